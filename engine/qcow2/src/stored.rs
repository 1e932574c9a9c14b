//! The bitmaps of an open image: loaded when it is opened, marked as in use while it may be written to, and stored
//! again.
//!
//! What keeps a bitmap from ever saying too little, whenever the power is cut:
//!
//! * before the first write the directory says of each bitmap that it is in use, durably. That changes bits of the
//!   directory where it is, each in one sector, so whatever part of it gets there, the rest of the directory is as it
//!   was;
//! * to store, data and tables go to clusters that are free, then a new directory that refers to them; when all that is
//!   durable, with its refcounts, the header changes over to the new directory by one write of one sector
//!   ([`crate::update`]). Only after that the old clusters are given free ([`crate::frees`]).
//!
//! So a cut leaves the old directory, in which everything is in use, or the new one; and clusters that leak, at most.
//! Whoever opens an image in which bitmaps are in use knows that they say too little, unless there are notes of the
//! rest ([`crate::crash_safe`]); they stay so until they are removed.
//!
//! Nobody has to keep the bitmaps of an image that he opens: without [`BitmapStore::begin`] the first write clears the
//! bit that says that the bitmaps fit the image, as the format asks of programs that do not know bitmaps.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, MutexGuard, PoisonError, Weak};

use async_trait::async_trait;
use underlay_graph::bitmap::DirtyBitmap;
use underlay_graph::bitmaps::{BitmapStore, PlanBitmap, inconsistent};
use underlay_graph::{ByteRange, Cx, GraphError, IoError, NodeName, Result, WriteFlags};
use underlay_sys::Iov;

use crate::ahead::Ahead;
use crate::bitmap_writer::Writer;
use crate::bitmaps::{
    self, ALL_ONES, AUTO, BitmapError, GRANULARITY_BITS, IN_USE, MAX_BITMAP, MAX_NAME, StoredBitmap,
    bytes_of_bits,
};
use crate::crash_safe::{Missing, is_good};
use crate::extensions::{BitmapsExtension, MAX_BITMAP_DIRECTORY, MAX_BITMAPS, Region};
use crate::features;
use crate::header::{Header, Version};
use crate::live::Qcow2;
use crate::metadata::Owner;
use crate::update::{write_features, write_header};

/// Most memory for the bits of an image. A table may say "all set" without having anything in the file.
const MAX_MEMORY: u64 = 2 << 30;
/// Bits are read in pieces of this many bytes.
const PIECE: u64 = 1 << 20;

/// The bitmaps as the disk has them.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    /// The directory; without the marks that say that an image is open.
    pub(crate) entries: Vec<StoredBitmap>,
    /// What was loaded, until somebody begins to write.
    loaded: Vec<PlanBitmap>,
    /// Somebody keeps the bitmaps up to date.
    kept: bool,
    /// The directory on disk says of every bitmap that it is in use.
    pub(crate) marked: bool,
    /// The disk calls bitmaps good that are not to be relied on.
    distrusted: bool,
    /// What the disk has of which bits.
    pub(crate) written: Written,
}

/// By the names of bitmaps: the bits that were written, and how often they had been changed by then.
pub(crate) type Written = HashMap<String, (Weak<DirtyBitmap>, u64)>;

/// What the directory says of the bitmaps in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// They are as they should be, and nobody writes.
    Valid,
    /// Somebody writes.
    InUse,
}

impl Stored {
    /// The directory as the disk has it.
    pub(crate) fn directory(&self) -> Vec<StoredBitmap> {
        if self.marked { marked(&self.entries) } else { self.entries.clone() }
    }

    fn find(&self, name: &str) -> Option<&StoredBitmap> {
        self.entries.iter().find(|entry| entry.name == name)
    }
}

fn marked(entries: &[StoredBitmap]) -> Vec<StoredBitmap> {
    entries.iter().map(|entry| StoredBitmap { flags: entry.flags | IN_USE, ..entry.clone() }).collect()
}

/// Reads all bitmaps of an image that is being opened, and completes them by the notes in it. `distrusted`: whatever
/// the image says, they are not to be relied on.
pub(crate) async fn load(
    file: &Cx<'_>,
    header: &Header,
    ahead: Option<&Ahead>,
    distrusted: bool,
) -> std::result::Result<Stored, BitmapError> {
    let mut entries = bitmaps::read(file, header).await?;
    if distrusted {
        entries = marked(&entries);
    }
    let marked = !distrusted && entries.iter().all(|entry| entry.flags & IN_USE != 0);
    let mut names = HashSet::new();
    let mut loaded = Vec::with_capacity(entries.len());
    let mut memory = 0;
    let mut missing = Missing::new(ahead, header.virtual_size());
    let mut written = Written::new();
    for entry in &mut entries {
        if !names.insert(entry.name.clone()) {
            return Err(BitmapError::Twice(entry.name.clone()));
        }
        let granularity = 1 << entry.granularity_bits;
        // One that takes no room costs about this much.
        memory += 256 + header.virtual_size() / granularity / (1 << 17);
        if memory > MAX_MEMORY {
            return Err(BitmapError::TooMuch(MAX_MEMORY));
        }
        let was_in_use = entry.flags & IN_USE != 0;
        // Of a disk without length no bitmap can be kept.
        let inconsistent = !is_good(entry, ahead) || was_in_use && header.virtual_size() == 0;
        let bits = DirtyBitmap::new(header.virtual_size(), granularity);
        let mut changes = None;
        if !inconsistent {
            load_bits(file, header, entry, &bits, &mut memory).await?;
            // One that is in use may be of the disk before it got another size, and is written anew.
            changes = (!was_in_use).then(|| bits.changes());
            if entry.flags & AUTO != 0 {
                memory += missing.prepare(&bits);
                if memory > MAX_MEMORY {
                    return Err(BitmapError::TooMuch(MAX_MEMORY));
                }
                missing.add_to(&bits);
            }
            entry.flags &= !IN_USE;
        }
        let enabled = !inconsistent && entry.flags & AUTO != 0;
        let bitmap = PlanBitmap::new(&entry.name, bits, enabled);
        if let Some(changes) = changes {
            written.insert(entry.name.clone(), (Arc::downgrade(&bitmap.bits), changes));
        }
        loaded.push(PlanBitmap { persistent: true, inconsistent, ..bitmap });
    }
    Ok(Stored { entries, loaded, kept: false, marked, distrusted, written })
}

async fn load_bits(
    file: &Cx<'_>,
    header: &Header,
    entry: &StoredBitmap,
    bits: &DirtyBitmap,
    memory: &mut u64,
) -> std::result::Result<(), BitmapError> {
    let failed = |error| BitmapError::Bits { name: entry.name.clone(), error };
    let table = bitmaps::table(file, entry, header).await?;
    let (size, cluster) = (header.virtual_size(), header.cluster_size());
    let len = bytes_of_bits(size, entry.granularity_bits);
    // One that is in use may be of the disk before it got another size.
    if table.len() as u64 != len.div_ceil(cluster) && entry.flags & IN_USE == 0 {
        return Err(failed(IoError::EINVAL));
    }
    let places = (0..len.div_ceil(cluster)).zip(table);
    for (index, offset) in places.filter(|(_, offset)| *offset != 0) {
        let here = ByteRange::between(index * cluster, (index * cluster + cluster).min(len));
        *memory += here.len();
        if *memory > MAX_MEMORY {
            return Err(BitmapError::TooMuch(MAX_MEMORY));
        }
        if offset == ALL_ONES {
            let first = (here.start() * 8) << entry.granularity_bits;
            let end = u128::from(here.end() * 8) << entry.granularity_bits;
            bits.set(ByteRange::between(first, u64::try_from(end).unwrap_or(u64::MAX).min(size)));
            continue;
        }
        let mut rest = here;
        while !rest.is_empty() {
            let (piece, later) = rest.split(PIECE);
            let place = ByteRange::new(offset + (piece.start() - here.start()), piece.len());
            let into = Iov::scratch(piece.buffer_len());
            file.read(place.ok_or(failed(IoError::EIO))?, into.clone()).await.map_err(failed)?;
            bits.load_words(piece.start() * 8, &words_of(&into.to_vec()));
            rest = later;
        }
    }
    Ok(())
}

/// Bytes of bits as words.
fn words_of(bytes: &[u8]) -> Vec<u64> {
    let (whole, rest) = bytes.as_chunks::<8>();
    let rest = rest.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    whole.iter().map(|bytes| u64::from_le_bytes(*bytes)).chain([rest]).collect()
}

impl Qcow2 {
    pub(crate) fn stored(&self) -> MutexGuard<'_, Stored> {
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the disk can be `size` bytes long: the bitmaps change with it, so they must be known, and be possible
    /// then.
    pub fn check_bitmaps_can_be_resized(&self, size: u64) -> Result<()> {
        // Nobody asks when a disk that is elsewhere gets another size.
        let is_tied = self.header().extensions.is_tied();
        let stored = self.stored();
        let is_unknown = |entry: &&StoredBitmap| entry.flags & IN_USE != 0;
        if let Some(entry) = stored.entries.iter().find(is_unknown).filter(|_| !is_tied) {
            return Err(inconsistent(&entry.name));
        }
        let too_large = |entry: &&StoredBitmap| bytes_of_bits(size, entry.granularity_bits) > MAX_BITMAP;
        if let Some(entry) = stored.entries.iter().find(too_large) {
            let text = format!("Bitmap '{}' would be too large for the image to keep it", entry.name);
            return Err(IoError::EFBIG.with(text));
        }
        match stored.entries.is_empty() || stored.kept {
            true => Ok(()),
            false => Err(IoError::ENOTSUP.with("The image has bitmaps that nobody keeps up to date")),
        }
    }

    /// Before the first write: what the image says of its bitmaps must hold whatever is written. The turn of
    /// `stored_turn` is the caller's.
    pub(crate) async fn settle_bitmaps(&self, cx: &Cx<'_>) -> Result<()> {
        if self.stored().kept {
            return self.mark_bitmaps(cx).await;
        }
        self.take_back(cx, features::BITMAPS | features::DIRTY_REGIONS).await
    }

    /// Takes some auto-clear bits out of the header; durable on return.
    async fn take_back(&self, cx: &Cx<'_>, promises: u64) -> Result<()> {
        let _turn = self.header_turn.lock().await;
        let header = self.header();
        if header.autoclear & promises != 0 {
            let autoclear = header.autoclear & !promises;
            write_features(&cx.below(), &Header { autoclear, ..header }).await?;
            self.header_mut().autoclear = autoclear;
            self.notice_notes();
        }
        Ok(())
    }

    /// Marks all bitmaps in the directory as in use; durable on return.
    async fn mark_bitmaps(&self, cx: &Cx<'_>) -> Result<()> {
        let entries = {
            let mut stored = self.stored();
            let is_marked = stored.entries.iter().all(|entry| entry.flags & IN_USE != 0);
            if stored.marked || is_marked && !stored.distrusted {
                stored.marked = true;
                return Ok(());
            }
            marked(&stored.entries)
        };
        let Some(BitmapsExtension { directory, .. }) = self.header().extensions.bitmaps else {
            return Ok(());
        };
        self.check_own_run(cx, directory.offset, directory.len, Owner::Bitmaps).await?;
        let bytes = bitmaps::serialise(&entries);
        let range = ByteRange::new(directory.offset, bytes.len() as u64).ok_or(IoError::EFBIG)?;
        cx.below().write(range, Iov::copy_of(&bytes), WriteFlags::default()).await?;
        cx.below().flush().await?;
        let mut stored = self.stored();
        (stored.marked, stored.distrusted) = (true, false);
        Ok(())
    }

    /// Takes the extension out of the header that belongs to bitmaps which do not fit the image any more.
    pub(crate) async fn drop_stale_bitmaps(&self, cx: &Cx<'_>) -> Result<()> {
        let _turn = self.header_turn.lock().await;
        let mut header = self.header();
        if header.drop_stale_bitmaps() {
            write_header(&cx.below(), &header).await?;
            *self.header_mut() = header;
        }
        Ok(())
    }

    /// Has the image keep these bitmaps, and no others. The turn of `stored_turn` is the caller's.
    pub(crate) async fn store_as(&self, cx: &Cx<'_>, bitmaps: &[PlanBitmap], state: State) -> Result<()> {
        let (old, mut written) = {
            let stored = self.stored();
            (stored.entries.clone(), stored.written.clone())
        };
        let mut writer = Writer::new(self, cx);
        let entries = match writer.bitmaps(&old, bitmaps, &mut written).await {
            Ok(entries) => entries,
            Err(error) => {
                writer.undo().await;
                return Err(error);
            }
        };
        let directory = if state == State::InUse { marked(&entries) } else { entries.clone() };
        self.change_directory(writer, &directory, state).await?;
        let kept: HashSet<u64> = entries.iter().map(|entry| entry.table_offset).collect();
        {
            let mut stored = self.stored();
            (stored.entries, stored.written) = (entries, written);
            stored.marked = state == State::InUse;
        }
        if state == State::Valid {
            // Whoever writes all the same marks them again first.
            self.forget_modified();
        }
        for entry in old.iter().filter(|entry| !kept.contains(&entry.table_offset)) {
            self.drop_bitmap(cx, entry).await;
        }
        Ok(())
    }

    /// Changes over to a directory of these bitmaps, whose tables and data come from `writer`. Durable on return, as is
    /// all that was written before. What is not in the new directory is the caller's to give free.
    async fn change_directory(
        &self,
        mut writer: Writer<'_>,
        entries: &[StoredBitmap],
        state: State,
    ) -> Result<()> {
        let old = self.header().extensions.bitmaps;
        let new = match self.write_directory(&mut writer, entries, state).await {
            Ok(new) => new,
            Err(error) => {
                if self.usable().is_ok() {
                    writer.undo().await;
                }
                return Err(error);
            }
        };
        let run = |extension: BitmapsExtension| {
            let Region { offset, len } = extension.directory;
            (offset, len.div_ceil(self.layout.cluster()))
        };
        let bits = self.layout.cluster_bits;
        if let Some((offset, count)) = new.map(run) {
            self.metadata_mut().add(offset >> bits, count, Owner::Bitmaps);
        }
        if let Some((offset, count)) = old.map(run) {
            self.metadata_mut().remove(offset >> bits, count);
            self.drop_clusters(offset, count, false);
        }
        Ok(())
    }

    async fn write_directory(
        &self,
        writer: &mut Writer<'_>,
        entries: &[StoredBitmap],
        state: State,
    ) -> Result<Option<BitmapsExtension>> {
        let count = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        let bytes = bitmaps::serialise(entries);
        let len = bytes.len() as u64;
        if count > MAX_BITMAPS || len > MAX_BITMAP_DIRECTORY {
            return Err(IoError::EFBIG.with("Not enough space in the bitmap directory"));
        }
        let new = match count {
            0 => None,
            _ => Some(BitmapsExtension {
                count,
                directory: Region { offset: writer.put(bytes, false).await?, len },
            }),
        };
        writer.write_out().await?;
        self.write_refcounts(writer.cx).await?;
        self.name_directory(writer.cx, new, state).await?;
        Ok(new)
    }

    /// Writes the header with another directory, or without one.
    async fn name_directory(&self, cx: &Cx<'_>, new: Option<BitmapsExtension>, state: State) -> Result<()> {
        let edit = |header: &mut Header| {
            header.extensions.bitmaps = new;
            header.autoclear = match new {
                Some(_) => header.autoclear | features::BITMAPS,
                None => header.autoclear & !features::BITMAPS,
            };
            if new.is_none() || state == State::Valid {
                header.autoclear &= !features::DIRTY_REGIONS;
            }
        };
        self.switch_header(cx, edit).await?;
        self.notice_notes();
        Ok(())
    }

    /// The clusters of a bitmap are not needed any more: they must not be in the directory. What could not have been
    /// the bitmap's own is left alone.
    async fn drop_bitmap(&self, cx: &Cx<'_>, entry: &StoredBitmap) {
        let cluster = self.layout.cluster();
        let mut clusters = match bitmaps::data_clusters(&cx.below(), entry, &self.header()).await {
            Ok(clusters) => clusters,
            Err(error) => {
                tracing::warn!(%error, "clusters leaked");
                Vec::new()
            }
        };
        let table = (0..entry.table_bytes().div_ceil(cluster)).map(|i| entry.table_offset + i * cluster);
        clusters.extend(table);
        clusters.sort_unstable();
        clusters.dedup();
        clusters.retain(|offset| self.may_be_own(offset / cluster));
        for offset in clusters {
            self.drop_clusters(offset, 1, false);
        }
    }
}

fn refused(node: &NodeName, name: &str, why: &str) -> std::result::Result<(), GraphError> {
    Err(GraphError::new(format!("Can't make bitmap '{name}' persistent in '{node}': {why}")))
}

/// Whether an image of a disk of `size` bytes could keep one more bitmap beside the others of its `node`, only some of
/// which may be persistent.
pub fn check_new_bitmap(
    node: &NodeName,
    size: u64,
    others: &[PlanBitmap],
    name: &str,
    granularity: u64,
) -> std::result::Result<(), GraphError> {
    let refused = |why: &str| refused(node, name, why);
    if name.len() > MAX_NAME {
        return refused(&format!("Name length exceeds maximum ({MAX_NAME} characters)"));
    }
    if granularity > 1 << GRANULARITY_BITS.end() {
        return refused(&format!("Granularity exceeds maximum ({} bytes)", 1u64 << GRANULARITY_BITS.end()));
    }
    if granularity < 1 << GRANULARITY_BITS.start() {
        return refused(&format!(
            "Granularity is under minimum ({} bytes)",
            1u64 << GRANULARITY_BITS.start()
        ));
    }
    if bytes_of_bits(size, granularity.ilog2()) > MAX_BITMAP {
        return refused("Too much space will be occupied by the bitmap. Use larger granularity");
    }
    if size == 0 {
        return refused("The disk has no length");
    }
    let others = || others.iter().filter(|other| other.persistent);
    if others().count() as u64 >= u64::from(MAX_BITMAPS) {
        return refused("Maximum number of persistent bitmaps is already reached");
    }
    let used: u64 = others().map(|other| bitmaps::entry_len(other.name.len())).sum();
    if used + bitmaps::entry_len(name.len()) > MAX_BITMAP_DIRECTORY {
        return refused("Not enough space in the bitmap directory");
    }
    Ok(())
}

#[async_trait]
impl BitmapStore for Qcow2 {
    fn loaded(&self) -> Vec<PlanBitmap> {
        self.stored().loaded.clone()
    }

    fn check_new(
        &self,
        cx: &Cx<'_>,
        others: &[PlanBitmap],
        name: &str,
        granularity: u64,
    ) -> std::result::Result<(), GraphError> {
        let node = cx.view().name();
        let mut header = self.header();
        if header.version < Version::V3 {
            return refused(node, name, "Cannot store dirty bitmaps in qcow2 v2 files");
        }
        check_new_bitmap(node, self.size(), others, name, granularity)?;
        let place = BitmapsExtension { count: 1, directory: Region { offset: 0, len: 0 } };
        header.extensions.bitmaps.get_or_insert(place);
        match header.serialise() {
            Ok(_) => Ok(()),
            Err(_) => refused(node, name, "There is no room for it in the header"),
        }
    }

    async fn begin(&self, cx: &Cx<'_>) -> Result<()> {
        let _turn = self.stored_turn.lock().await;
        {
            let mut stored = self.stored();
            stored.kept = true;
            stored.loaded.clear();
        }
        if self.stored().distrusted {
            self.take_back(cx, features::DIRTY_REGIONS).await?;
        }
        self.begin_notes(cx).await?;
        self.mark_bitmaps(cx).await
    }

    async fn store(&self, cx: &Cx<'_>, bitmaps: &[PlanBitmap]) -> Result<()> {
        let _turn = self.stored_turn.lock().await;
        self.usable()?;
        let old = self.stored().entries.clone();
        if old.is_empty() && bitmaps.is_empty() {
            return Ok(());
        }
        if !self.is_writable() {
            return Err(IoError::EPERM);
        }
        self.store_as(cx, bitmaps, State::Valid).await
    }

    fn is_stored(&self) -> bool {
        !self.stored().marked
    }

    fn has(&self, name: &str) -> bool {
        self.stored().find(name).is_some()
    }

    async fn remove(&self, cx: &Cx<'_>, name: &str) -> Result<()> {
        self.begin_change(cx).await?;
        let _turn = self.stored_turn.lock().await;
        let (gone, rest, on_disk) = {
            let stored = self.stored();
            let Some(gone) = stored.find(name).cloned() else { return Ok(()) };
            let rest: Vec<_> = stored.entries.iter().filter(|entry| entry.name != name).cloned().collect();
            let on_disk = if stored.marked { marked(&rest) } else { rest.clone() };
            (gone, rest, on_disk)
        };
        self.change_directory(Writer::new(self, cx), &on_disk, State::InUse).await?;
        self.stored().entries = rest;
        self.drop_bitmap(cx, &gone).await;
        self.commit(cx).await
    }

    async fn refresh(&self, cx: &Cx<'_>, bitmaps: &[PlanBitmap]) -> Result<()> {
        if bitmaps.is_empty() || !self.can_take_notes() {
            return Ok(());
        }
        self.begin_change(cx).await?;
        let _turn = self.stored_turn.lock().await;
        self.store_with_notes(cx, bitmaps).await
    }

    fn is_worth_refreshing(&self) -> bool {
        self.usable().is_ok() && self.ahead().is_some_and(Ahead::has_news)
    }

    fn covers(&self, range: ByteRange) -> bool {
        self.ahead().is_none_or(|ahead| ahead.covers(range))
    }

    async fn cover(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        match self.ahead() {
            Some(ahead) => ahead.cover(&cx.below(), range).await,
            None => Ok(()),
        }
    }
}

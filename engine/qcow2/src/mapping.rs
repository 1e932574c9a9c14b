//! From guest offsets to places in the file.
//!
//! The L1 table is in memory, slices of L2 tables are in the cache. The fast way ([`Qcow2::map_now`]) answers from
//! memory alone; the slow way ([`Qcow2::map_slow`]) loads the slice that was missing, and reports what is wrong with an
//! entry. Answers never cross a slice, except that neighbouring unallocated tables are one answer, and so are
//! neighbouring slices of zeroes in memory.

use std::collections::BTreeSet;
use std::sync::{PoisonError, RwLockReadGuard, RwLockWriteGuard};

use underlay_graph::{ByteRange, Cx, Extent, IoError, Place, Result, WriteFlags};
use underlay_sys::Iov;

use crate::entry::{Bad, COPIED, Entry, Layout, OFFSET, Sub};
use crate::live::{Corruption, Qcow2, hex};
use crate::words::{Words, to_bytes};

/// Entries in a sector of the L1 table: what is written as one piece.
const SECTOR_ENTRIES: usize = 64;
/// Most slices that are loaded together: 64 KiB.
const AHEAD: u64 = 16;
/// Most bytes of refcounts that are read to find out whether an image is preallocated.
const MAX_REFCOUNTS: u64 = 64 << 20;

/// The active L1 table.
#[derive(Debug)]
pub struct L1 {
    /// Where it is in the file.
    pub(crate) offset: u64,
    pub(crate) entries: Vec<u64>,
    /// Sectors that differ from the disk.
    dirty: BTreeSet<usize>,
}

impl L1 {
    pub(crate) fn new(offset: u64, entries: Vec<u64>) -> Self {
        Self { offset, entries, dirty: BTreeSet::new() }
    }

    /// The entry at `index`; 0 behind the end.
    pub(crate) fn get(&self, index: u64) -> u64 {
        usize::try_from(index).ok().and_then(|index| self.entries.get(index)).copied().unwrap_or(0)
    }

    pub(crate) fn set(&mut self, index: u64, entry: u64) {
        if let Some((index, slot)) =
            usize::try_from(index).ok().and_then(|index| Some((index, self.entries.get_mut(index)?)))
        {
            *slot = entry;
            self.dirty.insert(index / SECTOR_ENTRIES);
        }
    }

    /// Copies of the sectors that differ from the disk, with their offsets in the file.
    pub(crate) fn take_dirty(&mut self) -> Vec<(u64, Vec<u8>)> {
        let sectors = std::mem::take(&mut self.dirty);
        let copy = |sector: usize| {
            let end = self.entries.len().min((sector + 1) * SECTOR_ENTRIES);
            let mut bytes = to_bytes(&self.entries[sector * SECTOR_ENTRIES..end]);
            bytes.resize(SECTOR_ENTRIES * 8, 0);
            (self.offset + (sector * SECTOR_ENTRIES * 8) as u64, bytes)
        };
        sectors.into_iter().map(copy).collect()
    }

    /// What [`L1::take_dirty`] gave could not be written.
    pub(crate) fn dirty_again(&mut self, copies: &[(u64, Vec<u8>)]) {
        for (offset, _) in copies {
            let sector = offset.saturating_sub(self.offset) / (SECTOR_ENTRIES as u64 * 8);
            self.dirty.extend(usize::try_from(sector));
        }
    }
}

/// The extent of the first bytes of `range`, which does not leave this slice. `None` for an entry that cannot be true.
/// With `kept` it also tells where room is kept for what has no data, and ends where that does not go on.
fn extent_in(layout: &Layout, slice: &[u64], range: ByteRange, kept: bool) -> Option<Extent> {
    let blank = blank_in(layout, slice, range);
    if blank > 0 {
        return Some(Extent::new(Place::Below, blank));
    }
    let sub_bits = layout.sub_bits();
    let cluster_mask = layout.cluster() - 1;
    let mut at = range.start();
    let mut found: Option<(Sub, Option<u64>)> = None;
    while at < range.end() {
        let entry = layout.get(slice, layout.entry_in_slice(at));
        layout.check(entry).ok()?;
        let host = layout.host(entry);
        let cluster_end = (at | cluster_mask) + 1;
        while at < range.end() && at < cluster_end {
            let sub = u32::try_from((at & cluster_mask) >> sub_bits).unwrap_or(0);
            let state = layout.sub_state(entry, if layout.extended { sub } else { 0 });
            let told = state == Sub::Data || (kept && host != 0);
            let here = told.then(|| host.wrapping_add(at & cluster_mask));
            match found {
                None => found = Some((state, here)),
                Some((kind, start)) => {
                    let follows = here == start.map(|start| start + (at - range.start()));
                    if kind != state || !follows {
                        return answer(found, at - range.start());
                    }
                }
            }
            at = ((at >> sub_bits) + 1) << sub_bits;
        }
    }
    answer(found, range.len())
}

/// How much of `range` has entries of zeroes only, from its start on: what most of a sparse disk has.
fn blank_in(layout: &Layout, slice: &[u64], range: ByteRange) -> u64 {
    let (first, last) = (layout.entry_in_slice(range.start()), layout.entry_in_slice(range.end() - 1));
    let words = layout.words();
    let Some(words) = slice.get(first * words..(last + 1) * words) else { return 0 };
    let sixteens =
        words.chunks_exact(16).take_while(|chunk| chunk.iter().fold(0, |all, word| all | word) == 0);
    let so_far = sixteens.count() * 16;
    let rest = words[so_far..].iter().take_while(|word| **word == 0).count();
    let entries = ((so_far + rest) / layout.words()) as u64;
    let end = ((range.start() >> layout.cluster_bits) + entries) << layout.cluster_bits;
    if entries == 0 { 0 } else { range.before(end).len() }
}

fn answer(found: Option<(Sub, Option<u64>)>, len: u64) -> Option<Extent> {
    let (kind, start) = found?;
    let (place, kept) = match (kind, start) {
        (Sub::Data, Some(start)) => (Place::Data(start), None),
        (Sub::Data, None) => return None,
        (Sub::Below, kept) => (Place::Below, kept),
        (Sub::Zero, kept) => (Place::Zero, kept),
        (Sub::Compressed, _) => (Place::Encoded, None),
    };
    Some(Extent { kept, ..Extent::new(place, len) })
}

impl Qcow2 {
    pub(crate) fn l1(&self) -> RwLockReadGuard<'_, L1> {
        self.l1.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn l1_mut(&self) -> RwLockWriteGuard<'_, L1> {
        self.l1.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The part of `range` that the slice of its first byte maps.
    pub(crate) fn in_slice(&self, range: ByteRange) -> ByteRange {
        let bits = self.layout.slice_reach_bits();
        range.before(((range.start() >> bits) + 1) << bits)
    }

    /// The answer to `map`, if it is in memory and true.
    pub(crate) fn map_now(&self, range: ByteRange) -> Option<Extent> {
        self.look(range, false)
    }

    /// [`Qcow2::map_now`], if asked for with the room that is kept.
    fn look(&self, range: ByteRange, kept: bool) -> Option<Extent> {
        let slice = self.layout.slice_of(range.start());
        let here = self.in_slice(range);
        match self.l2.view(slice, |words| extent_in(&self.layout, words, here, kept)) {
            Some(Some(extent))
                if extent.place == Place::Below && extent.kept.is_none() && extent.len == here.len() =>
            {
                Some(Extent { len: self.with_blanks(slice, range, extent.len), ..extent })
            }
            Some(found) => found,
            None => self.unallocated(range),
        }
    }

    /// `len` bytes of `range` in this slice are below; how many are with those of the next slices.
    fn with_blanks(&self, mut slice: u64, range: ByteRange, mut len: u64) -> u64 {
        let reach = 1 << self.layout.slice_reach_bits();
        while len < range.len() && self.l2.is_blank(slice + 1) {
            slice += 1;
            len = range.len().min(len + reach);
        }
        len
    }

    /// How far there is no L2 table.
    fn unallocated(&self, range: ByteRange) -> Option<Extent> {
        let bits = self.layout.table_reach_bits();
        let first = range.start() >> bits;
        let last = (range.end() - 1) >> bits;
        let l1 = self.l1();
        let mut index = first;
        while index <= last && l1.get(index) & OFFSET == 0 {
            index += 1;
        }
        if index == first {
            return None;
        }
        let end = index.checked_shl(bits).filter(|_| index <= last).unwrap_or(range.end());
        Some(Extent::new(Place::Below, range.before(end).len()))
    }

    /// The answer to `map`, whatever it takes.
    pub(crate) async fn map_slow(&self, cx: &Cx<'_>, range: ByteRange) -> Result<Extent> {
        self.look_slowly(cx, range, false).await
    }

    async fn look_slowly(&self, cx: &Cx<'_>, range: ByteRange, kept: bool) -> Result<Extent> {
        let slice = self.layout.slice_of(range.start());
        loop {
            self.usable()?;
            if let Some(extent) = self.look(range, kept) {
                return Ok(extent);
            }
            let here = self.in_slice(range);
            match self.l2.view(slice, |words| bad_entry(&self.layout, words, here)) {
                // Evicted, or never there.
                None => self.load_slices(cx, range).await?,
                Some(None) => {}
                Some(Some((guest, bad))) => return Err(self.bad_l2_entry(cx, guest, bad).await),
            }
        }
    }

    /// The answer to `map` for those who want to know everything: whether the file may have holes below the data, and
    /// where room is kept for what has none.
    pub(crate) async fn map_fully(&self, cx: &Cx<'_>, range: ByteRange) -> Result<Extent> {
        let mut extent = self.look_slowly(cx, range, true).await?;
        if matches!(extent.place, Place::Data(_)) {
            extent.recurse = self.is_preallocated(cx).await;
        }
        Ok(extent)
    }

    /// The answer of [`Qcow2::map_fully`], if it is in memory and true.
    pub(crate) fn map_fully_now(&self, range: ByteRange) -> Option<Extent> {
        let mut extent = self.look(range, true)?;
        if matches!(extent.place, Place::Data(_)) {
            extent.recurse = *self.preallocated.get()?;
        }
        Some(extent)
    }

    /// The answers of [`Qcow2::map_fully_now`] for the slice of the first byte of `range`, one after another.
    pub(crate) fn map_slice(&self, range: ByteRange, answers: &mut Vec<Extent>) {
        let Some(recurse) = self.preallocated.get().copied().filter(|_| !range.is_empty()) else { return };
        let mut rest = self.in_slice(range);
        self.l2.view(self.layout.slice_of(range.start()), |words| {
            while !rest.is_empty()
                && let Some(mut extent) = extent_in(&self.layout, words, rest, true)
            {
                extent.recurse = recurse && matches!(extent.place, Place::Data(_));
                rest = rest.split(extent.len).1;
                answers.push(extent);
            }
        });
    }

    /// Whether the image has far more clusters than its file has bytes on the medium: made with preallocated metadata.
    /// Found out once. The measure (a ninth more, and at least two) is QEMU's: found by filling the holes of such
    /// images one by one until `qemu-img map` says otherwise.
    async fn is_preallocated(&self, cx: &Cx<'_>) -> bool {
        if let Some(known) = self.preallocated.get() {
            return *known;
        }
        let bits = self.layout.cluster_bits;
        let real = cx.below().node().allocated_size().map(|bytes| bytes >> bits);
        let far_more = |clusters: u64| {
            real.is_some_and(|real| clusters >= (real.saturating_mul(10) / 9).max(real.saturating_add(2)))
        };
        let answer = far_more(cx.below().length() >> bits)
            && matches!(self.used_clusters(cx, MAX_REFCOUNTS).await, Ok(Some(used)) if far_more(used));
        *self.preallocated.get_or_init(|| answer)
    }

    pub(crate) async fn bad_l2_entry(&self, cx: &Cx<'_>, guest: u64, bad: Bad) -> IoError {
        let layout = &self.layout;
        let table = self.l1().get(guest >> layout.table_reach_bits()) & OFFSET;
        let index = hex((guest >> layout.cluster_bits) & ((1 << layout.l2_bits) - 1));
        let message = match bad {
            Bad::Unaligned(host) => format!(
                "Cluster allocation offset {host:#x} unaligned (L2 offset: {table:#x}, L2 index: {index})"
            ),
            Bad::Map => {
                // Two blanks, as QEMU has them.
                format!("Invalid cluster entry found  (L2 offset: {table:#x}, L2 index: {index})")
            }
        };
        self.corruption(cx, Corruption { message, offset: None, size: None, fatal: true }).await
    }

    /// As [`Self::bad_l2_entry`], for a change.
    async fn bad_target(&self, cx: &Cx<'_>, guest: u64, bad: Bad) -> IoError {
        let Bad::Unaligned(host) = bad else { return self.bad_l2_entry(cx, guest, bad).await };
        let message = format!("Data cluster offset {host:#x} unaligned (guest offset: {})", hex(guest));
        self.corruption(cx, Corruption { message, offset: None, size: None, fatal: true }).await
    }

    /// Where a slice is in the file, or `None` without an L2 table. A table in an impossible place is corruption.
    pub(crate) async fn slice_place(&self, cx: &Cx<'_>, slice: u64) -> Result<Option<u64>> {
        let index = self.layout.l1_of_slice(slice);
        let table = self.l1().get(index) & OFFSET;
        if table == 0 {
            return Ok(None);
        }
        if table & (self.layout.cluster() - 1) != 0 {
            let message = format!("L2 table offset {table:#x} unaligned (L1 index: {})", hex(index));
            let found = Corruption { message, offset: None, size: None, fatal: true };
            return Err(self.corruption(cx, found).await);
        }
        Ok(Some(table + self.layout.slice_in_table(slice)))
    }

    /// Loads the slice of the first byte of `range`. Who asks about more than that slice maps will ask for the next
    /// ones too: they are read together, as far as the table goes.
    async fn load_slices(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        let layout = &self.layout;
        let first = layout.slice_of(range.start());
        let in_table = 1 << (layout.l2_bits - layout.slice_bits);
        // No more than there is room for, or the first would be gone again.
        let ahead = AHEAD.min(self.l2.capacity() as u64);
        let last = layout.slice_of(range.end() - 1).min(first | (in_table - 1)).min(first + ahead - 1);
        if first == last {
            return self.load_slice(cx, first).await;
        }
        let _turns = self.loads.lock_run(first, last).await;
        // The others may be changed, written and evicted while the disk is read: what was read of them is too old then.
        let missing = |slice: &u64| self.l2.view(*slice, |_| ()).is_none();
        let missing: Vec<u64> = (first..=last).filter(missing).collect();
        if missing.first() != Some(&first) {
            return Ok(());
        }
        let Some(at) = self.slice_place(cx, first).await? else { return Ok(()) };
        let each = layout.slice_bytes();
        let place = ByteRange::new(at, each * (last - first + 1)).ok_or(IoError::EIO)?;
        let buffer = Iov::scratch(place.buffer_len());
        cx.below().read(place, buffer.clone()).await?;
        let bytes = buffer.to_vec();
        let slices: Vec<_> = (first..=last).zip(bytes.chunks_exact(layout.slice_words() * 8)).collect();
        // The first comes last: it is not evicted for the others.
        for (slice, bytes) in slices.into_iter().rev().filter(|(slice, _)| missing.contains(slice)) {
            self.l2.insert(slice, Words::from_bytes(bytes));
        }
        Ok(())
    }

    /// Makes sure that a slice is in the cache, unless it has no table or was evicted again at once.
    pub(crate) async fn load_slice(&self, cx: &Cx<'_>, slice: u64) -> Result<()> {
        let _turn = self.loads.lock(slice).await;
        if self.l2.view(slice, |_| ()).is_some() {
            return Ok(());
        }
        let Some(at) = self.slice_place(cx, slice).await? else { return Ok(()) };
        let range = ByteRange::new(at, self.layout.slice_bytes()).ok_or(IoError::EIO)?;
        let buffer = Iov::scratch(range.buffer_len());
        cx.below().read(range, buffer.clone()).await?;
        self.l2.insert(slice, Words::from_bytes(&buffer.to_vec()));
        Ok(())
    }

    /// The entry of a guest offset; the default entry when there is no table.
    pub(crate) async fn entry_at(&self, cx: &Cx<'_>, guest: u64) -> Result<Entry> {
        let slice = self.layout.slice_of(guest);
        loop {
            let index = self.layout.entry_in_slice(guest);
            if let Some(entry) = self.l2.view(slice, |words| self.layout.get(words, index)) {
                return Ok(entry);
            }
            if self.l1().get(self.layout.l1_of_slice(slice)) & OFFSET == 0 {
                return Ok(Entry::default());
            }
            self.load_slice(cx, slice).await?;
        }
    }

    /// All entries that `range` (inside one slice) touches, checked. Empty when there is no table.
    pub(crate) async fn entries(&self, cx: &Cx<'_>, range: ByteRange) -> Result<Vec<Entry>> {
        let layout = self.layout;
        let slice = layout.slice_of(range.start());
        let (first, last) = (layout.entry_in_slice(range.start()), layout.entry_in_slice(range.end() - 1));
        loop {
            let copy = |words: &[u64]| (first..=last).map(|i| layout.get(words, i)).collect::<Vec<_>>();
            let Some(entries) = self.l2.view(slice, copy) else {
                if self.l1().get(layout.l1_of_slice(slice)) & OFFSET == 0 {
                    return Ok(Vec::new());
                }
                self.load_slice(cx, slice).await?;
                continue;
            };
            for (i, entry) in entries.iter().enumerate() {
                if let Err(bad) = layout.check(*entry) {
                    let cluster = (range.start() >> layout.cluster_bits) + i as u64;
                    let guest = range.start().max(cluster << layout.cluster_bits);
                    return Err(self.bad_target(cx, guest, bad).await);
                }
            }
            return Ok(entries);
        }
    }

    /// Changes entries of the slice that maps `guest`; its table must exist. `change` may be called only once.
    pub(crate) async fn update_slice<R>(
        &self,
        cx: &Cx<'_>,
        guest: u64,
        mut change: impl FnMut(&mut [u64]) -> R,
    ) -> Result<R> {
        let slice = self.layout.slice_of(guest);
        loop {
            if let Some(result) = self.l2.update(slice, &mut change) {
                return Ok(result);
            }
            self.load_slice(cx, slice).await?;
        }
    }

    /// Makes sure that the L2 table for `guest` exists and may be written to.
    pub(crate) async fn ensure_table(&self, cx: &Cx<'_>, guest: u64) -> Result<()> {
        let index = guest >> self.layout.table_reach_bits();
        if self.l1().get(index) & COPIED != 0 {
            return self.check_own_table(cx, index).await;
        }
        let _turn = self.tables.lock(index).await;
        let old = self.l1().get(index);
        if old & COPIED != 0 {
            return Ok(());
        }
        if index >= self.l1().entries.len() as u64 {
            return Err(IoError::EIO.with("L1 table is too small"));
        }
        self.check_own_l1(cx).await?;
        // The new table is complete on its way to the disk before L1 knows it, so the barrier of the commit that
        // writes the L1 entry makes it durable first.
        let cluster = ByteRange::new(old & OFFSET, self.layout.cluster()).ok_or(IoError::EIO)?;
        let content = Iov::zeroed(cluster.buffer_len());
        if old & OFFSET != 0 {
            self.slice_place(cx, index << (self.layout.l2_bits - self.layout.slice_bits)).await?;
            cx.below().read(cluster, content.clone()).await?;
        }
        let host = self.alloc_clusters(cx, 1).await?.host;
        let place = ByteRange::between(host, host + self.layout.cluster());
        if let Err(error) = cx.below().write(place, content, WriteFlags::default()).await {
            self.free_unused(cx, host, 1).await;
            return Err(error);
        }
        self.metadata_mut().add_table(host >> self.layout.cluster_bits);
        self.l1_mut().set(index, COPIED | host);
        if old & OFFSET != 0 {
            self.metadata_mut().leave_table((old & OFFSET) >> self.layout.cluster_bits);
            self.drop_clusters(old & OFFSET, 1, false);
        }
        Ok(())
    }
}

/// The first entry in the way of `range` that cannot be true, with its guest offset.
fn bad_entry(layout: &Layout, slice: &[u64], range: ByteRange) -> Option<(u64, Bad)> {
    let mut at = range.start();
    while at < range.end() {
        if let Err(bad) = layout.check(layout.get(slice, layout.entry_in_slice(at))) {
            return Some((at, bad));
        }
        at = (at | (layout.cluster() - 1)) + 1;
    }
    None
}

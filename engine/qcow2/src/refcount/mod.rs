//! Who owns which host cluster: reference counts, and finding free clusters.
//!
//! Allocation takes the lowest free clusters from a moving hint on; freeing lowers the hint: QEMU's policy, so that the
//! same requests give the same image byte by byte. The refcount table is in memory; slices of refcount blocks are in a
//! cache. Which slices have no free cluster is remembered, so that a search never looks at one of them twice.
//!
//! What a search decides it decides under one plain lock, without I/O; when it needs a slice that is not in the
//! cache, or a refcount block that does not exist, it says so, and starts again when that has been provided.

mod growth;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use underlay_graph::{ByteRange, Cx, IoError, Result};
use underlay_sys::Iov;

use crate::cache::SliceCache;
use crate::entry::MAX_HOST;
use crate::header::Header;
use crate::live::{Corruption, Qcow2, Stripes, hex};
use crate::words::{Words, to_bytes, to_words};

/// Bits of a refcount table entry that hold an offset.
const TABLE_OFFSET: u64 = !511;
/// Bytes of a slice of a refcount block, or the cluster size if that is less.
const SLICE: u64 = 4096;
/// Entries in a sector of the refcount table.
const SECTOR_ENTRIES: usize = 64;

/// Clusters that now belong to the caller. Offsets in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Allocated {
    /// Offset of the first.
    pub host: u64,
    /// They have never been used, lie behind the end of the file, and read as zeroes for it.
    pub fresh: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Refcounts {
    /// log2 of a refcount's width in bits.
    order: u32,
    cluster_bits: u32,
    /// log2 of the refcounts in a block, and in a slice.
    block_bits: u32,
    slice_bits: u32,
    pub(crate) cache: SliceCache,
    state: Mutex<State>,
    /// No cluster from here on was ever used.
    end: AtomicU64,
    /// Held while blocks are made or the table grows.
    growth: tokio::sync::Mutex<()>,
    loads: Stripes,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    offset: u64,
    /// Offsets of the blocks; 0 = none, all counts are 0.
    pub(crate) table: Vec<u64>,
    /// Sectors of the table that differ from the disk.
    dirty: BTreeSet<usize>,
    /// No free cluster below this is looked for.
    hint: u64,
    /// One bit for each slice: no free cluster in it.
    full: Vec<u64>,
    /// Counts what makes a search that stopped begin anew: clusters taken or freed, blocks made.
    changes: u64,
    /// Where the next compressed cluster may go; 0 = nowhere in particular.
    pub(crate) packed: u64,
    loaded: bool,
}

/// Where a search stopped for a slice to be loaded. Everybody who searches keeps an own one: several who share one
/// would send each other back to the start for ever, if the cache does not hold all that lies between.
#[derive(Clone, Copy)]
struct Stopped {
    /// The state's, then.
    changes: u64,
    /// Start of the free run.
    start: u64,
    /// Position.
    at: u64,
}

/// What a search came to.
enum Try {
    /// The number of the first cluster.
    Done(Allocated),
    /// This slice must be loaded first.
    Load(u64),
    /// This block must be made first; then look again from this cluster.
    Missing { block: u64, from: u64 },
    /// The end of what can be addressed.
    TooFar,
}

impl State {
    fn is_full(&self, slice: u64) -> bool {
        let word = usize::try_from(slice / 64).ok().and_then(|i| self.full.get(i)).copied().unwrap_or(0);
        word >> (slice % 64) & 1 == 1
    }

    fn set_full(&mut self, slice: u64, full: bool) {
        let Ok(index) = usize::try_from(slice / 64) else { return };
        if index >= self.full.len() {
            if !full {
                return;
            }
            self.full.resize(index + 1, 0);
        }
        let bit = 1 << (slice % 64);
        self.full[index] = if full { self.full[index] | bit } else { self.full[index] & !bit };
    }

    fn block(&self, block: u64) -> Option<u64> {
        let offset = *self.table.get(usize::try_from(block).ok()?)? & TABLE_OFFSET;
        (offset != 0).then_some(offset)
    }
}

impl Refcounts {
    pub(crate) fn new(header: &Header, slices: impl Fn(u64) -> usize) -> Self {
        let slice = SLICE.min(header.cluster_size());
        Self {
            order: header.refcount_order,
            cluster_bits: header.cluster_bits,
            block_bits: header.cluster_bits + 3 - header.refcount_order,
            slice_bits: slice.ilog2() + 3 - header.refcount_order,
            cache: SliceCache::new(slices(slice)),
            state: Mutex::default(),
            end: AtomicU64::new(0),
            growth: tokio::sync::Mutex::default(),
            loads: Stripes::new(),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Offsets of all refcount blocks.
    pub(crate) fn blocks(&self) -> Vec<u64> {
        self.state().table.iter().map(|entry| entry & TABLE_OFFSET).filter(|&block| block != 0).collect()
    }

    /// Number of the first cluster that was never used.
    pub(crate) fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// The file ends in front of this cluster.
    pub(crate) fn set_end(&self, end: u64) {
        self.end.fetch_max(end, Ordering::AcqRel);
    }

    /// Largest count that can be stored.
    pub(crate) fn max(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.order))
    }

    fn get(&self, slice: &[u64], index: u64) -> u64 {
        let (word, shift) = self.position(index);
        slice[word] >> shift & self.max()
    }

    fn set(&self, slice: &mut [u64], index: u64, count: u64) {
        let (word, shift) = self.position(index);
        slice[word] = slice[word] & !(self.max() << shift) | count << shift;
    }

    /// Counts of less than a byte fill bytes from the lowest bits up; wider ones are big endian.
    fn position(&self, index: u64) -> (usize, u32) {
        let bit = (index & ((1 << self.slice_bits) - 1)) << self.order;
        let word = usize::try_from(bit / 64).unwrap_or(usize::MAX);
        let bit = u32::try_from(bit % 64).unwrap_or(0);
        let width = 1u32 << self.order;
        let shift = if width >= 8 { 64 - width - bit } else { 56 - (bit & !7) + (bit & 7) };
        (word, shift)
    }

    /// Bytes of a slice.
    pub(crate) fn slice_bytes(&self) -> u64 {
        1 << (self.slice_bits + self.order - 3)
    }

    /// Where a slice is in the file, if its block exists.
    pub(crate) fn slice_place(&self, slice: u64) -> Option<u64> {
        let per_block = self.block_bits - self.slice_bits;
        let block = self.state().block(slice >> per_block)?;
        let bytes = self.slice_bytes();
        Some(block + (slice & ((1 << per_block) - 1)) * bytes)
    }

    /// Copies of the changed sectors of the table, with their offsets in the file.
    pub(crate) fn take_dirty_table(&self) -> Vec<(u64, Vec<u8>)> {
        let mut state = self.state();
        let sectors = std::mem::take(&mut state.dirty);
        let copy = |sector: usize| {
            let from = sector * SECTOR_ENTRIES;
            let to = state.table.len().min(from + SECTOR_ENTRIES);
            (state.offset + (from * 8) as u64, to_bytes(&state.table[from..to]))
        };
        sectors.into_iter().map(copy).collect()
    }

    /// These could not be written.
    pub(crate) fn table_dirty_again(&self, copies: &[(u64, Vec<u8>)]) {
        let mut state = self.state();
        for (at, _) in copies {
            let sector = at.saturating_sub(state.offset) / (SECTOR_ENTRIES as u64 * 8);
            state.dirty.extend(usize::try_from(sector));
        }
    }

    /// Finds `wanted` free clusters in a row and takes them.
    fn try_take(&self, wanted: u64, stopped: &mut Option<Stopped>) -> Try {
        let mut state = self.state();
        let first = match self.find(&mut state, wanted, stopped) {
            Ok(first) => first,
            Err(other) => return other,
        };
        let end = first + wanted;
        if end > MAX_HOST >> self.cluster_bits {
            return Try::TooFar;
        }
        for block in first >> self.block_bits..=(end - 1) >> self.block_bits {
            if state.block(block).is_none() {
                // The block goes behind the clusters that wait for it.
                state.hint = end;
                return Try::Missing { block, from: first };
            }
        }
        let slices = first >> self.slice_bits..=(end - 1) >> self.slice_bits;
        for slice in slices.clone() {
            // Dirty slices stay in the cache, however small it is, until all of them are there.
            if self.cache.update(slice, |_| ()).is_none() {
                *stopped = Some(Stopped { changes: state.changes, start: first, at: end });
                return Try::Load(slice);
            }
        }
        for slice in slices {
            let from = first.max(slice << self.slice_bits);
            let to = end.min((slice + 1) << self.slice_bits);
            let taken = self.cache.update(slice, |words| (from..to).for_each(|i| self.set(words, i, 1)));
            if taken.is_none() {
                // Evicted just now. What has been set in other slices is undone by nobody: leave the hint, look again.
                (first..from).for_each(|i| {
                    self.cache.update(i >> self.slice_bits, |words| self.set(words, i, 0));
                });
                return Try::Load(slice);
            }
        }
        state.hint = end;
        state.changes += 1;
        let fresh = first >= self.end.fetch_max(end, Ordering::AcqRel);
        Try::Done(Allocated { host: first << self.cluster_bits, fresh })
    }

    /// Looks for `wanted` free clusters in a row, from the hint on.
    fn find(
        &self,
        state: &mut State,
        wanted: u64,
        stopped: &mut Option<Stopped>,
    ) -> std::result::Result<u64, Try> {
        let (mut start, mut at) = match stopped.take() {
            Some(stopped) if stopped.changes == state.changes => (stopped.start, stopped.at),
            _ => (state.hint, state.hint),
        };
        while at - start < wanted {
            let block = at >> self.block_bits;
            if block >= state.table.len() as u64 {
                break;
            }
            if state.block(block).is_none() {
                at = (block + 1) << self.block_bits;
                continue;
            }
            let slice = at >> self.slice_bits;
            let end = (slice + 1) << self.slice_bits;
            if state.is_full(slice) {
                (start, at) = (end, end);
                continue;
            }
            let whole = at == slice << self.slice_bits;
            let look = |words: &[u64]| {
                let (mut start, mut any) = (start, false);
                for i in at..end {
                    if self.get(words, i) != 0 {
                        start = i + 1;
                    } else {
                        any = true;
                        if i + 1 - start >= wanted {
                            break;
                        }
                    }
                }
                (start, any)
            };
            let Some((new_start, any)) = self.cache.view(slice, look) else {
                *stopped = Some(Stopped { changes: state.changes, start, at });
                return Err(Try::Load(slice));
            };
            if whole && !any {
                state.set_full(slice, true);
            }
            start = new_start;
            at = end.min(start + wanted).max(start);
        }
        Ok(start)
    }
}

impl Qcow2 {
    /// Reads the refcount table, once.
    pub(crate) async fn load_refcount_table(&self, cx: &Cx<'_>) -> Result<()> {
        if self.refcounts.state().loaded {
            return Ok(());
        }
        let header = self.header();
        let len = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        let range = ByteRange::new(header.refcount_table_offset, len).ok_or(IoError::EINVAL)?;
        let buffer = Iov::scratch(range.buffer_len());
        cx.below()
            .read(range, buffer.clone())
            .await
            .map_err(|e| e.context("Could not read refcount table"))?;
        let mut state = self.refcounts.state();
        if state.loaded {
            return Ok(());
        }
        state.offset = range.start();
        state.table = to_words(&buffer.to_vec()).into_vec();
        state.loaded = true;
        Ok(())
    }

    /// How many clusters are in use, as the disk says. `None` if that takes more than `limit` bytes to find out.
    pub(crate) async fn used_clusters(&self, cx: &Cx<'_>, limit: u64) -> Result<Option<u64>> {
        self.load_refcount_table(cx).await?;
        let blocks = self.refcounts.blocks();
        if blocks.len() as u64 * self.layout.cluster() > limit {
            return Ok(None);
        }
        let (width, max) = (1u32 << self.refcounts.order, self.refcounts.max());
        let mut used = 0;
        for block in blocks {
            let range = ByteRange::new(block, self.layout.cluster()).ok_or(IoError::EIO)?;
            let buffer = Iov::scratch(range.buffer_len());
            cx.below().read(range, buffer.clone()).await?;
            let in_word =
                |word: &u64| (0..64 / width).filter(|i| word >> (i * width) & max != 0).count() as u64;
            used += to_words(&buffer.to_vec()).iter().map(in_word).sum::<u64>();
        }
        Ok(Some(used))
    }

    /// Forgets all that is known about refcounts: the table is read anew. For repair.
    pub(crate) async fn reload_refcounts(&self, cx: &Cx<'_>) -> Result<()> {
        self.refcounts.cache.clear();
        *self.refcounts.state() = State::default();
        self.load_refcount_table(cx).await
    }

    /// Takes `count` free clusters in a row; each has one reference now.
    pub(crate) async fn alloc_clusters(&self, cx: &Cx<'_>, count: u64) -> Result<Allocated> {
        let mut stopped = None;
        loop {
            match self.refcounts.try_take(count, &mut stopped) {
                Try::Done(found) => {
                    self.check_allocated(cx, found.host, count).await?;
                    return Ok(Allocated { fresh: found.fresh && cx.below().unwritten_is_zero(), ..found });
                }
                Try::Load(slice) => self.load_refcounts(cx, slice).await?,
                Try::Missing { block, from } => {
                    let made = self.make_refcount_block(cx, block).await;
                    let mut state = self.refcounts.state();
                    state.hint = state.hint.min(from);
                    drop(state);
                    made?;
                }
                Try::TooFar => return Err(IoError::EFBIG),
            }
        }
    }

    /// What was free by its refcount must not be metadata.
    async fn check_allocated(&self, cx: &Cx<'_>, host: u64, count: u64) -> Result<()> {
        self.check_data_place(cx, host, count << self.layout.cluster_bits).await
    }

    /// Gives back clusters that were never linked anywhere.
    pub(crate) async fn free_unused(&self, cx: &Cx<'_>, host: u64, count: u64) {
        if let Err(error) = self.lower(cx, host >> self.layout.cluster_bits, count).await {
            tracing::warn!(%error, host, count, "clusters leaked");
        }
    }

    /// The refcount of a cluster.
    pub(crate) async fn refcount(&self, cx: &Cx<'_>, cluster: u64) -> Result<u64> {
        let slice = cluster >> self.refcounts.slice_bits;
        loop {
            if self.refcounts.slice_place(slice).is_none() {
                return Ok(0);
            }
            if let Some(count) = self.refcounts.cache.view(slice, |words| self.refcounts.get(words, cluster))
            {
                return Ok(count);
            }
            self.load_refcounts(cx, slice).await?;
        }
    }

    /// Takes one reference from each of `count` clusters from number `first` on.
    pub(crate) async fn lower(&self, cx: &Cx<'_>, first: u64, count: u64) -> Result<()> {
        let refcounts = &self.refcounts;
        let end = first.saturating_add(count);
        let mut at = first;
        while at < end {
            let slice = at >> refcounts.slice_bits;
            let to = end.min((slice + 1) << refcounts.slice_bits);
            if refcounts.slice_place(slice).is_none() {
                return Err(self.lost_count(cx, at).await);
            }
            self.load_refcounts(cx, slice).await?;
            let Some(lost) = refcounts.lower_in_slice(slice, at, to) else { continue };
            if let Some(cluster) = lost {
                return Err(self.lost_count(cx, cluster).await);
            }
            at = to;
        }
        Ok(())
    }

    async fn lost_count(&self, cx: &Cx<'_>, cluster: u64) -> IoError {
        let offset = cluster << self.layout.cluster_bits;
        let message = format!("Refcount of cluster at offset {offset:#x} is already 0");
        self.corruption(cx, Corruption { message, offset: Some(offset), size: None, fatal: false }).await
    }

    /// Makes sure that a slice of an existing block is in the cache, unless it is evicted again at once.
    async fn load_refcounts(&self, cx: &Cx<'_>, slice: u64) -> Result<()> {
        let refcounts = &self.refcounts;
        let _turn = refcounts.loads.lock(slice).await;
        if refcounts.cache.view(slice, |_| ()).is_some() {
            return Ok(());
        }
        let Some(at) = refcounts.slice_place(slice) else { return Ok(()) };
        let cluster = self.layout.cluster();
        let per_block = refcounts.block_bits - refcounts.slice_bits;
        let bytes = 1u64 << (refcounts.slice_bits + refcounts.order - 3);
        let block = at - (slice & ((1 << per_block) - 1)) * bytes;
        if block & (cluster - 1) != 0 {
            let index = hex(slice >> per_block);
            let message = format!("Refblock offset {block:#x} unaligned (reftable index: {index})");
            let found = Corruption { message, offset: None, size: None, fatal: true };
            return Err(self.corruption(cx, found).await);
        }
        self.check_refcount_block(cx, block).await?;
        let range = ByteRange::new(at, bytes).ok_or(IoError::EIO)?;
        let buffer = Iov::scratch(range.buffer_len());
        cx.below().read(range, buffer.clone()).await?;
        refcounts.cache.insert(slice, Words::from_bytes(&buffer.to_vec()));
        Ok(())
    }
}

impl Refcounts {
    /// Takes one known free cluster whose slice is in the cache.
    fn take_one(&self, state: &mut State, cluster: u64) -> Option<u64> {
        self.cache.update(cluster >> self.slice_bits, |words| self.set(words, cluster, 1))?;
        state.hint = cluster + 1;
        state.changes += 1;
        Some(cluster)
    }

    /// Lowers the counts of `from..to` in one slice. `None` if the slice is not in the cache; else the first cluster
    /// whose count was 0 already.
    fn lower_in_slice(&self, slice: u64, from: u64, to: u64) -> Option<Option<u64>> {
        let mut state = self.state();
        let mut lost = None;
        let mut lowest_free = None;
        let packed = state.packed >> self.cluster_bits;
        let mut packed_gone = false;
        self.cache.update(slice, |words| {
            for cluster in from..to {
                match self.get(words, cluster) {
                    0 => lost = lost.or(Some(cluster)),
                    1 => {
                        self.set(words, cluster, 0);
                        lowest_free = lowest_free.or(Some(cluster));
                        packed_gone |= cluster == packed;
                    }
                    count => self.set(words, cluster, count - 1),
                }
            }
        })?;
        if let Some(free) = lowest_free {
            state.hint = state.hint.min(free);
            state.changes += 1;
            state.set_full(slice, false);
        }
        if packed_gone {
            state.packed = 0;
        }
        Some(lost)
    }

    /// One reference more for a cluster that has some. False when there is no room for it in the count; `None` if the
    /// slice is not in the cache.
    pub(crate) fn raise_used(&self, cluster: u64) -> Option<bool> {
        let slice = cluster >> self.slice_bits;
        let count = self.cache.view(slice, |words| self.get(words, cluster))?;
        if count == 0 || count >= self.max() {
            return Some(false);
        }
        self.cache.update(slice, |words| self.set(words, cluster, count + 1))?;
        Some(true)
    }
}

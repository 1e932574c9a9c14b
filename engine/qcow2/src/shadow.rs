//! A second set of tables beside the one in force: a change of all the metadata in one step.
//!
//! Taking, deleting and applying a snapshot change refcounts and COPIED flags all over the image, and an image in which
//! a flag does not fit its refcount is damaged. No order of writes in place avoids that. So nothing is written in
//! place:
//!
//! 1. all refcount blocks are read, and the refcounts changed in memory;
//! 2. what changes goes to clusters that are free before and after: L2 tables in which a flag changes, the L1 table,
//!    the table of snapshots, refcount blocks and the refcount table, neighbours in large writes; **flush**;
//! 3. one write of one sector makes the header name all of that, and the size of the disk; **flush**. The old tables
//!    are free.
//!
//! A power cut leaves all that was before or all that comes after, without a leak. An error before the last write
//! leaves the image as it was. Nobody else may use the image meanwhile.

use std::pin::Pin;

use underlay_graph::format::join;
use underlay_graph::{ByteRange, Cx, IoError, WriteFlags};
use underlay_sys::Iov;

use crate::commit::write_pieces;
use crate::entry::MAX_HOST;
use crate::header::{Header, MAX_REFCOUNT_TABLE_BYTES};
use crate::live::Qcow2;
use crate::metadata::Owner;
use crate::refblocks::{get, set};
use crate::words::{to_bytes, to_words};

/// Most memory for refcounts, in bytes: 32 TiB of 64 KiB clusters with 16 bits each.
const MAX_COUNTS: u64 = 1 << 30;
/// Words of tables that are looked at, at most.
const BUDGET: u64 = 1 << 32;
/// Tables are read and written in pieces of so many bytes.
const PIECE: u64 = 1 << 20;
/// So many of them at once.
const PARALLEL: usize = 16;
/// Bytes of the header from the size on, in which all is named.
const PLACES: u64 = 24;

/// A request under way.
type Work<'a> = Pin<Box<dyn Future<Output = Result<(), IoError>> + Send + 'a>>;

/// Why it cannot be done.
#[derive(Debug)]
pub(crate) enum Bad {
    /// A request failed, or there is no room.
    Io(IoError),
    /// Something is wrong with the cluster of this number.
    Wrong(u64, &'static str),
}

impl From<IoError> for Bad {
    fn from(error: IoError) -> Self {
        Self::Io(error)
    }
}

/// One refcount block.
#[derive(Debug, Default)]
struct Block {
    /// Where it is on disk; 0: nowhere.
    offset: u64,
    /// The counts as they shall be; empty: all are 0.
    bytes: Vec<u8>,
    /// A bit for each cluster that is in use on disk and shall not be: it is not to be written to yet.
    freed: Vec<u64>,
    changed: bool,
}

/// See the module.
pub(crate) struct Shadow<'a> {
    pub image: &'a Qcow2,
    pub cx: &'a Cx<'a>,
    /// The header as it shall be.
    pub header: Header,
    old: Header,
    blocks: Vec<Block>,
    /// log2 of the refcounts in a block.
    block_bits: u32,
    /// No free cluster is looked for below this.
    next: u64,
    /// What goes to new clusters.
    pieces: Vec<(u64, Vec<u8>)>,
    waiting: u64,
    budget: u64,
}

impl<'a> Shadow<'a> {
    /// Begins: reads all refcounts. Nothing may be waiting to be written.
    pub async fn begin(image: &'a Qcow2, cx: &'a Cx<'a>) -> Result<Self, Bad> {
        let header = image.header();
        let table = image.refcounts.state().table.clone();
        let offsets: Vec<u64> = table.iter().map(|entry| entry & !511).collect();
        let used: Vec<u64> = offsets.iter().copied().filter(|offset| *offset != 0).collect();
        if used.len() as u64 * header.cluster_size() > MAX_COUNTS {
            return Err(IoError::EFBIG.with("The image has too many refcounts for that").into());
        }
        for block in &used {
            image.check_refcount_block(cx, *block).await?;
        }
        let mut contents = read_clusters(cx, &used, header.cluster_size()).await?.into_iter();
        let block = |offset: &u64| Block {
            offset: *offset,
            bytes: if *offset == 0 { Vec::new() } else { contents.next().unwrap_or_default() },
            ..Block::default()
        };
        let blocks = offsets.iter().map(block).collect();
        let block_bits = header.refcounts_per_block().ilog2();
        let (old, pieces) = (header.clone(), Vec::new());
        Ok(Self { image, cx, header, old, blocks, block_bits, next: 0, pieces, waiting: 0, budget: BUDGET })
    }

    fn place(&self, cluster: u64) -> (usize, u64) {
        let bits = self.block_bits;
        (usize::try_from(cluster >> bits).unwrap_or(usize::MAX), cluster & ((1 << bits) - 1))
    }

    /// The refcount of a cluster, as it shall be.
    pub fn count(&self, cluster: u64) -> u64 {
        let (block, at) = self.place(cluster);
        self.blocks.get(block).map_or(0, |block| get(&block.bytes, at, self.header.refcount_order))
    }

    fn set(&mut self, cluster: u64, count: u64) {
        let (block, at) = self.place(cluster);
        let size = self.image.layout.cluster();
        let order = self.header.refcount_order;
        let Some(block) = self.blocks.get_mut(block) else { return };
        if block.bytes.is_empty() {
            block.bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        }
        block.changed = true;
        set(&mut block.bytes, at, order, count);
    }

    /// One reference more to a cluster that has some. EINVAL, as the reference says, when there is no room for the
    /// count.
    pub fn raise(&mut self, cluster: u64) -> Result<(), Bad> {
        match self.count(cluster) {
            0 => Err(Bad::Wrong(cluster, "is used, but its refcount is 0")),
            count if count >= self.header.max_refcount() => Err(IoError::EINVAL.into()),
            count => {
                self.set(cluster, count + 1);
                Ok(())
            }
        }
    }

    /// One reference less. When none is left it must not be metadata in force, unless of the kind `was` that the caller
    /// has taken out of it.
    pub fn lower(&mut self, cluster: u64, was: Option<Owner>) -> Result<(), Bad> {
        let count = self.count(cluster).checked_sub(1);
        let count = count.ok_or(Bad::Wrong(cluster, "is used more often than its refcount says"))?;
        self.set(cluster, count);
        if count > 0 {
            return Ok(());
        }
        let owner = self.image.metadata().owner(cluster, cluster + 1);
        if owner.is_some_and(|(_, owner)| Some(owner) != was) {
            return Err(Bad::Wrong(cluster, "is metadata, but it is used as something else too"));
        }
        let (block, at) = self.place(cluster);
        let words = usize::try_from(self.header.refcounts_per_block().div_ceil(64)).unwrap_or(0);
        if let Some(block) = self.blocks.get_mut(block) {
            block.freed.resize(words, 0);
            block.freed[usize::try_from(at / 64).unwrap_or(0)] |= 1 << (at % 64);
        }
        Ok(())
    }

    /// The same for each cluster of `len` bytes of a table.
    pub fn lower_run(&mut self, offset: u64, len: u64, was: Owner) -> Result<(), Bad> {
        let bits = self.header.cluster_bits;
        let mut clusters = offset >> bits..offset.saturating_add(len).div_ceil(1 << bits);
        clusters.try_for_each(|cluster| self.lower(cluster, Some(was)))
    }

    fn was_freed(&self, cluster: u64) -> bool {
        let (block, at) = self.place(cluster);
        let word = self.blocks.get(block).and_then(|b| b.freed.get(usize::try_from(at / 64).ok()?));
        word.is_some_and(|word| word >> (at % 64) & 1 != 0)
    }

    /// Takes clusters in a row that are free now and were before, with one reference each; the offset of the first.
    fn take(&mut self, wanted: u64) -> Result<u64, Bad> {
        let mut first = self.next;
        let mut at = first;
        while at - first < wanted {
            if self.count(at) != 0 || self.was_freed(at) {
                first = at + 1;
            }
            at += 1;
        }
        let bits = self.header.cluster_bits;
        let (last, _) = self.place(at);
        if at > MAX_HOST >> bits || (last as u64 + 1) * 8 > MAX_REFCOUNT_TABLE_BYTES {
            return Err(IoError::EFBIG.into());
        }
        if last >= self.blocks.len() {
            self.blocks.resize_with(last + 1, Block::default);
        }
        if let Some((cluster, _)) = self.image.metadata().owner(first, at) {
            return Err(Bad::Wrong(cluster, "is metadata, but its refcount is 0"));
        }
        // What is behind the end now is written to, even if nothing comes of it.
        self.image.refcounts.set_end(at);
        (first..at).for_each(|cluster| self.set(cluster, 1));
        self.next = at;
        Ok(first << bits)
    }

    /// Has bytes written to new clusters; where.
    pub async fn put(&mut self, mut bytes: Vec<u8>) -> Result<u64, Bad> {
        let cluster = self.image.layout.cluster();
        let count = (bytes.len() as u64).div_ceil(cluster);
        let host = self.take(count)?;
        // Whole clusters are fewer writes where tables follow each other.
        bytes.resize(usize::try_from(count * cluster).map_err(|_| IoError::EFBIG)?, 0);
        self.waiting += bytes.len() as u64;
        self.pieces.push((host, bytes));
        if self.waiting > PIECE * PARALLEL as u64 {
            self.write_out().await?;
        }
        Ok(host)
    }

    async fn write_out(&mut self) -> Result<(), IoError> {
        self.waiting = 0;
        write_pieces(self.cx, std::mem::take(&mut self.pieces)).await
    }

    /// The L2 tables at these offsets.
    pub async fn tables(&self, offsets: &[u64]) -> Result<Vec<Box<[u64]>>, Bad> {
        let cluster = self.image.layout.cluster();
        let end = self.cx.below().length().next_multiple_of(cluster);
        let is_bad = |offset: &&u64| !offset.is_multiple_of(cluster) || **offset == 0 || **offset >= end;
        if let Some(offset) = offsets.iter().find(is_bad) {
            return Err(Bad::Wrong(offset >> self.header.cluster_bits, "cannot be an L2 table"));
        }
        let contents = read_clusters(self.cx, offsets, cluster).await?;
        Ok(contents.iter().map(|bytes| to_words(bytes)).collect())
    }

    /// Accounts for looking at words of tables. EFBIG when a hostile image has us look at far too many.
    pub fn spend(&mut self, words: usize) -> Result<(), Bad> {
        let left = self.budget.checked_sub(words as u64);
        let too_many = || IoError::EFBIG.with("The image refers to more tables than can be looked at");
        self.budget = left.ok_or_else(too_many)?;
        Ok(())
    }

    /// How many tables are read at once.
    pub fn batch(&self) -> usize {
        usize::try_from((PIECE * 4 / self.image.layout.cluster()).max(1)).unwrap_or(1)
    }

    /// Finds places for the active L1 table (from now on `l1`) and all refcounts, writes everything, and makes it what
    /// the image is.
    pub async fn finish(mut self, l1: &[u64]) -> Result<Freed, Bad> {
        let old = self.old.clone();
        if !l1.is_empty() {
            self.header.l1_offset = self.put(to_bytes(l1)).await?;
        }
        self.header.l1_entries = u32::try_from(l1.len()).map_err(|_| IoError::EFBIG)?;
        self.lower_run(old.l1_offset, old.l1_bytes(), Owner::L1)?;
        self.place_refcounts()?;
        self.write_out().await?;
        self.cx.below().flush().await?;
        self.take_over().await?;
        let freed = Freed::of(&self);
        if let Err(error) = self.image.begin_anew(self.cx).await {
            self.image.give_up();
            return Err(error.into());
        }
        Ok(freed)
    }

    /// Gives the changed refcount blocks and the refcount table new places.
    fn place_refcounts(&mut self) -> Result<(), Bad> {
        let cluster = self.header.cluster_size();
        let table_len = u64::from(self.old.refcount_table_clusters) * cluster;
        self.lower_run(self.old.refcount_table_offset, table_len, Owner::RefcountTable)?;
        let mut placed: Vec<bool> = Vec::new();
        let mut table: Option<(u64, u64)> = None;
        loop {
            // A block that moves may change others.
            let mut all = true;
            for index in 0..self.blocks.len() {
                placed.resize(self.blocks.len(), false);
                if !self.blocks[index].changed || placed[index] {
                    continue;
                }
                (placed[index], all) = (true, false);
                let host = self.take(1)?;
                let before = std::mem::replace(&mut self.blocks[index].offset, host);
                if before != 0 {
                    self.lower(before / cluster, Some(Owner::RefcountBlock))?;
                }
            }
            let clusters = (self.blocks.len() as u64 * 8).div_ceil(cluster);
            let clusters = clusters.max(u64::from(self.old.refcount_table_clusters));
            match table {
                Some((_, len)) if len >= clusters => {}
                smaller => {
                    for at in smaller.into_iter().flat_map(|(host, len)| host / cluster..host / cluster + len)
                    {
                        self.set(at, 0);
                    }
                    if clusters * cluster > MAX_REFCOUNT_TABLE_BYTES {
                        return Err(IoError::EFBIG.into());
                    }
                    table = Some((self.take(clusters)?, clusters));
                    all = false;
                }
            }
            if all {
                break;
            }
        }
        let (host, len) = table.unwrap_or_default();
        let mut entries: Vec<u64> = self.blocks.iter().map(|block| block.offset).collect();
        entries.resize(usize::try_from(len * cluster / 8).map_err(|_| IoError::EFBIG)?, 0);
        self.pieces.push((host, to_bytes(&entries)));
        for (block, _) in self.blocks.iter_mut().zip(&placed).filter(|(_, placed)| **placed) {
            self.pieces.push((block.offset, std::mem::take(&mut block.bytes)));
        }
        self.header.refcount_table_offset = host;
        self.header.refcount_table_clusters = u32::try_from(len).map_err(|_| IoError::EFBIG)?;
        Ok(())
    }

    /// Makes the header name what has been written; durable on return. After an error it is as it was, or the image is
    /// unusable.
    async fn take_over(&self) -> Result<(), IoError> {
        let _turn = self.image.header_turn.lock().await;
        let Err(error) = name(self.cx, &self.header).await else { return Ok(()) };
        if let Err(second) = name(self.cx, &self.old).await {
            tracing::error!(%second, "nobody knows which tables the header names");
            self.image.give_up();
        }
        Err(error)
    }
}

/// Runs of clusters that are not in use any more: numbers of the first, and how many.
#[derive(Debug, Default)]
pub(crate) struct Freed(Vec<(u64, u64)>);

impl Freed {
    fn of(shadow: &Shadow<'_>) -> Self {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let per_block = shadow.header.refcounts_per_block();
        for (index, block) in (0..).zip(&shadow.blocks) {
            for (number, word) in (0..).zip(&block.freed) {
                let mut word = *word;
                while word != 0 {
                    let cluster = index * per_block + number * 64 + u64::from(word.trailing_zeros());
                    word &= word - 1;
                    match runs.last_mut() {
                        Some((first, count)) if *first + *count == cluster => *count += 1,
                        _ => runs.push((cluster, 1)),
                    }
                }
            }
        }
        Self(runs)
    }

    /// Tells the file that nobody needs them, if that is wanted.
    pub async fn discard(self, image: &Qcow2, cx: &Cx<'_>) {
        if image.options().pass_discard_snapshot == Some(false) || !cx.below().passes_discards() {
            return;
        }
        let bits = image.layout.cluster_bits;
        let mut runs = self.0;
        runs.retain(|(first, count)| image.metadata().owner(*first, first + count).is_none());
        for group in runs.chunks(PARALLEL) {
            let discard = |(first, count): &(u64, u64)| -> Work<'_> {
                let range = ByteRange::between(first << bits, (first + count) << bits);
                Box::pin(async move { cx.below().discard(range).await })
            };
            if let Err(error) = join(group.iter().map(discard).collect()).await {
                tracing::debug!(%error, "the file kept discarded clusters");
                return;
            }
        }
    }
}

/// Writes the part of the header that says where everything is: inside one sector.
async fn name(cx: &Cx<'_>, header: &Header) -> Result<(), IoError> {
    let mut bytes = header.size.to_be_bytes().to_vec();
    bytes.extend((header.crypt as u32).to_be_bytes());
    bytes.extend(header.l1_entries.to_be_bytes());
    bytes.extend([header.l1_offset, header.refcount_table_offset].map(u64::to_be_bytes).concat());
    bytes.extend([header.refcount_table_clusters, header.snapshots].map(u32::to_be_bytes).concat());
    bytes.extend(header.snapshots_offset.to_be_bytes());
    let range = ByteRange::between(PLACES, PLACES + bytes.len() as u64);
    cx.below().write(range, Iov::copy_of(&bytes), WriteFlags::default()).await?;
    cx.below().flush().await
}

/// Reads clusters, several at once and neighbours together; in the order of `offsets`.
async fn read_clusters(cx: &Cx<'_>, offsets: &[u64], cluster: u64) -> Result<Vec<Vec<u8>>, IoError> {
    let mut order: Vec<usize> = (0..offsets.len()).collect();
    order.sort_unstable_by_key(|index| offsets[*index]);
    // Each with the clusters that it reads.
    let mut runs: Vec<(ByteRange, Vec<usize>)> = Vec::new();
    for index in order {
        let here = ByteRange::new(offsets[index], cluster).ok_or(IoError::EIO)?;
        match runs.last_mut() {
            Some((range, indexes)) if range.end() == here.start() && range.len() < PIECE => {
                *range = ByteRange::between(range.start(), here.end());
                indexes.push(index);
            }
            _ => runs.push((here, vec![index])),
        }
    }
    let mut contents = vec![Vec::new(); offsets.len()];
    let size = usize::try_from(cluster).map_err(|_| IoError::EFBIG)?;
    for group in runs.chunks(PARALLEL) {
        let buffers: Vec<Iov> = group.iter().map(|(range, _)| Iov::scratch(range.buffer_len())).collect();
        let read = |((range, _), into): (&(ByteRange, Vec<usize>), &Iov)| -> Work<'_> {
            let (range, into) = (*range, into.clone());
            Box::pin(async move { cx.below().read(range, into).await })
        };
        join(group.iter().zip(&buffers).map(read).collect()).await?;
        for ((_, indexes), buffer) in group.iter().zip(&buffers) {
            for (at, index) in indexes.iter().enumerate() {
                contents[*index] = buffer.slice(at * size, size).to_vec();
            }
        }
    }
    Ok(contents)
}

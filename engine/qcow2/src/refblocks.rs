//! The refcounts on disk, compared with the references found, and corrected in place.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use underlay_graph::{ByteRange, Cx, IoError, WriteFlags};
use underlay_sys::Iov;
use underlay_sys::buf::is_zero;

use crate::check::{CheckError, Checker, Fix, words};
use crate::counts::PAGE;

/// One refcount block in memory.
#[derive(Debug)]
struct Block {
    offset: u64,
    /// Shared by all entries of a damaged table that name the same block: there may be many.
    bytes: Arc<Vec<u8>>,
    /// A count went up: written first.
    raised: bool,
    /// A count went down.
    lowered: bool,
}

/// All refcount blocks that count clusters of the file. Blocks of nothing but zeroes are not kept.
#[derive(Debug)]
pub(crate) struct RefcountBlocks {
    order: u32,
    /// log2 of the refcounts in a block.
    block_bits: u32,
    /// For each block of the file, what is known of it.
    slots: Vec<Slot>,
}

/// What is known of a refcount block.
#[derive(Debug)]
enum Slot {
    /// Not there, or nothing but zeroes.
    Empty,
    Block(Block),
    /// It would be at this offset, where no block can be.
    Unusable(u64),
    /// Where no file can have anything.
    Unreadable,
}

/// A refcount of a block.
pub(crate) fn get(block: &[u8], index: u64, order: u32) -> u64 {
    let Ok(index) = usize::try_from(index) else { return 0 };
    match order {
        0..=2 => {
            let bit = index << order;
            let mask = (1u8 << (1 << order)) - 1;
            block.get(bit / 8).map_or(0, |byte| u64::from(byte >> (bit % 8) & mask))
        }
        _ => {
            let width = 1 << (order - 3);
            let bytes = block.get(index * width..(index + 1) * width).unwrap_or_default();
            bytes.iter().fold(0, |count, byte| count << 8 | u64::from(*byte))
        }
    }
}

/// Changes a refcount of a block; the caller knows that it fits.
pub(crate) fn set(block: &mut [u8], index: u64, order: u32, count: u64) {
    let Ok(index) = usize::try_from(index) else { return };
    let bytes = count.to_be_bytes();
    match order {
        0..=2 => {
            let bit = index << order;
            let mask = (1u8 << (1 << order)) - 1;
            if let Some(byte) = block.get_mut(bit / 8) {
                *byte = *byte & !(mask << (bit % 8)) | (bytes[7] & mask) << (bit % 8);
            }
        }
        _ => {
            let width = 1 << (order - 3);
            if let Some(slot) = block.get_mut(index * width..(index + 1) * width) {
                slot.copy_from_slice(&bytes[8 - width..]);
            }
        }
    }
}

impl RefcountBlocks {
    /// Reads the refcount table and the blocks that it names.
    pub async fn read(checker: &mut Checker<'_, '_>) -> Result<Self, IoError> {
        let header = checker.header.clone();
        let cluster = header.cluster_size();
        let per_block = header.refcounts_per_block();
        let mut all = Self::empty(header.refcount_order, per_block);
        all.slots.reserve(usize::try_from(checker.clusters.div_ceil(per_block).min(1 << 20)).unwrap_or(0));
        let len = u64::from(header.refcount_table_clusters) * cluster;
        let table = checker.read(header.refcount_table_offset, len).await?;
        let mut known: HashMap<u64, Arc<Vec<u8>>> = HashMap::new();
        for (_, entry) in (0..checker.clusters.div_ceil(per_block)).zip(words(&table)) {
            let offset = entry & !511;
            let slot = if !offset.is_multiple_of(cluster) {
                Slot::Unusable(offset)
            } else if offset > i64::MAX as u64 - cluster {
                Slot::Unreadable
            } else if offset != 0 && offset < checker.file_len {
                let bytes = match known.get(&offset) {
                    Some(bytes) => bytes.clone(),
                    None => Arc::new(checker.read(offset, cluster).await?),
                };
                known.insert(offset, bytes.clone());
                match is_zero(&bytes) {
                    true => Slot::Empty,
                    false => Slot::Block(Block { offset, bytes, raised: false, lowered: false }),
                }
            } else {
                Slot::Empty
            };
            all.slots.push(slot);
        }
        Ok(all)
    }

    /// No block at all.
    pub fn empty(order: u32, per_block: u64) -> Self {
        Self { order, block_bits: per_block.ilog2(), slots: Vec::new() }
    }

    fn slot(&self, cluster: u64) -> &Slot {
        let index = usize::try_from(cluster >> self.block_bits).unwrap_or(usize::MAX);
        self.slots.get(index).unwrap_or(&Slot::Empty)
    }

    fn in_block(&self, cluster: u64) -> u64 {
        cluster & ((1 << self.block_bits) - 1)
    }

    /// The refcount of a cluster, or `None` when its block cannot be used.
    pub fn get(&self, cluster: u64) -> Option<u64> {
        match self.slot(cluster) {
            Slot::Empty => Some(0),
            Slot::Block(block) => Some(get(&block.bytes, self.in_block(cluster), self.order)),
            Slot::Unusable(_) | Slot::Unreadable => None,
        }
    }

    /// Changes a refcount in memory. Its block exists: a count to be raised from zero means that all are made anew.
    /// False, and nothing changes, when the table names the block for other clusters as well.
    fn set(&mut self, cluster: u64, count: u64) -> bool {
        let (at, order) = (self.in_block(cluster), self.order);
        let index = usize::try_from(cluster >> self.block_bits).unwrap_or(usize::MAX);
        let Some(Slot::Block(block)) = self.slots.get_mut(index) else { return true };
        let Some(bytes) = Arc::get_mut(&mut block.bytes) else { return false };
        let old = get(bytes, at, order);
        block.raised |= count > old;
        block.lowered |= count < old;
        set(bytes, at, order, count);
        true
    }

    /// A block made by somebody else, which is on disk already.
    pub fn insert(&mut self, index: u64, offset: u64, bytes: Vec<u8>) {
        let Ok(index) = usize::try_from(index) else { return };
        if index >= self.slots.len() {
            self.slots.resize_with(index + 1, || Slot::Empty);
        }
        let bytes = Arc::new(bytes);
        self.slots[index] = Slot::Block(Block { offset, bytes, raised: false, lowered: false });
    }

    /// Writes the changed blocks: first those where a count went up, durably.
    pub async fn write_back(&mut self, file: &Cx<'_>, cluster: u64) -> Result<(), IoError> {
        for up in [true, false] {
            let mut any = false;
            for slot in &mut self.slots {
                let Slot::Block(block) = slot else { continue };
                if if up { block.raised } else { block.lowered } {
                    let range = ByteRange::new(block.offset, cluster).ok_or(IoError::EIO)?;
                    file.write(range, Iov::copy_of(&block.bytes), WriteFlags::default()).await?;
                    (block.raised, block.lowered) = (false, false);
                    any = true;
                }
            }
            if any {
                file.flush().await?;
            }
        }
        Ok(())
    }

    /// Pages of clusters in which there may be a count.
    fn pages(&self, clusters: u64) -> impl Iterator<Item = u64> + '_ {
        let known = (0..).zip(&self.slots).filter(|(_, slot)| !matches!(slot, Slot::Empty));
        known.flat_map(move |(index, _)| {
            let first: u64 = index << self.block_bits;
            let end = (first + (1 << self.block_bits)).min(clusters);
            first / PAGE..end.div_ceil(PAGE)
        })
    }
}

impl Checker<'_, '_> {
    /// Compares refcounts and references, and corrects in memory what `fix` says.
    pub(crate) fn compare(&mut self, blocks: &mut RefcountBlocks, fix: Fix) {
        let pages: BTreeSet<u64> = blocks.pages(self.clusters).chain(self.counts.pages()).collect();
        let mut highest = 0;
        let mut told = false;
        for page in pages {
            for cluster in page * PAGE..((page + 1) * PAGE).min(self.clusters) {
                let references = self.counts.get(cluster);
                let Some(refcount) = blocks.get(cluster) else {
                    self.unreadable(blocks, cluster, &mut told);
                    continue;
                };
                if refcount > 0 || references > 0 {
                    highest = cluster;
                }
                if refcount != references {
                    self.mismatch(blocks, fix, cluster, refcount, references);
                }
            }
        }
        self.outcome.image_end_offset = (highest + 1) * self.header.cluster_size();
    }

    fn mismatch(
        &mut self,
        blocks: &mut RefcountBlocks,
        fix: Fix,
        cluster: u64,
        refcount: u64,
        references: u64,
    ) {
        let leak = refcount > references;
        let repair = match fix {
            Fix::None => false,
            Fix::Leaks => leak,
            Fix::All => true,
        };
        self.unusable |= refcount == 0;
        let what = match (repair, leak) {
            (true, _) => "Repairing",
            (false, true) => "Leaked",
            (false, false) => "ERROR",
        };
        self.say(format!("{what} cluster {cluster} refcount={refcount} reference={references}"));
        let sum = match (repair, leak) {
            (true, true) => &mut self.outcome.leaks_fixed,
            (true, false) => &mut self.outcome.corruptions_fixed,
            (false, true) => &mut self.outcome.leaks,
            (false, false) => &mut self.outcome.corruptions,
        };
        *sum += 1;
        if repair {
            let changed = blocks.set(cluster, references);
            debug_assert!(changed, "blocks that are named twice are made anew");
        }
    }

    fn unreadable(&mut self, blocks: &RefcountBlocks, cluster: u64, told: &mut bool) {
        if let Slot::Unusable(offset) = blocks.slot(cluster)
            && !std::mem::replace(told, true)
        {
            let index = cluster >> blocks.block_bits;
            let (begin, end) = match self.fix {
                Fix::None => ("Image is corrupt", "further non-fatal corruption"),
                _ => ("Marking image as corrupt", "further corruption"),
            };
            self.say(format!(
                "qcow2: {begin}: Refblock offset 0x{offset:x} unaligned (reftable index: {index}); {end} events will be suppressed"
            ));
        }
        self.say(format!("Can't get refcount for cluster {cluster}: Input/output error"));
        self.outcome.check_errors += 1;
    }
}

/// Not an error of its own: reading tables fails the whole check.
impl From<std::num::TryFromIntError> for CheckError {
    fn from(_: std::num::TryFromIntError) -> Self {
        Self::Failed(IoError::EFBIG)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_keep_to_themselves() {
        for order in 0..=6 {
            let mut block = vec![0; 64];
            let max = u64::MAX >> (64 - (1u32 << order));
            set(&mut block, 3, order, max);
            set(&mut block, 5, order, 1);
            set(&mut block, 5, order, max);
            set(&mut block, 5, order, 1);
            assert_eq!([2, 3, 4, 5, 6].map(|i| get(&block, i, order)), [0, max, 0, 1, 0], "order {order}");
        }
    }
}

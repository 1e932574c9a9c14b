//! Making all refcount structures anew from the references found.
//!
//! New blocks and a new table go to clusters that nothing refers to, so the old ones stay as they are until the
//! header names the new ones: one write of one sector, between two flushes.

use std::collections::{BTreeMap, BTreeSet};

use underlay_graph::{ByteRange, IoError, WriteFlags};
use underlay_sys::Iov;

use crate::check::{CheckError, Checker, words};
use crate::counts::PAGE;
use crate::header::MAX_REFCOUNT_TABLE_BYTES;
use crate::refblocks::{RefcountBlocks, set};

/// Where the fields are that say where the refcount table is: offset u64, clusters u32.
const TABLE_FIELDS: u64 = 48;

/// Clusters of structures that are not used any more, and what their refcounts were.
pub(crate) type Freed = BTreeMap<u64, u64>;

/// New structures being planned. Positions in clusters.
#[derive(Debug, Default)]
struct Plan {
    blocks: BTreeMap<u64, u64>,
    table: u64,
    table_clusters: u64,
}

impl Checker<'_, '_> {
    /// Writes new refcount structures, and changes over to them. Also tells what the old ones were.
    pub(crate) async fn rebuild_refcounts(&mut self) -> Result<(RefcountBlocks, Freed), CheckError> {
        let freed = self.forget_old_structures().await?;
        let plan = self.plan(&freed)?;
        let blocks = self.write_structures(&plan).await?;
        self.file.flush().await?;
        let cluster = self.header.cluster_size();
        self.header.refcount_table_offset = plan.table * cluster;
        self.header.refcount_table_clusters = u32::try_from(plan.table_clusters)?;
        let mut fields = self.header.refcount_table_offset.to_be_bytes().to_vec();
        fields.extend(self.header.refcount_table_clusters.to_be_bytes());
        let range = ByteRange::between(TABLE_FIELDS, TABLE_FIELDS + 12);
        self.file.write(range, Iov::copy_of(&fields), WriteFlags::default()).await?;
        self.file.flush().await?;
        Ok((blocks, freed))
    }

    /// Takes the old table and blocks out of the count: clusters, and what their count was.
    async fn forget_old_structures(&mut self) -> Result<Freed, CheckError> {
        let cluster = self.header.cluster_size();
        let table_bytes = u64::from(self.header.refcount_table_clusters) * cluster;
        let first = self.header.refcount_table_offset / cluster;
        let bytes = self.read(self.header.refcount_table_offset, table_bytes).await?;
        let mut freed = BTreeMap::new();
        if (first * cluster + table_bytes).saturating_sub(self.file_len) < cluster {
            for at in first..first + u64::from(self.header.refcount_table_clusters) {
                self.forget(at, &mut freed)?;
            }
        }
        for entry in words(&bytes) {
            // Those that were counted, and no others.
            let at = entry / cluster;
            if entry != 0 && entry.is_multiple_of(cluster) && at < self.clusters {
                self.forget(at, &mut freed)?;
            }
        }
        Ok(freed)
    }

    fn forget(&mut self, at: u64, freed: &mut Freed) -> Result<(), IoError> {
        let count = self.counts.get(at);
        freed.entry(at).or_insert(count);
        self.counts.set(at, count.saturating_sub(1))
    }

    /// Finds clusters for everything, until all is counted by something.
    fn plan(&mut self, freed: &Freed) -> Result<Plan, CheckError> {
        let per_block = self.header.refcounts_per_block();
        let cluster = self.header.cluster_size();
        // Nothing of the old structures may be overwritten before the header has changed over: they are not free yet.
        self.sort_behind();
        let mut free = FreeClusters { next: 0, taken: freed.keys().copied().collect() };
        let mut plan = Plan::default();
        loop {
            let mut needed: BTreeSet<u64> = BTreeSet::new();
            for page in self.counts.pages().collect::<Vec<_>>() {
                for at in page * PAGE..(page + 1) * PAGE {
                    if self.counts.get(at) != 0 {
                        needed.insert(at / per_block);
                    }
                }
            }
            let missing: Vec<u64> = needed.iter().filter(|i| !plan.blocks.contains_key(i)).copied().collect();
            for index in &missing {
                let at = free.find(self, 1)?;
                self.counts.set(at, 1)?;
                plan.blocks.insert(*index, at);
            }
            let entries = plan.blocks.last_key_value().map_or(1, |(last, _)| last + 1);
            let clusters = (entries * 8).div_ceil(cluster);
            if clusters * cluster > MAX_REFCOUNT_TABLE_BYTES {
                return Err(IoError::EFBIG.into());
            }
            if missing.is_empty() && clusters <= plan.table_clusters {
                return Ok(plan);
            }
            if missing.is_empty() {
                for at in plan.table..plan.table + plan.table_clusters {
                    self.counts.set(at, 0)?;
                }
                plan.table = free.find(self, clusters)?;
                plan.table_clusters = clusters;
                for at in plan.table..plan.table + clusters {
                    self.counts.set(at, 1)?;
                }
            }
        }
    }

    async fn write_structures(&mut self, plan: &Plan) -> Result<RefcountBlocks, CheckError> {
        let header = &self.header;
        let (order, per_block, cluster) =
            (header.refcount_order, header.refcounts_per_block(), header.cluster_size());
        let mut blocks = RefcountBlocks::empty(order, per_block);
        let size = usize::try_from(cluster)?;
        let mut contents: BTreeMap<u64, Vec<u8>> =
            plan.blocks.keys().map(|index| (*index, vec![0; size])).collect();
        for page in self.counts.pages() {
            for at in page * PAGE..(page + 1) * PAGE {
                let count = self.counts.get(at);
                if let Some(bytes) = contents.get_mut(&(at / per_block)).filter(|_| count != 0) {
                    set(bytes, at % per_block, order, count);
                }
            }
        }
        for (index, bytes) in contents {
            let at = plan.blocks[&index] * cluster;
            self.write(at, &bytes).await?;
            blocks.insert(index, at, bytes);
        }
        let mut table = vec![0; usize::try_from(plan.table_clusters * cluster)?];
        for (&index, &at) in &plan.blocks {
            let slot = usize::try_from(index * 8)?;
            table[slot..slot + 8].copy_from_slice(&(at * cluster).to_be_bytes());
        }
        self.write(plan.table * cluster, &table).await?;
        Ok(blocks)
    }
}

/// First fit among the clusters that nothing refers to.
struct FreeClusters {
    next: u64,
    taken: BTreeSet<u64>,
}

impl FreeClusters {
    fn find(&mut self, checker: &mut Checker<'_, '_>, count: u64) -> Result<u64, IoError> {
        let mut start = self.next;
        let mut at = start;
        while at - start < count {
            let behind = checker.behind.partition_point(|clusters| clusters.end <= at);
            if let Some(used) = checker.behind.get(behind).filter(|clusters| clusters.start <= at) {
                // When the file reaches there, this is what is found.
                (start, at) = (used.end, used.end);
                continue;
            }
            if checker.counts.get(at) != 0 || self.taken.contains(&at) {
                start = at + 1;
            }
            at += 1;
        }
        if count == 1 {
            self.next = start + 1;
        }
        checker.counts.grow(start + count)?;
        Ok(start)
    }
}

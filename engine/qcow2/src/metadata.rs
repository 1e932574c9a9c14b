//! Which host clusters hold metadata, so that no guest write ever lands on them.
//!
//! In a sound image nothing points at metadata but metadata. In a damaged (or hostile) one an L2 entry may point at the
//! header or at another table; a write through it would destroy the image, so every write to guest data asks here
//! first.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{PoisonError, RwLockReadGuard, RwLockWriteGuard};

use underlay_graph::{Cx, Result};

use crate::cache::NumberMap;
use crate::entry::OFFSET;
use crate::live::{Corruption, Qcow2};
use crate::snapshots;

/// Most L1 entries of snapshots that are looked at when an image becomes writable.
const MOST_INACTIVE: u64 = 1 << 22;

/// Most clusters of snapshots' L1 tables that are kept in mind.
const MOST_OF_L1: u64 = 1 << 20;

/// What a host cluster of metadata is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The header.
    Header,
    /// The active L1 table.
    L1,
    /// An L2 table.
    L2,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The bitmap directory.
    Bitmaps,
    /// The table of internal snapshots.
    Snapshots,
    /// The L1 table of one of them.
    InactiveL1,
    /// An L2 table that only snapshots have.
    InactiveL2,
    /// Claimed by two tables at once, or outside the file: damage.
    Contested,
}

impl Owner {
    /// QEMU's word for it.
    fn name(self) -> &'static str {
        match self {
            Self::Header => "qcow2_header",
            Self::L1 => "active L1 table",
            Self::L2 => "active L2 table",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::Bitmaps => "bitmap directory",
            Self::Snapshots => "snapshot table",
            Self::InactiveL1 => "inactive L1 table",
            Self::InactiveL2 => "inactive L2 table",
            Self::Contested => "several tables",
        }
    }
}

/// All clusters of metadata, by cluster number.
#[derive(Debug, Default)]
pub struct Metadata {
    clusters: NumberMap<Owner>,
    /// L2 tables of snapshots, in use by the active L1 table or not.
    inactive: HashSet<u64>,
}

impl Metadata {
    /// A cluster is found to belong to `owner`. Two owners contest it.
    fn claim(&mut self, cluster: u64, owner: Owner) {
        let known = self.clusters.entry(cluster).or_insert(owner);
        if *known != owner || matches!(owner, Owner::L2 | Owner::RefcountBlock) {
            *known = Owner::Contested;
        }
    }

    fn claim_table(&mut self, cluster: u64, owner: Owner, end: u64) {
        match self.clusters.contains_key(&cluster) || cluster >= end {
            true => self.clusters.insert(cluster, Owner::Contested),
            false => self.clusters.insert(cluster, owner),
        };
    }

    fn claim_run(&mut self, first: u64, count: u64, owner: Owner) {
        (first..first.saturating_add(count)).for_each(|cluster| self.claim(cluster, owner));
    }

    /// A new L2 table.
    pub(crate) fn add_table(&mut self, cluster: u64) {
        self.clusters.insert(cluster, Owner::L2);
    }

    /// An L2 table that the active L1 table does not have any more. What something else claims too stays as it is.
    pub(crate) fn leave_table(&mut self, cluster: u64) {
        if self.clusters.get(&cluster) != Some(&Owner::L2) {
            return;
        }
        match self.inactive.contains(&cluster) {
            true => self.clusters.insert(cluster, Owner::InactiveL2),
            false => self.clusters.remove(&cluster),
        };
    }

    /// New clusters of some structure.
    pub(crate) fn add(&mut self, first: u64, count: u64, owner: Owner) {
        (first..first.saturating_add(count)).for_each(|cluster| {
            self.clusters.insert(cluster, owner);
        });
    }

    /// Clusters that hold no metadata any more.
    pub(crate) fn remove(&mut self, first: u64, count: u64) {
        (first..first.saturating_add(count)).for_each(|cluster| {
            self.clusters.remove(&cluster);
        });
    }

    /// Who owns one of these clusters, if any is metadata.
    pub(crate) fn owner(&self, first: u64, end: u64) -> Option<(u64, Owner)> {
        (first..end).find_map(|cluster| Some((cluster, *self.clusters.get(&cluster)?)))
    }
}

impl Metadata {
    /// Who owns one of these clusters instead of `owner`.
    fn other_owner(&self, first: u64, end: u64, owner: Owner) -> Option<Owner> {
        (first..end).find_map(|cluster| self.clusters.get(&cluster).copied().filter(|known| *known != owner))
    }
}

impl Qcow2 {
    pub(crate) fn metadata(&self) -> RwLockReadGuard<'_, Metadata> {
        self.metadata.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn metadata_mut(&self) -> RwLockWriteGuard<'_, Metadata> {
        self.metadata.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds all metadata, when the image becomes writable.
    pub(crate) async fn collect_metadata(&self, cx: &Cx<'_>) {
        let inactive = self.inactive_tables(cx).await;
        let header = self.header();
        let cluster = header.cluster_size();
        let end = cx.below().length().div_ceil(cluster);
        let mut all = Metadata::default();
        all.claim(0, Owner::Header);
        // These two may lie behind the end of a file that was cut where only zeroes were left.
        all.claim_run(header.l1_offset / cluster, header.l1_bytes().div_ceil(cluster), Owner::L1);
        let table = header.refcount_table_offset / cluster;
        all.claim_run(table, u64::from(header.refcount_table_clusters), Owner::RefcountTable);
        if let Some(bitmaps) = header.extensions.bitmaps {
            let directory = bitmaps.directory;
            all.claim_run(directory.offset / cluster, directory.len.div_ceil(cluster), Owner::Bitmaps);
        }
        let snapshots = self.known_snapshots();
        all.claim_run(
            header.snapshots_offset / cluster,
            snapshots.table.len.div_ceil(cluster),
            Owner::Snapshots,
        );
        // A damaged one may claim anything.
        let mut most = MOST_OF_L1;
        for snapshot in &snapshots.table.snapshots {
            let first = snapshot.l1_offset / cluster;
            let count = snapshot.l1_bytes().div_ceil(cluster).min(end.saturating_sub(first)).min(most);
            all.claim_run(first, count, Owner::InactiveL1);
            most -= count;
        }
        for entry in &self.l1().entries {
            if entry & OFFSET != 0 {
                all.claim_table((entry & OFFSET) / cluster, Owner::L2, end);
            }
        }
        for block in self.refcounts.blocks() {
            all.claim_table(block / cluster, Owner::RefcountBlock, end);
        }
        for table in &inactive {
            all.clusters.entry(*table).or_insert(Owner::InactiveL2);
        }
        all.inactive = inactive;
        self.refcounts.set_end(end);
        *self.metadata_mut() = all;
    }

    /// The L2 tables of all snapshots, unless they are very many: damage that leads there is noticed late then, as with
    /// the reference.
    async fn inactive_tables(&self, cx: &Cx<'_>) -> HashSet<u64> {
        let snapshots = self.known_snapshots().table.snapshots.clone();
        let entries: u64 = snapshots.iter().map(|snapshot| u64::from(snapshot.l1_entries)).sum();
        let mut tables = HashSet::new();
        if entries > MOST_INACTIVE {
            return tables;
        }
        for snapshot in &snapshots {
            // One that cannot be read cannot be used either.
            let l1 = snapshots::l1(&cx.below(), &self.header(), snapshot).await.unwrap_or_default();
            let bits = self.layout.cluster_bits;
            tables.extend(l1.iter().map(|entry| (entry & OFFSET) >> bits).filter(|table| *table != 0));
        }
        tables
    }

    /// Whether a cluster can be something else than metadata.
    pub(crate) fn may_be_own(&self, cluster: u64) -> bool {
        cluster < self.refcounts.end() && self.metadata().owner(cluster, cluster + 1).is_none()
    }

    /// Refuses a write to guest data at `host` that would hit metadata, or lies outside of everything ever allocated:
    /// the file may end before that, if it was cut, but the clusters have to be counted.
    pub(crate) async fn check_data_place(&self, cx: &Cx<'_>, host: u64, len: u64) -> Result<()> {
        let bits = self.layout.cluster_bits;
        let (first, end) = (host >> bits, ((host.saturating_add(len.max(1)) - 1) >> bits) + 1);
        let owner = self.metadata().owner(first, end);
        let what = match owner {
            None if end <= self.refcounts.end() => return Ok(()),
            None if self.are_counted(cx, self.refcounts.end().max(first)..end).await? => {
                self.refcounts.set_end(end);
                return Ok(());
            }
            None => format!("Data cluster at offset {host:#x} is behind the end of the image file"),
            Some((_, owner)) => {
                format!("Preventing invalid write on metadata (overlaps with {})", owner.name())
            }
        };
        let found = Corruption { message: what, offset: Some(host), size: Some(len), fatal: true };
        Err(self.corruption(cx, found).await)
    }

    async fn are_counted(&self, cx: &Cx<'_>, clusters: Range<u64>) -> Result<bool> {
        for cluster in clusters {
            if self.refcount(cx, cluster).await? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Refuses to use a refcount block, which may be changed then, that something else claims too or that is not in the
    /// file.
    pub(crate) async fn check_refcount_block(&self, cx: &Cx<'_>, block: u64) -> Result<()> {
        self.check_owner(cx, block, Owner::RefcountBlock).await
    }

    /// Refuses to change an L2 table that something else claims too.
    pub(crate) async fn check_own_table(&self, cx: &Cx<'_>, index: u64) -> Result<()> {
        let host = self.l1().get(index) & OFFSET;
        self.check_owner(cx, host, Owner::L2).await
    }

    /// Refuses to change the table at `host` unless it is that and nothing else.
    async fn check_owner(&self, cx: &Cx<'_>, host: u64, wanted: Owner) -> Result<()> {
        let cluster = host >> self.layout.cluster_bits;
        let owner = self.metadata().owner(cluster, cluster + 1).map(|(_, owner)| owner);
        if owner == Some(wanted) {
            return Ok(());
        }
        let name = owner.map_or("nothing", Owner::name);
        let message = format!("Preventing invalid write on metadata (overlaps with {name})");
        let size = Some(self.layout.cluster());
        Err(self.corruption(cx, Corruption { message, offset: Some(host), size, fatal: true }).await)
    }

    /// Refuses to change or move the L1 table if something else claims a cluster of it too: it could be the header.
    pub(crate) async fn check_own_l1(&self, cx: &Cx<'_>) -> Result<()> {
        let header = self.header();
        self.check_own_run(cx, header.l1_offset, header.l1_bytes(), Owner::L1).await
    }

    /// The same for the refcount table.
    pub(crate) async fn check_own_refcount_table(&self, cx: &Cx<'_>) -> Result<()> {
        let header = self.header();
        let len = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        self.check_own_run(cx, header.refcount_table_offset, len, Owner::RefcountTable).await
    }

    pub(crate) async fn check_own_run(&self, cx: &Cx<'_>, offset: u64, len: u64, owner: Owner) -> Result<()> {
        let bits = self.layout.cluster_bits;
        let (first, count) = (offset >> bits, len.div_ceil(self.layout.cluster()));
        let other = self.metadata().other_owner(first, first.saturating_add(count), owner);
        let Some(other) = other else { return Ok(()) };
        let message = format!("Preventing invalid write on metadata (overlaps with {})", other.name());
        let found = Corruption { message, offset: Some(offset), size: Some(len), fatal: true };
        Err(self.corruption(cx, found).await)
    }
}

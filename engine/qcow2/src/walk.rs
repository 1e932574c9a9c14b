//! Counting what an image refers to: a walk over all its tables.

use std::ops::Range;

use underlay_graph::IoError;

use crate::bitmaps;
use crate::check::{CheckError, Checker, Fix, words};
use crate::entry::{COMPRESSED, COPIED, OFFSET, ZERO};
use crate::features;
use crate::header::{Crypt, MAX_L1_BYTES, MAX_SNAPSHOTS};
use crate::snapshots::{MAX_EXTRA, Snapshot, Table};

/// Bits of an L1 entry that must be zero.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of an uncompressed L2 entry that must be zero.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits of a refcount table entry that must be zero.
const TABLE_RESERVED: u64 = 0x1ff;

/// Most places behind the end of the file, neighbours in one, that an image may refer to if its refcounts are to be
/// made anew.
const MOST_BEHIND: usize = 1 << 20;

/// An L2 table with nothing wrong in it.
#[derive(Debug)]
pub(crate) struct KnownTable {
    /// How often it was met again.
    again: u64,
    /// Clusters allocated, fragmented, compressed.
    sums: (u64, u64, u64),
}

/// One L2 entry, and how to speak of it.
#[derive(Clone, Copy)]
struct L2Entry {
    index: u64,
    word: u64,
    /// Subcluster bits; 0 without extended entries.
    map: u64,
}

impl Checker<'_, '_> {
    /// What is wrong with the snapshot table itself. It is written anew by who has asked for it, once everything else
    /// is right.
    pub(crate) fn count_flaws(&mut self, table: &Table) {
        let mut flaws: Vec<(u32, String)> = Vec::new();
        for (i, _) in (0..).zip(&table.snapshots).filter(|(_, snapshot)| snapshot.incomplete) {
            match self.fix {
                Fix::All => flaws.push((i, format!("Repairing snapshot table entry {i} is incomplete"))),
                _ => self.wrong(format!("ERROR snapshot table entry {i} is incomplete")),
            }
        }
        flaws.extend(table.excess.iter().map(|(i, len)| {
            let text = "Discarding too much extra metadata in snapshot table entry";
            (*i, format!("{text} {i} ({len} > {MAX_EXTRA})"))
        }));
        flaws.sort_unstable();
        self.outcome.incomplete_snapshots += flaws.len() as u64;
        flaws.into_iter().for_each(|(_, line)| self.say(line));
        if table.overhanging > 0 {
            let count = table.overhanging;
            let why = match self.header.snapshots > MAX_SNAPSHOTS {
                true => "",
                false => " (snapshot table is too big)",
            };
            self.say(format!("Discarding {count} overhanging snapshots{why}"));
            self.outcome.incomplete_snapshots += u64::from(count);
        }
    }

    /// Counts everything, in QEMU's order.
    pub(crate) async fn count_all(&mut self, snapshots: &Table) -> Result<(), CheckError> {
        let cluster = self.header.cluster_size();
        self.count(0, cluster)?;
        self.count_tree(self.header.l1_offset, self.header.l1_entries, true).await?;
        for snapshot in &snapshots.snapshots {
            self.count_snapshot(snapshot).await?;
        }
        self.count_again().await?;
        self.count(self.header.snapshots_offset, snapshots.len)?;
        let table_bytes = u64::from(self.header.refcount_table_clusters) * cluster;
        self.count(self.header.refcount_table_offset, table_bytes)?;
        if let (Crypt::Luks, Some(region)) = (self.header.crypt, self.header.extensions.crypto) {
            self.count(region.offset, region.len)?;
        }
        self.count_bitmaps().await?;
        self.count_refcount_blocks(table_bytes).await
    }

    /// Counts every cluster that the region touches.
    fn count(&mut self, offset: u64, len: u64) -> Result<(), CheckError> {
        if len == 0 {
            return Ok(());
        }
        let cluster = self.header.cluster_size();
        let end = offset.saturating_add(len);
        if end > self.file_len && end - self.file_len >= cluster {
            self.wrong(format!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset 0x{offset:x} size 0x{len:x}"
            ));
            return self.note_behind(offset / cluster..end.div_ceil(cluster));
        }
        // Less than a cluster behind the end still counts.
        self.clusters = self.clusters.max(end.div_ceil(cluster));
        self.spend(len / cluster)?;
        for at in offset / cluster..end.div_ceil(cluster) {
            self.count_cluster(at)?;
        }
        Ok(())
    }

    /// Notes what is referred to behind the end of the file: nothing new may be put there.
    fn note_behind(&mut self, clusters: Range<u64>) -> Result<(), CheckError> {
        if self.fix != Fix::All {
            return Ok(());
        }
        self.behind.push(clusters);
        if self.behind.len() < MOST_BEHIND {
            return Ok(());
        }
        self.sort_behind();
        match self.behind.len() < MOST_BEHIND / 2 {
            true => Ok(()),
            false => {
                Err(IoError::EFBIG.with("The image refers to too much behind the end of its file").into())
            }
        }
    }

    /// Puts what is behind the end in order, neighbours in one.
    pub(crate) fn sort_behind(&mut self) {
        self.behind.sort_unstable_by_key(|clusters| clusters.start);
        self.behind.dedup_by(|next, last| {
            let goes_on = next.start <= last.end;
            last.end = if goes_on { last.end.max(next.end) } else { last.end };
            goes_on
        });
    }

    fn count_cluster(&mut self, at: u64) -> Result<(), CheckError> {
        if !self.counts.add(at, self.header.max_refcount())? {
            self.overflow(at);
        }
        Ok(())
    }

    fn overflow(&mut self, at: u64) {
        self.wrong(format!(
            "ERROR: overflow cluster offset=0x{:x}\nUse qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if the image cannot be opened for writing",
            at * self.header.cluster_size()
        ));
    }

    async fn count_snapshot(&mut self, snapshot: &Snapshot) -> Result<(), CheckError> {
        let Snapshot { l1_offset, l1_entries, id, name, .. } = snapshot;
        if !l1_offset.is_multiple_of(self.header.cluster_size()) {
            self.wrong(format!(
                "ERROR snapshot {id} ({name}) l1_offset=0x{l1_offset:x}: L1 table is not cluster aligned; snapshot table entry corrupted"
            ));
            return Ok(());
        }
        if u64::from(*l1_entries) * 8 > MAX_L1_BYTES {
            self.wrong(format!(
                "ERROR snapshot {id} ({name}) l1_size=0x{l1_entries:x}: L1 table is too large; snapshot table entry corrupted"
            ));
            return Ok(());
        }
        self.count_tree(*l1_offset, *l1_entries, false).await
    }

    /// Counts an L1 table and everything below it.
    async fn count_tree(&mut self, offset: u64, entries: u32, active: bool) -> Result<(), CheckError> {
        if entries == 0 {
            return Ok(());
        }
        self.spend(u64::from(entries))?;
        let len = u64::from(entries) * 8;
        self.count(offset, len)?;
        let bytes = self.read(offset, len).await?;
        for entry in words(&bytes).filter(|entry| *entry != 0) {
            if entry & L1_RESERVED != 0 {
                self.wrong(format!("ERROR found L1 entry with reserved bits set: {entry:x}"));
            }
            let table = entry & OFFSET;
            self.count(table, self.header.cluster_size())?;
            if !table.is_multiple_of(self.header.cluster_size()) {
                self.wrong(format!(
                    "ERROR l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted"
                ));
            }
            self.count_l2(table, active).await?;
        }
        Ok(())
    }

    /// Counts what an L2 table refers to. A table that was in order when it was first met is not walked again each time
    /// (snapshots share theirs, and a hostile image may name one a million times): see [`Checker::count_again`].
    async fn count_l2(&mut self, table: u64, active: bool) -> Result<(), CheckError> {
        if table >= self.file_len {
            return Ok(());
        }
        if let Some(known) = self.tables.get_mut(&table) {
            known.again += 1;
            let (allocated, fragmented, compressed) = known.sums;
            if active {
                self.outcome.allocated_clusters += allocated;
                self.outcome.fragmented_clusters += fragmented;
                self.outcome.compressed_clusters += compressed;
            }
            return Ok(());
        }
        let before = self.outcome;
        self.walk_l2(table, active).await?;
        let now = self.outcome;
        let clean =
            (now.corruptions, now.corruptions_fixed) == (before.corruptions, before.corruptions_fixed);
        // Narrow refcounts overflow soon, and each time is told.
        if clean && self.header.refcount_order >= 4 {
            let sums = (
                now.allocated_clusters - before.allocated_clusters,
                now.fragmented_clusters - before.fragmented_clusters,
                now.compressed_clusters - before.compressed_clusters,
            );
            self.tables.insert(table, KnownTable { again: 0, sums });
        }
        Ok(())
    }

    /// Counts the further references through tables that were met more than once.
    async fn count_again(&mut self) -> Result<(), CheckError> {
        let cluster = self.header.cluster_size();
        let stride = usize::try_from(self.header.l2_entry_size()).unwrap_or(8);
        let shared: Vec<(u64, u64)> = self
            .tables
            .iter()
            .filter(|(_, known)| known.again > 0)
            .map(|(at, known)| (*at, known.again))
            .collect();
        self.tables.clear();
        for (table, again) in shared {
            let bytes = self.read(table, cluster).await?;
            for slot in bytes.chunks_exact(stride) {
                let word = words(slot).next().unwrap_or(0);
                let region = if word & COMPRESSED != 0 {
                    self.packed(word)
                } else {
                    (word & OFFSET, if word & OFFSET == 0 { 0 } else { cluster })
                };
                for at in region.0 / cluster..(region.0 + region.1).div_ceil(cluster) {
                    let max = self.header.max_refcount();
                    let count = self.counts.get(at).saturating_add(again);
                    self.counts.set(at, count.min(max))?;
                    if count > max {
                        self.overflow(at);
                    }
                }
            }
        }
        Ok(())
    }

    async fn walk_l2(&mut self, table: u64, active: bool) -> Result<(), CheckError> {
        self.spend(self.header.l2_entries())?;
        let bytes = self.read(table, self.header.cluster_size()).await?;
        let stride = usize::try_from(self.header.l2_entry_size()).unwrap_or(8);
        // Where the next data cluster would be if the disk were laid out in order.
        let mut expected = 0;
        for (index, slot) in (0..).zip(bytes.chunks_exact(stride)) {
            let mut slot = words(slot);
            let entry = L2Entry { index, word: slot.next().unwrap_or(0), map: slot.next().unwrap_or(0) };
            if entry.word == 0 && entry.map == 0 {
                continue;
            }
            if entry.word & COMPRESSED != 0 {
                self.count_compressed(entry, active)?;
            } else {
                self.count_normal(table, entry, active, &mut expected).await?;
            }
        }
        Ok(())
    }

    /// Where a compressed cluster is, and how long.
    fn packed(&self, word: u64) -> (u64, u64) {
        let offset_bits = 62 - (self.header.cluster_bits - 8);
        let offset = word & ((1 << offset_bits) - 1);
        let sectors = ((word & !(COPIED | COMPRESSED)) >> offset_bits) + 1;
        (offset, sectors * 512 - (offset & 511))
    }

    fn count_compressed(&mut self, entry: L2Entry, active: bool) -> Result<(), CheckError> {
        let (offset, len) = self.packed(entry.word);
        if entry.word & COPIED != 0 {
            self.wrong(format!(
                "ERROR: coffset=0x{offset:x}: copied flag must never be set for compressed clusters"
            ));
        }
        if self.header.extended_l2() && entry.map != 0 {
            self.wrong(format!(
                "ERROR compressed cluster {} with non-zero subcluster allocation bitmap, entry=0x{:x}",
                entry.index,
                entry.word & !COPIED
            ));
            return Ok(());
        }
        self.count(offset, len)?;
        if active {
            self.outcome.allocated_clusters += 1;
            self.outcome.compressed_clusters += 1;
            // Compressed clusters are fragmented by nature.
            self.outcome.fragmented_clusters += 1;
        }
        Ok(())
    }

    async fn count_normal(
        &mut self,
        table: u64,
        entry: L2Entry,
        active: bool,
        expected: &mut u64,
    ) -> Result<(), CheckError> {
        let cluster = self.header.cluster_size();
        let extended = self.header.extended_l2();
        if entry.word & L2_RESERVED != 0 {
            self.wrong(format!("ERROR found l2 entry with reserved bits set: {:x}", entry.word));
        }
        let offset = entry.word & OFFSET;
        let (data, zero) = (entry.map & 0xffff_ffff, entry.map >> 32);
        if offset == 0 {
            if data != 0 {
                self.wrong("ERROR: Unallocated cluster has non-zero subcluster allocation map");
            }
            return Ok(());
        }
        if data & zero != 0 {
            self.wrong(format!(
                "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
            ));
        }
        if !offset.is_multiple_of(cluster) {
            let holds_data = if extended { data != 0 } else { entry.word & ZERO == 0 };
            if holds_data {
                self.wrong(format!(
                    "ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted."
                ));
            } else if self.fix == Fix::All && self.may_repair(table) {
                return self.drop_preallocation(table, entry, offset).await;
            } else {
                self.wrong(format!(
                    "ERROR offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
                ));
            }
        }
        if active {
            self.outcome.allocated_clusters += 1;
            if *expected != 0 && offset != *expected {
                self.outcome.fragmented_clusters += 1;
            }
            *expected = offset + cluster;
        }
        self.count(offset, cluster)
    }

    /// A cluster that reads as zeroes has a place that it cannot have: it loses it.
    async fn drop_preallocation(
        &mut self,
        table: u64,
        entry: L2Entry,
        offset: u64,
    ) -> Result<(), CheckError> {
        self.say(format!(
            "Repairing offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
        ));
        let word = if self.header.extended_l2() { 0 } else { ZERO };
        let at = table + entry.index * self.header.l2_entry_size();
        self.write(at, &u64::to_be_bytes(word)).await?;
        self.outcome.corruptions_fixed += 1;
        Ok(())
    }

    async fn count_bitmaps(&mut self) -> Result<(), CheckError> {
        if self.header.autoclear & features::BITMAPS == 0 {
            return Ok(());
        }
        let Some(extension) = self.header.extensions.bitmaps else { return Ok(()) };
        let all = bitmaps::read(self.file, &self.header).await?;
        self.count(extension.directory.offset, extension.directory.len)?;
        for bitmap in all {
            self.count(bitmap.table_offset, bitmap.table_bytes())?;
            if bitmap.table_offset >= self.file_len {
                continue;
            }
            for cluster in bitmaps::data_clusters(self.file, &bitmap, &self.header).await? {
                self.count(cluster, self.header.cluster_size())?;
            }
        }
        Ok(())
    }

    async fn count_refcount_blocks(&mut self, table_bytes: u64) -> Result<(), CheckError> {
        let cluster = self.header.cluster_size();
        let bytes = self.read(self.header.refcount_table_offset, table_bytes).await?;
        for (i, entry) in words(&bytes).enumerate() {
            let offset = entry & !TABLE_RESERVED;
            if entry & TABLE_RESERVED != 0 {
                self.wrong(format!("ERROR refcount table entry {i} has reserved bits set"));
                self.unusable = true;
            } else if !offset.is_multiple_of(cluster) {
                self.wrong(format!(
                    "ERROR refcount block {i} is not cluster aligned; refcount table entry corrupted"
                ));
                self.unusable = true;
            } else if offset / cluster >= self.clusters {
                // QEMU would make the file so long that the block is inside; it is of no use, though.
                self.outside(i);
            } else if offset != 0 {
                self.count(offset, cluster)?;
                let count = self.counts.get(offset / cluster);
                if count != 1 {
                    self.wrong(format!("ERROR refcount block {i} refcount={count}"));
                    self.unusable = true;
                }
            }
        }
        Ok(())
    }

    fn outside(&mut self, block: usize) {
        let what = if self.fix == Fix::All { "Repairing" } else { "ERROR" };
        self.wrong(format!("{what} refcount block {block} is outside image"));
        self.unusable |= self.fix == Fix::All;
    }
}

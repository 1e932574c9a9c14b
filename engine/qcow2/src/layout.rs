//! Where everything goes in a new image: QEMU's allocation order, played through in memory.
//!
//! A new image has the header, a refcount table of one cluster, one refcount block, and then whatever is allocated, in
//! order. A refcount block is made when the first cluster that it counts is; it takes the next free cluster, which
//! may need a block of its own first. When the table has no room for a block, a larger one is made in the area that
//! the new block counts. Following this to the letter gives images that equal QEMU's byte for byte.
//! All positions are in clusters. Found by comparing with the images that qemu-img creates.

use std::collections::BTreeMap;

/// What is where.
#[derive(Debug)]
pub(crate) struct Layout {
    /// Refcounts per block.
    per_block: u64,
    /// Table entries per cluster.
    per_cluster: u64,
    /// Clusters with refcount 1: start and end of each run.
    used: BTreeMap<u64, u64>,
    /// Refcount blocks: index and position.
    pub blocks: BTreeMap<u64, u64>,
    /// Position of the refcount table.
    pub table: u64,
    /// Its length.
    pub table_clusters: u64,
    /// Tables given up again, as they were then: position, and block positions by index.
    pub stale: Vec<(u64, BTreeMap<u64, u64>)>,
    /// Where the search for free clusters begins.
    hint: u64,
}

impl Layout {
    /// Header, table, first block.
    pub fn new(cluster_bits: u32, refcount_order: u32) -> Self {
        Self {
            per_block: 1 << (cluster_bits + 3 - refcount_order),
            per_cluster: 1 << (cluster_bits - 3),
            used: BTreeMap::from([(0, 3)]),
            blocks: BTreeMap::from([(0, 2)]),
            table: 1,
            table_clusters: 1,
            stale: Vec::new(),
            hint: 3,
        }
    }

    /// Takes `count` clusters in a row.
    pub fn allocate(&mut self, count: u64) -> u64 {
        let start = self.take(count);
        self.count(start, count);
        start
    }

    /// The cluster behind the last one in use.
    pub fn end(&self) -> u64 {
        self.used.last_key_value().map_or(0, |(_, end)| *end)
    }

    /// Runs of clusters whose refcount is 1.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.used.iter().map(|(start, end)| (*start, *end))
    }

    /// Finds clusters and takes them, without looking after their refcount blocks.
    fn take(&mut self, count: u64) -> u64 {
        let mut start = self.hint;
        if let Some((_, end)) = self.used.range(..=start).next_back() {
            start = start.max(*end);
        }
        for (next, end) in self.used.range(start..) {
            if next - start >= count {
                break;
            }
            start = *end;
        }
        self.hint = start + count;
        self.mark(start, count);
        start
    }

    fn mark(&mut self, start: u64, count: u64) {
        if count == 0 {
            return;
        }
        let (mut start, mut end) = (start, start + count);
        if let Some((before, before_end)) = self.used.range(..=start).next_back().map(|(a, b)| (*a, *b))
            && before_end >= start
        {
            self.used.remove(&before);
            (start, end) = (before, end.max(before_end));
        }
        while let Some((next, next_end)) = self.used.range(start..=end).next().map(|(a, b)| (*a, *b)) {
            self.used.remove(&next);
            end = end.max(next_end);
        }
        self.used.insert(start, end);
    }

    fn unmark(&mut self, start: u64, count: u64) {
        let Some((run, end)) = self.used.range(..=start).next_back().map(|(a, b)| (*a, *b)) else { return };
        self.used.remove(&run);
        if run < start {
            self.used.insert(run, start);
        }
        if start + count < end {
            self.used.insert(start + count, end);
        }
    }

    /// Sees to it that all of the run has refcount blocks.
    fn count(&mut self, start: u64, count: u64) {
        for index in start / self.per_block..=(start + count - 1) / self.per_block {
            self.need_block(index);
        }
    }

    fn need_block(&mut self, index: u64) {
        if self.blocks.contains_key(&index) {
            return;
        }
        let at = self.take(1);
        if at / self.per_block != index {
            self.need_block(at / self.per_block);
        }
        self.blocks.insert(index, at);
        if index >= self.table_clusters * self.per_cluster {
            self.grow_table(index);
        }
    }

    /// A larger table, in the clusters behind those that block `index` counts, with blocks for itself.
    fn grow_table(&mut self, index: u64) {
        self.retire_table();
        let mut at = (index + 1) * self.per_block;
        let (mut fresh, mut clusters) = (0, 0);
        loop {
            // As if all blocks so far, these and the table were to be counted by these.
            let all = index + 1 + fresh;
            let now = ((all + clusters).div_ceil(self.per_block), (all * 3 / 2).div_ceil(self.per_cluster));
            if now == (fresh, clusters) {
                break;
            }
            (fresh, clusters) = now;
        }
        for block in index + 1..=index + fresh {
            self.blocks.insert(block, at);
            at += 1;
        }
        let hint = self.hint;
        self.move_table(at, clusters);
        self.mark((index + 1) * self.per_block, fresh);
        // The old table is free now, but the search goes on from where it was.
        self.hint = hint;
    }

    /// Notes what the table looks like, as it is about to be replaced.
    fn retire_table(&mut self) {
        let room = self.table_clusters * self.per_cluster;
        let entries = self.blocks.range(..room).map(|(index, at)| (*index, *at)).collect();
        self.stale.push((self.table, entries));
    }

    fn move_table(&mut self, to: u64, clusters: u64) {
        self.unmark(self.table, self.table_clusters);
        self.hint = self.hint.min(self.table);
        (self.table, self.table_clusters) = (to, clusters);
        self.mark(to, clusters);
    }

    /// Takes `data` clusters in a row, with all blocks for them and for `more` clusters behind them in front, and a new
    /// table that is just large enough: how QEMU preallocates.
    pub fn allocate_area(&mut self, data: u64, more: u64) -> u64 {
        self.retire_table();
        let start = self.end();
        let have = self.blocks.len() as u64;
        let (mut fresh, mut clusters) = (0, 1);
        loop {
            let end = start + fresh + clusters + data + more;
            let blocks = end.div_ceil(self.per_block);
            let now = (blocks.saturating_sub(have), blocks.max(have).div_ceil(self.per_cluster));
            if now == (fresh, clusters) {
                break;
            }
            (fresh, clusters) = now;
        }
        for i in 0..fresh {
            self.blocks.insert(have + i, start + i);
        }
        self.mark(start, fresh);
        self.move_table(start + fresh, clusters);
        let at = start + fresh + clusters;
        self.mark(at, data);
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_and_tables_land_where_qemu_puts_them() {
        // 512-byte clusters, 64-bit refcounts, an L1 table of 4096 clusters: read off an image of QEMU's.
        let mut layout = Layout::new(9, 6);
        assert_eq!(layout.allocate(4096), 3);
        assert_eq!((layout.table, layout.table_clusters, layout.end()), (4162, 2, 4167));
        assert_eq!(layout.blocks[&60], 4159);
        assert_eq!(layout.blocks[&61], 4164);
        assert_eq!(layout.blocks[&66], 4161);
        assert_eq!(layout.runs().collect::<Vec<_>>(), [(0, 1), (2, 4167)]);
    }

    #[test]
    fn a_preallocated_area_brings_its_refcounts() {
        let mut layout = Layout::new(9, 6);
        layout.allocate(1);
        assert_eq!(layout.allocate_area(4096, 64), 72);
        assert_eq!((layout.table, layout.table_clusters), (70, 2));
        assert_eq!(layout.allocate(1), 1);
        assert_eq!(layout.allocate(1), 4168);
    }
}

//! Making refcount blocks, and a larger table for them.

use underlay_graph::{ByteRange, Cx, IoError, Result, WriteFlags};
use underlay_sys::Iov;

use super::{Refcounts, SECTOR_ENTRIES, Try};
use crate::header::MAX_REFCOUNT_TABLE_BYTES;
use crate::live::Qcow2;
use crate::metadata::Owner;
use crate::words::{Words, to_bytes};

impl Qcow2 {
    /// Makes the refcount block number `block`, or another one that is needed first.
    pub(super) async fn make_refcount_block(&self, cx: &Cx<'_>, block: u64) -> Result<()> {
        let refcounts = &self.refcounts;
        let _growth = refcounts.growth.lock().await;
        self.check_own_refcount_table(cx).await?;
        // Where the block goes, and which block that makes: a cluster in a range without a block holds that range's
        // own.
        let mut stopped = None;
        let (cluster, block, own) = loop {
            let load = {
                let mut state = refcounts.state();
                if state.block(block).is_some() {
                    return Ok(());
                }
                match refcounts.find(&mut state, 1, &mut stopped) {
                    Ok(cluster) => {
                        let home = cluster >> refcounts.block_bits;
                        if block.max(home) >= state.table.len() as u64 {
                            None
                        } else if state.block(home).is_none() {
                            break (cluster, home, true);
                        } else if let Some(taken) = refcounts.take_one(&mut state, cluster) {
                            break (taken, block, false);
                        } else {
                            Some(cluster >> refcounts.slice_bits)
                        }
                    }
                    Err(Try::Load(slice)) => Some(slice),
                    Err(_) => return Err(IoError::EFBIG),
                }
            };
            match load {
                Some(slice) => self.load_refcounts(cx, slice).await?,
                None => return self.grow_refcount_table(cx, block).await,
            }
        };
        let host = cluster << self.layout.cluster_bits;
        // Counts that are not there are zero: all of the block must be on its way before the table knows it.
        let outcome = async {
            self.check_fresh_block(cx, cluster).await?;
            let range = ByteRange::new(host, self.layout.cluster()).ok_or(IoError::EFBIG)?;
            cx.below().write(range, Iov::zeroed(range.buffer_len()), WriteFlags::default()).await
        }
        .await;
        if let Err(error) = outcome {
            if !own {
                self.free_unused(cx, host, 1).await;
            }
            return Err(error);
        }
        self.metadata_mut().add(cluster, 1, Owner::RefcountBlock);
        refcounts.add_block(block, cluster, own);
        Ok(())
    }

    async fn check_fresh_block(&self, cx: &Cx<'_>, cluster: u64) -> Result<()> {
        self.refcounts.set_end(cluster + 1);
        self.check_allocated(cx, cluster << self.layout.cluster_bits, 1).await
    }

    /// Moves the refcount table to a larger place behind everything that is counted. The growth lock is held.
    ///
    /// The new table and the new blocks that count them are written and flushed before the header says where they are.
    async fn grow_refcount_table(&self, cx: &Cx<'_>, needed: u64) -> Result<()> {
        let refcounts = &self.refcounts;
        let _turn = self.commits.refcounts.lock().await;
        let bits = self.layout.cluster_bits;
        let (old_table, old_offset) = {
            let state = refcounts.state();
            (state.table.clone(), state.offset)
        };
        let place = NewTable::plan(old_table.len() as u64, needed, refcounts.block_bits, bits)?;
        refcounts.set_end(place.end());
        self.check_allocated(cx, place.first << bits, place.blocks + place.clusters).await?;
        let mut table = old_table.clone();
        table.resize(usize::try_from(place.entries).map_err(|_| IoError::EFBIG)?, 0);
        for (i, entry) in table[old_table.len()..].iter_mut().take(place.len_blocks()).enumerate() {
            *entry = (place.first + i as u64) << bits;
        }
        let slices = refcounts.cache.take_dirty();
        let outcome = self.write_new_table(cx, &place, &table, &slices).await;
        for (slice, _) in &slices {
            refcounts.cache.settle(*slice, outcome.is_ok());
        }
        outcome?;
        let old_clusters = (old_table.len() as u64 * 8) >> bits;
        {
            let mut metadata = self.metadata_mut();
            metadata.add(place.first, place.blocks, Owner::RefcountBlock);
            metadata.add(place.table(), place.clusters, Owner::RefcountTable);
            metadata.remove(old_offset >> bits, old_clusters);
        }
        {
            let mut state = refcounts.state();
            state.table = table;
            state.offset = place.table() << bits;
            state.dirty.clear();
        }
        // The header on disk does not know the old table any more, and nobody else ever looks at it.
        self.free_unused(cx, old_offset, old_clusters).await;
        Ok(())
    }

    async fn write_new_table(
        &self,
        cx: &Cx<'_>,
        place: &NewTable,
        table: &[u64],
        slices: &[crate::cache::Copy],
    ) -> Result<()> {
        let refcounts = &self.refcounts;
        let bits = self.layout.cluster_bits;
        let write = async |at: u64, bytes: Vec<u8>| {
            let range = ByteRange::new(at, bytes.len() as u64).ok_or(IoError::EFBIG)?;
            cx.below().write(range, Iov::copy_of(&bytes), WriteFlags::default()).await
        };
        for (slice, words) in slices {
            if let Some(at) = refcounts.slice_place(*slice) {
                write(at, to_bytes(words)).await?;
            }
        }
        let cluster_words = usize::try_from(self.layout.cluster() / 8).map_err(|_| IoError::EFBIG)?;
        for i in 0..place.blocks {
            let mut words = vec![0; cluster_words];
            let from = (place.first + (i << refcounts.block_bits)).max(place.first);
            let to = place.end().min(from + (1 << refcounts.block_bits));
            let per_slice = cluster_words >> (refcounts.block_bits - refcounts.slice_bits);
            for cluster in from..to {
                let slice = (cluster - from) >> refcounts.slice_bits;
                let start = usize::try_from(slice).map_err(|_| IoError::EFBIG)? * per_slice;
                refcounts.set(&mut words[start..start + per_slice], cluster, 1);
            }
            write((place.first + i) << bits, to_bytes(&words)).await?;
        }
        write(place.table() << bits, to_bytes(table)).await?;
        cx.below().flush().await?;
        let _turn = self.header_turn.lock().await;
        let clusters = u32::try_from(place.clusters).map_err(|_| IoError::EFBIG)?;
        let mut header = self.header();
        if let Err(error) = point_to_table(cx, place.table() << bits, clusters).await {
            // The disk may know the one or the other table now. It must be the old one, or nothing may be written any
            // more.
            let old = (header.refcount_table_offset, header.refcount_table_clusters);
            if point_to_table(cx, old.0, old.1).await.is_err() {
                self.give_up();
            }
            return Err(error);
        }
        header.refcount_table_offset = place.table() << bits;
        header.refcount_table_clusters = clusters;
        *self.header_mut() = header;
        Ok(())
    }
}

impl Refcounts {
    /// The table knows a new block; if it lies in the range that it counts, it counts itself.
    fn add_block(&self, block: u64, cluster: u64, own: bool) {
        let mut state = self.state();
        if own {
            let slice = cluster >> self.slice_bits;
            loop {
                self.cache.insert(slice, Words::zeroes((1usize << self.slice_bits << self.order) / 64));
                if self.cache.update(slice, |words| self.set(words, cluster, 1)).is_some() {
                    break;
                }
            }
            state.hint = cluster + 1;
        }
        if let Some(index) = usize::try_from(block).ok().filter(|&index| index < state.table.len()) {
            state.table[index] = cluster << self.cluster_bits;
            state.dirty.insert(index / SECTOR_ENTRIES);
        }
        state.changes += 1;
    }
}

/// Makes the header on disk say where the refcount table is: a part of one sector.
async fn point_to_table(cx: &Cx<'_>, offset: u64, clusters: u32) -> Result<()> {
    let mut fields = offset.to_be_bytes().to_vec();
    fields.extend(clusters.to_be_bytes());
    let range = ByteRange::between(48, 60);
    cx.below().write(range, Iov::copy_of(&fields), WriteFlags::default()).await?;
    cx.below().flush().await
}

/// Where a larger refcount table goes: from cluster `first` on, the blocks that count it all, then the table.
struct NewTable {
    first: u64,
    blocks: u64,
    clusters: u64,
    entries: u64,
}

impl NewTable {
    fn plan(old_entries: u64, needed: u64, block_bits: u32, cluster_bits: u32) -> Result<Self> {
        let first = old_entries << block_bits;
        let per_cluster = 1u64 << (cluster_bits - 3);
        let mut clusters = (needed + 1).max(old_entries + old_entries / 2).div_ceil(per_cluster);
        loop {
            // Blocks count themselves too; each counts at least 64 clusters, so this settles.
            let mut blocks = 1;
            while blocks << block_bits < blocks + clusters {
                blocks += 1;
            }
            if old_entries + blocks <= clusters * per_cluster {
                if clusters << cluster_bits > MAX_REFCOUNT_TABLE_BYTES {
                    return Err(IoError::EFBIG);
                }
                return Ok(Self { first, blocks, clusters, entries: clusters * per_cluster });
            }
            clusters += 1;
        }
    }

    fn table(&self) -> u64 {
        self.first + self.blocks
    }

    fn end(&self) -> u64 {
        self.first + self.blocks + self.clusters
    }

    fn len_blocks(&self) -> usize {
        usize::try_from(self.blocks).unwrap_or(0)
    }
}

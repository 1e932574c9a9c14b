//! Making the disk larger or smaller.
//!
//! Growing: first a larger L1 table if need be: it is written and durable before the header names it, in the same
//! sector as its length, and the old one is given free afterwards. Then whatever could show in the new part is removed
//! or zeroed (old clusters behind the end, the backing file where it is longer), then space is reserved; and when all
//! of that is durable the header gets the new size. A power cut leaves the old size or the new one.
//!
//! Shrinking: the header gets the new size first, so that no guest ever sees half of the lost part; then its clusters
//! are given free. A power cut in between leaves clusters mapped behind the end, which growing removes.

use underlay_graph::range_lock::Mode;
use underlay_graph::{ByteRange, Cx, IoError, Place, Preallocation, Result, WriteFlags, ZeroFlags};
use underlay_sys::Iov;

use crate::check::{Fix, check, words};
use crate::entry::{Entry, OFFSET};
use crate::features;
use crate::header::{Header, MAX_L1_BYTES};
use crate::live::Qcow2;
use crate::metadata::Owner;
use crate::refblocks;

/// The L1 table is copied in pieces of this many bytes.
const PIECE: u64 = 1 << 20;
/// Clusters that are reserved at once, at most.
const RUN: u64 = 1 << 30;

impl Qcow2 {
    /// Gives the disk another size, in bytes: a multiple of 512. Growth reads as zeroes.
    pub(crate) async fn change_size(
        &self,
        cx: &Cx<'_>,
        size: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        if !size.is_multiple_of(512) {
            return Err(IoError::EINVAL.with("The new size must be a multiple of 512"));
        }
        if !self.layout.v3 && self.header().snapshots > 0 {
            // The entries of the snapshots do not say how large the disk was.
            return Err(IoError::ENOTSUP.with("Can't resize a v2 image which has snapshots"));
        }
        self.check_bitmaps_can_be_resized(size)?;
        self.begin_change(cx).await?;
        let _turn = self.resizing.lock().await;
        let old = self.size();
        match size.cmp(&old) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => self.grow(cx, old, size, preallocation).await,
            std::cmp::Ordering::Less if preallocation != Preallocation::Off => {
                Err(IoError::EINVAL.with("Preallocation can't be used for shrinking an image"))
            }
            std::cmp::Ordering::Less => self.shrink(cx, old, size).await,
        }
    }

    async fn grow(&self, cx: &Cx<'_>, old: u64, size: u64, preallocation: Preallocation) -> Result<()> {
        let too_large = || IoError::EFBIG.with("Failed to grow the L1 table: File too large");
        let reach = self.layout.table_reach_bits();
        let needed = size.checked_add((1 << reach) - 1).ok_or_else(too_large)? >> reach;
        if needed * 8 > MAX_L1_BYTES {
            return Err(too_large());
        }
        if needed > self.l1().entries.len() as u64 {
            self.grow_l1(cx, needed).await?;
        }
        self.clear_new_part(cx, old, size).await?;
        if preallocation != Preallocation::Off {
            self.reserve(cx, old.next_multiple_of(self.layout.cluster()), size, preallocation).await?;
        }
        self.commit(cx).await?;
        self.store_size(cx, size).await?;
        self.set_size(size);
        Ok(())
    }

    async fn shrink(&self, cx: &Cx<'_>, old: u64, size: u64) -> Result<()> {
        self.commit(cx).await?;
        self.set_size(size);
        if let Err(error) = self.store_size(cx, size).await {
            self.set_size(old);
            return Err(error);
        }
        // The disk is shorter now, whatever comes: what is left behind its end is only not used.
        let freed = match self.unmap_behind(cx, size).await {
            Ok(()) => self.settle(cx).await,
            failed => failed,
        };
        if let Err(error) = freed {
            tracing::warn!(%error, "not all of what is behind the new end was freed");
        }
        Ok(())
    }

    /// Writes the header with another size.
    async fn store_size(&self, cx: &Cx<'_>, size: u64) -> Result<()> {
        self.switch_header(cx, |header| header.size = size).await
    }

    /// Moves the L1 table to where it can have `entries` entries.
    async fn grow_l1(&self, cx: &Cx<'_>, entries: u64) -> Result<()> {
        let context = |error: IoError| error.context("Failed to grow the L1 table");
        self.check_own_l1(cx).await.map_err(context)?;
        let cluster = self.layout.cluster();
        let count = (entries * 8).div_ceil(cluster);
        let host = self.alloc_clusters(cx, count).await.map_err(context)?.host;
        // Nothing is written back meanwhile: the table on disk is complete and does not change. What is linked in
        // memory from now on goes to the new table with the next commit.
        let _covered = self.commits.turn.lock().await;
        let old = self.header();
        if let Err(error) = self.copy_l1(cx, &old, host, entries * 8).await {
            self.free_unused(cx, host, count).await;
            return Err(context(error));
        }
        self.metadata_mut().add(host / cluster, count, Owner::L1);
        let (len, l1_entries) = match (usize::try_from(entries), u32::try_from(entries)) {
            (Ok(len), Ok(entries)) => (len, entries),
            _ => return Err(context(IoError::EFBIG)),
        };
        let named =
            self.switch_header(cx, |header| (header.l1_offset, header.l1_entries) = (host, l1_entries));
        // After an error the new one stays allocated: it may be on disk that the header names it.
        named.await.map_err(context)?;
        {
            let mut l1 = self.l1_mut();
            l1.offset = host;
            l1.entries.resize(len, 0);
        }
        let old_count = old.l1_bytes().div_ceil(cluster);
        if old_count > 0 {
            self.metadata_mut().remove(old.l1_offset / cluster, old_count);
            self.drop_clusters(old.l1_offset, old_count, true);
        }
        Ok(())
    }

    /// Copies the L1 table to `host`, and fills up with zeroes to `len` bytes. Durable on return, as is all that it
    /// refers to.
    async fn copy_l1(&self, cx: &Cx<'_>, old: &Header, host: u64, len: u64) -> Result<()> {
        self.commit_now(cx).await?;
        let mut at = 0;
        while at < len {
            let piece = PIECE.min(len - at);
            let buffer = Iov::zeroed(usize::try_from(piece).map_err(|_| IoError::EFBIG)?);
            let have = ByteRange::between(at, (at + piece).min(old.l1_bytes()));
            if !have.is_empty() {
                let from = ByteRange::between(old.l1_offset + have.start(), old.l1_offset + have.end());
                cx.below().read(from, buffer.slice(0, have.buffer_len())).await?;
            }
            let to = ByteRange::new(host + at, piece).ok_or(IoError::EFBIG)?;
            cx.below().write(to, buffer, WriteFlags::default()).await?;
            at += piece;
        }
        cx.below().flush().await
    }

    /// Nothing old may show between `old` and `size`.
    async fn clear_new_part(&self, cx: &Cx<'_>, old: u64, size: u64) -> Result<()> {
        let cluster = self.layout.cluster();
        let end = size.next_multiple_of(cluster);
        let whole = old.next_multiple_of(cluster).min(end);
        self.unmap_behind(cx, old).await?;
        let flags = ZeroFlags { may_unmap: false, no_fallback: false };
        let below = cx.backing().map_or(0, |backing| backing.length());
        // The rest of the last cluster, then what the backing file has.
        self.clear_rest(cx, ByteRange::between(old, whole), below).await?;
        let shown = ByteRange::between(whole, below.min(size));
        if !shown.is_empty() {
            self.zero_or_write(cx, shown, flags).await?;
        }
        Ok(())
    }

    /// Zeroes what would show of `range`, less than a cluster behind the end of the disk.
    async fn clear_rest(&self, cx: &Cx<'_>, range: ByteRange, below: u64) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let extent = self.map_slow(cx, rest).await?;
            let (here, later) = rest.split(extent.len);
            rest = later;
            let shows = match extent.place {
                Place::Zero => false,
                Place::Below => here.start() < below,
                Place::Data(_) | Place::Encoded | Place::Unknown => true,
            };
            let zeroes = Iov::zeroed(here.buffer_len());
            if !shows {
                continue;
            }
            match self.write_fast(cx, here, &zeroes).await {
                Some(written) => written?,
                None => self.write_allocating(cx, here, zeroes).await?,
            }
        }
        Ok(())
    }

    async fn zero_or_write(&self, cx: &Cx<'_>, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        match self.zero(cx, range, flags).await {
            Err(error) if error == IoError::ENOTSUP => {}
            other => return other,
        }
        // Version 2 over a backing file has no other way.
        let mut rest = range;
        while !rest.is_empty() {
            let (here, later) = rest.split(PIECE);
            self.write_allocating(cx, here, Iov::zeroed(here.buffer_len())).await?;
            rest = later;
        }
        Ok(())
    }

    /// Removes all mappings of whole clusters from `from` on, and the L2 tables that map nothing else.
    async fn unmap_behind(&self, cx: &Cx<'_>, from: u64) -> Result<()> {
        let (cluster, reach) = (self.layout.cluster(), self.layout.table_reach_bits());
        let tables = self.l1().entries.len() as u64;
        let range = ByteRange::between(from.next_multiple_of(cluster), tables << reach);
        if range.is_empty() {
            return Ok(());
        }
        self.unmap(cx, range).await?;
        for index in from.div_ceil(1 << reach)..tables {
            let _turn = self.tables.lock(index).await;
            let table = self.l1().get(index) & OFFSET;
            if table == 0 {
                continue;
            }
            self.check_own_table(cx, index).await?;
            self.check_own_l1(cx).await?;
            self.l1_mut().set(index, 0);
            self.metadata_mut().leave_table(table / cluster);
            self.drop_clusters(table, 1, true);
        }
        Ok(())
    }

    /// Reserves clusters for `from` (a multiple of the cluster size) up to `size`.
    async fn reserve(&self, cx: &Cx<'_>, from: u64, size: u64, how: Preallocation) -> Result<()> {
        let cluster = self.layout.cluster();
        let mut rest = ByteRange::between(from, size.next_multiple_of(cluster));
        while !rest.is_empty() {
            let here = self.in_slice(rest).split(RUN).0;
            let _turn = self.ranges.lock(here, Mode::Exclusive).await;
            self.ensure_table(cx, here.start()).await?;
            let count = here.len() / cluster;
            let new = self.alloc_clusters(cx, count).await?;
            let place = ByteRange::new(new.host, here.len()).ok_or(IoError::EFBIG)?;
            if let Err(error) = self.prepare(cx, place, new.fresh, how).await {
                self.free_unused(cx, new.host, count).await;
                return Err(error);
            }
            let old = self.link_reserved(cx, here, new.host).await?;
            for entry in old {
                self.drop_entry(entry, true);
            }
            rest = rest.split(here.len()).1;
            self.relieve(cx).await?;
        }
        Ok(())
    }

    /// Makes new clusters read as zeroes and, for more than metadata, have their space.
    async fn prepare(&self, cx: &Cx<'_>, place: ByteRange, fresh: bool, how: Preallocation) -> Result<()> {
        let file = cx.below();
        match how {
            Preallocation::Full => {
                let mut rest = place;
                while !rest.is_empty() {
                    let (here, later) = rest.split(PIECE);
                    file.write(here, Iov::zeroed(here.buffer_len()), WriteFlags::default()).await?;
                    rest = later;
                }
                Ok(())
            }
            Preallocation::Falloc if file.length() <= place.start() => {
                file.node().resize(&file, place.end(), Preallocation::Falloc).await
            }
            Preallocation::Falloc => {
                file.write_zeroes(place, ZeroFlags { may_unmap: false, no_fallback: false }).await
            }
            _ if fresh && file.length() <= place.start() => {
                // Longer, but empty. What is mapped must not lie behind the end of the file.
                file.node().resize(&file, place.end(), Preallocation::Off).await
            }
            _ => file.write_zeroes(place, ZeroFlags { may_unmap: true, no_fallback: false }).await,
        }
    }

    async fn link_reserved(&self, cx: &Cx<'_>, here: ByteRange, host: u64) -> Result<Vec<Entry>> {
        let layout = self.layout;
        // Subclusters stay as they were: zero, where something was hidden.
        self.update_slice(cx, here.start(), |words| {
            let mut replaced = Vec::new();
            let mut at = here.start();
            while at < here.end() {
                let index = layout.entry_in_slice(at);
                let old = layout.get(words, index);
                let mut entry = layout.data(host + (at - here.start()));
                if layout.extended {
                    entry.map = old.map & (0xffff_ffff << 32);
                }
                if layout.host(old) != 0 {
                    replaced.push(old);
                }
                layout.set(words, index, entry);
                at += layout.cluster();
            }
            replaced
        })
        .await
    }
}

/// Cuts unused clusters off the end of the file of an image that nobody changes, as shrinking with QEMU does: the file
/// then ends where the last cluster in use ends. It is left as it is when the refcounts cannot be relied on.
pub async fn trim_file(file: &Cx<'_>) -> Result<()> {
    let header = Header::read(file).await.map_err(|error| IoError::EINVAL.with(error.to_string()))?;
    if header.has(features::DIRTY | features::CORRUPT) {
        return Ok(());
    }
    // A cluster that is in use and not counted would be lost.
    match check(file, Fix::None, &mut |_| ()).await {
        Ok(found) if found.corruptions == 0 && found.check_errors == 0 => {}
        _ => return Ok(()),
    }
    let cluster = header.cluster_size();
    let read = async |at: u64, len: u64| {
        let range = ByteRange::new(at, len).ok_or(IoError::EIO)?;
        let into = Iov::scratch(range.buffer_len());
        file.read(range, into.clone()).await?;
        Ok::<_, IoError>(into.to_vec())
    };
    let table =
        read(header.refcount_table_offset, u64::from(header.refcount_table_clusters) * cluster).await?;
    let entries: Vec<u64> = words(&table).collect();
    let per_block = header.refcounts_per_block();
    let clusters = file.length().div_ceil(cluster);
    for (index, entry) in entries.iter().enumerate().rev().filter(|(_, entry)| **entry != 0) {
        let index = index as u64;
        let block = read(entry & !511, cluster).await?;
        let used = (0..per_block).rev().find(|i| refblocks::get(&block, *i, header.refcount_order) != 0);
        if let Some(used) = used {
            let end = index * per_block + used + 1;
            if end <= clusters {
                file.node().resize(file, end * cluster, Preallocation::Off).await?;
            }
            return Ok(());
        }
    }
    Ok(())
}

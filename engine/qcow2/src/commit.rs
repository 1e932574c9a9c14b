//! Writing metadata back, in an order that a power cut at any moment cannot hurt.
//!
//! What is in memory is the truth and the disk lags behind. A commit makes the disk catch up with the moment at which
//! the commit began:
//!
//! 1. It takes note of the clusters that lost a reference, then copies of all changed L2 slices and L1 sectors, then of
//!    all changed refcount slices: in this order, because a cluster is counted before it is linked, written before it
//!    is linked, and unlinked before it is noted as dropped. So everything that the copies of L2 and L1 refer to has
//!    been written and counted in the copies of the refcounts, and what is noted as dropped is not referred to.
//! 2. Refcount slices are written. (When there are new refcount blocks: a flush, then the refcount table.) **Flush.**
//!    Now data, new (empty) L2 tables and refcounts are durable.
//! 3. L2 slices and L1 sectors are written, in any order: an entry refers only to what is durable, and an L1 entry that
//!    is there before its L2 table's new slices leads to an empty table. **Flush.** Now the commit is done.
//! 4. Dropped clusters go into quarantine ([`crate::frees`]): their refcounts go down, in memory, when nobody can use
//!    them any more, and on disk with the next commit. So on disk a refcount is never below the number of references.
//!
//! Every entry lies inside one 512-byte sector and each mixture of old and new sectors is sound, so torn
//! writes do no harm. Lazy refcounts need nothing else: counts are always written before what refers to them, so the
//! dirty bit is never needed, which the format allows. When a step fails everything it carried is dirty again.
//!
//! Without changed metadata a commit is one flush of the file. Flushes that arrive during a commit share the next.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};

use underlay_graph::format::join;
use underlay_graph::{ByteRange, Cx, Result, WriteFlags};
use underlay_sys::Iov;

use crate::cache::Copy;
use crate::live::Qcow2;
use crate::words::to_bytes;

/// Writes that are under way at once.
const PARALLEL: usize = 16;
/// Bytes of dropped clusters after which a commit happens without being asked for, so that they can be used again.
const MAX_DROPPED: u64 = 64 << 20;

/// Who waits for a commit.
#[derive(Debug, Default)]
pub struct Commits {
    /// The number of the last flush request that a finished commit covers.
    pub(crate) turn: tokio::sync::Mutex<u64>,
    arrivals: AtomicU64,
    /// Held while refcounts are on their way to the disk.
    pub(crate) refcounts: tokio::sync::Mutex<()>,
}

/// A write of the metadata: where and what.
type Piece = (u64, Vec<u8>);

impl Qcow2 {
    /// Makes everything durable that was done before the call.
    pub(crate) async fn commit(&self, cx: &Cx<'_>) -> Result<()> {
        let mine = self.commits.arrivals.fetch_add(1, Ordering::SeqCst) + 1;
        let mut covered = self.commits.turn.lock().await;
        if *covered >= mine {
            return Ok(());
        }
        self.usable()?;
        let upto = self.commits.arrivals.load(Ordering::SeqCst);
        self.commit_now(cx).await?;
        *covered = upto;
        Ok(())
    }

    /// Commits when there is much to write back or many clusters wait to be free: the bound of the caches.
    pub(crate) async fn relieve(&self, cx: &Cx<'_>) -> Result<()> {
        let crowded = |cache: &crate::cache::SliceCache| {
            let dirty = cache.dirty_count();
            dirty > 1 && dirty * 4 > cache.capacity() * 3
        };
        let dropped = self.pending_clusters() << self.layout.cluster_bits;
        if crowded(&self.l2) || crowded(&self.refcounts.cache) || dropped > MAX_DROPPED {
            self.commit(cx).await?;
        }
        Ok(())
    }

    pub(crate) async fn commit_now(&self, cx: &Cx<'_>) -> Result<()> {
        let frees = self.frees().take_pending();
        let l2 = self.l2.take_dirty();
        let l1 = self.l1_mut().take_dirty();
        let outcome = self.write_back(cx, &l2, &l1).await;
        for (slice, _) in &l2 {
            self.l2.settle(*slice, outcome.is_ok());
        }
        if let Err(error) = outcome {
            self.l1_mut().dirty_again(&l1);
            self.frees().put_back(frees);
            return Err(error);
        }
        self.quarantine(frees);
        self.reclaim(cx).await;
        Ok(())
    }

    async fn write_back(&self, cx: &Cx<'_>, l2: &[Copy], l1: &[Piece]) -> Result<()> {
        self.write_refcounts(cx).await?;
        if l2.is_empty() && l1.is_empty() {
            return Ok(());
        }
        let mut pieces: Vec<Piece> = l1.to_vec();
        for (slice, words) in l2 {
            if let Some(at) = self.slice_place(cx, *slice).await? {
                pieces.push((at, to_bytes(words)));
            }
        }
        write_pieces(cx, pieces).await?;
        cx.below().flush().await
    }

    /// Writes all changed refcounts (and the refcount table); durable on return, as is all data written before.
    pub(crate) async fn write_refcounts(&self, cx: &Cx<'_>) -> Result<()> {
        let _turn = self.commits.refcounts.lock().await;
        let table = self.refcounts.take_dirty_table();
        let slices = self.refcounts.cache.take_dirty();
        let outcome = self.write_refcount_copies(cx, &slices, &table).await;
        for (slice, _) in &slices {
            self.refcounts.cache.settle(*slice, outcome.is_ok());
        }
        if outcome.is_err() {
            self.refcounts.table_dirty_again(&table);
        }
        outcome
    }

    async fn write_refcount_copies(&self, cx: &Cx<'_>, slices: &[Copy], table: &[Piece]) -> Result<()> {
        let place = |(slice, words): &Copy| Some((self.refcounts.slice_place(*slice)?, to_bytes(words)));
        write_pieces(cx, slices.iter().filter_map(place).collect()).await?;
        if !table.is_empty() {
            cx.below().flush().await?;
            write_pieces(cx, table.to_vec()).await?;
        }
        cx.below().flush().await
    }

    /// Whether memory and disk differ, or clusters wait to be free.
    pub(crate) fn is_behind(&self) -> bool {
        self.l2.dirty_count() > 0 || self.refcounts.cache.dirty_count() > 0 || !self.frees().is_empty()
    }
}

/// Writes all pieces, several at once; neighbours as one.
pub(crate) async fn write_pieces(cx: &Cx<'_>, mut pieces: Vec<Piece>) -> Result<()> {
    pieces.sort_unstable_by_key(|(at, _)| *at);
    let mut merged: Vec<Piece> = Vec::with_capacity(pieces.len());
    for (at, bytes) in pieces {
        match merged.last_mut() {
            Some((start, all)) if *start + all.len() as u64 == at && all.len() < 1 << 20 => all.extend(bytes),
            _ => merged.push((at, bytes)),
        }
    }
    for group in merged.chunks(PARALLEL) {
        let write = |(at, bytes): &Piece| -> Pin<Box<dyn Future<Output = Result<()>> + Send + '_>> {
            let range = ByteRange::between(*at, *at + bytes.len() as u64);
            let from = Iov::copy_of(bytes);
            Box::pin(async move { cx.below().write(range, from, WriteFlags::default()).await })
        };
        join(group.iter().map(write).collect()).await?;
    }
    Ok(())
}

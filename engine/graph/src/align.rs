//! Requests that do not fit a node's alignment: read more, or read, modify and write back.
//!
//! While a block is being read, modified and written back nobody else may write to it, or that write would be
//! undone. So every write to a node that has an alignment takes its blocks: whole-block writes share them, and
//! a read-modify-write has them alone.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use underlay_sys::Iov;

use crate::chain::Reliers;
use crate::error::Result;
use crate::node::WriteFlags;
use crate::range_lock::{Mode, RangeGuard, RangeLock};
use crate::threshold::Threshold;
use crate::units::ByteRange;
use crate::view::Cx;

/// Who writes which blocks of a node right now, and how far anybody has written. Lives as long as the node, across
/// changes of the wiring.
#[derive(Debug, Default)]
pub struct Blocks {
    lock: RangeLock,
    highest: AtomicU64,
    pub(crate) threshold: Threshold,
    pub(crate) reliers: Reliers,
    /// Of a node that must not change under a reader; see [`Cx::overwrite`].
    serialised: OnceLock<RangeLock>,
}

impl Blocks {
    pub(crate) async fn shared(&self, range: ByteRange) -> RangeGuard {
        self.lock.lock(range, Mode::Shared).await
    }

    /// From now on readers are known, and [`Cx::overwrite`] waits for them.
    pub(crate) fn serialise(&self) -> &RangeLock {
        self.serialised.get_or_init(RangeLock::default)
    }

    pub(crate) fn is_serialised(&self) -> bool {
        self.serialised.get().is_some()
    }

    /// A reader's place, on a node where it matters.
    pub(crate) async fn reading(&self, range: ByteRange) -> Option<RangeGuard> {
        match self.serialised.get() {
            Some(readers) => Some(readers.lock(range, Mode::Shared).await),
            None => None,
        }
    }

    /// Everything before `end` may have been written. Most writes change nothing here, and only look.
    pub(crate) fn wrote_to(&self, end: u64) {
        if end > self.highest.load(Ordering::Relaxed) {
            self.highest.fetch_max(end, Ordering::Relaxed);
        }
    }

    /// The end of the highest write so far, in bytes.
    pub(crate) fn highest(&self) -> u64 {
        self.highest.load(Ordering::Relaxed)
    }
}

/// Reads the blocks around `range` and keeps what was asked for.
pub(crate) async fn read(cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
    let outer = range.align_out(u64::from(cx.limits().request_alignment));
    let whole = Iov::scratch(outer.buffer_len());
    cx.node().read(cx, outer, whole.clone()).await?;
    let skip = usize::try_from(range.start() - outer.start()).expect("less than a block");
    into.copy_from(&whole.slice(skip, into.len()));
    Ok(())
}

/// Writes, reading the blocks at both ends first when they are only partly overwritten.
pub(crate) async fn write(cx: &Cx<'_>, range: ByteRange, from: Iov, flags: WriteFlags) -> Result<()> {
    let alignment = u64::from(cx.limits().request_alignment);
    let blocks = &cx.view().blocks;
    if range.is_aligned(alignment) {
        let _turn = blocks.shared(range).await;
        return cx.node().write(cx, range, from, flags).await;
    }
    let outer = range.align_out(alignment);
    let _turn = blocks.lock.lock(outer, Mode::Exclusive).await;
    let block = usize::try_from(alignment).expect("a block fits memory");
    let mut all = Iov::default();
    if outer.start() < range.start() {
        let first = Iov::scratch(block);
        cx.node().read(cx, outer.split(alignment).0, first.clone()).await?;
        all.append(
            first.slice(0, usize::try_from(range.start() - outer.start()).expect("less than a block")),
        );
    }
    all.append(from);
    if range.end() < outer.end() {
        let last = Iov::scratch(block);
        let at = ByteRange::between(outer.end() - alignment, outer.end());
        cx.node().read(cx, at, last.clone()).await?;
        let skip = usize::try_from(range.end() - at.start()).expect("at most a block");
        all.append(last.slice(skip, block - skip));
    }
    // In one piece of aligned memory, as O_DIRECT wants it.
    let whole = Iov::scratch(all.len());
    whole.copy_from(&all);
    cx.node().write(cx, outer, whole, flags).await
}

//! The filter above the source of a mirror: passes everything through, and in the copy mode `write-blocking` writes to
//! the target too before a write is acknowledged.
//!
//! What of the source is not (or no longer) at the target is dirty. Copies by the job and writes through this filter
//! take turns where they touch the same granules, and both reach the target through the filter's own children: nobody
//! waits for a turn outside the gate that he holds, so a change of the graph finds everybody on the way out.
//!
//! ```text
//!   guest ──► mirror_top ──► target     write-blocking: second, and the granules stay clean
//!                  │
//!                  └───────► source     first; every write there makes its granules dirty …
//! ```
//!
//! … except the one that is on its way to the target, which this filter has announced ([`Tracked::expected`]). Somebody
//! who writes to the source past the filter is never announced, so what he wrote is dirty.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use underlay_graph::bitmap::DirtyBitmap;
use underlay_graph::range_lock::{Mode, RangeLock};
use underlay_graph::status::status;
use underlay_graph::view::Tracker;
use underlay_graph::{Access, ByteRange, Cx, Kind, Limits, Node, Perms, Result, Role, WriteFlags, ZeroFlags};
use underlay_sys::Iov;

/// What the job and the filter share.
#[derive(Debug)]
pub(crate) struct Tracked {
    pub(crate) dirty: DirtyBitmap,
    /// One copy or guest's write at a time for a granule.
    pub(crate) turns: RangeLock,
    /// The target does not show yet what will be below it: it must get whole clusters, and every zero. A granule is a
    /// cluster at least then, and only whole granules are written.
    pub(crate) unbacked: bool,
    /// The copy mode: `write-blocking`, or else `background`.
    pub(crate) blocking: Arc<AtomicBool>,
    /// Bytes of guests' writes that went to the target, for the job to count.
    copied: AtomicU64,
    /// The target's doubts that have been seen to.
    doubts: AtomicU64,
    /// Writes to the source that will be written to the target as well.
    expected: Mutex<Vec<ByteRange>>,
}

impl Tracked {
    pub(crate) fn new(size: u64, granularity: u64, unbacked: bool, blocking: bool) -> Arc<Self> {
        Arc::new(Self {
            dirty: DirtyBitmap::new(size, granularity),
            turns: RangeLock::default(),
            unbacked,
            blocking: Arc::new(AtomicBool::new(blocking)),
            copied: AtomicU64::new(0),
            doubts: AtomicU64::new(0),
            expected: Mutex::default(),
        })
    }

    pub(crate) fn is_blocking(&self) -> bool {
        self.blocking.load(Ordering::Relaxed)
    }

    /// The target's doubts that have been seen to.
    pub(crate) fn doubts(&self) -> u64 {
        self.doubts.load(Ordering::Relaxed)
    }

    /// What was written to the target before the job does not concern it.
    pub(crate) fn begin_with(&self, doubts: u64) {
        self.doubts.store(doubts, Ordering::Relaxed);
    }

    /// Makes the target durable. False: it has lost something, and all of it is to be copied once more.
    pub(crate) async fn flush(&self, target: &Cx<'_>) -> Result<bool> {
        let flushed = target.flush().await;
        let doubts = target.doubts();
        if self.doubts() == doubts || !target.forgive() {
            return flushed.map(|()| true);
        }
        self.doubts.store(doubts, Ordering::Relaxed);
        self.dirty.set(ByteRange::between(0, self.dirty.size()));
        Ok(false)
    }

    /// Bytes that guests have written to the target since the last call.
    pub(crate) fn take_copied(&self) -> u64 {
        self.copied.swap(0, Ordering::Relaxed)
    }

    fn expected(&self) -> MutexGuard<'_, Vec<ByteRange>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `range` was announced; it is not any more.
    fn take_expected(&self, range: ByteRange) -> bool {
        let mut expected = self.expected();
        let at = expected.iter().position(|other| *other == range);
        at.map(|at| expected.swap_remove(at)).is_some()
    }
}

impl Tracker for Tracked {
    fn touched(&self, range: ByteRange) {
        if !self.take_expected(range) {
            self.dirty.set(range);
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct MirrorTop(pub(crate) Arc<Tracked>);

impl MirrorTop {
    /// What the guest uses.
    pub(crate) fn source<'a>(cx: &Cx<'a>) -> Cx<'a> {
        cx.backing().expect("mirror_top has its source as long as it exists")
    }

    /// Where it is copied to.
    pub(crate) fn target<'a>(cx: &Cx<'a>) -> Cx<'a> {
        cx.child(Role::Target).expect("mirror_top has its target as long as it exists")
    }
}

#[async_trait]
impl Node for MirrorTop {
    fn driver(&self) -> &'static str {
        "mirror_top"
    }
    fn kind(&self) -> Kind {
        Kind::Filter
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn length(&self, cx: &Cx<'_>) -> u64 {
        Self::source(cx).length()
    }
    fn limits(&self, cx: &Cx<'_>) -> Limits {
        Self::source(cx).limits()
    }
    fn child_access(&self, _access: Access, role: Role) -> Option<(Perms, Perms)> {
        // A root of the job's has the target.
        (role == Role::Target).then_some((Perms::NONE, Perms::ALL))
    }
    async fn read(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        Self::source(cx).read(range, into).await
    }
    async fn write(&self, cx: &Cx<'_>, range: ByteRange, from: Iov, flags: WriteFlags) -> Result<()> {
        if !self.0.is_blocking() {
            return Self::source(cx).write(range, from, flags).await;
        }
        let granules = range.align_out(self.0.dirty.granularity());
        let _turn = self.0.turns.lock(granules, Mode::Exclusive).await;
        self.0.expected().push(range);
        let written = Self::source(cx).write(range, from.clone(), flags).await;
        self.0.take_expected(range);
        let copied = match &written {
            Ok(()) if self.0.unbacked => {
                copy_to_unbacked(cx, range, from, granules.before(self.length(cx))).await
            }
            Ok(()) => Self::target(cx).write(range, from, WriteFlags::default()).await,
            Err(_) => Ok(()),
        };
        if written.is_err() || copied.is_err() {
            // The job copies what is there now, and meets the error that the target has.
            self.0.dirty.set(range);
        } else {
            self.0.copied.fetch_add(range.len(), Ordering::Relaxed);
        }
        written
    }
    async fn write_zeroes(&self, cx: &Cx<'_>, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        Self::source(cx).write_zeroes(range, flags).await
    }
    async fn discard(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        Self::source(cx).discard(range).await
    }
    async fn flush(&self, cx: &Cx<'_>) -> Result<()> {
        Self::source(cx).flush().await
    }
    async fn close(&self, _cx: &Cx<'_>) -> Result<()> {
        Ok(())
    }
}

/// Writes `from` to a target that lacks its backing node; and all of `granules`, which are the caller's alone, if it
/// has not all of them yet: it would fill up its clusters with zeroes.
async fn copy_to_unbacked(cx: &Cx<'_>, range: ByteRange, from: Iov, granules: ByteRange) -> Result<()> {
    let mut missing = granules;
    while !missing.is_empty() {
        let found = status(&MirrorTop::target(cx), missing, None).await?;
        if !found.allocated {
            break;
        }
        missing = missing.split(found.len).1;
    }
    if missing.is_empty() {
        return MirrorTop::target(cx).write(range, from, WriteFlags::default()).await;
    }
    let bytes = Iov::scratch(granules.buffer_len());
    MirrorTop::source(cx).read(granules, bytes.clone()).await?;
    MirrorTop::target(cx).write(granules, bytes, WriteFlags::default()).await
}

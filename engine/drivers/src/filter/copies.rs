//! A disk as it was at some moment, while it is written to: what has been copied away, what has not yet, and the
//! copying.
//!
//! Every cluster of the disk is in one of three states:
//!
//! ```text
//!   to be copied     still as it was; the disk itself shows it       `todo` and `visible`
//!   copied           the disk may have changed; the target shows it  `visible` only
//!   not wanted       nobody keeps it                                 neither
//! ```
//!
//! A cluster leaves the first state once and for ever. Who copies a cluster has it alone, and who reads a cluster that
//! is to be copied shares it with other readers, so it is not copied, and so not overwritten, under them. A write to
//! clusters that are not to be copied has nothing to wait for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use underlay_graph::bitmap::DirtyBitmap;
use underlay_graph::range_lock::{Mode, RangeGuard, RangeLock};
use underlay_graph::reflink::Reflinks;
use underlay_graph::status::status;
use underlay_graph::{ByteRange, Cx, Extent, IoError, Place, Result, WriteFlags, ZeroFlags};
use underlay_sys::Iov;
use underlay_sys::buffers::Buffers;

use super::snapshot_access::SnapshotAccess;

/// Bytes in one copy, if nobody wants it smaller.
pub const CHUNK: u64 = 1 << 20;

/// Bytes of one copy that are in memory at a time, however large the clusters are: the largest cluster that an image
/// can have, which is written as a whole.
const MOST_IN_MEMORY: u64 = 2 << 20;

/// The smallest cluster. Source: `design/qemu-surface.md` 3.
pub const LEAST_CLUSTER: u64 = 64 << 10;

/// How to copy.
#[derive(Clone, Copy, Debug)]
pub struct HowToCopy {
    /// Bytes that are copied as a whole, a power of two; at least the target's cluster size.
    pub cluster: u64,
    /// Most bytes in one copy, at least a cluster.
    pub chunk: u64,
    /// Store the copies compressed.
    pub compress: bool,
    /// Discard on the disk what has been copied.
    pub discard_source: bool,
    /// Share storage with the disk where that can be.
    pub reflink: bool,
    /// The target must hold every zero itself: who has only a part of the disk there gives it a backing file some day.
    pub every_zero: bool,
}

/// A copy that failed.
#[derive(Clone, Debug)]
pub struct CopyError {
    /// Why.
    pub error: IoError,
    /// Reading the disk failed, else writing the copy.
    pub is_read: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Copies {
    how: HowToCopy,
    /// Clusters to be copied.
    todo: DirtyBitmap,
    /// Clusters that can be read as they were.
    visible: DirtyBitmap,
    turns: RangeLock,
    /// Bytes copied so far, in whole clusters.
    copied: Arc<AtomicU64>,
    /// Why the moment is lost: something was overwritten that could not be copied.
    lost: OnceLock<IoError>,
    buffers: Buffers,
    reflinks: Reflinks,
}

/// The disk and where it is copied to.
#[derive(Clone, Copy, Debug)]
pub struct Ends<'a> {
    /// The disk.
    pub source: Cx<'a>,
    /// Where it is copied to.
    pub target: Cx<'a>,
}

impl Copies {
    /// Of a disk of `size` bytes that is to be copied whole.
    pub fn new(size: u64, how: HowToCopy) -> Arc<Self> {
        let all = || {
            let bitmap = DirtyBitmap::new(size, how.cluster);
            bitmap.set(ByteRange::between(0, size));
            bitmap
        };
        let (todo, visible) = (all(), all());
        let (turns, copied, lost) = (RangeLock::default(), Arc::default(), OnceLock::new());
        let (buffers, reflinks) = (Buffers::default(), Reflinks::new(how.reflink));
        Arc::new(Self { how, todo, visible, turns, copied, lost, buffers, reflinks })
    }

    /// Nobody wants more than the clusters in which something is dirty in `bits`. For the very beginning, before
    /// anything is copied or read.
    pub fn limit_to(&self, bits: &DirtyBitmap) {
        for clusters in [&self.todo, &self.visible] {
            clusters.clear(ByteRange::between(0, clusters.size()));
            clusters.merge(bits);
        }
    }

    /// Clusters that are to be copied now.
    pub fn rest(&self) -> DirtyBitmap {
        self.todo.copy()
    }

    /// How it is copied.
    pub fn how(&self) -> HowToCopy {
        self.how
    }

    /// Most bytes to be copied at once when nobody limits the speed, a power of two.
    pub fn stride(&self) -> u64 {
        (1 << self.how.chunk.ilog2()).max(self.reflinks.stride())
    }

    /// Bytes copied so far, by anybody, in whole clusters.
    pub fn copied(&self) -> &Arc<AtomicU64> {
        &self.copied
    }

    /// Bytes still to be copied, in whole clusters.
    pub fn left(&self) -> u64 {
        self.todo.count_whole()
    }

    /// The first clusters at or behind the start of `range` that are to be copied, as far as they touch it.
    pub fn next(&self, range: ByteRange) -> Option<ByteRange> {
        let run = self.todo.peek(range.start(), range.len().max(self.how.cluster))?;
        Some(run.intersect(range)).filter(|run| !run.is_empty())
    }

    /// Nobody wants these clusters (whole ones, or the end of the disk) unless they are copied already.
    pub async fn leave_out(&self, clusters: ByteRange) {
        let _turn = self.turns.lock(clusters, Mode::Exclusive).await;
        let mut rest = clusters;
        while !rest.is_empty() {
            let (todo, len) = self.todo.run_at(rest);
            let (run, later) = rest.split(len);
            if todo {
                self.visible.clear(run);
                self.todo.clear(run);
            }
            rest = later;
        }
    }

    /// Why the disk as it was cannot be had any more.
    pub fn lost(&self) -> Option<&IoError> {
        self.lost.get()
    }

    /// From now on nothing is copied any more, and nothing can be read as it was.
    pub fn lose(&self, error: IoError) {
        let _ = self.lost.set(error);
    }

    /// Whether a write to `range` has to wait for a copy.
    pub fn is_wanted(&self, range: ByteRange) -> bool {
        self.lost.get().is_none() && self.todo.any(range)
    }

    /// The clusters that `range` touches, in a disk of `length` bytes.
    pub fn clusters(&self, range: ByteRange, length: u64) -> ByteRange {
        range.align_out(self.how.cluster).before(length.max(range.end()))
    }

    /// Copies what of `clusters` (whole ones, or the end of the disk) is to be copied, for somebody who waits to write
    /// there. After an error the rest still is.
    pub async fn copy(&self, ends: Ends<'_>, clusters: ByteRange) -> std::result::Result<(), CopyError> {
        self.copy_with(ends, clusters, None).await
    }

    /// The same for nobody in particular: storage may be shared, which can take a moment.
    pub async fn copy_in_background(
        &self,
        ends: Ends<'_>,
        clusters: ByteRange,
    ) -> std::result::Result<(), CopyError> {
        self.copy_with(ends, clusters, Some(&self.reflinks)).await
    }

    async fn copy_with(
        &self,
        ends: Ends<'_>,
        clusters: ByteRange,
        reflinks: Option<&Reflinks>,
    ) -> std::result::Result<(), CopyError> {
        let _turn = self.turns.lock(clusters, Mode::Exclusive).await;
        let mut rest = clusters;
        while !rest.is_empty() {
            if let Some(error) = self.lost.get() {
                return Err(CopyError { error: error.clone(), is_read: false });
            }
            let (todo, len) = self.todo.run_at(rest);
            let (run, later) = rest.split(len);
            if !todo {
                rest = later;
                continue;
            }
            let done = self.copy_first(ends, run, reflinks).await?;
            self.todo.clear(done);
            self.copied.fetch_add(done.len().next_multiple_of(self.how.cluster), Ordering::Relaxed);
            if self.how.discard_source {
                discard_copied(ends, done).await;
            }
            rest = rest.split(done.len()).1;
        }
        Ok(())
    }

    /// Copies the first clusters of `run`, which are the caller's alone: those that it returns.
    async fn copy_first(
        &self,
        ends: Ends<'_>,
        run: ByteRange,
        reflinks: Option<&Reflinks>,
    ) -> std::result::Result<ByteRange, CopyError> {
        let of_read = |error| CopyError { error, is_read: true };
        let of_write = |error| CopyError { error, is_read: false };
        let found = status(&ends.source, run, None).await.map_err(of_read)?;
        let whole = if found.len == run.len() { run.len() } else { found.len - found.len % self.how.cluster };
        if found.zero && whole > 0 {
            let zeroes = run.split(whole).0;
            self.zero(ends.target, zeroes).await.map_err(of_write)?;
            return Ok(zeroes);
        }
        let data = run.split(found.len.next_multiple_of(self.how.cluster)).0;
        if let Some(reflinks) = reflinks
            && let Some(shared) = self.reflink_first(ends, data, reflinks).await
        {
            return Ok(shared);
        }
        let piece = data.split(self.how.chunk).0;
        let mut rest = piece;
        while !rest.is_empty() {
            let (part, later) = rest.split(MOST_IN_MEMORY);
            self.copy_part(ends, part).await?;
            rest = later;
        }
        Ok(piece)
    }

    /// Copies bytes.
    async fn copy_part(&self, ends: Ends<'_>, part: ByteRange) -> std::result::Result<(), CopyError> {
        let buffer = self.buffers.take(part.buffer_len());
        let bytes = buffer.slice(0, part.buffer_len());
        let result = match ends.source.read(part, bytes.clone()).await {
            Ok(()) => {
                let _readers = ends.target.overwrite(part).await;
                let flags = WriteFlags { compressed: self.how.compress };
                let written = ends.target.write(part, bytes, flags).await;
                written.map_err(|error| CopyError { error, is_read: false })
            }
            Err(error) => Err(CopyError { error, is_read: true }),
        };
        self.buffers.put(buffer);
        result
    }

    /// Copies the first clusters of `data` without copying their bytes, if that can be.
    async fn reflink_first(&self, ends: Ends<'_>, data: ByteRange, reflinks: &Reflinks) -> Option<ByteRange> {
        let stride = match reflinks.stride() {
            0 => return None,
            stride => stride.max(self.how.cluster),
        };
        let piece = data.split(stride).0;
        let _readers = ends.target.overwrite(piece).await;
        let done = reflinks.copy(&ends.source, piece, &ends.target, piece.start()).await;
        done.then_some(piece)
    }

    /// Makes the target hold zeroes itself: what it shows from below may be the very disk that is about to change.
    async fn zero(&self, target: Cx<'_>, range: ByteRange) -> Result<()> {
        let _readers = target.overwrite(range).await;
        let is_based =
            self.how.every_zero || target.skip_filters().backing().is_some() || target.lacks_backing();
        let mut rest = range;
        while !rest.is_empty() {
            let found = status(&target, rest, None).await?;
            let (run, later) = rest.split(found.len);
            let holds = found.zero && (!is_based || found.allocated && found.depth == 0);
            if !holds {
                target.write_zeroes(run, ZeroFlags { may_unmap: true, no_fallback: false }).await?;
            }
            rest = later;
        }
        Ok(())
    }

    /// Fills `into` with what `range` was.
    pub async fn read(&self, ends: Ends<'_>, range: ByteRange, into: Iov) -> Result<()> {
        let (mut rest, mut done) = (range, 0);
        while !rest.is_empty() {
            let found = self.find(ends, rest.split(CHUNK).0).await?;
            let part = into.slice(done, found.run.buffer_len());
            let result = found.at.read(found.run, part).await;
            self.still_there()?;
            result?;
            done += found.run.buffer_len();
            rest = rest.split(found.run.len()).1;
        }
        Ok(())
    }

    /// What the first bytes of `range` were: data or zeroes.
    pub async fn map(&self, ends: Ends<'_>, range: ByteRange) -> Result<Extent> {
        let found = self.find(ends, range).await?;
        let what = status(&found.at, found.run, None).await;
        self.still_there()?;
        let what = what?;
        let place = if what.zero { Place::Zero } else { Place::Data(range.start()) };
        Ok(Extent::new(place, what.len))
    }

    /// Nobody wants the clusters inside `range` any more: they cannot be read as they were from now on.
    pub async fn forget(&self, ends: Ends<'_>, range: ByteRange, length: u64) -> Result<()> {
        let inner = match range.end() == length {
            true => ByteRange::between(range.start().next_multiple_of(self.how.cluster).min(length), length),
            false => range.align_in(self.how.cluster),
        };
        if inner.is_empty() {
            return Ok(());
        }
        let _turn = self.turns.lock(inner, Mode::Exclusive).await;
        self.visible.clear(inner);
        self.todo.clear(inner);
        ends.target.discard(inner).await
    }

    /// Where the first bytes of `range` are as they were.
    async fn find<'a>(&self, ends: Ends<'a>, range: ByteRange) -> Result<Found<'a>> {
        let (visible, len) = self.visible.run_at(range);
        if !visible || self.lost.get().is_some() {
            return Err(IoError::EACCES);
        }
        let run = range.split(len).0;
        let turn = self.turns.lock(run, Mode::Shared).await;
        // Somebody may have had it forgotten while we waited.
        let (visible, len) = self.visible.run_at(run);
        if !visible {
            return Err(IoError::EACCES);
        }
        let run = run.split(len).0;
        let (todo, len) = self.todo.run_at(run);
        let at = if todo { ends.source } else { ends.target };
        Ok(Found { run: run.split(len).0, at, _turn: turn })
    }

    /// To be asked after reading: a write for which nobody could copy in time does not wait for readers, and a copy
    /// that was too slow may have copied what that write left.
    fn still_there(&self) -> Result<()> {
        self.lost.get().map_or(Ok(()), |_| Err(IoError::EACCES))
    }
}

/// Frees what has been copied on the disk, once the copy is durable; a moment, which a crash ends in any case, need not
/// wait for that. It only frees space: errors of the flush are met again at the end.
async fn discard_copied(ends: Ends<'_>, copied: ByteRange) {
    let is_moment = ends.source.skip_filters().node().as_any().is::<SnapshotAccess>();
    if is_moment || ends.target.flush().await.is_ok() {
        let _ = ends.source.discard(copied).await;
    }
}

/// A place to read from as long as it lives.
struct Found<'a> {
    run: ByteRange,
    at: Cx<'a>,
    /// Holds off who would copy or discard what is read.
    _turn: RangeGuard,
}

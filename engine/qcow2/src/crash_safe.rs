//! Bitmaps that are still good after a crash, with the regions of [`crate::ahead`].
//!
//! * When somebody begins to write, or makes the first bitmap persistent: the regions, none yet, are written to their
//!   place; then the header says so ([`features::DIRTY_REGIONS`]); only then are the bitmaps in the directory marked as
//!   in use.
//! * While he writes: each region is noted before the first write to it. Now and then, and whenever a command has
//!   changed what bitmaps say, they are stored again, still marked, and regions that nobody has written to meanwhile
//!   are taken back.
//! * When the image is closed the directory is stored unmarked, and the same write of the header ends the notes.
//!
//! So whoever opens the image after a crash finds bitmaps that are marked, and the notes: what the bitmaps say and all
//! noted regions, if they were recording, is at least what was written. The next store makes that part of them.

use std::sync::atomic::Ordering;

use underlay_graph::bitmap::DirtyBitmap;
use underlay_graph::bitmaps::PlanBitmap;
use underlay_graph::{ByteRange, Cx, Result};

use crate::ahead::{self, Ahead};
use crate::bitmaps::{IN_USE, StoredBitmap};
use crate::features;
use crate::header::{Header, Version};
use crate::live::Qcow2;
use crate::stored::State;
use crate::update::{header_end, room, write_features};

/// The notes of an image that is being opened, if there are any that hold.
pub(crate) async fn load(file: &Cx<'_>, header: &Header) -> Result<Option<Ahead>> {
    let wanted = features::BITMAPS | features::DIRTY_REGIONS;
    if header.autoclear & wanted != wanted || header.extensions.bitmaps.is_none() {
        return Ok(None);
    }
    Ahead::load(file, header.cluster_size()).await
}

/// Whether a bitmap can be relied on: it was closed, or the notes tell the rest.
pub(crate) fn is_good(entry: &StoredBitmap, ahead: Option<&Ahead>) -> bool {
    entry.flags & IN_USE == 0 || ahead.is_some_and(|ahead| !ahead.is_broken(&entry.name))
}

/// Most ranges that the bitmaps of an image are told, together: so many take about a second.
const MAX_TOLD: usize = 16 << 20;

/// What the bitmaps of an image have not been told, by the notes in it.
pub(crate) struct Missing {
    ranges: Vec<ByteRange>,
    /// Of all ranges together.
    bytes: u64,
    size: u64,
    /// How many ranges may still be told, for all bitmaps together.
    left: usize,
}

impl Missing {
    /// Of a disk of `size` bytes.
    pub(crate) fn new(ahead: Option<&Ahead>, size: u64) -> Self {
        let ranges = ahead.map_or_else(Vec::new, |ahead| ahead.ranges(size));
        let bytes = ranges.iter().map(|range| range.len()).sum();
        Self { ranges, bytes, size, left: MAX_TOLD }
    }

    /// Before another bitmap is told: if that is too much, it is told that all of the disk is dirty. The memory that
    /// this may take, at most, in bytes.
    pub(crate) fn prepare(&mut self, bits: &DirtyBitmap) -> u64 {
        match self.left.checked_sub(self.ranges.len()) {
            Some(left) => self.left = left,
            None => (self.ranges, self.bytes) = (vec![ByteRange::between(0, self.size)], self.size),
        }
        // Whole words are taken, and more, for small parts.
        self.bytes / bits.granularity() / 8 + self.bytes.min(1) * 4096
    }

    /// Adds to a bitmap what it has not been told.
    pub(crate) fn add_to(&self, bits: &DirtyBitmap) {
        self.ranges.iter().for_each(|range| bits.set(*range));
    }
}

impl Qcow2 {
    /// The notes, while the header says that they hold.
    pub(crate) fn ahead(&self) -> Option<&Ahead> {
        if self.ahead_holds.load(Ordering::Acquire) { self.ahead.get() } else { None }
    }

    /// Whether the image is of a kind that has room for notes.
    pub(crate) fn can_take_notes(&self) -> bool {
        self.header().version >= Version::V3 && ahead::place(self.layout.cluster()).is_some()
    }

    /// Begins to take notes, if the image has room for them. What the directory does not mark as in use must be good by
    /// now, and nobody may write before the end. The turn of `stored_turn` is the caller's.
    async fn take_notes(&self, cx: &Cx<'_>) -> Result<()> {
        let header = self.header();
        if self.ahead().is_some() || !self.can_take_notes() {
            return Ok(());
        }
        let Some(new) = Ahead::new(header.cluster_size()) else { return Ok(()) };
        let ahead = self.ahead.get_or_init(|| new);
        let fits = {
            let stored = self.stored();
            let broken = stored.entries.iter().filter(|entry| entry.flags & IN_USE != 0);
            ahead.restart(self.size(), broken.map(|entry| entry.name.as_str()))
        };
        let end = room(&Header { autoclear: features::DIRTY_REGIONS, ..header.clone() });
        if !fits || header_end(&cx.below(), &header).await? > end {
            return Ok(());
        }
        ahead.write(&cx.below()).await?;
        let _turn = self.header_turn.lock().await;
        let header = self.header();
        let autoclear = header.autoclear | features::DIRTY_REGIONS;
        write_features(&cx.below(), &Header { autoclear, ..header }).await?;
        self.header_mut().autoclear = autoclear;
        self.ahead_holds.store(true, Ordering::Release);
        Ok(())
    }

    /// The header says something else of the notes now, perhaps.
    pub(crate) fn notice_notes(&self) {
        let holds = self.header().autoclear & features::DIRTY_REGIONS != 0;
        self.ahead_holds.store(holds, Ordering::Release);
    }

    /// Somebody begins to write: bitmaps that are good stay so whatever happens. The turn of `stored_turn` is the
    /// caller's.
    pub(crate) async fn begin_notes(&self, cx: &Cx<'_>) -> Result<()> {
        let is_good = {
            let stored = self.stored();
            // What is marked already, and without notes, may be out of date.
            !stored.marked && stored.entries.iter().any(|entry| entry.flags & IN_USE == 0)
        };
        if is_good { self.take_notes(cx).await } else { Ok(()) }
    }

    /// Stores bitmaps of an image that goes on being written to, if that is of any use: marked as in use, with the
    /// notes for what comes. The turn of `stored_turn` is the caller's.
    pub(crate) async fn store_with_notes(&self, cx: &Cx<'_>, bitmaps: &[PlanBitmap]) -> Result<()> {
        let Some(ahead) = self.ahead() else {
            // Not before what the image has is good: it may have been written to without notes. No request is inside
            // now.
            self.store_as(cx, bitmaps, State::InUse).await?;
            self.take_notes(cx).await?;
            return self.commit(cx).await;
        };
        ahead.begin_epoch();
        self.store_as(cx, bitmaps, State::InUse).await?;
        ahead.forget(&cx.below()).await?;
        self.commit(cx).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_to_tell_is_told_as_one() {
        let ranges = vec![ByteRange::between(0, 512), ByteRange::between(4096, 4608)];
        let mut missing = Missing { ranges, bytes: 1024, size: 1 << 20, left: 3 };
        for expected in [1024, 1 << 20, 1 << 20] {
            let bits = DirtyBitmap::new(1 << 20, 512);
            assert!(missing.prepare(&bits) >= expected / 512 / 8);
            missing.add_to(&bits);
            assert_eq!(bits.count(), expected);
        }
    }
}

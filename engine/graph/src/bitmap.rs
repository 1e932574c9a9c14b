//! Dirty bitmaps: which granules of a node were written.
//!
//! A clean bitmap of a huge disk costs next to nothing and a full one a bit per granule.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bits::Bits;
pub use crate::bits::Words;
use crate::units::ByteRange;
use crate::view::Tracker;

/// Most granules of one bitmap: where every 64 KiB of the largest disk there may be is one.
const MAX_GRANULES: u64 = 1 << 47;

/// Remembers which granules were touched since it was last cleared. Shared between the guest's writes, which set
/// bits, and a job, which takes them.
#[derive(Debug)]
pub struct DirtyBitmap {
    /// Bytes per bit, a power of two.
    granularity: u64,
    state: Mutex<State>,
    /// Grows before and after anything is made clean.
    forgotten: AtomicU64,
}

#[derive(Debug)]
struct State {
    /// Bytes covered.
    size: u64,
    bits: Bits,
}

impl DirtyBitmap {
    /// A clean bitmap for `size` bytes, one bit for every `granularity` of them (a power of two).
    pub fn new(size: u64, granularity: u64) -> Self {
        assert!(granularity.is_power_of_two(), "granularity {granularity}");
        let bits = Bits::new(size.div_ceil(granularity));
        Self { granularity, state: Mutex::new(State { size, bits }), forgotten: AtomicU64::new(0) }
    }

    /// Whether there can be a bitmap of that granularity for so many bytes.
    pub fn fits(size: u64, granularity: u64) -> bool {
        granularity.is_power_of_two() && size.div_ceil(granularity) <= MAX_GRANULES
    }

    /// One that says the same.
    pub fn copy(&self) -> Self {
        let copy = Self::new(self.size(), self.granularity);
        copy.merge(self);
        copy
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a change that makes something clean.
    fn forgetting<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        self.forgotten.fetch_add(1, Ordering::SeqCst);
        let result = change(&mut state);
        self.forgotten.fetch_add(1, Ordering::SeqCst);
        // What the caller reads now, he reads after that.
        fence(Ordering::SeqCst);
        result
    }

    /// Bytes per bit.
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// Bytes covered.
    pub fn size(&self) -> u64 {
        self.state().size
    }

    /// The node has another length now; what was added is clean.
    pub fn resize(&self, size: u64) {
        self.forgetting(|state| state.resize(self.granularity, size));
    }

    /// Grows with every change: as long as it stays, so does what the bitmap says.
    pub fn changes(&self) -> u64 {
        self.state().bits.changes()
    }

    /// Dirty bytes, counted in whole granules (the last one as long as it is).
    pub fn count(&self) -> u64 {
        let state = self.state();
        let whole = state.bits.count().saturating_mul(self.granularity);
        let tail = state.size % self.granularity;
        let last_is_dirty = tail != 0 && state.bits.next(state.bits.len() - 1, true).is_some();
        if last_is_dirty { whole - self.granularity + tail } else { whole }
    }

    /// Dirty bytes as if all granules were whole: what users are shown.
    pub fn count_whole(&self) -> u64 {
        self.state().bits.count().saturating_mul(self.granularity)
    }

    /// Whether nothing is dirty.
    pub fn is_clean(&self) -> bool {
        self.state().bits.count() == 0
    }

    /// Marks every granule that `range` touches.
    pub fn set(&self, range: ByteRange) {
        self.state().put(self.granularity, range, true);
    }

    /// Marks every granule that `range` touches as clean.
    pub fn clear(&self, range: ByteRange) {
        self.forgetting(|state| state.put(self.granularity, range, false));
    }

    /// Whether the first granule that `range` touches is dirty, and for how many bytes of `range` it stays so.
    pub fn run_at(&self, range: ByteRange) -> (bool, u64) {
        let bits = &self.state().bits;
        let first = range.start() / self.granularity;
        let dirty = bits.next(first, true) == Some(first);
        let change = bits.next(first, !dirty).map_or(u64::MAX, |bit| bit.saturating_mul(self.granularity));
        (dirty, range.end().min(change) - range.start())
    }

    /// Whether any granule that `range` touches is dirty.
    pub fn any(&self, range: ByteRange) -> bool {
        let next = self.state().bits.next(range.start() / self.granularity, true);
        !range.is_empty() && next.is_some_and(|bit| bit.saturating_mul(self.granularity) < range.end())
    }

    /// The first dirty run at or behind `from`, at most `max` bytes of it (at least a granule).
    pub fn peek(&self, from: u64, max: u64) -> Option<ByteRange> {
        self.state().run(self.granularity, from, max).map(|(_, range)| range)
    }

    /// As [`DirtyBitmap::peek`], and clears it. Whoever takes it copies it.
    pub fn take(&self, from: u64, max: u64) -> Option<ByteRange> {
        self.forgetting(|state| {
            let (run, range) = state.run(self.granularity, from, max)?;
            state.bits.put_all(run, false);
            Some(range)
        })
    }

    /// Marks what is dirty in `other`, whose granules may be larger or smaller.
    pub fn merge(&self, other: &Self) {
        if std::ptr::eq(self, other) {
            return;
        }
        if self.granularity == other.granularity {
            return other.for_each_chunk(|first, words| self.load_words(first, words));
        }
        let (mut from, size) = (0, other.size());
        while let Some(run) = other.peek(from, u64::MAX).filter(|_| from < size) {
            self.set(run);
            from = run.end();
        }
    }

    /// Shows all that is dirty, in pieces: the number of the first granule (a multiple of 64) and words with a bit for
    /// each granule from there on, the first in bit 0. What is not shown is clean.
    pub fn for_each_chunk(&self, mut show: impl FnMut(u64, &Words)) {
        let mut from = 0;
        // Not under the lock: who looks may take its time.
        while let Some((first, words)) = self.next_words(from) {
            show(first, &words);
            from = first + words.len() as u64 * 64;
        }
    }

    /// The first of those pieces with anything dirty at or behind the granule `from`. (The piece may begin in front of
    /// it.)
    pub fn next_words(&self, from: u64) -> Option<(u64, Words)> {
        self.state().bits.next_words(from).map(|(first, words)| (first, *words))
    }

    /// Marks what is set in `words`, the first of which stands for the granules from `first` on (a multiple of 64).
    pub fn load_words(&self, first: u64, words: &[u64]) {
        self.state().bits.add_words(first, words);
    }
}

impl State {
    fn resize(&mut self, granularity: u64, size: u64) {
        self.size = size;
        self.bits.resize(size.div_ceil(granularity));
    }

    fn put(&mut self, granularity: u64, range: ByteRange, dirty: bool) {
        if range.is_empty() {
            return;
        }
        // For every write of a guest, and each of its bitmaps: no divisions.
        let shift = granularity.trailing_zeros();
        let end = (((range.end() - 1) >> shift) + 1).min(self.bits.len());
        self.bits.put_all(range.start() >> shift..end, dirty);
    }

    fn run(&self, granularity: u64, from: u64, max: u64) -> Option<(std::ops::Range<u64>, ByteRange)> {
        let first = self.bits.next(from / granularity, true)?;
        let most = (max / granularity).max(1);
        let end = self.bits.next(first, false).unwrap_or(self.bits.len()).min(first.saturating_add(most));
        let bytes = ByteRange::between(first * granularity, end.saturating_mul(granularity).min(self.size));
        Some((first..end, bytes))
    }
}

impl Tracker for DirtyBitmap {
    fn touched(&self, range: ByteRange) {
        // A file grows with what is written behind its end.
        let mut state = self.state();
        if range.end() > state.size {
            state.resize(self.granularity, range.end());
        }
        state.put(self.granularity, range, true);
    }

    fn granularity(&self) -> Option<u64> {
        Some(self.granularity)
    }

    fn forgotten(&self) -> u64 {
        self.forgotten.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_was_touched_once() {
        let bitmap = DirtyBitmap::new(10_000_000_000, 65536);
        assert!(bitmap.is_clean());
        bitmap.set(ByteRange::between(65535, 65537));
        bitmap.set(ByteRange::between(9_999_999_999, 10_000_000_000));
        assert_eq!(bitmap.count(), 2 * 65536 + 10_000_000_000 % 65536);
        assert_eq!(bitmap.take(0, 65536), Some(ByteRange::between(0, 65536)));
        assert_eq!(bitmap.take(0, 1 << 20), Some(ByteRange::between(65536, 131072)));
        let tail = bitmap.take(0, 1 << 20).expect("the last granule");
        assert_eq!(tail.end(), 10_000_000_000);
        assert!(bitmap.take(0, 1).is_none() && bitmap.is_clean());
    }

    #[test]
    fn merges_other_granularities() {
        let size = 100 * 65536 + 5;
        for (granularity, others) in [(65536, 65536), (4096, 65536), (65536, 512)] {
            let (bitmap, other) = (DirtyBitmap::new(size, granularity), DirtyBitmap::new(size, others));
            bitmap.set(ByteRange::between(0, 1));
            other.set(ByteRange::between(200_000, 200_001));
            other.set(ByteRange::between(size - 1, size));
            bitmap.merge(&other);
            let whole = |at: u64, granule: u64| {
                let start = at / granule * granule;
                ByteRange::between(start, (start + granule).min(size))
            };
            let coarse = granularity.max(others);
            assert_eq!(bitmap.take(0, u64::MAX), Some(whole(0, granularity)));
            assert_eq!(bitmap.take(0, u64::MAX), Some(whole(200_000, coarse)));
            assert_eq!(bitmap.take(0, u64::MAX), Some(whole(size - 1, granularity.min(coarse))));
            assert!(bitmap.is_clean());
            assert_eq!(other.copy().count(), other.count());
        }
    }

    #[test]
    fn grows_and_shrinks() {
        let bitmap = DirtyBitmap::new(5 << 30, 512);
        bitmap.set(ByteRange::between(0, 5 << 30));
        bitmap.resize((1 << 30) + 100);
        assert_eq!(bitmap.count(), (1 << 30) + 100);
        bitmap.resize(8 << 40);
        assert_eq!(bitmap.count(), (1 << 30) + 512);
        assert_eq!(bitmap.peek(1 << 20, u64::MAX), Some(ByteRange::between(1 << 20, (1 << 30) + 512)));
        bitmap.resize(0);
        assert!(bitmap.is_clean() && bitmap.peek(0, 1).is_none());
    }

    #[test]
    fn agrees_with_a_plain_set() {
        let bitmap = DirtyBitmap::new(1 << 22, 512);
        let mut model = std::collections::BTreeSet::new();
        let mut seed = 1_u64;
        for _ in 0..4000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let start = (seed >> 33) % (1 << 22);
            let range = ByteRange::between(start, (start + (seed >> 50)).min(1 << 22));
            if range.is_empty() {
                continue;
            }
            let granules = range.start() / 512..range.end().div_ceil(512);
            if seed & 4 == 0 {
                bitmap.clear(range);
                granules.for_each(|g| {
                    model.remove(&g);
                });
            } else {
                bitmap.set(range);
                model.extend(granules);
            }
        }
        assert_eq!(bitmap.count(), model.len() as u64 * 512);
        for start in (0..1 << 22).step_by(4711) {
            let range = ByteRange::between(start, (start + 9000).min(1 << 22));
            let is_dirty = |granule: &u64| model.contains(granule);
            let mut granules = range.start() / 512..range.end().div_ceil(512);
            assert_eq!(bitmap.any(range), granules.clone().any(|granule| is_dirty(&granule)));
            let first = is_dirty(&granules.start);
            let end = granules
                .find(|granule| is_dirty(granule) != first)
                .map_or(range.end(), |change| change * 512);
            assert_eq!(bitmap.run_at(range), (first, end - range.start()));
        }
        let mut taken = Vec::new();
        while let Some(range) = bitmap.take(0, 4096) {
            taken.extend(range.start() / 512..range.end() / 512);
        }
        assert_eq!(taken, model.into_iter().collect::<Vec<_>>());
    }
}

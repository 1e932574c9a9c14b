//! Dirty bitmaps: which granules of a node were written.
//!
//! The bits live in chunks that exist only where something is dirty, so a clean bitmap of a huge disk costs next
//! to nothing and a full one a bit per granule.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::units::ByteRange;
use crate::view::Tracker;

const CHUNK_WORDS: usize = 512;
const CHUNK_BITS: u64 = CHUNK_WORDS as u64 * 64;

#[derive(Debug)]
struct Chunk {
    set: u64,
    words: Box<[u64; CHUNK_WORDS]>,
}

#[derive(Debug, Default)]
struct Bits {
    chunks: Vec<Option<Chunk>>,
    granules: u64,
    set: u64,
}

fn split(bit: u64) -> (usize, usize, u64) {
    let within = bit % CHUNK_BITS;
    let index = |n: u64| usize::try_from(n).expect("a 64-bit machine");
    (index(bit / CHUNK_BITS), index(within / 64), 1 << (within % 64))
}

impl Bits {
    fn new(granules: u64) -> Self {
        let chunks = usize::try_from(granules.div_ceil(CHUNK_BITS)).expect("a 64-bit machine");
        Self { chunks: (0..chunks).map(|_| None).collect(), granules, set: 0 }
    }

    fn put_all(&mut self, mut bits: std::ops::Range<u64>, dirty: bool) {
        while bits.start < bits.end {
            let (chunk, word, _) = split(bits.start);
            let of_chunk = ((bits.start / CHUNK_BITS + 1) * CHUNK_BITS).min(bits.end);
            if self.chunks[chunk].is_none() && !dirty {
                bits.start = of_chunk;
                continue;
            }
            let of_word = ((bits.start / 64 + 1) * 64).min(bits.end);
            let below = |bit: u64| if bit.is_multiple_of(64) { u64::MAX } else { (1 << (bit % 64)) - 1 };
            let first = (1_u64 << (bits.start % 64)).wrapping_neg();
            self.put_word(chunk, word, first & below(of_word), dirty);
            bits.start = of_word;
        }
    }

    /// Sets or clears the bits of `mask`.
    fn put_word(&mut self, chunk: usize, word: usize, mask: u64, dirty: bool) {
        let slot = &mut self.chunks[chunk];
        if slot.is_none() && !dirty {
            return;
        }
        let chunk = slot.get_or_insert_with(|| Chunk { set: 0, words: Box::new([0; CHUNK_WORDS]) });
        let before = chunk.words[word];
        let after = if dirty { before | mask } else { before & !mask };
        chunk.words[word] = after;
        let (had, has) = (u64::from(before.count_ones()), u64::from(after.count_ones()));
        chunk.set = chunk.set + has - had;
        self.set = self.set + has - had;
        if chunk.set == 0 {
            *slot = None;
        }
    }

    /// The first granule from `bit` on that is (not) dirty.
    fn next(&self, mut bit: u64, dirty: bool) -> Option<u64> {
        while bit < self.granules {
            let (chunk, word, _) = split(bit);
            let Some(chunk) = &self.chunks[chunk] else {
                if !dirty {
                    return Some(bit);
                }
                bit = (bit / CHUNK_BITS + 1) * CHUNK_BITS;
                continue;
            };
            if !dirty && chunk.set == CHUNK_BITS {
                bit = (bit / CHUNK_BITS + 1) * CHUNK_BITS;
                continue;
            }
            let bits = if dirty { chunk.words[word] } else { !chunk.words[word] };
            let rest = bits >> (bit % 64);
            if rest != 0 {
                return Some(bit + u64::from(rest.trailing_zeros())).filter(|&bit| bit < self.granules);
            }
            bit = (bit / 64 + 1) * 64;
        }
        None
    }
}

/// Remembers which granules were touched since it was last cleared. Shared between the guest's writes, which set
/// bits, and a job, which takes them.
#[derive(Debug)]
pub struct DirtyBitmap {
    /// Bytes per bit, a power of two.
    granularity: u64,
    /// Bytes covered.
    size: u64,
    bits: Mutex<Bits>,
}

impl DirtyBitmap {
    /// A clean bitmap for `size` bytes, one bit for every `granularity` of them (a power of two).
    pub fn new(size: u64, granularity: u64) -> Self {
        assert!(granularity.is_power_of_two(), "granularity {granularity}");
        Self { granularity, size, bits: Mutex::new(Bits::new(size.div_ceil(granularity))) }
    }

    fn bits(&self) -> MutexGuard<'_, Bits> {
        self.bits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes per bit.
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// Dirty bytes, counted in whole granules (the last one as long as it is).
    pub fn count(&self) -> u64 {
        let bits = self.bits();
        let whole = bits.set * self.granularity;
        let tail = self.size % self.granularity;
        let last_is_dirty = tail != 0 && bits.next(bits.granules - 1, true).is_some();
        if last_is_dirty { whole - self.granularity + tail } else { whole }
    }

    /// Whether nothing is dirty.
    pub fn is_clean(&self) -> bool {
        self.bits().set == 0
    }

    /// Marks every granule that `range` touches.
    pub fn set(&self, range: ByteRange) {
        self.put(range, true);
    }

    /// Marks every granule that `range` touches as clean.
    pub fn clear(&self, range: ByteRange) {
        self.put(range, false);
    }

    fn put(&self, range: ByteRange, dirty: bool) {
        if range.is_empty() {
            return;
        }
        let mut bits = self.bits();
        let end = range.end().div_ceil(self.granularity).min(bits.granules);
        bits.put_all(range.start() / self.granularity..end, dirty);
    }

    /// Whether the first granule that `range` touches is dirty, and for how many bytes of `range` it stays so.
    pub fn state(&self, range: ByteRange) -> (bool, u64) {
        let bits = self.bits();
        let first = range.start() / self.granularity;
        let dirty = bits.next(first, true) == Some(first);
        let change = bits.next(first, !dirty).map_or(u64::MAX, |bit| bit.saturating_mul(self.granularity));
        (dirty, range.end().min(change) - range.start())
    }

    /// Whether any granule that `range` touches is dirty.
    pub fn any(&self, range: ByteRange) -> bool {
        let next = self.bits().next(range.start() / self.granularity, true);
        !range.is_empty() && next.is_some_and(|bit| bit.saturating_mul(self.granularity) < range.end())
    }

    /// The first dirty run at or behind `from`, at most `max` bytes of it (at least a granule).
    pub fn peek(&self, from: u64, max: u64) -> Option<ByteRange> {
        let run = self.run(&self.bits(), from, max)?;
        Some(ByteRange::between(run.start * self.granularity, (run.end * self.granularity).min(self.size)))
    }

    /// As [`DirtyBitmap::peek`], and clears it. Whoever takes it copies it.
    pub fn take(&self, from: u64, max: u64) -> Option<ByteRange> {
        let mut bits = self.bits();
        let run = self.run(&bits, from, max)?;
        bits.put_all(run.clone(), false);
        Some(ByteRange::between(run.start * self.granularity, (run.end * self.granularity).min(self.size)))
    }

    fn run(&self, bits: &Bits, from: u64, max: u64) -> Option<std::ops::Range<u64>> {
        let first = bits.next(from / self.granularity, true)?;
        let most = (max / self.granularity).max(1);
        Some(first..bits.next(first, false).unwrap_or(bits.granules).min(first.saturating_add(most)))
    }
}

impl Tracker for DirtyBitmap {
    fn touched(&self, range: ByteRange) {
        self.set(range);
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
            assert_eq!(bitmap.state(range), (first, end - range.start()));
        }
        let mut taken = Vec::new();
        while let Some(range) = bitmap.take(0, 4096) {
            taken.extend(range.start() / 512..range.end() / 512);
        }
        assert_eq!(taken, model.into_iter().collect::<Vec<_>>());
    }
}

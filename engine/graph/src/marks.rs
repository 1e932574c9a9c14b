//! Who wants to know which ranges of a node were written, told with little work.
//!
//! Most writes go where others went before, and change no bitmap any more. With several bitmaps, what has been told to
//! all of them is remembered here, once: such a write looks at one word instead of taking the lock of each.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use smallvec::SmallVec;

use crate::units::ByteRange;
use crate::view::Tracker;

/// Words of a chunk, which is there once anything in it is remembered.
const WORDS: usize = 512;
const CHUNK: u64 = WORDS as u64 * 64;
/// Most chunks: 8 TiB at 64 KiB for each bit. Behind them nothing is remembered.
const MOST_CHUNKS: u64 = 4096;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    trackers: SmallVec<[Arc<dyn Tracker>; 1]>,
    /// Made with the first write; `None` if a tracker must hear of all.
    told: OnceLock<Option<Told>>,
}

/// What all trackers know.
#[derive(Debug)]
struct Told {
    /// Each bit is for so many bytes, two to this power, as those of the finest tracker are: what is told of one is
    /// told of all.
    shift: u32,
    chunks: Box<[OnceLock<Box<[AtomicU64; WORDS]>>]>,
    /// How often the trackers had forgotten something when this began. Once it is more often, nothing here counts.
    forgotten: u64,
}

impl Marks {
    pub(crate) fn new(trackers: SmallVec<[Arc<dyn Tracker>; 1]>) -> Self {
        Self { trackers, told: OnceLock::new() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.trackers.is_empty()
    }

    /// Tells everybody who does not know. The node has `length` bytes, at least at first.
    pub(crate) fn touched(&self, range: ByteRange, length: impl FnOnce() -> u64) {
        if self.trackers.len() < 2 {
            return self.tell(range);
        }
        let told = self.told.get_or_init(|| Told::new(&self.trackers, length()));
        let place = told.as_ref().and_then(|told| Some((told.place(range)?, told.forgotten)));
        let Some(((word, mask), before)) = place else { return self.tell(range) };
        if word.load(Ordering::Acquire) & mask == mask {
            // Who makes a bitmap forget something reads the data later: it sees this write, or we see that it has
            // begun.
            fence(Ordering::SeqCst);
            if forgotten(&self.trackers) == before {
                return;
            }
        }
        self.tell(range);
        word.fetch_or(mask, Ordering::Release);
    }

    fn tell(&self, range: ByteRange) {
        self.trackers.iter().for_each(|tracker| tracker.touched(range));
    }
}

/// How often any of them forgot something.
fn forgotten(trackers: &[Arc<dyn Tracker>]) -> u64 {
    trackers.iter().map(|tracker| tracker.forgotten()).fold(0, u64::wrapping_add)
}

impl Told {
    fn new(trackers: &[Arc<dyn Tracker>], length: u64) -> Option<Self> {
        let shift = trackers.iter().map(|tracker| tracker.granularity()).min()??.trailing_zeros();
        let chunks = (length >> shift).div_ceil(CHUNK).min(MOST_CHUNKS);
        let chunks = (0..chunks).map(|_| OnceLock::new()).collect();
        Some(Self { shift, chunks, forgotten: forgotten(trackers) })
    }

    /// The word and the bits for a range, if they are in one word.
    fn place(&self, range: ByteRange) -> Option<(&AtomicU64, u64)> {
        let last = range.end().checked_sub(1).filter(|_| !range.is_empty())? >> self.shift;
        let first = range.start() >> self.shift;
        if first / 64 != last / 64 {
            return None;
        }
        let chunk = self.chunks.get(usize::try_from(first / CHUNK).ok()?)?;
        let words = chunk.get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]));
        let mask = (u64::MAX << (first % 64)) & (u64::MAX >> (63 - last % 64));
        Some((&words[usize::try_from(first % CHUNK / 64).ok()?], mask))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bitmap::DirtyBitmap;

    const SIZE: u64 = 1 << 20;

    fn bitmaps() -> ([Arc<DirtyBitmap>; 3], Marks) {
        let all = [4096, 512, 65536].map(|granularity| Arc::new(DirtyBitmap::new(SIZE, granularity)));
        let marks = Marks::new(all.iter().map(|bitmap| bitmap.clone() as Arc<dyn Tracker>).collect());
        (all, marks)
    }

    /// Bitmaps that are told of everything, and others that are told by way of [`Marks`], say the same.
    #[test]
    fn nothing_is_left_out() {
        for forgets in [false, true] {
            let ((plain, _), (told, marks)) = (bitmaps(), bitmaps());
            let mut seed = 3_u64;
            for _ in 0..20_000 {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let start = (seed >> 33) % SIZE;
                let len = if seed & 0x7000 == 0 { (seed >> 40) % 40_000 } else { (seed >> 40) % 5000 };
                // Some are behind the end: files grow.
                let range = ByteRange::between(start, start + len);
                let which = usize::try_from(seed >> 20 & 1).unwrap();
                for all in [&plain, &told] {
                    match seed >> 24 & 63 {
                        0 if forgets => all[which].clear(range),
                        1 if forgets => drop(all[which].take(start, len)),
                        2 if forgets => all[2].resize(SIZE - (seed >> 60) * 1000),
                        _ if std::ptr::eq(all, &told) => marks.touched(range, || SIZE),
                        _ => all.iter().for_each(|bitmap| bitmap.touched(range)),
                    }
                }
            }
            for (plain, told) in plain.iter().zip(&told) {
                assert_eq!((plain.size(), plain.count()), (told.size(), told.count()));
                let both = plain.copy();
                both.merge(told);
                assert_eq!(both.count(), plain.count());
            }
        }
    }

    /// What somebody takes and then reads is never older than the last write that was told.
    #[test]
    fn whoever_forgets_sees_what_was_written() {
        let ([taken, ..], marks) = bitmaps();
        let data: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(0)).collect();
        let place = |range: ByteRange| usize::try_from(range.start() / 4096).unwrap();
        let copy = |copy: &mut Vec<u64>| {
            while let Some(range) = taken.take(0, 4096) {
                copy[place(range)] = data[place(range)].load(Ordering::Relaxed);
            }
        };
        let done = std::sync::atomic::AtomicBool::new(false);
        let mut seen = vec![0; data.len()];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..2000 {
                    for (number, place) in data.iter().enumerate() {
                        place.store(round, Ordering::Relaxed);
                        marks.touched(
                            ByteRange::between(number as u64 * 4096, number as u64 * 4096 + 512),
                            || SIZE,
                        );
                    }
                }
                done.store(true, Ordering::Release);
            });
            while !done.load(Ordering::Acquire) {
                copy(&mut seen);
            }
        });
        copy(&mut seen);
        assert_eq!(seen, vec![1999; 64]);
    }
}

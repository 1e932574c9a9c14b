//! A set of bits that takes up room only where some are set: 4 KiB for every 32,768 of them with at least one.

use std::ops::Range;

const CHUNK_WORDS: usize = 512;
const CHUNK_BITS: u64 = CHUNK_WORDS as u64 * 64;
const GROUP_CHUNKS: usize = 512;
const GROUP_BITS: u64 = GROUP_CHUNKS as u64 * CHUNK_BITS;

/// The words of a chunk: bit 0 of the first is the chunk's first bit.
pub type Words = [u64; CHUNK_WORDS];

#[derive(Clone, Debug)]
struct Chunk {
    set: u64,
    words: Box<Words>,
}

type Group = Vec<Option<Chunk>>;

#[derive(Debug, Default)]
pub(crate) struct Bits {
    /// Each either empty or `GROUP_CHUNKS` long.
    groups: Vec<Group>,
    len: u64,
    set: u64,
    changes: u64,
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("a 64-bit machine")
}

fn word_of(bit: u64) -> usize {
    index(bit % CHUNK_BITS / 64)
}

impl Bits {
    pub(crate) fn new(len: u64) -> Self {
        let mut bits = Self::default();
        bits.resize(len);
        bits
    }

    /// How many bits there are.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// How many are set.
    pub(crate) fn count(&self) -> u64 {
        self.set
    }

    /// Grows with every change: as long as it stays, so do the bits.
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }

    /// More bits, which are clear, or fewer.
    pub(crate) fn resize(&mut self, len: u64) {
        if len < self.len {
            self.put_all(len..self.len, false);
        }
        self.groups.resize_with(index(len.div_ceil(GROUP_BITS)), Vec::new);
        self.len = len;
        self.changes += 1;
    }

    fn chunk(&self, bit: u64) -> Option<&Chunk> {
        self.groups[index(bit / GROUP_BITS)].get(index(bit % GROUP_BITS / CHUNK_BITS))?.as_ref()
    }

    pub(crate) fn put_all(&mut self, mut bits: Range<u64>, set: bool) {
        while bits.start < bits.end {
            if !set && self.chunk(bits.start).is_none() {
                bits.start = self.next_chunk(bits.start).min(bits.end);
                continue;
            }
            let of_word = ((bits.start / 64 + 1) * 64).min(bits.end);
            let below = |bit: u64| if bit.is_multiple_of(64) { u64::MAX } else { (1 << (bit % 64)) - 1 };
            let first = (1_u64 << (bits.start % 64)).wrapping_neg();
            self.put_word(bits.start, first & below(of_word), set);
            bits.start = of_word;
        }
    }

    /// Where the chunk behind that of `bit` begins, or the group if that one has none.
    fn next_chunk(&self, bit: u64) -> u64 {
        let size = if self.groups[index(bit / GROUP_BITS)].is_empty() { GROUP_BITS } else { CHUNK_BITS };
        (bit / size + 1).saturating_mul(size)
    }

    /// Sets or clears the bits of `mask` in the word of `bit`.
    fn put_word(&mut self, bit: u64, mask: u64, set: bool) {
        let group = &mut self.groups[index(bit / GROUP_BITS)];
        if group.is_empty() {
            if !set {
                return;
            }
            group.resize(GROUP_CHUNKS, None);
        }
        let slot = &mut group[index(bit % GROUP_BITS / CHUNK_BITS)];
        if slot.is_none() && !set {
            return;
        }
        let chunk = slot.get_or_insert_with(|| Chunk { set: 0, words: Box::new([0; CHUNK_WORDS]) });
        let word = &mut chunk.words[word_of(bit)];
        let before = *word;
        let now = if set { before | mask } else { before & !mask };
        if now == before {
            return;
        }
        *word = now;
        let (had, has) = (u64::from(before.count_ones()), u64::from(now.count_ones()));
        chunk.set = chunk.set + has - had;
        self.set = self.set + has - had;
        self.changes += 1;
        if chunk.set == 0 {
            *slot = None;
        }
    }

    /// The first bit from `bit` on that is (not) set.
    pub(crate) fn next(&self, mut bit: u64, set: bool) -> Option<u64> {
        while bit < self.len {
            let Some(chunk) = self.chunk(bit) else {
                if !set {
                    return Some(bit);
                }
                bit = self.next_chunk(bit);
                continue;
            };
            if !set && chunk.set == CHUNK_BITS {
                bit = self.next_chunk(bit);
                continue;
            }
            let word = chunk.words[word_of(bit)];
            let rest = if set { word } else { !word } >> (bit % 64);
            if rest != 0 {
                return Some(bit + u64::from(rest.trailing_zeros())).filter(|&bit| bit < self.len);
            }
            bit = (bit / 64 + 1) * 64;
        }
        None
    }

    /// The first chunk at or behind `bit` with a bit set: its first bit and its words.
    pub(crate) fn next_words(&self, bit: u64) -> Option<(u64, &Words)> {
        let first = self.next(bit / CHUNK_BITS * CHUNK_BITS, true)? / CHUNK_BITS * CHUNK_BITS;
        self.chunk(first).map(|chunk| (first, &*chunk.words))
    }

    /// Sets what is set in `words`, the first of which begins at `first` (a multiple of 64); what is behind the end is
    /// left out.
    pub(crate) fn add_words(&mut self, first: u64, words: &[u64]) {
        for (word, bit) in words.iter().zip((first..self.len).step_by(64)) {
            let left = self.len - bit;
            let mask = if left < 64 { (1 << left) - 1 } else { u64::MAX };
            if word & mask != 0 {
                self.put_word(bit, word & mask, true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Bits {
        /// Bytes of memory that it takes up.
        fn memory(&self) -> usize {
            let of_group = |group: &Group| {
                let chunks = group.iter().flatten().count();
                group.capacity() * size_of::<Option<Chunk>>() + chunks * size_of::<Words>()
            };
            size_of::<Self>()
                + self.groups.capacity() * size_of::<Group>()
                + self.groups.iter().map(of_group).sum::<usize>()
        }
    }

    /// A disk of 16 TiB with a bit for every 64 KiB.
    #[test]
    fn memory_of_a_huge_disk() {
        const MIB: usize = 1 << 20;
        let len = (16 << 40) / (64 << 10);
        let mut bits = Bits::new(len);
        assert!(bits.memory() < MIB, "clean: {}", bits.memory());
        bits.put_all(0..len, true);
        assert_eq!(bits.count(), len);
        assert!((32 * MIB..40 * MIB).contains(&bits.memory()), "dirty: {}", bits.memory());
        // Clean again, but for some.
        bits.put_all(7..len - 7, false);
        assert!(bits.memory() < MIB, "nearly clean: {}", bits.memory());
    }
}

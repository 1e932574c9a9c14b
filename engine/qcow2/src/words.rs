//! The 64-bit words that qcow2's tables are made of: big-endian on disk.

use std::ops::{Deref, DerefMut};

use underlay_sys::buf::is_zero;

/// Most words that are kept as [`Words::Zeroes`]: a slice of 4 KiB.
const MOST_ZEROES: usize = 512;
static ZEROES: [u64; MOST_ZEROES] = [0; MOST_ZEROES];

/// A piece of a table in memory. Most of a sparse disk's tables is zeroes, which take up none.
#[derive(Clone, Debug)]
pub enum Words {
    /// So many zeroes, at most [`MOST_ZEROES`].
    Zeroes(usize),
    /// Words.
    Stored(Box<[u64]>),
}

impl Words {
    /// So many zeroes.
    pub fn zeroes(count: usize) -> Self {
        if count <= MOST_ZEROES { Self::Zeroes(count) } else { Self::Stored(vec![0; count].into()) }
    }

    /// Of what was read from a table.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let count = bytes.len() / 8;
        if count <= MOST_ZEROES && is_zero(bytes) {
            Self::Zeroes(count)
        } else {
            Self::Stored(to_words(bytes))
        }
    }
}

impl From<Box<[u64]>> for Words {
    fn from(words: Box<[u64]>) -> Self {
        Self::Stored(words)
    }
}

impl Deref for Words {
    type Target = [u64];

    fn deref(&self) -> &[u64] {
        match self {
            Self::Zeroes(count) => &ZEROES[..*count],
            Self::Stored(words) => words,
        }
    }
}

impl DerefMut for Words {
    fn deref_mut(&mut self) -> &mut [u64] {
        if let Self::Zeroes(count) = self {
            *self = Self::Stored(vec![0; *count].into());
        }
        match self {
            Self::Stored(words) => words,
            Self::Zeroes(_) => &mut [],
        }
    }
}

/// The words of big-endian bytes.
pub fn to_words(bytes: &[u8]) -> Box<[u64]> {
    bytes
        .chunks_exact(8)
        .map(|b| u64::from_be_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
        .collect()
}

/// The big-endian bytes of words.
pub fn to_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_big_endian() {
        let words = to_words(&[0, 0, 0, 0, 0, 0, 1, 2, 0xff, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(*words, [0x102, 0xff << 56]);
        assert_eq!(to_bytes(&words)[6..9], [1, 2, 0xff]);
    }

    #[test]
    fn zeroes_are_words_like_others() {
        for len in [512, 4096, 8192] {
            let mut bytes = vec![0; len];
            let mut words = Words::from_bytes(&bytes);
            assert_eq!(matches!(words, Words::Zeroes(_)), len <= 4096);
            assert_eq!((words.len(), words.iter().sum::<u64>()), (len / 8, 0));
            words[3] = 5;
            bytes[31] = 5;
            let same = Words::from_bytes(&bytes);
            assert!(matches!(same, Words::Stored(_)));
            assert_eq!(*words, *same);
        }
    }
}

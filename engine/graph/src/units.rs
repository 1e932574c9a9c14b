//! Bytes, ranges and names.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

/// A run of bytes. [`ByteRange::new`] is the only way in, so the end cannot overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start: u64,
    len: u64,
}

impl ByteRange {
    /// `None` if the end does not fit `off_t`, which the kernel would refuse anyway.
    pub fn new(start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        (end <= i64::MAX as u64).then_some(Self { start, len })
    }

    /// The run from `start` up to (not including) `end`; empty when `end` is not behind `start`.
    pub fn between(start: u64, end: u64) -> Self {
        let end = end.min(i64::MAX as u64);
        let start = start.min(end);
        Self { start, len: end - start }
    }

    /// First byte.
    pub fn start(self) -> u64 {
        self.start
    }

    /// Number of bytes.
    pub fn len(self) -> u64 {
        self.len
    }

    /// Whether there is not a single byte in it.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The byte after the last one.
    pub fn end(self) -> u64 {
        self.start + self.len
    }

    /// The first `len` bytes and the rest; the rest is empty when there are no more than `len`.
    pub fn split(self, len: u64) -> (Self, Self) {
        let len = len.min(self.len);
        (Self { start: self.start, len }, Self { start: self.start + len, len: self.len - len })
    }

    /// The part in front of `end`.
    pub fn before(self, end: u64) -> Self {
        Self::between(self.start.min(end), self.end().min(end))
    }

    /// Bytes that both have; empty when there are none.
    pub fn intersect(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self::between(start, self.end().min(other.end()).max(start))
    }

    /// Whether both have a byte in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    /// The smallest run around this one that begins and ends at multiples of `unit`, a power of two.
    pub fn align_out(self, unit: u64) -> Self {
        let start = self.start & !(unit - 1);
        let end = self.end().checked_next_multiple_of(unit).unwrap_or(i64::MAX as u64);
        Self::between(start, end)
    }

    /// The largest run inside this one that begins and ends at multiples of `unit`, a power of two.
    pub fn align_in(self, unit: u64) -> Self {
        let start = self.start.checked_next_multiple_of(unit).unwrap_or(i64::MAX as u64);
        Self::between(start, (self.end() & !(unit - 1)).max(start))
    }

    /// Whether both ends are multiples of `unit`.
    pub fn is_aligned(self, unit: u64) -> bool {
        self.start.is_multiple_of(unit) && self.len.is_multiple_of(unit)
    }

    /// The length as a buffer length; a request in memory always fits.
    pub fn buffer_len(self) -> usize {
        usize::try_from(self.len).expect("a 64-bit machine")
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.start, self.len)
    }
}

/// The name of a node. Source: QEMU's rule for ids: a letter, then letters, digits, `-`, `.`, `_`; 31 characters.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeName(Arc<str>);

impl NodeName {
    /// Longest name that a user may give, in characters.
    pub const MAX: usize = 31;

    /// A name given by a user, or `None` if it is not well formed. (Its length is the caller's to check, as QEMU
    /// has a message of its own for that.)
    pub fn new(name: &str) -> Option<Self> {
        is_well_formed_id(name).then(|| Self(name.into()))
    }

    /// A name for a node that its user did not name: `#block` and at least three digits.
    pub fn generated(counter: u64, noise: u8) -> Self {
        Self(format!("#block{counter}{:02}", noise % 100).into())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it was made by [`NodeName::generated`].
    pub fn is_generated(&self) -> bool {
        self.0.starts_with('#')
    }
}

/// So that a map of names can be asked for a text.
impl Borrow<str> for NodeName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether `id` may name a node, a job, an export or an object.
pub fn is_well_formed_id(id: &str) -> bool {
    let mut chars = id.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_never_overflow() {
        assert!(ByteRange::new(u64::MAX, 1).is_none());
        assert!(ByteRange::new(i64::MAX as u64, 1).is_none());
        let last = ByteRange::new(i64::MAX as u64 - 1, 1).expect("fits");
        assert_eq!(last.align_out(65536).end(), i64::MAX as u64);
        assert!(last.align_in(65536).is_empty());
    }

    #[test]
    fn splitting_and_aligning() {
        let range = ByteRange::new(1000, 5000).expect("fits");
        assert_eq!(range.align_out(4096), ByteRange::between(0, 8192));
        assert_eq!(range.align_in(4096), ByteRange::between(4096, 4096));
        assert_eq!(range.split(24), (ByteRange::between(1000, 1024), ByteRange::between(1024, 6000)));
        assert_eq!(range.before(500), ByteRange::between(500, 500));
        assert!(range.overlaps(ByteRange::between(5999, 7000)));
        assert!(!range.overlaps(ByteRange::between(6000, 7000)));
    }

    #[test]
    fn names() {
        assert!(NodeName::new("node-A.b_c1").is_some());
        for bad in ["", "1a", "a b", "#block", "é"] {
            assert!(NodeName::new(bad).is_none(), "{bad}");
        }
    }
}

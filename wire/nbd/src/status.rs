//! Block status: descriptors of consecutive extents, coalesced and bounded.

use zerocopy::FromBytes;
use zerocopy::big_endian::{U32, U64};

use crate::transmission::{Framing, Payload, chunk};

/// The most descriptors in one reply.
pub const MAX_EXTENTS: usize = 128 << 10;

/// One extent of a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Bytes.
    pub length: u64,
    /// What they are; depends on the context.
    pub flags: u32,
}

/// Collects the descriptors of one context.
#[derive(Clone, Debug)]
pub struct Extents {
    list: Vec<Descriptor>,
    limit: usize,
    longest: u64,
    full: bool,
}

impl Extents {
    /// At most one descriptor for `one`, else [`MAX_EXTENTS`].
    pub fn new(framing: Framing, one: bool) -> Self {
        // Longer ones do not fit 32 bits; rounded down so that the next one starts aligned.
        let longest = if framing == Framing::Extended { u64::MAX } else { u64::from(u32::MAX) & !511 };
        Self { list: Vec::new(), limit: if one { 1 } else { MAX_EXTENTS }, longest, full: false }
    }

    /// Adds what comes next. False when there is no room for more, so that asking on is in vain.
    pub fn push(&mut self, length: u64, flags: u32) -> bool {
        let mut length = length;
        while length > 0 && !self.full {
            let count = self.list.len();
            match self.list.last_mut() {
                Some(last) if last.flags == flags && last.length < self.longest => {
                    let more = length.min(self.longest - last.length);
                    last.length += more;
                    length -= more;
                }
                _ if count == self.limit => self.full = true,
                _ => {
                    let piece = length.min(self.longest);
                    self.list.push(Descriptor { length: piece, flags });
                    length -= piece;
                }
            }
        }
        !self.full
    }

    /// What was collected.
    pub fn list(&self) -> &[Descriptor] {
        &self.list
    }

    /// Bytes that are described.
    pub fn covered(&self) -> u64 {
        self.list.iter().map(|descriptor| descriptor.length).sum()
    }
}

/// Reads the payload of a block status chunk.
pub(crate) fn parse(kind: u16, bytes: &[u8]) -> Option<Payload<'static>> {
    let (context, rest) = U32::read_from_prefix(bytes).ok()?;
    let mut list = Vec::new();
    if kind == chunk::BLOCK_STATUS_EXT {
        let (count, rest) = U32::read_from_prefix(rest).ok()?;
        let (pairs, rest) = rest.as_chunks::<16>();
        if !rest.is_empty() || usize::try_from(count.get()).ok()? != pairs.len() {
            return None;
        }
        for pair in pairs {
            let (length, flags) = U64::read_from_prefix(pair).ok()?;
            let flags = u32::try_from(U64::read_from_bytes(flags).ok()?.get()).ok()?;
            list.push(Descriptor { length: length.get(), flags });
        }
    } else {
        let (pairs, rest) = rest.as_chunks::<8>();
        if !rest.is_empty() {
            return None;
        }
        for pair in pairs {
            let (length, flags) = U32::read_from_prefix(pair).ok()?;
            let flags = U32::read_from_bytes(flags).ok()?;
            list.push(Descriptor { length: length.get().into(), flags: flags.get() });
        }
    }
    let sound = !list.is_empty() && list.iter().all(|descriptor| descriptor.length > 0);
    sound.then_some(Payload::Status(context.get(), list))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_neighbours_become_one() {
        let mut extents = Extents::new(Framing::Structured, false);
        assert!(extents.push(512, 0));
        assert!(extents.push(512, 0));
        assert!(extents.push(512, 3));
        let wanted = [Descriptor { length: 1024, flags: 0 }, Descriptor { length: 512, flags: 3 }];
        assert_eq!(extents.list(), wanted);
        assert_eq!(extents.covered(), 1536);
    }

    #[test]
    fn one_means_one() {
        let mut extents = Extents::new(Framing::Extended, true);
        assert!(extents.push(1 << 40, 1));
        assert!(extents.push(1, 1));
        assert!(!extents.push(1, 0));
        assert!(!extents.push(1, 1));
        assert_eq!(extents.list(), [Descriptor { length: (1 << 40) + 1, flags: 1 }]);
    }

    #[test]
    fn long_extents_are_cut_for_short_headers() {
        let mut extents = Extents::new(Framing::Structured, false);
        assert!(extents.push(1 << 33, 1));
        assert_eq!(extents.covered(), 1 << 33);
        assert_eq!(extents.list().len(), 3);
    }
}

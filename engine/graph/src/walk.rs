//! Block status of a disk from one end to the other, for tools that hold it: what nodes have once said holds until the
//! end, and they are asked for much at once.

use crate::error::Result;
use crate::format::{Extent, Place};
use crate::node::{Kind, Node};
use crate::status::{Search, Status};
use crate::units::ByteRange;
use crate::view::Cx;

/// Most extents of a node that are remembered.
const MOST: usize = 1 << 16;

/// What was said so far.
#[derive(Debug, Default)]
pub struct Walk {
    said: Vec<Said>,
}

/// What a node has said.
#[derive(Debug, Default)]
struct Said {
    /// Its address.
    node: usize,
    /// Where each of the extents begins, in order. On their own, so that a search touches little memory.
    starts: Vec<u64>,
    extents: Vec<Extent>,
    /// Extents in 2^64 bytes, on average.
    density: u64,
    /// The one that was needed last.
    last: usize,
}

impl Walk {
    /// As [`crate::status::status`].
    pub async fn status(&mut self, cx: &Cx<'_>, range: ByteRange) -> Result<Status> {
        let mut search = Search::new(cx, range, None);
        loop {
            if let Some(status) = search.proceed() {
                return Ok(status);
            }
            let extent = match self.known(&search) {
                Some(extent) => extent,
                None => self.said(search.at.node()).ask(&search.at, search.range).await?,
            };
            if let Some(status) = search.told(extent) {
                return Ok(status);
            }
        }
    }

    /// The same where nobody has to be asked: for the most of millions of extents.
    pub fn status_now(&mut self, cx: &Cx<'_>, range: ByteRange) -> Option<Status> {
        let mut search = Search::new(cx, range, None);
        loop {
            if let Some(status) = search.proceed() {
                return Some(status);
            }
            let extent = self.known(&search)?;
            if let Some(status) = search.told(extent) {
                return Some(status);
            }
        }
    }

    /// What the node of this search has said of the first bytes.
    #[inline]
    fn known(&mut self, search: &Search<'_>) -> Option<Extent> {
        let node = address(search.at.node());
        let said = self.said.iter_mut().find(|said| said.node == node)?;
        let (start, extent) = said.find(search.range.start())?;
        Some(part(extent, search.range.start() - start, search.range.len()))
    }

    fn said(&mut self, node: &dyn Node) -> &mut Said {
        let node = address(node);
        let index = self.said.iter().position(|said| said.node == node).unwrap_or_else(|| {
            self.said.push(Said { node, ..Said::default() });
            self.said.len() - 1
        });
        &mut self.said[index]
    }
}

fn address(node: &dyn Node) -> usize {
    std::ptr::from_ref(node).addr()
}

impl Said {
    /// The extent that has the byte, and where it begins.
    #[inline]
    fn find(&mut self, byte: u64) -> Option<(u64, Extent)> {
        // Who goes forward needs the same one or the next.
        for index in [self.last, self.last + 1] {
            if let Some(found) = self.at(index).filter(|(start, extent)| has(*start, extent, byte)) {
                self.last = index;
                return Some(found);
            }
        }
        self.last = self.search(byte)?;
        self.at(self.last).filter(|(start, extent)| has(*start, extent, byte))
    }

    /// The last extent that does not begin behind the byte. Begins where it would be if all were of one length, which
    /// is next to it where a format has put its tables at regular distances, and looks further and further away.
    fn search(&self, byte: u64) -> Option<usize> {
        let is_behind = |index: usize| self.starts.get(index).is_none_or(|start| *start > byte);
        let behind_first = byte.saturating_sub(*self.starts.first()?);
        let guess = (u128::from(behind_first) * u128::from(self.density)) >> 64;
        let guess = usize::try_from(guess).unwrap_or(usize::MAX).min(self.starts.len() - 1);
        let (mut low, mut high, mut stride) = (guess, guess + 1, 1);
        while low > 0 && is_behind(low) {
            (low, high) = (low.saturating_sub(stride), low);
            stride *= 2;
        }
        while !is_behind(high) {
            (low, high) = (high, high + stride);
            stride *= 2;
        }
        let between = &self.starts[low..high.min(self.starts.len())];
        (low + between.partition_point(|start| *start <= byte)).checked_sub(1)
    }

    fn at(&self, index: usize) -> Option<(u64, Extent)> {
        Some((*self.starts.get(index)?, *self.extents.get(index)?))
    }

    /// Asks the node for the first bytes of `range`, and remembers what it says.
    async fn ask(&mut self, at: &Cx<'_>, range: ByteRange) -> Result<Extent> {
        let is_protocol = at.node().kind() == Kind::Protocol;
        // Somebody above asks for pieces, in any order.
        let end = if is_protocol { at.length().max(range.end()) } else { range.end() };
        let whole = ByteRange::between(range.start(), end);
        if !is_protocol || self.extents.len() >= MOST {
            self.starts.clear();
            self.extents.clear();
        }
        let first = at.map(whole).await?;
        let mut new = vec![first];
        at.node().map_ahead(at, whole.split(first.len).1, &mut new);
        self.learn(range.start(), &new);
        Ok(part(first, 0, range.len()))
    }

    /// Extents one after another from `start` on, which is in none that is known.
    fn learn(&mut self, start: u64, new: &[Extent]) {
        let mut end = start;
        let starts = new.iter().map(|extent| {
            let start = end;
            end += extent.len;
            start
        });
        let starts: Vec<u64> = starts.collect();
        self.last = self.starts.partition_point(|other| *other < start);
        // They may have been asked for from further on.
        let old = self.starts[self.last..].iter().take_while(|other| **other < end).count();
        self.starts.splice(self.last..self.last + old, starts);
        self.extents.splice(self.last..self.last + old, new.iter().copied());
        if let [first, .., last] = self.starts[..] {
            let all = (self.starts.len() as u128 - 1) << 64;
            self.density = u64::try_from(all / u128::from(last - first)).unwrap_or(u64::MAX);
        }
    }
}

fn has(start: u64, extent: &Extent, byte: u64) -> bool {
    byte.checked_sub(start).is_some_and(|skip| skip < extent.len)
}

/// Of an extent what is behind `skip` bytes, `most` bytes of it.
fn part(extent: Extent, skip: u64, most: u64) -> Extent {
    let place = match extent.place {
        Place::Data(offset) => Place::Data(offset.saturating_add(skip)),
        other => other,
    };
    let kept = extent.kept.map(|offset| offset.saturating_add(skip));
    Extent { place, kept, len: (extent.len - skip).min(most), ..extent }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A protocol node that was asked in any order, and once more from before what it had said.
    #[test]
    fn what_was_said_is_found_from_wherever_it_is_asked() {
        let mut said = Said::default();
        let data = |start, len| Extent::new(Place::Data(start), len);
        said.learn(100, &[data(100, 50), Extent::new(Place::Zero, 10)]);
        said.learn(20, &[data(20, 30)]);
        assert_eq!(said.starts, [20, 100, 150]);
        for byte in 0..200 {
            let found = said.find(byte).map(|(start, extent)| part(extent, byte - start, 5));
            let wanted = match byte {
                20..50 => Some(data(byte, 5.min(50 - byte))),
                100..150 => Some(data(byte, 5.min(150 - byte))),
                150..160 => Some(Extent::new(Place::Zero, 5.min(160 - byte))),
                _ => None,
            };
            assert_eq!(found, wanted, "{byte}");
        }
        let mut far = Said::default();
        // Short ones first, so that every guess is a bad one, in either direction.
        for start in (0..600).map(|at: u64| at * at * at) {
            far.learn(start, &[data(start, 1)]);
        }
        for byte in (0..600u64.pow(3)).step_by(997).chain([0, 1, 8, u64::MAX]) {
            let wanted = far.starts.partition_point(|start| *start <= byte).checked_sub(1);
            assert_eq!(far.search(byte), wanted, "{byte}");
        }
        said.learn(60, &[data(60, 90)]);
        assert_eq!(said.starts, [20, 60, 150]);
        assert_eq!(said.find(120), Some((60, data(60, 90))));
    }
}

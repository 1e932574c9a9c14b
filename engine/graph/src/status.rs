//! Block status: what a range of a disk is, seen through all its layers. The base of `map`, of `base:allocation`
//! and of every job that copies.

use crate::error::Result;
use crate::format::{Extent, Place};
use crate::node::Kind;
use crate::plan::NodeId;
use crate::units::ByteRange;
use crate::view::{Cx, Role};

/// What the first `len` bytes of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// How many bytes the answer holds for.
    pub len: u64,
    /// Which layer has them: 0 is the top one. Filters do not count. The lowest layer when none has them.
    pub depth: u32,
    /// The node of that layer.
    pub layer: NodeId,
    /// Some layer holds them (QEMU: `present`).
    pub allocated: bool,
    /// They read as zeroes.
    pub zero: bool,
    /// There are bytes on some medium for them.
    pub data: bool,
    /// They are compressed.
    pub encoded: bool,
    /// Where they are in `file` when that is known, or would be: there may be room for what has no data.
    pub offset: Option<u64>,
    /// The node that holds them: the file of a format with an allocation of its own, else the protocol node.
    pub file: Option<NodeId>,
    /// No layer has them, but `layer` ends before them: the one above it shows zeroes.
    pub past_end: bool,
}

/// What the first bytes of `range` are. Layers from `until` on downwards are not looked at: what only they could
/// have is reported as not allocated. The range must lie inside the node and not be empty.
pub async fn status(cx: &Cx<'_>, range: ByteRange, until: Option<NodeId>) -> Result<Status> {
    let mut search = Search::new(cx, range, until);
    loop {
        if let Some(status) = search.proceed() {
            return Ok(status);
        }
        let extent = search.at.map(search.range).await?;
        if let Some(status) = search.told(extent) {
            return Ok(status);
        }
    }
}

/// The way to an answer: which node has to be asked next, and what for. Who searches asks, be it the node or what he
/// has noted of it ([`crate::walk`]): first [`Search::proceed`], and then, until there is an answer, [`Search::told`]
/// and [`Search::proceed`] again.
pub(crate) struct Search<'a> {
    /// The node to ask ([`Cx::map`]).
    pub(crate) at: Cx<'a>,
    /// And what for.
    pub(crate) range: ByteRange,
    until: Option<NodeId>,
    depth: u32,
    /// Room that the layer above keeps, and in which file.
    kept: (Option<u64>, Option<NodeId>),
    found: Option<Found>,
}

/// Plain data was found. It is followed down to the protocol node that holds it, to say where it is and whether it is a
/// hole there. Of a format with an allocation of its own it is told where it is in that format's file, whatever that
/// is.
struct Found {
    status: Status,
    /// Whether it is worth looking further down.
    recurse: bool,
    /// A format with an allocation of its own still says data for what is a hole in its file, as QEMU's does.
    allocates: bool,
}

impl<'a> Search<'a> {
    pub(crate) fn new(cx: &Cx<'a>, range: ByteRange, until: Option<NodeId>) -> Self {
        Self { at: cx.skip_filters(), range, until, depth: 0, kept: (None, None), found: None }
    }

    /// The answer, if nobody needs to be asked for it.
    #[inline]
    pub(crate) fn proceed(&mut self) -> Option<Status> {
        if self.found.is_some() {
            return self.descend();
        }
        let length = self.at.length();
        if self.range.start() >= length {
            // Shorter than its overlay: the overlay reads zeroes here, and this layer counts as having them.
            let (offset, file) = self.kept;
            let status = self.nothing();
            return Some(Status { zero: true, allocated: true, past_end: true, offset, file, ..status });
        }
        self.range = self.range.before(length);
        None
    }

    /// What was asked for is this; the answer, if that says it all.
    #[inline]
    pub(crate) fn told(&mut self, extent: Extent) -> Option<Status> {
        let asked = self.range;
        self.range = asked.split(extent.len).0;
        if self.found.is_some() {
            return self.told_below(extent);
        }
        let is_protocol = self.at.node().kind() == Kind::Protocol;
        let place = extent.kept.or((is_protocol && extent.place == Place::Zero).then_some(asked.start()));
        self.kept = (place, place.and_then(|_| file_of(&self.at)));
        let nothing = Status { offset: self.kept.0, file: self.kept.1, ..self.nothing() };
        match extent.place {
            Place::Below => match self.at.backing().map(Cx::skip_filters) {
                Some(below) if Some(below.view().id()) != self.until && !is_above(&self.at, self.until) => {
                    self.at = below;
                    self.depth += 1;
                    None
                }
                Some(_) => Some(nothing),
                None => Some(Status { zero: self.until.is_none(), ..nothing }),
            },
            Place::Zero => Some(Status { allocated: true, zero: true, ..nothing }),
            Place::Encoded => Some(Status { allocated: true, data: true, encoded: true, ..nothing }),
            Place::Unknown => Some(Status { allocated: true, data: true, ..nothing }),
            Place::Data(offset) => {
                let status = Status { allocated: true, data: true, ..self.nothing() };
                let status = Status { offset: Some(offset), file: file_of(&self.at), ..status };
                let allocates = self.at.node().supports_backing();
                self.found = Some(Found { status, recurse: extent.recurse, allocates });
                self.range = ByteRange::between(offset, offset.saturating_add(self.range.len()));
                None
            }
        }
    }

    fn nothing(&self) -> Status {
        Status {
            len: self.range.len(),
            depth: self.depth,
            layer: self.at.view().id(),
            allocated: false,
            zero: false,
            data: false,
            encoded: false,
            offset: None,
            file: None,
            past_end: false,
        }
    }

    /// From where the data was found to the next node below that may say more about it.
    #[inline]
    fn descend(&mut self) -> Option<Status> {
        let found = self.found.as_mut()?;
        while found.recurse && self.at.node().kind() != Kind::Protocol {
            let Some(below) = self.at.child(Role::File) else { break };
            self.at = below;
            if below.node().kind() == Kind::Filter {
                continue;
            }
            let length = below.length();
            if self.range.start() < length {
                self.range = self.range.before(length);
                return None;
            }
            (found.status.zero, found.status.data) = (true, found.allocates);
            found.status.file = if found.allocates { found.status.file } else { file_of(&below) };
            break;
        }
        Some(found.status)
    }

    /// What the node below has of the data.
    #[inline]
    fn told_below(&mut self, extent: Extent) -> Option<Status> {
        let (at, here, found) = (&self.at, self.range, self.found.as_mut()?);
        let status = &mut found.status;
        status.len = here.len();
        let place = match extent.place {
            Place::Data(offset) => {
                found.recurse = extent.recurse;
                self.range = ByteRange::between(offset, offset.saturating_add(here.len()));
                Some(offset)
            }
            Place::Zero if at.node().kind() == Kind::Protocol => Some(here.start()),
            Place::Zero => extent.kept,
            Place::Below => extent.kept.filter(|_| at.backing().is_none()),
            Place::Encoded | Place::Unknown => None,
        };
        if !found.allocates {
            (status.offset, status.file) = (place, place.and_then(|_| file_of(at)));
            status.encoded = extent.place == Place::Encoded;
        }
        let nowhere = extent.place == Place::Below && at.backing().is_none();
        if extent.place == Place::Zero || nowhere {
            (status.zero, status.data) = (true, found.allocates);
            status.allocated = found.allocates || !nowhere;
        }
        if !matches!(extent.place, Place::Data(_)) {
            return Some(*status);
        }
        found.allocates |= at.node().supports_backing();
        None
    }
}

fn is_above(at: &Cx<'_>, until: Option<NodeId>) -> bool {
    at.child(Role::Backing).is_some_and(|child| Some(child.view().id()) == until)
}

/// What the offsets that a node tells are offsets of.
fn file_of(at: &Cx<'_>) -> Option<NodeId> {
    match at.node().kind() {
        Kind::Protocol => Some(at.view().id()),
        _ => at.child(Role::File).map(|file| file.view().id()),
    }
}

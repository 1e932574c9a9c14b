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
    ask(&mut Straight, cx, range, until).await
}

/// How nodes are asked where a range lives.
pub(crate) trait Map: Send {
    /// As [`Cx::map`].
    fn map(&mut self, at: &Cx<'_>, range: ByteRange) -> impl Future<Output = Result<Extent>> + Send;
}

/// Each time anew.
struct Straight;

impl Map for Straight {
    async fn map(&mut self, at: &Cx<'_>, range: ByteRange) -> Result<Extent> {
        at.map(range).await
    }
}

/// [`status`], by way of `map`.
pub(crate) async fn ask(
    map: &mut impl Map,
    cx: &Cx<'_>,
    range: ByteRange,
    until: Option<NodeId>,
) -> Result<Status> {
    let mut at = cx.skip_filters();
    let mut range = range;
    let mut depth = 0;
    let mut kept = (None, None);
    loop {
        let length = at.length();
        if range.start() >= length {
            // Shorter than its overlay: the overlay reads zeroes here, and this layer counts as having them.
            let (offset, file) = kept;
            let status = nothing(&at, depth, range.len());
            return Ok(Status { zero: true, allocated: true, past_end: true, offset, file, ..status });
        }
        range = range.before(length);
        let extent = map.map(&at, range).await?;
        range = range.split(extent.len).0;
        let is_protocol = at.node().kind() == Kind::Protocol;
        let place = extent.kept.or((is_protocol && extent.place == Place::Zero).then_some(range.start()));
        kept = (place, file_of(&at).filter(|_| place.is_some()));
        let nothing =
            |at: &Cx<'_>, depth, len| Status { offset: kept.0, file: kept.1, ..nothing(at, depth, len) };
        match extent.place {
            Place::Below => match at.backing().map(Cx::skip_filters) {
                Some(below) if Some(below.view().id()) != until && !is_above(&at, until) => {
                    at = below;
                    depth += 1;
                }
                Some(_) => return Ok(nothing(&at, depth, range.len())),
                None => return Ok(Status { zero: until.is_none(), ..nothing(&at, depth, range.len()) }),
            },
            Place::Zero => {
                return Ok(Status { allocated: true, zero: true, ..nothing(&at, depth, range.len()) });
            }
            Place::Encoded => {
                let status = nothing(&at, depth, range.len());
                return Ok(Status { allocated: true, data: true, encoded: true, ..status });
            }
            Place::Unknown => {
                return Ok(Status { allocated: true, data: true, ..nothing(&at, depth, range.len()) });
            }
            Place::Data(offset) => return data(map, &at, depth, range, (offset, extent.recurse)).await,
        }
    }
}

fn is_above(at: &Cx<'_>, until: Option<NodeId>) -> bool {
    at.child(Role::Backing).is_some_and(|child| Some(child.view().id()) == until)
}

fn nothing(at: &Cx<'_>, depth: u32, len: u64) -> Status {
    Status {
        len,
        depth,
        layer: at.view().id(),
        allocated: false,
        zero: false,
        data: false,
        encoded: false,
        offset: None,
        file: None,
        past_end: false,
    }
}

/// What the offsets that a node tells are offsets of.
fn file_of(at: &Cx<'_>) -> Option<NodeId> {
    match at.node().kind() {
        Kind::Protocol => Some(at.view().id()),
        _ => at.child(Role::File).map(|file| file.view().id()),
    }
}

/// Follows plain data down to the protocol node that holds it, to say where it is and whether it is a hole there. Of a
/// format with an allocation of its own it is told where it is in that format's file, whatever that is.
async fn data(
    map: &mut impl Map,
    layer: &Cx<'_>,
    depth: u32,
    range: ByteRange,
    (offset, mut recurse): (u64, bool),
) -> Result<Status> {
    let mut status = Status { allocated: true, data: true, ..nothing(layer, depth, range.len()) };
    (status.offset, status.file) = (Some(offset), file_of(layer));
    let mut at = *layer;
    let mut here = ByteRange::between(offset, offset.saturating_add(range.len()));
    // A format with an allocation of its own still says data for what is a hole in its file, as QEMU's does.
    let mut allocates = layer.node().supports_backing();
    while recurse && at.node().kind() != Kind::Protocol {
        let Some(below) = at.child(Role::File) else { break };
        at = below;
        if at.node().kind() == Kind::Filter {
            continue;
        }
        let own = file_of(&at);
        let length = at.length();
        if here.start() >= length {
            (status.zero, status.data) = (true, allocates);
            status.file = if allocates { status.file } else { own };
            return Ok(status);
        }
        here = here.before(length);
        let extent = map.map(&at, here).await?;
        here = here.split(extent.len).0;
        status.len = here.len();
        let place = match extent.place {
            Place::Data(offset) => {
                recurse = extent.recurse;
                here = ByteRange::between(offset, offset.saturating_add(here.len()));
                Some(offset)
            }
            Place::Zero if at.node().kind() == Kind::Protocol => Some(here.start()),
            Place::Zero => extent.kept,
            Place::Below => extent.kept.filter(|_| at.backing().is_none()),
            Place::Encoded | Place::Unknown => None,
        };
        if !allocates {
            (status.offset, status.file) = (place, own.filter(|_| place.is_some()));
            status.encoded = extent.place == Place::Encoded;
        }
        let nowhere = extent.place == Place::Below && at.backing().is_none();
        if extent.place == Place::Zero || nowhere {
            (status.zero, status.data) = (true, allocates);
            status.allocated = allocates || !nowhere;
        }
        if !matches!(extent.place, Place::Data(_)) {
            break;
        }
        allocates |= at.node().supports_backing();
    }
    Ok(status)
}

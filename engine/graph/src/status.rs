//! Block status: what a range of a disk is, seen through all its layers. The base of `map`, of `base:allocation`
//! and of every job that copies.

use crate::error::Result;
use crate::format::Place;
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
    /// Where they are in `file`.
    pub offset: Option<u64>,
    /// The protocol node that holds them.
    pub file: Option<NodeId>,
}

/// What the first bytes of `range` are. Layers from `until` on downwards are not looked at: what only they could
/// have is reported as not allocated. The range must lie inside the node and not be empty.
pub async fn status(cx: &Cx<'_>, range: ByteRange, until: Option<NodeId>) -> Result<Status> {
    let mut at = cx.skip_filters();
    let mut range = range;
    let mut depth = 0;
    loop {
        let length = at.length();
        if range.start() >= length {
            // Shorter than its overlay: the overlay reads zeroes here, and this layer counts as having them.
            return Ok(Status { zero: true, allocated: true, ..nothing(&at, depth, range.len()) });
        }
        range = range.before(length);
        let extent = at.map(range).await?;
        range = range.split(extent.len).0;
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
            Place::Data(offset) => return data(&at, depth, range, offset, extent.recurse).await,
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
    }
}

/// Follows plain data down to the protocol node that holds it, to say where it is and whether it is a hole there.
async fn data(layer: &Cx<'_>, depth: u32, range: ByteRange, offset: u64, recurse: bool) -> Result<Status> {
    let mut status =
        Status { allocated: true, data: true, offset: Some(offset), ..nothing(layer, depth, range.len()) };
    let mut at = *layer;
    let mut here = ByteRange::between(offset, offset.saturating_add(range.len()));
    let mut recurse = recurse;
    // A format with an allocation of its own still says data for what is a hole in its file, as QEMU's does.
    let allocates = layer.node().supports_backing();
    while at.node().kind() != Kind::Protocol {
        let Some(below) = at.child(Role::File) else { break };
        at = below;
        if at.node().kind() == Kind::Filter {
            continue;
        }
        if at.node().kind() == Kind::Protocol && !recurse {
            break;
        }
        let length = at.length();
        if here.start() >= length {
            return Ok(Status { zero: true, data: allocates, file: Some(at.view().id()), ..status });
        }
        here = here.before(length);
        let extent = at.map(here).await?;
        here = here.split(extent.len).0;
        status.len = here.len();
        match extent.place {
            Place::Data(offset) => {
                recurse = extent.recurse;
                status.offset = Some(offset);
                here = ByteRange::between(offset, offset.saturating_add(here.len()));
            }
            Place::Zero => {
                status.zero = true;
                status.data = allocates;
                break;
            }
            Place::Below | Place::Encoded => {
                status.offset = None;
                break;
            }
        }
    }
    if at.node().kind() == Kind::Protocol {
        status.file = Some(at.view().id());
    }
    Ok(status)
}

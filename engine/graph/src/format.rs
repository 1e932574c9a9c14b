//! The engine that all formats share: a format says where bytes live, the code here moves them.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use async_trait::async_trait;
use underlay_sys::Iov;

use crate::error::Result;
use crate::units::ByteRange;
use crate::view::Cx;

/// Where a run of bytes of one layer lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Not in this layer: the backing node shows, or zeroes where there is none.
    Below,
    /// Reads as zeroes, and hides the backing node.
    Zero,
    /// As they are, at this offset of the `file` child (of a protocol node: at this offset of its own).
    Data(u64),
    /// In a form that only the format can read (compressed).
    Encoded,
    /// The node has them, and does not know what they are: they have to be read.
    Unknown,
}

/// The answer to "where does this range live?": one place for the first `len` bytes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where.
    pub place: Place,
    /// For how many bytes, at least 1 and at most what was asked for.
    pub len: u64,
    /// The `file` child may know more about holes in there (raw; qcow2 with preallocated metadata).
    pub recurse: bool,
    /// Where in the `file` child room is kept for what is [`Place::Below`] or [`Place::Zero`].
    pub kept: Option<u64>,
}

impl Extent {
    /// An extent whose place is all that is known.
    pub fn new(place: Place, len: u64) -> Self {
        Self { place, len, recurse: false, kept: None }
    }
}

/// Whoever has it holds on to something.
pub type Lease = Arc<dyn Send + Sync>;

/// What a node adds when the engine here shall read for it. Its [`crate::Node::map`] answers where bytes live.
#[async_trait]
pub trait Format: Send + Sync {
    /// As [`crate::Node::map`], if the answer is in memory. Called for every layer of every read: it must be fast.
    fn map_cached(&self, range: ByteRange) -> Option<Extent>;
    /// Reads a range that lies in a [`Place::Encoded`] extent.
    async fn read_encoded(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()>;
    /// Keeps the clusters that `map` answers from being given to other data, until it is dropped: held from the
    /// question to the end of the read. `None` for formats that never move data.
    fn lease(&self) -> Option<Lease> {
        None
    }
}

/// Where the first bytes of a range come from, after looking through all layers.
#[derive(Clone, Copy, Debug)]
struct Found<'a> {
    /// The layer that has them; nothing there means zeroes.
    source: Option<(Cx<'a>, Place)>,
    len: u64,
}

/// Finds the first bytes of `range`, looking from `cx`'s node downwards.
async fn find<'a>(cx: &Cx<'a>, range: ByteRange, leases: &mut Vec<Lease>) -> Result<Found<'a>> {
    let mut at = *cx;
    let mut range = range;
    let mut top = true;
    loop {
        let length = at.length();
        if range.start() >= length {
            return Ok(Found { source: None, len: range.len() });
        }
        range = range.before(length);
        let Some(format) = at.node().as_format() else {
            return Ok(Found { source: Some((at, Place::Data(range.start()))), len: range.len() });
        };
        let backing = at.backing();
        // Most layers of a deep chain have nothing here. Who only passes by needs no lease.
        if let Some(below) = backing
            && let Some(extent) = format.map_cached(range)
            && extent.place == Place::Below
        {
            range = range.split(extent.len).0;
            at = below;
            if top && let Some((first, len)) = cx.view().chain().and_then(|chain| chain.first_with(range)) {
                range = range.split(len).0;
                at = first;
            }
            top = false;
            continue;
        }
        top = false;
        leases.extend(format.lease());
        let extent = match format.map_cached(range) {
            Some(extent) => extent,
            None => at.map(range).await?,
        };
        range = range.split(extent.len).0;
        match (extent.place, backing) {
            (Place::Below, Some(backing)) => at = backing,
            (Place::Below | Place::Zero, _) => return Ok(Found { source: None, len: range.len() }),
            (place, _) => return Ok(Found { source: Some((at, place)), len: range.len() }),
        }
    }
}

/// Reads for a format node: looks each part of the range up, layer by layer, and fetches the parts side by side.
pub async fn read(cx: &Cx<'_>, mut range: ByteRange, into: Iov) -> Result<()> {
    let mut places = Vec::new();
    for layer in &cx.view().passed_by {
        places.extend(layer.reading(range).await);
    }
    let mut leases = Vec::new();
    let mut parts: Vec<Pin<Box<dyn Future<Output = Result<()>> + Send + '_>>> = Vec::new();
    let mut done = 0;
    while !range.is_empty() {
        let found = find(cx, range, &mut leases).await?;
        let (part, rest) = range.split(found.len);
        let target = into.slice(done, part.buffer_len());
        done += part.buffer_len();
        range = rest;
        match found.source {
            None => target.fill(0),
            Some((at, place)) if range.is_empty() && parts.is_empty() => {
                fetch(at, place, part, target).await?
            }
            Some((at, place)) => parts.push(Box::pin(fetch(at, place, part, target))),
        }
    }
    join(parts).await
}

async fn fetch(at: Cx<'_>, place: Place, range: ByteRange, into: Iov) -> Result<()> {
    match (place, at.node().as_format()) {
        (Place::Encoded, Some(format)) => format.read_encoded(&at, range, into).await,
        (Place::Data(offset), Some(_)) => {
            at.below().read(ByteRange::between(offset, offset.saturating_add(range.len())), into).await
        }
        _ => at.read(range, into).await,
    }
}

/// Runs all of `parts` side by side to their ends; the first error wins.
pub async fn join(mut parts: Vec<Pin<Box<dyn Future<Output = Result<()>> + Send + '_>>>) -> Result<()> {
    if parts.is_empty() {
        return Ok(());
    }
    let mut result = Ok(());
    std::future::poll_fn(|cx| {
        parts.retain_mut(|part| match part.as_mut().poll(cx) {
            Poll::Pending => true,
            Poll::Ready(done) => {
                if result.is_ok() {
                    result = done;
                }
                false
            }
        });
        if parts.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    result
}

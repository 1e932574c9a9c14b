//! The driver `snapshot-access`: reads a disk as it was when the copy-before-write filter below came, while guests
//! write through that filter. What was given up by a discard here, or lost, cannot be read: EACCES.

use std::any::Any;

use async_trait::async_trait;
use underlay_graph::{
    Access, ByteRange, Cx, Extent, IoError, Kind, Limits, Node, Perms, Place, Result, Role, WriteFlags,
};
use underlay_sys::Iov;

use super::copies::{Copies, Ends};
use super::copy_before_write::CopyBeforeWrite;

/// See the module.
#[derive(Debug)]
pub struct SnapshotAccess;

/// The copies of the filter below, if it is one.
fn copies<'a>(cx: &Cx<'a>) -> Result<(&'a Copies, Ends<'a>)> {
    let below = cx.below();
    let filter = below.node().as_any().downcast_ref::<CopyBeforeWrite>().ok_or(IoError::ENOTSUP)?;
    Ok((filter.copies(), CopyBeforeWrite::ends(&below)))
}

#[async_trait]
impl Node for SnapshotAccess {
    fn driver(&self) -> &'static str {
        "snapshot-access"
    }
    /// Nothing that looks through nodes at what they stand on may look through this one.
    fn kind(&self) -> Kind {
        Kind::Protocol
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn length(&self, cx: &Cx<'_>) -> u64 {
        cx.below().length()
    }
    fn limits(&self, cx: &Cx<'_>) -> Limits {
        cx.below().limits()
    }
    fn child_access(&self, _access: Access, _role: Role) -> Option<(Perms, Perms)> {
        // It reads what others must not rely on, and lets them do what they like.
        Some((Perms::NONE, Perms::ALL))
    }
    async fn read(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        let (copies, ends) = copies(cx)?;
        let inside = range.before(self.length(cx).max(range.start()));
        let (part, rest) = (inside.buffer_len(), range.buffer_len() - inside.buffer_len());
        into.slice(part, rest).fill(0);
        copies.read(ends, inside, into.slice(0, part)).await
    }
    async fn write(&self, _cx: &Cx<'_>, _range: ByteRange, _from: Iov, _flags: WriteFlags) -> Result<()> {
        Err(IoError::ENOTSUP)
    }
    async fn discard(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        let (copies, ends) = copies(cx)?;
        copies.forget(ends, range, self.length(cx)).await
    }
    async fn map(&self, cx: &Cx<'_>, range: ByteRange) -> Result<Extent> {
        let (copies, ends) = copies(cx)?;
        let inside = range.before(self.length(cx));
        match inside.is_empty() {
            true => Ok(Extent::new(Place::Zero, range.len())),
            false => copies.map(ends, inside).await,
        }
    }
    async fn close(&self, _cx: &Cx<'_>) -> Result<()> {
        Ok(())
    }
}

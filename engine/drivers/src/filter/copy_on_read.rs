//! `copy-on-read`: what is read and lies further down the chain is copied into the image below this filter first, and
//! need not be fetched from there again.
//!
//! The image makes the copy itself ([`Node::populate`]): it takes only what it still borrows at that moment, and a
//! guest's write to the same place waits for it or goes first, so a copy never overwrites newer data. With `bottom`
//! only what lies in the chain down to that image is copied; the chain must stay as it is down to there. A copy that
//! fails (the disk is full) does not fail the read.

use std::any::Any;

use async_trait::async_trait;
use underlay_graph::status::status;
use underlay_graph::{
    Access, ByteRange, Cx, Kind, Limits, Node, NodeId, NodeName, Perms, Preallocation, Result, Role,
    WriteFlags, ZeroFlags,
};
use underlay_sys::Iov;

/// See the module.
#[derive(Debug)]
pub struct CopyOnRead {
    bottom: Option<NodeName>,
}

impl CopyOnRead {
    /// Copies from all of the chain, or down to the image `bottom`, which must be in it.
    pub fn new(bottom: Option<NodeName>) -> Self {
        Self { bottom }
    }

    /// The first image that nothing is copied from.
    fn below_bottom(&self, top: Cx<'_>) -> Option<NodeId> {
        let bottom = self.bottom.as_ref()?;
        let mut at = top;
        while at.view().name() != bottom {
            at = at.backing()?.skip_filters();
        }
        Some(at.backing()?.skip_filters().view().id())
    }

    async fn copy_up(&self, below: Cx<'_>, mut range: ByteRange) -> Result<()> {
        let top = below.skip_filters();
        let until = self.below_bottom(top);
        range = range.before(top.length());
        while !range.is_empty() {
            let found = status(&top, range, until).await?;
            let (here, rest) = range.split(found.len);
            if found.allocated && !found.past_end && found.depth > 0 {
                below.populate(here).await?;
            }
            range = rest;
        }
        Ok(())
    }
}

#[async_trait]
impl Node for CopyOnRead {
    fn driver(&self) -> &'static str {
        "copy-on-read"
    }

    fn kind(&self) -> Kind {
        Kind::Filter
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn child_access(&self, access: Access, _role: Role) -> Option<(Perms, Perms)> {
        Some((access.required | Perms::WRITE_UNCHANGED, access.shared))
    }

    fn relies_down_to(&self) -> Option<&NodeName> {
        self.bottom.as_ref()
    }

    fn length(&self, cx: &Cx<'_>) -> u64 {
        cx.below().length()
    }

    fn limits(&self, cx: &Cx<'_>) -> Limits {
        cx.below().limits()
    }

    async fn read(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        if let Err(error) = self.copy_up(cx.below(), range).await {
            tracing::debug!(node = %cx.view().name(), %error, "what was read could not be copied");
        }
        cx.below().read(range, into).await
    }

    async fn write(&self, cx: &Cx<'_>, range: ByteRange, from: Iov, flags: WriteFlags) -> Result<()> {
        cx.below().write(range, from, flags).await
    }

    async fn write_zeroes(&self, cx: &Cx<'_>, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        cx.below().write_zeroes(range, flags).await
    }

    async fn discard(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        cx.below().discard(range).await
    }

    async fn flush(&self, cx: &Cx<'_>) -> Result<()> {
        cx.below().flush().await
    }

    async fn populate(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        cx.below().populate(range).await
    }

    async fn resize(&self, cx: &Cx<'_>, size: u64, preallocation: Preallocation) -> Result<()> {
        let below = cx.below();
        below.node().resize(&below, size, preallocation).await
    }

    async fn close(&self, _cx: &Cx<'_>) -> Result<()> {
        Ok(())
    }
}

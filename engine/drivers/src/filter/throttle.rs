//! `throttle`: requests wait until the limits of their group let them go on. Flushes do not count.

use std::any::Any;

use async_trait::async_trait;
use underlay_graph::{ByteRange, Cx, Kind, Limits, Node, Preallocation, Result, WriteFlags, ZeroFlags};
use underlay_sys::Iov;

use crate::throttle::{Direction, Member};

/// See the module.
#[derive(Debug)]
pub struct Throttle {
    member: Member,
}

impl Throttle {
    /// In a group.
    pub fn new(member: Member) -> Self {
        Self { member }
    }

    /// Its place in its group.
    pub fn member(&self) -> &Member {
        &self.member
    }
}

#[async_trait]
impl Node for Throttle {
    fn driver(&self) -> &'static str {
        "throttle"
    }

    fn kind(&self) -> Kind {
        Kind::Filter
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

    async fn read(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        self.member.pass(Direction::Read, range.len()).await;
        cx.below().read(range, into).await
    }

    async fn write(&self, cx: &Cx<'_>, range: ByteRange, from: Iov, flags: WriteFlags) -> Result<()> {
        self.member.pass(Direction::Write, range.len()).await;
        cx.below().write(range, from, flags).await
    }

    async fn write_zeroes(&self, cx: &Cx<'_>, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.member.pass(Direction::Write, range.len()).await;
        cx.below().write_zeroes(range, flags).await
    }

    async fn discard(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        self.member.pass(Direction::Write, range.len()).await;
        cx.below().discard(range).await
    }

    async fn flush(&self, cx: &Cx<'_>) -> Result<()> {
        cx.below().flush().await
    }

    async fn populate(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        self.member.pass(Direction::Write, range.len()).await;
        cx.below().populate(range).await
    }

    fn hurry(&self, on: bool) {
        self.member.hurry(on);
    }

    async fn resize(&self, cx: &Cx<'_>, size: u64, preallocation: Preallocation) -> Result<()> {
        let below = cx.below();
        below.node().resize(&below, size, preallocation).await
    }

    async fn close(&self, _cx: &Cx<'_>) -> Result<()> {
        Ok(())
    }
}

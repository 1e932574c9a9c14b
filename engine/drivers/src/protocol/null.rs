//! A disk that keeps nothing: the drivers `null-co` and `null-aio`.

use std::any::Any;
use std::time::Duration;

use async_trait::async_trait;
use underlay_graph::{
    ByteRange, Cx, Extent, IoError, Kind, Node, Place, Preallocation, Result, WriteFlags, ZeroFlags,
};
use underlay_sys::{Iov, rt};

use crate::options::{Given, NullSpec};

/// See the module.
#[derive(Debug)]
pub struct NullNode {
    spec: NullSpec,
}

impl NullNode {
    /// With its options.
    pub fn new(spec: &NullSpec) -> Self {
        Self { spec: spec.clone() }
    }

    /// Its options.
    pub fn spec(&self) -> &NullSpec {
        &self.spec
    }

    /// The options that matter for its content, for its file name.
    pub fn filename_options(&self) -> Given {
        self.spec.given.clone()
    }

    async fn pretend(&self) {
        if self.spec.latency_ns > 0 {
            rt::sleep(Duration::from_nanos(self.spec.latency_ns)).await;
        }
    }
}

#[async_trait]
impl Node for NullNode {
    fn driver(&self) -> &'static str {
        self.spec.driver
    }

    fn kind(&self) -> Kind {
        Kind::Protocol
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn length(&self, _cx: &Cx<'_>) -> u64 {
        self.spec.size
    }

    /// Zeroes in any case: without `read-zeroes` clients may expect anything, but a buffer can hold another disk's
    /// data, which is not theirs to see.
    async fn read(&self, _cx: &Cx<'_>, _range: ByteRange, into: Iov) -> Result<()> {
        self.pretend().await;
        into.fill(0);
        Ok(())
    }

    async fn write(&self, _cx: &Cx<'_>, _range: ByteRange, _from: Iov, _flags: WriteFlags) -> Result<()> {
        self.pretend().await;
        Ok(())
    }

    async fn write_zeroes(&self, _cx: &Cx<'_>, _range: ByteRange, _flags: ZeroFlags) -> Result<()> {
        self.pretend().await;
        Ok(())
    }

    async fn map(&self, _cx: &Cx<'_>, range: ByteRange) -> Result<Extent> {
        let place = if self.spec.read_zeroes { Place::Zero } else { Place::Data(range.start()) };
        Ok(Extent::new(place, range.len()))
    }

    async fn flush(&self, _cx: &Cx<'_>) -> Result<()> {
        self.pretend().await;
        Ok(())
    }

    async fn resize(&self, _cx: &Cx<'_>, _size: u64, _preallocation: Preallocation) -> Result<()> {
        Err(IoError::ENOTSUP.with("Image format driver does not support resize"))
    }

    fn allocated_size(&self) -> Option<u64> {
        Some(0)
    }

    fn exact_filename(&self) -> Option<String> {
        let plain = self.filename_options().is_empty();
        plain.then(|| format!("{}://", self.spec.driver))
    }
}

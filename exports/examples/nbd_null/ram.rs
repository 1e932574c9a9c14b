//! A disk in memory, and a graph with nothing but it.

use std::any::Any;
use std::sync::Arc;

use async_trait::async_trait;
use underlay_graph::plan::{NewRoot, NodeOptions};
use underlay_graph::{
    ByteRange, Cx, Extent, Graph, IoError, Kind, Limits, NewNode, Node, Perms, Place, Result, Root,
    WriteFlags, ZeroFlags,
};
use underlay_sys::Iov;

/// Bytes that `map` looks at as one.
const GRAIN: u64 = 64 << 10;

/// A disk in memory.
#[derive(Debug)]
pub struct Ram {
    memory: Iov,
    limits: Limits,
    /// Every request waits for a turn of the executor first.
    slow: bool,
}

impl Ram {
    /// `size` zeroes.
    pub fn new(size: usize, slow: bool, request_alignment: u32) -> Arc<Self> {
        let limits = Limits { request_alignment, ..Limits::default() };
        Arc::new(Self { memory: Iov::zeroed(size), limits, slow })
    }

    fn part(&self, range: ByteRange) -> Iov {
        self.memory.slice(usize::try_from(range.start()).unwrap_or(usize::MAX), range.buffer_len())
    }

    async fn wait(&self) {
        if self.slow {
            underlay_sys::rt::yield_now().await;
        }
    }
}

#[async_trait]
impl Node for Ram {
    fn driver(&self) -> &'static str {
        "ram"
    }
    fn kind(&self) -> Kind {
        Kind::Protocol
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn length(&self, _cx: &Cx<'_>) -> u64 {
        self.memory.len() as u64
    }
    fn limits(&self, _cx: &Cx<'_>) -> Limits {
        self.limits
    }
    fn unwritten_is_zero(&self, _cx: &Cx<'_>) -> bool {
        true
    }
    async fn read(&self, _cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        self.wait().await;
        into.copy_from(&self.part(range));
        // A place on the disk that is broken, for tests.
        if range.len() == 17 { Err(IoError::EIO) } else { Ok(()) }
    }
    async fn write(&self, _cx: &Cx<'_>, range: ByteRange, from: Iov, _flags: WriteFlags) -> Result<()> {
        self.wait().await;
        // A place on the disk that is broken, for tests.
        if range.len() == 13 {
            return Err(IoError::ENOSPC);
        }
        self.part(range).copy_from(&from);
        Ok(())
    }
    async fn write_zeroes(&self, _cx: &Cx<'_>, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if flags.no_fallback {
            return Err(IoError::ENOTSUP);
        }
        self.part(range).fill(0);
        Ok(())
    }
    async fn discard(&self, _cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        self.part(range).fill(0);
        Ok(())
    }
    async fn map(&self, _cx: &Cx<'_>, range: ByteRange) -> Result<Extent> {
        let until = ((range.start() / GRAIN) + 1) * GRAIN;
        let range = range.before(until);
        let place = if self.part(range).is_zero() { Place::Zero } else { Place::Data(range.start()) };
        Ok(Extent::new(place, range.len()))
    }
}

/// A way into a graph that consists of `node`.
pub async fn root(node: Arc<dyn Node>) -> Root {
    let graph = Graph::new();
    let new = NewNode {
        name: None,
        node,
        read_only: false,
        options: NodeOptions { discard: true, ..NodeOptions::default() },
        children: Vec::new(),
    };
    let id = graph
        .change(|plan| {
            let node = plan.add(new)?;
            Ok(plan.add_root(NewRoot {
                user: "NBD export".into(),
                role: "root",
                node,
                required: Perms::CONSISTENT_READ | Perms::WRITE,
                shared: Perms::ALL.without(Perms::RESIZE),
                pinned: false,
                drained: None,
            }))
        })
        .await
        .expect("a graph of one node is sound");
    graph.root(id).expect("just made")
}

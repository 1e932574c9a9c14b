//! The filters that jobs put above the nodes they work on: they pass everything through.
//!
//! `commit_top` also keeps the needs of the nodes above away from what is below, so that a commit may write to
//! the base although the images between are not consistent by themselves meanwhile.

use std::any::Any;
use std::sync::Arc;

use async_trait::async_trait;
use underlay_graph::{
    Access, ByteRange, Cx, GraphError, Kind, Limits, NewNode, Node, NodeId, NodeName, Perms, Plan, Result,
    Role, Wiring, WriteFlags, ZeroFlags,
};
use underlay_sys::Iov;

/// Which one it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Above the top of a commit.
    CommitTop,
    /// Above the top of a stream.
    CopyOnRead,
    /// Above the active layer that is being committed.
    MirrorTop,
}

#[async_trait]
impl Node for Pass {
    fn driver(&self) -> &'static str {
        match self {
            Self::CommitTop => "commit_top",
            Self::CopyOnRead => "copy-on-read",
            Self::MirrorTop => "mirror_top",
        }
    }
    fn kind(&self) -> Kind {
        Kind::Filter
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn length(&self, cx: &Cx<'_>) -> u64 {
        self.child(cx).length()
    }
    fn limits(&self, cx: &Cx<'_>) -> Limits {
        self.child(cx).limits()
    }
    fn child_access(&self, access: Access, _role: Role) -> Option<(Perms, Perms)> {
        match self {
            // The images below the top of a commit are not consistent by themselves.
            Self::CommitTop => Some((Perms::NONE, Perms::ALL)),
            // Nor are those below the active layer, and who lets nobody write above lets the job write to the base.
            Self::MirrorTop => {
                Some((access.required.without(Perms::CONSISTENT_READ), access.shared | Perms::WRITE))
            }
            Self::CopyOnRead => None,
        }
    }
    async fn read(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        self.child(cx).read(range, into).await
    }
    async fn write(&self, cx: &Cx<'_>, range: ByteRange, from: Iov, flags: WriteFlags) -> Result<()> {
        self.child(cx).write(range, from, flags).await
    }
    async fn write_zeroes(&self, cx: &Cx<'_>, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.child(cx).write_zeroes(range, flags).await
    }
    async fn discard(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        self.child(cx).discard(range).await
    }
    async fn flush(&self, cx: &Cx<'_>) -> Result<()> {
        self.child(cx).flush().await
    }
    async fn close(&self, _cx: &Cx<'_>) -> Result<()> {
        Ok(())
    }
}

impl Pass {
    fn role(self) -> Role {
        match self {
            Self::CopyOnRead => Role::File,
            Self::CommitTop | Self::MirrorTop => Role::Backing,
        }
    }

    fn child<'a>(self, cx: &Cx<'a>) -> Cx<'a> {
        cx.child(self.role()).expect("a job's filter has its child as long as it exists")
    }

    /// Puts the filter between `node` and its users; without a name it is implicit.
    pub(crate) fn insert(
        self,
        plan: &mut Plan,
        node: NodeId,
        name: Option<&str>,
    ) -> std::result::Result<NodeId, GraphError> {
        let children = [(self.role(), node)];
        // Nobody writes through the filter above what is being committed.
        let failed = |error: GraphError| GraphError::new(format!("Could not create node: {error}"));
        let filter = insert(plan, Arc::new(self), &children, name, failed, |_| false)?;
        if self == Self::CommitTop {
            plan.node_mut(filter).read_only = true;
        }
        Ok(filter)
    }
}

/// Puts a filter between the first of its `children` and the users of that, except those for which `keep`; without a
/// name it is implicit. `failed` says it in the job's words when there can be no such node.
pub(crate) fn insert(
    plan: &mut Plan,
    filter: Arc<dyn Node>,
    children: &[(Role, NodeId)],
    name: Option<&str>,
    failed: impl Fn(GraphError) -> GraphError,
    keep: impl Fn(NodeId) -> bool,
) -> std::result::Result<NodeId, GraphError> {
    let named = match name {
        Some(name) if name.len() > NodeName::MAX => return Err(failed(GraphError::NameTooLong)),
        Some(name) => {
            Some(NodeName::new(name).ok_or_else(|| failed(GraphError::InvalidName(name.to_owned())))?)
        }
        None => None,
    };
    let Some(&(_, node)) = children.first() else { return Err(GraphError::new("A filter has a child")) };
    let below = plan.node(node);
    let new = NewNode {
        name: named,
        node: filter,
        read_only: below.read_only,
        // What the node below ignores is nothing to a filter either: no discard makes a backup copy then.
        options: underlay_graph::plan::NodeOptions {
            detect_zeroes: underlay_graph::plan::DetectZeroes::Off,
            ..below.options
        },
        children: children.iter().map(|(role, id)| (*role, Wiring::Existing(*id))).collect(),
    };
    let filter = plan.add(new).map_err(&failed)?;
    // What keeps it from being there at all is told apart from what keeps it from its place.
    plan.check().map_err(failed)?;
    plan.node_mut(filter).implicit = name.is_none();
    plan.replace(node, filter, |parent| parent == filter || keep(parent))?;
    Ok(filter)
}

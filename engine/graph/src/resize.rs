//! Another length for a node, while no request is inside and its users do not mind.

use async_trait::async_trait;

use crate::error::GraphError;
use crate::graph::{Graph, LastStep};
use crate::node::Preallocation;
use crate::perm::Perms;
use crate::plan::{NewRoot, NodeId, Plan, Wires};

/// Makes a node `size` bytes long. `user` is who its users are told that wants it so, if they mind.
pub async fn resize(
    graph: &Graph,
    id: NodeId,
    size: u64,
    preallocation: Preallocation,
    user: &str,
) -> Result<(), GraphError> {
    let edit = |plan: &mut Plan| {
        let node = plan.get(id).ok_or_else(|| GraphError::new("The node was removed in the meantime"))?;
        if node.read_only {
            return Err(GraphError::new("Image is read-only"));
        }
        let root = plan.add_root(NewRoot {
            user: user.to_owned(),
            role: "root",
            node: id,
            required: Perms::RESIZE,
            shared: Perms::ALL,
            pinned: true,
            drained: None,
        });
        plan.touch(id);
        let step: Box<dyn LastStep> = Box::new(Resize { id, size, preallocation });
        Ok((root, Some(step)))
    };
    let root = graph.change_with(edit).await?;
    let let_go = |plan: &mut Plan| {
        plan.remove_root(root);
        Ok(())
    };
    graph.change(let_go).await
}

struct Resize {
    id: NodeId,
    size: u64,
    preallocation: Preallocation,
}

#[async_trait]
impl LastStep for Resize {
    async fn run(self: Box<Self>, _old: &Wires, new: &Wires) -> Result<(), GraphError> {
        let view = new.view(self.id);
        Ok(view.node().resize(&view.cx(), self.size, self.preallocation).await?)
    }
}

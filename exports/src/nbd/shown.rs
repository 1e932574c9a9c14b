//! Which bitmaps an export shows, and that nobody changes them meanwhile.

use std::sync::Arc;

use underlay_graph::bitmap::DirtyBitmap;
use underlay_graph::{GraphError, Kind, NodeId, Plan, Role};

/// A bitmap that an export shall show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shown {
    /// The first of that name on the way down from the exported node.
    Somewhere(String),
    /// That of a node.
    Of {
        /// The node's name.
        node: String,
        /// The bitmap's.
        name: String,
    },
}

/// Bitmaps that an export shows, each once; locked in the plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShownBitmaps(Vec<(NodeId, String)>);

/// What they say, by the names under which clients see them.
pub type NamedBits = Vec<(String, Arc<DirtyBitmap>)>;

impl Shown {
    /// The node that has it, for an export of `top`.
    fn find(&self, plan: &Plan, top: NodeId, writable: bool) -> Result<(NodeId, String), GraphError> {
        match self {
            Self::Of { node, name } => {
                let id = plan.find(node);
                let id = id.ok_or_else(|| GraphError::new(format!("Node '{node}' not found")))?;
                plan.bitmap(id, name)?;
                Ok((id, name.clone()))
            }
            Self::Somewhere(name) => {
                let down = |id: &NodeId| {
                    let node = plan.node(*id);
                    let backing = node.child(Role::Backing);
                    backing.or(node.child(Role::File).filter(|_| node.node.kind() == Kind::Filter))
                };
                let mut nodes = std::iter::successors(Some(top), down);
                let found = nodes.find(|id| plan.bitmap(*id, name).is_ok());
                let node = found.ok_or_else(|| GraphError::new(format!("Bitmap '{name}' is not found")))?;
                let may_grow = !plan.node(node).read_only && plan.bitmap(node, name)?.enabled;
                if !writable && may_grow {
                    return Err(GraphError::new(format!(
                        "Enabled bitmap '{name}' incompatible with readonly export"
                    )));
                }
                Ok((node, name.clone()))
            }
        }
    }
}

impl ShownBitmaps {
    /// Finds and locks the bitmaps of an export of `top`. Errors are QEMU's.
    pub fn lock(
        plan: &mut Plan,
        top: NodeId,
        wanted: &[Shown],
        writable: bool,
    ) -> Result<(Self, NamedBits), GraphError> {
        let find = |shown: &Shown| shown.find(plan, top, writable);
        let found = wanted.iter().map(find).collect::<Result<Vec<_>, _>>()?;
        let (mut locked, mut bits) = (Vec::new(), NamedBits::new());
        for (node, name) in found {
            // Clients see a bitmap that is named twice twice.
            let earlier = locked.iter().position(|other| *other == (node, name.clone()));
            match earlier.and_then(|at| bits.get(at)).map(|(_, bits)| bits.clone()) {
                Some(same) => bits.push((name.clone(), same)),
                None => bits.push((name.clone(), plan.lock_bitmap(node, &name)?)),
            }
            locked.push((node, name));
        }
        Ok((Self(locked), bits))
    }

    /// Gives them back.
    pub fn unlock(&self, plan: &mut Plan) {
        self.0.iter().for_each(|(node, name)| plan.unlock_bitmap(*node, name));
    }
}

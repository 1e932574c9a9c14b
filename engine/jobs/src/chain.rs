//! What jobs have to know about chains: which images lie between two, who works on them, and the marks that keep
//! everybody else's hands off.

use std::sync::Arc;

use underlay_graph::plan::NewRoot;
use underlay_graph::{Graph, GraphError, Kind as NodeKind, Node, NodeId, Perms, Plan, Role, RootId};

use crate::error::JobError;
use crate::job::Job;
use crate::settings::Kind;

/// The images from `top` down to (not including) `base`; to the lowest one without a base. `None` when `base` is not
/// below `top`. Filters are left out.
pub fn above(plan: &Plan, top: NodeId, base: Option<NodeId>) -> Option<Vec<NodeId>> {
    let base = match base {
        Some(base) => Some(plan.get(base).map(|_| plan.skip_filters(base))?),
        None => None,
    };
    let mut images = Vec::new();
    for image in plan.chain(top) {
        if Some(image) == base {
            return (!images.is_empty()).then_some(images);
        }
        images.push(image);
    }
    base.is_none().then_some(images)
}

/// Refuses when a job works on one of `nodes`.
pub(crate) fn check_free(plan: &Plan, nodes: &[NodeId]) -> Result<(), GraphError> {
    for id in nodes {
        let node = plan.get(*id).ok_or_else(|| GraphError::new("The node was removed in the meantime"))?;
        if let Some(job) = node.busy {
            return Err(GraphError::Busy { node: node.name.to_string(), job });
        }
    }
    Ok(())
}

/// Refuses when a job works on a node from `top` down: on an image, or on a filter among them, which its job will want
/// to take out again. `last` is the end of it, or with `None` the lowest.
pub(crate) fn check_free_down_to(plan: &Plan, top: NodeId, last: Option<NodeId>) -> Result<(), GraphError> {
    let mut nodes = Vec::new();
    for id in plan.chain_with_filters(top) {
        nodes.push(id);
        if Some(id) == last {
            break;
        }
    }
    check_free(plan, &nodes)
}

/// Does something to the nodes of the target of a copy that came to nothing, as far as they are not the source's as
/// well.
pub(crate) fn at_target(plan: &Plan, source: NodeId, target: NodeId, act: fn(&dyn Node)) {
    let of_source = if plan.get(source).is_some() { plan.reachable(source) } else { Default::default() };
    let file = |id: &NodeId| plan.get(*id).and_then(|node| node.child(Role::File));
    for id in std::iter::successors(Some(target), file).filter(|id| !of_source.contains(id)) {
        if let Some(node) = plan.get(id) {
            act(&*node.node);
        }
    }
}

/// Refuses when a filter relies on a link from `device` down to the last of `images`, or on the one below that.
pub(crate) fn check_links(plan: &Plan, device: NodeId, images: &[NodeId]) -> Result<(), GraphError> {
    let filters = std::iter::successors(Some(device), |id| plan.node(*id).child(Role::File))
        .take_while(|id| plan.node(*id).node.kind() == NodeKind::Filter);
    filters
        .map(|id| (id, Role::File))
        .chain(images.iter().map(|id| (*id, Role::Backing)))
        .try_for_each(|(id, role)| plan.check_link(id, role))
}

/// The nodes that a job works on, as it has marked them, with what has to be put back.
#[derive(Clone, Debug, Default)]
pub(crate) struct Claim {
    /// Refuse other operations.
    nodes: Vec<NodeId>,
    /// The filter that comes and goes with the job; refuses them too.
    filter: Option<NodeId>,
    /// Keep their backing links.
    frozen: Vec<NodeId>,
    /// Were read-only before.
    reopened: Vec<NodeId>,
}

impl Claim {
    /// Marks `nodes` as busy with a job of this kind, and keeps the backing links of `frozen`.
    pub(crate) fn take(
        plan: &mut Plan,
        kind: Kind,
        nodes: Vec<NodeId>,
        frozen: Vec<NodeId>,
    ) -> Result<Self, GraphError> {
        check_free(plan, &nodes)?;
        for id in &nodes {
            plan.node_mut(*id).busy = Some(kind.as_str());
        }
        for id in &frozen {
            plan.node_mut(*id).frozen = true;
        }
        Ok(Self { nodes, frozen, ..Self::default() })
    }

    /// Marks the filter that the job has put in: it goes with the job, and nobody is to build on it.
    pub(crate) fn add_filter(&mut self, plan: &mut Plan, kind: Kind, filter: NodeId) {
        plan.node_mut(filter).busy = Some(kind.as_str());
        self.filter = Some(filter);
    }

    /// Makes a node writable, until the claim is released.
    pub(crate) fn make_writable(&mut self, plan: &mut Plan, id: NodeId) {
        if plan.node(id).read_only {
            plan.set_read_only(id, false);
            self.reopened.push(id);
        }
    }

    /// The node stays writable after the claim.
    pub(crate) fn leave_writable(&mut self, id: NodeId) {
        self.reopened.retain(|other| *other != id);
    }

    /// Nothing goes back to read-only: for a base that cannot be flushed. Whether that makes a difference.
    pub(crate) fn leave_all_writable(&mut self) -> bool {
        !std::mem::take(&mut self.reopened).is_empty()
    }

    /// Takes all marks away again. When the wiring is as it will be, [`Claim::make_read_only_again`] is to follow.
    pub(crate) fn release(&self, plan: &mut Plan) {
        for id in self.nodes.iter().chain(&self.frozen).chain(&self.filter) {
            if plan.get(*id).is_some() {
                let node = plan.node_mut(*id);
                node.busy = None;
                node.frozen = false;
            }
        }
    }

    /// Nodes go back to read-only, but for those that somebody has come to write to since.
    pub(crate) fn make_read_only_again(&self, plan: &mut Plan) -> Result<(), GraphError> {
        if self.reopened.is_empty() {
            return Ok(());
        }
        let access = plan.check()?;
        let is_written_to = |id: &NodeId| access.get(id).is_some_and(|is| is.required.has(Perms::WRITE));
        for id in self.reopened.iter().filter(|id| !is_written_to(id)) {
            if plan.get(*id).is_some() {
                plan.set_read_only(*id, true);
            }
        }
        Ok(())
    }
}

/// What a job that is over keeps of the graph until it is dismissed: QEMU's still count as users of their images, and
/// nobody else may work on these.
#[derive(Debug)]
pub(crate) struct Afterlife {
    graph: Arc<Graph>,
    nodes: Vec<NodeId>,
    roots: Vec<RootId>,
}

impl Afterlife {
    /// Keeps hold of the nodes of a claim that was released. Nothing for a job that vanishes by itself.
    pub(crate) fn begin(plan: &mut Plan, graph: &Arc<Graph>, claim: &Claim, job: &Job) -> Option<Self> {
        if job.vanishes_by_itself() {
            return None;
        }
        let nodes: Vec<_> = claim.nodes.iter().copied().filter(|id| plan.get(*id).is_some()).collect();
        let hold = |id: &NodeId| {
            plan.node_mut(*id).busy = Some(job.kind().as_str());
            plan.add_root(NewRoot {
                user: user(job.kind(), job.id()),
                role: "intermediate node",
                node: *id,
                required: Perms::NONE,
                shared: Perms::ALL,
                pinned: true,
                drained: None,
            })
        };
        let roots = nodes.iter().map(hold).collect();
        Some(Self { graph: graph.clone(), nodes, roots })
    }

    /// Lets go of everything.
    pub(crate) async fn end(self) {
        let edit = |plan: &mut Plan| {
            self.roots.iter().for_each(|root| plan.remove_root(*root));
            self.nodes.iter().for_each(|id| plan.node_mut(*id).busy = None);
            Ok(())
        };
        if let Err(error) = self.graph.change(edit).await {
            tracing::error!(%error, "the images of a dismissed job cannot be let go of");
        }
    }
}

/// The user in a permission conflict.
pub(crate) fn user(kind: Kind, id: &str) -> String {
    format!("{} job '{id}'", kind.as_str())
}

pub(crate) fn wrong(text: String) -> JobError {
    JobError::Chain(text)
}

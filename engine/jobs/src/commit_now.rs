//! The human monitor's `commit`: what a disk's image has goes to the image below it, and the image is emptied. No job:
//! the users of the disk wait meanwhile, as the reference's guests do, so that nothing is written that would be emptied
//! with it.
//!
//! ```text
//!   guest ── A <- B          the base becomes writable, for this only
//!   (held) ─ A <- B          with the gates closed: B is copied into A, A is flushed, B is emptied
//!   guest ── A <- B          the base is as it was
//! ```
//!
//! Whatever goes wrong before A is flushed, B still has everything. The change of the graph in which all this happens
//! keeps other changes waiting.

use std::sync::Arc;

use async_trait::async_trait;
use underlay_graph::graph::LastStep;
use underlay_graph::plan::{NewNode, NewRoot, Wires, Wiring};
use underlay_graph::{ByteRange, Graph, GraphError, IoError, NodeId, Perms, Plan, Role, RootId};
use underlay_sys::rt::StopSign;

use crate::active::copy_still;
use crate::chain::{self, Claim};
use crate::commit::{base_needs, chunk_unit, lengthen};
use crate::filter::Pass;
use crate::settings::Kind;

/// Who the base is told that it is written by. Source: the reference's messages.
const USER: &str = "an unnamed block device";

/// Why nothing was committed.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum Refusal {
    /// The image has nothing below it, or cannot be emptied.
    #[error("Operation not supported")]
    NotSupported,
    /// A job works on one of the two.
    #[error("Device or resource busy")]
    Busy,
    /// The graph would not have it.
    #[error("{0}")]
    Graph(GraphError),
}

impl From<GraphError> for Refusal {
    fn from(error: GraphError) -> Self {
        Self::Graph(error)
    }
}

/// Commits the image `top` into the one below it, and empties it. Ends early, with nothing lost, when `stop` is raised.
pub async fn commit_now(graph: &Graph, top: NodeId, stop: &StopSign) -> Result<(), Refusal> {
    let base = ends(&graph.plan(), top)?;
    let wiring = graph.change(|plan| wire(plan, top, base)).await?;
    let stop = stop.clone();
    let edit = |plan: &mut Plan| {
        plan.touch(top);
        Ok(((), Some(Box::new(Empty { top, base, stop }) as Box<dyn LastStep>)))
    };
    let done = graph.change_with(edit).await;
    unwire(graph, wiring).await;
    Ok(done?)
}

/// The image below, if all is as it has to be.
fn ends(plan: &Plan, top: NodeId) -> Result<NodeId, Refusal> {
    let node = plan.get(top).ok_or_else(|| GraphError::new("The node was removed in the meantime"))?;
    let below = plan.backing(top).filter(|_| node.node.can_be_emptied());
    let base = plan.skip_filters(below.ok_or(Refusal::NotSupported)?);
    chain::check_free_down_to(plan, top, Some(base)).map_err(|_| Refusal::Busy)?;
    Ok(base)
}

/// What has been put into the graph.
#[derive(Debug)]
struct Held {
    claim: Claim,
    /// Between the top and what is below it otherwise.
    filter: NodeId,
    root: RootId,
}

fn wire(plan: &mut Plan, top: NodeId, base: NodeId) -> Result<Held, GraphError> {
    let changed = || GraphError::new("The chain was changed in the meantime");
    if ends(plan, top) != Ok(base) {
        return Err(changed());
    }
    if plan.node(top).read_only {
        return Err(GraphError::ReadOnly);
    }
    let below = plan.node(top).child(Role::Backing).ok_or_else(changed)?;
    // The top does not mind that what it hides is written to; everybody else who uses the base does.
    let filter = plan.add(NewNode {
        name: None,
        node: Arc::new(Pass::CommitTop),
        read_only: true,
        options: plan.node(below).options,
        children: vec![(Role::Backing, Wiring::Existing(below))],
    })?;
    plan.node_mut(filter).implicit = true;
    plan.set_child(top, Role::Backing, Some(filter))?;
    let mut claim = Claim::take(plan, Kind::Commit, vec![top, base], vec![top])?;
    claim.make_writable(plan, base);
    let root = plan.add_root(NewRoot {
        user: USER.to_owned(),
        role: "root",
        node: base,
        required: base_needs(true),
        shared: Perms::ALL.without(Perms::RESIZE | Perms::WRITE),
        pinned: true,
        drained: None,
    });
    Ok(Held { claim, filter, root })
}

/// Puts everything back. Going back to read-only flushes, and may fail for it: then the base stays writable.
async fn unwire(graph: &Graph, mut held: Held) {
    let edit = |held: &Held, plan: &mut Plan| {
        plan.remove_root(held.root);
        held.claim.release(plan);
        plan.take_out(held.filter);
        held.claim.make_read_only_again(plan)
    };
    let mut outcome = graph.change(|plan| edit(&held, plan)).await;
    if outcome.is_err() && held.claim.leave_all_writable() {
        outcome = graph.change(|plan| edit(&held, plan)).await;
    }
    if let Err(error) = outcome {
        graph.tell_of_trouble(&format!("What the commit put into the graph stays there: {error}"));
    }
}

/// With nobody else in the way: copies, flushes, empties.
struct Empty {
    top: NodeId,
    base: NodeId,
    stop: StopSign,
}

#[async_trait]
impl LastStep for Empty {
    async fn run(self: Box<Self>, _old: &Wires, new: &Wires) -> Result<(), GraphError> {
        let (top, base) = (new.view(self.top), new.view(self.base));
        let (top, base) = (top.cx(), base.cx());
        let length = top.length();
        if base.length() < length {
            lengthen(&base, length).await?;
        }
        let unit = chunk_unit(base);
        let mut rest = ByteRange::between(0, length);
        while !rest.is_empty() {
            if self.stop.is_raised() {
                return Err(GraphError::Io(IoError::ECANCELED));
            }
            let (chunk, later) = rest.split(unit);
            copy_still(&top, &base, self.base, chunk).await?;
            rest = later;
        }
        base.flush().await?;
        Ok(top.node().make_empty(&top).await?)
    }
}

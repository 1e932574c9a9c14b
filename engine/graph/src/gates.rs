//! How the gates close for a change of the graph: first those of jobs, then those of guests.
//!
//! A job may wait for a target that is slow, or does not answer. Its requests come home while guests go on; only then
//! the guests are held up, for as long as their own requests take. Who is not to hold them up for long
//! ([`Plan::wait_at_most`]) lets them go on now and then, and gives up in the end.

use std::collections::BTreeSet;
use std::ops::DerefMut;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::RwLockWriteGuard;
use underlay_sys::rt;

use crate::node::Node;
use crate::plan::{NodeId, Plan, PlanRoot, RootId};
use crate::view::View;

/// How long guests are held up at a time by who has only so much patience, and how long they go on then.
const HOLD: Duration = Duration::from_millis(100);
const GO_ON: Duration = Duration::from_millis(400);

/// Closed gates, in the order of their roots. Where they are dropped, they open.
pub(crate) struct Gates<'a> {
    gates: Vec<RwLockWriteGuard<'a, Option<Arc<View>>>>,
    _hurry: [Hurry; 2],
}

impl<'a> Gates<'a> {
    /// What is behind the gates.
    pub(crate) fn iter_mut(
        &mut self,
    ) -> impl Iterator<Item = &mut (impl DerefMut<Target = Option<Arc<View>>> + 'a)> {
        self.gates.iter_mut()
    }
}

/// Nodes whose requests do not wait for anything that can be left out: limits of throughput.
struct Hurry(Vec<Arc<dyn Node>>);

impl Hurry {
    fn begin(nodes: Vec<Arc<dyn Node>>) -> Self {
        nodes.iter().for_each(|node| node.hurry(true));
        Self(nodes)
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        self.0.iter().for_each(|node| node.hurry(false));
    }
}

/// Closes the gates of `roots`, those of jobs in front, and waits until nothing is inside or left behind
/// ([`Node::settle`]). `None` if that takes longer than `patience`.
pub(crate) async fn close<'a>(
    plan: &Plan,
    roots: &'a [(RootId, PlanRoot)],
    patience: Option<Duration>,
) -> Option<Gates<'a>> {
    let until = patience.map(|patience| rt::now() + patience);
    let (of_jobs, of_guests) = roots.split_at(roots.partition_point(|(_, root)| root.pinned));
    let by_guests = below(plan, of_guests);
    let by_jobs_alone = below(plan, of_jobs).difference(&by_guests).copied().collect();
    let hurry_of_jobs = Hurry::begin(nodes(plan, &by_jobs_alone));
    let mut gates = rt::by(until, close_each(of_jobs)).await?;
    let on_the_way = nodes(plan, &by_jobs_alone.union(&by_guests).copied().collect());
    loop {
        let hurry = Hurry::begin(nodes(plan, &by_guests));
        let held = until.map(|until| until.min(rt::now() + HOLD));
        let closing = async {
            let gates = close_each(of_guests).await;
            for node in &on_the_way {
                node.settle().await;
            }
            gates
        };
        if let Some(rest) = rt::by(held, closing).await {
            gates.extend(rest);
            return Some(Gates { gates, _hurry: [hurry_of_jobs, hurry] });
        }
        drop(hurry);
        if until.is_some_and(|until| rt::now() + GO_ON >= until) {
            return None;
        }
        rt::sleep(GO_ON).await;
    }
}

async fn close_each(roots: &[(RootId, PlanRoot)]) -> Vec<RwLockWriteGuard<'_, Option<Arc<View>>>> {
    let mut gates = Vec::with_capacity(roots.len());
    for (_, root) in roots {
        gates.push(root.door.view.write().await);
    }
    gates
}

/// All nodes that requests through these roots may be at.
fn below(plan: &Plan, roots: &[(RootId, PlanRoot)]) -> BTreeSet<NodeId> {
    roots.iter().filter_map(|(id, _)| plan.root(*id)).flat_map(|root| plan.reachable(root.node)).collect()
}

fn nodes(plan: &Plan, ids: &BTreeSet<NodeId>) -> Vec<Arc<dyn Node>> {
    ids.iter().map(|id| plan.node(*id).node.clone()).collect()
}

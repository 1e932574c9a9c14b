//! Internal snapshots: kept inside the image itself.
//!
//! They are taken while the gates of all users are closed, those of one transaction at one moment. If one of them
//! cannot be taken those taken before it are deleted again, behind the same closed gates: nobody has seen them.

use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use underlay_drivers::info;
use underlay_graph::graph::LastStep;
use underlay_graph::info::SnapshotInfo;
use underlay_graph::plan::Wires;
use underlay_graph::{Cx, GraphError, Node, NodeId, Plan};
use underlay_qcow2::Qcow2;
use underlay_qcow2::snapshot_changes::NewSnapshot;
use underlay_qmp::json::Value;

use super::arguments::Arguments;
use super::lookup::Names;
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// A snapshot to be taken.
#[derive(Clone, Debug)]
pub struct Take {
    node: NodeId,
    /// How the user calls the disk.
    device: String,
    name: String,
    has_machine: bool,
}

impl Take {
    /// From the arguments of blockdev-snapshot-internal-sync, done to a draft that closes the gates for it. `earlier`
    /// are those that will be taken before it.
    pub fn new(
        daemon: &Daemon,
        plan: &mut Plan,
        arguments: &mut Arguments,
        earlier: &[Self],
    ) -> CommandResult<Self> {
        let (device, name) = (arguments.text("device"), arguments.text("name"));
        let has_machine = daemon.machine.is_some();
        let take = Self { node: disk(daemon, plan, &device)?, device, name, has_machine };
        if plan.node(take.node).read_only {
            return Err(CommandError::new(format!("Device '{}' is read only", take.device)));
        }
        if take.name.is_empty() {
            return Err(CommandError::new("Name is empty"));
        }
        match qcow2(&*plan.node(take.node).node) {
            Some(image) => take.check_name(image, earlier)?,
            None => {
                let (driver, device) = (plan.node(take.node).node.driver(), &take.device);
                return Err(CommandError::new(format!(
                    "Block format '{driver}' used by device '{device}' does not support internal snapshots"
                )));
            }
        }
        plan.touch(take.node);
        Ok(take)
    }

    fn check_name(&self, image: &Qcow2, earlier: &[Self]) -> Result<(), GraphError> {
        let Self { device, name, node, .. } = self;
        let is_there = image.snapshots().iter().any(|snapshot| snapshot.name == *name);
        if is_there || earlier.iter().any(|other| other.node == *node && other.name == *name) {
            let text = format!("Snapshot with name '{name}' already exists on device '{device}'");
            return Err(GraphError::new(text));
        }
        Ok(())
    }

    /// Takes it; its id.
    async fn take(&self, wires: &Wires) -> Result<String, GraphError> {
        let view = wires.view(self.node);
        let image = qcow2(&**view.node()).ok_or_else(|| GraphError::new("Device has no medium"))?;
        let Self { device, name, .. } = self;
        let taken = image.take_snapshot(&view.cx(), &now(name, self.has_machine)).await;
        taken.map_err(|error| {
            GraphError::new(format!("Failed to create snapshot '{name}' on device '{device}': {error}"))
        })
    }
}

/// The image that has the snapshots of a disk.
fn disk(daemon: &Daemon, plan: &Plan, device: &str) -> CommandResult<NodeId> {
    let names = Names::of(daemon);
    let node = names.either(plan, device)?;
    underlay_jobs::commit::check_root(plan, node)?;
    Ok(plan.skip_filters(node))
}

/// A snapshot of this moment. A machine without a processor has no clock; without a machine the guest's clock is that
/// of the host, as with the reference.
fn now(name: &str, has_machine: bool) -> NewSnapshot {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let now = Duration::from_micros(u64::try_from(now.as_micros()).unwrap_or(u64::MAX));
    NewSnapshot {
        name: name.to_owned(),
        seconds: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
        nanoseconds: now.subsec_nanos(),
        clock: if has_machine { 0 } else { u64::try_from(now.as_nanos()).unwrap_or(u64::MAX) },
        icount: None,
    }
}

fn qcow2(node: &dyn Node) -> Option<&Qcow2> {
    node.as_any().downcast_ref()
}

/// Takes snapshots, and does what else there is to do at the moment; all of it or nothing.
pub struct AtTheMoment {
    /// In this order.
    pub takes: Vec<Take>,
    /// What cannot be undone, and so comes last.
    pub rest: Option<Box<dyn LastStep>>,
}

#[async_trait]
impl LastStep for AtTheMoment {
    async fn run(self: Box<Self>, old: &Wires, new: &Wires) -> Result<(), GraphError> {
        let mut taken: Vec<(&Take, String)> = Vec::new();
        let mut outcome = Ok(());
        for take in &self.takes {
            match take.take(new).await {
                Ok(id) => taken.push((take, id)),
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        if let (Ok(()), Some(rest)) = (&outcome, self.rest) {
            outcome = rest.run(old, new).await;
        }
        if outcome.is_err() {
            for (take, id) in taken.into_iter().rev() {
                let view = new.view(take.node);
                if let Err(error) = delete_id(&view.cx(), &id).await {
                    tracing::error!(device = take.device, id, %error, "a snapshot could not be deleted again");
                }
            }
        }
        outcome
    }
}

async fn delete_id(cx: &Cx<'_>, id: &str) -> underlay_graph::Result<()> {
    let Some(image) = qcow2(cx.node()) else { return Ok(()) };
    match image.snapshots().iter().position(|snapshot| snapshot.id == id) {
        Some(place) => image.delete_snapshot(cx, place).await,
        None => Ok(()),
    }
}

/// Deletes a snapshot while no request is inside.
struct Delete(NodeId, String);

#[async_trait]
impl LastStep for Delete {
    async fn run(self: Box<Self>, _old: &Wires, new: &Wires) -> Result<(), GraphError> {
        let Self(node, id) = *self;
        let view = new.view(node);
        let failed =
            |error| GraphError::new(format!("Failed to remove snapshot from snapshot list: {error}"));
        delete_id(&view.cx(), &id).await.map_err(failed)
    }
}

/// blockdev-snapshot-delete-internal-sync: what the snapshot was.
pub async fn delete(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<Value> {
    let device = arguments.text("device");
    let (id, name) = (arguments.optional_text("id"), arguments.optional_text("name"));
    let plan = daemon.graph.plan();
    let node = disk(daemon, &plan, &device)?;
    if id.is_none() && name.is_none() {
        return Err(CommandError::new("Name or id must be provided"));
    }
    let image = qcow2(&*plan.node(node).node);
    let image =
        image.ok_or_else(|| CommandError::new("Failed to get a snapshot list: Operation not supported"))?;
    let is = |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|wanted| wanted == found);
    let snapshots = image.snapshots();
    let found = snapshots.iter().find(|snapshot| is(&id, &snapshot.id) && is(&name, &snapshot.name));
    let Some(found): Option<SnapshotInfo> = found.cloned() else {
        let text = |text: &Option<String>| text.clone().unwrap_or_else(|| "null".to_owned());
        return Err(CommandError::new(format!(
            "Snapshot with id '{}' and name '{}' does not exist on device '{device}'",
            text(&id),
            text(&name)
        )));
    };
    let gone = found.id.clone();
    let edit = |plan: &mut Plan| {
        if plan.get(node).is_none_or(|node| node.read_only) {
            return Err(GraphError::new(
                "Failed to remove snapshot from snapshot list: Operation not permitted",
            ));
        }
        plan.touch(node);
        let step: Box<dyn LastStep> = Box::new(Delete(node, gone));
        Ok(((), Some(step)))
    };
    daemon.graph.change_with(edit).await?;
    Ok(info::snapshot(&found))
}

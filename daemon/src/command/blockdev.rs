//! Nodes come, go and change: blockdev-add, blockdev-del, change-backing-file, block_resize, block-set-write-threshold.

use async_trait::async_trait;
use underlay_drivers::reopen::{self, Reopening};
use underlay_drivers::{BackingPolicy, NodeSpec};
use underlay_graph::graph::LastStep;
use underlay_graph::plan::Wires;
use underlay_graph::resize;
use underlay_graph::{BackingRef, GraphError, NodeId, Plan, Preallocation, Role};
use underlay_qmp::json::Object;

use super::arguments::Arguments;
use super::lookup::Names;
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// How an unnamed user of a node is called in permission conflicts.
pub const UNNAMED_USER: &str = "an unnamed block device";

/// blockdev-add: opens a node that then belongs to the monitor.
pub async fn add(daemon: &Daemon, options: Object) -> CommandResult<NodeId> {
    let spec = NodeSpec::parse(options)?;
    let Some(name) = spec.node_name.clone() else {
        return Err(CommandError::new("'node-name' must be specified for the root node"));
    };
    if daemon.machine.as_ref().is_some_and(|machine| machine.devices.named(&name).is_some()) {
        return Err(CommandError::new(format!("node-name={name} is conflicting with a device id")));
    }
    if daemon.graph.plan().find(&name).is_some() {
        return Err(GraphError::DuplicateName(name).into());
    }
    let new = daemon.opener(BackingPolicy::Follow).open(spec).await?;
    let added = daemon.graph.change(|plan| {
        let id = plan.add(new)?;
        plan.node_mut(id).monitor_owned = true;
        Ok(id)
    });
    Ok(added.await?)
}

/// blockdev-del: gives up a node that only the monitor keeps alive.
pub async fn del(daemon: &Daemon, node_name: &str) -> CommandResult<()> {
    let names = Names::of(daemon);
    let edit = |plan: &mut Plan| {
        let id = plan.find(node_name).ok_or_else(|| GraphError::NodeNotFound(node_name.to_owned()))?;
        // A job's own ends are told by what follows.
        if plan.roots_of(id).any(|(_, root)| !root.pinned) {
            return Err(GraphError::InUse(node_name.to_owned()));
        }
        let is_job = |parent| plan.node(parent).node.driver() == "mirror_top";
        if plan.parents(id).any(|(parent, role)| role == Role::Target && is_job(parent)) {
            return Err(GraphError::new(format!("Node {node_name} is in use")));
        }
        names.not_busy(plan, id, node_name).map_err(|error| GraphError::new(error.desc))?;
        if !plan.node(id).monitor_owned {
            return Err(GraphError::NotMonitorOwned(node_name.to_owned()));
        }
        if plan.parents(id).next().is_some() {
            return Err(GraphError::new(format!("Block device {node_name} is in use")));
        }
        plan.node_mut(id).monitor_owned = false;
        Ok(())
    };
    Ok(daemon.graph.change(edit).await?)
}

/// block-set-write-threshold: an event when a node is written to beyond that many bytes; 0: none any more.
pub fn set_write_threshold(daemon: &Daemon, node_name: &str, at: u64) -> CommandResult<()> {
    let plan = daemon.graph.plan();
    let not_found = || CommandError::new(format!("Device '{node_name}' not found"));
    let node = plan.node(plan.find(node_name).ok_or_else(not_found)?);
    let (events, name) = (daemon.events.clone(), node_name.to_owned());
    let crossed = move |exceeded: u64| {
        let data = Object::new().with("node-name", name).with("amount-exceeded", exceeded);
        events.emit("BLOCK_WRITE_THRESHOLD", data.with("write-threshold", at));
    };
    node.set_write_threshold(at, Box::new(crossed));
    Ok(())
}

/// blockdev-reopen: other options for several nodes, for all or for none.
pub async fn reopen(daemon: &Daemon, nodes: Vec<Arguments>) -> CommandResult<()> {
    let mut closing = Vec::new();
    let edit = |plan: &mut Plan| {
        let mut reopening = Reopening::new(plan, &daemon.groups);
        for options in nodes {
            reopening.reopen(&options.rest())?;
        }
        closing.extend_from_slice(reopening.closing());
        Ok(((), Some(reopening.finish())))
    };
    match daemon.graph.change_with(edit).await {
        Err(GraphError::ReadOnly) => {
            let error = reopen::read_write_users(&daemon.graph, &closing);
            Err(error.unwrap_or(GraphError::ReadOnly).into())
        }
        result => Ok(result?),
    }
}

/// Rewrites what an image says of its backing file, while no request is inside.
struct SetBacking(NodeId, BackingRef);

#[async_trait]
impl LastStep for SetBacking {
    async fn run(self: Box<Self>, _old: &Wires, new: &Wires) -> Result<(), GraphError> {
        let Self(id, backing) = *self;
        let view = new.view(id);
        view.cx().flush().await?;
        Ok(view.node().set_backing_ref(&view.cx(), Some(backing)).await?)
    }
}

/// The largest disk that QEMU makes: whole GiB that fit into 63 bits. Source: its message.
const MAX_LENGTH: u64 = 0x7fff_ffff_c000_0000;

/// block_resize
pub async fn resize(
    daemon: &Daemon,
    device: Option<&str>,
    node_name: Option<&str>,
    size: i64,
) -> CommandResult<()> {
    let plan = daemon.graph.plan();
    let names = Names::of(daemon);
    let id = names.device_or_node(&plan, device, node_name)?;
    let size = u64::try_from(size).map_err(|_| CommandError::new("Parameter 'size' expects a >0 size"))?;
    names.not_busy(&plan, id, device.or(node_name).unwrap_or_default())?;
    if size > MAX_LENGTH {
        return Err(CommandError::new(format!("offset({size}) exceeds maximum({MAX_LENGTH})")));
    }
    drop(plan);
    Ok(resize::resize(&daemon.graph, id, size, Preallocation::Off, UNNAMED_USER).await?)
}

/// change-backing-file: rewrites only what the image says, not the wiring.
pub async fn change_backing_file(
    daemon: &Daemon,
    device: &str,
    image_node_name: &str,
    backing_file: &str,
) -> CommandResult<()> {
    let plan = daemon.graph.plan();
    let top = Names::of(daemon).either(&plan, device)?;
    underlay_jobs::commit::check_root(&plan, top)?;
    let image = plan.find(image_node_name);
    let image = image.ok_or_else(|| {
        CommandError::new(format!("Cannot find device='' nor node-name='{image_node_name}'"))
    })?;
    let bottom = plan.backing(image);
    if bottom.is_none() {
        return Err(CommandError::new("not allowing backing file change on an image without a backing file"));
    }
    if !plan.chain(top).any(|id| id == image) {
        return Err(CommandError::new(format!("'{device}' and image file are not in the same chain")));
    }
    let format = plan.node(image).node.backing_ref().and_then(|backing| backing.format);
    let format = format.or(bottom.map(|id| plan.node(id).node.driver().to_owned()));
    let backing = BackingRef { file: backing_file.to_owned(), format };
    let was_read_only = plan.node(image).read_only;
    drop(plan);
    let edit = move |plan: &mut Plan| {
        plan.get(image).ok_or_else(|| GraphError::new("image file not found"))?;
        if was_read_only {
            plan.set_read_only(image, false);
        }
        plan.touch(image);
        let step: Box<dyn LastStep> = Box::new(SetBacking(image, backing));
        Ok(((), Some(step)))
    };
    daemon.graph.change_with(edit).await?;
    if was_read_only {
        let restore = |plan: &mut Plan| {
            if plan.get(image).is_some() {
                plan.set_read_only(image, true);
            }
            Ok(())
        };
        daemon.graph.change(restore).await?;
    }
    Ok(())
}

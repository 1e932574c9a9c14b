//! From the names in a command to nodes of the plan.

use std::sync::Arc;

use underlay_graph::units::is_well_formed_id;
use underlay_graph::{Class, Kind, NodeId, Plan, Role};

use crate::device::Backend;
use crate::error::{CommandError, CommandResult};
use crate::machine::Machine;
use crate::state::Daemon;

/// Who knows names: of nodes, and in a machine those of backends and devices, too.
///
/// As in QEMU the name of a backend comes before that of a node. The names of devices, which only some of QEMU's
/// commands take, come last, so that `virtio0` means the disk of `-device virtio-blk,id=virtio0`.
#[derive(Clone)]
pub struct Names {
    machine: Option<Arc<Machine>>,
}

impl Names {
    /// Those of a daemon.
    pub fn of(daemon: &Daemon) -> Self {
        Self { machine: daemon.machine.clone() }
    }

    fn backend(&self, name: &str) -> Option<Backend> {
        self.machine.as_ref()?.devices.named(name)
    }

    fn device(&self, name: &str) -> Option<Backend> {
        self.machine.as_ref()?.devices.behind(name)
    }

    /// The node that a command's `device` and `node-name` mean: one for devices only, the other for nodes only.
    pub fn device_or_node(
        &self,
        plan: &Plan,
        device: Option<&str>,
        node_name: Option<&str>,
    ) -> CommandResult<NodeId> {
        let behind = device.and_then(|name| Some((name, self.backend(name).or_else(|| self.device(name))?)));
        if let Some((name, backend)) = behind {
            return disk(plan, name, &backend);
        }
        node_name.and_then(|name| plan.find(name)).ok_or_else(|| {
            let (device, node_name) = (device.unwrap_or_default(), node_name.unwrap_or_default());
            CommandError::new(format!("Cannot find device='{device}' nor node-name='{node_name}'"))
        })
    }

    /// The node of a command that has one name for devices and nodes.
    pub fn either(&self, plan: &Plan, name: &str) -> CommandResult<NodeId> {
        let missing = || CommandError::new(format!("Cannot find device='{name}' nor node-name='{name}'"));
        self.find(plan, name)?.ok_or_else(missing)
    }

    /// The node that a name means, if it means one. An error if it is that of a device without a disk.
    pub fn find(&self, plan: &Plan, name: &str) -> CommandResult<Option<NodeId>> {
        if let Some(backend) = self.backend(name) {
            return disk(plan, name, &backend).map(Some);
        }
        if let Some(id) = plan.find(name) {
            return Ok(Some(id));
        }
        self.device(name).map(|backend| disk(plan, name, &backend)).transpose()
    }

    /// As [`Self::find`] for commands to which a device that has no disk is none.
    pub fn root(&self, plan: &Plan, name: &str) -> CommandResult<NodeId> {
        let found = self.find(plan, name).ok().flatten();
        found.ok_or_else(|| CommandError {
            class: Class::DeviceNotFound,
            ..CommandError::new(format!("Device '{name}' not found"))
        })
    }

    /// What a job on a node is called of which its user says nothing: as the backend with that disk, or as the device
    /// by whose name the disk was found; else nothing.
    pub fn job_id(&self, plan: &Plan, name: &str, node: NodeId) -> String {
        let called = self.backend_of(plan, node).map(|backend| backend.name);
        let is_device =
            || plan.find(name).is_none() && is_well_formed_id(name) && self.device(name).is_some();
        called.or_else(|| is_device().then(|| name.to_owned())).unwrap_or_default()
    }

    /// The backend with a name that has the node as its disk.
    fn backend_of(&self, plan: &Plan, node: NodeId) -> Option<Backend> {
        let backends = self.machine.as_ref()?.devices.backends();
        backends.into_iter().find(|backend| !backend.name.is_empty() && backend.disk(plan) == Some(node))
    }

    /// What a node is called that was asked for by the name `asked`: as the backend whose disk it is, if it was asked
    /// for or is right above the node, else by its own name.
    fn called(&self, plan: &Plan, id: NodeId, asked: &str) -> String {
        let is_asked = |backend: &Backend| backend.disk(plan) == Some(id);
        if self.backend(asked).as_ref().is_some_and(is_asked) {
            return asked.to_owned();
        }
        let backends = self.machine.iter().flat_map(|machine| machine.devices.backends());
        let root = |backend: &Backend| Some(plan.root(backend.medium?)?.node);
        let mut above = backends.filter(|backend| !backend.name.is_empty() && root(backend) == Some(id));
        above.next().map_or_else(|| plan.node(id).name.to_string(), |backend| backend.name)
    }

    /// Refuses a node that a job works on; `asked` is the name by which it was found.
    pub fn free(&self, plan: &Plan, id: NodeId, asked: &str) -> CommandResult<()> {
        let Some(job) = plan.node(id).busy else { return Ok(()) };
        let name = self.called(plan, id, asked);
        let text = format!("Node '{name}' is busy: block device is in use by block job: {job}");
        Err(CommandError::new(text))
    }

    /// Refuses a node that something else is going on with: a job, or an overlay above it.
    pub fn not_busy(&self, plan: &Plan, id: NodeId, asked: &str) -> CommandResult<()> {
        self.free(plan, id, asked)?;
        let overlay = plan
            .parents(id)
            .find(|(parent, role)| *role == Role::Backing && plan.node(*parent).node.kind() != Kind::Filter);
        match overlay {
            Some((overlay, _)) => {
                let (name, overlay) = (self.called(plan, id, asked), &plan.node(overlay).name);
                Err(CommandError::new(format!(
                    "Node '{name}' is busy: node is used as backing hd of '{overlay}'"
                )))
            }
            None => Ok(()),
        }
    }
}

fn disk(plan: &Plan, name: &str, backend: &Backend) -> CommandResult<NodeId> {
    backend.disk(plan).ok_or_else(|| CommandError::new(format!("Device '{name}' has no medium")))
}

/// The topmost implicit filter above a node: what the users of the node are really wired to while a job has put
/// one in. (Where the job copies to is below the filter too, but not what the filter shows.)
pub fn above_implicit_filters(plan: &Plan, mut id: NodeId) -> NodeId {
    let is_filter = |(parent, role): &(NodeId, Role)| *role != Role::Target && plan.node(*parent).implicit;
    while let Some((parent, _)) = plan.parents(id).find(is_filter) {
        id = parent;
    }
    id
}

//! From the names in a command to nodes of the plan.

use underlay_graph::{Kind, NodeId, Plan, Role};

use crate::error::{CommandError, CommandResult};

/// The node that a command's `device` and `node-name` mean. There are no devices with names here, so both are
/// looked up as nodes, but only `node-name` finds one when the command tells the two apart.
pub fn device_or_node(plan: &Plan, device: Option<&str>, node_name: Option<&str>) -> CommandResult<NodeId> {
    node_name.and_then(|name| plan.find(name)).ok_or_else(|| {
        let (device, node_name) = (device.unwrap_or_default(), node_name.unwrap_or_default());
        CommandError::new(format!("Cannot find device='{device}' nor node-name='{node_name}'"))
    })
}

/// The node of a command that has one name for devices and nodes.
pub fn either(plan: &Plan, name: &str) -> CommandResult<NodeId> {
    plan.find(name)
        .ok_or_else(|| CommandError::new(format!("Cannot find device='{name}' nor node-name='{name}'")))
}

/// Refuses a node that something else is going on with: a job, or an overlay above it.
pub fn not_busy(plan: &Plan, id: NodeId) -> CommandResult<()> {
    let name = &plan.node(id).name;
    if let Some(job) = plan.node(id).busy {
        let text = format!("Node '{name}' is busy: block device is in use by block job: {job}");
        return Err(CommandError::new(text));
    }
    let overlay = plan
        .parents(id)
        .find(|(parent, role)| *role == Role::Backing && plan.node(*parent).node.kind() != Kind::Filter);
    match overlay {
        Some((overlay, _)) => {
            let overlay = &plan.node(overlay).name;
            Err(CommandError::new(format!(
                "Node '{name}' is busy: node is used as backing hd of '{overlay}'"
            )))
        }
        None => Ok(()),
    }
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

/// Refuses a node whose backing link a job relies on.
pub fn not_frozen(plan: &Plan, id: NodeId) -> CommandResult<()> {
    let node = plan.node(id);
    if !node.frozen {
        return Ok(());
    }
    let to = node.child(Role::Backing).map_or_else(String::new, |id| plan.node(id).name.to_string());
    Err(CommandError::new(format!("Cannot change frozen 'backing' link from '{}' to '{to}'", node.name)))
}

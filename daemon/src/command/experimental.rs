//! Commands that the reference has on trial: x-blockdev-amend, x-blockdev-change, x-blockdev-set-iothread.

use underlay_jobs::Creation;
use underlay_qmp::json::Object;

use super::arguments::Arguments;
use super::lookup::Names;
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// x-blockdev-amend. What can be changed of an image in this way is its encryption only, and no image here has any.
pub async fn amend(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let (id, node_name) = (arguments.text("job-id"), arguments.text("node-name"));
    let mut options = arguments.object("options").unwrap_or_else(|| Arguments::new(Object::new()));
    let plan = daemon.graph.plan();
    let node = Names::of(daemon).device_or_node(&plan, None, Some(&node_name))?;
    let driver = plan.node(node).node.driver();
    if options.text("driver") != driver {
        return Err(CommandError::new("x-blockdev-amend doesn't support changing the block driver"));
    }
    if driver != "qcow2" {
        return Err(CommandError::new("Driver does not support x-blockdev-amend"));
    }
    let encrypt = options.take("encrypt").is_some();
    let amendment: Creation = Box::pin(async move {
        if encrypt { Err("image is not encrypted, can't amend".to_owned()) } else { Ok(()) }
    });
    super::job::start(daemon, daemon.jobs.amend(id, amendment).await?);
    Ok(())
}

/// x-blockdev-change: of the drivers that there are none takes more children, nor fewer.
pub fn change(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let plan = daemon.graph.plan();
    let parent = Names::of(daemon).either(&plan, &arguments.text("parent"))?;
    let parent = plan.node(parent);
    let (child, node) = (arguments.optional_text("child"), arguments.optional_text("node"));
    let refused = |text: String| Err(CommandError::new(text));
    let name = &parent.name;
    match (child, node) {
        (Some(_), Some(_)) => refused("The parameters child and node are in conflict".to_owned()),
        (None, None) => refused("Either child or node must be specified".to_owned()),
        (Some(child), None) => match parent.children.iter().any(|(role, _)| role.as_str() == child) {
            true => refused(format!("The node {name} does not support removing a child")),
            false => refused(format!("Node '{name}' does not have child '{child}'")),
        },
        (None, Some(node)) => match plan.find(&node) {
            Some(_) => refused(format!("The node {name} does not support adding a child")),
            None => refused(format!("Node '{node}' not found")),
        },
    }
}

/// x-blockdev-set-iothread: every node is served by all I/O threads, and so by the one that is asked for.
pub fn set_iothread(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let plan = daemon.graph.plan();
    let name = arguments.text("node-name");
    let found = plan.find(&name);
    let node =
        found.ok_or_else(|| CommandError::new(format!("Failed to find node with node-name='{name}'")))?;
    if plan.roots_of(node).next().is_some() && !arguments.flag("force", false) {
        return Err(CommandError::new(format!(
            "Node {name} is associated with a BlockBackend and could be in use (use force=true to override this check)"
        )));
    }
    match arguments.optional_text("iothread") {
        Some(iothread) if daemon.iothreads.get(&iothread).is_none() => {
            Err(CommandError::new(format!("Cannot find iothread {iothread}")))
        }
        _ => Ok(()),
    }
}

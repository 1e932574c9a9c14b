//! `qemu-io` and `commit`: what only the human monitor does with a machine's disks.

use std::sync::Arc;

use underlay_disk::{Disk, Modes};
use underlay_graph::error::strerror;
use underlay_graph::plan::NewRoot;
use underlay_graph::{GraphError, IoError, Kind, NodeId, Perms, Plan, Role, RootId};
use underlay_io::monitor::{self, Accounts, Needs};
use underlay_jobs::commit_now::{Refusal, commit_now};

use crate::command::blockdev::UNNAMED_USER;
use crate::command::lookup::above_implicit_filters;
use crate::device::{Backend, tray};
use crate::error::{CommandError, CommandResult};
use crate::machine::Machine;
use crate::machine::running::RunState;
use crate::state::Daemon;

/// Somebody else has the lock. Source: Linux.
const EAGAIN: i32 = 11;

/// What `qemu-io` works on.
struct Target {
    /// Nothing for a drive without a medium.
    node: Option<NodeId>,
    /// The root of the device that is there, if what it may do is enough.
    root: Option<RootId>,
    modes: Modes,
    /// Those of the device.
    accounts: Option<Arc<dyn Accounts>>,
}

impl Target {
    fn backend(plan: &Plan, backend: &Backend) -> Self {
        let root = backend.medium.and_then(|medium| plan.root(medium));
        let modes = Modes {
            writethrough: backend.writethrough,
            copy_on_read: backend.io.copies_on_read(),
            ..backend.modes
        };
        let writes = root.is_some_and(|root| root.required.has(Perms::WRITE));
        let accounts: Arc<dyn Accounts> = backend.io.clone();
        Self {
            node: root.map(|root| root.node),
            root: backend.medium.filter(|_| writes),
            modes,
            accounts: Some(accounts),
        }
    }

    fn find(plan: &Plan, machine: &Machine, name: &str, is_device: bool) -> CommandResult<Self> {
        if is_device {
            return Ok(Self::backend(plan, &tray::by_id(machine, name)?));
        }
        if let Some(backend) = machine.devices.named(name) {
            return Ok(Self::backend(plan, &backend));
        }
        if let Some(node) = plan.find(name) {
            // What a job watches is to be seen by it.
            let node = Some(above_implicit_filters(plan, node));
            return Ok(Self { node, root: None, modes: Modes::default(), accounts: None });
        }
        let missing = || CommandError::new(format!("Cannot find device='' nor node-name='{name}'"));
        Ok(Self::backend(plan, &machine.devices.behind(name).ok_or_else(missing)?))
    }
}

/// `qemu-io`: a command of that program on a disk that is in use.
pub async fn qemu_io(daemon: &Daemon, name: &str, is_device: bool, line: &str) -> CommandResult<String> {
    let machine = super::run::machine(daemon)?;
    let target = Target::find(&daemon.graph.plan(), machine, name, is_device)?;
    let needs = monitor::needs(line);
    if needs == Needs::Writable && machine.running.state() == RunState::InMigrate {
        return Err(CommandError::new("The disk is still that of another machine"));
    }
    let Some(node) = target.node.filter(|_| needs != Needs::Nothing) else {
        return Ok(monitor::execute(None, None, line).await);
    };
    let own = match target.root {
        Some(root) => root,
        None => match daemon.graph.change(|plan| come_in(plan, node, needs)).await {
            Ok(root) => root,
            // The reference says it without a word in front.
            Err(error) => return Ok(format!("{error}\n")),
        },
    };
    let disk = Disk::of_others(&daemon.graph, own, target.modes);
    let gone = || CommandError::new(format!("Device '{name}' has no medium"));
    let said = match disk.ok_or_else(gone) {
        Ok(disk) => Ok(monitor::execute(Some(disk), target.accounts, line).await),
        Err(error) => Err(error),
    };
    if target.root.is_none() {
        let go = |plan: &mut Plan| {
            plan.remove_root(own);
            Ok(())
        };
        daemon.graph.change(go).await?;
    }
    said
}

/// In a draft: a way in to a node, for as long as a command takes.
fn come_in(plan: &mut Plan, node: NodeId, needs: Needs) -> Result<RootId, GraphError> {
    let there = plan.get(node).ok_or_else(|| GraphError::new("The node was removed in the meantime"))?;
    // That a node is read-only is for the command to say.
    let writes = needs == Needs::Writable && !there.read_only;
    Ok(plan.add_root(NewRoot {
        user: UNNAMED_USER.to_owned(),
        role: "root",
        node,
        required: if writes { Perms::WRITE } else { Perms::NONE },
        shared: Perms::ALL,
        pinned: false,
        drained: None,
    }))
}

/// `commit`: a drive's image goes into the one below it; or those of all drives, up to the first that will not.
pub async fn commit(daemon: &Daemon, name: &str) -> CommandResult<String> {
    let machine = super::run::machine(daemon)?;
    let _turn = daemon.turn.lock().await;
    if name != "all" {
        let Some(backend) = machine.devices.find(name) else {
            return Ok(format!("Device '{name}' not found\n"));
        };
        return Ok(match backend.disk(&daemon.graph.plan()) {
            Some(disk) => commit_one(daemon, disk, name).await.err().unwrap_or_default(),
            None => format!("Device '{name}' has no medium\n"),
        });
    }
    for backend in machine.devices.backends() {
        let plan = daemon.graph.plan();
        let disk = backend.disk(&plan);
        let is_overlay = |id: &NodeId| {
            let node = plan.node(*id);
            node.node.kind() != Kind::Filter && node.child(Role::Backing).is_some()
        };
        let Some(disk) = disk.filter(is_overlay) else { continue };
        if let Err(text) = commit_one(daemon, disk, name).await {
            return Ok(text);
        }
    }
    Ok(String::new())
}

/// The error is what is to be said.
async fn commit_one(daemon: &Daemon, disk: NodeId, name: &str) -> Result<(), String> {
    let Err(refusal) = commit_now(&daemon.graph, disk, &daemon.quit).await else { return Ok(()) };
    let short = match &refusal {
        // Of a lock that somebody else has the reference says that.
        Refusal::Graph(GraphError::Io(error)) if error.errno() == EAGAIN => strerror(IoError::EACCES.errno()),
        Refusal::Graph(GraphError::Io(error)) => strerror(error.errno()),
        Refusal::Graph(_) => strerror(IoError::EPERM.errno()),
        refusal => refusal.to_string(),
    };
    let full = refusal.to_string();
    let sentence = if full == short { String::new() } else { full + "\n" };
    Err(format!("{sentence}'commit' error for '{name}': {short}\n"))
}

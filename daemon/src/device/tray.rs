//! Media: trays open and close, disks are put in and taken out, by a command instead of a guest's hand.

use underlay_disk::Request;
use underlay_drivers::BackingPolicy;
use underlay_graph::plan::DetectZeroes;
use underlay_graph::{GraphError, Plan};
use underlay_qmp::json::Object;

use super::{Backend, plug};
use crate::command::arguments::Arguments;
use crate::command::lookup::{Names, above_implicit_filters};
use crate::error::{CommandError, CommandResult};
use crate::machine::Machine;
use crate::state::Daemon;

/// The backend that a command means by one of `device` (its name) and `id` (its device's), and the word for it.
pub fn wanted(machine: &Machine, arguments: &mut Arguments) -> CommandResult<(Backend, String)> {
    match (arguments.optional_text("device"), arguments.optional_text("id")) {
        (Some(device), None) => {
            let backend = machine.devices.named(&device).ok_or_else(|| plug::not_found(&device))?;
            Ok((backend, device))
        }
        (None, Some(id)) => Ok((by_id(machine, &id)?, id)),
        _ => Err(CommandError::new("Need exactly one of 'device' and 'id'")),
    }
}

/// The backend of the device `id`.
pub fn by_id(machine: &Machine, id: &str) -> CommandResult<Backend> {
    machine.devices.behind(id).ok_or_else(|| match machine.devices.device(id) {
        Some(_) => CommandError::new("Device does not have a block device backend"),
        None => plug::not_found(id),
    })
}

fn check_removable(backend: &Backend, called: &str) -> CommandResult<()> {
    match backend.is_removable() {
        true => Ok(()),
        false => Err(CommandError::new(format!("Device '{called}' is not removable"))),
    }
}

/// An export tells its clients once how long a disk is: no other one can take its place under them.
fn check_unused(backend: &Backend) -> CommandResult<()> {
    match backend.guests {
        0 => Ok(()),
        _ => Err(CommandError::new(format!("Device '{}' is in use by an export", backend.called()))),
    }
}

fn not_busy(daemon: &Daemon, backend: &Backend) -> CommandResult<()> {
    let plan = daemon.graph.plan();
    backend.disk(&plan).map_or(Ok(()), |disk| Names::of(daemon).not_busy(&plan, disk, &backend.name))
}

/// blockdev-open-tray, blockdev-close-tray: whoever has no tray has nothing to move.
pub fn move_tray(
    daemon: &Daemon,
    machine: &Machine,
    (backend, called): &(Backend, String),
    open: bool,
) -> CommandResult<()> {
    check_removable(backend, called)?;
    if !backend.has_tray() || backend.tray_open == open {
        return Ok(());
    }
    check_unused(backend)?;
    moved(daemon, machine, backend, open);
    Ok(())
}

fn moved(daemon: &Daemon, machine: &Machine, backend: &Backend, open: bool) {
    machine.devices.edit(backend.id, |backend| backend.tray_open = open);
    let id = backend.device.as_ref().map_or("", |shown| &*shown.qdev);
    let data = Object::new().with("device", &*backend.name).with("id", id).with("tray-open", open);
    daemon.events.emit("DEVICE_TRAY_MOVED", data);
}

/// eject: opens the tray and takes out what is there.
pub async fn eject(daemon: &Daemon, machine: &Machine, wanted: &(Backend, String)) -> CommandResult<()> {
    move_tray(daemon, machine, wanted, true)?;
    let Some(backend) = machine.devices.backend(wanted.0.id) else { return Ok(()) };
    take_out(daemon, machine, &backend).await
}

/// blockdev-remove-medium
pub async fn remove(daemon: &Daemon, machine: &Machine, id: &str) -> CommandResult<()> {
    let backend = by_id(machine, id)?;
    check_removable(&backend, id)?;
    if backend.has_tray() && !backend.tray_open {
        return Err(CommandError::new(format!("Tray of device '{id}' is not open")));
    }
    take_out(daemon, machine, &backend).await
}

async fn take_out(daemon: &Daemon, machine: &Machine, backend: &Backend) -> CommandResult<()> {
    let Some(medium) = backend.medium else { return Ok(()) };
    check_unused(backend)?;
    not_busy(daemon, backend)?;
    let edit = |plan: &mut Plan| {
        plan.remove_root(medium);
        Ok(())
    };
    daemon.graph.change(edit).await?;
    machine.devices.edit(backend.id, |backend| backend.medium = None);
    Ok(())
}

/// blockdev-insert-medium: a node of blockdev-add that nobody uses.
pub async fn insert(daemon: &Daemon, machine: &Machine, id: &str, node_name: &str) -> CommandResult<()> {
    let mut backend = by_id(machine, id)?;
    let plan = daemon.graph.plan();
    let node = plan.find(node_name);
    let node = node.ok_or_else(|| CommandError::new(format!("Node '{node_name}' not found")))?;
    if plan.roots_of(node).next().is_some() {
        return Err(CommandError::new(format!("Node '{node_name}' is already in use")));
    }
    if !backend.is_removable() {
        return Err(CommandError::new("Device is not removable"));
    }
    if backend.has_tray() && !backend.tray_open {
        return Err(CommandError::new("Tray of the device is not open"));
    }
    if backend.medium.is_some() {
        return Err(CommandError::new("There already is a medium in the device"));
    }
    drop(plan);
    let state = machine.running.state();
    let edit = |plan: &mut Plan| {
        backend.medium = Some(plug::put_in(&backend, plan, node)?);
        plug::apply_access(&backend, state, plan)?;
        Ok(backend.medium)
    };
    let medium = daemon.graph.change(edit).await?;
    machine.devices.edit(backend.id, |backend| backend.medium = medium);
    Ok(())
}

/// qom-set of `drive`: another node takes the place of the disk, under those who use it. That is how filters come to a
/// device and go again.
pub async fn set_drive(
    daemon: &Daemon,
    machine: &Machine,
    backend: &Backend,
    node_name: &str,
) -> CommandResult<()> {
    let wires = daemon.graph.wires();
    let plan = wires.plan();
    let missing = || CommandError::new(format!("Cannot find device='' nor node-name='{node_name}'"));
    let node = plan.find(node_name).ok_or_else(missing)?;
    let now = backend.medium.and_then(|medium| plan.root(medium));
    let length = |node| wires.view(node).cx().length();
    if now.is_some_and(|now| length(now.node) != length(node)) {
        check_unused(backend)?;
    }
    let state = machine.running.state();
    let edit = |plan: &mut Plan| {
        let Some(medium) = backend.medium else {
            let mut filled = backend.clone();
            filled.medium = Some(plug::put_in(backend, plan, node)?);
            plug::apply_access(&filled, state, plan)?;
            return Ok(filled.medium);
        };
        plan.get(node).ok_or_else(|| GraphError::new("The node was removed in the meantime"))?;
        // What a job has put above the node stays above it.
        let node = above_implicit_filters(plan, node);
        if let Some(root) = plan.root_mut(medium) {
            root.node = node;
        }
        Ok(Some(medium))
    };
    let medium = daemon.graph.change(edit).await?;
    machine.devices.edit(backend.id, |backend| backend.medium = medium);
    Ok(())
}

/// blockdev-change-medium: an image takes the place of what is there.
pub async fn change(
    daemon: &Daemon,
    machine: &Machine,
    wanted: &(Backend, String),
    arguments: &mut Arguments,
) -> CommandResult<()> {
    let (backend, called) = wanted;
    let filename = arguments.text("filename");
    let read_only = match arguments.optional_text("read-only-mode").as_deref() {
        Some("read-only") => true,
        Some("read-write") => false,
        _ => backend.read_only,
    };
    let mut request = Request::named(filename);
    request.format = arguments.optional_text("format");
    request.read_only = read_only;
    request.modes = backend.modes;
    request.modes.detect_zeroes = DetectZeroes::Off;
    let mut spec = request.spec().map_err(CommandError::told)?;
    spec.detect_zeroes = backend.modes.detect_zeroes;
    let new = daemon.opener(BackingPolicy::Follow).open(spec).await?;
    check_removable(backend, called)?;
    check_unused(backend)?;
    not_busy(daemon, backend)?;
    let mut draft = backend.clone();
    let state = machine.running.state();
    let edit = |plan: &mut Plan| -> Result<_, GraphError> {
        if let Some(medium) = draft.medium {
            plan.remove_root(medium);
        }
        let node = plan.add(new)?;
        draft.medium = Some(plug::put_in(&draft, plan, node)?);
        plug::apply_access(&draft, state, plan)?;
        Ok(draft.medium)
    };
    let medium = daemon.graph.change(edit).await?;
    move_tray(daemon, machine, wanted, true)?;
    machine.devices.edit(backend.id, |backend| backend.medium = medium);
    if backend.has_tray() {
        moved(daemon, machine, backend, false);
    }
    Ok(())
}

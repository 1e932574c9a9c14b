//! What a machine is told: to run and to stop, to take devices and media, to keep limits.

use std::sync::Arc;

use underlay_drivers::throttle::Limits;
use underlay_graph::Plan;
use underlay_qmp::json::{Object, Value};

use super::arguments::Arguments;
use super::statistics;
use crate::device::given::{Given, Input};
use crate::device::{plug, tray};
use crate::error::{CommandError, CommandResult};
use crate::machine::Machine;
use crate::machine::running::RunState;
use crate::state::Daemon;

/// What is asked about a machine.
pub fn query(machine: &Machine, command: &str) -> Option<Value> {
    let object = match command {
        "query-status" => {
            let state = machine.running.state();
            Object::new().with("status", state.as_str()).with("running", state == RunState::Running)
        }
        "query-name" => {
            machine.name.iter().fold(Object::new(), |object, name| object.with("name", name.as_str()))
        }
        "query-uuid" => Object::new().with("UUID", machine.uuid.as_str()),
        "query-target" => Object::new().with("arch", "x86_64"),
        "query-kvm" => Object::new().with("enabled", false).with("present", false),
        _ => return None,
    };
    Some(object.into())
}

/// What changes a machine. `None`: something else.
pub async fn change(
    daemon: &Daemon,
    machine: &Arc<Machine>,
    command: &str,
    arguments: &mut Arguments,
) -> Option<CommandResult<()>> {
    Some(match command {
        "stop" => stop(daemon, machine).await,
        "cont" => cont(daemon, machine).await,
        "system_reset" => {
            let data = Object::new().with("guest", false).with("reason", "host-qmp-system-reset");
            daemon.events.emit("RESET", data);
            machine.running.reset();
            Ok(())
        }
        "system_powerdown" => {
            daemon.events.emit("POWERDOWN", Object::new());
            Ok(())
        }
        "device_add" => device_add(daemon, machine, arguments).await,
        "device_del" => plug::unplug(daemon, machine, &arguments.text("id")).await,
        "blockdev-open-tray" | "blockdev-close-tray" => {
            let open = command == "blockdev-open-tray";
            let wanted = tray::wanted(machine, arguments);
            wanted.and_then(|wanted| tray::move_tray(daemon, machine, &wanted, open))
        }
        "eject" => match tray::wanted(machine, arguments) {
            Ok(wanted) => tray::eject(daemon, machine, &wanted).await,
            Err(error) => Err(error),
        },
        "blockdev-remove-medium" => tray::remove(daemon, machine, &arguments.text("id")).await,
        "blockdev-insert-medium" => {
            let id = arguments.text("id");
            tray::insert(daemon, machine, &id, &arguments.text("node-name")).await
        }
        "blockdev-change-medium" => match tray::wanted(machine, arguments) {
            Ok(wanted) => tray::change(daemon, machine, &wanted, arguments).await,
            Err(error) => Err(error),
        },
        "block-latency-histogram-set" => statistics::set_histograms(machine, arguments),
        "block_set_io_throttle" => set_io_throttle(daemon, machine, arguments),
        _ => return None,
    })
}

/// stop: no request of a guest is on its way when this is done, and what they have written is durable.
async fn stop(daemon: &Daemon, machine: &Machine) -> CommandResult<()> {
    if !machine.running.stop_if_running(RunState::Paused) {
        return Ok(());
    }
    machine.running.quiet().await;
    for backend in machine.devices.backends() {
        let Some(root) = backend.medium.and_then(|medium| daemon.graph.root(medium)) else { continue };
        if let Err(error) = root.flush().await {
            tracing::warn!(%error, "a disk could not be flushed");
        }
    }
    daemon.events.emit("STOP", Object::new());
    Ok(())
}

/// cont. Of a machine that waits for another one to be continued by it, the disks are its own from now on.
async fn cont(daemon: &Daemon, machine: &Arc<Machine>) -> CommandResult<()> {
    let state = machine.running.state();
    if state == RunState::Running {
        return Ok(());
    }
    machine.devices.backends().iter().for_each(|backend| backend.io.forget_errors());
    if state == RunState::InMigrate {
        plug::claim_all(daemon, machine, RunState::Running).await?;
    }
    daemon.events.emit("RESUME", Object::new());
    machine.running.set(RunState::Running);
    Ok(())
}

async fn device_add(daemon: &Daemon, machine: &Machine, arguments: &mut Arguments) -> CommandResult<()> {
    let given = Given::read(std::mem::replace(arguments, Arguments::new(Object::new())).rest(), Input::Json)?;
    let name = given.model.name;
    plug::plug(daemon, machine, given, &|text| tracing::info!("{name} {text}")).await
}

/// The limits of the command, and what they are called elsewhere.
const LIMITS: [(&str, &str); 6] = [
    ("bps", "bps-total"),
    ("bps_rd", "bps-read"),
    ("bps_wr", "bps-write"),
    ("iops", "iops-total"),
    ("iops_rd", "iops-read"),
    ("iops_wr", "iops-write"),
];

/// block_set_io_throttle: limits of all zeroes are none.
fn set_io_throttle(daemon: &Daemon, machine: &Machine, arguments: &mut Arguments) -> CommandResult<()> {
    let (backend, name) = tray::wanted(machine, arguments)?;
    if backend.medium.is_none() {
        return Err(CommandError::new("Device has no medium"));
    }
    let mut limits = Limits::default();
    let mut set = |given: &str, name: &str| {
        if let Some(number) = limits.number_mut(name).filter(|_| arguments.has(given)) {
            // Negative numbers are out of every range that is checked.
            *number = arguments.number(given, 0).cast_unsigned();
        }
    };
    for (short, long) in LIMITS {
        set(short, long);
        set(&format!("{short}_max"), &format!("{long}-max"));
        set(&format!("{short}_max_length"), &format!("{long}-max-length"));
    }
    set("iops_size", "iops-size");
    limits.check().map_err(|error| CommandError::new(error.to_string()))?;
    if limits.is_none() {
        backend.io.set_group(None);
        return Ok(());
    }
    let wanted = arguments.optional_text("group");
    let group = match (backend.io.group(), wanted) {
        (Some(group), None) => group,
        (_, wanted) => machine.devices.group(&daemon.groups, &wanted.unwrap_or(name)),
    };
    group.set_limits(limits);
    backend.io.set_group(Some(group));
    Ok(())
}

/// For a description of a disk with limits: what they are.
pub fn describe_limits(limits: &Limits, group: &str, object: &mut Object) {
    let mut show = |name: &str, long: &str, always: bool| {
        let number = (*limits).number(long).unwrap_or(0);
        if always || number > 0 {
            object.insert(name, Value::Int(number.cast_signed()));
        }
        number > 0
    };
    for (short, long) in LIMITS {
        show(short, long, true);
        if show(&format!("{short}_max"), &format!("{long}-max"), false) {
            show(&format!("{short}_max_length"), &format!("{long}-max-length"), true);
        }
    }
    show("iops_size", "iops-size", false);
    object.insert("group", group);
}

/// Whether a backend of that name could be there: it must not be that of a node.
pub fn check_backend_name(plan: &Plan, name: &str) -> CommandResult<()> {
    match plan.find(name) {
        Some(_) => {
            Err(CommandError::new(format!("Device name '{name}' conflicts with an existing node name")))
        }
        None => Ok(()),
    }
}

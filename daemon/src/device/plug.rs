//! Devices come and go: `-device`, device_add, device_del.

use underlay_graph::plan::NewRoot;
use underlay_graph::units::is_well_formed_id;
use underlay_graph::{Class, GraphError, NodeId, Perms, Plan, RootId};
use underlay_qmp::json::Object;

use super::given::Given;
use super::guest::{GuestIo, on_error};
use super::model::{Bus, Kind, Model};
use super::{Backend, BackendId, Device, Shown};
use crate::command::object;
use crate::error::{CommandError, CommandResult};
use crate::machine::Machine;
use crate::machine::running::RunState;
use crate::state::Daemon;

/// Largest block size, in bytes. Source: the reference's message.
const MAX_BLOCK: u64 = 2 << 20;

/// Longest serial number of a SCSI or IDE disk. Source: the reference's message; virtio cuts it off.
const MAX_SERIAL: usize = 36;

/// Drives on an IDE bus of the oldest kind of machine.
const IDE_UNITS: u32 = 2;

/// Plugs a device in. What has no effect is told to `remark`.
pub async fn plug(
    daemon: &Daemon,
    machine: &Machine,
    given: Given,
    remark: &(dyn Fn(&str) + Sync),
) -> CommandResult<()> {
    plug_at(daemon, machine, given, None, remark).await
}

/// The same with a device that has its place among all objects already.
pub async fn plug_at(
    daemon: &Daemon,
    machine: &Machine,
    mut given: Given,
    path: Option<String>,
    remark: &(dyn Fn(&str) + Sync),
) -> CommandResult<()> {
    let model = given.model;
    let (bus, unit) = place(daemon, machine, &given)?;
    if let Some(id) = &given.id {
        if machine.devices.device(id).is_some() {
            let text = if daemon.ready.is_raised() { "Duplicate device ID '" } else { "Duplicate ID '" };
            let rest = if daemon.ready.is_raised() { "'" } else { "' for device" };
            return Err(CommandError::new(format!("{text}{id}{rest}")));
        }
        // A monitor may call a device what it likes.
        if !daemon.ready.is_raised() && !is_well_formed_id(id) {
            return Err(object::bad_id());
        }
    }
    given.check()?;
    let path = path.unwrap_or_else(|| machine.devices.new_path(given.id.as_deref()));
    let mut device = Device { id: given.id.clone(), path, model, bus, unit, backend: None };
    if let Some(path) = given.text("iothread").filter(|path| !object::is_iothread(daemon, path)) {
        return Err(not_found(path));
    }
    if model.has_disk() {
        device.backend = Some(realize(daemon, machine, &given, &device).await?);
    } else if model.kind == Kind::Other {
        remark("has no effect: there is no CPU");
    }
    machine.devices.add_device(device);
    Ok(())
}

/// The error for what is no device.
pub fn not_found(id: &str) -> CommandError {
    CommandError { class: Class::DeviceNotFound, ..CommandError::new(format!("Device '{id}' not found")) }
}

/// Where a device goes: the name of the bus, and the place on it if that counts.
fn place(daemon: &Daemon, machine: &Machine, given: &Given) -> CommandResult<(Option<String>, u32)> {
    let kind = given.model.bus;
    let own = |bus: Bus| machine.own_buses(bus);
    let all = |bus: Bus| own(bus).into_iter().chain(machine.devices.buses(bus)).collect::<Vec<_>>();
    let chosen = match &given.bus {
        _ if kind == Bus::Other => return Ok((given.bus.clone(), 0)),
        Some(name) => {
            let kinds = [Bus::Pci, Bus::Scsi, Bus::Ide];
            let found = kinds.into_iter().find(|bus| all(*bus).contains(name));
            let found = found.ok_or_else(|| CommandError::new(format!("Bus '{name}' not found")))?;
            if found != kind {
                let (model, bus) = (given.model.name, found.as_str());
                return Err(CommandError::new(format!("Device '{model}' can't go on {bus} bus")));
            }
            vec![name.clone()]
        }
        None => all(kind),
    };
    let Some(first) = chosen.first() else {
        let (bus, model) = (kind.as_str(), given.model.name);
        return Err(CommandError::new(format!("No '{bus}' bus found for device '{model}'")));
    };
    if kind != Bus::Ide {
        return Ok((Some(first.clone()), 0));
    }
    if daemon.ready.is_raised() {
        return Err(no_hotplug(first));
    }
    ide_place(machine, given, &chosen)
}

fn no_hotplug(bus: &str) -> CommandError {
    CommandError::new(format!("Bus '{bus}' does not support hotplugging"))
}

/// IDE buses have a few places each.
fn ide_place(machine: &Machine, given: &Given, buses: &[String]) -> CommandResult<(Option<String>, u32)> {
    let units = if machine.has_one_unit_per_ide_bus() { 1 } else { IDE_UNITS };
    let devices = machine.devices.devices();
    let is_free = |bus: &str, unit| {
        !devices.iter().any(|other| other.bus.as_deref() == Some(bus) && other.unit == unit)
    };
    let wanted = given.wanted_unit()?;
    if let Some(unit) = wanted.filter(|unit| *unit >= units) {
        let text = format!("Can't create IDE unit {unit}, bus supports only {units} units");
        return Err(CommandError::new(text));
    }
    let places = buses.iter().flat_map(|bus| (0..units).map(move |unit| (bus, unit)));
    let mut places = places.filter(|(_, unit)| wanted.is_none_or(|wanted| wanted == *unit));
    match places.find(|(bus, unit)| is_free(bus, *unit)) {
        Some((bus, unit)) => Ok((Some(bus.clone()), unit)),
        None => Err(CommandError::new(format!("IDE unit {} is in use", wanted.unwrap_or(units - 1)))),
    }
}

/// Gives a device its disk.
async fn realize(
    daemon: &Daemon,
    machine: &Machine,
    given: &Given,
    device: &Device,
) -> CommandResult<BackendId> {
    let model = given.model;
    let drive = match given.text("drive").filter(|name| !name.is_empty()) {
        None if model.kind == Kind::Disk => return Err(CommandError::new("drive property not set")),
        None => Drive::Nothing,
        Some(name) => behind(daemon, machine, model, name)?,
    };
    check_numbers(given)?;
    let path =
        if model.is_virtio() { format!("{}/virtio-backend", device.path) } else { device.path.clone() };
    let shown = Shown {
        model,
        // The disk of a virtio device is that of a device within, which has no name of its own.
        qdev: device.id.clone().filter(|_| !model.is_virtio()).unwrap_or_else(|| path.clone()),
        path,
        share_rw: given.flag("share-rw").unwrap_or(false),
    };
    let (id, node) = match drive {
        Drive::Backend(backend) if model.kind == Kind::Disk && backend.medium.is_none() => {
            return Err(CommandError::new("Device needs media, but drive is empty"));
        }
        Drive::Backend(backend) => (backend.id, None),
        Drive::Node(node) => (machine.new_backend(daemon, ""), Some(node)),
        Drive::Nothing => (machine.new_backend(daemon, ""), None),
    };
    machine.devices.edit(id, |backend| backend.device = Some(shown));
    let claimed = claim(daemon, machine, id, node).await;
    machine.devices.edit(id, |backend| match &claimed {
        Ok(()) => settle(backend, given),
        Err(_) => backend.device = None,
    });
    match claimed {
        Ok(()) => Ok(id),
        Err(error) => {
            machine.devices.drop_nameless(id);
            Err(error)
        }
    }
}

/// What the properties of the device say about requests.
fn settle(backend: &mut Backend, given: &Given) {
    match given.text("write-cache") {
        Some("on") => backend.writethrough = false,
        Some("off") => backend.writethrough = true,
        _ => {}
    }
    let accounts = |name: &str| match given.text(name) {
        Some("on") => Some(true),
        Some("off") => Some(false),
        _ => None,
    };
    backend.io.stats().account(accounts("account-failed"), accounts("account-invalid"));
    let mut policies = backend.io.policies();
    if let Some(policy) = given.text("rerror").and_then(on_error) {
        policies.read = policy;
    }
    if let Some(policy) = given.text("werror").and_then(on_error) {
        policies.write = policy;
    }
    backend.io.set_policies(policies);
}

/// What the property `drive` means.
enum Drive {
    Backend(Box<Backend>),
    Node(NodeId),
    Nothing,
}

fn behind(daemon: &Daemon, machine: &Machine, model: &Model, name: &str) -> CommandResult<Drive> {
    if let Some(backend) = machine.devices.named(name) {
        if backend.device.is_some() {
            return Err(CommandError::new(format!("Drive '{name}' is already in use by another device")));
        }
        return Ok(Drive::Backend(Box::new(backend)));
    }
    let whose = if model.is_virtio() { "virtio-blk-device" } else { model.name };
    let missing = || CommandError::new(format!("Property '{whose}.drive' can't find value '{name}'"));
    daemon.graph.plan().find(name).map(Drive::Node).ok_or_else(missing)
}

fn check_numbers(given: &Given) -> CommandResult<()> {
    let refused = |text: String| Err(CommandError::new(text));
    for name in ["logical_block_size", "physical_block_size"] {
        if let Some(size) = given.number(name).filter(|size| *size != 0)
            && (!size.is_power_of_two() || !(512..=MAX_BLOCK).contains(&size))
        {
            return refused(format!("parameter {name} must be a power of 2 between 512 and {MAX_BLOCK}"));
        }
    }
    let size = |name| given.number(name).filter(|size| *size != 0).unwrap_or(512);
    if size("logical_block_size") > size("physical_block_size").max(512)
        && given.number("physical_block_size").is_some()
    {
        return refused("logical_block_size > physical_block_size not supported".to_owned());
    }
    let of_bus = |bus, name: &str, most: u64, text: &str| match given.number(name) {
        Some(number) if given.model.bus == bus && number > most && number != u64::from(u32::MAX) => {
            refused(format!("{text}: {number}"))
        }
        _ => Ok(()),
    };
    of_bus(Bus::Scsi, "channel", 0, "bad scsi channel id")?;
    of_bus(Bus::Scsi, "scsi-id", 255, "bad scsi device id")?;
    of_bus(Bus::Scsi, "lun", 16383, "bad scsi device lun")?;
    if given.number("num-queues") == Some(0) {
        return refused("num-queues property must be larger than 0".to_owned());
    }
    let serial = given.text("serial").unwrap_or_default();
    if !given.model.is_virtio() && serial.len() > MAX_SERIAL {
        return refused(format!("The serial number can't be longer than {MAX_SERIAL} characters"));
    }
    Ok(())
}

/// What a backend asks of its disk, and what it lets others do meanwhile.
fn access(backend: &Backend, state: RunState, read_only: bool) -> (Perms, Perms) {
    let Some(shown) = &backend.device else { return (Perms::NONE, Perms::ALL) };
    if state == RunState::InMigrate {
        return (Perms::NONE, Perms::ALL);
    }
    let is_disk = shown.model.kind == Kind::Disk;
    // An IDE disk that cannot be written to is none.
    let writes = is_disk && (!read_only || shown.model.bus == Bus::Ide);
    let writes = if writes { Perms::WRITE } else { Perms::NONE };
    let resize = if is_disk && backend.guests == 0 { Perms::RESIZE } else { Perms::NONE };
    let share_rw = if shown.share_rw { Perms::WRITE } else { Perms::NONE };
    let shared = Perms::CONSISTENT_READ | Perms::WRITE_UNCHANGED | resize | share_rw;
    (Perms::CONSISTENT_READ | writes, shared)
}

/// In a draft: has a backend ask for what it needs by now.
pub fn apply_access(backend: &Backend, state: RunState, plan: &mut Plan) -> Result<(), GraphError> {
    let Some(id) = backend.medium else { return Ok(()) };
    let Some(node) = plan.root(id).map(|root| root.node) else { return Ok(()) };
    let read_only = plan.node(node).read_only;
    let (required, shared) = access(backend, state, read_only);
    if let Some(root) = plan.root_mut(id) {
        (root.required, root.shared, root.user) = (required, shared, backend.user());
    }
    Ok(())
}

/// Has a backend ask for what it needs by now, of `node` if that comes in.
async fn claim(daemon: &Daemon, machine: &Machine, id: BackendId, node: Option<NodeId>) -> CommandResult<()> {
    let Some(mut backend) = machine.devices.backend(id) else { return Ok(()) };
    let state = machine.running.state();
    let edit = |plan: &mut Plan| {
        if let Some(node) = node {
            backend.medium = Some(put_in(&backend, plan, node)?);
        }
        apply_access(&backend, state, plan)?;
        Ok(backend.medium)
    };
    let medium = daemon.graph.change(edit).await?;
    machine.devices.edit(id, |backend| backend.medium = medium);
    Ok(())
}

/// In a draft: puts a node into a backend.
pub fn put_in(backend: &Backend, plan: &mut Plan, node: NodeId) -> Result<RootId, GraphError> {
    plan.get(node).ok_or_else(|| GraphError::new("The node was removed in the meantime"))?;
    Ok(plan.add_root(NewRoot {
        user: backend.user(),
        role: "root",
        node,
        required: Perms::NONE,
        shared: Perms::ALL,
        pinned: false,
        drained: None,
    }))
}

/// Has all backends ask for what they need by now, or none of them.
pub async fn claim_all(daemon: &Daemon, machine: &Machine, state: RunState) -> CommandResult<()> {
    let backends = machine.devices.backends();
    let edit = |plan: &mut Plan| backends.iter().try_for_each(|backend| apply_access(backend, state, plan));
    Ok(daemon.graph.change(edit).await?)
}

/// device_del: the guest is not asked. What is plugged into the device goes with it, and so does its backend.
pub async fn unplug(daemon: &Daemon, machine: &Machine, id: &str) -> CommandResult<()> {
    let device = machine.devices.device(id).ok_or_else(|| not_found(id))?;
    if device.model.bus == Bus::Ide {
        return Err(no_hotplug(device.bus.as_deref().unwrap_or_default()));
    }
    let name = |device: &Device| device.id.clone().unwrap_or_else(|| device.path.clone());
    // What is plugged into what goes, too, and goes first.
    let mut levels = vec![vec![device]];
    while let Some(level) = levels.last().filter(|level| !level.is_empty()) {
        let names: Vec<_> = level.iter().map(name).collect();
        let on_one = |other: &Device| {
            let bus = other.bus.as_deref().unwrap_or_default();
            names.iter().any(|name| bus == name || bus.rsplit_once('.').is_some_and(|(of, _)| of == name))
        };
        // A device that has no effect may be said to be on a bus of its own.
        let is_new = |other: &Device| levels.iter().flatten().all(|known| known.path != other.path);
        let next = machine.devices.devices().into_iter().filter(|other| on_one(other) && is_new(other));
        let next = next.collect();
        levels.push(next);
    }
    for device in levels.iter().rev().flatten() {
        remove(daemon, machine, device).await?;
    }
    Ok(())
}

async fn remove(daemon: &Daemon, machine: &Machine, device: &Device) -> CommandResult<()> {
    if let Some(backend) = device.backend.and_then(|id| machine.devices.backend(id)) {
        crate::command::export::close_guests(daemon, backend.id).await?;
        let edit = |plan: &mut Plan| {
            if let Some(medium) = backend.medium {
                plan.remove_root(medium);
            }
            Ok(())
        };
        daemon.graph.change(edit).await?;
        machine.devices.remove_backend(backend.id);
        if device.model.is_virtio() {
            let path = format!("{}/virtio-backend", device.path);
            daemon.events.emit("DEVICE_DELETED", Object::new().with("path", path));
        }
    }
    machine.devices.remove_device(&device.path);
    let mut data = Object::new();
    if let Some(id) = &device.id {
        data.insert("device", id.as_str());
    }
    daemon.events.emit("DEVICE_DELETED", data.with("path", device.path.as_str()));
    Ok(())
}

impl Machine {
    /// A new backend of that name, with nothing in it.
    pub fn new_backend(&self, daemon: &Daemon, name: &str) -> BackendId {
        let io = GuestIo::new(daemon.graph.clone(), daemon.events.clone(), self.running.clone());
        self.devices.add_backend(name, io)
    }
}

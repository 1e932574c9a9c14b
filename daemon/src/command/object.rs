//! Objects beside the graph: object-add, object-del, `--object`, and qom-list, qom-get, qom-set. So far these are
//! throttle groups and iothreads.
//!
//! In a machine devices are objects, too, of which no more is told than what they are and which disk they have, and
//! that can be changed.
//!
//! Objects are children of `/objects`, by their ids; a path without a slash in front is found anywhere.

use std::sync::Arc;

use underlay_drivers::filter::throttle::Throttle;
use underlay_drivers::throttle::{Group, Limits};
use underlay_graph::Class;
use underlay_graph::units::is_well_formed_id;
use underlay_qmp::json::{Object, Value};
use underlay_qmp::schema::{self, Input};

use super::arguments::Arguments;
use super::iothread::Iothread;
use crate::device::{Backend, Device, tray};
use crate::error::{CommandError, CommandResult};
use crate::machine::Machine;
use crate::state::Daemon;

/// The properties of a throttle group, in the order in which the reference lists them.
const PROPERTIES: [&str; 21] = [
    "type",
    "x-bps-write-max-length",
    "x-iops-total-max-length",
    "x-iops-size",
    "limits",
    "x-bps-total",
    "x-iops-read-max-length",
    "x-bps-write",
    "x-iops-write-max-length",
    "x-bps-read-max",
    "x-iops-read-max",
    "x-bps-total-max",
    "x-bps-read-max-length",
    "x-iops-read",
    "x-bps-read",
    "x-bps-write-max",
    "x-iops-total-max",
    "x-iops-total",
    "x-iops-write",
    "x-bps-total-max-length",
    "x-iops-write-max",
];

/// object-add and `--object`, with the options checked.
pub fn add(daemon: &Daemon, mut options: Arguments) -> CommandResult<()> {
    let id = options.text("id");
    if !is_well_formed_id(&id) {
        return Err(bad_id());
    }
    let taken = daemon.groups.get(&id).is_some() || daemon.iothreads.get(&id).is_some();
    let twice = || {
        CommandError::new(format!("attempt to add duplicate property '{id}' to object (type 'container')"))
    };
    if options.text("qom-type") == "iothread" {
        let iothread = Iothread::new(&mut options)?;
        if taken {
            return Err(twice());
        }
        daemon.iothreads.add(&id, iothread);
        return Ok(());
    }
    let limits = limits(&mut options)?;
    if taken {
        return Err(twice());
    }
    limits.check().map_err(|error| CommandError::new(error.to_string()))?;
    daemon.groups.add(Group::new(&id, limits));
    Ok(())
}

/// The error for a name that is not well formed.
pub fn bad_id() -> CommandError {
    let hint = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.";
    CommandError { hint: Some(hint.to_owned()), ..CommandError::new("Parameter 'id' expects an identifier") }
}

/// Reads the options of an object and makes none.
pub fn understood(mut options: Arguments) -> CommandResult<()> {
    match options.text("qom-type").as_str() {
        "iothread" => Iothread::new(&mut options).map(drop),
        _ => limits(&mut options).map(drop),
    }
}

/// The limits of a throttle group to come.
fn limits(options: &mut Arguments) -> CommandResult<Limits> {
    let mut limits = Limits::default();
    for name in Limits::names() {
        let property = format!("x-{name}");
        if options.has(&property) {
            let value = options.number(&property, 0);
            let value = u64::try_from(value);
            let value = value.map_err(|_| CommandError::new("Property values cannot be negative"))?;
            // The missing space is the reference's.
            set_number(&mut limits, &name, value, &format!("{property} value must be in therange"))?;
        }
    }
    if let Some(mut given) = options.object("limits") {
        set_numbers(&mut limits, &mut given)?;
        limits.check().map_err(|error| CommandError::new(error.to_string()))?;
    }
    Ok(limits)
}

/// The numbers of `limits`; what is not given stays.
fn set_numbers(limits: &mut Limits, given: &mut Arguments) -> CommandResult<()> {
    for name in Limits::names() {
        if given.has(&name) {
            // Negative numbers are out of every range that is checked.
            let value = given.number(&name, 0).cast_unsigned();
            set_number(limits, &name, value, &format!("{name} value must be in the range"))?;
        }
    }
    Ok(())
}

fn set_number(limits: &mut Limits, name: &str, value: u64, out_of_range: &str) -> CommandResult<()> {
    let longest = u64::from(u32::MAX);
    if name.ends_with("-length") && value.cast_signed() > longest.cast_signed() {
        return Err(CommandError::new(format!("{out_of_range} [0, {longest}]")));
    }
    if let Some(number) = limits.number_mut(name) {
        *number = value;
    }
    Ok(())
}

/// object-del
pub fn del(daemon: &Daemon, id: &str) -> CommandResult<()> {
    if daemon.iothreads.remove(id) {
        return Ok(());
    }
    let Some(group) = daemon.groups.get(id) else {
        return Err(CommandError::new(format!("object '{id}' not found")));
    };
    let plan = daemon.graph.plan();
    let backends = daemon.machine.iter().flat_map(|machine| machine.devices.backends());
    let has_limits = |backend: Backend| backend.io.group().is_some_and(|other| Arc::ptr_eq(&other, &group));
    let in_use = backends.into_iter().any(has_limits)
        || plan.nodes().any(|(_, node)| {
            let throttle = node.node.as_any().downcast_ref::<Throttle>();
            throttle.is_some_and(|throttle| Arc::ptr_eq(throttle.member().group(), &group))
        });
    if in_use {
        return Err(CommandError::new(format!("object '{id}' is in use, can not be deleted")));
    }
    daemon.groups.remove(id);
    Ok(())
}

/// What a path leads to.
enum Place {
    Root,
    Objects,
    Machine(Arc<Machine>),
    /// Devices with names, or those without.
    Peripheral(Arc<Machine>, bool),
    Device(Arc<Machine>, Box<Device>),
    /// The device within a device, which has the disk.
    Within(Arc<Machine>, Box<Device>),
    Group(Arc<Group>),
    Iothread(Arc<Iothread>),
}

impl Place {
    fn find(daemon: &Daemon, path: &str) -> CommandResult<Self> {
        let absolute = path.starts_with('/');
        let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty()).collect();
        let found = match (absolute, parts.as_slice()) {
            (true, []) => Some(Self::Root),
            (_, ["objects"]) => Some(Self::Objects),
            (_, ["machine"]) => daemon.machine.clone().map(Self::Machine),
            (_, ["machine", named @ ("peripheral" | "peripheral-anon")]) => {
                daemon.machine.clone().map(|machine| Self::Peripheral(machine, *named == "peripheral"))
            }
            (true, ["machine", ..]) => Self::device(daemon, path),
            (_, ["objects", id]) | (false, [id]) => {
                let group = daemon.groups.get(id).map(Self::Group);
                let found = group.or_else(|| daemon.iothreads.get(id).map(Self::Iothread));
                found.or_else(|| Self::device(daemon, id).filter(|_| parts.len() == 1))
            }
            _ => None,
        };
        found.ok_or_else(|| CommandError {
            class: Class::DeviceNotFound,
            ..CommandError::new(format!("Device '{path}' not found"))
        })
    }

    fn device(daemon: &Daemon, id: &str) -> Option<Self> {
        let machine = daemon.machine.clone()?;
        if let Some(device) = machine.devices.device(id) {
            return Some(Self::Device(machine, Box::new(device)));
        }
        let around = machine.devices.device(id.strip_suffix("/virtio-backend")?)?;
        around.model.is_virtio().then(|| Self::Within(machine, Box::new(around)))
    }

    /// What has a disk, or a place for one.
    fn backend(&self) -> Option<(&Machine, Backend)> {
        let (Self::Device(machine, device) | Self::Within(machine, device)) = self else { return None };
        Some((machine, machine.devices.backend(device.backend?)?))
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Root | Self::Objects | Self::Peripheral(..) => "container",
            Self::Machine(machine) => machine.kind(),
            Self::Device(_, device) => device.model.name,
            Self::Within(..) => "virtio-blk-device",
            Self::Group(_) => "throttle-group",
            Self::Iothread(_) => "iothread",
        }
    }

    /// The objects in it, with their types.
    fn children(&self, daemon: &Daemon) -> Vec<(String, &'static str)> {
        match self {
            Self::Root => {
                let machine = daemon.machine.iter().map(|machine| ("machine".to_owned(), machine.kind()));
                machine.chain([("objects".to_owned(), "container")]).collect()
            }
            Self::Machine(_) => {
                ["peripheral-anon", "peripheral"].map(|name| (name.to_owned(), "container")).into()
            }
            Self::Peripheral(machine, named) => {
                let devices = machine.devices.devices().into_iter();
                let devices = devices.filter(|device| device.id.is_some() == *named);
                let name = |device: &Device| device.path.rsplit('/').next().unwrap_or_default().to_owned();
                devices.map(|device| (name(&device), device.model.name)).collect()
            }
            Self::Objects => {
                let groups = daemon.groups.all();
                let groups = groups.iter().map(|group| (group.name().to_owned(), "throttle-group"));
                groups.chain(daemon.iothreads.names().into_iter().map(|name| (name, "iothread"))).collect()
            }
            Self::Group(_) | Self::Iothread(_) | Self::Device(..) | Self::Within(..) => Vec::new(),
        }
    }

    /// Whether it is what an export may ask to be served by.
    fn is_iothread(&self) -> bool {
        matches!(self, Self::Iothread(_))
    }

    fn no_property(&self, name: &str) -> CommandError {
        CommandError::new(format!("Property '{}.{name}' not found", self.kind()))
    }
}

/// Whether `path` leads to an iothread.
pub fn is_iothread(daemon: &Daemon, path: &str) -> bool {
    Place::find(daemon, path).is_ok_and(|place| place.is_iothread())
}

fn property(name: &str, kind: &str) -> Value {
    Value::Object(Object::new().with("name", name).with("type", kind))
}

/// The properties of objects of a type, if it is one that users make.
pub fn properties(kind: &str) -> Option<Vec<Value>> {
    match kind {
        "throttle-group" => {
            let kind = |name: &str| match name {
                "type" => "string",
                "limits" => "ThrottleLimits",
                _ => "int",
            };
            Some(PROPERTIES.iter().map(|name| property(name, kind(name))).collect())
        }
        "iothread" => {
            let numbers = Iothread::properties().map(|name| property(name, "int"));
            Some(std::iter::once(property("type", "string")).chain(numbers).collect())
        }
        _ => None,
    }
}

/// qom-list
pub fn qom_list(daemon: &Daemon, path: &str) -> CommandResult<Value> {
    let place = Place::find(daemon, path)?;
    if let Some(known) = properties(place.kind()) {
        return Ok(Value::List(known));
    }
    if let Place::Device(_, device) | Place::Within(_, device) = &place {
        let drive = device.model.has_disk().then(|| property("drive", "str"));
        return Ok(Value::List(std::iter::once(property("type", "string")).chain(drive).collect()));
    }
    let children = place.children(daemon);
    let children = children.iter().map(|(name, kind)| property(name, &format!("child<{kind}>")));
    Ok(Value::List(std::iter::once(property("type", "string")).chain(children).collect()))
}

/// qom-get
pub fn qom_get(daemon: &Daemon, path: &str, property: &str) -> CommandResult<Value> {
    let place = Place::find(daemon, path)?;
    if property == "type" {
        return Ok(Value::Str(place.kind().to_owned()));
    }
    if let Place::Iothread(iothread) = &place {
        return iothread.get(property).ok_or_else(|| place.no_property(property));
    }
    if let Place::Device(..) | Place::Within(..) = &place {
        let backend = place.backend().filter(|_| property == "drive");
        let plan = daemon.graph.plan();
        let drive = backend.map(|(_, backend)| match (&*backend.name, backend.disk(&plan)) {
            ("", disk) => disk.map_or_else(String::new, |disk| plan.node(disk).name.to_string()),
            (name, _) => name.to_owned(),
        });
        return drive.map(Value::Str).ok_or_else(|| place.no_property(property));
    }
    let Place::Group(group) = &place else {
        let child = place.children(daemon).into_iter().find(|(name, _)| name == property);
        let (name, _) = child.ok_or_else(|| place.no_property(property))?;
        let above = match &place {
            Place::Objects => "/objects",
            Place::Machine(_) => "/machine",
            Place::Peripheral(_, true) => "/machine/peripheral",
            Place::Peripheral(_, false) => "/machine/peripheral-anon",
            _ => "",
        };
        return Ok(Value::Str(format!("{above}/{name}")));
    };
    let limits = group.limits();
    let number = |name: &str| limits.number(name).map(|value| Value::Int(value.cast_signed()));
    if property == "limits" {
        let mut object = Object::new();
        Limits::names().for_each(|name| object.insert(&name, number(&name).unwrap_or(Value::Null)));
        return Ok(Value::Object(object));
    }
    property.strip_prefix("x-").and_then(number).ok_or_else(|| place.no_property(property))
}

/// qom-set
pub async fn qom_set(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let place = Place::find(daemon, &arguments.text("path"))?;
    let property = arguments.text("property");
    let not_writable =
        || CommandError::new(format!("Property '{}.{property}' is not writable", place.kind()));
    if let Place::Iothread(iothread) = &place {
        return match property.as_str() {
            "type" => Err(not_writable()),
            other if Iothread::properties().any(|name| name == other) => {
                iothread.set(other, &arguments.take("value").unwrap_or(Value::Null))
            }
            other => Err(place.no_property(other)),
        };
    }
    let Place::Group(group) = &place else {
        if let Some((machine, backend)) = place.backend().filter(|_| property == "drive") {
            let Some(Value::Str(node_name)) = arguments.take("value") else {
                let text = "Invalid parameter type for 'drive', expected: string";
                return Err(CommandError::new(text));
            };
            return tray::set_drive(daemon, machine, &backend, &node_name).await;
        }
        let is_there = property == "type" || place.children(daemon).iter().any(|(name, _)| *name == property);
        return Err(if is_there { not_writable() } else { place.no_property(&property) });
    };
    match property.as_str() {
        "limits" => {}
        "type" => return Err(not_writable()),
        other if PROPERTIES.contains(&other) => {
            return Err(CommandError::new("Property cannot be set after initialization"));
        }
        other => return Err(place.no_property(other)),
    }
    let value = arguments.take("value").unwrap_or(Value::Null);
    let checked = schema::check(Object::new().with("limits", value), schema::limits_property(), Input::Json);
    let mut checked = Arguments::new(checked.map_err(|error| CommandError::new(error.to_string()))?);
    let mut limits = group.limits();
    set_numbers(&mut limits, &mut checked.object("limits").unwrap_or_else(|| Arguments::new(Object::new())))?;
    limits.check().map_err(|error| CommandError::new(error.to_string()))?;
    group.set_limits(limits);
    Ok(())
}

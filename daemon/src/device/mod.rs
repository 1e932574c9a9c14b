//! Devices: places in a machine where a guest finds a disk.
//!
//! ```text
//!   guest ── export ── GuestIo ──┐  waits while the machine is stopped, limits, accounts, errors
//!                                │
//!   Device ─ has a ─ Backend ─ medium: a root of the graph ── nodes
//!   (id, model, path)  (name of -drive)
//! ```
//!
//! A backend is what commands call a device: the name that `-drive` gave it, or none for a device on a node of
//! `-blockdev`. Its medium is an unpinned root, so it follows its disk through snapshots, commits and pivots. A backend
//! without a device asks nothing of its disk; with one, it asks for what a guest does.

pub mod given;
pub mod guest;
pub mod latency;
pub mod model;
pub mod plug;
pub mod stats;
pub mod tray;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use underlay_disk::Modes;
use underlay_drivers::throttle::{Group, Limits};
use underlay_graph::{NodeId, Plan, RootId};

use guest::GuestIo;
use model::{Bus, Model};

/// A backend for as long as it is there; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BackendId(u64);

/// What is behind a device. See the module.
#[derive(Clone, Debug)]
pub struct Backend {
    /// Which one it is.
    pub id: BackendId,
    /// Its name; empty for what came with a device on a node.
    pub name: String,
    /// The disk that is in it.
    pub medium: Option<RootId>,
    /// The device that shows it.
    pub device: Option<Shown>,
    /// Every write is flushed: `cache=writethrough`, `write-cache=off`.
    pub writethrough: bool,
    /// How media are opened.
    pub modes: Modes,
    /// Media are opened to be read only, unless a command says otherwise.
    pub read_only: bool,
    /// The tray is out.
    pub tray_open: bool,
    /// Exports by which guests use it.
    pub guests: usize,
    /// For exports.
    pub io: Arc<GuestIo>,
}

/// A device, from its backend's side.
#[derive(Clone, Debug)]
pub struct Shown {
    /// What it is.
    pub model: &'static Model,
    /// What queries and messages call it.
    pub qdev: String,
    /// Its place among all objects.
    pub path: String,
    /// Others may write to the disk.
    pub share_rw: bool,
}

/// A device.
#[derive(Clone, Debug)]
pub struct Device {
    /// Its name.
    pub id: Option<String>,
    /// Its place among all objects.
    pub path: String,
    /// What it is.
    pub model: &'static Model,
    /// The bus that it is on; nothing for those where it does not matter.
    pub bus: Option<String>,
    /// Its place on the bus, where there are few.
    pub unit: u32,
    /// What is behind it.
    pub backend: Option<BackendId>,
}

/// All devices and backends of a machine, in the order in which they came. Commands take turns with changing them.
#[derive(Debug, Default)]
pub struct Devices {
    table: Mutex<Table>,
    /// Groups of limits that were made for devices, not by object-add.
    groups: Mutex<BTreeMap<String, Weak<Group>>>,
}

#[derive(Debug, Default)]
struct Table {
    backends: Vec<Backend>,
    devices: Vec<Device>,
    next: u64,
    /// How many devices without a name there have been.
    nameless: u64,
}

impl Devices {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All backends.
    pub fn backends(&self) -> Vec<Backend> {
        self.table().backends.clone()
    }

    /// All devices.
    pub fn devices(&self) -> Vec<Device> {
        self.table().devices.clone()
    }

    /// A backend, if it is still there.
    pub fn backend(&self, id: BackendId) -> Option<Backend> {
        self.table().backends.iter().find(|backend| backend.id == id).cloned()
    }

    /// The backend of that name.
    pub fn named(&self, name: &str) -> Option<Backend> {
        let table = self.table();
        table.backends.iter().find(|backend| !name.is_empty() && backend.name == name).cloned()
    }

    /// The device of that name, or at that place.
    pub fn device(&self, id: &str) -> Option<Device> {
        let table = self.table();
        let is_it = |device: &&Device| device.id.as_deref() == Some(id) || device.path == id;
        table.devices.iter().find(is_it).cloned()
    }

    /// What is behind the device of that name, or at that place, be it that of the disk within the device.
    pub fn behind(&self, id: &str) -> Option<Backend> {
        let device = self.device(id);
        let table = self.table();
        let is_it = |backend: &&Backend| match &device {
            Some(device) => device.backend == Some(backend.id),
            None => backend.device.as_ref().is_some_and(|shown| shown.path == id),
        };
        table.backends.iter().find(is_it).cloned()
    }

    /// What has its disk at that place, or in the device of that name itself: not what is in a device within. `Err`:
    /// there is such a device, without a disk of its own.
    pub fn at(&self, id: &str) -> Result<Option<Backend>, ()> {
        let device = self.device(id);
        let table = self.table();
        let is_there = |backend: &&Backend| backend.device.as_ref().is_some_and(|shown| shown.path == id);
        if let Some(backend) = table.backends.iter().find(is_there) {
            return Ok(Some(backend.clone()));
        }
        let Some(device) = device else { return Ok(None) };
        let own = device.backend.filter(|_| !device.model.is_virtio());
        let backend = own.and_then(|own| table.backends.iter().find(|backend| backend.id == own));
        backend.cloned().map(Some).ok_or(())
    }

    /// The backend that a name means: its own, or that of its device.
    pub fn find(&self, name: &str) -> Option<Backend> {
        self.named(name).or_else(|| self.behind(name))
    }

    /// Takes a backend in.
    pub fn add_backend(&self, name: &str, io: Arc<GuestIo>) -> BackendId {
        let mut table = self.table();
        let id = BackendId(table.next);
        table.next += 1;
        io.set_names(guest::Names { backend: name.to_owned(), path: String::new() });
        table.backends.push(Backend {
            id,
            name: name.to_owned(),
            medium: None,
            device: None,
            writethrough: false,
            modes: Modes::default(),
            read_only: name.is_empty(),
            tray_open: false,
            guests: 0,
            io,
        });
        id
    }

    /// Changes a backend.
    pub fn edit(&self, id: BackendId, edit: impl FnOnce(&mut Backend)) {
        if let Some(backend) = self.table().backends.iter_mut().find(|backend| backend.id == id) {
            edit(backend);
            backend.io.set_disk(backend.medium);
            let path = backend.device.as_ref().map_or_else(String::new, |shown| shown.path.clone());
            backend.io.set_names(guest::Names { backend: backend.name.clone(), path });
        }
    }

    /// Lets a backend go.
    pub fn remove_backend(&self, id: BackendId) {
        self.table().backends.retain(|backend| backend.id != id);
    }

    /// Lets a backend go that came with a device, which has come to nothing.
    pub fn drop_nameless(&self, id: BackendId) {
        self.table().backends.retain(|backend| backend.id != id || !backend.name.is_empty());
    }

    /// Takes a device in.
    pub fn add_device(&self, device: Device) {
        self.table().devices.push(device);
    }

    /// Lets a device go.
    pub fn remove_device(&self, path: &str) {
        self.table().devices.retain(|device| device.path != path);
    }

    /// The place among all objects of a device to come.
    pub fn new_path(&self, id: Option<&str>) -> String {
        match id {
            Some(id) => format!("/machine/peripheral/{id}"),
            None => {
                let mut table = self.table();
                let number = table.nameless;
                table.nameless += 1;
                format!("/machine/peripheral-anon/device[{number}]")
            }
        }
    }

    /// The buses of a kind that devices have brought along, in their order.
    pub fn buses(&self, kind: Bus) -> Vec<String> {
        let buses = |device: &Device| {
            let count = match device.model.kind {
                model::Kind::Controller(bus, count) if bus == kind => count,
                _ => 0,
            };
            let name = device.id.clone().unwrap_or_else(|| device.path.clone());
            (0..count).map(move |at| if kind == Bus::Pci { name.clone() } else { format!("{name}.{at}") })
        };
        self.table().devices.iter().flat_map(buses).collect()
    }

    /// The group of that name, one of those made by object-add or for devices; made if there is none.
    pub fn group(&self, objects: &underlay_drivers::throttle::Groups, name: &str) -> Arc<Group> {
        if let Some(group) = objects.get(name) {
            return group;
        }
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|_, group| group.strong_count() > 0);
        groups.get(name).and_then(Weak::upgrade).unwrap_or_else(|| {
            let group = Group::new(name, Limits::default());
            groups.insert(name.to_owned(), Arc::downgrade(&group));
            group
        })
    }
}

impl Backend {
    /// The node of its disk, below filters that only jobs know of.
    pub fn disk(&self, plan: &Plan) -> Option<NodeId> {
        let node = plan.root(self.medium?)?.node;
        plan.get(node).map(|_| plan.skip_implicit(node))
    }

    /// What messages call it as a user of its disk.
    pub fn user(&self) -> String {
        match (&*self.name, &self.device) {
            ("", Some(shown)) => format!("block device '{}'", shown.qdev),
            ("", None) => crate::command::blockdev::UNNAMED_USER.to_owned(),
            (name, _) => format!("block device '{name}'"),
        }
    }

    /// What events and statistics call it: its own name or that of its device.
    pub fn called(&self) -> &str {
        match &self.device {
            Some(shown) if self.name.is_empty() => &shown.qdev,
            _ => &self.name,
        }
    }

    /// Whether a medium may come and go.
    pub fn is_removable(&self) -> bool {
        self.device.as_ref().is_none_or(|shown| shown.model.kind == model::Kind::Cd)
    }

    /// Whether it has a tray.
    pub fn has_tray(&self) -> bool {
        self.device.as_ref().is_some_and(|shown| shown.model.kind == model::Kind::Cd)
    }
}

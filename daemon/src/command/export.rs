//! How guests get in: the NBD server and its exports.

use std::sync::Arc;
use std::time::Duration;

use underlay_drivers::socket_address;
use underlay_exports::{ExportError, NamedBits, NbdExport, NbdServer, ServerOptions, Shown, ShownBitmaps};
use underlay_graph::plan::NewRoot;
use underlay_graph::{GraphError, NodeId, Perms, Plan, RootId};
use underlay_qmp::json::{Object, Value};
use underlay_sys::net::Address;
use underlay_sys::rt;

use super::arguments::Arguments;
use super::blockdev::UNNAMED_USER;
use super::lookup::Names;
use crate::device::guest::Attached;
use crate::device::{Backend, BackendId, plug};
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// How long a command waits for the last requests of an export's clients.
const PATIENCE: Duration = Duration::from_secs(1);
/// Longest name and description of an export, in bytes. Source: the NBD protocol's limit of a string.
const MAX_STRING: usize = 4096;

/// A guest of a device.
#[derive(Clone, Debug)]
struct Guest {
    backend: BackendId,
    attached: Attached,
}

/// An export as the queries know it.
#[derive(Clone, Debug)]
pub struct Export {
    id: String,
    /// What NBD clients call it.
    name: String,
    root: RootId,
    /// The device whose guest uses it.
    of: Option<Guest>,
    bitmaps: ShownBitmaps,
    shutting_down: bool,
}

/// query-block-exports, newest first.
pub fn query(daemon: &Daemon) -> Value {
    let plan = daemon.graph.plan();
    let describe = |export: &Export| {
        let node =
            plan.root(export.root).map_or_else(String::new, |root| plan.node(root.node).name.to_string());
        let object = Object::new().with("id", export.id.as_str()).with("type", "nbd").with("node-name", node);
        Value::Object(object.with("shutting-down", export.shutting_down))
    };
    Value::List(daemon.exports().iter().rev().map(describe).collect())
}

/// nbd-server-start, and `--nbd-server`, whose address has no `data` in between.
pub fn server_start(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let address = address(arguments)?;
    if let Some(id) = arguments.optional_text("tls-creds") {
        return Err(no_credentials(&id));
    }
    if arguments.has("tls-authz") {
        return Err(CommandError::new("Parameter 'tls-authz': TLS is not supported yet"));
    }
    let mut running = daemon.nbd();
    if running.is_some() {
        return Err(CommandError::new("NBD server already running"));
    }
    let limit = |number: i64| u32::try_from(number);
    let max_connections = limit(arguments.number("max-connections", 100));
    let seconds = limit(arguments.number("handshake-max-seconds", 10));
    let (Ok(max_connections), Ok(seconds)) = (max_connections, seconds) else {
        return Err(CommandError::new("Parameter 'max-connections' expects a non-negative value"));
    };
    let options =
        ServerOptions { max_connections, handshake_timeout: Duration::from_secs(u64::from(seconds)) };
    // Who connects while the command line is carried out finds all of its exports.
    let server = NbdServer::start_early(&address, options, daemon.spawners(), daemon.ready.clone())?;
    *running = Some(Arc::new(server));
    Ok(())
}

/// There are no credentials, whatever their name.
pub fn no_credentials(id: &str) -> CommandError {
    CommandError::new(format!("No TLS credentials with id '{id}'"))
}

/// Where a server is to listen.
pub fn address(arguments: &mut Arguments) -> CommandResult<Address> {
    let mut address =
        arguments.object("addr").ok_or_else(|| CommandError::new("Parameter 'addr' is missing"))?;
    let kind = address.text("type");
    let members = address.object("data").unwrap_or(address).rest();
    socket_address::from_options(&kind, &members).map_err(CommandError::told)
}

/// nbd-server-stop: drops all NBD exports, whoever is connected.
pub async fn server_stop(daemon: &Daemon) -> CommandResult<()> {
    if daemon.nbd().is_none() {
        return Err(CommandError::new("NBD server not running"));
    }
    close_all(daemon).await;
    Ok(())
}

/// The end of the server and of all exports.
pub async fn close_all(daemon: &Daemon) {
    let ids: Vec<_> = daemon.exports().iter().rev().map(|export| export.id.clone()).collect();
    for id in ids {
        // Refused for one that cannot be closed, which is then no better off than without a server.
        let _ = close(daemon, &id, true).await;
    }
    let server = daemon.nbd().take();
    if let Some(server) = server {
        server.stop().await;
    }
}

/// nbd-server-add (deprecated): id and name are the same, and a read-only node is exported read-only.
pub async fn server_add(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let device = arguments.text("device");
    let name = arguments.optional_text("name").unwrap_or_else(|| device.clone());
    if name.len() > MAX_STRING {
        return Err(CommandError::new(format!("export name '{name}' too long")));
    }
    let plan = daemon.graph.plan();
    let node = Names::of(daemon).either(&plan, &device)?;
    let writable = arguments.flag("writable", false) && !plan.node(node).read_only;
    let node_name = plan.node(node).name.to_string();
    drop(plan);
    let description = arguments.optional_text("description");
    let spec = Spec {
        id: name.clone(),
        node_name,
        name,
        description,
        writable,
        writethrough: false,
        depth: false,
        bitmaps: arguments.optional_text("bitmap").map(Shown::Somewhere).into_iter().collect(),
        iothread: None,
    };
    spec.add(daemon).await
}

/// block-export-add
pub async fn add(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let node_name = arguments.text("node-name");
    let spec = Spec {
        id: arguments.text("id"),
        name: arguments.optional_text("name").unwrap_or_else(|| node_name.clone()),
        description: arguments.optional_text("description"),
        writable: arguments.flag("writable", false),
        writethrough: arguments.flag("writethrough", false),
        depth: arguments.flag("allocation-depth", false),
        bitmaps: shown_bitmaps(arguments),
        iothread: arguments.optional_text("iothread"),
        node_name,
    };
    spec.add(daemon).await
}

/// An export to come.
struct Spec {
    id: String,
    node_name: String,
    name: String,
    description: Option<String>,
    writable: bool,
    writethrough: bool,
    depth: bool,
    bitmaps: Vec<Shown>,
    iothread: Option<String>,
}

/// `bitmaps` of an NBD export.
fn shown_bitmaps(arguments: &mut Arguments) -> Vec<Shown> {
    let Some(Value::List(list)) = arguments.take("bitmaps") else { return Vec::new() };
    let shown = |value| match value {
        Value::Str(name) => Some(Shown::Somewhere(name)),
        Value::Object(object) => {
            let mut of = Arguments::new(object);
            Some(Shown::Of { node: of.text("node"), name: of.text("name") })
        }
        _ => None,
    };
    list.into_iter().filter_map(shown).collect()
}

impl Spec {
    async fn add(self, daemon: &Daemon) -> CommandResult<()> {
        if !underlay_graph::units::is_well_formed_id(&self.id) {
            return Err(CommandError::new("Invalid block export id"));
        }
        if daemon.exports().iter().any(|export| export.id == self.id) {
            return Err(CommandError::new(format!("Block export id '{}' is already in use", self.id)));
        }
        let (guest, node) = self.disk(daemon)?;
        let server = daemon.nbd().clone().ok_or_else(|| CommandError::new("NBD server not running"))?;
        self.check_name(daemon)?;
        let backend = guest.as_ref().map(|(backend, _)| backend);
        let (root_id, locked, bitmaps) = self.enter(daemon, backend, node).await?;
        let root = daemon
            .graph
            .root(root_id)
            .ok_or_else(|| CommandError::new("The export was removed in the meantime"))?;
        let writethrough = self.writethrough || backend.is_some_and(|backend| backend.writethrough);
        let of = guest.map(|(_, guest)| guest);
        if let Some(guest) = &of {
            guest.count(daemon, 1);
        }
        let attached = of.as_ref().map(|guest| guest.attached.clone());
        let nbd = NbdExport {
            id: self.id.clone(),
            name: self.name.clone(),
            description: self.description.unwrap_or_default(),
            root,
            guest: attached.map(|guest| Arc::new(guest) as Arc<dyn underlay_exports::Guest>),
            writable: self.writable,
            writethrough,
            allocation_depth: self.depth,
            bitmaps,
        };
        let (id, name) = (self.id, self.name);
        let export = Export { id, name, root: root_id, of, bitmaps: locked, shutting_down: false };
        if let Err(error) = server.add(nbd) {
            export.let_go(daemon).await?;
            return Err(error.into());
        }
        daemon.exports().push(export);
        Ok(())
    }

    /// What is to be exported, and the device whose guest will use it.
    fn disk(&self, daemon: &Daemon) -> CommandResult<(Option<(Backend, Guest)>, NodeId)> {
        let (plan, name) = (daemon.graph.plan(), self.node_name.as_str());
        let guest = plan.find(name).is_none().then(|| Guest::new(daemon, name)).flatten();
        let node = match &guest {
            Some((backend, _)) => Names::of(daemon).device_or_node(&plan, Some(backend.called()), None)?,
            None => Names::of(daemon).device_or_node(&plan, None, Some(name))?,
        };
        let is_cd = guest.as_ref().is_some_and(|(backend, _)| backend.has_tray());
        if self.writable && (plan.node(node).read_only || is_cd) {
            return Err(CommandError::new("Cannot export read-only node as writable"));
        }
        // Every I/O thread serves every export, with `fixed-iothread` and without.
        let unknown = self.iothread.as_ref().filter(|path| !super::object::is_iothread(daemon, path));
        if let Some(iothread) = unknown {
            return Err(CommandError::new(format!("iothread \"{iothread}\" not found")));
        }
        Ok((guest, super::lookup::above_implicit_filters(&plan, node)))
    }

    /// Whether the server can show it under its name.
    fn check_name(&self, daemon: &Daemon) -> CommandResult<()> {
        for (what, text) in [("name", Some(&self.name)), ("description", self.description.as_ref())] {
            if let Some(text) = text.filter(|text| text.len() > MAX_STRING) {
                return Err(CommandError::new(format!("export {what} '{text}' too long")));
            }
        }
        if daemon.exports().iter().any(|export| export.name == self.name) {
            return Err(CommandError::new(format!("NBD server already has export named '{}'", self.name)));
        }
        Ok(())
    }

    /// Into the graph: the export's root, and the bitmaps that it shows.
    async fn enter(
        &self,
        daemon: &Daemon,
        device: Option<&Backend>,
        node: NodeId,
    ) -> CommandResult<(RootId, ShownBitmaps, NamedBits)> {
        let writes = if self.writable { Perms::WRITE } else { Perms::NONE };
        let new_root = NewRoot {
            user: UNNAMED_USER.to_owned(),
            role: "root",
            node,
            required: Perms::CONSISTENT_READ | writes,
            shared: Perms::ALL.without(Perms::RESIZE),
            pinned: false,
            drained: None,
        };
        let edit = |plan: &mut Plan| {
            if plan.get(node).is_none() {
                return Err(GraphError::new("The node was removed in the meantime"));
            }
            let (locked, bits) = ShownBitmaps::lock(plan, node, &self.bitmaps, self.writable)?;
            let root = match device {
                Some(backend) => Guest::let_in(daemon, backend, plan)?,
                None => plan.add_root(new_root),
            };
            Ok((root, locked, bits))
        };
        Ok(daemon.graph.change(edit).await?)
    }
}

impl Guest {
    /// A guest to come, if it is a device that is called so.
    fn new(daemon: &Daemon, name: &str) -> Option<(Backend, Self)> {
        let backend = daemon.machine.as_ref()?.devices.find(name)?;
        let attached = Attached::new(backend.io.clone());
        Some((backend.clone(), Self { backend: backend.id, attached }))
    }

    /// In a draft: nobody may change the length of the device's disk from now on. The root of the disk.
    fn let_in(daemon: &Daemon, backend: &Backend, plan: &mut Plan) -> Result<RootId, GraphError> {
        let gone = || GraphError::new(format!("Device '{}' has no medium", backend.called()));
        let mut used = backend.clone();
        used.guests += 1;
        let state = daemon.machine.as_ref().map(|machine| machine.running.state()).unwrap_or_default();
        plug::apply_access(&used, state, plan)?;
        backend.medium.ok_or_else(gone)
    }

    /// So many more exports of the device.
    fn count(&self, daemon: &Daemon, more: isize) {
        if let Some(machine) = &daemon.machine {
            machine.devices.edit(self.backend, |backend| {
                backend.guests = backend.guests.saturating_add_signed(more);
            });
        }
    }

    /// In a draft: the device's disk is as it was before there was a guest. False if there is no such device any more.
    fn let_out(&self, daemon: &Daemon, plan: &mut Plan) -> Result<(), GraphError> {
        let Some(machine) = &daemon.machine else { return Ok(()) };
        let Some(mut backend) = machine.devices.backend(self.backend) else { return Ok(()) };
        backend.guests = backend.guests.saturating_sub(1);
        plug::apply_access(&backend, machine.running.state(), plan)
    }
}

impl Export {
    /// The disk and its bitmaps are not used any more.
    async fn let_go(&self, daemon: &Daemon) -> CommandResult<()> {
        let edit = |plan: &mut Plan| {
            match &self.of {
                Some(guest) => guest.let_out(daemon, plan)?,
                None => plan.remove_root(self.root),
            }
            self.bitmaps.unlock(plan);
            Ok(())
        };
        daemon.graph.change(edit).await?;
        if let Some(guest) = &self.of {
            guest.count(daemon, -1);
        }
        Ok(())
    }
}

/// The end of all exports of a device.
pub async fn close_guests(daemon: &Daemon, backend: BackendId) -> CommandResult<()> {
    let is_one = |export: &&Export| export.of.as_ref().is_some_and(|guest| guest.backend == backend);
    let ids: Vec<_> = daemon.exports().iter().filter(is_one).map(|export| export.id.clone()).collect();
    for id in ids {
        close(daemon, &id, true).await?;
    }
    Ok(())
}

/// block-export-del, nbd-server-remove: once its clients' last requests are done, the export is gone and
/// BLOCK_EXPORT_DELETED is on its way. Most are done at once. A request that waits for somebody else does not hold up
/// this command, and with it all others.
pub async fn del(daemon: &Daemon, id: &str, hard: bool) -> CommandResult<()> {
    let ending = rt::spawn(begin_to_close(daemon, id, hard)?);
    rt::by(Some(rt::now() + PATIENCE), ending).await.unwrap_or(Ok(()))
}

/// The end of an export, of one that is on its way already too.
async fn close(daemon: &Daemon, id: &str, hard: bool) -> CommandResult<()> {
    let is_going = |export: &Export| export.id == id && export.shutting_down;
    loop {
        let mut changed = std::pin::pin!(daemon.exports_changed.notified());
        changed.as_mut().enable();
        if !daemon.exports().iter().any(is_going) {
            break;
        }
        changed.await;
    }
    if !daemon.exports().iter().any(|export| export.id == id) {
        return Ok(());
    }
    begin_to_close(daemon, id, hard)?.await
}

/// It can be tried again to close it.
fn stays(exports: &mut [Export], id: &str) {
    exports.iter_mut().filter(|export| export.id == id).for_each(|export| export.shutting_down = false);
}

/// Lets no more clients in; what is left to be done before the export is gone.
fn begin_to_close(
    daemon: &Daemon,
    id: &str,
    hard: bool,
) -> CommandResult<impl Future<Output = CommandResult<()>> + Send + use<>> {
    let export = {
        let mut exports = daemon.exports();
        let found = exports.iter_mut().find(|export| export.id == id);
        let export = found.ok_or_else(|| CommandError::new(format!("Export '{id}' is not found")))?;
        if export.shutting_down {
            return Err(CommandError::new(format!("Export '{id}' is already shutting down")));
        }
        export.shutting_down = true;
        export.clone()
    };
    let server = daemon.nbd().clone();
    let removed = server.map(|server| server.remove(&export.name, hard));
    // What waits for a machine that is stopped would wait for ever.
    let hurried = export.of.as_ref().filter(|_| hard).map(|guest| guest.attached.give_up());
    let gone = match removed {
        Some(Ok(gone)) => Some(gone),
        None | Some(Err(ExportError::NotFound(_))) => None,
        Some(Err(error)) => {
            stays(&mut daemon.exports(), id);
            return Err(error.into());
        }
    };
    let daemon = daemon.me.clone();
    Ok(async move {
        if let Some(gone) = gone {
            gone.wait().await;
        }
        drop(hurried);
        let Some(daemon) = daemon.upgrade() else { return Ok(()) };
        let gone = export.let_go(&daemon).await;
        match &gone {
            Ok(()) => {
                daemon.exports().retain(|other| other.id != export.id);
                daemon.events.emit("BLOCK_EXPORT_DELETED", Object::new().with("id", export.id.as_str()));
            }
            Err(error) => {
                tracing::error!(id = export.id, ?error, "the export stays");
                stays(&mut daemon.exports(), &export.id);
            }
        }
        daemon.exports_changed.notify_waiters();
        gone
    })
}

//! Character devices: the ends of monitors.

mod mux;
mod options;
pub mod ring;
mod shown;
mod telnet;
pub mod terminal;
mod wanted;
pub mod wire;

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use underlay_exports::listen::{cannot_connect, cannot_listen, reason};
use underlay_qmp::json::{Object, Value};
use underlay_qmp::option_list::OptionList;
use underlay_sys::net::{Abstract, Address, Listener, Stream};
use underlay_sys::pty::Pty;
use underlay_sys::{pipe::Pipe, say};

use crate::command::arguments::Arguments;
use crate::error::{CommandError, CommandResult};
use crate::monitor::Mode;
use crate::storage_daemon::{Answer, Remark};
pub use mux::Mux;
use ring::Ring;
pub use shown::Shown;
use wanted::Kind;
pub use wanted::Wanted;
use wire::Carrier;

/// What is behind a character device.
pub enum End {
    /// A socket that clients connect to.
    Listener(Listener),
    /// A socket that we connected, once.
    Stream(Stream),
    /// A socket that we connect, again and again, with a pause of so long between attempts.
    Caller(Address, Duration),
    /// A terminal, which may be opened and closed.
    Pty(Pty),
    /// What is there from the beginning to the end.
    Fixed(Carrier),
    /// What several monitors share.
    Mux(Arc<Mux>),
}

/// A character device.
pub struct Backend {
    /// What is behind it.
    pub end: End,
    /// Telnet is spoken.
    pub telnet: bool,
    /// Keys of a terminal send signals.
    pub signals: bool,
    /// Where a copy of what is written goes.
    pub log: Option<Arc<File>>,
    /// What it is called, and who is there.
    pub shown: Arc<Shown>,
}

/// The kinds of character devices, in the order in which the reference's query-chardev-backends has them.
pub const KINDS: [&str; 9] = ["mux", "pipe", "null", "ringbuf", "socket", "stdio", "memory", "file", "pty"];

/// The answer to `--chardev help`.
pub const HELP: &str = "Available chardev backend types: \n  pty\n  file\n  memory\n  stdio\n  socket\n  ringbuf\n  null\n  pipe\n  mux\n";

/// All character devices, in the order in which they came.
#[derive(Default)]
pub struct Chardevs {
    devices: Mutex<Vec<Device>>,
}

struct Device {
    id: String,
    shown: Arc<Shown>,
    /// What is behind it, unless a monitor, or a device for several of them, has taken that.
    backend: Option<Backend>,
    ring: Option<Arc<Ring>>,
    mux: Option<Arc<Mux>>,
    is_stdio: bool,
}

impl Chardevs {
    fn devices(&self) -> MutexGuard<'_, Vec<Device>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_there(&self, id: &str) -> bool {
        self.devices().iter().any(|device| device.id == id)
    }

    /// `--chardev`. An answer ends the program.
    pub async fn add(&self, list: OptionList, remark: Remark<'_>) -> CommandResult<Option<Answer>> {
        list.warnings.iter().for_each(|warning| remark(warning));
        let Wanted::Device { id, device, mux } = Wanted::read(list)? else { return Ok(Some(HELP)) };
        self.check_new(&id)?;
        if mux {
            let base = format!("{id}-base");
            self.check_new(&base)?;
            self.add_device(&base, device, remark).await?;
            return self.add_device(&id, wanted::Device::mux(base), remark).await;
        }
        self.add_device(&id, device, remark).await
    }

    async fn add_device(
        &self,
        id: &str,
        device: wanted::Device,
        remark: Remark<'_>,
    ) -> CommandResult<Option<Answer>> {
        let is_terminal = matches!(device.kind, Kind::Pty(_));
        let device = self.open(id, device, remark).await?;
        if is_terminal {
            let name = device.shown.filename();
            say!("char device redirected to {} (label {id})", name.trim_start_matches("pty:"));
        }
        self.devices().push(device);
        Ok(None)
    }

    fn check_new(&self, id: &str) -> CommandResult<()> {
        match self.is_there(id) {
            true => Err(CommandError::new(format!("Chardev with id '{id}' already exists"))),
            false => Ok(()),
        }
    }

    /// chardev-add: the name of the terminal, if it is one.
    pub async fn add_live(&self, id: &str, backend: Arguments) -> CommandResult<Option<String>> {
        self.check_new(id)?;
        let device = self.open_live(id, backend).await?;
        let terminal = device.terminal();
        self.devices().push(device);
        Ok(terminal)
    }

    /// chardev-change: likewise. What nobody uses can be anything else; a monitor wants what it has.
    pub async fn change(&self, id: &str, backend: Arguments) -> CommandResult<Option<String>> {
        let is_free = self.devices().iter().find(|device| device.id == id).map(Device::is_free);
        match is_free {
            None => return Err(CommandError::new(format!("Chardev '{id}' does not exist"))),
            Some(false) => return Err(CommandError::new("Chardev user does not support chardev hotswap")),
            Some(true) => {}
        }
        let new = self.open_live(id, backend).await?;
        let terminal = new.terminal();
        if let Some(device) = self.devices().iter_mut().find(|device| device.id == id) {
            *device = new;
        }
        Ok(terminal)
    }

    async fn open_live(&self, id: &str, backend: Arguments) -> CommandResult<Device> {
        let opened = match wanted::Device::of_backend(backend) {
            Ok(wanted) => match wanted.named_pipe() {
                // To open one waits for a reader, and everybody with it.
                Some(path) => Err(CommandError::new(format!("'{path}' is a named pipe"))),
                None => self.open(id, wanted, &|text| tracing::info!("{text}")).await,
            },
            Err(error) => Err(error),
        };
        opened.map_err(|error| CommandError {
            desc: format!("Failed to add chardev '{id}': {}", error.desc),
            ..error
        })
    }

    /// chardev-remove
    pub fn remove(&self, id: &str) -> CommandResult<()> {
        let mut devices = self.devices();
        let at = devices.iter().position(|device| device.id == id).ok_or_else(|| not_found(id))?;
        if !devices[at].is_free() {
            return Err(CommandError::new(format!("Chardev '{id}' is busy")));
        }
        let gone = devices.remove(at);
        if let Some(mux) = gone.mux
            && let Some(base) = devices.iter_mut().find(|device| device.id == mux.base())
        {
            base.backend = mux.give_back();
        }
        Ok(())
    }

    /// chardev-send-break: none of those that there are can send one.
    pub fn send_break(&self, id: &str) -> CommandResult<()> {
        if self.is_there(id) { Ok(()) } else { Err(not_found(id)) }
    }

    /// query-chardev
    pub fn query(&self) -> Value {
        let devices = self.devices();
        let info = |device: &Device| {
            let object = Object::new().with("label", &*device.id).with("filename", device.shown.filename());
            let above = devices.iter().filter_map(|other| other.mux.as_ref());
            let above = above.into_iter().find(|mux| mux.base() == device.id);
            let open = above.map_or(!device.is_free(), |mux| mux.monitors() > 0);
            object.with("frontend-open", open).into()
        };
        Value::List(devices.iter().map(info).collect())
    }

    /// The buffer that a device is.
    pub fn ring(&self, id: &str) -> CommandResult<Arc<Ring>> {
        let devices = self.devices();
        let device = devices.iter().find(|device| device.id == id);
        let device = device.ok_or_else(|| CommandError::new(format!("Device '{id}' not found")))?;
        device.ring.clone().ok_or_else(|| CommandError::new(format!("{id} is not a ringbuf device")))
    }

    async fn open(&self, id: &str, wanted: wanted::Device, remark: Remark<'_>) -> CommandResult<Device> {
        let wanted::Device { kind, log, telnet } = wanted;
        let log = log.map(open_log).transpose()?;
        let is_stdio = matches!(kind, Kind::Stdio { .. });
        let signals = !matches!(kind, Kind::Stdio { signals: false });
        if is_stdio && self.devices().iter().any(|device| device.is_stdio) {
            return Err(CommandError::new("cannot use stdio by multiple character devices"));
        }
        let fixed = |carrier, name: &str| (End::Fixed(carrier), Shown::plain(name));
        let (mut ring, mut mux) = (None, None);
        let (end, shown) = match kind {
            Kind::Socket { address, server: true, wait, .. } => {
                listen(&address, wait, telnet, remark).await?
            }
            Kind::Socket { address, pause, .. } => connect(address, pause).await?,
            Kind::Stdio { .. } => fixed(Carrier::Stdio, "stdio"),
            Kind::Null => fixed(file("/dev/null", true)?, "null"),
            Kind::File { path, append } => fixed(file(&path, append)?, "file"),
            Kind::Pipe(path) => fixed(pipe(&path)?, "pipe"),
            Kind::Pty(link) => pty(link.as_deref())?,
            Kind::Ring { size, name } => {
                let ring = ring.insert(Arc::new(Ring::new(size)));
                fixed(Carrier::Ring(ring.clone()), name)
            }
            Kind::Mux(base) => {
                let mux = mux.insert(Arc::new(Mux::new(base.clone(), self.take_base(&base)?)));
                (End::Mux(mux.clone()), Shown::plain("mux"))
            }
        };
        let shown = Arc::new(shown);
        let backend = Backend { end, telnet, signals, log, shown: shown.clone() };
        Ok(Device { id: id.to_owned(), shown, backend: Some(backend), ring, mux, is_stdio })
    }

    /// What is behind a device that several monitors are to share.
    fn take_base(&self, id: &str) -> CommandResult<Backend> {
        let mut devices = self.devices();
        let base = devices.iter_mut().find(|device| device.id == id);
        let base = base.ok_or_else(|| CommandError::new(format!("mux: base chardev {id} not found")))?;
        if base.mux.is_some() {
            return Err(CommandError::new(
                "Character devices of type 'mux' above each other are not supported",
            ));
        }
        base.backend.take().ok_or_else(|| in_use(id))
    }

    /// `--monitor`, `-mon`: what is behind its character device, and what is spoken there; `default` if that is not
    /// said.
    pub fn take_for_monitor(
        &self,
        mut arguments: Arguments,
        default: &str,
    ) -> CommandResult<(Backend, Mode)> {
        let id = arguments.text("chardev");
        let mut devices = self.devices();
        let device = devices.iter_mut().find(|device| device.id == id);
        let device = device.ok_or_else(|| CommandError::new(format!("chardev \"{id}\" not found")))?;
        let is_human = arguments.optional_text("mode").as_deref().unwrap_or(default) == "readline";
        let pretty = arguments.flag("pretty", false);
        let backend = match &device.mux {
            Some(mux) if mux.monitors() >= mux::MOST => {
                let text = format!("too many uses of multiplexed chardev '{id}' (maximum is {})", mux::MOST);
                return Err(CommandError::new(text));
            }
            Some(mux) => Backend::of(End::Mux(mux.clone()), device.shown.clone()),
            None => device.backend.take().ok_or_else(|| in_use(&id))?,
        };
        Ok((backend, if is_human { Mode::Human } else { Mode::Qmp { pretty } }))
    }
}

impl Backend {
    fn of(end: End, shown: Arc<Shown>) -> Self {
        Self { end, telnet: false, signals: true, log: None, shown }
    }
}

fn in_use(id: &str) -> CommandError {
    CommandError::new(format!("chardev '{id}' is already in use"))
}

impl Device {
    /// Whether no monitor uses it.
    fn is_free(&self) -> bool {
        self.backend.is_some() && self.mux.as_ref().is_none_or(|mux| mux.monitors() == 0)
    }

    fn terminal(&self) -> Option<String> {
        self.shown.filename().strip_prefix("pty:").map(str::to_owned)
    }
}

fn not_found(id: &str) -> CommandError {
    CommandError::new(format!("Chardev '{id}' not found"))
}

async fn connect(address: Address, pause: Option<Duration>) -> CommandResult<(End, Shown)> {
    let place = match &address {
        Address::Inet(inet) => format!("tcp:{}:{}", inet.host, inet.port),
        Address::Unix(path) => format!("unix:{}", path.display()),
        Address::Abstract(name) => of_abstract(name),
        Address::Fd(fd) => format!("fd:{fd}"),
    };
    let shown = Shown::socket(place, false);
    if let Some(pause) = pause {
        return Ok((End::Caller(address, pause), shown));
    }
    let stream = Stream::connect(&address).await;
    let stream = stream.map_err(|error| CommandError::told(cannot_connect(&address, &error)))?;
    shown.connected(&stream);
    Ok((End::Stream(stream), shown))
}

async fn listen(
    address: &Address,
    wait: bool,
    telnet: bool,
    remark: Remark<'_>,
) -> CommandResult<(End, Shown)> {
    let listener = Listener::bind(address);
    let listener = listener.map_err(|error| CommandError::told(cannot_listen(address, &error)))?;
    let place = place(address, &listener, telnet);
    if wait {
        remark(&format!("info: QEMU waiting for connection on: disconnected:{place},server=on"));
        let waited = listener.readable().await;
        waited.map_err(|error| CommandError::new(format!("Failed to listen: {}", reason(&error))))?;
    }
    Ok((End::Listener(listener), Shown::socket(place, true)))
}

fn of_abstract(name: &Abstract) -> String {
    format!("unix:{},abstract=on{}", name.name, if name.tight { ",tight=on" } else { "" })
}

/// A listener as it is shown to who shall connect.
fn place(address: &Address, listener: &Listener, telnet: bool) -> String {
    match address {
        Address::Unix(path) => format!("unix:{}", path.display()),
        Address::Abstract(name) => of_abstract(name),
        _ => {
            let place = listener.local_address();
            if telnet { place.replacen("tcp:", "telnet:", 1) } else { place }
        }
    }
}

fn open_log((path, append): (String, bool)) -> CommandResult<Arc<File>> {
    let failed = |error| CommandError::new(format!("Could not create '{path}': {}", reason(&error)));
    create(&path, append).map(Arc::new).map_err(failed)
}

fn pipe(path: &str) -> CommandResult<Carrier> {
    let failed = |error| CommandError::new(format!("Could not open '{path}': {}", reason(&error)));
    Ok(Carrier::Pipe(Arc::new(Pipe::open(Path::new(path)).map_err(failed)?)))
}

fn pty(link: Option<&str>) -> CommandResult<(End, Shown)> {
    let failed = |error| CommandError::new(format!("Failed to create PTY: {}", reason(&error)));
    let mut pty = Pty::open().map_err(failed)?;
    let shown = Shown::plain(format!("pty:{}", pty.name()));
    if let Some(link) = link {
        let failed = |error| CommandError::new(format!("Failed to create PTY symlink: {}", reason(&error)));
        pty.link(Path::new(link)).map_err(failed)?;
    }
    Ok((End::Pty(pty), shown))
}

fn create(path: &str, append: bool) -> std::io::Result<File> {
    let mut how = std::fs::OpenOptions::new();
    how.create(true).write(true).append(append).truncate(!append).open(Path::new(path))
}

fn file(path: &str, append: bool) -> CommandResult<Carrier> {
    let failed = |error| CommandError::new(format!("Could not open '{path}': {}", reason(&error)));
    Ok(Carrier::File(Arc::new(create(path, append).map_err(failed)?)))
}

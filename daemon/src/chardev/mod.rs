//! Character devices: the ends of monitors.

mod options;
mod telnet;
pub mod wire;

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use underlay_drivers::socket_address;
use underlay_exports::listen::{cannot_connect, cannot_listen, reason};
use underlay_qmp::option_list::OptionList;
use underlay_sys::net::{Address, Inet, Listener, Stream};
use underlay_sys::pipe::Pipe;
use underlay_sys::pty::Pty;

use crate::command::arguments::Arguments;
use crate::error::{CommandError, CommandResult};
use crate::storage_daemon::{Answer, Remark};
use options::Options;
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
}

/// A character device.
pub struct Backend {
    /// What is behind it.
    pub end: End,
    /// Telnet is spoken.
    pub telnet: bool,
    /// Where a copy of what is written goes.
    pub log: Option<Arc<File>>,
}

/// The answer to `--chardev help`.
const HELP: &str = "Available chardev backend types: \n  pty\n  file\n  stdio\n  socket\n  null\n  pipe\n";

/// The kinds that there are in the reference only.
const LATER: [&str; 7] = ["udp", "memory", "ringbuf", "parallel", "mux", "serial", "hub"];

/// All character devices; those that no monitor has taken yet with what is behind them.
#[derive(Default)]
pub struct Chardevs {
    devices: HashMap<String, Option<Backend>>,
    stdio_taken: bool,
}

impl Chardevs {
    /// `--chardev`. An answer ends the program.
    pub async fn add(&mut self, list: OptionList, remark: Remark<'_>) -> CommandResult<Option<Answer>> {
        list.warnings.iter().for_each(|warning| remark(warning));
        let (id, mut options) = Options::new(list.options)?;
        let kind = options.text("backend");
        if matches!(kind.as_deref(), Some("help" | "?")) {
            return Ok(Some(HELP));
        }
        let id = id.ok_or_else(|| CommandError::new("chardev: no id specified"))?;
        let kind = kind.ok_or_else(|| CommandError::new(format!("chardev: \"{id}\" missing backend")))?;
        if self.devices.contains_key(&id) {
            return Err(CommandError::new(format!("Chardev with id '{id}' already exists")));
        }
        options.drop_defaults(&[("mux", false)]);
        let log = log(&mut options)?;
        let telnet = options.flag("telnet").unwrap_or(false) && kind == "socket";
        let end = match kind.as_str() {
            "socket" => socket(options, telnet, remark).await?,
            "stdio" => self.stdio(options)?,
            "file" => file(options)?,
            "null" => {
                options.finish("null")?;
                open("/dev/null", true)?
            }
            "pipe" => pipe(options)?,
            "pty" => pty(&id, options)?,
            later if LATER.contains(&later) => {
                let text = format!("Character devices of type '{later}' are not supported yet");
                return Err(CommandError::new(text));
            }
            other => return Err(CommandError::new(format!("'{other}' is not a valid char driver name"))),
        };
        self.devices.insert(id, Some(Backend { end, telnet, log }));
        Ok(None)
    }

    fn stdio(&mut self, mut options: Options) -> CommandResult<End> {
        // Whether a terminal's keys may send signals: we leave terminals as they are.
        options.drop_defaults(&[("signal", true)]);
        options.finish("stdio")?;
        if self.stdio_taken {
            return Err(CommandError::new("cannot use stdio by multiple character devices"));
        }
        self.stdio_taken = true;
        Ok(End::Fixed(Carrier::Stdio))
    }

    /// `--monitor`: what is behind its character device, and whether replies are printed over several lines.
    pub fn take_for_monitor(&mut self, mut arguments: Arguments) -> CommandResult<(Backend, bool)> {
        let id = arguments.text("chardev");
        let device = self.devices.get_mut(&id);
        let device = device.ok_or_else(|| CommandError::new(format!("chardev \"{id}\" not found")))?;
        if arguments.optional_text("mode").as_deref() == Some("readline") {
            return Err(CommandError::new("Only QMP is supported"));
        }
        let backend = device.take();
        let backend =
            backend.ok_or_else(|| CommandError::new(format!("chardev '{id}' is already in use")))?;
        Ok((backend, arguments.flag("pretty", false)))
    }
}

/// There are no objects, hence no credentials, whatever their name.
pub fn no_credentials(id: &str) -> CommandError {
    CommandError::new(format!("No TLS credentials with id '{id}'"))
}

async fn socket(mut options: Options, telnet: bool, remark: Remark<'_>) -> CommandResult<End> {
    let server = options.flag("server").unwrap_or(false);
    let address = address(&mut options)?;
    if options.has("tls-authz") && !options.has("tls-creds") {
        return Err(CommandError::new("'tls_authz' option requires 'tls_creds' option"));
    }
    let misplaced: &[&str] = if server { &["reconnect", "reconnect-ms"] } else { &["wait"] };
    if let Some(option) = misplaced.iter().find(|option| options.has(option)) {
        let mode = if server { "server listen" } else { "client connect" };
        let text = format!("'{option}' option is incompatible with socket in {mode} mode");
        return Err(CommandError::new(text));
    }
    if !server && options.flag_is("websocket", true) {
        return Err(CommandError::new("Websocket client is not implemented"));
    }
    let pause = pause(&mut options, &address)?;
    if let Some(id) = options.text("tls-creds") {
        return Err(no_credentials(&id));
    }
    if options.has("delay") && options.has("nodelay") {
        return Err(CommandError::new("'delay' and 'nodelay' are mutually exclusive"));
    }
    let wait = options.flag("wait").unwrap_or(true);
    options.drop_defaults(&[("delay", false), ("nodelay", true), ("tn3270", false), ("websocket", false)]);
    options.finish("socket")?;
    if let Some(pause) = pause {
        return Ok(End::Caller(address, pause));
    }
    if !server {
        let stream = Stream::connect(&address).await;
        let stream = stream.map_err(|error| CommandError::told(cannot_connect(&address, &error)))?;
        return Ok(End::Stream(stream));
    }
    let listener = Listener::bind(&address);
    let listener = listener.map_err(|error| CommandError::told(cannot_listen(&address, &error)))?;
    if wait {
        let place = place(&address, &listener, telnet);
        remark(&format!("info: QEMU waiting for connection on: disconnected:{place},server=on"));
        let waited = listener.readable().await;
        waited.map_err(|error| CommandError::new(format!("Failed to listen: {}", reason(&error))))?;
    }
    Ok(End::Listener(listener))
}

/// A listener as it is shown to who shall connect.
fn place(address: &Address, listener: &Listener, telnet: bool) -> String {
    match address {
        Address::Unix(path) => format!("unix:{}", path.display()),
        Address::Abstract(name) => format!("unix:{},abstract=on", name.name),
        _ => {
            let place = listener.local_address();
            if telnet { place.replacen("tcp:", "telnet:", 1) } else { place }
        }
    }
}

/// How long to wait between attempts to connect; nothing if there is to be one attempt.
fn pause(options: &mut Options, address: &Address) -> CommandResult<Option<Duration>> {
    if options.has("reconnect") && options.has("reconnect-ms") {
        return Err(CommandError::new("'reconnect' and 'reconnect-ms' are mutually exclusive"));
    }
    let number =
        |options: &mut Options, name| options.number(name).map_or(0, |number| number.max(0).unsigned_abs());
    let seconds = number(options, "reconnect");
    let milliseconds = number(options, "reconnect-ms");
    let pause = Duration::from_secs(seconds).saturating_add(Duration::from_millis(milliseconds));
    if !pause.is_zero() && matches!(address, Address::Fd(_)) {
        return Err(CommandError::new("'reconnect' option is incompatible with 'fd' address type"));
    }
    Ok((!pause.is_zero()).then_some(pause))
}

fn address(options: &mut Options) -> CommandResult<Address> {
    let (path, fd, host) = (options.text("path"), options.text("fd"), options.text("host"));
    let given = [path.is_some(), fd.is_some(), host.is_some()].iter().filter(|given| **given).count();
    if given > 1 || (given == 0 && !options.has("port")) {
        return Err(CommandError::new("None or one of 'path', 'fd' or 'host' option required."));
    }
    if let Some(path) = path {
        return Ok(socket_address::unix(path, options.flag("abstract"), options.flag("tight")));
    }
    if let Some(fd) = fd {
        return socket_address::fd(&fd).map_err(CommandError::told);
    }
    let port = options.text("port").ok_or_else(|| CommandError::new("chardev: socket: no port given"))?;
    let to = options.number("to").map(u16::try_from).transpose();
    Ok(Address::Inet(Inet {
        to: to.map_err(|_| CommandError::new("Parameter 'to' expects uint16_t"))?,
        ipv4: options.flag("ipv4"),
        ipv6: options.flag("ipv6"),
        ..Inet::new(host.unwrap_or_default(), port)
    }))
}

fn log(options: &mut Options) -> CommandResult<Option<Arc<File>>> {
    let append = options.flag("logappend").unwrap_or(false);
    let Some(path) = options.text("logfile") else { return Ok(None) };
    let opened = create(&path, append);
    let failed = |error| CommandError::new(format!("Could not create '{path}': {}", reason(&error)));
    opened.map(|file| Some(Arc::new(file))).map_err(failed)
}

fn file(mut options: Options) -> CommandResult<End> {
    let Some(path) = options.text("path") else {
        return Err(CommandError::new("chardev: file: no filename given"));
    };
    let append = options.flag("append").unwrap_or(false);
    options.finish("file")?;
    open(&path, append)
}

fn pipe(mut options: Options) -> CommandResult<End> {
    let Some(path) = options.text("path") else {
        return Err(CommandError::new("chardev: pipe: no device path given"));
    };
    options.finish("pipe")?;
    let failed = |error| CommandError::new(format!("Could not open '{path}': {}", reason(&error)));
    Ok(End::Fixed(Carrier::Pipe(Arc::new(Pipe::open(Path::new(&path)).map_err(failed)?))))
}

fn pty(id: &str, mut options: Options) -> CommandResult<End> {
    let link = options.text("path");
    options.finish("pty")?;
    let failed = |error| CommandError::new(format!("Failed to create PTY: {}", reason(&error)));
    let mut pty = Pty::open().map_err(failed)?;
    println!("char device redirected to {} (label {id})", pty.name());
    if let Some(link) = link {
        let failed = |error| CommandError::new(format!("Failed to create PTY symlink: {}", reason(&error)));
        pty.link(Path::new(&link)).map_err(failed)?;
    }
    Ok(End::Pty(pty))
}

fn create(path: &str, append: bool) -> std::io::Result<File> {
    let mut how = std::fs::OpenOptions::new();
    how.create(true).write(true).append(append).truncate(!append).open(Path::new(path))
}

fn open(path: &str, append: bool) -> CommandResult<End> {
    let failed = |error| CommandError::new(format!("Could not open '{path}': {}", reason(&error)));
    Ok(End::Fixed(Carrier::File(Arc::new(create(path, append).map_err(failed)?))))
}

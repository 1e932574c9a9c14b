//! Character devices: the ends of monitors.

mod options;
mod telnet;
mod wanted;
pub mod wire;

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use underlay_exports::listen::{cannot_connect, cannot_listen, reason};
use underlay_qmp::option_list::OptionList;
use underlay_sys::net::{Address, Listener, Stream};
use underlay_sys::pipe::Pipe;
use underlay_sys::pty::Pty;

use crate::command::arguments::Arguments;
use crate::error::{CommandError, CommandResult};
use crate::monitor::Mode;
use crate::storage_daemon::{Answer, Remark};
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
pub const HELP: &str =
    "Available chardev backend types: \n  pty\n  file\n  stdio\n  socket\n  null\n  pipe\n";

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
        let Wanted::Device { id, kind, log, telnet } = Wanted::read(list)? else { return Ok(Some(HELP)) };
        if self.devices.contains_key(&id) {
            return Err(CommandError::new(format!("Chardev with id '{id}' already exists")));
        }
        let log = log.map(open_log).transpose()?;
        let end = match kind {
            Kind::Socket { address, pause: Some(pause), .. } => End::Caller(address, pause),
            Kind::Socket { address, server: true, wait, .. } => {
                listen(&address, wait, telnet, remark).await?
            }
            Kind::Socket { address, .. } => {
                let stream = Stream::connect(&address).await;
                let failed = |error| CommandError::told(cannot_connect(&address, &error));
                End::Stream(stream.map_err(failed)?)
            }
            Kind::Stdio => self.stdio()?,
            Kind::File { path, append } => file(&path, append)?,
            Kind::Pipe(path) => pipe(&path)?,
            Kind::Pty(link) => pty(&id, link.as_deref())?,
        };
        self.devices.insert(id, Some(Backend { end, telnet, log }));
        Ok(None)
    }

    fn stdio(&mut self) -> CommandResult<End> {
        if self.stdio_taken {
            return Err(CommandError::new("cannot use stdio by multiple character devices"));
        }
        self.stdio_taken = true;
        Ok(End::Fixed(Carrier::Stdio))
    }

    /// `--monitor`, `-mon`: what is behind its character device, and what is spoken there; `default` if that is not said.
    pub fn take_for_monitor(
        &mut self,
        mut arguments: Arguments,
        default: &str,
    ) -> CommandResult<(Backend, Mode)> {
        let id = arguments.text("chardev");
        let device = self.devices.get_mut(&id);
        let device = device.ok_or_else(|| CommandError::new(format!("chardev \"{id}\" not found")))?;
        let is_human = arguments.optional_text("mode").as_deref().unwrap_or(default) == "readline";
        let pretty = arguments.flag("pretty", false);
        let backend = device.take();
        let backend =
            backend.ok_or_else(|| CommandError::new(format!("chardev '{id}' is already in use")))?;
        Ok((backend, if is_human { Mode::Human } else { Mode::Qmp { pretty } }))
    }
}

async fn listen(address: &Address, wait: bool, telnet: bool, remark: Remark<'_>) -> CommandResult<End> {
    let listener = Listener::bind(address);
    let listener = listener.map_err(|error| CommandError::told(cannot_listen(address, &error)))?;
    if wait {
        let place = place(address, &listener, telnet);
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

fn open_log((path, append): (String, bool)) -> CommandResult<Arc<File>> {
    let failed = |error| CommandError::new(format!("Could not create '{path}': {}", reason(&error)));
    create(&path, append).map(Arc::new).map_err(failed)
}

fn pipe(path: &str) -> CommandResult<End> {
    let failed = |error| CommandError::new(format!("Could not open '{path}': {}", reason(&error)));
    Ok(End::Fixed(Carrier::Pipe(Arc::new(Pipe::open(Path::new(path)).map_err(failed)?))))
}

fn pty(id: &str, link: Option<&str>) -> CommandResult<End> {
    let failed = |error| CommandError::new(format!("Failed to create PTY: {}", reason(&error)));
    let mut pty = Pty::open().map_err(failed)?;
    println!("char device redirected to {} (label {id})", pty.name());
    if let Some(link) = link {
        let failed = |error| CommandError::new(format!("Failed to create PTY symlink: {}", reason(&error)));
        pty.link(Path::new(link)).map_err(failed)?;
    }
    Ok(End::Pty(pty))
}

fn create(path: &str, append: bool) -> std::io::Result<File> {
    let mut how = std::fs::OpenOptions::new();
    how.create(true).write(true).append(append).truncate(!append).open(Path::new(path))
}

fn file(path: &str, append: bool) -> CommandResult<End> {
    let failed = |error| CommandError::new(format!("Could not open '{path}': {}", reason(&error)));
    Ok(End::Fixed(Carrier::File(Arc::new(create(path, append).map_err(failed)?))))
}

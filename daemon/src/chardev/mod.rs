//! Character devices: the ends of monitors.

mod options;

use std::collections::HashMap;
use std::path::Path;

use underlay_exports::listen::{cannot_connect, cannot_listen, reason};
use underlay_qmp::option_list::OptionList;
use underlay_sys::net::{Address, Listener, Stream};

use crate::command::arguments::Arguments;
use crate::error::{CommandError, CommandResult};
use crate::storage_daemon::{Answer, Remark};
use options::Options;

/// What is behind a character device.
pub enum Backend {
    /// A socket that clients connect to.
    Listener(Listener),
    /// A socket that we connected.
    Stream(Stream),
    /// Standard input and output.
    Stdio,
    /// A file for output.
    File(std::fs::File),
}

/// The answer to `--chardev help`.
const HELP: &str = "Available chardev backend types: \n  file\n  stdio\n  socket\n  null\n";

/// The kinds that there are in the reference only.
const LATER: [&str; 9] = ["pty", "udp", "memory", "ringbuf", "parallel", "pipe", "mux", "serial", "hub"];

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
        let backend = match kind.as_str() {
            "socket" => socket(options, remark).await?,
            "stdio" => self.stdio(options)?,
            "file" => file(options)?,
            "null" => {
                options.finish("null")?;
                open("/dev/null", true)?
            }
            later if LATER.contains(&later) => {
                let text = format!("Character devices of type '{later}' are not supported yet");
                return Err(CommandError::new(text));
            }
            other => return Err(CommandError::new(format!("'{other}' is not a valid char driver name"))),
        };
        self.devices.insert(id, Some(backend));
        Ok(None)
    }

    fn stdio(&mut self, mut options: Options) -> CommandResult<Backend> {
        // Whether a terminal's keys may send signals: we leave terminals as they are.
        options.drop_defaults(&[("signal", true)]);
        options.finish("stdio")?;
        if self.stdio_taken {
            return Err(CommandError::new("cannot use stdio by multiple character devices"));
        }
        self.stdio_taken = true;
        Ok(Backend::Stdio)
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

async fn socket(mut options: Options, remark: Remark<'_>) -> CommandResult<Backend> {
    let server = options.flag("server").unwrap_or(false);
    let address = address(&mut options)?;
    if options.has("tls-authz") && !options.has("tls-creds") {
        return Err(CommandError::new("'tls_authz' option requires 'tls_creds' option"));
    }
    if let Some(id) = options.text("tls-creds") {
        return Err(no_credentials(&id));
    }
    let misplaced = if server { ("reconnect", "server listen") } else { ("wait", "client connect") };
    if options.has(misplaced.0) {
        let (option, mode) = misplaced;
        let text = format!("'{option}' option is incompatible with socket in {mode} mode");
        return Err(CommandError::new(text));
    }
    let wait = options.flag("wait").unwrap_or(true);
    options.drop_defaults(&[
        ("abstract", false),
        ("delay", false),
        ("nodelay", true),
        ("telnet", false),
        ("tight", true),
        ("tn3270", false),
        ("websocket", false),
    ]);
    options.finish("socket")?;
    if !server {
        let stream = Stream::connect(&address).await;
        let stream = stream.map_err(|error| CommandError::told(cannot_connect(&address, &error)))?;
        return Ok(Backend::Stream(stream));
    }
    let listener = Listener::bind(&address);
    let listener = listener.map_err(|error| CommandError::told(cannot_listen(&address, &error)))?;
    if wait {
        let place = match &address {
            Address::Unix(path) => format!("unix:{}", path.display()),
            _ => listener.local_address(),
        };
        remark(&format!("info: QEMU waiting for connection on: disconnected:{place},server=on"));
        let waited = listener.readable().await;
        waited.map_err(|error| CommandError::new(format!("Failed to listen: {}", reason(&error))))?;
    }
    Ok(Backend::Listener(listener))
}

fn address(options: &mut Options) -> CommandResult<Address> {
    let (path, fd, host) = (options.text("path"), options.text("fd"), options.text("host"));
    match (path, fd, host, options.has("port")) {
        (Some(path), None, None, _) => Ok(Address::Unix(path.into())),
        (None, Some(fd), None, _) => {
            let number = fd.parse();
            number.map(Address::Fd).map_err(|_| CommandError::new(format!("Unable to parse FD number {fd}")))
        }
        (None, None, host, true) => {
            let port = options.text("port").unwrap_or_default();
            Ok(Address::Inet { host: host.unwrap_or_default(), port })
        }
        (None, None, Some(_), false) => Err(CommandError::new("chardev: socket: no port given")),
        _ => Err(CommandError::new("None or one of 'path', 'fd' or 'host' option required.")),
    }
}

fn file(mut options: Options) -> CommandResult<Backend> {
    let Some(path) = options.text("path") else {
        return Err(CommandError::new("chardev: file: no filename given"));
    };
    let append = options.flag("append").unwrap_or(false);
    options.finish("file")?;
    open(&path, append)
}

fn open(path: &str, append: bool) -> CommandResult<Backend> {
    let mut how = std::fs::OpenOptions::new();
    let opened = how.create(true).write(true).append(append).truncate(!append).open(Path::new(path));
    let failed = |error| CommandError::new(format!("Could not open '{path}': {}", reason(&error)));
    opened.map(Backend::File).map_err(failed)
}

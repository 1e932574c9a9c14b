//! From the options of `--chardev` to what is wanted, before anything is opened.

use std::os::unix::fs::FileTypeExt;
use std::time::Duration;

use underlay_drivers::options::parse_size;
use underlay_drivers::socket_address;
use underlay_qmp::json::{Object, Value};
use underlay_qmp::option_list::OptionList;
use underlay_sys::net::{Address, Inet};

use super::options::Options;
use super::ring;
use crate::command::arguments::Arguments;
use crate::command::export::{address as address_of, no_credentials};
use crate::error::{CommandError, CommandResult};

/// The kinds that there are in the reference only.
const LATER: [&str; 4] = ["udp", "parallel", "serial", "hub"];

/// What a `--chardev` asks for.
pub enum Wanted {
    /// To be told which kinds there are.
    Help,
    /// A device.
    Device {
        /// Its name.
        id: String,
        /// The rest.
        device: Device,
        /// Several monitors share it.
        mux: bool,
    },
}

/// A character device that is wanted.
pub struct Device {
    /// What is to be behind it.
    pub kind: Kind,
    /// Where a copy of what is written goes, and whether it goes behind what is there.
    pub log: Option<(String, bool)>,
    /// Telnet is spoken.
    pub telnet: bool,
}

/// What is to be behind a character device.
pub enum Kind {
    /// A socket.
    Socket {
        /// Where.
        address: Address,
        /// Others connect.
        server: bool,
        /// Nothing goes on before the first of them.
        wait: bool,
        /// We connect, again and again, with such a pause in between.
        pause: Option<Duration>,
    },
    /// Standard input and output.
    Stdio {
        /// Keys of a terminal send signals.
        signals: bool,
    },
    /// Nothing.
    Null,
    /// A file for output.
    File {
        /// Its path.
        path: String,
        /// What is there stays.
        append: bool,
    },
    /// Named pipes.
    Pipe(String),
    /// A terminal, with a link to it.
    Pty(Option<String>),
    /// Memory for so many bytes.
    Ring {
        /// In bytes.
        size: usize,
        /// As it was asked for.
        name: &'static str,
    },
    /// The device of that name, for several monitors.
    Mux(String),
}

impl Wanted {
    /// Reads the options.
    pub fn read(list: OptionList) -> CommandResult<Self> {
        let (id, mut options) = Options::new(list.options)?;
        let kind = options.text("backend");
        if matches!(kind.as_deref(), Some("help" | "?")) {
            return Ok(Self::Help);
        }
        let id = id.ok_or_else(|| CommandError::new("chardev: no id specified"))?;
        let kind = kind.ok_or_else(|| CommandError::new(format!("chardev: \"{id}\" missing backend")))?;
        let mux = options.flag("mux").unwrap_or(false);
        Ok(Self::Device { id, device: Device::read(&kind, options, None)?, mux })
    }
}

impl Device {
    /// For several monitors.
    pub fn mux(base: String) -> Self {
        Self { kind: Kind::Mux(base), log: None, telnet: false }
    }

    fn read(kind: &str, mut options: Options, address: Option<Address>) -> CommandResult<Self> {
        let append = options.flag("logappend").unwrap_or(false);
        let log = options.text("logfile").map(|path| (path, append));
        let telnet = kind == "socket" && options.flag("telnet").unwrap_or(false);
        Ok(Self { kind: Kind::read(kind, options, address)?, log, telnet })
    }

    /// What would be written to as if it were a file, and is a named pipe.
    pub fn named_pipe(&self) -> Option<&str> {
        let output = if let Kind::File { path, .. } = &self.kind { Some(path) } else { None };
        let log = self.log.as_ref().map(|(path, _)| path);
        let is_pipe = |path: &&String| std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo());
        output.into_iter().chain(log).find(is_pipe).map(String::as_str)
    }

    /// The `backend` of a command, whose names and types have been checked: the same options by other names, and with
    /// other defaults.
    pub fn of_backend(mut backend: Arguments) -> CommandResult<Self> {
        let kind = backend.text("type");
        let mut data = backend.object("data").unwrap_or_else(|| Arguments::new(Object::new()));
        let address = if kind == "socket" { Some(address_of(&mut data)?) } else { None };
        let mut words = Object::new();
        for (name, value) in data.rest().into_iter() {
            let word = match value {
                Value::Bool(flag) => if flag { "on" } else { "off" }.to_owned(),
                Value::Str(text) => text,
                // A size that is below zero is far above everything.
                Value::Int(number) if name == "size" => number.cast_unsigned().to_string(),
                other => other.to_string(),
            };
            let name = match &*name {
                "out" | "device" => "path",
                "in" => "input-path",
                name => name,
            };
            words.insert(name, word);
        }
        if kind == "socket" {
            let server = words.get("server").is_none_or(|word| word.as_str() == Some("on"));
            words.insert("server", if server { "on" } else { "off" });
            if server && words.get("wait").is_none() {
                words.insert("wait", "off");
            }
        }
        Self::read(&kind, Options::of_words(words), address)
    }
}

impl Kind {
    fn read(name: &str, mut options: Options, address: Option<Address>) -> CommandResult<Self> {
        let mut path = |missing: &str| {
            let path = options.text("path");
            path.ok_or_else(|| CommandError::new(format!("chardev: {name}: no {missing} given")))
        };
        let kind = match name {
            "socket" => socket(&mut options, address)?,
            "stdio" => Self::Stdio { signals: options.flag("signal").unwrap_or(true) },
            "file" => {
                let path = path("filename")?;
                Self::File { path, append: options.flag("append").unwrap_or(false) }
            }
            "null" => Self::Null,
            "ringbuf" => Self::Ring { size: ring_size(&mut options)?, name: "ringbuf" },
            "memory" => Self::Ring { size: ring_size(&mut options)?, name: "memory" },
            "pipe" => Self::Pipe(path("device path")?),
            "pty" => Self::Pty(options.text("path")),
            "mux" => {
                let base = options.text("chardev");
                Self::Mux(base.ok_or_else(|| CommandError::new("chardev: mux: no chardev given"))?)
            }
            later if LATER.contains(&later) => {
                let text = format!("Character devices of type '{later}' are not supported yet");
                return Err(CommandError::new(text));
            }
            other => return Err(CommandError::new(format!("'{other}' is not a valid char driver name"))),
        };
        options.finish(name)?;
        Ok(kind)
    }
}

/// Bytes of a buffer that nobody gives a size for.
const RING: u64 = 64 << 10;

fn ring_size(options: &mut Options) -> CommandResult<usize> {
    let size = match options.text("size") {
        None => RING,
        Some(word) => parse_size(&word).ok_or_else(|| CommandError {
            hint: Some(
                "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
                    .to_owned(),
            ),
            ..CommandError::new("Parameter 'size' expects a non-negative number below 2^64")
        })?,
    };
    if size != 0 && !size.is_power_of_two() {
        return Err(CommandError::new("size of ringbuf chardev must be power of two"));
    }
    match usize::try_from(size) {
        Ok(size) if size as u64 <= ring::MOST => Ok(size),
        _ => Err(CommandError::new(format!("size of ringbuf chardev must be at most {}", ring::MOST))),
    }
}

fn socket(options: &mut Options, given: Option<Address>) -> CommandResult<Kind> {
    let server = options.flag("server").unwrap_or(false);
    let address = match given {
        Some(address) => address,
        None => address(options)?,
    };
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
        // The reference has none either, and these are its words.
        return Err(CommandError::new("Websocket client is not implemented"));
    }
    let pause = pause(options, &address)?;
    if let Some(id) = options.text("tls-creds") {
        return Err(no_credentials(&id));
    }
    if options.has("delay") && options.has("nodelay") {
        return Err(CommandError::new("'delay' and 'nodelay' are mutually exclusive"));
    }
    let wait = options.flag("wait").unwrap_or(true);
    options.drop_defaults(&[("delay", false), ("nodelay", true), ("tn3270", false), ("websocket", false)]);
    Ok(Kind::Socket { address, server, wait, pause })
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

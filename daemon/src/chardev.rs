//! Character devices: the ends of monitors.

use std::collections::HashMap;

use underlay_qmp::json::Object;
use underlay_sys::net::{Address, Listener, Stream};

use crate::command::arguments::Arguments;
use crate::error::{CommandError, CommandResult};

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

/// The character devices that no monitor has taken yet.
#[derive(Default)]
pub struct Chardevs {
    free: HashMap<String, Backend>,
    taken: Vec<String>,
}

impl Chardevs {
    /// `--chardev`
    pub async fn add(&mut self, options: Object) -> CommandResult<()> {
        let mut options = Words { options };
        let kind = options.take("backend").unwrap_or_default();
        let Some(id) = options.take("id") else {
            return Err(CommandError::new("chardev: no id specified"));
        };
        if self.free.contains_key(&id) || self.taken.contains(&id) {
            return Err(CommandError::new(format!("Chardev with id '{id}' already exists")));
        }
        let backend = match kind.as_str() {
            "socket" => socket(&mut options).await?,
            "stdio" => {
                options.flag("signal", true)?;
                Backend::Stdio
            }
            "file" => file(&mut options)?,
            "" => return Err(CommandError::new("chardev: \"\" missing backend")),
            other => return Err(CommandError::new(format!("'{other}' is not a valid char driver name"))),
        };
        if let Some((name, _)) = options.options.iter().next() {
            return Err(CommandError::new(format!("Invalid parameter '{name}'")));
        }
        self.free.insert(id, backend);
        Ok(())
    }

    /// For a monitor.
    pub fn take(&mut self, id: &str) -> CommandResult<Backend> {
        if self.taken.iter().any(|taken| taken == id) {
            return Err(CommandError::new(format!("Device '{id}' is in use")));
        }
        let backend = self.free.remove(id);
        let backend = backend.ok_or_else(|| CommandError::new(format!("chardev \"{id}\" not found")))?;
        self.taken.push(id.to_owned());
        Ok(backend)
    }
}

/// Options that are all words.
struct Words {
    options: Object,
}

impl Words {
    fn take(&mut self, name: &str) -> Option<String> {
        self.options.remove(name).and_then(|value| value.as_str().map(str::to_owned))
    }

    fn flag(&mut self, name: &str, default: bool) -> CommandResult<bool> {
        match self.take(name).as_deref() {
            None => Ok(default),
            Some("on" | "yes" | "true" | "y" | "") => Ok(true),
            Some("off" | "no" | "false" | "n") => Ok(false),
            Some(_) => Err(CommandError::new(format!("Parameter '{name}' expects 'on' or 'off'"))),
        }
    }
}

async fn socket(options: &mut Words) -> CommandResult<Backend> {
    let server = options.flag("server", false)?;
    let wait = options.flag("wait", server)?;
    for unsupported in
        ["telnet", "tn3270", "websocket", "tls-creds", "tls-authz", "reconnect", "reconnect-ms"]
    {
        if options.take(unsupported).is_some_and(|value| value != "off" && value != "0") {
            return Err(CommandError::new(format!("chardev: option '{unsupported}' is not supported yet")));
        }
    }
    let (path, fd) = (options.take("path"), options.take("fd"));
    let (host, port) = (options.take("host"), options.take("port"));
    let address = match (path, fd, port) {
        (Some(path), None, None) => Address::Unix(path.into()),
        (None, Some(fd), None) => {
            let fd = fd.parse().map_err(|_| CommandError::new(format!("Invalid file descriptor '{fd}'")))?;
            Address::Fd(fd)
        }
        (None, None, Some(port)) => Address::Inet { host: host.unwrap_or_default(), port },
        (None, None, None) => return Err(CommandError::new("chardev: socket: no host or path given")),
        _ => return Err(CommandError::new("'path', 'fd' and 'port' are mutually exclusive")),
    };
    let failed = |what: &str, error| CommandError::new(format!("Failed to {what} socket: {error}"));
    if !server {
        return Ok(Backend::Stream(
            Stream::connect(&address).await.map_err(|error| failed("connect", error))?,
        ));
    }
    let listener = Listener::bind(&address).map_err(|error| failed("bind", error))?;
    if wait {
        eprintln!(
            "info: QEMU waiting for connection on: disconnected:{},server=on",
            listener.local_address()
        );
        listener.readable().await.map_err(|error| failed("listen on", error))?;
    }
    Ok(Backend::Listener(listener))
}

fn file(options: &mut Words) -> CommandResult<Backend> {
    let Some(path) = options.take("path") else {
        return Err(CommandError::new("chardev: file: no filename given"));
    };
    let append = options.flag("append", false)?;
    let opened =
        std::fs::OpenOptions::new().create(true).write(true).append(append).truncate(!append).open(&path);
    let file = opened.map_err(|error| CommandError::new(format!("Could not open '{path}': {error}")))?;
    Ok(Backend::File(file))
}

/// `--monitor`: the character device and whether replies are printed over several lines.
pub fn monitor(mut arguments: Arguments) -> CommandResult<(String, bool)> {
    let chardev = arguments.optional_text("chardev");
    let chardev = chardev.ok_or_else(|| CommandError::new("Parameter 'chardev' is missing"))?;
    match arguments.optional_text("mode").as_deref() {
        None | Some("control") => {}
        Some("readline") => return Err(CommandError::new("The human monitor is not supported yet")),
        Some(other) => {
            return Err(CommandError::new(format!("Parameter 'mode' does not accept value '{other}'")));
        }
    }
    arguments.optional_text("id");
    let pretty = match arguments.optional_text("pretty").as_deref() {
        None | Some("off") => false,
        Some("on") => true,
        Some(_) => return Err(CommandError::new("Parameter 'pretty' expects 'on' or 'off'")),
    };
    match arguments.rest().iter().next() {
        Some((name, _)) => Err(CommandError::new(format!("Parameter '{name}' is unexpected"))),
        None => Ok((chardev, pretty)),
    }
}

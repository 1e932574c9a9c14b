//! From words to what is wished for. Texts are the reference's.

use std::path::PathBuf;
use std::time::Duration;

use underlay_disk::{Modes, Request, Source, parse_options};
use underlay_graph::Perms;
use underlay_img::WantedSnapshot as Wanted;
use underlay_img::getopt::{Known, parse};
use underlay_nbd::MAX_NAME;
use underlay_sys::net::{Address, Inet};

/// What the command line asks for.
#[derive(Debug)]
pub enum Wish {
    /// Print this.
    Print(String),
    /// Print what a server has.
    List(Address),
    /// Serve a disk.
    Serve(Box<Serving>),
}

/// Why a command line is refused.
#[derive(Debug, PartialEq)]
pub enum Refusal {
    /// A sentence.
    Text(String),
    /// A sentence about an option, and where help is.
    Option(String),
    /// Too many or too few words.
    Count,
}

impl From<&str> for Refusal {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Refusal {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// A disk and how to serve it.
#[derive(Debug)]
pub struct Serving {
    /// The disk.
    pub request: Request,
    /// How the user calls it.
    pub file: String,
    /// Where to listen. Nothing was said about it when `None`: a socket may come from outside.
    pub address: Option<Address>,
    /// Which option said where to listen.
    pub placed_by: Placed,
    /// The export's name.
    pub name: String,
    /// A text for people.
    pub description: String,
    /// Clients at a time; 0 for no limit.
    pub clients: u32,
    /// Go on when the last client has left.
    pub persistent: bool,
    /// Offer `qemu:allocation-depth`.
    pub allocation_depth: bool,
    /// Offer `qemu:dirty-bitmap:NAME` for each.
    pub bitmaps: Vec<String>,
    /// Time for a client to choose its export; zero for no limit.
    pub handshake: Duration,
    /// Go on in the background once clients can connect.
    pub fork: bool,
    /// Where to write the process number.
    pub pid_file: Option<PathBuf>,
    /// Say where it listens.
    pub verbose: bool,
    /// An internal snapshot rather than the disk.
    pub snapshot: Option<Wanted>,
}

/// Which options say where to listen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// `-b`
    pub interface: bool,
    /// `-p`
    pub port: bool,
    /// `-k`
    pub path: bool,
}

const KNOWN: Known = Known {
    short: "hVb:o:p:rsnc:dvk:e:f:tl:x:T:D:AB:L",
    long: &[
        ("help", "h", false),
        ("version", "V", false),
        ("bind", "b", true),
        ("port", "p", true),
        ("socket", "k", true),
        ("snapshot", "s", false),
        ("shared", "e", true),
        ("persistent", "t", false),
        ("verbose", "v", false),
        ("export-name", "x", true),
        ("description", "D", true),
        ("handshake-limit", "handshake-limit", true),
        ("offset", "o", true),
        ("allocation-depth", "A", false),
        ("bitmap", "B", true),
        ("list", "L", false),
        ("object", "object", true),
        ("tls-creds", "tls-creds", true),
        ("tls-authz", "tls-authz", true),
        ("tls-hostname", "tls-hostname", true),
        ("trace", "T", true),
        ("fork", "fork", false),
        ("pid-file", "pid-file", true),
        ("selinux-label", "selinux-label", true),
        ("connect", "c", true),
        ("disconnect", "d", false),
        ("format", "f", true),
        ("read-only", "r", false),
        ("load-snapshot", "l", true),
        ("nocache", "n", false),
        ("cache", "cache", true),
        ("aio", "aio", true),
        ("discard", "discard", true),
        ("detect-zeroes", "detect-zeroes", true),
        ("image-opts", "image-opts", false),
    ],
};

/// What is there in the reference and not yet here: option, and how it is named.
const LATER: [(&str, &str); 8] = [
    ("T", "-T (--trace)"),
    ("c", "-c (--connect), the client in the Linux kernel,"),
    ("d", "-d (--disconnect), the client in the Linux kernel,"),
    ("object", "--object"),
    ("selinux-label", "--selinux-label"),
    ("tls-authz", "--tls-authz"),
    ("tls-creds", "--tls-creds"),
    ("tls-hostname", "--tls-hostname"),
];

const HELP: &str = "\
Usage: qemu-nbd [OPTIONS] FILE
  or:  qemu-nbd -L [OPTIONS]
Serves a disk image to NBD clients until the last one has left, or lists what another server has.

  -h, --help                this help
  -V, --version             the version

Where:
  -p, --port=PORT           TCP port (10809)
  -b, --bind=HOST           address or name of the interface (0.0.0.0)
  -k, --socket=PATH         a UNIX socket instead
                            (Or a socket from systemd: LISTEN_FDS=1.)
  -L, --list                list the exports of the server there

Clients:
  -e, --shared=NUM          so many at a time (1); 0 for no limit
  -t, --persistent          go on when the last one has left
  -x, --export-name=NAME    the export's name (empty)
  -D, --description=TEXT    a text about it for people
      --handshake-limit=N   seconds for choosing an export (10); 0 for no limit

What:
  -f, --format=FORMAT       the image's format (raw, qcow2); probed when absent
      --image-opts          FILE is a list of options: driver=qcow2,file.filename=disk.img
  -r, --read-only           clients cannot write
  -s, --snapshot            what clients write goes to a temporary overlay, which is gone at the end
  -l, --load-snapshot=SNAP  an internal snapshot of the image, by id or name, or snapshot.id=…,snapshot.name=…;
                            for reading only
  -o, --offset=OFFSET       leave out so many bytes at the beginning
  -A, --allocation-depth    offer the meta context qemu:allocation-depth
  -B, --bitmap=NAME         offer the meta context qemu:dirty-bitmap:NAME; more than once for more bitmaps
  -n, --nocache             past the page cache, as --cache=none
      --cache=MODE          none, writeback (default), writethrough, directsync or unsafe
      --aio=MODE            threads, native or io_uring
      --discard=MODE        ignore (default) or unmap
      --detect-zeroes=MODE  off (default), on or unmap

Running:
      --fork                return once clients can connect, and serve in the background
      --pid-file=PATH       keep the process number in this file
  -v, --verbose             say where it listens

Not supported yet: -c (--connect), -d (--disconnect), -T (--trace),
--object, --tls-creds, --tls-authz, --tls-hostname, --selinux-label.
";

/// The port that NBD has been given. Source: IANA.
const PORT: &str = "10809";
const INTERFACE: &str = "0.0.0.0";

/// What has been said so far.
struct Said {
    request: Request,
    interface: Option<String>,
    port: Option<String>,
    path: Option<PathBuf>,
    list: bool,
    image_opts: bool,
    /// An option that only makes sense for a disk.
    per_device: bool,
    cache: bool,
    aio: bool,
    discard: bool,
    serving: Serving,
}

impl Said {
    fn new() -> Self {
        let modes = Modes::default();
        // An export does not change its size.
        let request = Request { modes, shared: Perms::ALL.without(Perms::RESIZE), ..Request::named("") };
        let serving = Serving {
            request: request.clone(),
            file: String::new(),
            address: None,
            placed_by: Placed::default(),
            name: String::new(),
            description: String::new(),
            clients: 1,
            persistent: false,
            allocation_depth: false,
            bitmaps: Vec::new(),
            handshake: Duration::from_secs(10),
            fork: false,
            pid_file: None,
            verbose: false,
            snapshot: None,
        };
        Self {
            request,
            interface: None,
            port: None,
            path: None,
            list: false,
            image_opts: false,
            per_device: false,
            cache: false,
            aio: false,
            discard: false,
            serving,
        }
    }

    /// Options that take no argument.
    fn plain(&mut self, option: &str) {
        match option {
            "r" => self.request.read_only = true,
            "s" => self.request.temporary = true,
            "t" => self.serving.persistent = true,
            "v" => self.serving.verbose = true,
            "fork" => self.serving.fork = true,
            "image-opts" => self.image_opts = true,
            "A" => (self.serving.allocation_depth, self.per_device) = (true, true),
            _ => self.list = true,
        }
    }

    /// Options that take one.
    fn valued(&mut self, option: &str, value: String) -> Result<(), Refusal> {
        match option {
            "b" => self.interface = Some(value),
            "p" => self.port = Some(value),
            "k" if !value.starts_with('/') => return Err("socket path must be absolute".into()),
            "k" => self.path = Some(value.into()),
            "e" => {
                let number = integer(&value).and_then(|number| i32::try_from(number).ok());
                let invalid = || format!("Invalid shared device number '{value}'");
                self.serving.clients = number.ok_or_else(invalid)?.unsigned_abs();
            }
            "x" if value.len() > MAX_NAME => return Err(format!("export name '{value}' too long").into()),
            "x" => (self.serving.name, self.per_device) = (value, true),
            "B" => {
                // The last one is listed first.
                self.serving.bitmaps.insert(0, value);
                self.per_device = true;
            }
            "D" if value.len() > MAX_NAME => {
                return Err(format!("export description '{value}' too long").into());
            }
            "D" => (self.serving.description, self.per_device) = (value, true),
            "handshake-limit" => {
                let seconds = integer(&value).and_then(|number| u32::try_from(number).ok());
                let invalid = || format!("Invalid handshake limit '{value}'");
                self.serving.handshake = Duration::from_secs(seconds.ok_or_else(invalid)?.into());
            }
            "o" => {
                let offset = integer(&value).ok_or_else(|| format!("Invalid offset '{value}'"))?;
                (self.request.offset, self.per_device) = (Some(offset).filter(|o| *o > 0), true);
            }
            "f" => (self.request.format, self.per_device) = (Some(value), true),
            "l" => {
                let wanted = Wanted::parse("qemu-nbd", &value).map_err(|failure| {
                    let why = failure.message.unwrap_or_default();
                    let why = why.lines().next().unwrap_or_default();
                    format!("{why}\nqemu-nbd: Failed in parsing snapshot param `{value}'")
                });
                self.serving.snapshot = Some(wanted?);
                (self.request.read_only, self.per_device) = (true, true);
            }
            "pid-file" => self.serving.pid_file = Some(value.into()),
            mode => self.mode(mode, &value)?,
        }
        Ok(())
    }

    /// Options that are a word out of some.
    fn mode(&mut self, option: &str, value: &str) -> Result<(), Refusal> {
        self.per_device |= option != "detect-zeroes";
        let modes = &mut self.request.modes;
        let again = |seen: &mut bool, name: &str| match std::mem::replace(seen, true) {
            true => Err(format!("{name} can only be specified once")),
            false => Ok(()),
        };
        let refused = match option {
            "n" | "cache" => {
                again(&mut self.cache, "-n and --cache")?;
                let mode = if option == "n" { "none" } else { value };
                (!modes.set_cache(mode)).then(|| format!("Invalid cache mode `{value}'"))
            }
            "aio" => {
                again(&mut self.aio, "--aio")?;
                (!modes.set_aio(value)).then(|| format!("Invalid aio mode '{value}'"))
            }
            "discard" => {
                again(&mut self.discard, "--discard")?;
                (!modes.set_discard(value)).then(|| format!("Invalid discard mode `{value}'"))
            }
            _ => {
                let text = "Failed to parse detect_zeroes mode: invalid parameter value";
                let known = modes.set_detect_zeroes(value);
                if known && value == "unmap" && !modes.discard {
                    return Err(
                        "setting detect-zeroes to unmap is not allowed without setting discard operation to \
                                unmap"
                            .into(),
                    );
                }
                (!known).then(|| format!("{text}: {value}"))
            }
        };
        refused.map_or(Ok(()), |text| Err(text.into()))
    }

    /// Where to listen, or to connect to.
    fn address(&mut self) -> Address {
        match self.path.take() {
            Some(path) => Address::Unix(path),
            None => {
                let host = self.interface.take().unwrap_or_else(|| INTERFACE.to_owned());
                Inet::new(host, self.port.take().unwrap_or_else(|| PORT.to_owned())).into()
            }
        }
    }
}

/// A whole number, decimal, octal (0…) or hexadecimal (0x…), perhaps with blanks and a plus in front of it; `None` for
/// anything else.
fn integer(text: &str) -> Option<u64> {
    let text = text.trim_ascii_start();
    let text = text.strip_prefix('+').unwrap_or(text);
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if text.len() > 1 && text.starts_with('0') => (&text[1..], 8),
        None => (text, 10),
    };
    let valid = !digits.is_empty() && digits.chars().all(|digit| digit.is_digit(radix));
    u64::from_str_radix(digits, radix).ok().filter(|_| valid)
}

/// Understands the command line; `warn` is told what is worth a warning.
pub fn understand(words: &[String], warn: &mut dyn FnMut(&str)) -> Result<Wish, Refusal> {
    let parsed = parse(KNOWN, words);
    let (options, others) = parsed.map_err(|failure| Refusal::Option(failure.message.unwrap_or_default()))?;
    let mut said = Said::new();
    for (option, value) in options {
        if let Some((_, what)) = LATER.iter().find(|(later, _)| *later == option) {
            return Err(format!("{what} is not supported yet").into());
        }
        match option.as_str() {
            "h" => return Ok(Wish::Print(HELP.to_owned())),
            "V" => {
                return Ok(Wish::Print(format!(
                    "qemu-nbd 10.0.2 (Underlay {})\n\
                     Copyright (c) 2026 The Underlay authors; the interface is that of QEMU 10.0.2\n",
                    env!("CARGO_PKG_VERSION")
                )));
            }
            "r" | "s" | "t" | "v" | "fork" | "image-opts" | "A" | "L" => said.plain(&option),
            option => said.valued(option, value)?,
        }
    }
    if said.list {
        return match (others.is_empty(), said.per_device) {
            (false, _) => Err("List mode is incompatible with a file name".into()),
            (_, true) => Err("List mode is incompatible with per-device settings".into()),
            _ if said.serving.fork => Err("List mode is incompatible with forking".into()),
            _ => Ok(Wish::List(said.address())),
        };
    }
    let [file] = others.as_slice() else { return Err(Refusal::Count) };
    serve(said, file, warn).map(|serving| Wish::Serve(Box::new(serving)))
}

fn serve(mut said: Said, file: &str, warn: &mut dyn FnMut(&str)) -> Result<Serving, Refusal> {
    if said.image_opts && said.request.format.is_some() {
        return Err("--image-opts and -f are mutually exclusive".into());
    }
    said.request.source = if said.image_opts {
        let list = parse_options(file, Some("file"));
        list.warnings.iter().for_each(|warning| warn(warning));
        Source::Options(list.options)
    } else {
        Source::Name(file.to_owned())
    };
    let placed_by =
        Placed { interface: said.interface.is_some(), port: said.port.is_some(), path: said.path.is_some() };
    let address = (placed_by != Placed::default()).then(|| said.address());
    let file = file.to_owned();
    Ok(Serving { request: said.request, file, address, placed_by, ..said.serving })
}

/// Where a server listens of which nothing is said.
pub fn default_address() -> Address {
    Inet::new(INTERFACE, PORT).into()
}

#[cfg(test)]
mod tests {
    use super::{LATER, Refusal, Wish, integer, understand};

    fn refusal(line: &str) -> String {
        let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        match understand(&words, &mut |_| ()) {
            Ok(wish) => format!("{wish:?}"),
            Err(Refusal::Text(text) | Refusal::Option(text)) => text,
            Err(Refusal::Count) => "count".to_owned(),
        }
    }

    #[test]
    fn what_is_not_there_is_refused_by_name() {
        for (option, what) in LATER {
            let dashes = if option.len() == 1 { "-" } else { "--" };
            let said = refusal(&format!("{dashes}{option} a b"));
            assert_eq!(said, format!("{what} is not supported yet"));
        }
    }

    #[test]
    fn the_defaults_are_the_reference_s() {
        let Ok(Wish::Serve(serving)) = understand(&["a".to_owned()], &mut |_| ()) else { panic!("refused") };
        assert_eq!((serving.clients, serving.persistent, serving.address), (1, false, None));
        assert!(!serving.request.read_only && !serving.request.modes.discard);
        assert_eq!(refusal(""), "count");
        assert_eq!(refusal("-L -A"), "List mode is incompatible with per-device settings");
    }

    #[test]
    fn numbers() {
        for (text, value) in [("0", Some(0)), ("0x10", Some(16)), ("010", Some(8)), ("12", Some(12))] {
            assert_eq!(integer(text), value);
        }
        for text in ["", "1k", "-1", "0x", "08", "18446744073709551616"] {
            assert_eq!(integer(text), None, "{text}");
        }
    }
}

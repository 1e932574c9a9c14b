//! The command line of `qemu-storage-daemon`, in two goes as the reference has it: first all option names are looked at
//! (`--version` and `--help` end it here), then options take effect in the order in which they stand, and only then are
//! their values read.

use underlay_qmp::json::Object;
use underlay_qmp::keyval;
use underlay_qmp::option_list::{self, OptionList};
use underlay_qmp::schema::{self, Input, ty};

use crate::error::{CommandError, CommandResult};

/// One option with its value, read.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// `--blockdev`
    Blockdev(Object),
    /// `--chardev`
    Chardev(OptionList),
    /// `--monitor`
    Monitor(Object),
    /// `--nbd-server`
    NbdServer(Object),
    /// `--export`
    Export(Object),
    /// `--object`
    Object(Object),
    /// `--object` with a word that asks for help, which is this.
    ObjectHelp(&'static str),
    /// `--pidfile`
    PidFile(String),
}

/// A word of the command line that is to take effect.
#[derive(Clone, Debug, PartialEq)]
pub struct Given {
    /// As it was typed, for messages.
    pub typed: String,
    /// The option, in full; nothing for a word that is none.
    option: Option<&'static str>,
    value: String,
}

/// What the command line asks for.
#[derive(Debug, PartialEq)]
pub enum CommandLine {
    /// `--help`
    Help,
    /// `--version`
    Version,
    /// To run.
    Run {
        /// `--daemonize`
        daemonize: bool,
        /// The other options.
        given: Vec<Given>,
    },
}

/// The text of `--help`; `%s` stands for the program.
pub const HELP: &str = "\
Usage: %s [options]
Underlay's storage daemon: serves disk images and changes them while they are in use.

  -h, --help             display this help and exit
  -V, --version          output version information and exit

  --blockdev [driver=]DRIVER,node-name=NAME[,OPTION=VALUE...]
                         open a block node. Drivers: file, host_device, nbd, raw, qcow2,
                         throttle, copy-on-read, null-co, null-aio. Nested options have dots (file.filename=a.qcow2); JSON is
                         taken too.
  --chardev socket,id=ID,path=PATH[,server=on|off][,wait=on|off]
  --chardev socket,id=ID,host=HOST,port=PORT[,server=on|off][,wait=on|off]
  --chardev socket,id=ID,fd=FD[,server=on|off][,wait=on|off]
  --chardev socket,...[,telnet=on|off][,reconnect-ms=N][,ipv4=on|off][,ipv6=on|off][,to=PORT]
            [,abstract=on|off][,tight=on|off]
  --chardev pty,id=ID[,path=LINK]
  --chardev pipe,id=ID,path=PATH
  --chardev stdio,id=ID
  --chardev file,id=ID,path=PATH[,append=on|off]
  --chardev null,id=ID
                         a character device, for a monitor; logfile=FILE and logappend=on|off with all of them
  --monitor [chardev=]ID[,pretty=on|off]
                         a QMP monitor on a character device
  --nbd-server addr.type=unix,addr.path=PATH[,max-connections=N][,handshake-max-seconds=N]
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,...]
                         start the NBD server
  --export [type=]nbd,id=ID,node-name=NODE[,name=NAME][,writable=on|off][,...]
                         export a block node
  --object [qom-type=]throttle-group,id=ID[,limits.iops-total=N][,limits.bps-total=N][,...]
                         limits that throttle nodes share
  --object [qom-type=]iothread,id=ID[,...]
                         a name that exports may ask for; all I/O threads serve all exports
  --pidfile PATH         write the process number to PATH; removed at the end
  --daemonize            go to the background once everything is set up

Options take effect in the order in which they are given.
";

const WITH_ARGUMENT: [&str; 8] =
    ["blockdev", "chardev", "monitor", "nbd-server", "export", "object", "pidfile", "trace"];
const PLAIN: [&str; 3] = ["daemonize", "help", "version"];

/// Reads a command line (without the program's name). Errors are whole messages but for the program's name.
pub fn parse(words: &[String]) -> Result<CommandLine, String> {
    let mut given = Vec::new();
    let mut daemonize = false;
    let mut only_words = false;
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let (name, attached) = match word.as_str() {
            "--" if !only_words => {
                only_words = true;
                continue;
            }
            long if long.starts_with("--") && !only_words => match long[2..].split_once('=') {
                Some((name, value)) => (complete(name, word)?, Some(value.to_owned())),
                None => (complete(&long[2..], word)?, None),
            },
            short if short.starts_with('-') && short.len() > 1 && !only_words => letter(&short[1..])?,
            other => {
                let typed = other.to_owned();
                given.push(Given { typed, option: None, value: String::new() });
                continue;
            }
        };
        if PLAIN.contains(&name) {
            if attached.is_some() {
                return Err(format!("option '--{name}' doesn't allow an argument"));
            }
            match name {
                "help" => return Ok(CommandLine::Help),
                "version" => return Ok(CommandLine::Version),
                _ => daemonize = true,
            }
            continue;
        }
        let (typed, value) = match attached {
            Some(value) => (word.clone(), value),
            None => {
                let next = words.next().ok_or_else(|| match word.as_str() {
                    "-T" => "option requires an argument -- 'T'".to_owned(),
                    _ => format!("option '--{name}' requires an argument"),
                })?;
                (format!("{word} {next}"), next.clone())
            }
        };
        given.push(Given { typed, option: Some(name), value });
    }
    Ok(CommandLine::Run { daemonize, given })
}

/// The option that the first of some letters means, with what is attached to it.
fn letter(letters: &str) -> Result<(&'static str, Option<String>), String> {
    let mut letters = letters.chars();
    match letters.next() {
        Some('h') => Ok(("help", None)),
        Some('V') => Ok(("version", None)),
        Some('T') => Ok(("trace", Some(letters.collect()).filter(|value: &String| !value.is_empty()))),
        first => Err(format!("invalid option -- '{}'", first.unwrap_or('-'))),
    }
}

/// The option that a name, perhaps abbreviated, means.
fn complete(name: &str, word: &str) -> Result<&'static str, String> {
    let all = || WITH_ARGUMENT.into_iter().chain(PLAIN);
    let option = word.split('=').next().unwrap_or(word);
    if let Some(exact) = all().find(|option| *option == name) {
        return Ok(exact);
    }
    let matches: Vec<_> = all().filter(|option| option.starts_with(name)).collect();
    match matches.as_slice() {
        [one] => Ok(one),
        [] => Err(format!("unrecognized option '{option}'")),
        several => {
            let names: Vec<_> = several.iter().map(|name| format!("'--{name}'")).collect();
            Err(format!("option '{option}' is ambiguous; possibilities: {}", names.join(" ")))
        }
    }
}

impl Given {
    /// Reads the value. Errors are to be told with what was typed before them.
    pub fn read(&self) -> CommandResult<Arg> {
        let value = self.value.as_str();
        match self.option {
            Some("blockdev") => checked(value, Some("driver"), schema::blockdev_options()).map(Arg::Blockdev),
            Some("export") => checked(value, Some("type"), schema::block_export_options()).map(Arg::Export),
            Some("monitor") => checked(value, Some("chardev"), schema::monitor_options()).map(Arg::Monitor),
            Some("nbd-server") => checked(value, None, schema::nbd_server_options()).map(Arg::NbdServer),
            Some("chardev") => {
                Ok(Arg::Chardev(option_list::parse_knowing(value, Some("backend"), &["nodelay"])))
            }
            Some("pidfile") => Ok(Arg::PidFile(value.to_owned())),
            Some("trace") => Err(CommandError::new("Trace events are not supported")),
            Some(_) => match keyval::parse(value, Some("qom-type")) {
                Err(keyval::KeyvalError::NoHelp) => object_help(value).map(Arg::ObjectHelp),
                _ => object(value).map(Arg::Object),
            },
            None => Err(CommandError::new("Unexpected argument")),
        }
    }
}

fn pairs(value: &str, implied: Option<&str>) -> CommandResult<Object> {
    keyval::parse(value, implied).map_err(|error| CommandError::new(error.to_string()))
}

/// Reads options and holds them against their description.
pub fn checked(value: &str, implied: Option<&str>, by: &ty::Object) -> CommandResult<Object> {
    let input = if value.starts_with('{') { Input::Json } else { Input::Words };
    schema::check(pairs(value, implied)?, by, input).map_err(|error| CommandError::new(error.to_string()))
}

/// The types of objects that there are in the reference only.
const LATER: [&str; 9] = [
    "secret",
    "tls-creds-x509",
    "tls-creds-psk",
    "tls-creds-anon",
    "authz-list",
    "authz-simple",
    "authz-pam",
    "authz-list-file",
    "secret_keyring",
];

fn not_yet(kind: &str) -> CommandError {
    CommandError::new(format!("Objects of type '{kind}' are not supported yet"))
}

const OBJECTS: &str = "List of user creatable objects:\n  iothread\n  throttle-group\n";

const OF_IOTHREAD: &str = "iothread options:\n  aio-max-batch=<int>\n  poll-grow=<int>\n  poll-max-ns=<int>\n  \
    poll-shrink=<int>\n  thread-pool-max=<int>\n  thread-pool-min=<int>\n";

const OF_THROTTLE_GROUP: &str = "throttle-group options:\n  limits=<ThrottleLimits>\n  \
    x-bps-read-max-length=<int>\n  x-bps-read-max=<int>\n  x-bps-read=<int>\n  \
    x-bps-total-max-length=<int>\n  x-bps-total-max=<int>\n  x-bps-total=<int>\n  \
    x-bps-write-max-length=<int>\n  x-bps-write-max=<int>\n  x-bps-write=<int>\n  \
    x-iops-read-max-length=<int>\n  x-iops-read-max=<int>\n  x-iops-read=<int>\n  x-iops-size=<int>\n  \
    x-iops-total-max-length=<int>\n  x-iops-total-max=<int>\n  x-iops-total=<int>\n  \
    x-iops-write-max-length=<int>\n  x-iops-write-max=<int>\n  x-iops-write=<int>\n";

/// Help on the type that the other words name, or on which types there are.
fn object_help(value: &str) -> CommandResult<&'static str> {
    let words: Vec<_> = value.split(',').filter(|word| !matches!(*word, "help" | "?")).collect();
    let given = keyval::parse(&words.join(","), Some("qom-type")).unwrap_or_default();
    match given.get("qom-type").and_then(|kind| kind.as_str()) {
        Some("iothread") => Ok(OF_IOTHREAD),
        Some("throttle-group") => Ok(OF_THROTTLE_GROUP),
        Some(later) if LATER.contains(&later) => Err(not_yet(later)),
        _ => Ok(OBJECTS),
    }
}

/// The options of `--object`.
pub fn object(value: &str) -> CommandResult<Object> {
    let given = pairs(value, Some("qom-type"))?;
    let kind = given.get("qom-type").and_then(|kind| kind.as_str()).unwrap_or_default();
    if LATER.contains(&kind) {
        return Err(not_yet(kind));
    }
    checked(value, Some("qom-type"), schema::object_options())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint(words: &str) -> String {
        let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        match parse(&words) {
            Err(error) => error,
            Ok(CommandLine::Run { given, .. }) => {
                let complaint = |given: &Given| Some(format!("{}: {}", given.typed, given.read().err()?));
                given.iter().find_map(complaint).unwrap_or_default()
            }
            Ok(other) => format!("{other:?}"),
        }
    }

    /// The texts are those of the reference.
    #[test]
    fn complains_as_the_reference() {
        for (words, text) in [
            (
                "--blockdev driver=foo",
                "--blockdev driver=foo: Parameter 'driver' does not accept value 'foo'",
            ),
            ("--foo", "unrecognized option '--foo'"),
            ("--blockdev nope --foo", "unrecognized option '--foo'"),
            ("--blockdev nope --version", "Version"),
            ("--blockdev", "option '--blockdev' requires an argument"),
            ("extra", "extra: Unexpected argument"),
            ("--object foo,id=a", "--object foo,id=a: Parameter 'qom-type' does not accept value 'foo'"),
            ("--object iothread,id=a,poll-max-ns=5", ""),
            ("--object secret,id=a", "--object secret,id=a: Objects of type 'secret' are not supported yet"),
            (
                "--object throttle-group,id=g,limits.foo=1",
                "--object throttle-group,id=g,limits.foo=1: Parameter 'limits.foo' is unexpected",
            ),
            ("--object throttle-group,id=g,limits.iops-total=100,x-bps-read=5", ""),
            ("--blockdev driver=null-co,node-name=n,size=65536,read-zeroes=on --daem", ""),
        ] {
            assert_eq!(complaint(words), text, "{words}");
        }
    }
}

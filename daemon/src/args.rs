//! The command line of `qemu-storage-daemon`: options take effect in the order in which they stand.

use underlay_qmp::json::Object;
use underlay_qmp::keyval;
use underlay_qmp::schema::{self, Input};

use crate::error::{CommandError, CommandResult};

/// One option with its argument.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// `--blockdev`
    Blockdev(Object),
    /// `--chardev`
    Chardev(Object),
    /// `--monitor`
    Monitor(Object),
    /// `--nbd-server`
    NbdServer(Object),
    /// `--export`
    Export(Object),
    /// `--pidfile`
    PidFile(String),
    /// `--daemonize`
    Daemonize,
}

/// What the command line asks for.
#[derive(Debug, PartialEq)]
pub enum CommandLine {
    /// `--help`
    Help,
    /// `--version`
    Version,
    /// To run, with each option as it was typed, for messages.
    Run(Vec<(String, Arg)>),
}

/// The text of `--help`; `%s` stands for the program.
pub const HELP: &str = "\
Usage: %s [options]
Underlay's storage daemon: serves disk images and changes them while they are in use.

  -h, --help             display this help and exit
  -V, --version          output version information and exit

  --blockdev [driver=]DRIVER,node-name=NAME[,OPTION=VALUE...]
                         open a block node. Drivers: file, host_device, raw, qcow2, null-co,
                         null-aio. Nested options have dots (file.filename=a.qcow2); JSON is
                         taken too.
  --chardev socket,id=ID,path=PATH[,server=on|off][,wait=on|off]
  --chardev socket,id=ID,host=HOST,port=PORT[,server=on|off][,wait=on|off]
  --chardev socket,id=ID,fd=FD[,server=on|off][,wait=on|off]
  --chardev stdio,id=ID
  --chardev file,id=ID,path=PATH[,append=on|off]
                         a character device, for a monitor
  --monitor [chardev=]ID[,pretty=on|off]
                         a QMP monitor on a character device
  --nbd-server addr.type=unix,addr.path=PATH[,max-connections=N][,handshake-max-seconds=N]
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,...]
                         start the NBD server
  --export [type=]nbd,id=ID,node-name=NODE[,name=NAME][,writable=on|off][,...]
                         export a block node
  --pidfile PATH         write the process number to PATH; removed at the end
  --daemonize            go to the background once everything is set up

Options take effect in the order in which they are given.
";

const WITH_ARGUMENT: [&str; 7] =
    ["blockdev", "chardev", "monitor", "nbd-server", "export", "object", "pidfile"];
const PLAIN: [&str; 3] = ["daemonize", "help", "version"];

/// Reads a command line (without the program's name). Errors are whole messages but for the program's name.
pub fn parse(words: &[String]) -> Result<CommandLine, String> {
    let mut args = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let (name, attached) = match word.as_str() {
            "-h" => ("help", None),
            "-V" => ("version", None),
            long if long.starts_with("--") && long.len() > 2 => match long[2..].split_once('=') {
                Some((name, value)) => (complete(name, word)?, Some(value.to_owned())),
                None => (complete(&long[2..], word)?, None),
            },
            short if short.starts_with('-') && short.len() > 1 => {
                return Err(format!("invalid option -- '{}'", &short[1..2]));
            }
            other => return Err(format!("{other}: Unexpected argument")),
        };
        if PLAIN.contains(&name) {
            if attached.is_some() {
                return Err(format!("option '--{name}' doesn't allow an argument"));
            }
            match name {
                "help" => return Ok(CommandLine::Help),
                "version" => return Ok(CommandLine::Version),
                _ => args.push((word.clone(), Arg::Daemonize)),
            }
            continue;
        }
        let (typed, value) = match attached {
            Some(value) => (word.clone(), value),
            None => {
                let next = words.next().ok_or_else(|| format!("option '--{name}' requires an argument"))?;
                (format!("{word} {next}"), next.clone())
            }
        };
        let arg = argument(name, &value).map_err(|error| format!("{typed}: {error}"))?;
        args.push((typed, arg));
    }
    Ok(CommandLine::Run(args))
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

fn argument(name: &str, value: &str) -> CommandResult<Arg> {
    let words =
        |implied| keyval::parse(value, Some(implied)).map_err(|error| CommandError::new(error.to_string()));
    let input = if value.starts_with('{') { Input::Json } else { Input::Words };
    let checked =
        |object, by| schema::check(object, by, input).map_err(|error| CommandError::new(error.to_string()));
    Ok(match name {
        "blockdev" => Arg::Blockdev(checked(words("driver")?, schema::blockdev_options())?),
        "export" => Arg::Export(checked(words("type")?, schema::block_export_options())?),
        "chardev" => Arg::Chardev(words("backend")?),
        "monitor" => Arg::Monitor(words("chardev")?),
        "nbd-server" => {
            Arg::NbdServer(keyval::parse(value, None).map_err(|error| CommandError::new(error.to_string()))?)
        }
        "pidfile" => Arg::PidFile(value.to_owned()),
        _ => {
            let kind = words("qom-type")?;
            let kind =
                kind.get("qom-type").and_then(|kind| kind.as_str().map(str::to_owned)).unwrap_or_default();
            let text = match kind.as_str() {
                "secret" | "iothread" | "throttle-group" | "tls-creds-x509" | "tls-creds-psk"
                | "tls-creds-anon" | "authz-list" | "authz-simple" | "authz-pam" | "authz-list-file"
                | "secret_keyring" => {
                    format!("Objects of type '{kind}' are not supported yet")
                }
                "" => "Parameter 'qom-type' is missing".to_owned(),
                _ => format!("Parameter 'qom-type' does not accept value '{kind}'"),
            };
            return Err(CommandError::new(text));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint(words: &str) -> String {
        let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        parse(&words).map_or_else(|error| error, |_| String::new())
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
            ("--blockdev", "option '--blockdev' requires an argument"),
            ("extra", "extra: Unexpected argument"),
            ("--object foo,id=a", "--object foo,id=a: Parameter 'qom-type' does not accept value 'foo'"),
            (
                "--object iothread,id=a",
                "--object iothread,id=a: Objects of type 'iothread' are not supported yet",
            ),
            ("--blockdev driver=null-co,node-name=n,size=65536,read-zeroes=on --daem", ""),
        ] {
            assert_eq!(complaint(words), text, "{words}");
        }
    }
}

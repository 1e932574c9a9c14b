//! `qemu-storage-daemon`: from a command line to a running daemon to its end.

use std::path::Path;
use std::sync::Arc;

use underlay_drivers::NodeSpec;
use underlay_qmp::json::{Object, Value};
use underlay_qmp::option_list::OptionList;
use underlay_sys::{complain, say, say_part};

use crate::args::{Arg, CommandLine, Given, HELP, parse};
use crate::chardev::Wanted;
use crate::command::arguments::Arguments;
use crate::command::{blockdev, export, object};
use crate::error::{CommandError, CommandResult};
use crate::life::{self, Ready};
use crate::monitor::{self, Mode};
use crate::state::Daemon;

/// Runs the daemon to its end; the exit status.
pub fn main(program: &str, words: &[String]) -> i32 {
    let name = Path::new(program).file_name().map_or(program.into(), |name| name.to_string_lossy());
    match parse(words) {
        Err(error) => fail(&name, &error),
        Ok(CommandLine::Help) => {
            say_part!("{}", HELP.replace("%s", program));
            0
        }
        Ok(CommandLine::Version) => {
            say!("qemu-storage-daemon version 10.0.2 (Underlay {})", env!("CARGO_PKG_VERSION"));
            say!("Copyright (c) 2026 The Underlay authors; the interface is that of QEMU 10.0.2");
            0
        }
        Ok(CommandLine::Run { daemonize, given }) => {
            run(&name, daemonize, given).map_or_else(|error| fail(&name, &error), |()| 0)
        }
    }
}

/// Reads a command line as far as that goes without carrying anything out; what is wrong with it, if that is found so
/// early.
pub fn understood(words: &[String]) -> Result<(), String> {
    let CommandLine::Run { given, .. } = parse(words)? else { return Ok(()) };
    let read = |given: &Given| match given.read()? {
        Arg::Chardev(list) => Wanted::read(list).map(drop),
        Arg::Blockdev(options) => NodeSpec::parse(options).map(drop).map_err(CommandError::from),
        Arg::NbdServer(options) => export::address(&mut Arguments::new(options)).map(drop),
        Arg::Object(options) => object::understood(Arguments::new(options)),
        Arg::Export(_) | Arg::Monitor(_) | Arg::ObjectHelp(_) | Arg::PidFile(_) => Ok(()),
    };
    given.iter().try_for_each(read).map_err(|error| error.in_full())
}

fn fail(name: &str, error: &str) -> i32 {
    complain!("{name}: {error}");
    1
}

fn run(name: &str, daemonize: bool, given: Vec<Given>) -> Result<(), String> {
    life::run(daemonize, || Daemon::start(None), async |daemon| set_up(&daemon, name, given, daemonize).await)
}

/// Carries out the options in their order.
async fn set_up(
    daemon: &Arc<Daemon>,
    name: &str,
    given: Vec<Given>,
    daemonize: bool,
) -> Result<Ready, String> {
    let mut pid_file = None;
    for given in given {
        let typed = &given.typed;
        let told = |error: CommandError| format!("{typed}: {}", error.in_full());
        let remark = |text: &str| complain!("{name}: {typed}: {text}");
        match given.read().map_err(told)? {
            Arg::PidFile(path) => pid_file = Some(path),
            Arg::Chardev(options) if daemonize && is_stdio(&options) => {
                return Err(told(CommandError::new("cannot use stdio with -daemonize")));
            }
            arg => {
                if let Some(answer) = carry_out(daemon, arg, &remark).await.map_err(told)? {
                    say_part!("{answer}");
                    return Ok(Ready::Answered);
                }
            }
        }
    }
    life::keep_pid(pid_file)
}

/// Whether these options of a character device ask for the standard streams.
pub fn is_stdio(options: &OptionList) -> bool {
    options.options.get("backend").and_then(Value::as_str) == Some("stdio")
}

/// Told what is worth a remark, but no error.
pub type Remark<'a> = &'a (dyn Fn(&str) + Sync);

/// A text that was asked for instead of a running daemon.
pub type Answer = &'static str;

async fn carry_out(daemon: &Arc<Daemon>, arg: Arg, remark: Remark<'_>) -> CommandResult<Option<Answer>> {
    match arg {
        Arg::Blockdev(options) => {
            if has_empty_backing(&options) {
                remark("warning: Use of \"backing\": \"\" is deprecated; use \"backing\": null instead");
            }
            blockdev::add(daemon, options).await?;
        }
        Arg::Chardev(options) => return daemon.chardevs.add(options, remark).await,
        Arg::Monitor(options) => {
            let (backend, mode) = daemon.chardevs.take_for_monitor(Arguments::new(options), "control")?;
            if mode == Mode::Human {
                return Err(CommandError::new("Only QMP is supported"));
            }
            monitor::serve(daemon, backend, mode);
        }
        Arg::NbdServer(options) => export::server_start(daemon, &mut Arguments::new(options))?,
        Arg::Export(options) => {
            let mut arguments = Arguments::new(options);
            arguments.optional_text("type");
            export::add(daemon, &mut arguments).await?;
        }
        Arg::Object(options) => object::add(daemon, Arguments::new(options))?,
        Arg::ObjectHelp(text) => return Ok(Some(text)),
        Arg::PidFile(_) => {}
    }
    Ok(None)
}

/// Whether a block node anywhere in these options says that nothing is below it by an empty name.
pub fn has_empty_backing(options: &Object) -> bool {
    options.iter().any(|(name, value)| match value {
        Value::Str(text) => name == "backing" && text.is_empty(),
        Value::Object(inner) => has_empty_backing(inner),
        _ => false,
    })
}

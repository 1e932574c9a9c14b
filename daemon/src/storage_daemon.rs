//! `qemu-storage-daemon`: from a command line to a running daemon to its end.

use std::io;
use std::path::Path;
use std::sync::Arc;

use underlay_sys::process::{self, Birth, PidFile};
use underlay_sys::rt;
use underlay_sys::signal::Ending;
use underlay_sys::thread::block_on;

use crate::args::{Arg, CommandLine, HELP, parse};
use crate::chardev::{self, Chardevs};
use crate::command::arguments::Arguments;
use crate::command::{blockdev, export};
use crate::error::{CommandError, CommandResult};
use crate::monitor;
use crate::state::Daemon;

/// Runs the daemon to its end; the exit status.
pub fn main(program: &str, words: &[String]) -> i32 {
    let name = Path::new(program).file_name().map_or(program.into(), |name| name.to_string_lossy());
    match parse(words) {
        Err(error) => fail(&name, &error),
        Ok(CommandLine::Help) => {
            print!("{}", HELP.replace("%s", program));
            0
        }
        Ok(CommandLine::Version) => {
            println!("qemu-storage-daemon version 10.0.2 (Underlay {})", env!("CARGO_PKG_VERSION"));
            println!("Copyright (c) 2026 The Underlay authors; the interface is that of QEMU 10.0.2");
            0
        }
        Ok(CommandLine::Run(args)) => run(&args).map_or_else(|error| fail(&name, &error), |()| 0),
    }
}

fn fail(name: &str, error: &str) -> i32 {
    eprintln!("{name}: {error}");
    1
}

fn run(args: &[(String, Arg)]) -> Result<(), String> {
    let ending = Ending::hold_back().map_err(|error| format!("cannot handle signals: {error}"))?;
    // Forking must come before the first thread.
    let birth = if args.iter().any(|(_, arg)| *arg == Arg::Daemonize) {
        Some(process::daemonize().map_err(|error| format!("cannot daemonize: {error}"))?)
    } else {
        None
    };
    let daemon = Daemon::start().map_err(|error| format!("cannot start the I/O threads: {error}"))?;
    block_on(serve(daemon, args, ending, birth))
}

async fn serve(
    daemon: Arc<Daemon>,
    args: &[(String, Arg)],
    ending: Ending,
    birth: Option<Birth>,
) -> Result<(), String> {
    let ready = set_up(&daemon, args).await;
    if let (Ok(_), Some(birth)) = (&ready, birth) {
        birth.succeeded().map_err(|error: io::Error| format!("cannot daemonize: {error}"))?;
    }
    // Kept until the end: the pid file goes with it.
    let kept = match ready {
        Ok(pid_file) => {
            let quit = daemon.quit.clone();
            rt::spawn(async move {
                if ending.wait().await.is_ok() {
                    quit.raise();
                }
            });
            daemon.quit.raised().await;
            Ok(pid_file)
        }
        Err(error) => Err(error),
    };
    daemon.shut_down().await;
    monitor::last_words(&daemon).await;
    kept.map(drop)
}

/// Carries out the options in their order.
async fn set_up(daemon: &Arc<Daemon>, args: &[(String, Arg)]) -> Result<Option<PidFile>, String> {
    let mut chardevs = Chardevs::default();
    let mut pid_file = None;
    for (typed, arg) in args {
        match arg {
            Arg::PidFile(path) => pid_file = Some(path.clone()),
            arg => carry_out(daemon, &mut chardevs, arg.clone())
                .await
                .map_err(|error| format!("{typed}: {}", error.in_full()))?,
        }
    }
    let Some(path) = pid_file else { return Ok(None) };
    let created = PidFile::create(Path::new(&path));
    created.map(Some).map_err(|error| {
        let reason = underlay_graph::error::strerror(error.raw_os_error().unwrap_or(5));
        format!("cannot create PID file: Could not create '{path}': {reason}")
    })
}

async fn carry_out(daemon: &Arc<Daemon>, chardevs: &mut Chardevs, arg: Arg) -> CommandResult<()> {
    match arg {
        Arg::Blockdev(options) => {
            blockdev::add(daemon, options).await?;
        }
        Arg::Chardev(options) => chardevs.add(options).await?,
        Arg::Monitor(options) => {
            let (id, pretty) = chardev::monitor(Arguments::new(options))?;
            monitor::serve(daemon, chardevs.take(&id)?, pretty);
        }
        Arg::NbdServer(options) => nbd_server(daemon, Arguments::new(options))?,
        Arg::Export(options) => {
            let mut arguments = Arguments::new(options);
            arguments.optional_text("type");
            export::add(daemon, &mut arguments).await?;
        }
        Arg::PidFile(_) | Arg::Daemonize => {}
    }
    Ok(())
}

/// `--nbd-server`: as nbd-server-start, but the address has no `data` in between.
fn nbd_server(daemon: &Daemon, mut options: Arguments) -> CommandResult<()> {
    let missing = |name: &str| CommandError::new(format!("Parameter '{name}' is missing"));
    let mut address = options.object("addr").ok_or_else(|| missing("addr"))?;
    let kind = address.optional_text("type").ok_or_else(|| missing("addr.type"))?;
    let needed: &[&str] = match kind.as_str() {
        "unix" => &["path"],
        "inet" => &["host", "port"],
        "fd" => &["str"],
        _ => &[],
    };
    if let Some(name) = needed.iter().find(|name| !address.has(name)) {
        return Err(missing(&format!("addr.{name}")));
    }
    let address = export::socket_address(&kind, &mut address)?;
    let mut limits = Arguments::new(Object::new());
    for name in ["max-connections", "handshake-max-seconds"] {
        if let Some(text) = options.optional_text(name) {
            let number: i64 = text
                .parse()
                .map_err(|_| CommandError::new(format!("Parameter '{name}' expects a number")))?;
            limits = Arguments::new(limits.rest().with(name, number));
        }
    }
    match options.rest().iter().next() {
        Some((name @ ("tls-creds" | "tls-authz"), _)) => {
            Err(CommandError::new(format!("Parameter '{name}': TLS is not supported yet")))
        }
        Some((name, _)) => Err(CommandError::new(format!("Parameter '{name}' is unexpected"))),
        None => export::start_at(daemon, &address, &mut limits),
    }
}

use underlay_qmp::json::Object;

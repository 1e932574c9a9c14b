//! The life of a daemon from its command line to its end, whichever program it is.

use std::io;
use std::path::Path;
use std::sync::Arc;

use underlay_graph::Graph;
use underlay_sys::process::{self, Birth, PidFile};
use underlay_sys::rt;
use underlay_sys::signal::Ending;
use underlay_sys::thread::block_on;

use crate::chardev::terminal;
use crate::monitor;
use crate::state::{Daemon, Why};

/// What the options have led to.
pub enum Ready {
    /// Everything is set up; the file goes at the end.
    Running(#[expect(dead_code, reason = "held")] Option<PidFile>),
    /// A question was answered.
    Answered,
}

/// Runs a daemon that `start` makes and `set_up` sets up.
pub fn run<F>(
    daemonize: bool,
    start: impl FnOnce() -> io::Result<Arc<Daemon>>,
    set_up: impl FnOnce(Arc<Daemon>) -> F,
) -> Result<(), String>
where
    F: Future<Output = Result<Ready, String>>,
{
    let ending = Ending::hold_back().map_err(|error| format!("cannot handle signals: {error}"))?;
    // Forking must come before the first thread.
    let birth = if daemonize {
        Some(process::daemonize().map_err(|error| format!("cannot daemonize: {error}"))?)
    } else {
        None
    };
    let daemon = start().map_err(|error| format!("cannot start the I/O threads: {error}"))?;
    let done = block_on(serve(daemon.clone(), set_up(daemon), ending, birth));
    terminal::give_back();
    done
}

async fn serve(
    daemon: Arc<Daemon>,
    set_up: impl Future<Output = Result<Ready, String>>,
    ending: Ending,
    birth: Option<Birth>,
) -> Result<(), String> {
    let ready = set_up.await;
    if let (Ok(_), Some(birth)) = (&ready, birth) {
        birth.succeeded().map_err(|error: io::Error| format!("cannot daemonize: {error}"))?;
    }
    if let Ok(Ready::Running(_)) = &ready {
        daemon.ready.raise();
        rt::spawn(Graph::refresh_bitmaps_for_ever(Arc::downgrade(&daemon.graph)));
        let ended = daemon.clone();
        rt::spawn(async move {
            if ending.wait().await.is_ok() {
                ended.end(Why::Signal);
            }
        });
        daemon.quit.raised().await;
    }
    daemon.shut_down().await;
    monitor::last_words(&daemon).await;
    // The pid file was kept until here.
    ready.map(drop)
}

/// Writes the process number, if that is wanted.
pub fn keep_pid(path: Option<String>) -> Result<Ready, String> {
    let Some(path) = path else { return Ok(Ready::Running(None)) };
    let created = PidFile::create(Path::new(&path));
    created.map(|file| Ready::Running(Some(file))).map_err(|error| {
        let reason = underlay_graph::error::strerror(error.raw_os_error().unwrap_or(5));
        format!("cannot create PID file: Could not create '{path}': {reason}")
    })
}

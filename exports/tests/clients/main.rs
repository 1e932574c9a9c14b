//! The server against clients that others wrote: libnbd's tools, QEMU's tools, fio; and against clients that
//! nobody would want. Tests of programs that are not installed say so and pass.
#![forbid(unsafe_code)]

mod hostile;
mod programs;
#[path = "../../examples/nbd_null/ram.rs"]
mod ram;
mod removal;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use tempfile::TempDir;
use underlay_exports::nbd::{NbdExport, NbdServer, ServerOptions};
use underlay_nbd::blocking::{Client, Server};
use underlay_sys::net::Address;
use underlay_sys::thread::{IoThread, block_on};

/// Bytes of the disk.
const SIZE: usize = 8 << 20;

/// A server with the exports `disk` and (read-only) `ro`, both of the same disk in memory.
struct World {
    server: NbdServer,
    dir: TempDir,
    // After the server, which needs them to stop.
    _threads: [IoThread; 2],
}

impl World {
    fn new() -> Self {
        Self::with(ServerOptions::default(), false)
    }

    /// `slow`: no request is done at once.
    fn with(options: ServerOptions, slow: bool) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let threads = ["io0", "io1"].map(|name| IoThread::start(name).expect("a thread"));
        let spawners = threads.iter().map(IoThread::spawner).collect();
        let address = Address::Unix(dir.path().join("nbd.sock"));
        let server = NbdServer::start(&address, options, spawners).expect("the server starts");
        let disk = ram::Ram::new(SIZE, slow, 1);
        for (name, writable) in [("disk", true), ("ro", false)] {
            server
                .add(NbdExport {
                    id: format!("id-{name}"),
                    name: name.into(),
                    description: format!("the {name}"),
                    root: block_on(ram::root(disk.clone())),
                    guest: None,
                    writable,
                    writethrough: false,
                    allocation_depth: true,
                    bitmaps: Vec::new(),
                })
                .expect("a new name");
        }
        Self { server, dir, _threads: threads }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("nbd.sock")
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    fn client(&self, export: &str) -> std::io::Result<Client> {
        Client::connect(&Server::unix(self.socket()), export, &["base:allocation", "qemu:allocation-depth"])
    }

    /// A file with a pattern in the first half, a hole in the third quarter, and a pattern again.
    fn patterned_file(&self, name: &str) -> PathBuf {
        let mut bytes = pattern(SIZE, 17);
        bytes[SIZE / 2..SIZE / 4 * 3].fill(0);
        let path = self.path(name);
        std::fs::File::create(&path).and_then(|mut file| file.write_all(&bytes)).expect("written");
        path
    }
}

/// A short timeout for tests that wait for it; long enough for honest clients on a busy machine.
fn impatient() -> ServerOptions {
    ServerOptions { handshake_timeout: Duration::from_millis(700), ..ServerOptions::default() }
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let step = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[7]
    };
    std::iter::repeat_with(step).take(len).collect()
}

/// Runs a program; `None` when it is not installed.
fn run(program: &str, args: &[&str]) -> Option<Output> {
    match Command::new(program).args(args).output() {
        Ok(output) => Some(output),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("{program} is not installed; nothing tested");
            None
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

/// Runs a program that must succeed, and gives its standard output; `None` when it is not installed.
fn good(program: &str, args: &[&str]) -> Option<String> {
    let output = run(program, args)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {}{}", text(&output.stdout), text(&output.stderr));
    Some(text(&output.stdout))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

//! The tour: a daemon, a guest that never stops writing and verifying, and a chain of images that is made,
//! streamed, committed, mirrored, backed up and moved to another daemon under it, case by case as in "Live Block Device
//! Operations"; and a daemon that is killed between the backups of a disk.
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod cases;
mod guest;
mod incremental;
mod moments;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use underlay_qcow2::CreateOptions;
use underlay_qmp::blocking::Monitor;
use underlay_qmp::json::{Object, Value};
use underlay_sys::{complain, say, say_part, thread::block_on};

use cases::{CASES, Case, End};
use guest::{Account, Guest};
use moments::{Copied, Far};

const HELP: &str = "\
Usage: underlay tour

Makes a chain of disk images live in a temporary folder, streams and commits it in eight ways, mirrors it in three, backs
it up in two and moves it to a second daemon, and makes incremental backups across a crash, while a guest keeps writing and verifying over NBD, and verifies every byte.
Exit status 1 if anything differs.
";

/// Size of the guest's disk, in bytes.
const DISK: u64 = 64 << 20;
/// Requests that the guest is served on each layer before the next snapshot.
const PER_LAYER: u64 = 1500;

/// Runs the tour; the exit status.
pub fn main(words: &[String]) -> i32 {
    match words {
        [] => {}
        [word] if word == "--help" || word == "-h" => {
            say_part!("{HELP}");
            return 0;
        }
        [word, ..] => {
            complain!("underlay tour: unexpected argument '{word}'");
            return 1;
        }
    }
    match tour() {
        Ok(true) => 0,
        Ok(false) => 1,
        Err(error) => {
            complain!("underlay tour: {error}");
            1
        }
    }
}

/// A daemon of our own, ended when it goes.
struct Daemon {
    child: Child,
}

impl Daemon {
    /// Its sockets are called NAMEqmp.sock and NAMEnbd.sock.
    fn start(folder: &Path, name: &str) -> Result<Self, String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut command = Command::new(program);
        command.arg("storage-daemon").current_dir(folder).stdout(Stdio::null());
        let monitor = format!("socket,id=m,path={name}qmp.sock,server=on,wait=off");
        command.args(["--chardev", &monitor, "--monitor", "m"]);
        command.args(["--nbd-server", &format!("addr.type=unix,addr.path={name}nbd.sock")]);
        Ok(Self { child: command.spawn().map_err(|error| format!("cannot start the daemon: {error}"))? })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What all cases together did.
#[derive(Default)]
struct Summary {
    guest: Account,
    copied: u64,
    wrong_chains: u32,
}

fn tour() -> Result<bool, String> {
    let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
    say!("Underlay's tour, in {}", folder.path().display());
    let begun = Instant::now();
    let mut daemon = Daemon::start(folder.path(), "")?;
    let mut monitor = Monitor::connect(&folder.path().join("qmp.sock"))?;
    let mut summary = Summary::default();
    for (number, case) in CASES.iter().enumerate() {
        let stop = Stop { folder: folder.path().to_owned(), number };
        stop.visit(&mut monitor, case, &mut summary)?;
    }
    incremental::visit(folder.path(), &mut summary)?;
    monitor.execute("quit", Object::new())?;
    let ended = daemon.child.wait().map_err(|error| format!("the daemon: {error}"))?;
    let errors = summary.guest.errors + u64::from(summary.wrong_chains) + u64::from(!ended.success());
    say!();
    say!("chain data copied by jobs   {}", HumanBytes(summary.copied));
    say!("guest requests served       {}", HumanCount(summary.guest.requests));
    say!("time                        {:.1} s", begun.elapsed().as_secs_f64());
    say!("{errors} errors");
    Ok(errors == 0)
}

/// One stop of the tour.
struct Stop {
    folder: PathBuf,
    number: usize,
}

impl Stop {
    fn node(&self, letter: &str) -> String {
        format!("node-{letter}{}", self.number + 1)
    }

    fn file(&self, letter: &str) -> String {
        format!("{}{}.qcow2", letter.to_lowercase(), self.number + 1)
    }

    fn visit(&self, monitor: &mut Monitor, case: &Case, summary: &mut Summary) -> Result<(), String> {
        say!("\n== {}", case.title);
        let guest = self.make_chain(monitor)?;
        say!("   before  {}", show(&self.chain(monitor)?));
        let (begun, served) = (Instant::now(), guest.requests());
        let Copied { bytes: copied, wrong, far } = match case.end {
            End::Itself | End::Complete => {
                Copied { bytes: self.run_job(monitor, case)?, ..Copied::default() }
            }
            _ => self.copy_a_moment(monitor, case, &guest)?,
        };
        let (took, served) = (begun.elapsed().as_secs_f64(), guest.requests() - served);
        let chain = self.chain(monitor)?;
        say!("   after   {}", show(&chain));
        guest.work(PER_LAYER / 4);
        let account = guest.finish()?;
        let ended = far.map_or(Ok(true), Far::end)?;
        let wanted: Vec<String> = case.result.chars().map(|letter| letter.to_string()).collect();
        let right = chain == wanted && ended;
        let verdict =
            if right && account.errors + wrong == 0 { "every byte as it must be" } else { "DIFFERENT" };
        say!("   {} in {took:.2} s, {served} guest requests meanwhile; {verdict}", HumanBytes(copied));
        summary.guest.requests += account.requests;
        summary.guest.errors += account.errors + wrong;
        summary.copied += copied;
        summary.wrong_chains += u32::from(!right);
        // The guest has said goodbye, but the server may not have heard it yet.
        monitor.execute("block-export-del", Object::new().with("id", "guest").with("mode", "hard"))?;
        monitor.execute("blockdev-del", Object::new().with("node-name", self.node("A")))?;
        Ok(())
    }

    /// A <- B <- C <- D, made by live snapshots under the guest, with something of the guest's in each.
    fn make_chain(&self, monitor: &mut Monitor) -> Result<Guest, String> {
        let base = self.folder.join(self.file("A"));
        let (base, options) = (base.to_string_lossy(), CreateOptions::new(DISK));
        block_on(underlay_drivers::create::qcow2(&base, &options)).map_err(|error| error.to_string())?;
        let file = Object::new().with("driver", "file").with("filename", self.file("A"));
        let add = Object::new().with("driver", "qcow2").with("node-name", self.node("A")).with("file", file);
        monitor.execute("blockdev-add", add.with("discard", "unmap"))?;
        let export = Object::new().with("type", "nbd").with("id", "guest").with("node-name", self.node("A"));
        monitor.execute("block-export-add", export.with("name", "disk").with("writable", true))?;
        let seed = 0x9e37_79b9_7f4a_7c15 ^ (self.number as u64 + 1);
        let guest = Guest::start(&self.folder.join("nbd.sock"), "disk", seed)?;
        for (below, above) in [("A", "B"), ("B", "C"), ("C", "D")] {
            guest.work(PER_LAYER);
            let snapshot = Object::new()
                .with("node-name", self.node(below))
                .with("snapshot-file", self.file(above))
                .with("snapshot-node-name", self.node(above))
                .with("format", "qcow2");
            monitor.execute("blockdev-snapshot-sync", snapshot)?;
        }
        guest.work(PER_LAYER);
        Ok(guest)
    }

    /// Runs the case's job to its end; the bytes it went through.
    fn run_job(&self, monitor: &mut Monitor, case: &Case) -> Result<u64, String> {
        self.start_job(monitor, case)?;
        if self.watch_job(monitor, case.end == End::Complete)? {
            monitor.execute("block-job-complete", Object::new().with("device", "job0"))?;
        }
        job_end(monitor, case)
    }

    fn start_job(&self, monitor: &mut Monitor, case: &Case) -> Result<(), String> {
        let mut arguments = Object::new().with("job-id", "job0");
        for (name, value) in case.arguments {
            let value = match *name {
                "target" if value.len() == 1 => self.file(value),
                "device" | "node-name" | "base-node" | "top-node" => self.node(value),
                _ => (*value).to_owned(),
            };
            arguments.insert(name, value);
        }
        monitor.execute(case.command, arguments)?;
        Ok(())
    }

    /// Shows how far the job is, until it is over or, if it gets ready, that: whether it is ready.
    fn watch_job(&self, monitor: &mut Monitor, gets_ready: bool) -> Result<bool, String> {
        let bar = ProgressBar::new(DISK);
        let style = ProgressStyle::with_template("   {bar:40} {bytes}/{total_bytes}");
        bar.set_style(style.map_err(|error| error.to_string())?);
        loop {
            let jobs = monitor.execute("query-block-jobs", Object::new())?;
            let job = jobs.as_list().and_then(|jobs| jobs.first()?.as_object());
            let number = |name: &str| job.and_then(|job| job.get(name)?.as_u64()).unwrap_or(0);
            bar.set_length(number("len"));
            bar.set_position(number("offset"));
            let ready = gets_ready && job.and_then(|job| job.get("ready")) == Some(&Value::Bool(true));
            if ready || job.is_none() {
                bar.finish_and_clear();
                return Ok(ready);
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    /// The letters of the chain below the guest's export, base first.
    fn chain(&self, monitor: &mut Monitor) -> Result<Vec<String>, String> {
        let exports = monitor.execute("query-block-exports", Object::new())?;
        let top = exports.as_list().and_then(|list| list.first()?.as_object()?.get("node-name")?.as_str());
        let top = top.unwrap_or_default().to_owned();
        let flat = Object::new().with("flat", true);
        let nodes = monitor.execute("query-named-block-nodes", flat)?;
        let text = |node: &Object, name: &str| node.get(name).and_then(Value::as_str).map(str::to_owned);
        let nodes: Vec<&Object> =
            nodes.as_list().unwrap_or_default().iter().filter_map(Value::as_object).collect();
        let mut chain = Vec::new();
        let mut at = nodes.iter().find(|node| text(node, "node-name").as_deref() == Some(&top));
        while let Some(node) = at {
            let name = text(node, "node-name").unwrap_or_default();
            chain.push(name.chars().nth(5).map(String::from).unwrap_or_default());
            let below = text(node, "backing_file");
            at = nodes.iter().find(|node| {
                below.is_some()
                    && text(node, "file") == below
                    && text(node, "drv").as_deref() == Some("qcow2")
            });
        }
        chain.reverse();
        Ok(chain)
    }
}

/// Waits for the end of the job; the bytes it went through.
fn job_end(monitor: &mut Monitor, case: &Case) -> Result<u64, String> {
    let done = monitor.event("BLOCK_JOB_COMPLETED", "device", "job0")?;
    if let Some(error) = done.get("error").and_then(Value::as_str) {
        return Err(format!("{}: {error}", case.command));
    }
    monitor.event("JOB_STATUS_CHANGE", "status", "null")?;
    Ok(done.get("offset").and_then(Value::as_u64).unwrap_or(0))
}

fn show(chain: &[String]) -> String {
    chain.iter().map(|letter| format!("[{letter}]")).collect::<Vec<_>>().join(" <-- ")
}

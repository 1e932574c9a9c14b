//! The daemon: started, killed, started again.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use underlay_nbd::blocking::{Client, Server};
use underlay_qmp::blocking::Monitor;
use underlay_qmp::json::{Object, Value};

use crate::plan::{Moment, Plan};

/// How long a daemon may take to start or to end, and locks of a killed one to go: the kernel takes its requests down
/// in its own time.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How long a daemon may live: a round takes a second or two. One that hangs is killed, and the round fails.
const LIFE: Duration = Duration::from_secs(120);

/// How long the moment of a kill is waited for.
const LONGEST: Duration = Duration::from_secs(5);

/// A running daemon. Killed when it goes.
pub struct Daemon {
    child: Arc<Mutex<Child>>,
    folder: PathBuf,
    /// It lived too long.
    hung: Arc<AtomicBool>,
    /// Who watches over that: until this goes.
    _watch: Sender<()>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let mut child = lock(&self.child);
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn lock(child: &Mutex<Child>) -> std::sync::MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Daemon {
    /// Starts `program` on the image `top` (a file name in `folder`) as the node `node`, exported to a guest, and
    /// connects a monitor. Tries again while somebody else still has a lock.
    pub fn start(
        program: &Path,
        folder: &Path,
        plan: &Plan,
        top: &str,
        node: &str,
    ) -> Result<(Self, Monitor), String> {
        let begun = Instant::now();
        let blockdev = Value::Object(blockdev(plan, top, node)).to_string();
        loop {
            let daemon = Self::spawn(program, folder, &blockdev, node)?;
            match daemon.connect() {
                Ok(monitor) => return Ok((daemon, monitor)),
                Err(said) if said.contains(" lock") && begun.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(said) => return Err(said),
            }
        }
    }

    fn spawn(program: &Path, folder: &Path, blockdev: &str, node: &str) -> Result<Self, String> {
        let said = File::create(folder.join("daemon.err")).map_err(|error| error.to_string())?;
        let mut command = Command::new(program);
        if !is_storage_daemon(program) {
            command.arg("storage-daemon");
        }
        command.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
        command.args(["--blockdev", blockdev, "--nbd-server", "addr.type=unix,addr.path=nbd.sock"]);
        command.args(["--export", &format!("type=nbd,id=guest,node-name={node},name=disk,writable=on")]);
        command.args(["--chardev", "socket,id=m,path=qmp.sock,server=on,wait=off", "--monitor", "m"]);
        let child = command.spawn().map_err(|error| format!("{}: {error}", program.display()))?;
        let (child, hung) = (Arc::new(Mutex::new(child)), Arc::new(AtomicBool::new(false)));
        let (watch, gone) = mpsc::channel();
        let (child_too, hung_too) = (child.clone(), hung.clone());
        std::thread::spawn(move || {
            if gone.recv_timeout(LIFE) == Err(RecvTimeoutError::Timeout) {
                hung_too.store(true, Ordering::Relaxed);
                let _ = lock(&child_too).kill();
            }
        });
        Ok(Self { child, folder: folder.to_owned(), hung, _watch: watch })
    }

    /// Whether it had to be killed because it did not answer or did not end.
    pub fn hung(&self) -> bool {
        self.hung.load(Ordering::Relaxed)
    }

    /// The monitor, or what the daemon said when it ended instead.
    fn connect(&self) -> Result<Monitor, String> {
        let begun = Instant::now();
        loop {
            // The socket of the daemon before this one may still lie there: nobody listens on it.
            if let Ok(stream) = UnixStream::connect(self.folder.join("qmp.sock")) {
                return Ok(Monitor::negotiate(stream)?);
            }
            if let Ok(Some(status)) = lock(&self.child).try_wait() {
                let said = std::fs::read_to_string(self.folder.join("daemon.err")).unwrap_or_default();
                return Err(format!("the daemon does not start ({status}): {}", said.trim()));
            }
            if begun.elapsed() > PATIENCE {
                return Err("the daemon does not listen".to_owned());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Where the guest connects.
    pub fn nbd(&self) -> PathBuf {
        self.folder.join("nbd.sock")
    }

    /// A client of the export.
    pub fn client(&self) -> Result<Client, String> {
        Client::connect(&Server::unix(self.nbd()), "disk", &[])
            .map_err(|error| format!("the export: {error}"))
    }

    /// Ends the daemon as one should.
    pub fn quit(self, mut monitor: Monitor) -> Result<(), String> {
        monitor.execute("quit", Object::new())?;
        let begun = Instant::now();
        loop {
            match lock(&self.child).try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(format!("the daemon ended with {status}")),
                Ok(None) if begun.elapsed() < PATIENCE => {}
                Ok(None) => return Err("the daemon does not end".to_owned()),
                Err(error) => return Err(error.to_string()),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Who kills it when the plan says so.
    pub fn killer(&self, plan: &Plan) -> Killer {
        Killer { child: self.child.clone(), moment: plan.moment, delay: plan.delay, clock: None }
    }
}

/// Kills a daemon some time after a moment.
pub struct Killer {
    child: Arc<Mutex<Child>>,
    moment: Moment,
    delay: Duration,
    clock: Option<JoinHandle<()>>,
}

impl Killer {
    /// Starts the clock if this is the moment.
    pub fn reached(&mut self, moment: Moment) {
        if moment == self.moment && self.clock.is_none() {
            self.start(self.delay);
        } else if moment == Moment::Issued {
            // The other moment may never come: an active commit can run after its guest for ever.
            kill_after(self.child.clone(), LONGEST);
        }
    }

    /// Waits until the daemon is dead. The moment that has not come will not come any more.
    pub fn finish(mut self) -> Result<(), String> {
        if self.clock.is_none() {
            self.start(Duration::ZERO);
        }
        if let Some(clock) = self.clock {
            clock.join().map_err(|_| "the killer panicked".to_owned())?;
        }
        let status: ExitStatus = lock(&self.child).wait().map_err(|error| error.to_string())?;
        match status.signal() {
            Some(9) => Ok(()),
            _ => Err(format!("the daemon ended by itself: {status}")),
        }
    }

    fn start(&mut self, delay: Duration) {
        self.clock = Some(kill_after(self.child.clone(), delay));
    }
}

fn kill_after(child: Arc<Mutex<Child>>, delay: Duration) -> JoinHandle<()> {
    std::thread::spawn(move || {
        std::thread::sleep(delay);
        // A daemon that has ended by itself is no more there to be killed; its status tells.
        let _ = lock(&child).kill();
    })
}

/// Whether the program is a storage daemon under that name, as QEMU's; else it is `underlay`.
pub fn is_storage_daemon(program: &Path) -> bool {
    program.file_name().is_some_and(|name| name.to_string_lossy().contains("storage-daemon"))
}

/// The arguments that open an image (a raw one if it is called so), with the backing files that its header names.
pub fn blockdev(plan: &Plan, image: &str, node: &str) -> Object {
    let cache = Object::new().with("direct", plan.direct);
    let file = Object::new().with("driver", "file").with("filename", image).with("cache", cache.clone());
    let driver = if image.ends_with(".raw") { "raw" } else { "qcow2" };
    let image = Object::new().with("driver", driver).with("node-name", node).with("file", file);
    image.with("cache", cache).with("discard", plan.discard)
}

//! A storage daemon of either side, with a monitor and an NBD server.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use underlay_nbd::blocking::{Client, Server};
use underlay_qmp::blocking::Monitor;
use underlay_qmp::json::{Object, Value};

use crate::measure::{Outcome, Sample};
use crate::rows::Bench;
use crate::side::Side;

/// See the module. It is killed when dropped.
pub struct Daemon {
    child: Child,
    socket: PathBuf,
    pub monitor: Monitor,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Who has not ended by then hangs.
const LONGEST_END: Duration = Duration::from_secs(20);

/// Ticks of the kernel's processor accounting in a second; fixed for user space on Linux.
const TICKS: f64 = 100.0;

impl Daemon {
    /// Opens `chain`, base first, and exports its top as `disk`; the nodes are called `n0` and so on.
    pub fn start(bench: &Bench, side: Side, chain: &[PathBuf], format: &str) -> Outcome<Self> {
        let (socket, monitor) = (bench.folder.join("nbd.sock"), bench.folder.join("qmp.sock"));
        for left_behind in [&socket, &monitor] {
            // Mostly there is none.
            let _ = std::fs::remove_file(left_behind);
        }
        let mut command = bench.programs.command(side, "storage-daemon");
        for (index, path) in chain.iter().enumerate() {
            let file = Object::new().with("driver", "file").with("filename", path.to_string_lossy().as_ref());
            let mut node = Object::new().with("driver", format).with("node-name", format!("n{index}"));
            node.insert("file", Value::Object(file));
            node.insert("discard", "unmap");
            if format == "qcow2" {
                let backing = index.checked_sub(1).map_or(Value::Null, |below| format!("n{below}").into());
                node.insert("backing", backing);
            }
            command.arg("--blockdev").arg(Value::Object(node).to_string());
        }
        command
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={},max-connections=0", socket.display()));
        if let Some(top) = chain.len().checked_sub(1) {
            command.arg("--export").arg(format!("type=nbd,id=e,node-name=n{top},name=disk,writable=on"));
        }
        let path = monitor.display();
        command
            .arg("--chardev")
            .arg(format!("socket,id=m,path={path},server=on,wait=off"))
            .args(["--monitor", "m"]);
        // It tells of the images that it makes.
        let child = command.stdout(std::process::Stdio::null()).spawn()?;
        let monitor = Monitor::connect(&monitor)?;
        Ok(Self { child, socket, monitor })
    }

    /// Another connection to the disk.
    pub fn connect(&self) -> Outcome<Client> {
        Ok(Client::connect(&Server::unix(&self.socket), "disk", &[])?)
    }

    /// Where its images are.
    pub fn folder(&self) -> &Path {
        self.socket.parent().unwrap_or(Path::new("."))
    }

    /// The path of its NBD server.
    pub fn nbd_socket(&self) -> String {
        self.socket.to_string_lossy().into_owned()
    }

    /// Ends it, and waits for the end. QEMU's sometimes hangs.
    pub fn quit(mut self) -> Outcome<()> {
        self.execute("quit", Object::new())?;
        let begun = Instant::now();
        while self.child.try_wait()?.is_none() {
            if begun.elapsed() > LONGEST_END {
                return Err("it does not end".into());
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    fn proc(&self, file: &str) -> Outcome<String> {
        Ok(std::fs::read_to_string(Path::new("/proc").join(self.child.id().to_string()).join(file))?)
    }

    /// Seconds of processor time so far.
    pub fn cpu(&self) -> Outcome<f64> {
        let stat = self.proc("stat")?;
        // Behind the name in brackets, user and system time are the 12th and 13th field.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        Ok((ticks(11) + ticks(12)) / TICKS)
    }

    /// A line of its memory accounting (`VmHWM`, `VmRSS`), in MiB.
    pub fn memory(&self, what: &str) -> Outcome<f64> {
        let status = self.proc("status")?;
        let line = status.lines().find(|line| line.starts_with(what)).ok_or("no such line")?;
        let kib: f64 = line.split_whitespace().nth(1).unwrap_or_default().parse()?;
        Ok(kib / 1024.0)
    }

    /// Measures `work`: its value, and what the daemon needed for it.
    pub fn measure(&mut self, work: impl FnOnce(&mut Self) -> Outcome<f64>) -> Outcome<Sample> {
        let before = self.cpu()?;
        let value = work(self)?;
        Ok(Sample { value, cpu: self.cpu()? - before, peak: self.memory("VmHWM")? })
    }

    /// Executes a command.
    pub fn execute(&mut self, command: &str, arguments: Object) -> Outcome<()> {
        self.monitor.execute(command, arguments)?;
        Ok(())
    }

    /// Runs a job called `j` to its end; seconds.
    pub fn job(&mut self, command: &str, arguments: &Object) -> Outcome<f64> {
        let begun = Instant::now();
        self.execute(command, arguments.clone().with("job-id", "j"))?;
        let completed = self.monitor.event("BLOCK_JOB_COMPLETED", "device", "j")?;
        match completed.get("error") {
            None => Ok(begun.elapsed().as_secs_f64()),
            Some(error) => Err(format!("{command}: {error:?}").into()),
        }
    }
}

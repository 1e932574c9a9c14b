//! Storage migration as the specification has it ("live storage migration with drive-mirror + NBD"), between two
//! daemons on one machine, over TCP and over UNIX sockets, with the reference's daemon as the destination and as the
//! source: a guest writes until the disk is on the other side, and goes on there. And between two machines, whose
//! guests come to their devices.

use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use underlay_nbd::blocking::{Client, Server};
use underlay_qmp::blocking::Monitor;
use underlay_qmp::json::Object;

const SIZE: usize = 8 << 20;
const OURS: &str = env!("CARGO_BIN_EXE_underlay");
const THEIRS: &str = "qemu-storage-daemon";
/// Our machine, with the image in a device.
const MACHINE: &str = "machine";

/// A daemon on one image of the folder, as the node `node`.
struct Daemon {
    is_machine: bool,
    child: Child,
    monitor: Monitor,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    /// It is the one that connects: the reference's loses what is sent to it before its monitor is there.
    fn start(program: &str, folder: &Path, image: &str, node: &str) -> Self {
        let socket = folder.join(format!("{node}.sock"));
        let listener = UnixListener::bind(&socket).expect("a socket");
        let is_machine = program == MACHINE;
        let mut command = Command::new(if is_machine { OURS } else { program });
        match program {
            OURS => drop(command.arg("storage-daemon")),
            MACHINE => drop(command.args(["machine", "-nodefaults", "-display", "none"])),
            _ => {}
        }
        let image = format!(
            "node-name={node},driver=qcow2,file.driver=file,file.node-name=file,file.filename={image}"
        );
        command.current_dir(folder).args(["--blockdev", &image]);
        command.args(["--chardev", &format!("socket,id=m,path={node}.sock")]);
        match is_machine {
            false => drop(command.args(["--monitor", "m"])),
            true => {
                let device = format!("virtio-blk,drive={node},id=virtio0");
                command.args(["-mon", "m,mode=control", "-device", &device]);
            }
        }
        if is_machine && node == "node-TargetDisk" {
            command.args(["-S", "-incoming", "defer"]);
        }
        let child = command.spawn().expect("the daemon starts");
        let (stream, _) = listener.accept().expect("it connects");
        Self { is_machine, child, monitor: Monitor::negotiate(stream).expect("a monitor") }
    }

    fn execute(&mut self, command: &str, arguments: Object) {
        self.monitor.execute(command, arguments).unwrap_or_else(|error| panic!("{error}"));
    }

    /// Exports a node on a socket that is named after it; a machine's guest comes to the device.
    fn serve(&mut self, node: &str) {
        let data = Object::new().with("path", format!("{node}.nbd"));
        let address = Object::new().with("type", "unix").with("data", data);
        self.execute("nbd-server-start", Object::new().with("addr", address));
        match self.is_machine {
            false => {
                self.execute("nbd-server-add", Object::new().with("device", node).with("writable", true))
            }
            true => {
                let export = Object::new().with("type", "nbd").with("id", "guest").with("name", node);
                let export = export.with("node-name", "virtio0").with("writable", true);
                self.execute("block-export-add", export);
            }
        }
    }

    fn quit(mut self) {
        self.execute("quit", Object::new());
        assert!(self.child.wait().expect("it ends").success());
    }
}

/// What the two sides speak over.
#[derive(Clone, Copy)]
enum Over {
    Tcp,
    Unix,
}

/// Where the destination's server is.
struct Place {
    /// As `nbd-server-start` wants to know it.
    address: Object,
    /// In the name of the target.
    name: String,
    /// In the options of a node.
    server: Object,
}

fn place(over: Over) -> Place {
    let (kind, data, at) = match over {
        Over::Tcp => {
            // A port that was free a moment ago.
            let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
            let port = port.expect("a port").port().to_string();
            let at = format!("127.0.0.1:{port}");
            ("inet", Object::new().with("host", "127.0.0.1").with("port", port), at)
        }
        Over::Unix => ("unix", Object::new().with("path", "far.sock"), "unix:far.sock".to_owned()),
    };
    let server = data.clone().with("type", kind);
    let address = Object::new().with("type", kind).with("data", data);
    Place { address, name: format!("nbd:{at}:exportname=node-TargetDisk"), server }
}

/// A guest: keeps writing until it is told to stop, and knows what its disk is like.
struct Guest {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: JoinHandle<Vec<u8>>,
}

impl Guest {
    fn start(server: &Server, export: &str) -> Self {
        let mut client = Client::connect(server, export, &[]).expect("the export");
        let mut disk = read_all(&mut client);
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stop_too, written_too) = (stop.clone(), written.clone());
        let thread = std::thread::spawn(move || {
            let mut random = 1_u64;
            while !stop_too.load(Ordering::SeqCst) {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = usize::try_from(random >> 33).expect("31 bits") % (SIZE / 512 - 256) * 512;
                let bytes = random.to_be_bytes().repeat(64 * (1 + usize::from(random.to_be_bytes()[0])));
                client.write(at as u64, &bytes, 0).expect("written");
                disk[at..at + bytes.len()].copy_from_slice(&bytes);
                written_too.fetch_add(1, Ordering::SeqCst);
            }
            client.flush().expect("flushed");
            disk
        });
        Self { stop, written, thread }
    }

    /// Waits until it has written so many times more.
    fn write(&self, more: u64) {
        let until = self.written.load(Ordering::SeqCst) + more;
        while self.written.load(Ordering::SeqCst) < until && !self.thread.is_finished() {
            std::thread::yield_now();
        }
    }

    fn stop(self) -> Vec<u8> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("a guest without errors")
    }
}

fn read_all(client: &mut Client) -> Vec<u8> {
    let piece = 1 << 20;
    let all = (0..SIZE / piece).map(|at| client.read((at * piece) as u64, 1 << 20).expect("read"));
    all.collect::<Vec<_>>().concat()
}

/// Runs one of our tools.
fn tool(folder: &Path, arguments: &[&str]) {
    let status = Command::new(OURS).args(arguments).current_dir(folder).stdout(Stdio::null()).status();
    assert!(status.expect("the tool runs").success(), "{arguments:?}");
}

/// A chain A <- B <- C <- D on one side, and on the other an image on the contents of A to C.
fn make_images(folder: &Path) {
    let create = |image: &str, below: Option<&str>| {
        let (name, size) = (format!("{image}.qcow2"), SIZE.to_string());
        let below = below.map(|below| format!("{below}.qcow2"));
        let backing = below.iter().flat_map(|below| ["-b", below, "-F", "qcow2"]);
        let arguments: Vec<_> = ["img", "create", "-q", "-f", "qcow2"].into_iter().chain(backing).collect();
        tool(folder, &[&arguments[..], &[&name, &size]].concat());
    };
    for (at, (image, below)) in
        [("a", None), ("b", Some("a")), ("c", Some("b")), ("d", Some("c"))].into_iter().enumerate()
    {
        create(image, below);
        let write = format!("write -q -P {} {}k 2M", at + 1, at * 512);
        tool(folder, &["io", "-f", "qcow2", "-c", &write, &format!("{image}.qcow2")]);
    }
    tool(folder, &["img", "convert", "-f", "qcow2", "-O", "qcow2", "c.qcow2", "abc.qcow2"]);
    create("target-disk", Some("abc"));
}

fn is_installed(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok_and(|status| status.success())
}

fn migrate(source: &str, destination: &str, over: Over) {
    if [source, destination].contains(&THEIRS) && !is_installed(THEIRS) {
        println!("not compared: {THEIRS} is not installed (Debian: qemu-utils)");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    make_images(folder);
    let mut source = Daemon::start(source, folder, "d.qcow2", "node-D");
    let mut destination = Daemon::start(destination, folder, "target-disk.qcow2", "node-TargetDisk");
    source.serve("node-D");
    let guest = Guest::start(&Server::unix(folder.join("node-D.nbd")), "node-D");
    guest.write(20);

    // (1) and (2)
    let place = place(over);
    destination.execute("nbd-server-start", Object::new().with("addr", place.address));
    destination
        .execute("nbd-server-add", Object::new().with("device", "node-TargetDisk").with("writable", true));
    // (3)
    let mirror = Object::new().with("device", "node-D").with("target", place.name).with("sync", "top");
    source.execute("drive-mirror", mirror.with("mode", "existing").with("job-id", "job0"));
    // (4)
    source.monitor.event("BLOCK_JOB_READY", "device", "job0").expect("it is ready");
    guest.write(50);
    // The guest is stopped here to go over to the other side.
    let disk = guest.stop();
    source.execute("block-job-cancel", Object::new().with("device", "job0"));
    source.monitor.event("BLOCK_JOB_COMPLETED", "device", "job0").expect("it is done");
    // (5)
    destination.execute("nbd-server-stop", Object::new());
    // (6), for a guest that comes to us.
    if destination.is_machine {
        destination.execute("cont", Object::new());
    }
    destination.serve("node-TargetDisk");
    let guest = Guest::start(&Server::unix(folder.join("node-TargetDisk.nbd")), "node-TargetDisk");
    guest.write(20);
    let later = guest.stop();
    destination.quit();
    source.quit();

    check(folder, "d.qcow2", &disk);
    check(folder, "target-disk.qcow2", &later);
}

/// The image is sound and shows `disk`.
fn check(folder: &Path, image: &str, disk: &[u8]) {
    tool(folder, &["img", "check", "-q", "-f", "qcow2", image]);
    tool(folder, &["img", "convert", "-f", "qcow2", "-O", "raw", image, "raw"]);
    let found = std::fs::read(folder.join("raw")).expect("the disk");
    let differs = found.iter().zip(disk).position(|(a, b)| a != b);
    assert_eq!((found.len(), differs), (SIZE, None), "{image}");
}

fn signal(daemon: &Daemon, signal: &str) {
    let status = Command::new("kill").args([signal, &daemon.child.id().to_string()]).status();
    assert!(status.expect("kill runs").success());
}

#[test]
fn between_two_of_ours() {
    migrate(OURS, OURS, Over::Tcp);
    migrate(OURS, OURS, Over::Unix);
}

#[test]
fn between_two_machines() {
    migrate(MACHINE, MACHINE, Over::Tcp);
    migrate(MACHINE, OURS, Over::Unix);
    migrate(OURS, MACHINE, Over::Unix);
}

#[test]
fn to_the_reference() {
    migrate(OURS, THEIRS, Over::Tcp);
    migrate(OURS, THEIRS, Over::Unix);
}

#[test]
fn from_the_reference() {
    migrate(THEIRS, OURS, Over::Tcp);
    migrate(THEIRS, OURS, Over::Unix);
}

/// The reference hangs here until the server goes on or it is killed.
#[test]
fn a_destination_that_does_not_answer_does_not_keep_a_daemon_from_its_end() {
    for command in ["blockdev-mirror", "blockdev-backup"] {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path();
        make_images(folder);
        let mut source = Daemon::start(OURS, folder, "d.qcow2", "node-D");
        let mut destination = Daemon::start(OURS, folder, "target-disk.qcow2", "node-TargetDisk");
        source.serve("node-D");
        let guest = Guest::start(&Server::unix(folder.join("node-D.nbd")), "node-D");
        let place = place(Over::Unix);
        destination.execute("nbd-server-start", Object::new().with("addr", place.address));
        let export = Object::new().with("device", "node-TargetDisk").with("writable", true);
        destination.execute("nbd-server-add", export);
        let far = Object::new().with("driver", "nbd").with("node-name", "far").with("server", place.server);
        source.execute("blockdev-add", far.with("export", "node-TargetDisk"));
        let job = Object::new().with("device", "node-D").with("target", "far").with("job-id", "job0");
        let job = job.with("sync", "full");
        let disk = if command == "blockdev-mirror" {
            source.execute(command, job);
            source.monitor.event("BLOCK_JOB_READY", "device", "job0").expect("it is ready");
            signal(&destination, "-STOP");
            // What the guest writes cannot be copied any more, but is acknowledged.
            guest.write(20);
            guest.stop()
        } else {
            guest.write(20);
            let disk = guest.stop();
            signal(&destination, "-STOP");
            source.execute(command, job);
            disk
        };
        signal(&source, "-TERM");
        source.monitor.event("BLOCK_JOB_CANCELLED", "device", "job0").expect("it is cancelled");
        assert!(source.child.wait().expect("it ends").success());
        check(folder, "d.qcow2", &disk);
    }
}

//! The persistent bitmaps of a raw disk after a real SIGKILL: they are good if nobody else has written to the disk, and
//! only then.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command};

use underlay_nbd::blocking::{Client, Server};
use underlay_qmp::blocking::Monitor;
use underlay_qmp::json::{Object, Value, parse};

const SIZE: u64 = 16 << 20;

struct Daemon {
    child: Child,
    monitor: Monitor,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn object(text: &str) -> Object {
    match parse(text.as_bytes()) {
        Ok(Value::Object(object)) => object,
        other => panic!("{other:?}"),
    }
}

impl Daemon {
    /// On the disk in a folder, for a guest.
    fn start(folder: &Path) -> Self {
        let _ = std::fs::remove_file(folder.join("qmp.sock"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_underlay"));
        command.arg("storage-daemon").current_dir(folder);
        command.args(["--blockdev", "driver=raw,node-name=disk,file.driver=file,file.filename=disk"]);
        command.args(["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]);
        command.args(["--export", "type=nbd,id=guest,node-name=disk,name=disk,writable=on"]);
        command.args(["--chardev", "socket,id=m,path=qmp.sock,server=on,wait=off", "--monitor", "m"]);
        let child = command.spawn().expect("the daemon starts");
        let monitor = Monitor::connect(&folder.join("qmp.sock")).expect("a monitor");
        Self { child, monitor }
    }

    fn add(&mut self, name: &str) {
        let bitmap = format!(r#"{{"node":"disk","name":"{name}","persistent":true}}"#);
        self.monitor.execute("block-dirty-bitmap-add", object(&bitmap)).expect("added");
    }

    fn write(folder: &Path, at: u64) {
        let server = Server::unix(folder.join("nbd.sock"));
        let mut client = Client::connect(&server, "disk", &[]).expect("a guest");
        client.write(at, &[7; 4096], 0).expect("written");
    }

    /// Dirty bytes of the bitmap, unless it is inconsistent.
    fn count(&mut self) -> Option<u64> {
        let nodes = self.monitor.execute("query-named-block-nodes", Object::new()).expect("told");
        let nodes = nodes.as_list().expect("a list");
        let bitmaps = nodes.iter().find_map(|node| node.as_object()?.get("dirty-bitmaps")?.as_list());
        let bitmap = bitmaps.and_then(|bitmaps| bitmaps.first()?.as_object()).expect("a bitmap");
        let is_bad = matches!(bitmap.get("inconsistent"), Some(Value::Bool(true)));
        bitmap.get("count").and_then(Value::as_u64).filter(|_| !is_bad)
    }

    fn kill(mut self) {
        self.child.kill().expect("it lives");
        self.child.wait().expect("it ends");
    }
}

#[test]
fn a_killed_daemon_is_believed_if_nobody_else_has_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    File::create(folder.join("disk")).and_then(|disk| disk.set_len(SIZE)).expect("a disk");
    let mut daemon = Daemon::start(folder);
    daemon.add("b");
    Daemon::write(folder, 0);
    daemon.kill();
    // The region of 1 MiB around the write.
    let mut daemon = Daemon::start(folder);
    assert_eq!(daemon.count(), Some(1 << 20));
    Daemon::write(folder, 3 << 20);
    daemon.kill();
    let mut daemon = Daemon::start(folder);
    assert_eq!(daemon.count(), Some(2 << 20));
    daemon.kill();
    // The same with somebody else in between.
    let mut daemon = Daemon::start(folder);
    Daemon::write(folder, 5 << 20);
    assert_eq!(daemon.count(), Some((2 << 20) + 65536));
    daemon.kill();
    let disk = OpenOptions::new().write(true).open(folder.join("disk")).expect("opens");
    disk.write_all_at(&[1], 9 << 20).expect("written");
    let mut daemon = Daemon::start(folder);
    assert_eq!(daemon.count(), None);
}

//! A new image is never made in the place of one that a node has open, whether a lock keeps it from that or not.

use std::path::Path;
use std::process::{Child, Command};

use underlay_qmp::blocking::{Failure, Monitor};
use underlay_qmp::json::{Object, Value, parse};

struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A daemon with these nodes over files of 1 MiB: one that nobody uses, one that needs no locks, one that an export
/// uses and shares by force, and one that an export has locked; and a disk.
fn start(folder: &Path) -> (Daemon, Monitor) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_underlay"));
    command.current_dir(folder).args([
        "storage-daemon",
        "--chardev",
        "socket,id=m,path=m.sock,server=on,wait=off",
        "--monitor",
        "m",
        "--nbd-server",
        "addr.type=unix,addr.path=nbd.sock",
    ]);
    for (name, options) in [
        ("disk", ""),
        ("idle", ""),
        ("careless", ",locking=off"),
        ("shared", ",read-only=on,force-share=on"),
        ("locked", ""),
    ] {
        std::fs::write(folder.join(name), vec![7; 1 << 20]).expect("room");
        command.args(["--blockdev", &format!("file,node-name={name},filename={name}{options}")]);
    }
    for name in ["careless", "shared", "locked"] {
        command.args(["--export", &format!("nbd,id={name},node-name={name}")]);
    }
    let daemon = Daemon(command.spawn().expect("it starts"));
    (daemon, Monitor::connect(&folder.join("m.sock")).expect("a monitor"))
}

fn arguments(text: &str) -> Object {
    match parse(text.as_bytes()) {
        Ok(Value::Object(object)) => object,
        other => panic!("{other:?}"),
    }
}

#[test]
fn nothing_is_made_in_the_place_of_an_open_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let (_daemon, mut monitor) = start(folder.path());
    std::os::unix::fs::symlink("idle", folder.path().join("link")).expect("a link");
    for name in ["idle", "./idle", "link", "careless", "shared", "locked"] {
        let snapshot =
            format!(r#"{{"node-name": "disk", "snapshot-file": "{name}", "snapshot-node-name": "o"}}"#);
        let backup = format!(
            r#"{{"device": "disk", "target": "{name}", "sync": "full", "format": "raw", "job-id": "j"}}"#
        );
        for (command, text) in
            [("blockdev-snapshot-sync", &snapshot), ("drive-backup", &backup), ("drive-mirror", &backup)]
        {
            let Err(Failure::Refused(_, why)) = monitor.execute(command, arguments(text)) else {
                panic!("{command} makes {name}");
            };
            assert!(
                why.contains("in use by node") || name == "locked" && why.contains("lock"),
                "{name}: {why}"
            );
        }
    }
    for name in ["disk", "idle", "careless", "shared", "locked"] {
        assert!(std::fs::read(folder.path().join(name)).expect("a file") == vec![7; 1 << 20], "{name}");
    }
}

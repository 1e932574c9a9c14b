//! Programs whose output goes nowhere do what they would have done, and a daemon goes on.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use underlay_qmp::blocking::Monitor;
use underlay_qmp::json::Object;

const CLUSTER: u64 = 65536;

/// A pipe that nobody reads, and a file system without room.
fn nowhere() -> [Stdio; 2] {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    [writer.into(), OpenOptions::new().write(true).open("/dev/full").expect("is there").into()]
}

fn program(folder: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_underlay"));
    command.args(words).current_dir(folder);
    command
}

fn succeeds(command: &mut Command) -> bool {
    command.status().expect("it runs").success()
}

/// An image of 1 MiB, and what is in its file.
fn image(folder: &Path, name: &str) -> File {
    let mut create = program(folder, &["img", "create", "-q", "-f", "qcow2", name, "1M"]);
    let mut write = program(folder, &["io", "-f", "qcow2", "-c", "write -q 0 64k", name]);
    assert!(succeeds(&mut create) && succeeds(&mut write));
    OpenOptions::new().read(true).write(true).open(folder.join(name)).expect("an image")
}

fn word(file: &File, at: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at).expect("an image");
    u64::from_be_bytes(bytes)
}

/// Gives a cluster behind the end of the file a reference that it does not have.
fn leak(file: &File) {
    let end = file.metadata().expect("a file").len().next_multiple_of(CLUSTER);
    file.set_len(end + CLUSTER).expect("a file");
    let block = word(file, word(file, 48));
    file.write_all_at(&1_u16.to_be_bytes(), block + end / CLUSTER * 2).expect("an image");
}

#[test]
fn a_repair() {
    let folder = tempfile::tempdir().expect("a folder");
    for (number, output) in nowhere().into_iter().enumerate() {
        let name = format!("{number}.qcow2");
        leak(&image(folder.path(), &name));
        let check = |more: &[&str]| program(folder.path(), &[&["img", "check", &name][..], more].concat());
        assert!(!succeeds(check(&["-q"]).stderr(Stdio::null())), "there is something to repair");
        let [_, errors] = nowhere();
        assert!(succeeds(check(&["-r", "all"]).stdout(output).stderr(errors)));
        assert!(succeeds(&mut check(&["-q"])));
    }
}

#[test]
fn a_daemon() {
    let folder = tempfile::tempdir().expect("a folder");
    for output in nowhere() {
        let [errors, _] = nowhere();
        let bad = image(folder.path(), "bad.qcow2");
        // An L2 table where none can be.
        bad.write_all_at(&((1 << 63) | (3 * CLUSTER + 512)).to_be_bytes(), word(&bad, 40)).expect("an image");
        image(folder.path(), "good.qcow2");
        let mut daemon = program(
            folder.path(),
            &["storage-daemon", "--chardev", "socket,id=m,path=m.sock,server=on,wait=off"],
        );
        daemon.args(["--monitor", "m", "--nbd-server", "addr.type=unix,addr.path=nbd.sock"]);
        for name in ["good", "bad"] {
            daemon
                .arg("--blockdev")
                .arg(format!("qcow2,node-name={name},file.driver=file,file.filename={name}.qcow2"));
        }
        daemon.args(["--export", "nbd,id=e,node-name=bad,writable=on"]);
        let mut daemon = daemon.stdout(output).stderr(errors).spawn().expect("it starts");
        let mut monitor = Monitor::connect(&folder.path().join("m.sock")).expect("a monitor");
        // What it has to say about these it cannot say.
        let snapshot = Object::new().with("node-name", "good").with("snapshot-file", "over.qcow2");
        let snapshot = snapshot.with("snapshot-node-name", "over");
        monitor.execute("blockdev-snapshot-sync", snapshot).expect("a snapshot");
        let mut read = program(
            folder.path(),
            &["io", "-f", "raw", "-c", "write -q 0 64k", "nbd+unix:///bad?socket=nbd.sock"],
        );
        assert!(!succeeds(read.stderr(Stdio::null()).stdout(Stdio::null())));
        monitor.execute("query-named-block-nodes", Object::new()).expect("it is there");
        monitor.execute("quit", Object::new()).expect("it ends");
        assert!(daemon.wait().expect("it ends").success());
    }
}

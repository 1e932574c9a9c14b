//! Programs that people use with NBD servers.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use underlay_nbd::blocking::{Client, Server};
use underlay_nbd::transmission::command;
use underlay_nbd::{Framing, Wish, flags};

use crate::{SIZE, World, good, run, text};

#[test]
fn nbdinfo_sees_what_the_export_can() {
    let world = World::new();
    let Some(info) = good("nbdinfo", &[&world.uri("disk")]) else { return };
    for line in [
        "export-size: 8388608 (8M)",
        "description: the disk",
        "is_read_only: false",
        "can_cache: true",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
        "base:allocation",
        "qemu:allocation-depth",
    ] {
        assert!(info.contains(line), "no '{line}' in\n{info}");
    }
    let info = good("nbdinfo", &[&world.uri("ro")]).expect("it is installed");
    assert!(info.contains("is_read_only: true"), "{info}");
    let list = good("nbdinfo", &["--list", &world.uri("")]).expect("it is installed");
    assert!(list.contains("export=\"disk\":") && list.contains("export=\"ro\":"), "{list}");
    let refused = run("nbdinfo", &[&world.uri("nope")]).expect("it is installed");
    assert!(!refused.status.success());
}

#[test]
fn nbdcopy_copies_in_and_out() {
    let world = World::with(crate::ServerOptions::default(), true);
    let (source, target) = (world.patterned_file("in"), world.path("out"));
    if good("nbdcopy", &[text(&source), &world.uri("disk")]).is_none() {
        return;
    }
    let map = good("nbdinfo", &["--map", &world.uri("ro")]).expect("libnbd's tools come together");
    let lines: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    let wanted = [
        ["0", "4194304", "0", "data"],
        ["4194304", "2097152", "3", "hole,zero"],
        ["6291456", "2097152", "0", "data"],
    ];
    assert_eq!(lines, wanted, "{map}");
    good("nbdcopy", &[&world.uri("ro"), text(&target)]);
    assert!(same(&source, &target));
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    let world = World::new();
    let (source, target) = (world.patterned_file("in"), world.path("out"));
    let raw = ["-f", "raw", "-O", "raw"];
    let convert = |from: &str, more: &[&str], to: &str| {
        let args = [&["convert"], &raw[..], more, &[from, to]].concat();
        good("qemu-img", &args)
    };
    if convert(text(&source), &["-n", "-W", "-m", "16"], &world.uri("disk")).is_none() {
        return;
    }
    let uri = world.uri("ro");
    good("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&source), &uri]);
    let map = good("qemu-img", &["map", "--output=json", "-f", "raw", &uri]).expect("it is installed");
    assert!(map.contains("\"start\": 4194304, \"length\": 2097152"), "{map}");
    assert_eq!(map.lines().count(), 3, "{map}");
    convert(&uri, &[], text(&target));
    assert!(same(&source, &target));
}

#[test]
fn qemu_io_writes_zeroes_and_discards() {
    let world = World::new();
    let commands = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 1000 5000",
        "read -P 0x11 0 1000",
        "read -P 0x22 1000 5000",
        "write -z 64k 64k",
        "read -P 0 64k 64k",
        "write -z -u 128k 64k",
        "read -P 0 128k 64k",
        "discard 192k 64k",
        "aio_write -P 0x33 512k 64k",
        "aio_write -P 0x44 576k 64k",
        "aio_flush",
        "read -P 0x33 512k 64k",
        "read -P 0x44 576k 64k",
        "flush",
    ];
    let mut args = vec!["-f", "raw"];
    commands.iter().for_each(|command| args.extend(["-c", *command]));
    let uri = world.uri("disk");
    args.push(&uri);
    let Some(said) = good("qemu-io", &args) else { return };
    assert!(!said.contains("Pattern verification failed") && !said.contains("error"), "{said}");

    let read_only = run("qemu-io", &["-f", "raw", "-c", "write 0 512", &world.uri("ro")]);
    let output = read_only.expect("it is installed");
    assert!(!output.status.success(), "written to a read-only export");
}

#[test]
fn fio_verifies_what_it_wrote() {
    let world = World::with(crate::ServerOptions::default(), true);
    let uri = format!("--uri={}", world.uri("disk"));
    let mut args = vec!["--name=verify", "--ioengine=nbd", &uri, "--rw=randwrite", "--iodepth=32"];
    args.extend(["--bsrange=512-64k", "--size=8m", "--verify=crc32c", "--verify_fatal=1", "--randseed=1"]);
    args.push("--verify_state_save=0");
    let Some(output) = run("fio", &args) else { return };
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if said.contains("engine nbd not loadable") {
        return eprintln!("fio has no nbd engine; nothing tested");
    }
    assert!(output.status.success() && said.contains("err= 0"), "{said}");
}

/// QEMU's own server, killed at the end.
struct Reference(Child);

impl Drop for Reference {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Reference {
    /// With exports like those of [`World`]; `None` when it is not installed.
    fn start(world: &World) -> Option<(Self, PathBuf)> {
        let (disk, socket, pid) = (world.path("disk"), world.path("reference.sock"), world.path("pid"));
        std::fs::write(&disk, vec![1; SIZE]).expect("written");
        let export = |name: &str, writable: &str| {
            let text = format!("type=nbd,id={name},node-name=d,name={name},description=the {name}");
            format!("{text},writable={writable},allocation-depth=on")
        };
        let child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &format!("driver=file,node-name=d,filename={}", text(&disk))])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", text(&socket))])
            .args(["--export", &export("disk", "on"), "--export", &export("ro", "off")])
            .args(["--pidfile", text(&pid)])
            .spawn();
        let Ok(child) = child else {
            eprintln!("qemu-storage-daemon is not installed; nothing tested");
            return None;
        };
        let mut reference = Self(child);
        // The pid file comes when everything else is ready.
        while !pid.exists() {
            assert!(reference.0.try_wait().expect("a child").is_none(), "qemu-storage-daemon has ended");
            std::thread::yield_now();
        }
        Some((reference, socket))
    }
}

#[test]
fn nbdinfo_sees_no_difference_to_qemu() {
    let world = World::new();
    let Some((_reference, socket)) = Reference::start(&world) else { return };
    // Ours needs data, too, as nbdinfo looks at the content.
    let mut client = world.client("disk").expect("connects");
    client.write(0, &vec![1; SIZE], 0).expect("written");
    for name in ["disk", "ro"] {
        let theirs = format!("nbd+unix:///{name}?socket={}", text(&socket));
        let Some(theirs) = good("nbdinfo", &["--json", &theirs]) else { return };
        let ours = good("nbdinfo", &["--json", &world.uri(name)]).expect("it is installed");
        assert_eq!(without_uri(&ours), without_uri(&theirs));
    }
}

/// Error number and text of a request, and whether the connection goes on after it.
fn outcome(socket: &Path, export: &str, framing: Framing, request: (u16, u16, u64, u64)) -> String {
    let contexts = if framing == Framing::Simple { vec![] } else { vec!["base:allocation".to_owned()] };
    let wish = Wish { export: export.into(), framing, contexts, list: false };
    let mut client = Client::open(&Server::unix(socket), wish).expect("connects");
    let (what, flags, offset, length) = request;
    let data = if what == command::WRITE { vec![1; usize::try_from(length).unwrap_or(0)] } else { vec![] };
    client.submit(what, flags, offset, length, &data).expect("queued");
    let error = client.complete().map(|done| done.error).map_err(|error| error.kind());
    format!("{error:?}, goes on: {}", client.read(0, 512).is_ok())
}

#[test]
fn errors_are_told_as_by_qemu() {
    let world = World::new();
    let Some((_reference, socket)) = Reference::start(&world) else { return };
    let end = SIZE as u64;
    let requests = [
        (command::READ, 0, end, 512),
        (command::READ, 0, u64::MAX, 512),
        (command::READ, 0, 0, (32 << 20) + 1),
        (command::READ, flags::CMD_NO_HOLE, 0, 512),
        (command::WRITE, 0, end - 511, 512),
        (command::WRITE, flags::CMD_DF, 0, 512),
        (command::WRITE_ZEROES, 0, end, 512),
        (command::WRITE_ZEROES, 0, u64::MAX - 3, 4096),
        (command::TRIM, 0, end, 512),
        (command::BLOCK_STATUS, 0, end, 512),
        (command::BLOCK_STATUS, 0, 0, 0),
        (77, 0, 0, 512),
        // Refused only by the read-only one.
        (command::WRITE, 0, 0, 512),
        (command::WRITE_ZEROES, 0, 0, 512),
        (command::TRIM, 0, 0, 512),
    ];
    for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
        for (export, request) in requests.iter().flat_map(|request| [("disk", *request), ("ro", *request)]) {
            let theirs = outcome(&socket, export, framing, request);
            let ours = outcome(&world.socket(), export, framing, request);
            assert_eq!(ours, theirs, "{framing:?} {export} {request:?}");
        }
    }
}

fn without_uri(json: &str) -> Vec<&str> {
    json.lines().filter(|line| !line.contains("\"uri\"")).collect()
}

fn same(one: &Path, other: &Path) -> bool {
    std::fs::read(one).expect("read") == std::fs::read(other).expect("read")
}

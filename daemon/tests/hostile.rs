//! Monitors with clients that mean no good: they hurt nobody but themselves, and the daemon's memory stays bounded.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use underlay_qmp::blocking::{Failure, Monitor};
use underlay_qmp::json::{Object, Value};

/// More than the largest message (64 MiB) and the most that may wait for one client (64 MiB) need, each of them twice
/// over for growing buffers; and far less than what the clients here send.
const MOST_MEMORY_KIB: u64 = 320 << 10;

/// A daemon with two monitors: one for the hostile client, one for everybody else.
struct Daemon {
    child: Child,
    folder: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut command = Command::new(env!("CARGO_BIN_EXE_underlay"));
        command.arg("storage-daemon").current_dir(folder.path());
        for name in ["bad", "good"] {
            command.arg("--chardev").arg(format!("socket,id={name},path={name}.sock,server=on,wait=off"));
            command.args(["--monitor", name]);
        }
        command.args(["--pidfile", "pid", "--blockdev", "null-co,node-name=n,size=1048576,read-zeroes=on"]);
        let daemon = Self { child: command.spawn().expect("the daemon starts"), folder };
        // Both listen once the second one answers.
        daemon.monitor("good");
        daemon
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.sock"))
    }

    fn monitor(&self, name: &str) -> Monitor {
        Monitor::connect(&self.socket(name)).expect("a monitor")
    }

    /// A client that speaks as it likes.
    fn bad(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket("bad")).expect("a monitor");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
        // The daemon stops to read from who does not read.
        stream.set_write_timeout(Some(Duration::from_millis(500))).expect("a socket");
        stream
    }

    fn peak_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it lives");
        let line = status.lines().find(|line| line.starts_with("VmHWM")).expect("memory");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
    }

    /// Somebody else is served as ever, the bad client's monitor is there for the next one, and the end is clean.
    fn expect_unhurt(mut self) {
        for name in ["good", "bad"] {
            let mut monitor = self.monitor(name);
            let nodes = monitor.execute("query-named-block-nodes", Object::new()).expect("served");
            assert_eq!(nodes.as_list().map(<[Value]>::len), Some(1));
        }
        assert!(self.peak_kib() < MOST_MEMORY_KIB, "{} KiB", self.peak_kib());
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill").success());
        assert!(self.child.wait().expect("it ends").success());
        let left: Vec<_> =
            ["good.sock", "bad.sock", "pid"].into_iter().map(|name| self.folder.path().join(name)).collect();
        assert!(!left.iter().any(|path| Path::exists(path)), "{left:?}");
    }
}

/// Writes until the other side has had enough; whether all was taken.
fn pour(stream: &mut UnixStream, piece: &[u8], bytes: usize) -> bool {
    let mut sent = 0;
    while sent < bytes {
        match stream.write(piece) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
    true
}

#[test]
fn garbage_is_answered_and_forgotten() {
    let daemon = Daemon::start();
    let mut stream = daemon.bad();
    for garbage in [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".as_slice(),
        b"\x00\xff\xfe\x80\n",
        b"}}}}]]]]\n",
        b"{\"execute\": \"qmp_capabilities\", \n",
        b"{\"execute\": 7}\n",
        b"{\"execute\": \"\\ud800\"}\n",
        b"[1e999999, -0, 99999999999999999999999]\n",
    ] {
        assert!(stream.write_all(garbage).is_ok());
    }
    // Whatever it made of that: a new line and a sound command are understood.
    stream.write_all(b"\n\xff\n{\"execute\": \"qmp_capabilities\", \"id\": \"last\"}\n").expect("written");
    let (mut heard, mut buffer) = (Vec::new(), [0; 4096]);
    while !String::from_utf8_lossy(&heard).contains("\"id\": \"last\"") {
        let count = stream.read(&mut buffer).expect("an answer in time");
        assert_ne!(count, 0, "the daemon hung up: {}", String::from_utf8_lossy(&heard));
        heard.extend(&buffer[..count]);
    }
    drop(stream);
    daemon.expect_unhurt();
}

#[test]
fn a_hundred_megabytes_without_an_end() {
    for piece in ["x", "\"", "{\"a\": ", "[", "1", " "] {
        let daemon = Daemon::start();
        let mut stream = daemon.bad();
        let mut good = daemon.monitor("good");
        let piece = piece.repeat((1 << 16) / piece.len());
        // It may hang up before the end, or stop reading.
        pour(&mut stream, piece.as_bytes(), 100 << 20);
        good.execute("query-block-jobs", Object::new()).expect("others are served meanwhile");
        drop((stream, good));
        daemon.expect_unhurt();
    }
}

#[test]
fn half_a_message_and_gone() {
    let daemon = Daemon::start();
    for cut in 0..200 {
        let mut stream = daemon.bad();
        let message = b"{\"execute\": \"qmp_capabilities\"}{\"execute\": \"query-jobs\"}";
        // The daemon need not have read it.
        let _ = stream.write_all(&message[..cut % message.len()]);
    }
    daemon.expect_unhurt();
}

#[test]
fn a_client_that_never_reads() {
    let daemon = Daemon::start();
    let mut stream = daemon.bad();
    stream.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").expect("written");
    // What it has sent is carried out to the end, so few commands should fit into a socket.
    let command = format!("{{\"execute\": \"query-qmp-schema\", \"id\": \"{}\"}}\n", "x".repeat(4000));
    // The schema is large: the daemon stops reading long before all of that is answered.
    let all = pour(&mut stream, command.repeat(100).as_bytes(), 64 << 20);
    assert!(!all, "thousands of replies were kept");
    let mut good = daemon.monitor("good");
    for _ in 0..100 {
        good.execute("query-version", Object::new()).expect("others are served meanwhile");
    }
    drop((stream, good));
    daemon.expect_unhurt();
}

#[test]
fn events_for_a_client_that_never_reads() {
    let daemon = Daemon::start();
    let mut stream = daemon.bad();
    stream.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").expect("written");
    let mut good = daemon.monitor("good");
    let server = "{\"addr\": {\"type\": \"unix\", \"data\": {\"path\": \"nbd.sock\"}}}";
    let server = match underlay_qmp::json::parse(server.as_bytes()) {
        Ok(Value::Object(server)) => server,
        other => panic!("{other:?}"),
    };
    good.execute("nbd-server-start", server).expect("started");
    for _ in 0..2000 {
        let export = Object::new().with("type", "nbd").with("id", "e").with("node-name", "n");
        good.execute("block-export-add", export).expect("added");
        good.execute("block-export-del", Object::new().with("id", "e")).expect("removed");
        good.event("BLOCK_EXPORT_DELETED", "id", "e").expect("told");
    }
    drop((stream, good));
    daemon.expect_unhurt();
}

/// What it has sent is carried out all the same. (Its events and replies go nowhere.)
#[test]
fn a_client_whose_standard_output_nobody_reads() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_underlay"));
    command.args(["storage-daemon", "--chardev", "stdio,id=m", "--monitor", "m"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the daemon starts");
    drop(child.stdout.take());
    let mut input = child.stdin.take().expect("a pipe");
    input.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").expect("written");
    for _ in 0..100 {
        input.write_all(b"{\"execute\": \"query-version\"}\n").expect("written");
    }
    input.write_all(b"{\"execute\": \"quit\"}\n").expect("written");
    assert!(child.wait().expect("it ends").success());
}

#[test]
fn two_monitors_hear_the_same_events() {
    let daemon = Daemon::start();
    let (mut one, mut other) = (daemon.monitor("good"), daemon.monitor("bad"));
    let stream = Object::new().with("device", "n").with("job-id", "j");
    one.execute("block-stream", stream).expect("a job with nothing to do");
    for monitor in [&mut one, &mut other] {
        monitor.event("JOB_STATUS_CHANGE", "status", "null").expect("both are told");
    }
    let refused = other.execute("job-dismiss", Object::new().with("id", "j"));
    assert!(matches!(refused, Err(Failure::Refused(..))), "{refused:?}");
    drop((one, other));
    daemon.expect_unhurt();
}

/// As deep as the reference goes, one deeper, and much deeper: the next message is understood whatever came before.
#[test]
fn deeply_nested_messages() {
    let daemon = Daemon::start();
    for (depth, fits) in [(1000, true), (1100, false), (200_000, false)] {
        for (open, inner, close) in [("[", "", "]"), ("{\"a\":", "1", "}")] {
            let mut stream = daemon.bad();
            stream.set_write_timeout(Some(Duration::from_secs(60))).expect("a socket");
            let mut reader = stream.try_clone().expect("a socket");
            let heard = std::thread::spawn(move || {
                let (mut heard, mut buffer) = (Vec::new(), [0; 4096]);
                while !heard.ends_with(b"\"id\": \"last\"}\r\n") {
                    let count = reader.read(&mut buffer).expect("an answer in time");
                    assert_ne!(count, 0, "the daemon hung up");
                    heard.extend(&buffer[..count]);
                }
                String::from_utf8_lossy(&heard).into_owned()
            });
            let nested = format!("{}{inner}{}", open.repeat(depth), close.repeat(depth));
            let text = format!(
                "{{\"execute\": \"qmp_capabilities\"}}{{\"execute\": \"query-version\", \"arguments\": {{\"x\": {nested}}}}}\n\
                 \u{1}\n{{\"execute\": \"query-jobs\", \"id\": \"last\"}}\n"
            );
            stream.write_all(text.as_bytes()).expect("taken");
            let heard = heard.join().expect("answers");
            let text = if fits { "Parameter 'x' is unexpected" } else { "JSON nesting depth limit exceeded" };
            assert!(heard.contains(text), "{depth}: {}", &heard[..heard.len().min(600)]);
        }
    }
    daemon.expect_unhurt();
}

/// A monitor has one client at a time; all others wait, and each gets its turn.
#[test]
fn hundreds_of_clients_at_once() {
    let daemon = Daemon::start();
    let mut good = daemon.monitor("good");
    let path = daemon.socket("bad");
    std::thread::scope(|scope| {
        for client in 0..400 {
            let path = &path;
            scope.spawn(move || {
                let mut stream = UnixStream::connect(path).expect("a place in the queue");
                stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
                let sent =
                    ["", "{\"execute\": ", "{\"execute\": \"qmp_capabilities\"}\n", "\u{1}]\n"][client % 4];
                let mut greeting = [0; 8];
                stream.read_exact(&mut greeting).expect("its turn comes");
                assert_eq!(&greeting, b"{\"QMP\": ");
                let _ = stream.write_all(sent.as_bytes());
            });
        }
        for _ in 0..100 {
            good.execute("query-named-block-nodes", Object::new()).expect("others are served meanwhile");
        }
    });
    drop(good);
    daemon.expect_unhurt();
}

#[test]
fn a_transaction_that_waits_for_a_server_does_not_hold_up_the_end() {
    let mut daemon = Daemon::start();
    let silent = UnixListener::bind(daemon.socket("silent")).expect("a socket");
    let mut stream = daemon.bad();
    stream.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").expect("written");
    let add = "{'driver': 'null-co', 'node-name': 't', 'size': 1048576}".replace('\'', "\"");
    let actions = "[{'type': 'blockdev-backup', 'data': {'job-id': 'j', 'device': 'n', 'target': 't', 'sync': 'none'}}, \
         {'type': 'drive-backup', 'data': {'job-id': 'k', 'device': 'n', 'mode': 'existing', 'format': 'raw', 'sync': 'full', \
         'target': 'nbd+unix:///?socket=silent.sock'}}]"
        .replace('\'', "\"");
    writeln!(stream, "{{\"execute\": \"blockdev-add\", \"arguments\": {add}}}").expect("written");
    writeln!(stream, "{{\"execute\": \"transaction\", \"arguments\": {{\"actions\": {actions}}}}}")
        .expect("written");
    let _waits = silent.accept().expect("it comes to the second action");
    let mut good = daemon.monitor("good");
    good.execute("quit", Object::new()).expect("the end");
    // Until the daemon hangs up; one that does not end runs into the time limit of the socket.
    let mut heard = String::new();
    stream.read_to_string(&mut heard).expect("an end in time");
    assert!(daemon.child.wait().expect("it ends").success(), "{heard}");
}

//! Monitors on every kind of character device: who comes is greeted and answered, and what was made is gone at the end.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const NEGOTIATE: &[u8] = b"{'execute':'qmp_capabilities','id':'done'}\n";
const QUIT: &[u8] = b"{'execute':'quit'}\n";

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
    /// With a monitor on the character device `device`, in a folder that is prepared first.
    fn start(device: &str, prepare: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        prepare(folder.path());
        let mut command = Command::new(env!("CARGO_BIN_EXE_underlay"));
        let (device, more) = device.split_once(' ').unwrap_or((device, ""));
        command.args(["storage-daemon", "--chardev", &format!("{device},id=m"), "--monitor", "m"]);
        command.args(more.split_whitespace());
        let output = File::create(folder.path().join("stdout")).expect("a file");
        let child = command.args(["--pidfile", "pid"]).current_dir(folder.path()).stdout(output).spawn();
        Self { child: child.expect("the daemon starts"), folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// Everything on the command line has taken effect.
    fn ready(self) -> Self {
        until(|| self.path("pid").exists().then_some(()));
        self
    }

    fn expect_end(mut self) {
        assert!(self.child.wait().expect("it ends").success());
    }
}

/// Tries until there is something.
fn until<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = attempt() {
            return found;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "not in time");
        std::thread::yield_now();
    }
}

/// A conversation: greeted, negotiated.
fn talk(input: impl Read, mut output: impl Write) {
    let mut lines = BufReader::new(input);
    let mut line = Vec::new();
    lines.read_until(b'\n', &mut line).expect("a greeting");
    assert!(String::from_utf8_lossy(&line).contains("{\"QMP\": "), "{line:?}");
    output.write_all(NEGOTIATE).expect("taken");
    line.clear();
    lines.read_until(b'\n', &mut line).expect("an answer");
    assert_eq!(String::from_utf8_lossy(&line), "{\"return\": {}, \"id\": \"done\"}\r\n");
}

fn talk_over(stream: &UnixStream) {
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
    talk(stream, stream);
}

#[test]
fn a_socket_without_a_file() {
    let name = format!("underlay-chardev-{}", std::process::id());
    for tight in ["on", "off"] {
        let daemon = Daemon::start(
            &format!("socket,path={name},abstract=on,tight={tight},server=on,wait=off"),
            |_| (),
        )
        .ready();
        let mut bytes = name.clone().into_bytes();
        bytes.resize(if tight == "on" { bytes.len() } else { 107 }, 0);
        let address = SocketAddr::from_abstract_name(bytes).expect("a name");
        let mut stream = UnixStream::connect_addr(&address).expect("it listens");
        talk_over(&stream);
        assert!(!daemon.path(&name).exists());
        stream.write_all(QUIT).expect("taken");
        daemon.expect_end();
    }
}

#[test]
fn telnet_and_a_log() {
    let daemon = Daemon::start("socket,path=s,server=on,wait=off,telnet=on,logfile=log", |_| ()).ready();
    let mut stream = UnixStream::connect(daemon.path("s")).expect("it listens");
    let mut hello = [0; 12];
    stream.read_exact(&mut hello).expect("a hello");
    assert_eq!(hello, [255, 251, 1, 255, 251, 3, 255, 251, 0, 255, 253, 0]);
    stream.write_all(b"\xff\xfd\x01 \xff\xfb").expect("taken");
    stream.write_all(b"\x00").expect("taken");
    talk_over(&stream);
    let log = daemon.read("log");
    assert!(log.starts_with("{\"QMP\": ") && log.ends_with("\"id\": \"done\"}\r\n"), "what was sent: {log}");
    stream.write_all(QUIT).expect("taken");
    daemon.expect_end();
}

#[test]
fn a_log_that_goes_on() {
    for (append, kept) in [("on", true), ("off", false)] {
        let before = |folder: &Path| fs::write(folder.join("log"), "before\n").expect("written");
        let device = format!("socket,path=s,server=on,wait=off,logfile=log,logappend={append}");
        let daemon = Daemon::start(&device, before).ready();
        talk_over(&UnixStream::connect(daemon.path("s")).expect("it listens"));
        assert_eq!(daemon.read("log").starts_with("before\n{"), kept, "logappend={append}");
    }
}

#[test]
fn connects_again_and_again() {
    let daemon = Daemon::start("socket,path=s,reconnect-ms=1", |_| ()).ready();
    for _ in 0..3 {
        let listener = UnixListener::bind(daemon.path("s")).expect("a socket");
        for _ in 0..3 {
            let (stream, _) = listener.accept().expect("it connects");
            talk_over(&stream);
        }
        fs::remove_file(daemon.path("s")).expect("removed");
    }
    let listener = UnixListener::bind(daemon.path("s")).expect("a socket");
    let (mut stream, _) = listener.accept().expect("it connects");
    talk_over(&stream);
    stream.write_all(QUIT).expect("taken");
    daemon.expect_end();
}

#[test]
fn a_terminal_that_is_opened_and_closed() {
    let daemon = Daemon::start("pty,path=link", |_| ()).ready();
    let said = daemon.read("stdout");
    let name = said.strip_prefix("char device redirected to ").and_then(|rest| rest.split(' ').next());
    let name = name.unwrap_or_else(|| panic!("{said}"));
    assert_eq!(fs::read_link(daemon.path("link")).expect("a link"), Path::new(name));
    let open = || OpenOptions::new().read(true).write(true).open(daemon.path("link")).expect("a terminal");
    let terminal = open();
    talk(&terminal, &terminal);
    drop(terminal);
    // Who opens it before the daemon has noticed that it was closed goes on with the same conversation.
    let mut terminal = until(|| {
        let mut terminal = open();
        terminal.write_all(b"{'execute':'query-version','id':'again'}\n").expect("taken");
        let (mut lines, mut line) = (BufReader::new(&terminal), String::new());
        while !line.contains("\"again\"") {
            line.clear();
            lines.read_line(&mut line).expect("an answer");
        }
        line.contains("Expecting capabilities negotiation").then_some(terminal)
    });
    terminal.write_all(NEGOTIATE).expect("taken");
    terminal.write_all(QUIT).expect("taken");
    let link = daemon.path("link");
    daemon.expect_end();
    assert!(fs::symlink_metadata(link).is_err(), "the link is gone");
}

#[test]
fn two_named_pipes() {
    let daemon = Daemon::start("pipe,path=p", |folder| {
        let made = Command::new("mkfifo").args(["p.in", "p.out"]).current_dir(folder).status();
        assert!(made.expect("mkfifo").success());
    })
    .ready();
    let open = |name| OpenOptions::new().read(true).write(true).open(daemon.path(name)).expect("a pipe");
    let (mut there, back) = (open("p.in"), open("p.out"));
    talk(&back, &there);
    there.write_all(QUIT).expect("taken");
    daemon.expect_end();
}

#[test]
fn the_first_free_port() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let first = taken.local_addr().expect("an address").port();
    let mut command = Command::new(env!("CARGO_BIN_EXE_underlay"));
    let device =
        format!("socket,id=m,host=127.0.0.1,port={first},to={},server=on", first.saturating_add(100));
    command.args(["storage-daemon", "--chardev", &device, "--monitor", "m"]).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the daemon starts");
    let mut line = String::new();
    BufReader::new(child.stderr.take().expect("piped")).read_line(&mut line).expect("text");
    let port = line.rsplit_once("tcp:127.0.0.1:").and_then(|(_, rest)| rest.split_once(',')?.0.parse().ok());
    let port: u16 = port.unwrap_or_else(|| panic!("{line}"));
    assert!(port > first);
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    talk(&stream, &stream);
    stream.write_all(QUIT).expect("taken");
    assert!(child.wait().expect("it ends").success());
}

/// What is said until `end`, at least.
fn hear(mut stream: &UnixStream, end: &str) -> String {
    let mut heard = Vec::new();
    let mut byte = [0];
    while !heard.ends_with(end.as_bytes()) {
        stream.read_exact(&mut byte).expect("more");
        heard.push(byte[0]);
    }
    String::from_utf8(heard).expect("text")
}

/// The first monitor prints as always, the second one over several lines, and so it is known whose answer it is.
#[test]
fn several_monitors_on_one_socket() {
    let daemon =
        Daemon::start("socket,path=s,server=on,wait=off,mux=on --monitor m,pretty=on", |_| ()).ready();
    let connect = || {
        let stream = UnixStream::connect(daemon.path("s")).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
        // Both greet.
        assert!(hear(&stream, "\n}\r\n").contains("{\"QMP\": "));
        stream
    };
    let send = |mut stream: &UnixStream, bytes: &[u8]| stream.write_all(bytes).expect("taken");
    let stream = connect();
    send(&stream, b"\x01h");
    assert!(hear(&stream, "sends C-a\n\r").starts_with("\n\rC-a h    print this help\n\r"));
    send(&stream, NEGOTIATE);
    assert_eq!(hear(&stream, "\n"), "{\"return\": {}, \"id\": \"done\"}\r\n");
    // Between two commands of one packet, and cut in two.
    send(&stream, b"{'execute':'query-version'}\x01");
    send(&stream, b"c{'execute':'qmp_capabilities'}");
    assert!(hear(&stream, "\n").starts_with("{\"return\": {\"qemu\""));
    assert_eq!(hear(&stream, "\n}\r\n"), "{\r\n    \"return\": {\r\n    }\r\n}\r\n");
    drop(stream);
    // Whose turn it is stays, but it is a new session.
    let stream = connect();
    send(&stream, b"{'execute':'query-chardev'}");
    assert!(hear(&stream, "\n}\r\n").contains("Expecting capabilities negotiation"));
    send(&stream, b"\x01c{'execute':'qmp_capabilities'}{'execute':'query-chardev'}\x01\x01");
    hear(&stream, "\n");
    let devices = hear(&stream, "\n");
    assert!(devices.contains(r#""frontend-open": true, "filename": "mux", "label": "m""#), "{devices}");
    assert!(
        devices.contains(r#""frontend-open": true, "filename": "unix:s,server=on", "label": "m-base""#),
        "{devices}"
    );
    // A Ctrl-a for the monitor, which does not know what to do with it.
    assert!(hear(&stream, "\n").contains("JSON parse error"));
    send(&stream, b"\x01t");
    send(&stream, b"{'execute':'query-version'}{'execute':'query-version'}");
    hear(&stream, "\n");
    let stamped = hear(&stream, "\n");
    assert!(stamped.starts_with("[00:00:00.000] {\"return\""), "{stamped}");
    send(&stream, b"\x01x");
    assert!(hear(&stream, "\n\r").ends_with("QEMU: Terminated\n\r"));
    daemon.expect_end();
}

/// The answer to a command.
fn ask(mut stream: &UnixStream, lines: &mut impl BufRead, command: &str) -> String {
    stream.write_all(format!("{command}\n").as_bytes()).expect("taken");
    let mut line = String::new();
    lines.read_line(&mut line).expect("an answer");
    line.trim_end().to_owned()
}

#[test]
fn who_is_there_is_told() {
    let daemon = Daemon::start(
        "socket,path=s,server=on,wait=off --chardev socket,id=t,host=127.0.0.1,port=0,server=on,wait=off \
         --monitor t --chardev ringbuf,id=r,size=64k --monitor r --chardev pty,id=p",
        |folder| {
            let made = Command::new("mkfifo").arg(folder.join("fifo")).status();
            assert!(made.expect("mkfifo").success());
        },
    )
    .ready();
    let stream = UnixStream::connect(daemon.path("s")).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
    talk_over(&stream);
    let mut lines = BufReader::new(&stream);
    let mut shown = |id: &str| {
        let all = ask(&stream, &mut lines, r#"{"execute": "query-chardev"}"#);
        let end = all.find(&format!(", \"label\": \"{id}\"")).unwrap_or_else(|| panic!("{id} in {all}"));
        let begin = all[..end].rfind('{').expect("an object");
        all[begin + 1..end].to_owned()
    };
    let waiting = shown("t");
    let place = waiting.strip_prefix("\"frontend-open\": true, \"filename\": \"disconnected:tcp:127.0.0.1:");
    let port: u16 = place.and_then(|rest| rest.strip_suffix(",server=on\"")?.parse().ok()).expect(&waiting);
    let guest = std::net::TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    talk(&guest, &guest);
    let peer = guest.local_addr().expect("connected");
    let there = format!("\"tcp:127.0.0.1:{port},server=on <-> {peer}\"");
    assert_eq!(shown("t"), format!("\"frontend-open\": true, \"filename\": {there}"));
    drop(guest);
    until(|| (shown("t") == waiting).then_some(()));
    assert!(shown("m").contains("\"unix:s,server=on\""), "{}", shown("m"));
    assert!(
        shown("p").starts_with("\"frontend-open\": false, \"filename\": \"pty:/dev/pts/"),
        "{}",
        shown("p")
    );
    let (stream, mut lines) = (&stream, BufReader::new(&stream));
    // What a monitor says into memory.
    let said = ask(
        stream,
        &mut lines,
        r#"{"execute": "ringbuf-read", "arguments": {"device": "r", "size": 99999}}"#,
    );
    assert!(said.starts_with(r#"{"return": "{\"QMP\": "#), "{said}");
    let add = r#"{"execute": "chardev-add", "arguments": {"id": "q", "backend": {"type": "pty", "data": {"path": "link"}}}}"#;
    let added = ask(stream, &mut lines, add);
    let name = added.strip_prefix(r#"{"return": {"pty": ""#).and_then(|rest| rest.strip_suffix(r#""}}"#));
    assert_eq!(fs::read_link(daemon.path("link")).expect("a link"), Path::new(name.expect(&added)));
    ask(stream, &mut lines, r#"{"execute": "chardev-remove", "arguments": {"id": "q"}}"#);
    assert!(!daemon.path("link").exists());
    // Nobody waits for a reader.
    for data in [r#""file", "data": {"out": "fifo"}"#, r#""null", "data": {"logfile": "fifo"}"#] {
        let add = format!(
            r#"{{"execute": "chardev-add", "arguments": {{"id": "f", "backend": {{"type": {data}}}}}}}"#
        );
        assert!(ask(stream, &mut lines, &add).contains("'fifo' is a named pipe"));
    }
    // What cannot be opened takes nothing away.
    let change = r#"{"execute": "chardev-change", "arguments": {"id": "p", "backend": {"type": "pipe", "data": {"device": "nope"}}}}"#;
    assert!(ask(stream, &mut lines, change).contains("Could not open 'nope'"));
    assert!(ask(stream, &mut lines, r#"{"execute": "query-chardev"}"#).contains("pty:/dev/pts/"));
    let mut stream = stream;
    stream.write_all(QUIT).expect("taken");
    daemon.expect_end();
}

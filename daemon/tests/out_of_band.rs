//! Requests out of band while a command of the same client takes its time, on our daemon and on the reference's:
//! answered ahead of what waits, but not any more once eight commands wait.
//!
//! The command that takes its time opens a disk on an NBD server that says nothing until the test lets go of it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use underlay_qmp::json::{self, Value};

struct Daemon {
    child: Child,
    stream: BufReader<UnixStream>,
    servers: UnixListener,
    _folder: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    /// One that connects to the test; negotiated, with out of band. Nothing if the program is not there.
    fn start(program: &str, arguments: &[&str]) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let listen = |name: &str| UnixListener::bind(folder.path().join(name)).expect("a socket");
        let (monitors, servers) = (listen("qmp.sock"), listen("nbd.sock"));
        let mut command = Command::new(program);
        command.args(arguments).args(["--chardev", "socket,id=m,path=qmp.sock", "--monitor", "m"]);
        let child = command.current_dir(folder.path()).stderr(Stdio::null()).spawn().ok()?;
        let (stream, _) = monitors.accept().expect("it connects");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
        let mut daemon = Self { child, stream: BufReader::new(stream), servers, _folder: folder };
        assert!(daemon.line().contains(r#""capabilities": ["oob"]"#), "it offers out of band");
        daemon.send(&[
            "{'execute':'qmp_capabilities','arguments':{'enable':['oob']},'id':'negotiated'}".into()
        ]);
        assert_eq!(daemon.id(), "negotiated");
        Some(daemon)
    }

    fn send(&mut self, messages: &[String]) {
        self.stream.get_mut().write_all(messages.concat().as_bytes()).expect("taken");
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("an answer in time");
        line
    }

    /// The id of the next reply.
    fn id(&mut self) -> String {
        let line = self.line();
        let reply = json::parse(line.as_bytes());
        let id = reply.as_ref().ok().and_then(Value::as_object).and_then(|reply| reply.get("id")?.as_str());
        id.unwrap_or_else(|| panic!("{line}")).to_owned()
    }

    /// Sends a command that takes its time, `waiting` that wait behind it, and one out of band; the ids of the replies
    /// in their order, and how many of them came before the slow command could be done.
    fn order(mut self, waiting: usize, before: usize) -> Vec<String> {
        let slow = "{'execute':'blockdev-add','id':'slow','arguments':{'driver':'nbd','node-name':'n',\
                    'server':{'type':'unix','path':'nbd.sock'}}}";
        let mut messages = vec![slow.to_owned()];
        messages.extend((0..waiting).map(|at| format!("{{'execute':'query-version','id':'{at}'}}")));
        messages.push("{'exec-oob':'query-version','id':'urgent'}".to_owned());
        self.send(&messages);
        let (server, _) = self.servers.accept().expect("it connects");
        let mut ids: Vec<_> = (0..before).map(|_| self.id()).collect();
        drop(server);
        ids.extend((before..waiting + 2).map(|_| self.id()));
        ids
    }
}

fn check(program: &str, arguments: &[&str]) {
    for waiting in [0, 5, 7] {
        let Some(daemon) = Daemon::start(program, arguments) else {
            println!("{program} is not installed");
            return;
        };
        let ids = daemon.order(waiting, 1);
        let numbers = (0..waiting).map(|at| at.to_string());
        let expected: Vec<_> = ["urgent".to_owned(), "slow".to_owned()].into_iter().chain(numbers).collect();
        assert_eq!(ids, expected, "{program}: {waiting} wait");
    }
    for waiting in [8, 20] {
        let Some(daemon) = Daemon::start(program, arguments) else { return };
        let mut ids = daemon.order(waiting, 0);
        assert_eq!(ids[0], "slow", "{program}: {waiting} wait");
        ids.retain(|id| id != "urgent");
        assert_eq!(ids.len(), waiting + 1, "{program}: all are answered");
        assert!(
            ids[1..].iter().enumerate().all(|(at, id)| *id == at.to_string()),
            "{program}: in order: {ids:?}"
        );
    }
}

#[test]
fn ours() {
    check(env!("CARGO_BIN_EXE_underlay"), &["storage-daemon"]);
}

#[test]
fn the_reference() {
    check("qemu-storage-daemon", &[]);
}

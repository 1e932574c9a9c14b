//! The shell with its standard input and output in pipes, typing to our daemon and to the reference's.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use underlay_qmp::json::{self, Value};

/// How long a line of output may take.
const PATIENCE: Duration = Duration::from_secs(60);

const OURS: &str = env!("CARGO_BIN_EXE_underlay");

/// A process that is ended when it goes.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A storage daemon that listens at `NAME.sock` in the folder.
fn daemon(program: &[&str], folder: &Path, name: &str, options: &[&str]) -> Running {
    let (program, first) = program.split_first().expect("a program");
    let (pid, socket) = (folder.join(format!("{name}.pid")), format!("{name}.sock"));
    let mut command = Command::new(program);
    command.args(first).args(options).current_dir(folder).stdout(Stdio::null()).stdin(Stdio::null());
    command.args(["--chardev", &format!("socket,id=m,path={socket},server=on,wait=off"), "--monitor", "m"]);
    let mut running = Running(command.arg("--pidfile").arg(&pid).spawn().expect("the daemon starts"));
    while !pid.exists() {
        assert!(matches!(running.0.try_wait(), Ok(None)), "the daemon ended");
        std::thread::yield_now();
    }
    running
}

/// A shell that is typed to line by line.
struct Shell {
    running: Running,
    input: Option<ChildStdin>,
    output: Receiver<String>,
    /// Events that nobody has waited for.
    events: Vec<String>,
}

impl Shell {
    fn start(folder: &Path, name: &str) -> Self {
        let mut command = Command::new(OURS);
        command.args(["shell", "-v", &format!("{name}.sock")]).current_dir(folder);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the shell starts");
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let lines = BufReader::new(output.expect("a pipe")).lines();
        let (sender, output) = channel();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { running: Running(child), input, output, events: Vec::new() }
    }

    /// Types a line; the reply, or nothing within a transaction.
    fn line(&mut self, line: &str, in_transaction: bool) -> Option<Value> {
        self.input.as_mut().expect("a pipe").write_all(format!("{line}\n").as_bytes()).expect("typed");
        if in_transaction {
            return None;
        }
        loop {
            let (message, text) = self.message();
            if message
                .as_object()
                .is_some_and(|message| message.get("return").is_some() || message.get("error").is_some())
            {
                return Some(message);
            }
            self.events.push(text);
        }
    }

    fn message(&mut self) -> (Value, String) {
        let line = self.output.recv_timeout(PATIENCE).expect("a line");
        (json::parse(line.as_bytes()).unwrap_or_else(|error| panic!("{error}: {line:?}")), line)
    }

    fn wait_for(&mut self, event: &str) {
        while !self.events.iter().any(|heard| heard.contains(event)) {
            let (_, text) = self.message();
            self.events.push(text);
        }
        self.events.clear();
    }

    /// Ends the input; the exit status.
    fn end(mut self) -> Option<i32> {
        drop(self.input.take());
        self.running.0.wait().expect("waited for").code()
    }
}

fn sh(folder: &Path, line: &str) {
    let path = format!("{}:{}", folder.join("bin").display(), std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("sh");
    let output = command.args(["-ec", line]).current_dir(folder).env("PATH", path).output().expect("a shell");
    assert!(output.status.success(), "{line}: {output:?}");
}

/// One session of the document on a daemon.
fn session(program: &[&str], title: &str, lines: &[&str]) {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    std::fs::create_dir(folder.join("bin")).expect("a folder");
    assert!(
        Command::new(OURS)
            .arg("install-links")
            .arg(folder.join("bin"))
            .output()
            .expect("links")
            .status
            .success()
    );
    sh(folder, "qemu-img create -q -f qcow2 a.qcow2 39M; qemu-io -f qcow2 -c 'write -P 7 1M 9M' a.qcow2");
    sh(
        folder,
        "qemu-img create -q -f qcow2 abc.qcow2 39M; qemu-img create -q -f qcow2 -b abc.qcow2 -F qcow2 target-disk.qcow2",
    );
    let disk = "node-name=node-A,driver=qcow2,file.driver=file,file.node-name=file,file.filename=./a.qcow2";
    let far = "node-name=node-TargetDisk,driver=qcow2,file.driver=file,file.node-name=file,file.filename=./target-disk.qcow2";
    // In the document a virtio device uses the disk; here an export does.
    let server = ["--nbd-server", "addr.type=unix,addr.path=nbd.sock"];
    let export = ["--export", "type=nbd,id=virtio0,node-name=node-A,writable=on"];
    let near = [["--blockdev", disk], server, export].concat();
    let _daemons = [daemon(program, folder, "1", &near), daemon(program, folder, "2", &["--blockdev", far])];
    let mut shells = [Shell::start(folder, "1"), Shell::start(folder, "2")];
    let mut open = false;
    for line in lines {
        if let Some(command) = line.strip_prefix("$ ") {
            sh(folder, command);
            continue;
        }
        if let Some(event) = line.strip_prefix("? ") {
            shells[0].wait_for(event);
            continue;
        }
        let (fails, line) = line.strip_prefix("! ").map_or((false, *line), |line| (true, line));
        let (at, typed) = match (line.strip_prefix("(QEMU) "), line.strip_prefix("(QEMU 2) ")) {
            (Some(typed), _) => (0, typed),
            (_, Some(typed)) => (1, typed),
            _ => panic!("{title}: {line}"),
        };
        open = typed == "transaction(" || open && typed != ")";
        let reply = shells[at].line(typed, open);
        let error = reply.as_ref().and_then(|reply| reply.as_object()?.get("error"));
        assert_eq!(error.is_some(), fails, "{title}: {typed}: {reply:?}");
        if fails {
            let name = ["1", "2"][at];
            let shell = std::mem::replace(&mut shells[at], Shell::start(folder, name));
            assert_eq!(shell.end(), Some(1), "{title}: {typed}");
        }
    }
    for shell in shells {
        assert_eq!(shell.end(), Some(0), "{title}");
    }
}

/// The port of the document's storage migration is one for all who run this on a machine.
fn take_port() -> File {
    let file = File::create(std::env::temp_dir().join("underlay-port-49153")).expect("a file");
    file.lock().expect("a turn");
    file
}

fn document(program: &[&str]) {
    let _turn = take_port();
    let text = include_str!("shell/live-block-operations.txt");
    let mut sessions: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match line.strip_prefix("= ") {
            Some(title) => sessions.push((title, Vec::new())),
            None => sessions.last_mut().expect("a title").1.push(line),
        }
    }
    assert_eq!(sessions.len(), 12);
    for (title, lines) in sessions {
        session(program, title, &lines);
    }
}

#[test]
fn the_documents_lines_work_as_they_are_printed() {
    document(&[OURS, "storage-daemon"]);
}

#[test]
fn they_work_on_the_reference_too() {
    let program = "qemu-storage-daemon";
    if Command::new(program).arg("--version").output().is_err() {
        eprintln!("skipped: there is no {program}");
        return;
    }
    document(&[program]);
}

/// Runs the shell on an input; its output, and its exit status.
fn shell(folder: &Path, options: &[&str], input: &str) -> Output {
    let mut command = Command::new(OURS);
    command.arg("shell").args(options).current_dir(folder);
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().expect("the shell starts");
    // It may end before it has read everything.
    let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
    child.wait_with_output().expect("the shell ends")
}

/// A folder with a daemon in it that has a node called n.
fn with_daemon() -> (tempfile::TempDir, Running) {
    let folder = tempfile::tempdir().expect("a folder");
    let node = ["--blockdev", "null-co,node-name=n,size=1048576,read-zeroes=on"];
    let daemon = daemon(&[OURS, "storage-daemon"], folder.path(), "1", &node);
    (folder, daemon)
}

fn said(output: &[u8]) -> String {
    String::from_utf8_lossy(output).into_owned()
}

#[test]
fn a_script_ends_at_the_first_error() {
    let (folder, _daemon) = with_daemon();
    let input = "# a comment\n\n{'execute': 'query-jobs', 'id': 'x'}\nblock-export-del id=none\nquery-jobs\n";
    let output = shell(folder.path(), &["1.sock"], input);
    let error = r#"{"error": {"class": "GenericError", "desc": "Export 'none' is not found"}}"#;
    assert_eq!(said(&output.stdout), format!("{{\"return\": [], \"id\": \"x\"}}\n{error}\n"));
    let complaint = "qmp-shell: line 4: block-export-del: GenericError: Export 'none' is not found\n";
    assert_eq!((said(&output.stderr).as_str(), output.status.code()), (complaint, Some(1)));
}

#[test]
fn lines_that_cannot_be_sent_end_it_too() {
    let (folder, _daemon) = with_daemon();
    for (input, complaint) in [
        ("query-jobs\nquery-jobs x\n", "line 2: Expected a key=value pair, got 'x'"),
        ("transaction(\nabort\n", "the transaction at the end is not closed"),
        ("query-jobs a='\u{fffd}", "line 1: The value of 'a' is not closed"),
        ("quit\nquery-jobs\n", "line 2: The server has closed the connection"),
    ] {
        let output = shell(folder.path(), &["1.sock"], input);
        assert_eq!(said(&output.stderr), format!("qmp-shell: {complaint}\n"), "{input}");
        assert_eq!(output.status.code(), Some(1), "{input}");
    }
}

#[test]
fn options_change_what_is_shown() {
    let (folder, _daemon) = with_daemon();
    let shown = |options: &[&str]| said(&shell(folder.path(), options, "query-jobs").stdout);
    assert_eq!(shown(&["1.sock"]), "{\"return\": []}\n");
    assert_eq!(shown(&["-p", "1.sock"]), "{\n    \"return\": []\n}\n");
    let sent = "{\n    \"execute\": \"query-jobs\",\n    \"arguments\": {}\n}\n";
    assert_eq!(shown(&["-vp", "1.sock"]), format!("{sent}{{\n    \"return\": []\n}}\n"));
    assert_eq!(shown(&["-l", "log", "1.sock"]), "{\"return\": []}\n");
    let log = std::fs::read_to_string(folder.path().join("log")).expect("a log");
    let directions: Vec<_> = log.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(directions, ["<-", "->", "<-", "->", "<-"], "{log}");
    assert!(
        log.ends_with("-> {\"execute\": \"query-jobs\", \"arguments\": {}}\n<- {\"return\": []}\n"),
        "{log}"
    );
    // Without negotiation a QMP server refuses everything, and that is shown.
    assert!(shown(&["-N", "1.sock"]).contains("Expecting capabilities negotiation"));
}

#[test]
fn the_human_monitor_is_asked_for() {
    let (folder, _daemon) = with_daemon();
    let output = shell(folder.path(), &["-H", "1.sock"], "info block\n");
    assert!(
        said(&output.stderr).starts_with("qmp-shell: The server has no human monitor (CommandNotFound: "),
        "{output:?}"
    );
    assert_eq!(output.status.code(), Some(1));
    // One that has it.
    let listener = UnixListener::bind(folder.path().join("hmp.sock")).expect("a socket");
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        stream.write_all(b"{\"QMP\": {}}\n").expect("sent");
        let mut asked = Vec::new();
        for line in BufReader::new(stream.try_clone().expect("a handle")).lines() {
            let request = json::parse(line.expect("a line").as_bytes()).expect("JSON");
            let arguments =
                request.as_object().and_then(|object| object.get("arguments")).expect("arguments");
            asked.push(arguments.as_it_came(false));
            let answer = if asked.len() == 4 { r#""""# } else { r#""a\u001b[2Jb\r\nc\r\n""# };
            stream.write_all(format!("{{\"return\": {answer}}}\n").as_bytes()).expect("sent");
        }
        asked
    });
    let output = shell(folder.path(), &["-H", "hmp.sock"], "info block\n\ncpu 1\ninfo registers\n");
    assert_eq!(said(&output.stdout), "a[2Jb\nc\na[2Jb\nc\n");
    assert_eq!(
        server.join().expect("the server"),
        [
            "{}",
            r#"{"command-line": "help"}"#,
            r#"{"command-line": "info block"}"#,
            r#"{"command-line": "cpu 1", "cpu-index": 1}"#,
            r#"{"command-line": "info registers", "cpu-index": 1}"#,
        ]
    );
}

#[test]
fn the_command_line() {
    let folder = tempfile::tempdir().expect("a folder");
    for (options, status, complaint) in [
        (&["no.sock"][..], 1, "Couldn't connect to no.sock: No such file or directory (os error 2)"),
        (&["-l", "no/log", "no.sock"], 1, "no/log: No such file or directory (os error 2)"),
        (&[], 2, "a server is missing"),
        (&["a", "b"], 2, "there can be only one server"),
        (&["-x", "a"], 2, "invalid option -- 'x'"),
    ] {
        let output = shell(folder.path(), options, "");
        assert!(said(&output.stderr).starts_with(&format!("qmp-shell: {complaint}\n")), "{output:?}");
        assert_eq!(output.status.code(), Some(status), "{options:?}");
    }
    let help = shell(folder.path(), &["--help"], "");
    assert!(said(&help.stdout).starts_with("Usage: qmp-shell") && help.status.success());
}

/// Events and replies are printed in the order in which the server has sent them.
#[test]
fn what_comes_first_is_printed_first() {
    const LINES: usize = 300;
    let folder = tempfile::tempdir().expect("a folder");
    let listener = UnixListener::bind(folder.path().join("s")).expect("a socket");
    let messages =
        |number: usize| format!("{{\"event\": \"B\"}}\n{{\"return\": {number}}}\n{{\"event\": \"A\"}}\n");
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        stream.write_all(b"{\"QMP\": {}}\n").expect("sent");
        let lines = BufReader::new(stream.try_clone().expect("a handle")).lines();
        for (number, _) in lines.take(LINES + 1).enumerate() {
            stream.write_all(messages(number).as_bytes()).expect("sent");
        }
    });
    let output = shell(folder.path(), &["-v", "s"], &"x\n".repeat(LINES));
    server.join().expect("the server");
    let printed = said(&output.stdout).replace("{\"execute\": \"x\", \"arguments\": {}}\n", "");
    let wanted: String = (0..=LINES).map(messages).collect();
    // The shell is done with the last reply, and the first is that to its own negotiation.
    let (wanted, last) = wanted.rsplit_once("{\"event\": \"A\"").expect("an event");
    assert!(
        last.len() < 10 && printed.starts_with(&wanted.replacen("{\"return\": 0}\n", "", 1)),
        "{printed}"
    );
}

/// A server that talks nonsense, or all too much, ends the shell with a reason.
#[test]
fn a_server_that_is_none() {
    let folder = tempfile::tempdir().expect("a folder");
    let endless = [b"{\"QMP\": \"".as_slice(), &[b'x'; 70 << 20]].concat();
    for (said_by_server, reason) in [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".as_slice(), "The server does not speak QMP: "),
        (b"", "The server has closed the connection"),
        (&endless, "The server does not speak QMP: JSON token size limit exceeded"),
    ] {
        let socket = folder.path().join("s");
        let listener = UnixListener::bind(&socket).expect("a socket");
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let (mut stream, _) = listener.accept().expect("a client");
                // The client leaves before it has heard everything.
                let _ = stream.write_all(said_by_server);
            });
            let output = shell(folder.path(), &["s"], "query-jobs\n");
            assert!(said(&output.stderr).contains(&format!("qmp-shell: {reason}")), "{output:?}");
            assert_eq!(output.status.code(), Some(1));
        });
        std::fs::remove_file(socket).expect("removed");
    }
}

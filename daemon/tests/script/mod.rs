//! A script against a daemon: its lines are executed, replies and events are kept.
//!
//! A line `! …` is a shell command, `? NAME [TEXT]` waits for an event (that has the text in it) after the last command
//! and the event waited for before, `~ …` is a command whose reply does not count, and anything else is a command to
//! execute. What may differ (generated names, times, sizes on disk) is blanked out.

#![allow(dead_code, reason = "not every test needs all of it")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use underlay_qmp::json::{self, Object, Value};

/// A running daemon, ended when dropped.
pub struct Daemon {
    child: Child,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a daemon said.
#[derive(Default)]
pub struct Heard {
    /// Each with its command.
    pub replies: Vec<String>,
    /// In their order.
    pub events: Vec<String>,
    /// The last reply as it came.
    pub last: String,
}

struct Client {
    reader: BufReader<UnixStream>,
    heard: Heard,
    /// Names and texts of the events since the last command was sent, reply or not, and since the last one waited for:
    /// what a script may wait for.
    fresh: Vec<(String, String)>,
}

impl Client {
    /// The daemon is the one that connects: one that listens hears clients before its monitor is there, and the
    /// reference's then greets twice or loses what was sent.
    fn accept(listener: &UnixListener, daemon: &mut Daemon) -> Self {
        listener.set_nonblocking(true).expect("a socket");
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(_) => assert!(matches!(daemon.child.try_wait(), Ok(None)), "the daemon ended"),
            }
            std::thread::yield_now();
        };
        stream.set_nonblocking(false).expect("a socket");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
        let mut client = Self { reader: BufReader::new(stream), heard: Heard::default(), fresh: Vec::new() };
        let greeting = client.line().expect("a greeting");
        assert!(greeting.0.get("QMP").is_some(), "{}", greeting.1);
        client.execute("{\"execute\": \"qmp_capabilities\"}");
        client
    }

    /// A message, and its line as it came: the order of members counts.
    fn line(&mut self) -> Option<(Object, String)> {
        let mut line = String::new();
        let read = self.reader.read_line(&mut line);
        let last = self.heard.replies.last();
        read.unwrap_or_else(|error| panic!("{error}: the daemon does not answer, last {last:?}"));
        match json::parse(line.as_bytes()) {
            Ok(Value::Object(object)) => Some((object, line.trim_end().to_owned())),
            _ if line.is_empty() => None,
            other => panic!("{other:?}"),
        }
    }

    fn execute(&mut self, command: &str) {
        self.fresh.clear();
        self.reader.get_mut().write_all(format!("{command}\n").as_bytes()).expect("written");
        while let Some((message, line)) = self.line() {
            if message.get("event").is_none() {
                self.heard.replies.push(format!("{command}\n    {}", blanked(&line)));
                self.heard.last = line;
                return;
            }
            self.event(&message, &line);
        }
        self.heard.replies.push(format!("{command}\n    nothing"));
    }

    fn event(&mut self, message: &Object, line: &str) {
        let timestamp = line.find("}, ").unwrap_or_else(|| panic!("no event: {line}"));
        self.heard.events.push(blanked(&line[timestamp..]));
        let name = message.get("event").and_then(Value::as_str);
        self.fresh.extend(name.map(|name| (name.to_owned(), line.to_owned())));
    }

    fn wait_for(&mut self, event: &str) {
        let (name, text) = event.split_once(' ').unwrap_or((event, ""));
        loop {
            let found = self.fresh.iter().position(|(fresh, line)| fresh == name && line.contains(text));
            if let Some(at) = found {
                self.fresh.drain(..=at);
                return;
            }
            let (message, line) = self.line().unwrap_or_else(|| panic!("no {event}"));
            self.event(&message, &line);
        }
    }
}

/// How the names of times, and of what is reckoned from them, end.
const TIMES: [&str; 4] = ["_total_time_ns", "idle_time_ns", "_latency_ns", "_queue_depth"];

/// Without what cannot be the same.
pub fn blanked(line: &str) -> String {
    let mut out = String::new();
    let mut rest = line;
    while let Some(at) = rest.find("#block") {
        out.push_str(&rest[..at]);
        out.push_str("#blockN");
        rest = rest[at + 6..].trim_start_matches(|c: char| c.is_ascii_digit());
    }
    out.push_str(rest);
    // The folder of this run.
    let mut parts = out.split("/.tmp");
    let mut said = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        said.truncate(said.rfind("unix:").map_or(said.len(), |at| at + 5));
        said.push_str("FOLDER");
        said.push_str(part.trim_start_matches(|c: char| c.is_ascii_alphanumeric()));
    }
    let out = said;
    // How much room a file takes up is said to people, too.
    let mut parts = out.split("disk size: ");
    let mut said = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        said.push_str("disk size: N");
        said.push_str(part.find('\\').map_or("", |end| &part[end..]));
    }
    let out = said;
    // How long anything takes, if it took place.
    let out = TIMES.iter().fold(out, |out, name| {
        let name = format!("{name}\": ");
        let mut parts = out.split(&name);
        let mut done = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            done.push_str(&name);
            let number = |c: char| c.is_ascii_digit() || matches!(c, '.' | 'e' | '-' | '+');
            let rest = part.trim_start_matches(number);
            done.push_str(if part.strip_suffix(rest) == Some("0") { "0" } else { "N" });
            done.push_str(rest);
        }
        done
    });
    let mut numbers = vec!["actual-size", "thread-id"];
    // The dates of snapshots that were taken just now; a script may have set others.
    if out.contains("\"date-sec\": 1") {
        numbers.extend(["date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"]);
    }
    numbers.into_iter().fold(out, |out, name| {
        let name = format!("\"{name}\": ");
        let mut parts = out.split(&name);
        let mut done = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            done.push_str(&name);
            done.push('N');
            done.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
        }
        done
    })
}

/// Runs a script with a program that connects to `qmp.sock` in its folder. `path` comes before what shell commands
/// find.
pub fn run(program: &str, arguments: &[&str], script: &str, path: Option<&Path>) -> Heard {
    let folder = tempfile::tempdir().expect("a folder");
    let mut lines =
        script.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')).peekable();
    let shell = |line: &str| {
        let mut shell = Command::new("sh");
        if let Some(path) = path {
            let rest = std::env::var("PATH").unwrap_or_default();
            shell.env("PATH", format!("{}:{rest}", path.display()));
        }
        let status = shell.args(["-c", line]).current_dir(folder.path()).stdout(Stdio::null()).status();
        assert!(status.expect("a shell").success(), "{line}");
    };
    while let Some(line) = lines.next_if(|line| line.starts_with('!')) {
        shell(&line[1..]);
    }
    let mut daemon = Command::new(program);
    daemon.args(arguments);
    let listener = UnixListener::bind(folder.path().join("qmp.sock")).expect("a socket");
    let child = daemon.current_dir(folder.path()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut daemon = Daemon { child: child.expect("the daemon starts") };
    let mut client = Client::accept(&listener, &mut daemon);
    for line in lines {
        match line.split_at(1) {
            ("!", command) => shell(command),
            ("?", name) => client.wait_for(name.trim()),
            ("~", command) => {
                client.execute(command.trim());
                client.heard.replies.pop();
            }
            _ => client.execute(line),
        }
    }
    client.heard
}

/// Shows the first difference with what is around it: a reply can be many thousand characters long.
pub fn same(what: &str, ours: &[String], theirs: &[String]) {
    let (ours, theirs) = (ours.join("\n"), theirs.join("\n"));
    let Some(at) = ours.bytes().zip(theirs.bytes()).position(|(a, b)| a != b) else {
        assert_eq!(ours.len(), theirs.len(), "{what}: one has more");
        return;
    };
    let line = ours[..at].rfind('\n').map_or(0, |end| end + 1);
    let begin = line.max(at.saturating_sub(200));
    let around = |text: &str| text.bytes().skip(begin).take(600).collect::<Vec<_>>();
    let (ours, theirs) = (around(&ours), around(&theirs));
    let (ours, theirs) = (String::from_utf8_lossy(&ours), String::from_utf8_lossy(&theirs));
    panic!("{what} differ\n  ours:   …{ours}\n\n  theirs: …{theirs}");
}

/// Whether a program can be started.
pub fn is_installed(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok_and(|status| status.success())
}

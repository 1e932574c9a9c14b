//! The specification, from its first line to its last, on machines that are started as it prints it: once in QMP, once
//! as it is typed, into the shell and the human monitor. Each time the replies, the events in their order, the chain
//! after each step and what all images hold in the end are those that the reference was seen to have.
//!
//! A script in `tests/specification` has sessions (`= TITLE`). In a session:
//!
//! | line | what it is |
//! |---|---|
//! | `$ COMMAND` | a command of a shell; those before the machines are for before they start |
//! | `1: WORDS`, `2: WORDS` | starts a machine, without the program's name; `$PWD` is the folder |
//! | `(QEMU) LINE` | typed into the shell of machine 1, or with `(QEMU 2)` of 2 |
//! | `{…}` | what that line says in QMP: the shell must send it, and the other form sends it itself |
//! | `(qemu) LINE` | typed into the human monitor of machine 1; with ` ~~ LINE` behind it that goes to the reference |
//! | `+ NAME` | the lines of the part `= + NAME` |
//! | `? EVENT [TEXT]` | machine 1 tells it; the chain is looked at |
//!
//! Machine 1 is looked at after each line that is no job's, too. What the reference said is beside each script
//! (`*.expected`); `UNDERLAY_SYSTEM_EMULATOR` asks it again and `UNDERLAY_RECORD` writes it down.

mod script;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use script::{blanked, is_installed};
use underlay_qmp::json::{self, Object, Value};

const OURS: &str = env!("CARGO_BIN_EXE_underlay");

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// How lines go to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// As JSON.
    Qmp,
    /// As they are typed.
    Typed,
}

/// What is started.
#[derive(Clone, Copy)]
enum Program<'a> {
    Ours,
    Theirs(&'a str),
}

/// A monitor for programs.
struct Link {
    reader: BufReader<UnixStream>,
    /// All events so far; and the first that nobody has waited for.
    events: Vec<String>,
    fresh: usize,
}

impl Link {
    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut link = Self { reader: BufReader::new(stream), events: Vec::new(), fresh: 0 };
        assert!(link.message().expect("a greeting").0.get("QMP").is_some());
        link.execute("{\"execute\": \"qmp_capabilities\"}");
        link
    }

    fn message(&mut self) -> Option<(Object, String)> {
        let mut line = String::new();
        let read = self.reader.read_line(&mut line);
        read.unwrap_or_else(|error| {
            panic!("{error}: the machine does not answer, events {:#?}", self.events)
        });
        match json::parse(line.as_bytes()) {
            Ok(Value::Object(object)) => Some((object, line.trim_end().to_owned())),
            _ if line.is_empty() => None,
            other => panic!("{other:?}"),
        }
    }

    fn event(&mut self, line: &str) {
        let begin = line.find("}, ").unwrap_or_else(|| panic!("no event: {line}"));
        self.events.push(blanked(&line[begin + 3..]));
    }

    /// The reply, as it came.
    fn execute(&mut self, command: &str) -> (Object, String) {
        self.reader.get_mut().write_all(format!("{command}\n").as_bytes()).expect("written");
        loop {
            let (object, line) = self.message().unwrap_or_else(|| panic!("{command}: the machine has ended"));
            if object.get("event").is_none() {
                return (object, blanked(&line));
            }
            self.event(&line);
        }
    }

    fn wait_for(&mut self, event: &str) {
        let (name, text) = event.split_once(' ').unwrap_or((event, ""));
        let name = format!("\"event\": \"{name}\"");
        loop {
            let is_it = |event: &String| event.contains(&name) && event.contains(text);
            if let Some(at) = self.events[self.fresh..].iter().position(is_it) {
                self.fresh += at + 1;
                return;
            }
            let (_, line) = self.message().unwrap_or_else(|| panic!("no {event}"));
            self.event(&line);
        }
    }

    /// What is still to come until the machine has ended.
    fn drain(&mut self) {
        let mut line = String::new();
        while self.reader.read_line(&mut line).is_ok_and(|read| read > 0) {
            if line.contains("\"event\"") {
                self.event(line.trim_end());
            }
            line.clear();
        }
    }
}

/// The shell, typed to through a pipe.
struct Shell {
    child: Child,
    input: ChildStdin,
    output: Receiver<String>,
}

impl Shell {
    fn start(folder: &Path, socket: &str) -> Self {
        let mut command = Command::new(OURS);
        command.args(["shell", "-v", socket]).current_dir(folder);
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = piped.spawn().expect("the shell starts");
        let (input, output) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
        let (sender, lines) = channel();
        let reader = BufReader::new(output).lines();
        std::thread::spawn(move || reader.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { child, input, output: lines }
    }

    /// Types a line: what was sent for it, and the reply.
    fn line(&mut self, line: &str) -> (Value, String) {
        self.input.write_all(format!("{line}\n").as_bytes()).expect("typed");
        let parse =
            |line: &str| json::parse(line.as_bytes()).unwrap_or_else(|error| panic!("{error}: {line}"));
        let mut sent = None;
        loop {
            let text = self.output.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no reply to {line}"));
            let message = parse(&text);
            let has = |name| message.as_object().is_some_and(|object| object.get(name).is_some());
            if has("execute") {
                sent = Some(message);
            } else if has("return") || has("error") {
                return (sent.unwrap_or(Value::Null), blanked(&text));
            }
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const PROMPT: &str = "(qemu) ";

/// A machine: what it was started with, and the ways to talk to it.
struct Machine {
    child: Child,
    /// What nobody types into: events, and questions about the chain.
    link: Link,
    /// The monitor of the invocation.
    socket: PathBuf,
    typed: Option<Shell>,
    terminal: Option<ChildStdin>,
    screen: Receiver<Vec<u8>>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Machine {
    fn start(program: Program<'_>, folder: &Path, number: usize, words: &str) -> Self {
        let name = format!("t{number}.sock");
        let listener = UnixListener::bind(folder.join(&name)).expect("a socket");
        let mut command = match program {
            Program::Ours => Command::new(OURS),
            Program::Theirs(program) => Command::new(program),
        };
        match program {
            Program::Ours => drop(command.arg("machine")),
            Program::Theirs(_) => drop(command.args(["-accel", "tcg"])),
        }
        // The option of the document was given up since.
        let is_known = |word: &&str| matches!(program, Program::Ours) || *word != "-nodefconfig";
        command.args(words.split_whitespace().filter(is_known));
        command.args(["-chardev", &format!("socket,id=t,path={name}"), "-mon", "t,mode=control"]);
        let piped = command.current_dir(folder).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = piped.stderr(Stdio::null()).spawn().expect("the machine starts");
        listener.set_nonblocking(true).expect("a socket");
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(_) => assert!(matches!(child.try_wait(), Ok(None)), "{words}: the machine ended"),
            }
            std::thread::yield_now();
        };
        stream.set_nonblocking(false).expect("a socket");
        let (sender, screen) = channel();
        let mut output = child.stdout.take().expect("a pipe");
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(read) = output.read(&mut bytes) {
                if read == 0 || sender.send(bytes[..read].to_vec()).is_err() {
                    break;
                }
            }
        });
        let terminal = child.stdin.take();
        let socket = words.split_whitespace().find_map(|word| word.strip_prefix("unix:"));
        let socket = folder.join(socket.and_then(|word| word.split(',').next()).expect("a monitor"));
        let mut machine = Self { child, link: Link::new(stream), socket, typed: None, terminal, screen };
        machine.read_screen();
        machine
    }

    /// What the human monitor shows up to its prompt.
    fn read_screen(&mut self) -> String {
        let mut shown = Vec::new();
        while !shown.ends_with(PROMPT.as_bytes()) {
            match self.screen.recv_timeout(PATIENCE) {
                Ok(bytes) => shown.extend(bytes),
                // It was told to quit.
                Err(_) => break,
            }
        }
        String::from_utf8_lossy(&shown).into_owned()
    }

    /// A line of the human monitor; what it says.
    fn human(&mut self, form: Form, line: &str) -> String {
        let said = match form {
            Form::Qmp => {
                let text = Object::new().with("command-line", line);
                let request = Object::new().with("execute", "human-monitor-command").with("arguments", text);
                let (reply, _) = self.link.execute(&Value::Object(request).as_it_came(false));
                reply.get("return").and_then(Value::as_str).unwrap_or("an error").to_owned()
            }
            Form::Typed => {
                let terminal = self.terminal.as_mut().expect("a terminal");
                terminal.write_all(format!("{line}\n").as_bytes()).expect("typed");
                let shown = self.read_screen();
                let shown = shown.strip_suffix(PROMPT).unwrap_or(&shown);
                shown.split_once("\r\n").map_or("", |(_, said)| said).to_owned()
            }
        };
        // The reference tells of images that it makes on its standard output.
        let folder = self.socket.parent().map(|folder| folder.to_string_lossy().into_owned());
        let said = said.replace(&folder.unwrap_or_default(), "FOLDER");
        let lines = said.lines().filter(|line| !line.starts_with("Formatting "));
        lines.fold(String::new(), |text, line| text + "    " + blanked(line).trim_end() + "\n")
    }

    /// A command; its reply.
    fn execute(&mut self, form: Form, line: &str, json: &str) -> String {
        match form {
            Form::Qmp => self.link.execute(json).1,
            Form::Typed => {
                let (folder, socket) = (self.socket.parent(), self.socket.file_name());
                let (folder, socket) = (folder.expect("a folder"), socket.expect("a name").to_string_lossy());
                let shell = self.typed.get_or_insert_with(|| Shell::start(folder, &socket));
                let (sent, reply) = shell.line(line);
                let wanted = json::parse(json.as_bytes()).expect("JSON");
                assert_eq!(sent.to_string(), wanted.to_string(), "{line}");
                if reply.starts_with("{\"error\"") {
                    // That ends the shell.
                    self.typed = None;
                }
                reply
            }
        }
    }

    /// The images in each device from the top down, and the nodes with names.
    fn chain(&mut self) -> String {
        let list = |reply: Object| match reply.get("return") {
            Some(Value::List(list)) => list.clone(),
            _ => Vec::new(),
        };
        let text = |object: &Object, name: &str| {
            object.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        let mut shown = String::new();
        for device in list(self.link.execute("{\"execute\": \"query-block\"}").0) {
            let device = device.as_object().expect("a device").clone();
            let mut files = Vec::new();
            let mut image = device.get("inserted").and_then(|inserted| inserted.as_object()?.get("image"));
            while let Some(object) = image.and_then(Value::as_object) {
                files.push(text(object, "filename"));
                image = object.get("backing-image");
            }
            let name = [text(&device, "device"), text(&device, "qdev")].concat();
            let _ = writeln!(shown, "    {name}: {}", files.join(" -> "));
        }
        let nodes: BTreeSet<_> = list(self.link.execute("{\"execute\": \"query-named-block-nodes\"}").0)
            .iter()
            .filter_map(Value::as_object)
            .map(|node| (text(node, "node-name"), text(node, "file")))
            .filter(|(name, _)| !name.starts_with('#'))
            .map(|(name, file)| format!("{name}={file}"))
            .collect();
        let nodes: Vec<_> = nodes.into_iter().collect();
        let _ = writeln!(shown, "    nodes: {}", nodes.join(" "));
        shown
    }
}

/// The machines' folder, with our tools in `bin`.
struct Place(tempfile::TempDir);

impl Drop for Place {
    fn drop(&mut self) {
        if let Ok(pid) = fs::read_to_string(self.0.path().join("nbdkit.pid")) {
            let _ = Command::new("kill").arg(pid.trim()).status();
        }
    }
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let bin = folder.path().join("bin");
        fs::create_dir(&bin).expect("a folder");
        let links = Command::new(OURS).arg("install-links").arg(&bin).output().expect("links");
        assert!(links.status.success());
        Self(folder)
    }

    fn sh(&self, line: &str) -> String {
        let path = self.0.path().join("bin").display().to_string();
        let path = format!("{path}:{}", std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("timeout");
        command.args(["-s", "KILL", "60", "sh", "-ec", line]).current_dir(self.0.path()).env("PATH", path);
        let output = command.output().expect("a shell");
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What the images hold: each with the name of its backing file, and a number for its content.
    fn contents(&self) -> String {
        let mut names: Vec<_> = fs::read_dir(self.0.path())
            .expect("the folder")
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.len() == 1 || name.ends_with(".qcow2") || name.ends_with(".img"))
            .collect();
        names.sort();
        let one = "qemu-img check -q $name && qemu-img convert -O raw $name $name.content \
                   && echo $(qemu-img info $name | sed -n 's/^backing file: \\([^ ]*\\).*/\\1/p')";
        let backing = self.sh(&format!("for name in {}; do {one}; done", names.join(" ")));
        let show = |(name, backing): (&String, &str)| {
            let content = digest(&self.0.path().join(format!("{name}.content")));
            let backing = if backing.is_empty() { "nothing" } else { backing };
            format!("    {name} on {backing}: {content:016x}\n")
        };
        names.iter().zip(backing.lines()).map(show).collect()
    }
}

/// A number for the bytes of a file and their places; zeroes do not count.
fn digest(path: &Path) -> u64 {
    let mut file = File::open(path).expect("a file");
    let (mut bytes, mut at, mut sum) = (vec![0; 64 << 10], 0_u64, 0_u64);
    loop {
        let read = file.read(&mut bytes).expect("read");
        if read == 0 {
            return sum;
        }
        if bytes[..read].iter().any(|byte| *byte != 0) {
            for (here, byte) in (at..).zip(&bytes[..read]).filter(|(_, byte)| **byte != 0) {
                let mixed = (here << 8 | u64::from(*byte)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                sum = sum.wrapping_add(mixed ^ mixed >> 29);
            }
        }
        at += read as u64;
    }
}

/// Whether a line may start something that is not over with its reply.
fn starts_a_job(line: &str) -> bool {
    let name = line.split_whitespace().next().unwrap_or_default().replace('_', "-");
    let verbs =
        ["block-stream", "block-commit", "drive-", "blockdev-mirror", "blockdev-backup", "transaction"];
    verbs.iter().any(|verb| name.starts_with(verb)) || name.starts_with("block-job-")
}

/// The job that an event is about.
fn job_of(event: &str) -> &str {
    let after = |name: &str| event.split_once(&format!("\"{name}\": \"")).map(|(_, rest)| rest);
    let id = after("id").or_else(|| after("device")).unwrap_or_default();
    id.split('"').next().unwrap_or_default()
}

/// One session; all that is to be seen of it.
fn session(program: Program<'_>, form: Form, title: &str, lines: &[&str]) -> String {
    let _turn = lines.iter().any(|line| line.contains("4915")).then(take_ports);
    let place = Place::new();
    let mut machines: Vec<Machine> = Vec::new();
    let mut out = format!("= {title}\n");
    let mut lines = lines.iter().peekable();
    while let Some(line) = lines.next() {
        if let Some(command) = line.strip_prefix("$ ") {
            let said = place.sh(command);
            let _ = write!(out, "{line}\n{said}");
            continue;
        }
        let number = machines.len() + 1;
        if let Some(words) = line.strip_prefix(&format!("{number}: ")) {
            let words = words.replace("$PWD", &place.0.path().to_string_lossy());
            machines.push(Machine::start(program, place.0.path(), number, &words));
            continue;
        }
        let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
        let _ = writeln!(out, "{line}");
        if kind == "?" {
            machines[0].link.wait_for(rest);
        } else if kind == "(qemu)" {
            // What the reference does not understand is said to it in another way.
            let (ours, theirs) = rest.split_once(" ~~ ").unwrap_or((rest, rest));
            let said = match program {
                Program::Ours => ours,
                Program::Theirs(_) => theirs,
            };
            out += &machines[0].human(form, said);
        } else {
            let (at, typed) = match line.strip_prefix("(QEMU 2) ") {
                Some(typed) => (1, typed),
                None => (0, line.strip_prefix("(QEMU) ").unwrap_or_else(|| panic!("{title}: {line}"))),
            };
            // The lines of a transaction are typed one by one.
            let mut typed = typed.to_owned();
            while let Some(line) = lines.next_if(|line| line.starts_with("TRANS> ")) {
                typed = typed + "\n" + &line[7..];
            }
            let json = lines.next_if(|line| line.starts_with('{')).expect("what it says in QMP");
            let reply = machines[at].execute(form, &typed, json);
            let _ = writeln!(out, "    {reply}");
        }
        let rest = rest.strip_prefix("2) ").unwrap_or(rest);
        if rest == "quit" {
            machines[0].link.drain();
            assert!(machines[0].child.wait().expect("it ends").success(), "{title}");
            continue;
        }
        let is_over = !rest.is_empty() && !starts_a_job(rest) && !line.starts_with("(QEMU 2)")
            // Between two events nobody knows how far it is.
            && !lines.peek().is_some_and(|next| next.starts_with("? "));
        if is_over {
            out += &machines[0].chain();
        }
    }
    for (at, machine) in machines.iter_mut().enumerate() {
        if machine.child.try_wait().expect("a machine").is_none() {
            machine.link.reader.get_mut().write_all(b"{\"execute\": \"quit\"}\n").ok();
        }
        machine.link.drain();
        assert!(machine.child.wait().expect("it ends").success(), "{title}");
        let _ = writeln!(out, "EVENTS OF {}", at + 1);
        // Those of one job are in their order; jobs beside each other have none.
        let mut events = machine.link.events.clone();
        // A machine of the reference that waits for another one's memory does not run before that has come.
        events.retain(|event| !event.contains("\"RESUME\""));
        events.sort_by_key(|event| job_of(event).to_owned());
        let jobs: BTreeSet<_> = events.iter().map(|event| job_of(event).to_owned()).collect();
        if jobs.iter().filter(|job| !job.is_empty()).count() > 1 {
            // Where a job is when another one begins, ends or fails, and so is held for a moment or waits, nobody
            // knows.
            let passes = ["paused", "waiting"].map(|status| format!("\"status\": \"{status}\""));
            events.retain(|event| !passes.iter().any(|status| event.contains(status)));
            events.dedup();
        }
        for event in events.iter_mut().filter(|event| event.contains("BLOCK_JOB_CANCELLED")) {
            // How far it had come is another thing that nobody can know.
            if let (Some(begin), Some(end)) = (event.find("\"offset\""), event.find("\"speed\"")) {
                event.replace_range(begin..end, "");
            }
        }
        events.iter().for_each(|event| out += &format!("    {event}\n"));
    }
    drop(machines);
    out += "CONTENTS\n";
    out += &place.contents();
    out.replace(&*place.0.path().to_string_lossy(), "FOLDER")
}

/// The ports of the document are the same for all who run this on a machine.
fn take_ports() -> File {
    let file = File::create(std::env::temp_dir().join("underlay-port-49153")).expect("a file");
    file.lock().expect("a turn");
    file
}

fn follow(name: &str) {
    let path = |kind: &str| {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/specification").join(format!("{name}.{kind}"))
    };
    let text = fs::read_to_string(path("txt")).expect("a script");
    let mut sessions: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let part = |(title, _): &&(&str, Vec<&str>)| *title == line;
        match (line.strip_prefix("= "), sessions.iter().find(part).map(|(_, lines)| lines.clone())) {
            (Some(title), _) => sessions.push((title, Vec::new())),
            (None, Some(lines)) => sessions.last_mut().expect("a title").1.extend(lines),
            (None, None) => sessions.last_mut().expect("a title").1.push(line),
        }
    }
    sessions.retain(|(title, _)| !title.starts_with("+ "));
    let run = |program: Program<'_>, form: Form| {
        sessions.iter().map(|(title, lines)| session(program, form, title, lines)).collect::<String>()
    };
    if let Ok(emulator) = std::env::var("UNDERLAY_SYSTEM_EMULATOR") {
        let program = Program::Theirs(&emulator);
        let theirs = run(program, Form::Qmp);
        if std::env::var("UNDERLAY_RECORD").is_ok() {
            fs::write(path("expected"), &theirs).expect("written");
        }
        compare("what was written down", &theirs, &fs::read_to_string(path("expected")).expect("it was"));
        compare("typed to the reference", &run(program, Form::Typed), &theirs);
    }
    let expected = fs::read_to_string(path("expected")).expect("what the reference said");
    for form in [Form::Qmp, Form::Typed] {
        compare(&format!("{form:?}"), &run(Program::Ours, form), &expected);
    }
}

/// Shows the first lines that differ.
fn compare(what: &str, ours: &str, theirs: &str) {
    let differs = ours.lines().zip(theirs.lines()).position(|(a, b)| a != b);
    let Some(at) = differs.or((ours.len() != theirs.len()).then_some(theirs.lines().count())) else { return };
    let part = |text: &str| text.lines().skip(at.saturating_sub(6)).take(14).collect::<Vec<_>>().join("\n");
    panic!("{what}:\n### ours\n{}\n### theirs\n{}", part(ours), part(theirs));
}

#[test]
fn live_block_operations() {
    follow("live-block-operations");
}

#[test]
fn the_older_notes() {
    follow("older-notes");
}

#[test]
fn bitmaps() {
    // A disk that cannot be read, as the document has it.
    if is_installed("nbdkit") {
        follow("bitmaps");
    } else {
        eprintln!("skipped: there is no nbdkit");
    }
}

//! The shell, and the human monitor of a machine, on a terminal: a real pty, with an emulator that knows what is on its
//! screen. Nothing here waits for a time: each step waits until the screen shows what it has to.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::num::NonZeroU16;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use underlay_qmp::blocking::Monitor;
use underlay_qmp::json::Object;

/// How long the screen may take to show what it has to.
const PATIENCE: Duration = Duration::from_secs(60);

const ROWS: u16 = 24;
const COLUMNS: u16 = 130;

/// A process that is ended when it goes.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A terminal with a shell on it, or a machine.
struct Terminal {
    keyboard: File,
    output: Receiver<Vec<u8>>,
    screen: vt100::Parser,
    /// Everything that was written to the terminal.
    raw: Vec<u8>,
    shell: Running,
}

impl Terminal {
    fn start(folder: &Path, socket: &str, environment: &[(&str, &str)]) -> Self {
        Self::with(folder, &["shell", socket], environment)
    }

    /// With our program and these arguments.
    fn with(folder: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a pty");
        grantpt(&master).and_then(|()| unlockpt(&master)).expect("a pty");
        let name = OsString::from_vec(ptsname(&master, Vec::new()).expect("a name").into_bytes());
        tcsetwinsize(&master, size(ROWS, COLUMNS)).expect("a size");
        let slave = File::options().read(true).write(true).open(name).expect("a terminal");
        let stream = || Stdio::from(slave.try_clone().expect("a handle"));
        // In a session of its own the terminal is its own, and it hears when the size changes.
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait", env!("CARGO_BIN_EXE_underlay")]).args(arguments);
        command.current_dir(folder).stdin(stream()).stdout(stream()).stderr(stream());
        command.env("TERM", "xterm").env("XDG_STATE_HOME", folder.join("state")).env_remove("NO_COLOR");
        let shell = Running(command.envs(environment.iter().copied()).spawn().expect("the shell starts"));
        let (sender, output) = channel();
        let mut reader = File::from(master.try_clone().expect("a handle"));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // At the end of the shell reading fails.
            while let Ok(read) = reader.read(&mut bytes) {
                if read == 0 || sender.send(bytes[..read].to_vec()).is_err() {
                    break;
                }
            }
        });
        let screen = vt100::Parser::new(nonzero(ROWS), nonzero(COLUMNS), 0);
        Self { keyboard: File::from(master), output, screen, raw: Vec::new(), shell }
    }

    fn type_in(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).expect("typed");
    }

    fn resize(&mut self, columns: u16) {
        self.screen.screen_mut().set_size(nonzero(ROWS), nonzero(columns));
        tcsetwinsize(&self.keyboard, size(ROWS, columns)).expect("a size");
    }

    /// The rows of the screen down to the cursor's.
    fn rows(&self) -> Vec<String> {
        let screen = self.screen.screen();
        let (_, columns) = screen.size();
        let down = usize::from(screen.cursor_position().0) + 1;
        screen.rows(0, columns.get()).take(down).map(|row| row.trim_end().to_owned()).collect()
    }

    fn wait(&mut self, what: &str, shown: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !shown(self) {
            let bytes = self.output.recv_timeout(PATIENCE.saturating_sub(begun.elapsed()));
            let bytes =
                bytes.unwrap_or_else(|error| panic!("{what}: {error}, the screen is {:#?}", self.rows()));
            self.raw.extend_from_slice(&bytes);
            self.screen.process(&bytes);
        }
    }

    /// Waits until the row with the cursor is `row`, with the cursor right behind it.
    fn wait_for_row(&mut self, row: &str) {
        self.wait_for_cursor(row, row.chars().count());
    }

    /// Waits until the row with the cursor is `row`, with the cursor in that column.
    fn wait_for_cursor(&mut self, row: &str, column: usize) {
        self.wait(row, |terminal| {
            let cursor = usize::from(terminal.screen.screen().cursor_position().1);
            cursor == column && terminal.rows().last().is_some_and(|last| last == row.trim_end())
        });
    }

    /// The row that is `above` rows above the cursor's.
    fn above(&self, above: usize) -> String {
        self.rows().into_iter().rev().nth(above).unwrap_or_default()
    }

    /// The colour of the first character of the row that is `above` rows above the cursor's.
    fn colour(&self, above: u16) -> vt100::Color {
        let screen = self.screen.screen();
        screen.cell(screen.cursor_position().0 - above, 0).expect("a cell").fgcolor()
    }

    /// Waits for the shell to end; its exit status.
    fn end(&mut self) -> Option<i32> {
        self.shell.0.wait().expect("waited for").code()
    }
}

fn size(ws_row: u16, ws_col: u16) -> Winsize {
    Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 }
}

fn nonzero(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).expect("a size")
}

/// A folder with a daemon in it, that listens for the shell and for somebody else.
fn with_daemon(options: &[&str]) -> (tempfile::TempDir, Running, Monitor) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(env!("CARGO_BIN_EXE_underlay"));
    command.arg("storage-daemon").args(options).current_dir(folder.path()).stdin(Stdio::null());
    for name in ["s", "other"] {
        command.arg("--chardev").arg(format!("socket,id={name},path={name},server=on,wait=off"));
        command.args(["--monitor", name]);
    }
    let daemon = Running(command.spawn().expect("the daemon starts"));
    // Both listen once the second one answers.
    let monitor = Monitor::connect(&folder.path().join("other")).expect("a monitor");
    (folder, daemon, monitor)
}

const NODE: [&str; 2] = ["--blockdev", "null-co,node-name=n,size=1073741824"];

#[test]
fn lines_are_edited_completed_and_remembered() {
    let (folder, _daemon, _other) = with_daemon(&NODE);
    let mut terminal = Terminal::start(folder.path(), "s", &[]);
    terminal.wait_for_row("(QEMU) ");
    assert_eq!(terminal.rows()[..2], ["Welcome to the QMP low-level shell!", "Connected to QEMU 10.0.2"]);

    terminal.type_in("uery-jbs\x1b[D\x1b[Do\x01q");
    terminal.wait_for_cursor("(QEMU) query-jobs", 8);
    terminal.type_in("\x05\x7f");
    terminal.wait_for_row("(QEMU) query-job");
    terminal.type_in("\x15");
    terminal.wait_for_row("(QEMU) ");

    terminal.type_in("query-jo\t");
    terminal.wait_for_row("(QEMU) query-jobs ");
    terminal.type_in("\r");
    terminal.wait("a reply", |terminal| terminal.above(1) == "{\"return\": []}");
    terminal.wait_for_row("(QEMU) ");

    terminal.type_in("blockdev-add dri\tnull\t");
    terminal.wait_for_row("(QEMU) blockdev-add driver=null-");
    terminal.type_in("\t\t");
    terminal.wait("a list", |terminal| terminal.above(1).split_whitespace().eq(["null-aio", "null-co"]));
    terminal.wait_for_row("(QEMU) blockdev-add driver=null-");
    terminal.type_in("co node\t");
    terminal.wait_for_row("(QEMU) blockdev-add driver=null-co node-name=");
    terminal.type_in("\x03");
    terminal.wait_for_row("(QEMU) ");
    terminal.type_in("\x1b[A");
    terminal.wait_for_row("(QEMU) query-jobs");
    terminal.type_in("\x03");
    terminal.wait_for_row("(QEMU) ");

    terminal.type_in("nope\r");
    let error = r#"{"error": {"class": "CommandNotFound", "desc": "The command nope has not been found"}}"#;
    terminal.wait("an error", |terminal| terminal.above(1) == error);
    assert_eq!(terminal.colour(1), vt100::Color::Idx(1));
    terminal.type_in("query-jobs x\r");
    terminal.wait("an error", |terminal| terminal.above(1) == "Expected a key=value pair, got 'x'");
    terminal.wait_for_row("(QEMU) ");

    // Pasted lines are lines.
    terminal.type_in("\x1b[200~query-jobs\ntransaction(\x1b[201~\r");
    terminal.wait_for_row("TRANS> ");
    assert_eq!(terminal.above(1), "{\"return\": []}");
    terminal.type_in("blockdev-snapshot-s\tnode-n\t");
    terminal.wait_for_row("TRANS> blockdev-snapshot-sync node-name=");
    terminal.type_in("\x03");
    terminal.wait_for_row("(QEMU) ");

    terminal.type_in("\x04");
    assert_eq!(terminal.end(), Some(0));
    let history =
        std::fs::read_to_string(folder.path().join("state/underlay/qmp-history")).expect("a history");
    assert_eq!(
        history.lines().skip(1).collect::<Vec<_>>(),
        ["query-jobs", "nope", "query-jobs x", "query-jobs", "transaction("]
    );

    let mut terminal = Terminal::start(folder.path(), "s", &[("NO_COLOR", "1")]);
    terminal.wait_for_row("(QEMU) ");
    terminal.type_in("\x1b[A\x1b[A\x1b[A\x1b[A");
    terminal.wait_for_row("(QEMU) nope");
    terminal.type_in("\r");
    terminal.wait("an error", |terminal| terminal.above(1) == error);
    assert_eq!(terminal.colour(1), vt100::Color::Default);
}

/// Whether the terminal shows by itself what is typed.
fn echoes(terminal: &Terminal) -> bool {
    tcgetattr(&terminal.keyboard).expect("a terminal").local_modes.contains(LocalModes::ECHO)
}

#[test]
fn the_human_monitor_of_a_machine() {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["disk.img", "disk2.img"] {
        std::fs::write(folder.path().join(name), [0; 512]).expect("a file");
    }
    let machine = "machine -nodefaults -display none -S -monitor stdio -device virtio-scsi \
                   -drive if=none,id=d0,driver=null-co,size=1048576 -drive if=none,id=d1,driver=null-co \
                   -drive if=none,id=cd,media=cdrom -device scsi-cd,drive=cd \
                   -blockdev driver=null-co,node-name=node-A,read-zeroes=on";
    let arguments: Vec<&str> = machine.split_whitespace().collect();
    let mut terminal = Terminal::with(folder.path(), &arguments, &[]);
    terminal.wait_for_row("(qemu) ");
    assert!(terminal.above(1).starts_with("QEMU 10.0.2 monitor") && !echoes(&terminal));

    // Each key is seen once, where the line is edited.
    terminal.type_in("ifo stats\x1b[D\x1b[Du\x01\x1b[Cn");
    terminal.wait_for_cursor("(qemu) info stauts", 9);
    terminal.type_in("\x05\x1b[D\x1b[D\x7f\x1b[Cu");
    terminal.wait_for_cursor("(qemu) info status", 17);
    terminal.type_in("\r");
    terminal.wait("an answer", |terminal| terminal.above(1) == "VM status: paused (prelaunch)");
    terminal.type_in("\x1b[A");
    terminal.wait_for_row("(qemu) info status");
    terminal.type_in("\x15");
    terminal.wait_for_row("(qemu) ");

    terminal.type_in("comm\t\t");
    terminal.wait("a list", |terminal| terminal.above(1).split_whitespace().eq(["cd", "d0", "d1", "node-A"]));
    terminal.type_in("n\t");
    terminal.wait_for_row("(qemu) commit node-A ");
    terminal.type_in("\x15change cd di\t");
    terminal.wait("a list", |terminal| terminal.above(1).split_whitespace().eq(["disk.img", "disk2.img"]));
    terminal.wait_for_row("(qemu) change cd disk");
    terminal.resize(60);
    terminal.type_in("2\t");
    terminal.wait_for_row("(qemu) change cd disk2.img ");
    terminal.type_in("raw\r");
    terminal.wait_for_row("(qemu) ");
    terminal.resize(COLUMNS);

    for (line, answer) in [
        ("info block cd", "    Cache mode:       writeback"),
        ("info named-block-nodes node-A", "    Cache mode:       writeback"),
        ("info named-block-nodes -v nope", "info named-block-nodes -v nope"),
        ("commit nope", "Device 'nope' not found"),
        ("device_add virtio-blk,drive=d1,id=v1", ""),
        ("device_add virtio-blk,drive=d1,id=v2", "Error: Drive 'd1' is already in use by another device"),
        ("device_add virtio-blk,drive=node-A,id=v3", ""),
        ("device_add virtio-blk,drive=node-A,id=v4", "as 'root' child)."),
        ("drive_mirror d0 copy.img raw", "Formatting 'copy.img', fmt=raw size=1048576"),
        ("drive_del d0", "Node 'd0' is busy: block device is in use by block job: mirror"),
        ("block_stream d0", "Error: Node 'd0' is busy: block device is in use by block job: mirror"),
        ("nonsense", "unknown command: 'nonsense'"),
    ] {
        terminal.type_in(&format!("{line}\r"));
        terminal.wait(line, |terminal| {
            let expected = if answer.is_empty() { line } else { answer };
            terminal.above(1).ends_with(expected) && terminal.above(0) == "(qemu)"
        });
    }
    // Ctrl-C ends the machine, and the terminal is as it was.
    terminal.type_in("half a li\x03");
    assert_eq!(terminal.end(), Some(0));
    assert!(echoes(&terminal));
}

/// With signals off Ctrl-C is a key without a meaning, and `quit` gives the terminal back, too.
#[test]
fn a_terminal_without_signals() {
    let folder = tempfile::tempdir().expect("a folder");
    let machine = "machine -nodefaults -display none -S -chardev stdio,id=c,signal=off -mon c";
    let arguments: Vec<&str> = machine.split_whitespace().collect();
    let mut terminal = Terminal::with(folder.path(), &arguments, &[]);
    terminal.wait_for_row("(qemu) ");
    terminal.type_in("qu\x03it");
    terminal.wait_for_row("(qemu) quit");
    terminal.type_in("\r");
    assert_eq!(terminal.end(), Some(0));
    assert!(echoes(&terminal));
}

#[test]
fn events_come_above_the_line_that_is_typed() {
    let (folder, _daemon, mut other) = with_daemon(&NODE);
    let mut terminal = Terminal::start(folder.path(), "s", &[]);
    terminal.wait_for_row("(QEMU) ");
    terminal.type_in("query-jbs\x1b[D\x1b[D");
    terminal.wait_for_cursor("(QEMU) query-jbs", 14);

    let address = Object::new().with("type", "unix").with("data", Object::new().with("path", "nbd"));
    other.execute("nbd-server-start", Object::new().with("addr", address)).expect("started");
    for id in ["e1", "e2"] {
        let export = Object::new().with("type", "nbd").with("id", id).with("node-name", "n").with("name", id);
        other.execute("block-export-add", export).expect("added");
        other.execute("block-export-del", Object::new().with("id", id)).expect("deleted");
        let end = format!("\"event\": \"BLOCK_EXPORT_DELETED\", \"data\": {{\"id\": \"{id}\"}}}}");
        terminal.wait("an event", |terminal| terminal.above(1).ends_with(&end));
        assert_eq!(terminal.colour(1), vt100::Color::Idx(6));
        terminal.wait_for_cursor("(QEMU) query-jbs", 14);
    }
    // The line is still what it was.
    terminal.type_in("o\r");
    terminal.wait("a reply", |terminal| terminal.above(1) == "{\"return\": []}");
    terminal.wait_for_row("(QEMU) ");

    // Narrower, the line goes on in a second row, and is put together again when there is room.
    let long = format!("query-jobs x={}", "abcdefghij".repeat(9));
    terminal.resize(60);
    terminal.type_in(&long);
    let in_two_rows = |terminal: &Terminal, line: &str| {
        format!("{}{}", terminal.above(1), terminal.above(0)) == format!("(QEMU) {line}")
    };
    terminal.wait("two rows", |terminal| in_two_rows(terminal, &long));
    terminal.resize(COLUMNS);
    terminal.type_in("k");
    // The key may come before the signal that tells of the size; the next one does not.
    let long = format!("{long}k");
    terminal.wait("the key", |terminal| {
        in_two_rows(terminal, &long) || terminal.above(0) == format!("(QEMU) {long}")
    });
    terminal.type_in("l");
    terminal.wait_for_row(&format!("(QEMU) {long}l"));
    terminal.type_in("\x03");
    terminal.wait_for_row("(QEMU) ");

    other.execute("quit", Object::new()).expect("quit");
    let reason = "The server has closed the connection";
    terminal.wait("the end", |terminal| terminal.rows().iter().any(|row| row == reason));
    terminal.type_in("\r");
    assert_eq!(terminal.end(), Some(1));
}

#[test]
fn a_line_says_how_far_jobs_are() {
    let (folder, _daemon, mut other) = with_daemon(&NODE);
    let mut terminal = Terminal::start(folder.path(), "s", &[]);
    terminal.wait_for_row("(QEMU) ");
    terminal.type_in("blockdev-add driver=null-co node-name=copy size=1073741824\r");
    terminal.type_in("blockdev-backup device=n target=copy sync=full job-id=job0 speed=33554432\r");
    terminal.type_in("query-j");
    let percent = |terminal: &Terminal| {
        let row = terminal.above(1);
        let (job, rest) = row.split_once(" [")?;
        let (number, status) = rest.split_once("] ")?.1.split_once("% ")?;
        (job == "job0 backup" && status == "running").then_some(number.parse::<u32>().ok()?)
    };
    terminal.wait("progress", |terminal| percent(terminal) > Some(0));
    terminal.wait_for_row("(QEMU) query-j");
    let seen = percent(&terminal);
    terminal.wait("more of it", |terminal| percent(terminal) > seen);
    terminal.wait_for_row("(QEMU) query-j");
    other.execute("job-cancel", Object::new().with("id", "job0")).expect("cancelled");
    terminal.wait("the end", |terminal| terminal.above(1) == "no job is running");
    terminal.wait_for_row("(QEMU) query-j");
    assert!(terminal.rows().iter().any(|row| row.contains("BLOCK_JOB_CANCELLED")), "{:#?}", terminal.rows());
    terminal.type_in("obs\r");
    terminal.wait("a reply", |terminal| terminal.above(1) == "{\"return\": []}");
    terminal.type_in("quit\r");
    assert_eq!(terminal.end(), Some(0));
}

/// Events come all the time, also just when a line is ended and the next is begun: each is shown once, in order.
#[test]
fn no_event_is_lost_between_two_lines() {
    const LINES: u32 = 60;
    let folder = tempfile::tempdir().expect("a folder");
    let listener = UnixListener::bind(folder.path().join("s")).expect("a socket");
    let (more, wanted) = channel();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let mut lines = BufReader::new(stream.try_clone().expect("a handle")).lines();
        stream.write_all(b"{\"QMP\": {}}\n").expect("sent");
        let mut number = 0;
        loop {
            // Some before the reply, some after it; between these the next line is begun.
            let line = lines.next().expect("a line").expect("read");
            let last = line.contains("quit");
            for at in 0..40 {
                if at == 20 {
                    stream.write_all(b"{\"return\": 7}\n").expect("sent");
                }
                stream
                    .write_all(format!("{{\"event\": \"E\", \"n\": {number}}}\n").as_bytes())
                    .expect("sent");
                number += 1;
            }
            more.send(()).expect("heard");
            if last {
                return number;
            }
        }
    });
    let mut terminal = Terminal::start(folder.path(), "s", &[]);
    // Capabilities, the schema and jobs; then the user's lines, each as soon as the one before it is being answered.
    for line in 0..LINES {
        wanted.recv_timeout(PATIENCE).expect("a line was heard");
        if line >= 2 {
            terminal.type_in("x\r");
        }
    }
    terminal.type_in("quit\r");
    assert_eq!(terminal.end(), Some(0));
    let sent = server.join().expect("the server");
    while let Ok(bytes) = terminal.output.recv_timeout(PATIENCE) {
        terminal.raw.extend_from_slice(&bytes);
    }
    let raw = String::from_utf8_lossy(&terminal.raw).into_owned();
    let numbers =
        raw.split("\"n\": ").skip(1).map(|rest| rest.split('}').next().unwrap_or_default().to_owned());
    assert!(numbers.eq((0..sent).map(|number| number.to_string())), "{raw}");
}

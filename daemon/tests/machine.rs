//! A machine answers as the reference's system emulator does.
//!
//! Scripts are in `tests/machine`; a line `@ …` in front has arguments for the program, [`script`] says what the others
//! mean. Beside each is what the reference said (`*.expected`). Where `UNDERLAY_SYSTEM_EMULATOR` names a system
//! emulator, it is asked again, and with `UNDERLAY_RECORD` what it says is written down.

mod script;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use script::{Heard, run, same};

const MONITOR: [&str; 4] = ["-chardev", "socket,id=m,path=qmp.sock", "-mon", "m,mode=control"];
const COMMON: [&str; 3] = ["-nodefaults", "-display", "none"];

/// A script's lines and its arguments.
fn read(name: &str) -> (String, Vec<String>) {
    let text = fs::read_to_string(path(name, "qmp")).expect("a script");
    let is_argument = |line: &&str| line.starts_with('@');
    let arguments = text.lines().filter(is_argument).flat_map(|line| line[1..].split_whitespace());
    let arguments = arguments.map(str::to_owned).collect();
    let lines: Vec<_> = text.lines().filter(|line| !is_argument(line)).collect();
    (lines.join("\n"), arguments)
}

fn path(name: &str, kind: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/machine").join(format!("{name}.{kind}"))
}

fn heard(heard: &Heard) -> Vec<String> {
    heard.replies.iter().cloned().chain(["EVENTS".to_owned()]).chain(heard.events.clone()).collect()
}

/// Replies and events.
fn compare(name: &str) {
    compare_what(name, heard);
}

/// Only replies: how often a job is held for a moment is nobody's business.
fn compare_replies(name: &str) {
    compare_what(name, |heard| heard.replies.clone());
}

fn compare_what(name: &str, heard: impl Fn(&Heard) -> Vec<String>) {
    let (script, arguments) = read(name);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    // Images are made by our own tool, whichever machine has them: nothing needs to be installed.
    let tools = tempfile::tempdir().expect("a folder");
    symlink(env!("CARGO_BIN_EXE_underlay"), tools.path().join("qemu-img")).expect("a link");
    let tools = Some(tools.path());
    if let Ok(emulator) = std::env::var("UNDERLAY_SYSTEM_EMULATOR") {
        let small = ["-accel", "tcg", "-m", "64"];
        let theirs =
            heard(&run(&emulator, &[&small[..], &COMMON, &arguments, &MONITOR].concat(), &script, tools));
        if std::env::var("UNDERLAY_RECORD").is_ok() {
            fs::write(path(name, "expected"), theirs.join("\n") + "\n").expect("written");
        }
        same(&format!("{name}: what was written down"), &expected(name), &lines(&theirs));
    }
    let ours = run(
        env!("CARGO_BIN_EXE_underlay"),
        &[&["machine"][..], &COMMON, &arguments, &MONITOR].concat(),
        &script,
        tools,
    );
    same(name, &lines(&heard(&ours)), &expected(name));
    assert!(ours.replies.len() > 5, "{name} says something");
}

fn lines(said: &[String]) -> Vec<String> {
    said.iter().flat_map(|text| text.lines()).map(str::to_owned).collect()
}

fn expected(name: &str) -> Vec<String> {
    lines(&[fs::read_to_string(path(name, "expected")).expect("what the reference said")])
}

/// A line of a command line, and what is said to it.
struct Said {
    line: String,
    answer: String,
}

/// Lines after `$ ` with what is said to them, the exit status first.
fn read_lines(text: &str) -> Vec<Said> {
    let said = |part: &str| {
        let (line, answer) = part.split_once('\n').unwrap_or((part, ""));
        Said { line: line.to_owned(), answer: answer.trim_end().to_owned() }
    };
    text.split("$ ").skip(1).map(said).collect()
}

/// Runs a line that ends by itself. Should it not, it is ended.
fn say(program: &Path, more: &str, line: &str) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let files = "truncate -s 1M r.img; \"$1\" img create -q -f qcow2 a.qcow2 1M; \"$1\" img create -q -f qcow2 b.qcow2 1M";
    let script = format!("{files}; exec timeout -s KILL 30 \"$0\" {more} -nodefaults -display none {line}");
    let output = Command::new("sh")
        .args(["-c", &script])
        .arg(program)
        .arg(env!("CARGO_BIN_EXE_underlay"))
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .output()
        .expect("a shell");
    let status = output.status.code().unwrap_or(-1);
    format!("{status}\n{}", String::from_utf8_lossy(&output.stderr)).trim_end().to_owned()
}

/// What a terminal is sent while somebody types, as the reference was seen to send it.
#[test]
fn human_on_a_socket() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut machine = Command::new(env!("CARGO_BIN_EXE_underlay"))
        .args(["machine", "-S", "-monitor", "unix:m,server=on,wait=on"])
        .args(COMMON)
        .args(["-drive", "if=none,id=d0,driver=null-co", "-drive", "if=none,id=d1,driver=null-co"])
        .current_dir(&folder)
        .stderr(Stdio::null())
        .spawn()
        .expect("a machine");
    let socket = folder.path().join("m");
    let mut stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(_) => assert!(matches!(machine.try_wait(), Ok(None)), "the machine ended"),
        }
        std::thread::yield_now();
    };
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
    let mut said = |typed: &[u8], answer: &str| {
        stream.write_all(typed).expect("it listens");
        let answer = answer.replace('<', "\x1b[D").replace('|', "\x1b[K");
        let mut found = vec![0; answer.len()];
        stream.read_exact(&mut found).expect("an answer");
        assert_eq!(String::from_utf8_lossy(&found), answer);
    };
    said(b"", "QEMU 10.0.2 monitor - type 'help' for more information\r\n(qemu) ");
    said(b"inf\t", "i|<in|<<inf|<<<info |");
    said(
        b"stat\t\n",
        "<<<<<info s|<<<<<<info st|<<<<<<<info sta|<<<<<<<<info stat|<<<<<<<<<info status |\r\n",
    );
    said(b"", "VM status: paused (prelaunch)\r\n(qemu) ");
    said(b"\x1b[A\x15", "info status |<<<<<<<<<<<<|");
    said(b"x\x7feject \t", "x|<|e|<ej|<<eje|<<<ejec|<<<<eject|<<<<<eject |");
    said(b"", "\r\nd0        d1        \r\n(qemu) eject d|");
    said(b"9\n", "<<<<<<<eject d9|\r\nError: Device 'd9' not found\r\n(qemu) ");
    said(b"q\n", "q|\r\n");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).expect("the end");
    assert!(rest.is_empty() && machine.wait().expect("a machine").success());
}

/// What is no text, what has no end, and who does not wait for the answer: the next one is served as ever.
#[test]
fn human_in_bad_company() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut machine = Command::new(env!("CARGO_BIN_EXE_underlay"))
        .args(["machine", "-S", "-monitor", "unix:m,server=on,wait=off"])
        .args(COMMON)
        .args(["-drive", "if=none,id=d0,driver=null-co", "-pidfile", "pid"])
        .current_dir(&folder)
        .stderr(Stdio::null())
        .spawn()
        .expect("a machine");
    while !folder.path().join("pid").exists() {
        assert!(matches!(machine.try_wait(), Ok(None)), "the machine ended");
        std::thread::yield_now();
    }
    let come = || UnixStream::connect(folder.path().join("m")).expect("a monitor");
    // Both sides of what is written and what is read meanwhile.
    let talk = |stream: UnixStream, typed: Vec<u8>| {
        let mut writer = stream.try_clone().expect("a handle");
        let writer = std::thread::spawn(move || writer.write_all(&typed));
        let mut reader = stream;
        reader.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
        let (mut heard, mut bytes) = (Vec::new(), [0; 4096]);
        while !heard.ends_with(b"paused (prelaunch)\r\n(qemu) ") {
            let count = reader.read(&mut bytes).expect("an answer in time");
            assert_ne!(count, 0, "the machine hung up");
            heard.extend(&bytes[..count]);
            heard.drain(..heard.len().saturating_sub(200));
        }
        writer.join().expect("a thread").expect("written");
    };
    let all_bytes: Vec<u8> = (0..=255).cycle().take(5000).collect();
    for garbage in [
        all_bytes,
        b"\xff\xfe\x1b[999999999999;1;1~\x1b[\x1bO\x1b".to_vec(),
        vec![b'x'; 20_000],
        b"{\"execute\": \"qmp_capabilities\"}\r\nGET / HTTP/1.1\r\n\r\n\0\0".to_vec(),
        b"qemu-io d0 \"read -v 0 \"\n\t\t\t\"\t\\\t".to_vec(),
    ] {
        // A key that ends what may have begun, and a line of its own.
        talk(come(), [&garbage[..], b"x\x05\x15\ninfo status\n"].concat());
    }
    for number in 0..100 {
        let mut stream = come();
        stream
            .write_all(&b"help\ninfo block -v\nqemu-io d0 \"read -v 0 64k\"\n".repeat(number % 7))
            .expect("sent");
        let _ = stream.read(&mut [0; 100]);
    }
    talk(come(), b"info status\n".to_vec());
    come().write_all(b"quit\n").expect("sent");
    assert!(machine.wait().expect("a machine").success());
}

#[test]
fn human_blockdev() {
    compare("human_blockdev");
}

#[test]
fn human() {
    compare("human");
}

#[test]
fn human_words() {
    compare("human_words");
}

#[test]
fn busy() {
    compare_replies("busy");
}

#[test]
fn human_disks() {
    compare("human_disks");
}

/// The reference prints that elsewhere.
#[test]
fn what_qemu_io_says_is_for_the_monitor() {
    let script = "!qemu-img create -q -f qcow2 a.qcow2 1M\n";
    let lines = [
        ("write -P 0x61 0 64k", "wrote 65536/65536 bytes at offset 0\\r\\n64 KiB, 1 ops; "),
        ("aio_read -P 0x61 0 1k", "read 1024/1024 bytes at offset 0\\r\\n1 KiB, 1 ops; "),
        ("read -v 0 4", "00000000:  61 61 61 61  aaaa\\r\\nread 4/4 bytes at offset 0\\r\\n"),
        ("map", "64 KiB (0x10000) bytes     allocated at offset 0 bytes (0x0)\\r\\n960 KiB"),
        ("length", "1 MiB\\r\\n\""),
        ("read -P 1 0 1", "Pattern verification failed at offset 0, 1 bytes\\r\\nread 1/1"),
        ("read -Z 0 1", "read: invalid option -- 'Z'\\r\\nread [-abCqrv]"),
        ("read 0", "bad argument count 1 to read, expected at least 2 arguments\\r\\n\""),
        ("read 1M 1", "read failed: Input/output error\\r\\n\""),
        ("read 0 65M", "length cannot exceed 67108864 on a monitor, given 68157440\\r\\n\""),
        ("reopen -r", "reopen: Operation not supported; use blockdev-reopen\\r\\n\""),
        ("write -s . 0 1", ".: not a regular file\\r\\n\""),
        ("close", "command \\\"close\\\" not found\\r\\n\""),
        ("abort", "command \\\"abort\\\" not found\\r\\n\""),
        ("sigraise 9", "command \\\"sigraise\\\" not found\\r\\n\""),
        ("help quit", "command quit not found\\r\\n\""),
    ];
    let ask = |line: &str| {
        format!("{{\"execute\": \"human-monitor-command\", \"arguments\": {{\"command-line\": {line}}}}}\n")
    };
    let script = lines
        .iter()
        .fold(script.to_owned(), |script, (line, _)| script + &ask(&format!("\"qemu-io d \\\"{line}\\\"\"")));
    let script = script + &ask("\"qemu-io cd \\\"info\\\"\"") + &ask("\"qemu-io v \\\"length\\\"\"");
    let drives = ["-drive", "if=none,id=d,file=a.qcow2", "-drive", "if=none,id=cd,media=cdrom"];
    let device = ["-device", "virtio-blk,id=v,drive=d"];
    let folder = tempfile::tempdir().expect("a folder");
    symlink(env!("CARGO_BIN_EXE_underlay"), folder.path().join("qemu-img")).expect("a link");
    let arguments = [&["machine", "-S"][..], &COMMON, &drives, &device, &MONITOR].concat();
    let said = run(env!("CARGO_BIN_EXE_underlay"), &arguments, &script, Some(folder.path()));
    let expected = lines.iter().map(|(_, said)| *said).chain(["No medium found\\r\\n\"", "1 MiB\\r\\n\""]);
    // The first reply is that of the negotiation.
    for (reply, expected) in said.replies[1..].iter().zip(expected) {
        let answer = reply.split_once("\"return\": \"").map_or("", |(_, answer)| answer);
        assert!(answer.starts_with(expected), "{reply}, not {expected}");
    }
    assert_eq!(said.replies.len(), lines.len() + 3);
}

#[test]
fn command_lines() {
    let path = path("command_lines", "txt");
    let mut lines = read_lines(&fs::read_to_string(&path).expect("lines"));
    if let Ok(emulator) = std::env::var("UNDERLAY_SYSTEM_EMULATOR") {
        let record = std::env::var("UNDERLAY_RECORD").is_ok();
        for said in &mut lines {
            let answer = say(Path::new(&emulator), "-accel tcg -m 64", &said.line);
            if record {
                said.answer.clone_from(&answer);
            }
            assert_eq!(said.answer, answer, "{}: what was written down", said.line);
        }
        if record {
            let text = lines.iter().map(|said| format!("$ {}\n{}\n", said.line, said.answer));
            fs::write(&path, text.collect::<Vec<_>>().join("\n")).expect("written");
        }
    }
    let folder = tempfile::tempdir().expect("a folder");
    let ours = folder.path().join("qemu-system-x86_64");
    symlink(env!("CARGO_BIN_EXE_underlay"), &ours).expect("a link");
    let answers = lines.iter().map(|said| (said, say(&ours, "", &said.line)));
    let wrong: Vec<_> = answers
        .filter(|(said, answer)| said.answer != *answer)
        .map(|(said, answer)| format!("$ {}\n  ours:   {answer}\n  theirs: {}", said.line, said.answer))
        .collect();
    assert!(wrong.is_empty(), "{} lines:\n{}", wrong.len(), wrong.join("\n"));
    assert!(lines.len() > 80, "{} lines", lines.len());
}

/// As they are printed, but for where the socket is.
const OF_THE_SPECIFICATION: [&str; 2] = [
    "-display none -nodefconfig -M q35 -nodefaults -m 512 \
     -blockdev node-name=node-A,driver=qcow2,file.driver=file,file.node-name=file,file.filename=./a.qcow2 \
     -device virtio-blk,drive=node-A,id=virtio0 -monitor stdio -qmp unix:./qmp-sock,server,nowait",
    "-display none -nodefconfig -M q35 -nodefaults -m 512 \
     -blockdev node-name=node-TargetDisk,driver=qcow2,file.driver=file,file.node-name=file,file.filename=./a.qcow2 \
     -device virtio-blk,drive=node-TargetDisk,id=virtio0 \
     -S -monitor stdio -qmp unix:./qmp-sock2,server,nowait -incoming tcp:localhost:6666",
];

#[test]
fn the_specifications_machines_start() {
    for line in OF_THE_SPECIFICATION {
        let folder = tempfile::tempdir().expect("a folder");
        let (program, here) = (env!("CARGO_BIN_EXE_underlay"), folder.path());
        let mut make = Command::new(program);
        let made = make.args("img create -q -f qcow2 a.qcow2 1M".split(' ')).current_dir(here).status();
        assert!(made.expect("our tool").success());
        let mut machine = Command::new(program);
        machine.arg("machine").args(line.split_whitespace()).current_dir(here);
        let piped = machine.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut machine = piped.spawn().expect("a machine");
        machine.stdin.take().expect("a pipe").write_all(b"quit\n").expect("written");
        let output = machine.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.starts_with("QEMU 10.0.2 monitor"), "{line}\n{output:?}");
        assert!(
            String::from_utf8_lossy(&output.stderr).contains("without effect, as there is no CPU here: -m\n")
        );
    }
}

#[test]
fn devices() {
    compare("devices");
}

#[test]
fn drives() {
    compare("drives");
}

#[test]
fn plugging() {
    compare("plugging");
}

#[test]
fn media() {
    compare("media");
}

#[test]
fn throttling() {
    compare("throttling");
}

#[test]
fn running() {
    compare("running");
}

#[test]
fn objects() {
    compare("objects");
}

#[test]
fn incoming() {
    compare("incoming");
}

#[test]
fn statistics() {
    compare("statistics");
}

#[test]
fn chain_statistics() {
    compare("chain_statistics");
}

#[test]
fn drive_property() {
    compare("drive_property");
}

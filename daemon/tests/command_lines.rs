//! The same command lines for our `qemu-storage-daemon` and for the reference's: the same messages, the same exit
//! status.
//!
//! `command_lines.txt` has one on each line, as a shell reads it. Each ends by itself: a good one has `--monitor none`
//! behind it, which fails once everything before it has taken effect. Lines after `~ ` differ, for the reason that the
//! comment above them gives; the test sees to it that they do. What goes to standard output (version, help) is our own.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;

/// What is in the folder that a line runs in.
const FILES: [&str; 3] = ["x.raw", "x.qcow2", "old.qcow2"];

/// What a program said about a line.
#[derive(Debug, PartialEq)]
struct Outcome {
    status: Option<i32>,
    stderr: String,
}

/// Runs a line with the program that a link in `program` leads to. Should it not end, it is ended.
fn run(program: &Path, files: &Path, line: &str) -> Outcome {
    let folder = tempfile::tempdir().expect("a folder");
    for file in FILES {
        fs::copy(files.join(file), folder.path().join(file)).expect("a copy");
    }
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("exec timeout -s KILL 30 qemu-storage-daemon {line}")]);
    let path = std::env::var("PATH").unwrap_or_default();
    shell.env("PATH", format!("{}:{path}", program.display())).current_dir(folder.path());
    let output = shell.stdin(Stdio::null()).output().expect("a shell");
    Outcome { status: output.status.code(), stderr: String::from_utf8_lossy(&output.stderr).into_owned() }
}

fn prepare(files: &Path) {
    let sh = "truncate -s 1M x.raw && qemu-img create -q -f qcow2 x.qcow2 1M && \
              qemu-img create -q -f qcow2 -o compat=0.10 old.qcow2 1M";
    let status = Command::new("sh").args(["-c", sh]).current_dir(files).status();
    assert!(status.expect("a shell").success());
}

fn reference() -> Option<String> {
    let find =
        Command::new("sh").args(["-c", "command -v qemu-img >&2 && command -v qemu-storage-daemon"]).output();
    let found = find.ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&found.stdout).trim().to_owned())
}

/// What is wrong with a line, if anything.
fn judge(ours: &Path, theirs: &Path, files: &Path, line: &str) -> Option<String> {
    let (line, same) = line.strip_prefix("~ ").map_or((line, true), |line| (line, false));
    let (ours, theirs) = (run(ours, files, line), run(theirs, files, line));
    match (ours == theirs, same) {
        (true, true) | (false, false) => None,
        (false, true) => Some(format!("{line}\n  ours:   {ours:?}\n  theirs: {theirs:?}")),
        (true, false) => Some(format!("{line}\n  does not differ any more: {ours:?}")),
    }
}

#[test]
fn command_lines() {
    let Some(reference) = reference() else {
        println!("not compared: qemu-storage-daemon is not installed (Debian: qemu-utils)");
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let (ours, theirs) = (folder.path().join("ours"), folder.path().join("theirs"));
    for (name, program) in [(&ours, env!("CARGO_BIN_EXE_underlay")), (&theirs, reference.as_str())] {
        fs::create_dir(name).expect("a folder");
        symlink(program, name.join("qemu-storage-daemon")).expect("a link");
    }
    prepare(folder.path());
    let lines = include_str!("command_lines.txt").lines();
    let lines: Vec<_> = lines.filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    assert!(lines.len() > 100, "{} lines", lines.len());
    let (todo, wrong) = (Mutex::new(lines.into_iter()), Mutex::new(Vec::new()));
    let next = || todo.lock().expect("no panic").next();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(line) = next() {
                    let found = judge(&ours, &theirs, folder.path(), line);
                    wrong.lock().expect("no panic").extend(found);
                }
            });
        }
    });
    let wrong = wrong.into_inner().expect("no panic");
    assert!(wrong.is_empty(), "{} lines:\n{}", wrong.len(), wrong.join("\n"));
}

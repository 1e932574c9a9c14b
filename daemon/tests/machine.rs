//! A machine answers as the reference's system emulator does.
//!
//! Scripts are in `tests/machine`; a line `@ …` in front has arguments for the program, [`script`] says what the others mean.
//! Beside each is what the reference said (`*.expected`). Where `UNDERLAY_SYSTEM_EMULATOR` names a system emulator, it is
//! asked again, and with `UNDERLAY_RECORD` what it says is written down.

mod script;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

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

fn compare(name: &str) {
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
fn incoming() {
    compare("incoming");
}

//! A short run of every target: what is kept, then some seconds of mutations. `UNDERLAY_FUZZ=n` runs n times as many.

use std::path::Path;

use underlay_fuzz::{TARGETS, runner};

fn short(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target");
    runner::limit_memory();
    let times = std::env::var("UNDERLAY_FUZZ").ok().and_then(|times| times.parse().ok()).unwrap_or(1);
    let crashes = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    if let Err(crash) = runner::run(target, 1, target.short * times, &crashes) {
        panic!("{name}: {} is too much; again: {}", crash.input.display(), crash.again);
    }
}

#[test]
fn qcow2() {
    short("qcow2");
}

#[test]
fn qcow2_header() {
    short("qcow2-header");
}

#[test]
fn qmp() {
    short("qmp");
}

#[test]
fn blockdev() {
    short("blockdev");
}

#[test]
fn command_line() {
    short("command-line");
}

#[test]
fn nbd_server() {
    short("nbd-server");
}

#[test]
fn nbd_client() {
    short("nbd-client");
}

#[test]
fn shell() {
    short("shell");
}

#[test]
fn qmp_client() {
    short("qmp-client");
}

#[test]
fn a_target_that_fails_is_found_out() {
    let target = underlay_fuzz::Target {
        name: "trap",
        run: |data| assert!(!data.contains(&0x80), "the trap"),
        seeds: || vec![vec![0; 4]],
        mutate: underlay_fuzz::mutate::bytes,
        short: 0,
    };
    let crashes = Path::new(env!("CARGO_TARGET_TMPDIR")).join("trap");
    let crash = runner::run(&target, 1, 10_000, &crashes).expect_err("a crash");
    let input = std::fs::read(crash.input).expect("kept");
    assert!(input.contains(&0x80) && crash.again.contains("--seed"));
}

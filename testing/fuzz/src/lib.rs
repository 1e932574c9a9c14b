//! Fuzzing with ordinary means: targets are functions of bytes that must not panic, hang or take much memory, whatever
//! the bytes are; the runner replays what is kept (`corpus/TARGET/`) and what a target makes itself, and then
//! mutates it, everything from a seed.
//!
//! A target fits libFuzzer as it is: `libfuzzer/` beside this crate's sources is a program for `cargo fuzz` that runs
//! any of them.
#![forbid(unsafe_code)]

pub mod mutate;
pub mod runner;
pub mod targets;

use underlay_sim::Rng;

/// Something that takes bytes from strangers.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, and that of its folder in the corpus.
    pub name: &'static str,
    /// What must survive anything.
    pub run: fn(&[u8]),
    /// Inputs to begin with, besides the corpus.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// A change that knows what the bytes mean.
    pub mutate: fn(&mut Vec<u8>, &mut Rng),
    /// Mutated inputs in a short run.
    pub short: u64,
}

/// All targets.
pub const TARGETS: [Target; 9] = [
    Target {
        name: "qcow2",
        run: targets::qcow2::run,
        seeds: targets::qcow2::seeds,
        mutate: targets::qcow2::mutate,
        short: 1500,
    },
    Target {
        name: "qcow2-header",
        run: targets::qcow2::header,
        seeds: targets::qcow2::seeds_of_headers,
        mutate: targets::qcow2::mutate,
        short: 30_000,
    },
    Target {
        name: "qmp",
        run: targets::qmp::run,
        seeds: targets::qmp::seeds,
        mutate: mutate::text,
        short: 10_000,
    },
    Target {
        name: "blockdev",
        run: targets::blockdev::run,
        seeds: targets::blockdev::seeds,
        mutate: mutate::text,
        short: 20_000,
    },
    Target {
        name: "command-line",
        run: targets::command_line::run,
        seeds: targets::command_line::seeds,
        mutate: mutate::text,
        short: 20_000,
    },
    Target {
        name: "nbd-server",
        run: targets::nbd::server,
        seeds: targets::nbd::seeds_of_clients,
        mutate: mutate::bytes,
        short: 30_000,
    },
    Target {
        name: "nbd-client",
        run: targets::nbd::client,
        seeds: targets::nbd::seeds_of_servers,
        mutate: mutate::bytes,
        short: 30_000,
    },
    Target {
        name: "shell",
        run: targets::shell::typed,
        seeds: targets::shell::seeds_of_lines,
        mutate: mutate::text,
        short: 20_000,
    },
    Target {
        name: "qmp-client",
        run: targets::shell::heard,
        seeds: targets::shell::seeds_of_servers,
        mutate: mutate::text,
        short: 20_000,
    },
];

//! `cargo run -p underlay-fuzz`: fuzzes as long as one likes.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Parser;
use underlay_fuzz::{TARGETS, runner};

/// Mutates inputs and feeds them to what takes bytes from strangers.
#[derive(Debug, Parser)]
#[command(name = "underlay-fuzz")]
struct Arguments {
    /// Only this target.
    #[arg(long)]
    target: Option<String>,
    /// Seed of the first input; the others follow. Taken from the clock by default.
    #[arg(long)]
    seed: Option<u64>,
    /// Inputs for each target.
    #[arg(long, default_value_t = 100_000)]
    count: u64,
    /// Feed a target this file, and nothing else.
    #[arg(long, requires = "target")]
    input: Option<PathBuf>,
    /// Where inputs go that were too much.
    #[arg(long, default_value = "target/fuzz")]
    crashes: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    runner::limit_memory();
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() << 20);
    let seed = arguments.seed.unwrap_or_else(clock);
    let chosen = |name: &str| arguments.target.as_deref().is_none_or(|only| only == name);
    let mut ran = false;
    for target in TARGETS.iter().filter(|target| chosen(target.name)) {
        ran = true;
        if let Some(file) = &arguments.input {
            match std::fs::read(file) {
                Ok(input) => (target.run)(&input),
                Err(error) => {
                    eprintln!("{}: {error}", file.display());
                    return ExitCode::FAILURE;
                }
            }
            continue;
        }
        println!("{}: {} inputs, seeds from {seed}", target.name, arguments.count);
        if let Err(crash) = runner::run(target, seed, arguments.count, &arguments.crashes) {
            eprintln!("{}: {} is too much\nagain: {}", target.name, crash.input.display(), crash.again);
            return ExitCode::FAILURE;
        }
    }
    if ran {
        return ExitCode::SUCCESS;
    }
    let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
    eprintln!("there is no such target; there are: {}", names.join(", "));
    ExitCode::FAILURE
}

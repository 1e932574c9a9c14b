//! Kills the daemon for real: the release binary on a chain of images, a guest that writes over NBD, an operation, and
//! SIGKILL at a random moment of it. Then the images are checked and read, and must have every write that was flushed
//! (or covered by a snapshot), and nothing that was never written; a backup that was done is what the disk was like when it
//! began. Incremental backups are made by a daemon that is killed several times ([`incremental`]). Writes that were acknowledged and not flushed are
//! counted when they are missing: their data is in the kernel's page cache, which survives the kill, but the tables
//! that say where it lies may still have been in the daemon, as in QEMU.
//!
//! ```text
//!   plan ──► operation (QMP) ─┐                    ┌─► check every image
//!                             ├─► daemon ─ SIGKILL ┤
//!            guest (NBD) ─────┘                    └─► open again, read, compare with the guest's model,
//!                                                      go on writing, check and read once more
//! ```
//!
//! A power cut is something else (the page cache does not survive it): the simulated world has those.
#![forbid(unsafe_code)]

mod daemon;
mod guest;
mod incremental;
mod judge;
mod model;
mod operation;
mod plan;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::{Parser, ValueEnum};

use daemon::is_storage_daemon;
use judge::{Found, Programs};
use operation::Stage;
use plan::{Operation, Plan};

/// Kills a daemon under a writing guest, round after round, and checks that nothing is lost.
#[derive(Debug, Parser)]
#[command(name = "underlay-kill")]
struct Arguments {
    /// Rounds of each operation.
    #[arg(long, default_value_t = 100)]
    rounds: u64,
    /// Only this operation.
    #[arg(long)]
    operation: Option<Operation>,
    /// Seed of the first round; the others follow. Taken from the clock by default.
    #[arg(long)]
    seed: Option<u64>,
    /// The program: `underlay`, or a qemu-storage-daemon. The release build by default.
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Begin no round after so many seconds.
    #[arg(long)]
    seconds: Option<u64>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(said) => {
            eprintln!("underlay-kill: {said}");
            ExitCode::FAILURE
        }
    }
}

/// Runs all rounds; how many failed.
fn run(arguments: &Arguments) -> Result<u64, String> {
    let binary = match &arguments.binary {
        Some(binary) => binary.clone(),
        None => release_build()?,
    };
    let binary = binary.canonicalize().map_err(|error| format!("{}: {error}", binary.display()))?;
    let programs = Programs::find(binary);
    if programs.reference.is_none() {
        println!("qemu-img is not installed: the images are checked by underlay alone");
    }
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let first = arguments.seed.unwrap_or_else(clock);
    println!("{}, seeds from {first}", programs.daemon.display());
    let until = arguments.seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut failures = 0;
    for operation in Operation::value_variants() {
        // The bitmaps of the reference do not survive.
        let is_possible = *operation != Operation::Incremental || !is_storage_daemon(&programs.daemon);
        if is_possible && arguments.operation.is_none_or(|only| only == *operation) {
            let seeds = (0..arguments.rounds).map(|round| first.wrapping_add(round));
            failures += rounds(&programs, *operation, seeds, until);
        }
    }
    println!("{failures} failures");
    Ok(failures)
}

/// Where cargo puts the release build, seen from where it puts this program.
fn release_build() -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let built = own.ancestors().nth(2).map(|target| target.join("release/underlay"));
    built.filter(|path| path.is_file()).ok_or_else(|| {
        "there is no release build; make one with: cargo build --release, or name a --binary".to_owned()
    })
}

/// All rounds of an operation; how many failed.
fn rounds(
    programs: &Programs,
    operation: Operation,
    seeds: impl Iterator<Item = u64>,
    until: Option<Instant>,
) -> u64 {
    let name = operation.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned());
    let begun = Instant::now();
    let (mut failures, mut done, mut in_doubt, mut copied, mut total) = (0, 0, 0, 0, Found::default());
    for seed in seeds {
        if until.is_some_and(|until| Instant::now() > until) {
            break;
        }
        done += 1;
        match round(programs, &Plan::new(operation, seed)) {
            Ok(found) => {
                in_doubt += u64::from(found.in_doubt);
                copied += u64::from(found.copied);
                total.leaks += found.leaks;
                total.served += found.served;
                total.in_flight += found.in_flight;
                total.behind += found.behind;
            }
            Err(Failed { folder, wrong }) => {
                failures += 1;
                println!("\n{name}: round with seed {seed} FAILED: {wrong}");
                println!("  the images are in {}", folder.display());
                println!(
                    "  again (timing is up to the kernel; try it some times): \
                     cargo run -p underlay-kill -- --operation {name} --seed {seed} --rounds 1 --binary {}\n",
                    programs.daemon.display()
                );
            }
        }
    }
    println!(
        "{name:8} {done} rounds, {failures} failures; {} requests answered, {} changes cut off, {in_doubt} kills in \
         the midst of a change of the chain, {copied} finished copies, {} sectors back at their last flush, {} clusters leaked; {:.0} s",
        total.served,
        total.in_flight,
        total.behind,
        total.leaks,
        begun.elapsed().as_secs_f64()
    );
    failures
}

/// A round that found something.
struct Failed {
    folder: PathBuf,
    wrong: String,
}

fn round(programs: &Programs, plan: &Plan) -> Result<Found, Failed> {
    let folder = tempfile::Builder::new().prefix("underlay-kill-").tempdir();
    let folder = folder.map_err(|error| Failed { folder: PathBuf::new(), wrong: error.to_string() })?;
    match play(programs, folder.path(), plan) {
        Ok(found) => Ok(found),
        Err(wrong) => {
            let wrong = format!("{}\n  {plan:?}", wrong.join("\n  "));
            Err(Failed { folder: folder.keep(), wrong })
        }
    }
}

fn play(programs: &Programs, folder: &Path, plan: &Plan) -> Result<Found, Vec<String>> {
    if plan.operation == Operation::Incremental {
        return incremental::play(programs, folder, plan);
    }
    let played = Stage::set(&programs.daemon, folder, plan).and_then(Stage::play);
    let (expected, account) = played.map_err(|wrong| vec![wrong])?;
    judge::judge(programs, folder, plan, &expected, account)
}

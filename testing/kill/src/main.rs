//! Kills the daemon for real: the release binary on a chain of images, a guest that writes over NBD, an operation, and
//! SIGKILL at a random moment of it. Then the images are checked and read, and must have every write that was flushed
//! (or covered by a snapshot), and nothing that was never written; a backup that was done is what the disk was like
//! when it began. Incremental backups are made by a daemon that is killed several times ([`incremental`]). Writes that
//! were acknowledged and not flushed are counted when they are missing: their data is in the kernel's page cache, which
//! survives the kill, but the tables that say where it lies may still have been in the daemon, as in QEMU.
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

use std::fmt::{Display, Formatter};
use std::io::IsTerminal;
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
    let wanted = |operation: &Operation| {
        // The bitmaps of the reference do not survive.
        let is_possible = *operation != Operation::Incremental || !is_storage_daemon(&programs.daemon);
        is_possible && arguments.operation.is_none_or(|only| only == *operation)
    };
    let operations = Operation::value_variants().iter().copied().filter(wanted);
    let mut tallies: Vec<_> = operations.map(Tally::new).collect();
    // In turns: whatever time there is, every operation gets its share.
    'all: for number in 0..arguments.rounds {
        progress(number, arguments.rounds);
        for tally in &mut tallies {
            if until.is_some_and(|until| Instant::now() > until) {
                break 'all;
            }
            tally.round(&programs, first.wrapping_add(number));
        }
    }
    tallies.iter().for_each(|tally| println!("{tally}"));
    let failures = tallies.iter().map(|tally| tally.failures).sum();
    println!("{failures} failures");
    Ok(failures)
}

/// On a terminal only.
fn progress(round: u64, rounds: u64) {
    if std::io::stderr().is_terminal() {
        eprint!("round {} of {rounds}\r", round + 1);
    }
}

/// Where cargo puts the release build, seen from where it puts this program.
fn release_build() -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let built = own.ancestors().nth(2).map(|target| target.join("release/underlay"));
    built.filter(|path| path.is_file()).ok_or_else(|| {
        "there is no release build; make one with: cargo build --release, or name a --binary".to_owned()
    })
}

/// What came of the rounds of one operation.
struct Tally {
    operation: Operation,
    rounds: u64,
    failures: u64,
    in_doubt: u64,
    copied: u64,
    found: Found,
    took: Duration,
}

impl Tally {
    fn new(operation: Operation) -> Self {
        let (found, took) = (Found::default(), Duration::ZERO);
        Self { operation, rounds: 0, failures: 0, in_doubt: 0, copied: 0, found, took }
    }

    fn name(&self) -> String {
        self.operation.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned())
    }

    /// One more.
    fn round(&mut self, programs: &Programs, seed: u64) {
        let begun = Instant::now();
        match round(programs, &Plan::new(self.operation, seed)) {
            Ok(found) => {
                self.in_doubt += u64::from(found.in_doubt);
                self.copied += u64::from(found.copied);
                self.found.leaks += found.leaks;
                self.found.served += found.served;
                self.found.in_flight += found.in_flight;
                self.found.behind += found.behind;
            }
            Err(Failed { folder, wrong }) => {
                self.failures += 1;
                let name = self.name();
                println!("\n{name}: round with seed {seed} FAILED: {wrong}");
                println!("  the images are in {}", folder.display());
                println!(
                    "  again (timing is up to the kernel; try it some times): \
                     cargo run -p underlay-kill -- --operation {name} --seed {seed} --rounds 1 --binary {}\n",
                    programs.daemon.display()
                );
            }
        }
        self.rounds += 1;
        self.took += begun.elapsed();
    }
}

impl Display for Tally {
    fn fmt(&self, out: &mut Formatter<'_>) -> std::fmt::Result {
        let Self { rounds, failures, in_doubt, copied, found, took, .. } = self;
        write!(
            out,
            "{:8} {rounds} rounds, {failures} failures; {} requests answered, {} changes cut off, {in_doubt} kills in \
             the midst of a change of the chain, {copied} finished copies, {} sectors back at their last flush, {} clusters leaked; {:.0} s",
            self.name(),
            found.served,
            found.in_flight,
            found.behind,
            found.leaks,
            took.as_secs_f64()
        )
    }
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

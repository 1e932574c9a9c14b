//! The benchmark: the same work on Underlay and on the installed QEMU, in alternation (A B A B), and the ratio.
//!
//! Each row is one kind of work (`rows/`); targets are those of `docs/benchmarks.md`. No absolute time is ever a
//! test: machines are shared, and what counts is the ratio of medians in the same run.
#![forbid(unsafe_code)]

mod daemon;
mod guest;
mod image;
mod limit;
mod measure;
mod null_server;
mod report;
mod rows;
mod side;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use measure::Outcome;
use rows::Bench;
use side::{Programs, Side};

/// The same work on Underlay and on the installed QEMU, in alternation.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", about)]
struct Options {
    /// Only rows whose names contain one of these words
    rows: Vec<String>,
    /// Samples per row and side
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds that a guest's load runs for one sample
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Where the images lie; the default is main memory
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    folder: PathBuf,
    /// The binary to measure
    #[arg(long, value_name = "FILE", default_value = "target/release/underlay")]
    binary: PathBuf,
    /// One short round of everything, on small images: only shows that the benchmark works
    #[arg(long)]
    quick: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// List the rows
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Outcome<()> {
    let wanted = |name: &str| options.rows.is_empty() || options.rows.iter().any(|word| name.contains(word));
    let rows: Vec<_> = rows::all().into_iter().filter(|row| wanted(row.name)).collect();
    if rows.is_empty() {
        return Err("no row has such a name; --list shows them".into());
    }
    if options.list {
        rows.iter().for_each(|row| println!("{:<22} {}", row.name, row.about));
        return Ok(());
    }
    let folder = tempfile::Builder::new().prefix("underlay-bench").tempdir_in(&options.folder)?;
    let bench = Bench {
        programs: Programs::find(&options.binary)?,
        folder: folder.path().to_owned(),
        seconds: if options.quick { 0.05 } else { options.seconds },
        quick: options.quick,
    };
    let rounds = if options.quick { 1 } else { options.rounds };
    let mut report = report::Report::begin(&bench, rounds, options.json)?;
    for row in rows {
        if !row.is_for(&bench)? {
            report.skip(&row);
            continue;
        }
        let mut samples = measure::Samples::default();
        for _ in 0..rounds {
            for side in [Side::Qemu, Side::Underlay] {
                let sample = bench.sample(&row, side).or_else(|error| match side {
                    // Seen once, of its daemon on a busy machine: a monitor that was reset in the middle of a stream.
                    Side::Qemu => {
                        eprintln!("{error}; once more");
                        bench.sample(&row, side)
                    }
                    Side::Underlay => Err(error),
                });
                samples.add(side, sample?);
            }
            samples.add_limit(bench.limit(&row)?);
        }
        report.row(&row, &samples);
    }
    report.end();
    Ok(())
}

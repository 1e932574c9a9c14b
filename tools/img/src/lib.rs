//! The command line of qemu-img on Underlay's engine: a file per subcommand.
#![forbid(unsafe_code)]

mod check;
mod commit;
mod compare;
mod convert;
mod create;
pub mod getopt;
mod info;
mod map;
pub mod open;
mod rebase;
mod resize;
pub mod sizes;

pub use info::format_lines as info_lines;

use underlay_sys::thread::block_on;

/// Why a subcommand ends early: what to print (nothing when that has been done) and the exit status.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Printed behind `qemu-img: `.
    pub message: Option<String>,
    /// The exit status.
    pub status: i32,
    /// Points to the help of this subcommand (empty: of the program).
    pub help: Option<&'static str>,
    /// The words are no options that the subcommand has: its name stands in front, and its help is pointed to.
    pub misspelled: bool,
}

impl Failure {
    /// A message, and exit status 1.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: Some(message.into()), status: 1, help: None, misspelled: false }
    }

    /// The words cannot be understood: a message that points to a subcommand's help.
    pub fn usage(message: impl Into<String>, command: &'static str) -> Self {
        Self { help: Some(command), ..Self::new(message) }
    }

    /// An exit status without a message.
    pub fn status(status: i32) -> Self {
        Self { message: None, status, help: None, misspelled: false }
    }
}

/// What a subcommand ends with.
pub type Outcome = Result<(), Failure>;

const HELP: &str = "\
Usage: qemu-img SUBCOMMAND [options]
Makes, checks, converts and resizes disk images.

  check [-f FMT] [--output=human|json] [-r leaks|all] [-q] [-U] FILENAME
  commit [-f FMT] [-b BASE] [-d] [-p] [-q] [-r RATE] FILENAME
  compare [-f FMT] [-F FMT] [-p] [-q] [-s] [-U] FILENAME1 FILENAME2
  convert [-f FMT] [-O FMT] [-o OPTIONS] [-c] [-n] [-p] [-q] [-U] [-W] [-S SIZE] [-m N] FILENAME [...] OUTPUT
  create [-f FMT] [-b BACKING [-F FMT]] [-o OPTIONS] [-q] [-u] FILENAME [SIZE]
  info [-f FMT] [--output=human|json] [--backing-chain] [-U] FILENAME
  map [-f FMT] [--output=human|json] [-s OFFSET] [-l LENGTH] [-U] FILENAME
  rebase [-f FMT] [-b BACKING [-F FMT]] [-u] [-c] [-p] [-q] [-U] FILENAME
  resize [-f FMT] [--preallocation=MODE] [-q] [--shrink] FILENAME [+|-]SIZE

Formats: qcow2, raw. Sizes take the suffixes k, M, G, T, P and E.
";

const LATER: [&str; 6] = ["amend", "bench", "bitmap", "dd", "measure", "snapshot"];

/// Runs the program; the exit status.
pub fn main(program: &str, words: &[String]) -> i32 {
    let name = program.rsplit('/').next().unwrap_or(program);
    let Some((command, rest)) = words.split_first() else {
        eprintln!("{name}: Not enough arguments");
        eprintln!("Try '{name} --help' for more info");
        return 1;
    };
    let outcome = match command.as_str() {
        "--help" | "-h" => {
            print!("{HELP}");
            Ok(())
        }
        "--version" | "-V" => {
            println!("qemu-img version 10.0.2 (Underlay {})", env!("CARGO_PKG_VERSION"));
            println!("Copyright (c) 2026 The Underlay authors; the interface is that of QEMU 10.0.2");
            Ok(())
        }
        "check" => block_on(check::run(rest)),
        "commit" => block_on(commit::run(rest)),
        "compare" => block_on(compare::run(rest)),
        "convert" => block_on(convert::run(rest)),
        "create" => block_on(create::run(rest)),
        "info" => block_on(info::run(rest)),
        "map" => block_on(map::run(rest)),
        "rebase" => block_on(rebase::run(rest)),
        "resize" => block_on(resize::run(rest)),
        later if LATER.contains(&later) => {
            Err(Failure::new(format!("subcommand '{later}' is not part of this version of Underlay")))
        }
        other if other.starts_with('-') => Err(Failure::usage(format!("unrecognized option '{other}'"), "")),
        other => Err(Failure::usage(format!("Command not found: {other}"), "")),
    };
    match outcome {
        Ok(()) => 0,
        Err(failure) => {
            if failure.misspelled {
                eprintln!("{name} {command}: {}", failure.message.unwrap_or_default());
                eprintln!("Try '{name} {command} --help' for more info");
                return failure.status;
            }
            if let Some(message) = failure.message {
                eprintln!("{name}: {message}");
            }
            if let Some(help) = failure.help {
                let command = if help.is_empty() { String::new() } else { format!(" {help}") };
                eprintln!("Try '{name}{command} --help' for more info");
            }
            failure.status
        }
    }
}

//! The command line of qemu-img on Underlay's engine: a file per subcommand.
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod amend;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod dd;
pub mod getopt;
mod help;
mod info;
mod map;
mod map_lines;
mod measure;
pub mod open;
mod option_help;
mod progress;
mod rebase;
mod resize;
mod same_file;
pub mod sizes;
mod snapshot;
mod snapshot_list;

pub use snapshot::Wanted as WantedSnapshot;
pub use snapshot_list::lines as snapshot_lines;

pub use info::format_lines as info_lines;

use std::sync::OnceLock;

use underlay_sys::thread::{IoThread, block_on};
use underlay_sys::{complain, say, say_part};

/// Why a subcommand ends early: what to print (nothing when that has been done) and the exit status.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Printed behind `qemu-img: `.
    pub message: Option<String>,
    /// The exit status.
    pub status: i32,
    /// Points to the help of this subcommand (empty: of the program).
    pub help: Option<&'static str>,
    /// The subcommand's name comes first.
    pub named: bool,
}

impl Failure {
    /// A message, and exit status 1.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: Some(message.into()), status: 1, help: None, named: false }
    }

    /// A message and perhaps a line below it.
    pub fn with_hint(message: String, hint: Option<&str>) -> Self {
        Self::new(hint.map_or_else(|| message.clone(), |hint| format!("{message}\n{hint}")))
    }

    /// The words cannot be understood: a message that points to a subcommand's help.
    pub fn usage(message: impl Into<String>, command: &'static str) -> Self {
        Self { help: Some(command), ..Self::new(message) }
    }

    /// An exit status without a message.
    pub fn status(status: i32) -> Self {
        Self { message: None, status, help: None, named: false }
    }
}

/// Reads the options of a subcommand.
fn options(command: &'static str, known: getopt::Known, words: &[String]) -> Result<getopt::Parsed, Failure> {
    getopt::parse(known, words).map_err(|failure| Failure {
        named: true,
        ..Failure::usage(failure.message.unwrap_or_default(), command)
    })
}

/// An option that is known, but not supported by this version.
fn unsupported(option: &str) -> Failure {
    let dashes = if option.len() > 1 { "--" } else { "-" };
    Failure::new(format!("option '{dashes}{option}' is not supported by this version of Underlay"))
}

/// What a subcommand ends with.
pub type Outcome = Result<(), Failure>;

const HELP: &str = "\
Usage: qemu-img SUBCOMMAND [options]
Makes, checks, converts and resizes disk images.

  amend [-f FMT] [-t CACHE] [-p] [-q] -o OPTIONS FILENAME
  bitmap (--add [-g SIZE] | --remove | --clear | --enable | --disable | --merge SOURCE)... [-f FMT]
         [-b SOURCE_FILENAME [-F SOURCE_FMT]] FILENAME BITMAP
  check [-f FMT] [--output=human|json] [-r leaks|all] [-q] [-U] FILENAME
  commit [-f FMT] [-b BASE] [-d] [-p] [-q] [-r RATE] FILENAME
  compare [-f FMT] [-F FMT] [-p] [-q] [-s] [-U] FILENAME1 FILENAME2
  convert [-f FMT] [-l SNAPSHOT] [-O FMT] [-o OPTIONS] [-c] [-n] [-p] [-q] [-U] [-W] [-S SIZE] [-m N]
          [--bitmaps [--skip-broken-bitmaps]] FILENAME [...] OUTPUT
  create [-f FMT] [-b BACKING [-F FMT]] [-o OPTIONS] [-q] [-u] FILENAME [SIZE]
  dd [-f FMT] [-O FMT] [-U] [bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT
  info [-f FMT] [--output=human|json] [--backing-chain] [-U] FILENAME
  map [-f FMT] [--output=human|json] [-s OFFSET] [-l LENGTH] [-U] FILENAME
  measure [-f FMT] [-O FMT] [-o OPTIONS] [--output=human|json] [-U] FILENAME | --size SIZE
  rebase [-f FMT] [-b BACKING [-F FMT]] [-u] [-c] [-p] [-q] [-U] FILENAME
  resize [-f FMT] [--preallocation=MODE] [-q] [--shrink] FILENAME [+|-]SIZE
  snapshot [-l | -a SNAPSHOT | -c SNAPSHOT | -d SNAPSHOT] [-f FMT] [-q] [-U] FILENAME

All but create take --image-opts: FILENAME is then a list of options (driver=qcow2,file.filename=disk.img), and there is
no -f. So is OUTPUT with --target-image-opts, which needs -n.
Formats: qcow2, raw. Sizes take the suffixes k, M, G, T, P and E.
";

const LATER: [&str; 1] = ["bench"];

/// Most threads that copy.
const MOST_THREADS: usize = 4;

/// Converts on several threads: where the bytes are in memory, copying them is all the work there is.
fn on_all_processors(words: &[String]) -> Outcome {
    let count = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    let threads = IoThread::start_crew("img", count)
        .map_err(|error| Failure::new(format!("Cannot start threads: {error}")))?;
    let words = words.to_vec();
    let home = threads.first().map(IoThread::spawner);
    let home = home.ok_or_else(|| Failure::new("Cannot start threads"))?;
    block_on(home.run(async move { open::closing(convert::run(&words)).await }))
}

/// Converts nothing: one thread is enough.
fn on_one_thread(command: impl Future<Output = Outcome>) -> Outcome {
    block_on(open::closing(command))
}

/// Runs the program; the exit status.
pub fn main(program: &str, words: &[String]) -> i32 {
    NAME.get_or_init(|| program.rsplit('/').next().unwrap_or(program).to_owned());
    let words = if words.first().is_some_and(|word| word == "--") { &words[1..] } else { words };
    let outcome = match words.split_first() {
        None => Err(Failure::usage("Not enough arguments", "")),
        Some((command, rest)) => run(command, rest),
    };
    match outcome {
        Ok(()) => 0,
        Err(failure) => {
            tell(&failure);
            failure.status
        }
    }
}

/// What the program is called in messages.
static NAME: OnceLock<String> = OnceLock::new();

/// Prints why a subcommand has ended early.
fn tell(failure: &Failure) {
    let name = NAME.get().map_or("qemu-img", String::as_str);
    let command = failure.help.unwrap_or_default();
    let space = if command.is_empty() { "" } else { " " };
    match &failure.message {
        Some(message) if failure.named => complain!("{name}{space}{command}: {message}"),
        Some(message) => complain!("{name}: {message}"),
        None => {}
    }
    if failure.help.is_some() {
        complain!("Try '{name}{space}{command} --help' for more info");
    }
}

fn run(command: &str, rest: &[String]) -> Outcome {
    match command {
        "--help" | "-h" => {
            say_part!("{HELP}");
            Ok(())
        }
        "--version" | "-V" => {
            say!("qemu-img version 10.0.2 (Underlay {})", env!("CARGO_PKG_VERSION"));
            say!("Copyright (c) 2026 The Underlay authors; the interface is that of QEMU 10.0.2");
            Ok(())
        }
        "amend" => on_one_thread(amend::run(rest)),
        "bitmap" => on_one_thread(bitmap::run(rest)),
        "check" => on_one_thread(check::run(rest)),
        "commit" => on_one_thread(commit::run(rest)),
        "compare" => on_one_thread(compare::run(rest)),
        "convert" => on_all_processors(rest),
        "create" => on_one_thread(create::run(rest)),
        "dd" => on_one_thread(dd::run(rest)),
        "info" => on_one_thread(info::run(rest)),
        "map" => on_one_thread(map::run(rest)),
        "measure" => on_one_thread(measure::run(rest)),
        "rebase" => on_one_thread(rebase::run(rest)),
        "resize" => on_one_thread(resize::run(rest)),
        "snapshot" => on_one_thread(snapshot::run(rest)),
        later if LATER.contains(&later) => {
            Err(Failure::new(format!("subcommand '{later}' is not part of this version of Underlay")))
        }
        "-T" | "--trace" => Err(unsupported("trace")),
        other if other.starts_with("--") => Err(Failure::usage(format!("unrecognized option '{other}'"), "")),
        other => Err(match other.strip_prefix('-').and_then(|letters| letters.chars().next()) {
            Some(letter) => Failure::usage(format!("invalid option -- '{letter}'"), ""),
            None => Failure::usage(format!("Command not found: {other}"), ""),
        }),
    }
}

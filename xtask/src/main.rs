//! The project's own commands: `cargo xtask test` runs everything that proves that Underlay works, `cargo xtask check`
//! what needs no running: formatting, lints, documentation.
#![forbid(unsafe_code)]

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const HELP: &str = "\
Usage: cargo xtask COMMAND

Commands:
  test    install what the comparison tests need (where it may), then run all tests:
          unit, property and power-cut tests, and the comparisons with QEMU's tools;
          then the daemon is killed in the midst of each operation, a few times
  check   formatting, lints and documentation
  bench   the same work on Underlay and on the installed QEMU, in alternation
          (cargo xtask bench --help; --quick only shows that it works)

Environment:
  UNDERLAY_SEEDS=N          seeds per property (default: what CI runs)
  UNDERLAY_SEED=S           only this seed: a property that fails prints it
  UNDERLAY_FUZZ=N           N times as many inputs for each fuzz target
";

/// Programs that the comparison tests call, and the Debian package that each comes from.
const NEEDED: [(&str, &str); 7] = [
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("qemu-storage-daemon", "qemu-utils"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdkit", "nbdkit"),
    ("fio", "fio"),
];

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let command = arguments.next().unwrap_or_default();
    let ok = match command.as_str() {
        "test" => test(),
        "check" => check(),
        "bench" => bench(arguments),
        "help" | "--help" | "-h" => {
            print!("{HELP}");
            true
        }
        _ => {
            eprint!("{HELP}");
            false
        }
    };
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Says what is run, runs it, and says so when it fails.
fn step(command: &mut Command) -> bool {
    let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
    let line = words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    println!("\n==> {line}");
    let ok = command.status().is_ok_and(|status| status.success());
    if !ok {
        eprintln!("==> failed: {line}");
    }
    ok
}

fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

fn check() -> bool {
    let formatted = step(cargo().args(["fmt", "--all", "--check"]));
    let linted = step(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]));
    let documented = step(
        cargo()
            .args(["doc", "--workspace", "--no-deps", "--quiet"])
            .env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links"),
    );
    formatted && linted && documented
}

fn test() -> bool {
    install_needed();
    // The binary first: tests of the command line start it.
    let built = step(cargo().args(["build", "--release", "--package", "underlay"]));
    let tested = built && step(cargo().args(["test", "--workspace", "--no-fail-fast"]));
    tested && measures() && kill()
}

/// The benchmark still works. Figures of a machine that does other things meanwhile are worth nothing, so its own code
/// need not be built to be fast.
fn measures() -> bool {
    let mut bench = cargo();
    bench.args(["run", "--package", "underlay-bench", "--", "--binary", "target/release/underlay"]);
    step(bench.args(["--quick", "--folder", "target", "read-raw", "stream-dense", "info"]))
}

fn bench(arguments: impl IntoIterator<Item = String>) -> bool {
    let built =
        step(cargo().args(["build", "--release", "--package", "underlay", "--package", "underlay-bench"]));
    built
        && step(
            Command::new(root().join("target/release/underlay-bench")).current_dir(root()).args(arguments),
        )
}

/// Kills the release binary for real, a few rounds of each operation; `cargo run -p underlay-kill` does it longer.
fn kill() -> bool {
    step(cargo().args(["run", "--package", "underlay-kill", "--", "--rounds", "3", "--seconds", "90"]))
}

/// Installs the programs that the comparison tests need, if this is a Debian on which we may; else says what is
/// missing, and the tests that need it say so too.
fn install_needed() {
    let missing: Vec<_> = NEEDED.iter().filter(|(program, _)| !is_installed(program)).collect();
    let mut packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    packages.dedup();
    if packages.is_empty() {
        return;
    }
    println!("==> missing for the comparison tests: {}", packages.join(" "));
    let may = is_installed("apt-get") && is_root();
    if may && step(Command::new("apt-get").args(["update", "--quiet"])) {
        let mut install = Command::new("apt-get");
        install.args(["install", "--yes", "--quiet", "--no-install-recommends"]).args(&packages);
        install.env("DEBIAN_FRONTEND", "noninteractive");
        step(&mut install);
    } else {
        println!(
            "==> cannot install them here; install them by hand: apt-get install {}",
            packages.join(" ")
        );
    }
}

fn is_installed(program: &str) -> bool {
    env::var_os("PATH")
        .is_some_and(|path| env::split_paths(&path).any(|folder| folder.join(program).is_file()))
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n")
}

//! The same command lines for qemu-img and for ours: the same output, the same exit status, the same disks.
//!
//! A script (`tests/img/*.sh`) has a command in each line. `qemu-img` in it is the program under test; `ref-img` is
//! always the reference's, for making images and looking at them. Both run in folders of their own, with relative
//! names, so what they print is comparable as it is, but for how much room files take up.

use std::fmt::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn find(program: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH")?;
    std::env::split_paths(&paths).map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// Without what depends on where clusters are put, and on time.
fn blanked(text: &str) -> String {
    let varies =
        ["disk size: ", "Image end offset: ", "\"actual-size\": ", "\"image-end-offset\": ", "file length: "];
    let mut out = String::new();
    for line in text.lines() {
        // Progress overwrites itself; its last state counts.
        let line = line.rsplit('\r').next().unwrap_or(line);
        match varies.iter().find_map(|name| line.find(name).map(|at| at + name.len())) {
            Some(end) => out.push_str(&line[..end]),
            None => out.push_str(line),
        }
        out.push('\n');
    }
    out
}

/// Runs a script with `img` as qemu-img; everything that it printed.
fn run(script: &str, img: &Path, reference: &Path) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let programs = folder.path().join("bin");
    let work = folder.path().join("work");
    for new in [&programs, &work] {
        std::fs::create_dir(new).expect("a folder");
    }
    symlink(img, programs.join("qemu-img")).expect("a link");
    symlink(reference, programs.join("ref-img")).expect("a link");
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default());
    let mut transcript = String::new();
    for line in script.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", line])
            .current_dir(&work)
            .env("PATH", &path)
            .env("LC_ALL", "C")
            .stdin(Stdio::null());
        let output = shell.output().expect("a shell");
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let (out, err) = (blanked(&out), blanked(&err).replace("ref-img: ", "qemu-img: "));
        writeln!(transcript, "$ {line}\n{out}{err}= {:?}", output.status.code()).expect("memory");
    }
    transcript
}

fn compare(name: &str) {
    let (Some(reference), Some(_)) = (find("qemu-img"), find("qemu-io")) else {
        println!("not compared: qemu-img and qemu-io are not installed (Debian: qemu-utils)");
        return;
    };
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/img").join(format!("{name}.sh"));
    let script = std::fs::read_to_string(path).expect("a script");
    let theirs = run(&script, &reference, &reference);
    let ours = run(&script, Path::new(env!("CARGO_BIN_EXE_underlay")), &reference);
    let commands = |text: &str| text.split("\n$ ").map(str::to_owned).collect::<Vec<_>>();
    let differ: Vec<_> = commands(&ours)
        .into_iter()
        .zip(commands(&theirs))
        .filter(|(ours, theirs)| ours != theirs)
        .map(|(ours, theirs)| format!("--- ours:\n{ours}\n--- theirs:\n{theirs}\n"))
        .collect();
    assert!(differ.is_empty(), "{name}: {} commands differ\n{}", differ.len(), differ.join("\n"));
    assert!(theirs.matches("\n$ ").count() > 5, "{name} says something");
}

#[test]
fn create_and_info() {
    compare("create");
}

#[test]
fn map_check_and_compare() {
    compare("look");
}

#[test]
fn convert_and_resize() {
    compare("convert");
}

#[test]
fn commit() {
    compare("commit");
}

#[test]
fn rebase() {
    compare("rebase");
}

#[test]
fn command_lines() {
    compare("usage");
}

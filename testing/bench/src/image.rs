//! The images that rows work on: made by QEMU's tools, so that neither side has an advantage.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::guest::Random;
use crate::measure::Outcome;

const MIB: u64 = 1 << 20;

fn checked(command: &mut Command) -> Outcome<()> {
    if command.stdout(Stdio::null()).status()?.success() {
        Ok(())
    } else {
        Err(format!("{command:?} failed").into())
    }
}

/// An empty qcow2 image, perhaps over a backing file.
pub fn qcow2(path: &Path, size: u64, backing: Option<&Path>) -> Outcome<()> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]);
    if let Some(backing) = backing {
        command.arg("-b").arg(backing).args(["-F", "qcow2"]);
    }
    checked(command.arg(path).arg(size.to_string()))
}

/// A raw image full of bytes that are not zero.
pub fn raw(path: &Path, size: u64) -> Outcome<()> {
    let mut file = File::create(path)?;
    let mut random = Random::new(1);
    let bytes: Vec<u8> = (0..MIB).map(|_| random.byte() | 1).collect();
    for _ in 0..size / MIB {
        file.write_all(&bytes)?;
    }
    Ok(())
}

/// Writes runs of `len` bytes, `every` so many, until `total` bytes are written.
pub fn fill(path: &Path, len: u64, every: u64, total: u64) -> Outcome<()> {
    let mut tool = Command::new("qemu-io")
        .args(["-f", "qcow2"])
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    let mut input = tool.stdin.take().ok_or("no way in")?;
    for run in 0..total / len {
        writeln!(input, "write -q -P {} {} {len}", run % 255 + 1, run * every)?;
    }
    drop(input);
    if tool.wait()?.success() { Ok(()) } else { Err("qemu-io failed".into()) }
}

/// All clusters of a qcow2 image allocated, in random order: metadata only, the data is a hole.
pub fn fragmented(path: &Path, size: u64) -> Outcome<()> {
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"]);
    checked(create.arg(path).arg(size.to_string()))?;
    let file = File::options().read(true).write(true).open(path)?;
    let mut header = [0; 48];
    file.read_exact_at(&mut header, 0)?;
    let (entries, l1) = (be32(&header[36..40]), be64(&header[40..48]));
    let tables = words(&file, l1, usize::try_from(entries)?)?;
    let tables: Vec<u64> =
        tables.iter().map(|entry| entry & 0x00ff_ffff_ffff_fe00).filter(|at| *at != 0).collect();
    let mut all = Vec::new();
    for table in &tables {
        all.extend(words(&file, *table, 8192)?);
    }
    // The last table is not full: what is 0 stays where it is.
    let used: Vec<usize> = (0..all.len()).filter(|at| all[*at] != 0).collect();
    let mut random = Random::new(7);
    for last in (1..used.len()).rev() {
        let other = usize::try_from(random.below(last as u64 + 1))?;
        all.swap(used[last], used[other]);
    }
    for (table, entries) in tables.iter().zip(all.chunks(8192)) {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        file.write_all_at(&bytes, *table)?;
    }
    Ok(())
}

fn words(file: &File, at: u64, count: usize) -> Outcome<Vec<u64>> {
    let mut bytes = vec![0; count * 8];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes.chunks_exact(8).map(be64).collect())
}

fn be64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

fn be32(bytes: &[u8]) -> u64 {
    be64(bytes)
}

/// Makes pages of main memory ready to be used again: on a virtual machine, memory that was given back to its host
/// costs many times more at the next touch, and one side would pay for the other.
pub fn warm_up(folder: &Path, bytes: u64) -> Outcome<()> {
    let path: PathBuf = folder.join("warm");
    let mut file = File::create(&path)?;
    let piece = vec![1; 512 << 10];
    for _ in 0..bytes.div_ceil(piece.len() as u64) {
        file.write_all(&piece)?;
    }
    drop(file);
    fs::remove_file(path)?;
    Ok(())
}

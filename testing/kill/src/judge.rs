//! After the kill: are the images sound, and does one of them have the guest's disk?

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use underlay_nbd::blocking::Client;
use underlay_qmp::json::{self, Value};

use crate::daemon::{Daemon, PATIENCE, is_storage_daemon};
use crate::guest::{Account, Guest, read_all};
use crate::model::{BYTES, Model, Wrong};
use crate::operation::Expected;
use crate::plan::Plan;

/// The programs that a round calls.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The daemon that is killed.
    pub daemon: PathBuf,
    /// Those that check an image, with their first words.
    pub checkers: Vec<(PathBuf, Vec<String>)>,
    /// The reference's qemu-img, if there is one.
    pub reference: Option<PathBuf>,
}

impl Programs {
    /// The programs for a round on `daemon`.
    pub fn find(daemon: PathBuf) -> Self {
        let reference = std::env::var_os("PATH").and_then(|path| {
            std::env::split_paths(&path)
                .map(|folder| folder.join("qemu-img"))
                .find(|program| program.is_file())
        });
        let mut checkers: Vec<_> = reference.iter().map(|program| (program.clone(), Vec::new())).collect();
        if !is_storage_daemon(&daemon) {
            checkers.push((daemon.clone(), vec!["img".to_owned()]));
        }
        Self { daemon, checkers, reference }
    }
}

/// What was found in a round without faults.
#[derive(Clone, Copy, Debug, Default)]
pub struct Found {
    /// Clusters that nobody uses, in all images: allowed.
    pub leaks: u64,
    /// Requests that had been answered.
    pub served: u64,
    /// Changes without an answer when the kill came.
    pub in_flight: usize,
    /// Sectors without an acknowledged write that no flush had covered: allowed.
    pub behind: usize,
    /// The kill came when either of two images could be the guest's.
    pub in_doubt: bool,
    /// There was a copy that was done.
    pub copied: bool,
}

/// Judges what a kill has left. All that is wrong, if anything is.
pub fn judge(
    programs: &Programs,
    folder: &Path,
    plan: &Plan,
    expected: &Expected,
    account: Account,
) -> Result<Found, Vec<String>> {
    let mut complaints = account.wrong;
    let in_flight = account.model.in_flight();
    let mut leaks = 0;
    for image in &expected.images {
        match check(programs, folder, image) {
            Ok(found) => leaks += found,
            Err(wrong) => complaints.push(wrong),
        }
    }
    if let Some((image, model)) = &expected.copy
        && let Err(wrong) = examine_copy(programs, folder, plan, image, model)
    {
        complaints.extend(wrong.into_iter().map(|wrong| format!("the copy: {wrong}")));
    }
    if let Some((image, name, model)) = &expected.snapshot
        && let Err(wrong) = examine_snapshot(programs, folder, image, name, model)
    {
        complaints.extend(wrong.into_iter().map(|wrong| format!("the snapshot {name}: {wrong}")));
    }
    let mut rejected = Vec::new();
    let mut accepted = None;
    for top in &expected.tops {
        match examine(programs, folder, plan, expected, top, account.model.clone()) {
            Ok(behind) => {
                accepted = Some(behind);
                break;
            }
            Err(wrong) => rejected.extend(wrong.into_iter().map(|wrong| format!("{top}: {wrong}"))),
        }
    }
    let Some(behind) = accepted.filter(|_| complaints.is_empty()) else {
        complaints.extend(rejected);
        return Err(complaints);
    };
    Ok(Found {
        leaks,
        served: account.served,
        in_flight,
        behind,
        in_doubt: expected.tops.len() > 1,
        copied: expected.copy.is_some() || expected.snapshot.is_some(),
    })
}

/// Opens the image again, reads all of it, goes on writing, and checks and reads it once more. Says how many sectors
/// lack a write that was acknowledged and not flushed.
fn examine(
    programs: &Programs,
    folder: &Path,
    plan: &Plan,
    expected: &Expected,
    top: &str,
    model: Model,
) -> Result<usize, Vec<String>> {
    let one = |wrong: String| vec![wrong];
    check(programs, folder, top).map_err(one)?;
    let (daemon, monitor) = Daemon::start(&programs.daemon, folder, plan, top, "again").map_err(one)?;
    let (behind, again) = live_on(&daemon, plan, expected, model).map_err(|mut wrong| {
        wrong.extend(daemon.hung().then(|| "the daemon hung".to_owned()));
        wrong
    })?;
    daemon.quit(monitor).map_err(one)?;
    check(programs, folder, top).map_err(|wrong| one(format!("after going on: {wrong}")))?;
    if let Some(program) = &programs.reference {
        same_for_the_reference(program, folder, top, &again).map_err(one)?;
    }
    Ok(behind)
}

/// A copy that the job has said is done shows what the disk was like when the job began. All that is in it.
pub fn examine_copy(
    programs: &Programs,
    folder: &Path,
    plan: &Plan,
    image: &str,
    model: &Model,
) -> Result<Vec<u8>, Vec<String>> {
    let one = |wrong: String| vec![wrong];
    let (daemon, monitor) = Daemon::start(&programs.daemon, folder, plan, image, "copied").map_err(one)?;
    let found = read(&mut daemon.client().map_err(one)?, model)?;
    daemon.quit(monitor).map_err(one)?;
    Ok(found)
}

/// An internal snapshot shows everybody what the disk was like when it was taken.
fn examine_snapshot(
    programs: &Programs,
    folder: &Path,
    image: &str,
    name: &str,
    model: &Model,
) -> Result<(), Vec<String>> {
    for (program, words) in &programs.checkers {
        let one = |wrong: &dyn std::fmt::Display| vec![format!("{}: {wrong}", program.display())];
        let mut command = Command::new(program);
        command.args(words).args(["convert", "-l", name, "-f", "qcow2", "-O", "raw", image, "snapshot.raw"]);
        let output = unlocked(command.current_dir(folder)).map_err(|error| one(&error))?;
        if !output.status.success() {
            return Err(one(&String::from_utf8_lossy(&output.stderr)));
        }
        let found = std::fs::read(folder.join("snapshot.raw")).map_err(|error| one(&error))?;
        compare(model, &found)?;
    }
    Ok(())
}

/// Reads all of the disk, goes on writing, and reads it once more: how many sectors were behind, and the last content.
fn live_on(
    daemon: &Daemon,
    plan: &Plan,
    expected: &Expected,
    mut model: Model,
) -> Result<(usize, Vec<u8>), Vec<String>> {
    let one = |wrong: String| vec![wrong];
    let mut client = daemon.client().map_err(one)?;
    if !expected.sizes.contains(&client.size()) {
        return Err(vec![format!("the disk has {} bytes instead of {:?}", client.size(), expected.sizes)]);
    }
    let found = read(&mut client, &model)?;
    tail_is_zero(&mut client, found.len() as u64).map_err(one)?;
    let behind = found.chunks(BYTES).enumerate().filter(|(at, bytes)| model.is_behind(*at, bytes)).count();
    // Life goes on, and must not trip over what the kill has left.
    model.settle(&found);
    let guest = Guest::start(&daemon.nbd(), model, !plan.seed, plan.depth).map_err(one)?;
    guest.serve(200);
    let account = guest.stop().map_err(one)?;
    if account.lost || !account.wrong.is_empty() {
        return Err([vec!["after the kill:".to_owned()], account.wrong].concat());
    }
    let again = read(&mut client, &account.model)?;
    Ok((behind, again))
}

/// All of the guest's disk, as it must be.
pub fn read(client: &mut Client, model: &Model) -> Result<Vec<u8>, Vec<String>> {
    let found = read_all(client, model.len()).map_err(|error| vec![format!("reading: {error}")])?;
    compare(model, &found)?;
    Ok(found)
}

/// All sectors against what they may hold.
fn compare(model: &Model, found: &[u8]) -> Result<(), Vec<String>> {
    let mut wrong: BTreeMap<Wrong, Vec<usize>> = BTreeMap::new();
    for (at, bytes) in found.chunks(BYTES).enumerate() {
        if let Some(kind) = model.judge(at, bytes) {
            wrong.entry(kind).or_default().push(at);
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let mut said = Vec::new();
    for (kind, sectors) in wrong.iter().rev() {
        said.push(format!("{kind:?}: {} sectors", sectors.len()));
        for &at in sectors.iter().take(3) {
            said.push(format!("  {}", model.describe(at, &found[at * BYTES..(at + 1) * BYTES])));
        }
    }
    Err(said)
}

/// Beyond what the guest uses there is nothing. A sample: the disk may be large there.
fn tail_is_zero(client: &mut Client, from: u64) -> Result<(), String> {
    let end = client.size().min(from + (4 << 20));
    let length = u32::try_from(end.saturating_sub(from)).map_err(|error| error.to_string())?;
    if length == 0 {
        return Ok(());
    }
    let found = client.read(from, length).map_err(|error| format!("reading beyond: {error}"))?;
    match found.iter().position(|&byte| byte != 0) {
        None => Ok(()),
        Some(at) => Err(format!("byte {} beyond the guest's disk is not zero", from + at as u64)),
    }
}

/// Checks an image with every checker; how many clusters it leaks.
pub fn check(programs: &Programs, folder: &Path, image: &str) -> Result<u64, String> {
    let mut leaks = 0;
    for (program, words) in &programs.checkers {
        let mut command = Command::new(program);
        command.args(words).args(["check", "--output=json", "-f", "qcow2", image]).current_dir(folder);
        let output = unlocked(&mut command).map_err(|error| format!("{}: {error}", program.display()))?;
        // 0: sound; 3: sound but for leaks.
        if !matches!(output.status.code(), Some(0 | 3)) {
            let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            return Err(format!("{}: {} finds {image} broken: {said}", output.status, program.display()));
        }
        if let Ok(Value::Object(report)) = json::parse(&output.stdout) {
            leaks = report.get("leaks").and_then(Value::as_u64).unwrap_or(0).max(leaks);
        }
    }
    Ok(leaks)
}

/// The output of a program, once nobody has a lock on its images any more: the locks of a killed process go when the
/// kernel has taken its requests down, some milliseconds later.
fn unlocked(command: &mut Command) -> std::io::Result<Output> {
    let begun = Instant::now();
    loop {
        let output = command.output()?;
        let is_locked = String::from_utf8_lossy(&output.stderr).contains(" lock");
        if output.status.success() || !is_locked || begun.elapsed() > PATIENCE {
            return Ok(output);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The reference reads the same from the image.
fn same_for_the_reference(program: &Path, folder: &Path, top: &str, ours: &[u8]) -> Result<(), String> {
    let mut command = Command::new(program);
    command.args(["convert", "-f", "qcow2", "-O", "raw", top, "reference.raw"]).current_dir(folder);
    let output = command.output().map_err(|error| format!("{}: {error}", program.display()))?;
    if !output.status.success() {
        return Err(format!("qemu-img cannot read it: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let theirs = std::fs::read(folder.join("reference.raw")).map_err(|error| error.to_string())?;
    let same = theirs.get(..ours.len()) == Some(ours) && theirs[ours.len()..].iter().all(|&byte| byte == 0);
    if same { Ok(()) } else { Err("qemu-img reads something else from it than the daemon".to_owned()) }
}

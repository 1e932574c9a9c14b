//! Whole raw disks copied to raw files: by sharing storage, on file systems that can.

use std::process::{Command, Stdio};
use std::time::Instant;

use underlay_qmp::json::Object;

use super::{Bench, GIB, Row, Target};
use crate::daemon::Daemon;
use crate::image;
use crate::measure::{Outcome, Sample};
use crate::side::Side;

/// A disk that is on its medium, and an empty target.
fn disks(bench: &Bench) -> Outcome<[String; 2]> {
    let (source, target) = (bench.path("source"), bench.path("target"));
    let size = bench.size(GIB);
    image::raw(&source, size)?;
    std::fs::File::open(&source)?.sync_all()?;
    std::fs::File::create(&target)?.set_len(size)?;
    Ok([source, target].map(|path| path.to_string_lossy().into_owned()))
}

/// Whether files in the folder can share storage.
pub fn is_supported(bench: &Bench) -> Outcome<bool> {
    let (one, other) = (bench.path("one"), bench.path("other"));
    std::fs::write(&one, [1; 4096])?;
    let mut copy = Command::new("cp");
    copy.arg("--reflink=always").args([&one, &other]).stderr(Stdio::null());
    Ok(copy.status()?.success())
}

fn job(bench: &Bench, side: Side, command: &str) -> Outcome<Sample> {
    let [source, target] = disks(bench)?;
    let mut daemon = Daemon::start(bench, side, &[source.into()], "raw")?;
    let arguments = Object::new()
        .with("device", "n0")
        .with("target", target.as_str())
        .with("sync", "full")
        .with("format", "raw")
        .with("mode", "existing");
    daemon.measure(|daemon| {
        if command == "drive-backup" {
            return daemon.job(command, &arguments);
        }
        let begun = Instant::now();
        daemon.execute(command, arguments.with("job-id", "j"))?;
        daemon.monitor.event("BLOCK_JOB_READY", "device", "j")?;
        let took = begun.elapsed().as_secs_f64();
        daemon.execute("block-job-cancel", Object::new().with("device", "j"))?;
        daemon.monitor.event("BLOCK_JOB_COMPLETED", "device", "j")?;
        Ok(took)
    })
}

fn convert(bench: &Bench, side: Side) -> Outcome<Sample> {
    let [source, target] = disks(bench)?;
    std::fs::remove_file(&target)?;
    bench.programs.run(side, &["convert", "-f", "raw", "-O", "raw", &source, &target])
}

pub fn rows() -> Vec<Row> {
    let row = |name, about, work: fn(&Bench, Side) -> Outcome<Sample>| {
        Row::one(name, about, ("s", Target::Ratio(30.0)), work).only_where(is_supported)
    };
    vec![
        row("raw-mirror", "mirror of 1 GiB, raw to raw, shared (xfs, btrfs)", |bench, side| {
            job(bench, side, "drive-mirror")
        }),
        row("raw-backup", "backup of 1 GiB, raw to raw, shared (xfs, btrfs)", |bench, side| {
            job(bench, side, "drive-backup")
        }),
        row("raw-convert", "convert 1 GiB, raw to raw, shared (xfs, btrfs)", convert),
    ]
}

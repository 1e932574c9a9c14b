//! A guest under a mirror that is in step with it, and copies to another daemon.

use std::time::Duration;

use underlay_qmp::json::{Object, Value};

use super::jobs::{Data, Job};
use super::{Bench, GIB, MIB, Row, Target};
use crate::daemon::Daemon;
use crate::guest::{self, Mix, Until, random};
use crate::image;
use crate::measure::{Outcome, Sample};
use crate::side::Side;

/// How the time of a guest's request under a ready mirror relates to that without.
fn under_mirror(bench: &Bench, side: Side, copy_mode: &str) -> Outcome<Sample> {
    let chain = Job::Mirror.chain(bench, Data::Dense, bench.size(GIB))?;
    let target = bench.path("t");
    // What a mirror costs once it has copied everything does not depend on who has filled the target.
    image::fill(&target, 4 * MIB, 4 * MIB, bench.size(GIB))?;
    let mut daemon = Daemon::start(bench, side, &chain, "qcow2")?;
    let time = Duration::from_secs_f64(bench.seconds);
    let load = || random(Mix::Both, 8);
    guest::run(daemon.connect()?, load(), Until::Time(time / 4), 9)?;
    let idle = guest::run(daemon.connect()?, load(), Until::Time(time), 1)?;
    let arguments = Object::new()
        .with("job-id", "j")
        .with("device", "n0")
        .with("target", target.to_string_lossy().as_ref())
        .with("sync", "none")
        .with("format", "qcow2")
        .with("mode", "existing")
        .with("copy-mode", copy_mode);
    daemon.execute("drive-mirror", arguments)?;
    daemon.monitor.event("BLOCK_JOB_READY", "device", "j")?;
    daemon.measure(|daemon| {
        let busy = guest::run(daemon.connect()?, load(), Until::Time(time), 1)?;
        Ok(busy.time / idle.time)
    })
}

/// A copy of 1 GiB to an export of a second daemon of the same make.
fn remote(bench: &Bench, side: Side, command: &str) -> Outcome<Sample> {
    let chain = Job::Mirror.chain(bench, Data::Dense, bench.size(GIB))?;
    let there = bench.path("there");
    std::fs::create_dir_all(&there)?;
    let second = Bench { programs: bench.programs.clone(), folder: there, ..*bench };
    let far = Daemon::start(&second, side, &[bench.path("t")], "qcow2")?;
    let mut daemon = Daemon::start(bench, side, &chain, "qcow2")?;
    let server = Object::new().with("type", "unix").with("path", far.nbd_socket());
    let node = Object::new()
        .with("driver", "nbd")
        .with("node-name", "far")
        .with("export", "disk")
        .with("server", Value::Object(server));
    daemon.execute("blockdev-add", node)?;
    bench.warm_up(2 * GIB)?;
    let arguments = Object::new().with("device", "n0").with("target", "far").with("sync", "full");
    daemon.measure(|daemon| match command {
        "blockdev-mirror" => {
            let begun = std::time::Instant::now();
            daemon.execute(command, arguments.with("job-id", "j"))?;
            daemon.monitor.event("BLOCK_JOB_READY", "device", "j")?;
            Ok(begun.elapsed().as_secs_f64())
        }
        _ => daemon.job(command, &arguments),
    })
}

pub fn rows() -> Vec<Row> {
    let guest = |name, about, most, mode: &'static str| {
        Row::one(name, about, ("of idle", Target::Value(most)), move |bench, side| {
            under_mirror(bench, side, mode)
        })
    };
    let remote = |name, about, command: &'static str| {
        Row::one(name, about, ("s", Target::Ratio(2.0)), move |bench, side| remote(bench, side, command))
    };
    vec![
        guest("mirrored", "guest 50/50, depth 8, under a converged mirror, by idle", 1.5, "background"),
        guest("mirrored-blocking", "the same with copy-mode=write-blocking", 1.8, "write-blocking"),
        remote("mirror-remote", "mirror of 1 GiB to an NBD export of a second daemon", "blockdev-mirror"),
        remote("backup-remote", "backup of 1 GiB to an NBD export of a second daemon", "blockdev-backup"),
    ]
}

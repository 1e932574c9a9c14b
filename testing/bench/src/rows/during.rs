//! A guest while a job runs, and the job while a guest runs: each against itself alone.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::jobs::{Data, Job};
use super::{Bench, GIB, Part, Row, Target};
use crate::daemon::Daemon;
use crate::guest::{self, Load, Mix, Served, Until, random};
use crate::measure::{Outcome, Sample};
use crate::side::Side;

const LOAD: fn() -> Load = || random(Mix::Both, 8);

/// Bytes that the job copies: enough for a second or two.
const COPIED: u64 = 3 * GIB;

fn job_alone(bench: &Bench, side: Side, job: Job) -> Outcome<f64> {
    let chain = job.chain(bench, Data::Dense, bench.size(COPIED))?;
    let mut daemon = Daemon::start(bench, side, &chain, "qcow2")?;
    bench.warm_up(COPIED + GIB)?;
    job.run(&mut daemon)
}

/// What the guest needs while the job runs, and the job's time.
fn both(daemon: &mut Daemon, job: Job) -> Outcome<(Served, f64)> {
    let client = daemon.connect()?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop = &stop;
        let load = scope.spawn(move || {
            guest::run(client, LOAD(), Until::Told(stop), 2).map_err(|error| error.to_string())
        });
        let time = job.run(daemon);
        stop.store(true, Ordering::Relaxed);
        let served = load.join().map_err(|_| "the guest panicked")??;
        Ok((served, time?))
    })
}

fn sample(bench: &Bench, side: Side, job: Job) -> Outcome<Vec<Sample>> {
    let alone = job_alone(bench, side, job)?;
    for name in ["a", "b", "c", "t"] {
        // Not all jobs have all of them.
        let _ = std::fs::remove_file(bench.path(name));
    }
    let chain = job.chain(bench, Data::Dense, bench.size(COPIED))?;
    let mut daemon = Daemon::start(bench, side, &chain, "qcow2")?;
    // What the guest touches is its own already: a first write costs the same with and without the job.
    let time = Duration::from_secs_f64(bench.seconds);
    guest::run(
        daemon.connect()?,
        Load { order: guest::Order::EachCluster, mix: Mix::Read, ..LOAD() },
        Until::Time(time),
        3,
    )?;
    bench.warm_up(COPIED + GIB)?;
    let idle = guest::run(daemon.connect()?, LOAD(), Until::Time(time), 1)?;
    let mut parts = Vec::new();
    let whole = daemon.measure(|daemon| {
        let (served, took) = both(daemon, job)?;
        parts = vec![served.time / idle.time, served.p99 / idle.p99, took / alone, served.time, served.p99];
        Ok(took)
    })?;
    Ok(parts.into_iter().map(|value| Sample { value, ..whole }).collect())
}

pub fn rows() -> Vec<Row> {
    let part = |name, unit, target| Part { name, unit, target };
    let row = |name, about, job| {
        let parts = vec![
            part("guest's time", "of idle", Target::Value(2.0)),
            part("guest's p99", "of idle", Target::Value(4.0)),
            part("job's time", "of alone", Target::Value(2.0)),
            part("guest's time", "us/op", Target::Ratio(1.0)),
            part("guest's p99", "us", Target::None),
        ];
        Row::of_parts(name, about, parts, move |bench, side| sample(bench, side, job))
    };
    vec![
        row("during-stream", "guest 50/50, depth 8, during an unthrottled stream", Job::Stream),
        row("during-commit", "guest 50/50, depth 8, during an unthrottled commit", Job::Commit),
        row("during-mirror", "guest 50/50, depth 8, during an unthrottled mirror", Job::Mirror),
        row("during-backup", "guest 50/50, depth 8, during an unthrottled backup", Job::Backup),
    ]
}

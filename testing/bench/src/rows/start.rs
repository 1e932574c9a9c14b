//! The daemon itself: how soon it answers, how fast, and how much memory it takes.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use underlay_qmp::json::Object;

use super::{Bench, GIB, Part, Row, Target};
use crate::daemon::Daemon;
use crate::guest::{self, Mix, Until, random};
use crate::image;
use crate::measure::{Outcome, Sample};
use crate::side::Side;

/// Daemons started for one sample.
const STARTS: u32 = 10;
/// Commands for one sample.
const COMMANDS: u32 = 2000;

fn disk(bench: &Bench, size: u64) -> Outcome<Vec<PathBuf>> {
    let path = bench.path("disk");
    image::qcow2(&path, size, None)?;
    Ok(vec![path])
}

fn start(bench: &Bench, side: Side) -> Outcome<Sample> {
    let chain = disk(bench, GIB)?;
    let mut all = Sample::default();
    for _ in 0..STARTS {
        let begun = Instant::now();
        let daemon = Daemon::start(bench, side, &chain, "qcow2")?;
        all.value += begun.elapsed().as_secs_f64() * 1e3 / f64::from(STARTS);
        all.cpu += daemon.cpu()?;
        all.peak = all.peak.max(daemon.memory("VmHWM")?);
    }
    Ok(all)
}

fn round_trip(bench: &Bench, side: Side) -> Outcome<Sample> {
    let mut daemon = Daemon::start(bench, side, &disk(bench, GIB)?, "qcow2")?;
    daemon.measure(|daemon| {
        let begun = Instant::now();
        for _ in 0..COMMANDS {
            daemon.execute("query-version", Object::new())?;
        }
        Ok(begun.elapsed().as_secs_f64() * 1e6 / f64::from(COMMANDS))
    })
}

fn memory(bench: &Bench, side: Side) -> Outcome<Vec<Sample>> {
    let chain = disk(bench, bench.size(GIB))?;
    image::fill(&chain[0], 4 << 20, 4 << 20, bench.size(GIB))?;
    let mut daemon = Daemon::start(bench, side, &chain, "qcow2")?;
    let idle = daemon.memory("VmRSS")?;
    let time = Duration::from_secs_f64(bench.seconds);
    let whole = daemon.measure(|daemon| {
        for mix in [Mix::Read, Mix::Write] {
            guest::run(daemon.connect()?, random(mix, 32), Until::Time(time), 1)?;
        }
        daemon.memory("VmHWM")
    })?;
    Ok(vec![Sample { value: idle, ..Sample::default() }, whole])
}

pub fn rows() -> Vec<Row> {
    let part = |name| Part { name, unit: "MiB", target: Target::Ratio(1.0) };
    vec![
        Row::one("start", "daemon start to the first answer", ("ms", Target::Ratio(2.0)), start),
        Row::one("round-trip", "QMP command and reply", ("us", Target::Ratio(4.0)), round_trip),
        Row::of_parts(
            "memory",
            "resident memory of a daemon with one disk",
            vec![part("idle"), part("under load")],
            memory,
        ),
    ]
}

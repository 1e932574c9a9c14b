//! What dirty bitmaps cost, and what they save.

use std::time::{Duration, Instant};

use underlay_qmp::json::{Object, Value};

use super::{Bench, GIB, MIB, Row, Target};
use crate::daemon::Daemon;
use crate::guest::{self, Load, Mix, Order, Until, random};
use crate::image;
use crate::limit;
use crate::measure::{Outcome, Sample};
use crate::side::Side;

/// Bitmaps of a transaction, and of an image.
const MANY: usize = 1000;

/// A guest with and without bitmaps takes turns so often for one sample.
const TURNS: u32 = 4;

/// Actions on bitmaps `b0`, `b1` and so on of the disk.
fn transaction(daemon: &mut Daemon, action: &str, count: usize, more: &Object) -> Outcome<()> {
    let action = |index| {
        let mut data = Object::new().with("node", "n0").with("name", format!("b{index}"));
        for (name, value) in more.iter() {
            data.insert(name, value.clone());
        }
        Object::new().with("type", format!("block-dirty-bitmap-{action}")).with("data", data).into()
    };
    let actions: Vec<Value> = (0..count).map(action).collect();
    daemon.execute("transaction", Object::new().with("actions", Value::List(actions)))
}

fn add(daemon: &mut Daemon, count: usize, persistent: bool) -> Outcome<()> {
    transaction(daemon, "add", count, &Object::new().with("persistent", persistent))
}

/// How the time of a guest's write with so many bitmaps relates to that with none. What is measured is the usual write,
/// not the first one to a region, as the disk is written all over before.
fn guest_writes(bench: &Bench, side: Side, count: usize, persistent: bool) -> Outcome<Sample> {
    let path = bench.path("disk");
    let size = bench.size(GIB);
    image::qcow2(&path, size, None)?;
    image::fill(&path, 4 * MIB, 4 * MIB, size)?;
    let mut daemon = Daemon::start(bench, side, &[path], "qcow2")?;
    let time = Duration::from_secs_f64(bench.seconds / f64::from(TURNS));
    let everywhere = Load { mix: Mix::Write, order: Order::EachCluster, bytes: 4096, depth: 32 };
    daemon.measure(|daemon| {
        let (mut with, mut without) = (0.0, 0.0);
        for turn in 0..TURNS {
            guest::run(daemon.connect()?, everywhere, Until::Time(time), 3)?;
            let load = || random(Mix::Write, 32);
            without += guest::run(daemon.connect()?, load(), Until::Time(time), turn.into())?.time;
            add(daemon, count, persistent)?;
            guest::run(daemon.connect()?, everywhere, Until::Time(time), 3)?;
            with += guest::run(daemon.connect()?, load(), Until::Time(time), turn.into())?.time;
            transaction(daemon, "remove", count, &Object::new())?;
        }
        Ok(with / without)
    })
}

fn one_transaction(bench: &Bench, side: Side) -> Outcome<Sample> {
    let path = bench.path("disk");
    image::qcow2(&path, GIB, None)?;
    let mut daemon = Daemon::start(bench, side, &[path], "qcow2")?;
    daemon.measure(|daemon| {
        let begun = Instant::now();
        add(daemon, MANY, false)?;
        Ok(begun.elapsed().as_secs_f64())
    })
}

/// The end of one daemon and the start of the next, with bitmaps in the image.
fn stored_and_loaded(bench: &Bench, side: Side) -> Outcome<Sample> {
    let path = bench.path("disk");
    image::qcow2(&path, bench.size(GIB), None)?;
    let chain = [path];
    let mut daemon = Daemon::start(bench, side, &chain, "qcow2")?;
    add(&mut daemon, MANY, true)?;
    let everywhere = Load { mix: Mix::Write, order: Order::EachCluster, bytes: 4096, depth: 32 };
    guest::run(daemon.connect()?, everywhere, Until::Time(Duration::ZERO), 3)?;
    let begun = Instant::now();
    daemon.quit()?;
    let mut daemon = Daemon::start(bench, side, &chain, "qcow2")?;
    daemon.execute("query-named-block-nodes", Object::new().with("flat", true))?;
    let took = begun.elapsed().as_secs_f64();
    daemon.measure(|_| Ok(took))
}

/// A backup of the hundredth part that was written since the last one.
fn incremental(bench: &Bench, side: Side) -> Outcome<Sample> {
    let (path, target) = (bench.path("disk"), bench.path("target"));
    let size = bench.size(64 * GIB);
    image::qcow2(&path, size, None)?;
    image::qcow2(&target, size, None)?;
    image::fill(&path, MIB, 100 * MIB, size / 100 / MIB * MIB)?;
    let mut daemon = Daemon::start(bench, side, std::slice::from_ref(&path), "qcow2")?;
    add(&mut daemon, 1, false)?;
    let every = Load { mix: Mix::Write, order: Order::Every(100 * MIB), bytes: 1 << 20, depth: 8 };
    guest::run(daemon.connect()?, every, Until::Time(Duration::ZERO), 1)?;
    bench.warm_up(GIB)?;
    daemon.measure(|daemon| {
        let arguments = Object::new()
            .with("device", "n0")
            .with("target", target.to_string_lossy().as_ref())
            .with("format", "qcow2")
            .with("mode", "existing")
            .with("sync", "incremental")
            .with("bitmap", "b0");
        daemon.job("drive-backup", &arguments)
    })
}

pub fn rows() -> Vec<Row> {
    let of_none = |most| ("of none", Target::Value(most));
    vec![
        Row::one(
            "bitmaps-16",
            "4 KiB random writes, depth 32, with 16 bitmaps, by those with none",
            of_none(1.03),
            |bench, side| guest_writes(bench, side, 16, false),
        ),
        Row::one(
            "bitmaps-8-persistent",
            "the same with 8 persistent ones (ours survive a crash)",
            of_none(1.05),
            |bench, side| guest_writes(bench, side, 8, true),
        ),
        Row::one(
            "bitmaps-transaction",
            "1,000 bitmaps added in one transaction",
            ("s", Target::Ratio(5.0)),
            one_transaction,
        ),
        Row::one(
            "bitmaps-stored",
            "1,000 persistent bitmaps: end of a daemon, and start of the next",
            ("s", Target::Ratio(3.0)),
            stored_and_loaded,
        ),
        Row::one(
            "incremental",
            "incremental backup of 64 GiB, 1 % dirty",
            ("s", Target::Ratio(3.0)),
            incremental,
        )
        .limited_by(|bench| limit::copy(bench, bench.size(64 * GIB) / 100 / MIB * MIB, MIB, true)),
    ]
}

//! A guest alone with its disk.

use std::path::PathBuf;
use std::time::Duration;

use super::{Bench, GIB, Row, Target};
use crate::daemon::Daemon;
use crate::guest::{self, Load, Mix, Order, Until, random};
use crate::image;
use crate::limit;
use crate::measure::{Outcome, Sample};
use crate::side::Side;

/// What qemu-img makes.
const CLUSTER: u64 = 64 << 10;

/// Layers of the deep chain.
const DEEP: usize = 32;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Disk {
    Raw,
    Qcow2,
    /// Nothing is allocated.
    Empty,
    /// Nothing is allocated, but everything below is.
    Overlay,
}

impl Disk {
    fn make(self, bench: &Bench) -> Outcome<(Vec<PathBuf>, &'static str)> {
        let size = bench.size(GIB);
        let (base, top) = (bench.path("base"), bench.path("top"));
        match self {
            Self::Raw => {
                image::raw(&base, size)?;
                return Ok((vec![base], "raw"));
            }
            Self::Empty => image::qcow2(&base, size, None)?,
            Self::Qcow2 | Self::Overlay => {
                image::qcow2(&base, size, None)?;
                image::fill(&base, 4 << 20, 4 << 20, size)?;
            }
        }
        if self != Self::Overlay {
            return Ok((vec![base], "qcow2"));
        }
        image::qcow2(&top, size, Some(&base))?;
        Ok((vec![base, top], "qcow2"))
    }
}

fn alone(bench: &Bench, side: Side, disk: Disk, load: Load) -> Outcome<Sample> {
    let (chain, format) = disk.make(bench)?;
    let mut daemon = Daemon::start(bench, side, &chain, format)?;
    let time = Duration::from_secs_f64(bench.seconds);
    if load.order == Order::EachCluster {
        bench.warm_up(2 * GIB)?;
    } else {
        // Caches full, processors awake.
        guest::run(daemon.connect()?, load, Until::Time(time / 4), 9)?;
    }
    daemon.measure(|daemon| Ok(guest::run(daemon.connect()?, load, Until::Time(time), 1)?.time))
}

/// How the time per request with four connections relates to that with one.
fn connections(bench: &Bench, side: Side) -> Outcome<Sample> {
    let (chain, format) = Disk::Qcow2.make(bench)?;
    let mut daemon = Daemon::start(bench, side, &chain, format)?;
    let time = Duration::from_secs_f64(bench.seconds);
    let of = |count: usize| -> Outcome<f64> {
        let clients = (0..count).map(|_| daemon.connect()).collect::<Outcome<Vec<_>>>()?;
        Ok(guest::run_all(clients, random(Mix::Read, 32), time)?.time)
    };
    of(1)?;
    let (one, four) = (of(1)?, of(4)?);
    daemon.measure(|_| Ok(four / one))
}

/// How the time of a read below many layers relates to that below one.
fn depth(bench: &Bench, side: Side) -> Outcome<Sample> {
    let of = |layers: usize| -> Outcome<Sample> {
        let (mut chain, format) = Disk::Qcow2.make(bench)?;
        for layer in 1..=layers {
            let path = bench.path(&format!("layer{layer}"));
            image::qcow2(&path, bench.size(GIB), chain.last().map(PathBuf::as_path))?;
            chain.push(path);
        }
        let mut daemon = Daemon::start(bench, side, &chain, format)?;
        let time = Duration::from_secs_f64(bench.seconds);
        let load = random(Mix::Read, 32);
        guest::run(daemon.connect()?, load, Until::Time(time / 4), 9)?;
        daemon.measure(|daemon| Ok(guest::run(daemon.connect()?, load, Until::Time(time), 1)?.time))
    };
    let (one, deep) = (of(1)?, of(DEEP)?);
    Ok(Sample { value: deep.value / one.value, ..deep })
}

pub fn rows() -> Vec<Row> {
    let row = |name, about, target, disk, load| {
        Row::one(name, about, ("us/op", Target::Ratio(target)), move |bench, side| {
            alone(bench, side, disk, load)
        })
    };
    let megabytes = |mix| Load { mix, order: Order::Sequential, bytes: 1 << 20, depth: 8 };
    let first = Load { mix: Mix::Write, order: Order::EachCluster, bytes: 4096, depth: 32 };
    let (read, write) = (Mix::Read, Mix::Write);
    vec![
        row("read-raw", "4 KiB random reads, depth 32, raw", 2.0, Disk::Raw, random(read, 32)),
        row("write-raw", "4 KiB random writes, depth 32, raw", 2.0, Disk::Raw, random(write, 32)),
        row("read-qcow2", "4 KiB random reads, depth 32, qcow2", 2.0, Disk::Qcow2, random(read, 32)),
        row("write-qcow2", "4 KiB random writes, depth 32, qcow2", 2.0, Disk::Qcow2, random(write, 32)),
        row("read-raw-d1", "4 KiB random reads, depth 1, raw", 1.3, Disk::Raw, random(read, 1)),
        row("write-raw-d1", "4 KiB random writes, depth 1, raw", 1.3, Disk::Raw, random(write, 1)),
        row("read-qcow2-d1", "4 KiB random reads, depth 1, qcow2", 1.3, Disk::Qcow2, random(read, 1)),
        row("write-qcow2-d1", "4 KiB random writes, depth 1, qcow2", 1.3, Disk::Qcow2, random(write, 1)),
        row("seq-read-raw", "1 MiB sequential reads, depth 8, raw", 1.5, Disk::Raw, megabytes(read)),
        row("seq-write-raw", "1 MiB sequential writes, depth 8, raw", 1.5, Disk::Raw, megabytes(write)),
        row("seq-read-qcow2", "1 MiB sequential reads, depth 8, qcow2", 1.5, Disk::Qcow2, megabytes(read)),
        row("seq-write-qcow2", "1 MiB sequential writes, depth 8, qcow2", 1.5, Disk::Qcow2, megabytes(write)),
        row("first-write", "first writes to unallocated clusters, depth 32", 2.0, Disk::Empty, first),
        row("first-write-backed", "first writes over a backing file, depth 32", 2.0, Disk::Overlay, first)
            .limited_by(|bench| {
                let bytes = bench.size(GIB);
                Ok(limit::copy(bench, bytes, CLUSTER, false)? * 1e6 / (bytes / CLUSTER) as f64)
            }),
        Row::one(
            "connections",
            "time per 4 KiB read with four connections, by that with one",
            ("of one", Target::Value(1.0 / 1.6)),
            connections,
        ),
        Row::one(
            "depth",
            "time per 4 KiB read of data below 32 layers, by that below 1",
            ("of one", Target::Value(1.1)),
            depth,
        ),
    ]
}

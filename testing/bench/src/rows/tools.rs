//! The image tool.

use super::{Bench, GIB, Row, Target};
use crate::image;
use crate::limit;
use crate::measure::{Outcome, Sample};
use crate::side::Side;

/// Runs of a command that takes milliseconds, for one sample.
const RUNS: u32 = 20;

fn convert(bench: &Bench, side: Side, from: &str, to: &str) -> Outcome<Sample> {
    let (source, target) = (bench.path("source"), bench.path("target"));
    let size = bench.size(GIB);
    if from == "raw" {
        image::raw(&source, size)?;
    } else {
        image::qcow2(&source, size, None)?;
        image::fill(&source, 4 << 20, 4 << 20, size)?;
    }
    bench.warm_up(2 * GIB)?;
    let (source, target) = (source.to_string_lossy(), target.to_string_lossy());
    bench.programs.run(side, &["convert", "-f", from, "-O", to, &source, &target])
}

fn fragmented(bench: &Bench, side: Side, arguments: &[&str]) -> Outcome<Sample> {
    let path = bench.path("fragmented");
    image::fragmented(&path, bench.size(100 * GIB))?;
    let path = path.to_string_lossy();
    bench.programs.run(side, &[arguments, &[&*path]].concat())
}

fn info(bench: &Bench, side: Side) -> Outcome<Sample> {
    let path = bench.path("image");
    image::qcow2(&path, GIB, None)?;
    let path = path.to_string_lossy();
    let mut all = Sample::default();
    for _ in 0..RUNS {
        let one = bench.programs.run(side, &["info", &path])?;
        all.value += one.value * 1e3 / f64::from(RUNS);
        all.cpu += one.cpu / f64::from(RUNS);
        all.peak = all.peak.max(one.peak);
    }
    Ok(all)
}

fn snapshot(bench: &Bench, side: Side) -> Outcome<Sample> {
    let path = bench.path("fragmented");
    image::fragmented(&path, bench.size(16 * GIB))?;
    let path = path.to_string_lossy();
    let taken = bench.programs.run(side, &["snapshot", "-c", "s", &path])?;
    let deleted = bench.programs.run(side, &["snapshot", "-d", "s", &path])?;
    Ok(Sample {
        value: taken.value + deleted.value,
        cpu: taken.cpu + deleted.cpu,
        peak: taken.peak.max(deleted.peak),
    })
}

pub fn rows() -> Vec<Row> {
    let seconds = |target| ("s", Target::Ratio(target));
    vec![
        Row::one("convert-to-qcow2", "convert 1 GiB, raw to qcow2", seconds(1.2), |bench, side| {
            convert(bench, side, "raw", "qcow2")
        })
        .limited_by(limit::of_a_gigabyte),
        Row::one("convert-to-raw", "convert 1 GiB, qcow2 to raw", seconds(1.2), |bench, side| {
            convert(bench, side, "qcow2", "raw")
        })
        .limited_by(limit::of_a_gigabyte),
        Row::one("map", "map of a fragmented image of 100 GiB", seconds(20.0), |bench, side| {
            fragmented(bench, side, &["map", "--output=json", "-f", "qcow2"])
        }),
        Row::one("check", "check of a fragmented image of 100 GiB", seconds(20.0), |bench, side| {
            fragmented(bench, side, &["check", "-f", "qcow2"])
        }),
        Row::one("snapshot", "snapshot -c and -d, fragmented image of 16 GiB", seconds(10.0), snapshot),
        Row::one("info", "img info", ("ms", Target::Ratio(2.0)), info),
    ]
}

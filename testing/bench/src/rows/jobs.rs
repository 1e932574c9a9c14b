//! Jobs without a guest.

use std::path::PathBuf;

use underlay_qmp::json::Object;

use super::{Bench, GIB, MIB, Row, Target};
use crate::daemon::Daemon;
use crate::image;
use crate::limit;
use crate::measure::{Outcome, Sample};
use crate::side::Side;

/// Which job.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Job {
    Stream,
    /// Of an image in the middle.
    Commit,
    /// Of the active image.
    ActiveCommit,
    /// Until it is ready.
    Mirror,
    Backup,
}

/// How the data lies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Data {
    Dense,
    /// 1 MiB in each GiB.
    Sparse,
    /// 1 MiB in each 16 GiB.
    Thin,
}

impl Job {
    /// A chain with `bytes` of data in the image that the job copies from.
    pub fn chain(self, bench: &Bench, data: Data, bytes: u64) -> Outcome<Vec<PathBuf>> {
        let paths: Vec<_> = ["a", "b", "c"].map(|name| bench.path(name)).into();
        let (run, every) = match data {
            Data::Dense => (4 * MIB, 4 * MIB),
            Data::Sparse => (MIB, GIB),
            Data::Thin => (MIB, 16 * GIB),
        };
        let size = bytes / run * every;
        image::qcow2(&paths[0], size, None)?;
        if matches!(self, Self::Mirror | Self::Backup) {
            image::fill(&paths[0], run, every, bytes)?;
            // Not made by the job: of an image that it has made, QEMU knows that it is empty.
            image::qcow2(&bench.path("t"), size, None)?;
            return Ok(paths[..1].to_vec());
        }
        image::qcow2(&paths[1], size, Some(&paths[0]))?;
        let from = if self == Self::Stream { &paths[0] } else { &paths[1] };
        image::fill(from, run, every, bytes)?;
        if self != Self::Commit {
            return Ok(paths[..2].to_vec());
        }
        image::qcow2(&paths[2], size, Some(&paths[1]))?;
        Ok(paths)
    }

    /// Runs it to its end; seconds.
    pub fn run(self, daemon: &mut Daemon) -> Outcome<f64> {
        match self {
            Self::Stream => daemon.job("block-stream", &Object::new().with("device", "n1")),
            Self::Commit => {
                let arguments =
                    Object::new().with("device", "n2").with("top-node", "n1").with("base-node", "n0");
                daemon.job("block-commit", &arguments)
            }
            Self::ActiveCommit => {
                let begun = std::time::Instant::now();
                let arguments =
                    Object::new().with("device", "n1").with("base-node", "n0").with("job-id", "j");
                daemon.execute("block-commit", arguments)?;
                daemon.monitor.event("BLOCK_JOB_READY", "device", "j")?;
                daemon.execute("job-complete", Object::new().with("id", "j"))?;
                daemon.monitor.event("BLOCK_JOB_COMPLETED", "device", "j")?;
                Ok(begun.elapsed().as_secs_f64())
            }
            Self::Backup => daemon.job("drive-backup", &copy(daemon)),
            Self::Mirror => {
                let begun = std::time::Instant::now();
                daemon.execute("drive-mirror", copy(daemon).with("job-id", "j"))?;
                daemon.monitor.event("BLOCK_JOB_READY", "device", "j")?;
                let took = begun.elapsed().as_secs_f64();
                daemon.execute("job-cancel", Object::new().with("id", "j"))?;
                daemon.monitor.event("BLOCK_JOB_CANCELLED", "device", "j")?;
                Ok(took)
            }
        }
    }
}

/// A copy of the whole disk to an image.
fn copy(daemon: &Daemon) -> Object {
    let target = daemon.folder().join("t");
    Object::new()
        .with("device", "n0")
        .with("target", target.to_string_lossy().as_ref())
        .with("sync", "full")
        .with("format", "qcow2")
        .with("mode", "existing")
}

fn sample(bench: &Bench, side: Side, job: Job, data: Data) -> Outcome<Sample> {
    let bytes = if data == Data::Thin { GIB / 16 } else { GIB };
    let chain = job.chain(bench, data, bench.size(bytes))?;
    let mut daemon = Daemon::start(bench, side, &chain, "qcow2")?;
    bench.warm_up(2 * GIB)?;
    daemon.measure(|daemon| job.run(daemon))
}

pub fn rows() -> Vec<Row> {
    let row = |name, about, target, job, data| {
        Row::one(name, about, ("s", target), move |bench, side| sample(bench, side, job, data))
    };
    let (dense, sparse) = (Target::Ratio(1.3), Target::Ratio(20.0));
    let (copy_dense, copy_thin) = (Target::Ratio(1.5), Target::Ratio(50.0));
    vec![
        row("stream-dense", "stream of 1 GiB", dense, Job::Stream, Data::Dense)
            .limited_by(limit::of_a_gigabyte),
        row("commit-dense", "commit of 1 GiB", dense, Job::Commit, Data::Dense)
            .limited_by(limit::of_a_gigabyte),
        row("active-dense", "active commit of 1 GiB", dense, Job::ActiveCommit, Data::Dense)
            .limited_by(limit::of_a_gigabyte),
        row("stream-sparse", "stream of 1 GiB in 1 TiB", sparse, Job::Stream, Data::Sparse),
        row("commit-sparse", "commit of 1 GiB in 1 TiB", sparse, Job::Commit, Data::Sparse),
        row(
            "active-sparse",
            "active commit of 1 GiB in 1 TiB",
            Target::Ratio(1.3),
            Job::ActiveCommit,
            Data::Sparse,
        ),
        row("mirror-dense", "mirror of 1 GiB", copy_dense, Job::Mirror, Data::Dense)
            .limited_by(limit::of_a_gigabyte),
        row("backup-dense", "backup of 1 GiB", copy_dense, Job::Backup, Data::Dense)
            .limited_by(limit::of_a_gigabyte),
        row("mirror-thin", "mirror of 64 MiB in 1 TiB", copy_thin, Job::Mirror, Data::Thin),
        row("backup-thin", "backup of 64 MiB in 1 TiB", copy_thin, Job::Backup, Data::Thin),
    ]
}

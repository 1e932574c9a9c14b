//! Jobs without a guest.

use std::path::PathBuf;

use underlay_qmp::json::Object;

use super::{Bench, GIB, MIB, Row, Target};
use crate::daemon::Daemon;
use crate::image;
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
}

/// How the data lies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Data {
    Dense,
    /// 1 MiB in each GiB.
    Sparse,
}

impl Job {
    /// A chain with `bytes` of data in the image that the job copies from.
    pub fn chain(self, bench: &Bench, data: Data, bytes: u64) -> Outcome<Vec<PathBuf>> {
        let paths: Vec<_> = ["a", "b", "c"].map(|name| bench.path(name)).into();
        let size = if data == Data::Dense { bytes } else { bytes / MIB * GIB };
        image::qcow2(&paths[0], size, None)?;
        image::qcow2(&paths[1], size, Some(&paths[0]))?;
        let from = if self == Self::Stream { &paths[0] } else { &paths[1] };
        match data {
            Data::Dense => image::fill(from, 4 * MIB, 4 * MIB, bytes)?,
            Data::Sparse => image::fill(from, MIB, GIB, bytes)?,
        }
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
        }
    }
}

fn sample(bench: &Bench, side: Side, job: Job, data: Data) -> Outcome<Sample> {
    let chain = job.chain(bench, data, bench.size(GIB))?;
    let mut daemon = Daemon::start(bench, side, &chain, "qcow2")?;
    bench.warm_up(2 * GIB)?;
    daemon.measure(|daemon| job.run(daemon))
}

pub fn rows() -> Vec<Row> {
    let row = |name, about, target, job, data| {
        Row::one(name, about, ("s", target), move |bench, side| sample(bench, side, job, data))
    };
    let (dense, sparse) = (Target::Ratio(1.3), Target::Ratio(20.0));
    vec![
        row("stream-dense", "stream of 1 GiB", dense, Job::Stream, Data::Dense),
        row("commit-dense", "commit of 1 GiB", dense, Job::Commit, Data::Dense),
        row("active-dense", "active commit of 1 GiB", dense, Job::ActiveCommit, Data::Dense),
        row("stream-sparse", "stream of 1 GiB in 1 TiB", sparse, Job::Stream, Data::Sparse),
        row("commit-sparse", "commit of 1 GiB in 1 TiB", sparse, Job::Commit, Data::Sparse),
        row(
            "active-sparse",
            "active commit of 1 GiB in 1 TiB",
            Target::Ratio(1.3),
            Job::ActiveCommit,
            Data::Sparse,
        ),
    ]
}

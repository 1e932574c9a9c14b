//! What a seed decides: the images, the guest, the variant of the operation and the moment of the kill. (What happens
//! between that is up to the kernel: a seed makes a failure likely again, not certain.)

use std::time::Duration;

use clap::ValueEnum;
use underlay_qcow2::CreateOptions;
use underlay_qcow2::header::Version;
use underlay_sim::Rng;

/// Bytes of the guest's disk.
pub const DISK: u64 = 32 << 20;

/// What is done to the chain while the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Operation {
    /// Nothing: the guest's writes, zeroes and discards are all there is.
    Write,
    /// One snapshot after the other.
    Snapshot,
    /// Internal snapshots, taken and deleted.
    Internal,
    /// block-stream: everything, or down to a base, or below the guest's image.
    Stream,
    /// block-commit of images below the guest's.
    Commit,
    /// block-commit of the guest's image, with block-job-complete.
    Active,
    /// A mirror of the guest's disk, of all kinds, with block-job-complete or block-job-cancel.
    Mirror,
    /// A backup of the guest's disk, of all kinds.
    Backup,
    /// Incremental backups of an image or a raw disk, with a persistent bitmap, over several kills.
    Incremental,
    /// block_resize, back and forth.
    Resize,
}

/// When the clock of the kill starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// When the command is sent.
    Issued,
    /// When the job is in this state.
    Status(&'static str),
    /// When block-job-complete (or the cancel of a mirror that is ready) is sent.
    Completing,
}

/// How snapshots are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Snapshots {
    /// blockdev-snapshot-sync; the daemon makes the images.
    Sync,
    /// blockdev-snapshot-sync with the mode `existing`.
    Existing,
    /// blockdev-add and blockdev-snapshot.
    Added,
}

/// What a round does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where it all comes from.
    pub seed: u64,
    /// What is done.
    pub operation: Operation,
    /// Which of the operation's variants.
    pub variant: usize,
    /// When the clock of the kill starts.
    pub moment: Moment,
    /// How long it runs.
    pub delay: Duration,
    /// The lowest image, and the others unless the daemon makes them.
    pub create: CreateOptions,
    /// How snapshots are taken.
    pub snapshots: Snapshots,
    /// Option `discard`.
    pub discard: &'static str,
    /// Option `cache.direct`.
    pub direct: bool,
    /// Requests that the guest keeps under way.
    pub depth: usize,
    /// Requests on each image before the next snapshot.
    pub per_layer: u64,
    /// Speed limit of the job, in bytes per second; 0 is none.
    pub speed: u64,
    /// A mirror writes to its target before a write is acknowledged: from the start, or from when it is ready.
    pub write_blocking: [bool; 2],
    /// A mirror that is ready is cancelled, and leaves a copy.
    pub cancel: bool,
}

impl Plan {
    /// The plan of a seed.
    pub fn new(operation: Operation, seed: u64) -> Self {
        let mut random = Rng::new(seed ^ (operation as u64) << 56);
        let (moment, longest) = moment(operation, &mut random);
        // Early moments are the more interesting ones: most operations are short.
        let part = random.below(1000) * random.below(1000);
        let delay = Duration::from_nanos(longest * part / 1000);
        Self {
            seed,
            operation,
            variant: random.index(6),
            moment,
            delay,
            create: create(operation, &mut random),
            snapshots: snapshots(operation, &mut random),
            discard: random.pick(&["unmap", "unmap", "ignore"]),
            direct: random.one_in(4),
            depth: random.pick(&[1, 4, 16]),
            per_layer: 100 + random.below(300),
            speed: speed(operation, &mut random),
            write_blocking: [random.one_in(2), random.one_in(3)],
            cancel: random.one_in(5),
        }
    }
}

/// The moment, and the longest delay after it in microseconds.
fn moment(operation: Operation, random: &mut Rng) -> (Moment, u64) {
    let ends = [Moment::Status("waiting"), Moment::Status("pending"), Moment::Status("concluded")];
    let at = match operation {
        Operation::Write | Operation::Snapshot | Operation::Internal | Operation::Resize => {
            return (Moment::Issued, 120_000);
        }
        Operation::Stream | Operation::Commit | Operation::Backup | Operation::Incremental => {
            [Moment::Issued, Moment::Issued, random.pick(&ends)]
        }
        Operation::Active => [Moment::Issued, Moment::Completing, random.pick(&ends)],
        Operation::Mirror => {
            let late = [random.pick(&ends), Moment::Completing];
            [Moment::Issued, random.pick(&[Moment::Completing, Moment::Status("ready")]), random.pick(&late)]
        }
    };
    match random.pick(&at) {
        Moment::Issued => (Moment::Issued, 80_000),
        Moment::Completing => (Moment::Completing, 10_000),
        ready @ Moment::Status("ready") => (ready, 15_000),
        end @ Moment::Status(_) => (end, 4_000),
    }
}

fn speed(operation: Operation, random: &mut Rng) -> u64 {
    match random.below(6) {
        // An active commit or a mirror would never catch up with the guest.
        0 if !matches!(operation, Operation::Active | Operation::Mirror) => 50 << 20,
        1 => 400 << 20,
        _ => 0,
    }
}

fn snapshots(operation: Operation, random: &mut Rng) -> Snapshots {
    match operation {
        // Nodes of the other kind go when the guest leaves, and it has to, to have its disk resized.
        Operation::Resize => Snapshots::Added,
        _ => random.pick(&[Snapshots::Sync, Snapshots::Existing, Snapshots::Added]),
    }
}

fn create(operation: Operation, random: &mut Rng) -> CreateOptions {
    let mut options = CreateOptions::new(DISK);
    options.cluster_size = random.pick(&[65536, 65536, 65536, 4096, 512, 1 << 20]);
    if random.one_in(8) {
        options.version = Version::V2;
    } else {
        options.refcount_bits = random.pick(&[16, 16, 16, 1, 8, 64]);
        options.extended_l2 = options.cluster_size >= 65536 && random.one_in(4);
    }
    if operation == Operation::Internal {
        // With a snapshot clusters have two users.
        options.refcount_bits = options.refcount_bits.max(8);
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_plan_and_every_plan_can_be_made() {
        for operation in Operation::value_variants() {
            let plans: Vec<Plan> = (0..200).map(|seed| Plan::new(*operation, seed)).collect();
            assert_eq!(format!("{:?}", plans[7]), format!("{:?}", Plan::new(*operation, 7)));
            assert!(plans.iter().all(|plan| plan.create.check().is_ok()));
            assert!(plans.iter().all(|plan| plan.delay < Duration::from_millis(200)));
            assert!(plans.iter().any(|plan| plan.delay != plans[0].delay));
        }
    }
}

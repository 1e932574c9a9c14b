//! Where jobs copy a guest's disk to, what their clients do, and whether the copy is one.

use std::sync::{Arc, Mutex};

use underlay_graph::{ByteRange, NewNode, Perms, View, WriteFlags};
use underlay_jobs::{EventSink, Job, JobEvent, OnError};
use underlay_qcow2::{OpenOptions, create};
use underlay_sim::{Disk, Model, Rng, SECTOR};
use underlay_sys::Iov;

use crate::lab::{Setup, add_user, called, create_options, new_node, open_image, open_options, writable};

/// What shows in the target where nothing was copied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ground {
    Nothing,
    /// Bytes that the guest must never see.
    Rubbish,
    /// The guest's disk as it is when the job starts.
    Copy,
    /// The layer with this index, from the beginning on.
    Layer(usize),
    /// The same, from the switch on.
    LayerLater(usize),
}

impl Ground {
    pub fn backing(self) -> Option<usize> {
        match self {
            Self::Layer(at) | Self::LayerLater(at) => Some(at),
            _ => None,
        }
    }
}

/// The image that a disk is copied to.
#[derive(Debug)]
pub struct TargetImage {
    pub ground: Ground,
    pub raw: bool,
    /// Bytes.
    pub cluster: u64,
}

impl TargetImage {
    pub fn new(rng: &mut Rng, setup: &Setup, ground: Ground) -> Self {
        let raw = ground.backing().is_none() && rng.one_in(3);
        Self { ground, raw, cluster: rng.pick(&[512, 4096, 16384, 65536, setup.cluster]) }
    }

    /// Makes the file, with what is in it at first.
    pub async fn make(&self, setup: &Setup, rng: &mut Rng) -> Arc<Disk> {
        let size = setup.sectors * SECTOR;
        let content = if self.raw { vec![0; usize::try_from(size).unwrap()] } else { Vec::new() };
        let disk = Disk::new(content, rng.number(), setup.power.clone());
        let file = View::detached(disk.clone(), []);
        if !self.raw {
            let mut options = create_options(rng, self.cluster, size);
            options.backing = self.ground.backing().map(|at| called(&setup.layers[at]));
            create(&file.cx(), &options).await.unwrap();
        }
        let format = open_image(&file, self.raw, OpenOptions::default()).await;
        let view = writable(format.clone(), file.clone(), None).await;
        for start in (0..size).step_by(1 << 12) {
            let range = ByteRange::between(start, size.min(start + (1 << 12)));
            let into = match self.ground {
                Ground::Rubbish if rng.one_in(2) => Iov::filled(range.buffer_len(), 0xbb),
                Ground::Copy => {
                    let into = Iov::scratch(range.buffer_len());
                    setup.guest.read(range, into.clone()).await.unwrap();
                    into
                }
                _ => continue,
            };
            view.cx().write(range, into, WriteFlags::default()).await.unwrap();
        }
        format.close(&view.cx()).await.unwrap();
        disk
    }

    /// The node, not in the graph yet.
    pub async fn open(&self, setup: &Setup, disk: &Arc<Disk>, rng: &mut Rng) -> NewNode {
        let file = View::detached(disk.clone(), []);
        let format = open_image(&file, self.raw, open_options(rng)).await;
        let below = match self.ground {
            Ground::Layer(at) => Some(setup.layers[at].node),
            _ => None,
        };
        new_node("T", disk, format, below, false)
    }
}

/// The events that matter.
#[derive(Default)]
pub struct Record(pub Mutex<Vec<JobEvent>>);

impl EventSink for Record {
    fn emit(&self, event: JobEvent) {
        self.0.lock().unwrap().push(event);
    }
}

impl Record {
    /// Whether the job has ended well.
    pub fn is_well(&self) -> bool {
        let well = |event: &JobEvent| matches!(event, JobEvent::Completed { error: None, .. });
        self.0.lock().unwrap().iter().any(well)
    }
}

/// What a client says a job shall do with errors.
pub fn policy(rng: &mut Rng) -> OnError {
    rng.pick(&[OnError::Report, OnError::Ignore, OnError::Enospc, OnError::Stop])
}

/// What clients do while they wait, most of it refused as the job is not in the state for it.
pub async fn meddle(job: &Job, rng: &mut Rng) {
    match rng.below(8) {
        0 => drop(job.pause()),
        1 | 2 => drop(job.resume()),
        3 => drop(job.set_speed(rng.pick(&[0, 1 << 20, 64 << 20]))),
        4 => drop(job.finalize().await),
        _ => {}
    }
}

/// The last layer is a copy of what the disk was like at one moment that `model` remembers, also after a power cut.
pub async fn check_copy(setup: &Setup, model: &Model, seed: u64) {
    let target = setup.layers.last().unwrap();
    if setup.graph.plan().get(target.node).is_some() {
        let root = add_user(&setup.graph, target.node, Perms::CONSISTENT_READ).await;
        let into = Iov::scratch(usize::try_from(setup.sectors * SECTOR).unwrap());
        match root.read(ByteRange::between(0, setup.sectors * SECTOR), into.clone()).await {
            Ok(()) => model.check_copy(&into.to_vec()).unwrap(),
            Err(error) => assert!(setup.power.is_cut(), "{error}"),
        }
    }
    for round in 0..3 {
        let left = setup.reopen(seed.wrapping_mul(5) + round, target).await;
        model.check_copy(&left).map_err(|wrong| format!("after a cut, {wrong}")).unwrap();
    }
}

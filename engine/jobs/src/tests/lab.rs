//! A chain of images, guests that use it, and a record of what jobs tell.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use underlay_graph::plan::{NewRoot, NodeOptions};
use underlay_graph::{
    ByteRange, Graph, NewNode, NodeId, NodeName, Perms, Plan, Role, Root, View, Wiring, WriteFlags, ZeroFlags,
};
use underlay_sys::{Iov, rt};

use super::disk::{CLUSTER, Cluster, Image};
use super::world::Lot;
use crate::{EventSink, Job, JobEvent, Jobs};

/// Events, written down.
#[derive(Default)]
pub struct Record(Mutex<Vec<String>>);

impl EventSink for Record {
    fn emit(&self, event: JobEvent) {
        let line = match event {
            JobEvent::StatusChange { status, .. } => status.to_string(),
            JobEvent::Ready { .. } => "READY".into(),
            JobEvent::Pending { .. } => "PENDING".into(),
            JobEvent::Completed { error: None, .. } => "COMPLETED".into(),
            JobEvent::Completed { error: Some(error), .. } => format!("COMPLETED({error})"),
            JobEvent::Cancelled { .. } => "CANCELLED".into(),
            JobEvent::Error { is_read, action, .. } => {
                format!("ERROR({},{})", if is_read { "read" } else { "write" }, action.as_str())
            }
        };
        self.0.lock().unwrap().push(line);
    }
}

impl Record {
    pub fn take(&self) -> String {
        std::mem::take(&mut *self.0.lock().unwrap()).join(" ")
    }
}

pub struct Lab {
    pub graph: Arc<Graph>,
    pub jobs: Arc<Jobs>,
    pub record: Arc<Record>,
    /// A, B, C, D: each the backing file of the next.
    pub images: Vec<Arc<Image>>,
    pub nodes: Vec<NodeId>,
    pub guest: Root,
}

pub fn names() -> crate::BackingNames {
    Arc::new(|_: &View, base: &View| format!("{}.img", base.name()))
}

/// Of the disks of tests with [`Guests`].
pub const SIZE: u64 = 3 << 20;

const NAMES: [&str; 4] = ["A", "B", "C", "D"];

impl Lab {
    /// `sizes` of A, B, …; each image has data in about one of three clusters.
    pub async fn new(seed: u64, sizes: &[u64]) -> Self {
        let graph = Graph::new();
        let record = Arc::new(Record::default());
        let mut lot = Lot::new(seed);
        let (mut images, mut nodes): (Vec<Arc<Image>>, Vec<NodeId>) = (Vec::new(), Vec::new());
        for (at, &size) in sizes.iter().enumerate() {
            let below = at.checked_sub(1).map(|at| format!("{}.img", NAMES[at]));
            let image = Arc::new(Image::new(size, below.as_deref(), lot.below(u64::MAX)));
            {
                let mut state = image.state();
                for cluster in &mut state.clusters {
                    *cluster = match lot.below(6) {
                        0 | 1 => Cluster::Data(vec![lot.below(255) as u8 + 1; CLUSTER as usize]),
                        2 if at > 0 => Cluster::Zero,
                        _ => Cluster::Below,
                    };
                }
                state.durable = state.clusters.clone();
            }
            let new = NewNode {
                name: NodeName::new(NAMES[at]),
                node: image.clone(),
                read_only: at + 1 < sizes.len(),
                options: NodeOptions { discard: true, ..NodeOptions::default() },
                children: nodes.last().map(|id| (Role::Backing, Wiring::Existing(*id))).into_iter().collect(),
            };
            let id = graph
                .change(|plan| {
                    let id = plan.add(new)?;
                    plan.node_mut(id).monitor_owned = true;
                    Ok(id)
                })
                .await
                .unwrap();
            images.push(image);
            nodes.push(id);
        }
        let top = *nodes.last().unwrap();
        let root = NewRoot {
            user: "guest".into(),
            role: "root",
            node: top,
            required: Perms::CONSISTENT_READ | Perms::WRITE,
            shared: Perms::ALL.without(Perms::RESIZE),
            pinned: false,
            drained: None,
        };
        let guest = graph.change(|plan| Ok(plan.add_root(root))).await.unwrap();
        let guest = graph.root(guest).unwrap();
        Self { jobs: Jobs::new(record.clone()), graph, record, images, nodes, guest }
    }

    /// Names of the images that the guest's disk consists of, from the top.
    pub fn chain(&self) -> String {
        let plan = self.graph.plan();
        let top = plan.root(self.guest.id()).unwrap().node;
        plan.chain(top).map(|id| plan.node(id).name.to_string()).collect()
    }

    /// The same by what the headers would say after a power cut.
    pub fn chain_on_disk(&self) -> Vec<Arc<Image>> {
        let mut at = self.chain().chars().next().unwrap();
        let mut chain = Vec::new();
        loop {
            let image = self.images[NAMES.iter().position(|n| n.starts_with(at)).unwrap()].clone();
            let next = image.state().durable_backing.clone();
            chain.push(image);
            let Some(next) = next else { return chain };
            at = next.file.chars().next().unwrap();
        }
    }

    /// No job has left a mark.
    pub fn assert_tidy(&self) {
        let plan = self.graph.plan();
        for (_, node) in plan.nodes() {
            assert!(node.busy.is_none() && !node.frozen && node.trackers.is_empty(), "{}", node.name);
            assert_eq!(node.node.driver(), "image");
        }
        assert_eq!(plan.roots().count(), 1);
    }

    /// What the guest's disk would hold after a power cut now.
    pub fn after_power_cut(&self, len: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let chain = self.chain_on_disk();
        for at in 0..(len / CLUSTER) as usize {
            let mut found = vec![0; CLUSTER as usize];
            for image in &chain {
                match image.state().durable.get(at) {
                    Some(Cluster::Below) => continue,
                    Some(Cluster::Data(data)) => found.clone_from(data),
                    Some(Cluster::Zero) | None => {}
                }
                break;
            }
            bytes.extend(found);
        }
        bytes
    }
}

/// What a guest knows of its part of the disk.
pub struct Model {
    pub part: ByteRange,
    pub bytes: Vec<u8>,
    /// What was not written since the last flush.
    pub settled: Vec<bool>,
    /// Writes may fail, and then nothing has happened.
    pub may_fail: bool,
}

pub async fn learn(root: &Root, part: ByteRange) -> Model {
    let into = Iov::scratch(part.buffer_len());
    root.read(part, into.clone()).await.unwrap();
    Model { part, bytes: into.to_vec(), settled: vec![true; part.buffer_len() / 4096], may_fail: false }
}

/// Writes and checks at random until told to stop.
pub async fn guest(root: Root, mut model: Model, mut lot: Lot, stop: Arc<AtomicBool>) -> Model {
    let blocks = model.part.len() / 4096;
    while !stop.load(Ordering::SeqCst) {
        let first = lot.below(blocks);
        let count = (1 + lot.below(16)).min(blocks - first);
        let start = model.part.start() + first * 4096;
        let range = ByteRange::between(start, start + count * 4096);
        let at = usize::try_from(first * 4096).unwrap();
        let here = at..at + range.buffer_len();
        let touched = usize::try_from(first).unwrap()..usize::try_from(first + count).unwrap();
        match lot.below(8) {
            0..3 => {
                let byte = lot.below(256) as u8;
                model.settled[touched].fill(false);
                let from = Iov::filled(range.buffer_len(), byte);
                match root.write(range, from, WriteFlags::default()).await {
                    Err(_) if model.may_fail => {}
                    result => {
                        result.unwrap();
                        model.bytes[here].fill(byte);
                    }
                }
            }
            3 => {
                model.settled[touched].fill(false);
                let flags = ZeroFlags { may_unmap: true, no_fallback: false };
                match root.write_zeroes(range, flags).await {
                    Err(_) if model.may_fail => {}
                    result => {
                        result.unwrap();
                        model.bytes[here].fill(0);
                    }
                }
            }
            4 => {
                root.flush().await.unwrap();
                model.settled.fill(true);
            }
            _ => {
                let into = Iov::scratch(range.buffer_len());
                root.read(range, into.clone()).await.unwrap();
                assert!(into.to_vec() == model.bytes[here], "the guest reads something else at {range}");
            }
        }
        for _ in 0..lot.below(6) {
            rt::yield_now().await;
        }
    }
    model
}

/// Somebody who reads a node.
pub async fn add_root(lab: &Lab, node: NodeId) -> Root {
    let (user, role, shared) = ("reader".into(), "root", Perms::ALL);
    let required = Perms::CONSISTENT_READ;
    let new = NewRoot { user, role, node, required, shared, pinned: false, drained: None };
    let id = lab.graph.change(|plan| Ok(plan.add_root(new))).await.unwrap();
    lab.graph.root(id).unwrap()
}

/// He goes.
pub async fn remove_root(lab: &Lab, root: &Root) {
    let gone = lab.graph.change(|plan| {
        plan.remove_root(root.id());
        Ok(())
    });
    gone.await.unwrap();
}

/// What somebody reads who uses the target alone.
pub async fn content(lab: &Lab, node: NodeId) -> Vec<u8> {
    let root = add_root(lab, node).await;
    let bytes = learn(&root, ByteRange::between(0, SIZE)).await.bytes;
    remove_root(lab, &root).await;
    bytes
}

/// Two guests with half of the disk each.
pub struct Guests {
    stop: Arc<AtomicBool>,
    running: Vec<rt::JoinHandle<Model>>,
    pub models: Vec<Model>,
}

impl Guests {
    /// `may_fail`: their writes may, and then nothing has happened.
    pub async fn start(lab: &Lab, seed: u64, may_fail: bool) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut running = Vec::new();
        for half in 0..2 {
            let part = ByteRange::between(half * SIZE / 2, (half + 1) * SIZE / 2);
            let model = Model { may_fail, ..learn(&lab.guest, part).await };
            let lot = Lot::new(seed ^ (half + 1) << 32);
            running.push(rt::spawn(guest(lab.guest.clone(), model, lot, stop.clone())));
        }
        Self { stop, running, models: Vec::new() }
    }

    pub async fn rest(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for guest in self.running.drain(..) {
            self.models.push(guest.await);
        }
    }
}

pub async fn meddle(lab: &Lab, job: &Job, lot: &mut Lot) {
    match lot.below(8) {
        0 => drop(job.pause()),
        1 => drop(job.set_speed([0, 4 << 20][lot.below(2) as usize])),
        2 => {
            let id = lab.nodes[lot.below(4) as usize];
            let touch = |plan: &mut Plan| {
                plan.touch(id);
                Ok(())
            };
            lab.graph.change(touch).await.unwrap();
        }
        _ => {}
    }
}

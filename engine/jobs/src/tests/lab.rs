//! A chain of images, guests that use it, and a record of what jobs tell.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use underlay_graph::plan::{NewRoot, NodeOptions};
use underlay_graph::{
    ByteRange, Graph, NewNode, NodeId, NodeName, Perms, Role, Root, View, Wiring, WriteFlags, ZeroFlags,
};
use underlay_sys::{Iov, rt};

use super::disk::{CLUSTER, Cluster, Image};
use super::world::Lot;
use crate::{EventSink, JobEvent, Jobs};

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
}

pub async fn learn(root: &Root, part: ByteRange) -> Model {
    let into = Iov::scratch(part.buffer_len());
    root.read(part, into.clone()).await.unwrap();
    Model { part, bytes: into.to_vec(), settled: vec![true; part.buffer_len() / 4096] }
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
                root.write(range, Iov::filled(range.buffer_len(), byte), WriteFlags::default())
                    .await
                    .unwrap();
                model.bytes[here].fill(byte);
            }
            3 => {
                model.settled[touched].fill(false);
                root.write_zeroes(range, ZeroFlags { may_unmap: true, no_fallback: false }).await.unwrap();
                model.bytes[here].fill(0);
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

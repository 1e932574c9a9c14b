//! A chain of qcow2 images on simulated disks, below a guest: how it is made, broken, mended, and opened again after a
//! power cut.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use underlay_drivers::beside::Beside;
use underlay_drivers::format::raw::{Raw, RawOptions};
use underlay_graph::graph::LastStep;
use underlay_graph::perm::Access;
use underlay_graph::plan::{NewRoot, NodeOptions, Wires};
use underlay_graph::{
    BackingRef, ByteRange, Graph, GraphError, IoError, Kind, NewNode, Node, NodeId, NodeName, Perms, Plan,
    Preallocation, Role, Root, View, Wiring, WriteFlags,
};
use underlay_qcow2::{CreateOptions, Fix, OpenOptions, Qcow2, check, create};
use underlay_sim::model::stamp;
use underlay_sim::{Disk, Fault, Model, Power, Rng, SECTOR};
use underlay_sys::{Iov, rt};

use crate::guests::Guests;
use crate::home::SimHome;

/// The layers of a chain, from below.
const NAMES: [&str; 4] = ["A", "B", "C", "D"];

/// Bytes of a chain that is large enough for most.
pub const SMALL: u64 = 48 << 10;

/// An image, and the disk below it.
#[derive(Clone)]
pub struct Layer {
    pub name: &'static str,
    pub disk: Arc<Disk>,
    pub node: NodeId,
    /// Not qcow2.
    pub raw: bool,
    /// Where a raw one has its bitmaps.
    pub home: Option<Arc<SimHome>>,
}

/// A chain, and the guest above it.
pub struct Setup {
    pub graph: Arc<Graph>,
    /// From below; others may come behind them.
    pub layers: Vec<Layer>,
    pub guest: Root,
    pub power: Arc<Power>,
    pub sectors: u64,
    pub cluster: u64,
    /// What the layers were filled with.
    pub model: Model,
    pub numbers: u64,
}

pub fn create_options(rng: &mut Rng, cluster: u64, size: u64) -> CreateOptions {
    let extended_l2 = cluster >= 16384 && rng.one_in(2);
    CreateOptions {
        cluster_size: cluster,
        refcount_bits: rng.pick(&[1, 2, 4, 8, 16, 16, 32, 64]),
        extended_l2,
        lazy_refcounts: rng.one_in(4),
        ..CreateOptions::new(size)
    }
}

pub fn open_options(rng: &mut Rng) -> OpenOptions {
    if rng.one_in(2) {
        return OpenOptions::default();
    }
    OpenOptions {
        l2_cache_size: Some(1024),
        refcount_cache_size: Some(512),
        l2_cache_entry_size: Some(512),
        ..OpenOptions::default()
    }
}

/// An image in no graph, by itself or on the layers below, for somebody who writes to it.
pub async fn writable(image: Arc<dyn Node>, file: Arc<View>, below: Option<Arc<View>>) -> Arc<View> {
    let backing = below.map(|view| (Role::Backing, view));
    let view = View::detached(image.clone(), [(Role::File, file)].into_iter().chain(backing));
    let access = Access { writable: true, required: Perms::ALL, shared: Perms::ALL, used: true };
    image.set_access(&view.cx(), access).await.unwrap();
    view
}

/// An image that lies in `file`.
pub async fn open_image(file: &Arc<View>, raw: bool, options: OpenOptions) -> Arc<dyn Node> {
    if raw {
        return Arc::new(Raw::open(&file.cx(), RawOptions::default()).unwrap());
    }
    Arc::new(Qcow2::open(&file.cx(), options).await.unwrap())
}

/// A raw image with the bitmaps that are beside it.
pub async fn open_raw(file: &Arc<View>, home: &Arc<SimHome>) -> Arc<dyn Node> {
    let raw = Raw::open(&file.cx(), RawOptions::default()).unwrap();
    let beside = Beside::open(home.clone(), file.cx().length()).await;
    Arc::new(raw.with_bitmaps_in(beside))
}

/// Writes something into a new layer, so that jobs have work, and leaves it flushed.
async fn fill(rng: &mut Rng, view: &View, model: &mut Model, numbers: &mut u64) {
    let sectors = view.cx().length() / SECTOR;
    model.resize(sectors);
    for _ in 0..rng.below(4) {
        let first = rng.below(sectors);
        let count = (1 + rng.below(sectors / 3)).min(sectors - first);
        let writing = model.begin_write(first, count, *numbers, *numbers);
        let range = ByteRange::between(first * SECTOR, (first + count) * SECTOR);
        let bytes = Iov::copy_of(&stamp(first, count, *numbers));
        view.cx().write(range, bytes, WriteFlags::default()).await.unwrap();
        model.end_write(writing, true);
        *numbers += 1;
    }
    let flush = model.begin_flush();
    view.node().close(&view.cx()).await.unwrap();
    model.end_flush(&flush);
}

/// An image as a node for a graph, on its disk.
pub fn new_node(
    name: &str,
    disk: &Arc<Disk>,
    image: Arc<dyn Node>,
    below: Option<NodeId>,
    read_only: bool,
) -> NewNode {
    let options = NodeOptions { discard: true, ..NodeOptions::default() };
    let node: Arc<dyn Node> = disk.clone();
    let storage = NewNode { name: None, node, read_only, options, children: Vec::new() };
    let mut children = vec![(Role::File, Wiring::New(Box::new(storage)))];
    children.extend(below.map(|id| (Role::Backing, Wiring::Existing(id))));
    NewNode { name: NodeName::new(name), node: image, read_only, options, children }
}

/// Adds a node that stays until somebody removes it.
pub async fn add_node(graph: &Graph, new: NewNode) -> NodeId {
    let add = graph.change(|plan| {
        let id = plan.add(new)?;
        plan.node_mut(id).monitor_owned = true;
        Ok(id)
    });
    add.await.unwrap()
}

/// Somebody who uses a node.
pub async fn add_user(graph: &Graph, node: NodeId, required: Perms) -> Root {
    let shared = Perms::ALL.without(Perms::RESIZE);
    let (user, role) = ("guest".into(), "root");
    let root = NewRoot { user, role, node, required, shared, pinned: false, drained: None };
    let id = graph.change(|plan| Ok(plan.add_root(root))).await.unwrap();
    graph.root(id).unwrap()
}

/// A node gets another length.
struct Resize(NodeId, u64);

#[async_trait]
impl LastStep for Resize {
    async fn run(self: Box<Self>, _old: &Wires, new: &Wires) -> Result<(), GraphError> {
        let view = new.view(self.0);
        Ok(view.node().resize(&view.cx(), self.1, Preallocation::Off).await?)
    }
}

/// Makes a node `size` bytes long, whatever its users say.
pub async fn resize(graph: &Graph, node: NodeId, size: u64) -> Result<(), GraphError> {
    let step: Box<dyn LastStep> = Box::new(Resize(node, size));
    let edit = |plan: &mut Plan| {
        plan.touch(node);
        Ok(((), Some(step)))
    };
    graph.change_with(edit).await
}

/// A chain of `length` images, with something in each, and a guest on top. The lowest may be raw, and each may be
/// longer or shorter than the one below it. They have `least` bytes, more with large clusters, or about half of that.
pub async fn build(rng: &mut Rng, length: usize, least: u64) -> Setup {
    let cluster = rng.pick(&[512, 1024, 4096, 16384, 65536]);
    let usual = (cluster * 24).max(least);
    let (is_even, has_raw) = (rng.one_in(2), rng.one_in(if length == 1 { 2 } else { 4 }));
    let power = Power::until(u64::MAX);
    let graph = Graph::new();
    let mut model = Model::new(0);
    let mut below: Option<Arc<View>> = None;
    let mut numbers = 1;
    let mut layers: Vec<Layer> = Vec::new();
    let mut size = usual;
    for (at, name) in NAMES.into_iter().enumerate().take(length) {
        if !is_even {
            size = usual / 2 + rng.below(usual / SECTOR) * SECTOR;
        }
        let raw = has_raw && at == 0;
        let content = if raw { vec![0; usize::try_from(size).unwrap()] } else { Vec::new() };
        let disk = Disk::new(content, rng.number(), power.clone());
        let file = View::detached(disk.clone(), []);
        if !raw {
            let backing = layers.last().map(called);
            create(&file.cx(), &CreateOptions { backing, ..create_options(rng, cluster, size) })
                .await
                .unwrap();
        }
        let image = open_image(&file, raw, OpenOptions::default()).await;
        let view = writable(image, file.clone(), below).await;
        fill(rng, &view, &mut model, &mut numbers).await;
        below = Some(view);
        let home = raw.then(|| SimHome::new(&disk, &power, rng.number()));
        let image = match &home {
            Some(home) => open_raw(&file, home).await,
            None => open_image(&file, raw, open_options(rng)).await,
        };
        let new = new_node(name, &disk, image, layers.last().map(|layer| layer.node), at + 1 < length);
        let node = add_node(&graph, new).await;
        layers.push(Layer { name, disk, node, raw, home });
    }
    let top = layers.last().unwrap().node;
    let guest = add_user(&graph, top, Perms::CONSISTENT_READ | Perms::WRITE).await;
    Setup { graph, layers, guest, power, sectors: size / SECTOR, cluster, model, numbers }
}

/// How a header names a layer.
pub fn called(layer: &Layer) -> BackingRef {
    let format = if layer.raw { "raw" } else { "qcow2" };
    BackingRef { file: layer.name.into(), format: Some(format.into()) }
}

/// What a power cut left of an image: opened, repaired if it says that it needs it, and checked.
pub async fn open_left(layer: &Layer, seed: u64) -> (Arc<dyn Node>, Arc<View>, Option<String>) {
    let left = layer.disk.after_power_cut(seed);
    let file = View::detached(Disk::new(left, seed, Power::until(u64::MAX)), []);
    let image = open_image(&file, layer.raw, OpenOptions::default()).await;
    writable(image.clone(), file.clone(), None).await;
    if layer.raw {
        return (image, file, None);
    }
    let mut findings = Vec::new();
    let outcome = check(&file.cx(), Fix::None, &mut |finding| findings.push(finding)).await.unwrap();
    let errors = outcome.corruptions + outcome.check_errors;
    assert_eq!(errors, 0, "image {}: {findings:?}", layer.name);
    let below = image.backing_ref().map(|below| below.file.trim_start_matches("./").to_owned());
    (image, file, below)
}

/// What the first `sectors` of the layer `top` show after a power cut, with the layers that the headers name.
pub async fn reopen(layers: &[Layer], top: &str, sectors: u64, seed: u64) -> Vec<u8> {
    let mut at = Some(top.to_owned());
    let mut opened = Vec::new();
    while let Some(name) = at {
        let index = layers.iter().position(|layer| layer.name == name).unwrap();
        let (image, file, below) = open_left(&layers[index], seed ^ index as u64).await;
        assert!(opened.len() < layers.len(), "a loop");
        opened.push((image, file));
        at = below;
    }
    let mut below: Option<Arc<View>> = None;
    for (image, file) in opened.into_iter().rev() {
        let backing = below.map(|view| (Role::Backing, view));
        below = Some(View::detached(image, [(Role::File, file)].into_iter().chain(backing)));
    }
    let into = Iov::scratch(usize::try_from(sectors * SECTOR).unwrap());
    below.unwrap().cx().read(ByteRange::between(0, sectors * SECTOR), into.clone()).await.unwrap();
    into.to_vec()
}

impl Setup {
    /// What a layer shows after a power cut, with the layers that the headers name.
    pub async fn reopen(&self, seed: u64, top: &Layer) -> Vec<u8> {
        reopen(&self.layers, top.name, self.sectors, seed).await
    }

    /// The image that the guest's disk has on top.
    pub fn top(&self) -> &Layer {
        let plan = self.graph.plan();
        let chain = plan.chain(plan.root(self.guest.id()).unwrap().node);
        let top = chain.into_iter().find_map(|id| self.layers.iter().find(|layer| layer.node == id));
        top.unwrap()
    }

    /// Unless the power is gone already, the disks are well and all is as it should be.
    pub async fn live_on(&self, guests: &Guests, rng: &mut Rng) {
        if !self.power.is_cut() {
            let healthy = guests.on_sound_disks();
            healthy.verify().await;
            healthy.start(rng, 2, 10).done().await;
            healthy.verify().await;
        }
    }

    /// After a power cut every write is there that was flushed, and nothing that was never written.
    pub async fn cut_and_compare(&self, guests: &Guests, seed: u64) {
        self.power.cut();
        for round in 0..3 {
            let bytes = self.reopen(seed.wrapping_mul(3) + round, self.top()).await;
            guests.model().check_after_cut(&bytes).unwrap();
        }
    }

    /// The graph has no filters, nor anybody who wants to know what is written.
    pub fn check_no_job_is_left(&self) {
        for (_, node) in self.graph.plan().nodes() {
            assert!(node.node.kind() != Kind::Filter, "{} is left", node.name);
            assert!(node.trackers.is_empty(), "writes to {} are tracked", node.name);
        }
    }

    /// Makes the disk below an image, or one beside it, fail or fill up.
    pub fn break_disk(&self, disk: &Disk, rng: &mut Rng) {
        let kind = rng.below(5);
        let mut fault = |error| Some(Fault { after: rng.below(40), error, sticky: rng.one_in(2) });
        match kind {
            0 => disk.fail_writes(fault(IoError::ENOSPC)),
            1 => disk.fail_writes(fault(IoError::EIO)),
            2 => disk.fail_reads(fault(IoError::EIO)),
            3 => disk.fail_flushes(fault(IoError::EIO)),
            _ => disk.limit(disk.content().len() as u64 + rng.below(20) * self.cluster),
        }
    }

    /// All disks are well again, and large; done after `trouble`.
    pub fn mend_after(&self, trouble: Duration) -> rt::JoinHandle<()> {
        let disks: Vec<_> = self.layers.iter().map(|layer| layer.disk.clone()).collect();
        rt::spawn(async move {
            rt::sleep(trouble).await;
            disks.iter().for_each(|disk| mend(disk));
        })
    }

    /// The power goes after `delay`, unless all is over before.
    pub fn cut_after(&self, delay: Duration, guests: &Guests) {
        let (power, guests) = (self.power.clone(), guests.clone());
        drop(rt::spawn(async move {
            rt::sleep(delay).await;
            if !guests.are_over() {
                power.cut();
            }
        }));
    }
}

/// A disk is well again, and large.
pub fn mend(disk: &Disk) {
    disk.fail_writes(None);
    disk.fail_reads(None);
    disk.fail_flushes(None);
    disk.limit(1 << 27);
}

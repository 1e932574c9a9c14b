//! Deep chains in which every layer may be written to while others read: what is remembered of a chain must never
//! show a reader what was there before a write that was acknowledged.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use underlay_graph::perm::Access;
use underlay_graph::plan::{NewRoot, NodeOptions};
use underlay_graph::{
    ByteRange, Graph, NewNode, Node, NodeId, Perms, Role, Root, View, Wiring, WriteFlags, ZeroFlags,
};
use underlay_qcow2::{CreateOptions, OpenOptions, Qcow2, create};
use underlay_sim::model::stamp;
use underlay_sim::{Disk, Power, Rng, SECTOR, run_seeds};
use underlay_sys::{Iov, rt};

/// Sectors of each layer, and of a cluster.
const SECTORS: u64 = 1024;
const CLUSTER: u64 = 8;

/// One layer: its user, and what it has of its own; 0 for zeroes.
struct Layer {
    root: Root,
    own: Vec<Option<u64>>,
}

async fn add_layer(graph: &Graph, rng: &mut Rng, power: &Arc<Power>, below: Option<NodeId>) -> NodeId {
    let disk = Disk::new(Vec::new(), rng.number(), power.clone());
    let file = View::detached(disk.clone(), []);
    let options = CreateOptions { cluster_size: CLUSTER * SECTOR, ..CreateOptions::new(SECTORS * SECTOR) };
    create(&file.cx(), &options).await.unwrap();
    let image = Arc::new(Qcow2::open(&file.cx(), OpenOptions::default()).await.unwrap());
    let options = NodeOptions { discard: true, ..NodeOptions::default() };
    let storage = NewNode { name: None, node: disk, read_only: false, options, children: Vec::new() };
    let mut children = vec![(Role::File, Wiring::New(Box::new(storage)))];
    children.extend(below.map(|id| (Role::Backing, Wiring::Existing(id))));
    let access = Access { writable: true, required: Perms::ALL, shared: Perms::ALL, used: true };
    let view = View::detached(image.clone(), [(Role::File, file)]);
    image.set_access(&view.cx(), access).await.unwrap();
    let new = NewNode { name: None, node: image, read_only: false, options, children };
    let add = graph.change(|plan| {
        let id = plan.add(new)?;
        plan.node_mut(id).monitor_owned = true;
        Ok(id)
    });
    add.await.unwrap()
}

/// Everybody shares everything: who writes to a backing file has agreed that its readers see it.
async fn user(graph: &Graph, node: NodeId) -> Root {
    let required = Perms::CONSISTENT_READ | Perms::WRITE;
    let (user, role, shared) = ("guest".into(), "root", Perms::ALL);
    let new = NewRoot { user, role, node, required, shared, pinned: false, drained: None };
    let id = graph.change(|plan| Ok(plan.add_root(new))).await.unwrap();
    graph.root(id).unwrap()
}

/// Keeps asking, so that what is known of the chain is learned in the middle of writes too.
fn reader(root: Root, seed: u64, over: Arc<AtomicBool>) -> rt::JoinHandle<()> {
    rt::spawn(async move {
        let mut rng = Rng::new(seed);
        while !over.load(Ordering::SeqCst) {
            let first = rng.below(SECTORS - CLUSTER) * SECTOR;
            let into = Iov::scratch(usize::try_from(CLUSTER * SECTOR).unwrap());
            root.read(ByteRange::between(first, first + CLUSTER * SECTOR), into).await.unwrap();
            rt::sleep(Duration::from_micros(rng.below(200))).await;
        }
    })
}

async fn write(rng: &mut Rng, layers: &mut [Layer], number: u64) {
    let depth = layers.len();
    let layer = &mut layers[rng.index(depth)];
    let first = rng.below(SECTORS / CLUSTER - 2) * CLUSTER;
    let count = CLUSTER * (1 + rng.below(2));
    let range = ByteRange::between(first * SECTOR, (first + count) * SECTOR);
    let value = if rng.one_in(4) { 0 } else { number };
    if value == 0 {
        let flags = ZeroFlags { may_unmap: rng.one_in(2), no_fallback: false };
        layer.root.write_zeroes(range, flags).await.unwrap();
    } else {
        let bytes = Iov::copy_of(&stamp(first, count, value));
        layer.root.write(range, bytes, WriteFlags::default()).await.unwrap();
    }
    for sector in first..first + count {
        layer.own[usize::try_from(sector).unwrap()] = Some(value);
    }
}

/// Reads a part of the disk that a layer shows and compares.
async fn compare(rng: &mut Rng, layers: &[Layer]) {
    let top = rng.index(layers.len());
    let first = rng.below(SECTORS);
    let count = (1 + rng.below(300)).min(SECTORS - first);
    let into = Iov::filled(usize::try_from(count * SECTOR).unwrap(), 0xee);
    let range = ByteRange::between(first * SECTOR, (first + count) * SECTOR);
    layers[top].root.read(range, into.clone()).await.unwrap();
    let shows = |sector: u64| {
        let at = usize::try_from(sector).unwrap();
        layers[..=top].iter().rev().find_map(|layer| layer.own[at]).unwrap_or(0)
    };
    let expected: Vec<u8> = (first..first + count).flat_map(|at| stamp(at, 1, shows(at))).collect();
    assert!(into.to_vec() == expected, "layer {top} of {}, sectors {first}+{count}", layers.len());
}

async fn deep(seed: u64) {
    let mut rng = Rng::new(seed);
    let power = Power::until(u64::MAX);
    let graph = Graph::new();
    let mut layers: Vec<Layer> = Vec::new();
    let mut below = None;
    for _ in 0..2 + rng.below(7) {
        let node = add_layer(&graph, &mut rng, &power, below).await;
        layers.push(Layer {
            root: user(&graph, node).await,
            own: vec![None; usize::try_from(SECTORS).unwrap()],
        });
        below = Some(node);
    }
    let over = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> =
        layers.iter().skip(1).map(|layer| reader(layer.root.clone(), seed, over.clone())).collect();
    for number in 1..120 {
        // Runs of reads between writes, so that there is something remembered to be wrong about.
        if rng.one_in(6) {
            write(&mut rng, &mut layers, number).await;
        } else {
            compare(&mut rng, &layers).await;
        }
    }
    over.store(true, Ordering::SeqCst);
    for reader in readers {
        reader.await;
    }
}

#[test]
fn every_layer_shows_what_was_written_last() {
    run_seeds(300, deep);
}

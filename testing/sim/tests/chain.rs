//! A guest on a chain of qcow2 images, while the chain is streamed and committed: on disks that lose power, fill up
//! and fail. The guest always reads what it wrote; after a power cut the images are sound, the chain opens by the
//! names in its headers, every flushed write is there, and no byte that was never written.
//!
//! `UNDERLAY_SEEDS=n` runs n seeds of each test, `UNDERLAY_SEED=s` just that one.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use underlay_drivers::filter::copy_on_read::CopyOnRead;
use underlay_graph::perm::Access;
use underlay_graph::plan::{NewRoot, NodeOptions};
use underlay_graph::status::status;
use underlay_graph::{
    BackingRef, ByteRange, Graph, IoError, NewNode, Node, NodeId, NodeName, Perms, Plan, Role, Root, View,
    Wiring, WriteFlags, ZeroFlags,
};
use underlay_jobs::{
    CommitArgs, EventSink, Job, JobEvent, Jobs, OnError, Settings, Started, Status, StreamArgs, StreamEnd,
};
use underlay_qcow2::{CreateOptions, Fix, OpenOptions, Qcow2, check, create};
use underlay_sim::model::stamp;
use underlay_sim::{Disk, Fault, Model, Power, Rng, SECTOR, run_seeds};
use underlay_sys::{Iov, rt};

const NAMES: [&str; 4] = ["A", "B", "C", "D"];

struct Quiet;

impl EventSink for Quiet {
    fn emit(&self, _event: JobEvent) {}
}

/// The disk below an image, and how it was made.
struct Setup {
    graph: Arc<Graph>,
    disks: Vec<Arc<Disk>>,
    nodes: Vec<NodeId>,
    guest: Root,
    power: Arc<Power>,
    sectors: u64,
    cluster: u64,
    /// What the layers were filled with.
    model: Model,
    numbers: u64,
}

fn create_options(rng: &mut Rng, cluster: u64, size: u64) -> CreateOptions {
    let extended_l2 = cluster >= 16384 && rng.one_in(2);
    CreateOptions {
        cluster_size: cluster,
        refcount_bits: rng.pick(&[1, 2, 4, 8, 16, 16, 32, 64]),
        extended_l2,
        lazy_refcounts: rng.one_in(4),
        ..CreateOptions::new(size)
    }
}

fn open_options(rng: &mut Rng) -> OpenOptions {
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

/// Writes something into a new layer, so that jobs have work, and leaves it flushed.
async fn fill(
    rng: &mut Rng,
    file: &Arc<View>,
    below: Option<Arc<View>>,
    model: &mut Model,
    numbers: &mut u64,
) -> Arc<View> {
    let image = Arc::new(Qcow2::open(&file.cx(), OpenOptions::default()).await.unwrap());
    let backing = below.map(|view| (Role::Backing, view));
    let view = View::detached(image.clone(), [(Role::File, file.clone())].into_iter().chain(backing));
    let access = Access { writable: true, required: Perms::ALL, shared: Perms::ALL };
    image.set_access(&view.cx(), access).await.unwrap();
    let sectors = view.cx().length() / SECTOR;
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
    image.close(&view.cx()).await.unwrap();
    model.end_flush(&flush);
    view
}

async fn build(rng: &mut Rng, length: usize) -> Setup {
    let cluster = rng.pick(&[512, 1024, 4096, 16384, 65536]);
    let size = (cluster * 24).max(48 << 10);
    let power = Power::until(u64::MAX);
    let graph = Graph::new();
    let mut model = Model::new(size / SECTOR);
    let mut below: Option<Arc<View>> = None;
    let mut numbers = 1;
    let (mut disks, mut nodes): (Vec<Arc<Disk>>, Vec<NodeId>) = (Vec::new(), Vec::new());
    for (at, name) in NAMES.iter().enumerate().take(length) {
        let disk = Disk::new(Vec::new(), rng.number(), power.clone());
        let file = View::detached(disk.clone(), []);
        let mut options = create_options(rng, cluster, size);
        if at > 0 {
            options.backing = Some(BackingRef { file: NAMES[at - 1].into(), format: Some("qcow2".into()) });
        }
        create(&file.cx(), &options).await.unwrap();
        below = Some(fill(rng, &file, below, &mut model, &mut numbers).await);
        let image = Qcow2::open(&file.cx(), open_options(rng)).await.unwrap();
        let storage = NewNode {
            name: None,
            node: disk.clone(),
            read_only: at + 1 < length,
            options: NodeOptions { discard: true, ..NodeOptions::default() },
            children: Vec::new(),
        };
        let mut children = vec![(Role::File, Wiring::New(Box::new(storage)))];
        children.extend(nodes.last().map(|id| (Role::Backing, Wiring::Existing(*id))));
        let new = NewNode {
            name: NodeName::new(name),
            node: Arc::new(image),
            read_only: at + 1 < length,
            options: NodeOptions { discard: true, ..NodeOptions::default() },
            children,
        };
        let add = graph.change(|plan| {
            let id = plan.add(new)?;
            plan.node_mut(id).monitor_owned = true;
            Ok(id)
        });
        nodes.push(add.await.unwrap());
        disks.push(disk);
    }
    let root = NewRoot {
        user: "guest".into(),
        role: "root",
        node: *nodes.last().unwrap(),
        required: Perms::CONSISTENT_READ | Perms::WRITE,
        shared: Perms::ALL.without(Perms::RESIZE),
        pinned: false,
        drained: None,
    };
    let guest = graph.change(|plan| Ok(plan.add_root(root))).await.unwrap();
    let guest = graph.root(guest).unwrap();
    Setup { graph, disks, nodes, guest, power, sectors: size / SECTOR, cluster, model, numbers }
}

/// What the guests share.
#[derive(Clone)]
struct Guests {
    root: Root,
    model: Arc<Mutex<Model>>,
    numbers: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    /// Errors are expected: the disks fail.
    errors: bool,
    cluster: u64,
    sectors: u64,
}

impl Guests {
    fn new(setup: &Setup, errors: bool) -> Self {
        Self {
            root: setup.guest.clone(),
            model: Arc::new(Mutex::new(setup.model.clone())),
            numbers: Arc::new(AtomicU64::new(setup.numbers)),
            stop: Arc::default(),
            errors,
            cluster: setup.cluster,
            sectors: setup.sectors,
        }
    }

    fn settle(&self, result: underlay_graph::Result<()>) -> bool {
        assert!(result.is_ok() || self.errors, "{result:?}");
        result.is_ok()
    }

    async fn step(&self, rng: &mut Rng) {
        let mut first = rng.below(self.sectors);
        let mut count = (1 + rng.below(2 * self.cluster / SECTOR + 2)).min(self.sectors - first);
        let action = rng.below(16);
        if action == 8 {
            first -= first % (self.cluster / SECTOR);
            count = self.cluster / SECTOR;
        }
        let range = ByteRange::between(first * SECTOR, (first + count) * SECTOR);
        let number = self.numbers.fetch_add(1, Ordering::SeqCst);
        match action {
            0..=8 => {
                let flags = WriteFlags { compressed: action == 8 };
                let bytes = Iov::copy_of(&stamp(first, count, number));
                let writing = self.model.lock().unwrap().begin_write(first, count, number, number);
                let ok = self.settle(self.root.write(range, bytes, flags).await);
                self.model.lock().unwrap().end_write(writing, ok);
            }
            9 | 10 => {
                let flags = ZeroFlags { may_unmap: rng.one_in(2), no_fallback: false };
                let writing = self.model.lock().unwrap().begin_write(first, count, 0, number);
                let ok = if action == 9 {
                    self.settle(self.root.write_zeroes(range, flags).await)
                } else {
                    self.settle(self.root.discard(range).await);
                    false
                };
                self.model.lock().unwrap().end_write(writing, ok);
            }
            11 => {
                let flush = self.model.lock().unwrap().begin_flush();
                if self.settle(self.root.flush().await) {
                    self.model.lock().unwrap().end_flush(&flush);
                }
            }
            _ => {
                let into = Iov::filled(range.buffer_len(), 0xee);
                let read = self.model.lock().unwrap().begin_read(first, count);
                if self.settle(self.root.read(range, into.clone()).await) {
                    self.model.lock().unwrap().end_read(&read, &into.to_vec()).unwrap();
                }
            }
        }
    }

    /// Starts `count` guests that work until they are stopped, or for `steps`.
    fn start(&self, rng: &mut Rng, count: u64, steps: u64) -> Vec<rt::JoinHandle<()>> {
        let one = |seed| {
            let guests = self.clone();
            rt::spawn(async move {
                let mut rng = Rng::new(seed);
                for _ in 0..steps {
                    if guests.stop.load(Ordering::SeqCst) {
                        break;
                    }
                    guests.step(&mut rng).await;
                    rt::sleep(Duration::from_micros(rng.below(300))).await;
                }
            })
        };
        (0..count).map(|_| one(rng.number())).collect()
    }

    /// Reads the whole disk and compares.
    async fn verify(&self) {
        let into = Iov::scratch(usize::try_from(self.sectors * SECTOR).unwrap());
        let read = self.model.lock().unwrap().begin_read(0, self.sectors);
        self.root.read(ByteRange::between(0, self.sectors * SECTOR), into.clone()).await.unwrap();
        self.model.lock().unwrap().end_read(&read, &into.to_vec()).unwrap();
    }
}

fn job_settings(rng: &mut Rng, id: &str) -> Settings {
    let policies = [OnError::Report, OnError::Ignore, OnError::Enospc, OnError::Stop];
    Settings {
        id: Some(id.into()),
        speed: rng.pick(&[0, 0, 1 << 20, 64 << 20]),
        auto_finalize: !rng.one_in(4),
        on_error: rng.pick(&policies),
        ..Settings::default()
    }
}

async fn stream_or_commit(setup: &Setup, jobs: &Arc<Jobs>, rng: &mut Rng, id: &str) -> Option<Started> {
    let names: underlay_jobs::BackingNames = Arc::new(|_: &View, base: &View| base.name().to_string());
    let settings = job_settings(rng, id);
    let node = |at: usize| setup.nodes[at];
    // What a client calls the base: the same file, in other words than the graph's own.
    let called = |rng: &mut Rng, at: usize| rng.one_in(3).then(|| format!("./{}", NAMES[at]));
    if rng.one_in(2) {
        let top = 1 + rng.index(3);
        let (end, backing_file) = match rng.index(top + 1) {
            0 => (StreamEnd::Whole, None),
            at if rng.one_in(2) => (StreamEnd::Bottom(node(at)), called(rng, at - 1)),
            at => (StreamEnd::Above(node(at - 1)), called(rng, at - 1)),
        };
        let args = StreamArgs {
            settings,
            top: node(top),
            end,
            backing_file,
            backing_mask_protocol: false,
            filter_node_name: None,
            names,
        };
        return jobs.stream(&setup.graph, args).await.ok();
    }
    let top = 1 + rng.index(3);
    let base = rng.index(top);
    let args = CommitArgs {
        settings,
        device: node(3),
        top: Some(node(top)),
        base: Some(node(base)),
        // An active commit rewrites no header and refuses it.
        backing_file: if top < 3 { called(rng, base) } else { None },
        backing_mask_protocol: false,
        filter_node_name: None,
        names,
    };
    jobs.commit(&setup.graph, args).await.ok()
}

/// A client of a job: it waits, pauses and resumes, changes the speed, completes, finalizes, and may lose patience.
async fn attend(job: &Arc<Job>, power: &Power, rng: &mut Rng) {
    let mut patience = if rng.one_in(4) { rng.below(20) } else { u64::MAX };
    while !matches!(job.status(), Status::Concluded | Status::Null) {
        rt::sleep(Duration::from_micros(1 + rng.below(2000))).await;
        patience = patience.saturating_sub(1);
        if patience == 0 {
            let _ = if rng.one_in(2) { job.block_cancel(false) } else { job.cancel() };
        }
        // A job that ignores errors would try for ever on disks without power.
        if power.is_cut() {
            let _ = job.cancel();
        }
        // Most of these are refused, for the job is not in the state for it.
        match rng.below(8) {
            0 => drop(job.pause()),
            1 | 2 => drop(job.resume()),
            3 => drop(job.set_speed(rng.pick(&[0, 1 << 20, 64 << 20]))),
            4 => drop(job.finalize().await),
            _ => {}
        }
        let _ = job.complete();
    }
}

/// Opens what the cut left, repairing what says that it needs it, and checks it.
async fn reopen(setup: &Setup, seed: u64, top: usize) -> Vec<u8> {
    let power = Power::until(u64::MAX);
    let mut at = Some(top);
    let mut layers = Vec::new();
    while let Some(index) = at {
        let disk = Disk::new(setup.disks[index].after_power_cut(seed ^ index as u64), seed, power.clone());
        let file = View::detached(disk, []);
        let image = Arc::new(Qcow2::open(&file.cx(), OpenOptions::default()).await.unwrap());
        let view = View::detached(image.clone(), [(Role::File, file.clone())]);
        let access = Access { writable: true, required: Perms::ALL, shared: Perms::ALL };
        image.set_access(&view.cx(), access).await.unwrap();
        let mut findings = Vec::new();
        let outcome = check(&file.cx(), Fix::None, &mut |finding| findings.push(finding)).await.unwrap();
        let errors = outcome.corruptions + outcome.check_errors;
        assert_eq!(errors, 0, "image {}: {findings:?}", NAMES[index]);
        at = image
            .backing_ref()
            .map(|below| NAMES.iter().position(|name| *name == below.file.trim_start_matches("./")).unwrap());
        assert!(layers.len() < 4, "a loop");
        layers.push((image, file));
    }
    let mut below: Option<Arc<View>> = None;
    for (image, file) in layers.into_iter().rev() {
        let backing = below.map(|view| (Role::Backing, view));
        below = Some(View::detached(image, [(Role::File, file)].into_iter().chain(backing)));
    }
    let into = Iov::scratch(usize::try_from(setup.sectors * SECTOR).unwrap());
    let whole = ByteRange::between(0, setup.sectors * SECTOR);
    below.unwrap().cx().read(whole, into.clone()).await.unwrap();
    into.to_vec()
}

/// The image that the guest's disk has on top.
fn top_of(setup: &Setup) -> usize {
    let plan = setup.graph.plan();
    let chain = plan.chain(plan.root(setup.guest.id()).unwrap().node);
    let top = chain.into_iter().find_map(|id| setup.nodes.iter().position(|node| *node == id));
    top.unwrap()
}

async fn cut_and_compare(setup: &Setup, guests: &Guests, seed: u64) {
    setup.power.cut();
    for round in 0..3 {
        let bytes = reopen(setup, seed.wrapping_mul(3) + round, top_of(setup)).await;
        guests.model.lock().unwrap().check_after_cut(&bytes).unwrap();
    }
}

async fn power(seed: u64) {
    let mut rng = Rng::new(seed);
    let length = 1 + rng.index(3);
    let setup = build(&mut rng, length).await;
    let guests = Guests::new(&setup, true);
    let count = 1 + rng.below(4);
    let running = guests.start(&mut rng, count, 25);
    rt::sleep(Duration::from_micros(rng.below(40_000))).await;
    setup.power.cut();
    for guest in running {
        guest.await;
    }
    cut_and_compare(&setup, &guests, seed).await;
}

async fn faults(seed: u64) {
    let mut rng = Rng::new(seed);
    let length = 1 + rng.index(2);
    let setup = build(&mut rng, length).await;
    let guests = Guests::new(&setup, true);
    let top = &setup.disks[length - 1];
    let fault = |rng: &mut Rng, error| Some(Fault { after: rng.below(60), error, sticky: rng.one_in(2) });
    match rng.below(4) {
        0 => top.fail_writes(fault(&mut rng, IoError::ENOSPC)),
        1 => top.fail_writes(fault(&mut rng, IoError::EIO)),
        2 => top.fail_reads(fault(&mut rng, IoError::EIO)),
        _ => top.limit(top.content().len() as u64 + rng.below(20) * setup.cluster),
    }
    for guest in guests.start(&mut rng, 3, 20) {
        guest.await;
    }
    mend(&setup.disks);
    guests.verify().await;
    let healthy = Guests { errors: false, ..guests.clone() };
    for guest in healthy.start(&mut rng, 2, 10) {
        guest.await;
    }
    healthy.verify().await;
    cut_and_compare(&setup, &guests, seed).await;
}

/// Starts a job, or tries two on one chain (the second is refused where they would meet), each with a client.
async fn start_jobs(setup: &Setup, rng: &mut Rng) -> Vec<rt::JoinHandle<()>> {
    let jobs = Jobs::new(Arc::new(Quiet));
    let ids = if rng.one_in(3) { &["j", "k"][..] } else { &["j"] };
    let mut clients = Vec::new();
    for id in ids {
        let Some(started) = stream_or_commit(setup, &jobs, rng, id).await else { continue };
        drop(rt::spawn(started.task));
        let (job, power, mut rng) = (started.job, setup.power.clone(), Rng::new(rng.number()));
        clients.push(rt::spawn(async move { attend(&job, &power, &mut rng).await }));
    }
    clients
}

/// Makes one disk of the chain fail or fill up.
fn break_a_disk(setup: &Setup, rng: &mut Rng) {
    let disk = &setup.disks[rng.index(setup.disks.len())];
    let kind = rng.below(4);
    let mut fault = |error| Some(Fault { after: rng.below(40), error, sticky: rng.one_in(2) });
    match kind {
        0 => disk.fail_writes(fault(IoError::ENOSPC)),
        1 => disk.fail_writes(fault(IoError::EIO)),
        2 => disk.fail_reads(fault(IoError::EIO)),
        _ => disk.limit(disk.content().len() as u64 + rng.below(20) * setup.cluster),
    }
}

/// All disks are well again, and large.
fn mend(disks: &[Arc<Disk>]) {
    for disk in disks {
        disk.fail_writes(None);
        disk.fail_reads(None);
        disk.limit(1 << 27);
    }
}

/// Jobs on failing disks: they fail, stop and are resumed, or go on, as their policy says; the guest loses nothing.
async fn troubled(seed: u64) {
    let mut rng = Rng::new(seed);
    let setup = build(&mut rng, 4).await;
    let guests = Guests::new(&setup, true);
    let running = guests.start(&mut rng, 2, 200);
    rt::sleep(Duration::from_micros(rng.below(5000))).await;
    break_a_disk(&setup, &mut rng);
    let (disks, trouble) = (setup.disks.clone(), Duration::from_micros(rng.below(60_000)));
    let mending = rt::spawn(async move {
        rt::sleep(trouble).await;
        mend(&disks);
    });
    for client in start_jobs(&setup, &mut rng).await {
        client.await;
    }
    mending.await;
    guests.stop.store(true, Ordering::SeqCst);
    for guest in running {
        guest.await;
    }
    guests.verify().await;
    cut_and_compare(&setup, &guests, seed).await;
}

async fn jobs(seed: u64) {
    let mut rng = Rng::new(seed);
    let setup = build(&mut rng, 4).await;
    let cut = rng.one_in(2);
    let guests = Guests::new(&setup, cut);
    let running = guests.start(&mut rng, 2, 200);
    rt::sleep(Duration::from_micros(rng.below(5000))).await;
    let clients = start_jobs(&setup, &mut rng).await;
    if !clients.is_empty() {
        if cut {
            let (power, delay, over) = (setup.power.clone(), rng.below(60_000), guests.stop.clone());
            drop(rt::spawn(async move {
                rt::sleep(Duration::from_micros(delay)).await;
                if !over.load(Ordering::SeqCst) {
                    power.cut();
                }
            }));
        }
        for client in clients {
            client.await;
        }
    }
    guests.stop.store(true, Ordering::SeqCst);
    for guest in running {
        guest.await;
    }
    if !setup.power.is_cut() {
        guests.verify().await;
    }
    cut_and_compare(&setup, &guests, seed).await;
}

/// Puts a copy-on-read filter between the top and the guest.
async fn copy_what_is_read(setup: &Setup, bottom: Option<usize>) {
    let top = *setup.nodes.last().unwrap();
    let bottom = bottom.and_then(|at| NodeName::new(NAMES[at]));
    let filter = NewNode {
        name: None,
        node: Arc::new(CopyOnRead::new(bottom)),
        read_only: false,
        options: NodeOptions { discard: true, ..NodeOptions::default() },
        children: vec![(Role::File, Wiring::Existing(top))],
    };
    let edit = |plan: &mut Plan| {
        let filter = plan.add(filter)?;
        plan.replace(top, filter, |parent| parent == filter)
    };
    setup.graph.change(edit).await.unwrap();
}

/// Whether the top still borrows anything from the images below it, as far down as `bottom`.
async fn borrows(setup: &Setup, bottom: Option<usize>) -> bool {
    let inside = setup.guest.enter().await.unwrap();
    let until = bottom.and_then(|at| at.checked_sub(1)).map(|below| setup.nodes[below]);
    let mut rest = ByteRange::between(0, setup.sectors * SECTOR);
    while !rest.is_empty() {
        let found = status(&inside.cx(), rest, until).await.unwrap();
        if found.allocated && found.depth > 0 {
            return true;
        }
        rest = rest.split(found.len).1;
    }
    false
}

/// Reads copy, beside writes to the same clusters and on disks that lose power or fill up.
async fn copies(seed: u64) {
    let mut rng = Rng::new(seed);
    let length = 2 + rng.index(3);
    let setup = build(&mut rng, length).await;
    let bottom = rng.one_in(2).then(|| rng.index(length - 1));
    copy_what_is_read(&setup, bottom).await;
    let cut = rng.one_in(3);
    let guests = Guests::new(&setup, cut || rng.one_in(3));
    if guests.errors {
        let top = &setup.disks[length - 1];
        top.limit(top.content().len() as u64 + rng.below(20) * setup.cluster);
    }
    let running = guests.start(&mut rng, 4, 20);
    if cut {
        rt::sleep(Duration::from_micros(rng.below(40_000))).await;
        setup.power.cut();
    }
    for guest in running {
        guest.await;
    }
    if !cut {
        mend(&setup.disks);
        guests.verify().await;
        assert!(!borrows(&setup, bottom).await);
        guests.verify().await;
    }
    cut_and_compare(&setup, &guests, seed).await;
}

#[test]
fn copies_of_what_is_read_never_undo_a_write() {
    run_seeds(500, copies);
}

#[test]
fn power_cuts_lose_nothing_flushed() {
    run_seeds(5000, power);
}

#[test]
fn failing_disks_lose_nothing() {
    run_seeds(3000, faults);
}

#[test]
fn streams_and_commits_lose_nothing() {
    run_seeds(3000, jobs);
}

#[test]
fn jobs_on_failing_disks_lose_nothing() {
    run_seeds(2000, troubled);
}

//! A chain of incremental backups of a disk under guests, by a bitmap that lasts: backups that succeed, fail and are
//! cancelled, while the disk grows and the bitmaps are brought up to date; then the power goes, or the process is
//! killed, or all is closed. Whatever on the disk is not what it was at the last backup that succeeded is dirty. Each
//! backup that was done shows the disk of its moment. After the end the next one goes on top of them, or of one that
//! was cut off, and shows the disk as it is.

use std::sync::Arc;
use std::time::Duration;

use underlay_drivers::filter::copy_before_write::{CbwOptions, OnCbwError};
use underlay_graph::bitmaps::NewBitmap;
use underlay_graph::{
    ByteRange, Graph, GraphError, IoError, NewNode, Node, NodeId, Perms, Plan, Root, View, WriteFlags,
};
use underlay_jobs::{
    BackupArgs, BackupBitmap, BackupSync, BackupTarget, BitmapMode, Jobs, OnError, Settings,
};
use underlay_qcow2::{OpenOptions, create};
use underlay_sim::{Disk, Fault, Model, Power, Rng, SECTOR, run_seeds};
use underlay_sys::{Iov, rt};

use crate::backup::{attend, settings};
use crate::bitmaps::{Left, ROOMY};
use crate::guests::Guests;
use crate::home::End;
use crate::lab::{Setup, add_node, add_user, build, create_options, new_node, open_image, resize};
use crate::target::Record;

/// Bytes of the disk: what is copied at once has at least 64 KiB.
const SIZE: u64 = 7 << 16;
const BITMAP: &str = "changes";

/// An image of the chain, on a disk that keeps its power.
#[derive(Clone)]
struct Image {
    disk: Arc<Disk>,
    raw: bool,
}

impl Image {
    fn on(disk: Arc<Disk>, raw: bool) -> Self {
        Self { disk, raw }
    }

    async fn node(&self, name: &str, below: Option<NodeId>, read_only: bool) -> NewNode {
        let file = View::detached(self.disk.clone(), []);
        let image = open_image(&file, self.raw, OpenOptions::default()).await;
        new_node(name, &self.disk, image, below, read_only)
    }

    /// What is left of it after an end.
    fn after(&self, end: End, seed: u64) -> Self {
        let content = if end == End::Cut { self.disk.after_power_cut(seed) } else { self.disk.content() };
        Self::on(Disk::new(content, seed, Power::until(u64::MAX)), self.raw)
    }
}

/// A backup that was done.
struct Done {
    image: Image,
    node: NodeId,
    /// The disk at its moment.
    moment: Model,
}

/// What became of a backup.
enum Outcome {
    Done(NodeId),
    Failed,
}

async fn read_all(root: &Root, bytes: u64) -> underlay_graph::Result<Vec<u8>> {
    let all = Iov::scratch(usize::try_from(bytes).unwrap());
    root.read(ByteRange::between(0, bytes), all.clone()).await?;
    Ok(all.to_vec())
}

/// An empty image for what has changed on a disk of so many bytes.
async fn target(rng: &mut Rng, bytes: u64) -> Image {
    let disk = Disk::new(Vec::new(), rng.number(), Power::until(u64::MAX));
    let file = View::detached(disk.clone(), []);
    let cluster = rng.pick(&[512, 4096, 65536]);
    create(&file.cx(), &create_options(rng, cluster, bytes)).await.unwrap();
    Image::on(disk, false)
}

/// An incremental backup, to its end. How long the client waits is up to `settings`, which a second one of them has
/// too.
struct Backup<'a> {
    graph: &'a Arc<Graph>,
    source: NodeId,
    settings: Settings,
    cancel: bool,
    power: &'a Power,
}

impl Backup<'_> {
    /// To a new node; `begun` is called when its moment is over.
    async fn run(self, new: NewNode, rng: &mut Rng, begun: impl FnOnce()) -> Outcome {
        let name = new.name.clone().unwrap();
        let arguments = BackupArgs {
            settings: self.settings,
            source: self.source,
            target: BackupTarget::New(Box::new(new)),
            sync: BackupSync::Bitmap,
            bitmap: Some(BackupBitmap { name: BITMAP.into(), mode: BitmapMode::OnSuccess }),
            how: CbwOptions { on_error: OnCbwError::BreakSnapshot, ..CbwOptions::default() },
            most_in_flight: rng.pick(&[1, 4]),
            filter_node_name: None,
        };
        let record = Arc::new(Record::default());
        let started = Jobs::new(record.clone()).backup(self.graph, arguments).await;
        begun();
        let Ok(started) = started else { return Outcome::Failed };
        // Nobody else keeps it when the job is over.
        let keep = self.graph.change(|plan| {
            let node = plan.find(name.as_str()).ok_or_else(|| GraphError::new("it is over"))?;
            plan.node_mut(node).monitor_owned = true;
            Ok(node)
        });
        let kept = keep.await;
        drop(rt::spawn(started.task));
        attend(self.power, &started.job, self.cancel, rng).await;
        match kept {
            Ok(node) if record.is_well() => Outcome::Done(node),
            _ => Outcome::Failed,
        }
    }
}

/// The first life of the disk.
struct Life {
    setup: Setup,
    guests: Guests,
    source: NodeId,
    /// The oldest first.
    chain: Vec<Done>,
    /// One that was cut off.
    doubtful: Option<Image>,
    /// The disk got another size when the power went.
    is_resizing: bool,
    bytes: u64,
}

impl Life {
    async fn begin(rng: &mut Rng, cut: bool) -> Self {
        let setup = build(rng, 1, SIZE).await;
        setup.graph.let_bitmaps_last();
        let guests = Guests::new(&setup, cut);
        let (source, bytes) = (setup.layers[0].node, setup.sectors * SECTOR);
        // Nobody writes yet.
        let content = read_all(&setup.guest, bytes).await.unwrap();
        let image = Image::on(Disk::new(content, rng.number(), Power::until(u64::MAX)), true);
        let node = add_node(&setup.graph, image.node("T0", None, true).await).await;
        let new = NewBitmap {
            name: BITMAP,
            granularity: Some(512 << rng.below(8)),
            persistent: true,
            enabled: true,
        };
        setup.graph.change(|plan| plan.add_bitmap(source, &new)).await.unwrap();
        guests.model().remember();
        let moment = guests.model().moment_over();
        let chain = vec![Done { image, node, moment }];
        Self { setup, guests, source, chain, doubtful: None, is_resizing: false, bytes }
    }

    async fn backup(&mut self, number: usize, rng: &mut Rng) {
        let below = self.chain.last().unwrap().node;
        let image = target(rng, self.bytes).await;
        let (fails, cancel) = (rng.one_in(4), rng.one_in(4));
        let new = image.node(&format!("T{number}"), Some(below), false).await;
        if fails {
            let error = if rng.one_in(2) { IoError::ENOSPC } else { IoError::EIO };
            let fault = Fault { after: rng.below(20), error, sticky: true };
            image.disk.fail_writes(Some(fault));
        }
        let (on_error, on_target_error) = (OnError::Report, Some(OnError::Report));
        let settings = Settings { on_error, on_target_error, ..settings(rng) };
        let power = self.setup.power.clone();
        let backup =
            Backup { graph: &self.setup.graph, source: self.source, settings, cancel, power: &power };
        self.guests.model().remember();
        let mut moment = None;
        let outcome = backup.run(new, rng, || moment = Some(self.guests.model().moment_over())).await;
        image.disk.fail_writes(None);
        let is_cut = power.is_cut();
        match outcome {
            Outcome::Done(node) => self.chain.push(Done { image, node, moment: moment.unwrap() }),
            Outcome::Failed if is_cut => self.doubtful = Some(image),
            Outcome::Failed => assert!(fails || cancel),
        }
    }

    async fn grow(&mut self, rng: &mut Rng) {
        let bytes = self.bytes + (1 + rng.below(200)) * SECTOR;
        self.is_resizing = true;
        let done = resize(&self.setup.graph, self.source, bytes).await;
        if !self.setup.power.is_cut() {
            done.unwrap();
            (self.bytes, self.is_resizing) = (bytes, false);
        }
    }

    async fn step(&mut self, number: usize, rng: &mut Rng) {
        rt::sleep(Duration::from_micros(rng.below(4000))).await;
        match rng.below(6) {
            0 => self.setup.graph.refresh_bitmaps().await,
            1 => self.grow(rng).await,
            _ => self.backup(number, rng).await,
        }
    }

    /// The guests' disk at the last backup that succeeded, and its sectors.
    fn last(&self) -> (&Model, u64) {
        (&self.chain.last().unwrap().moment, self.setup.sectors)
    }

    /// Nobody writes any more.
    async fn check(&self) {
        let content = read_all(&self.guests.root, self.bytes).await.unwrap();
        check_dirty(&self.setup.graph, self.source, self.last(), &content);
        for done in &self.chain {
            let root = add_user(&self.setup.graph, done.node, Perms::CONSISTENT_READ).await;
            let shown = read_all(&root, self.setup.sectors * SECTOR).await.unwrap();
            done.moment.check_copy(&shown).unwrap();
        }
    }

    /// Takes everything out of the graph.
    async fn close(&self) {
        let close = |plan: &mut Plan| {
            let roots: Vec<_> = plan.roots().map(|(id, _)| id).collect();
            roots.into_iter().for_each(|root| plan.remove_root(root));
            let nodes: Vec<_> = plan.nodes().map(|(id, _)| id).collect();
            nodes.into_iter().for_each(|node| plan.node_mut(node).monitor_owned = false);
            Ok(())
        };
        self.setup.graph.change(close).await.unwrap();
        assert_eq!(self.setup.graph.plan().nodes().count(), 0);
    }
}

/// Whatever is not what it was at the moment, when the guests' disk had so many `sectors` and the rest was zero, is
/// dirty.
fn check_dirty(graph: &Graph, node: NodeId, (moment, sectors): (&Model, u64), content: &[u8]) {
    let plan = graph.plan();
    let bits = &plan.bitmap(node, BITMAP).unwrap().bits;
    for (sector, bytes) in (0..).zip(content.chunks(512)) {
        let here = ByteRange::between(sector * SECTOR, (sector + 1) * SECTOR);
        let is_new = match sector < sectors {
            true => moment.check_part(sector, bytes).is_err(),
            false => bytes.iter().any(|byte| *byte != 0),
        };
        assert!(!is_new || bits.any(here), "sector {sector} has changed and is clean");
    }
}

/// What comes after the end: the chain is still there, and one more backup shows the disk.
async fn live_on(life: &Life, end: End, seed: u64, rng: &mut Rng) {
    let left = Left::of(&life.setup.layers[0], end, seed);
    let graph = Graph::new();
    let image: Arc<dyn Node> = left.open().await;
    let source = add_node(&graph, new_node("A", &left.disk, image, None, false)).await;
    let guest = add_user(&graph, source, Perms::CONSISTENT_READ | Perms::WRITE).await;
    let is_raw = life.setup.layers[0].raw;
    let is_good = end == End::Still || is_raw || life.setup.cluster >= ROOMY;
    let (is_lost, bytes) = {
        let (plan, wires) = (graph.plan(), graph.wires());
        let is_lost = plan.bitmap(source, BITMAP).is_ok_and(|bitmap| bitmap.inconsistent);
        (is_lost || plan.bitmap(source, BITMAP).is_err(), wires.view(source).cx().length())
    };
    assert!(is_lost != is_good || life.is_resizing && is_raw, "the bitmap is lost: {is_lost}");
    let mut below = None;
    for (number, done) in life.chain.iter().enumerate() {
        let image = done.image.after(end, seed ^ number as u64);
        let node = add_node(&graph, image.node(&format!("T{number}"), below, true).await).await;
        let root = add_user(&graph, node, Perms::CONSISTENT_READ).await;
        done.moment.check_copy(&read_all(&root, life.setup.sectors * SECTOR).await.unwrap()).unwrap();
        below = Some(node);
    }
    if is_lost {
        return;
    }
    match &life.doubtful {
        // It was done, or the bitmap is as it was: who comes on top of it need not know.
        Some(image) => {
            let new = image.after(end, seed).node("doubtful", below, true).await;
            below = Some(add_node(&graph, new).await);
        }
        None => {
            let content = read_all(&guest, bytes).await.unwrap();
            check_dirty(&graph, source, life.last(), &content);
        }
    }
    for _ in 0..rng.below(6) {
        let first = rng.below(bytes / SECTOR);
        let range = ByteRange::between(first * SECTOR, ((first + 1 + rng.below(20)) * SECTOR).min(bytes));
        guest.write(range, Iov::filled(range.buffer_len(), 0x77), WriteFlags::default()).await.unwrap();
    }
    let last = target(rng, bytes).await;
    let new = last.node("last", below, false).await;
    let (settings, power) =
        (Settings { id: Some("j".into()), ..Settings::default() }, Power::until(u64::MAX));
    let backup = Backup { graph: &graph, source, settings, cancel: false, power: &power };
    let Outcome::Done(node) = backup.run(new, rng, || ()).await else { panic!("the last backup has failed") };
    let shown = read_all(&add_user(&graph, node, Perms::CONSISTENT_READ).await, bytes).await.unwrap();
    let disk = read_all(&guest, bytes).await.unwrap();
    let wrong = shown.chunks(512).zip(disk.chunks(512)).position(|(shown, disk)| shown != disk);
    assert_eq!(wrong, None, "the last backup shows something else in this sector");
}

async fn play(seed: u64) {
    let mut rng = Rng::new(seed);
    let cut = rng.one_in(2);
    let mut life = Life::begin(&mut rng, cut).await;
    let mut running = life.guests.start(&mut rng, 2, 120);
    if cut {
        life.setup.cut_after(Duration::from_micros(rng.below(120_000)), &life.guests);
    }
    let steps = 2 + rng.index(5);
    for number in 1..=steps {
        if !life.setup.power.is_cut() {
            life.step(number, &mut rng).await;
        }
    }
    running.stop().await;
    let end = match life.setup.power.is_cut() {
        true => End::Cut,
        false => {
            life.check().await;
            rng.pick(&[End::Still, End::Killed, End::Cut])
        }
    };
    match end {
        End::Still => life.close().await,
        _ => life.setup.power.cut(),
    }
    live_on(&life, end, seed, &mut rng).await;
}

#[test]
fn chains_of_backups_restore_every_moment() {
    run_seeds(60, play);
}

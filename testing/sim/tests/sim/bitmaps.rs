//! Dirty bitmaps under guests who write, while bitmaps come, are cleared, merged, switched on and off and brought up to
//! date in the image, or beside a raw one. Whatever on the disk is not what it was when a bitmap was last clean lies in
//! granules that it calls dirty: now, after the image was closed and opened again, and after a power cut or a kill. A
//! raw disk to which somebody else has written has no bitmap that could be believed.

use std::sync::Arc;
use std::time::Duration;

use underlay_graph::bitmap::DirtyBitmap;
use underlay_graph::bitmaps::{NewBitmap, PlanBitmap};
use underlay_graph::{ByteRange, Graph, GraphError, Node, NodeId, Perms, Plan, View};
use underlay_qcow2::OpenOptions;
use underlay_sim::{Disk, Model, Power, Rng, SECTOR, run_seeds};
use underlay_sys::{Iov, rt};

use crate::guests::Guests;
use crate::home::{End, SimHome};
use crate::lab::{Layer, Setup, add_node, add_user, build, mend, new_node, open_image, open_raw, resize};

/// Bytes of the disk: a few regions of those that are noted for a crash.
const SIZE: u64 = 5 << 18;
/// Clusters that leave room for notes.
pub const ROOMY: u64 = 4096;

/// What is known of a bitmap.
struct Known {
    name: String,
    persistent: bool,
    enabled: bool,
    /// The disk when it was last clean, unless it has missed something since.
    clean: Option<Model>,
}

/// What there is of an image after an end.
pub struct Left {
    pub disk: Arc<Disk>,
    /// Of a raw one.
    home: Option<Arc<SimHome>>,
}

impl Left {
    pub fn of(layer: &Layer, end: End, seed: u64) -> Self {
        Self { disk: layer.disk.clone(), home: layer.home.clone() }.after(end, seed)
    }

    fn after(&self, end: End, seed: u64) -> Self {
        if let Some(home) = &self.home {
            let home = home.after(end, seed);
            return Self { disk: home.disk.clone(), home: Some(home) };
        }
        let content = if end == End::Cut { self.disk.after_power_cut(seed) } else { self.disk.content() };
        Self { disk: Disk::new(content, seed, Power::until(u64::MAX)), home: None }
    }

    pub async fn open(&self) -> Arc<dyn Node> {
        let file = View::detached(self.disk.clone(), []);
        match &self.home {
            Some(home) => open_raw(&file, home).await,
            None => open_image(&file, false, OpenOptions::default()).await,
        }
    }
}

/// The guests' disk, and its bitmaps.
struct Lab {
    setup: Setup,
    guests: Guests,
    node: NodeId,
    bitmaps: Vec<Known>,
    /// The disks fail now and then.
    faulty: bool,
    /// Bitmaps so far, and attempts.
    added: usize,
    /// The image is being closed.
    closing: bool,
    /// It is getting another length, or was when the power went.
    resizing: bool,
}

/// What became of an edit.
enum Edited {
    /// It is done; the disk at the moment.
    Done(Box<Model>),
    /// All is as before.
    Refused,
    /// The power is gone, or the image was given up as nobody knew any more which header the disk had.
    Unknown,
}

impl Edited {
    /// When a bitmap was last clean that is clean if it was done.
    fn clean(&self, enabled: bool, before: &Option<Model>) -> Option<Model> {
        match self {
            Self::Done(moment) => enabled.then(|| Model::clone(moment)),
            Self::Refused => before.clone(),
            Self::Unknown => None,
        }
    }
}

impl Lab {
    /// Edits the plan.
    async fn edit(&self, edit: impl Fn(&mut Plan) -> Result<(), GraphError> + Send + Sync) -> Edited {
        self.guests.model().remember();
        let outcome = self.setup.graph.change(|plan| edit(plan)).await;
        let moment = self.guests.model().moment_over();
        match outcome {
            Ok(()) => Edited::Done(Box::new(moment)),
            Err(_) if self.is_over() => Edited::Unknown,
            Err(error) => {
                assert!(self.faulty, "{error:?}");
                Edited::Refused
            }
        }
    }

    /// Nothing can be done with the disk any more.
    fn is_over(&self) -> bool {
        self.setup.power.is_cut() || self.setup.graph.plan().node(self.node).node.is_unusable()
    }

    async fn add(&mut self, rng: &mut Rng) {
        let name = format!("b{}", self.added);
        self.added += 1;
        let persistent = !rng.one_in(3);
        let (enabled, granularity) = (!rng.one_in(5), Some(512 << rng.below(9)));
        let new = NewBitmap { name: &name, granularity, persistent, enabled };
        if let Edited::Done(moment) = self.edit(|plan| plan.add_bitmap(self.node, &new)).await {
            self.bitmaps.push(Known { name, persistent, enabled, clean: enabled.then_some(*moment) });
        }
    }

    async fn clear(&mut self, at: usize) {
        let name = &self.bitmaps[at].name;
        let edited = self.edit(|plan| plan.clear_bitmap(self.node, name)).await;
        let known = &mut self.bitmaps[at];
        known.clean = edited.clean(known.enabled, &known.clean);
    }

    async fn switch(&mut self, at: usize) {
        let enabled = !self.bitmaps[at].enabled;
        let name = &self.bitmaps[at].name;
        let edited = self.edit(|plan| plan.enable_bitmap(self.node, name, enabled)).await;
        let known = &mut self.bitmaps[at];
        match edited {
            Edited::Refused => {}
            Edited::Done(_) => (known.enabled, known.clean) = (enabled, None),
            Edited::Unknown => (known.enabled, known.clean) = (false, None),
        }
    }

    /// What was dirty in the other is moved to the one, in one step.
    async fn merge(&mut self, one: usize, other: usize) {
        let (target, source) = (&self.bitmaps[one].name, &self.bitmaps[other].name);
        let edited = self.edit(|plan| {
            plan.merge_bitmaps(self.node, target, &[(self.node, source)])?;
            plan.clear_bitmap(self.node, source)
        });
        let edited = edited.await;
        if matches!(edited, Edited::Unknown) {
            self.bitmaps[one].clean = None;
        }
        let known = &mut self.bitmaps[other];
        known.clean = edited.clean(known.enabled, &known.clean);
    }

    /// The disk, and that of the file beside it.
    fn disks(&self) -> Vec<Arc<Disk>> {
        let layer = &self.setup.layers[0];
        let beside = layer.home.as_ref().and_then(|home| home.side());
        [layer.disk.clone()].into_iter().chain(beside).collect()
    }

    /// A disk fails or fills up, or all are well again.
    fn trouble(&self, rng: &mut Rng) {
        let disks = self.disks();
        disks.iter().for_each(|disk| mend(disk));
        if rng.one_in(2) {
            self.setup.break_disk(&disks[rng.index(disks.len())], rng);
        }
    }

    /// The disk gets longer, or shorter again: never shorter than what the guests use.
    async fn resize(&mut self, rng: &mut Rng) {
        let size = (self.setup.sectors + rng.below(3000)) * SECTOR;
        self.resizing = true;
        let outcome = resize(&self.setup.graph, self.node, size).await;
        assert!(outcome.is_ok() || self.faulty || self.is_over(), "{outcome:?}");
        self.resizing = self.setup.power.is_cut();
    }

    async fn step(&mut self, rng: &mut Rng) {
        let count = self.bitmaps.len();
        match rng.below(9) {
            8 => self.resize(rng).await,
            0 | 1 => self.add(rng).await,
            2 if count > 0 => self.clear(rng.index(count)).await,
            3 if count > 0 => self.switch(rng.index(count)).await,
            4 | 5 if count > 1 => {
                let one = rng.index(count);
                self.merge(one, (one + 1 + rng.index(count - 1)) % count).await;
            }
            _ => self.setup.graph.refresh_bitmaps().await,
        }
    }

    /// Checks all bitmaps that `of` finds, against what is on a disk.
    fn check<'a>(&self, content: &[u8], of: impl Fn(&Known) -> Option<&'a DirtyBitmap>) {
        for known in &self.bitmaps {
            let (Some(clean), Some(bits)) = (&known.clean, of(known)) else { continue };
            for (sector, bytes) in (0..).zip(content.chunks(512)) {
                let here = ByteRange::between(sector * SECTOR, (sector + 1) * SECTOR);
                let knows = bits.any(here) || clean.check_part(sector, bytes).is_ok();
                assert!(knows, "{} has missed sector {sector}", known.name);
            }
        }
    }

    /// Opens what is left of the image after an end in a graph of its own, and once more as if that one ended at once:
    /// nobody writes, or only somebody who does not know of the bitmaps.
    async fn check_left(&self, end: End, seed: u64) {
        let mut rng = Rng::new(seed ^ 0xbeef);
        let mut left = Left::of(&self.setup.layers[0], end, seed);
        let lasts = left.home.is_some() || self.setup.cluster >= ROOMY;
        // Who was cut off while he closed an image without room for notes may have been done with the bitmaps, or not.
        let mut is_good = Some(end == End::Still || lasts).filter(|good| *good || !self.closing);
        // A raw disk of another length is not the one that the bitmaps are of; and the file beside may have failed for
        // good.
        if (self.resizing || self.faulty) && left.home.is_some() {
            is_good = None;
        }
        for round in 0..2 {
            if let Some(home) = left.home.as_ref().filter(|_| rng.one_in(5)) {
                home.somebody_writes().await;
                is_good = Some(false);
            }
            let image = left.open().await;
            let graph = Graph::new();
            let node = add_node(&graph, new_node("A", &left.disk, image, None, false)).await;
            let root = add_user(&graph, node, Perms::CONSISTENT_READ | Perms::WRITE).await;
            let all = Iov::scratch(usize::try_from(self.setup.sectors * SECTOR).unwrap());
            root.read(ByteRange::between(0, self.setup.sectors * SECTOR), all.clone()).await.unwrap();
            let plan = graph.plan();
            let find = |known: &Known| -> Option<&PlanBitmap> {
                let found = plan.bitmap(node, &known.name).ok().filter(|_| known.persistent);
                let is_as_expected =
                    |found: &PlanBitmap| is_good.is_none_or(|good| found.inconsistent != good);
                assert!(found.is_none_or(is_as_expected), "{}: {is_good:?}", known.name);
                let may_be_gone = is_good != Some(true) || !known.persistent || known.clean.is_none();
                assert!(found.is_some() || may_be_gone, "{} is gone", known.name);
                found.filter(|found| !found.inconsistent)
            };
            self.check(&all.to_vec(), |known| find(known).map(|found| &*found.bits));
            let end = rng.pick(&[End::Cut, End::Killed]);
            is_good = if lasts { is_good } else { Some(false) };
            left = left.after(end, seed + round);
        }
    }

    /// Takes the disk out of its graph.
    async fn close(&self) {
        let close = |plan: &mut Plan| {
            plan.remove_root(self.guests.root.id());
            plan.node_mut(self.node).monitor_owned = false;
            Ok(())
        };
        let closed = self.setup.graph.change(close).await;
        if !self.setup.power.is_cut() {
            closed.unwrap();
            assert_eq!(self.setup.graph.plan().nodes().count(), 0);
        }
    }
}

async fn play(seed: u64, faulty: bool) {
    let mut rng = Rng::new(seed);
    let setup = build(&mut rng, 1, SIZE).await;
    let cut = rng.one_in(2);
    let mut guests = Guests::new(&setup, cut || faulty);
    // The last cluster need not be the last for ever.
    guests.compress &= (setup.sectors * SECTOR).is_multiple_of(setup.cluster);
    let node = setup.layers[0].node;
    setup.graph.let_bitmaps_last();
    let mut lab =
        Lab { setup, guests, node, bitmaps: Vec::new(), faulty, added: 0, closing: false, resizing: false };
    let mut running = lab.guests.start(&mut rng, 2, 150);
    if cut {
        lab.setup.cut_after(Duration::from_micros(rng.below(60_000)), &lab.guests);
    }
    for _ in 0..4 + rng.below(12) {
        rt::sleep(Duration::from_micros(rng.below(6000))).await;
        if faulty {
            lab.trouble(&mut rng);
        }
        lab.step(&mut rng).await;
    }
    running.stop().await;
    if faulty {
        lab.disks().iter().for_each(|disk| mend(disk));
    }
    let is_cut = lab.setup.power.is_cut();
    if !lab.is_over() {
        let all = Iov::scratch(usize::try_from(lab.setup.sectors * SECTOR).unwrap());
        lab.guests.root.read(ByteRange::between(0, lab.setup.sectors * SECTOR), all.clone()).await.unwrap();
        let plan = lab.setup.graph.plan();
        lab.check(&all.to_vec(), |known| plan.bitmap(node, &known.name).ok().map(|found| &*found.bits));
        if rng.one_in(2) {
            if rng.one_in(2) {
                let (power, time) = (lab.setup.power.clone(), rng.below(20_000));
                drop(rt::spawn(async move {
                    rt::sleep(Duration::from_micros(time)).await;
                    power.cut();
                }));
            }
            lab.closing = true;
            lab.close().await;
            let end = if lab.setup.power.is_cut() { End::Cut } else { End::Still };
            return lab.check_left(end, seed).await;
        }
    }
    lab.setup.power.cut();
    for round in 0..3 {
        let end = if is_cut || round > 0 { End::Cut } else { End::Killed };
        lab.check_left(end, seed.wrapping_mul(3) + round).await;
    }
}

#[test]
fn bitmaps_miss_nothing() {
    run_seeds(100, |seed| play(seed, false));
}

#[test]
fn bitmaps_miss_nothing_when_disks_fail() {
    run_seeds(100, |seed| play(seed, true));
}

//! Several clients at once, on one graph that guests write to: they start jobs of all kinds, take snapshots, come as
//! users and go, put filters in, make bitmaps persistent, and do to all jobs what clients do, in any order. Most of it
//! is refused. The guests always read what they wrote; when all jobs have ended nothing of them is left in the graph, and
//! when the graph has ended no image has a wrong refcount, nor a cluster that leaks.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use underlay_drivers::filter::copy_before_write::CbwOptions;
use underlay_drivers::filter::copy_on_read::CopyOnRead;
use underlay_graph::bitmaps::{Forget, NewBitmap};
use underlay_graph::graph::LastStep;
use underlay_graph::plan::NodeOptions;
use underlay_graph::{
    BackingRef, ByteRange, Graph, GraphError, Kind, NewNode, NodeId, NodeName, Perms, Plan, Role, RootId,
    View, Wiring,
};
use underlay_jobs::{
    BackingNames, BackupArgs, BackupSync, BackupTarget, CommitArgs, EventSink, JobError, JobEvent, Jobs,
    MirrorArgs, Settings, Started, StreamArgs, StreamEnd, SyncMode, Target,
};
use underlay_qcow2::{CreateOptions, Fix, Qcow2, check, create};
use underlay_sim::{Disk, Power, Rng, run_seeds};
use underlay_sys::{Iov, rt};

use crate::guests::{Guests, Running};
use crate::lab::{
    Layer, SMALL, Setup, build, create_options, mend, new_node, open_left, open_options, reopen,
};
use crate::target::policy;

/// What a client could not do.
#[derive(Debug)]
struct Refused;

impl From<GraphError> for Refused {
    fn from(_: GraphError) -> Self {
        Self
    }
}

impl From<JobError> for Refused {
    fn from(_: JobError) -> Self {
        Self
    }
}

struct Quiet;

impl EventSink for Quiet {
    fn emit(&self, _event: JobEvent) {}
}

/// What the clients share.
struct Crowd {
    graph: Arc<Graph>,
    jobs: Arc<Jobs>,
    guest: RootId,
    setup: Setup,
    /// Images that came later.
    later: Mutex<Vec<Layer>>,
    users: Mutex<Vec<RootId>>,
    numbers: AtomicU64,
    /// The power or a disk may fail.
    troubled: bool,
    /// What was heard of nodes and images that could not be closed well.
    trouble: Arc<Mutex<Vec<String>>>,
}

fn names() -> BackingNames {
    Arc::new(|_: &View, base: &View| base.name().to_string())
}

impl Crowd {
    fn new(setup: Setup, troubled: bool) -> Arc<Self> {
        let trouble = Arc::<Mutex<Vec<String>>>::default();
        let told = trouble.clone();
        setup.graph.on_trouble(move |text| told.lock().unwrap().push(text.to_owned()));
        setup.graph.let_bitmaps_last();
        Arc::new(Self {
            graph: setup.graph.clone(),
            jobs: Jobs::new(Arc::new(Quiet)),
            guest: setup.guest.id(),
            setup,
            later: Mutex::default(),
            users: Mutex::default(),
            numbers: AtomicU64::new(0),
            troubled,
            trouble,
        })
    }

    /// The jobs and the nodes, for the log of a seed that fails.
    fn wiring(&self) -> String {
        let plan = self.graph.plan();
        let name = |id| plan.node(id).name.to_string();
        let mut text = format!("{:?}", self.jobs);
        for (id, node) in plan.nodes().filter(|(_, node)| node.node.kind() != Kind::Protocol) {
            let below: Vec<_> = node.children.iter().map(|(role, id)| (role.as_str(), name(*id))).collect();
            let users: Vec<_> = plan.roots_of(id).map(|(_, root)| (&root.user, root.role)).collect();
            let (driver, access) =
                (node.node.driver(), if node.read_only { "read-only" } else { "writable" });
            text += &format!(
                "\n  {} ({driver}, {access}) {:?} above {below:?}, used by {users:?}",
                node.name, node.busy
            );
        }
        text
    }

    /// Any image or filter.
    fn node(&self, rng: &mut Rng) -> NodeId {
        let plan = self.graph.plan();
        let all = plan.nodes().filter(|(_, node)| node.node.kind() != Kind::Protocol);
        rng.pick(&all.map(|(id, _)| id).collect::<Vec<_>>())
    }

    /// One that is likely to have a chain below it: the guest's, or any.
    fn disk(&self, rng: &mut Rng) -> NodeId {
        let plan = self.graph.plan();
        match rng.one_in(2) {
            true => plan.skip_implicit(plan.root(self.guest).unwrap().node),
            false => self.node(rng),
        }
    }

    fn settings(&self, rng: &mut Rng) -> Settings {
        Settings {
            id: Some(format!("j{}", rng.below(4))),
            speed: rng.pick(&[0, 0, 1 << 20]),
            auto_finalize: !rng.one_in(4),
            auto_dismiss: !rng.one_in(4),
            on_error: policy(rng),
            ..Settings::default()
        }
    }

    fn filter_name(&self, rng: &mut Rng) -> Option<String> {
        rng.one_in(2).then(|| format!("f{}", self.numbers.fetch_add(1, Ordering::Relaxed)))
    }

    /// Nothing goes wrong by itself.
    fn fine<T, E: Debug>(&self, result: Result<T, E>) -> Result<T, Refused> {
        match self.troubled {
            true => result.map_err(|_| Refused),
            false => Ok(result.unwrap()),
        }
    }

    /// A new image, as long as a node is, on the image `below`; its header says that it is on the image `named`.
    async fn image(
        &self,
        like: NodeId,
        below: Option<NodeId>,
        named: Option<NodeId>,
        rng: &mut Rng,
    ) -> Result<NewNode, Refused> {
        let plan = self.graph.plan();
        plan.get(like).ok_or(Refused)?;
        let backing = named.map(|id| {
            let image = plan.node(plan.skip_filters(id));
            BackingRef { file: image.name.to_string(), format: Some(image.node.driver().to_owned()) }
        });
        let size = plan.wires().view(like).cx().length();
        let name: &str = format!("n{}", self.numbers.fetch_add(1, Ordering::Relaxed)).leak();
        let cluster = rng.pick(&[512, 4096, 65536]);
        let made = Disk::new(Vec::new(), rng.number(), Power::until(u64::MAX));
        let options = CreateOptions { backing, ..create_options(rng, cluster, size) };
        create(&View::detached(made.clone(), []).cx(), &options).await.unwrap();
        let disk = Disk::new(made.content(), rng.number(), self.setup.power.clone());
        let file = View::detached(disk.clone(), []);
        let image = Qcow2::open(&file.cx(), open_options(rng)).await;
        let image = Arc::new(self.fine(image)?);
        let layer = Layer { name, disk: disk.clone(), node: NodeId::DETACHED, raw: false, home: None };
        self.later.lock().unwrap().push(layer);
        Ok(new_node(name, &disk, image, below, false))
    }

    async fn stream(&self, rng: &mut Rng) -> Result<Started, Refused> {
        let (top, other) = (self.disk(rng), self.node(rng));
        let end = rng.pick(&[StreamEnd::Whole, StreamEnd::Above(other), StreamEnd::Bottom(other)]);
        let args = StreamArgs {
            settings: self.settings(rng),
            top,
            end,
            backing_file: None,
            backing_mask_protocol: false,
            filter_node_name: self.filter_name(rng),
            names: names(),
        };
        Ok(self.jobs.stream(&self.graph, args).await?)
    }

    async fn commit(&self, rng: &mut Rng) -> Result<Started, Refused> {
        let (device, top) = (self.disk(rng), rng.one_in(2).then(|| self.node(rng)));
        let base = rng.one_in(2).then(|| self.node(rng));
        {
            // Who commits something else into the guest's disk wants it to be something else.
            let plan = self.graph.plan();
            let guests = plan.root(self.guest).unwrap().node;
            let base = base.or_else(|| plan.chain(device).last());
            let is_of_guest = base.is_some_and(|base| plan.reachable(guests).contains(&base));
            if is_of_guest && plan.skip_implicit(guests) != device {
                return Err(Refused);
            }
        }
        let args = CommitArgs {
            settings: self.settings(rng),
            device,
            top,
            base,
            backing_file: None,
            backing_mask_protocol: false,
            filter_node_name: self.filter_name(rng),
            names: names(),
        };
        Ok(self.jobs.commit(&self.graph, args).await?)
    }

    async fn mirror(&self, rng: &mut Rng) -> Result<Started, Refused> {
        let source = self.disk(rng);
        let node = Box::new(self.image(source, None, None, rng).await?);
        let args = MirrorArgs {
            settings: Settings { on_target_error: Some(policy(rng)), ..self.settings(rng) },
            source,
            target: Target::New { node, backing: None },
            replaces: None,
            sync: SyncMode::Full,
            granularity: None,
            buf_size: None,
            write_blocking: rng.one_in(2),
            target_is_zero: rng.one_in(2),
            target_is_new: true,
            unmap: rng.one_in(2),
            filter_node_name: self.filter_name(rng),
        };
        Ok(self.jobs.mirror(&self.graph, args).await?)
    }

    async fn backup(&self, rng: &mut Rng) -> Result<Started, Refused> {
        let source = self.disk(rng);
        let sync = rng.pick(&[BackupSync::Full, BackupSync::Top, BackupSync::None]);
        let below = (sync == BackupSync::None && rng.one_in(2)).then_some(source);
        let args = BackupArgs {
            settings: self.settings(rng),
            source,
            target: BackupTarget::New(Box::new(self.image(source, below, below, rng).await?)),
            sync,
            bitmap: None,
            how: CbwOptions::default(),
            most_in_flight: rng.pick(&[1, 4, 64]),
            filter_node_name: self.filter_name(rng),
        };
        Ok(self.jobs.backup(&self.graph, args).await?)
    }

    async fn start(&self, job: impl Future<Output = Result<Started, Refused>>) -> Result<(), Refused> {
        let started = job.await?;
        drop(rt::spawn(started.task));
        Ok(())
    }

    async fn snapshot(&self, rng: &mut Rng) -> Result<(), Refused> {
        let disk = self.disk(rng);
        let image = self.image(disk, None, Some(disk), rng).await?;
        let edit = |plan: &mut Plan| {
            let node = plan.get(disk).filter(|node| node.busy.is_none());
            let is_below = plan
                .parents(disk)
                .any(|(parent, role)| role == Role::Backing && plan.node(parent).node.kind() != Kind::Filter);
            node.filter(|_| !is_below).ok_or_else(|| GraphError::new("busy"))?;
            let overlay = plan.add(image)?;
            plan.put_on_top(disk, overlay)
        };
        Ok(self.graph.change(edit).await?)
    }

    /// Somebody reads a node for a while.
    async fn come(&self, rng: &mut Rng) -> Result<(), Refused> {
        let node = self.node(rng);
        let shared = Perms::ALL.without(Perms::RESIZE);
        let root = underlay_graph::plan::NewRoot {
            user: "reader".into(),
            role: "root",
            node,
            required: Perms::CONSISTENT_READ,
            shared,
            pinned: false,
            drained: None,
        };
        let edit = |plan: &mut Plan| match plan.get(node) {
            Some(_) => Ok(plan.add_root(root)),
            None => Err(GraphError::new("gone")),
        };
        let id = self.graph.change(edit).await?;
        self.users.lock().unwrap().push(id);
        let root = self.graph.root(id).ok_or(Refused)?;
        let length = root.length().await.map_err(|_| Refused)?;
        let at = rng.below(length / 512) * 512;
        let read = root.read(ByteRange::between(at, at + 512), Iov::scratch(512)).await;
        // The node may have gone with its disk.
        if self.graph.root(id).is_some() { self.fine(read) } else { Ok(()) }
    }

    async fn go(&self, rng: &mut Rng) -> Result<(), Refused> {
        let id = {
            let mut users = self.users.lock().unwrap();
            if users.is_empty() {
                return Err(Refused);
            }
            let at = rng.index(users.len());
            users.swap_remove(at)
        };
        let edit = |plan: &mut Plan| {
            plan.remove_root(id);
            Ok(())
        };
        Ok(self.graph.change(edit).await?)
    }

    /// A filter above a node, of which its other users know nothing.
    async fn filter(&self, rng: &mut Rng) -> Result<(), Refused> {
        let (below, bottom) = (self.node(rng), rng.one_in(2).then(|| self.node(rng)));
        let name = format!("f{}", self.numbers.fetch_add(1, Ordering::Relaxed));
        let edit = |plan: &mut Plan| {
            let gone = || GraphError::new("gone");
            plan.get(below).ok_or_else(gone)?;
            let bottom = bottom.map(|id| plan.get(id).map(|node| node.name.clone()).ok_or_else(gone));
            let bottom = bottom.transpose()?;
            // As its options are checked when it is opened.
            let mut chain = plan.chain(below);
            if bottom.as_ref().is_some_and(|bottom| !chain.any(|id| plan.node(id).name == *bottom)) {
                return Err(gone());
            }
            drop(chain);
            let id = plan.add(NewNode {
                name: NodeName::new(&name),
                node: Arc::new(CopyOnRead::new(bottom)),
                read_only: false,
                options: NodeOptions::default(),
                children: vec![(Role::File, Wiring::Existing(below))],
            })?;
            plan.node_mut(id).monitor_owned = true;
            Ok(())
        };
        Ok(self.graph.change(edit).await?)
    }

    async fn delete(&self, rng: &mut Rng) -> Result<(), Refused> {
        let id = self.node(rng);
        let edit = |plan: &mut Plan| {
            let is_used = plan.roots_of(id).next().is_some() || plan.parents(id).next().is_some();
            if plan.get(id).is_none_or(|node| node.busy.is_some()) || is_used {
                return Err(GraphError::new("in use"));
            }
            plan.node_mut(id).monitor_owned = false;
            Ok(())
        };
        Ok(self.graph.change(edit).await?)
    }

    async fn bitmap(&self, rng: &mut Rng) -> Result<(), Refused> {
        let (id, name) = (self.node(rng), rng.pick(&["a", "b"]));
        let persistent = rng.one_in(2);
        let new = NewBitmap { name, granularity: None, persistent, enabled: true };
        let is_new = rng.one_in(2);
        let edit = |plan: &mut Plan| {
            let node = plan.get(id).ok_or_else(|| GraphError::new("gone"))?;
            if is_new {
                return Ok((plan.add_bitmap(id, &new)?, None));
            }
            let bitmap = node.bitmaps.iter().find(|bitmap| *bitmap.name == *name && !bitmap.busy);
            let bitmap = bitmap.ok_or_else(|| GraphError::new("no bitmap"))?;
            let step = bitmap.persistent.then(|| Box::new(Forget(vec![(id, name.to_owned())])));
            plan.drop_bitmap(id, name);
            Ok(((), step.map(|step| step as Box<dyn LastStep>)))
        };
        Ok(self.graph.change_with(edit).await?)
    }

    /// What clients do to jobs.
    async fn manage(&self, rng: &mut Rng) -> Result<(), Refused> {
        let job = self.jobs.job(&format!("j{}", rng.below(4)))?;
        match rng.below(9) {
            0 => job.pause()?,
            1 => job.resume()?,
            2 => job.set_speed(rng.pick(&[0, 1 << 20]))?,
            3 => job.cancel()?,
            4 => job.block_cancel(rng.one_in(2))?,
            5 | 6 => job.complete()?,
            7 => job.finalize().await?,
            _ => self.jobs.dismiss(&job).await?,
        }
        Ok(())
    }

    async fn act(&self, rng: &mut Rng) -> Result<(), Refused> {
        match rng.below(22) {
            0 | 1 => self.start(self.stream(rng)).await,
            2 | 3 => self.start(self.commit(rng)).await,
            4 => self.start(self.mirror(rng)).await,
            5 | 6 => self.start(self.backup(rng)).await,
            7..=9 => self.snapshot(rng).await,
            10 => self.come(rng).await,
            11 => self.go(rng).await,
            12 => self.filter(rng).await,
            13 => self.delete(rng).await,
            14 | 15 => self.bitmap(rng).await,
            _ => self.manage(rng).await,
        }
    }

    /// What the image of that name shows after a power cut, with the images that the headers name.
    async fn reopen(&self, seed: u64, name: &str) -> Vec<u8> {
        reopen(&self.layers(), name, self.setup.sectors, seed).await
    }

    /// All images that there ever were.
    fn layers(&self) -> Vec<Layer> {
        self.setup.layers.iter().chain(&*self.later.lock().unwrap()).cloned().collect()
    }

    /// All jobs end, and everybody but the guest goes.
    async fn disperse(&self) {
        self.jobs.cancel_all().await;
        assert!(self.jobs.query().is_empty(), "{:?}", self.jobs);
        let users = std::mem::take(&mut *self.users.lock().unwrap());
        let is_filter = |plan: &Plan, id| plan.node(id).node.driver() == "copy-on-read";
        let edit = |plan: &mut Plan| {
            users.iter().for_each(|id| plan.remove_root(*id));
            let filters: Vec<_> = plan.nodes().map(|(id, _)| id).filter(|id| is_filter(plan, *id)).collect();
            for id in filters {
                plan.take_out(id);
                plan.node_mut(id).monitor_owned = false;
            }
            Ok(())
        };
        self.graph.change(edit).await.unwrap();
        self.setup.check_no_job_is_left();
        let plan = self.graph.plan();
        for (_, node) in plan.nodes() {
            assert!(node.busy.is_none() && !node.frozen, "{} is marked", node.name);
        }
        assert_eq!(plan.roots().count(), 1, "somebody is left");
    }

    /// The graph ends, and the images are looked at.
    async fn close(&self) {
        let edit = |plan: &mut Plan| {
            plan.remove_root(self.guest);
            let all: Vec<_> = plan.nodes().map(|(id, _)| id).collect();
            all.into_iter().for_each(|id| plan.node_mut(id).monitor_owned = false);
            Ok(())
        };
        self.graph.change(edit).await.unwrap();
        assert_eq!(self.graph.plan().nodes().count(), 0);
        let trouble = self.trouble.lock().unwrap().clone();
        let is_expected = |text: &String| self.troubled || text.starts_with("Lost persistent bitmaps");
        assert!(trouble.iter().all(is_expected), "{trouble:?}");
        for Layer { name, disk, .. } in self.layers().into_iter().filter(|layer| !layer.raw) {
            let file = View::detached(disk, []);
            let mut findings = Vec::new();
            let found = check(&file.cx(), Fix::None, &mut |finding| findings.push(finding)).await.unwrap();
            let leaks = if self.troubled { 0 } else { found.leaks };
            assert_eq!((found.corruptions, found.check_errors, leaks), (0, 0, 0), "{name}: {findings:?}");
        }
    }
}

/// A crowd at work, with guests: all that each of them does is given up with the world.
async fn gather(rng: &mut Rng, troubled: bool) -> (Arc<Crowd>, Running, Vec<rt::JoinHandle<()>>) {
    let length = 1 + rng.index(4);
    let setup = build(rng, length, SMALL).await;
    let mut guests = Guests::new(&setup, troubled);
    guests.compress = false;
    let crowd = Crowd::new(setup, troubled);
    let running = guests.start(rng, 2, 400);
    let client = |seed| {
        let crowd = crowd.clone();
        rt::spawn(async move {
            let mut rng = Rng::new(seed);
            for _ in 0..30 {
                if crowd.setup.power.is_cut() {
                    return;
                }
                if crowd.act(&mut rng).await.is_ok() {
                    println!("{}", crowd.wiring());
                }
                rt::sleep(Duration::from_micros(rng.below(1000))).await;
            }
        })
    };
    let clients = (0..3).map(|_| client(rng.number())).collect();
    (crowd, running, clients)
}

async fn crowd(seed: u64) {
    let mut rng = Rng::new(seed);
    let (crowd, mut running, clients) = gather(&mut rng, false).await;
    for client in clients {
        client.await;
    }
    crowd.disperse().await;
    running.stop().await;
    running.guests.verify().await;
    crowd.close().await;
}

/// A disk fails or fills up for a while.
async fn faults(seed: u64) {
    let mut rng = Rng::new(seed);
    let (crowd, mut running, clients) = gather(&mut rng, true).await;
    rt::sleep(Duration::from_micros(rng.below(10_000))).await;
    let layers = crowd.layers();
    let broken = &layers[rng.index(layers.len())].disk;
    crowd.setup.break_disk(broken, &mut rng);
    rt::sleep(Duration::from_micros(rng.below(20_000))).await;
    mend(broken);
    for client in clients {
        client.await;
    }
    crowd.disperse().await;
    running.stop().await;
    let guests = running.guests.on_sound_disks();
    guests.verify().await;
    guests.start(&mut rng, 2, 10).done().await;
    guests.verify().await;
    crowd.close().await;
}

/// The power goes in the midst of it: every flushed write is where the headers lead to, and all images are sound.
async fn power(seed: u64) {
    let mut rng = Rng::new(seed);
    let (crowd, mut running, clients) = gather(&mut rng, true).await;
    rt::sleep(Duration::from_micros(rng.below(30_000))).await;
    crowd.setup.power.cut();
    running.stop().await;
    let plan = crowd.graph.plan();
    let top = plan.skip_filters(plan.root(crowd.guest).unwrap().node);
    let bytes = crowd.reopen(seed, &plan.node(top).name.to_string()).await;
    running.guests.model().check_after_cut(&bytes).unwrap();
    for layer in crowd.layers().iter().filter(|layer| !layer.raw) {
        open_left(layer, seed).await;
    }
    drop(clients);
}

#[test]
fn a_crowd_leaves_nothing_behind() {
    run_seeds(350, crowd);
}

#[test]
fn a_crowd_on_failing_disks_leaves_nothing_behind() {
    run_seeds(350, faults);
}

#[test]
fn a_crowd_loses_nothing_with_the_power() {
    run_seeds(350, power);
}

//! blockdev-mirror: copies a disk to another node, keeps the copy in step with what the guest writes, and at the end
//! either moves the guest there (complete) or leaves a copy of that moment (cancel). Source: `design/qemu-surface.md`
//! 6.3, 5.4.
//!
//! A dirty bitmap remembers what has to be copied: at first what `sync` says, then what the guest writes. A range is
//! taken out of the bitmap *before* it is read, and a write puts it in *after* it is done, so nothing is missed. In the
//! copy mode `write-blocking` the filter above the source ([`crate::mirror_top`]) copies the guest's writes itself.
//! Whole granules are copied, as the guest sees them: where nothing but zeroes shows, nothing is read, and where the
//! target shows zeroes already, nothing is written.

use std::sync::Arc;

use async_trait::async_trait;
use underlay_graph::bitmap::DirtyBitmap;
use underlay_graph::graph::LastStep;
use underlay_graph::plan::{NewRoot, Wires};
use underlay_graph::range_lock::Mode;
use underlay_graph::reflink::Reflinks;
use underlay_graph::root::Drained;
use underlay_graph::status::{Status, status};
use underlay_graph::view::Tracker;
use underlay_graph::{
    ByteRange, Cx, Graph, GraphError, IoError, Kind as NodeKind, NewNode, Node, NodeId, Perms, Plan, Role,
    Root, RootId, WriteFlags, ZeroFlags,
};
use underlay_sys::buffers::Buffers;

use crate::chain::{self, Claim, wrong};
use crate::commit::{check_root, overlays};
use crate::copy::{self, Copier, Fault, Ignored, Step};
use crate::error::{JobError, Stop};
use crate::filter;
use crate::follow::{self, Follow, NAP};
use crate::job::{HeldBack, Job};
use crate::jobs::{Jobs, Started, Work};
use crate::mirror_top::{MirrorTop, Tracked};
use crate::settings::{Kind, Settings};

/// Bytes in one copy. Source: QEMU's, seen in the `offset` of a slow job.
const CHUNK: u64 = 1 << 20;
/// The source is looked at in steps of so many bytes, as the job may be cancelled.
const STRIDE: u64 = 1 << 40;

/// What is copied at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncMode {
    /// The whole disk.
    Full,
    /// What the source's own layer has.
    Top,
    /// Nothing: only what is written from now on.
    None,
}

/// Where to copy to.
#[derive(Debug)]
pub enum Target {
    /// A node of the graph.
    Existing(NodeId),
    /// A node that comes with the job.
    New {
        /// The node, without what is below it.
        node: Box<NewNode>,
        /// What gets below it when the users are switched over to it.
        backing: Option<NodeId>,
    },
}

/// What blockdev-mirror and drive-mirror ask for, with their names resolved.
#[derive(Debug)]
pub struct MirrorArgs {
    /// What all jobs have.
    pub settings: Settings,
    /// `device`: the disk that is copied.
    pub source: NodeId,
    /// `target`
    pub target: Target,
    /// `replaces`: the node in whose place the target comes; the source by default.
    pub replaces: Option<NodeId>,
    /// `sync`
    pub sync: SyncMode,
    /// `granularity`, in bytes; by default the target's cluster size between 4 and 64 KiB.
    pub granularity: Option<u32>,
    /// `buf-size`: bytes that may be on their way; checked, but our own engine decides.
    pub buf_size: Option<i64>,
    /// `copy-mode=write-blocking`
    pub write_blocking: bool,
    /// `target-is-zero`
    pub target_is_zero: bool,
    /// The target was made just now, and reads as zeroes where its nodes say so
    /// ([`underlay_graph::Node::unwritten_is_zero`]).
    pub target_is_new: bool,
    /// `unmap`: zeroes may be holes at the target.
    pub unmap: bool,
    /// `filter-node-name`
    pub filter_node_name: Option<String>,
}

impl Jobs {
    /// Starts a mirror.
    pub async fn mirror(self: &Arc<Self>, graph: &Arc<Graph>, args: MirrorArgs) -> Result<Started, JobError> {
        let granularity = check(&graph.wires(), &args)?;
        let wires = graph.wires();
        // What is only a part of the disk gets the rest below it some day, if not now.
        let is_part = args.sync != SyncMode::Full;
        let about = |node: &dyn Node, has_backing: bool| {
            let is_based = node.backing_ref().is_some() || is_part && node.supports_backing();
            (node.image_info().cluster_size, is_based && !has_backing)
        };
        let (cluster, unbacked) = match &args.target {
            Target::Existing(id) => {
                let view = wires.view(*id);
                let cx = view.cx().skip_filters();
                about(cx.node(), cx.backing().is_some())
            }
            Target::New { node, .. } => {
                about(&*node.node, node.children.iter().any(|(role, _)| *role == Role::Backing))
            }
        };
        let default = cluster.map_or(64 << 10, |cluster| cluster.clamp(4 << 10, 64 << 10));
        // A cluster that is only partly there would hide what will be below it.
        let least = cluster.filter(|_| unbacked).unwrap_or(0);
        let granularity = granularity.unwrap_or(default).max(least);
        let length = wires.view(args.source).cx().length();
        if !DirtyBitmap::fits(length, granularity) {
            return Err(wrong(format!("Granularity {granularity} is too small for {length} bytes")));
        }
        let id = self.choose_id(&args.settings)?;
        let job = self.draft(id, Kind::Mirror, &args.settings);
        let tracked = Tracked::new(length, granularity, unbacked, args.write_blocking);
        if let Target::Existing(id) = args.target {
            tracked.begin_with(wires.view(id).cx().doubts());
        }
        job.set_copy_mode(tracked.blocking.clone());
        let MirrorArgs { settings, source, target, replaces, sync, unmap, .. } = args;
        let (target_is_zero, target_is_new) = (args.target_is_zero, args.target_is_new);
        let name = args.filter_node_name.as_deref();
        let wired = graph.change(|plan| wire(plan, source, target, name, &job, &tracked)).await;
        let wiring = wired.map_err(|why| self.refused(&job, &settings, why))?;
        let (graph, of_job) = (graph.clone(), graph.clone());
        let (source, target) = (wiring.source, wiring.target);
        job.set_at_target(move |act| chain::at_target(&of_job.plan(), source, target, act));
        let means = Arc::new(Means::new(true));
        let mirror = Mirror {
            graph,
            replaces,
            sync,
            target_is_zero,
            target_is_new,
            unmap,
            wiring,
            tracked,
            means,
            switch: false,
        };
        self.launch(job, &settings, Box::new(mirror)).await
    }
}

/// What is wrong with the arguments, in the reference's order; or else the granularity, if one was asked for.
fn check(wires: &Wires, args: &MirrorArgs) -> Result<Option<u64>, JobError> {
    let plan = wires.plan();
    check_root(plan, args.source)?;
    let target = match args.target {
        Target::Existing(node) => node,
        // It has no node yet that could be wrong.
        Target::New { .. } => NodeId::DETACHED,
    };
    let is_new = target == NodeId::DETACHED;
    let granularity = check_granularity(args.granularity)?;
    if plan.get(args.source).is_none() || !is_new && plan.get(target).is_none() {
        return Err(wrong("The node was removed in the meantime".into()));
    }
    if !is_new && target != args.source {
        not_busy(plan, target)?;
    }
    check_replaces(wires, args)?;
    if args.buf_size.is_some_and(|size| size < 0) {
        return Err(wrong("Invalid parameter 'buf-size'".into()));
    }
    if args.source == target {
        return Err(wrong("Can't mirror node into itself".into()));
    }
    chain::check_free(plan, &[args.source])?;
    Ok(granularity)
}

/// Refuses a node with which a job is busy, or an overlay above it.
fn not_busy(plan: &Plan, id: NodeId) -> Result<(), JobError> {
    chain::check_free(plan, &[id])?;
    match overlays(plan, id).last() {
        Some(overlay) => {
            let (node, overlay) = (&plan.node(id).name, &plan.node(*overlay).name);
            Err(wrong(format!("Node '{node}' is busy: node is used as backing hd of '{overlay}'")))
        }
        None => Ok(()),
    }
}

/// The granularity, if there is one that can be.
pub fn check_granularity(granularity: Option<u32>) -> Result<Option<u64>, JobError> {
    match granularity.filter(|granularity| *granularity != 0) {
        Some(granularity) if !(512..=64 << 20).contains(&granularity) => {
            Err(wrong("Parameter 'granularity' expects a value in range [512B, 64MB]".into()))
        }
        Some(granularity) if !granularity.is_power_of_two() => {
            Err(wrong("Parameter 'granularity' expects a power of 2".into()))
        }
        granularity => Ok(granularity.map(u64::from)),
    }
}

/// Only a node that shows the same as the source may be replaced: the source, or one that it is a filter above.
fn check_replaces(wires: &Wires, args: &MirrorArgs) -> Result<(), JobError> {
    let Some(replaces) = args.replaces else { return Ok(()) };
    let plan = wires.plan();
    let name = |id| plan.get(id).map_or_else(String::new, |node| node.name.to_string());
    not_busy(plan, replaces)?;
    let filtered = |id: &NodeId| {
        let node = Some(plan.node(*id)).filter(|node| node.node.kind() == NodeKind::Filter)?;
        node.child(Role::File).or(node.child(Role::Backing))
    };
    if !std::iter::successors(Some(args.source), filtered).any(|id| id == replaces) {
        return Err(wrong(format!(
            "Cannot replace '{}' by a node mirrored from '{}', because it cannot be guaranteed that doing so would not lead to an abrupt change of visible data",
            name(replaces),
            name(args.source)
        )));
    }
    if wires.view(replaces).cx().length() != wires.view(args.source).cx().length() {
        return Err(wrong("cannot replace image with a mirror image of different size".into()));
    }
    Ok(())
}

/// What the job has put into the graph.
#[derive(Clone, Debug)]
struct Wiring {
    claim: Claim,
    source: NodeId,
    target: NodeId,
    /// What gets below the target when the users are switched over to it.
    backing: Option<NodeId>,
    filter: NodeId,
    /// On the filter; its children are reached through it.
    main: RootId,
    /// On the target, which is the job's alone.
    copy: RootId,
    tracker: Arc<dyn Tracker>,
}

fn wire(
    plan: &mut Plan,
    source: NodeId,
    target: Target,
    filter_name: Option<&str>,
    job: &Arc<Job>,
    tracked: &Arc<Tracked>,
) -> Result<Wiring, GraphError> {
    let (target, backing) = match target {
        Target::Existing(node) => (node, None),
        Target::New { node, backing } => (plan.add(*node)?, backing),
    };
    let mut claim = Claim::take(plan, Kind::Mirror, vec![source, target], Vec::new())?;
    if plan.node(target).read_only {
        return Err(GraphError::ReadOnly);
    }
    let tracker: Arc<dyn Tracker> = tracked.clone();
    plan.node_mut(source).trackers.push(tracker.clone());
    let children = [(Role::Backing, source), (Role::Target, target)];
    // A target that is based on the source goes on showing the source itself.
    let of_target = plan.reachable(target);
    let node = Arc::new(MirrorTop(tracked.clone()));
    let keep = |parent| of_target.contains(&parent);
    let filter = filter::insert(plan, node, &children, filter_name, |error| error, keep)?;
    claim.add_filter(plan, Kind::Mirror, filter);
    let mut root = |user, role, node, required, shared, drained| {
        plan.add_root(NewRoot { user, role, node, required, shared, pinned: true, drained })
    };
    let drained: Arc<dyn Drained> = Arc::new(HeldBack(job.clone()));
    let main = root(
        chain::user(Kind::Mirror, job.id()),
        "main node",
        filter,
        Perms::CONSISTENT_READ,
        Perms::ALL.without(Perms::RESIZE),
        Some(drained),
    );
    // Nobody else is to rely on what is there, or to change it. The job comes through the filter.
    let nobody = "an unnamed block device".to_owned();
    let copy = root(nobody, "root", target, Perms::WRITE, Perms::WRITE_UNCHANGED, None);
    Ok(Wiring { claim, source, target, backing, filter, main, copy, tracker })
}

/// The work of a mirror.
struct Mirror {
    graph: Arc<Graph>,
    replaces: Option<NodeId>,
    sync: SyncMode,
    target_is_zero: bool,
    target_is_new: bool,
    unmap: bool,
    wiring: Wiring,
    tracked: Arc<Tracked>,
    means: Arc<Means>,
    /// At the end, switch the users over.
    switch: bool,
}

impl Mirror {
    fn root(&self) -> Result<Root, Stop> {
        self.graph.root(self.wiring.main).ok_or(Stop::Cancelled)
    }

    async fn copying(&self) -> Result<Arc<Copying>, Stop> {
        let root = self.root()?;
        let length = root.length().await?;
        let (tracked, means) = (self.tracked.clone(), self.means.clone());
        Ok(Arc::new(Copying { root, length, tracked, means, unmap: self.unmap }))
    }

    /// Marks what has to be copied at first.
    async fn mark(&self, job: &Job, root: &Root, length: u64) -> Result<(), Stop> {
        let has_backing = self.graph.plan().backing(self.wiring.source).is_some();
        if self.sync == SyncMode::None {
            job.set_remaining(self.tracked.dirty.count());
            return Ok(());
        }
        let only_top = self.sync == SyncMode::Top && has_backing;
        let mut rest = ByteRange::between(0, length);
        while !rest.is_empty() {
            job.checkpoint().await?;
            let step = rest.split(STRIDE).0;
            let looked = {
                let inside = root.enter().await?;
                self.look(&inside.cx(), step, only_top).await
            };
            let (wanted, len) = match looked {
                Ok(looked) => looked,
                Err(error) => {
                    job.on_error(&error, true)?;
                    job.doze(NAP).await?;
                    continue;
                }
            };
            let (range, later) = rest.split(len);
            if wanted {
                self.tracked.dirty.set(range);
            }
            rest = later;
        }
        if !only_top && !self.target_is_zero {
            // QEMU counts the zeroes that need no copy, unless it knows that the target has nothing else.
            job.advance(length.saturating_sub(self.tracked.dirty.count()));
        }
        job.set_remaining(self.tracked.dirty.count());
        Ok(())
    }

    /// Whether the first bytes of `range` have to be copied, and for how many of them that is so.
    async fn look(&self, cx: &Cx<'_>, range: ByteRange, only_top: bool) -> Result<(bool, u64), IoError> {
        let source = MirrorTop::source(cx);
        let below = source.skip_filters().backing().filter(|_| only_top);
        let found = status(&source, range, below.map(|below| below.view().id())).await?;
        if only_top {
            return Ok((found.allocated, found.len));
        }
        if !found.zero || self.target_is_zero {
            return Ok((!found.zero, found.len));
        }
        let already = status(&MirrorTop::target(cx), range.split(found.len).0, None).await?;
        Ok((!shows_zero(&already, self.tracked.unbacked), already.len))
    }

    /// The target is as read-only as what it has replaced. Should it not become so, it stays as it is.
    async fn make_read_only(&self, job: &Job) {
        let edit = |plan: &mut Plan| {
            if plan.get(self.wiring.target).is_some() {
                plan.set_read_only(self.wiring.target, true);
            }
            Ok(((), None))
        };
        if let Err(error) = job.change(&self.graph, edit).await {
            tracing::warn!(?job, %error, "the target stays writable");
        }
    }

    /// Everything is copied, and the job's part in the graph is over.
    fn last_change(&self, plan: &mut Plan) -> Result<((), Option<Box<dyn LastStep>>), GraphError> {
        self.unwire(plan, &self.wiring.claim, self.switch)?;
        let Wiring { source, target, filter, .. } = self.wiring;
        let shows_source = self.switch && plan.reachable(target).contains(&source);
        let rest = CopyRest { tracked: self.tracked.clone(), filter, unmap: self.unmap, shows_source };
        Ok(((), Some(Box::new(rest))))
    }

    fn unwire(&self, plan: &mut Plan, claim: &Claim, switch: bool) -> Result<(), GraphError> {
        let Wiring { source, target, filter, main, copy, tracker, .. } = &self.wiring;
        plan.remove_root(*main);
        plan.remove_root(*copy);
        plan.node_mut(*source).trackers.retain(|other| !Arc::ptr_eq(other, tracker));
        claim.release(plan);
        if plan.get(*filter).is_none() {
            return Ok(());
        }
        let replaced = self.replaces.unwrap_or(*source);
        match switch && replaced == *source {
            true => plan.replace(*filter, *target, |_| false)?,
            false => plan.take_out(*filter),
        }
        // Also the source itself: somebody may have come to it past the filter.
        if switch && plan.get(replaced).is_some() {
            let of_target = plan.reachable(*target);
            plan.replace(replaced, *target, |parent| parent == *filter || of_target.contains(&parent))?;
        }
        match self.wiring.backing.filter(|backing| switch && plan.get(*backing).is_some()) {
            Some(backing) => plan.set_child(*target, Role::Backing, Some(backing)),
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Work for Mirror {
    async fn run(&mut self, job: &Arc<Job>) -> Result<(), Stop> {
        let root = self.root()?;
        let (length, of_target, unwritten_is_zero) = {
            let inside = root.enter().await?;
            let target = MirrorTop::target(&inside.cx());
            (inside.cx().length(), target.length(), target.unwritten_is_zero())
        };
        self.target_is_zero |= self.target_is_new && unwritten_is_zero;
        if length != of_target {
            return Err(Stop::Failed("Source and target image have different sizes".into()));
        }
        if self.sync == SyncMode::Full {
            // What it has lost since the job was made is noticed at the next flush all the same.
            MirrorTop::target(&root.enter().await?.cx()).forgive();
        }
        self.mark(job, &root, length).await?;
        let copying = self.copying().await?;
        self.switch = follow::until_ended(job, &Following { job, copying }).await?;
        Ok(())
    }

    async fn prepare(&mut self, job: &Arc<Job>) -> Result<(), Stop> {
        let replaced = self.replaces.unwrap_or(self.wiring.source);
        let was_read_only = self.switch && self.graph.plan().get(replaced).is_some_and(|node| node.read_only);
        loop {
            follow::catch_up(&Following { job, copying: self.copying().await? }).await?;
            let doubts = self.tracked.doubts();
            match job.change(&self.graph, |plan| self.last_change(plan)).await {
                // The target was lost meanwhile, and all of it is to be copied once more.
                Err(_) if self.tracked.doubts() != doubts => {}
                result => break result?,
            }
        }
        job.advance(self.tracked.take_copied());
        job.set_remaining(0);
        if was_read_only {
            self.make_read_only(job).await;
        }
        Ok(())
    }

    async fn abandon(&mut self, job: &Arc<Job>) {
        let edit = |plan: &mut Plan, claim: &Claim| {
            plan.give_up_content(self.wiring.target);
            self.unwire(plan, claim, false)
        };
        job.give_back(&self.graph, &self.wiring.claim, edit).await;
    }
}

/// The target on its way after the source.
struct Following<'a> {
    job: &'a Arc<Job>,
    copying: Arc<Copying>,
}

#[async_trait]
impl Follow for Following<'_> {
    async fn round(&self) -> Result<(), Stop> {
        let (job, copying) = (self.job, &self.copying);
        job.advance(copying.tracked.take_copied());
        job.set_remaining(self.left());
        copy::walk(job, copying, ByteRange::between(0, copying.length), Ignored::TryAgain).await?;
        job.set_remaining(self.left());
        job.set_synced(copying.tracked.is_blocking() && copying.tracked.dirty.is_clean());
        Ok(())
    }

    fn left(&self) -> u64 {
        self.copying.tracked.dirty.count()
    }

    async fn flush(&self) -> Result<bool, Stop> {
        loop {
            let (flushed, is_lost) = {
                let inside = self.copying.root.enter().await?;
                let target = MirrorTop::target(&inside.cx());
                (self.copying.tracked.flush(&target).await, target.doubts() > 0)
            };
            match flushed {
                Ok(kept) => return Ok(kept),
                Err(error) => copy::on_flush_error(self.job, &error, is_lost).await?,
            }
        }
    }
}

/// Copies what is dirty while the guest writes on.
struct Copying {
    root: Root,
    length: u64,
    tracked: Arc<Tracked>,
    means: Arc<Means>,
    unmap: bool,
}

/// What copies are made with.
struct Means {
    buffers: Buffers,
    reflinks: Reflinks,
}

impl Means {
    /// Storage is only shared `in_the_background`: who has just written something has it in memory.
    fn new(in_the_background: bool) -> Self {
        Self { buffers: Buffers::default(), reflinks: Reflinks::new(in_the_background) }
    }
}

#[async_trait]
impl Copier for Copying {
    async fn look(&self, range: ByteRange) -> Result<(Step, u64), Fault> {
        let granularity = self.tracked.dirty.granularity();
        let Some(run) = self.tracked.dirty.peek(range.start(), range.len().max(granularity)) else {
            return Ok((Step::Skip, range.len()));
        };
        let clean = range.before(run.start());
        if !clean.is_empty() {
            return Ok((Step::Skip, clean.len()));
        }
        let run = run.intersect(range);
        // Only to know how much can be done at once; the copy looks again.
        let inside = self.root.enter().await.map_err(Fault::read)?;
        let found = status(&MirrorTop::source(&inside.cx()), run, None).await.map_err(Fault::read)?;
        // Whole granules, as that is what gets clean.
        let len = found.len.next_multiple_of(granularity).min(run.len());
        Ok((if found.zero { Step::Zero } else { Step::Copy }, len))
    }

    async fn copy(&self, range: ByteRange, _: Step) -> Result<(), Fault> {
        let inside = self.root.enter().await.map_err(Fault::read)?;
        let _turn = self.tracked.turns.lock(range, Mode::Exclusive).await;
        // Clean before it is read: a write from now on makes it dirty again.
        self.tracked.dirty.clear(range);
        let result = copy_now(&inside.cx(), range, &self.means, self.how()).await;
        if result.is_err() {
            self.tracked.dirty.set(range);
        }
        result
    }

    fn counts_skipped(&self) -> bool {
        false
    }

    fn unit(&self) -> u64 {
        CHUNK.max(self.tracked.dirty.granularity())
    }

    fn stride(&self) -> u64 {
        self.unit().max(self.means.reflinks.stride())
    }
}

impl Copying {
    fn how(&self) -> HowToZero {
        HowToZero { unmap: self.unmap, unbacked: self.tracked.unbacked }
    }
}

/// Makes the target show in `range` what the source does. `cx` is at the filter.
async fn copy_now(cx: &Cx<'_>, mut rest: ByteRange, means: &Means, how: HowToZero) -> Result<(), Fault> {
    let (source, target) = (MirrorTop::source(cx), MirrorTop::target(cx));
    while !rest.is_empty() {
        let found = status(&source, rest, None).await.map_err(Fault::read)?;
        let (run, later) = rest.split(found.len);
        if found.zero {
            zero(&target, run, how).await.map_err(Fault::write)?;
            rest = later;
            continue;
        }
        let stride = means.reflinks.stride();
        let shared = run.split(stride).0;
        if stride > 0 && means.reflinks.copy(&source, shared, &target, shared.start()).await {
            rest = rest.split(shared.len()).1;
            continue;
        }
        let run = run.split(CHUNK).0;
        rest = rest.split(run.len()).1;
        let whole = means.buffers.take(run.buffer_len());
        let bytes = whole.slice(0, run.buffer_len());
        let result = match source.read(run, bytes.clone()).await {
            Ok(()) => target.write(run, bytes, WriteFlags::default()).await.map_err(Fault::write),
            Err(error) => Err(Fault::read(error)),
        };
        means.buffers.put(whole);
        result?;
    }
    Ok(())
}

/// How zeroes get to the target.
#[derive(Clone, Copy)]
struct HowToZero {
    /// As holes, perhaps.
    unmap: bool,
    /// See [`Tracked`].
    unbacked: bool,
}

/// Whether the target shows zeroes, and will when it has its backing node.
fn shows_zero(already: &Status, unbacked: bool) -> bool {
    already.zero && (already.allocated || !unbacked)
}

/// Zeroes what does not show zeroes yet.
async fn zero(target: &Cx<'_>, mut rest: ByteRange, how: HowToZero) -> Result<(), IoError> {
    while !rest.is_empty() {
        let already = status(target, rest, None).await?;
        let (run, later) = rest.split(already.len);
        rest = later;
        if !shows_zero(&already, how.unbacked) {
            target.write_zeroes(run, ZeroFlags { may_unmap: how.unmap, no_fallback: false }).await?;
        }
    }
    Ok(())
}

/// With all gates closed: copies what is still dirty, and makes it durable. The moment of no return.
struct CopyRest {
    tracked: Arc<Tracked>,
    filter: NodeId,
    unmap: bool,
    /// The users are switched over to a target that has the source below it. Their flushes will not reach the source
    /// any more, and what they have written there before must not wait for one.
    shows_source: bool,
}

#[async_trait]
impl LastStep for CopyRest {
    async fn run(self: Box<Self>, old: &Wires, _new: &Wires) -> Result<(), GraphError> {
        let filter = old.view(self.filter);
        let means = Means::new(false);
        let how = HowToZero { unmap: self.unmap, unbacked: self.tracked.unbacked };
        while let Some(range) = self.tracked.dirty.take(0, CHUNK) {
            copy_now(&filter.cx(), range, &means, how).await.map_err(|fault| fault.error)?;
        }
        if self.shows_source {
            MirrorTop::source(&filter.cx()).flush().await?;
        }
        match self.tracked.flush(&MirrorTop::target(&filter.cx())).await? {
            true => Ok(()),
            false => Err(IoError::EIO.into()),
        }
    }
}

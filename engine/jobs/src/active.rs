//! block-commit of the active layer: keeps `base` in step with what a guest writes to `top`, and moves the guest
//! there when asked. Source: `design/qemu-surface.md` 6.2, 5.4.
//!
//! A dirty bitmap on `top` remembers what has to be copied: at first what the images above `base` have, then what
//! the guest writes. A range is taken out of the bitmap *before* it is read, and a write puts it in *after* it is
//! done, so nothing is missed; two copies of the same range take turns, so that an old one never lands last.
//!
//! When it is ready, and how it ends: [`crate::follow`]. The switch closes the gates of all users, copies what is left
//! then, flushes the base and opens the gates onto it.

use std::sync::Arc;

use async_trait::async_trait;
use underlay_graph::bitmap::DirtyBitmap;
use underlay_graph::graph::LastStep;
use underlay_graph::plan::{NewRoot, Wires};
use underlay_graph::range_lock::{Mode, RangeLock};
use underlay_graph::status::status;
use underlay_graph::view::Tracker;
use underlay_graph::{
    ByteRange, Cx, Graph, GraphError, IoError, NodeId, Perms, Plan, Root, RootId, WriteFlags, ZeroFlags,
};
use underlay_sys::Iov;
use underlay_sys::buffers::Buffers;

use crate::chain::{self, Claim};
use crate::commit::{
    CommitArgs, Note, Part, Push, base_needs, chunk_unit, grow, grows, overlays, reopen, still_so,
};
use crate::copy::{self, CHUNK, Copier, Fault, Ignored, Step};
use crate::error::Stop;
use crate::filter::Pass;
use crate::follow::{self, Follow, NAP};
use crate::job::{HeldBack, Job};
use crate::jobs::Work;
use crate::settings::Kind;

/// Bytes per bit: less than QEMU's 64 KiB, so that a guest that writes at random makes less work than it does
/// itself, and the job catches up with it.
const GRANULARITY: u64 = 16 << 10;
/// Bits are set for so many bytes at once, as writes of the guest wait meanwhile.
const STRIDE: u64 = 128 << 20;

/// What the job has put into the graph.
#[derive(Clone, Debug)]
struct Wiring {
    claim: Claim,
    filter: NodeId,
    roots: Vec<RootId>,
    main: RootId,
    base: RootId,
    tracker: Arc<dyn Tracker>,
}

/// The work of an active commit.
pub(crate) struct Active {
    graph: Arc<Graph>,
    args: CommitArgs,
    part: Part,
    wiring: Wiring,
    dirty: Arc<DirtyBitmap>,
    /// At the end, switch the users over.
    switch: bool,
}

impl Active {
    /// Marks the chain and starts to track the guest's writes.
    pub(crate) async fn prepare_chain(
        graph: &Arc<Graph>,
        args: CommitArgs,
        part: Part,
        job: &Arc<Job>,
    ) -> Result<Self, GraphError> {
        let length = graph.wires().view(part.top).cx().length();
        let dirty = Arc::new(DirtyBitmap::new(length, GRANULARITY));
        let wiring = graph.change(|plan| wire(plan, graph, &args, &part, job, dirty.clone())).await?;
        Ok(Self { graph: graph.clone(), args, part, wiring, dirty, switch: false })
    }

    fn root(&self, id: RootId) -> Result<Root, Stop> {
        self.graph.root(id).ok_or(Stop::Cancelled)
    }

    /// Marks what the images above the base have.
    async fn mark_all(&self, job: &Job, top: &Root, length: u64) -> Result<(), Stop> {
        let mut rest = ByteRange::between(0, length);
        while !rest.is_empty() {
            job.checkpoint().await?;
            let looked = {
                let inside = top.enter().await?;
                status(&inside.cx(), rest.split(STRIDE).0, Some(self.part.base)).await
            };
            let found = match looked {
                Ok(found) => found,
                Err(error) => {
                    job.on_error(&error, true)?;
                    job.doze(NAP).await?;
                    continue;
                }
            };
            let (range, later) = rest.split(found.len);
            if found.allocated {
                self.dirty.set(range);
            }
            rest = later;
        }
        job.set_remaining(self.dirty.count());
        Ok(())
    }

    async fn mirror(&self) -> Result<Arc<Mirror>, Stop> {
        let (top, base) = (self.root(self.wiring.main)?, self.root(self.wiring.base)?);
        let length = top.length().await?;
        let unit = chunk_unit(base.enter().await?.cx());
        let push = Push { top, base, below: self.part.base, unit, buffers: Arc::new(Buffers::default()) };
        Ok(Arc::new(Mirror { push, length, dirty: self.dirty.clone(), turns: RangeLock::default() }))
    }

    /// Takes everything out of the plan again, but for the filter.
    fn let_go(&self, plan: &mut Plan, claim: &Claim) {
        let (wiring, part) = (&self.wiring, &self.part);
        wiring.roots.iter().for_each(|root| plan.remove_root(*root));
        plan.node_mut(part.top).trackers.retain(|tracker| !Arc::ptr_eq(tracker, &wiring.tracker));
        claim.release(plan);
    }

    /// The users of the top get to the base.
    fn switch_over(&self, plan: &mut Plan) -> Result<(), GraphError> {
        let (wiring, part) = (&self.wiring, &self.part);
        let mut claim = wiring.claim.clone();
        if !plan.node(part.top).read_only {
            claim.leave_writable(part.base);
        }
        self.let_go(plan, &claim);
        plan.replace(wiring.filter, part.base, |_| false)?;
        // Somebody may have come to it past the filter.
        plan.replace(part.top, part.base, |parent| parent == wiring.filter)?;
        claim.make_read_only_again(plan)
    }

    fn stay(&self, plan: &mut Plan, claim: &Claim) -> Result<(), GraphError> {
        self.let_go(plan, claim);
        plan.take_out(self.wiring.filter);
        claim.make_read_only_again(plan)
    }
}

#[async_trait]
impl Work for Active {
    async fn run(&mut self, job: &Arc<Job>) -> Result<(), Stop> {
        let top = self.root(self.wiring.main)?;
        grow(&self.graph, job, self.part.base, top.length().await?).await?;
        let mirror = self.mirror().await?;
        self.mark_all(job, &top, mirror.length).await?;
        self.switch = follow::until_ended(job, &Following { job, mirror }).await?;
        Ok(())
    }

    async fn prepare(&mut self, job: &Arc<Job>) -> Result<(), Stop> {
        follow::catch_up(&Following { job, mirror: self.mirror().await? }).await?;
        let mut overlays = overlays(&self.graph.plan(), self.part.top);
        if !self.switch {
            overlays.clear();
        }
        self.wiring.claim = reopen(&self.graph, job, self.wiring.claim.clone(), &overlays).await?;
        let edit = |plan: &mut Plan| {
            match self.switch {
                true => self.switch_over(plan)?,
                false => self.stay(plan, &self.wiring.claim)?,
            }
            let note = Note::new(&self.args, &self.part, overlays.clone());
            let rest = CopyRest { dirty: self.dirty.clone(), top: self.part.top, base: self.part.base, note };
            Ok(((), Some(Box::new(rest) as Box<dyn LastStep>)))
        };
        job.change(&self.graph, edit).await?;
        job.set_remaining(0);
        Ok(())
    }

    async fn abandon(&mut self, job: &Arc<Job>) {
        job.give_back(&self.graph, &self.wiring.claim, |plan, claim| self.stay(plan, claim)).await;
    }
}

/// The base on its way after the top.
struct Following<'a> {
    job: &'a Arc<Job>,
    mirror: Arc<Mirror>,
}

#[async_trait]
impl Follow for Following<'_> {
    async fn round(&self) -> Result<(), Stop> {
        let (job, mirror) = (self.job, &self.mirror);
        job.set_remaining(mirror.dirty.count());
        copy::walk(job, mirror, ByteRange::between(0, mirror.length), Ignored::TryAgain).await?;
        job.set_remaining(mirror.dirty.count());
        Ok(())
    }

    fn left(&self) -> u64 {
        self.mirror.dirty.count()
    }

    async fn flush(&self) -> Result<bool, Stop> {
        let base = &self.mirror.push.base;
        while let Err(error) = base.flush().await {
            let is_lost = base.enter().await?.cx().doubts() > 0;
            copy::on_flush_error(self.job, &error, is_lost).await?;
        }
        Ok(true)
    }
}

/// Copies what is dirty while the guest writes on.
struct Mirror {
    push: Push,
    length: u64,
    dirty: Arc<DirtyBitmap>,
    /// Copies of the same range take turns.
    turns: RangeLock,
}

#[async_trait]
impl Copier for Mirror {
    async fn look(&self, range: ByteRange) -> Result<(Step, u64), Fault> {
        let Some(run) = self.dirty.peek(range.start(), range.len().max(GRANULARITY)) else {
            return Ok((Step::Skip, range.len()));
        };
        let clean = range.before(run.start());
        if !clean.is_empty() {
            return Ok((Step::Skip, clean.len()));
        }
        let run = run.intersect(range);
        // Only to know how much can be done at once; the copy looks again.
        let inside = self.push.top.enter().await.map_err(Fault::read)?;
        let found = status(&inside.cx(), run, Some(self.push.below)).await.map_err(Fault::read)?;
        let bytes = !found.zero && found.allocated;
        // Whole granules, as that is what gets clean.
        let len = found.len.next_multiple_of(GRANULARITY).min(run.len());
        Ok((if bytes { Step::Copy } else { Step::Zero }, len))
    }

    async fn copy(&self, range: ByteRange, _: Step) -> Result<(), Fault> {
        let _turn = self.turns.lock(range, Mode::Exclusive).await;
        // Clean before it is read: a write from now on makes it dirty again.
        self.dirty.clear(range);
        let result = self.copy_now(range).await;
        if result.is_err() {
            self.dirty.set(range);
        }
        result
    }

    fn counts_skipped(&self) -> bool {
        false
    }

    fn unit(&self) -> u64 {
        self.push.unit
    }
}

impl Mirror {
    async fn copy_now(&self, mut rest: ByteRange) -> Result<(), Fault> {
        while !rest.is_empty() {
            let found = {
                let inside = self.push.top.enter().await.map_err(Fault::read)?;
                status(&inside.cx(), rest, Some(self.push.below)).await.map_err(Fault::read)?
            };
            let (mut run, later) = rest.split(found.len);
            rest = later;
            match (found.allocated, found.zero) {
                // What the base has shows anyway. It cannot have come to that from data of ours: nothing above the
                // base ever goes back to borrowing.
                (false, _) => {}
                (true, true) => self.push.copy(run, Step::Zero).await?,
                (true, false) => {
                    while !run.is_empty() {
                        let (chunk, more) = run.split(self.push.unit);
                        self.push.copy(chunk, Step::Copy).await?;
                        run = more;
                    }
                }
            }
        }
        Ok(())
    }
}

/// With all gates closed: copies what is still dirty, and makes it durable. The moment of no return.
struct CopyRest {
    dirty: Arc<DirtyBitmap>,
    top: NodeId,
    base: NodeId,
    note: Note,
}

#[async_trait]
impl LastStep for CopyRest {
    async fn run(self: Box<Self>, old: &Wires, new: &Wires) -> Result<(), GraphError> {
        let (top, base) = (old.view(self.top), old.view(self.base));
        while let Some(range) = self.dirty.take(0, 2 * CHUNK) {
            copy_still(&top.cx(), &base.cx(), self.base, range).await?;
        }
        base.cx().flush().await?;
        Box::new(self.note).run(old, new).await
    }
}

/// Copies what the images above `below` have, while nobody else can write there.
pub(crate) async fn copy_still(
    top: &Cx<'_>,
    base: &Cx<'_>,
    below: NodeId,
    mut rest: ByteRange,
) -> Result<(), IoError> {
    while !rest.is_empty() {
        let found = status(top, rest, Some(below)).await?;
        let (run, later) = rest.split(found.len);
        rest = later;
        match (found.allocated, found.zero) {
            (false, _) => {}
            (true, true) => base.write_zeroes(run, ZeroFlags { may_unmap: true, no_fallback: false }).await?,
            (true, false) => {
                let bytes = Iov::scratch(run.buffer_len());
                top.read(run, bytes.clone()).await?;
                base.write(run, bytes, WriteFlags::default()).await?;
            }
        }
    }
    Ok(())
}

fn wire(
    plan: &mut Plan,
    graph: &Graph,
    args: &CommitArgs,
    part: &Part,
    job: &Arc<Job>,
    dirty: Arc<DirtyBitmap>,
) -> Result<Wiring, GraphError> {
    still_so(plan, args, part)?;
    let mut nodes = vec![args.device];
    nodes.extend(overlays(plan, part.top));
    nodes.extend(part.copied.iter().copied().chain([part.base]));
    nodes.dedup();
    let mut claim = Claim::take(plan, Kind::Commit, nodes, part.copied.clone())?;
    claim.make_writable(plan, part.base);
    let tracker: Arc<dyn Tracker> = dirty;
    plan.node_mut(part.top).trackers.push(tracker.clone());
    let filter = Pass::MirrorTop.insert(plan, part.top, args.filter_node_name.as_deref())?;
    claim.add_filter(plan, Kind::Commit, filter);
    let needs_growth = grows(graph, part.top, part.base);
    let mut root = |node, role, required, shared, drained| {
        let user = chain::user(Kind::Commit, job.id());
        plan.add_root(NewRoot { user, role, node, required, shared, pinned: true, drained })
    };
    let all_but_resize = Perms::ALL.without(Perms::RESIZE);
    let held_back = Some(Arc::new(HeldBack(job.clone())) as _);
    let main = root(part.top, "main node", Perms::CONSISTENT_READ, all_but_resize, held_back);
    let base = root(part.base, "target", base_needs(needs_growth), all_but_resize, None);
    let mut roots = vec![main, base];
    for image in part.copied.iter().skip(1) {
        let shared = Perms::CONSISTENT_READ | Perms::WRITE | Perms::WRITE_UNCHANGED;
        roots.push(root(*image, "intermediate node", Perms::NONE, shared, None));
    }
    roots.push(root(filter, "filter", Perms::NONE, Perms::ALL, None));
    Ok(Wiring { claim, filter, roots, main, base, tracker })
}

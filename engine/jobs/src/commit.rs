//! block-commit below the active layer: copies what the images from `top` down to above `base` have into `base`,
//! then moves the users of `top` there. Source: `design/qemu-surface.md` 6.2, `spec/live-block-operations.rst`.
//!
//! ```text
//!   A <- B <- C <- D     commit top C into base A:     A <- D
//!   base      ^top
//! ```
//!
//! While it runs, A is neither what it was nor what it will be; D does not notice, because what was copied into A
//! is still hidden by B and C. A filter above `top` (commit_top) says so to the permissions: nobody below it may be
//! relied upon. The overlay's header is rewritten in the last step, after everything in `base` has been flushed.

use std::sync::Arc;

use async_trait::async_trait;
use underlay_graph::graph::LastStep;
use underlay_graph::plan::{NewRoot, Wires};
use underlay_graph::status::status;
use underlay_graph::{
    BackingRef, ByteRange, Cx, Graph, GraphError, NodeId, Perms, Plan, Preallocation, Role, Root, RootId,
    WriteFlags, ZeroFlags,
};
use underlay_sys::buffers::Buffers;

use crate::BackingNames;
use crate::active::Active;
use crate::chain::{self, Afterlife, Claim, wrong};
use crate::copy::{self, CHUNK, Copier, Fault, Ignored, Step};
use crate::error::{JobError, Stop};
use crate::filter::Pass;
use crate::job::{HeldBack, Job};
use crate::jobs::{Jobs, Started, Work};
use crate::settings::{Kind, Settings};
use crate::stream::stored_format;

/// What block-commit asks for, with its names resolved.
#[derive(Clone)]
pub struct CommitArgs {
    /// What all jobs have.
    pub settings: Settings,
    /// `device`: the root of the chain.
    pub device: NodeId,
    /// `top`, `top-node`; the active layer by default.
    pub top: Option<NodeId>,
    /// `base`, `base-node`; the lowest image by default.
    pub base: Option<NodeId>,
    /// `backing-file`: what to call the base in the header of the overlay of `top`.
    pub backing_file: Option<String>,
    /// `backing-mask-protocol`
    pub backing_mask_protocol: bool,
    /// `filter-node-name`
    pub filter_node_name: Option<String>,
    /// How the base is called in a header otherwise.
    pub names: BackingNames,
}

/// `device` must be the root of its chain, with no job on it. (QEMU says the same of both: a job is a user.)
pub fn check_root(plan: &Plan, device: NodeId) -> Result<(), JobError> {
    let is_free = plan.get(device).is_some_and(|node| node.busy.is_none());
    let is_of_job = plan.roots_of(device).any(|(_, root)| root.role != "root");
    if is_free && !is_of_job && plan.parents(device).next().is_none() {
        return Ok(());
    }
    Err(wrong("Need a root block node".into()))
}

/// The part of a chain that a commit is about.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Part {
    pub(crate) top: NodeId,
    pub(crate) base: NodeId,
    /// From `top` down to above `base`.
    pub(crate) copied: Vec<NodeId>,
}

impl Part {
    fn find(plan: &Plan, args: &CommitArgs) -> Result<Self, JobError> {
        let name = |id: NodeId| plan.get(id).map_or_else(String::new, |node| node.name.to_string());
        let elsewhere = |id| wrong(format!("'{}' is not in this backing file chain", name(id)));
        if plan.get(args.device).is_none() {
            return Err(wrong("The node was removed in the meantime".into()));
        }
        check_root(plan, args.device)?;
        let images: Vec<_> = plan.chain(args.device).collect();
        let top =
            args.top.map_or(images.first().copied(), |top| plan.get(top).map(|_| plan.skip_filters(top)));
        let top = top
            .filter(|top| images.contains(top))
            .ok_or_else(|| elsewhere(args.top.unwrap_or(args.device)))?;
        let base = args.base.or(images.last().copied()).unwrap_or(top);
        if plan.get(base).is_none() {
            return Err(elsewhere(base));
        }
        let base = plan.skip_filters(base);
        if base == top {
            return Err(wrong("cannot commit an image into itself".into()));
        }
        let copied = chain::above(plan, top, Some(base)).ok_or_else(|| elsewhere(base))?;
        Ok(Self { top, base, copied })
    }
}

impl Jobs {
    /// Starts a commit: an active one when `top` is the active layer or somebody may write to it.
    pub async fn commit(self: &Arc<Self>, graph: &Arc<Graph>, args: CommitArgs) -> Result<Started, JobError> {
        let plan = graph.plan();
        let part = Part::find(&plan, &args)?;
        check_free(&plan, &args, &part)?;
        if let Some(base) = args.base.filter(|base| *base != part.base) {
            // The overlay would have to stay on the filter.
            let name = &plan.node(base).name;
            return Err(wrong(format!("'{name}' is not in this backing file chain")));
        }
        let is_top = plan.skip_filters(args.device) == part.top;
        let has_writer = graph.access(part.top).required.has(Perms::WRITE);
        if args.backing_file.is_some() && (is_top || has_writer) {
            let why = if is_top { "is the active layer" } else { "has a writer on it" };
            return Err(wrong(format!("'backing-file' specified, but 'top' {why}")));
        }
        let id = self.choose_id(&args.settings)?;
        let job = self.draft(id, Kind::Commit, &args.settings);
        let settings = args.settings.clone();
        let work: Box<dyn Work> = if is_top || has_writer {
            Box::new(Active::prepare_chain(graph, args, part, &job).await?)
        } else {
            let wiring = graph.change(|plan| wire(plan, graph, &args, &part, &job)).await?;
            let buffers = Arc::default();
            Box::new(Commit { graph: graph.clone(), args, part, wiring, buffers })
        };
        self.launch(job, &settings, work).await
    }
}

/// Refuses when a job works on what is named, or on what lies between.
fn check_free(plan: &Plan, args: &CommitArgs, part: &Part) -> Result<(), GraphError> {
    chain::check_free(plan, &[args.device])?;
    let top = args.top.unwrap_or(args.device);
    chain::check_free_down_to(plan, top, Some(args.base.unwrap_or(part.base)))
}

/// Checks, with the plan that will be changed, what was found with an earlier one.
pub(crate) fn still_so(plan: &Plan, args: &CommitArgs, part: &Part) -> Result<(), GraphError> {
    match Part::find(plan, args) {
        Ok(now) if now == *part => check_free(plan, args, part),
        _ => Err(GraphError::new("The chain was changed in the meantime")),
    }
}

/// What the job has put into the graph.
#[derive(Clone, Debug)]
struct Wiring {
    claim: Claim,
    filter: NodeId,
    roots: Vec<RootId>,
    main: RootId,
    base: RootId,
}

fn wire(
    plan: &mut Plan,
    graph: &Graph,
    args: &CommitArgs,
    part: &Part,
    job: &Arc<Job>,
) -> Result<Wiring, GraphError> {
    still_so(plan, args, part)?;
    let mut nodes = vec![args.device];
    nodes.extend(overlays(plan, part.top));
    nodes.extend(part.copied.iter().copied().chain([part.base]));
    nodes.dedup();
    let mut claim = Claim::take(plan, Kind::Commit, nodes, part.copied.clone())?;
    claim.make_writable(plan, part.base);
    let filter = Pass::CommitTop.insert(plan, part.top, args.filter_node_name.as_deref())?;
    let mut root = |node, role, required, shared, drained| {
        let user = chain::user(Kind::Commit, job.id());
        plan.add_root(NewRoot { user, role, node, required, shared, pinned: true, drained })
    };
    let filter_root =
        root(filter, "commit_top", Perms::NONE, Perms::ALL, Some(Arc::new(HeldBack(job.clone())) as _));
    let between = Perms::WRITE | Perms::WRITE_UNCHANGED;
    let of_images: Vec<_> = part
        .copied
        .iter()
        .map(|image| root(*image, "intermediate node", Perms::NONE, between, None))
        .collect();
    let needs_growth = grows(graph, part.top, part.base);
    let base = root(
        part.base,
        "base",
        base_needs(needs_growth),
        Perms::CONSISTENT_READ | Perms::WRITE_UNCHANGED,
        None,
    );
    let main = of_images.first().copied().unwrap_or(base);
    let mut roots = vec![filter_root, base];
    roots.extend(of_images);
    Ok(Wiring { claim, filter, roots, main, base })
}

pub(crate) fn base_needs(growth: bool) -> Perms {
    let write = Perms::CONSISTENT_READ | Perms::WRITE;
    if growth { write | Perms::RESIZE } else { write }
}

/// Whether `base` is shorter than `top`.
pub(crate) fn grows(graph: &Graph, top: NodeId, base: NodeId) -> bool {
    let wires = graph.wires();
    wires.view(base).cx().length() < wires.view(top).cx().length()
}

/// The images whose backing node `node` is, perhaps through filters.
pub(crate) fn overlays(plan: &Plan, node: NodeId) -> Vec<NodeId> {
    let mut found = Vec::new();
    let mut todo = vec![node];
    while let Some(id) = todo.pop() {
        for (parent, role) in plan.parents(id) {
            if plan.node(parent).node.kind() == underlay_graph::Kind::Filter {
                todo.push(parent);
            } else if role == Role::Backing {
                found.push(parent);
            }
        }
    }
    found
}

struct Commit {
    graph: Arc<Graph>,
    args: CommitArgs,
    part: Part,
    wiring: Wiring,
    buffers: Arc<Buffers>,
}

#[async_trait]
impl Work for Commit {
    async fn run(&mut self, job: &Arc<Job>) -> Result<(), Stop> {
        let root = |id| self.graph.root(id).ok_or(Stop::Cancelled);
        let (top, base) = (root(self.wiring.main)?, root(self.wiring.base)?);
        let length = top.length().await?;
        job.set_total(length);
        grow(&self.graph, job, self.part.base, length).await?;
        let unit = chunk_unit(base.enter().await?.cx());
        let push =
            Push { top, base: base.clone(), below: self.part.base, unit, buffers: self.buffers.clone() };
        let push = Arc::new(push);
        copy::walk(job, &push, ByteRange::between(0, length), Ignored::TryAgain).await?;
        self.hide_tail(&base, length).await?;
        // The overlay's header will rely on it: the long flush comes now, the last step's is short then.
        base.flush().await?;
        Ok(())
    }

    async fn prepare(&mut self, job: &Arc<Job>) -> Result<(), Stop> {
        // Who has come to the top itself since keeps it.
        let overlays = overlays(&self.graph.plan(), self.wiring.filter);
        self.wiring.claim = reopen(&self.graph, job, self.wiring.claim.clone(), &overlays).await?;
        let (wiring, part, args) = (&self.wiring, &self.part, &self.args);
        let edit = |plan: &mut Plan| {
            wiring.let_go(plan, &wiring.claim);
            plan.replace(wiring.filter, part.base, |_| false)?;
            // A filter that was named as the top goes with what it filtered.
            if let Some(named) = args.top.filter(|top| *top != part.top && plan.get(*top).is_some()) {
                plan.replace(named, part.base, |_| false)?;
            }
            wiring.claim.make_read_only_again(plan)?;
            let note = Note::new(args, part, overlays.clone());
            let kept = Afterlife::begin(plan, &self.graph, &wiring.claim, job);
            Ok((kept, Some(Box::new(note) as Box<dyn LastStep>)))
        };
        job.keep(job.change(&self.graph, edit).await?);
        Ok(())
    }

    async fn abandon(&mut self, job: &Arc<Job>) {
        let edit = |plan: &mut Plan, claim: &Claim| {
            self.wiring.let_go(plan, claim);
            plan.take_out(self.wiring.filter);
            claim.make_read_only_again(plan)
        };
        job.give_back(&self.graph, &self.wiring.claim, edit).await;
    }
}

impl Wiring {
    /// Takes everything out of the plan again, but for the filter.
    fn let_go(&self, plan: &mut Plan, claim: &Claim) {
        self.roots.iter().for_each(|root| plan.remove_root(*root));
        claim.release(plan);
    }
}

impl Commit {
    /// What `base` has behind the end of `top` was hidden from longer overlays, which read zeroes there.
    async fn hide_tail(&self, base: &Root, top_length: u64) -> Result<(), Stop> {
        let overlays = overlays(&self.graph.plan(), self.part.top);
        let wires = self.graph.wires();
        let seen = overlays.iter().map(|id| wires.view(*id).cx().length()).max().unwrap_or(0);
        let end = base.length().await?.min(seen);
        let tail = ByteRange::between(top_length, end);
        if !tail.is_empty() {
            base.write_zeroes(tail, ZeroFlags { may_unmap: true, no_fallback: false }).await?;
        }
        Ok(())
    }
}

/// Makes the overlays writable whose headers will be rewritten.
pub(crate) async fn reopen(
    graph: &Graph,
    job: &Job,
    mut claim: Claim,
    overlays: &[NodeId],
) -> Result<Claim, GraphError> {
    let edit = |plan: &mut Plan| {
        overlays.iter().for_each(|overlay| claim.make_writable(plan, *overlay));
        Ok((claim, None))
    };
    job.change(graph, edit).await
}

/// Notes the base as backing file in the headers of the overlays.
pub(crate) struct Note {
    overlays: Vec<NodeId>,
    base: NodeId,
    file: Option<String>,
    mask_protocol: bool,
    names: BackingNames,
}

impl Note {
    pub(crate) fn new(args: &CommitArgs, part: &Part, overlays: Vec<NodeId>) -> Self {
        Self {
            overlays,
            base: part.base,
            file: args.backing_file.clone(),
            mask_protocol: args.backing_mask_protocol,
            names: args.names.clone(),
        }
    }
}

#[async_trait]
impl LastStep for Note {
    async fn run(self: Box<Self>, old: &Wires, new: &Wires) -> Result<(), GraphError> {
        // Never a header that relies on what a power cut could take away.
        let flushed = old.view(self.base);
        flushed.cx().flush().await?;
        if new.plan().get(self.base).is_none() {
            // All who used it have gone meanwhile, and it goes with the job.
            return Ok(());
        }
        let base = new.view(self.base);
        for overlay in self.overlays.into_iter().filter(|overlay| new.plan().get(*overlay).is_some()) {
            let overlay = new.view(overlay);
            let file = self.file.clone().unwrap_or_else(|| (self.names)(&overlay, &base));
            let backing = BackingRef { file, format: Some(stored_format(&base, self.mask_protocol)) };
            overlay.cx().node().set_backing_ref(&overlay.cx(), Some(backing)).await?;
        }
        Ok(())
    }
}

/// Makes `base` at least `length` bytes long.
pub(crate) async fn grow(graph: &Graph, job: &Job, base: NodeId, length: u64) -> Result<(), Stop> {
    if graph.wires().view(base).cx().length() >= length {
        return Ok(());
    }
    let edit = |plan: &mut Plan| {
        plan.touch(base);
        Ok(((), Some(Box::new(Grow { base, length }) as Box<dyn LastStep>)))
    };
    Ok(job.change(graph, edit).await?)
}

struct Grow {
    base: NodeId,
    length: u64,
}

#[async_trait]
impl LastStep for Grow {
    async fn run(self: Box<Self>, _old: &Wires, new: &Wires) -> Result<(), GraphError> {
        Ok(lengthen(&new.view(self.base).cx(), self.length).await?)
    }
}

/// Makes `base` longer, by what reads as zeroes.
pub(crate) async fn lengthen(base: &Cx<'_>, length: u64) -> underlay_graph::Result<()> {
    let grown = ByteRange::between(base.length(), length);
    base.node().resize(base, length, Preallocation::Off).await?;
    // What is below may be longer, and must not show in what was behind the end.
    let below = base.backing().map_or(0, |below| below.length());
    if below > grown.start() {
        base.write_zeroes(grown, ZeroFlags { may_unmap: true, no_fallback: false }).await?;
    }
    Ok(())
}

/// Chunks that fill whole clusters of the node they go to.
pub(crate) fn chunk_unit(cx: Cx<'_>) -> u64 {
    let cluster = u64::from(cx.skip_filters().limits().preferred_zero);
    if cluster.is_power_of_two() { CHUNK.max(cluster) } else { CHUNK }
}

/// Pushes what the images above the base have down into it.
pub(crate) struct Push {
    pub(crate) top: Root,
    pub(crate) base: Root,
    pub(crate) below: NodeId,
    pub(crate) unit: u64,
    pub(crate) buffers: Arc<Buffers>,
}

#[async_trait]
impl Copier for Push {
    async fn look(&self, range: ByteRange) -> Result<(Step, u64), Fault> {
        let found = {
            let inside = self.top.enter().await.map_err(Fault::read)?;
            status(&inside.cx(), range, Some(self.below)).await.map_err(Fault::read)?
        };
        if !found.allocated {
            return Ok((Step::Skip, found.len));
        }
        if !found.zero {
            return Ok((Step::Copy, found.len));
        }
        // Zeroes over zeroes cost nothing, where the base will go on showing them.
        let inside = self.base.enter().await.map_err(Fault::read)?;
        let already = status(&inside.cx(), range.split(found.len).0, None).await.map_err(Fault::read)?;
        let stays = already.allocated || !inside.cx().lacks_backing();
        Ok((if already.zero && stays { Step::Skip } else { Step::Zero }, already.len))
    }

    async fn copy(&self, range: ByteRange, step: Step) -> Result<(), Fault> {
        if step == Step::Zero {
            let flags = ZeroFlags { may_unmap: true, no_fallback: false };
            return self.base.write_zeroes(range, flags).await.map_err(Fault::write);
        }
        let whole = self.buffers.take(range.buffer_len());
        let buffer = whole.slice(0, range.buffer_len());
        let result = match self.top.read(range, buffer.clone()).await {
            Ok(()) => self.base.write(range, buffer, WriteFlags::default()).await.map_err(Fault::write),
            Err(error) => Err(Fault::read(error)),
        };
        self.buffers.put(whole);
        result
    }

    fn unit(&self) -> u64 {
        self.unit
    }
}

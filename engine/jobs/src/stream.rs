//! block-stream: copies into `top` what it still borrows from above `base`, then makes `base` its backing node.
//! Source: `design/qemu-surface.md` 6.1, `spec/live-block-operations.rst`.
//!
//! ```text
//!   A <- B <- C <- D     stream D with base A (bottom B):     A <- D
//!   base  ^bottom  ^top  stream D:                            D
//! ```
//!
//! The base is what is below `bottom` when the job ends, whatever that was when it began. Until the last step the
//! chain shows the same bytes with and without the copies, so a job that ends early leaves nothing to undo.

use std::sync::Arc;

use async_trait::async_trait;
use underlay_graph::graph::LastStep;
use underlay_graph::plan::{NewRoot, Wires};
use underlay_graph::status::status;
use underlay_graph::{
    BackingRef, ByteRange, Graph, GraphError, Kind as NodeKind, NodeId, Perms, Plan, Role, Root, RootId,
};

use crate::BackingNames;
use crate::chain::{self, Afterlife, Claim, wrong};
use crate::copy::{self, Copier, Fault, Ignored, Step};
use crate::error::{JobError, Stop};
use crate::filter::Pass;
use crate::job::{HeldBack, Job};
use crate::jobs::{Jobs, Started, Work};
use crate::settings::{Kind, Settings};

/// Down to where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// The whole chain; the result has no backing node.
    Whole,
    /// `base`, `base-node`: down to above this node, which becomes the backing node.
    Above(NodeId),
    /// `bottom`: down to this node, inclusive.
    Bottom(NodeId),
}

/// What block-stream asks for, with its names resolved.
#[derive(Clone)]
pub struct StreamArgs {
    /// What all jobs have.
    pub settings: Settings,
    /// `device`
    pub top: NodeId,
    /// `base`, `base-node` or `bottom`
    pub end: StreamEnd,
    /// `backing-file`: what to call the base in the header.
    pub backing_file: Option<String>,
    /// `backing-mask-protocol`
    pub backing_mask_protocol: bool,
    /// `filter-node-name`
    pub filter_node_name: Option<String>,
    /// How the base is called in the header otherwise.
    pub names: BackingNames,
}

impl Jobs {
    /// Starts a stream.
    pub async fn stream(self: &Arc<Self>, graph: &Arc<Graph>, args: StreamArgs) -> Result<Started, JobError> {
        let copied = copied_images(&graph.plan(), &args)?;
        check_free(&graph.plan(), &args)?;
        if args.backing_file.is_some() && args.end == StreamEnd::Whole {
            return Err(wrong("backing file specified, but streaming the entire chain".into()));
        }
        let id = self.choose_id(&args.settings)?;
        let job = self.draft(id, Kind::Stream, &args.settings);
        let wiring = graph.change(|plan| wire(plan, &args, copied, &job)).await?;
        let settings = args.settings.clone();
        let idle = wiring.top == wiring.bottom;
        let mut started =
            self.launch(job, &settings, Box::new(Stream { graph: graph.clone(), args, wiring })).await?;
        // With nothing to copy it is over before the command's reply, as clients have come to expect.
        if idle && settings.auto_finalize {
            started.task.await;
            started.task = Box::pin(async {});
        }
        Ok(started)
    }
}

/// Refuses when a job works on what is named, or on what lies between.
fn check_free(plan: &Plan, args: &StreamArgs) -> Result<(), GraphError> {
    let last = match args.end {
        StreamEnd::Whole => None,
        StreamEnd::Bottom(bottom) => Some(bottom),
        // The base itself may be busy, but not a filter above it.
        StreamEnd::Above(base) => plan.chain_with_filters(args.top).take_while(|id| *id != base).last(),
    };
    chain::check_free_down_to(plan, args.top, last)
}

/// The top and the images below it whose data it will get.
fn copied_images(plan: &Plan, args: &StreamArgs) -> Result<Vec<NodeId>, JobError> {
    let name = |id: NodeId| plan.get(id).map_or_else(String::new, |node| node.name.to_string());
    if plan.get(args.top).is_none() {
        return Err(wrong("The node was removed in the meantime".into()));
    }
    match args.end {
        StreamEnd::Whole => Ok(plan.chain(args.top).collect()),
        StreamEnd::Above(base) => chain::above(plan, args.top, Some(base)).ok_or_else(|| {
            wrong(format!("Node '{}' is not a backing image of '{}'", name(base), name(args.top)))
        }),
        StreamEnd::Bottom(bottom) => {
            if plan.get(bottom).is_some_and(|node| node.node.kind() == NodeKind::Filter) {
                let name = name(bottom);
                return Err(wrong(format!("Node '{name}' is a filter, use a non-filter node as 'bottom'")));
            }
            let mut images: Vec<_> = plan.chain(args.top).collect();
            let at = images.iter().position(|id| *id == bottom).ok_or_else(|| {
                wrong(format!("Node '{}' is not in a chain starting from '{}'", name(bottom), name(args.top)))
            })?;
            images.truncate(at + 1);
            Ok(images)
        }
    }
}

/// What the job has put into the graph.
#[derive(Clone, Debug)]
struct Wiring {
    claim: Claim,
    top: NodeId,
    bottom: NodeId,
    roots: Vec<RootId>,
    main: RootId,
    filter: Option<NodeId>,
}

fn wire(
    plan: &mut Plan,
    args: &StreamArgs,
    copied: Vec<NodeId>,
    job: &Arc<Job>,
) -> Result<Wiring, GraphError> {
    let (Some(&top), Some(&bottom)) = (copied.first(), copied.last()) else {
        return Err(GraphError::new("The chain is empty"));
    };
    if copied_images(plan, args).as_ref() != Ok(&copied) {
        return Err(GraphError::new("The chain was changed in the meantime"));
    }
    check_free(plan, args)?;
    chain::check_links(plan, args.top, &copied)
        .map_err(|error| GraphError::new(format!("Could not create node: {error}")))?;
    // The link below the bottom may change; the others may not.
    let frozen = copied[..copied.len() - 1].to_vec();
    let mut claim = Claim::take(plan, Kind::Stream, copied.clone(), frozen)?;
    claim.make_writable(plan, top);
    let filter = match &args.filter_node_name {
        Some(name) => Some(Pass::CopyOnRead.insert(plan, top, Some(name))?),
        None => None,
    };
    filter.iter().for_each(|filter| claim.add_filter(plan, Kind::Stream, *filter));
    let read_and_unchanged = Perms::CONSISTENT_READ | Perms::WRITE_UNCHANGED;
    let mut root = |node, role, required, shared, drained| {
        let user = chain::user(Kind::Stream, job.id());
        plan.add_root(NewRoot { user, role, node, required, shared, pinned: true, drained })
    };
    let shared = read_and_unchanged | Perms::WRITE;
    let main = root(top, "main node", read_and_unchanged, shared, Some(Arc::new(HeldBack(job.clone()))));
    let mut roots = vec![main];
    for &image in &copied[1..] {
        roots.push(root(image, "intermediate node", Perms::NONE, read_and_unchanged, None));
    }
    roots.extend(filter.map(|filter| root(filter, "filter", Perms::NONE, Perms::ALL, None)));
    Ok(Wiring { claim, top, bottom, roots, main, filter })
}

impl Wiring {
    /// Takes everything out of the plan again, but for the link below the top.
    fn unwire(&self, plan: &mut Plan, claim: &Claim) {
        self.roots.iter().for_each(|root| plan.remove_root(*root));
        claim.release(plan);
        self.filter.iter().for_each(|filter| plan.take_out(*filter));
    }
}

struct Stream {
    graph: Arc<Graph>,
    args: StreamArgs,
    wiring: Wiring,
}

#[async_trait]
impl Work for Stream {
    async fn run(&mut self, job: &Arc<Job>) -> Result<(), Stop> {
        if self.wiring.top == self.wiring.bottom {
            return Ok(());
        }
        let top = self.graph.root(self.wiring.main).ok_or(Stop::Cancelled)?;
        let length = top.length().await?;
        job.set_total(length);
        let whole = self.args.end == StreamEnd::Whole;
        let fill = Arc::new(Fill { top: top.clone(), bottom: self.wiring.bottom, whole });
        let outcome = copy::walk(job, &fill, ByteRange::between(0, length), Ignored::PassOver).await?;
        // The header will rely on the copies: the long flush comes now, the last step's is short then.
        top.flush().await?;
        match outcome.passed_over {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    async fn prepare(&mut self, job: &Arc<Job>) -> Result<(), Stop> {
        let (wiring, args) = (&self.wiring, &self.args);
        let edit = |plan: &mut Plan| {
            wiring.unwire(plan, &wiring.claim);
            let base = match args.end {
                StreamEnd::Whole => None,
                _ => plan.node(wiring.bottom).child(Role::Backing),
            };
            let had_one = plan.node(wiring.top).child(Role::Backing).is_some();
            plan.set_child(wiring.top, Role::Backing, base)?;
            wiring.claim.make_read_only_again(plan)?;
            let note = Note {
                top: wiring.top,
                base,
                file: args.backing_file.clone(),
                mask_protocol: args.backing_mask_protocol,
                names: args.names.clone(),
            };
            let last: Option<Box<dyn LastStep>> = if had_one { Some(Box::new(note)) } else { None };
            Ok((Afterlife::begin(plan, &self.graph, &wiring.claim, job), last))
        };
        job.keep(job.change(&self.graph, edit).await?);
        Ok(())
    }

    async fn abandon(&mut self, job: &Arc<Job>) {
        let edit = |plan: &mut Plan, claim: &Claim| {
            self.wiring.unwire(plan, claim);
            claim.make_read_only_again(plan)?;
            Ok(Afterlife::begin(plan, &self.graph, claim, job))
        };
        job.keep(job.give_back(&self.graph, &self.wiring.claim, edit).await.flatten());
    }
}

/// Notes the new backing file in the header.
struct Note {
    top: NodeId,
    base: Option<NodeId>,
    file: Option<String>,
    mask_protocol: bool,
    names: BackingNames,
}

#[async_trait]
impl LastStep for Note {
    async fn run(self: Box<Self>, old: &Wires, new: &Wires) -> Result<(), GraphError> {
        // All who used the top may have gone meanwhile, and it goes with the job.
        let wires = if new.plan().get(self.top).is_some() { new } else { old };
        let top = wires.view(self.top);
        // Never a header that relies on what a power cut could take away.
        let flushed = old.view(self.top);
        flushed.cx().flush().await?;
        let backing = self.base.map(|base| wires.view(wires.plan().skip_filters(base)));
        let backing = backing.map(|base| {
            let file = self.file.unwrap_or_else(|| (self.names)(&top, &base));
            BackingRef { file, format: Some(stored_format(&base, self.mask_protocol)) }
        });
        Ok(top.cx().node().set_backing_ref(&top.cx(), backing).await?)
    }
}

/// The format to note for a backing file: its driver, or `raw` instead of a bare protocol where that is wanted.
pub(crate) fn stored_format(base: &underlay_graph::View, mask_protocol: bool) -> String {
    let masked = mask_protocol && base.node().kind() == NodeKind::Protocol;
    if masked { "raw" } else { base.node().driver() }.to_owned()
}

/// Fills the top from below.
struct Fill {
    top: Root,
    bottom: NodeId,
    whole: bool,
}

#[async_trait]
impl Copier for Fill {
    async fn look(&self, range: ByteRange) -> Result<(Step, u64), Fault> {
        let inside = self.top.enter().await.map_err(Fault::read)?;
        let cx = inside.cx();
        // Whatever is below the bottom now: it may change while the job runs.
        let mut at = cx;
        while at.view().id() != self.bottom {
            let Some(below) = at.backing() else { break };
            at = below.skip_filters();
        }
        let until = at.backing().map(|base| base.view().id());
        let found = status(&cx, range, until).await.map_err(Fault::read)?;
        // Without a backing node the top will read zeroes by itself.
        let borrowed = found.allocated && found.depth > 0 && !(found.zero && self.whole);
        Ok((if borrowed { Step::Copy } else { Step::Skip }, found.len))
    }

    async fn copy(&self, range: ByteRange, _: Step) -> Result<(), Fault> {
        // QEMU calls every error of a stream one of reading.
        self.top.populate(range).await.map_err(Fault::read)
    }
}

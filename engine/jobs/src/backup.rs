//! blockdev-backup: copies a disk as it is at the moment of the command, whatever the guest writes meanwhile.
//! Source: `design/qemu-surface.md` 6.4, 5.4.
//!
//! A copy-before-write filter above the source sees to it that nothing is overwritten before it is copied
//! ([`CopyBeforeWrite`]); the job copies the rest. What is copied and what is not they keep in one place
//! ([`Copies`]). With `sync=none` there is no rest: the job only holds the filter.

use std::sync::Arc;

use async_trait::async_trait;
use underlay_drivers::filter::copies::{Copies, CopyError};
use underlay_drivers::filter::copy_before_write::{CbwOptions, CopyBeforeWrite, cluster_for};
use underlay_graph::bitmap::DirtyBitmap;
use underlay_graph::bitmaps::Release;
use underlay_graph::plan::NewRoot;
use underlay_graph::status::status;
use underlay_graph::{
    ByteRange, Graph, GraphError, IoError, NewNode, NodeId, Perms, Plan, Role, Root, RootId,
};

use crate::backup_bitmap::{BackupBitmap, BitmapMode};
use crate::chain::{self, Claim, wrong};
use crate::copy::{self, Copier, Fault, Ignored, Step};
use crate::error::{JobError, Stop};
use crate::filter;
use crate::follow::NAP;
use crate::group::Group;
use crate::job::{HeldBack, Job};
use crate::jobs::{Jobs, Started, Work};
use crate::settings::{Kind, Settings};
use crate::status::Status;

/// The source is looked at in steps of so many bytes, as the job may be cancelled.
const STRIDE: u64 = 1 << 40;

/// What is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupSync {
    /// The whole disk.
    Full,
    /// What the source's own layer has.
    Top,
    /// What is dirty in the bitmap: `incremental` and `bitmap`.
    Bitmap,
    /// What is overwritten, until the job is cancelled.
    None,
}

/// Where to copy to.
#[derive(Debug)]
pub enum BackupTarget {
    /// A node of the graph.
    Existing(NodeId),
    /// A node that comes with the job.
    New(Box<NewNode>),
}

/// What blockdev-backup and drive-backup ask for, with their names resolved.
#[derive(Debug)]
pub struct BackupArgs {
    /// What all jobs have.
    pub settings: Settings,
    /// `device`: the disk that is copied.
    pub source: NodeId,
    /// `target`
    pub target: BackupTarget,
    /// `sync`
    pub sync: BackupSync,
    /// `bitmap` and `bitmap-mode`
    pub bitmap: Option<BackupBitmap>,
    /// `compress`, `on-cbw-error`, `discard-source`, and `min-cluster-size` and `max-chunk` of `x-perf`.
    pub how: CbwOptions,
    /// `max-workers` of `x-perf`: most copies in flight.
    pub most_in_flight: usize,
    /// `filter-node-name`
    pub filter_node_name: Option<String>,
}

/// A backup that is wired in a draft of the graph: in a transaction several start at the same moment.
///
/// In this order: [`Jobs::draft_backup`], [`BackupDraft::enlist`], the draft is put into force (the moment),
/// [`start_all`]; or [`BackupDraft::withdraw`] once it is shown and comes to nothing.
pub struct BackupDraft {
    jobs: Arc<Jobs>,
    job: Arc<Job>,
    settings: Settings,
    work: Backup,
}

impl std::fmt::Debug for BackupDraft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.job.fmt(f)
    }
}

impl Jobs {
    /// Starts a backup.
    pub async fn backup(self: &Arc<Self>, graph: &Arc<Graph>, args: BackupArgs) -> Result<Started, JobError> {
        let mut draft = graph.draft().await;
        let mut backup = self.draft_backup(graph, &mut draft.plan, args)?;
        draft.put_in_force(None).await?;
        if let Err(error) = backup.enlist() {
            let job = backup.job.clone();
            backup.work.begun = false;
            backup.work.abandon(&job).await;
            return Err(error);
        }
        let mut started = start_all(vec![backup], false);
        started.pop().ok_or_else(|| wrong("No job".to_owned()))
    }

    /// Checks a backup, and puts its filter into the plan: when it is in force the moment has come.
    pub fn draft_backup(
        self: &Arc<Self>,
        graph: &Arc<Graph>,
        plan: &mut Plan,
        args: BackupArgs,
    ) -> Result<BackupDraft, JobError> {
        let filter = check(plan, &args)?;
        let id = match (&args.settings.id, args.settings.default_id.is_empty()) {
            // What the reference says here is not what it says for other jobs.
            (None, true) => return Err(JobError::InvalidId(String::new())),
            _ => self.choose_id(&args.settings)?,
        };
        let job = self.draft(id, Kind::Backup, &args.settings);
        job.set_counter(filter.copies().copied().clone());
        job.set_total(filter.copies().left());
        let BackupArgs { settings, source, target, sync, bitmap, most_in_flight, filter_node_name, .. } =
            args;
        let doubts = match &target {
            BackupTarget::Existing(node) => plan.wires().view(*node).cx().doubts(),
            BackupTarget::New(_) => 0,
        };
        let (graph, copies) = (graph.clone(), filter.copies().clone());
        let mut work = Backup {
            graph,
            sync,
            bitmap,
            most_in_flight,
            copies,
            source,
            wiring: None,
            below: plan.backing(source),
            begun: true,
            changes_bitmap: false,
            doubts,
        };
        let mut wired = work.wire(plan, &job, target, filter, filter_node_name.as_deref());
        // What users do not get on is for each backup to say, and not for the draft as a whole.
        wired = wired.and_then(|()| plan.check().map(|_| ()));
        match wired {
            Ok(()) => Ok(BackupDraft { jobs: self.clone(), job, settings, work }),
            Err(why) => Err(self.refused(&job, &settings, why)),
        }
    }
}

/// What is wrong with the arguments, or else the filter.
fn check(plan: &Plan, args: &BackupArgs) -> Result<Arc<CopyBeforeWrite>, JobError> {
    let wires = plan.wires();
    if plan.get(args.source).is_none() {
        return Err(wrong("The node was removed in the meantime".into()));
    }
    let target = match &args.target {
        BackupTarget::Existing(node) if *node == args.source => {
            return Err(wrong("Source and target cannot be the same".into()));
        }
        BackupTarget::Existing(node) => {
            chain::check_free(plan, &[*node])?;
            if plan.node(*node).read_only {
                return Err(wrong(format!("Could not create node: {}", GraphError::ReadOnly)));
            }
            wires.view(*node)
        }
        BackupTarget::New(node) => node.view(&wires),
    };
    chain::check_free(plan, &[args.source])?;
    if args.sync == BackupSync::Bitmap && args.bitmap.is_none() {
        return Err(wrong("must provide a valid bitmap name for 'bitmap' sync mode".into()));
    }
    if args.how.compress && target.cx().skip_filters().node().driver() != "qcow2" {
        // The reference names a drive here, which no node has.
        return Err(wrong("Compression is not supported for this drive ".into()));
    }
    let is_written_to =
        || Ok(plan.check()?.get(&args.source).is_some_and(|is| is.required.has(Perms::WRITE)));
    if args.how.discard_source && is_written_to().map_err(JobError::Graph)? {
        return Err(wrong("discard-source would destroy the disk of those who write to it".into()));
    }
    let source = wires.view(args.source);
    if source.cx().length() != target.cx().length() {
        return Err(wrong("Source and target image have different sizes".into()));
    }
    let every_zero = args.sync != BackupSync::Full;
    let filter = CopyBeforeWrite::new(&source, &target, CbwOptions { every_zero, ..args.how })
        .map_err(|why| wrong(format!("Could not create node: {why}")))?;
    let cluster = cluster_for(&target, args.how.min_cluster).map_err(wrong)?;
    if args.how.max_chunk != 0 && args.how.max_chunk < cluster {
        let chunk = args.how.max_chunk;
        return Err(wrong(format!(
            "Required max-chunk ({chunk}) is less than backup cluster size ({cluster})"
        )));
    }
    Ok(filter)
}

impl BackupDraft {
    /// Shows the job.
    pub fn enlist(&self) -> Result<(), JobError> {
        self.jobs.enlist(&self.job, &self.settings)
    }

    /// A job that was shown does not start after all.
    pub fn withdraw(self) {
        self.jobs.withdraw(&self.job);
    }
}

/// Starts backups that are wired; with `grouped` they finish together. The newest starts first, as in QEMU.
pub fn start_all(drafts: Vec<BackupDraft>, grouped: bool) -> Vec<Started> {
    let all: Vec<_> = drafts.iter().map(|draft| draft.job.clone()).collect();
    let group = grouped.then(|| Group::new(&all));
    for job in all.iter().rev() {
        job.begin(Status::Running);
        // The reference holds the source back for a moment.
        job.drained_begin();
    }
    all.iter().rev().for_each(|job| job.drained_end());
    let mut started = Vec::new();
    for draft in drafts.into_iter().rev() {
        let BackupDraft { jobs, job, work, .. } = draft;
        let group = group.clone().unwrap_or_else(|| Group::new(std::slice::from_ref(&job)));
        started.push(jobs.started(job, Box::new(work), group));
    }
    started
}

/// What the job has put into the graph.
#[derive(Clone, Debug)]
struct Wiring {
    claim: Claim,
    target: NodeId,
    filter: NodeId,
    /// The way in, at the filter, and the mark on the target.
    roots: [RootId; 2],
}

/// The work of a backup.
struct Backup {
    graph: Arc<Graph>,
    sync: BackupSync,
    /// As long as the job holds it.
    bitmap: Option<BackupBitmap>,
    most_in_flight: usize,
    copies: Arc<Copies>,
    source: NodeId,
    /// As long as it is in the graph.
    wiring: Option<Wiring>,
    /// The image that the source's own layer was based on at the moment.
    below: Option<NodeId>,
    /// Else the graph has only been prepared for it.
    begun: bool,
    /// The bitmap has been given back, and its image has yet to hear of it.
    changes_bitmap: bool,
    /// The target's before the moment.
    doubts: u64,
}

impl Backup {
    /// Puts the filter into the plan.
    fn wire(
        &mut self,
        plan: &mut Plan,
        job: &Arc<Job>,
        target: BackupTarget,
        filter: Arc<CopyBeforeWrite>,
        name: Option<&str>,
    ) -> Result<(), GraphError> {
        let target = match target {
            BackupTarget::Existing(node) => node,
            BackupTarget::New(node) => plan.add(*node)?,
        };
        if let Some(bitmap) = &self.bitmap {
            let bits = bitmap.hold(plan, self.source)?;
            let (copies, job) = (self.copies.clone(), job.clone());
            if self.sync == BackupSync::Bitmap {
                plan.at_the_moment(move || {
                    copies.limit_to(&bits);
                    job.set_total(copies.left());
                });
            }
        }
        let children = [(Role::File, self.source), (Role::Target, target)];
        // A target that is based on the source goes on showing the source itself.
        let of_target = plan.reachable(target);
        let keep = |parent| of_target.contains(&parent);
        let failed = |error: GraphError| GraphError::new(format!("Could not create node: {error}"));
        let filter = filter::insert(plan, filter, &children, name, failed, keep)?;
        // New users of the source's node get to the source itself, as with QEMU: to write there is refused.
        plan.node_mut(filter).implicit = false;
        let claim = Claim::take(plan, Kind::Backup, vec![filter, target], Vec::new())?;
        let mut root = |role, node, drained| {
            let user = chain::user(Kind::Backup, job.id());
            let (required, shared) = (Perms::NONE, Perms::ALL);
            plan.add_root(NewRoot { user, role, node, required, shared, pinned: true, drained })
        };
        let main = root("main node", filter, Some(Arc::new(HeldBack(job.clone()))));
        let roots = [main, root("target", target, None)];
        let (graph, source) = (self.graph.clone(), self.source);
        job.set_at_target(move |act| chain::at_target(&graph.plan(), source, target, act));
        self.wiring = Some(Wiring { claim, target, filter, roots });
        Ok(())
    }

    fn root(&self) -> Result<Root, Stop> {
        let main = self.wiring.as_ref().map(|wiring| wiring.roots[0]);
        main.and_then(|main| self.graph.root(main)).ok_or(Stop::Cancelled)
    }

    /// Only holds the filter, until somebody cancels the job.
    async fn hold(&self, job: &Job) -> Result<(), Stop> {
        loop {
            self.check_lost()?;
            job.doze(10 * NAP).await?;
        }
    }

    fn check_lost(&self) -> Result<(), Stop> {
        self.copies.lost().map_or(Ok(()), |error| Err(error.clone().into()))
    }

    /// Leaves out what the source's own layer does not have.
    async fn leave_out_below(&self, job: &Job, root: &Root, length: u64) -> Result<(), Stop> {
        let mut rest = ByteRange::between(0, length);
        while !rest.is_empty() {
            job.checkpoint().await?;
            match self.own_layer(root, rest.split(STRIDE).0).await {
                Ok((own, len)) => {
                    let (range, later) = rest.split(len);
                    let whole = range.align_in(self.copies.how().cluster);
                    let whole =
                        if later.is_empty() { whole.start()..length } else { whole.start()..whole.end() };
                    let whole = ByteRange::between(whole.start, whole.end);
                    if !own && !whole.is_empty() && whole.start() >= range.start() {
                        self.copies.leave_out(whole).await;
                        job.set_remaining(self.copies.left());
                    }
                    rest = later;
                }
                Err(error) => {
                    job.on_error(&error, true)?;
                    job.doze(NAP).await?;
                }
            }
        }
        Ok(())
    }

    /// Whether the source's own layer has the first bytes of `range`, and for how many of them that is so.
    async fn own_layer(&self, root: &Root, range: ByteRange) -> Result<(bool, u64), IoError> {
        let inside = root.enter().await?;
        // Overlays may have come between since, as in one transaction with a snapshot.
        let source = CopyBeforeWrite::ends(&inside.cx()).source;
        let found = status(&source, range, self.below).await?;
        Ok((found.allocated, found.len))
    }

    async fn flush(&self, job: &Job, root: &Root) -> Result<(), Stop> {
        loop {
            let (result, is_lost) = {
                let inside = root.enter().await?;
                let target = CopyBeforeWrite::ends(&inside.cx()).target;
                (target.flush().await, target.doubts() > 0)
            };
            let Err(error) = result else { return Ok(()) };
            copy::on_flush_error(job, &error, is_lost).await?;
        }
    }

    /// Takes the filter out of the graph. After a backup that failed the target may keep nothing, and it is said what
    /// becomes of the bitmap.
    async fn unwire(&mut self, job: &Job, failed: Option<Release>) -> Result<(), GraphError> {
        let edit = |plan: &mut Plan| {
            if let Some(wiring) = &self.wiring {
                wiring.roots.iter().for_each(|root| plan.remove_root(*root));
                wiring.claim.release(plan);
                if failed.is_some() && plan.get(wiring.target).is_some() {
                    plan.give_up_content(wiring.target);
                }
                plan.take_out(wiring.filter);
            }
            if let (Some(bitmap), Some(how)) = (&self.bitmap, &failed) {
                plan.release_bitmap(self.source, &bitmap.name, how.clone());
            }
            Ok(((), None))
        };
        job.change(&self.graph, edit).await?;
        self.wiring = None;
        self.changes_bitmap = failed.is_some() && self.bitmap.is_some();
        Ok(())
    }

    /// What the target may not have for sure, if that is less than what was asked for.
    async fn rest(&self, root: &Root) -> Option<DirtyBitmap> {
        // What is copied behind the flush counts as not copied.
        let rest = self.copies.rest();
        let inside = root.enter().await.ok()?;
        let target = CopyBeforeWrite::ends(&inside.cx()).target;
        let is_kept = target.flush().await.is_ok();
        if !is_kept && self.sync == BackupSync::Bitmap {
            return None;
        }
        if !is_kept {
            rest.set(ByteRange::between(0, rest.size()));
        }
        Some(rest)
    }

    /// What becomes of the bitmap now that the backup has failed.
    async fn release_after_failure(&self) -> Release {
        let Some(bitmap) = self.bitmap.as_ref().filter(|_| self.begun) else { return Release::Reclaim };
        let rest = match self.root() {
            Ok(root) if bitmap.mode == BitmapMode::Always => self.rest(&root).await,
            Ok(_) => None,
            // All was copied and flushed; another job of the group has failed.
            Err(_) => Some(self.copies.rest()),
        };
        bitmap.on_failure(rest)
    }
}

#[async_trait]
impl Work for Backup {
    async fn run(&mut self, job: &Arc<Job>) -> Result<(), Stop> {
        let root = self.root()?;
        let length = root.length().await?;
        if self.sync == BackupSync::Full {
            // All of it is written once more, but not what the target has lost since the moment.
            let inside = root.enter().await?;
            let target = CopyBeforeWrite::ends(&inside.cx()).target;
            if target.doubts() == self.doubts {
                target.forgive();
            }
        }
        if self.sync == BackupSync::None {
            return self.hold(job).await;
        }
        if self.sync == BackupSync::Top {
            self.leave_out_below(job, &root, length).await?;
        }
        let (copies, most) = (self.copies.clone(), self.most_in_flight);
        let copying = Arc::new(Copying { root: root.clone(), copies, most });
        copy::walk(job, &copying, ByteRange::between(0, length), Ignored::TryAgain).await?;
        self.check_lost()?;
        self.flush(job, &root).await
    }

    async fn prepare(&mut self, job: &Arc<Job>) -> Result<(), Stop> {
        self.check_lost()?;
        Ok(self.unwire(job, None).await?)
    }

    async fn commit(&mut self, job: &Arc<Job>) {
        let Some(bitmap) = self.bitmap.take() else { return };
        self.changes_bitmap = true;
        let edit = |plan: &mut Plan| {
            plan.release_bitmap(self.source, &bitmap.name, bitmap.on_success());
            Ok(((), None))
        };
        if let Err(error) = job.change(&self.graph, edit).await {
            tracing::error!(?job, %error, "the bitmap cannot be given back");
        }
    }

    async fn told(&mut self) {
        if self.changes_bitmap {
            self.graph.refresh_bitmaps().await;
        }
    }

    async fn abandon(&mut self, job: &Arc<Job>) {
        let release = self.release_after_failure().await;
        if let Err(error) = self.unwire(job, Some(release)).await {
            job.tell_of_remains(&self.graph, &error);
        }
    }
}

/// Copies what nobody has copied yet.
struct Copying {
    root: Root,
    copies: Arc<Copies>,
    most: usize,
}

impl From<CopyError> for Fault {
    fn from(failed: CopyError) -> Self {
        Self { error: failed.error, is_read: failed.is_read }
    }
}

#[async_trait]
impl Copier for Copying {
    async fn look(&self, range: ByteRange) -> Result<(Step, u64), Fault> {
        let next = self.copies.next(range).filter(|_| self.copies.lost().is_none());
        let Some(run) = next else { return Ok((Step::Skip, range.len())) };
        let done = range.before(run.start());
        if !done.is_empty() {
            return Ok((Step::Skip, done.len()));
        }
        let inside = self.root.enter().await.map_err(Fault::read)?;
        let source = CopyBeforeWrite::ends(&inside.cx()).source;
        let found = status(&source, run, None).await.map_err(Fault::read)?;
        // Whole clusters; the copy looks again.
        let len = found.len.next_multiple_of(self.copies.how().cluster).min(run.len());
        Ok((if found.zero { Step::Zero } else { Step::Copy }, len))
    }

    async fn copy(&self, range: ByteRange, _: Step) -> Result<(), Fault> {
        let inside = self.root.enter().await.map_err(Fault::read)?;
        let ends = CopyBeforeWrite::ends(&inside.cx());
        match self.copies.copy_in_background(ends, range).await {
            // Not to be tried again: the job finds it at the end of the walk.
            Err(_) if self.copies.lost().is_some() => Ok(()),
            result => Ok(result?),
        }
    }

    fn counts_skipped(&self) -> bool {
        false
    }

    fn counts_copied(&self, _range: ByteRange) -> u64 {
        // It is counted where it is done, by whom ever.
        0
    }

    fn most_in_flight(&self) -> usize {
        self.most
    }

    fn unit(&self) -> u64 {
        1 << self.copies.how().chunk.ilog2()
    }

    fn stride(&self) -> u64 {
        self.copies.stride()
    }
}

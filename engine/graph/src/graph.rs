//! The owner of the plan: puts a change of the wiring into force in one step that no request sees half done.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::OwnedMutexGuard;
use underlay_sys::rt;

use crate::bitmaps::{BitmapStore, PlanBitmap};
use crate::error::{GraphError, IoError};
use crate::gates;
use crate::moment::Moment;
use crate::node::Kind;
use crate::perm::Access;
use crate::plan::{NodeId, Plan, PlanNode, PlanRoot, RootId, Wires};
use crate::root::Root;
use crate::view::{Role, View};

/// How often images are made to keep what persistent bitmaps say by now, at most.
const REFRESH: Duration = Duration::from_secs(30);

/// What must happen between closing the gates and the swap: the last thing that may fail, and the moment of no
/// return. Both wirings may be used for I/O here (no gate is needed: the caller holds them all).
#[async_trait]
pub trait LastStep: Send {
    /// Does it. An error leaves the old wiring in force.
    async fn run(self: Box<Self>, old: &Wires, new: &Wires) -> Result<(), GraphError>;
}

/// A plan and what it asks of its nodes.
#[derive(Clone, Debug, Default)]
struct InForce {
    plan: Arc<Plan>,
    access: Arc<BTreeMap<NodeId, Access>>,
}

/// Somebody's turn to change the graph, until it is taken from him.
type Turn = Mutex<Option<OwnedMutexGuard<()>>>;

/// The graph of all nodes and the gates of all roots.
#[derive(Debug, Default)]
pub struct Graph {
    /// One change at a time.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// The turn of the newest draft, for as long as that is being prepared.
    drafting: Mutex<Weak<Turn>>,
    /// The plan in force and what it asks of the nodes; queries read it and never wait for a change.
    now: Mutex<InForce>,
    trouble: Trouble,
    /// Changes of persistent bitmaps go to their images at once.
    lasts: AtomicBool,
    /// Nodes whose images have not been told of them yet.
    lagging: Mutex<BTreeSet<NodeId>>,
}

/// Who is told of what has gone wrong when it was too late for an error.
#[derive(Default)]
struct Trouble(OnceLock<Tell>);

/// Tells somebody.
type Tell = Box<dyn Fn(&str) + Send + Sync>;

impl fmt::Debug for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "told: {}", self.0.get().is_some())
    }
}

impl Trouble {
    fn tell(&self, text: &str) {
        tracing::error!("{text}");
        if let Some(tell) = self.0.get() {
            tell(text);
        }
    }
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// From now on `tell` is told what goes wrong when it is too late for an error, as when an image is closed.
    pub fn on_trouble(&self, tell: impl Fn(&str) + Send + Sync + 'static) {
        let _ = self.trouble.0.set(Box::new(tell));
    }

    /// Tells whoever wants to be told that something went wrong, and nobody asks for it any more.
    pub fn tell_of_trouble(&self, text: &str) {
        self.trouble.tell(text);
    }

    fn now(&self) -> MutexGuard<'_, InForce> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The plan in force.
    pub fn plan(&self) -> Arc<Plan> {
        self.now().plan.clone()
    }

    /// What users ask of a node now.
    pub fn access(&self, id: NodeId) -> Access {
        self.now().access.get(&id).copied().unwrap_or(Access::UNUSED)
    }

    /// The views of the plan in force, for reading what cannot change under the reader (headers of opened
    /// images, lengths). Data requests go through a [`Root`].
    pub fn wires(&self) -> Wires {
        Wires::new(self.plan())
    }

    /// The way in for a root of the plan in force.
    pub fn root(&self, id: RootId) -> Option<Root> {
        self.plan().root(id).map(|root| Root { id, door: root.door.clone() })
    }

    /// Has images that are written to keep what persistent bitmaps say by now, where they lag behind or it is worth it:
    /// after a crash they will say less that is not so. Requests go on meanwhile, changes of the graph wait.
    pub async fn refresh_bitmaps(&self) {
        let _turn = self.turn.lock().await;
        let wires = self.wires();
        let lagging = std::mem::take(&mut *self.lagging());
        for (id, node) in wires.plan().nodes().filter(|(_, node)| !node.read_only) {
            let lags = lagging.contains(&id);
            let store = node.node.as_bitmap_store().filter(|store| lags || store.is_worth_refreshing());
            let (Some(store), view) = (store, wires.view(id)) else { continue };
            let bitmaps = persistent(node);
            let refreshed = match lags {
                true => refresh_cleaner(store, &view, &bitmaps).await,
                false => store.refresh(&view.cx(), &bitmaps).await,
            };
            if let Err(error) = refreshed {
                self.lagging().extend(lags.then_some(id));
                tracing::warn!(node = %view.name(), %error, "the bitmaps were not refreshed");
            }
        }
    }

    fn lagging(&self) -> MutexGuard<'_, BTreeSet<NodeId>> {
        self.lagging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on images are told at once when a command has changed their bitmaps: they will be right after a crash,
    /// too. Not worth it for tools, which close them a moment later.
    pub fn let_bitmaps_last(&self) {
        self.lasts.store(true, Ordering::Relaxed);
    }

    /// Does that now and then, as long as there is the graph: it takes a hundredth of the time at most.
    pub async fn refresh_bitmaps_for_ever(graph: Weak<Self>) {
        let mut pause = REFRESH;
        loop {
            rt::sleep(pause).await;
            let Some(graph) = graph.upgrade() else { return };
            let start = rt::now();
            graph.refresh_bitmaps().await;
            pause = REFRESH.max(rt::now().saturating_sub(start) * 100);
        }
    }

    /// Rewires the graph. See [`Graph::change_with`].
    pub async fn change<R: Send>(
        &self,
        edit: impl FnOnce(&mut Plan) -> Result<R, GraphError> + Send,
    ) -> Result<R, GraphError> {
        self.change_with(|plan| Ok((edit(plan)?, None))).await
    }

    /// Rewires the graph in one step: `edit` changes a [`Draft`], which is put into force then. On error nothing has
    /// happened.
    pub async fn change_with<R: Send>(
        &self,
        edit: impl FnOnce(&mut Plan) -> Result<(R, Option<Box<dyn LastStep>>), GraphError> + Send,
    ) -> Result<R, GraphError> {
        let mut draft = self.draft().await;
        let (result, last_step) = edit(&mut draft.plan)?;
        draft.put_in_force(last_step).await?;
        Ok(result)
    }

    /// Begins a change of the graph. No other gets its turn until the draft is put into force or dropped.
    pub async fn draft(&self) -> Draft<'_> {
        let turn = Arc::new(Mutex::new(Some(self.turn.clone().lock_owned().await)));
        *self.drafting.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&turn);
        Draft { graph: self, turn, plan: Plan::clone(&self.plan()) }
    }

    /// A draft that is still being prepared can no more be put into force: the graph shall end, and who prepares it may
    /// be waiting for a server that does not answer.
    pub fn give_up_draft(&self) {
        let drafting = self.drafting.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        drop(drafting.and_then(|turn| turn.lock().unwrap_or_else(PoisonError::into_inner).take()));
    }
}

/// A change in the making. To drop it is to leave everything as it was.
#[derive(Debug)]
pub struct Draft<'a> {
    graph: &'a Graph,
    turn: Arc<Turn>,
    /// The wiring as it will be.
    pub plan: Plan,
}

impl Draft<'_> {
    /// Rewires the graph in one step that no request sees half done:
    ///
    /// 1. The draft is checked as a whole.
    /// 2. The gates of all roots close whose part of the graph changes, those of jobs first; requests inside run to
    ///    their end, in a hurry, and what they left behind ([`crate::Node::settle`]).
    /// 3. Nodes that stop being written to are flushed, and nodes get ready for new users (locks, reopening).
    /// 4. What the draft wants done at the moment is done, and the last step runs. Any error up to here leaves the old
    ///    wiring in force.
    /// 5. The gates open onto the new wiring; nodes that nobody needs any more are closed.
    pub async fn put_in_force(self, last_step: Option<Box<dyn LastStep>>) -> Result<(), GraphError> {
        let Self { graph, turn, mut plan } = self;
        let turn = turn.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(_turn) = turn else { return Err(GraphError::new("It is too late to change the graph")) };
        let old = Wires::new(graph.plan());
        let old_access = graph.now().access.clone();
        plan.collect();
        plan.serialise_targets();
        let mut moment = plan.take_moment();
        let new_access = plan.check()?;
        let new = Wires::new(Arc::new(plan));

        let roots = changed_roots(old.plan(), new.plan());
        for (_, root) in &roots {
            root.drained.iter().for_each(|drained| drained.begin());
        }
        let closed = gates::close(old.plan(), &roots, moment.patience).await;
        let end_drained = || {
            for (_, root) in roots.iter().rev() {
                root.drained.iter().for_each(|drained| drained.end());
            }
        };
        let Some(mut gates) = closed else {
            end_drained();
            return Err(GraphError::new("Requests that are under way, maybe a job's, do not end"));
        };
        let trouble = &graph.trouble;
        let lasts = graph.lasts.load(Ordering::Relaxed);
        let (old_access, new_access) = (&old_access, &new_access);
        moment.act();
        let step = Step { graph, old: &old, new: &new, old_access, new_access, moment, trouble, lasts };
        let outcome = step.run(last_step).await;
        if outcome.is_ok() {
            step.resize_bitmaps().await;
            // Nodes may want to be asked in another way after the last step.
            let now = Wires::new(Arc::new(new.plan().clone()));
            for ((id, _), gate) in roots.iter().zip(gates.iter_mut()) {
                **gate = now.plan().root(*id).map(|root| now.view(root.node));
            }
            let plan = Arc::new(new.plan().clone());
            let access = Arc::new(new_access.clone());
            *graph.now() = InForce { plan, access };
        }
        drop(gates);
        end_drained();
        if outcome.is_ok() {
            step.give_up().await;
        }
        outcome
    }
}

/// The roots whose gates must close, those of jobs first: all that come, go or see a different wiring.
fn changed_roots(old: &Plan, new: &Plan) -> Vec<(RootId, PlanRoot)> {
    let same = |id: NodeId| match (old.get(id), new.get(id)) {
        (Some(before), Some(after)) => before.is_wired_as(after),
        _ => false,
    };
    let mut roots: BTreeMap<RootId, PlanRoot> = BTreeMap::new();
    for (id, root) in old.roots() {
        let stays = new.root(id).is_some_and(|now| now.node == root.node);
        if !stays || old.reachable(root.node).into_iter().any(|id| !same(id)) {
            roots.insert(id, root.clone());
        }
    }
    for (id, root) in new.roots().filter(|(id, _)| old.root(*id).is_none()) {
        roots.insert(id, root.clone());
    }
    let mut roots: Vec<_> = roots.into_iter().collect();
    roots.sort_by_key(|(_, root)| !root.pinned);
    roots
}

/// One change between its check and its end.
struct Step<'a> {
    graph: &'a Graph,
    old: &'a Wires,
    new: &'a Wires,
    old_access: &'a BTreeMap<NodeId, Access>,
    new_access: &'a BTreeMap<NodeId, Access>,
    moment: Moment,
    trouble: &'a Trouble,
    lasts: bool,
}

/// Has an image keep bitmaps that may call clean what they called dirty before. What was written there until then must
/// not be lost when the power goes: nobody would know that the disk is not what it was when it was called clean.
async fn refresh_cleaner(
    store: &dyn BitmapStore,
    view: &View,
    bitmaps: &[PlanBitmap],
) -> Result<(), IoError> {
    view.cx().flush().await?;
    store.refresh(&view.cx(), bitmaps).await
}

impl Step<'_> {
    async fn run(&self, last_step: Option<Box<dyn LastStep>>) -> Result<(), GraphError> {
        let mut done = Done::default();
        self.flush_leaving().await?;
        let outcome = self.steps(last_step, &mut done).await;
        match outcome {
            Ok(()) => {
                self.store_late(&done.stored).await;
                self.tell_of_lost_bitmaps();
            }
            Err(_) => self.undo(done).await,
        }
        outcome
    }

    async fn steps(&self, last_step: Option<Box<dyn LastStep>>, done: &mut Done) -> Result<(), GraphError> {
        self.gain(done).await?;
        for (id, bitmaps) in self.bitmaps_to_store() {
            // Those of nodes that go can wait: to store them is the end of it.
            if self.new.plan().get(id).is_some() {
                done.stored.push((id, dirty(&bitmaps)));
                self.store(&self.old.view(id), &bitmaps).await?;
            }
        }
        self.refresh_bitmaps(done).await?;
        match last_step {
            Some(last_step) => last_step.run(self.old, self.new).await,
            None => Ok(()),
        }
    }

    /// Has images that go on being written to keep persistent bitmaps as the change has made them.
    async fn refresh_bitmaps(&self, done: &mut Done) -> Result<(), GraphError> {
        for (id, node) in self.new.plan().nodes().filter(|(_, node)| self.lasts && !node.read_only) {
            let Some(store) = node.node.as_bitmap_store() else { continue };
            let before = self.old.plan().get(id).map_or_else(|| store.loaded(), persistent);
            let now = persistent(node);
            let is_same = now.len() == before.len() && now.iter().zip(&before).all(|(a, b)| a.is_kept_as(b));
            if !is_same && self.moment.may_lag {
                self.graph.lagging().insert(id);
            } else if !is_same {
                done.refreshed.push(id);
                refresh_cleaner(store, &self.new.view(id), &now).await?;
            }
        }
        Ok(())
    }

    /// The persistent bitmaps of nodes that are written to now and will not be any more.
    fn bitmaps_to_store(&self) -> impl Iterator<Item = (NodeId, Vec<PlanBitmap>)> {
        self.old.plan().nodes().filter_map(|(id, node)| {
            let now = self.new.plan().get(id);
            let stops = !node.read_only && now.is_none_or(|node| node.read_only);
            let given_up = node.node.is_unusable() || now.is_none() && self.moment.given_up.contains(&id);
            let stores = stops && !given_up && node.node.as_bitmap_store().is_some();
            stores.then(|| (id, persistent(now.unwrap_or(node))))
        })
    }

    /// What nothing depends on any more: images that go keep their bitmaps, and those to which the last step has
    /// written keep them once more. A bitmap that cannot be stored stays marked as not to be relied on.
    async fn store_late(&self, stored: &[(NodeId, u64)]) {
        for (id, bitmaps) in self.bitmaps_to_store() {
            let view = self.old.view(id);
            let before = stored.iter().find(|(stored, _)| *stored == id);
            let is_stored = view.node().as_bitmap_store().is_some_and(|store| store.is_stored());
            if is_stored && before.is_some_and(|(_, before)| *before == dirty(&bitmaps)) {
                continue;
            }
            let result = match before {
                Some(_) => self.begin_bitmaps(&view).await,
                None => Ok(()),
            };
            if let Err(error) = result.and(self.store(&view, &bitmaps).await) {
                let node = view.name();
                self.trouble
                    .tell(&format!("Lost persistent bitmaps during inactivation of node '{node}': {error}"));
            }
        }
    }

    /// Bitmaps that were to be persistent and were added to images which nobody may write to, and which go.
    fn tell_of_lost_bitmaps(&self) {
        let gone = self.old.plan().nodes().filter(|(id, _)| self.new.plan().get(*id).is_none());
        for (_, node) in gone.filter(|(_, node)| node.read_only) {
            let Some(store) = node.node.as_bitmap_store() else { continue };
            if !persistent(node).iter().all(|bitmap| store.has(&bitmap.name)) {
                let text = "Lost persistent bitmaps during inactivation of node";
                self.trouble.tell(&format!("{text} '{}': No write access", node.name));
            }
        }
    }

    async fn store(&self, view: &View, bitmaps: &[PlanBitmap]) -> Result<(), IoError> {
        match view.node().as_bitmap_store() {
            Some(store) => store.store(&view.cx(), bitmaps).await,
            None => Ok(()),
        }
    }

    async fn begin_bitmaps(&self, view: &View) -> Result<(), IoError> {
        match view.node().as_bitmap_store() {
            Some(store) => store.begin(&view.cx()).await,
            None => Ok(()),
        }
    }

    /// Bitmaps are as long as their nodes, which the last step may have changed.
    async fn resize_bitmaps(&self) {
        for (id, node) in self.new.plan().nodes().filter(|(_, node)| !node.bitmaps.is_empty()) {
            let view = self.new.view(id);
            let length = view.cx().length();
            if node.bitmaps.iter().filter(|bitmap| bitmap.resize(length)).count() == 0
                || node.read_only
                || !self.lasts
            {
                continue;
            }
            let Some(store) = node.node.as_bitmap_store() else { continue };
            let lags = self.graph.lagging().remove(&id);
            let refreshed = match lags {
                true => refresh_cleaner(store, &view, &persistent(node)).await,
                false => store.refresh(&view.cx(), &persistent(node)).await,
            };
            if let Err(error) = refreshed {
                self.graph.lagging().extend(lags.then_some(id));
                tracing::warn!(node = %view.name(), %error, "the bitmaps were not refreshed");
            }
        }
    }

    fn before(&self, id: NodeId) -> Access {
        self.old_access.get(&id).copied().unwrap_or(Access::UNUSED)
    }

    fn after(&self, id: NodeId) -> Access {
        self.new_access.get(&id).copied().unwrap_or(Access::UNUSED)
    }

    /// Flushes the nodes that were written to and will not be any more, and those of which the draft wants it. A filter
    /// keeps nothing, and what it filters is asked for itself: a job that failed must get its filter out above a disk
    /// that cannot be flushed, too.
    async fn flush_leaving(&self) -> Result<(), GraphError> {
        for id in self.moment.flushes.iter().filter(|id| self.old.plan().get(**id).is_some()) {
            self.old.view(*id).cx().flush().await?;
        }
        for (id, node) in self.old.plan().nodes() {
            let now = self.new.plan().get(id);
            let is_filter = node.node.kind() == Kind::Filter;
            let is_given_up = now.is_none() && self.moment.given_up.contains(&id);
            let pointless = is_filter || node.node.is_unusable() || is_given_up;
            let stops = !node.read_only && now.is_none_or(|node| node.read_only) && !pointless;
            if !stops {
                continue;
            }
            match self.old.view(id).cx().flush().await {
                // To keep it would not bring back what it has lost.
                Err(error) if now.is_none() && self.is_out_of_reach(id) => {
                    self.trouble.tell(&format!("Node '{}' could not be flushed: {error}", node.name));
                }
                flushed => flushed?,
            }
        }
        Ok(())
    }

    /// Whether the image in a node is somewhere that nobody gets to any more. (Where its backing image is does not
    /// matter: a flush is not for that.)
    fn is_out_of_reach(&self, id: NodeId) -> bool {
        let plan = self.old.plan();
        let mut files = std::iter::successors(Some(id), |id| plan.node(*id).child(Role::File));
        files.any(|id| plan.node(id).node.is_lost())
    }

    /// Asks the nodes for what their users need from now on, children first.
    async fn gain(&self, done: &mut Done) -> Result<(), GraphError> {
        let mut refused = None;
        for id in self.new.plan().parents_first()?.into_iter().rev() {
            let is_new = self.old.plan().get(id).is_none();
            if refused.is_some() && !(is_new && self.new.plan().node(id).node.kind() == Kind::Protocol) {
                continue;
            }
            let access = self.before(id).both(self.after(id));
            if is_new || access != self.before(id) {
                done.gained.push(id);
                let view = self.new.view(id);
                if let Err(error) = view.cx().node().set_access(&view.cx(), access).await {
                    // Of several files that cannot be had the topmost is told, which people open first.
                    refused = Some(self.of_images_above(id, error));
                    continue;
                }
            }
            if refused.is_some() {
                continue;
            }
            let was_writable = self.old.plan().get(id).is_some_and(|node| !node.read_only);
            if !was_writable && !self.new.plan().node(id).read_only {
                done.begun.push(id);
                self.begin_bitmaps(&self.new.view(id)).await?;
            }
        }
        refused.map_or(Ok(()), |error| Err(error.into()))
    }

    /// An image that cannot be had is the trouble of each that was opened over it in the same go.
    fn of_images_above(&self, id: NodeId, mut error: IoError) -> IoError {
        let (old, new) = (self.old.plan(), self.new.plan());
        let opened_for = |id: &NodeId| new.parents(*id).find(|(parent, _)| old.get(*parent).is_none());
        let mut at = Some(id).filter(|id| old.get(*id).is_none());
        while let Some((parent, role)) = at.as_ref().and_then(opened_for) {
            if role == Role::Backing && new.node(parent).node.kind() != Kind::Filter {
                error = error.context("Could not open backing file");
            }
            at = Some(parent);
        }
        error
    }

    async fn undo(&self, done: Done) {
        let tell = |view: &View, result: Result<(), IoError>| {
            if let Err(error) = result {
                tracing::error!(node = %view.name(), %error, "could not go back after a failed change");
            }
        };
        for (id, _) in done.stored {
            let view = self.old.view(id);
            tell(&view, self.begin_bitmaps(&view).await);
        }
        for id in done.refreshed {
            let Some(node) = self.old.plan().get(id).filter(|node| !node.read_only) else { continue };
            if let Some(store) = node.node.as_bitmap_store() {
                let view = self.old.view(id);
                let refreshed = store.refresh(&view.cx(), &persistent(node)).await;
                if refreshed.is_err() {
                    // The image may call clean what is dirty again.
                    self.graph.lagging().insert(id);
                }
                tell(&view, refreshed);
            }
        }
        for id in done.begun {
            let view = self.new.view(id);
            let node = self.old.plan().get(id).unwrap_or(self.new.plan().node(id));
            tell(&view, self.store(&view, &persistent(node)).await);
        }
        for id in done.gained.into_iter().rev() {
            let view = self.new.view(id);
            let is_new = self.old.plan().get(id).is_none();
            let undone = match is_new {
                true => view.cx().node().close(&view.cx()).await,
                false => view.cx().node().set_access(&view.cx(), self.before(id)).await,
            };
            tell(&view, undone);
        }
    }

    /// Tells the nodes what is not needed any more, parents first, and closes those that are gone.
    async fn give_up(&self) {
        for id in self.old.plan().parents_first().unwrap_or_default() {
            let view = self.old.view(id);
            let done = match self.new.plan().get(id) {
                None => view.cx().node().close(&view.cx()).await,
                Some(_) if self.before(id).both(self.after(id)) != self.after(id) => {
                    let view = self.new.view(id);
                    view.cx().node().set_access(&view.cx(), self.after(id)).await
                }
                Some(_) => Ok(()),
            };
            if let Err(error) = done {
                tracing::error!(node = %view.name(), %error, "could not be closed cleanly");
            }
        }
    }
}

/// What a change has done so far, in case it cannot go on.
#[derive(Default)]
struct Done {
    /// Nodes that were asked to get ready for more.
    gained: Vec<NodeId>,
    /// Nodes whose stored bitmaps were called out of date.
    begun: Vec<NodeId>,
    /// Nodes whose images were told of other bitmaps.
    refreshed: Vec<NodeId>,
    /// Nodes whose bitmaps were stored, and how much was dirty in them.
    stored: Vec<(NodeId, u64)>,
}

fn persistent(node: &PlanNode) -> Vec<PlanBitmap> {
    node.bitmaps.iter().filter(|bitmap| bitmap.persistent).cloned().collect()
}

/// Grows with whatever is written.
fn dirty(bitmaps: &[PlanBitmap]) -> u64 {
    bitmaps.iter().map(|bitmap| bitmap.bits.count()).fold(0, u64::saturating_add)
}

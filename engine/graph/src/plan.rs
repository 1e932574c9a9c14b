//! The wiring as plain data: edited as a draft, checked as a whole, then put into force by the [`crate::Graph`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use crate::align::Blocks;
use crate::bitmaps::PlanBitmap;
use crate::error::{Conflict, GraphError};
use crate::marks::Marks;
use crate::moment::Moment;
use crate::node::{Kind, Node};
use crate::perm::{self, Access, Perms};
use crate::root::{Door, Drained};
use crate::threshold::Crossed;
use crate::units::NodeName;
use crate::view::{Role, Tracker, Trackers, View};

/// A node's place in the plan; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(u64);

impl NodeId {
    /// Of nodes that are in no plan.
    pub const DETACHED: Self = Self(u64::MAX);
}

/// A root's place in the plan; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RootId(u64);

/// What to do with writes of zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// Write them.
    #[default]
    Off,
    /// Make the range read as zeroes.
    On,
    /// The same, and give the space back.
    Unmap,
}

/// Options that every node has, whatever its driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeOptions {
    /// `discard=unmap`: discards are passed on.
    pub discard: bool,
    /// `cache.direct`
    pub cache_direct: bool,
    /// `cache.no-flush`
    pub cache_no_flush: bool,
    /// `detect-zeroes`
    pub detect_zeroes: DetectZeroes,
    /// `force-share`
    pub force_share: bool,
}

/// A node on its way into the plan, with everything below it that is new as well.
#[derive(Debug)]
pub struct NewNode {
    /// `None`: a name is generated.
    pub name: Option<NodeName>,
    /// The node.
    pub node: Arc<dyn Node>,
    /// Not open for writing.
    pub read_only: bool,
    /// The options it was opened with.
    pub options: NodeOptions,
    /// What is below.
    pub children: Vec<(Role, Wiring)>,
}

impl NewNode {
    /// The node as it will be, over nodes of `wires`: to look at before it is in a plan.
    pub fn view(&self, wires: &Wires) -> Arc<View> {
        let child = |wiring: &Wiring| match wiring {
            Wiring::Existing(id) => wires.view(*id),
            Wiring::New(node) => node.view(wires),
        };
        let children: Vec<_> = self.children.iter().map(|(role, wiring)| (*role, child(wiring))).collect();
        View::detached(self.node.clone(), children)
    }
}

/// A child of a new node.
#[derive(Debug)]
pub enum Wiring {
    /// A node that is in the plan.
    Existing(NodeId),
    /// One that comes along.
    New(Box<NewNode>),
}

/// A node in the plan.
#[derive(Clone, Debug)]
pub struct PlanNode {
    /// Its name.
    pub name: NodeName,
    /// The node.
    pub node: Arc<dyn Node>,
    /// Not open for writing.
    pub read_only: bool,
    /// The options it was opened with.
    pub options: NodeOptions,
    /// What is below, in the order in which it was wired.
    pub children: SmallVec<[(Role, NodeId); 2]>,
    /// Kept alive by blockdev-add until blockdev-del.
    pub monitor_owned: bool,
    /// A filter that a job put in without being asked for it by name: users address the node below.
    pub implicit: bool,
    /// Who wants to know of writes.
    pub trackers: SmallVec<[Arc<dyn Tracker>; 1]>,
    /// Its named dirty bitmaps, the newest last.
    pub bitmaps: Vec<PlanBitmap>,
    /// The kind of job that works on this node; other operations on it are refused.
    pub busy: Option<&'static str>,
    /// A job relies on the backing link.
    pub frozen: bool,
    /// Counts the times when requests had to be held back although the wiring stays: see [`Plan::touch`].
    touched: u64,
    blocks: Arc<Blocks>,
}

impl PlanNode {
    /// The end of the highest write to the node so far, in bytes: `wr_highest_offset`.
    pub fn highest_write(&self) -> u64 {
        self.blocks.highest()
    }

    /// `crossed` is told of the first write that goes beyond `at` bytes; at 0: nobody is. At once, also where requests
    /// run.
    pub fn set_write_threshold(&self, at: u64, crossed: Crossed) {
        self.blocks.threshold.set(at, crossed);
    }

    /// How far writes may go before somebody is told; 0: nobody is.
    pub fn write_threshold(&self) -> u64 {
        self.blocks.threshold.at()
    }

    /// Whether the image keeps bitmaps that can be relied on.
    pub fn has_bitmaps_to_keep(&self) -> bool {
        self.bitmaps.iter().any(|bitmap| bitmap.persistent && !bitmap.inconsistent)
    }

    /// Whether requests to the node are the same under both wirings.
    pub(crate) fn is_wired_as(&self, other: &Self) -> bool {
        self.children == other.children
            && self.options == other.options
            && self.read_only == other.read_only
            && self.touched == other.touched
            && self.trackers.len() == other.trackers.len()
            && self.trackers.iter().zip(&other.trackers).all(|(a, b)| Arc::ptr_eq(a, b))
            && self.bitmaps.len() == other.bitmaps.len()
            && self.bitmaps.iter().zip(&other.bitmaps).all(|(a, b)| a.records_as(b))
    }

    /// The child in `role`.
    pub fn child(&self, role: Role) -> Option<NodeId> {
        self.children.iter().find(|(r, _)| *r == role).map(|(_, id)| *id)
    }
}

/// A user of the graph: an export, one end of a job.
#[derive(Clone, Debug)]
pub struct PlanRoot {
    /// Who it is, as permission conflicts name it: `block device 'x'`, `stream job 'job0'`.
    pub user: String,
    /// As what it uses the node: `root`, `main node`, …
    pub role: &'static str,
    /// The node it uses.
    pub node: NodeId,
    /// What it needs.
    pub required: Perms,
    /// What others may do meanwhile.
    pub shared: Perms,
    /// Stays where it is when the users of its node are moved elsewhere: the ends of jobs.
    pub pinned: bool,
    pub(crate) door: Arc<Door>,
    pub(crate) drained: Option<Arc<dyn Drained>>,
}

/// A root on its way into the plan.
#[derive(Debug)]
pub struct NewRoot {
    /// See [`PlanRoot`].
    pub user: String,
    /// See [`PlanRoot`].
    pub role: &'static str,
    /// See [`PlanRoot`].
    pub node: NodeId,
    /// See [`PlanRoot`].
    pub required: Perms,
    /// See [`PlanRoot`].
    pub shared: Perms,
    /// See [`PlanRoot`].
    pub pinned: bool,
    /// Wants to be told when its requests are held back.
    pub drained: Option<Arc<dyn Drained>>,
}

/// The wiring. Cloning copies the wiring only; nodes are shared.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    nodes: BTreeMap<NodeId, PlanNode>,
    names: HashMap<NodeName, NodeId>,
    roots: BTreeMap<RootId, PlanRoot>,
    next: u64,
    generated: u64,
    moment: Moment,
}

impl Plan {
    /// All nodes, oldest first.
    pub fn nodes(&self) -> impl DoubleEndedIterator<Item = (NodeId, &PlanNode)> {
        self.nodes.iter().map(|(id, node)| (*id, node))
    }

    /// All roots, oldest first.
    pub fn roots(&self) -> impl Iterator<Item = (RootId, &PlanRoot)> {
        self.roots.iter().map(|(id, root)| (*id, root))
    }

    /// The node `id`, if it is still there.
    pub fn get(&self, id: NodeId) -> Option<&PlanNode> {
        self.nodes.get(&id)
    }

    /// The node `id`. Panics when it is gone; for ids that were found in this very plan.
    pub fn node(&self, id: NodeId) -> &PlanNode {
        self.get(id).expect("an id of this plan")
    }

    /// For editing the node's own flags.
    pub fn node_mut(&mut self, id: NodeId) -> &mut PlanNode {
        self.nodes.get_mut(&id).expect("an id of this plan")
    }

    /// The root `id`, if it is still there.
    pub fn root(&self, id: RootId) -> Option<&PlanRoot> {
        self.roots.get(&id)
    }

    /// For editing a root's permissions.
    pub fn root_mut(&mut self, id: RootId) -> Option<&mut PlanRoot> {
        self.roots.get_mut(&id)
    }

    /// The node with this name.
    pub fn find(&self, name: &str) -> Option<NodeId> {
        self.names.get(name).copied()
    }

    /// All parents of a node with the role in which it is theirs.
    pub fn parents(&self, id: NodeId) -> impl Iterator<Item = (NodeId, Role)> {
        self.nodes.iter().flat_map(move |(parent, node)| {
            node.children.iter().filter(move |(_, child)| *child == id).map(|(role, _)| (*parent, *role))
        })
    }

    /// The roots that use a node directly.
    pub fn roots_of(&self, id: NodeId) -> impl Iterator<Item = (RootId, &PlanRoot)> {
        self.roots().filter(move |(_, root)| root.node == id)
    }

    /// The backing node, below filters: the next image of the chain.
    pub fn backing(&self, id: NodeId) -> Option<NodeId> {
        let node = self.node(self.skip_filters(id));
        node.child(Role::Backing).map(|below| self.skip_filters(below))
    }

    /// The first node at or below `id` that is no filter.
    pub fn skip_filters(&self, mut id: NodeId) -> NodeId {
        while self.node(id).node.kind() == Kind::Filter {
            let node = self.node(id);
            let Some(below) = node.child(Role::File).or(node.child(Role::Backing)) else { break };
            id = below;
        }
        id
    }

    /// The first node at or below `id` that is not a filter which only a job knows of.
    pub fn skip_implicit(&self, mut id: NodeId) -> NodeId {
        while self.node(id).implicit {
            let node = self.node(id);
            let Some(below) = node.child(Role::Backing).or(node.child(Role::File)) else { break };
            id = below;
        }
        id
    }

    /// The images of a chain from `top` down, filters left out.
    pub fn chain(&self, top: NodeId) -> impl Iterator<Item = NodeId> {
        std::iter::successors(Some(self.skip_filters(top)), |id| self.backing(*id))
    }

    /// The same with the filters among the images.
    pub fn chain_with_filters(&self, top: NodeId) -> impl Iterator<Item = NodeId> {
        std::iter::successors(Some(top), |id| {
            let node = self.node(*id);
            let file = node.child(Role::File).filter(|_| node.node.kind() == Kind::Filter);
            file.or(node.child(Role::Backing))
        })
    }

    /// Adds a node and the new nodes below it.
    pub fn add(&mut self, new: NewNode) -> Result<NodeId, GraphError> {
        let taken = |names: &HashMap<_, _>, name: &Option<NodeName>| match name {
            Some(name) if names.contains_key(name) => Err(GraphError::DuplicateName(name.to_string())),
            _ => Ok(()),
        };
        taken(&self.names, &new.name)?;
        // What a node stands on is older than it, and its backing node is younger: it shows in the order of queries.
        let (backing, others): (Vec<_>, Vec<_>) =
            new.children.into_iter().partition(|(role, _)| *role == Role::Backing);
        let mut children = SmallVec::new();
        for (role, wiring) in others {
            children.push((role, self.add_wiring(wiring)?));
        }
        taken(&self.names, &new.name)?;
        let name = new.name.unwrap_or_else(|| self.generate_name());
        let id = NodeId(self.next);
        self.next += 1;
        self.names.insert(name.clone(), id);
        let bitmaps = new.node.as_bitmap_store().map_or_else(Vec::new, |store| store.loaded());
        let node = PlanNode {
            name,
            node: new.node,
            read_only: new.read_only,
            options: new.options,
            children,
            monitor_owned: false,
            implicit: false,
            trackers: SmallVec::new(),
            bitmaps,
            busy: None,
            frozen: false,
            touched: 0,
            blocks: Arc::default(),
        };
        self.nodes.insert(id, node);
        for (role, wiring) in backing {
            let child = self.add_wiring(wiring)?;
            self.node_mut(id).children.push((role, child));
        }
        Ok(id)
    }

    fn add_wiring(&mut self, wiring: Wiring) -> Result<NodeId, GraphError> {
        match wiring {
            Wiring::Existing(id) if !self.nodes.contains_key(&id) => {
                Err(GraphError::new("The node was removed in the meantime"))
            }
            Wiring::Existing(id) => Ok(id),
            Wiring::New(node) => self.add(*node),
        }
    }

    fn generate_name(&mut self) -> NodeName {
        loop {
            let noise = u8::try_from(self.next.wrapping_mul(37) % 100).expect("below 100");
            let name = NodeName::generated(self.generated, noise);
            self.generated += 1;
            if !self.names.contains_key(&name) {
                return name;
            }
        }
    }

    /// Adds a user of a node.
    pub fn add_root(&mut self, new: NewRoot) -> RootId {
        let id = RootId(self.next);
        self.next += 1;
        let NewRoot { user, role, node, required, shared, pinned, drained } = new;
        let door = Arc::default();
        self.roots.insert(id, PlanRoot { user, role, node, required, shared, pinned, door, drained });
        id
    }

    /// Takes a user away; nodes that only it kept alive go too.
    pub fn remove_root(&mut self, id: RootId) {
        self.roots.remove(&id);
    }

    /// Wires `parent`'s child in `role` anew.
    pub fn set_child(&mut self, parent: NodeId, role: Role, child: Option<NodeId>) -> Result<(), GraphError> {
        let node = self.node(parent);
        if role == Role::Backing && node.frozen && node.child(role) != child {
            let to = node.child(role).map_or_else(String::new, |id| self.node(id).name.to_string());
            return Err(GraphError::Frozen { from: node.name.to_string(), to });
        }
        if node.child(role).is_some_and(|now| Some(now) != child) {
            self.check_link(parent, role)?;
        }
        self.link(parent, role, child);
        Ok(())
    }

    fn link(&mut self, parent: NodeId, role: Role, child: Option<NodeId>) {
        let node = self.node_mut(parent);
        match (child, node.children.iter().position(|(r, _)| *r == role)) {
            (Some(child), Some(at)) => node.children[at].1 = child,
            (Some(child), None) => node.children.push((role, child)),
            (None, Some(at)) => drop(node.children.remove(at)),
            (None, None) => {}
        }
    }

    /// Whether the link below `parent` may change as far as filters above are concerned, which may rely on it.
    pub fn check_link(&self, parent: NodeId, role: Role) -> Result<(), GraphError> {
        let link = self.node(parent);
        let is_filter = link.node.kind() == Kind::Filter;
        let Some(child) = link.child(role) else { return Ok(()) };
        if is_filter != (role == Role::File) {
            return Ok(());
        }
        let relies = |filter: NodeId, bottom: &NodeName| {
            let down = |id: &NodeId| {
                let node = self.node(*id);
                let below =
                    node.child(if node.node.kind() == Kind::Filter { Role::File } else { Role::Backing });
                below.filter(|_| node.name != *bottom)
            };
            std::iter::successors(Some(filter), down)
                .take_while(|id| self.node(*id).name != *bottom)
                .any(|id| id == parent)
        };
        let mut filters = self.nodes().filter_map(|(id, node)| Some((id, node.node.relies_down_to()?)));
        if filters.any(|(id, bottom)| relies(id, bottom)) {
            let (role, from, to) = (role.as_str(), &link.name, &self.node(child).name);
            return Err(GraphError::new(format!("Cannot change '{role}' link from '{from}' to '{to}'")));
        }
        Ok(())
    }

    /// Moves every user of `from` to `to`: parents and roots, except pinned roots and parents for which `keep`.
    pub fn replace(
        &mut self,
        from: NodeId,
        to: NodeId,
        keep: impl Fn(NodeId) -> bool,
    ) -> Result<(), GraphError> {
        let parents: Vec<_> = self.parents(from).filter(|(parent, _)| !keep(*parent)).collect();
        for (parent, role) in parents {
            self.set_child(parent, role, Some(to))?;
        }
        self.move_roots(from, to);
        Ok(())
    }

    /// Moves every user of a filter to what it filters, but for pinned roots. Whoever relies on links of the chain, and
    /// came when the filter was in it already, has the same images as before. Nothing if it has gone.
    pub fn take_out(&mut self, filter: NodeId) {
        let below = |node: &PlanNode| node.child(Role::File).or(node.child(Role::Backing));
        let Some(below) = self.get(filter).and_then(below) else { return };
        for (parent, role) in self.parents(filter).collect::<Vec<_>>() {
            self.link(parent, role, Some(below));
        }
        self.move_roots(filter, below);
    }

    fn move_roots(&mut self, from: NodeId, to: NodeId) {
        for root in self.roots.values_mut().filter(|root| root.node == from && !root.pinned) {
            root.node = to;
        }
    }

    /// Makes a node read-only or writable, together with the file that it opened for itself.
    pub fn set_read_only(&mut self, id: NodeId, read_only: bool) {
        let node = self.node_mut(id);
        node.read_only = read_only;
        let file = node.child(Role::File);
        if let Some(file) = file.filter(|file| !self.node(*file).monitor_owned) {
            self.set_read_only(file, read_only);
        }
    }

    /// If a node goes with this draft, nobody needs what was written to it, nor its file: that they cannot be flushed
    /// does not keep them in the graph. For the target of a copy that came to nothing.
    pub fn give_up_content(&mut self, id: NodeId) {
        let own = |id: NodeId| self.get(id).is_some_and(|node| !node.monitor_owned);
        let below = |id: &NodeId| self.node(*id).child(Role::File).filter(|file| own(*file));
        let all: Vec<_> = std::iter::successors(Some(id).filter(|id| own(*id)), below).collect();
        self.moment.given_up.extend(all);
    }

    /// What was written to a node is made durable before the draft is put into force, and if that fails it is not.
    pub fn flush_before(&mut self, id: NodeId) {
        self.moment.flushes.push(id);
    }

    /// Requests under way are waited for this long at most, and if some are left then, the draft is refused: for a
    /// command that is not worth holding a disk back until a job's target answers again.
    pub fn wait_at_most(&mut self, patience: Duration) {
        self.moment.patience = Some(patience);
    }

    /// Makes the change hold back the requests to this node although its wiring stays: it will be resized, say.
    pub fn touch(&mut self, id: NodeId) {
        self.node_mut(id).touched += 1;
    }

    /// When the draft is put into force, and no request is inside any node that it touches, `action` runs: in turn with
    /// others, before anything that may fail.
    pub fn at_the_moment(&mut self, action: impl FnOnce() + Send + Sync + 'static) {
        self.moment.push(action);
    }

    pub(crate) fn let_images_lag(&mut self) {
        self.moment.may_lag = true;
    }

    pub(crate) fn take_moment(&mut self) -> Moment {
        std::mem::take(&mut self.moment)
    }

    /// From the moment on readers of targets that must not change under them are known ([`Node::serialises_target`]):
    /// new targets, and nodes that have taken the place of one.
    pub(crate) fn serialise_targets(&mut self) {
        let target = |node: &PlanNode| node.child(Role::Target).filter(|_| node.node.serialises_target());
        // Readers may come past a filter above it.
        let targets: Vec<_> =
            self.nodes().filter_map(|(_, node)| target(node)).map(|id| self.skip_filters(id)).collect();
        for target in targets {
            let blocks = self.node(target).blocks.clone();
            if !blocks.is_serialised() {
                // Who reads there now leaves before.
                self.touch(target);
                self.at_the_moment(move || _ = blocks.serialise());
            }
        }
    }

    /// Its views, for looking at what is not in force yet.
    pub fn wires(&self) -> Wires {
        Wires::new(Arc::new(self.clone()))
    }

    /// A node as it is wired here, for looking at.
    pub(crate) fn view(&self, id: NodeId) -> Arc<View> {
        view_of(self, &mut HashMap::new(), id)
    }

    /// Everything below and including `id`.
    pub fn reachable(&self, id: NodeId) -> BTreeSet<NodeId> {
        let mut seen = BTreeSet::new();
        let mut todo = vec![id];
        while let Some(id) = todo.pop() {
            if seen.insert(id) {
                todo.extend(self.node(id).children.iter().map(|(_, child)| *child));
            }
        }
        seen
    }

    /// Drops the nodes that nobody keeps alive: neither the monitor, nor a root, nor a parent.
    pub(crate) fn collect(&mut self) {
        let mut alive = BTreeSet::new();
        let kept = self.nodes.iter().filter(|(_, node)| node.monitor_owned).map(|(id, _)| *id);
        let mut todo: Vec<_> = kept.chain(self.roots.values().map(|root| root.node)).collect();
        while let Some(id) = todo.pop() {
            if alive.insert(id) {
                todo.extend(self.node(id).children.iter().map(|(_, child)| *child));
            }
        }
        self.nodes.retain(|id, _| alive.contains(id));
        self.names.retain(|_, id| alive.contains(id));
    }

    /// Checks the whole: no loops, every format over a file, permissions that get on. Returns what each node's
    /// users ask of it.
    pub fn check(&self) -> Result<BTreeMap<NodeId, Access>, GraphError> {
        let order = self.parents_first()?;
        let mut uses: BTreeMap<NodeId, Vec<Use>> = BTreeMap::new();
        for (id, root) in &self.roots {
            let (age, shared) = (id.0, root.shared);
            let by = Use { age, user: root.user.clone(), role: root.role, required: root.required, shared };
            uses.entry(root.node).or_default().push(by);
        }
        let mut accesses = BTreeMap::new();
        for id in order {
            let node = self.node(id);
            let mut uses_here = uses.remove(&id).unwrap_or_default();
            uses_here.sort_by_key(|one| std::cmp::Reverse(one.age));
            self.check_uses(node, &uses_here)?;
            let writable = !node.read_only;
            let mut access = Access { writable, used: !uses_here.is_empty(), ..Access::UNUSED };
            for one in &uses_here {
                access.required = access.required | one.required;
                access.shared = access.shared & one.shared;
            }
            accesses.insert(id, access);
            for (role, child) in &node.children {
                let (required, mut shared) = perm::for_child(&*node.node, access, *role);
                if *role == Role::File && node.has_bitmaps_to_keep() {
                    // They would not hear of what others write there.
                    shared = shared.without(Perms::WRITE | Perms::RESIZE);
                }
                let (age, user) = (id.0, format!("node '{}'", node.name));
                uses.entry(*child).or_default().push(Use {
                    age,
                    user,
                    role: role.as_str(),
                    required,
                    shared,
                });
            }
        }
        Ok(accesses)
    }

    /// `uses` are the newest first.
    fn check_uses(&self, node: &PlanNode, uses: &[Use]) -> Result<(), GraphError> {
        for one in uses {
            let wants_to_write = !(one.required & (Perms::WRITE | Perms::WRITE_UNCHANGED)).is_empty();
            if node.read_only && wants_to_write {
                return Err(GraphError::ReadOnly);
            }
        }
        // Which conflict is told is the reference's choice: of the newest that does not share.
        for (at_other, other) in uses.iter().enumerate() {
            for (at, one) in uses.iter().enumerate() {
                let refused = one.required.without(other.shared);
                if at != at_other && !refused.is_empty() {
                    let conflict = Conflict {
                        node: node.name.to_string(),
                        perms: refused.to_string(),
                        by: one.user.clone(),
                        by_role: one.role.into(),
                        against: other.user.clone(),
                        against_role: other.role.into(),
                    };
                    return Err(GraphError::Conflict(Box::new(conflict)));
                }
            }
        }
        Ok(())
    }

    /// All nodes, every parent before its children; an error if that cannot be.
    pub(crate) fn parents_first(&self) -> Result<Vec<NodeId>, GraphError> {
        let mut waiting: HashMap<NodeId, usize> = HashMap::new();
        for node in self.nodes.values() {
            for (_, child) in &node.children {
                *waiting.entry(*child).or_default() += 1;
            }
        }
        let mut order: Vec<_> = self.nodes.keys().copied().filter(|id| !waiting.contains_key(id)).collect();
        let mut done = 0;
        while let Some(&id) = order.get(done) {
            done += 1;
            for (_, child) in &self.node(id).children {
                if let Some(count) = waiting.get_mut(child) {
                    *count -= 1;
                    if *count == 0 {
                        order.push(*child);
                    }
                }
            }
        }
        if order.len() == self.nodes.len() {
            return Ok(order);
        }
        // Nodes below a loop wait in vain too; a link of the loop itself is one that leads back to where it starts.
        let links =
            self.nodes.iter().flat_map(|(id, node)| node.children.iter().map(move |link| (*id, node, link)));
        let mut looping = links.filter(|(id, _, (_, child))| self.reachable(*child).contains(id));
        match looping.next_back() {
            Some((_, node, (role, child))) => {
                let to = self.node(*child).name.to_string();
                Err(GraphError::Cycle { from: node.name.to_string(), to, role: role.as_str() })
            }
            None => Err(GraphError::new("The graph would have a loop")),
        }
    }
}

/// One use of a node: by a root or by a parent.
struct Use {
    /// The greater, the newer.
    age: u64,
    user: String,
    role: &'static str,
    required: Perms,
    shared: Perms,
}

/// The views of one plan, made when asked for.
#[derive(Debug)]
pub struct Wires {
    plan: Arc<Plan>,
    views: std::sync::Mutex<HashMap<NodeId, Arc<View>>>,
}

impl Wires {
    pub(crate) fn new(plan: Arc<Plan>) -> Self {
        Self { plan, views: std::sync::Mutex::default() }
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The view of a node of the plan.
    pub fn view(&self, id: NodeId) -> Arc<View> {
        let mut views = self.views.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        view_of(&self.plan, &mut views, id)
    }
}

fn view_of(plan: &Plan, views: &mut HashMap<NodeId, Arc<View>>, id: NodeId) -> Arc<View> {
    // Not recursive: chains may be thousands of nodes deep.
    let mut todo = vec![id];
    while let Some(&id) = todo.last() {
        let node = plan.node(id);
        let missing = node.children.iter().map(|(_, child)| *child).find(|id| !views.contains_key(id));
        if let Some(child) = missing {
            todo.push(child);
            continue;
        }
        todo.pop();
        let children = node.children.iter().map(|(role, id)| (*role, views[id].clone())).collect();
        let (mut before, mut after) = (SmallVec::new(), node.trackers.clone());
        for bitmap in &node.bitmaps {
            let when = if bitmap.persistent { &mut before } else { &mut after };
            when.extend(bitmap.tracker());
        }
        let trackers = Trackers { before: Marks::new(before), after: Marks::new(after) };
        let (options, blocks) = (node.options, node.blocks.clone());
        views.entry(id).or_insert_with(|| {
            View::new(id, node.name.clone(), node.node.clone(), children, trackers, options, blocks)
        });
    }
    views[&id].clone()
}

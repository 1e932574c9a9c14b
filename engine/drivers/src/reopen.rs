//! blockdev-reopen: other options for nodes that are in use.
//!
//! All changes of one command are edits of one draft of the plan, so either all of them are made or none. A node's
//! options are as if it were opened anew: what is not given goes back to its default, or to what its parent hands down
//! to a child that was opened inline. What a driver cannot change is refused, given or left out. The texts are QEMU's.
//!
//! What has to be done to the nodes themselves (files that change their way past the page cache) is the last step of
//! the change, while no request is inside.

use std::sync::Arc;

use async_trait::async_trait;
use underlay_graph::graph::LastStep;
use underlay_graph::plan::Wires;
use underlay_graph::{GraphError, NodeId, NodeOptions, Plan, Role, View};
use underlay_qcow2::{CheckedOptions, OpenOptions, Qcow2};
use underlay_qmp::json::{Object, Value};

use crate::filter::throttle::Throttle;
use crate::format::raw::{Raw, RawOptions};
use crate::options::{Backing, Child, DriverSpec, FileSpec, Inherited, NodeSpec, NullSpec};
use crate::protocol::file::FileNode;
use crate::protocol::nbd::NbdNode;
use crate::protocol::nbd::spec::NbdSpec;
use crate::protocol::null::NullNode;
use crate::throttle::{Groups, Member};

type Result<T> = std::result::Result<T, GraphError>;

/// A reopening under way, on a draft of the plan.
pub struct Reopening<'a> {
    plan: &'a mut Plan,
    groups: &'a Groups,
    step: AtNodes,
    closing: Vec<NodeId>,
}

/// What is done to the nodes when the change is put into force.
#[derive(Default)]
struct AtNodes {
    /// Written out before they get another file.
    flushed: Vec<NodeId>,
    /// Files, past the page cache or not, flushed or not.
    cached: Vec<(NodeId, bool, bool)>,
    /// Images with other options of their own.
    tuned: Vec<(NodeId, CheckedOptions)>,
}

fn text(text: impl Into<String>) -> GraphError {
    GraphError::new(text)
}

fn cannot_change(option: &str) -> GraphError {
    text(format!("Cannot change the option '{option}'"))
}

/// Refuses an option that is not as it was, whether it is given or left out.
fn same(given: &Object, option: &str, is_same: bool) -> Result<()> {
    match (is_same, given.get(option).is_some()) {
        (true, _) => Ok(()),
        (false, true) => Err(cannot_change(option)),
        (false, false) => Err(text(format!("Option '{option}' cannot be reset to its default value"))),
    }
}

/// What a child that was opened inline gets from its parent.
fn handed_down(plan: &Plan, parent: NodeId, role: Role) -> Inherited {
    let node = plan.node(parent);
    let is_file = role == Role::File;
    Inherited {
        read_only: !is_file || node.read_only,
        auto_read_only: false,
        discard: is_file,
        cache_direct: node.options.cache_direct,
        cache_no_flush: node.options.cache_no_flush,
        force_share: node.options.force_share,
    }
}

impl<'a> Reopening<'a> {
    /// On this draft.
    pub fn new(plan: &'a mut Plan, groups: &'a Groups) -> Self {
        Self { plan, groups, step: AtNodes::default(), closing: Vec::new() }
    }

    /// One node with its options, all of them.
    pub fn reopen(&mut self, options: &Object) -> Result<()> {
        let name = options.get("node-name").and_then(Value::as_str);
        let name = name.ok_or_else(|| text("node-name not specified"))?;
        let id = self.plan.find(name).ok_or_else(|| GraphError::NodeNotFound(name.to_owned()))?;
        self.node(options, id)
    }

    /// The nodes that are not open for writing any more, in the order in which they were met.
    pub fn closing(&self) -> &[NodeId] {
        &self.closing
    }

    /// The last step of the change.
    pub fn finish(self) -> Box<dyn LastStep> {
        Box::new(self.step)
    }

    fn node(&mut self, given: &Object, id: NodeId) -> Result<()> {
        let spec = NodeSpec::parse(given.clone()).map_err(|error| text(error.to_string()))?;
        let old = self.plan.node(id).node.clone();
        if old.driver() != spec.driver_name() {
            return Err(cannot_change("driver"));
        }
        let own = old.as_any();
        match &spec.driver {
            DriverSpec::File(new) => file_is_same(given, own.downcast_ref(), new)?,
            DriverSpec::Null(new) => null_is_same(given, own.downcast_ref(), new)?,
            DriverSpec::Nbd(new) => nbd_is_same(given, own.downcast_ref(), new)?,
            DriverSpec::Raw { .. } | DriverSpec::Throttle { .. } => {}
            DriverSpec::Qcow2 { options, .. } => self.qcow2(given, id, own.downcast_ref(), options)?,
            _ => {
                let (driver, name) = (old.driver(), &self.plan.node(id).name);
                return Err(text(format!(
                    "Block format '{driver}' used by node '{name}' does not support reopening files"
                )));
            }
        }
        self.common(given, id, &spec)?;
        match spec.driver {
            DriverSpec::Raw { file, options } => {
                self.child(given, id, Role::File, &file)?;
                self.raw(id, options)
            }
            DriverSpec::Throttle { file, group } => {
                self.child(given, id, Role::File, &file)?;
                self.throttle(id, &group)
            }
            DriverSpec::Qcow2 { file, backing, .. } => {
                self.child(given, id, Role::File, &file)?;
                self.backing(given, id, &backing)
            }
            _ => Ok(()),
        }
    }

    /// The options that every node has.
    fn common(&mut self, given: &Object, id: NodeId, spec: &NodeSpec) -> Result<()> {
        let parent = match self.plan.node(id).monitor_owned {
            true => None,
            false => self.plan.parents(id).next(),
        };
        let inherited = parent.map(|(parent, role)| handed_down(self.plan, parent, role)).unwrap_or_default();
        let options = spec.node_options(&inherited);
        let old = self.plan.node(id);
        same(given, "force-share", options.force_share == old.options.force_share)?;
        let read_only = spec.read_only.unwrap_or(inherited.read_only);
        self.set(id, read_only, options);
        Ok(())
    }

    /// Sets the options of a node, and of the children that have theirs from it. (Not recursive: chains may be long.)
    fn set(&mut self, id: NodeId, read_only: bool, options: NodeOptions) {
        let mut todo = vec![(id, read_only, options)];
        while let Some((id, read_only, options)) = todo.pop() {
            let children = self.plan.node(id).children.clone();
            let before: Vec<_> = children.iter().map(|(role, _)| handed_down(self.plan, id, *role)).collect();
            let node = self.plan.node_mut(id);
            if read_only && !node.read_only {
                self.closing.push(id);
            }
            (node.read_only, node.options) = (read_only, options);
            if node.node.as_any().is::<FileNode>() {
                self.step.cached.push((id, options.cache_direct, options.cache_no_flush));
            }
            for ((role, child), was) in children.into_iter().zip(before) {
                todo.extend(self.followed(child, was, handed_down(self.plan, id, role)));
            }
        }
    }

    /// What a child that was opened inline has from its parent from now on, where it had that before.
    fn followed(&self, child: NodeId, was: Inherited, now: Inherited) -> Option<(NodeId, bool, NodeOptions)> {
        let node = self.plan.node(child);
        let (mut read_only, mut options) = (node.read_only, node.options);
        let follow = |value: &mut bool, was: bool, now: bool| {
            if *value == was {
                *value = now;
            }
        };
        follow(&mut read_only, was.read_only, now.read_only);
        follow(&mut options.cache_direct, was.cache_direct, now.cache_direct);
        follow(&mut options.cache_no_flush, was.cache_no_flush, now.cache_no_flush);
        let changes = (read_only, options) != (node.read_only, node.options);
        (changes && !node.monitor_owned).then_some((child, read_only, options))
    }

    /// A child by its name, or by the options of the one that is there.
    fn child(&mut self, given: &Object, id: NodeId, role: Role, child: &Child) -> Result<()> {
        let wired = self.plan.node(id).child(role);
        // A job's filter in between does not count.
        let now = wired.map(|wired| self.plan.skip_implicit(wired));
        let name = match child {
            Child::Reference(name) => name,
            Child::Inline(spec) => {
                let other = || cannot_change(&format!("{}.driver", role.as_str()));
                let now = now.filter(|child| !self.plan.node(*child).monitor_owned).ok_or_else(other)?;
                if self.plan.parents(now).count() != 1 || self.plan.roots_of(now).next().is_some() {
                    return Err(other());
                }
                if spec.node_name.as_deref().is_some_and(|name| name != self.plan.node(now).name.as_str()) {
                    return Err(cannot_change("node-name"));
                }
                let Some(Value::Object(options)) = given.get(role.as_str()) else { return Err(other()) };
                return self.node(&options.clone(), now);
            }
        };
        let missing = || text(format!("Cannot find device='' nor node-name='{name}'"));
        let found = self.plan.find(name).ok_or_else(missing)?;
        if now == Some(found) || wired == Some(found) {
            return Ok(());
        }
        self.has_no_implicit(id, role)?;
        let keeps_metadata = self.plan.node(id).node.keeps_metadata();
        let bytes = |plan: &Plan, id| plan.skip_filters(id);
        if role == Role::File
            && keeps_metadata
            && now.map(|now| bytes(self.plan, now)) != Some(bytes(self.plan, found))
        {
            let id = &self.plan.node(id).name;
            return Err(text(format!(
                "The file of '{id}' can only get or lose filters, '{name}' is another file"
            )));
        }
        let is_other = now.map(|now| bytes(self.plan, now)) != Some(bytes(self.plan, found));
        if role == Role::File && is_other {
            self.other_file(id)?;
        }
        self.plan.set_child(id, role, Some(found))?;
        if !self.plan.node(id).read_only && role == Role::File {
            self.step.flushed.push(id);
        }
        Ok(())
    }

    /// Refuses when a job has its filter in this place: the job relies on what comes by there.
    fn has_no_implicit(&self, id: NodeId, role: Role) -> Result<()> {
        let node = self.plan.node(id);
        let Some(filter) = node.child(role).filter(|child| self.plan.node(*child).implicit) else {
            return Ok(());
        };
        let (role, name) = (role.as_str(), &node.name);
        Err(text(match self.plan.node(filter).busy {
            Some("commit") => {
                let below = &self.plan.node(self.plan.skip_implicit(filter)).name;
                format!("Cannot change frozen '{role}' link from '{name}' to '{below}'")
            }
            _ => format!("Cannot replace implicit {role} child of {name}"),
        }))
    }

    /// The bitmaps of a raw disk belong to its file.
    fn other_file(&mut self, id: NodeId) -> Result<()> {
        let node = self.plan.node(id);
        let Some(raw) = node.node.as_any().downcast_ref::<Raw>() else { return Ok(()) };
        if node.bitmaps.iter().any(|bitmap| bitmap.persistent) {
            return Err(text(format!("The persistent bitmaps of '{}' belong to its file", node.name)));
        }
        let raw = raw.elsewhere();
        self.plan.node_mut(id).node = Arc::new(raw);
        self.plan.touch(id);
        Ok(())
    }

    fn backing(&mut self, given: &Object, id: NodeId, backing: &Backing) -> Result<()> {
        let node = self.plan.node(id);
        match backing {
            Backing::Child(child) => self.child(given, id, Role::Backing, child),
            // Old programs mean that there is nothing below when they open an image; here it is the name of a node.
            Backing::None if given.get("backing").and_then(Value::as_str).is_some() => {
                Err(text("Cannot find device='' nor node-name=''".to_owned()))
            }
            Backing::None => {
                self.has_no_implicit(id, Role::Backing)?;
                self.plan.set_child(id, Role::Backing, None)
            }
            Backing::FromImage
                if node.child(Role::Backing).is_none() && node.node.backing_ref().is_none() =>
            {
                Ok(())
            }
            Backing::FromImage | Backing::FromImageWith(_) => {
                Err(text(format!("backing is missing for '{}'", node.name)))
            }
        }
    }

    fn raw(&mut self, id: NodeId, options: RawOptions) -> Result<()> {
        let node = self.plan.node(id);
        let Some(file) = node.child(Role::File) else { return Ok(()) };
        if node.node.as_any().downcast_ref::<Raw>().is_some_and(|raw| raw.has_options(&options)) {
            return Ok(());
        }
        if node.bitmaps.iter().any(|bitmap| bitmap.persistent) {
            return Err(text(format!("The persistent bitmaps of '{}' belong to all of its file", node.name)));
        }
        // Only its length is asked.
        let view = self.view(file);
        let raw = Raw::open(&view.cx(), options)?;
        self.plan.node_mut(id).node = Arc::new(raw);
        self.plan.touch(id);
        Ok(())
    }

    fn qcow2(
        &mut self,
        given: &Object,
        id: NodeId,
        image: Option<&Qcow2>,
        options: &OpenOptions,
    ) -> Result<()> {
        let Some(image) = image else { return Err(cannot_change("driver")) };
        let slice = |options: &OpenOptions| options.l2_cache_entry_size;
        same(given, "l2-cache-entry-size", slice(&image.options()) == slice(options))?;
        let checked = image.check_options(options.clone()).map_err(|error| text(error.to_string()))?;
        self.step.tuned.push((id, checked));
        Ok(())
    }

    fn throttle(&mut self, id: NodeId, group: &str) -> Result<()> {
        let missing = || text(format!("Throttle group '{group}' does not exist"));
        let group = self.groups.get(group).ok_or_else(missing)?;
        let node = self.plan.node_mut(id);
        let throttle = node.node.as_any().downcast_ref::<Throttle>();
        if throttle.is_some_and(|throttle| Arc::ptr_eq(throttle.member().group(), &group)) {
            return Ok(());
        }
        node.node = Arc::new(Throttle::new(Member::new(group)));
        self.plan.touch(id);
        Ok(())
    }

    /// A node of the draft and the files below it.
    fn view(&self, id: NodeId) -> Arc<View> {
        let node = self.plan.node(id);
        let file = node.child(Role::File).map(|file| (Role::File, self.view(file)));
        View::detached_as(node.name.clone(), node.node.clone(), file)
    }
}

fn file_is_same(given: &Object, old: Option<&FileNode>, new: &FileSpec) -> Result<()> {
    let Some(old) = old.map(FileNode::spec) else { return Err(cannot_change("driver")) };
    same(given, "filename", old.filename == new.filename)?;
    same(given, "locking", old.locking == new.locking)?;
    same(given, "aio", old.aio == new.aio)
}

fn null_is_same(given: &Object, old: Option<&NullNode>, new: &NullSpec) -> Result<()> {
    let Some(old) = old.map(NullNode::spec) else { return Err(cannot_change("driver")) };
    same(given, "size", old.size == new.size)?;
    same(given, "latency-ns", old.latency_ns == new.latency_ns)?;
    same(given, "read-zeroes", old.read_zeroes == new.read_zeroes)
}

fn nbd_is_same(given: &Object, old: Option<&NbdNode>, new: &NbdSpec) -> Result<()> {
    let Some(old) = old.map(NbdNode::spec) else { return Err(cannot_change("driver")) };
    same(given, "export", old.export == new.export)?;
    same(given, "reconnect-delay", old.reconnect_delay == new.reconnect_delay)?;
    same(given, "open-timeout", old.open_timeout == new.open_timeout)?;
    if old.server == new.server {
        return Ok(());
    }
    let kind = |spec: &NbdSpec| std::mem::discriminant(&spec.server);
    let path = matches!(new.server, underlay_sys::net::Address::Unix(_)) && kind(old) == kind(new);
    Err(cannot_change(if path { "server.path" } else { "server.type" }))
}

#[async_trait]
impl LastStep for AtNodes {
    async fn run(self: Box<Self>, old: &Wires, new: &Wires) -> Result<()> {
        for id in self.flushed {
            old.view(id).cx().flush().await?;
        }
        let mut undo = Vec::new();
        for (id, direct, no_flush) in self.cached {
            let Some(node) = new.plan().get(id).map(|node| node.node.clone()) else { continue };
            let Some(file) = node.as_any().downcast_ref::<FileNode>() else { continue };
            match file.set_cache(direct, no_flush) {
                Ok(before) => undo.push((node, before)),
                Err(error) => {
                    for (node, (direct, no_flush)) in undo.into_iter().rev() {
                        let file = node.as_any().downcast_ref::<FileNode>();
                        if let Some(Err(error)) = file.map(|file| file.set_cache(direct, no_flush)) {
                            tracing::error!(%error, "could not go back after a failed reopening");
                        }
                    }
                    return Err(error.into());
                }
            }
        }
        for (id, options) in self.tuned {
            let node = new.plan().get(id).map(|node| node.node.clone());
            if let Some(image) = node.as_ref().and_then(|node| node.as_any().downcast_ref::<Qcow2>()) {
                image.set_options(options);
            }
        }
        Ok(())
    }
}

/// The node among `closing` that has users who write, which is why the change was refused.
pub fn read_write_users(graph: &underlay_graph::Graph, closing: &[NodeId]) -> Option<GraphError> {
    use underlay_graph::Perms;
    let plan = graph.plan();
    let written =
        |id: &NodeId| !(graph.access(*id).required & (Perms::WRITE | Perms::WRITE_UNCHANGED)).is_empty();
    let node = plan.get(*closing.iter().find(|id| written(id))?)?;
    Some(text(format!("Read-only block node '{}' cannot support read-write users", node.name)))
}

//! From options to nodes: opens what a [`NodeSpec`] describes, with everything below it.
//!
//! Nothing enters the graph here: the result is a [`NewNode`] for a plan's draft, so a failure leaves nothing
//! behind. Backing files that images name themselves are opened under one [`BackingPolicy`], one after the other
//! (not recursively: chains may be long), and a chain that comes back to a file it has been at is an error.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use underlay_graph::plan::Wires;
use underlay_graph::{
    Graph, GraphError, Kind, Limits, NewNode, Node, NodeId, NodeName, NodeOptions, Plan, Role, View, Wiring,
};
use underlay_qcow2::{Corruption, Qcow2};
use underlay_qmp::json::Object;
use underlay_sys::{complain, complain_part};

use crate::error::OpenError;
use crate::filter::copy_before_write::{CbwOptions, CopyBeforeWrite};
use crate::filter::copy_on_read::CopyOnRead;
use crate::filter::snapshot_access::SnapshotAccess;
use crate::filter::throttle::Throttle;
use crate::format::raw::Raw;
use crate::names;
use crate::options::{Backing, Child, DriverSpec, Inherited, NodeSpec, probed};
use crate::probe::probe;
use crate::protocol::file::FileNode;
use crate::protocol::nbd::NbdNode;
use crate::protocol::null::NullNode;
use crate::throttle::{Groups, Member};

/// What may be opened because an image says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackingPolicy {
    /// Whatever the image names, read-only.
    #[default]
    Follow,
    /// Nothing: images are opened without what is below them (`img info`, `rebase -u`).
    Ignore,
}

/// Told when a node finds its image damaged: the node's name (empty when it has none yet) and what was found.
pub type OnCorrupt = Arc<dyn Fn(&str, Corruption) + Send + Sync>;

/// Tells whoever runs a program.
pub fn tell_on_stderr() -> OnCorrupt {
    Arc::new(|_, found| complain!("{found}"))
}

/// The name under which the program runs, for messages.
fn program() -> String {
    let path = std::env::args().next().unwrap_or_default();
    path.rsplit('/').next().unwrap_or_default().to_owned()
}

/// Tells whoever runs a program what goes wrong too late for an error ([`Graph::on_trouble`]).
pub fn tell_trouble_on_stderr(text: &str) {
    complain!("{}: {text}", program());
}

/// As QEMU tells it, down to the newline that is missing.
fn tell_of_stale_bitmaps() {
    let program = program();
    complain_part!(
        "{program}: warning: a program lacking bitmap support modified this file, so all bitmaps are now considered \
         inconsistent\nSome clusters may be leaked, run 'qemu-img check -r' on the image file to fix."
    );
}

/// Opens nodes.
pub struct Opener {
    wires: Wires,
    policy: BackingPolicy,
    on_corrupt: Option<OnCorrupt>,
    groups: Arc<Groups>,
    find: FindNode,
}

/// How a name in options leads to a node that is there already.
pub type FindNode = Arc<dyn Fn(&Plan, &str) -> Option<NodeId> + Send + Sync>;

/// A node that was opened, and a view of it for whoever is above.
struct Opened {
    wiring: Wiring,
    view: Arc<View>,
    /// The plain name of the image, for relative names in it.
    filename: Option<String>,
}

/// An image whose backing node is still missing.
struct Unbacked {
    spec: NodeSpec,
    node: Arc<dyn Node>,
    read_only: bool,
    options: NodeOptions,
    file: Opened,
    target: Option<Opened>,
}

impl Opener {
    /// For nodes that may refer to those of `graph`.
    pub fn new(graph: &Graph, policy: BackingPolicy, on_corrupt: Option<OnCorrupt>) -> Self {
        Self::over(graph.wires(), policy, on_corrupt)
    }

    /// The same for nodes of a plan that may not be in force yet.
    pub fn over(wires: Wires, policy: BackingPolicy, on_corrupt: Option<OnCorrupt>) -> Self {
        let find: FindNode = Arc::new(|plan, name| plan.find(name));
        Self { wires, policy, on_corrupt, groups: Arc::default(), find }
    }

    /// With names beside those of nodes.
    pub fn with_names(self, find: FindNode) -> Self {
        Self { find, ..self }
    }

    /// With the throttle groups that there are.
    pub fn with_groups(self, groups: &Arc<Groups>) -> Self {
        Self { groups: groups.clone(), ..self }
    }

    /// Opens `spec` and everything below it.
    pub async fn open(&self, spec: NodeSpec) -> Result<NewNode, OpenError> {
        match self.open_chain(spec, Inherited::default()).await?.wiring {
            Wiring::New(node) => Ok(*node),
            Wiring::Existing(_) => Err(OpenError::text("A node must be given by its options".to_owned())),
        }
    }

    /// Opens a node and, as long as images name what is below them, the next one.
    async fn open_chain(&self, spec: NodeSpec, inherited: Inherited) -> Result<Opened, OpenError> {
        let mut waiting: Vec<Unbacked> = Vec::new();
        let mut visited = HashSet::new();
        let mut next = Some((Child::Inline(Box::new(spec)), inherited));
        let mut below = None;
        while let Some((child, inherited)) = next.take() {
            let spec = match child {
                Child::Inline(spec) => *spec,
                Child::Reference(name) => {
                    below = Some(self.existing(&name).map_err(|error| in_backing(error, waiting.len()))?);
                    break;
                }
            };
            let image = self.open_image(spec, inherited).await.map_err(|e| in_backing(e, waiting.len()))?;
            if let Some(path) = image.file.filename.as_deref().and_then(identity)
                && !visited.insert(path)
            {
                let name = image.file.filename.unwrap_or_default();
                return Err(OpenError::text(format!("Backing file '{name}' creates an infinite loop.")));
            }
            next = self.below(&image).map_err(|e| in_backing(e, waiting.len()))?;
            waiting.push(image);
        }
        while let Some(image) = waiting.pop() {
            below = Some(assemble(image, below)?);
        }
        below.ok_or_else(|| OpenError::text("A block device must be specified".to_owned()))
    }

    fn existing(&self, name: &str) -> Result<Opened, OpenError> {
        let plan = self.wires.plan();
        let id = (self.find)(plan, name).ok_or_else(|| GraphError::NeitherDeviceNorNode(name.to_owned()))?;
        let view = self.wires.view(id);
        let filename = crate::filename::exact(&view);
        Ok(Opened { wiring: Wiring::Existing(id), view, filename })
    }

    /// What an image wants below it: given by its options, or named by itself.
    fn below(&self, image: &Unbacked) -> Result<Option<(Child, Inherited)>, OpenError> {
        let DriverSpec::Qcow2 { backing, .. } = &image.spec.driver else { return Ok(None) };
        let inherited = Inherited {
            read_only: true,
            auto_read_only: false,
            // So that a commit gives back what the image below has no use for any more.
            discard: image.options.discard,
            cache_direct: image.options.cache_direct,
            cache_no_flush: image.options.cache_no_flush,
            force_share: image.options.force_share,
        };
        match backing {
            Backing::None => Ok(None),
            Backing::Child(child) => Ok(Some((child.clone(), inherited))),
            Backing::FromImage | Backing::FromImageWith(_) if self.policy == BackingPolicy::Ignore => {
                Ok(None)
            }
            Backing::FromImage | Backing::FromImageWith(_) => {
                let Some(named) = image.node.backing_ref() else { return Ok(None) };
                let own = image.file.filename.as_deref().unwrap_or_default();
                let name = names::resolve_backing(own, &named.file);
                let spec = match backing {
                    Backing::FromImageWith(options) => {
                        NodeSpec::image_with(&name, named.format.as_deref(), options.clone())
                    }
                    _ => NodeSpec::image(&name, named.format.as_deref()),
                };
                let spec = spec.map_err(|error| OpenError::Backing(Box::new(error)))?;
                Ok(Some((Child::Inline(Box::new(spec)), inherited)))
            }
        }
    }

    /// Opens a node without its backing node.
    async fn open_image(&self, mut spec: NodeSpec, inherited: Inherited) -> Result<Unbacked, OpenError> {
        let read_only = spec.read_only.unwrap_or(inherited.read_only);
        let options = spec.node_options(&inherited);
        if options.force_share && !read_only {
            return Err(OpenError::text("force-share=on can only be used with read-only images".to_owned()));
        }
        let auto_read_only = spec.auto_read_only.unwrap_or(inherited.auto_read_only);
        let for_file = Inherited { read_only, auto_read_only, discard: true, ..inherit(&options) };
        if let DriverSpec::Probe { file, rest } = &mut spec.driver {
            let rest = std::mem::take(rest);
            let file = self.open_child(file.clone(), for_file).await?;
            return self.open_probed(spec, rest, file, read_only, options).await;
        }
        let (node, file): (Arc<dyn Node>, Opened) = match &mut spec.driver {
            DriverSpec::File(file) => {
                let node = FileNode::open(file, &options, read_only, auto_read_only).await?;
                let read_only = node.is_read_only();
                return Ok(protocol(spec, Arc::new(node), read_only, options));
            }
            DriverSpec::Nbd(nbd) => {
                let node = NbdNode::open(nbd, read_only, auto_read_only).await?;
                let read_only = node.is_read_only();
                return Ok(protocol(spec, Arc::new(node), read_only, options));
            }
            DriverSpec::Null(null) => {
                let node = Arc::new(NullNode::new(null));
                return Ok(protocol(spec, node, read_only, options));
            }
            DriverSpec::Raw { file, options } => {
                let file = self.open_child(file.clone(), for_file).await?;
                let raw = Raw::open(&file.view.cx(), options.clone())?.with_bitmaps(&file.view).await;
                (Arc::new(raw), file)
            }
            DriverSpec::Qcow2 { file, .. } => {
                let file = self.open_child(file.clone(), for_file).await?;
                (self.open_qcow2(&spec, &file).await?, file)
            }
            DriverSpec::Throttle { file, group } => {
                let found = self.groups.get(group);
                let missing = || OpenError::text(format!("Throttle group '{group}' does not exist"));
                let member = Member::new(found.ok_or_else(missing)?);
                (Arc::new(Throttle::new(member)), self.open_child(file.clone(), for_file).await?)
            }
            DriverSpec::CopyOnRead { file, bottom } => {
                let file = self.open_child(file.clone(), for_file).await?;
                let bottom = bottom.as_deref().map(|name| self.bottom(name, &file.view)).transpose()?;
                (Arc::new(CopyOnRead::new(bottom)), file)
            }
            DriverSpec::SnapshotAccess { file } => {
                let file = self.open_child(file.clone(), for_file).await?;
                (Arc::new(SnapshotAccess), file)
            }
            DriverSpec::CopyBeforeWrite { file, target, options: how, bitmap } => {
                let file = self.open_child(file.clone(), for_file).await?;
                let target = self.open_child(target.clone(), for_file).await?;
                let node = self.open_copy_before_write(&file, &target, *how, bitmap.clone())?;
                return Ok(Unbacked { spec, node, read_only, options, file, target: Some(target) });
            }
            DriverSpec::Probe { .. } => return Err(OpenError::text("The format is not known".to_owned())),
        };
        Ok(Unbacked { spec, node, read_only, options, file, target: None })
    }

    fn open_copy_before_write(
        &self,
        file: &Opened,
        target: &Opened,
        how: CbwOptions,
        bitmap: Option<(String, String)>,
    ) -> Result<Arc<dyn Node>, OpenError> {
        let bitmap = bitmap.map(|(node, name)| self.bitmap(&node, name)).transpose()?;
        let filter = copy_before_write(&file.view, &target.view, how)?;
        if let Some((node, name)) = bitmap {
            let size = file.view.cx().length();
            let bits = self.wires.plan().bits_for_size(node, &name, size).map_err(|why| {
                let text = "Cannot create block-copy-state: Failed to merge bitmap";
                OpenError::text(format!("{text} '{name}' to internal copy-bitmap: {why}"))
            })?;
            filter.copies().limit_to(&bits);
        }
        Ok(filter)
    }

    fn bitmap(&self, node: &str, name: String) -> Result<(NodeId, String), OpenError> {
        let plan = self.wires.plan();
        let id = (self.find)(plan, node);
        let id = id.ok_or_else(|| OpenError::text(format!("Node '{node}' not found")))?;
        plan.bitmap(id, &name).map_err(|why| OpenError::text(why.to_string()))?;
        Ok((id, name))
    }

    /// The lowest image that a copy-on-read filter above `top` shall copy from.
    fn bottom(&self, name: &str, top: &View) -> Result<NodeName, OpenError> {
        let mut at = Some(top.cx());
        while let Some(layer) = at {
            let is_filter = layer.node().kind() == Kind::Filter;
            if layer.view().name().as_str() == name {
                return match is_filter {
                    true => Err(OpenError::text(format!("Bottom node '{name}' is a filter"))),
                    false => Ok(layer.view().name().clone()),
                };
            }
            at = layer.child(if is_filter { Role::File } else { Role::Backing });
        }
        Err(OpenError::text(match self.wires.plan().find(name) {
            Some(_) => format!("Bottom node '{name}' is not in the chain below this node"),
            None => format!("Bottom node '{name}' not found"),
        }))
    }

    async fn open_probed(
        &self,
        mut spec: NodeSpec,
        rest: Object,
        file: Opened,
        read_only: bool,
        options: NodeOptions,
    ) -> Result<Unbacked, OpenError> {
        spec.driver = probed(probe(&file.view.cx()).await?, rest)?;
        let node: Arc<dyn Node> = match &spec.driver {
            DriverSpec::Raw { options, .. } => {
                let raw = Raw::open(&file.view.cx(), options.clone())?.guessed();
                Arc::new(raw.with_bitmaps(&file.view).await)
            }
            _ => self.open_qcow2(&spec, &file).await?,
        };
        Ok(Unbacked { spec, node, read_only, options, file, target: None })
    }

    async fn open_qcow2(&self, spec: &NodeSpec, file: &Opened) -> Result<Arc<dyn Node>, OpenError> {
        let DriverSpec::Qcow2 { options, .. } = &spec.driver else {
            return Err(OpenError::text("not a qcow2 image".to_owned()));
        };
        let mut options = (**options).clone();
        if let Some(on_corrupt) = self.on_corrupt.clone() {
            let name = spec.node_name.clone().unwrap_or_default();
            options.on_corrupt = Some(Arc::new(move |corruption| on_corrupt(&name, corruption)));
        }
        let image = Qcow2::open(&file.view.cx(), options).await;
        let image = image.map_err(|error| OpenError::Qcow2(error.to_string()))?;
        if self.on_corrupt.is_some() && image.header().extensions.bitmaps_stale {
            tell_of_stale_bitmaps();
        }
        Ok(Arc::new(image))
    }

    async fn open_child(&self, child: Child, inherited: Inherited) -> Result<Opened, OpenError> {
        match child {
            Child::Reference(name) => self.existing(&name),
            Child::Inline(spec) => Box::pin(self.open_chain(*spec, inherited)).await,
        }
    }
}

fn copy_before_write(disk: &View, target: &View, how: CbwOptions) -> Result<Arc<CopyBeforeWrite>, OpenError> {
    let is_same = disk.id() == target.id() && disk.id() != underlay_graph::NodeId::DETACHED;
    if is_same {
        return Err(OpenError::text("Source and target cannot be the same".to_owned()));
    }
    if target.cx().length() < disk.cx().length() {
        return Err(OpenError::text(
            "The target is smaller than the disk that is to be copied there".to_owned(),
        ));
    }
    CopyBeforeWrite::new(disk, target, how).map_err(OpenError::text)
}

fn inherit(options: &NodeOptions) -> Inherited {
    Inherited {
        cache_direct: options.cache_direct,
        cache_no_flush: options.cache_no_flush,
        force_share: options.force_share,
        ..Inherited::default()
    }
}

/// A protocol node has no file below; it stands for itself.
fn protocol(spec: NodeSpec, node: Arc<dyn Node>, read_only: bool, options: NodeOptions) -> Unbacked {
    let view = View::detached(node.clone(), []);
    let filename = node.exact_filename();
    // The wiring of a protocol's `file` is never used: `assemble` knows protocols by having no file child.
    let file = Opened { wiring: Wiring::Existing(underlay_graph::NodeId::DETACHED), view, filename };
    Unbacked { spec, node, read_only, options, file, target: None }
}

/// Each of the images above has something to say.
fn in_backing(error: OpenError, depth: usize) -> OpenError {
    (0..depth).fold(error, |error, _| OpenError::Backing(Box::new(error)))
}

/// Which file a name leads to, for finding loops.
fn identity(name: &str) -> Option<PathBuf> {
    std::fs::canonicalize(names::plain_path(name)).ok()
}

/// Wires an opened node with its children.
fn assemble(image: Unbacked, backing: Option<Opened>) -> Result<Opened, OpenError> {
    let Unbacked { spec, node, read_only, options, file, target } = image;
    let name = match &spec.node_name {
        None => None,
        Some(name) => {
            let valid = NodeName::new(name).ok_or_else(|| GraphError::InvalidName(name.clone()))?;
            if name.len() > NodeName::MAX {
                return Err(GraphError::NameTooLong.into());
            }
            Some(valid)
        }
    };
    let filename = file.filename;
    let mut children = Vec::new();
    let mut views = Vec::new();
    if !matches!(file.wiring, Wiring::Existing(underlay_graph::NodeId::DETACHED)) {
        views.push((Role::File, file.view));
        children.push((Role::File, file.wiring));
    }
    if let Some(target) = target {
        views.push((Role::Target, target.view));
        children.push((Role::Target, target.wiring));
    }
    if let Some(backing) = backing {
        views.push((Role::Backing, backing.view));
        children.push((Role::Backing, backing.wiring));
    }
    let view = match &name {
        Some(name) => View::detached_as(name.clone(), node.clone(), views),
        None => View::detached(node.clone(), views),
    };
    debug_assert!(view.cx().limits().request_alignment >= Limits::default().request_alignment);
    let new = NewNode { name, node, read_only, options, children };
    Ok(Opened { wiring: Wiring::New(Box::new(new)), view, filename })
}

//! Opening images for a tool: a graph of one's own, and everything flushed and closed at the end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use underlay_drivers::filename;
use underlay_drivers::open::{tell_on_stderr, tell_trouble_on_stderr};
use underlay_drivers::options::{Child, DriverSpec, nest};
use underlay_drivers::{BackingPolicy, NodeSpec, Opener};
use underlay_graph::plan::{NewRoot, Wires};
use underlay_graph::status::{Status, status};
use underlay_graph::{ByteRange, Graph, GraphError, IoError, NodeId, Perms, Root, RootId};

use underlay_qmp::json::Value;
use underlay_sys::complain;

use crate::{Failure, Outcome};

/// How to open an image.
#[derive(Clone, Copy, Debug, Default)]
pub struct How<'a> {
    /// Its format; probed when absent.
    pub format: Option<&'a str>,
    /// `--image-opts`: what is given as its name is a list of options.
    pub image_opts: bool,
    /// Not the image, but what it is stored in.
    pub protocol: bool,
    /// For writing too.
    pub write: bool,
    /// Resizing it, too.
    pub resize: bool,
    /// That what is discarded is given back goes without saying. (It is in any case; this is for options that need it.)
    pub unmap: bool,
    /// Share it with whoever uses it.
    pub force_share: bool,
    /// Refuse an image that somebody may be writing to.
    pub no_share: bool,
    /// Without what is below it.
    pub no_backing: bool,
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    name: String,
    /// Nobody said of what format it is.
    probed: bool,
    graph: Arc<Graph>,
    node: NodeId,
    root_id: RootId,
    /// The way in.
    pub root: Root,
}

/// An image could not be closed as it should.
static IN_TROUBLE: AtomicBool = AtomicBool::new(false);

/// Opens an image; errors are worded as qemu-img's, but for its name.
pub async fn image(name: &str, how: How<'_>) -> Result<Image, Failure> {
    let graph = Graph::new();
    graph.on_trouble(|text| {
        tell_trouble_on_stderr(text);
        IN_TROUBLE.store(true, Ordering::Relaxed);
    });
    image_in(graph, name, how).await
}

/// The same beside the images that are open already.
pub async fn image_in(graph: Arc<Graph>, name: &str, how: How<'_>) -> Result<Image, Failure> {
    let failed = |error: &dyn std::fmt::Display, hint: Option<&str>| {
        Failure::with_hint(format!("Could not open '{name}': {error}"), hint)
    };
    let mut spec = match how.image_opts {
        true => listed(name, how, &|error| failed(error, None))?,
        false => NodeSpec::image_as(name, how.format, how.unmap).map_err(|error| failed(&error, None))?,
    };
    if how.protocol {
        if how.write && spec.read_only == Some(true) {
            return Err(failed(&"Block node is read-only", None));
        }
        spec = stored_in(spec);
    }
    let probed = matches!(spec.driver, DriverSpec::Probe { .. });
    spec.read_only.get_or_insert(!how.write);
    spec.force_share.get_or_insert(how.force_share);
    spec.discard.get_or_insert(true);
    let policy = if how.no_backing { BackingPolicy::Ignore } else { BackingPolicy::Follow };
    let opened = Opener::new(&graph, policy, Some(tell_on_stderr())).open(spec).await;
    let new = opened.map_err(|error| failed(&error, error.cause().and_then(|cause| cause.hint())))?;
    let mut required = Perms::CONSISTENT_READ;
    if how.write {
        required = required | Perms::WRITE;
    }
    if how.resize {
        required = required | Perms::RESIZE;
    }
    let edit = |plan: &mut underlay_graph::Plan| {
        let node = plan.add(new)?;
        let user = "an unnamed block device".to_owned();
        let shared = match how.no_share {
            true => Perms::CONSISTENT_READ | Perms::WRITE_UNCHANGED,
            false => Perms::ALL,
        };
        let root = NewRoot { user, role: "root", node, required, shared, pinned: false, drained: None };
        Ok((node, plan.add_root(root)))
    };
    let changed = graph.change(edit).await;
    let (node, root_id) = changed.map_err(|error| failed(&error, error.hint()))?;
    open_images().push((graph.clone(), node));
    let root = graph.root(root_id).ok_or_else(|| Failure::new("the image was closed"))?;
    let name = if how.image_opts { filename::of_alone(&graph.wires().view(node)) } else { name.to_owned() };
    Ok(Image { name, probed, graph, node, root_id, root })
}

/// The images that are open.
fn open_images() -> MutexGuard<'static, Vec<(Arc<Graph>, NodeId)>> {
    static OPEN: Mutex<Vec<(Arc<Graph>, NodeId)>> = Mutex::new(Vec::new());
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn let_go(plan: &mut underlay_graph::Plan, node: NodeId) {
    if plan.get(node).is_some() {
        plan.node_mut(node).monitor_owned = false;
    }
}

/// Runs a command, and closes the images that it leaves open because it has failed: an image keeps what it has to
/// keep (its bitmaps, say) only when it is closed.
pub async fn closing(command: impl Future<Output = Outcome>) -> Outcome {
    let mut outcome = command.await;
    let left = std::mem::take(&mut *open_images());
    if let Err(failure) = &mut outcome
        && !left.is_empty()
    {
        // The cause is told first, and not again.
        crate::tell(failure);
        *failure = Failure::status(failure.status);
    }
    for (graph, node) in left.into_iter().rev() {
        let closed = graph.change(|plan| {
            let own: Vec<_> =
                plan.roots_of(node).filter(|(_, root)| !root.pinned).map(|(id, _)| id).collect();
            own.into_iter().for_each(|root| plan.remove_root(root));
            let_go(plan, node);
            Ok(())
        });
        if let Err(error) = closed.await {
            complain!("qemu-img: Error while closing the image: {error}");
        }
    }
    outcome
}

/// The description of an image that a list of options gives.
fn listed(
    list: &str,
    how: How<'_>,
    failed: &dyn Fn(&dyn std::fmt::Display) -> Failure,
) -> Result<NodeSpec, Failure> {
    if how.format.is_some() {
        return Err(Failure::new("--image-opts and --format are mutually exclusive"));
    }
    let list = underlay_disk::parse_options(list, Some("file"));
    for warning in list.warnings {
        complain!("qemu-img: {warning}");
    }
    let mut options = nest(list.options);
    if options.get("backing").is_some_and(|backing| *backing == Value::Str(String::new())) {
        complain!("qemu-img: warning: Use of \"backing\": \"\" is deprecated; use \"backing\": null instead");
        if options.get("driver").and_then(Value::as_str) == Some("raw") {
            // That there is nothing below may be said of everything.
            options.remove("backing");
        }
    }
    if let Some(Value::Str(node)) = options.get("file") {
        // There is no other node.
        return Err(failed(&GraphError::NeitherDeviceNorNode(node.clone())));
    }
    if how.no_backing
        && let Some(option) = backing_option(options.get("backing"))
    {
        return Err(failed(&format_args!(
            "Block format '{}' does not support the option '{option}'",
            options.get("driver").and_then(Value::as_str).unwrap_or_default()
        )));
    }
    let spec = NodeSpec::parse_as(options, how.unmap).map_err(|error| failed(&error))?;
    if how.force_share && spec.force_share == Some(false) {
        return Err(Failure::new("--force-share/-U conflicts with image options"));
    }
    Ok(spec)
}

/// What is said of what is below an image that is opened without it.
fn backing_option(backing: Option<&Value>) -> Option<String> {
    match backing? {
        Value::Object(options) => options.iter().next().map(|(name, _)| format!("backing.{name}")),
        Value::Str(name) if !name.is_empty() => Some("backing".to_owned()),
        _ => None,
    }
}

/// What an image is stored in, opened as the image was to be.
fn stored_in(spec: NodeSpec) -> NodeSpec {
    match spec.driver {
        DriverSpec::Qcow2 { file: Child::Inline(file), .. }
        | DriverSpec::Probe { file: Child::Inline(file), .. } => *file,
        _ => spec,
    }
}

/// Refuses a cache mode that does not exist. (Which of them is used makes no difference to what a tool does: it flushes
/// at its end.)
pub fn check_cache(mode: &str, what: &str) -> Result<(), Failure> {
    match mode {
        "none" | "off" | "directsync" | "writeback" | "writethrough" | "unsafe" => Ok(()),
        _ => Err(Failure::new(format!("Invalid {what} option: {mode}"))),
    }
}

impl Image {
    /// Its name: as it was given, but for a list of options.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The graph that it is the only image of.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    /// The wiring, for questions.
    pub fn wires(&self) -> Wires {
        self.graph.wires()
    }

    /// The image's node.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Its length in bytes.
    pub async fn length(&self) -> Result<u64, Failure> {
        self.root.length().await.map_err(|error| Failure::new(error.to_string()))
    }

    /// What the first bytes of a range are, with all that is below the image.
    pub async fn status(&self, range: ByteRange) -> Result<Status, IoError> {
        let inside = self.root.enter().await?;
        status(&inside.cx(), range, None).await
    }

    /// Whether it has no format of its own.
    pub fn is_raw(&self) -> bool {
        self.wires().view(self.node).node().driver() == "raw"
    }

    /// Warns of an image that is written to and only guessed to be raw: a guest could make it look like another format.
    pub fn warn_if_guessed(&self) {
        let name = filename::of_alone(&self.wires().view(self.node));
        if self.probed && self.is_raw() {
            complain!(
                "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
                 Automatically detecting the format is dangerous for raw images, write operations on block 0 will \
                 be restricted.\n         Specify the 'raw' format explicitly to remove the restrictions."
            );
        }
    }

    /// The image stays open, with its locks, whatever a job puts in its place.
    pub async fn keep(&self) -> Result<(), Failure> {
        let kept = self.graph.change(|plan| {
            plan.node_mut(self.node).monitor_owned = true;
            Ok(())
        });
        kept.await.map_err(|error| Failure::new(error.to_string()))
    }

    /// The way in leads to the image itself again, which was kept, for writing. What has come into its place is
    /// flushed.
    pub async fn come_back(&mut self) -> Result<(), Failure> {
        self.root.flush().await.map_err(|error| Failure::new(format!("Error while flushing: {error}")))?;
        let (node, old) = (self.node, self.root_id);
        let changed = self.graph.change(|plan| {
            let user = plan.root(old).ok_or(GraphError::NeitherDeviceNorNode(String::new()))?.clone();
            plan.remove_root(old);
            Ok(plan.add_root(NewRoot {
                user: user.user,
                role: user.role,
                node,
                required: user.required,
                shared: user.shared,
                pinned: false,
                drained: None,
            }))
        });
        self.root_id = changed.await.map_err(|error| Failure::new(error.to_string()))?;
        self.root = self.graph.root(self.root_id).ok_or_else(|| Failure::new("the image was closed"))?;
        Ok(())
    }

    /// Flushes and closes it.
    pub async fn close(self) -> Result<(), Failure> {
        let flushed = self.root.flush().await;
        open_images().retain(|(graph, node)| !(Arc::ptr_eq(graph, &self.graph) && *node == self.node));
        let closed = self.graph.change(|plan| {
            plan.remove_root(self.root_id);
            let_go(plan, self.node);
            Ok(())
        });
        closed.await.map_err(|error| Failure::new(error.to_string()))?;
        if IN_TROUBLE.swap(false, Ordering::Relaxed) {
            return Err(Failure::new("Error while closing the image"));
        }
        flushed.map_err(|error| Failure::new(format!("Error while flushing: {error}")))
    }
}

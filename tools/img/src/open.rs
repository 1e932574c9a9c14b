//! Opening images for a tool: a graph of one's own, and everything flushed and closed at the end.

use std::sync::Arc;

use underlay_drivers::open::OnCorrupt;
use underlay_drivers::options::nest;
use underlay_drivers::{BackingPolicy, NodeSpec, OpenError, Opener};
use underlay_graph::plan::{NewRoot, Wires};
use underlay_graph::status::{Status, status};
use underlay_graph::{ByteRange, Graph, IoError, NodeId, Perms, Root, RootId};
use underlay_qmp::keyval;

use crate::Failure;

/// How to open an image.
#[derive(Clone, Copy, Debug, Default)]
pub struct How<'a> {
    /// `--image-opts`: the name is not a name but options.
    pub image_opts: bool,
    /// Its format; probed when absent.
    pub format: Option<&'a str>,
    /// For writing too.
    pub write: bool,
    /// Resizing it, too.
    pub resize: bool,
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
    graph: Arc<Graph>,
    node: NodeId,
    root_id: RootId,
    /// The way in.
    pub root: Root,
}

/// Opens an image; errors are worded as qemu-img's, but for its name.
pub async fn image(name: &str, how: How<'_>) -> Result<Image, Failure> {
    let failed = |error: &dyn std::fmt::Display, hint: Option<&str>| {
        let text = error.to_string();
        let text = format!("Could not open '{name}': {text}");
        Failure::new(match hint {
            Some(hint) => format!("{text}\n{hint}"),
            None => text,
        })
    };
    let spec = if how.image_opts { by_options(name) } else { NodeSpec::image(name, how.format) };
    let mut spec = spec.map_err(|error| failed(&error, None))?;
    spec.read_only = Some(!how.write);
    spec.force_share = Some(how.force_share);
    spec.discard = Some(true);
    let graph = Graph::new();
    let policy = if how.no_backing { BackingPolicy::Ignore } else { BackingPolicy::Follow };
    let on_corrupt: OnCorrupt = Arc::new(|_, found| eprintln!("{found}"));
    let opened = Opener::new(&graph, policy, Some(on_corrupt)).open(spec).await;
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
    let (node, root_id) = changed.map_err(|error| {
        let hint = match &error {
            underlay_graph::GraphError::Io(error) => error.hint().map(str::to_owned),
            _ => None,
        };
        failed(&error, hint.as_deref())
    })?;
    let root = graph.root(root_id).ok_or_else(|| Failure::new("the image was closed"))?;
    Ok(Image { graph, node, root_id, root })
}

/// What `--image-opts` says: options like those of the daemon's `--blockdev`; a lone word is the node that the image is in.
fn by_options(options: &str) -> Result<NodeSpec, OpenError> {
    let parsed = keyval::parse(options, Some("file")).map_err(|error| OpenError::text(error.to_string()))?;
    NodeSpec::parse(nest(parsed))
}

/// Options and a format say the same thing twice.
pub fn check_format(image_opts: bool, format: Option<&String>) -> Result<(), Failure> {
    match image_opts && format.is_some() {
        true => Err(Failure::new("--image-opts and --format are mutually exclusive")),
        false => Ok(()),
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
    pub fn warn_if_guessed(&self, name: &str, format: Option<&str>) {
        if format.is_none() && self.is_raw() {
            eprintln!(
                "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
                 Automatically detecting the format is dangerous for raw images, write operations on block 0 will \
                 be restricted.\n         Specify the 'raw' format explicitly to remove the restrictions."
            );
        }
    }

    /// Flushes and closes it.
    pub async fn close(self) -> Result<(), Failure> {
        let flushed = self.root.flush().await;
        let closed = self.graph.change(|plan| {
            plan.remove_root(self.root_id);
            Ok(())
        });
        closed.await.map_err(|error| Failure::new(error.to_string()))?;
        flushed.map_err(|error| Failure::new(format!("Error while flushing: {error}")))
    }
}

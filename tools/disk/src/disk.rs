//! Opening, reopening and closing.

use std::sync::Arc;

use underlay_drivers::filename;
use underlay_drivers::format::raw::RawOptions;
use underlay_drivers::open::{BackingPolicy, tell_on_stderr, tell_trouble_on_stderr};
use underlay_drivers::options::{Child, DriverSpec, json_options, nest};
use underlay_drivers::protocol::file::Aio;
use underlay_drivers::{NodeSpec, Opener};
use underlay_graph::plan::{DetectZeroes, NewRoot, Wires};
use underlay_graph::resize;
use underlay_graph::{
    ByteRange, Graph, GraphError, IoError, NodeId, Perms, Plan, Preallocation, Root, RootId,
};
use underlay_qmp::json::{Object, Value};
use underlay_sys::{Iov, rt};

use crate::modes::Modes;
use crate::temporary;

/// Which disk.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// A file name, `file:` and a name, or `json:{…}`.
    Name(String),
    /// All options, with dotted names.
    Options(Object),
}

/// A disk and how to open it.
#[derive(Clone, Debug)]
pub struct Request {
    /// Which disk.
    pub source: Source,
    /// The image's format; probed when absent.
    pub format: Option<String>,
    /// Options beside those of the source, with dotted names; they go before the modes.
    pub options: Object,
    /// Not from the disk's first byte on but from this one.
    pub offset: Option<u64>,
    /// For reading only.
    pub read_only: bool,
    /// What is written goes to a temporary overlay; the image is only read.
    pub temporary: bool,
    /// Share the image with whoever uses it.
    pub force_share: bool,
    /// What other users of the disk may do meanwhile.
    pub shared: Perms,
    /// How it is used.
    pub modes: Modes,
}

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    graph: Arc<Graph>,
    node: NodeId,
    root_id: RootId,
    request: Request,
    /// Nobody said of what format it is.
    probed: bool,
    /// The way in.
    pub root: Root,
}

/// What messages call the user of a disk.
const USER: &str = "an unnamed block device";

/// Texts are QEMU's, without the program's name; what a hint says is on a line of its own.
type Result<T> = std::result::Result<T, String>;

/// What users are told who did not say that an image is raw.
pub fn guessed_raw(name: &str) -> String {
    format!(
        "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be \
         restricted.\n         Specify the 'raw' format explicitly to remove the restrictions."
    )
}

fn with_hint(text: String, hint: Option<&str>) -> String {
    match hint {
        Some(hint) => format!("{text}\n{hint}"),
        None => text,
    }
}

fn graph_error(error: &GraphError) -> String {
    match error {
        GraphError::Io(io) => with_hint(error.to_string(), io.hint()),
        _ => error.to_string(),
    }
}

impl Request {
    /// A disk by its name, for writing, shared with nobody who would disturb.
    pub fn named(name: impl Into<String>) -> Self {
        Self {
            source: Source::Name(name.into()),
            format: None,
            options: Object::new(),
            offset: None,
            read_only: false,
            temporary: false,
            force_share: false,
            shared: Perms::ALL,
            modes: Modes { discard: true, ..Modes::default() },
        }
    }

    /// The node that it asks for.
    pub fn spec(&self) -> Result<NodeSpec> {
        let text = |error: underlay_drivers::OpenError| error.to_string();
        let mut spec = match &self.source {
            Source::Name(name) if self.options.is_empty() => {
                NodeSpec::image_as(name, self.format.as_deref(), self.modes.discard).map_err(text)?
            }
            Source::Name(name) => self.with_options(name)?,
            Source::Options(options) => {
                let mut all = options.clone();
                self.options.clone().into_iter().for_each(|(name, value)| all.insert(&name, value));
                let nested = nest(all);
                if nested.get("driver").is_none() && nested.get("file").is_none() {
                    return Err("Must specify either driver or file".to_owned());
                }
                NodeSpec::parse_as(nested, self.modes.discard).map_err(text)?
            }
        };
        if let Some(offset) = self.offset {
            let file = Child::Inline(Box::new(spec));
            let given = vec![("offset", Value::UInt(offset))];
            let options = RawOptions { offset: Some(offset), size: None, given };
            spec = NodeSpec::with_driver(DriverSpec::Raw { file, options });
        }
        let modes = self.modes;
        spec.read_only.get_or_insert(self.read_only || self.temporary);
        spec.force_share.get_or_insert(self.force_share);
        spec.discard.get_or_insert(modes.discard);
        spec.cache_direct.get_or_insert(modes.direct);
        spec.cache_no_flush.get_or_insert(modes.no_flush);
        if spec.detect_zeroes == DetectZeroes::Off {
            spec.detect_zeroes = modes.detect_zeroes;
        }
        if spec.detect_zeroes == DetectZeroes::Unmap && spec.discard != Some(true) {
            let text =
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap";
            return Err(text.to_owned());
        }
        if let Some(aio) = modes.aio {
            set_aio(&mut spec, aio);
        }
        Ok(spec)
    }

    /// A named disk with options for the image in it, which go before those in the name.
    fn with_options(&self, name: &str) -> Result<NodeSpec> {
        let text = |error: underlay_drivers::OpenError| error.to_string();
        if self.format.is_some() && self.options.get("driver").is_some() {
            return Err("Driver specified twice".to_owned());
        }
        let mut all = match name.strip_prefix("json:") {
            Some(json) => json_options(json).map_err(text)?,
            None => self.named_options(name)?,
        };
        if let Some(format) = &self.format {
            all.insert("driver", format.as_str());
        }
        self.options.clone().into_iter().for_each(|(name, value)| all.insert(&name, value));
        NodeSpec::parse_as(nest(all), self.modes.discard).map_err(text)
    }

    /// The options that a plain name stands for, but for the format.
    fn named_options(&self, name: &str) -> Result<Object> {
        // Errors of the name alone come out here.
        let plain = NodeSpec::image(name, self.format.as_deref()).map_err(|error| error.to_string())?;
        if self.options.get("file.filename").is_some() {
            return Err("Can't specify 'file' and 'filename' options at the same time".to_owned());
        }
        let DriverSpec::File(file) = protocol(&plain) else {
            return Err(format!("Options beside the name '{name}' are not supported yet"));
        };
        let at = match plain.driver {
            DriverSpec::File(_) => Object::new().with("filename", file.filename.as_str()),
            _ => Object::new().with("file.driver", file.driver).with("file.filename", file.filename.as_str()),
        };
        Ok(at)
    }
}

/// The protocol at the bottom of a description.
fn protocol(spec: &NodeSpec) -> &DriverSpec {
    match &spec.driver {
        DriverSpec::Raw { file: Child::Inline(file), .. }
        | DriverSpec::Qcow2 { file: Child::Inline(file), .. }
        | DriverSpec::Probe { file: Child::Inline(file), .. } => protocol(file),
        other => other,
    }
}

/// Whether a description leaves it to be found out of what format the image is, which may lie below a window.
fn is_probed(spec: &NodeSpec, is_window: bool) -> bool {
    match &spec.driver {
        DriverSpec::Raw { file: Child::Inline(image), .. } if is_window => is_probed(image, false),
        driver => matches!(driver, DriverSpec::Probe { .. }),
    }
}

fn set_aio(spec: &mut NodeSpec, aio: Aio) {
    match &mut spec.driver {
        DriverSpec::File(file) => file.aio = aio,
        DriverSpec::Raw { file: Child::Inline(file), .. }
        | DriverSpec::Qcow2 { file: Child::Inline(file), .. }
        | DriverSpec::Probe { file: Child::Inline(file), .. } => set_aio(file, aio),
        _ => {}
    }
}

impl Disk {
    /// Opens a disk.
    pub async fn open(request: Request) -> Result<Self> {
        let spec = request.spec()?;
        let probed = is_probed(&spec, request.offset.is_some());
        let write = !request.read_only;
        if !write && request.modes.copy_on_read {
            return Err("Can't use copy-on-read on read-only device".to_owned());
        }
        let graph = Graph::new();
        graph.on_trouble(tell_trouble_on_stderr);
        let opener = |policy| Opener::new(&graph, policy, Some(tell_on_stderr()));
        let opened = opener(BackingPolicy::Follow).open(spec).await;
        let opened = match opened {
            Ok(below) if request.temporary => {
                temporary::above(&graph, &opener(BackingPolicy::Ignore), below, request.modes).await
            }
            opened => opened,
        };
        let hint = |error: &underlay_drivers::OpenError| {
            error.cause().and_then(|cause| cause.hint().map(str::to_owned))
        };
        let new = opened.map_err(|error| with_hint(error.to_string(), hint(&error).as_deref()))?;
        let required = if write { Perms::CONSISTENT_READ | Perms::WRITE } else { Perms::CONSISTENT_READ };
        let shared = request.shared;
        let edit = |plan: &mut Plan| {
            let node = plan.add(new)?;
            let user = USER.to_owned();
            let root = NewRoot { user, role: "root", node, required, shared, pinned: false, drained: None };
            Ok((node, plan.add_root(root)))
        };
        let (node, root_id) = graph.change(edit).await.map_err(|error| graph_error(&error))?;
        let root = graph.root(root_id).ok_or("the image was closed")?;
        Ok(Self { graph, node, root_id, request, probed, root })
    }

    /// A disk that others have open, as a root of their graph sees it: to be used, not to be closed or reopened. `None`
    /// if the root has gone.
    pub fn of_others(graph: &Arc<Graph>, root_id: RootId, modes: Modes) -> Option<Self> {
        let node = graph.plan().root(root_id)?.node;
        let root = graph.root(root_id)?;
        let request = Request { modes, ..Request::named("") };
        Some(Self { graph: graph.clone(), node, root_id, request, probed: false, root })
    }

    /// How it was opened.
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// Has the images keep their bitmaps now and then, as long as the disk is open: for who serves it for long.
    pub fn refresh_bitmaps(&self) {
        rt::spawn(Graph::refresh_bitmaps_for_ever(Arc::downgrade(&self.graph)));
    }

    /// The graph that it is in by itself.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    /// The wiring, for questions.
    pub fn wires(&self) -> Wires {
        self.graph.wires()
    }

    /// The disk's node.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The name of the disk's node.
    pub fn node_name(&self) -> String {
        self.graph.plan().node(self.node).name.to_string()
    }

    /// The driver of the image, below the window that `offset` makes.
    fn image_driver(&self) -> &'static str {
        let view = self.wires().view(self.node);
        match (self.request.offset, view.children().first()) {
            (Some(_), Some((_, image))) => image.node().driver(),
            _ => view.node().driver(),
        }
    }

    /// The driver of the disk's node.
    pub fn driver(&self) -> &'static str {
        self.wires().view(self.node).node().driver()
    }

    /// Whether it may not be written to.
    pub fn is_read_only(&self) -> bool {
        self.graph.plan().node(self.node).read_only
    }

    /// Whether its format was guessed to be raw and it may be written to: users should be warned.
    pub fn is_guessed_raw(&self) -> bool {
        self.probed && self.image_driver() == "raw" && !self.is_read_only()
    }

    /// What the disk is called in messages.
    pub fn name(&self) -> String {
        filename::of_alone(&self.wires().view(self.node))
    }

    /// A way to read that copies what is below the image, if the disk was opened so. For requests that go on by
    /// themselves.
    pub fn reader(&self) -> Reader {
        Reader { root: self.root.clone(), copies: self.request.modes.copy_on_read }
    }

    /// Sets the length, in bytes.
    pub async fn resize(&self, size: u64, preallocation: Preallocation) -> std::result::Result<(), String> {
        let resized = resize::resize(&self.graph, self.node, size, preallocation, USER).await;
        resized.map_err(|error| graph_error(&error))
    }

    /// Flushes and closes it, and opens it as `request` says; if that fails, as it was before. Without a disk when
    /// not even that is possible (somebody else was quicker).
    pub async fn reopen(self, request: Request) -> std::result::Result<Self, (Option<Self>, String)> {
        let before = self.request.clone();
        self.close().await.map_err(|error| (None, error))?;
        match Self::open(request).await {
            Ok(disk) => Ok(disk),
            Err(error) => match Self::open(before).await {
                Ok(disk) => Err((Some(disk), error)),
                Err(_) => Err((None, error)),
            },
        }
    }

    /// Flushes and closes it.
    pub async fn close(self) -> Result<()> {
        let flushed = if self.is_read_only() { Ok(()) } else { self.root.flush().await };
        let closed = self.graph.change(|plan| {
            plan.remove_root(self.root_id);
            Ok(())
        });
        closed.await.map_err(|error| graph_error(&error))?;
        flushed.map_err(|error| format!("Error while flushing: {error}"))
    }
}

/// See [`Disk::reader`].
#[derive(Clone, Debug)]
pub struct Reader {
    root: Root,
    copies: bool,
}

impl Reader {
    /// Fills `into`.
    pub async fn read(&self, range: ByteRange, into: Iov) -> std::result::Result<(), IoError> {
        if self.copies {
            match self.root.populate(range).await {
                // Nothing is below such a disk.
                Err(error) if error == IoError::ENOTSUP => {}
                done => done?,
            }
        }
        self.root.read(range, into).await
    }
}

//! What a node tells about itself for `query-named-block-nodes` and `img info`.

use std::sync::Arc;

use crate::node::Kind;
use crate::view::{Role, View};

/// The "format specific information" of an image: its kind and its fields, in any order (printing orders them).
#[derive(Clone, Debug, PartialEq)]
pub struct FormatInfo {
    /// `qcow2`, `file`, …: the `type` member.
    pub kind: &'static str,
    /// The `data` member.
    pub fields: Vec<(&'static str, InfoValue)>,
}

/// One value in it.
#[derive(Clone, Debug, PartialEq)]
pub enum InfoValue {
    /// true or false
    Bool(bool),
    /// A number.
    Int(i64),
    /// A text.
    Text(String),
    /// Several values.
    List(Vec<InfoValue>),
    /// A nested object.
    Object(Vec<(&'static str, InfoValue)>),
}

/// The node whose word a node passes on where it has none of its own: what a filter filters, the file of a format.
fn passed_on(view: &View) -> Option<&View> {
    let filtered = || view.child(Role::Backing).filter(|_| view.node().kind() == Kind::Filter);
    let file = view.child(Role::File).filter(|_| view.node().kind() != Kind::Protocol);
    file.or_else(filtered).map(|below| &**below)
}

/// The `dirty-flag` of the image at `view`: what it says itself, or of a format without such a thing what its file
/// says. `None`: nobody can tell.
pub fn dirty_flag(view: &View) -> Option<bool> {
    view.node().image_info().dirty.or_else(|| passed_on(view).and_then(dirty_flag))
}

/// Bytes per cluster of the image at `view`, through what passes everything on: filters, and raw images.
pub fn cluster_size(view: &View) -> Option<u64> {
    let passes = view.node().kind() == Kind::Filter || view.node().driver() == "raw";
    let below = || passed_on(view).filter(|_| passes);
    view.node().image_info().cluster_size.or_else(|| below().and_then(cluster_size))
}

/// What `query-named-block-nodes` shows below `image`, as far as the node alone knows it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImageInfo {
    /// Bytes per cluster, for formats that have clusters.
    pub cluster_size: Option<u64>,
    /// Whether the image was not closed cleanly (`dirty-flag`); `None` where only the node below can tell, if any.
    pub dirty: Option<bool>,
    /// The image keeps its data encrypted.
    pub encrypted: bool,
    /// More, for formats that have more.
    pub format_specific: Option<FormatInfo>,
    /// Internal snapshots, in the image's order.
    pub snapshots: Arc<[SnapshotInfo]>,
}

/// An internal snapshot of an image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SnapshotInfo {
    /// Its number, as text.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes of the guest's state.
    pub vm_state_size: u64,
    /// When it was taken: seconds since 1970.
    pub seconds: u32,
    /// And nanoseconds.
    pub nanoseconds: u32,
    /// How long the guest had run then, in nanoseconds.
    pub clock: u64,
    /// How many instructions it had executed then, if that is known.
    pub icount: Option<u64>,
}

//! What a node tells about itself for `query-named-block-nodes` and `img info`.

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

/// The `dirty-flag` of the image at `view`: what it says itself, or of a format without such a thing what its file says. `None`:
/// nobody can tell.
pub fn dirty_flag(view: &crate::View) -> Option<bool> {
    let own = view.node().image_info().dirty;
    own.or_else(|| view.child(crate::Role::File).and_then(|file| dirty_flag(file)))
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
}

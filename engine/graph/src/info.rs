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

/// What `query-named-block-nodes` shows below `image`, as far as the node alone knows it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImageInfo {
    /// Bytes per cluster, for formats that have clusters.
    pub cluster_size: Option<u64>,
    /// The image was not closed cleanly (`dirty-flag`).
    pub dirty: bool,
    /// The image keeps its data encrypted.
    pub encrypted: bool,
    /// More, for formats that have more.
    pub format_specific: Option<FormatInfo>,
}

//! A node's options as they come from a command line, a monitor or an image's own `json:` name, checked and typed.
//!
//! Values may be typed (JSON) or all strings (command lines): `on`/`off` and numbers with suffixes are taken too.
//! Whatever no driver asked for is refused by name.

mod drivers;
mod fields;
mod size;

use underlay_graph::NodeOptions;
use underlay_graph::plan::DetectZeroes;
use underlay_qcow2::OpenOptions as Qcow2Options;
use underlay_qmp::json::{Object, Value};

pub(crate) use self::drivers::probed;
use self::drivers::{driver_spec, null_by_name};
use self::fields::Fields;
pub use self::fields::nest;
pub use self::size::{is_out_of_range, not_a_size, parse_size};
use crate::error::OpenError;
use crate::filter::copy_before_write::CbwOptions;
use crate::format::raw::RawOptions;
use crate::protocol::file::{Aio, Locking};
use crate::protocol::nbd::spec::{self, NbdSpec};

/// A node to open, with all that is below it.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    /// The name its user gave it.
    pub node_name: Option<String>,
    /// Not open for writing; `None`: as the parent.
    pub read_only: Option<bool>,
    /// Fall back to read-only rather than fail.
    pub auto_read_only: Option<bool>,
    /// `discard=unmap`; `None`: as the parent's kind of child has it.
    pub discard: Option<bool>,
    /// `cache.direct`; `None`: as the parent.
    pub cache_direct: Option<bool>,
    /// `cache.no-flush`; `None`: as the parent.
    pub cache_no_flush: Option<bool>,
    /// `force-share`; `None`: as the parent.
    pub force_share: Option<bool>,
    /// `detect-zeroes`
    pub detect_zeroes: DetectZeroes,
    /// The driver and its own options.
    pub driver: DriverSpec,
}

/// A driver and its own options.
#[derive(Clone, Debug)]
pub enum DriverSpec {
    /// `file`, `host_device`
    File(FileSpec),
    /// `nbd`
    Nbd(NbdSpec),
    /// `null-co`, `null-aio`
    Null(NullSpec),
    /// `raw`
    Raw {
        /// Where the bytes are.
        file: Child,
        /// The window.
        options: RawOptions,
    },
    /// `qcow2`
    Qcow2 {
        /// Where the image is.
        file: Child,
        /// What is below the image.
        backing: Backing,
        /// Caches and checks.
        options: Box<Qcow2Options>,
    },
    /// `throttle`
    Throttle {
        /// What is filtered.
        file: Child,
        /// The group of disks that share limits.
        group: String,
    },
    /// `copy-on-read`
    CopyOnRead {
        /// What is filtered.
        file: Child,
        /// The lowest image that is copied from.
        bottom: Option<String>,
    },
    /// `copy-before-write`
    CopyBeforeWrite {
        /// The disk.
        file: Child,
        /// Where it is copied to.
        target: Child,
        /// How.
        options: CbwOptions,
        /// Only what is dirty here is copied: a node and its bitmap.
        bitmap: Option<(String, String)>,
    },
    /// `snapshot-access`
    SnapshotAccess {
        /// A copy-before-write node.
        file: Child,
    },
    /// The format is not known yet: look at the first bytes.
    Probe {
        /// Where the image is.
        file: Child,
        /// Options of the format, whatever it is.
        rest: Object,
    },
}

/// Options of `file` and `host_device`.
#[derive(Clone, Debug)]
pub struct FileSpec {
    /// `file` or `host_device`.
    pub driver: &'static str,
    /// Path.
    pub filename: String,
    /// `locking`
    pub locking: Locking,
    /// `aio`
    pub aio: Aio,
}

/// Options of `null-co` and `null-aio`.
#[derive(Clone, Debug)]
pub struct NullSpec {
    /// `null-co` or `null-aio`.
    pub driver: &'static str,
    /// Length in bytes.
    pub size: u64,
    /// Time that a request takes.
    pub latency_ns: u64,
    /// Reads give zeroes (else: whatever was in the buffer).
    pub read_zeroes: bool,
    /// What of this was given, for the file name.
    pub given: Given,
}

impl NullSpec {
    /// The length of a disk of which none is given.
    pub const SIZE: u64 = 1 << 30;
}

/// Options as they were given: numbers may be text with a suffix. QEMU shows them so in file names.
pub type Given = Vec<(&'static str, Value)>;

/// A child: a node that exists, or one to open.
#[derive(Clone, Debug)]
pub enum Child {
    /// By its name.
    Reference(String),
    /// By its options.
    Inline(Box<NodeSpec>),
}

/// What is below an image.
#[derive(Clone, Debug)]
pub enum Backing {
    /// What the image says.
    FromImage,
    /// The same, with these options beside.
    FromImageWith(Object),
    /// Nothing, whatever the image says.
    None,
    /// This.
    Child(Child),
}

/// Deepest nesting of inline children.
const MAX_NESTING: u32 = 64;

/// The options in a file name, behind `json:`, as they are written there: nested, dotted or both.
pub fn json_options(json: &str) -> Result<Object, OpenError> {
    let value = underlay_qmp::json::parse(json.as_bytes())
        .map_err(|error| OpenError::text(format!("Could not parse the JSON options: {error}")))?;
    let Value::Object(object) = value else {
        return Err(OpenError::text("Invalid JSON object given".to_owned()));
    };
    Ok(object)
}

impl NodeSpec {
    /// A local file as a protocol node.
    pub fn file(filename: &str) -> Self {
        // Who says `file:` means no device.
        let driver = if is_device(filename) { "host_device" } else { "file" };
        let filename = crate::names::plain_path(filename).to_owned();
        let (locking, aio) = (Locking::default(), Aio::default());
        Self::with_driver(DriverSpec::File(FileSpec { driver, filename, locking, aio }))
    }

    /// A node with a driver and no further options.
    pub fn with_driver(driver: DriverSpec) -> Self {
        Self {
            node_name: None,
            read_only: None,
            auto_read_only: None,
            discard: None,
            cache_direct: None,
            cache_no_flush: None,
            force_share: None,
            detect_zeroes: DetectZeroes::Off,
            driver,
        }
    }

    pub(crate) fn driver_name(&self) -> &'static str {
        match &self.driver {
            DriverSpec::File(file) => file.driver,
            DriverSpec::Nbd(_) => "nbd",
            DriverSpec::Null(null) => null.driver,
            DriverSpec::Raw { .. } => "raw",
            DriverSpec::Qcow2 { .. } => "qcow2",
            DriverSpec::Throttle { .. } => "throttle",
            DriverSpec::CopyOnRead { .. } => "copy-on-read",
            DriverSpec::CopyBeforeWrite { .. } => "copy-before-write",
            DriverSpec::SnapshotAccess { .. } => "snapshot-access",
            DriverSpec::Probe { .. } => "",
        }
    }

    /// The same as [`Self::image`], with options for the image.
    pub fn image_with(name: &str, format: Option<&str>, mut options: Object) -> Result<Self, OpenError> {
        let plain = Self::image(name, format)?;
        let DriverSpec::File(file) = (match &plain.driver {
            DriverSpec::Raw { file: Child::Inline(file), .. }
            | DriverSpec::Qcow2 { file: Child::Inline(file), .. }
            | DriverSpec::Probe { file: Child::Inline(file), .. } => &file.driver,
            own => own,
        }) else {
            return Err(OpenError::text(format!("Options for '{name}' are not supported yet")));
        };
        let at = Object::new().with("driver", file.driver).with("filename", file.filename.as_str());
        options.insert("file", at);
        if let Some(format) = format {
            options.insert("driver", format);
        }
        Self::parse(options)
    }

    /// An image by its name: a path, `file:` and a path, `nbd:…` and its like, `null-co://`, or `json:{…}`; with its
    /// format, or probed without. The format counts even if `json:{…}` says another, as in QEMU.
    pub fn image(name: &str, format: Option<&str>) -> Result<Self, OpenError> {
        Self::image_as(name, format, false)
    }

    /// The same where what is discarded is given back, or is not, if the options in `json:{…}` do not say.
    pub fn image_as(name: &str, format: Option<&str>, unmap: bool) -> Result<Self, OpenError> {
        if let Some(json) = name.strip_prefix("json:") {
            let mut object = json_options(json)?;
            if let Some(format) = format {
                object.insert("driver", format);
            }
            return Self::parse_as(nest(object), unmap);
        }
        let is_export = spec::is_name(name);
        let scheme = name.split(':').next().filter(|_| crate::names::has_protocol(name));
        let protocol = match scheme {
            None | Some("file") => Self::file(name),
            _ if is_export => Self::with_driver(DriverSpec::Nbd(NbdSpec::parse(name)?)),
            Some("null-co") => null_by_name(name, "null-co")?,
            Some("null-aio") => null_by_name(name, "null-aio")?,
            Some(other) => return Err(OpenError::text(format!("Unknown protocol '{other}'"))),
        };
        if format == Some(protocol.driver_name()) {
            return Ok(protocol);
        }
        let file = Child::Inline(Box::new(protocol));
        let driver = match format {
            None => DriverSpec::Probe { file, rest: Object::new() },
            Some("raw") => DriverSpec::Raw { file, options: RawOptions::default() },
            Some("qcow2") => DriverSpec::Qcow2 { file, backing: Backing::FromImage, options: Box::default() },
            Some("file") if !is_export => return Ok(Self::file(name)),
            // Opening it tells.
            Some("host_device") if !std::path::Path::new(name).exists() => return Ok(Self::file(name)),
            Some(other) => return Err(not_of_driver(name, other)),
        };
        Ok(Self::with_driver(driver))
    }

    /// From options with nested children (see [`nest`] for dotted ones).
    pub fn parse(object: Object) -> Result<Self, OpenError> {
        Self::parse_as(object, false)
    }

    /// The same where what is discarded is given back, or is not, if the options do not say.
    pub fn parse_as(object: Object, unmap: bool) -> Result<Self, OpenError> {
        Self::parse_at(object, String::new(), 0, unmap)
    }

    /// What is below a format gives back what is discarded unless it is told not to.
    fn parse_at(object: Object, prefix: String, depth: u32, unmap: bool) -> Result<Self, OpenError> {
        if depth > MAX_NESTING {
            return Err(OpenError::text("Block node options are nested too deep".to_owned()));
        }
        let mut fields = Fields { object, prefix };
        let node_name = fields.text("node-name")?;
        let read_only = fields.flag("read-only")?;
        let auto_read_only = fields.flag("auto-read-only")?;
        let discard =
            fields.choice("discard", &[("ignore", false), ("off", false), ("unmap", true), ("on", true)])?;
        let detect_zeroes = fields
            .choice(
                "detect-zeroes",
                &[("off", DetectZeroes::Off), ("on", DetectZeroes::On), ("unmap", DetectZeroes::Unmap)],
            )?
            .unwrap_or_default();
        if detect_zeroes == DetectZeroes::Unmap && !discard.unwrap_or(unmap) {
            return Err(OpenError::text(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
                    .to_owned(),
            ));
        }
        let mut cache = match fields.take("cache") {
            None => Fields { object: Object::new(), prefix: String::new() },
            Some(Value::Object(object)) => Fields { object, prefix: format!("{}cache.", fields.prefix) },
            Some(_) => return Err(fields.wrong_type("cache", "object")),
        };
        let (cache_direct, cache_no_flush) = (cache.flag("direct")?, cache.flag("no-flush")?);
        if fields.flag("active")? == Some(false) {
            return Err(OpenError::text("Inactive nodes are not supported".to_owned()));
        }
        let force_share = fields.flag("force-share")?;
        let driver = match (fields.text("driver")?, fields.object.get("filename").is_some()) {
            (Some(driver), _) if driver.is_empty() => return Err(OpenError::UnknownDriver(driver)),
            (Some(driver), _) => driver,
            (None, true) if depth > 0 => "file".to_owned(),
            (None, _) if fields.object.get("file").is_some() => String::new(),
            (None, _) => {
                let text = "Must specify either driver or file";
                return Err(OpenError::text(text.to_owned()));
            }
        };
        let spec = driver_spec(&mut fields, &driver, depth)?;
        let left = cache.object.iter().map(|(name, _)| format!("cache.{name}"));
        let unknown = fields.object.iter().map(|(name, _)| name.to_owned()).chain(left).next();
        if let Some(option) = unknown {
            return Err(match spec {
                DriverSpec::File(_) | DriverSpec::Nbd(_) | DriverSpec::Null(_) => {
                    OpenError::UnknownProtocolOption { driver, option }
                }
                _ => OpenError::UnknownFormatOption { driver, option },
            });
        }
        Ok(Self {
            node_name,
            read_only,
            auto_read_only,
            discard,
            cache_direct,
            cache_no_flush,
            force_share,
            detect_zeroes,
            driver: spec,
        })
    }

    /// The common options, with what the parent hands down.
    pub fn node_options(&self, parent: &Inherited) -> NodeOptions {
        NodeOptions {
            discard: self.discard.unwrap_or(parent.discard),
            cache_direct: self.cache_direct.unwrap_or(parent.cache_direct),
            cache_no_flush: self.cache_no_flush.unwrap_or(parent.cache_no_flush),
            detect_zeroes: self.detect_zeroes,
            force_share: self.force_share.unwrap_or(parent.force_share),
        }
    }
}

/// What a node gets from its parent where its own options are silent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inherited {
    /// Not open for writing.
    pub read_only: bool,
    /// Fall back to read-only rather than fail.
    pub auto_read_only: bool,
    /// Discards are passed on.
    pub discard: bool,
    /// See [`NodeOptions`].
    pub cache_direct: bool,
    /// See [`NodeOptions`].
    pub cache_no_flush: bool,
    /// See [`NodeOptions`].
    pub force_share: bool,
}

/// Why a name cannot be opened with a driver that is no format.
fn not_of_driver(name: &str, driver: &str) -> OpenError {
    match driver {
        "null-co" | "null-aio" => {
            OpenError::text(format!("The only allowed filename for this driver is '{driver}://'"))
        }
        "nbd" => OpenError::text("File name string for NBD must start with 'nbd:'".to_owned()),
        "host_device" => OpenError::text(format!(
            "'host_device' driver requires '{name}' to be either a character or block device"
        )),
        other => OpenError::UnknownDriver(other.to_owned()),
    }
}

fn is_device(path: &str) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let kind = std::fs::metadata(path).map(|meta| meta.file_type());
    kind.is_ok_and(|kind| kind.is_block_device() || kind.is_char_device())
}

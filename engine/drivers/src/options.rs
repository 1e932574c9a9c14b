//! A node's options as they come from a command line, a monitor or an image's own `json:` name, checked and typed.
//!
//! Values may be typed (JSON) or all strings (command lines): `on`/`off` and numbers with suffixes are taken too.
//! Whatever no driver asked for is refused by name.

use std::time::Duration;

use underlay_graph::NodeOptions;
use underlay_graph::plan::DetectZeroes;
use underlay_qcow2::OpenOptions as Qcow2Options;
use underlay_qmp::json::{Object, Value};

use crate::error::OpenError;
use crate::filter::copy_before_write::{CbwOptions, OnCbwError};
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

/// Options that are taken out one by one; what is left at the end is unknown.
struct Fields {
    object: Object,
    prefix: String,
}

impl Fields {
    fn take(&mut self, name: &str) -> Option<Value> {
        self.object.remove(name)
    }

    fn wrong_type(&self, name: &str, expected: &str) -> OpenError {
        OpenError::text(format!("Invalid parameter type for '{}{name}', expected: {expected}", self.prefix))
    }

    /// Those of `names` that are there, as they are.
    fn given(&self, names: &[&'static str]) -> Given {
        names.iter().filter_map(|name| Some((*name, self.object.get(name)?.clone()))).collect()
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, OpenError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Str(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong_type(name, "string")),
        }
    }

    fn flag(&mut self, name: &str) -> Result<Option<bool>, OpenError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(Value::Str(text)) => match text.as_str() {
                "on" | "yes" | "true" | "y" => Ok(Some(true)),
                "off" | "no" | "false" | "n" => Ok(Some(false)),
                _ => Err(OpenError::text(format!("Parameter '{}{name}' expects 'on' or 'off'", self.prefix))),
            },
            Some(_) => Err(self.wrong_type(name, "boolean")),
        }
    }

    fn size(&mut self, name: &str) -> Result<Option<u64>, OpenError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Int(size)) => {
                let negative = || format!("Value '{size}' is out of range for parameter '{name}'");
                u64::try_from(size).map(Some).map_err(|_| OpenError::text(negative()))
            }
            Some(Value::UInt(size)) => Ok(Some(size)),
            Some(Value::Str(text)) => {
                parse_size(&text).map(Some).ok_or_else(|| OpenError::text(not_a_size(&text, name)))
            }
            Some(_) => Err(OpenError::text(not_a_size("", name))),
        }
    }

    /// A number; one below zero counts as the largest.
    fn number(&mut self, name: &str) -> Result<Option<u64>, OpenError> {
        let read = match self.take(name) {
            None => return Ok(None),
            Some(Value::Int(number)) => Some(u64::try_from(number).unwrap_or(u64::MAX)),
            Some(Value::UInt(number)) => Some(number),
            Some(Value::Str(text)) => match text.strip_prefix('-') {
                Some(rest) => rest.parse::<u64>().ok().map(|_| u64::MAX),
                None => text.parse().ok(),
            },
            Some(_) => None,
        };
        let wrong = || OpenError::text(format!("Parameter '{}{name}' expects a number", self.prefix));
        read.map(Some).ok_or_else(wrong)
    }

    fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> Result<Option<T>, OpenError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let found = choices.iter().find(|(choice, _)| *choice == text);
        let unknown =
            || OpenError::text(format!("Parameter '{}{name}' does not accept value '{text}'", self.prefix));
        found.map(|(_, value)| Some(*value)).ok_or_else(unknown)
    }

    fn child(&mut self, name: &str, depth: u32) -> Result<Option<Child>, OpenError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Str(reference)) => Ok(Some(Child::Reference(reference))),
            Some(Value::Object(object)) => {
                let prefix = format!("{}{name}.", self.prefix);
                Ok(Some(Child::Inline(Box::new(NodeSpec::parse_at(object, prefix, depth + 1, true)?))))
            }
            Some(_) => Err(self.wrong_type(name, "string or object")),
        }
    }
}

/// Deepest nesting of inline children.
const MAX_NESTING: u32 = 64;

/// A number of bytes with an optional suffix (`64k`, `1M`, `0x200`).
pub fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.char_indices().next_back()? {
        (at, 'b' | 'B') => (&text[..at], 0),
        (at, 'k' | 'K') => (&text[..at], 10),
        (at, 'm' | 'M') => (&text[..at], 20),
        (at, 'g' | 'G') => (&text[..at], 30),
        (at, 't' | 'T') => (&text[..at], 40),
        (at, 'p' | 'P') => (&text[..at], 50),
        (at, 'e' | 'E') if !text.starts_with("0x") => (&text[..at], 60),
        _ => (text, 0),
    };
    let number = match digits.strip_prefix("0x") {
        Some(_) if shift != 0 => return None,
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().ok()?,
        None => return None,
    };
    number.checked_mul(1_u64 << shift)
}

/// What is wrong with the value of an option that is a size.
pub fn not_a_size(text: &str, name: &str) -> String {
    match is_out_of_range(text) {
        true => format!("Value '{text}' is out of range for parameter '{name}'"),
        false => format!(
            "Parameter '{name}' expects a non-negative number below 2^64\n\
             Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
             and exabytes, respectively."
        ),
    }
}

/// Whether this looks like a size but is none: negative, or too many digits.
pub fn is_out_of_range(text: &str) -> bool {
    let text = text.trim_start();
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    let digits =
        digits.strip_suffix(|last: char| "bkmgtpe".contains(last.to_ascii_lowercase())).unwrap_or(digits);
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// The options in a file name, behind `json:`.
fn json_options(json: &str) -> Result<Object, OpenError> {
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
        let filename = crate::names::plain_path(filename).to_owned();
        let driver = if is_block_device(&filename) { "host_device" } else { "file" };
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
            | DriverSpec::Probe { file: Child::Inline(file) } => &file.driver,
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

    /// An image by its name: a path, `file:` and a path, `nbd:…` and its like, `null-co://`, or `json:{…}`; with its format, or
    /// probed without. The format counts even if `json:{…}` says another, as in QEMU.
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
            None => DriverSpec::Probe { file },
            Some("raw") => DriverSpec::Raw { file, options: RawOptions::default() },
            Some("qcow2") => DriverSpec::Qcow2 { file, backing: Backing::FromImage, options: Box::default() },
            Some("file" | "host_device") if !is_export => return Ok(Self::file(name)),
            Some(other) => return Err(OpenError::UnknownDriver(other.to_owned())),
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

fn driver_spec(fields: &mut Fields, driver: &str, depth: u32) -> Result<DriverSpec, OpenError> {
    let missing = |child: &str| OpenError::text(format!("A block device must be specified for \"{child}\""));
    let given = fields.given(&["offset", "size", "read-zeroes"]);
    match driver {
        "file" | "host_device" => file_spec(fields, if driver == "file" { "file" } else { "host_device" }),
        "null-co" | "null-aio" => Ok(DriverSpec::Null(NullSpec {
            driver: if driver == "null-co" { "null-co" } else { "null-aio" },
            size: fields.size("size")?.unwrap_or(NullSpec::SIZE),
            latency_ns: latency(fields)?,
            read_zeroes: fields.flag("read-zeroes")?.unwrap_or(false),
            given,
        })),
        "nbd" => nbd_spec(fields),
        "raw" => {
            let options = RawOptions { offset: fields.size("offset")?, size: fields.size("size")?, given };
            let file = fields.child("file", depth)?.ok_or_else(|| missing("file"))?;
            Ok(DriverSpec::Raw { file, options })
        }
        "qcow2" => qcow2_spec(fields, depth),
        "copy-on-read" => {
            let bottom = fields.text("bottom")?;
            Ok(DriverSpec::CopyOnRead {
                file: fields.child("file", depth)?.ok_or_else(|| missing("file"))?,
                bottom,
            })
        }
        "throttle" => {
            let group = fields.text("throttle-group")?;
            let group = group.ok_or_else(|| {
                OpenError::text(format!("Parameter '{}throttle-group' is missing", fields.prefix))
            })?;
            Ok(DriverSpec::Throttle {
                file: fields.child("file", depth)?.ok_or_else(|| missing("file"))?,
                group,
            })
        }
        "copy-before-write" => cbw_spec(fields, depth),
        "snapshot-access" => {
            let file = fields.child("file", depth)?.ok_or_else(|| missing("file"))?;
            Ok(DriverSpec::SnapshotAccess { file })
        }
        "" => Ok(DriverSpec::Probe { file: fields.child("file", depth)?.ok_or_else(|| missing("file"))? }),
        other => Err(OpenError::UnknownDriver(other.to_owned())),
    }
}

/// What a name like `null-co://` stands for.
fn null_by_name(name: &str, driver: &'static str) -> Result<NodeSpec, OpenError> {
    if name.strip_prefix(driver) != Some("://") {
        return Err(OpenError::text(format!("The only allowed filename for this driver is '{driver}://'")));
    }
    let (size, given) = (NullSpec::SIZE, Given::new());
    let null = NullSpec { driver, size, latency_ns: 0, read_zeroes: false, given };
    Ok(NodeSpec::with_driver(DriverSpec::Null(null)))
}

fn latency(fields: &mut Fields) -> Result<u64, OpenError> {
    if matches!(fields.object.get("latency-ns"), Some(Value::Int(..0))) {
        return Err(OpenError::text("latency-ns is invalid".to_owned()));
    }
    Ok(fields.size("latency-ns")?.unwrap_or(0))
}

fn file_spec(fields: &mut Fields, driver: &'static str) -> Result<DriverSpec, OpenError> {
    let Some(filename) = fields.text("filename")? else {
        let text = format!("The '{driver}' block driver requires a file name");
        return Err(OpenError::text(text));
    };
    let locking = fields
        .choice("locking", &[("auto", Locking::Auto), ("on", Locking::On), ("off", Locking::Off)])?
        .unwrap_or_default();
    let aio = fields
        .choice("aio", &[("threads", Aio::Threads), ("native", Aio::Native), ("io_uring", Aio::IoUring)])?
        .unwrap_or_default();
    // It is about handing a disk over to another host, which does not happen here.
    fields.flag("drop-cache")?;
    for unsupported in ["pr-manager", "aio-max-batch", "x-check-cache-dropped"] {
        if fields.take(unsupported).is_some() {
            return Err(OpenError::text(format!("Option '{unsupported}' is not supported yet")));
        }
    }
    Ok(DriverSpec::File(FileSpec {
        driver,
        filename: crate::names::plain_path(&filename).to_owned(),
        locking,
        aio,
    }))
}

fn nbd_spec(fields: &mut Fields) -> Result<DriverSpec, OpenError> {
    for unsupported in ["tls-creds", "tls-hostname"] {
        if fields.take(unsupported).is_some() {
            let text = format!("TLS of NBD servers is not supported yet (option '{unsupported}')");
            return Err(OpenError::text(text));
        }
    }
    // As they were before there was `server`.
    let old = ["path", "host", "port"].map(|name| fields.take(name));
    let server = match (fields.take("server"), old) {
        (Some(Value::Object(server)), [None, None, None]) => server,
        (Some(Value::Object(_)), _) => {
            let text = "host/port/path and server cannot be used at the same time";
            return Err(OpenError::text(text.to_owned()));
        }
        (Some(_), _) => return Err(fields.wrong_type("server", "object")),
        (None, [Some(path), None, None]) => Object::new().with("type", "unix").with("path", path),
        (None, [None, Some(host), port]) => {
            let port = port.unwrap_or_else(|| Value::Str("10809".to_owned()));
            Object::new().with("type", "inet").with("host", host).with("port", port)
        }
        (None, [None, None, None]) => return Err(OpenError::text("NBD server address missing".to_owned())),
        (None, _) => {
            return Err(OpenError::text("path and host/port cannot be used at the same time".to_owned()));
        }
    };
    let mut seconds =
        |name| Ok::<_, OpenError>(std::time::Duration::from_secs(fields.size(name)?.unwrap_or(0)));
    let (reconnect_delay, open_timeout) = (seconds("reconnect-delay")?, seconds("open-timeout")?);
    let export = fields.text("export")?.unwrap_or_default();
    let context = fields.text("x-dirty-bitmap")?;
    let server = NbdSpec::server(&server)?;
    Ok(DriverSpec::Nbd(NbdSpec { server, export, reconnect_delay, open_timeout, context }))
}

fn cbw_spec(fields: &mut Fields, depth: u32) -> Result<DriverSpec, OpenError> {
    let bitmap = fields.take("bitmap").map(|bitmap| bitmap_of(fields, bitmap)).transpose()?;
    let on_error = fields.choice(
        "on-cbw-error",
        &[("break-guest-write", OnCbwError::BreakGuestWrite), ("break-snapshot", OnCbwError::BreakSnapshot)],
    )?;
    let seconds = fields.size("cbw-timeout")?.unwrap_or(0);
    if seconds > u64::from(u32::MAX) {
        return Err(OpenError::text("Parameter 'cbw-timeout' expects uint32_t".to_owned()));
    }
    let options = CbwOptions {
        on_error: on_error.unwrap_or_default(),
        timeout: std::time::Duration::from_secs(seconds),
        min_cluster: fields.size("min-cluster-size")?.unwrap_or(0),
        ..CbwOptions::default()
    };
    let mut child = |name: &str| {
        let missing = || OpenError::text(format!("A block device must be specified for \"{name}\""));
        fields.child(name, depth)?.ok_or_else(missing)
    };
    Ok(DriverSpec::CopyBeforeWrite { file: child("file")?, target: child("target")?, options, bitmap })
}

/// A node and its bitmap.
fn bitmap_of(fields: &Fields, bitmap: Value) -> Result<(String, String), OpenError> {
    let Value::Object(mut bitmap) = bitmap else { return Err(fields.wrong_type("bitmap", "object")) };
    let mut text = |name: &str| match bitmap.remove(name) {
        Some(Value::Str(text)) => Ok(text),
        Some(_) => Err(fields.wrong_type(&format!("bitmap.{name}"), "string")),
        None => Err(OpenError::text(format!("Parameter '{}bitmap.{name}' is missing", fields.prefix))),
    };
    Ok((text("node")?, text("name")?))
}

fn qcow2_spec(fields: &mut Fields, depth: u32) -> Result<DriverSpec, OpenError> {
    let options = qcow2_options(fields)?;
    let backing = match fields.object.get("backing") {
        Some(Value::Null) => {
            fields.take("backing");
            Backing::None
        }
        Some(Value::Str(name)) if name.is_empty() => {
            fields.take("backing");
            Backing::None
        }
        Some(Value::Object(with)) if with.get("driver").is_none() && with.get("file").is_none() => {
            let with = with.clone();
            fields.take("backing");
            Backing::FromImageWith(with)
        }
        _ => fields.child("backing", depth)?.map_or(Backing::FromImage, Backing::Child),
    };
    for (unsupported, what) in [("data-file", "External data files"), ("encrypt", "Encryption")] {
        if fields.take(unsupported).is_some() {
            return Err(OpenError::text(format!("{what} of qcow2 images are not supported yet")));
        }
    }
    let file = fields.child("file", depth)?;
    let file =
        file.ok_or_else(|| OpenError::text("A block device must be specified for \"file\"".to_owned()))?;
    Ok(DriverSpec::Qcow2 { file, backing, options: Box::new(options) })
}

/// `cache-clean-interval` of which nothing is said, in seconds. Source: QEMU's documentation of the L2 cache, for Linux.
const CACHE_CLEAN_INTERVAL: u64 = 600;

fn qcow2_options(fields: &mut Fields) -> Result<Qcow2Options, OpenError> {
    let mut options = Qcow2Options {
        l2_cache_size: fields.size("l2-cache-size")?,
        refcount_cache_size: fields.size("refcount-cache-size")?,
        cache_size: fields.size("cache-size")?,
        l2_cache_entry_size: fields.size("l2-cache-entry-size")?,
        pass_discard_request: fields.flag("pass-discard-request")?,
        ..Qcow2Options::default()
    };
    options.discard_no_unref = fields.flag("discard-no-unref")?.unwrap_or(false);
    options.pass_discard_other = fields.flag("pass-discard-other")?.unwrap_or(false);
    options.lazy_refcounts = fields.flag("lazy-refcounts")?.unwrap_or(false);
    options.pass_discard_snapshot = fields.flag("pass-discard-snapshot")?;
    overlap_check(fields)?;
    let seconds = fields.number("cache-clean-interval")?.unwrap_or(CACHE_CLEAN_INTERVAL);
    let seconds =
        u32::try_from(seconds).map_err(|_| OpenError::text("Cache clean interval too big".to_owned()))?;
    options.cache_clean_interval = (seconds > 0).then(|| Duration::from_secs(u64::from(seconds)));
    Ok(options)
}

/// `overlap-check`, short or long. Whatever it asks for: every write is held against all tables in use, which costs
/// nothing worth switching off; against those of internal snapshots too.
fn overlap_check(fields: &mut Fields) -> Result<(), OpenError> {
    const TEMPLATES: [(&str, ()); 4] = [("none", ()), ("constant", ()), ("cached", ()), ("all", ())];
    const TABLES: [&str; 9] = [
        "main-header",
        "active-l1",
        "active-l2",
        "refcount-table",
        "refcount-block",
        "snapshot-table",
        "inactive-l1",
        "inactive-l2",
        "bitmap-directory",
    ];
    let Some(Value::Object(object)) = fields.object.get("overlap-check").cloned() else {
        return fields.choice("overlap-check", &TEMPLATES).map(drop);
    };
    fields.take("overlap-check");
    let mut flags = Fields { object, prefix: format!("{}overlap-check.", fields.prefix) };
    flags.choice("template", &TEMPLATES)?;
    for table in TABLES {
        flags.flag(table)?;
    }
    match flags.object.iter().next() {
        Some((name, _)) => Err(OpenError::text(format!("Parameter '{}{name}' is unexpected", flags.prefix))),
        None => Ok(()),
    }
}

/// Turns `{"file.driver": "x", "file.filename": "y"}` into `{"file": {"driver": "x", "filename": "y"}}`.
pub fn nest(object: Object) -> Object {
    let mut nested = Object::new();
    for (name, value) in object.into_iter() {
        match name.split_once('.') {
            Some((parent, rest)) => {
                let mut inner = match nested.remove(parent) {
                    Some(Value::Object(inner)) => inner,
                    _ => Object::new(),
                };
                inner.insert(rest, value);
                nested.insert(parent, Value::Object(inner));
            }
            None => match (nested.remove(&name), value) {
                (Some(Value::Object(mut before)), Value::Object(more)) => {
                    more.into_iter().for_each(|(name, value)| before.insert(&name, value));
                    nested.insert(&name, Value::Object(before));
                }
                (_, value) => nested.insert(&name, value),
            },
        }
    }
    let mut done = Object::new();
    for (name, value) in nested.into_iter() {
        let value = match value {
            Value::Object(inner) => Value::Object(nest(inner)),
            other => other,
        };
        done.insert(&name, value);
    }
    done
}

fn is_block_device(path: &str) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, size) in [
            ("0", Some(0)),
            ("64k", Some(65536)),
            ("1G", Some(1 << 30)),
            ("0x200", Some(512)),
            ("", None),
            ("k", None),
            ("-1", None),
            ("99999999999G", None),
            ("1x", None),
        ] {
            assert_eq!(parse_size(text), size, "{text}");
        }
    }
}

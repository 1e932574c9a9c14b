//! `create`: makes an image.

use underlay_drivers::create::{self, Wishes};
use underlay_drivers::names::resolve_backing;
use underlay_graph::{BackingRef, Preallocation};
use underlay_qcow2::{Compression, CreateOptions, Version};
use underlay_sys::say;

use crate::getopt::Known;
use crate::help::Help;
use crate::open::{How, image};
use crate::{Failure, Outcome, option_help, same_file, sizes};

const KNOWN: Known = Known {
    short: "F:b:f:ho:qu",
    long: &[
        ("help", "h", false),
        ("quiet", "q", false),
        ("object", "object", true),
        ("format", "f", true),
        ("options", "o", true),
        ("backing", "b", true),
        ("backing-format", "F", true),
        ("backing-unsafe", "u", false),
    ],
};

/// See [`Help`].
pub const HELP: Help = Help {
    command: "create",
    usage: "Usage: qemu-img create [-f FMT] [-b BACKING [-F FMT]] [-o OPTIONS] [-q] [-u] FILENAME [SIZE]",
    known: KNOWN,
};

/// What the command line asks for.
#[derive(Default)]
struct Request {
    format: String,
    backing: Option<String>,
    backing_format: Option<String>,
    options: Vec<(String, String)>,
    /// `-o help`
    help: bool,
    quiet: bool,
    unsafe_backing: bool,
    /// Of a backing file that is not opened otherwise: what is below it is looked at, if it can be opened.
    look_below: bool,
}

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = crate::options("create", KNOWN, words)?;
    let mut request = Request { format: "raw".to_owned(), ..Request::default() };
    for (name, value) in options {
        match name.as_str() {
            "f" => request.format = value,
            "b" => request.backing = Some(value),
            "F" => request.backing_format = Some(value),
            "o" if option_help::is_asked(&value) => request.help = true,
            "o" => request.options.extend(option_list(&value)?),
            "q" => request.quiet = true,
            "u" => request.unsafe_backing = true,
            "h" => return HELP.print(),
            other => return Err(crate::unsupported(other)),
        }
    }
    if request.help {
        return option_help::print(&request.format, others.first().map(String::as_str));
    }
    let (name, size) = match others.as_slice() {
        [name] => (name, None),
        [name, size] => (name, Some(sizes::argument(size, "image size")?)),
        [] => return Err(Failure::usage("Expecting image file name", "create")),
        [_, size, extra, ..] => {
            sizes::argument(size, "image size")?;
            return Err(Failure::usage(format!("Unexpected argument: {extra}"), "create"));
        }
    };
    let format = request.format.clone();
    make(name, size, request).await.map_err(|refused| {
        let (Refused::Option(mut failure) | Refused::Create(mut failure)) = refused;
        if failure.message.as_ref().is_some_and(|text| text.ends_with(": File too large")) {
            let hint = if format == "qcow2" { " (try using a larger cluster size)" } else { "" };
            failure.message = Some(format!("The image size is too large for file format '{format}'{hint}"));
        }
        Failure::new(format!("{name}: {}", failure.message.unwrap_or_default()))
    })
}

/// `a=b,c=d` with `,,` for a comma; `a` alone is switched on and `noa` off.
pub fn option_list(text: &str) -> Result<Vec<(String, String)>, Failure> {
    if text.is_empty() || text.starts_with(',') || text.ends_with(',') {
        return Err(Failure::new(format!("Invalid option list: {text}")));
    }
    let marked = text.replace(",,", "\0");
    let words = marked.split(',').map(|word| word.replace('\0', ","));
    let pair = |word: String| match word.split_once('=') {
        Some((name, value)) => (name.to_owned(), value.to_owned()),
        None => match word.strip_prefix("no") {
            Some(name) => (name.to_owned(), "off".to_owned()),
            None => (word, "on".to_owned()),
        },
    };
    Ok(words.map(pair).collect())
}

/// Why an image is not made.
pub enum Refused {
    /// An option that cannot be understood.
    Option(Failure),
    /// Anything else.
    Create(Failure),
}

/// An option that cannot be understood.
fn bad_option(text: String) -> Refused {
    Refused::Option(Failure::new(text))
}

/// What cannot be made.
fn cannot(text: impl Into<String>) -> Refused {
    Refused::Create(Failure::new(text))
}

/// The image that `convert` writes to.
pub async fn target(
    name: &str,
    size: u64,
    format: &str,
    backing: Option<(&str, Option<&str>)>,
    options: Vec<(String, String)>,
) -> Result<(), Refused> {
    let request = Request {
        format: format.to_owned(),
        backing: backing.map(|(file, _)| file.to_owned()),
        backing_format: backing.and_then(|(_, format)| format.map(str::to_owned)),
        options,
        help: false,
        quiet: true,
        // It is opened with the target.
        unsafe_backing: true,
        look_below: true,
    };
    make(name, Some(size), request).await
}

/// Whether options can be understood, before anything is made.
pub fn understood(format: &str, options: &[(String, String)]) -> Outcome {
    let read = match format {
        "qcow2" => wanted(options).map(|_| ()),
        "raw" | "file" => raw_options(options.to_vec()).map(|_| ()),
        other => Err(unknown_target(other)),
    };
    match read {
        Err(Refused::Option(failure)) => Err(failure),
        // What else is wrong is told when it is made.
        _ => Ok(()),
    }
}

fn unknown_target(format: &str) -> Refused {
    match format {
        "null-co" | "null-aio" => {
            bad_option(format!("Format driver '{format}' does not support image creation"))
        }
        other => bad_option(format!("Unknown file format '{other}'")),
    }
}

async fn make(name: &str, size: Option<u64>, mut request: Request) -> Result<(), Refused> {
    let mut backing = (None, None);
    for (option, value) in std::mem::take(&mut request.options) {
        match option.as_str() {
            // -b and -F go before these.
            "backing_file" if request.format == "qcow2" => backing.0 = Some(value),
            "backing_fmt" if request.format == "qcow2" => backing.1 = Some(value),
            _ => request.options.push((option, value)),
        }
    }
    request.backing = request.backing.or(backing.0);
    request.backing_format = request.backing_format.or(backing.1);
    if request.backing.as_deref() == Some("") && request.format == "qcow2" {
        return Err(cannot("Expected backing file name, got empty string"));
    }
    let known = matches!(request.format.as_str(), "qcow2" | "raw" | "file");
    if known && (!option_help::stored_in_file(name).map_err(Refused::Option)? || option_help::is_device(name))
    {
        let of_files = request.options.iter().find(|(option, _)| FileHints::NAMES.contains(&option.as_str()));
        if let Some((option, _)) = of_files {
            return Err(bad_option(format!("Invalid parameter '{option}'")));
        }
    }
    match request.format.as_str() {
        "qcow2" => make_qcow2(name, size, request).await,
        "raw" | "file" => make_raw(name, size, request).await,
        other => Err(unknown_target(other)),
    }
}

/// Wishes about the file that an image is stored in.
#[derive(Default)]
struct FileHints {
    /// As it was written, and what it says.
    nocow: Option<(String, bool)>,
    /// Bytes.
    extent_size: Option<u64>,
}

impl FileHints {
    const NAMES: [&str; 2] = ["nocow", "extent_size_hint"];

    /// Whether the option was one of these.
    fn take(&mut self, name: &str, value: &str) -> Result<bool, Refused> {
        match name {
            "nocow" => self.nocow = Some((value.to_owned(), flag(name, value)?)),
            "extent_size_hint" => self.extent_size = Some(size_option(name, value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The words of `Formatting …` before and after those of preallocation, where that is the file's.
    fn shown(&self) -> (String, String) {
        let nocow = self.nocow.as_ref().map(|(value, _)| format!(" nocow={value}"));
        let extent_size = self.extent_size.map(|bytes| format!(" extent_size_hint={bytes}"));
        (nocow.unwrap_or_default(), extent_size.unwrap_or_default())
    }

    fn wishes(&self) -> Wishes {
        Wishes {
            nocow: matches!(self.nocow, Some((_, true))),
            extent_size: self.extent_size.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX)),
        }
    }
}

/// What the options of a raw image say.
#[derive(Default)]
struct RawOptions {
    size: Option<u64>,
    /// The mode of preallocation.
    mode: Option<String>,
    hints: FileHints,
}

fn raw_options(options: Vec<(String, String)>) -> Result<RawOptions, Refused> {
    let mut wanted = RawOptions::default();
    for (option, value) in options {
        match option.as_str() {
            "size" => wanted.size = Some(size_option(&option, &value)?),
            "preallocation" => wanted.mode = Some(value),
            other if wanted.hints.take(other, &value)? => {}
            other => return Err(bad_option(format!("Invalid parameter '{other}'"))),
        }
    }
    Ok(wanted)
}

async fn make_raw(name: &str, size: Option<u64>, request: Request) -> Result<(), Refused> {
    let RawOptions { size: wanted, mode, hints } = raw_options(request.options)?;
    let size = only_one(size, wanted)?;
    for (unsupported, what) in [(&request.backing, "file"), (&request.backing_format, "file format")] {
        if unsupported.is_some() {
            return Err(cannot(format!("Backing {what} not supported for file format '{}'", request.format)));
        }
    }
    let size = size.ok_or_else(|| cannot("Image creation needs a size parameter"))?;
    if !request.quiet {
        let shown = mode.as_ref().map(|mode| format!(" preallocation={mode}")).unwrap_or_default();
        let (nocow, extent_size) = hints.shown();
        say!("Formatting '{name}', fmt={} size={size}{nocow}{shown}{extent_size}", request.format);
    }
    let unknown = |mode: &str| cannot(format!("invalid parameter value: {mode}"));
    let mode =
        mode.map_or(Ok(Preallocation::Off), |mode| preallocation(&mode).ok_or_else(|| unknown(&mode)))?;
    create::raw_as_wished(name, size.next_multiple_of(512), mode, hints.wishes()).await.map_err(failed)
}

fn preallocation(value: &str) -> Option<Preallocation> {
    Some(match value {
        "off" => Preallocation::Off,
        "metadata" => Preallocation::Metadata,
        "falloc" => Preallocation::Falloc,
        "full" => Preallocation::Full,
        _ => return None,
    })
}

fn size_option(name: &str, value: &str) -> Result<u64, Refused> {
    sizes::option(value, name).map_err(Refused::Option)
}

pub(crate) fn flag(name: &str, value: &str) -> Result<bool, Refused> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(bad_option(format!("Parameter '{name}' expects 'on' or 'off'"))),
    }
}

/// A number, perhaps hexadecimal.
pub(crate) fn number(name: &str, value: &str) -> Result<u64, Refused> {
    let parsed = match value.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => value.parse(),
    };
    parsed.map_err(|_| bad_option(format!("Parameter '{name}' expects a number")))
}

/// What the options of a qcow2 image say.
pub struct Wanted {
    /// What has been understood.
    pub options: CreateOptions,
    size: Option<u64>,
    /// These are words that are looked at last.
    pub compat: Option<String>,
    /// See [`Wanted::compat`].
    pub preallocation: Option<String>,
    compression: Option<String>,
    /// As it was written.
    flags: [Option<String>; 4],
    hints: FileHints,
}

/// Reads the options of a qcow2 image, but for those of its backing file.
pub fn wanted(list: &[(String, String)]) -> Result<Wanted, Refused> {
    let options = CreateOptions::new(0);
    let mut wanted = Wanted {
        options,
        size: None,
        compat: None,
        preallocation: None,
        compression: None,
        flags: [const { None }; 4],
        hints: FileHints::default(),
    };
    let options = &mut wanted.options;
    for (name, value) in list {
        match name.as_str() {
            "size" => wanted.size = Some(size_option(name, value)?),
            "cluster_size" => options.cluster_size = size_option(name, value)?,
            "refcount_bits" => options.refcount_bits = number(name, value)?,
            "lazy_refcounts" => {
                options.lazy_refcounts = flag(name, value)?;
                wanted.flags[0] = Some(value.clone());
            }
            "extended_l2" => {
                options.extended_l2 = flag(name, value)?;
                wanted.flags[1] = Some(value.clone());
            }
            "compat" => wanted.compat = Some(value.clone()),
            "compression_type" => wanted.compression = Some(value.clone()),
            "preallocation" => wanted.preallocation = Some(value.clone()),
            // Not to have what we do not have is fine.
            "encryption" if !flag(name, value)? => wanted.flags[2] = Some(value.clone()),
            "data_file_raw" if !flag(name, value)? => wanted.flags[3] = Some(value.clone()),
            "encryption" | "encrypt.format" | "data_file" | "data_file_raw" => {
                return Err(cannot(format!("Option '{name}' is not supported yet")));
            }
            other if wanted.hints.take(other, value)? => {}
            other => return Err(bad_option(format!("Invalid parameter '{other}'"))),
        }
    }
    Ok(wanted)
}

impl Wanted {
    /// Reads the words, in the reference's order.
    fn finish(&self, request: &Request) -> Result<CreateOptions, Refused> {
        let mut options = self.options.clone();
        let refused = |name: &str, value: &str| {
            Err(cannot(format!("Parameter '{name}' does not accept value '{value}'")))
        };
        match self.compat.as_deref() {
            None => {}
            Some("0.10" | "v2") => options.version = Version::V2,
            Some("1.1" | "v3") => options.version = Version::V3,
            Some(other) => return refused("version", other),
        }
        if let Some(format) = unknown_format(request) {
            return refused("backing-fmt", format);
        }
        if let Some(mode) = &self.preallocation {
            options.preallocation = match preallocation(mode) {
                Some(mode) => mode,
                None => return refused("preallocation", mode),
            };
        }
        match self.compression.as_deref() {
            None | Some("zlib") => {}
            Some("zstd") => options.compression = Compression::Zstd,
            Some(other) => return refused("compression-type", other),
        }
        if request.backing.is_none() && request.backing_format.is_some() {
            return Err(cannot("Backing format cannot be used without backing file"));
        }
        options.size = options.size.next_multiple_of(512);
        Ok(options)
    }
}

async fn make_qcow2(name: &str, size: Option<u64>, request: Request) -> Result<(), Refused> {
    let mut wanted = wanted(&request.options)?;
    let size = only_one(size, wanted.size)?;
    wanted.options.size =
        backing_and_size(name, size, &request, &mut wanted.options).await.map_err(Refused::Create)?;
    if !request.quiet {
        say!("{}", formatting(name, &wanted, &request));
    }
    let options = wanted.finish(&request)?;
    // Nothing is emptied for an image that cannot be.
    options.check().map_err(|error| cannot(error.to_string()))?;
    create::qcow2_as_wished(name, &options, wanted.hints.wishes()).await.map_err(failed)
}

/// The size is an argument or an option.
fn only_one(size: Option<u64>, option: Option<u64>) -> Result<Option<u64>, Refused> {
    match (size, option) {
        (Some(_), Some(_)) => Err(cannot("The image size must be specified only once")),
        (size, option) => Ok(size.or(option)),
    }
}

/// Why it was not made, with a hint perhaps.
fn failed(error: underlay_drivers::OpenError) -> Refused {
    match error.cause().and_then(underlay_graph::IoError::hint) {
        Some(hint) => cannot(format!("{error}\n{hint}")),
        None => cannot(error.to_string()),
    }
}

/// The line that says what is made.
fn formatting(name: &str, wanted: &Wanted, request: &Request) -> String {
    let options = &wanted.options;
    let compression = wanted.compression.as_deref().unwrap_or("zlib");
    let [lazy, extended, encryption, data_file_raw] = wanted.flags.each_ref().map(Option::as_deref);
    let (lazy, extended) = (lazy.unwrap_or("off"), extended.unwrap_or("off"));
    let encryption = encryption.map_or_else(String::new, |value| format!(" encryption={value}"));
    let mut line = format!(
        "Formatting '{name}', fmt=qcow2{encryption} cluster_size={} extended_l2={extended}",
        options.cluster_size,
    );
    let mut say = |text: String| line.push_str(&text);
    if let Some(mode) = &wanted.preallocation {
        say(format!(" preallocation={mode}"));
    }
    say(format!(" compression_type={compression} size={}", options.size));
    if let Some(compat) = &wanted.compat {
        say(format!(" compat={compat}"));
    }
    if let Some(backing) = &options.backing {
        say(format!(" backing_file={}", backing.file.replace(',', ",,")));
    }
    if let Some(format) = &request.backing_format {
        say(format!(" backing_fmt={format}"));
    }
    if let Some(value) = data_file_raw {
        say(format!(" data_file_raw={value}"));
    }
    say(format!(" lazy_refcounts={lazy} refcount_bits={}", options.refcount_bits));
    let (nocow, extent_size) = wanted.hints.shown();
    say(nocow + &extent_size);
    line
}

/// Looks at the backing file, which gives the size when none was given.
async fn backing_and_size(
    name: &str,
    size: Option<u64>,
    request: &Request,
    options: &mut CreateOptions,
) -> Result<u64, Failure> {
    let Some(backing) = &request.backing else {
        return size.ok_or_else(|| Failure::new("Image creation needs a size parameter"));
    };
    let place = resolve_backing(name, backing);
    if place == name || same_file::is_same(&place, name) {
        return Err(own_backing());
    }
    options.backing = Some(BackingRef { file: backing.clone(), format: request.backing_format.clone() });
    let how = How { format: request.backing_format.as_deref(), force_share: true, ..How::default() };
    if request.unsafe_backing {
        if request.look_below && is_below(name, &place, how).await? {
            return Err(own_backing());
        }
        if request.backing_format.is_none() {
            return Err(Failure::new("Backing file specified without backing format"));
        }
        return size.ok_or_else(|| Failure::new("Image creation needs a size parameter"));
    }
    if let Some(format) = unknown_format(request) {
        let text = format!("Unknown driver '{format}'\nCould not open backing image.");
        return Err(Failure::new(text));
    }
    if name.is_empty() && place == *backing && !backing.starts_with('/') {
        return Err(Failure::new("Cannot use relative backing file names for ''"));
    }
    let opened = image(&place, how).await;
    let below = opened.map_err(|failure| {
        let message = failure.message.unwrap_or_default();
        // The reference's text comes without the outer half.
        let message = message.strip_prefix(&format!("Could not open '{place}': ")).unwrap_or(&message);
        Failure::new(format!("{message}\nCould not open backing image."))
    })?;
    let length = below.root.length().await.map_err(|error| Failure::new(error.to_string()))?;
    let driver = below.wires().plan().node(below.node()).node.driver();
    let is_own = same_file::is_in(&below, name);
    below.close().await?;
    if is_own {
        return Err(own_backing());
    }
    if request.backing_format.is_none() {
        let text = "Backing file specified without backing format";
        return Err(Failure::new(format!("{text}\nDetected format of {driver}.")));
    }
    Ok(size.unwrap_or(length))
}

/// What is below an image would be destroyed when the image is made.
fn own_backing() -> Failure {
    Failure::new("Error: Trying to create an image with the same filename as the backing file")
}

/// Whether the backing file at `place` leads to the file `name`, as far as anybody can say.
async fn is_below(name: &str, place: &str, how: How<'_>) -> Result<bool, Failure> {
    let Ok(below) = image(place, how).await else { return Ok(false) };
    let found = same_file::is_in(&below, name);
    below.close().await?;
    Ok(found)
}

/// The format that the backing file is said to have, if there is none of that name.
fn unknown_format(request: &Request) -> Option<&str> {
    const KNOWN: [&str; 7] = ["qcow2", "raw", "file", "host_device", "nbd", "null-co", "null-aio"];
    request.backing_format.as_deref().filter(|format| !KNOWN.contains(format))
}

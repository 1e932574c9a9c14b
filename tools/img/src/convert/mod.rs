//! `convert`: copies images into a new one of another format or shape.

mod copy;
mod piece;

use std::sync::Arc;

use underlay_drivers::filename;
use underlay_graph::{IoError, NodeId, Role};
use underlay_jobs::pace::Pace;

use self::copy::Copy;

use crate::getopt::Known;
use crate::help::Help;
use crate::open::{How, Image, check_cache, image};
use crate::progress::Progress;
use crate::snapshot::Wanted;
use crate::{Failure, Outcome, bitmap, create, option_help, same_file, sizes};

const KNOWN: Known = Known {
    short: "hf:O:B:F:CcpS:o:m:WnqUt:T:l:r:",
    long: &[
        ("help", "h", false),
        ("quiet", "q", false),
        ("progress", "p", false),
        ("source-format", "f", true),
        ("source-image-opts", "source-image-opts", false),
        ("image-opts", "source-image-opts", false),
        ("source-snapshot", "l", true),
        ("source-cache", "T", true),
        ("target-format", "O", true),
        ("target-image-opts", "target-image-opts", false),
        ("target-options", "o", true),
        ("compress", "c", false),
        ("target-cache", "t", true),
        ("backing", "B", true),
        ("backing-format", "F", true),
        ("no-create", "n", false),
        ("target-is-zero", "target-is-zero", false),
        ("sparse-size", "S", true),
        ("bitmaps", "bitmaps", false),
        ("skip-broken-bitmaps", "skip-broken-bitmaps", false),
        ("force-share", "U", false),
        ("rate", "r", true),
        ("parallel", "m", true),
        ("copy-range-offloading", "C", false),
        ("salvage", "salvage", false),
        ("oob-writes", "W", false),
        ("object", "object", true),
    ],
};

/// See [`Help`].
pub const HELP: Help = Help {
    command: "convert",
    usage: "Usage: qemu-img convert [options] FILENAME [FILENAME2 [...]] OUTPUT_FILENAME",
    known: KNOWN,
};

/// Most copies under way at once.
const MOST_WORKERS: usize = 16;

#[derive(Debug, Default)]
struct Request {
    format: Option<String>,
    target_format: Option<String>,
    image_opts: bool,
    target_image_opts: bool,
    options: Option<Vec<(String, String)>>,
    backing: Option<String>,
    backing_format: Option<String>,
    /// Of the target and the source.
    caches: (Option<String>, Option<String>),
    compressed: bool,
    bitmaps: bool,
    skip_broken_bitmaps: bool,
    /// `-o help`
    help: bool,
    progress: bool,
    no_create: bool,
    quiet: bool,
    force_share: bool,
    snapshot: Option<Wanted>,
    target_is_zero: bool,
    /// What cannot be read becomes zero.
    salvage: bool,
    offload: bool,
    /// Runs of zeroes of at least so many bytes become holes; 0: none.
    sparse: Option<u64>,
    workers: usize,
    /// Bytes per second, 0 for no limit.
    rate: u64,
}

const SPARSE: &str = "buffer size for sparse output";

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = crate::options("convert", KNOWN, words)?;
    let mut request = Request { workers: 8, ..Request::default() };
    for (name, value) in options {
        if name == "h" {
            return HELP.print();
        }
        request.set(&name, value)?;
    }
    request.check()?;
    if request.help {
        return option_help::print(
            request.target_format(),
            others.get(1..).and_then(<[_]>::last).map(String::as_str),
        );
    }
    let Some((target, sources)) = others.split_last().filter(|(_, sources)| !sources.is_empty()) else {
        return Err(Failure::new("Must specify image file name"));
    };
    request.caches.1.as_ref().map_or(Ok(()), |mode| check_cache(mode, "source cache"))?;
    let progress = Progress::start(request.progress);
    convert(sources, target, &request, &progress).await
}

/// What can be said against a target that is to be made, in the reference's order.
fn check_new(request: &Request, sources: usize) -> Outcome {
    let format = request.target_format();
    create::understood(format, request.options.as_deref().unwrap_or_default())?;
    if request.backing.is_some() && format == "raw" {
        return Err(Failure::new("Backing file not supported for file format 'raw'"));
    }
    check_backing(request, sources)?;
    if request.backing.is_some() && request.backing_format.is_none() {
        return Err(Failure::new("Use of backing file requires explicit backing format"));
    }
    if request.compressed && format == "raw" {
        return Err(Failure::new("Compression not supported for this file format"));
    }
    let reserves = |(name, mode): &(String, String)| name == "preallocation" && mode != "off";
    if request.compressed && request.options.iter().flatten().any(reserves) {
        return Err(Failure::new("Compression and preallocation not supported at the same time"));
    }
    Ok(())
}

fn check_backing(request: &Request, sources: usize) -> Outcome {
    match request.backing.is_some() && sources > 1 {
        true => Err(Failure::new(
            "Having a backing file for the target makes no sense when concatenating multiple input images",
        )),
        false => Ok(()),
    }
}

impl Request {
    /// What is made if nothing else is asked for is raw.
    fn target_format(&self) -> &str {
        self.target_format.as_deref().unwrap_or("raw")
    }

    fn set(&mut self, name: &str, value: String) -> Outcome {
        match name {
            "f" => self.format = Some(value),
            "O" => self.target_format = Some(value),
            "source-image-opts" => self.image_opts = true,
            "target-image-opts" => self.target_image_opts = true,
            "B" => self.backing = Some(value),
            "F" => self.backing_format = Some(value),
            "o" if option_help::is_asked(&value) => self.help = true,
            "o" => self.options.get_or_insert_default().extend(create::option_list(&value)?),
            "bitmaps" => self.bitmaps = true,
            "skip-broken-bitmaps" => self.skip_broken_bitmaps = true,
            "c" => self.compressed = true,
            "p" => self.progress = true,
            "n" => self.no_create = true,
            "q" => self.quiet = true,
            "U" => self.force_share = true,
            "l" => self.snapshot = Some(Wanted::parse("qemu-img", &value)?),
            "t" => self.caches.0 = Some(value),
            "T" => self.caches.1 = Some(value),
            "C" => self.offload = true,
            "salvage" => self.salvage = true,
            "target-is-zero" => self.target_is_zero = true,
            // Writes go out of order anyway.
            "W" => {}
            "S" => self.sparse = Some(sparse_size(&value)?),
            "m" => self.workers = workers(&value)?,
            "r" => self.rate = sizes::argument(&value, "rate limit")?,
            other => return Err(crate::unsupported(other)),
        }
        Ok(())
    }

    /// What must not be asked for together.
    fn check(&mut self) -> Outcome {
        if self.skip_broken_bitmaps && !self.bitmaps {
            return Err(Failure::new("Use of --skip-broken-bitmaps requires --bitmaps"));
        }
        if self.offload && self.sparse.is_some() {
            return Err(Failure::new("Cannot enable copy offloading when -S is used"));
        }
        if self.offload && self.compressed {
            return Err(Failure::new("Cannot enable copy offloading when -c is used"));
        }
        if self.offload && self.salvage {
            return Err(Failure::new("Cannot use copy offloading in salvaging mode"));
        }
        if self.no_create && (self.help || self.options.is_some()) {
            return Err(Failure::new("-o has no effect when skipping image creation"));
        }
        if self.target_image_opts && !self.no_create {
            return Err(Failure::new("--target-image-opts requires use of -n flag"));
        }
        if self.target_is_zero && !self.no_create {
            return Err(Failure::new("--target-is-zero requires use of -n flag"));
        }
        if self.target_is_zero && self.backing.is_some() {
            let text = "Cannot use --target-is-zero when the destination image has a backing file";
            return Err(Failure::new(text));
        }
        let format = self.target_format().to_owned();
        let mut backing = (None, None);
        for (name, value) in std::mem::take(&mut self.options).into_iter().flatten() {
            match name.as_str() {
                "backing_file" if format == "qcow2" => backing.0 = Some(value),
                "backing_fmt" if format == "qcow2" => backing.1 = Some(value),
                _ => self.options.get_or_insert_default().push((name, value)),
            }
        }
        self.backing = self.backing.take().or(backing.0);
        self.backing_format = self.backing_format.take().or(backing.1);
        self.progress &= !self.quiet;
        Ok(())
    }
}

fn sparse_size(value: &str) -> Result<u64, Failure> {
    let size = sizes::argument(value, SPARSE)?;
    if size % 512 != 0 || size > 16 << 20 {
        return Err(Failure::new(format!(
            "Invalid {SPARSE} specified. Valid sizes are multiples of 512 up to 16777216. Select 0 to disable sparse \
             detection (fully allocates output)."
        )));
    }
    Ok(size)
}

fn workers(value: &str) -> Result<usize, Failure> {
    let is_number = sizes::parse(value).is_some() || sizes::is_out_of_range(value);
    let text = || match is_number {
        true => format!("Invalid number of coroutines specified. Must be between 1 and {MOST_WORKERS}."),
        false => format!("Invalid number of coroutines specified: '{value}'."),
    };
    let count = value.parse().ok().filter(|count| (1..=MOST_WORKERS).contains(count));
    count.ok_or_else(|| Failure::new(text()))
}

/// Makes the target.
async fn make(target: &str, size: u64, request: &Request) -> Outcome {
    let options = request.options.clone().unwrap_or_default();
    let format = request.target_format();
    let backing = request.backing.as_deref().map(|file| (file, request.backing_format.as_deref()));
    if backing.is_none() && request.backing_format.is_some() {
        let text = "Backing format cannot be used without backing file";
        return Err(Failure::new(format!("{target}: error while converting {format}: {text}")));
    }
    create::target(target, size, format, backing, options).await.map_err(|refused| match refused {
        create::Refused::Option(failure) => failure,
        create::Refused::Create(failure) => {
            let text = failure.message.unwrap_or_default();
            Failure::new(format!("{target}: error while converting {format}: {text}"))
        }
    })
}

/// An image to copy from.
struct Input {
    image: Arc<Image>,
    /// Where it begins in the target, in bytes.
    start: u64,
    /// In bytes.
    length: u64,
}

/// Opens the sources, to be copied one behind the other; and their length together.
async fn open_sources(names: &[String], request: &Request) -> Result<(Vec<Input>, u64), Failure> {
    let mut images = Vec::new();
    for name in names {
        let (format, force_share) = (request.format.as_deref(), request.force_share);
        let image_opts = request.image_opts;
        let how = How { format, image_opts, force_share, no_share: !force_share, ..How::default() };
        images.push(Arc::new(image(name, how).await?));
    }
    if let (Some(wanted), Some(first)) = (&request.snapshot, images.first()) {
        // Of several sources, options of a snapshot are for the first.
        if images.len() > 1 && matches!(wanted, Wanted::Either(_)) {
            return Err(Failure::new("No support for concatenating multiple snapshot"));
        }
        let inside = first.root.enter().await.map_err(|error| Failure::new(error.to_string()))?;
        wanted.show(&inside.cx()).await.map_err(Failure::new)?;
    }
    let (mut inputs, mut total) = (Vec::new(), 0_u64);
    for image in images {
        let length = image.length().await?;
        inputs.push(Input { image, start: total, length });
        total = total.checked_add(length).ok_or_else(|| Failure::new("the images together are too large"))?;
    }
    Ok((inputs, total))
}

/// Opens the target for writing, and looks whether it can take what is to be copied.
async fn open_target(target: &str, request: &Request) -> Result<Arc<Image>, Failure> {
    request.caches.0.as_ref().map_or(Ok(()), |mode| check_cache(mode, "cache"))?;
    // Parts of clusters get the rest of them from the backing file, also from that of an image that was there before.
    let no_backing = request.backing.is_none() && !request.no_create;
    let how = How {
        format: match request.target_image_opts {
            true => request.target_format.as_deref(),
            false => Some(request.target_format()),
        },
        image_opts: request.target_image_opts,
        write: true,
        unmap: request.sparse != Some(0),
        no_backing,
        ..How::default()
    };
    let output = Arc::new(image(target, how).await?);
    if request.compressed && output.is_raw() {
        return Err(Failure::new("Compression not supported for this file format"));
    }
    if request.bitmaps {
        bitmap::check_target(&output)?;
    }
    Ok(output)
}

async fn convert(sources: &[String], target: &str, request: &Request, progress: &Progress) -> Outcome {
    let (inputs, total) = open_sources(sources, request).await?;
    match request.no_create {
        true => check_backing(request, sources.len())?,
        false => check_new(request, sources.len())?,
    }
    if request.bitmaps {
        let [source] = inputs.as_slice() else {
            return Err(Failure::new("Copying bitmaps only possible with single source"));
        };
        bitmap::check_source(&source.image, request.skip_broken_bitmaps)?;
    }
    if !request.no_create {
        // Without -U a lock is met.
        if request.force_share && inputs.iter().any(|input| same_file::is_in(&input.image, target)) {
            return Err(Failure::new(format!("{target}: input and output are the same file")));
        }
        make(target, total, request).await?;
    }
    let output = open_target(target, request).await?;
    if output.length().await? < total {
        return Err(Failure::new("output file is smaller than input file"));
    }
    let copied = copy_all(inputs, &output, total, request, progress).await;
    // Closed after an error too: what was copied so far is then a sound image.
    let output = Arc::into_inner(output).ok_or_else(|| Failure::new("the target is still in use"))?;
    let closed = output.close().await;
    copied.and(closed)
}

/// Copies the inputs, each to its place; `total` bytes in all.
async fn copy_all(
    inputs: Vec<Input>,
    output: &Arc<Image>,
    total: u64,
    request: &Request,
    progress: &Progress,
) -> Outcome {
    let no_backing = request.backing.is_none();
    let cluster = cluster_size(output);
    let zero_from = match (no_backing, request.no_create) {
        (true, false) => {
            let inside = output.root.enter().await.map_err(|error| Failure::new(error.to_string()))?;
            if inside.cx().unwritten_is_zero() { 0 } else { u64::MAX }
        }
        (true, true) if request.target_is_zero => 0,
        (_, true) => u64::MAX,
        (false, false) => backing_length(output).await?.next_multiple_of(cluster),
    };
    let mut pace = Pace::default();
    for input in inputs {
        let below = if no_backing { None } else { shared_backing(&input.image, output) };
        let copy = Copy { input: &input, output, request, total, cluster, zero_from, below, progress };
        copy.run(&mut pace).await?;
        if request.bitmaps {
            bitmap::copy_all(&input.image, output).await?;
        }
        Arc::into_inner(input.image)
            .ok_or_else(|| Failure::new("the source is still in use"))?
            .close()
            .await?;
    }
    progress.show(100.0);
    Ok(())
}

/// The image below the source that has what the target's backing file has: the same file, if it is in the chain. Else
/// it is the user's promise that the source's own backing file says the same.
fn shared_backing(input: &Image, output: &Image) -> Option<NodeId> {
    let (source, target) = (input.wires(), output.wires());
    let own = source.plan().node(input.node()).child(Role::Backing);
    let named =
        target.plan().node(output.node()).child(Role::Backing).map(|id| filename::of(&target.view(id)));
    let found = named.and_then(|name| filename::find_in_chain(&source, input.node(), &name));
    found.filter(|id| *id != input.node()).or(own)
}

/// In bytes; of an image without clusters as much as is worth asking about at once.
fn cluster_size(image: &Image) -> u64 {
    image.wires().view(image.node()).node().image_info().cluster_size.unwrap_or(65536)
}

/// How long the image's backing file is.
async fn backing_length(image: &Image) -> Result<u64, Failure> {
    let failed = |error: IoError| Failure::new(error.to_string());
    let inside = image.root.enter().await.map_err(failed)?;
    let below = inside.cx().child(Role::Backing);
    Ok(below.map_or(0, |below| below.length()))
}

//! `convert`: copies images into a new one of another format or shape.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::oneshot;
use underlay_drivers::filename;
use underlay_graph::reflink::Reflinks;
use underlay_graph::status::status;
use underlay_graph::{ByteRange, IoError, NodeId, Role, WriteFlags};
use underlay_jobs::pace::Pace;
use underlay_qcow2::Qcow2;
use underlay_sys::{Iov, rt};

use crate::getopt::Known;
use crate::open::{How, Image, check_cache, image};
use crate::progress::Progress;
use crate::snapshot::Wanted;
use crate::{Failure, Outcome, bitmap, create, option_help, sizes};

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

/// Copied at a time, in bytes.
const CHUNK: u64 = 2 << 20;
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
            println!("Usage: qemu-img convert [options] FILENAME [FILENAME2 [...]] OUTPUT_FILENAME");
            return Ok(());
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
    let text = || match sizes::is_out_of_range(value) {
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

async fn convert(sources: &[String], target: &str, request: &Request, progress: &Progress) -> Outcome {
    let (mut opened, mut inputs) = (Vec::new(), Vec::new());
    let mut total = 0_u64;
    for name in sources {
        let (format, force_share) = (request.format.as_deref(), request.force_share);
        let image_opts = request.image_opts;
        let how = How { format, image_opts, force_share, no_share: !force_share, ..How::default() };
        let input = image(name, how).await?;
        opened.push(Arc::new(input));
    }
    if let (Some(wanted), Some(first)) = (&request.snapshot, opened.first()) {
        // Of several sources, options of a snapshot are for the first.
        if opened.len() > 1 && matches!(wanted, Wanted::Either(_)) {
            return Err(Failure::new("No support for concatenating multiple snapshot"));
        }
        let inside = first.root.enter().await.map_err(|error| Failure::new(error.to_string()))?;
        wanted.show(&inside.cx()).await.map_err(Failure::new)?;
    }
    for input in opened {
        let length = input.length().await?;
        inputs.push((total, length, input));
        total = total.checked_add(length).ok_or_else(|| Failure::new("the images together are too large"))?;
    }
    match request.no_create {
        true => check_backing(request, sources.len())?,
        false => check_new(request, sources.len())?,
    }
    if request.bitmaps {
        let [(_, _, source)] = inputs.as_slice() else {
            return Err(Failure::new("Copying bitmaps only possible with single source"));
        };
        bitmap::check_source(source, request.skip_broken_bitmaps)?;
    }
    if !request.no_create {
        make(target, total, request).await?;
    }
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
    inputs: Vec<(u64, u64, Arc<Image>)>,
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
    for (start, length, input) in inputs {
        let below = if no_backing { None } else { shared_backing(&input, output) };
        let copy = Copy {
            input: &input,
            output,
            request,
            start,
            length,
            total,
            cluster,
            zero_from,
            below,
            progress,
        };
        copy.run(&mut pace).await?;
        if request.bitmaps {
            bitmap::copy_all(&input, output).await?;
        }
        Arc::into_inner(input).ok_or_else(|| Failure::new("the source is still in use"))?.close().await?;
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

/// One input on its way to its place in the output.
struct Copy<'a> {
    input: &'a Arc<Image>,
    output: &'a Arc<Image>,
    request: &'a Request,
    start: u64,
    length: u64,
    total: u64,
    /// Of the output, in bytes.
    cluster: u64,
    /// From here on the output reads zeroes where nothing is written.
    zero_from: u64,
    /// The target has a backing file, and from this layer of the source on downwards they have the same.
    below: Option<NodeId>,
    progress: &'a Progress,
}

/// Chunks on their way, oldest first.
type Running = VecDeque<oneshot::Receiver<Outcome>>;

/// What to do with a run of bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The backing file has the same.
    Shared,
    Zero,
    Data,
}

impl Copy<'_> {
    /// Copies several chunks at once. None is under way any more when this ends.
    async fn run(&self, pace: &mut Pace) -> Outcome {
        let mut running = VecDeque::new();
        let mut outcome = self.start_all(pace, &mut running).await;
        while !running.is_empty() {
            outcome = outcome.and(finish(running.pop_front()).await);
        }
        outcome
    }

    /// Starts all chunks, as many at a time as there are workers; the last ones are still `running` then. Stops at an
    /// error.
    async fn start_all(&self, pace: &mut Pace, running: &mut Running) -> Outcome {
        let (request, output) = (self.request, self.output);
        // Compressed clusters are packed one behind the other: in order.
        let workers = if request.compressed { 1 } else { request.workers };
        let sparse = if request.compressed { self.cluster } else { request.sparse.unwrap_or(4096) };
        let unit = cluster_size(self.input);
        // Who cares where the holes are has to look at every byte.
        let reflinks = Reflinks::new(!request.compressed && request.sparse.is_none() && request.rate == 0);
        let mut rest = ByteRange::between(0, self.length);
        let mut next_lane = 0;
        // The first one's turn has come: its sender is gone.
        let mut turn = oneshot::channel::<()>().1;
        while !rest.is_empty() {
            let (kind, len) = match self.look(rest).await {
                Ok(looked) => looked,
                // One bad entry may be in the way of many good ones.
                Err(_) => match self.look(rest.split(unit - rest.start() % unit).0).await {
                    Ok(looked) => looked,
                    Err(error) => self.unknown(rest, error)?,
                },
            };
            if kind == Kind::Data
                && let Some(shared) = self.reflink_first(rest.split(len).0, &reflinks).await
            {
                rest = rest.split(shared).1;
                self.show_progress(rest);
                continue;
            }
            let (run, after) = rest.split(if kind == Kind::Data { len.min(CHUNK) } else { len });
            rest = after;
            let known_zero = self.start + run.start() >= self.zero_from;
            if kind == Kind::Shared || kind == Kind::Zero && known_zero {
                continue;
            }
            if running.len() >= workers {
                finish(running.pop_front()).await?;
            }
            if request.rate > 0 {
                pace.spend(rt::now(), run.len(), request.rate);
                if let Some(at) = pace.wait_until(rt::now()) {
                    rt::sleep_until(at).await;
                }
            }
            let piece = Piece {
                input: self.input.clone(),
                output: output.clone(),
                run,
                start: self.start,
                zero: kind == Kind::Zero,
                known_zero,
                salvage: request.salvage.then_some(request.quiet),
            };
            let compressed = request.compressed;
            let (to, from) = oneshot::channel();
            // All at the same time, but clusters get their places one after the other, so that they lie in order. A raw
            // target has a place for every byte anyway.
            let (next, next_turn) = oneshot::channel::<()>();
            if output.is_raw() {
                turn = oneshot::channel().1;
            }
            let turn = Turn { come: std::mem::replace(&mut turn, next_turn), next };
            rt::spawn_background(next_lane, async move {
                let copied = piece.copy(turn, compressed, sparse).await;
                // Nobody waits any more after an error.
                let _ = to.send(copied);
            });
            next_lane = (next_lane + 1) % rt::lanes();
            running.push_back(from);
            self.show_progress(rest);
        }
        Ok(())
    }

    fn show_progress(&self, rest: ByteRange) {
        let done = self.start + rest.start();
        self.progress.show(done as f64 * 100.0 / self.total.max(1) as f64);
    }

    /// Copies the first bytes of `run` without copying them, if that can be: how many.
    async fn reflink_first(&self, run: ByteRange, reflinks: &Reflinks) -> Option<u64> {
        let (first, at) = (run.split(reflinks.stride()).0, self.start + run.start());
        if first.is_empty() {
            return None;
        }
        let (from, to) = (self.input.root.enter().await.ok()?, self.output.root.enter().await.ok()?);
        reflinks.copy(&from.cx(), first, &to.cx(), at).await.then_some(first.len())
    }

    /// Where nobody can say what there is: an error, or a sector to try.
    fn unknown(&self, rest: ByteRange, error: IoError) -> Result<(Kind, u64), Failure> {
        let text = format!("error while reading block status at offset {}: {}", rest.start(), error.plain());
        if !self.request.salvage {
            return Err(Failure::new(text));
        }
        if !self.request.quiet {
            eprintln!("qemu-img: warning: {text}");
        }
        Ok((Kind::Data, rest.len().min(512)))
    }

    /// What to do with the first bytes of `rest`, and with how many.
    async fn look(&self, rest: ByteRange) -> Result<(Kind, u64), IoError> {
        let cluster = self.cluster;
        // Not across the place from which on zeroes need not be written.
        let until = self.zero_from.saturating_sub(self.start);
        let rest = if rest.start() < until { rest.before(until) } else { rest };
        let inside = self.input.root.enter().await?;
        let found = status(&inside.cx(), rest, self.below).await?;
        let compressed = self.request.compressed;
        let kind = match (self.below, found.allocated, found.zero) {
            (Some(_), false, _) => Kind::Shared,
            // A compressed write is of whole clusters, whatever is in them.
            _ if compressed || self.request.sparse == Some(0) => Kind::Data,
            (_, true, false) => Kind::Data,
            _ => Kind::Zero,
        };
        let whole = found.len - found.len % cluster;
        let within = (self.start + rest.start()) % cluster;
        Ok(match kind {
            // Another input has the first part of this cluster.
            _ if compressed && within != 0 => (Kind::Data, (cluster - within).min(rest.len())),
            Kind::Shared if compressed && whole == 0 && found.len < rest.len() => {
                (Kind::Data, cluster.min(rest.len()))
            }
            Kind::Shared if compressed && found.len < rest.len() => (Kind::Shared, whole),
            Kind::Data if compressed && self.below.is_some() => {
                (Kind::Data, found.len.next_multiple_of(cluster).min(CHUNK).min(rest.len()))
            }
            Kind::Data if compressed => (Kind::Data, CHUNK),
            kind => (kind, found.len),
        })
    }
}

async fn finish(piece: Option<oneshot::Receiver<Outcome>>) -> Outcome {
    match piece {
        // A task answers, or takes the program down with it.
        Some(piece) => piece.await.unwrap_or_else(|_| Err(Failure::new("a copy was lost"))),
        None => Ok(()),
    }
}

/// When a piece may take its places in the target: when the sender of `come` has gone. Then the next piece may.
struct Turn {
    come: oneshot::Receiver<()>,
    next: oneshot::Sender<()>,
}

/// One run to copy.
struct Piece {
    input: Arc<Image>,
    output: Arc<Image>,
    run: ByteRange,
    /// Where the input begins in the output.
    start: u64,
    zero: bool,
    known_zero: bool,
    /// What cannot be read becomes zero; quietly or not.
    salvage: Option<bool>,
}

impl Piece {
    async fn copy(self, turn: Turn, compressed: bool, sparse: u64) -> Outcome {
        let at = self.start + self.run.start();
        let writing = |error: underlay_graph::IoError| {
            Failure::new(format!("error while writing at byte {at}: {error}"))
        };
        let zeroes = underlay_graph::ZeroFlags { may_unmap: true, no_fallback: false };
        let target = ByteRange::between(at, at + self.run.len());
        if self.zero {
            let _ = turn.come.await;
            return self.output.root.write_zeroes(target, zeroes).await.map_err(writing);
        }
        let data = Iov::scratch(self.run.buffer_len());
        if let Err(error) = self.input.root.read(self.run, data.clone()).await {
            let Some(quiet) = self.salvage else {
                return Err(Failure::new(format!(
                    "error while reading at byte {}: {}",
                    self.run.start(),
                    error.plain()
                )));
            };
            self.salvage(&data, quiet).await;
        }
        let runs = runs(&data, sparse);
        let _ = turn.come.await;
        if !compressed {
            self.reserve(at, &runs).await.map_err(writing)?;
            drop(turn.next);
        }
        for (from, len, is_zero) in runs {
            let range = ByteRange::between(at + from as u64, at + (from + len) as u64);
            if is_zero && self.known_zero {
                continue;
            }
            let done = match is_zero {
                true => self.output.root.write_zeroes(range, zeroes).await,
                false => self.write(range, data.slice(from, len), compressed.then_some(sparse)).await,
            };
            done.map_err(writing)?;
        }
        Ok(())
    }

    /// Writes to the target, compressed if its clusters are told. One that another input has a part of is not.
    async fn write(&self, range: ByteRange, data: Iov, clusters: Option<u64>) -> Result<(), IoError> {
        let inside = self.output.root.enter().await?;
        let cx = inside.cx();
        let whole = match clusters.filter(|cluster| range.start().is_multiple_of(*cluster)) {
            Some(_) if range.end() == cx.length() => range.len(),
            Some(cluster) => range.len() - range.len() % cluster,
            None => 0,
        };
        let (packed, plain) = range.split(whole);
        let (first, rest) =
            (data.slice(0, packed.buffer_len()), data.slice(packed.buffer_len(), plain.buffer_len()));
        for (part, data, compressed) in [(packed, first, true), (plain, rest, false)] {
            if !part.is_empty() {
                cx.write(part, data, WriteFlags { compressed }).await?;
            }
        }
        Ok(())
    }
}

impl Piece {
    /// Gives the data among `runs` of the piece at `at` its places in a target that hands them out.
    async fn reserve(&self, at: u64, runs: &[(usize, usize, bool)]) -> Result<(), IoError> {
        let inside = self.output.root.enter().await?;
        let cx = inside.cx();
        let Some(qcow2) = cx.node().as_any().downcast_ref::<Qcow2>() else { return Ok(()) };
        for (from, len, _) in runs.iter().filter(|(_, _, is_zero)| !is_zero) {
            let range = ByteRange::between(at + *from as u64, at + (from + len) as u64);
            qcow2.reserve_places(&cx, range).await?;
        }
        Ok(())
    }

    /// Reads what can be read, sector by sector.
    async fn salvage(&self, data: &Iov, quiet: bool) {
        let mut rest = self.run;
        while !rest.is_empty() {
            let (sector, after) = rest.split(512);
            rest = after;
            let at = usize::try_from(sector.start() - self.run.start()).unwrap_or(0);
            let into = data.slice(at, sector.buffer_len());
            if let Err(error) = self.input.root.read(sector, into.clone()).await {
                if !quiet {
                    eprintln!(
                        "qemu-img: warning: error while reading offset {}: {}",
                        sector.start(),
                        error.plain()
                    );
                }
                into.fill(0);
            }
        }
    }
}

/// Cuts a buffer into runs of data and, of at least `sparse` bytes each, of zeroes.
fn runs(data: &Iov, sparse: u64) -> Vec<(usize, usize, bool)> {
    let unit = usize::try_from(sparse).unwrap_or(0);
    if unit == 0 {
        return vec![(0, data.len(), false)];
    }
    let mut runs: Vec<(usize, usize, bool)> = Vec::new();
    let mut at = 0;
    while at < data.len() {
        let len = unit.min(data.len() - at);
        let zero = data.slice(at, len).is_zero();
        match runs.last_mut() {
            Some((_, total, kind)) if *kind == zero => *total += len,
            _ => runs.push((at, len, zero)),
        }
        at += len;
    }
    runs
}

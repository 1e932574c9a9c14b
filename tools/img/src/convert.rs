//! `convert`: copies images into a new one of another format or shape.

use std::sync::Arc;

use underlay_drivers::filename;
use underlay_graph::status::status;
use underlay_graph::{ByteRange, IoError, NodeId, Role, WriteFlags};
use underlay_sys::{Iov, rt};

use crate::getopt::{Known, parse};
use crate::open::{How, Image, image};
use crate::{Failure, Outcome, create, sizes};

const KNOWN: Known = Known {
    short: "hf:O:B:F:cpS:o:m:WnqUt:T:b:l:r:",
    long: &[
        ("help", "h", false),
        ("object", "object", true),
        ("image-opts", "image-opts", false),
        ("target-image-opts", "target-image-opts", false),
        ("force-share", "U", false),
        ("target-is-zero", "target-is-zero", false),
        ("salvage", "salvage", false),
        ("bitmaps", "bitmaps", false),
    ],
};

/// Copied at a time, in bytes.
const CHUNK: u64 = 2 << 20;
/// Formats of targets.
const FORMATS: [&str; 2] = ["qcow2", "raw"];
/// Most copies under way at once.
const MOST_WORKERS: usize = 16;

#[derive(Debug)]
struct Request {
    format: Option<String>,
    target_format: String,
    create_words: Vec<String>,
    compressed: bool,
    progress: bool,
    no_create: bool,
    quiet: bool,
    force_share: bool,
    target_is_zero: bool,
    /// Runs of zeroes of at least so many bytes become holes; 0: none.
    sparse: u64,
    workers: usize,
}

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = parse(KNOWN, words)?;
    let mut request = Request {
        format: None,
        target_format: "raw".to_owned(),
        create_words: Vec::new(),
        compressed: false,
        progress: false,
        no_create: false,
        quiet: false,
        force_share: false,
        target_is_zero: false,
        sparse: 4096,
        workers: 8,
    };
    for (name, value) in options {
        match name.as_str() {
            "f" => request.format = Some(value),
            "O" => request.target_format = value,
            "B" | "b" => request.create_words.extend(["-b".to_owned(), value]),
            "F" => request.create_words.extend(["-F".to_owned(), value]),
            "o" => request.create_words.extend(["-o".to_owned(), value]),
            "c" => request.compressed = true,
            "p" => request.progress = true,
            "n" => request.no_create = true,
            "q" => request.quiet = true,
            "U" => request.force_share = true,
            "target-is-zero" => request.target_is_zero = true,
            // Writes go out of order anyway, and the cache modes matter for speed alone.
            "W" | "t" | "T" => {}
            "S" => {
                let size = sizes::parse(&value);
                request.sparse = size.ok_or_else(|| {
                    Failure::new(format!("Invalid buffer size for sparse output specified: {value}"))
                })?;
            }
            "m" => {
                let count = value.parse().ok().filter(|count| (1..=MOST_WORKERS).contains(count));
                request.workers = count.ok_or_else(|| {
                    Failure::new("Invalid number of coroutines specified. Must be between 1 and 16.")
                })?;
            }
            "h" => {
                println!("Usage: qemu-img convert [options] FILENAME [FILENAME2 [...]] OUTPUT_FILENAME");
                return Ok(());
            }
            other => return Err(Failure::new(format!("option '{other}' is not supported yet"))),
        }
    }
    let Some((target, sources)) = others.split_last().filter(|(_, sources)| !sources.is_empty()) else {
        return Err(Failure::new("Must specify image file name"));
    };
    if request.overlays() && sources.len() > 1 {
        return Err(Failure::new(
            "Having a backing file for the target makes no sense when concatenating multiple input images",
        ));
    }
    if request.overlays() {
        check_backing(&request)?;
    }
    convert(sources, target, &request).await
}

fn check_backing(request: &Request) -> Outcome {
    if request.target_format == "raw" {
        return Err(Failure::new("Backing file not supported for file format 'raw'"));
    }
    let named = |pair: &[String]| match pair {
        [option, value] => option == "-F" || option == "-o" && value.contains("backing_fmt="),
        _ => false,
    };
    if request.no_create || request.create_words.chunks(2).any(named) {
        return Ok(());
    }
    Err(Failure::new("Use of backing file requires explicit backing format"))
}

impl Request {
    /// Whether the target gets a backing file.
    fn overlays(&self) -> bool {
        let named = |pair: &[String]| match pair {
            [option, value] => option == "-b" || option == "-o" && value.contains("backing_file="),
            _ => false,
        };
        self.create_words.chunks(2).any(named)
    }
}

async fn convert(sources: &[String], target: &str, request: &Request) -> Outcome {
    if !FORMATS.contains(&request.target_format.as_str()) {
        return Err(Failure::new(format!("Unknown file format '{}'", request.target_format)));
    }
    let mut inputs = Vec::new();
    let mut total = 0;
    for name in sources {
        let how =
            How { format: request.format.as_deref(), force_share: request.force_share, ..How::default() };
        let input = image(name, how).await?;
        let length = input.root.length().await.map_err(|error| Failure::new(error.to_string()))?;
        inputs.push((total, length, Arc::new(input)));
        total += length;
    }
    if !request.no_create {
        let mut words = vec!["-q".to_owned(), "-f".to_owned(), request.target_format.clone()];
        words.extend(request.create_words.clone());
        if request.overlays() {
            // The backing file is opened with the target.
            words.push("-u".to_owned());
        }
        words.extend([target.to_owned(), total.to_string()]);
        create::run(&words).await?;
    }
    // Parts of clusters get the rest of them from the backing file.
    let no_backing = !request.overlays();
    let how = How { format: Some(&request.target_format), write: true, no_backing, ..How::default() };
    let output = Arc::new(image(target, how).await?);
    let room = output.root.length().await.map_err(|error| Failure::new(error.to_string()))?;
    if room < total {
        return Err(Failure::new("output file is smaller than input file"));
    }
    let known_zero = no_backing && (!request.no_create || request.target_is_zero);
    for (start, length, input) in inputs {
        let below = if no_backing { None } else { Some(shared_backing(&input, &output)) };
        let copy = Copy { input: &input, output: &output, request, start, length, total, known_zero, below };
        copy.run().await?;
        Arc::into_inner(input).ok_or_else(|| Failure::new("the source is still in use"))?.close().await?;
    }
    if request.progress {
        println!("    (100.00/100%)\r");
    }
    Arc::into_inner(output).ok_or_else(|| Failure::new("the target is still in use"))?.close().await
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

/// One input on its way to its place in the output.
struct Copy<'a> {
    input: &'a Arc<Image>,
    output: &'a Arc<Image>,
    request: &'a Request,
    start: u64,
    length: u64,
    total: u64,
    /// The target reads zeroes where nothing is written.
    known_zero: bool,
    /// The target has a backing file, and this is where the source's own data ends (`None`: it has nothing below).
    below: Option<Option<NodeId>>,
}

/// What to do with a run of bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The backing file has the same.
    Shared,
    Zero,
    Data,
}

impl Copy<'_> {
    /// Copies several chunks at once.
    async fn run(&self) -> Outcome {
        let (request, output) = (self.request, self.output);
        let reading = |error: IoError| Failure::new(format!("error while reading block status: {error}"));
        let cluster = output.wires().view(output.node()).node().image_info().cluster_size.unwrap_or(65536);
        // Compressed clusters are packed one behind the other: in order.
        let workers = if request.compressed { 1 } else { request.workers };
        let sparse = if request.compressed { cluster } else { request.sparse };
        let mut rest = ByteRange::between(0, self.length);
        let mut running = std::collections::VecDeque::new();
        while !rest.is_empty() {
            let (kind, len) = self.look(rest, cluster).await.map_err(reading)?;
            let (run, after) = rest.split(len);
            rest = after;
            if kind == Kind::Shared || kind == Kind::Zero && self.known_zero {
                continue;
            }
            if running.len() >= workers {
                finish(running.pop_front()).await?;
            }
            let piece = Piece {
                input: self.input.clone(),
                output: output.clone(),
                run,
                start: self.start,
                zero: kind == Kind::Zero,
                known_zero: self.known_zero,
            };
            let compressed = request.compressed;
            running.push_back(rt::spawn(async move { piece.copy(compressed, sparse).await }));
            if request.progress {
                let done = (self.start + run.end()) as f64 * 100.0 / self.total.max(1) as f64;
                print!("    ({done:.2}/100%)\r");
            }
        }
        while !running.is_empty() {
            finish(running.pop_front()).await?;
        }
        Ok(())
    }

    /// What to do with the first bytes of `rest`, and with how many.
    async fn look(&self, rest: ByteRange, cluster: u64) -> Result<(Kind, u64), IoError> {
        let inside = self.input.root.enter().await?;
        let found = status(&inside.cx(), rest, self.below.flatten()).await?;
        let compressed = self.request.compressed;
        let kind = match (self.below, found.allocated, found.zero) {
            (Some(_), false, _) => Kind::Shared,
            // A compressed write is of whole clusters, whatever is in them.
            _ if compressed => Kind::Data,
            (_, true, false) => Kind::Data,
            _ => Kind::Zero,
        };
        let whole = found.len - found.len % cluster;
        Ok(match kind {
            Kind::Shared if compressed && whole == 0 && found.len < rest.len() => {
                (Kind::Data, cluster.min(rest.len()))
            }
            Kind::Shared if compressed && found.len < rest.len() => (Kind::Shared, whole),
            Kind::Data if compressed && self.below.is_some() => {
                (Kind::Data, found.len.next_multiple_of(cluster).min(CHUNK).min(rest.len()))
            }
            Kind::Data if compressed => (Kind::Data, CHUNK),
            Kind::Data => (Kind::Data, found.len.min(CHUNK)),
            kind => (kind, found.len),
        })
    }
}

async fn finish(piece: Option<rt::JoinHandle<Outcome>>) -> Outcome {
    match piece {
        Some(piece) => piece.await,
        None => Ok(()),
    }
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
}

impl Piece {
    async fn copy(self, compressed: bool, sparse: u64) -> Outcome {
        let at = self.start + self.run.start();
        let writing = |error: underlay_graph::IoError| {
            Failure::new(format!("error while writing at byte {at}: {error}"))
        };
        let zeroes = underlay_graph::ZeroFlags { may_unmap: true, no_fallback: false };
        let target = ByteRange::between(at, at + self.run.len());
        if self.zero {
            return self.output.root.write_zeroes(target, zeroes).await.map_err(writing);
        }
        let data = Iov::scratch(self.run.buffer_len());
        let read = self.input.root.read(self.run, data.clone()).await;
        read.map_err(|error| {
            Failure::new(format!("error while reading at byte {}: {error}", self.run.start()))
        })?;
        for (from, len, is_zero) in runs(&data, sparse) {
            let range = ByteRange::between(at + from as u64, at + (from + len) as u64);
            if is_zero && self.known_zero {
                continue;
            }
            let done = match is_zero {
                true => self.output.root.write_zeroes(range, zeroes).await,
                false => {
                    self.output.root.write(range, data.slice(from, len), WriteFlags { compressed }).await
                }
            };
            done.map_err(writing)?;
        }
        Ok(())
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

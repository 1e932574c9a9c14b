//! `convert`: copies images into a new one of another format or shape.

use std::sync::Arc;

use underlay_graph::status::status;
use underlay_graph::{ByteRange, WriteFlags};
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
                    Failure::new(
                        "Invalid number of coroutines. Allowed number of coroutines is between 1 and 16",
                    )
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
    if request.create_words.iter().any(|word| word == "-b") {
        return Err(Failure::new("converting into an overlay (-B) is not part of this version of Underlay"));
    }
    convert(sources, target, &request).await
}

async fn convert(sources: &[String], target: &str, request: &Request) -> Outcome {
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
        words.extend([target.to_owned(), total.to_string()]);
        create::run(&words).await?;
    }
    let how = How { format: Some(&request.target_format), write: true, no_backing: true, ..How::default() };
    let output = Arc::new(image(target, how).await?);
    let room = output.root.length().await.map_err(|error| Failure::new(error.to_string()))?;
    if room < total {
        return Err(Failure::new("output file is smaller than input file"));
    }
    let known_zero = !request.no_create || request.target_is_zero;
    for (start, length, input) in inputs {
        copy(&input, start, length, total, &output, request, known_zero).await?;
        Arc::into_inner(input).ok_or_else(|| Failure::new("the source is still in use"))?.close().await?;
    }
    if request.progress {
        println!();
    }
    Arc::into_inner(output).ok_or_else(|| Failure::new("the target is still in use"))?.close().await
}

/// Copies one input to its place in the output, several chunks at once.
async fn copy(
    input: &Arc<Image>,
    start: u64,
    length: u64,
    total: u64,
    output: &Arc<Image>,
    request: &Request,
    known_zero: bool,
) -> Outcome {
    let mut rest = ByteRange::between(0, length);
    let mut running = std::collections::VecDeque::new();
    let reading =
        |error: underlay_graph::IoError| Failure::new(format!("error while reading block status: {error}"));
    // Compressed clusters are packed one behind the other: in order.
    let cluster = output.wires().view(output.node()).node().image_info().cluster_size.unwrap_or(65536);
    let workers = if request.compressed { 1 } else { request.workers };
    while !rest.is_empty() {
        let inside = input.root.enter().await.map_err(reading)?;
        let found = status(&inside.cx(), rest, None).await.map_err(reading)?;
        drop(inside);
        // A compressed write is of whole clusters, whatever is in them.
        let zero = (found.zero || !found.allocated) && !request.compressed;
        let found_len = if request.compressed { CHUNK } else { found.len };
        let (run, after) = if zero { rest.split(found_len) } else { rest.split(found_len.min(CHUNK)) };
        rest = after;
        if zero && known_zero {
            continue;
        }
        if running.len() >= workers {
            finish(running.pop_front()).await?;
        }
        let job = Piece { input: input.clone(), output: output.clone(), run, start, zero, known_zero };
        let (compressed, sparse) =
            (request.compressed, if request.compressed { cluster } else { request.sparse });
        running.push_back(rt::spawn(async move { job.copy(compressed, sparse).await }));
        if request.progress {
            let done = (start + run.end()) as f64 * 100.0 / total.max(1) as f64;
            print!("    ({done:.2}/100%)\r");
        }
    }
    while !running.is_empty() {
        finish(running.pop_front()).await?;
    }
    Ok(())
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

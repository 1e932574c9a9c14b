//! `compare`: whether two images have the same content.

use std::collections::VecDeque;

use underlay_graph::status::Status;
use underlay_graph::{ByteRange, Root};
use underlay_sys::{Iov, rt, say};

use crate::getopt::Known;
use crate::help::Help;
use crate::open::{How, Image, check_cache, image};
use crate::progress::Progress;
use crate::{Failure, Outcome};

const KNOWN: Known = Known {
    short: "hf:F:T:pqsU",
    long: &[
        ("help", "h", false),
        ("quiet", "q", false),
        ("progress", "p", false),
        ("a-format", "f", true),
        ("b-format", "F", true),
        ("strict", "s", false),
        ("cache", "T", true),
        ("object", "object", true),
        ("image-opts", "image-opts", false),
        ("force-share", "U", false),
    ],
};

/// See [`Help`].
pub const HELP: Help = Help {
    command: "compare",
    usage: "Usage: qemu-img compare [-f FMT] [-F FMT] [-p] [-q] [-s] [-U] FILENAME1 FILENAME2",
    known: KNOWN,
};

/// Compared at a time, in bytes.
const CHUNK: u64 = 1 << 20;
/// Chunks under way at once.
const WORKERS: usize = 4;

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = crate::options("compare", KNOWN, words)?;
    let (mut formats, mut quiet, mut strict, mut force_share) = ([None, None], false, false, false);
    let (mut progress, mut cache, mut image_opts) = (false, None, false);
    for (name, value) in options {
        match name.as_str() {
            "f" => formats[0] = Some(value),
            "F" => formats[1] = Some(value),
            "q" => quiet = true,
            "s" => strict = true,
            "U" => force_share = true,
            "p" => progress = true,
            "T" => cache = Some(value),
            "image-opts" => image_opts = true,
            "h" => return HELP.print(),
            other => {
                return Err(Failure { status: 2, ..crate::unsupported(other) });
            }
        }
    }
    let [first, second] = others.as_slice() else {
        return Err(Failure::usage("Expecting two image file names", "compare"));
    };
    let names = [first.as_str(), second.as_str()];
    let trouble = |failure: Failure| Failure { status: failure.status.max(2), ..failure };
    let progress = Progress::new(progress && !quiet);
    cache.map_or(Ok(()), |mode| check_cache(&mode, "source cache")).map_err(trouble)?;
    let how = |at: usize| How { format: formats[at].as_deref(), image_opts, force_share, ..How::default() };
    let first = image(first, how(0)).await.map_err(trouble)?;
    let second = image(second, how(1)).await.map_err(trouble)?;
    progress.show(0.0);
    let compared = Comparison { first: &first, second: &second, strict, quiet, progress: &progress, names };
    let difference = compared.run().await.map_err(trouble)?;
    first.close().await.map_err(trouble)?;
    second.close().await.map_err(trouble)?;
    if !quiet {
        say!("{}", difference.as_deref().unwrap_or("Images are identical."));
    }
    difference.map_or(Ok(()), |_| Err(Failure::status(1)))
}

/// Two images, being compared.
struct Comparison<'a> {
    first: &'a Image,
    second: &'a Image,
    strict: bool,
    quiet: bool,
    progress: &'a Progress,
    names: [&'a str; 2],
}

/// A chunk that is read and compared, if that has to be.
struct Chunk {
    /// Where the difference is, if there is one.
    task: Option<rt::JoinHandle<Result<Option<u64>, Failure>>>,
    /// How much has been compared with this chunk, in percent.
    percent: f64,
}

impl Comparison<'_> {
    /// The difference, in words.
    async fn run(&self) -> Result<Option<String>, Failure> {
        let lengths = (self.first.length().await?, self.second.length().await?);
        if lengths.0 != lengths.1 && self.strict {
            return Ok(Some("Strict mode: Image size mismatch!".to_owned()));
        }
        let common = lengths.0.min(lengths.1);
        let longer = if lengths.0 > lengths.1 { self.first } else { self.second };
        let longest = lengths.0.max(lengths.1);
        let both = self.part(ByteRange::between(0, common), self.first, Some(self.second), longest).await?;
        if both.is_some() || common == longest {
            return Ok(both);
        }
        if !self.quiet {
            say!("Warning: Image size mismatch!");
        }
        self.part(ByteRange::between(common, longest), longer, None, longest).await
    }

    /// Compares with `second`, or with zeroes; several chunks at once.
    async fn part(
        &self,
        mut rest: ByteRange,
        first: &Image,
        second: Option<&Image>,
        all: u64,
    ) -> Result<Option<String>, Failure> {
        let mut running = VecDeque::new();
        while !rest.is_empty() {
            let looked = self.look(rest, first, second).await?;
            if self.strict && !looked.alike {
                if let Some(at) = self.drain(&mut running).await? {
                    return Ok(Some(mismatch(at)));
                }
                return Ok(Some(format!("Strict mode: Offset {} block status mismatch!", rest.start())));
            }
            let (run, after) = rest.split(if looked.zero { looked.len } else { looked.len.min(CHUNK) });
            rest = after;
            let percent = run.end() as f64 * 100.0 / all as f64;
            if looked.zero {
                running.push_back(Chunk { task: None, percent });
                continue;
            }
            let side = |image: &Image| (image.root.clone(), self.name(image).to_owned());
            let (one, other) = (side(first), second.map(side));
            let task = Some(rt::spawn(async move { differ(run, one, other).await }));
            running.push_back(Chunk { task, percent });
            while running.len() >= WORKERS {
                if let Some(at) = self.next(&mut running).await? {
                    return Ok(Some(mismatch(at)));
                }
            }
        }
        Ok(self.drain(&mut running).await?.map(mismatch))
    }

    /// The result of the oldest chunk.
    async fn next(&self, running: &mut VecDeque<Chunk>) -> Result<Option<u64>, Failure> {
        let Some(chunk) = running.pop_front() else { return Ok(None) };
        let found = match chunk.task {
            Some(task) => task.await?,
            None => None,
        };
        if found.is_none() {
            self.progress.show(chunk.percent);
        }
        Ok(found)
    }

    async fn drain(&self, running: &mut VecDeque<Chunk>) -> Result<Option<u64>, Failure> {
        while !running.is_empty() {
            if let Some(at) = self.next(running).await? {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }
}

fn mismatch(at: u64) -> String {
    format!("Content mismatch at offset {at}!")
}

/// What both images say about the first bytes of a range, before they are read.
struct Looked {
    len: u64,
    /// Both are zero.
    zero: bool,
    /// What they say is the same in all that strict mode looks at.
    alike: bool,
}

impl Comparison<'_> {
    /// The name of one of the two.
    fn name(&self, image: &Image) -> &str {
        self.names[usize::from(std::ptr::eq(image, self.second))]
    }

    async fn look(&self, range: ByteRange, first: &Image, second: Option<&Image>) -> Result<Looked, Failure> {
        let unknown = |image: &Image| Failure {
            status: 3,
            ..Failure::new(format!("Sector allocation test failed for {}", self.name(image)))
        };
        let one = first.status(range).await.map_err(|_| unknown(first))?;
        let Some(second) = second else { return Ok(Looked { len: one.len, zero: one.zero, alike: true }) };
        let other = second.status(range).await.map_err(|_| unknown(second))?;
        Ok(Looked::of(range, &one, &other))
    }
}

impl Looked {
    fn of(range: ByteRange, one: &Status, other: &Status) -> Self {
        // The reference's strict mode also looks at whether a run reaches the image's end.
        let key = |s: &Status| (s.allocated, s.zero, s.data, s.encoded, s.len == range.len());
        let alike = key(one) == key(other);
        Self { len: one.len.min(other.len), zero: one.zero && other.zero, alike }
    }
}

/// An image to read, and its name.
type Side = (Root, String);

async fn differ(range: ByteRange, first: Side, second: Option<Side>) -> Result<Option<u64>, Failure> {
    let bytes = read(range, &first).await?;
    let found = match &second {
        None => bytes.iter().position(|byte| *byte != 0),
        Some(second) => {
            let others = read(range, second).await?;
            if bytes == others { None } else { bytes.iter().zip(&others).position(|(a, b)| a != b) }
        }
    };
    // In whole sectors, as the reference counts.
    Ok(found.map(|at| (range.start() + at as u64) / 512 * 512))
}

async fn read(range: ByteRange, (root, name): &Side) -> Result<Vec<u8>, Failure> {
    let bytes = Iov::scratch(range.buffer_len());
    root.read(range, bytes.clone()).await.map_err(|error| {
        let why = error.plain();
        let text = format!("Error while reading offset {} of {name}: {why}", range.start());
        Failure { status: 4, ..Failure::new(text) }
    })?;
    Ok(bytes.to_vec())
}

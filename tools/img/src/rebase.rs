//! `rebase`: puts an image on another backing file. In the safe mode what the image shows stays the same: where the old
//! and the new backing file differ, the image gets what the old one has.

use std::collections::VecDeque;
use std::sync::Arc;

use underlay_drivers::names;
use underlay_graph::status::status;
use underlay_graph::{BackingRef, ByteRange, IoError, NodeId, Role, WriteFlags, ZeroFlags};
use underlay_sys::{Iov, rt};

use crate::getopt::Known;
use crate::help::Help;
use crate::open::{How, Image, check_cache, image};
use crate::progress::Progress;
use crate::{Failure, Outcome};

const KNOWN: Known = Known {
    short: "hf:F:b:upt:T:qUc",
    long: &[
        ("help", "h", false),
        ("object", "object", true),
        ("image-opts", "image-opts", false),
        ("force-share", "U", false),
        ("compress", "c", false),
        ("quiet", "q", false),
        ("progress", "p", false),
        ("format", "f", true),
        ("cache", "t", true),
        ("backing", "b", true),
        ("backing-format", "F", true),
        ("backing-cache", "T", true),
        ("backing-unsafe", "u", false),
    ],
};

/// See [`Help`].
pub const HELP: Help = Help {
    command: "rebase",
    usage: "Usage: qemu-img rebase [-f FMT] [-t CACHE] [-q] [-U] [-p] [-b BACKING [-F FMT] [-T CACHE]] [-u] [-c] FILENAME",
    known: KNOWN,
};

/// Compared at a time, in bytes.
const CHUNK: u64 = 2 << 20;
/// Chunks under way at once.
const WORKERS: usize = 4;
const FORMATS: [&str; 2] = ["qcow2", "raw"];

#[derive(Debug, Default)]
struct Request {
    image_opts: bool,
    format: Option<String>,
    /// The new backing file; empty for none.
    backing: Option<String>,
    backing_format: Option<String>,
    blindly: bool,
    compressed: bool,
    progress: bool,
    /// Of the new backing file: what is written to is never shared so.
    force_share: bool,
}

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = crate::options("rebase", KNOWN, words)?;
    let mut request = Request::default();
    let (mut caches, mut quiet) = ((None, None), false);
    for (name, value) in options {
        match name.as_str() {
            "f" => request.format = Some(value),
            "F" => request.backing_format = Some(value),
            "b" => request.backing = Some(value),
            "u" => request.blindly = true,
            "c" => request.compressed = true,
            "p" => request.progress = true,
            "q" => quiet = true,
            "U" => request.force_share = true,
            "t" => caches.0 = Some(value),
            "T" => caches.1 = Some(value),
            "image-opts" => request.image_opts = true,
            "h" => return HELP.print(),
            other => return Err(crate::unsupported(other)),
        }
    }
    let [name] = others.as_slice() else {
        return Err(Failure::usage("Expecting one image file name", "rebase"));
    };
    request.progress &= !quiet;
    if !request.blindly && request.backing.is_none() {
        return Err(Failure::usage("Must specify backing file (-b) or use unsafe mode (-u)", "rebase"));
    }
    let progress = Progress::start(request.progress);
    caches.0.map_or(Ok(()), |mode| check_cache(&mode, "cache"))?;
    caches.1.map_or(Ok(()), |mode| check_cache(&mode, "source cache"))?;
    rebase(name, &request, &progress).await
}

async fn rebase(name: &str, request: &Request, progress: &Progress) -> Outcome {
    let how = How {
        format: request.format.as_deref(),
        image_opts: request.image_opts,
        write: true,
        no_backing: request.blindly,
        ..How::default()
    };
    let opened = Arc::new(image(name, how).await?);
    opened.warn_if_guessed();
    if request.compressed && opened.is_raw() {
        return Err(Failure::new("Compression not supported for this file format"));
    }
    if let Some(format) = request.backing_format.as_deref().filter(|format| !FORMATS.contains(format)) {
        return Err(Failure::new(format!("Invalid format name: '{format}'")));
    }
    let wanted = request.backing.as_deref().filter(|name| !name.is_empty());
    if !request.blindly {
        let new = match wanted {
            Some(wanted) => Some(Arc::new(new_backing(opened.name(), wanted, request).await?)),
            None => None,
        };
        check_header(&opened, request, wanted).inspect_err(|_| progress.show(100.0))?;
        let copied = Copy { image: opened.clone(), new: new.clone(), compressed: request.compressed };
        Arc::new(copied).run(progress).await?;
        if let Some(new) = new {
            last(new)?.close().await?;
        }
    }
    let noted = match check_header(&opened, request, wanted) {
        Ok(()) => note(&opened, request, wanted).await,
        refused => refused,
    };
    progress.show(100.0);
    noted?;
    last(opened)?.close().await
}

fn last<T>(shared: Arc<T>) -> Result<T, Failure> {
    Arc::into_inner(shared).ok_or_else(|| Failure::new("the image is still in use"))
}

fn cannot(request: &Request, why: impl std::fmt::Display) -> Failure {
    let backing = request.backing.as_deref().unwrap_or_default();
    Failure::new(format!("Could not change the backing file to '{backing}': {why}"))
}

/// Whether the header can be changed, before anything else is: what is copied would be of no use.
fn check_header(opened: &Image, request: &Request, wanted: Option<&str>) -> Outcome {
    if !opened.wires().view(opened.node()).node().supports_backing() {
        return Err(cannot(request, IoError::ENOTSUP));
    }
    if wanted.is_some() && request.backing_format.is_none() {
        return Err(cannot(request, "backing format must be specified"));
    }
    Ok(())
}

async fn new_backing(name: &str, wanted: &str, request: &Request) -> Result<Image, Failure> {
    let how =
        How { format: request.backing_format.as_deref(), force_share: request.force_share, ..How::default() };
    let opened = image(&names::resolve_backing(name, wanted), how).await;
    opened.map_err(|failure| {
        let message = failure.message.unwrap_or_default();
        let message = message.strip_prefix("Could not open").unwrap_or(&message);
        Failure::new(format!("Could not open new backing file{message}"))
    })
}

/// Changes the header.
async fn note(opened: &Image, request: &Request, wanted: Option<&str>) -> Outcome {
    let inside = opened.root.enter().await.map_err(|error| cannot(request, error))?;
    let cx = inside.cx();
    // Never a header that relies on what a power cut could take away.
    cx.flush().await.map_err(|error| cannot(request, error))?;
    let backing =
        wanted.map(|file| BackingRef { file: file.to_owned(), format: request.backing_format.clone() });
    cx.node().set_backing_ref(&cx, backing).await.map_err(|error| cannot(request, error))
}

/// The safe part: copying what would change.
struct Copy {
    image: Arc<Image>,
    new: Option<Arc<Image>>,
    compressed: bool,
}

impl Copy {
    async fn run(self: Arc<Self>, progress: &Progress) -> Outcome {
        let failed = |error: IoError| Failure::new(format!("error while reading image metadata: {error}"));
        let length = self.image.root.length().await.map_err(failed)?;
        let wires = self.image.wires();
        let below = wires.plan().node(self.image.node()).child(Role::Backing);
        let mut rest = ByteRange::between(0, length);
        let mut running: VecDeque<rt::JoinHandle<Outcome>> = VecDeque::new();
        while !rest.is_empty() {
            progress.show(rest.start() as f64 * 100.0 / length as f64);
            let looked = self.look(rest, below).await.map_err(failed)?;
            let (own, len) = match self.compressed {
                true => self.in_clusters(rest, looked, below).await.map_err(failed)?,
                false => looked,
            };
            // What both say to be zero is not read.
            let (found, later) = rest.split(if own { len } else { len.min(CHUNK) });
            rest = later;
            if own {
                continue;
            }
            if running.len() >= WORKERS
                && let Some(oldest) = running.pop_front()
            {
                oldest.await?;
            }
            let copy = self.clone();
            running.push_back(rt::spawn(async move { copy.chunk(found).await }));
        }
        for chunk in running {
            chunk.await?;
        }
        Ok(())
    }

    fn cluster(&self) -> u64 {
        self.image.wires().view(self.image.node()).node().image_info().cluster_size.unwrap_or(65536)
    }

    /// The same of whole clusters, as only these are written compressed: one of which a part may have to be copied is
    /// copied. `rest` begins with a cluster.
    async fn in_clusters(
        &self,
        rest: ByteRange,
        (own, len): (bool, u64),
        below: Option<NodeId>,
    ) -> Result<(bool, u64), IoError> {
        let cluster = self.cluster();
        let whole = if len == rest.len() { len } else { len - len % cluster };
        if own && whole > 0 {
            return Ok((true, whole));
        }
        if !own {
            return Ok((false, len.next_multiple_of(cluster).min(rest.len())));
        }
        // The rest of the cluster may be its own in another way.
        let (first, _) = rest.split(cluster);
        let mut later = first.split(len).1;
        while !later.is_empty() {
            let (own, len) = self.look(later, below).await?;
            if !own {
                return Ok((false, first.len()));
            }
            later = later.split(len).1;
        }
        Ok((true, first.len()))
    }

    /// Whether the first bytes of `range` are the image's own, or the same anyway; and how many.
    async fn look(&self, range: ByteRange, below: Option<NodeId>) -> Result<(bool, u64), IoError> {
        let found = {
            let inside = self.image.root.enter().await?;
            status(&inside.cx(), range, below).await?
        };
        if found.allocated || below.is_none() && self.new.is_none() {
            return Ok((true, found.len));
        }
        // Zero on both sides, for long perhaps.
        let old_zero = {
            let inside = self.image.root.enter().await?;
            status(&inside.cx(), range.split(found.len).0, None).await?
        };
        if !old_zero.zero {
            return Ok((false, old_zero.len));
        }
        let same = range.split(old_zero.len).0;
        let Some(new) = &self.new else { return Ok((true, same.len())) };
        let inside = new.root.enter().await?;
        let length = inside.cx().length();
        if same.start() >= length {
            return Ok((true, same.len()));
        }
        let there = status(&inside.cx(), same.before(length), None).await?;
        Ok((there.zero, there.len))
    }

    /// Writes what differs between the old and the new backing file, whole clusters of it.
    async fn chunk(&self, range: ByteRange) -> Outcome {
        let reading =
            |error: IoError| Failure::new(format!("error while reading from old backing file: {error}"));
        let writing = |error: IoError| Failure::new(format!("Error while writing to COW image: {error}"));
        let old = Iov::scratch(range.buffer_len());
        self.image.root.read(range, old.clone()).await.map_err(reading)?;
        let new = self.read_new(range).await?;
        let cluster = self.cluster();
        let mut rest = range;
        while !rest.is_empty() {
            let (unit, later) = rest.split(cluster - rest.start() % cluster);
            rest = later;
            let at = usize::try_from(unit.start() - range.start()).unwrap_or(0);
            let (was, is) = (old.slice(at, unit.buffer_len()), new.slice(at, unit.buffer_len()));
            if was.to_vec() == is.to_vec() {
                continue;
            }
            let flags = WriteFlags { compressed: self.compressed };
            let zeroes = ZeroFlags { may_unmap: true, no_fallback: false };
            match was.is_zero() {
                true => self.image.root.write_zeroes(unit, zeroes).await.map_err(writing)?,
                false => self.image.root.write(unit, was, flags).await.map_err(writing)?,
            }
        }
        Ok(())
    }

    /// What the new backing file has; zeroes behind its end.
    async fn read_new(&self, range: ByteRange) -> Result<Iov, Failure> {
        let reading =
            |error: IoError| Failure::new(format!("error while reading from new backing file: {error}"));
        let buffer = Iov::zeroed(range.buffer_len());
        if let Some(new) = &self.new {
            let there = range.before(new.root.length().await.map_err(reading)?);
            if !there.is_empty() {
                new.root.read(there, buffer.slice(0, there.buffer_len())).await.map_err(reading)?;
            }
        }
        Ok(buffer)
    }
}

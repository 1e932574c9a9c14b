//! `commit`: copies what an image has into one below it, then empties the image.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use underlay_drivers::filename;
use underlay_graph::{IoError, NodeId, Role};
use underlay_jobs::{CommitArgs, EventSink, Job, JobEvent, Jobs, Settings};
use underlay_sys::{rt, say};

use crate::getopt::Known;
use crate::help::Help;
use crate::open::{How, Image, check_cache, image};
use crate::progress::Progress;
use crate::{Failure, Outcome, sizes};

const KNOWN: Known = Known {
    short: "hf:t:b:dpqr:",
    long: &[
        ("help", "h", false),
        ("object", "object", true),
        ("image-opts", "image-opts", false),
        ("quiet", "q", false),
        ("progress", "p", false),
        ("format", "f", true),
        ("cache", "t", true),
        ("drop", "d", false),
        ("base", "b", true),
        ("rate", "r", true),
    ],
};

/// See [`Help`].
pub const HELP: Help = Help {
    command: "commit",
    usage: "Usage: qemu-img commit [-f FMT] [-t CACHE] [-b BASE] [-d] [-p] [-q] [-r RATE] FILENAME",
    known: KNOWN,
};

/// How often the progress is shown.
const TICK: Duration = Duration::from_millis(100);

#[derive(Debug, Default)]
struct Request {
    image_opts: bool,
    format: Option<String>,
    base: Option<String>,
    /// The image keeps its data.
    drop: bool,
    progress: bool,
    quiet: bool,
    /// Bytes per second, 0 for no limit.
    rate: i64,
}

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = crate::options("commit", KNOWN, words)?;
    let mut request = Request::default();
    let mut cache = None;
    for (name, value) in options {
        match name.as_str() {
            "f" => request.format = Some(value),
            "b" => (request.base, request.drop) = (Some(value), true),
            "d" => request.drop = true,
            "p" => request.progress = true,
            "q" => request.quiet = true,
            "t" => cache = Some(value),
            "r" => {
                let rate = sizes::argument(&value, "rate limit")?;
                request.rate = i64::try_from(rate).unwrap_or(i64::MAX);
            }
            "image-opts" => request.image_opts = true,
            "h" => return HELP.print(),
            other => return Err(crate::unsupported(other)),
        }
    }
    let [name] = others.as_slice() else {
        return Err(Failure::usage("Expecting one image file name", "commit"));
    };
    cache.map_or(Ok(()), |mode| check_cache(&mode, "cache"))?;
    request.progress &= !request.quiet;
    let (format, image_opts) = (request.format.as_deref(), request.image_opts);
    let how = How { format, image_opts, write: true, unmap: true, ..How::default() };
    let mut opened = image(name, how).await?;
    opened.warn_if_guessed();
    let progress = Arc::new(Progress::start(request.progress));
    let base = find_base(&opened, name, request.base.as_deref())?;
    let done = commit_and_empty(&mut opened, base, &request, &progress).await;
    let closed = opened.close().await;
    drop(progress);
    done.and(closed)?;
    if !request.quiet {
        say!("Image committed.");
    }
    Ok(())
}

fn find_base(opened: &Image, name: &str, wanted: Option<&str>) -> Result<NodeId, Failure> {
    let wires = opened.wires();
    let node = opened.node();
    let Some(wanted) = wanted else {
        let below = wires.plan().node(node).child(Role::Backing);
        return below.ok_or_else(|| Failure::new("Image does not have a backing file"));
    };
    let found = filename::find_in_chain(&wires, node, wanted).filter(|found| *found != node);
    found.ok_or_else(|| Failure::new(format!("Did not find '{wanted}' in the backing chain of '{name}'")))
}

/// What the job has told.
#[derive(Default)]
struct Heard {
    /// Why it failed, once it is over.
    end: Mutex<Option<Option<String>>>,
    news: Notify,
    ready: Notify,
}

impl EventSink for Heard {
    fn emit(&self, event: JobEvent) {
        match event {
            JobEvent::Ready { .. } => self.ready.notify_one(),
            JobEvent::Completed { error, .. } => {
                *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                // Whichever it is that waits.
                self.ready.notify_one();
                self.news.notify_one();
            }
            _ => {}
        }
    }
}

impl Heard {
    fn end(&self) -> Option<Option<String>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Nobody else can write to the image between the two.
async fn commit_and_empty(
    opened: &mut Image,
    base: NodeId,
    request: &Request,
    progress: &Arc<Progress>,
) -> Outcome {
    if request.drop {
        return commit(opened, base, request, progress).await;
    }
    opened.keep().await?;
    commit(opened, base, request, progress).await?;
    empty(opened).await
}

async fn commit(opened: &Image, base: NodeId, request: &Request, progress: &Arc<Progress>) -> Outcome {
    let heard = Arc::<Heard>::default();
    let args = CommitArgs {
        settings: Settings { id: Some("commit".into()), speed: request.rate, ..Settings::default() },
        device: opened.node(),
        top: None,
        base: Some(base),
        backing_file: None,
        backing_mask_protocol: false,
        filter_node_name: None,
        // No header is rewritten: nothing is above the image.
        names: Arc::new(|_, below| filename::of(below)),
    };
    let started = Jobs::new(heard.clone()).commit(opened.graph(), args).await;
    let started = started.map_err(|error| Failure::new(error.to_string()))?;
    let job = started.job;
    rt::spawn_background(0, started.task);
    let shown = request.progress.then(|| rt::spawn(show(job.clone(), heard.clone(), progress.clone())));
    heard.ready.notified().await;
    // An error has ended it before it was ready, or it is to end now.
    let _ = job.complete();
    heard.news.notified().await;
    if let Some(shown) = shown {
        shown.await;
    }
    match heard.end() {
        Some(Some(error)) => Err(Failure::new(format!("Block job failed: {error}"))),
        _ => Ok(()),
    }
}

/// The progress, until the end.
async fn show(job: Arc<Job>, heard: Arc<Heard>, progress: Arc<Progress>) {
    loop {
        let end = heard.end();
        if matches!(end, Some(Some(_))) {
            return;
        }
        let over = end.is_some();
        let info = job.info();
        let percent = if over { 100.0 } else { info.current as f64 * 100.0 / info.total.max(1) as f64 };
        // That nothing is done yet has been said.
        if percent > 0.0 {
            progress.show(percent);
        }
        if over {
            return;
        }
        rt::sleep(TICK).await;
    }
}

/// Removes all data of the image; what is below shows then.
async fn empty(opened: &mut Image) -> Outcome {
    opened.come_back().await?;
    let name = opened.name();
    let failed = |error: IoError| Failure::new(format!("Could not empty {name}: {error}"));
    let inside = opened.root.enter().await.map_err(failed)?;
    let cx = inside.cx();
    cx.node().make_empty(&cx).await.map_err(failed)
}

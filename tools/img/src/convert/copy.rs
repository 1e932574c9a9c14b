//! One input on its way to its place in the target: looks what is there, and has it copied piece by piece.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::oneshot;
use underlay_graph::reflink::Reflinks;
use underlay_graph::status::status;
use underlay_graph::{ByteRange, IoError, NodeId};
use underlay_jobs::pace::Pace;
use underlay_sys::{complain, rt};

use super::piece::{Piece, Turn};
use super::{Input, Request, cluster_size};
use crate::open::Image;
use crate::progress::Progress;
use crate::{Failure, Outcome};

/// Copied at a time, in bytes.
const CHUNK: u64 = 2 << 20;

/// One input on its way to its place in the output.
pub(super) struct Copy<'a> {
    pub(super) input: &'a Input,
    pub(super) output: &'a Arc<Image>,
    pub(super) request: &'a Request,
    /// Of all inputs, in bytes.
    pub(super) total: u64,
    /// Of the output, in bytes.
    pub(super) cluster: u64,
    /// From here on the output reads zeroes where nothing is written.
    pub(super) zero_from: u64,
    /// The target has a backing file, and from this layer of the source on downwards they have the same.
    pub(super) below: Option<NodeId>,
    pub(super) progress: &'a Progress,
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
    pub(super) async fn run(&self, pace: &mut Pace) -> Outcome {
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
        let request = self.request;
        // Compressed clusters are packed one behind the other: in order.
        let workers = if request.compressed { 1 } else { request.workers };
        // Who cares where the holes are has to look at every byte.
        let reflinks = Reflinks::new(!request.compressed && request.sparse.is_none() && request.rate == 0);
        let mut rest = ByteRange::between(0, self.input.length);
        let mut lanes = (0..rt::lanes()).cycle();
        // The first one's turn has come: its sender is gone.
        let mut turn = oneshot::channel::<()>().1;
        while !rest.is_empty() {
            let (kind, len) = self.look_on(rest).await?;
            if kind == Kind::Data
                && let Some(shared) = self.reflink_first(rest.split(len).0, &reflinks).await
            {
                rest = rest.split(shared).1;
                self.show_progress(rest);
                continue;
            }
            let (run, after) = rest.split(if kind == Kind::Data { len.min(CHUNK) } else { len });
            rest = after;
            if kind == Kind::Shared || kind == Kind::Zero && self.is_known_zero(run) {
                continue;
            }
            if running.len() >= workers {
                finish(running.pop_front()).await?;
            }
            self.keep_pace(pace, run).await;
            // All at the same time, but clusters get their places one after the other, so that they lie in order. A raw
            // target has a place for every byte anyway.
            let (next, next_turn) = oneshot::channel::<()>();
            if self.output.is_raw() {
                turn = oneshot::channel().1;
            }
            let turn = Turn { come: std::mem::replace(&mut turn, next_turn), next };
            running.push_back(self.piece(run, kind == Kind::Zero).start(turn, lanes.next().unwrap_or(0)));
            self.show_progress(rest);
        }
        Ok(())
    }

    fn piece(&self, run: ByteRange, zero: bool) -> Piece {
        let request = self.request;
        Piece {
            input: self.input.image.clone(),
            output: self.output.clone(),
            run,
            start: self.input.start,
            zero,
            known_zero: self.is_known_zero(run),
            compressed: request.compressed,
            sparse: if request.compressed { self.cluster } else { request.sparse.unwrap_or(4096) },
            salvage: request.salvage.then_some(request.quiet),
        }
    }

    fn is_known_zero(&self, run: ByteRange) -> bool {
        self.input.start + run.start() >= self.zero_from
    }

    async fn keep_pace(&self, pace: &mut Pace, run: ByteRange) {
        if self.request.rate > 0 {
            pace.spend(rt::now(), run.len(), self.request.rate);
            if let Some(at) = pace.wait_until(rt::now()) {
                rt::sleep_until(at).await;
            }
        }
    }

    /// What to do with the first bytes of `rest`, and with how many: also where some cannot be looked at.
    async fn look_on(&self, rest: ByteRange) -> Result<(Kind, u64), Failure> {
        if let Ok(looked) = self.look(rest).await {
            return Ok(looked);
        }
        // One bad entry may be in the way of many good ones.
        let unit = cluster_size(&self.input.image);
        match self.look(rest.split(unit - rest.start() % unit).0).await {
            Ok(looked) => Ok(looked),
            Err(error) => self.unknown(rest, error),
        }
    }

    fn show_progress(&self, rest: ByteRange) {
        let done = self.input.start + rest.start();
        self.progress.show(done as f64 * 100.0 / self.total.max(1) as f64);
    }

    /// Copies the first bytes of `run` without copying them, if that can be: how many.
    async fn reflink_first(&self, run: ByteRange, reflinks: &Reflinks) -> Option<u64> {
        let (first, at) = (run.split(reflinks.stride()).0, self.input.start + run.start());
        if first.is_empty() {
            return None;
        }
        let (from, to) = (self.input.image.root.enter().await.ok()?, self.output.root.enter().await.ok()?);
        reflinks.copy(&from.cx(), first, &to.cx(), at).await.then_some(first.len())
    }

    /// Where nobody can say what there is: an error, or a sector to try.
    fn unknown(&self, rest: ByteRange, error: IoError) -> Result<(Kind, u64), Failure> {
        let text = format!("error while reading block status at offset {}: {}", rest.start(), error.plain());
        if !self.request.salvage {
            return Err(Failure::new(text));
        }
        if !self.request.quiet {
            complain!("qemu-img: warning: {text}");
        }
        Ok((Kind::Data, rest.len().min(512)))
    }

    /// What to do with the first bytes of `rest`, and with how many.
    async fn look(&self, rest: ByteRange) -> Result<(Kind, u64), IoError> {
        let cluster = self.cluster;
        // Not across the place from which on zeroes need not be written.
        let until = self.zero_from.saturating_sub(self.input.start);
        let rest = if rest.start() < until { rest.before(until) } else { rest };
        let inside = self.input.image.root.enter().await?;
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
        let within = (self.input.start + rest.start()) % cluster;
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

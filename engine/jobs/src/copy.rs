//! The one copy engine: walks a range, skips what need not be copied in strides as long as the layers' answers,
//! and keeps a bounded number of copies in flight.
//!
//! What is to be done for a range, and how, is the job's [`Copier`]. Each copy is a task of its own, so that a
//! copy that waits for a guest's write does not hold up the walk, and a job that is told to pause, or waits for
//! its speed limit, first lets its copies come home. No task here holds a request open while it waits for
//! anything but that request.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;
use underlay_graph::{ByteRange, IoError};
use underlay_sys::rt;

use crate::error::Stop;
use crate::event::Action;
use crate::follow::NAP;
use crate::job::Job;

/// Bytes in one copy. Source for the size: QEMU's stream and commit, which clients see in `offset` when a slow job
/// starts.
pub const CHUNK: u64 = 512 << 10;

/// Bytes in one request for zeroes.
const ZEROES: u64 = 256 << 20;

/// Copies in flight on each lane: one is read while another is written. More does not make a job faster, but its
/// guests wait longer.
const PER_LANE: usize = 4;

/// Most lanes: with [`PER_LANE`] 8 MiB in memory, 16 MiB where chunks are of 1 MiB.
const LANES: usize = 4;

/// A failed chunk that the policy ignores is tried again after this time.
const RETRY: Duration = Duration::from_millis(100);

/// What becomes of a job when what it has written cannot be flushed. If something of it is lost
/// ([`underlay_graph::Node::doubts`]) no flush will ever succeed, whatever the policy hopes for.
pub(crate) async fn on_flush_error(job: &Job, error: &IoError, is_lost: bool) -> Result<(), Stop> {
    if is_lost {
        return Err(error.into());
    }
    job.on_error(error, false)?;
    job.doze(NAP).await
}

/// What to do with the first bytes of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Skip,
    /// Copy them.
    Copy,
    /// They read as zeroes.
    Zero,
}

/// A failed request.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Why.
    pub error: IoError,
    /// Whether it was a read; else a write.
    pub is_read: bool,
}

impl Fault {
    /// A failed read.
    pub fn read(error: IoError) -> Self {
        Self { error, is_read: true }
    }

    /// A failed write.
    pub fn write(error: IoError) -> Self {
        Self { error, is_read: false }
    }
}

/// What one kind of job copies, and how.
#[async_trait]
pub trait Copier: Send + Sync + 'static {
    /// What to do with the first bytes of `range`, and with how many of them.
    async fn look(&self, range: ByteRange) -> Result<(Step, u64), Fault>;
    /// Does it for a whole range.
    async fn copy(&self, range: ByteRange, step: Step) -> Result<(), Fault>;
    /// Whether what need not be copied counts as done.
    fn counts_skipped(&self) -> bool {
        true
    }
    /// What the job's progress grows by once `range` is copied.
    fn counts_copied(&self, range: ByteRange) -> u64 {
        range.len()
    }
    /// Most copies in flight.
    fn most_in_flight(&self) -> usize {
        usize::MAX
    }
    /// Chunks should begin and end at multiples of this, a power of two.
    fn unit(&self) -> u64 {
        CHUNK
    }
    /// The same while nothing limits the job's speed: more where a copy of many bytes takes no longer.
    fn stride(&self) -> u64 {
        self.unit()
    }
}

/// What becomes of chunks whose errors the policy ignores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ignored {
    /// They are passed over, and the first error is reported at the end (stream).
    PassOver,
    /// They are tried again (commit).
    TryAgain,
}

/// How a walk ended.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The first error that was passed over.
    pub passed_over: Option<IoError>,
}

/// A piece of work for one task.
#[derive(Clone, Copy, Debug)]
struct Piece {
    range: ByteRange,
    step: Step,
    /// How often errors had stopped the job when it was sent.
    stops: u64,
}

/// What a task has to tell.
struct Done {
    piece: Piece,
    lane: usize,
    result: Result<(), Fault>,
}

/// The answer of a task. If the task dies, its answer is an error.
struct Answer {
    to: mpsc::UnboundedSender<Done>,
    piece: Piece,
    lane: usize,
    result: Option<Result<(), Fault>>,
}

impl Answer {
    fn send(mut self, result: Result<(), Fault>) {
        self.result = Some(result);
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        let result = self.result.take().unwrap_or(Err(Fault::write(IoError::EIO)));
        let _ = self.to.send(Done { piece: self.piece, lane: self.lane, result });
    }
}

/// A walk under way.
struct Walk<'a, C> {
    job: &'a Arc<Job>,
    copier: &'a Arc<C>,
    ignored: Ignored,
    to: mpsc::UnboundedSender<Done>,
    from: mpsc::UnboundedReceiver<Done>,
    /// Copies in flight on each lane.
    lanes: Vec<usize>,
    again: VecDeque<Piece>,
    outcome: Outcome,
    /// The last step sent a piece.
    sent: bool,
    /// The walk has ended; what comes home now is not worth telling.
    over: bool,
}

/// Copies what has to be copied of `range`. The job's progress grows as that comes home.
pub async fn walk<C: Copier>(
    job: &Arc<Job>,
    copier: &Arc<C>,
    range: ByteRange,
    ignored: Ignored,
) -> Result<Outcome, Stop> {
    let (to, from) = mpsc::unbounded_channel();
    let (again, outcome) = (VecDeque::new(), Outcome::default());
    let lanes = vec![0; rt::lanes().min(LANES)];
    let mut walk = Walk { job, copier, ignored, to, from, lanes, again, outcome, sent: false, over: false };
    let result = walk.run(range).await;
    // Whatever happened, nothing stays in flight.
    walk.over = true;
    let settled = walk.settle().await;
    result.and(settled).map(|()| walk.outcome)
}

impl<C: Copier> Walk<'_, C> {
    async fn run(&mut self, mut rest: ByteRange) -> Result<(), Stop> {
        loop {
            while !rest.is_empty() {
                self.gate().await?;
                if let Some(piece) = self.again.pop_front() {
                    self.send(piece.range, piece.step).await?;
                    continue;
                }
                let (step, len) = match self.copier.look(rest).await {
                    Ok(answer) => answer,
                    Err(fault) => {
                        if !self.failed(&fault).await? {
                            let (passed_over, later) = rest.split(self.chunk_len(rest));
                            self.job.advance(passed_over.len());
                            rest = later;
                        }
                        continue;
                    }
                };
                let (found, later) = rest.split(len);
                self.work_off(found, step).await?;
                rest = later;
            }
            self.settle().await?;
            // What failed and is to be tried again came back only now.
            let Some(piece) = self.again.pop_front() else { return Ok(()) };
            self.gate().await?;
            self.send(piece.range, piece.step).await?;
        }
    }

    /// One run of bytes with the same thing to do.
    async fn work_off(&mut self, mut run: ByteRange, step: Step) -> Result<(), Stop> {
        match step {
            Step::Skip if self.copier.counts_skipped() => self.job.advance(run.len()),
            Step::Skip => {}
            Step::Zero | Step::Copy => {
                let mut first = true;
                while !run.is_empty() {
                    if !std::mem::take(&mut first) {
                        self.gate().await?;
                    }
                    let most = if step == Step::Zero { ZEROES } else { self.chunk_len(run) };
                    let (chunk, later) = run.split(most);
                    if step == Step::Copy {
                        self.job.spend(chunk.len());
                    }
                    self.send(chunk, step).await?;
                    run = later;
                }
            }
        }
        Ok(())
    }

    /// Up to the next multiple of the unit.
    fn chunk_len(&self, run: ByteRange) -> u64 {
        let unit = if self.job.is_throttled() { self.copier.unit() } else { self.copier.stride() };
        unit - (run.start() & (unit - 1))
    }

    /// The job's checkpoint, with nothing in flight when it would wait.
    async fn gate(&mut self) -> Result<(), Stop> {
        if self.job.is_wanted() {
            self.settle().await?;
        }
        self.job.checkpoint().await?;
        // After each piece that was sent it goes on at once, until every lane has enough: a lane that is out of work
        // must not wait for this one's turn to come.
        if !std::mem::take(&mut self.sent) {
            rt::yield_now().await;
        }
        Ok(())
    }

    /// Begins a piece on the lane that has least to do: a thread with busy guests takes longer for its pieces, and
    /// so gets fewer.
    async fn send(&mut self, range: ByteRange, step: Step) -> Result<(), Stop> {
        let most = if self.job.is_throttled() { 1 } else { PER_LANE * self.lanes.len() };
        let most = most.min(self.copier.most_in_flight());
        let lane = loop {
            let least = self.lanes.iter().enumerate().min_by_key(|(_, in_flight)| **in_flight);
            match least {
                Some((lane, in_flight)) if *in_flight < PER_LANE && self.in_flight() < most => break lane,
                _ => self.receive().await?,
            }
        };
        self.lanes[lane] += 1;
        self.sent = true;
        self.job.takes_off();
        let piece = Piece { range, step, stops: self.job.stops() };
        let copier = self.copier.clone();
        let answer = Answer { to: self.to.clone(), piece, lane, result: None };
        rt::spawn_background(lane, async move {
            let result = copier.copy(piece.range, piece.step).await;
            answer.send(result);
        });
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.lanes.iter().sum()
    }

    /// Takes one answer.
    async fn receive(&mut self) -> Result<(), Stop> {
        let Some(Done { piece, lane, result }) = self.from.recv().await else { return Ok(()) };
        self.lanes[lane] -= 1;
        self.job.lands();
        match result {
            Ok(()) => self.job.advance(self.copier.counts_copied(piece.range)),
            // One event tells of all that was in flight together, even if the client was so fast that the job goes on.
            Err(_) if piece.stops < self.job.stops() => self.again.push_back(piece),
            Err(fault) => match self.failed(&fault).await? {
                true => self.again.push_back(piece),
                false => self.job.advance(piece.range.len()),
            },
        }
        Ok(())
    }

    /// What becomes of a piece that failed: true to try it again, false to pass it over.
    async fn failed(&mut self, fault: &Fault) -> Result<bool, Stop> {
        if self.over || self.job.is_stopped_by_error() {
            return Ok(true);
        }
        let action = self.job.on_error(&fault.error, fault.is_read);
        self.over = action.is_err();
        match (action?, self.ignored) {
            (Action::Ignore, Ignored::PassOver) => {
                self.outcome.passed_over.get_or_insert_with(|| fault.error.clone());
                Ok(false)
            }
            (Action::Ignore, Ignored::TryAgain) => {
                rt::sleep(RETRY).await;
                Ok(true)
            }
            (Action::Stop | Action::Report, _) => Ok(true),
        }
    }

    /// Waits until nothing is in flight.
    async fn settle(&mut self) -> Result<(), Stop> {
        let mut result = Ok(());
        while self.in_flight() > 0 {
            let received = self.receive().await;
            result = result.and(received);
        }
        result
    }
}

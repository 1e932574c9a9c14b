//! Jobs that finish together: a transaction with `completion-mode=grouped`. None puts its result into force before all
//! have done their work, and if one fails or is cancelled the others are cancelled too. What they tell on the way
//! they tell in turn, newest first. Source: `design/qemu-surface.md` 5.3, and QEMU 10.0.2's events.
//!
//! ```text
//!   all done:    waiting …   pending PENDING, pending PENDING   (finalize)   prepare, prepare   concluded, concluded
//!   one fails:   aborting (the one)   aborting, aborting   concluded, concluded
//! ```
//!
//! Those that have come as far as waiting when one fails, or are held back, are aborting only when it is their turn to
//! be concluded; the newest is at once.
//!
//! Every arrow of such a line is a number of turns taken; who waits for a turn waits for the number.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Stop;
use crate::job::Job;
use crate::jobs::Work;

#[derive(Debug, Default)]
struct State {
    /// Jobs whose work is done.
    arrived: usize,
    /// Turns taken on the way to a good end.
    up: usize,
    /// Turns taken on the way to a bad one.
    down: usize,
    /// Whether it will be a good end.
    outcome: Option<bool>,
    /// The one that failed first.
    culprit: Option<usize>,
}

/// See the module. A job by itself is a group of one.
#[derive(Debug)]
pub(crate) struct Group {
    /// Newest first.
    members: Vec<Arc<Job>>,
    state: Mutex<State>,
}

impl Group {
    /// Of jobs in the order in which they were made.
    pub(crate) fn new(jobs: &[Arc<Job>]) -> Arc<Self> {
        let group = Arc::new(Self { members: jobs.iter().rev().cloned().collect(), state: Mutex::default() });
        group.members.iter().for_each(|job| job.set_group(&group));
        group
    }

    /// Waits until all of its jobs are over.
    pub(crate) async fn all_concluded(&self) {
        for job in &self.members {
            job.concluded().await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state());
        self.members.iter().for_each(|job| job.poke());
        result
    }

    fn is_failing(&self) -> bool {
        self.state().outcome == Some(false)
    }

    /// Takes a job whose work has ended to its end, up to the moment when it is concluded: with the result that it
    /// returns.
    pub(crate) async fn finish(
        &self,
        job: &Arc<Job>,
        work: &mut dyn Work,
        worked: Result<(), Stop>,
    ) -> Result<(), Stop> {
        let place = self.members.iter().position(|member| Arc::ptr_eq(member, job)).unwrap_or(0);
        let mut result = worked;
        if result.is_ok() {
            result = self.up(job, place, work).await;
        }
        if result.is_ok() && !self.is_failing() {
            return Ok(());
        }
        let stop = result.err().unwrap_or(Stop::Cancelled);
        self.down(job, place, work, &stop).await;
        Err(stop)
    }

    /// From the end of the work to where the job may be concluded.
    async fn up(&self, job: &Arc<Job>, place: usize, work: &mut dyn Work) -> Result<(), Stop> {
        let all = self.members.len();
        job.waits().await?;
        self.change(|state| state.arrived += 1);
        self.until(job, |state| state.arrived == all).await?;
        self.until(job, |state| state.up == place).await?;
        job.becomes_pending();
        self.change(|state| state.up += 1);
        self.until(job, |state| state.up >= all).await?;
        self.decide(job).await?;
        // When one has failed, some of the others may not have come as far as this, and will not.
        let failing = |state: &State| state.outcome == Some(false);
        self.turn(job, |state| failing(state) || state.up == all + place).await;
        let prepared = if self.is_failing() { Err(Stop::Cancelled) } else { work.prepare(job).await };
        self.change(|state| {
            state.up += 1;
            if prepared.is_err() && state.outcome != Some(false) {
                (state.outcome, state.culprit) = (Some(false), Some(place));
            }
        });
        self.turn(job, |state| failing(state) || state.up >= 2 * all).await;
        if !self.is_failing() {
            self.turn(job, |state| state.up == 2 * all + place).await;
            work.commit(job).await;
        }
        prepared
    }

    /// The job is concluded: the next one's turn.
    pub(crate) fn concluded(&self) {
        self.change(|state| match state.outcome {
            Some(false) => state.down += 1,
            _ => state.up += 1,
        });
    }

    /// Waits for the moment when nothing is given up any more. A job of the group whose client wants to finalize by
    /// himself holds up all, and any of them may be finalized for all.
    async fn decide(&self, job: &Job) -> Result<(), Stop> {
        let nobody_asks = self.members.iter().all(|member| member.finalizes_by_itself());
        let ready = || nobody_asks || self.members.iter().any(|member| member.is_finalized());
        job.until_group(|cancelled| cancelled || ready() || self.state().outcome.is_some()).await;
        let good = self.change(|state| *state.outcome.get_or_insert_with(ready));
        if good { Ok(()) } else { Err(Stop::Cancelled) }
    }

    /// Waits for what `is_time` says, unless the job is cancelled or the group fails.
    async fn until(&self, job: &Job, is_time: impl Fn(&State) -> bool) -> Result<(), Stop> {
        job.until_group(|cancelled| {
            let state = self.state();
            cancelled || state.outcome == Some(false) || is_time(&state)
        })
        .await;
        let state = self.state();
        // Whose time has come goes on, even if he is cancelled meanwhile: he learns of it later.
        if state.outcome != Some(false) && is_time(&state) { Ok(()) } else { Err(Stop::Cancelled) }
    }

    /// Waits for what will come for sure.
    async fn turn(&self, job: &Job, is_time: impl Fn(&State) -> bool) {
        job.until_group(|_| is_time(&self.state())).await;
    }

    /// One of the group failed or was cancelled.
    async fn down(&self, job: &Arc<Job>, place: usize, work: &mut dyn Work, stop: &Stop) {
        let all = self.members.len();
        let late = place > 0 && job.rests();
        let first = self.change(|state| {
            state.outcome = Some(false);
            let first = *state.culprit.get_or_insert(place) == place;
            if first && !late {
                // Before the others can hear of it.
                job.abort(stop);
            }
            first
        });
        if first {
            let others = self.members.iter().filter(|member| !Arc::ptr_eq(member, job));
            others.for_each(|member| member.cancel_with_group());
        }
        self.turn(job, |state| state.down == place).await;
        if !first && !late {
            job.abort(stop);
        }
        self.change(|state| state.down += 1);
        // Taking one out of the graph holds up those that still work, and they would tell.
        self.turn(job, |state| state.down >= all).await;
        work.abandon(job).await;
        self.turn(job, |state| state.down == all + place).await;
        if late {
            job.abort(stop);
        }
    }
}

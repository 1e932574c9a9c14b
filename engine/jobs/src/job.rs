//! The frame of a job: its state, what clients may do to it, and where its task reads what they want.
//!
//! Commands come from any thread; they change the state under a short lock and wake the task, which looks at
//! its [`Job::checkpoint`] between two chunks. Pausing shows at once: the task begins nothing new from then on
//! (`busy` tells whether something that it began before is still under way). A pause has two reasons that are
//! counted apart: a user's, and changes of the graph that hold the job's requests back ([`Drained`]).

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use underlay_graph::root::Drained;
use underlay_graph::{Graph, GraphError, IoError, Node, Plan};
use underlay_sys::rt;

use crate::chain::{Afterlife, Claim};
use crate::error::{JobError, Stop};
use crate::event::{Action, EventSink, JobEvent, Progress};
use crate::group::Group;
use crate::pace::Pace;
use crate::settings::{IoStatus, JobInfo, Kind, OnError, Settings};
use crate::status::{Status, Verb};

/// How often a job that was cancelled by force looks whether its target has gone.
const HURRY: Duration = Duration::from_millis(100);

/// How a client wants a job to end before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cancel {
    /// Finish the sync, then end without switching.
    Soft,
    /// End now.
    Hard,
}

#[derive(Debug)]
struct State {
    status: Status,
    user_paused: bool,
    /// Changes of the graph that hold our requests back.
    drained: u32,
    /// The job itself is changing the graph, which is not worth telling.
    own_change: bool,
    cancel: Option<Cancel>,
    complete: bool,
    finalize: bool,
    speed: u64,
    current: u64,
    total: u64,
    in_flight: u32,
    io_status: IoStatus,
    /// How often errors have stopped it.
    stops: u64,
    error: Option<String>,
    pace: Pace,
    synced: bool,
}

/// Does something to the nodes of a job's target.
type AtTarget = Box<dyn Fn(fn(&dyn Node)) + Send + Sync>;

/// A job. See the module.
pub struct Job {
    id: String,
    kind: Kind,
    on_error: OnError,
    on_target_error: Option<OnError>,
    auto_finalize: bool,
    auto_dismiss: bool,
    /// Of a mirror: whether it writes to the target before a guest's write is acknowledged.
    write_blocking: OnceLock<Arc<AtomicBool>>,
    /// Work that is done beside the task, by guests' writes say: it counts as the job's.
    counter: OnceLock<Arc<AtomicU64>>,
    /// Those with which it ends.
    group: OnceLock<Weak<Group>>,
    /// Reaches the nodes of a target that nobody needs any more.
    at_target: OnceLock<AtTarget>,
    sink: Arc<dyn EventSink>,
    state: Mutex<State>,
    changed: Notify,
    /// What it keeps of the graph when it is over.
    afterlife: Mutex<Option<Afterlife>>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} job '{}' {:?}", self.kind.as_str(), self.id, self.state().status)
    }
}

/// What a task may do at a checkpoint.
enum Turn {
    Go,
    /// Until somebody changes something.
    Wait,
    /// Until then, or until somebody changes something.
    WaitUntil(Duration),
}

impl Job {
    pub(crate) fn new(id: String, kind: Kind, settings: &Settings, sink: Arc<dyn EventSink>) -> Arc<Self> {
        let state = State {
            status: Status::Created,
            user_paused: false,
            drained: 0,
            own_change: false,
            cancel: None,
            complete: false,
            finalize: false,
            speed: u64::try_from(settings.speed).unwrap_or(0),
            current: 0,
            total: 0,
            in_flight: 0,
            io_status: IoStatus::Ok,
            stops: 0,
            error: None,
            pace: Pace::default(),
            synced: false,
        };
        Arc::new(Self {
            id,
            kind,
            on_error: settings.on_error,
            on_target_error: settings.on_target_error,
            write_blocking: OnceLock::new(),
            counter: OnceLock::new(),
            group: OnceLock::new(),
            at_target: OnceLock::new(),
            auto_finalize: settings.auto_finalize,
            auto_dismiss: settings.auto_dismiss,
            sink,
            state: Mutex::new(state),
            changed: Notify::new(),
            afterlife: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What it does.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its state.
    pub fn status(&self) -> Status {
        self.state().status
    }

    /// What the queries tell of it.
    pub fn info(&self) -> JobInfo {
        let state = self.state();
        JobInfo {
            id: self.id.clone(),
            kind: self.kind,
            status: state.status,
            current: self.current(&state),
            total: state.total,
            error: state.error.clone(),
            busy: state.in_flight > 0,
            paused: state.user_paused,
            ready: state.status.is_ready(),
            speed: state.speed,
            io_status: state.io_status,
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            actively_synced: self.write_blocking.get().map(|_| state.synced),
        }
    }

    // ---- what clients do ----

    fn check(&self, state: &State, verb: Verb) -> Result<(), JobError> {
        if state.status.allows(verb) {
            return Ok(());
        }
        Err(JobError::WrongState { id: self.id.clone(), status: state.status, verb })
    }

    /// job-pause
    pub fn pause(&self) -> Result<(), JobError> {
        let mut state = self.state();
        self.check(&state, Verb::Pause)?;
        if state.user_paused {
            return Err(JobError::AlreadyPaused);
        }
        state.user_paused = true;
        self.show_pause(&mut state);
        Ok(())
    }

    /// job-resume; also forgets that an error had stopped the job.
    pub fn resume(&self) -> Result<(), JobError> {
        let mut state = self.state();
        if !state.user_paused {
            return Err(JobError::NotPaused);
        }
        self.check(&state, Verb::Resume)?;
        state.user_paused = false;
        state.io_status = IoStatus::Ok;
        self.show_pause(&mut state);
        self.changed.notify_waiters();
        Ok(())
    }

    /// block-job-set-speed, in bytes per second.
    pub fn set_speed(&self, speed: i64) -> Result<(), JobError> {
        let mut state = self.state();
        self.check(&state, Verb::SetSpeed)?;
        state.speed = u64::try_from(speed).map_err(|_| JobError::NegativeSpeed)?;
        state.pace.forget();
        self.changed.notify_waiters();
        Ok(())
    }

    /// block-job-change of a mirror's copy mode, which may only become `write-blocking`.
    pub fn change_copy_mode(&self, write_blocking: bool) -> Result<(), JobError> {
        let state = self.state();
        self.check(&state, Verb::Change)?;
        let Some(now) = self.write_blocking.get() else { return Err(JobError::NoChange) };
        if !write_blocking && now.load(Ordering::Relaxed) {
            return Err(JobError::NoWayBack);
        }
        now.store(write_blocking, Ordering::Relaxed);
        self.changed.notify_waiters();
        Ok(())
    }

    /// job-cancel: ends the job now.
    pub fn cancel(&self) -> Result<(), JobError> {
        let mut state = self.state();
        self.check(&state, Verb::Cancel)?;
        self.cancel_hard(&mut state);
        Ok(())
    }

    /// block-job-cancel: a job that is ready finishes its sync and ends well, but does not switch over. Any
    /// other, or with `force`, ends now.
    pub fn block_cancel(&self, force: bool) -> Result<(), JobError> {
        let mut state = self.state();
        if state.user_paused && !force {
            return Err(JobError::CurrentlyPaused(self.id.clone()));
        }
        self.check(&state, Verb::Cancel)?;
        if force || !state.status.is_ready() {
            self.cancel_hard(&mut state);
        } else if state.cancel.is_none() {
            state.cancel = Some(Cancel::Soft);
            self.changed.notify_waiters();
        }
        Ok(())
    }

    /// For the reply to a cancel: waits until the job is over, unless it has requests under way. QEMU's jobs that
    /// sleep, are paused or pending end before the reply; clients have come to expect it.
    pub async fn after_cancel(&self) {
        let over_soon = {
            let state = self.state();
            // QEMU's mirrors first wait for their target.
            state.cancel == Some(Cancel::Hard) && state.in_flight == 0 && self.kind != Kind::Mirror
        };
        if !over_soon {
            return;
        }
        match self.group.get().and_then(Weak::upgrade) {
            Some(group) => group.all_concluded().await,
            None => self.concluded().await,
        }
    }

    fn cancel_hard(&self, state: &mut State) {
        state.cancel = Some(Cancel::Hard);
        // It goes on in order to end, as if it was resumed.
        if std::mem::take(&mut state.user_paused) {
            state.io_status = IoStatus::Ok;
        }
        self.show_pause(state);
        self.changed.notify_waiters();
    }

    /// job-complete: a job that is ready switches over.
    pub fn complete(&self) -> Result<(), JobError> {
        let mut state = self.state();
        self.check(&state, Verb::Complete)?;
        state.complete = true;
        self.changed.notify_waiters();
        Ok(())
    }

    /// job-finalize: a pending job puts its result into force. Done when it is concluded.
    pub async fn finalize(&self) -> Result<(), JobError> {
        {
            let mut state = self.state();
            self.check(&state, Verb::Finalize)?;
            state.finalize = true;
            self.changed.notify_waiters();
        }
        self.concluded().await;
        Ok(())
    }

    /// Waits until the job is over, well or badly.
    pub async fn concluded(&self) {
        self.until(|state| matches!(state.status, Status::Concluded | Status::Null)).await;
    }

    // ---- what the graph does ----

    /// Held back by a change of the graph, or by the end of the daemon; it shows as a pause.
    pub(crate) fn drained_begin(&self) {
        let mut state = self.state();
        state.drained += 1;
        if !state.own_change {
            self.show_pause(&mut state);
        }
    }

    /// Not any more.
    pub(crate) fn drained_end(&self) {
        let mut state = self.state();
        state.drained -= 1;
        self.show_pause(&mut state);
        self.changed.notify_waiters();
    }

    /// Changes the graph on the job's own behalf, without showing as paused meanwhile.
    pub(crate) async fn change<R: Send>(
        &self,
        graph: &Graph,
        edit: impl FnOnce(&mut Plan) -> Result<(R, Option<Box<dyn underlay_graph::graph::LastStep>>), GraphError>
        + Send,
    ) -> Result<R, GraphError> {
        self.state().own_change = true;
        let result = graph.change_with(edit).await;
        self.state().own_change = false;
        result
    }

    /// Has the graph as it was before the job; what `edit` returns, if that was possible. Nodes going back to read-only
    /// are flushed, and where that fails they stay writable: `edit` is tried again with such a claim.
    pub(crate) async fn give_back<R: Send>(
        &self,
        graph: &Graph,
        claim: &Claim,
        edit: impl Fn(&mut Plan, &Claim) -> Result<R, GraphError> + Send + Sync,
    ) -> Option<R> {
        let mut claim = claim.clone();
        let mut outcome = self.change(graph, |plan| Ok((edit(plan, &claim)?, None))).await;
        if outcome.is_err() && claim.leave_all_writable() {
            outcome = self.change(graph, |plan| Ok((edit(plan, &claim)?, None))).await;
        }
        outcome.map_err(|error| self.tell_of_remains(graph, &error)).ok()
    }

    /// It is over, but for its part in the graph.
    pub(crate) fn tell_of_remains(&self, graph: &Graph, error: &GraphError) {
        let (kind, id) = (self.kind.as_str(), &self.id);
        graph.tell_of_trouble(&format!("What the {kind} job '{id}' put into the graph stays there: {error}"));
    }

    // ---- what the task does ----

    /// Moves between running and paused, ready and standby, as the reasons to pause come and go.
    fn show_pause(&self, state: &mut State) {
        if !self.kind.is_block_job() {
            // It has no point at which to pause.
            return;
        }
        let held = state.user_paused || state.drained > 0;
        let next = match (state.status, held) {
            // It is on its way to its end.
            (_, true) if state.cancel == Some(Cancel::Hard) => return,
            (Status::Running, true) => Status::Paused,
            (Status::Ready, true) => Status::Standby,
            (Status::Paused, false) => Status::Running,
            (Status::Standby, false) => Status::Ready,
            _ => return,
        };
        self.enter(state, next);
    }

    fn enter(&self, state: &mut State, status: Status) {
        debug_assert!(state.status.may_become(status), "{} to {status}", state.status);
        state.status = status;
        self.sink.emit(JobEvent::StatusChange { id: self.id.clone(), status });
        self.changed.notify_waiters();
    }

    fn current(&self, state: &State) -> u64 {
        state.current + self.counter.get().map_or(0, |counter| counter.load(Ordering::Relaxed))
    }

    fn progress(&self, state: &State) -> Progress {
        Progress { kind: self.kind, len: state.total, offset: self.current(state), speed: state.speed }
    }

    /// Shows the new job.
    pub(crate) fn announce(&self) {
        self.sink.emit(JobEvent::StatusChange { id: self.id.clone(), status: Status::Created });
    }

    /// The job starts to run, or vanishes because it cannot.
    pub(crate) fn begin(&self, status: Status) {
        self.enter(&mut self.state(), status);
    }

    async fn until(&self, done: impl Fn(&State) -> bool) {
        loop {
            let notified = self.changed.notified();
            let mut notified = std::pin::pin!(notified);
            notified.as_mut().enable();
            if done(&self.state()) {
                return;
            }
            notified.await;
        }
    }

    fn turn(&self) -> Result<Turn, Stop> {
        let state = self.state();
        if state.cancel == Some(Cancel::Hard) {
            return Err(Stop::Cancelled);
        }
        // Beside the task's own change nobody else can hold it back.
        if matches!(state.status, Status::Paused | Status::Standby) {
            return Ok(Turn::Wait);
        }
        Ok(state.pace.wait_until(rt::now()).map_or(Turn::Go, Turn::WaitUntil))
    }

    /// Whether [`Job::checkpoint`] would wait or end the job; a task then lets its requests come home first.
    pub(crate) fn is_wanted(&self) -> bool {
        !matches!(self.turn(), Ok(Turn::Go))
    }

    /// The one place where a job waits while it is paused or ahead of its speed, and learns of a cancel. To be
    /// passed before every chunk.
    pub(crate) async fn checkpoint(&self) -> Result<(), Stop> {
        loop {
            let notified = self.changed.notified();
            let mut notified = std::pin::pin!(notified);
            notified.as_mut().enable();
            match self.turn()? {
                Turn::Go => return Ok(()),
                Turn::Wait => notified.await,
                Turn::WaitUntil(at) => either(notified, rt::sleep_until(at)).await,
            }
        }
    }

    /// Waits for `time`, or until a client or the graph wants something.
    pub(crate) async fn doze(&self, time: Duration) -> Result<(), Stop> {
        let notified = self.changed.notified();
        let mut notified = std::pin::pin!(notified);
        notified.as_mut().enable();
        if let Turn::Go = self.turn()?
            && !self.is_ending()
        {
            either(notified, rt::sleep(time)).await;
        }
        self.checkpoint().await
    }

    /// A chunk of `bytes` costs time at the job's speed.
    pub(crate) fn spend(&self, bytes: u64) {
        let mut state = self.state();
        let speed = state.speed;
        state.pace.spend(rt::now(), bytes, speed);
    }

    /// Whether there is a speed limit.
    pub(crate) fn is_throttled(&self) -> bool {
        self.state().speed != 0
    }

    /// A request begins.
    pub(crate) fn takes_off(&self) {
        self.state().in_flight += 1;
    }

    /// A request has ended.
    pub(crate) fn lands(&self) {
        self.state().in_flight -= 1;
    }

    /// There are `total` bytes to do in all.
    pub(crate) fn set_total(&self, total: u64) {
        self.state().total = total;
    }

    /// What does something to the nodes of the target, which nobody needs any more.
    pub(crate) fn set_at_target(&self, at_target: impl Fn(fn(&dyn Node)) + Send + Sync + 'static) {
        let _ = self.at_target.set(Box::new(at_target));
    }

    /// Has the requests under way fail, as far as they are for nobody but this job, which was cancelled.
    pub fn give_up(&self) {
        if let Some(at_target) = self.at_target.get() {
            at_target(|node| node.give_up());
        }
    }

    /// Does a part of the job's work. Once the job is cancelled by force that does not wait for a target to come back,
    /// whenever it is noticed that it has gone.
    pub(crate) async fn in_a_hurry<T>(&self, work: impl Future<Output = T>) -> T {
        let mut hurry = std::pin::pin!(self.hurry());
        let mut work = std::pin::pin!(work);
        std::future::poll_fn(|cx| {
            let done = work.as_mut().poll(cx);
            if done.is_pending() {
                let _ = hurry.as_mut().poll(cx);
            }
            done
        })
        .await
    }

    /// From when the job is cancelled by force: nobody waits for its target any longer.
    async fn hurry(&self) -> Infallible {
        self.until_group(|cancelled| cancelled).await;
        let Some(at_target) = self.at_target.get() else { return std::future::pending().await };
        loop {
            at_target(|node| node.stop_waiting());
            rt::sleep(HURRY).await;
        }
    }

    /// The job is a mirror, and this is its copy mode.
    pub(crate) fn set_copy_mode(&self, write_blocking: Arc<AtomicBool>) {
        let _ = self.write_blocking.set(write_blocking);
    }

    /// Whether what a guest writes is at the target too when it is acknowledged.
    pub(crate) fn set_synced(&self, synced: bool) {
        self.state().synced = synced;
    }

    /// So many bytes more are done.
    pub(crate) fn advance(&self, bytes: u64) {
        self.state().current += bytes;
    }

    /// So many bytes are left to do.
    pub(crate) fn set_remaining(&self, bytes: u64) {
        let mut state = self.state();
        state.total = self.current(&state) + bytes;
    }

    /// The jobs that it ends with.
    pub(crate) fn set_group(&self, group: &Arc<Group>) {
        let _ = self.group.set(Arc::downgrade(group));
    }

    /// Bytes that somebody else counts are done too.
    pub(crate) fn set_counter(&self, counter: Arc<AtomicU64>) {
        let _ = self.counter.set(counter);
    }

    /// What is done about a failed request: it sends the event, and pauses the job if that is the policy. An
    /// error is for the job to end with.
    pub(crate) fn on_error(&self, error: &IoError, is_read: bool) -> Result<Action, Stop> {
        let mut state = self.state();
        if state.cancel == Some(Cancel::Hard) {
            // It ends for another reason, and the request may have been given up for that.
            return Err(Stop::Cancelled);
        }
        // Too late to wait for anybody.
        let late = matches!(state.status, Status::Waiting | Status::Pending);
        let policy = self.on_target_error.filter(|_| !is_read).unwrap_or(self.on_error);
        let action = if late { Action::Report } else { policy.action(error) };
        self.sink.emit(JobEvent::Error { id: self.id.clone(), is_read, action });
        match action {
            Action::Report => return Err(error.into()),
            Action::Ignore => {}
            Action::Stop => {
                state.io_status = if error.is_no_space() { IoStatus::NoSpace } else { IoStatus::Failed };
                state.stops += 1;
                state.user_paused = true;
                self.show_pause(&mut state);
            }
        }
        Ok(action)
    }

    /// Whether an error has paused it.
    pub(crate) fn is_stopped_by_error(&self) -> bool {
        self.state().io_status != IoStatus::Ok
    }

    /// How often errors have stopped it.
    pub(crate) fn stops(&self) -> u64 {
        self.state().stops
    }

    /// Waits until the job is not held back, then moves on to `status`.
    async fn move_on(&self, status: Status, also: impl Fn(&mut State)) -> Result<(), Stop> {
        loop {
            self.until(|state| {
                state.cancel == Some(Cancel::Hard)
                    || !matches!(state.status, Status::Paused | Status::Standby)
            })
            .await;
            let mut state = self.state();
            if state.cancel == Some(Cancel::Hard) {
                return Err(Stop::Cancelled);
            }
            if state.status.may_become(status) {
                self.enter(&mut state, status);
                also(&mut state);
                return Ok(());
            }
        }
    }

    /// In sync: waits for `complete` from now on.
    pub(crate) async fn becomes_ready(&self) -> Result<(), Stop> {
        self.move_on(Status::Ready, |state| {
            let progress = self.progress(state);
            self.sink.emit(JobEvent::Ready { id: self.id.clone(), progress });
            self.show_pause(state);
        })
        .await
    }

    /// Whether a job that is ready shall end now: with the switch, or (soft cancel) without.
    pub(crate) fn end_wanted(&self) -> Option<bool> {
        let state = self.state();
        match (state.cancel, state.complete) {
            (Some(_), _) => Some(false),
            (None, true) => Some(true),
            (None, false) => None,
        }
    }

    fn is_ending(&self) -> bool {
        self.end_wanted().is_some()
    }

    /// The work is done: waits for the others of its group.
    pub(crate) async fn waits(&self) -> Result<(), Stop> {
        self.move_on(Status::Waiting, |_| {}).await
    }

    /// Whether it works no more: it waits for the others of its group or for its end, or is held back.
    pub(crate) fn rests(&self) -> bool {
        let state = self.state();
        state.drained > 0 || matches!(state.status, Status::Waiting | Status::Pending)
    }

    /// All of the group are done. It says so, if somebody is to ask for its end.
    pub(crate) fn becomes_pending(&self) {
        self.enter(&mut self.state(), Status::Pending);
        if !self.auto_finalize {
            self.sink.emit(JobEvent::Pending { id: self.id.clone(), kind: self.kind });
        }
    }

    /// Whether it vanishes once concluded, without being dismissed.
    pub(crate) fn vanishes_by_itself(&self) -> bool {
        self.auto_dismiss
    }

    /// Whether nobody need ask for the end of a pending job.
    pub(crate) fn finalizes_by_itself(&self) -> bool {
        self.auto_finalize
    }

    /// Whether somebody has asked for it.
    pub(crate) fn is_finalized(&self) -> bool {
        self.state().finalize
    }

    /// Something has changed that it may wait for in [`Job::until_group`].
    pub(crate) fn poke(&self) {
        self.changed.notify_waiters();
    }

    /// Waits for something about its group, told whether the job was cancelled.
    pub(crate) async fn until_group(&self, done: impl Fn(bool) -> bool) {
        loop {
            let notified = self.changed.notified();
            let mut notified = std::pin::pin!(notified);
            notified.as_mut().enable();
            let cancelled = self.state().cancel == Some(Cancel::Hard);
            if done(cancelled) {
                return;
            }
            notified.await;
        }
    }

    /// Another job of its group has failed.
    pub(crate) fn cancel_with_group(&self) {
        self.cancel_hard(&mut self.state());
    }

    /// It goes wrong: from now on the error shows.
    pub(crate) fn abort(&self, stop: &Stop) {
        let mut state = self.state();
        // However it was held back, it ends now.
        state.user_paused = false;
        let held = std::mem::take(&mut state.drained);
        self.show_pause(&mut state);
        state.drained = held;
        state.error = Some(stop.text());
        self.enter(&mut state, Status::Aborting);
    }

    /// It is over, and vanishes if nobody is to dismiss it: whether it has.
    pub(crate) fn conclude(&self, result: Result<(), Stop>) -> bool {
        let mut state = self.state();
        let (id, progress) = (self.id.clone(), self.progress(&state));
        if self.kind.is_block_job() {
            self.sink.emit(match result {
                Ok(()) => JobEvent::Completed { id, progress, error: None },
                Err(Stop::Cancelled) => JobEvent::Cancelled { id, progress },
                Err(Stop::Failed(error)) => JobEvent::Completed { id, progress, error: Some(error) },
            });
        }
        self.enter(&mut state, Status::Concluded);
        if self.auto_dismiss {
            self.enter(&mut state, Status::Null);
        }
        self.auto_dismiss
    }

    /// It never started: it goes without a word about its result.
    pub(crate) fn withdraw(&self) {
        self.abort(&Stop::Cancelled);
        let mut state = self.state();
        self.enter(&mut state, Status::Concluded);
        self.enter(&mut state, Status::Null);
    }

    /// What it keeps of the graph from now on, until it is dismissed.
    pub(crate) fn keep(&self, afterlife: Option<Afterlife>) {
        *self.afterlife.lock().unwrap_or_else(PoisonError::into_inner) = afterlife;
    }

    /// It is about to be dismissed: lets go of what it has kept.
    pub(crate) async fn let_go(&self) -> Result<(), JobError> {
        self.check(&self.state(), Verb::Dismiss)?;
        self.end_afterlife().await;
        Ok(())
    }

    /// Lets go of what it has kept.
    pub(crate) async fn end_afterlife(&self) {
        let kept = self.afterlife.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(kept) = kept {
            kept.end().await;
        }
    }

    /// It vanishes.
    pub(crate) fn vanish(&self) -> Result<(), JobError> {
        let mut state = self.state();
        self.check(&state, Verb::Dismiss)?;
        self.enter(&mut state, Status::Null);
        Ok(())
    }
}

/// The job as the graph knows it: one that is told when its requests are held back.
#[derive(Debug)]
pub(crate) struct HeldBack(pub Arc<Job>);

impl Drained for HeldBack {
    fn begin(&self) {
        self.0.drained_begin();
    }

    fn end(&self) {
        self.0.drained_end();
    }
}

/// Waits for the first of two signals. Only for signals and timers, which lose nothing when dropped.
async fn either(mut a: impl Future<Output = ()> + Unpin, b: impl Future<Output = ()>) {
    let mut b = std::pin::pin!(b);
    std::future::poll_fn(|cx| {
        let first = std::pin::Pin::new(&mut a).poll(cx).is_ready();
        if first || b.as_mut().poll(cx).is_ready() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}

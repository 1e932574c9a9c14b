//! A guest's requests on their way to the disk of a device: they wait while the machine is stopped and for the device's
//! limits, they are counted, and what fails is reported, ignored, or stops the machine to be tried again later.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use underlay_drivers::throttle::{Direction, Group, Member};
use underlay_exports::{Guest, Operation, Took, Verdict};
use underlay_graph::{Graph, IoError, Result, RootId};
use underlay_io::monitor::{Accounts, Way};
use underlay_jobs::{Action, IoStatus, OnError};
use underlay_qmp::json::Object;

use super::stats::Stats;
use crate::event::EventBus;
use crate::machine::running::{RunState, Running};

/// What to do about an error, from the word for it.
pub fn on_error(word: &str) -> Option<OnError> {
    match word {
        "report" => Some(OnError::Report),
        "ignore" => Some(OnError::Ignore),
        "stop" => Some(OnError::Stop),
        "enospc" => Some(OnError::Enospc),
        _ => None,
    }
}

/// What to do about errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policies {
    /// `rerror`
    pub read: OnError,
    /// `werror`
    pub write: OnError,
}

impl Policies {
    /// The guest is told of everything.
    pub const REPORT: Self = Self { read: OnError::Report, write: OnError::Report };
}

impl Default for Policies {
    fn default() -> Self {
        Self { read: OnError::Report, write: OnError::Enospc }
    }
}

/// What a device is called in events.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// The name of what is behind it.
    pub backend: String,
    /// Its place among all objects.
    pub path: String,
}

#[derive(Debug, Default)]
struct State {
    names: Names,
    disk: Option<RootId>,
    policies: Policies,
    /// How the last error went that has stopped the machine, if it has not been continued since.
    status: Option<IoStatus>,
    member: Option<Arc<Member>>,
}

/// What all guests of a device share.
#[derive(Debug)]
pub struct GuestIo {
    graph: Arc<Graph>,
    events: Arc<EventBus>,
    running: Arc<Running>,
    stats: Stats,
    copy_on_read: AtomicBool,
    /// Whether there is a member in the state.
    is_limited: AtomicBool,
    state: Mutex<State>,
}

impl GuestIo {
    /// Of a device in that machine.
    pub fn new(graph: Arc<Graph>, events: Arc<EventBus>, running: Arc<Running>) -> Arc<Self> {
        Arc::new(Self {
            graph,
            events,
            running,
            stats: Stats::default(),
            copy_on_read: AtomicBool::new(false),
            is_limited: AtomicBool::new(false),
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What events call it from now on.
    pub fn set_names(&self, names: Names) {
        self.state().names = names;
    }

    /// Where its disk is from now on.
    pub fn set_disk(&self, disk: Option<RootId>) {
        self.state().disk = disk;
    }

    /// What is done about errors from now on.
    pub fn set_policies(&self, policies: Policies) {
        self.state().policies = policies;
    }

    /// Whether what guests read from below the image is copied into it from now on.
    pub fn set_copy_on_read(&self, copy_on_read: bool) {
        self.copy_on_read.store(copy_on_read, Ordering::Relaxed);
    }

    /// Whether what is read from below the image is copied into it.
    pub fn copies_on_read(&self) -> bool {
        self.copy_on_read.load(Ordering::Relaxed)
    }

    /// What is done about errors.
    pub fn policies(&self) -> Policies {
        self.state().policies
    }

    /// Errors so far are forgotten.
    pub fn forget_errors(&self) {
        self.state().status = None;
    }

    /// What became of the last requests.
    pub fn status(&self) -> IoStatus {
        self.state().status.unwrap_or(IoStatus::Ok)
    }

    /// What was done so far.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Its limits are those of a group from now on; nothing: there are none.
    pub fn set_group(&self, group: Option<Arc<Group>>) {
        let before = {
            let mut state = self.state();
            self.is_limited.store(group.is_some(), Ordering::Release);
            std::mem::replace(&mut state.member, group.map(|group| Arc::new(Member::new(group))))
        };
        // Who waits there waits no longer.
        if let Some(before) = before {
            before.hurry(true);
        }
    }

    /// The group whose limits it has.
    pub fn group(&self) -> Option<Arc<Group>> {
        self.state().member.as_ref().map(|member| member.group().clone())
    }

    fn member(&self) -> Option<Arc<Member>> {
        if !self.is_limited.load(Ordering::Acquire) {
            return None;
        }
        self.state().member.clone()
    }

    /// Deals with an error: tells of it, and stops the machine if that is wanted.
    fn failed(&self, operation: Operation, error: &IoError) -> Verdict {
        let (names, disk, policy) = {
            let state = self.state();
            let reads = operation == Operation::Read;
            let policy = if reads { state.policies.read } else { state.policies.write };
            (state.names.clone(), state.disk, policy)
        };
        let action = policy.action(error);
        let verdict = match action {
            Action::Report => Verdict::Tell,
            Action::Ignore => Verdict::Hide,
            Action::Stop => Verdict::Again,
        };
        if verdict == Verdict::Again {
            let status = if error.is_no_space() { IoStatus::NoSpace } else { IoStatus::Failed };
            self.state().status = Some(status);
        }
        let mut data = Object::new().with("qom-path", names.path).with("device", names.backend);
        let plan = self.graph.plan();
        if let Some(node) = disk.and_then(|disk| plan.root(disk)).and_then(|root| plan.get(root.node)) {
            data.insert("node-name", node.name.as_str());
        }
        let data = data
            .with("operation", if operation == Operation::Read { "read" } else { "write" })
            .with("action", action.as_str())
            .with("nospace", error.is_no_space())
            .with("reason", error.plain().to_string());
        self.events.emit("BLOCK_IO_ERROR", data);
        if verdict == Verdict::Again && self.running.stop_if_running(RunState::IoError) {
            self.events.emit("STOP", Object::new());
        }
        verdict
    }
}

impl Accounts for GuestIo {
    fn done(&self, way: Way, bytes: u64, begun: Duration, ended: Duration, went_well: bool) {
        self.stats.count(operation(way), bytes, Took { start: begun, end: ended }, went_well);
    }

    fn invalid(&self, way: Way) {
        self.stats.count_invalid(operation(way));
    }
}

fn operation(way: Way) -> Operation {
    match way {
        Way::Read => Operation::Read,
        Way::Write => Operation::Write,
        Way::Flush => Operation::Flush,
    }
}

/// One guest of a device: an export.
#[derive(Clone, Debug)]
pub struct Attached {
    io: Arc<GuestIo>,
    given_up: Arc<AtomicBool>,
}

impl Attached {
    /// To a device.
    pub fn new(io: Arc<GuestIo>) -> Self {
        Self { io, given_up: Arc::default() }
    }

    /// Requests that wait are answered with an error from now on; they wait for no limits while the result is held.
    pub fn give_up(&self) -> Hurried {
        self.given_up.store(true, Ordering::Release);
        self.io.running.wake();
        let member = self.io.member();
        if let Some(member) = &member {
            member.hurry(true);
        }
        Hurried(member)
    }
}

/// Requests of a device do not wait for its limits as long as this is there.
#[derive(Debug)]
#[must_use = "the device's requests are in a hurry until this is dropped"]
pub struct Hurried(Option<Arc<Member>>);

impl Drop for Hurried {
    fn drop(&mut self) {
        if let Some(member) = &self.0 {
            member.hurry(false);
        }
    }
}

#[async_trait]
impl Guest for Attached {
    async fn admit(&self, operation: Operation, bytes: u64) -> Result<()> {
        let mut may_pass = operation == Operation::Flush;
        loop {
            if !self.io.running.runs(&self.given_up).await {
                return Err(IoError::ECANCELED);
            }
            if !may_pass && let Some(member) = self.io.member() {
                let direction = if operation == Operation::Read { Direction::Read } else { Direction::Write };
                member.pass(direction, bytes).await;
            }
            may_pass = true;
            if self.io.running.enter() {
                return Ok(());
            }
        }
    }

    fn copies_on_read(&self) -> bool {
        self.io.copies_on_read()
    }

    fn refused(&self, operation: Operation) {
        self.io.stats.count_invalid(operation);
    }

    fn done(&self, operation: Operation, bytes: u64, when: Took, result: &Result<()>) -> Verdict {
        self.io.running.leave();
        self.io.stats.count(operation, bytes, when, result.is_ok());
        match result {
            // Nothing is wrong with a disk that has gone, nor with one that cannot do what could be done in another
            // way.
            Err(error) if ![IoError::ECANCELED, IoError::ENOTSUP].contains(error) => {
                self.io.failed(operation, error)
            }
            _ => Verdict::Tell,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use underlay_sys::thread::block_on;

    use super::*;

    fn guest() -> (Arc<Running>, Attached) {
        let running = Arc::<Running>::default();
        let io = GuestIo::new(Graph::new(), Arc::default(), running.clone());
        (running, Attached::new(io))
    }

    /// One look at a future.
    fn look<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn requests_wait_until_the_machine_runs() {
        block_on(async { wait_until_the_machine_runs() });
    }

    fn wait_until_the_machine_runs() {
        let (running, guest) = guest();
        let mut request = pin!(guest.admit(Operation::Write, 512));
        assert!(look(request.as_mut()).is_pending());
        running.set(RunState::Running);
        assert_eq!(look(request.as_mut()), Poll::Ready(Ok(())));
        // It is on its way, so the machine is not quiet; another one has to wait.
        assert!(running.stop_if_running(RunState::Paused));
        let mut quiet = pin!(running.quiet());
        assert!(look(quiet.as_mut()).is_pending());
        let mut next = pin!(guest.admit(Operation::Read, 512));
        assert!(look(next.as_mut()).is_pending());
        assert_eq!(guest.done(Operation::Write, 512, Took::default(), &Ok(())), Verdict::Tell);
        assert!(look(quiet.as_mut()).is_ready());
        drop(guest.give_up());
        assert_eq!(look(next.as_mut()), Poll::Ready(Err(IoError::ECANCELED)));
    }

    #[test]
    fn policies_decide_about_errors() {
        block_on(async { decide_about_errors() });
    }

    fn decide_about_errors() {
        use OnError::{Enospc, Ignore, Report, Stop};
        let (full, broken) = (IoError::ENOSPC, IoError::EIO);
        for (policy, error, verdict, status) in [
            (Report, &full, Verdict::Tell, IoStatus::Ok),
            (Ignore, &full, Verdict::Hide, IoStatus::Ok),
            (Enospc, &full, Verdict::Again, IoStatus::NoSpace),
            (Enospc, &broken, Verdict::Tell, IoStatus::Ok),
            (Stop, &broken, Verdict::Again, IoStatus::Failed),
        ] {
            let (running, guest) = guest();
            running.set(RunState::Running);
            guest.io.set_policies(Policies { read: Report, write: policy });
            assert!(running.enter());
            let result = Err(error.clone());
            assert_eq!(guest.done(Operation::Discard, 1, Took::default(), &result), verdict, "{policy:?}");
            assert_eq!(guest.io.status(), status, "{policy:?}");
            let stopped = verdict == Verdict::Again;
            assert_eq!(running.state() == RunState::IoError, stopped, "{policy:?}");
            assert!(running.enter() || stopped);
            assert_eq!(guest.done(Operation::Read, 1, Took::default(), &result), Verdict::Tell);
            let unsupported = Err(IoError::ENOTSUP);
            assert_eq!(guest.done(Operation::Write, 1, Took::default(), &unsupported), Verdict::Tell);
        }
    }
}

//! The executor of one thread: run queue, timers, and the turn that waits for the kernel.
//!
//! A wake on the thread itself is a push on a plain queue; a wake from elsewhere takes a lock and, if the thread
//! may be asleep, one write to its eventfd. Completions come from io_uring ([`crate::ring`]) or, without it,
//! from a `poll(2)` loop ([`crate::pool`]).

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use async_task::{Runnable, ScheduleInfo, WithInfo};

use crate::background::{Background, Pulse, Step, is_step};
use crate::pool::Waits;
use crate::ring::Ring;
use crate::rt::{self, Runtime, Task};

/// Tasks that run between two looks at the kernel.
const BATCH: usize = 64;

/// Tasks that one thread takes off others at a time: one that runs, and one that is there when that is done.
const HELPS: usize = 2;

thread_local! {
    static HOME: RefCell<Option<Rc<Core>>> = const { RefCell::new(None) };
    /// Address of the home executor's [`Remote`], to know a local wake without counting references.
    static HOME_REMOTE: Cell<*const Remote> = const { Cell::new(std::ptr::null()) };
}

/// See [`rt::press`].
pub(crate) fn press(is_pressed: bool) {
    HOME.with_borrow(|home| {
        if let Some(core) = home {
            core.remote.pressed.store(is_pressed, Ordering::Relaxed);
        }
    });
}

/// The executor that runs on this thread, if one does.
pub(crate) fn home() -> Option<Rc<Core>> {
    HOME.with_borrow(Clone::clone)
}

/// Who goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Guests' requests, and whatever clients wait for.
    Foreground,
    /// What gives way to them.
    Background,
}

/// Where a task of the background waits for its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Before those that have not begun: what it waited for has come.
    Next,
    /// It is new, or lets others go first.
    Last,
}

/// What other threads know of an executor.
pub(crate) struct Remote {
    tasks: Mutex<Vec<(Runnable, Class, Turn)>>,
    event: OwnedFd,
    /// The eventfd was written since the thread last looked.
    signalled: AtomicBool,
    stop: AtomicBool,
    /// Whoever runs there now knows of others who wait for the thread.
    pressed: AtomicBool,
    /// Tasks that wait for the thread, as it last saw them, without the background.
    load: AtomicUsize,
    /// Tasks that were taken off other threads and are not done.
    helps: AtomicUsize,
}

/// One of [`Remote::helps`], as long as it lives.
struct Help(Arc<Remote>);

impl Drop for Help {
    fn drop(&mut self) {
        self.0.helps.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Remote {
    fn new() -> io::Result<Self> {
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
        Ok(Self {
            tasks: Mutex::new(Vec::new()),
            event,
            signalled: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            pressed: AtomicBool::new(false),
            load: AtomicUsize::new(0),
            helps: AtomicUsize::new(0),
        })
    }

    /// How many tasks a new one would find there, if the thread has time for it.
    fn room(&self) -> Option<usize> {
        // Those it has taken may be among those that wait.
        let all = self.load.load(Ordering::Relaxed).max(self.helps.load(Ordering::Relaxed));
        (!self.pressed.load(Ordering::Relaxed) && all < HELPS).then_some(all)
    }

    /// Takes a task off another thread, unless it has enough of them meanwhile.
    fn helps(self: &Arc<Self>) -> Option<Help> {
        let room = |helps| (helps < HELPS).then_some(helps + 1);
        self.helps.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).ok().map(|_| Help(self.clone()))
    }

    /// Makes the thread look at its queue soon.
    fn notify(&self) {
        if !self.signalled.swap(true, Ordering::SeqCst) {
            // The counter cannot overflow: one write per look. There is nobody to tell if it failed.
            let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        }
    }

    fn is_home(&self) -> bool {
        std::ptr::eq(HOME_REMOTE.get(), self)
    }

    fn schedule(&self, task: Runnable, class: Class, turn: Turn) {
        if self.is_home() {
            // The home executor is set whenever its address is (see `Core::enter`).
            HOME.with_borrow(|home| home.as_ref().map(|core| core.put(task, class, turn)));
            return;
        }
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).push((task, class, turn));
        self.notify();
    }

    /// Starts `task` on the executor's thread.
    pub(crate) fn spawn<F>(self: &Arc<Self>, class: Class, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let remote = self.clone();
        let again = move |task, info: ScheduleInfo| {
            let turn = if info.woken_while_running { Turn::Last } else { Turn::Next };
            remote.schedule(task, class, turn);
        };
        let (runnable, task) = async_task::spawn(task, WithInfo(again));
        task.detach();
        self.schedule(runnable, class, Turn::Last);
    }

    /// Ends [`Core::run_until_stopped`].
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.notify();
    }

    pub(crate) fn event_fd(&self) -> i32 {
        self.event.as_raw_fd()
    }
}

struct Timer {
    at: Duration,
    /// Keeps timers of the same moment in their order.
    number: u64,
    waker: Waker,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}

impl Eq for Timer {}

impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// Where completions come from.
pub(crate) enum Driver {
    Ring(Box<Ring>),
    Threads(Waits),
}

/// The executors that share background work.
#[derive(Default)]
pub(crate) struct Crew {
    members: OnceLock<Vec<Arc<Remote>>>,
    pulse: Pulse,
}

impl Crew {
    /// Everybody is there.
    pub(crate) fn complete(&self, members: Vec<Arc<Remote>>) {
        // A crew is completed once, by who made it.
        let _ = self.members.set(members);
    }

    fn members(&self) -> &[Arc<Remote>] {
        self.members.get().map_or(&[], Vec::as_slice)
    }
}

/// The executor itself. Lives on one thread.
pub(crate) struct Core {
    ready: RefCell<VecDeque<Runnable>>,
    background: Background,
    crew: Arc<Crew>,
    timers: RefCell<BinaryHeap<Reverse<Timer>>>,
    timers_made: Cell<u64>,
    remote: Arc<Remote>,
    pub(crate) driver: Driver,
}

/// Which driver new executors get.
fn wants_threads() -> bool {
    static CHOICE: OnceLock<bool> = OnceLock::new();
    *CHOICE.get_or_init(|| std::env::var_os("UNDERLAY_IO").is_some_and(|choice| choice == "threads"))
}

impl Core {
    /// For the calling thread; io_uring unless the kernel or `UNDERLAY_IO=threads` is against it.
    pub(crate) fn new() -> io::Result<Rc<Self>> {
        Self::member(Arc::default())
    }

    /// For the calling thread, as one of several that share background work.
    pub(crate) fn member(crew: Arc<Crew>) -> io::Result<Rc<Self>> {
        Self::with_threads(crew, wants_threads())
    }

    pub(crate) fn with_threads(crew: Arc<Crew>, threads: bool) -> io::Result<Rc<Self>> {
        let remote = Arc::new(Remote::new()?);
        let ring = if threads { None } else { Self::ring(&remote) };
        let driver = match ring {
            Some(ring) => Driver::Ring(Box::new(ring)),
            None => Driver::Threads(Waits::new(remote.event_fd())),
        };
        Ok(Rc::new(Self {
            ready: RefCell::default(),
            background: Background::default(),
            crew,
            timers: RefCell::default(),
            timers_made: Cell::new(0),
            remote,
            driver,
        }))
    }

    fn ring(remote: &Remote) -> Option<Ring> {
        match Ring::new(remote.event_fd()) {
            Ok(ring) => Some(ring),
            Err(error) => {
                tracing::warn!(%error, "no io_uring here, using threads");
                None
            }
        }
    }

    pub(crate) fn remote(&self) -> Arc<Remote> {
        self.remote.clone()
    }

    /// Makes this the thread's executor until the guard goes.
    fn enter(self: &Rc<Self>) -> Home {
        let remote = HOME_REMOTE.replace(Arc::as_ptr(&self.remote));
        let core = HOME.replace(Some(self.clone()));
        Home { core, remote, _runtime: rt::enter(self.clone()) }
    }

    /// Runs tasks until `future` is done.
    pub(crate) fn block_on<F: Future>(self: &Rc<Self>, future: F) -> F::Output {
        let _home = self.enter();
        let _drain = Drain(self);
        let mut future = pin!(future);
        let main = Arc::new(MainWaker { woken: AtomicBool::new(true), remote: self.remote.clone() });
        let waker = Waker::from(main.clone());
        loop {
            if main.woken.swap(false, Ordering::SeqCst)
                && let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker))
            {
                return output;
            }
            let idle = self.run_ready();
            self.turn(idle && !main.woken.load(Ordering::SeqCst));
        }
    }

    /// Runs tasks until [`Remote::stop`], and then whatever can still run.
    pub(crate) fn run_until_stopped(self: &Rc<Self>) {
        let _home = self.enter();
        let _drain = Drain(self);
        loop {
            let idle = self.run_ready();
            let stop = self.remote.stop.load(Ordering::SeqCst);
            if idle && stop {
                self.take_remote();
                if self.ready.borrow().is_empty() && self.background.is_empty() {
                    return;
                }
            }
            self.turn(idle && !stop);
        }
    }

    /// Which of its crew this is.
    fn place(&self) -> usize {
        let is_here = |member: &Arc<Remote>| Arc::ptr_eq(member, &self.remote);
        self.crew.members().iter().position(is_here).unwrap_or(0)
    }

    fn put(&self, task: Runnable, class: Class, turn: Turn) {
        match (class, turn) {
            (Class::Foreground, _) => self.ready.borrow_mut().push_back(task),
            (Class::Background, Turn::Next) => self.background.push_first(task),
            (Class::Background, Turn::Last) => self.background.push(task),
        }
    }

    /// Runs some of the tasks that are ready; whether none is left.
    fn run_ready(&self) -> bool {
        self.remote.load.store(self.ready.borrow().len(), Ordering::Relaxed);
        for count in 0..BATCH {
            let Some(task) = self.ready.borrow_mut().pop_front() else {
                if count > 0 {
                    self.background.gave_way(clock(), &self.crew.pulse);
                }
                self.remote.load.store(0, Ordering::Relaxed);
                return true;
            };
            task.run();
        }
        self.background.gave_way(clock(), &self.crew.pulse);
        self.ready.borrow().is_empty()
    }

    /// A step of the background work, if its time has come. Then looks for completions, timers and wakes from
    /// other threads; waits for one of them if `wait` and there is nothing else to do.
    fn turn(&self, wait: bool) {
        let limit = match self.background.step(clock, &self.crew.pulse) {
            Step::Idle => None,
            Step::Later(time) => Some(time),
            Step::Ran => Some(Duration::ZERO),
        };
        let timer = self.timers.borrow().peek().map(|Reverse(timer)| timer.at.saturating_sub(clock()));
        let timeout = match (wait, timer, limit) {
            (false, _, _) => Some(Duration::ZERO),
            (true, Some(timer), Some(limit)) => Some(timer.min(limit)),
            (true, timer, limit) => timer.or(limit),
        };
        let signalled = match &self.driver {
            Driver::Ring(ring) => ring.turn(timeout),
            Driver::Threads(waits) => waits.turn(timeout),
        };
        if limit == Some(Duration::ZERO) {
            // Requests run when they are handed to the kernel, which is part of the step.
            self.background.end_step(clock());
        }
        if signalled {
            self.take_remote();
        }
        self.fire_timers();
    }

    fn take_remote(&self) {
        self.remote.signalled.store(false, Ordering::SeqCst);
        let tasks = std::mem::take(&mut *self.remote.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.into_iter().for_each(|(task, class, turn)| self.put(task, class, turn));
    }

    fn fire_timers(&self) {
        if self.timers.borrow().is_empty() {
            return;
        }
        let now = clock();
        loop {
            let mut timers = self.timers.borrow_mut();
            if timers.peek().is_none_or(|Reverse(timer)| timer.at > now) {
                return;
            }
            let due = timers.pop();
            drop(timers);
            if let Some(Reverse(timer)) = due {
                timer.waker.wake();
            }
        }
    }

    /// Before the executor goes: no task may be left that runs, and the kernel must be done with its buffers.
    fn drain(&self) {
        let timers = std::mem::take(&mut *self.timers.borrow_mut());
        drop(timers);
        if let Driver::Ring(ring) = &self.driver {
            ring.cancel_all();
        }
        loop {
            let task = self.ready.borrow_mut().pop_front().or_else(|| self.background.pop());
            let Some(task) = task else { break };
            drop(task);
        }
    }
}

struct Drain<'a>(&'a Core);

impl Drop for Drain<'_> {
    fn drop(&mut self) {
        self.0.drain();
    }
}

struct Home {
    core: Option<Rc<Core>>,
    remote: *const Remote,
    _runtime: rt::Entered,
}

impl Drop for Home {
    fn drop(&mut self) {
        HOME_REMOTE.set(self.remote);
        drop(HOME.replace(self.core.take()));
    }
}

struct MainWaker {
    woken: AtomicBool,
    remote: Arc<Remote>,
}

impl Wake for MainWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::SeqCst);
        if !self.remote.is_home() {
            self.remote.notify();
        }
    }
}

/// Time since the process first asked; the same on all threads.
fn clock() -> Duration {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}

impl Runtime for Core {
    fn spawn(&self, task: Task) {
        self.remote.spawn(Class::Foreground, task);
    }

    fn lanes(&self) -> usize {
        self.crew.members().len().max(1)
    }

    fn spawn_background(&self, lane: usize, task: Task) {
        let members = self.crew.members();
        let remote = members.get((self.place() + lane) % members.len().max(1)).unwrap_or(&self.remote);
        remote.spawn(Class::Background, task);
    }

    fn help(&self, task: Task) -> Result<(), Task> {
        let is_pressed = self.remote.pressed.load(Ordering::Relaxed) || !self.ready.borrow().is_empty();
        // The background has its own turns and threads.
        if !is_pressed || is_step() {
            return Err(task);
        }
        let members = self.crew.members();
        let (before, others) = members.split_at(self.place());
        let others = others.iter().skip(1).chain(before);
        let least = others.filter_map(|other| Some((other.room()?, other))).min_by_key(|(load, _)| *load);
        let Some(help) = least.and_then(|(_, other)| other.helps()) else { return Err(task) };
        let remote = help.0.clone();
        remote.spawn(Class::Foreground, async move {
            let _help = help;
            task.await;
        });
        Ok(())
    }

    fn now(&self) -> Duration {
        clock()
    }

    fn wake_at(&self, at: Duration, waker: Waker) {
        let number = self.timers_made.get();
        self.timers_made.set(number + 1);
        self.timers.borrow_mut().push(Reverse(Timer { at, number, waker }));
    }
}

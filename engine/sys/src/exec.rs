//! The executor of one thread: tasks that are ready, timers, and a driver that waits for the kernel.
//!
//! A task stays on the thread where it was spawned. Waking a task from its own thread is a push onto a local queue;
//! from another thread it goes through a shared queue, and an eventfd when the thread sleeps. A turn of the loop
//! runs what is ready, then lets the driver submit and collect in one system call.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use async_task::Runnable;

use crate::driver::Driver;
use crate::rt::{self, Runtime, Task};

/// Tasks run in a turn before the driver is asked again, so that completions do not wait for ever.
const TURN: usize = 128;

/// What other threads may touch of an executor.
pub(crate) struct Remote {
    queue: Mutex<Vec<Runnable>>,
    /// The thread is about to sleep or asleep: whoever brings work must ring.
    sleeping: AtomicBool,
    /// The root future was woken.
    root: AtomicBool,
    stopping: AtomicBool,
    bell: crate::driver::Bell,
}

impl Remote {
    fn ring(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) {
            self.bell.ring();
        }
    }

    /// Makes the thread's loop end once nothing is ready.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.ring();
    }

    fn push(&self, task: Runnable) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push(task);
        self.ring();
    }
}

struct RootWaker(Arc<Remote>);

impl Wake for RootWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.root.store(true, Ordering::SeqCst);
        self.0.ring();
    }
}

struct Timer {
    at: Duration,
    order: u64,
    waker: Waker,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
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
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// See the module.
pub(crate) struct Executor {
    remote: Arc<Remote>,
    ready: RefCell<VecDeque<Runnable>>,
    timers: RefCell<BinaryHeap<Reverse<Timer>>>,
    next_timer: Cell<u64>,
    pub(crate) driver: Driver,
    origin: Instant,
}

thread_local! {
    static HERE: RefCell<Option<Rc<Executor>>> = const { RefCell::new(None) };
}

/// The executor of this thread.
pub(crate) fn here() -> Rc<Executor> {
    try_here().expect("called on an I/O thread")
}

/// The executor of this thread, if it has one.
pub(crate) fn try_here() -> Option<Rc<Executor>> {
    HERE.with_borrow(|here| here.clone())
}

fn schedule(home: &Arc<Remote>, task: Runnable) {
    let local =
        HERE.with_borrow(|here| here.as_ref().filter(|here| Arc::ptr_eq(&here.remote, home)).cloned());
    match local {
        Some(here) => here.ready.borrow_mut().push_back(task),
        None => home.push(task),
    }
}

/// Makes a task of `future` that runs on the thread of `home`.
pub(crate) fn spawn_on<F: Future<Output = ()> + Send + 'static>(home: &Arc<Remote>, future: F) {
    let to = home.clone();
    let (task, handle) = async_task::spawn(future, move |task| schedule(&to, task));
    handle.detach();
    task.schedule();
}

impl Runtime for Executor {
    fn spawn(&self, task: Task) {
        spawn_on(&self.remote, task);
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn wake_at(&self, at: Duration, waker: Waker) {
        let order = self.next_timer.replace(self.next_timer.get() + 1);
        self.timers.borrow_mut().push(Reverse(Timer { at, order, waker }));
    }
}

impl Executor {
    /// For the calling thread.
    pub(crate) fn new() -> std::io::Result<Rc<Self>> {
        let (driver, bell) = Driver::new()?;
        let remote = Remote {
            queue: Mutex::default(),
            sleeping: AtomicBool::new(false),
            root: AtomicBool::new(true),
            stopping: AtomicBool::new(false),
            bell,
        };
        Ok(Rc::new(Self {
            remote: Arc::new(remote),
            ready: RefCell::default(),
            timers: RefCell::default(),
            next_timer: Cell::new(0),
            driver,
            origin: Instant::now(),
        }))
    }

    pub(crate) fn remote(&self) -> Arc<Remote> {
        self.remote.clone()
    }

    /// Runs tasks until `root` is done.
    pub(crate) fn block_on<F: Future>(self: &Rc<Self>, root: F) -> F::Output {
        let _entered = self.enter();
        let mut root = pin!(root);
        let waker = Waker::from(Arc::new(RootWaker(self.remote.clone())));
        loop {
            if self.remote.root.swap(false, Ordering::SeqCst)
                && let Poll::Ready(output) = root.as_mut().poll(&mut Context::from_waker(&waker))
            {
                return output;
            }
            self.turn();
        }
    }

    /// Runs tasks until told to stop.
    pub(crate) fn run(self: &Rc<Self>) {
        let _entered = self.enter();
        self.remote.root.store(false, Ordering::SeqCst);
        while !self.remote.stopping.load(Ordering::SeqCst) || !self.ready.borrow().is_empty() {
            self.turn();
        }
    }

    fn enter(self: &Rc<Self>) -> (rt::Entered, Here) {
        let before = HERE.replace(Some(self.clone()));
        (rt::enter(self.clone()), Here { before })
    }

    fn turn(&self) {
        for _ in 0..TURN {
            let Some(task) = self.ready.borrow_mut().pop_front() else { break };
            task.run();
        }
        self.take_remote();
        self.fire_timers();
        if !self.ready.borrow().is_empty() || self.remote.root.load(Ordering::SeqCst) {
            self.driver.collect(Some(Duration::ZERO));
            return;
        }
        self.remote.sleeping.store(true, Ordering::SeqCst);
        self.take_remote();
        let woken = !self.ready.borrow().is_empty()
            || self.remote.root.load(Ordering::SeqCst)
            || self.remote.stopping.load(Ordering::SeqCst);
        let wait = if woken {
            Some(Duration::ZERO)
        } else {
            self.timers.borrow().peek().map(|Reverse(timer)| timer.at.saturating_sub(self.now()))
        };
        self.driver.collect(wait);
        self.remote.sleeping.store(false, Ordering::SeqCst);
    }

    fn take_remote(&self) {
        let tasks = std::mem::take(&mut *self.remote.queue.lock().unwrap_or_else(PoisonError::into_inner));
        self.ready.borrow_mut().extend(tasks);
    }

    fn fire_timers(&self) {
        if self.timers.borrow().is_empty() {
            return;
        }
        let now = self.now();
        loop {
            let due = {
                let mut timers = self.timers.borrow_mut();
                match timers.peek() {
                    Some(Reverse(timer)) if timer.at <= now => timers.pop(),
                    _ => None,
                }
            };
            match due {
                Some(Reverse(timer)) => timer.waker.wake(),
                None => break,
            }
        }
    }
}

struct Here {
    before: Option<Rc<Executor>>,
}

impl Drop for Here {
    fn drop(&mut self) {
        HERE.replace(self.before.take());
    }
}

//! One thread, one seed, one run: tasks take turns in a random order, and time passes only when nobody can move.
//!
//! Whatever the code under test does, it does through [`underlay_sys::rt`]; so the same seed gives the same run.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use underlay_sys::rt::{self, Runtime, Task};

use crate::rng::Rng;

/// A run that takes more turns than this makes no progress.
const MOST_TURNS: u64 = 20_000_000;

/// The id of the future given to [`World::run`].
const MAIN: u64 = 0;

/// Whose turn it may be.
type Ready = Arc<Mutex<Vec<u64>>>;

/// A task, away while it has its turn, and what wakes it.
type Sleeper = (Option<Task>, Arc<Alarm>);

struct Alarm {
    id: u64,
    queued: AtomicBool,
    ready: Ready,
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, Ordering::SeqCst) {
            self.ready.lock().unwrap_or_else(PoisonError::into_inner).push(self.id);
        }
    }
}

/// The simulated world. Everything in it ends with it.
pub struct World {
    inner: Rc<Inner>,
}

struct Inner {
    seed: u64,
    ready: Ready,
    tasks: RefCell<BTreeMap<u64, Sleeper>>,
    timers: RefCell<BTreeMap<(Duration, u64), Waker>>,
    clock: Cell<Duration>,
    next: Cell<u64>,
    rng: RefCell<Rng>,
}

impl World {
    /// A world in which everything depends on `seed` alone.
    pub fn new(seed: u64) -> Self {
        let inner = Inner {
            seed,
            ready: Arc::default(),
            tasks: RefCell::default(),
            timers: RefCell::default(),
            clock: Cell::new(Duration::ZERO),
            next: Cell::new(MAIN + 1),
            rng: RefCell::new(Rng::new(seed)),
        };
        Self { inner: Rc::new(inner) }
    }

    /// Runs `future`, and all tasks that it spawns, until it is done.
    ///
    /// # Panics
    /// When all wait for each other, and when a run does not come to an end; the message has the seed.
    pub fn run<F: Future>(&self, future: F) -> F::Output {
        let inner = &self.inner;
        let _entered = rt::enter(inner.clone());
        let alarm = inner.alarm(MAIN);
        alarm.clone().wake();
        let main_waker = Waker::from(alarm.clone());
        let mut main = pin!(future);
        for _ in 0..MOST_TURNS {
            let Some(id) = inner.pick() else {
                inner.pass_time();
                continue;
            };
            if id != MAIN {
                inner.turn(id);
                continue;
            }
            alarm.queued.store(false, Ordering::SeqCst);
            if let Poll::Ready(output) = main.as_mut().poll(&mut Context::from_waker(&main_waker)) {
                return output;
            }
        }
        panic!("UNDERLAY_SEED={}: no end after {MOST_TURNS} turns, at {:?}", inner.seed, inner.clock.get());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Tasks may refer to the runtime on their way out.
        let _entered = rt::enter(self.inner.clone());
        let tasks = std::mem::take(&mut *self.inner.tasks.borrow_mut());
        drop(tasks);
        self.inner.timers.borrow_mut().clear();
    }
}

impl Inner {
    fn alarm(&self, id: u64) -> Arc<Alarm> {
        Arc::new(Alarm { id, queued: AtomicBool::new(false), ready: self.ready.clone() })
    }

    fn number(&self) -> u64 {
        self.next.replace(self.next.get() + 1)
    }

    fn pick(&self) -> Option<u64> {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        (!ready.is_empty()).then(|| {
            let at = self.rng.borrow_mut().index(ready.len());
            ready.swap_remove(at)
        })
    }

    fn turn(&self, id: u64) {
        let (mut task, alarm) = {
            let mut tasks = self.tasks.borrow_mut();
            let Some((task, alarm)) = tasks.get_mut(&id) else { return };
            let Some(task) = task.take() else { return };
            (task, alarm.clone())
        };
        alarm.queued.store(false, Ordering::SeqCst);
        let waker = Waker::from(alarm);
        let done = task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let mut tasks = self.tasks.borrow_mut();
        if done {
            tasks.remove(&id);
        } else if let Some((place, _)) = tasks.get_mut(&id) {
            *place = Some(task);
        }
    }

    /// Nobody can move: on to the next moment at which somebody wants to be woken.
    fn pass_time(&self) {
        let Some(((at, _), waker)) = self.timers.borrow_mut().pop_first() else {
            let waiting: Vec<_> = self.tasks.borrow().keys().copied().collect();
            panic!("UNDERLAY_SEED={}: everybody waits: the main task and {waiting:?}", self.seed);
        };
        self.clock.set(self.clock.get().max(at));
        waker.wake();
    }
}

impl Runtime for Inner {
    fn spawn(&self, task: Task) {
        let id = self.number();
        let alarm = self.alarm(id);
        self.tasks.borrow_mut().insert(id, (Some(task), alarm.clone()));
        alarm.wake();
    }
    fn help(&self, task: Task) -> Result<(), Task> {
        if self.rng.borrow_mut().index(2) == 0 {
            return Err(task);
        }
        self.spawn(task);
        Ok(())
    }
    fn now(&self) -> Duration {
        self.clock.get()
    }
    fn wake_at(&self, at: Duration, waker: Waker) {
        self.timers.borrow_mut().insert((at, self.number()), waker);
    }
    /// Work is spread as over several threads, and takes turns like any other.
    fn lanes(&self) -> usize {
        3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(seed: u64) -> Vec<u64> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        World::new(seed).run(async {
            let tasks: Vec<_> = (0..8u64)
                .map(|n| {
                    let seen = seen.clone();
                    rt::spawn(async move {
                        rt::yield_now().await;
                        seen.lock().unwrap().push(n);
                        rt::sleep(Duration::from_secs(n % 3)).await;
                        seen.lock().unwrap().push(n + 100);
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
            assert_eq!(rt::now(), Duration::from_secs(2));
        });
        let seen = seen.lock().unwrap();
        seen.clone()
    }

    #[test]
    fn a_seed_is_a_run() {
        assert_eq!(trace(1), trace(1));
        assert!((0..20).any(|seed| trace(seed) != trace(1)));
    }

    #[test]
    #[should_panic(expected = "UNDERLAY_SEED=7: everybody waits")]
    fn who_waits_for_ever_is_told() {
        World::new(7).run(std::future::pending::<()>());
    }
}

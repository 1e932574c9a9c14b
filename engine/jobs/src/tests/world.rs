//! A seeded executor with a virtual clock: which task runs next is drawn by lot, and every step takes a
//! little time, and where nothing can happen the next timer is at once.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use underlay_sys::rt::{self, Runtime, Task};

/// Numbers by lot.
#[derive(Clone, Debug)]
pub struct Lot(u64);

impl Lot {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

#[derive(Default)]
struct Ready(Mutex<Vec<usize>>);

struct WakeTask {
    ready: Arc<Ready>,
    id: usize,
}

impl Wake for WakeTask {
    fn wake(self: Arc<Self>) {
        let mut ready = self.ready.0.lock().unwrap();
        if !ready.contains(&self.id) {
            ready.push(self.id);
        }
    }
}

#[derive(Default)]
struct Inner {
    tasks: Vec<Option<Task>>,
    timers: BTreeMap<(Duration, usize), Waker>,
    now: Duration,
    next_timer: usize,
}

struct World {
    inner: RefCell<Inner>,
    ready: Arc<Ready>,
}

impl Runtime for World {
    fn spawn(&self, task: Task) {
        let mut inner = self.inner.borrow_mut();
        inner.tasks.push(Some(task));
        self.ready.0.lock().unwrap().push(inner.tasks.len() - 1);
    }
    fn now(&self) -> Duration {
        self.inner.borrow().now
    }
    fn wake_at(&self, at: Duration, waker: Waker) {
        let mut inner = self.inner.borrow_mut();
        let id = inner.next_timer;
        inner.next_timer += 1;
        inner.timers.insert((at, id), waker);
    }
}

/// Runs `main` and all tasks it spawns until `main` is done.
pub fn run<F: Future<Output = T> + Send + 'static, T: Send + 'static>(seed: u64, main: F) -> T {
    let world = Rc::new(World { inner: RefCell::default(), ready: Arc::default() });
    let _entered = rt::enter(world.clone());
    let result: Arc<Mutex<Option<T>>> = Arc::default();
    let slot = result.clone();
    world.spawn(Box::pin(async move {
        let value = main.await;
        *slot.lock().unwrap() = Some(value);
    }));
    let mut lot = Lot::new(seed);
    loop {
        if let Some(value) = result.lock().unwrap().take() {
            return value;
        }
        let due = {
            let mut inner = world.inner.borrow_mut();
            inner.now += Duration::from_micros(lot.below(20));
            let now = inner.now;
            inner.timers.first_entry().filter(|first| first.key().0 <= now).map(|first| first.remove())
        };
        due.into_iter().for_each(Waker::wake);
        let next = {
            let mut ready = world.ready.0.lock().unwrap();
            let count = ready.len() as u64;
            (count > 0).then(|| ready.swap_remove(lot.below(count) as usize))
        };
        let Some(id) = next else {
            let mut inner = world.inner.borrow_mut();
            let ((at, _), waker) = inner.timers.pop_first().expect("somebody can go on");
            inner.now = inner.now.max(at);
            drop(inner);
            waker.wake();
            continue;
        };
        let Some(mut task) = world.inner.borrow_mut().tasks[id].take() else { continue };
        let waker = Waker::from(Arc::new(WakeTask { ready: world.ready.clone(), id }));
        if Pin::new(&mut task).poll(&mut Context::from_waker(&waker)).is_pending() {
            world.inner.borrow_mut().tasks[id] = Some(task);
        }
    }
}

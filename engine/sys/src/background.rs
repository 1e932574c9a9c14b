//! Background work on a thread that serves guests.
//!
//! Jobs would copy on one thread as fast as the hardware goes, and a guest's request would wait behind them. So
//! background tasks run a step at a time: at once while no guest has asked for anything for [`QUIET`], and else only
//! as long as they have had no more than one part in [`SHARE`] of the time. A step cannot be cut short by anybody,
//! not even in favour of a client on the same processor, so while guests are busy it copies at most [`SLICE`].

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_task::Runnable;

/// A guest that has asked for nothing for so long will not notice one step. A guest that waits for each answer asks
/// again within some tens of microseconds.
const QUIET: Duration = Duration::from_micros(200);

/// One part in so many of the time is the background's while guests are busy.
const SHARE: u32 = 2;

/// Bytes that the kernel is asked to copy in one step while guests are busy: some tens of microseconds.
const SLICE: usize = 128 << 10;

thread_local! {
    /// In a step of a background task, and some guest is busy.
    static GIVES_WAY: Cell<bool> = const { Cell::new(false) };
    /// In a step of a background task.
    static IS_STEP: Cell<bool> = const { Cell::new(false) };
}

/// Whether the task that runs is one of the background.
pub(crate) fn is_step() -> bool {
    IS_STEP.get()
}

/// How many bytes the running task may have the kernel copy before it lets others go first. `None`: any number.
pub(crate) fn slice() -> Option<usize> {
    GIVES_WAY.get().then_some(SLICE)
}

/// When a guest of any thread of a crew last asked for something, in nanoseconds of the executors' clock.
#[derive(Default)]
pub(crate) struct Pulse(AtomicU64);

impl Pulse {
    /// Written seldom: all threads read it.
    fn beat(&self, now: Duration) {
        let (now, quiet) = (nanos(now), nanos(QUIET));
        if now.saturating_sub(self.0.load(Ordering::Relaxed)) > quiet / 4 {
            self.0.store(now, Ordering::Relaxed);
        }
    }

    fn is_quiet(&self, now: Duration) -> bool {
        nanos(now).saturating_sub(self.0.load(Ordering::Relaxed)) > nanos(QUIET)
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What became of a chance to run a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// There is nothing to do.
    Idle,
    /// Not yet: in so long.
    Later(Duration),
    /// A task ran.
    Ran,
}

/// The background tasks of one thread. Times are those of the executor's clock.
#[derive(Default)]
pub(crate) struct Background {
    tasks: RefCell<VecDeque<Runnable>>,
    /// When a foreground task last ran.
    guest_ran: Cell<Duration>,
    step_began: Cell<Duration>,
    /// While guests are busy, the next step runs no sooner.
    not_before: Cell<Duration>,
}

impl Background {
    pub(crate) fn push(&self, task: Runnable) {
        self.tasks.borrow_mut().push_back(task);
    }

    /// For one that has begun, and whose time has come again: who goes through a disk has more work to give to others,
    /// and who is nearly done holds memory.
    pub(crate) fn push_first(&self, task: Runnable) {
        self.tasks.borrow_mut().push_front(task);
    }

    pub(crate) fn pop(&self) -> Option<Runnable> {
        self.tasks.borrow_mut().pop_front()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tasks.borrow().is_empty()
    }

    /// A foreground task has run.
    pub(crate) fn gave_way(&self, now: Duration, pulse: &Pulse) {
        self.guest_ran.set(now);
        pulse.beat(now);
    }

    /// Runs one task, if there is one and it may.
    pub(crate) fn step(&self, clock: impl Fn() -> Duration, pulse: &Pulse) -> Step {
        if self.is_empty() {
            return Step::Idle;
        }
        let now = clock();
        let allowed = self.not_before.get().min(self.guest_ran.get() + QUIET);
        if now < allowed {
            return Step::Later(allowed - now);
        }
        let Some(task) = self.pop() else { return Step::Idle };
        self.step_began.set(now);
        GIVES_WAY.set(!pulse.is_quiet(now));
        IS_STEP.set(true);
        task.run();
        IS_STEP.set(false);
        GIVES_WAY.set(false);
        Step::Ran
    }

    /// What the step has started is with the kernel now.
    pub(crate) fn end_step(&self, now: Duration) {
        let took = now.saturating_sub(self.step_began.get());
        self.not_before.set(now + took * (SHARE - 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    const US: Duration = Duration::from_micros(1);

    /// A background with one task that is ready, and how often it has run.
    fn busy() -> (Arc<Mutexed>, Arc<AtomicU32>) {
        let background = Arc::new(Mutexed::default());
        let runs = Arc::new(AtomicU32::new(0));
        let count = runs.clone();
        let task = async move {
            loop {
                count.fetch_add(1, Ordering::Relaxed);
                crate::rt::yield_now().await;
            }
        };
        let to = background.clone();
        let (runnable, task) = async_task::spawn(task, move |runnable| to.0.lock().unwrap().push(runnable));
        task.detach();
        runnable.schedule();
        (background, runs)
    }

    /// As on an executor, but for any thread.
    #[derive(Default)]
    struct Mutexed(std::sync::Mutex<Vec<Runnable>>);

    impl Mutexed {
        fn step(&self, background: &Background, now: Duration) -> Step {
            let woken = std::mem::take(&mut *self.0.lock().unwrap());
            woken.into_iter().for_each(|task| background.push(task));
            background.step(|| now, &Pulse::default())
        }
    }

    #[test]
    fn it_runs_freely_while_no_guest_asks() {
        let (tasks, runs) = busy();
        let background = Background::default();
        for turn in 1..10 {
            let now = QUIET + turn * 10 * US;
            assert_eq!(tasks.step(&background, now), Step::Ran);
            background.end_step(now + 5 * US);
        }
        assert_eq!(runs.load(Ordering::Relaxed), 9);
    }

    #[test]
    fn it_gets_its_share_while_guests_are_busy() {
        let (tasks, runs) = busy();
        let background = Background::default();
        let (mut now, mut in_steps) = (QUIET, Duration::ZERO);
        while now < Duration::from_millis(100) {
            now += 10 * US;
            background.gave_way(now, &Pulse::default());
            if tasks.step(&background, now) == Step::Ran {
                now += 30 * US;
                in_steps += 30 * US;
                background.end_step(now);
            }
        }
        assert!(in_steps <= now / SHARE, "{in_steps:?} of {now:?}");
        assert!(in_steps >= now / (SHARE + 1), "{in_steps:?} of {now:?}");
        assert!(runs.load(Ordering::Relaxed) > 0);
    }
}

//! Tasks and time for code that must not name an executor.
//!
//! The I/O threads and the simulated world each implement [`Runtime`] and [`enter`] it on their thread; the
//! graph, the formats and the jobs only call the functions here. A task stays on the thread that spawned it.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// A task without a result, as an executor takes it.
pub type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The executor of one thread.
pub trait Runtime {
    /// Runs `task` on this thread, to its end.
    fn spawn(&self, task: Task);
    /// Time since some fixed moment; never goes back.
    fn now(&self) -> Duration;
    /// Wakes `waker` once `now()` has reached `at`.
    fn wake_at(&self, at: Duration, waker: Waker);
    /// How many threads share the background work that begins here; see [`spawn_background`].
    fn lanes(&self) -> usize {
        1
    }
    /// Runs `task` on another thread, or gives it back: better here.
    fn help(&self, task: Task) -> Result<(), Task> {
        Err(task)
    }
    /// Runs `task` in the background of a lane.
    fn spawn_background(&self, _lane: usize, task: Task) {
        self.spawn(task);
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<dyn Runtime>>> = const { RefCell::new(None) };
}

/// Makes `runtime` this thread's executor until the guard goes.
pub fn enter(runtime: Rc<dyn Runtime>) -> Entered {
    Entered { before: CURRENT.replace(Some(runtime)) }
}

/// See [`enter`].
#[must_use = "the runtime is left when this is dropped"]
pub struct Entered {
    before: Option<Rc<dyn Runtime>>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.replace(self.before.take());
    }
}

fn current() -> Rc<dyn Runtime> {
    CURRENT.with_borrow(|current| current.clone()).expect("called on an I/O thread")
}

/// Runs `future` as a task of this thread. It runs to its end whether or not the handle is kept.
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    let (sender, receiver) = tokio::sync::oneshot::channel();
    current().spawn(Box::pin(async move {
        let _ = sender.send(future.await);
    }));
    JoinHandle { receiver }
}

/// Says whether other requests wait until the task that runs now lets go of this thread, for [`spread`].
pub fn press(is_pressed: bool) {
    crate::exec::press(is_pressed);
}

/// Runs `future`, which keeps a processor busy for long: on another thread that has time for it, if others wait for
/// this one, and else here. What belongs to the background stays here.
pub async fn spread<F>(future: F) -> F::Output
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let task: Task = Box::pin(async move {
        let _ = sender.send(future.await);
    });
    // Whoever needs nothing else of an executor can do without one.
    let back = match CURRENT.with_borrow(|current| current.clone()) {
        Some(current) => current.help(task),
        None => Err(task),
    };
    if let Err(task) = back {
        task.await;
    }
    JoinHandle { receiver }.await
}

/// How many threads, this one included, share background work that begins here: the lanes of
/// [`spawn_background`].
pub fn lanes() -> usize {
    current().lanes()
}

/// Runs `future` on the thread of a lane, 0 for this one, where it gives way to guests: as long as they have
/// requests, background tasks get a part of the time only.
pub fn spawn_background<F>(lane: usize, future: F)
where
    F: Future<Output = ()> + Send + 'static,
{
    current().spawn_background(lane, Box::pin(future));
}

/// Waits for a task's result.
#[derive(Debug)]
pub struct JoinHandle<T> {
    receiver: tokio::sync::oneshot::Receiver<T>,
}

impl<T> Future for JoinHandle<T> {
    type Output = T;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        // A task ends early only by a panic, which has been reported already; its waiter goes down with it.
        Pin::new(&mut self.receiver).poll(cx).map(|result| result.expect("the task did not panic"))
    }
}

/// Time since some fixed moment of this thread's clock (virtual in the simulated world).
pub fn now() -> Duration {
    current().now()
}

/// Waits for `time` to pass.
pub async fn sleep(time: Duration) {
    sleep_until(now().saturating_add(time)).await;
}

/// Waits until [`now`] has reached `at`.
pub async fn sleep_until(at: Duration) {
    // A future may be polled by another task later on; the last one is to be woken.
    let mut armed: Option<Waker> = None;
    std::future::poll_fn(move |cx| {
        if now() >= at {
            return Poll::Ready(());
        }
        if !armed.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            current().wake_at(at, cx.waker().clone());
            armed = Some(cx.waker().clone());
        }
        Poll::Pending
    })
    .await;
}

/// The output of `future`, or nothing if [`now`] reaches `deadline` before it, if there is one. Only for futures that
/// may be dropped midway: most of this program's may not.
pub async fn by<F: Future>(deadline: Option<Duration>, future: F) -> Option<F::Output> {
    let Some(at) = deadline else { return Some(future.await) };
    let (mut future, mut alarm) = (std::pin::pin!(future), std::pin::pin!(sleep_until(at)));
    std::future::poll_fn(move |cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => alarm.as_mut().poll(cx).map(|()| None),
    })
    .await
}

/// Lets the other tasks of this thread run first.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(move |cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// A stop sign that many tasks can read and wait for: cancel by flag, never by dropping a future.
#[derive(Clone, Debug, Default)]
pub struct StopSign {
    shared: Arc<(AtomicBool, tokio::sync::Notify)>,
}

impl StopSign {
    /// Raises the sign for good.
    pub fn raise(&self) {
        self.shared.0.store(true, Ordering::SeqCst);
        self.shared.1.notify_waiters();
    }

    /// Whether it is raised.
    pub fn is_raised(&self) -> bool {
        self.shared.0.load(Ordering::SeqCst)
    }

    /// Waits until it is raised.
    pub async fn raised(&self) {
        let notified = self.shared.1.notified();
        let mut notified = std::pin::pin!(notified);
        notified.as_mut().enable();
        if !self.is_raised() {
            notified.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::thread::block_on;

    #[test]
    fn who_polled_last_is_woken_from_sleep() {
        block_on(async {
            let mut nap = Box::pin(sleep(Duration::from_millis(2)));
            assert!(nap.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            // Without its own alarm this would sleep for ever.
            spawn(nap).await;
        });
    }
}

//! The threads that requests run on.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use crate::complain;

use crate::exec::{self, Class, Core, Crew, Remote};

/// A thread with an executor of its own. When it is dropped the thread ends.
pub struct IoThread {
    remote: Arc<Remote>,
    number: i32,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts a thread.
    pub fn start(name: &str) -> io::Result<Self> {
        Self::start_in(name, Arc::default())
    }

    /// Starts `count` threads, called `prefix` and a number from 0 on, that share background work
    /// ([`crate::rt::spawn_background`]).
    pub fn start_crew(prefix: &str, count: usize) -> io::Result<Vec<Self>> {
        let crew = Arc::<Crew>::default();
        let threads: Vec<_> = (0..count)
            .map(|at| Self::start_in(&format!("{prefix}{at}"), crew.clone()))
            .collect::<io::Result<_>>()?;
        crew.complete(threads.iter().map(|thread| thread.remote.clone()).collect());
        Ok(threads)
    }

    fn start_in(name: &str, crew: Arc<Crew>) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let executor = match Core::member(crew) {
                Ok(executor) => executor,
                Err(error) => {
                    let _ = sender.send(Err(error));
                    return;
                }
            };
            let number = rustix::thread::gettid().as_raw_nonzero().get();
            let _ = sender.send(Ok((executor.remote(), number)));
            // A task that panics leaves its requests without an answer: better no daemon than one that hangs.
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| executor.run_until_stopped()))
                .is_err()
            {
                complain!("an I/O thread panicked; ending");
                std::process::abort();
            }
        })?;
        let (remote, number) =
            receiver.recv().map_err(|_| io::Error::other("the I/O thread did not start"))??;
        Ok(Self { remote, number, thread: Some(thread) })
    }

    /// Its number among the system's threads, for who wants to choose its processors.
    pub fn number(&self) -> i32 {
        self.number
    }

    /// A handle for giving the thread work.
    pub fn spawner(&self) -> Spawner {
        Spawner { remote: self.remote.clone() }
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.remote.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Gives work to an I/O thread, from any thread.
#[derive(Clone)]
pub struct Spawner {
    remote: Arc<Remote>,
}

impl std::fmt::Debug for Spawner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Spawner")
    }
}

impl Spawner {
    /// Runs `task` there, to its end.
    pub fn spawn<F: Future<Output = ()> + Send + 'static>(&self, task: F) {
        self.remote.spawn(Class::Foreground, task);
    }

    /// Runs `task` there, to its end, in the background: it gives way to guests' requests.
    pub fn spawn_background<F: Future<Output = ()> + Send + 'static>(&self, task: F) {
        self.remote.spawn(Class::Background, task);
    }

    /// Runs `task` there and waits for its result here.
    pub async fn run<F>(&self, task: F) -> F::Output
    where
        F: Future + Send + 'static,
        F::Output: Send,
    {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        self.spawn(async move {
            let _ = sender.send(task.await);
        });
        receiver.await.expect("the task did not panic")
    }
}

/// Runs an executor on this thread until `future` is done. Tasks that are left then are dropped.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let executor = Core::new().expect("an event file descriptor for this thread");
    executor.block_on(future)
}

/// A handle to the executor of the calling thread.
pub fn current() -> Spawner {
    Spawner { remote: exec::home().expect("called on an I/O thread").remote() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rt;
    use std::task::{Context, Poll};
    use std::time::Duration;

    #[test]
    fn tasks_timers_and_threads() {
        let thread = IoThread::start("test").expect("starts");
        let spawner = thread.spawner();
        let sum = block_on(async move {
            let here = rt::spawn(async {
                rt::sleep(Duration::from_millis(1)).await;
                rt::yield_now().await;
                1
            });
            let there = spawner.run(async { rt::spawn(async { 2 }).await });
            here.await + there.await
        });
        assert_eq!(sum, 3);
    }

    #[test]
    fn a_crew_shares_background_work() {
        let threads = IoThread::start_crew("crew", 3).expect("they start");
        let names = block_on(threads[1].spawner().run(async {
            let (to, mut from) = tokio::sync::mpsc::unbounded_channel();
            for lane in 0..rt::lanes() {
                let to = to.clone();
                rt::spawn_background(lane, async move {
                    rt::yield_now().await;
                    let _ = to.send((lane, std::thread::current().name().map(str::to_owned)));
                });
            }
            let mut names = Vec::new();
            for _ in 0..rt::lanes() {
                names.extend(from.recv().await);
            }
            names
        }));
        let mut names: Vec<_> =
            names.into_iter().map(|(lane, name)| (lane, name.unwrap_or_default())).collect();
        names.sort();
        assert_eq!(names, [(0, "crew1".into()), (1, "crew2".into()), (2, "crew0".into())]);
    }

    #[test]
    fn background_work_that_was_begun_goes_first_and_who_yields_goes_last() {
        let thread = IoThread::start("order").expect("starts");
        let order = block_on(thread.spawner().run(async {
            let (say, mut said) = tokio::sync::mpsc::unbounded_channel();
            let (wake, woken) = tokio::sync::oneshot::channel::<()>();
            let to = say.clone();
            rt::spawn_background(0, async move {
                let _ = woken.await;
                let _ = to.send("waiter");
            });
            let to = say.clone();
            rt::spawn_background(0, async move {
                let _ = wake.send(());
                rt::yield_now().await;
                let _ = to.send("yielder");
            });
            rt::spawn_background(0, async move {
                let _ = say.send("new");
            });
            let mut order = Vec::new();
            while let Some(who) = said.recv().await {
                order.push(who);
            }
            order
        }));
        assert_eq!(order, ["waiter", "new", "yielder"]);
    }

    #[test]
    fn who_is_pressed_is_helped_as_far_as_the_others_have_room() {
        let threads = IoThread::start_crew("pressed", 2).expect("they start");
        let done = block_on(threads[0].spawner().run(async {
            let name = || std::thread::current().name().unwrap_or_default().to_owned();
            let alone = rt::spread(async move { name() }).await;
            rt::press(true);
            let (go, all_go) = tokio::sync::watch::channel(false);
            let work = || {
                let mut all_go = all_go.clone();
                // Nobody drops the sender before.
                Box::pin(rt::spread(async move { all_go.wait_for(|go| *go).await.map(|_| name()).ok() }))
            };
            let mut works = [work(), work(), work()];
            // Each begins in the order in which it is polled.
            for work in &mut works {
                let mut poll = |cx: &mut Context<'_>| Poll::Ready(work.as_mut().poll(cx).is_pending());
                assert!(std::future::poll_fn(&mut poll).await);
            }
            go.send_replace(true);
            let mut names = vec![Some(alone)];
            for work in works {
                names.push(work.await);
            }
            // What is done makes room, sooner or later.
            while rt::spread(async move { name() }).await != "pressed1" {
                rt::yield_now().await;
            }
            rt::press(false);
            names
        }));
        let names: Vec<_> = done.into_iter().flatten().collect();
        assert_eq!(names, ["pressed0", "pressed1", "pressed1", "pressed0"]);
    }

    #[test]
    fn many_wakes_from_another_thread_arrive() {
        let thread = IoThread::start("test").expect("starts");
        let (to, mut from) = tokio::sync::mpsc::unbounded_channel();
        thread.spawner().spawn(async move {
            for n in 0..10_000_u64 {
                let _ = to.send(n);
                if n % 64 == 0 {
                    rt::yield_now().await;
                }
            }
        });
        let sum = block_on(async move {
            let mut sum = 0;
            while let Some(n) = from.recv().await {
                sum += n;
            }
            sum
        });
        assert_eq!(sum, 9_999 * 10_000 / 2);
    }
}

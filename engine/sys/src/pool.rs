//! The way without io_uring: a few threads for system calls that block, and `poll(2)` for descriptors.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::sync::{Condvar, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use slab::Slab;
use tokio::sync::oneshot;

use crate::exec::{Core, Driver, home};

/// Threads for blocking calls, in the whole process.
const THREADS: usize = 4;

type Job = Box<dyn FnOnce() + Send>;

struct Jobs {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

static JOBS: Mutex<Jobs> = Mutex::new(Jobs { queue: VecDeque::new(), threads: 0, idle: 0 });
static MORE: Condvar = Condvar::new();

/// Runs `call` on another thread and gives its result. On a thread without an executor: right here.
pub(crate) async fn run<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    if home().is_none() {
        return Ok(call());
    }
    let (sender, receiver) = oneshot::channel();
    push(Box::new(move || {
        let _ = sender.send(call());
    }))?;
    receiver.await.map_err(|_| io::Error::other("a helper thread died"))
}

fn push(job: Job) -> io::Result<()> {
    let mut jobs = JOBS.lock().unwrap_or_else(PoisonError::into_inner);
    if jobs.idle <= jobs.queue.len() && jobs.threads < THREADS {
        let started = std::thread::Builder::new().name("underlay-call".to_owned()).spawn(work);
        match started {
            Ok(_) => jobs.threads += 1,
            Err(error) if jobs.threads == 0 => return Err(error),
            Err(_) => {}
        }
    }
    jobs.queue.push_back(job);
    drop(jobs);
    MORE.notify_one();
    Ok(())
}

fn work() {
    let mut jobs = JOBS.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        while let Some(job) = jobs.queue.pop_front() {
            drop(jobs);
            job();
            jobs = JOBS.lock().unwrap_or_else(PoisonError::into_inner);
        }
        jobs.idle += 1;
        jobs = MORE.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        jobs.idle -= 1;
    }
}

struct Wait {
    fd: i32,
    events: i16,
    waker: Option<Waker>,
    ready: bool,
}

/// Who waits for which descriptor on one thread.
pub(crate) struct Waits {
    event_fd: i32,
    waits: RefCell<Slab<Wait>>,
}

impl Waits {
    pub(crate) fn new(event_fd: i32) -> Self {
        Self { event_fd, waits: RefCell::default() }
    }

    /// Waits up to `timeout` and wakes whose descriptors are ready. Whether the eventfd was written.
    pub(crate) fn turn(&self, timeout: Option<Duration>) -> bool {
        let mut keys = Vec::new();
        let mut fds = vec![libc::pollfd { fd: self.event_fd, events: libc::POLLIN, revents: 0 }];
        for (key, wait) in self.waits.borrow().iter().filter(|(_, wait)| !wait.ready) {
            keys.push(key);
            fds.push(libc::pollfd { fd: wait.fd, events: wait.events, revents: 0 });
        }
        if poll(&mut fds, timeout) == 0 {
            return false;
        }
        let mut wake = Vec::new();
        for (key, fd) in keys.into_iter().zip(&fds[1..]).filter(|(_, fd)| fd.revents != 0) {
            if let Some(wait) = self.waits.borrow_mut().get_mut(key) {
                wait.ready = true;
                wake.extend(wait.waker.take());
            }
            let _ = fd;
        }
        wake.into_iter().for_each(Waker::wake);
        let signalled = fds[0].revents != 0;
        if signalled {
            let mut counter = [0_u8; 8];
            // SAFETY: reads at most eight bytes into a buffer of eight.
            unsafe { libc::read(self.event_fd, counter.as_mut_ptr().cast(), 8) };
        }
        signalled
    }
}

/// `poll(2)`; how many are ready, none on a signal.
pub(crate) fn poll(fds: &mut [libc::pollfd], timeout: Option<Duration>) -> usize {
    let timeout = timeout.map(|timeout| libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `fds` and the time are borrowed for the call.
    let ready = unsafe { libc::ppoll(fds.as_mut_ptr(), fds.len() as u64, timeout, std::ptr::null()) };
    usize::try_from(ready).unwrap_or(0)
}

/// Takes the entry away again, however the wait ends.
struct Entry(usize);

impl Drop for Entry {
    fn drop(&mut self) {
        let gone = with_waits(|waits| waits.waits.borrow_mut().try_remove(self.0));
        drop(gone);
    }
}

fn with_waits<T>(f: impl FnOnce(&Waits) -> T) -> Option<T> {
    let core = home()?;
    let Core { driver: Driver::Threads(waits), .. } = &*core else { return None };
    Some(f(waits))
}

/// Waits until one of `events` is true of `fd`, without io_uring.
pub(crate) async fn ready(fd: i32, events: i16) {
    let wait = Wait { fd, events, waker: None, ready: false };
    let Some(key) = with_waits(|waits| waits.waits.borrow_mut().insert(wait)) else {
        poll(&mut [libc::pollfd { fd, events, revents: 0 }], None);
        return;
    };
    let entry = Entry(key);
    poll_fn(|cx| {
        let before = with_waits(|waits| {
            let mut waits = waits.waits.borrow_mut();
            match waits.get_mut(entry.0) {
                Some(wait) if !wait.ready => Some(wait.waker.replace(cx.waker().clone())),
                _ => None,
            }
        });
        if before.flatten().is_some() { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
}

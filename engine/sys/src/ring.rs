//! Asking the kernel through io_uring.
//!
//! An operation is a future whose slot owns everything that the kernel works on (buffer leases, the list of
//! their pieces) until the completion has come: a dropped future cannot take memory away from the kernel.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::types::{CancelBuilder, Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};
use slab::Slab;
use smallvec::SmallVec;

use crate::buf::Iov;
use crate::exec::{Core, Driver, home};

/// Entries of the submission queue. More operations than this can be under way.
const ENTRIES: u32 = 256;
/// Marks the read of the eventfd.
const EVENT: u64 = u64::MAX;
/// Marks the request to cancel everything.
const CANCEL: u64 = u64::MAX - 1;

/// What the kernel works on during an operation.
#[derive(Default)]
#[allow(dead_code)] // kept, not read
pub(crate) struct Held {
    /// The lease on the data.
    pub(crate) iov: Iov,
    /// Where its pieces are.
    pub(crate) vecs: SmallVec<[libc::iovec; 4]>,
    /// The file, so that its descriptor is not reused before the kernel has looked it up.
    pub(crate) file: Option<Arc<OwnedFd>>,
}

enum State {
    Waiting(Option<Waker>),
    Done(i32),
    /// Nobody asks any more.
    Orphan,
}

struct Slot {
    state: State,
    /// Never looked at; kept alive. Boxed, as the kernel has the address of the list of pieces.
    _held: Box<Held>,
}

struct Inner {
    ring: IoUring,
    slots: Slab<Slot>,
    /// Where the kernel puts the eventfd's counter.
    counter: Box<u64>,
    event_fd: i32,
    event_armed: bool,
}

/// The io_uring of one thread.
pub(crate) struct Ring {
    inner: RefCell<Inner>,
}

fn build() -> io::Result<IoUring> {
    // Completions are worked off when this thread asks, not by interrupting it (Linux 6.1); else the plain kind.
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .build(ENTRIES)
        .or_else(|_| IoUring::new(ENTRIES))
}

impl Ring {
    pub(crate) fn new(event_fd: i32) -> io::Result<Self> {
        let ring = build()?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        }
        let counter = Box::new(0);
        let inner = Inner { ring, slots: Slab::new(), counter, event_fd, event_armed: false };
        Ok(Self { inner: RefCell::new(inner) })
    }

    /// Submits what was asked, waits up to `timeout` for a completion, and wakes who waited for it. Whether the
    /// eventfd was written.
    pub(crate) fn turn(&self, timeout: Option<Duration>) -> bool {
        let mut wake = Vec::new();
        let mut drops = Vec::new();
        let signalled = {
            let mut inner = self.inner.borrow_mut();
            inner.arm_event();
            inner.enter(timeout);
            inner.reap(&mut wake, &mut drops)
        };
        wake.into_iter().for_each(Waker::wake);
        signalled
    }

    fn start(&self, entry: &Entry, held: Box<Held>) -> usize {
        let mut inner = self.inner.borrow_mut();
        let key = inner.slots.insert(Slot { state: State::Waiting(None), _held: held });
        let entry = entry.clone().user_data(key as u64);
        // SAFETY: all that the entry points at is owned by the slot, which lives until the completion.
        unsafe { inner.push(&entry) };
        key
    }

    /// Cancels what is under way and waits until the kernel has let go of everything.
    pub(crate) fn cancel_all(&self) {
        let mut inner = self.inner.borrow_mut();
        if inner.slots.is_empty() && !inner.event_armed {
            return;
        }
        let cancel = opcode::AsyncCancel2::new(CancelBuilder::any()).build().user_data(CANCEL);
        // SAFETY: the entry points at nothing.
        unsafe { inner.push(&cancel) };
        let (mut wake, mut drops) = (Vec::new(), Vec::new());
        while inner.event_armed || inner.slots.iter().any(|(_, slot)| !matches!(slot.state, State::Done(_))) {
            inner.enter(None);
            inner.reap(&mut wake, &mut drops);
        }
        drop(inner);
        // Waking would only put tasks into a queue that nobody runs; dropping the wakers drops the tasks.
        drop(wake);
    }
}

impl Inner {
    /// # Safety
    /// What `entry` points at must live until its completion.
    unsafe fn push(&mut self, entry: &Entry) {
        loop {
            // SAFETY: by the caller's promise.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            // The queue is full: hand it over. EBUSY and EAGAIN pass once completions are taken.
            if self.ring.submit().is_err() {
                std::thread::yield_now();
            }
        }
    }

    fn arm_event(&mut self) {
        if self.event_armed {
            return;
        }
        let read = opcode::Read::new(Fd(self.event_fd), std::ptr::from_mut(&mut *self.counter).cast(), 8);
        // SAFETY: the counter is boxed, lives as long as the ring, and `cancel_all` waits for this read.
        unsafe { self.push(&read.build().user_data(EVENT)) };
        self.event_armed = true;
    }

    fn enter(&mut self, timeout: Option<Duration>) {
        let result = match timeout {
            Some(Duration::ZERO) if self.is_quiet() => return,
            Some(Duration::ZERO) => self.ring.submit(),
            _ if !self.ring.completion().is_empty() => self.ring.submit(),
            None => self.ring.submit_and_wait(1),
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
            }
        };
        match result.map_err(|error| error.raw_os_error()) {
            Ok(_) | Err(Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
            Err(errno) => panic!("io_uring_enter failed with {errno:?}"),
        }
    }

    /// Nothing to submit, and no completion that waits for a call to be worked off.
    fn is_quiet(&mut self) -> bool {
        let queue = self.ring.submission();
        queue.is_empty() && !queue.taskrun() && !queue.cq_overflow()
    }

    fn reap(&mut self, wake: &mut Vec<Waker>, drops: &mut Vec<Slot>) -> bool {
        let mut signalled = false;
        let Self { ring, slots, event_armed, .. } = self;
        for completion in ring.completion() {
            let key = match completion.user_data() {
                EVENT => {
                    *event_armed = false;
                    signalled = true;
                    continue;
                }
                CANCEL => continue,
                key => usize::try_from(key).unwrap_or(usize::MAX),
            };
            let Some(slot) = slots.get_mut(key) else { continue };
            match std::mem::replace(&mut slot.state, State::Done(completion.result())) {
                State::Waiting(waker) => wake.extend(waker),
                State::Orphan => drops.push(slots.remove(key)),
                State::Done(_) => {}
            }
        }
        signalled
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.cancel_all();
    }
}

/// An operation under way.
pub(crate) struct Op {
    key: Option<usize>,
}

/// Starts an operation on the calling thread's ring. `None`: there is none, do it another way.
pub(crate) fn start(entry: &Entry, held: Box<Held>) -> Option<Op> {
    with_ring(|ring| Op { key: Some(ring.start(entry, held)) })
}

fn with_ring<T>(f: impl FnOnce(&Ring) -> T) -> Option<T> {
    let core = home()?;
    let Core { driver: Driver::Ring(ring), .. } = &*core else { return None };
    Some(f(ring))
}

impl Future for Op {
    type Output = io::Result<usize>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(key) = self.key else {
            return Poll::Ready(Err(io::Error::from_raw_os_error(libc::ECANCELED)));
        };
        // A task never leaves its thread (see `rt`), so the ring is the one that it started on.
        let result = with_ring(|ring| {
            let mut inner = ring.inner.borrow_mut();
            let slot = inner.slots.get_mut(key)?;
            match &mut slot.state {
                State::Done(result) => {
                    let result = *result;
                    Some(Ok((result, inner.slots.remove(key))))
                }
                state => {
                    let before = std::mem::replace(state, State::Waiting(Some(cx.waker().clone())));
                    Some(Err(before))
                }
            }
        });
        match result.flatten() {
            Some(Err(_)) => Poll::Pending,
            Some(Ok((result, _slot))) => {
                self.key = None;
                Poll::Ready(usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result)))
            }
            None => panic!("an operation is polled on the thread that started it"),
        }
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let slot = with_ring(|ring| {
            let mut inner = ring.inner.try_borrow_mut().ok()?;
            match inner.slots.get_mut(key)?.state {
                State::Done(_) => Some(inner.slots.remove(key).state),
                _ => Some(std::mem::replace(&mut inner.slots.get_mut(key)?.state, State::Orphan)),
            }
        });
        drop(slot);
    }
}

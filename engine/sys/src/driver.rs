//! What waits for the kernel: an io_uring, or, where that is not to be had, poll(2) and calls in place.
//!
//! An operation's buffers and file are kept here from its submission until its completion has arrived, so that no
//! future that goes away can free them under the kernel.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use slab::Slab;

use crate::buf::Iov;
use crate::exec;

/// Entries of the submission queue.
const ENTRIES: u32 = 256;
/// Marks the completion of the poll on our own eventfd.
const BELL: u64 = u64::MAX;
/// Most pieces of one buffer that go into one call; the rest goes into the next.
pub(crate) const MAX_PIECES: usize = 1024;

/// Wakes a thread that waits in its driver.
pub(crate) struct Bell {
    fd: Arc<OwnedFd>,
}

impl Bell {
    fn new() -> io::Result<Self> {
        let fd = rustix::event::eventfd(
            0,
            rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK,
        )?;
        Ok(Self { fd: Arc::new(fd) })
    }

    pub(crate) fn ring(&self) {
        let _ = rustix::io::write(&*self.fd, &1_u64.to_ne_bytes());
    }
}

/// One operation.
pub(crate) enum Request {
    Read {
        fd: Arc<OwnedFd>,
        offset: u64,
        into: Iov,
    },
    Write {
        fd: Arc<OwnedFd>,
        offset: u64,
        from: Iov,
    },
    DataSync {
        fd: Arc<OwnedFd>,
    },
    Allocate {
        fd: Arc<OwnedFd>,
        mode: i32,
        offset: u64,
        len: u64,
    },
    /// Until `fd` is ready for `events` (of poll(2)).
    Ready {
        fd: Arc<OwnedFd>,
        events: i16,
    },
}

enum Outcome {
    Waiting(Option<Waker>),
    Done(i32),
    /// Nobody waits for it any more.
    Orphan,
}

struct Slot {
    outcome: Outcome,
    /// Held until the completion; the kernel uses what it holds.
    request: Request,
    _pieces: Vec<libc::iovec>,
}

/// See the module.
pub(crate) struct Driver {
    kind: RefCell<Kind>,
    slots: RefCell<Slab<Slot>>,
    bell: Arc<OwnedFd>,
}

enum Kind {
    Ring(Box<IoUring>),
    /// The keys of those that wait for readiness.
    Poll(Vec<usize>),
}

impl Driver {
    pub(crate) fn new() -> io::Result<(Self, Bell)> {
        let bell = Bell::new()?;
        let forced = std::env::var_os("UNDERLAY_IO").is_some_and(|kind| kind == "threads");
        let ring = if forced { None } else { ring().ok() };
        let kind = ring.map_or_else(|| Kind::Poll(Vec::new()), |ring| Kind::Ring(Box::new(ring)));
        let driver = Self { kind: RefCell::new(kind), slots: RefCell::default(), bell: bell.fd.clone() };
        driver.listen_to_bell();
        Ok((driver, bell))
    }

    /// Whether operations run in the kernel's background; else they block this thread.
    pub(crate) fn is_ring(&self) -> bool {
        matches!(*self.kind.borrow(), Kind::Ring(_))
    }

    fn listen_to_bell(&self) {
        if let Kind::Ring(ring) = &mut *self.kind.borrow_mut() {
            let poll =
                opcode::PollAdd::new(Fd(self.bell.as_raw_fd()), u32::from(libc::POLLIN.unsigned_abs()));
            push(ring, &poll.build().user_data(BELL));
        }
    }

    fn submit(&self, request: Request, waker: &Waker) -> usize {
        let mut pieces = Vec::new();
        if let Request::Read { into: iov, .. } | Request::Write { from: iov, .. } = &request {
            pieces = iovecs(iov);
        }
        let key = self.slots.borrow().vacant_key();
        match &mut *self.kind.borrow_mut() {
            Kind::Ring(ring) => push(ring, &entry(&request, &pieces).user_data(key as u64)),
            Kind::Poll(waiting) => waiting.push(key),
        }
        let outcome = Outcome::Waiting(Some(waker.clone()));
        self.slots.borrow_mut().insert(Slot { outcome, request, _pieces: pieces })
    }

    /// Submits what is queued and collects completions, waiting for one at most so long (`None`: for ever).
    pub(crate) fn collect(&self, wait: Option<Duration>) {
        let mut done: smallvec::SmallVec<[(u64, i32); 32]> = smallvec::SmallVec::new();
        match &mut *self.kind.borrow_mut() {
            Kind::Ring(ring) => {
                let result = match wait {
                    Some(Duration::ZERO) => ring.submit_and_wait(0),
                    None => ring.submit_and_wait(1),
                    Some(time) => {
                        let time = Timespec::from(time);
                        ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time))
                    }
                };
                if let Err(error) = result {
                    let expected = [libc::ETIME, libc::EINTR, libc::EBUSY, libc::EAGAIN];
                    let known = error.raw_os_error().is_some_and(|errno| expected.contains(&errno));
                    assert!(known, "io_uring_enter: {error}");
                }
                done.extend(ring.completion().map(|entry| (entry.user_data(), entry.result())));
            }
            Kind::Poll(waiting) => poll_ready(waiting, &self.slots.borrow(), &self.bell, wait, &mut done),
        }
        for (key, result) in done {
            if key == BELL {
                let _ = rustix::io::read(&*self.bell, &mut [0_u8; 8]);
                self.listen_to_bell();
                continue;
            }
            self.complete(usize::try_from(key).expect("a key of ours"), result);
        }
    }

    fn complete(&self, key: usize, result: i32) {
        let mut slots = self.slots.borrow_mut();
        let Some(slot) = slots.get_mut(key) else { return };
        match std::mem::replace(&mut slot.outcome, Outcome::Done(result)) {
            Outcome::Orphan => drop(slots.remove(key)),
            Outcome::Waiting(waker) => {
                drop(slots);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Outcome::Done(_) => {}
        }
    }
}

/// A ring for one thread, with the features of newer kernels where they are there.
fn ring() -> io::Result<IoUring> {
    let mut newer = IoUring::builder();
    newer.setup_single_issuer().setup_defer_taskrun().setup_coop_taskrun();
    newer.build(ENTRIES).or_else(|_| IoUring::new(ENTRIES))
}

fn push(ring: &mut IoUring, entry: &squeue::Entry) {
    loop {
        // SAFETY: whatever the entry points to lives in its slot (or, for the bell, in the driver) until its
        // completion has been collected; the slab's slots own heap memory, which does not move.
        if unsafe { ring.submission().push(entry) }.is_ok() {
            return;
        }
        if let Err(error) = ring.submit() {
            let retry = [libc::EINTR, libc::EBUSY, libc::EAGAIN];
            assert!(
                error.raw_os_error().is_some_and(|errno| retry.contains(&errno)),
                "io_uring_enter: {error}"
            );
        }
    }
}

fn entry(request: &Request, pieces: &[libc::iovec]) -> squeue::Entry {
    let count = u32::try_from(pieces.len()).expect("at most MAX_PIECES");
    match request {
        Request::Read { fd, offset, .. } => {
            opcode::Readv::new(Fd(fd.as_raw_fd()), pieces.as_ptr(), count).offset(*offset).build()
        }
        Request::Write { fd, offset, .. } => {
            opcode::Writev::new(Fd(fd.as_raw_fd()), pieces.as_ptr(), count).offset(*offset).build()
        }
        Request::DataSync { fd } => {
            opcode::Fsync::new(Fd(fd.as_raw_fd())).flags(FsyncFlags::DATASYNC).build()
        }
        Request::Allocate { fd, mode, offset, len } => {
            opcode::Fallocate::new(Fd(fd.as_raw_fd()), *len).offset(*offset).mode(*mode).build()
        }
        Request::Ready { fd, events } => {
            opcode::PollAdd::new(Fd(fd.as_raw_fd()), u32::from(events.unsigned_abs())).build()
        }
    }
}

/// Addresses and lengths for the kernel, at most [`MAX_PIECES`] of them.
pub(crate) fn iovecs(iov: &Iov) -> Vec<libc::iovec> {
    let piece = |(at, len): (*mut u8, usize)| libc::iovec { iov_base: at.cast(), iov_len: len };
    iov.pieces().take(MAX_PIECES).map(piece).collect()
}

/// The fallback: calls that cannot wait elsewhere are made in place; the others wait in poll(2).
fn poll_ready(
    waiting: &mut Vec<usize>,
    slots: &Slab<Slot>,
    bell: &OwnedFd,
    wait: Option<Duration>,
    done: &mut smallvec::SmallVec<[(u64, i32); 32]>,
) {
    let mut polled = vec![libc::pollfd { fd: bell.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
    let mut keys = vec![BELL];
    waiting.retain(|key| match slots.get(*key).map(|slot| &slot.request) {
        Some(Request::Ready { fd, events }) => {
            polled.push(libc::pollfd { fd: fd.as_raw_fd(), events: *events, revents: 0 });
            keys.push(*key as u64);
            true
        }
        Some(request) => {
            done.push((*key as u64, in_place(request)));
            false
        }
        None => false,
    });
    let wait = if done.is_empty() { wait } else { Some(Duration::ZERO) };
    let millis = wait.map_or(-1, |wait| i32::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
    // SAFETY: `polled` is a live array of that many entries.
    unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, millis) };
    for (entry, key) in polled.iter().zip(keys).filter(|(entry, _)| entry.revents != 0) {
        done.push((key, i32::from(entry.revents)));
        waiting.retain(|waiting| *waiting as u64 != key);
    }
}

fn in_place(request: &Request) -> i32 {
    let offset = |offset: u64| libc::off_t::try_from(offset).unwrap_or(libc::off_t::MAX);
    let result = match request {
        Request::Read { fd, offset: at, into } => {
            let pieces = iovecs(into);
            // SAFETY: the pieces lie in memory that `into` keeps alive; the count is theirs.
            unsafe { libc::preadv(fd.as_raw_fd(), pieces.as_ptr(), count(&pieces), offset(*at)) }
        }
        Request::Write { fd, offset: at, from } => {
            let pieces = iovecs(from);
            // SAFETY: as above.
            unsafe { libc::pwritev(fd.as_raw_fd(), pieces.as_ptr(), count(&pieces), offset(*at)) }
        }
        // SAFETY: a call on an open file, without memory.
        Request::DataSync { fd } => unsafe { libc::fdatasync(fd.as_raw_fd()) as isize },
        // SAFETY: as above.
        Request::Allocate { fd, mode, offset: at, len } => unsafe {
            libc::fallocate(fd.as_raw_fd(), *mode, offset(*at), offset(*len)) as isize
        },
        Request::Ready { .. } => 0,
    };
    match result {
        -1 => -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
        count => i32::try_from(count).unwrap_or(i32::MAX),
    }
}

fn count(pieces: &[libc::iovec]) -> i32 {
    i32::try_from(pieces.len()).expect("at most MAX_PIECES")
}

/// Runs an operation; its result as the kernel's system call would have given it.
pub(crate) fn run(request: Request) -> Operation {
    Operation { request: Some(request), key: None }
}

/// See [`run`].
pub(crate) struct Operation {
    request: Option<Request>,
    key: Option<usize>,
}

impl Future for Operation {
    type Output = io::Result<usize>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let here = exec::here();
        let driver = &here.driver;
        if let Some(request) = self.request.take() {
            self.key = Some(driver.submit(request, cx.waker()));
            return Poll::Pending;
        }
        let key = self.key.expect("polled after its end");
        let mut slots = driver.slots.borrow_mut();
        match &mut slots[key].outcome {
            Outcome::Done(result) => {
                let result = *result;
                slots.remove(key);
                self.key = None;
                Poll::Ready(match usize::try_from(result) {
                    Ok(count) => Ok(count),
                    Err(_) => Err(io::Error::from_raw_os_error(-result)),
                })
            }
            outcome => {
                *outcome = Outcome::Waiting(Some(cx.waker().clone()));
                Poll::Pending
            }
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // Without an executor the ring is gone, and its operations with it.
        let (Some(key), Some(here)) = (self.key, exec::try_here()) else { return };
        let mut slots = here.driver.slots.borrow_mut();
        match slots[key].outcome {
            Outcome::Done(_) => drop(slots.remove(key)),
            _ => slots[key].outcome = Outcome::Orphan,
        }
    }
}

/// Waits until `fd` is ready for `events` (of poll(2)).
pub(crate) async fn ready(fd: &Arc<OwnedFd>, events: i16) -> io::Result<()> {
    run(Request::Ready { fd: fd.clone(), events }).await.map(|_| ())
}

/// A second descriptor for the same open file.
pub(crate) fn duplicate(fd: &impl AsFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3)?)
}

/// Takes over a descriptor that was handed to the process by number.
pub(crate) fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD only asks; an unknown number gives an error.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and by the meaning of `fd=` on a command line it is ours from now on.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

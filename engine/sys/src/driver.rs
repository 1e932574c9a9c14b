//! Waiting for descriptors, by io_uring or by `poll(2)`; and taking descriptors over.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use io_uring::{opcode, types};
use rustix::event::{PollFd, PollFlags};

use crate::{pool, ring};

/// Waits until `fd` is ready for `events` (of `poll(2)`), or has an error, which the next call on it tells. It may come
/// too early: who has written to a pipe wakes its reader a moment later, who may have read everything by then and be
/// waiting again.
pub(crate) async fn ready(fd: &Arc<OwnedFd>, events: i16) -> io::Result<()> {
    let mask = u32::from(events.cast_unsigned());
    let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), mask).build();
    let held = ring::Held { file: Some(fd.clone()), ..ring::Held::default() };
    match ring::start(&entry, Box::new(held)) {
        Some(op) => op.await.map(|_| ()),
        None => {
            pool::ready(fd.as_raw_fd(), events).await;
            Ok(())
        }
    }
}

/// The same, of something that blocks: a call would not, at this moment.
async fn certainly_ready(fd: &Arc<OwnedFd>, events: PollFlags) -> io::Result<()> {
    loop {
        // A file is always ready; a pipe or terminal when something can be read.
        ready(fd, events.bits().cast_signed()).await.or_else(|error| match error.raw_os_error() {
            Some(libc::EPERM) => Ok(()),
            _ => Err(error),
        })?;
        if is_ready(fd, events)? {
            return Ok(());
        }
    }
}

fn is_ready(fd: &OwnedFd, events: PollFlags) -> io::Result<bool> {
    let mut polled = [PollFd::new(fd, events)];
    match rustix::event::poll(&mut polled, Some(&rustix::time::Timespec::default())) {
        Ok(count) => Ok(count > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Reads what is there, at least a byte; 0 at the end.
pub(crate) async fn read(fd: &Arc<OwnedFd>, into: &mut [u8]) -> io::Result<usize> {
    loop {
        certainly_ready(fd, PollFlags::IN).await?;
        match rustix::io::read(&**fd, &mut *into) {
            Ok(count) => return Ok(count),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Writes some of `bytes` to something that does not block; 0 after waiting for room.
pub(crate) async fn write(fd: &Arc<OwnedFd>, bytes: &[u8]) -> io::Result<usize> {
    match rustix::io::write(&**fd, bytes) {
        Ok(count) => Ok(count),
        Err(rustix::io::Errno::AGAIN) => ready(fd, libc::POLLOUT).await.map(|()| 0),
        Err(rustix::io::Errno::INTR) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// Writes all of `bytes` to something that may block, as fast as somebody reads them.
pub(crate) async fn write_all_blocking(fd: &Arc<OwnedFd>, bytes: &[u8]) -> io::Result<()> {
    // Where a pipe has any room it has room for so much.
    for piece in bytes.chunks(rustix::pipe::PIPE_BUF) {
        let mut rest = piece;
        while !rest.is_empty() {
            if !is_ready(fd, PollFlags::OUT)? {
                certainly_ready(fd, PollFlags::OUT).await?;
            }
            rest = &rest[write(fd, rest).await?..];
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::exec::Core;
    use crate::rt;

    /// Runs a test of a pipe that blocks with each driver. If it blocks, a byte from elsewhere ends that, and the test
    /// fails.
    fn with_pipe<F: Future<Output = ()> + Send>(
        test: impl Fn(Arc<OwnedFd>, Arc<OwnedFd>) -> F,
        rescue: fn(&OwnedFd, &OwnedFd),
    ) {
        for threads in [false, true] {
            let (input, output) = rustix::pipe::pipe().expect("a pipe");
            let (input, output) = (Arc::new(input), Arc::new(output));
            let ends = (input.clone(), output.clone());
            let (over, is_over) = mpsc::channel();
            let guard = std::thread::spawn(move || {
                let in_time = is_over.recv_timeout(Duration::from_secs(30)).is_ok();
                if !in_time {
                    rescue(&ends.0, &ends.1);
                }
                in_time
            });
            Core::with_threads(Arc::default(), threads).expect("an executor").block_on(test(input, output));
            // It may have given up waiting.
            let _ = over.send(());
            assert!(guard.join().expect("no panic"), "the thread was blocked");
        }
    }

    #[test]
    fn of_two_who_wait_for_one_byte_one_goes_on_waiting() {
        let test = |input: Arc<OwnedFd>, output: Arc<OwnedFd>| async move {
            let reader = || {
                let fd = input.clone();
                rt::spawn(async move { read(&fd, &mut [0; 8]).await.expect("read") })
            };
            let (first, second) = (reader(), reader());
            // Both wait now, and for the same byte.
            rt::yield_now().await;
            rustix::io::write(&*output, b"1").expect("written");
            // Until one of them has it.
            while is_ready(&input, PollFlags::IN).expect("asked") {
                rt::yield_now().await;
            }
            // The other one was woken, too.
            rt::yield_now().await;
            rt::yield_now().await;
            rustix::io::write(&*output, b"2").expect("written");
            assert_eq!((first.await, second.await), (1, 1));
        };
        with_pipe(test, |_, output| {
            rustix::io::write(output, b"!").expect("written");
        });
    }

    #[test]
    fn who_writes_to_a_full_pipe_waits_and_holds_up_nobody() {
        const ALL: usize = 300_000;
        let test = |input: Arc<OwnedFd>, output: Arc<OwnedFd>| async move {
            let writer = rt::spawn(async move {
                let bytes: Vec<u8> = (0..ALL).map(|at| (at % 251).to_le_bytes()[0]).collect();
                write_all_blocking(&output, &bytes).await.expect("written");
            });
            // Nobody reads until the pipe is full.
            let mut room = true;
            while room {
                rt::yield_now().await;
                room = !is_full(&input);
            }
            let (mut got, mut buffer) = (0, [0; 5000]);
            while got < ALL {
                let count = read(&input, &mut buffer).await.expect("read");
                for (at, byte) in buffer[..count].iter().enumerate() {
                    assert_eq!(usize::from(*byte), (got + at) % 251);
                }
                got += count;
            }
            writer.await;
        };
        with_pipe(test, |input, _| {
            rustix::io::read(input, &mut [0; ALL]).expect("read");
        });
    }

    fn is_full(input: &OwnedFd) -> bool {
        rustix::io::ioctl_fionread(input).expect("asked") >= 65536
    }
}

//! Waiting for descriptors, by io_uring or by `poll(2)`; and taking descriptors over.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use io_uring::{opcode, types};

use crate::{pool, ring};

/// Waits until `fd` is ready for `events` (of `poll(2)`), or has an error, which the next call on it tells.
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

/// Reads what is there, at least a byte; 0 at the end.
pub(crate) async fn read(fd: &Arc<OwnedFd>, into: &mut [u8]) -> io::Result<usize> {
    loop {
        // A file is always ready; a pipe or terminal when something can be read.
        ready(fd, libc::POLLIN).await.or_else(|error| match error.raw_os_error() {
            Some(libc::EPERM) => Ok(()),
            _ => Err(error),
        })?;
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

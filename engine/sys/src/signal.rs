//! Signals that ask a daemon to end, as something to wait for.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use crate::driver;

const ENDING: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// SIGTERM, SIGINT and SIGHUP, held back from every thread.
#[derive(Debug)]
pub struct Ending {
    fd: Arc<OwnedFd>,
}

impl Ending {
    /// Holds them back; to be called before any thread starts. A write to a closed socket is an error from now on,
    /// not a signal.
    pub fn hold_back() -> io::Result<Self> {
        // SAFETY: the set is initialised by sigemptyset before use, and both calls only touch what they are given.
        let fd = unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in ENDING {
                libc::sigaddset(&raw mut set, signal);
            }
            libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else has.
        Ok(Self { fd: Arc::new(unsafe { OwnedFd::from_raw_fd(fd) }) })
    }

    /// Waits for one of them.
    pub async fn wait(&self) -> io::Result<()> {
        driver::ready(&self.fd, libc::POLLIN).await
    }
}

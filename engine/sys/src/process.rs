//! Becoming a daemon, and the pid file.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::Duration;

/// From now on a write beyond the longest file that this process may have (`ulimit -f`) fails, as it does where a disk
/// is full. Else it would end the process, and with it all disks that it serves.
pub fn survive_long_files() {
    // SAFETY: an ignored signal runs none of our code.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// What a process needed during its life.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Processor time, the kernel's for it included.
    pub cpu: Duration,
    /// Most memory that was resident at once, in bytes.
    pub peak: u64,
}

/// Waits for the end of `child`, and tells what it needed.
pub fn wait_with_usage(child: Child) -> io::Result<(ExitStatus, Usage)> {
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    let mut status = 0;
    // SAFETY: all zeroes is a value of this plain struct.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills in both; nobody else waits for this child, as it is ours.
    while unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    let time = |at: libc::timeval| {
        let parts = (u64::try_from(at.tv_sec).unwrap_or(0), u64::try_from(at.tv_usec).unwrap_or(0));
        Duration::from_secs(parts.0) + Duration::from_micros(parts.1)
    };
    let usage = Usage {
        cpu: time(usage.ru_utime) + time(usage.ru_stime),
        // Linux counts KiB.
        peak: u64::try_from(usage.ru_maxrss).unwrap_or(0) << 10,
    };
    Ok((ExitStatus::from_raw(status), usage))
}

/// The child's end of a daemon's birth: the parent waits until it hears that all is well.
#[derive(Debug)]
pub struct Birth {
    pipe: File,
}

impl Birth {
    /// Tells the parent that all is well, and lets go of the terminal. Not of the folder: the names of files that are
    /// open, and those in the headers of images, may count from it.
    pub fn succeeded(mut self) -> io::Result<()> {
        let null = File::options().read(true).write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)?;
        self.pipe.write_all(&[0])
    }
}

/// Forks. The child goes on from here; the parent waits until the child has said that it succeeded (then it exits
/// with status 0) or is gone (status 1; the child has printed why). To be called before any thread starts.
pub fn daemonize() -> io::Result<Birth> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: no thread has been started, so the child is a whole copy and may do anything.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(reader);
            rustix::process::setsid()?;
            Ok(Birth { pipe: writer.into() })
        }
        _ => {
            drop(writer);
            let mut status = [1];
            let heard = File::from(reader).read_exact(&mut status);
            std::process::exit(if heard.is_ok() { i32::from(status[0]) } else { 1 });
        }
    }
}

/// Sends the signal of this number to the calling thread.
pub fn raise(signal: i32) -> io::Result<()> {
    // SAFETY: the call takes any number; unknown ones give an error. What a signal does is what its sender wants.
    if unsafe { libc::raise(signal) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A pid file, removed when it is dropped.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    _file: File,
}

impl PidFile {
    /// Writes our process number into `path` and locks it, so that two daemons cannot share one.
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut file =
            File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
        file.set_len(0)?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Self { path: std::path::absolute(path)?, _file: file })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Takes over a descriptor that was handed to the process.
pub fn inherited(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD only asks; an unknown number gives an error.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and by the meaning of the option that named it, it is ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

//! Files that share storage.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `struct file_clone_range` of `linux/fs.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct CloneRange {
    from: i64,
    from_at: u64,
    len: u64,
    at: u64,
}

/// `FICLONERANGE` of `linux/fs.h`.
const CLONE_RANGE: libc::Ioctl = 0x4020_940d_u32 as libc::Ioctl;

/// See [`crate::file::File::reflink`].
pub fn reflink(to: &impl AsFd, at: u64, from: &impl AsFd, from_at: u64, len: u64) -> io::Result<()> {
    let range = CloneRange { from: from.as_fd().as_raw_fd().into(), from_at, len, at };
    // SAFETY: the call reads the struct, which is laid out as the kernel's.
    match unsafe { libc::ioctl(to.as_fd().as_raw_fd(), CLONE_RANGE, &raw const range) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

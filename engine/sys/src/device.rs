//! What only block devices can be asked: `linux/fs.h`.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `_IO(0x12, 94)`
const BLKROGET: libc::Ioctl = 0x125e;
/// `_IO(0x12, 119)`
const BLKDISCARD: libc::Ioctl = 0x1277;
/// `_IOR(0x12, 114, size_t)`
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272_u32 as libc::Ioctl;
/// Ranges that are discarded begin and end at multiples of this.
const SECTOR: u64 = 512;

/// Whether it refuses writes, however it was opened.
pub fn is_read_only(device: &impl AsFd) -> io::Result<bool> {
    let mut answer: libc::c_int = 0;
    // SAFETY: the kernel writes an int into `answer`.
    match unsafe { libc::ioctl(device.as_fd().as_raw_fd(), BLKROGET, &raw mut answer) } {
        0 => Ok(answer != 0),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Bytes.
pub fn size(device: &impl AsFd) -> io::Result<u64> {
    let mut size = 0_u64;
    // SAFETY: the kernel writes eight bytes into `size`.
    match unsafe { libc::ioctl(device.as_fd().as_raw_fd(), BLKGETSIZE64, &raw mut size) } {
        0 => Ok(size),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Tells it that nobody needs the whole sectors of a range any more.
pub fn discard(device: &impl AsFd, at: u64, len: u64) -> io::Result<()> {
    let first = at.next_multiple_of(SECTOR);
    let end = at.saturating_add(len) / SECTOR * SECTOR;
    if first >= end {
        return Ok(());
    }
    let range = [first, end - first];
    // SAFETY: the kernel reads two numbers.
    match unsafe { libc::ioctl(device.as_fd().as_raw_fd(), BLKDISCARD, range.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

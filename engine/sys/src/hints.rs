//! Wishes about a new file that some file systems grant and others do not know.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

/// `struct fsxattr` of `linux/fs.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Attributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

/// `FS_IOC_FSGETXATTR`, `FS_IOC_FSSETXATTR` and `FS_XFLAG_EXTSIZE` of `linux/fs.h`.
const GET_ATTRIBUTES: libc::Ioctl = 0x801c_581f_u32 as libc::Ioctl;
const SET_ATTRIBUTES: libc::Ioctl = 0x401c_5820_u32 as libc::Ioctl;
const HAS_EXTENT_SIZE: u32 = 0x800;

/// The file is overwritten in place although the file system would copy on write. Only for empty files.
pub fn no_copy_on_write(file: &impl AsFd) -> io::Result<()> {
    let flags = ioctl_getflags(file)?;
    Ok(ioctl_setflags(file, flags | IFlags::NOCOW)?)
}

/// The file grows in extents of `bytes`.
pub fn extent_size(file: &impl AsFd, bytes: u32) -> io::Result<()> {
    let fd = file.as_fd().as_raw_fd();
    let mut attributes = Attributes::default();
    // SAFETY: the call fills the struct, which is laid out as the kernel's.
    if unsafe { libc::ioctl(fd, GET_ATTRIBUTES, &raw mut attributes) } != 0 {
        return Err(io::Error::last_os_error());
    }
    attributes.flags |= HAS_EXTENT_SIZE;
    attributes.extent_size = bytes;
    // SAFETY: the call reads the struct.
    if unsafe { libc::ioctl(fd, SET_ATTRIBUTES, &raw const attributes) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

//! Files and block devices: reading and writing by the method that suits each file best.
//!
//! Bytes that are in the page cache are read in place, as are files in memory (tmpfs): a ring would only add a
//! detour. Everything that may wait for a medium goes through the ring.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use crate::buf::Iov;
use crate::driver::{self, MAX_PIECES, Request, iovecs, run};
use crate::exec;

/// Buffered writes up to this many bytes are made in place: file systems hand larger and smaller ones alike to the
/// page cache, and the detour through the ring costs more than it frees.
const SMALL_WRITE: usize = 64 << 10;

/// How to open a file.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// For writing too.
    pub write: bool,
    /// Make it if it is not there.
    pub create: bool,
    /// Fail if it is there.
    pub create_new: bool,
    /// Empty it.
    pub truncate: bool,
    /// Past the page cache (`O_DIRECT`).
    pub direct: bool,
}

/// What kind of thing was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A file of a file system.
    Regular,
    /// A block device.
    BlockDevice,
    /// Something that has no bytes at offsets.
    Other,
}

/// What to do with a range of a file without writing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocate {
    /// Reserve space; the file grows if the range ends behind its end.
    Reserve,
    /// Make it read as zeroes and keep the space; the file grows if need be.
    Zero,
    /// Make it read as zeroes and give the space back; the length stays.
    PunchHole,
}

/// An open file.
#[derive(Debug)]
pub struct File {
    fd: Arc<OwnedFd>,
    kind: FileKind,
    direct: bool,
    /// Reads and writes never wait: a file in memory.
    in_memory: bool,
    nowait: std::sync::atomic::AtomicBool,
}

fn checked(result: impl TryInto<usize> + Copy) -> io::Result<usize> {
    result.try_into().map_err(|_| io::Error::last_os_error())
}

fn offset(at: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(at).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

fn count(pieces: &[libc::iovec]) -> i32 {
    i32::try_from(pieces.len()).expect("at most MAX_PIECES")
}

impl File {
    /// Opens a file. Never waits for a FIFO's other end.
    pub fn open(path: &Path, options: OpenOptions) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | if options.direct { libc::O_DIRECT } else { 0 };
        let mut how = std::fs::OpenOptions::new();
        how.read(true).write(options.write).create(options.create).create_new(options.create_new);
        let file = how.truncate(options.truncate).custom_flags(flags).open(path)?;
        let kind = file.metadata()?.file_type();
        let kind = match () {
            () if kind.is_file() => FileKind::Regular,
            () if kind.is_block_device() => FileKind::BlockDevice,
            () if kind.is_dir() => return Err(io::Error::from_raw_os_error(libc::EISDIR)),
            () => FileKind::Other,
        };
        let in_memory = rustix::fs::fstatfs(&file).is_ok_and(|fs| fs.f_type == TMPFS || fs.f_type == RAMFS);
        let nowait = std::sync::atomic::AtomicBool::new(true);
        Ok(Self { fd: Arc::new(file.into()), kind, direct: options.direct, in_memory, nowait })
    }

    /// What was opened.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// Fills `into` from offset `at` on; bytes past the end are zeroes.
    pub async fn read_at(&self, at: u64, into: &Iov) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            let rest = into.slice(done, into.len() - done);
            match self.read_some(at + done as u64, &rest).await {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn read_some(&self, at: u64, into: &Iov) -> io::Result<usize> {
        use std::sync::atomic::Ordering::Relaxed;
        if !self.direct && (self.in_memory || self.nowait.load(Relaxed)) {
            let flags = if self.in_memory { 0 } else { libc::RWF_NOWAIT };
            let pieces = iovecs(into);
            // SAFETY: the pieces lie in memory that `into` keeps alive during the call; the count is theirs.
            let result = unsafe {
                libc::preadv2(self.fd.as_raw_fd(), pieces.as_ptr(), count(&pieces), offset(at)?, flags)
            };
            match checked(result) {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    self.nowait.store(false, Relaxed)
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
        run(Request::Read { fd: self.fd.clone(), offset: at, into: into.clone() }).await
    }

    /// Writes all of `from` from offset `at` on.
    pub async fn write_at(&self, at: u64, from: &Iov) -> io::Result<()> {
        let mut done = 0;
        while done < from.len() {
            let rest = from.slice(done, from.len() - done);
            match self.write_some(at + done as u64, &rest).await {
                Ok(0) => return Err(io::Error::from_raw_os_error(libc::ENOSPC)),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn write_some(&self, at: u64, from: &Iov) -> io::Result<usize> {
        let in_place = !self.direct && (self.in_memory || from.len() <= SMALL_WRITE);
        if in_place || !exec::here().driver.is_ring() {
            let pieces = iovecs(from);
            // SAFETY: the pieces lie in memory that `from` keeps alive during the call; the count is theirs.
            let result =
                unsafe { libc::pwritev(self.fd.as_raw_fd(), pieces.as_ptr(), count(&pieces), offset(at)?) };
            return checked(result);
        }
        run(Request::Write { fd: self.fd.clone(), offset: at, from: from.clone() }).await
    }

    /// Everything that was written is on the medium.
    pub async fn data_sync(&self) -> io::Result<()> {
        if self.in_memory {
            return Ok(());
        }
        run(Request::DataSync { fd: self.fd.clone() }).await.map(|_| ())
    }

    /// See [`Allocate`]. ENOTSUP where the file system cannot.
    pub async fn allocate(&self, how: Allocate, at: u64, len: u64) -> io::Result<()> {
        let mode = match how {
            Allocate::Reserve => 0,
            Allocate::Zero => libc::FALLOC_FL_ZERO_RANGE,
            Allocate::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        };
        let request = Request::Allocate { fd: self.fd.clone(), mode, offset: at, len };
        if self.in_memory {
            let (at, len) = (offset(at)?, offset(len)?);
            // SAFETY: a call on an open file, without memory.
            let result = unsafe { libc::fallocate(self.fd.as_raw_fd(), mode, at, len) };
            return checked(result).map(|_| ());
        }
        run(request).await.map(|_| ())
    }

    /// Length in bytes; of a block device its size.
    pub fn len(&self) -> io::Result<u64> {
        match self.kind {
            FileKind::BlockDevice => {
                let mut size: u64 = 0;
                // SAFETY: BLKGETSIZE64 writes one u64 where the pointer says.
                let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), BLKGETSIZE64, &raw mut size) };
                checked(result).map(|_| size)
            }
            _ => Ok(rustix::fs::fstat(&*self.fd)?.st_size.try_into().unwrap_or(0)),
        }
    }

    /// Whether there is not a single byte in it.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Which file it is: device and inode number.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::fstat(&*self.fd)?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// Cuts or lengthens the file.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        Ok(rustix::fs::ftruncate(&*self.fd, len)?)
    }

    /// Bytes that the file takes up on its medium.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        let blocks = rustix::fs::fstat(&*self.fd)?.st_blocks;
        Ok(u64::try_from(blocks).unwrap_or(0).saturating_mul(512))
    }

    /// The first byte at or behind `at` that has data; `None`: only holes from there to the end.
    pub fn seek_data(&self, at: u64) -> io::Result<Option<u64>> {
        self.seek(at, libc::SEEK_DATA)
    }

    /// The first byte at or behind `at` that is in a hole; the end of the file counts as one.
    pub fn seek_hole(&self, at: u64) -> io::Result<Option<u64>> {
        self.seek(at, libc::SEEK_HOLE)
    }

    fn seek(&self, at: u64, whence: i32) -> io::Result<Option<u64>> {
        // SAFETY: a call on an open file, without memory. (Nothing here uses the file's own position.)
        let found = unsafe { libc::lseek(self.fd.as_raw_fd(), offset(at)?, whence) };
        match u64::try_from(found) {
            Ok(found) => Ok(Some(found)),
            Err(_) => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                error => Err(error),
            },
        }
    }

    /// What offsets and lengths must be multiples of, in bytes.
    pub fn request_alignment(&self) -> u32 {
        if !self.direct {
            return 1;
        }
        let mut size: libc::c_int = 0;
        // SAFETY: BLKSSZGET writes one int where the pointer says; other files than devices refuse it.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), BLKSSZGET, &raw mut size) };
        match u32::try_from(size) {
            Ok(size) if result == 0 && size.is_power_of_two() => size,
            _ => self.probe_alignment(),
        }
    }

    /// The smallest size in which a direct read is taken.
    fn probe_alignment(&self) -> u32 {
        let buffer = Iov::zeroed(4096);
        let fits = |size: &u32| {
            let length = usize::try_from(*size).expect("small");
            let pieces = iovecs(&buffer.slice(0, length));
            // SAFETY: the pieces lie in `buffer`, which lives during the call.
            unsafe { libc::preadv(self.fd.as_raw_fd(), pieces.as_ptr(), count(&pieces), 0) >= 0 }
        };
        [512, 1024, 2048].into_iter().find(fits).unwrap_or(4096)
    }

    /// Takes a shared lock on one byte, for this open file. `WouldBlock` when another holds it alone.
    pub fn lock_shared(&self, byte: u64) -> io::Result<()> {
        self.lock(byte, libc::F_RDLCK)
    }

    /// Gives the lock on a byte back.
    pub fn unlock(&self, byte: u64) -> io::Result<()> {
        self.lock(byte, libc::F_UNLCK)
    }

    fn lock(&self, byte: u64, kind: i32) -> io::Result<()> {
        let lock = one_byte(byte, kind)?;
        // SAFETY: F_OFD_SETLK reads the structure, which lives during the call.
        checked(unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }).map(|_| ())
    }

    /// Whether another open file holds a lock on the byte.
    pub fn is_locked_by_others(&self, byte: u64) -> io::Result<bool> {
        let mut lock = one_byte(byte, libc::F_WRLCK)?;
        // SAFETY: F_OFD_GETLK reads and writes the structure, which lives during the call.
        checked(unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) })?;
        Ok(i32::from(lock.l_type) != libc::F_UNLCK)
    }

    /// Waits until the file can be read or has ended: for pipes and terminals.
    pub async fn readable(&self) -> io::Result<()> {
        driver::ready(&self.fd, libc::POLLIN).await
    }
}

const TMPFS: i64 = 0x0102_1994;
const RAMFS: i64 = 0x8584_58f6;
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
const BLKSSZGET: libc::Ioctl = 0x1268;
const _: () = assert!(MAX_PIECES <= 1024);

fn one_byte(byte: u64, kind: i32) -> io::Result<libc::flock> {
    let narrow = |n: i32| libc::c_short::try_from(n).expect("a small constant");
    Ok(libc::flock {
        l_type: narrow(kind),
        l_whence: narrow(libc::SEEK_SET),
        l_start: offset(byte)?,
        l_len: 1,
        l_pid: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::thread::block_on;

    fn on_each(test: impl AsyncFn(File, &Path)) {
        for folder in ["/dev/shm", "/tmp"] {
            let path = Path::new(folder).join(format!("underlay-sys-{}", std::process::id()));
            let options = OpenOptions { write: true, create: true, truncate: true, ..OpenOptions::default() };
            let file = File::open(&path, options).expect("a temporary file");
            block_on(test(file, &path));
            std::fs::remove_file(&path).expect("it is there");
        }
    }

    #[test]
    fn reads_give_what_was_written_and_zeroes_behind_the_end() {
        on_each(async |file, _| {
            for size in [1_usize, 4096, 1 << 20] {
                let data = Iov::filled(size, 7);
                file.write_at(1000, &data).await.expect("written");
                file.data_sync().await.expect("synced");
                let back = Iov::filled(size + 10, 1);
                file.read_at(1000, &back).await.expect("read");
                let bytes = back.to_vec();
                assert!(bytes[..size].iter().all(|b| *b == 7));
                assert!(bytes[size..].iter().all(|b| *b == 0));
            }
            assert_eq!(file.len().expect("known"), 1000 + (1 << 20));
        });
    }

    #[test]
    fn locks_are_seen_by_other_open_files() {
        on_each(async |file, path| {
            let other = File::open(path, OpenOptions::default()).expect("opens");
            assert!(!other.is_locked_by_others(201).expect("asked"));
            file.lock_shared(201).expect("free");
            assert!(other.is_locked_by_others(201).expect("asked"));
            assert!(!file.is_locked_by_others(201).expect("asked"));
            file.unlock(201).expect("ours");
            assert!(!other.is_locked_by_others(201).expect("asked"));
        });
    }

    #[test]
    fn holes() {
        on_each(async |file, _| {
            file.write_at(0, &Iov::filled(1 << 20, 1)).await.expect("written");
            file.allocate(Allocate::PunchHole, 256 << 10, 256 << 10).await.expect("punched");
            assert_eq!(file.seek_hole(0).expect("asked"), Some(256 << 10));
            assert_eq!(file.seek_data(256 << 10).expect("asked"), Some(512 << 10));
            assert_eq!(file.seek_data(1 << 20).expect("asked"), None);
        });
    }
}

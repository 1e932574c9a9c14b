//! Files and block devices.
//!
//! What the page cache can answer at once is answered in place, without a trip through the ring; what would wait
//! for a disk goes to io_uring (or to helper threads without it). Offsets and lengths are bytes.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use io_uring::squeue::Entry;
use io_uring::{opcode, types};
use smallvec::SmallVec;

use crate::buf::Iov;
use crate::stat::Stat;
use crate::{background, device, driver, hints, pool, reflink, ring, rt};

/// Buffered writes up to this size only copy to the page cache; that is quicker here than on another thread.
const SMALL_WRITE: usize = 128 << 10;
/// Most pieces that one system call takes (`IOV_MAX`).
const MAX_PIECES: usize = 1024;
/// Most bytes of one system call (`MAX_RW_COUNT`).
const MAX_BYTES: usize = 0x7fff_f000;

/// How to open a file.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// For writing too.
    pub write: bool,
    /// Make it when it is not there (mode 0644 less the umask).
    pub create: bool,
    /// Make it, and fail when it is there.
    pub create_new: bool,
    /// Make it empty.
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
    /// A character device: mostly nothing to read, and everything can be written (`/dev/null`).
    CharacterDevice,
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

/// An open file or block device.
#[derive(Debug)]
pub struct File {
    fd: Arc<OwnedFd>,
    direct: bool,
    /// In memory only: no call waits for a disk.
    memory: bool,
    kind: FileKind,
    /// What offsets and lengths must be multiples of.
    alignment: u32,
}

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

type Pieces = SmallVec<[libc::iovec; 4]>;

/// The pieces of `iov` from byte `skip` on, as many as one call takes.
fn pieces(iov: &Iov, skip: usize) -> Pieces {
    let (mut skip, mut room) = (skip, background::slice().unwrap_or(MAX_BYTES));
    let mut vecs = Pieces::new();
    for (at, len) in iov.pieces() {
        if skip >= len {
            skip -= len;
            continue;
        }
        let take = (len - skip).min(room);
        if take == 0 || vecs.len() == MAX_PIECES {
            break;
        }
        // SAFETY: `skip < len`, so the result lies inside the piece.
        vecs.push(libc::iovec { iov_base: unsafe { at.add(skip) }.cast(), iov_len: take });
        (skip, room) = (0, room - take);
    }
    vecs
}

/// Between two slices of one request of the background.
async fn give_way(done: usize) {
    if done > 0 && background::slice().is_some() {
        rt::yield_now().await;
    }
}

fn checked(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// A call again when a signal interrupted it.
fn retried(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match checked(call()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn is(error: &io::Error, errno: i32) -> bool {
    error.raw_os_error() == Some(errno)
}

fn position(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

/// One `preadv2` or `pwritev2` on the calling thread.
fn call(fd: i32, direction: Direction, offset: i64, vecs: &[libc::iovec], flags: i32) -> io::Result<usize> {
    let count = i32::try_from(vecs.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    retried(|| match direction {
        // SAFETY: the pieces lie inside leases that the caller holds during the call.
        Direction::Read => unsafe { libc::preadv2(fd, vecs.as_ptr(), count, offset, flags) },
        // SAFETY: as above.
        Direction::Write => unsafe { libc::pwritev2(fd, vecs.as_ptr(), count, offset, flags) },
    })
}

impl File {
    /// Opens a file or block device, closed on exec. Never waits for a FIFO's other end.
    pub fn open(path: &Path, options: OpenOptions) -> io::Result<Self> {
        let name = CString::new(path.as_os_str().as_bytes())?;
        let mut flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        flags |= if options.write { libc::O_RDWR } else { libc::O_RDONLY };
        for (wanted, flag) in [
            (options.create, libc::O_CREAT),
            (options.create_new, libc::O_CREAT | libc::O_EXCL),
            (options.truncate, libc::O_TRUNC),
            (options.direct, libc::O_DIRECT),
        ] {
            flags |= if wanted { flag } else { 0 };
        }
        // SAFETY: `name` is a string with its NUL, borrowed for the call.
        let fd = retried(|| unsafe { libc::open(name.as_ptr(), flags, 0o644) as isize })?;
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: a new descriptor that nobody else has.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // The ring would give EAGAIN instead of waiting for a disk.
        rustix::fs::fcntl_setfl(&fd, rustix::fs::fcntl_getfl(&fd)? - rustix::fs::OFlags::NONBLOCK)?;
        Self::new(fd, options.direct)
    }

    fn new(fd: OwnedFd, direct: bool) -> io::Result<Self> {
        use rustix::fs::FileType;
        let kind = match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
            FileType::RegularFile => FileKind::Regular,
            FileType::BlockDevice => FileKind::BlockDevice,
            FileType::CharacterDevice => FileKind::CharacterDevice,
            _ => FileKind::Other,
        };
        let memory = kind == FileKind::Regular
            && rustix::fs::fstatfs(&fd).is_ok_and(|fs| fs.f_type == libc::TMPFS_MAGIC || fs.f_type == RAMFS);
        let mut file = Self { fd: Arc::new(fd), direct, memory, kind, alignment: 1 };
        if direct {
            file.alignment = file.direct_alignment();
        }
        Ok(file)
    }

    /// What was opened.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    fn raw(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    /// Whether the kernel takes this memory: past the page cache only aligned pieces, else all.
    fn takes(&self, iov: &Iov) -> bool {
        let alignment = self.alignment as usize;
        !self.direct
            || iov
                .pieces()
                .all(|(at, len)| at.addr().is_multiple_of(alignment) && len.is_multiple_of(alignment))
    }

    /// Fills `into` from `offset` on; zeroes past the end of the file. Direct: offset and length aligned; memory
    /// that is not costs a copy.
    pub async fn read_at(&self, offset: u64, into: &Iov) -> io::Result<()> {
        if self.takes(into) {
            return self.read_aligned(offset, into).await;
        }
        let whole = Iov::scratch(into.len());
        self.read_aligned(offset, &whole).await?;
        into.copy_from(&whole);
        Ok(())
    }

    async fn read_aligned(&self, offset: u64, into: &Iov) -> io::Result<()> {
        let mut done = 0;
        let mut in_place = !self.direct;
        while done < into.len() {
            let at = position(offset.saturating_add(done as u64))?;
            give_way(done).await;
            let result = if in_place { self.read_in_place(at, into, done) } else { None };
            let count = match result {
                Some(result) => result?,
                None => {
                    in_place = false;
                    self.far(Direction::Read, at, into, done).await?
                }
            };
            done += count;
            let at_end = self.direct && count % self.alignment as usize != 0;
            if count == 0 || at_end {
                into.slice(done, into.len() - done).fill(0);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Reads what is there without waiting; `None`: it would wait.
    fn read_in_place(&self, at: i64, into: &Iov, done: usize) -> Option<io::Result<usize>> {
        let vecs = pieces(into, done);
        let flags = if self.memory { 0 } else { libc::RWF_NOWAIT };
        match call(self.raw(), Direction::Read, at, &vecs, flags) {
            Err(error) if is(&error, libc::EAGAIN) => None,
            Err(error) if is(&error, libc::EOPNOTSUPP) && flags != 0 => {
                Some(call(self.raw(), Direction::Read, at, &vecs, 0))
            }
            result => Some(result),
        }
    }

    /// Writes all of `from` at `offset`. Done when reads see it; durable after [`Self::data_sync`]. Direct: as for
    /// [`Self::read_at`].
    pub async fn write_at(&self, offset: u64, from: &Iov) -> io::Result<()> {
        if self.takes(from) {
            return self.write_aligned(offset, from).await;
        }
        let whole = Iov::scratch(from.len());
        whole.copy_from(from);
        self.write_aligned(offset, &whole).await
    }

    async fn write_aligned(&self, offset: u64, from: &Iov) -> io::Result<()> {
        let in_place = !self.direct && (self.memory || from.len() <= SMALL_WRITE);
        let mut done = 0;
        while done < from.len() {
            let at = position(offset.saturating_add(done as u64))?;
            give_way(done).await;
            let count = if in_place {
                call(self.raw(), Direction::Write, at, &pieces(from, done), 0)?
            } else {
                self.far(Direction::Write, at, from, done).await?
            };
            if count == 0 {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            done += count;
        }
        Ok(())
    }

    /// One read or write where waiting does no harm.
    async fn far(&self, direction: Direction, at: i64, iov: &Iov, done: usize) -> io::Result<usize> {
        loop {
            let op = self.start(direction, at, iov, done);
            let result = match op {
                Some(op) => op.await,
                None => {
                    let (fd, iov) = (self.fd.clone(), iov.clone());
                    pool::run(move || call(fd.as_raw_fd(), direction, at, &pieces(&iov, done), 0)).await?
                }
            };
            match result {
                Err(error) if is(&error, libc::EINTR) || is(&error, libc::EAGAIN) => {}
                result => return result,
            }
        }
    }

    fn start(&self, direction: Direction, at: i64, iov: &Iov, done: usize) -> Option<ring::Op> {
        let held = ring::Held { iov: iov.clone(), vecs: pieces(iov, done), file: Some(self.fd.clone()) };
        let held = Box::new(held);
        let fd = types::Fd(self.raw());
        let offset = u64::try_from(at).ok()?;
        let entry = match (direction, held.vecs.as_slice()) {
            (Direction::Read, [one]) => {
                let len = u32::try_from(one.iov_len).ok()?;
                opcode::Read::new(fd, one.iov_base.cast(), len).offset(offset).build()
            }
            (Direction::Write, [one]) => {
                let len = u32::try_from(one.iov_len).ok()?;
                opcode::Write::new(fd, one.iov_base.cast_const().cast(), len).offset(offset).build()
            }
            (Direction::Read, many) => {
                opcode::Readv::new(fd, many.as_ptr(), u32::try_from(many.len()).ok()?).offset(offset).build()
            }
            (Direction::Write, many) => {
                opcode::Writev::new(fd, many.as_ptr(), u32::try_from(many.len()).ok()?).offset(offset).build()
            }
        };
        ring::start(&entry, held)
    }

    /// An operation without data, on the ring, or else as `otherwise` on a helper thread.
    async fn plain(
        &self,
        entry: Entry,
        otherwise: fn(i32, [u64; 2]) -> isize,
        args: [u64; 2],
    ) -> io::Result<()> {
        loop {
            let held = ring::Held { file: Some(self.fd.clone()), ..ring::Held::default() };
            let result = match ring::start(&entry, Box::new(held)) {
                Some(op) => op.await,
                None => {
                    let fd = self.fd.clone();
                    pool::run(move || retried(|| otherwise(fd.as_raw_fd(), args))).await?
                }
            };
            match result {
                Err(error) if is(&error, libc::EINTR) => {}
                result => return result.map(|_| ()),
            }
        }
    }

    /// What the file system tells of it.
    pub fn stat(&self) -> io::Result<Stat> {
        Stat::of(&*self.fd)
    }

    /// Lets the same people read and write it as a file with this mode.
    pub fn set_mode(&self, mode: u32) -> io::Result<()> {
        Ok(rustix::fs::fchmod(&*self.fd, rustix::fs::Mode::from_raw_mode(mode & 0o666))?)
    }

    /// Another descriptor of the same open file.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// Makes durable what was written, and when.
    pub async fn sync(&self) -> io::Result<()> {
        if self.memory {
            return Ok(());
        }
        let entry = opcode::Fsync::new(types::Fd(self.raw())).build();
        // SAFETY: no memory is involved.
        self.plain(entry, |fd, _| unsafe { libc::fsync(fd) as isize }, [0; 2]).await
    }

    /// Makes durable which files are in the folder of the file `name`.
    pub async fn sync_folder(name: &Path) -> io::Result<()> {
        let folder = match name.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            Some(_) => Path::new("."),
            None => Path::new("/"),
        };
        Self::open(folder, OpenOptions::default())?.sync().await
    }

    /// Makes durable what was written.
    pub async fn data_sync(&self) -> io::Result<()> {
        if self.memory {
            return Ok(());
        }
        let entry = opcode::Fsync::new(types::Fd(self.raw())).flags(types::FsyncFlags::DATASYNC).build();
        // SAFETY: no memory is involved.
        self.plain(entry, |fd, _| unsafe { libc::fdatasync(fd) as isize }, [0; 2]).await
    }

    /// See [`Allocate`]. EOPNOTSUPP where the file system cannot.
    pub async fn allocate(&self, how: Allocate, at: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        position(at.saturating_add(len))?;
        let (mode, otherwise): (_, fn(i32, [u64; 2]) -> isize) = match (how, self.kind) {
            (Allocate::Reserve, _) => (0, fallocate::<0>),
            (Allocate::PunchHole, _) => (PUNCH, fallocate::<PUNCH>),
            (Allocate::Zero, FileKind::BlockDevice) => (ZERO_KEEP, fallocate::<ZERO_KEEP>),
            (Allocate::Zero, _) => (ZERO, fallocate::<ZERO>),
        };
        if self.memory {
            return retried(|| otherwise(self.raw(), [at, len])).map(|_| ());
        }
        let entry = opcode::Fallocate::new(types::Fd(self.raw()), len).offset(at).mode(mode).build();
        self.plain(entry, otherwise, [at, len]).await
    }

    /// Whether it is a block device that refuses writes, however it was opened.
    pub fn is_read_only_device(&self) -> io::Result<bool> {
        Ok(self.kind == FileKind::BlockDevice && device::is_read_only(&*self.fd)?)
    }

    /// Gives back the space of a range that nobody needs any more: of a file by a hole; a block device may forget what
    /// was there, or not. EOPNOTSUPP where that cannot be.
    pub async fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        if self.kind != FileKind::BlockDevice {
            return self.allocate(Allocate::PunchHole, at, len).await;
        }
        position(at.saturating_add(len))?;
        let fd = self.fd.clone();
        // The device may take its time.
        pool::run(move || device::discard(&*fd, at, len)).await?
    }

    /// Makes the `len` bytes at `at` share the storage of those at `from_at` of another file of the same file system;
    /// both are regular files. EINVAL if they do not lie on whole blocks.
    pub async fn reflink(&self, at: u64, from: &Self, from_at: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let (to, from) = (self.fd.clone(), from.fd.clone());
        // The kernel writes out what is not on the disk yet, and waits for it.
        pool::run(move || reflink::reflink(&*to, at, &*from, from_at, len)).await?
    }

    /// Current length (of a block device: its size).
    pub fn len(&self) -> io::Result<u64> {
        if self.kind == FileKind::BlockDevice {
            return device::size(&*self.fd);
        }
        Ok(u64::try_from(rustix::fs::fstat(&*self.fd)?.st_size).unwrap_or(0))
    }

    /// Whether there is not a single byte in it.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Changes the length of a regular file; growth is a hole.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        position(len)?;
        Ok(rustix::fs::ftruncate(&*self.fd, len)?)
    }

    /// Asks that the file be overwritten in place where the file system would copy on write. Only for empty files.
    pub fn no_copy_on_write(&self) -> io::Result<()> {
        hints::no_copy_on_write(&*self.fd)
    }

    /// Asks that the file grow in extents of `bytes`. Only for empty files.
    pub fn extent_size(&self, bytes: u32) -> io::Result<()> {
        hints::extent_size(&*self.fd, bytes)
    }

    /// The first byte from `offset` on that is not in a hole; `None`: nothing but hole up to the end.
    pub fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.seek(offset, libc::SEEK_DATA)
    }

    /// The first hole from `offset` on, perhaps the end; `None`: `offset` is past the end.
    pub fn seek_hole(&self, offset: u64) -> io::Result<Option<u64>> {
        self.seek(offset, libc::SEEK_HOLE)
    }

    fn seek(&self, offset: u64, whence: i32) -> io::Result<Option<u64>> {
        // SAFETY: no memory is involved; nobody uses the file position for anything else.
        let found = unsafe { libc::lseek(self.raw(), position(offset)?, whence) };
        match u64::try_from(found) {
            Ok(found) => Ok(Some(found)),
            Err(_) => match io::Error::last_os_error() {
                error if is(&error, libc::ENXIO) => Ok(None),
                error => Err(error),
            },
        }
    }

    /// Bytes that the file takes up on its medium.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        let blocks = u64::try_from(rustix::fs::fstat(&*self.fd)?.st_blocks).unwrap_or(0);
        Ok(blocks.saturating_mul(512))
    }

    /// What offsets and lengths must be multiples of, in bytes; 1 unless it was opened past the page cache.
    pub fn request_alignment(&self) -> u32 {
        self.alignment
    }

    /// Opens the same file anew, whatever its name leads to by now.
    pub fn reopen(&self, options: OpenOptions) -> io::Result<Self> {
        Self::open(Path::new(&format!("/proc/self/fd/{}", self.raw())), options)
    }

    /// `statx` tells on newer kernels; else trying does.
    fn direct_alignment(&self) -> u32 {
        // SAFETY: all zeroes is a value of this plain struct.
        let mut stat: libc::statx = unsafe { std::mem::zeroed() };
        let (fd, path) = (self.raw(), c"");
        // SAFETY: the path is a string with its NUL, and the kernel fills in `stat`.
        let done = unsafe {
            libc::statx(fd, path.as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut stat)
        };
        let align = stat.stx_dio_offset_align;
        if done == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0 && align.is_power_of_two() {
            return align;
        }
        let buffer = Iov::scratch(4096);
        let fits = |size: &u32| {
            let piece = buffer.slice(0, *size as usize);
            call(fd, Direction::Read, 0, &pieces(&piece, 0), 0).is_ok()
        };
        [512, 1024, 2048].into_iter().find(fits).unwrap_or(4096)
    }

    fn lock(&self, command: i32, kind: i32, byte: u64) -> io::Result<libc::flock> {
        // SAFETY: all zeroes is a value of this plain struct; `l_pid` must be 0 for these locks.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = i16::try_from(kind).map_err(io::Error::other)?;
        lock.l_whence = i16::try_from(libc::SEEK_SET).map_err(io::Error::other)?;
        lock.l_start = position(byte)?;
        lock.l_len = 1;
        // SAFETY: the kernel reads and writes `lock` during the call.
        retried(|| unsafe { libc::fcntl(self.raw(), command, &raw mut lock) as isize })?;
        Ok(lock)
    }

    /// Takes a shared lock of the open file description on one byte; EAGAIN when somebody has it exclusively.
    pub fn lock_shared(&self, byte: u64) -> io::Result<()> {
        self.lock(libc::F_OFD_SETLK, libc::F_RDLCK, byte).map(|_| ())
    }

    /// Gives a byte's lock up.
    pub fn unlock(&self, byte: u64) -> io::Result<()> {
        self.lock(libc::F_OFD_SETLK, libc::F_UNLCK, byte).map(|_| ())
    }

    /// Whether another open file holds a lock on the byte. EINVAL where the file system has no such locks.
    pub fn is_locked_by_others(&self, byte: u64) -> io::Result<bool> {
        let lock = self.lock(libc::F_OFD_GETLK, libc::F_WRLCK, byte)?;
        Ok(i32::from(lock.l_type) != libc::F_UNLCK)
    }

    /// Waits until the file can be read or has ended: for pipes and terminals.
    pub async fn readable(&self) -> io::Result<()> {
        driver::ready(&self.fd, libc::POLLIN).await
    }
}

fn fallocate<const MODE: i32>(fd: i32, [at, len]: [u64; 2]) -> isize {
    // SAFETY: no memory is involved. Both numbers were checked to fit.
    unsafe { libc::fallocate(fd, MODE, at.cast_signed(), len.cast_signed()) as isize }
}

const RAMFS: i64 = 0x8584_58f6;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
const ZERO_KEEP: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::thread::block_on;

    fn on_each(test: impl AsyncFn(File, &Path)) {
        for folder in ["/dev/shm", "/tmp"] {
            static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
            let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let path = Path::new(folder).join(format!("underlay-sys-{}-{number}", std::process::id()));
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
    fn the_folder_of_any_name_can_be_synced() {
        let folder = tempfile::tempdir().unwrap();
        for name in [folder.path().join("x").as_path(), Path::new("x"), Path::new("/x"), Path::new("/")] {
            crate::thread::block_on(File::sync_folder(name)).unwrap();
        }
        let nowhere = folder.path().join("none/x");
        assert!(crate::thread::block_on(File::sync_folder(&nowhere)).is_err());
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

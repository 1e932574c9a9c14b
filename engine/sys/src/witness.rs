//! A process that outlives this one for a moment, to write down how a file was when this one died.
//!
//! Whatever kills a process, the kernel first ends all its threads and requests, and then closes its files: only after
//! the last write is the pipe to the witness at its end. The witness is not at once there, though, and somebody else
//! may be quicker. So the two share some words of memory, where the one says what he is about.
//!
//! The witness is this program once more, under another name: its `main` must begin with [`be_one_if_asked`]. Other
//! programs (tests) have no witnesses.

use std::fs::File as StdFile;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::file::File;
use crate::stat::Stat;

/// The name of the program when it is a witness.
const NAME: &str = "underlay-witness";
/// Bytes of what a witness writes down.
pub const PAGE: usize = 512;

/// Words of shared memory.
pub const WORDS: usize = 7;
/// What they take.
const BYTES: usize = WORDS * size_of::<u64>();
/// Behind them is one more: not zero once the witness is there.
const ALL: usize = BYTES + size_of::<u64>();

/// What a witness writes down, given the number that it was told, the shared words, and how the file is.
pub type Testimony = fn(u64, &[u64; WORDS], &Stat) -> [u8; PAGE];

/// Memory that outlives this process if it has a witness.
#[derive(Debug)]
pub struct Record {
    file: OwnedFd,
    words: NonNull<[AtomicU64; WORDS + 1]>,
}

// SAFETY: nothing but atomic words, which are there as long as the record.
unsafe impl Send for Record {}
// SAFETY: as above.
unsafe impl Sync for Record {}

impl Record {
    /// All zero.
    pub fn new() -> io::Result<Self> {
        let file = memfd_create("underlay-witness", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, ALL as u64)?;
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place that the kernel chooses.
        let at = unsafe { mmap(std::ptr::null_mut(), ALL, flags, MapFlags::SHARED, &file, 0) }?;
        let words = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { file, words })
    }

    fn all(&self) -> &[AtomicU64; WORDS + 1] {
        // SAFETY: mapped as long as `self` is there, aligned to a page, and everybody uses them as atomic.
        unsafe { self.words.as_ref() }
    }

    /// The words.
    pub fn words(&self) -> &[AtomicU64] {
        &self.all()[..WORDS]
    }

    /// Whether the witness is there: he will have seen what is in the words whatever happens.
    pub fn has_witness(&self) -> bool {
        self.all()[WORDS].load(Ordering::Acquire) != 0
    }

    /// Where another process of the same user finds it.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference to the words any more.
        let _ = unsafe { munmap(self.words.as_ptr().cast(), ALL) };
    }
}

/// The program can be a witness.
static CAN: AtomicBool = AtomicBool::new(false);

/// To be called first of all by `main`: does not return when this process is to be a witness. All that it may write
/// down is `testimony`.
pub fn be_one_if_asked(testimony: Testimony) {
    CAN.store(true, Ordering::Relaxed);
    let mut words = std::env::args();
    if words.next().as_deref() != Some(NAME) {
        return;
    }
    let number = words.next().and_then(|word| word.parse().ok());
    let at = words.next().and_then(|word| word.parse().ok());
    if let (Some(number), Some(at), Some(record)) = (number, at, words.next()) {
        ignore_signals();
        let _ = wait_and_tell(testimony, number, at, &record);
    }
    std::process::exit(0);
}

/// Whoever ends a group of processes ends the others; this one ends by itself then.
fn ignore_signals() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: to ignore a signal runs none of our code.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

fn wait_and_tell(testimony: Testimony, number: u64, at: u64, record: &str) -> io::Result<()> {
    let record = StdFile::options().read(true).write(true).open(record)?;
    record.write_all_at(&1_u64.to_ne_bytes(), BYTES as u64)?;
    let mut word = [0];
    if io::stdin().lock().read(&mut word)? > 0 {
        // All is well: there is nothing to tell.
        return Ok(());
    }
    let stat = Stat::of(io::stderr())?;
    let mut bytes = [0; BYTES];
    record.read_exact_at(&mut bytes, 0)?;
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_ne_bytes(*bytes);
    }
    let book = StdFile::from(io::stdout().as_fd().try_clone_to_owned()?);
    book.write_all_at(&testimony(number, &words, &stat), at)?;
    book.sync_data()
}

/// The witness of what happens to a file.
#[derive(Debug)]
pub struct Witness {
    child: Child,
}

impl Witness {
    /// Watches `file`, and will write to `book` at byte `at`. The book's locks stay until the witness is gone, the
    /// file's too: they should be open files of their own. He is there a moment later ([`Record::has_witness`]).
    /// ENOTSUP where the program cannot be a witness.
    pub fn start(file: &File, book: &File, at: u64, number: u64, record: &Record) -> io::Result<Self> {
        if !CAN.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::ENOTSUP));
        }
        record.all()[WORDS].store(0, Ordering::Release);
        let child = Command::new("/proc/self/exe")
            .arg0(NAME)
            .args([number.to_string(), at.to_string(), record.path()])
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::from(book.duplicate()?))
            .stderr(Stdio::from(file.duplicate()?))
            .spawn()?;
        Ok(Self { child })
    }

    /// It is not needed any more, and tells nothing.
    pub fn dismiss(mut self) {
        use std::io::Write;
        if let Some(mut pipe) = self.child.stdin.take() {
            // It may have been killed.
            let _ = pipe.write_all(&[1]);
        }
    }
}

impl Drop for Witness {
    /// As if the process died now.
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

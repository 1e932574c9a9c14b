//! Files and block devices of the host: the drivers `file` and `host_device`.

use std::any::Any;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::{RwLock, RwLockReadGuard};
use underlay_graph::info::ImageInfo;
use underlay_graph::{
    Access, ByteRange, Cx, Extent, FormatInfo, IoError, Kind, Limits, Node, NodeOptions, Perms, Place,
    Preallocation, Result, WriteFlags, ZeroFlags,
};
use underlay_sys::Iov;
use underlay_sys::file::{Allocate, File, FileKind, OpenOptions};

use super::locks::{self, Held};
use super::syncs::Syncs;
use crate::error::OpenError;
use crate::names;
use crate::options::FileSpec;

/// `locking`: whether other processes are told by locks what the image is used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Where the file can be locked.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// `aio`: a hint that QEMU's users give; every file here goes by the method that suits it best.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// `threads`
    #[default]
    Threads,
    /// `native`
    Native,
    /// `io_uring`
    IoUring,
}

/// Lengths are counted in units of this many bytes.
const SECTOR: u64 = 512;

/// Zeroes written at a time when a file is filled (`preallocation=full`), in bytes.
const FILL: u64 = 2 << 20;

/// What whoever makes an image asks of its file: nobody else may use it meanwhile.
pub const EXCLUSIVE: Access =
    Access { writable: true, required: Perms::ALL, shared: Perms::CONSISTENT_READ, used: true };

/// The file as it is open now; replaced when the node becomes writable or stops being so.
#[derive(Debug)]
struct Open {
    file: Arc<File>,
    writable: bool,
    held: Held,
}

/// See the module.
#[derive(Debug)]
pub struct FileNode {
    spec: FileSpec,
    open: Mutex<Open>,
    /// The same file, for requests.
    current: std::sync::RwLock<Arc<File>>,
    direct: AtomicBool,
    no_flush: AtomicBool,
    locking: bool,
    force_share: bool,
    read_only: bool,
    pub(super) alignment: AtomicU32,
    grows: bool,
    length: AtomicU64,
    /// Requests that write behind the end share it; whoever sets the length has it alone, or else it could cut off
    /// what another thread has just written.
    growth: RwLock<()>,
    syncs: Syncs,
    known: Mutex<Known>,
    discards: Discards,
    /// Nobody writes to the file, and a lock sees to it.
    holes_stay: AtomicBool,
}

/// What became of discards.
#[derive(Debug, Default)]
struct Discards {
    done: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
}

impl Discards {
    fn count(&self, bytes: u64, went_well: bool) {
        if went_well {
            self.done.fetch_add(1, Ordering::Relaxed);
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Most runs that are remembered.
const KNOWN_RUNS: usize = 4096;

/// What the file system has said about the file: runs of data and holes, by their first byte. Looking for the end of
/// a run takes as long as the run, so who goes through a file in steps would take the square of it. To take a hole
/// for data is never wrong; holes are remembered only while they must stay holes.
#[derive(Debug, Default)]
struct Known {
    runs: BTreeMap<u64, Run>,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    end: u64,
    data: bool,
}

impl Known {
    fn at(&self, start: u64) -> Option<Run> {
        self.runs.range(..=start).next_back().map(|(_, run)| *run).filter(|run| start < run.end)
    }

    fn learn(&mut self, start: u64, run: Run) {
        // What begins inside it ends with it.
        while let Some((&inside, _)) = self.runs.range(start..run.end).next() {
            self.runs.remove(&inside);
        }
        if self.runs.len() >= KNOWN_RUNS {
            self.runs.clear();
        }
        self.runs.insert(start, run);
    }
}

fn open_file(name: &str, write: bool, direct: bool) -> Result<File> {
    let opened = File::open(Path::new(name), OpenOptions { write, direct, ..OpenOptions::default() });
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(22) if direct => IoError::from(error)
            .with(format!("Could not open '{name}': file system may not support O_DIRECT")),
        _ => could_not_open(name, error),
    })?;
    check_writable(&file, write)?;
    Ok(file)
}

/// A device that refuses writes can be opened for them all the same.
fn check_writable(file: &File, write: bool) -> Result<()> {
    match write && file.is_read_only_device()? {
        true => Err(IoError::EACCES.with("The device is not writable: Permission denied")),
        false => Ok(()),
    }
}

fn could_not_open(name: &str, error: std::io::Error) -> IoError {
    IoError::from(error).context(format!("Could not open '{name}'"))
}

impl FileNode {
    /// Opens a file; `auto_read_only` falls back to reading when writing is not allowed.
    pub async fn open(
        spec: &FileSpec,
        options: &NodeOptions,
        read_only: bool,
        auto_read_only: bool,
    ) -> std::result::Result<Self, OpenError> {
        let (name, direct) = (spec.filename.as_str(), options.cache_direct);
        if spec.aio == Aio::Native && !direct {
            let text = "aio=native was specified, but it requires cache.direct=on, which was not specified.";
            return Err(OpenError::text(text.to_owned()));
        }
        if name.is_empty() {
            let text = format!("The '{}' block driver requires a file name", spec.driver);
            return Err(OpenError::text(text));
        }
        let mut read_only = read_only;
        let opened = match open_file(name, !read_only, direct) {
            Err(error) if auto_read_only && !read_only && may_not_write(&error) => {
                read_only = true;
                open_file(name, false, direct)
            }
            other => other,
        };
        let file = opened?;
        match (spec.driver, file.kind()) {
            ("file", FileKind::Regular)
            | ("host_device", FileKind::BlockDevice | FileKind::CharacterDevice) => {}
            ("file", _) => {
                return Err(OpenError::text(format!("'file' driver requires '{name}' to be a regular file")));
            }
            (driver, _) => {
                return Err(OpenError::text(format!(
                    "'{driver}' driver requires '{name}' to be either a character or block device"
                )));
            }
        }
        let grows = file.kind() == FileKind::Regular;
        let length = file.len().map_err(|error| could_not_open(name, error))?;
        let alignment = file.request_alignment();
        let locking = match spec.locking {
            Locking::Off => false,
            Locking::On => true,
            // Not every kernel and file system has locks of open files.
            Locking::Auto => file.is_locked_by_others(0).is_ok(),
        };
        let file = Arc::new(file);
        Ok(Self {
            spec: spec.clone(),
            open: Mutex::new(Open { file: file.clone(), writable: !read_only, held: Held::default() }),
            current: std::sync::RwLock::new(file),
            direct: AtomicBool::new(direct),
            no_flush: AtomicBool::new(options.cache_no_flush),
            locking,
            force_share: options.force_share,
            read_only,
            alignment: AtomicU32::new(alignment),
            grows,
            length: AtomicU64::new(length),
            growth: RwLock::new(()),
            syncs: Syncs::default(),
            discards: Discards::default(),
            known: Mutex::default(),
            holes_stay: AtomicBool::new(false),
        })
    }

    /// Makes durable what was written, and the times of the file with it, whatever the cache mode is.
    pub async fn sync(&self) -> Result<()> {
        let file = self.file();
        self.syncs.alone(file.sync()).await
    }

    /// Whether it was opened for reading only.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether other programs are told by locks what it is used for.
    pub(crate) fn is_locking(&self) -> bool {
        self.locking
    }

    /// Whether others who lock what they use would find it in use.
    pub fn is_locked(&self) -> bool {
        self.locking && self.open_state().held != Held::default()
    }

    /// The file as it is open now.
    pub fn handle(&self) -> Arc<File> {
        self.file()
    }

    fn file(&self) -> Arc<File> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where there was data there may be holes now.
    fn forget_data(&self) {
        *self.known() = Known::default();
    }

    fn open_state(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be held while writing up to `end`.
    async fn growing_to(&self, end: u64) -> Option<RwLockReadGuard<'_, ()>> {
        let grows = self.grows && end > self.length.load(Ordering::Acquire);
        if grows { Some(self.growth.read().await) } else { None }
    }

    /// Sets the length to `end` if that is more than it is.
    async fn lengthen_to(&self, end: u64) -> Result<()> {
        let _alone = self.growth.write().await;
        let file = self.file();
        if end > file.len()? {
            file.set_len(end)?;
        }
        self.grown_to(end);
        Ok(())
    }

    /// Something was written as far as `end`. A block device that takes it has grown since it was opened.
    fn grown_to(&self, end: u64) {
        let is_longer = end > self.length.load(Ordering::Relaxed);
        if is_longer && (self.grows || self.file().kind() == FileKind::BlockDevice) {
            self.length.fetch_max(end, Ordering::AcqRel);
        }
    }

    /// What was to write up to `end` has ended; if it failed, a part of it may be there.
    fn grown_by<E>(&self, written: &std::result::Result<(), E>, end: u64) {
        match written {
            Ok(()) => self.grown_to(end),
            Err(_) => self.grown_to(self.file().len().unwrap_or(0)),
        }
    }

    /// A device is as long as it is. Whoever has made it longer tells us with this.
    fn resize_device(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        if preallocation != Preallocation::Off {
            let mode = preallocation.name();
            let text = format!("Preallocation mode '{mode}' unsupported for this non-regular file");
            return Err(IoError::ENOTSUP.with(text));
        }
        let length = self.file().len()?;
        if size > length {
            return Err(IoError::EINVAL.with("Cannot grow device files"));
        }
        self.length.store(length, Ordering::Release);
        Ok(())
    }

    /// A file that ends within a block becomes longer when that block is written.
    fn check_end(&self, access: Access) -> Result<()> {
        let length = self.length.load(Ordering::Acquire).next_multiple_of(SECTOR);
        let is_odd = !length.is_multiple_of(self.alignment.load(Ordering::Relaxed).into());
        match is_odd && access.required.has(Perms::WRITE) && !access.required.has(Perms::RESIZE) {
            true => Err(IoError::EINVAL.with(
                "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment",
            )),
            false => Ok(()),
        }
    }

    /// Its options.
    pub fn spec(&self) -> &FileSpec {
        &self.spec
    }

    /// Past the page cache or through it from now on, with flushes or without; tells how it was before. To be called
    /// while no request is inside.
    pub fn set_cache(&self, direct: bool, no_flush: bool) -> Result<(bool, bool)> {
        let mut open = self.open_state();
        let was_direct = self.direct.swap(direct, Ordering::Relaxed);
        if direct != was_direct {
            let writable = open.writable;
            if let Err(error) = self.reopen(&mut open, writable) {
                self.direct.store(was_direct, Ordering::Relaxed);
                return Err(error);
            }
            self.alignment.store(open.file.request_alignment(), Ordering::Relaxed);
        }
        Ok((was_direct, self.no_flush.swap(no_flush, Ordering::Relaxed)))
    }

    /// Opens the file anew for `writable`, with the locks carried over before the old one goes.
    fn reopen(&self, open: &mut Open, writable: bool) -> Result<()> {
        // By its descriptor, not by its name: the name may lead elsewhere by now.
        let options = OpenOptions {
            write: writable,
            direct: self.direct.load(Ordering::Relaxed),
            ..OpenOptions::default()
        };
        let file =
            Arc::new(open.file.reopen(options).map_err(|error| could_not_open(&self.spec.filename, error))?);
        check_writable(&file, writable)?;
        let mut held = Held::default();
        if self.locking {
            locks::carry_over(&file, &mut held, open.held)?;
        }
        *open = Open { file: file.clone(), writable, held };
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = file;
        Ok(())
    }

    async fn fill(&self, mut range: ByteRange) -> Result<()> {
        let zeroes = Iov::zeroed(range.split(FILL).0.buffer_len());
        while !range.is_empty() {
            let (piece, rest) = range.split(FILL);
            self.file().write_at(piece.start(), &zeroes.slice(0, piece.buffer_len())).await?;
            range = rest;
        }
        Ok(())
    }
}

fn may_not_write(error: &IoError) -> bool {
    // EACCES, EPERM, EROFS
    matches!(error.errno(), 13 | 1 | 30)
}

/// The kernel's ways of saying that a file system cannot do something become ENOTSUP.
fn unsupported(error: std::io::Error) -> IoError {
    // EINVAL, ENOSYS, ENOTTY, EOPNOTSUPP, ENODEV, EPERM
    match error.raw_os_error() {
        Some(22 | 38 | 25 | 95 | 19 | 1) => IoError::ENOTSUP,
        _ => error.into(),
    }
}

#[async_trait]
impl Node for FileNode {
    fn driver(&self) -> &'static str {
        self.spec.driver
    }

    fn kind(&self) -> Kind {
        Kind::Protocol
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    /// In whole sectors, as QEMU counts; a file that ends in the middle of one reads as zeroes up to its end.
    fn length(&self, _cx: &Cx<'_>) -> u64 {
        self.length.load(Ordering::Acquire).next_multiple_of(SECTOR)
    }

    fn unwritten_is_zero(&self, _cx: &Cx<'_>) -> bool {
        self.grows
    }

    fn limits(&self, _cx: &Cx<'_>) -> Limits {
        let memory_alignment = self.alignment.load(Ordering::Relaxed);
        Limits { request_alignment: memory_alignment, memory_alignment, ..Limits::default() }
    }

    async fn read(&self, _cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        Ok(self.file().read_at(range.start(), &into).await?)
    }

    async fn write(&self, _cx: &Cx<'_>, range: ByteRange, from: Iov, flags: WriteFlags) -> Result<()> {
        if flags.compressed {
            return Err(IoError::ENOTSUP);
        }
        let _growing = self.growing_to(range.end()).await;
        let written = self.file().write_at(range.start(), &from).await;
        self.grown_by(&written, range.end());
        Ok(written?)
    }

    async fn write_zeroes(&self, cx: &Cx<'_>, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        let file = self.file();
        let length = self.length(cx);
        self.forget_data();
        if flags.may_unmap && range.end() <= length {
            match file.allocate(Allocate::PunchHole, range.start(), range.len()).await.map_err(unsupported) {
                Err(error) if error == IoError::ENOTSUP => {}
                done => return done,
            }
        }
        if self.grows && range.start() >= length && !flags.no_fallback {
            // Behind the end everything reads as zeroes already; only the length is missing.
            return self.lengthen_to(range.end()).await;
        }
        let _growing = self.growing_to(range.end()).await;
        file.allocate(Allocate::Zero, range.start(), range.len()).await.map_err(unsupported)?;
        self.grown_to(range.end());
        Ok(())
    }

    async fn discard(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        let range = range.before(self.length(cx));
        if range.is_empty() {
            return Ok(());
        }
        let punched = self.file().discard(range.start(), range.len()).await;
        self.discards.count(range.len(), punched.is_ok());
        self.forget_data();
        match punched.map_err(unsupported) {
            Err(error) if error == IoError::ENOTSUP => Ok(()),
            other => other,
        }
    }

    async fn flush(&self, _cx: &Cx<'_>) -> Result<()> {
        // Of a character device nothing is kept that could be made durable.
        if self.no_flush.load(Ordering::Relaxed) || self.file().kind() == FileKind::CharacterDevice {
            return Ok(());
        }
        let file = self.file();
        self.syncs.share(file.data_sync()).await
    }

    fn map_now(&self, cx: &Cx<'_>, range: ByteRange) -> Option<Extent> {
        let start = range.start();
        if start >= self.length(cx) {
            return Some(Extent::new(Place::Zero, range.len()));
        }
        let run = self.known().at(start)?;
        let place = if run.data { Place::Data(start) } else { Place::Zero };
        Some(Extent::new(place, run.end.min(range.end()) - start))
    }

    async fn map(&self, cx: &Cx<'_>, range: ByteRange) -> Result<Extent> {
        let file = self.file();
        let (start, end) = (range.start(), range.end());
        let length = self.length(cx);
        if start >= length {
            return Ok(Extent::new(Place::Zero, range.len()));
        }
        let Ok(data) = file.seek_data(start) else {
            return Ok(Extent::new(Place::Data(start), range.len()));
        };
        match data {
            Some(data) if data <= start => {
                let hole = file.seek_hole(start)?.unwrap_or(end).max(start + 1);
                self.known().learn(start, Run { end: hole, data: true });
                Ok(Extent::new(Place::Data(start), hole.min(end) - start))
            }
            data => {
                let data = data.unwrap_or(length).max(start + 1);
                if self.holes_stay.load(Ordering::Acquire) {
                    self.known().learn(start, Run { end: data, data: false });
                }
                Ok(Extent::new(Place::Zero, data.min(end) - start))
            }
        }
    }

    async fn reflink_to(&self, _cx: &Cx<'_>, range: ByteRange, to: &Cx<'_>, at: u64) -> Result<()> {
        let there = ByteRange::between(at, at.saturating_add(range.len()));
        to.reflink_from(there, self, range.start()).await
    }

    async fn reflink_from(&self, _cx: &Cx<'_>, range: ByteRange, from: &dyn Node, at: u64) -> Result<()> {
        let from = from.as_any().downcast_ref::<Self>().ok_or(IoError::ENOTSUP)?;
        if !self.grows || !from.grows {
            return Err(IoError::ENOTSUP);
        }
        let _growing = self.growing_to(range.end()).await;
        let shared = self.file().reflink(range.start(), &from.file(), at, range.len()).await;
        // Where there was data there may be a hole now.
        self.forget_data();
        self.grown_by(&shared, range.end());
        Ok(shared?)
    }

    async fn resize(&self, cx: &Cx<'_>, size: u64, preallocation: Preallocation) -> Result<()> {
        if !self.grows {
            return self.resize_device(size, preallocation);
        }
        let _alone = self.growth.write().await;
        self.forget_data();
        let (file, length) = (self.file(), self.length(cx));
        let cannot = |error: std::io::Error, what: &str| IoError::from(error).context(what);
        if size > length {
            match preallocation {
                Preallocation::Off => {}
                Preallocation::Metadata => {
                    return Err(IoError::ENOTSUP.with("Unsupported preallocation mode: metadata"));
                }
                Preallocation::Falloc => {
                    let reserved = file.allocate(Allocate::Reserve, length, size - length).await;
                    if let Err(error) = reserved {
                        let _ = file.set_len(length);
                        return Err(cannot(error, "Could not preallocate data for the new file"));
                    }
                }
                Preallocation::Full => {
                    // What no file can be as long as is refused before the disk is full.
                    file.set_len(size).map_err(|error| cannot(error, "Could not resize file"))?;
                    if let Err(error) = self.fill(ByteRange::between(length, size)).await {
                        let _ = file.set_len(length);
                        return Err(error.context("Could not write zeros for preallocation"));
                    }
                }
            }
        } else if size < length && preallocation != Preallocation::Off {
            return Err(IoError::ENOTSUP.with("Cannot use preallocation for shrinking files"));
        }
        file.set_len(size).map_err(|error| cannot(error, "Could not resize file"))?;
        self.length.store(size, Ordering::Release);
        Ok(())
    }

    async fn set_access(&self, _cx: &Cx<'_>, access: Access) -> Result<()> {
        self.check_end(access)?;
        let mut open = self.open_state();
        self.holes_stay.store(false, Ordering::Release);
        self.forget_data();
        if access.writable != open.writable {
            self.reopen(&mut open, access.writable)?;
        }
        if !self.locking {
            return Ok(());
        }
        let wanted = Held::wanted(access, self.force_share);
        let open = &mut *open;
        locks::gain(&open.file, &self.spec.filename, &mut open.held, wanted)?;
        locks::give_up(&open.file, &mut open.held, wanted);
        let others_may_write = self.force_share || access.shared.has(Perms::WRITE);
        self.holes_stay.store(!access.writable && !others_may_write, Ordering::Release);
        Ok(())
    }

    async fn close(&self, cx: &Cx<'_>) -> Result<()> {
        let writable = self.open_state().writable;
        let flushed = if writable { self.flush(cx).await } else { Ok(()) };
        let mut open = self.open_state();
        let open = &mut *open;
        locks::give_up(&open.file, &mut open.held, Held::default());
        flushed
    }

    fn exact_filename(&self) -> Option<String> {
        let name = &self.spec.filename;
        // Who reads `a:b` somewhere would take `a` for a protocol.
        Some(if names::has_protocol(name) { format!("./{name}") } else { name.clone() })
    }

    fn allocated_size(&self) -> Option<u64> {
        self.file().allocated_bytes().ok()
    }

    fn counts(&self) -> Vec<(&'static str, u64)> {
        let Discards { done, failed, bytes } = &self.discards;
        let counts = [("discard-nb-ok", done), ("discard-nb-failed", failed), ("discard-bytes-ok", bytes)];
        counts.map(|(name, count)| (name, count.load(Ordering::Relaxed))).to_vec()
    }

    fn image_info(&self) -> ImageInfo {
        let format_specific = Some(FormatInfo { kind: "file", fields: Vec::new() });
        ImageInfo { format_specific, dirty: Some(false), ..ImageInfo::default() }
    }
}

//! An open image: its state, how it is opened, and when it may be written to.
//!
//! Locks, in the order in which they are taken (a task that holds one never takes one further left):
//!
//! | lock | kind | held for |
//! | --- | --- | --- |
//! | `stored_turn` | async, one | changing what the image says of its bitmaps ([`crate::stored`]); before the first write too |
//! | `ranges` | guest clusters | an allocating write, zeroing, discarding or populating them, its data I/O included |
//! | `commit` | async, one | writing metadata back ([`crate::commit`]) |
//! | `tables` | async, per L1 entry | making an L2 table |
//! | `refcounts.growth` | async, one | making refcount blocks and growing their table |
//! | `loads` | async, per slice | reading a slice of a table |
//! | `header_turn` | async, one | writing the header |
//! | the others | plain | a few instructions, never across I/O |

mod corruption;
mod options;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use underlay_graph::range_lock::RangeLock;
use underlay_graph::{ByteRange, Cx, IoError, Result};
use underlay_sys::Iov;

pub(crate) use self::corruption::hex;
pub use self::corruption::{Corruption, OnCorrupt};
pub use self::options::{CheckedOptions, OnRepair, OpenOptions};
use self::options::{cache_sizes, cleaner, layout, slices};
use crate::ahead::Ahead;
use crate::bitmaps::BitmapError;
use crate::cache::SliceCache;
use crate::check::{Finding, Fix, check};
use crate::cleaner::Cleaner;
use crate::commit::Commits;
use crate::compress::Decoded;
use crate::crash_safe;
use crate::entry::Layout;
use crate::features;
use crate::frees::{Epoch, Frees};
use crate::header::{Crypt, Header, HeaderError, Purpose};
use crate::mapping::L1;
use crate::metadata::Metadata;
use crate::refcount::Refcounts;
use crate::reserve::Reserved;
use crate::snapshot_changes::Known;
use crate::stored::{self, Stored};
use crate::update::write_features;
use crate::words::to_words;

/// Why an image cannot be opened. The texts are QEMU's where QEMU has one.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum OpenError {
    /// The header is not one that we can work with.
    #[error("{0}")]
    Header(#[from] HeaderError),
    /// The bitmap directory is not one that we can work with.
    #[error("{0}")]
    Bitmaps(#[from] BitmapError),
    /// Reading failed.
    #[error("{what}: {error}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        error: IoError,
    },
    /// An option is wrong.
    #[error("{0}")]
    Option(String),
    /// Something that comes later.
    #[error("{0}")]
    Unsupported(&'static str),
}

/// Many async locks behind numbers: two numbers may share one, which costs time but is never wrong.
#[derive(Debug)]
pub(crate) struct Stripes(Box<[tokio::sync::Mutex<()>]>);

impl Stripes {
    pub(crate) fn new() -> Self {
        Self((0..64).map(|_| tokio::sync::Mutex::new(())).collect())
    }

    pub(crate) async fn lock(&self, number: u64) -> tokio::sync::MutexGuard<'_, ()> {
        self.0[usize::try_from(number % 64).unwrap_or(0)].lock().await
    }

    /// Locks fewer than 64 numbers in a row: always in the same order of locks, so that nobody waits in a circle.
    pub(crate) async fn lock_run(&self, first: u64, last: u64) -> Vec<tokio::sync::MutexGuard<'_, ()>> {
        let mut stripes: Vec<u64> = (first..=last).map(|number| number % 64).collect();
        stripes.sort_unstable();
        let mut guards = Vec::with_capacity(stripes.len());
        for stripe in stripes {
            guards.push(self.lock(stripe).await);
        }
        guards
    }
}

/// An open qcow2 image.
#[derive(Debug)]
pub struct Qcow2 {
    pub(crate) layout: Layout,
    options: RwLock<Arc<OpenOptions>>,
    /// As on disk (or about to be written there, under `header_turn`).
    header: Mutex<Header>,
    pub(crate) header_turn: tokio::sync::Mutex<()>,
    /// Virtual size in bytes.
    size: AtomicU64,
    pub(crate) l1: RwLock<L1>,
    pub(crate) l2: SliceCache,
    pub(crate) loads: Stripes,
    pub(crate) tables: Stripes,
    pub(crate) refcounts: Refcounts,
    cleaner: Mutex<Option<Cleaner>>,
    pub(crate) metadata: RwLock<Metadata>,
    pub(crate) ranges: RangeLock,
    pub(crate) commits: Commits,
    pub(crate) frees: Mutex<Frees>,
    pub(crate) reserved: Reserved,
    /// Held by everybody who uses an answer of the mapping; replaced whenever clusters have been dropped.
    pub(crate) epoch: RwLock<Epoch>,
    pub(crate) decoded: Mutex<Option<Decoded>>,
    /// One compressed cluster finds its place at a time.
    pub(crate) packing: tokio::sync::Mutex<()>,
    /// Whether the file has holes below the image's data; see [`crate::mapping`].
    pub(crate) preallocated: OnceLock<bool>,
    /// One change of the size at a time.
    pub(crate) resizing: tokio::sync::Mutex<()>,
    pub(crate) snapshots: RwLock<Known>,
    pub(crate) stored: Mutex<Stored>,
    /// What makes the bitmaps survive a crash, and whether the header says that it holds.
    pub(crate) ahead: OnceLock<Ahead>,
    pub(crate) ahead_holds: AtomicBool,
    pub(crate) stored_turn: tokio::sync::Mutex<()>,
    writable: AtomicBool,
    /// Something has been written since the image became writable.
    modified: AtomicBool,
    /// Where the file must end at least, in bytes; see [`Qcow2::fill_up`].
    pub(crate) data_end: AtomicU64,
    /// Unusable after a fatal corruption.
    corrupt: AtomicBool,
    warned: AtomicBool,
}

impl Qcow2 {
    /// Opens the image in `file`, for reading; [`underlay_graph::Node::set_access`] makes it writable.
    pub async fn open(file: &Cx<'_>, options: OpenOptions) -> std::result::Result<Self, OpenError> {
        let purpose = if options.repair { Purpose::Check } else { Purpose::Use };
        let header = Header::read_for(file, purpose).await?;
        check_supported(&header)?;
        let layout = layout(&header, &options)?;
        let (l2_cache, refcount_cache) = cache_sizes(&header, &options)?;
        let l1 = read_l1(file, &header).await?;
        let notes = match options.distrust_bitmaps {
            true => None,
            false => crash_safe::load(file, &header).await.map_err(BitmapError::Directory)?,
        };
        let stored = stored::load(file, &header, notes.as_ref(), options.distrust_bitmaps).await?;
        let snapshots = Known::read(file, &header).await;
        let refcounts = Refcounts::new(&header, |slice| slices(refcount_cache, slice));
        let l2 = SliceCache::new(slices(l2_cache, layout.slice_bytes()));
        let cleaner = cleaner(&options, &l2, &refcounts);
        Ok(Self {
            layout,
            options: RwLock::new(Arc::new(options)),
            size: AtomicU64::new(header.virtual_size()),
            header: Mutex::new(header),
            header_turn: tokio::sync::Mutex::default(),
            l1: RwLock::new(l1),
            l2,
            loads: Stripes::new(),
            tables: Stripes::new(),
            refcounts,
            cleaner: Mutex::new(cleaner),
            metadata: RwLock::default(),
            ranges: RangeLock::default(),
            commits: Commits::default(),
            frees: Mutex::default(),
            reserved: Reserved::default(),
            epoch: RwLock::default(),
            decoded: Mutex::default(),
            packing: tokio::sync::Mutex::default(),
            preallocated: OnceLock::new(),
            resizing: tokio::sync::Mutex::default(),
            snapshots: RwLock::new(snapshots),
            stored: Mutex::new(stored),
            ahead_holds: AtomicBool::new(notes.is_some()),
            ahead: notes.map_or_else(OnceLock::new, OnceLock::from),
            stored_turn: tokio::sync::Mutex::default(),
            writable: AtomicBool::new(false),
            data_end: AtomicU64::new(0),
            modified: AtomicBool::new(false),
            corrupt: AtomicBool::new(false),
            warned: AtomicBool::new(false),
        })
    }

    pub(crate) fn header_mut(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The header as it is now.
    pub fn header(&self) -> Header {
        self.header_mut().clone()
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// The disk has another size from now on.
    pub(crate) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    /// Whether the guest must never see what is below once the image has content of its own there.
    pub(crate) fn has_backing(&self, cx: &Cx<'_>) -> bool {
        cx.backing().is_some() || self.header_mut().backing_file.is_some()
    }

    /// Whether somebody writes to the image.
    pub fn is_writable(&self) -> bool {
        self.writable.load(Ordering::Relaxed)
    }

    /// Called first by everything that changes the image.
    pub(crate) async fn begin_change(&self, cx: &Cx<'_>) -> Result<()> {
        self.usable()?;
        if self.modified.load(Ordering::Acquire) {
            return Ok(());
        }
        if !self.is_writable() {
            return Err(IoError::EPERM.with("Block node is read-only"));
        }
        let _turn = self.stored_turn.lock().await;
        self.settle_bitmaps(cx).await?;
        self.modified.store(true, Ordering::Release);
        Ok(())
    }

    /// What is changed until the image is read-only again, guests cannot see: what is said of the bitmaps stays true.
    pub(crate) fn change_only_metadata(&self) {
        self.modified.store(true, Ordering::Release);
    }

    /// The next change is as if it were the first.
    pub(crate) fn forget_modified(&self) {
        self.modified.store(false, Ordering::Release);
    }

    /// The image gets ready for writing.
    pub(crate) async fn become_writable(&self, cx: &Cx<'_>) -> Result<()> {
        if self.is_writable() {
            return Ok(());
        }
        let header = self.header();
        self.snapshots_error().map_or(Ok(()), Err)?;
        if !self.options().repair {
            if header.has(features::CORRUPT) {
                return Err(IoError::EACCES.with("qcow2: Image is corrupt; cannot be opened read/write"));
            }
            if header.has(features::DIRTY) {
                self.repair_dirty(cx).await?;
            }
        }
        self.load_refcount_table(cx).await?;
        self.collect_metadata(cx).await;
        let unknown = self.header().autoclear & !features::KNOWN_AUTOCLEAR;
        if unknown != 0 {
            let _turn = self.header_turn.lock().await;
            let mut header = self.header();
            header.autoclear &= !unknown;
            write_features(&cx.below(), &header).await?;
            self.header_mut().autoclear &= !unknown;
        }
        self.drop_stale_bitmaps(cx).await?;
        self.writable.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Nobody writes any more.
    pub(crate) fn become_read_only(&self) {
        self.writable.store(false, Ordering::Relaxed);
        self.forget_modified();
    }

    /// Repairs an image that was not closed cleanly, so that its refcounts can be relied on.
    async fn repair_dirty(&self, cx: &Cx<'_>) -> Result<()> {
        let failed =
            |error: &dyn fmt::Display| IoError::EIO.with(format!("Could not repair dirty image: {error}"));
        let tell = |finding: Finding| {
            let (Finding::Line(line) | Finding::Error(line)) = finding;
            match &self.options().on_repair {
                Some(tell) => tell(&line),
                None => tracing::warn!("{line}"),
            }
        };
        let file = cx.below();
        let done =
            check(&file, Fix::All, &mut |finding| tell(finding)).await.map_err(|error| failed(&error))?;
        let left = check(&file, Fix::None, &mut |_| ()).await.map_err(|error| failed(&error))?;
        // An entry of the snapshot table that lacks what version 3 asks for can be used as it is.
        if left.corruptions > done.incomplete_snapshots || left.check_errors > 0 {
            return Err(failed(&"some errors could not be repaired"));
        }
        self.read_again(cx).await
    }

    /// Takes everything from the disk that somebody else has changed there. Nothing may be waiting to be written.
    pub(crate) async fn read_again(&self, cx: &Cx<'_>) -> Result<()> {
        let file = cx.below();
        let header = Header::read(&file).await.map_err(|error| IoError::EIO.with(error.to_string()))?;
        let l1 = read_l1(&file, &header).await.map_err(|error| IoError::EIO.with(error.to_string()))?;
        let snapshots = Known::read(&file, &header).await;
        if let Some(error) = &snapshots.error {
            return Err(IoError::EIO.with(error.to_string()));
        }
        self.notice_snapshots(snapshots);
        self.set_size(header.virtual_size());
        *self.header_mut() = header;
        *self.l1_mut() = l1;
        self.l2.clear();
        self.reload_refcounts(cx).await
    }
}

fn check_supported(header: &Header) -> std::result::Result<(), OpenError> {
    let later = |what| Err(OpenError::Unsupported(what));
    match header.crypt {
        Crypt::None => {}
        Crypt::Aes => return later("Images with the old AES encryption are not supported"),
        Crypt::Luks => return later("Images with LUKS encryption are not supported yet"),
    }
    if header.has(features::DATA_FILE) {
        return later("Images with an external data file are not supported yet");
    }
    Ok(())
}

async fn read_l1(file: &Cx<'_>, header: &Header) -> std::result::Result<L1, OpenError> {
    let len = header.l1_bytes();
    let range = ByteRange::new(header.l1_offset, len)
        .ok_or(OpenError::Io { what: "Could not read L1 table", error: IoError::EINVAL })?;
    let buffer = Iov::scratch(range.buffer_len());
    if !range.is_empty() {
        let read = file.read(range, buffer.clone()).await;
        read.map_err(|error| OpenError::Io { what: "Could not read L1 table", error })?;
    }
    Ok(L1::new(header.l1_offset, to_words(&buffer.to_vec()).into_vec()))
}

//! The raw format: the bytes of the file below as they are, or a window of them.

use std::any::Any;

use async_trait::async_trait;
use underlay_graph::bitmaps::{BitmapStore, PlanBitmap};
use underlay_graph::{
    Access, ByteRange, Cx, Extent, Format, GraphError, IoError, Kind, Limits, Node, Perms, Place,
    Preallocation, Result, Role, View, WriteFlags, ZeroFlags,
};
use underlay_sys::Iov;

use crate::beside::home::FileHome;
use crate::beside::{Beside, Writing};
use crate::options::Given;
use crate::probe::guess;

/// Sizes of a window are multiples of this many bytes.
pub const SECTOR: u64 = 512;
/// The same, as a length in memory.
const SECTOR_LEN: usize = 512;

/// Why a disk that was not opened by its own options has no bitmaps.
const NO_PLACE: &str = "It was reopened on another file";

/// Options of the driver.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RawOptions {
    /// Where the disk begins in the file.
    pub offset: Option<u64>,
    /// Length of the disk; the rest of the file when absent.
    pub size: Option<u64>,
    /// Both as they were given, for the file name.
    pub given: Given,
}

/// A raw disk.
#[derive(Debug)]
pub struct Raw {
    offset: u64,
    size: Option<u64>,
    given: Given,
    guessed: bool,
    /// Who keeps its bitmaps, or why nobody can.
    bitmaps: std::result::Result<Beside, String>,
}

impl Raw {
    /// Opens a window of `file`. The error texts are QEMU's.
    pub fn open(file: &Cx<'_>, options: RawOptions) -> Result<Self> {
        let offset = options.offset.unwrap_or(0);
        let length = file.length();
        if offset > length {
            let text =
                format!("Offset ({offset}) cannot be greater than size of the containing file ({length})");
            return Err(IoError::EINVAL.with(text));
        }
        if let Some(size) = options.size {
            if size > length - offset {
                return Err(IoError::EINVAL.with(format!(
                    "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of \
                     the containing file ({length})"
                )));
            }
            if !size.is_multiple_of(SECTOR) {
                return Err(IoError::EINVAL.with(format!("Specified size is not multiple of {SECTOR}")));
            }
        }
        let bitmaps = Err(NO_PLACE.to_owned());
        Ok(Self { offset, size: options.size, given: options.given, guessed: false, bitmaps })
    }

    /// With the bitmaps that are beside the disk, if it is all of a local file.
    pub async fn with_bitmaps(self, file: &View) -> Self {
        let home = match self.window() {
            Some(_) => Err("The disk is only a part of its file".to_owned()),
            None => FileHome::of(file),
        };
        let bitmaps = match home {
            Ok(home) => Ok(Beside::open(std::sync::Arc::new(home), file.cx().length()).await),
            Err(why) => Err(why),
        };
        Self { bitmaps, ..self }
    }

    /// With bitmaps that are kept elsewhere.
    pub fn with_bitmaps_in(self, bitmaps: Beside) -> Self {
        Self { bitmaps: Ok(bitmaps), ..self }
    }

    /// The same way to look at another file, for whose bitmaps there is no place.
    pub fn elsewhere(&self) -> Self {
        let bitmaps = Err(NO_PLACE.to_owned());
        Self { given: self.given.clone(), bitmaps, ..*self }
    }

    /// To be held while the disk is written to.
    async fn writing(&self) -> Result<Option<Writing>> {
        match &self.bitmaps {
            Ok(bitmaps) => bitmaps.writing().await,
            Err(_) => Ok(None),
        }
    }

    /// Whether it is as these options would make it.
    pub fn has_options(&self, options: &RawOptions) -> bool {
        self.offset == options.offset.unwrap_or(0) && self.size == options.size
    }

    /// Nobody said that this is raw. Whoever may write to it could make it look like an image that names other
    /// files, and get at these when it is opened the next time: no such first sector is written.
    pub fn guessed(self) -> Self {
        Self { guessed: true, ..self }
    }

    /// EPERM when the write would make it look like another format. Writes are whole sectors when it was guessed.
    fn stays_raw(&self, range: ByteRange, from: &Iov) -> Result<()> {
        let mut first = [0; SECTOR_LEN];
        if !self.guessed || range.start() > 0 || from.len() < first.len() {
            return Ok(());
        }
        from.read_at(0, &mut first);
        if guess(&first) == "raw" { Ok(()) } else { Err(IoError::EPERM) }
    }

    /// The options that make this more than the plain file: `offset` and `size`, where given.
    pub fn window(&self) -> Option<&Given> {
        Some(&self.given).filter(|given| !given.is_empty())
    }

    /// The same bytes in the file, cut at the end of the disk's address space.
    fn in_file(&self, range: ByteRange) -> ByteRange {
        let start = self.offset.saturating_add(range.start());
        ByteRange::between(start, start.saturating_add(range.len()))
    }

    /// For writes: EIO when a window with a fixed size would be left.
    fn in_window(&self, range: ByteRange) -> Result<ByteRange> {
        if self.size.is_some_and(|size| range.end() > size) {
            return Err(IoError::ENOSPC);
        }
        Ok(self.in_file(range))
    }
}

#[async_trait]
impl Format for Raw {
    fn map_cached(&self, range: ByteRange) -> Option<Extent> {
        Some(Extent { recurse: true, ..Extent::new(Place::Data(self.offset + range.start()), range.len()) })
    }

    async fn read_encoded(&self, _cx: &Cx<'_>, _range: ByteRange, _into: Iov) -> Result<()> {
        Err(IoError::EIO)
    }
}

#[async_trait]
impl Node for Raw {
    fn driver(&self) -> &'static str {
        "raw"
    }

    fn kind(&self) -> Kind {
        Kind::Format
    }

    fn keeps_metadata(&self) -> bool {
        false
    }

    fn child_access(&self, access: Access, role: Role) -> Option<(Perms, Perms)> {
        // It is a filter, unless it shows a window: then the file is to stay as long as it is.
        let shared = self.window().map_or(access.shared, |_| access.shared.without(Perms::RESIZE));
        (role == Role::File).then_some((access.required, shared))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_format(&self) -> Option<&dyn Format> {
        Some(self)
    }

    fn as_bitmap_store(&self) -> Option<&dyn BitmapStore> {
        match &self.bitmaps {
            Ok(bitmaps) => Some(bitmaps),
            Err(_) => Some(self),
        }
    }

    fn length(&self, cx: &Cx<'_>) -> u64 {
        let rest = cx.below().length().saturating_sub(self.offset);
        self.size.map_or(rest, |size| size.min(rest))
    }

    fn unwritten_is_zero(&self, cx: &Cx<'_>) -> bool {
        cx.below().unwritten_is_zero()
    }

    fn limits(&self, cx: &Cx<'_>) -> Limits {
        let below = cx.below().limits();
        let smallest = if self.guessed { 512 } else { 1 };
        Limits { request_alignment: below.request_alignment.max(smallest), ..below }
    }

    async fn read(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        let inside = range.before(self.size.unwrap_or(u64::MAX));
        let (now, rest) = (inside.buffer_len(), into.len() - inside.buffer_len());
        into.slice(now, rest).fill(0);
        cx.below().read(self.in_file(inside), into.slice(0, now)).await
    }

    async fn write(&self, cx: &Cx<'_>, range: ByteRange, from: Iov, flags: WriteFlags) -> Result<()> {
        if flags.compressed {
            return Err(IoError::ENOTSUP);
        }
        self.stays_raw(range, &from)?;
        let _writing = self.writing().await?;
        cx.below().write(self.in_window(range)?, from, flags).await
    }

    async fn write_zeroes(&self, cx: &Cx<'_>, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        let _writing = self.writing().await?;
        cx.below().write_zeroes(self.in_window(range)?, flags).await
    }

    async fn discard(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        let _writing = self.writing().await?;
        cx.below().discard(self.in_window(range)?).await
    }

    async fn flush(&self, cx: &Cx<'_>) -> Result<()> {
        cx.below().flush().await
    }

    fn map_now(&self, _cx: &Cx<'_>, range: ByteRange) -> Option<Extent> {
        self.map_cached(range)
    }

    async fn map(&self, _cx: &Cx<'_>, range: ByteRange) -> Result<Extent> {
        Ok(Extent { recurse: true, ..Extent::new(Place::Data(self.offset + range.start()), range.len()) })
    }

    async fn reflink_to(&self, cx: &Cx<'_>, range: ByteRange, to: &Cx<'_>, at: u64) -> Result<()> {
        if self.size.is_some_and(|size| range.end() > size) {
            return Err(IoError::EINVAL);
        }
        cx.below().reflink(self.in_file(range), to, at).await
    }

    async fn reflink_from(&self, cx: &Cx<'_>, range: ByteRange, from: &dyn Node, at: u64) -> Result<()> {
        if self.guessed && range.start() == 0 {
            // Who knows what it would look like.
            return Err(IoError::EINVAL);
        }
        let _writing = self.writing().await?;
        cx.below().reflink_from(self.in_window(range)?, from, at).await
    }

    async fn resize(&self, cx: &Cx<'_>, size: u64, preallocation: Preallocation) -> Result<()> {
        if self.size.is_some() {
            return Err(IoError::ENOTSUP.with("Cannot resize fixed-size raw disks"));
        }
        let Some(size) = self.offset.checked_add(size).filter(|size| *size <= i64::MAX as u64) else {
            return Err(IoError::EINVAL.with("Disk size too large for the chosen offset"));
        };
        if let Ok(bitmaps) = &self.bitmaps {
            bitmaps.check_can_be_resized(size.next_multiple_of(SECTOR))?;
        }
        let _writing = self.writing().await?;
        let below = cx.below();
        below.node().resize(&below, size, preallocation).await
    }

    async fn close(&self, cx: &Cx<'_>) -> Result<()> {
        if let Ok(bitmaps) = &self.bitmaps {
            bitmaps.close().await;
        }
        self.flush(cx).await
    }
}

/// For a disk whose bitmaps nobody can keep.
#[async_trait]
impl BitmapStore for Raw {
    fn loaded(&self) -> Vec<PlanBitmap> {
        Vec::new()
    }

    fn check_new(
        &self,
        cx: &Cx<'_>,
        _others: &[PlanBitmap],
        _name: &str,
        _granularity: u64,
    ) -> std::result::Result<(), GraphError> {
        let why = self.bitmaps.as_ref().err().map_or("Operation not supported", String::as_str);
        let node = cx.view().name();
        Err(GraphError::new(format!("Can't store persistent bitmaps to {node}: {why}")))
    }

    async fn begin(&self, _cx: &Cx<'_>) -> Result<()> {
        Ok(())
    }

    async fn store(&self, _cx: &Cx<'_>, _bitmaps: &[PlanBitmap]) -> Result<()> {
        Ok(())
    }

    fn is_stored(&self) -> bool {
        true
    }

    fn has(&self, _name: &str) -> bool {
        false
    }

    async fn remove(&self, _cx: &Cx<'_>, _name: &str) -> Result<()> {
        Ok(())
    }
}

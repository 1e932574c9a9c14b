//! The bitmaps stored in an image, as they are on disk: the directory says what they are called and where their tables
//! are, a table where the bits are. What an open image does with them: [`crate::stored`]. Source: qcow2.rst, "Bitmaps
//! extension", "Bitmap directory", "Bitmap table".

use underlay_graph::{ByteRange, Cx, IoError};
use underlay_sys::Iov;

use crate::check::words;
use crate::header::{Header, until_nul};

/// Bytes of a directory entry's fixed part.
const FIXED: usize = 24;
/// Largest bitmap table in bytes. QEMU's limit.
const MAX_TABLE: u64 = 64 << 20;
/// Largest bitmap in bytes. QEMU's limit.
pub(crate) const MAX_BITMAP: u64 = 1 << 29;
/// Longest name in bytes. QEMU's limit.
pub(crate) const MAX_NAME: usize = 1023;
/// What the granularity can be, as powers of two. QEMU's limits.
pub(crate) const GRANULARITY_BITS: std::ops::RangeInclusive<u32> = 9..=31;
/// The only kind of bitmap that there is: "dirty tracking bitmap".
const KIND: u8 = 1;
/// A table entry without a cluster whose bits are all set.
pub(crate) const ALL_ONES: u64 = 1;
/// Flag: was not saved after its last change.
pub const IN_USE: u32 = 1;
/// Flag: to be kept up to date from opening on.
pub const AUTO: u32 = 2;
/// Bits of a table entry that hold a cluster's offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// One entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBitmap {
    /// Its name.
    pub name: String,
    /// The name as stored; no encoding is promised.
    pub(crate) raw_name: Vec<u8>,
    /// [`IN_USE`], [`AUTO`].
    pub flags: u32,
    /// A bit stands for `1 << granularity_bits` bytes of the disk.
    pub granularity_bits: u32,
    /// Where its table is.
    pub table_offset: u64,
    /// How many entries that has.
    pub table_entries: u32,
}

impl StoredBitmap {
    /// Bytes of the table.
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.table_entries) * 8
    }
}

/// What is wrong with the bitmaps. The texts are QEMU's.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
#[allow(missing_docs)]
pub enum BitmapError {
    #[error("Failed to read bitmap directory: {0}")]
    Directory(IoError),
    #[error("Requested bitmap directory size is zero")]
    EmptyDirectory,
    #[error("Broken bitmap directory")]
    Broken,
    #[error("Bitmap extra data is not supported")]
    Extra,
    #[error("Bitmap '{0}' doesn't satisfy the constraints")]
    Constraints(String),
    #[error("Less bitmaps found than specified in header extension")]
    Less,
    #[error("More bitmaps found than specified in header extension")]
    More,
    #[error("Could not read bitmap_table table from image for bitmap '{name}': {error}")]
    Table { name: String, error: IoError },
    #[error("Could not read bitmap '{name}' from image: {error}")]
    Bits { name: String, error: IoError },
    #[error("Bitmap already exists: {0}")]
    Twice(String),
    #[error("The bitmaps of the image would take more than {0} bytes of memory")]
    TooMuch(u64),
}

/// Reads the directory; empty when the image has no (valid) bitmaps.
pub async fn read(file: &Cx<'_>, header: &Header) -> Result<Vec<StoredBitmap>, BitmapError> {
    let Some(extension) = header.extensions.bitmaps else { return Ok(Vec::new()) };
    if extension.directory.len == 0 {
        return Err(BitmapError::EmptyDirectory);
    }
    let range = ByteRange::new(extension.directory.offset, extension.directory.len)
        .ok_or(BitmapError::Directory(IoError::EIO))?;
    let into = Iov::scratch(range.buffer_len());
    file.read(range, into.clone()).await.map_err(BitmapError::Directory)?;
    parse(&into.to_vec(), extension.count, header)
}

/// The directory's bytes as bitmaps, checked.
pub fn parse(mut bytes: &[u8], count: u32, header: &Header) -> Result<Vec<StoredBitmap>, BitmapError> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let (bitmap, len) = entry(bytes, header)?;
        if all.len() as u64 == u64::from(count) {
            return Err(BitmapError::More);
        }
        all.push(bitmap);
        bytes = &bytes[len..];
    }
    if (all.len() as u64) < u64::from(count) {
        return Err(BitmapError::Less);
    }
    Ok(all)
}

fn entry(bytes: &[u8], header: &Header) -> Result<(StoredBitmap, usize), BitmapError> {
    let fixed = bytes.get(..FIXED).ok_or(BitmapError::Broken)?;
    let word = |at: usize| u32::from_be_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
    let quad = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
    let (kind, granularity_bits) = (fixed[16], fixed[17]);
    let name_len = usize::from(u16::from_be_bytes([fixed[18], fixed[19]]));
    let extra = usize::try_from(word(20)).map_err(|_| BitmapError::Broken)?;
    let end = FIXED.checked_add(extra).and_then(|at| at.checked_add(name_len)).ok_or(BitmapError::Broken)?;
    let len = end.next_multiple_of(8);
    if len > bytes.len() {
        return Err(BitmapError::Broken);
    }
    if extra != 0 {
        return Err(BitmapError::Extra);
    }
    let raw_name = bytes[end - name_len..end].to_vec();
    let bitmap = StoredBitmap {
        name: String::from_utf8_lossy(until_nul(&raw_name)).into_owned(),
        raw_name,
        flags: word(12),
        granularity_bits: u32::from(granularity_bits),
        table_offset: quad(0),
        table_entries: word(8),
    };
    let known = kind == KIND && bitmap.flags & !(IN_USE | AUTO) == 0;
    if known && (1..=MAX_NAME).contains(&name_len) && fits(&bitmap, header) {
        Ok((bitmap, len))
    } else {
        Err(BitmapError::Constraints(bitmap.name))
    }
}

/// The directory as it goes to disk.
pub(crate) fn serialise(bitmaps: &[StoredBitmap]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for bitmap in bitmaps {
        bytes.extend(bitmap.table_offset.to_be_bytes());
        bytes.extend(bitmap.table_entries.to_be_bytes());
        bytes.extend(bitmap.flags.to_be_bytes());
        // Both were checked when the bitmap was read or made.
        bytes.extend([KIND, u8::try_from(bitmap.granularity_bits).unwrap_or(u8::MAX)]);
        bytes.extend(u16::try_from(bitmap.raw_name.len()).unwrap_or(u16::MAX).to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&bitmap.raw_name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

/// Bytes that a bitmap of that name takes in the directory.
pub(crate) fn entry_len(name_len: usize) -> u64 {
    (FIXED + name_len).next_multiple_of(8) as u64
}

/// Bytes that the bits of a disk of `size` bytes take, a bit for each granule.
pub(crate) fn bytes_of_bits(size: u64, granularity_bits: u32) -> u64 {
    size.div_ceil(1 << granularity_bits).div_ceil(8)
}

/// Whether the table is where a table may be, not larger than a bitmap can be and, if it is to be relied on, large
/// enough for the disk.
fn fits(bitmap: &StoredBitmap, header: &Header) -> bool {
    let bytes = bitmap.table_bytes();
    let reach = u128::from(bitmap.table_entries) * u128::from(header.cluster_size()) * 8;
    let enough = bitmap.flags & IN_USE != 0
        || u128::from(header.virtual_size()) <= reach << bitmap.granularity_bits.min(31);
    enough
        && bitmap.table_entries > 0
        && bitmap.table_offset != 0
        && bitmap.table_offset.is_multiple_of(header.cluster_size())
        && GRANULARITY_BITS.contains(&bitmap.granularity_bits)
        && bytes <= MAX_TABLE
        && u64::from(bitmap.table_entries) * header.cluster_size()
            <= MAX_BITMAP.next_multiple_of(header.cluster_size())
}

/// Reads a bitmap's table: for each cluster of bits where it is, or 0 (no bit is set), or [`ALL_ONES`].
pub(crate) async fn table(
    file: &Cx<'_>,
    bitmap: &StoredBitmap,
    header: &Header,
) -> Result<Vec<u64>, BitmapError> {
    let failed = |error| BitmapError::Table { name: bitmap.name.clone(), error };
    let range = ByteRange::new(bitmap.table_offset, bitmap.table_bytes()).ok_or(failed(IoError::EIO))?;
    let into = Iov::scratch(range.buffer_len());
    file.read(range, into.clone()).await.map_err(failed)?;
    let table: Vec<u64> = words(&into.to_vec()).collect();
    for word in &table {
        let offset = word & OFFSET;
        // Without a cluster, bit 0 says "all ones".
        let flags = if offset == 0 { ALL_ONES } else { 0 };
        if word & !OFFSET & !flags != 0 || !offset.is_multiple_of(header.cluster_size()) {
            return Err(failed(IoError::EINVAL));
        }
    }
    Ok(table)
}

/// Reads a bitmap's table and gives the offsets of its data clusters.
pub async fn data_clusters(
    file: &Cx<'_>,
    bitmap: &StoredBitmap,
    header: &Header,
) -> Result<Vec<u64>, BitmapError> {
    let mut table = table(file, bitmap, header).await?;
    table.retain(|offset| *offset > ALL_ONES);
    Ok(table)
}

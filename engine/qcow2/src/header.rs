//! The first cluster of an image: fixed fields, extensions, the backing file's name.
//!
//! Bytes become a raw struct, the raw struct becomes a checked [`Header`], and only that travels. [`Header::parse`]
//! does no I/O, allocates at most a few clusters, and can be called by a fuzzer. The checks come in
//! QEMU's order with QEMU's texts, so that a broken image gives the same message from both. [`Header::serialise`]
//! writes what QEMU writes: fixed fields, extensions, end marker, then the name.
//! Source: qcow2.rst, "Header"; limits are QEMU's where the text says so.

use std::mem::{offset_of, size_of};

use underlay_graph::{BackingRef, ByteRange, Cx, IoError};
use underlay_sys::Iov;
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::extensions::{self, Around, Extensions};
use crate::features;

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;
/// Smallest and largest cluster, as powers of two. The largest is QEMU's limit, not the format's.
pub const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Smallest cluster with extended L2 entries, as a power of two: subclusters have at least 512 bytes.
pub const MIN_EXTENDED_L2_BITS: u32 = 14;
/// Largest L1 table in bytes. QEMU's limit.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes. QEMU's limit.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots. QEMU's limit.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Longest name of a backing file in bytes.
pub const MAX_BACKING_NAME: usize = 1023;
/// Length of the fixed fields that we write for version 3, and that we know.
pub const V3_LENGTH: u32 = 112;
/// Length of the fixed fields of version 2.
pub const V2_LENGTH: u32 = 72;
/// Bytes of a snapshot table entry before its variable part; used for bounds.
const SNAPSHOT_ENTRY: u64 = 40;

/// The fixed fields. Those from `incompatible` on exist in version 3 only.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: U32,
    backing_offset: U64,
    backing_len: U32,
    cluster_bits: U32,
    size: U64,
    crypt: U32,
    l1_entries: U32,
    l1_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    snapshots: U32,
    snapshots_offset: U64,
    incompatible: U64,
    compatible: U64,
    autoclear: U64,
    refcount_order: U32,
    header_length: U32,
    compression: u8,
    padding: [u8; 7],
}
const _: () = assert!(size_of::<RawHeader>() == V3_LENGTH as usize);
const _: () = assert!(offset_of!(RawHeader, l1_offset) == 40 && offset_of!(RawHeader, incompatible) == 72);
const _: () = assert!(offset_of!(RawHeader, compression) == 104);

/// Which rules an image follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// `compat: 0.10`
    V2,
    /// `compat: 1.1`
    V3,
}

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crypt {
    /// Not at all.
    None,
    /// The old AES-CBC scheme.
    Aes,
    /// LUKS, with its header inside the image.
    Luks,
}

impl Crypt {
    /// LUKS in the field `crypt_method`.
    pub(crate) const LUKS: u32 = 2;
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    #[default]
    Zlib,
    /// zstd.
    Zstd,
}

impl Compression {
    /// Its name in options and in `img info`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// A header that passed all checks. Offsets and sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which rules the image follows.
    pub version: Version,
    /// The cluster size is `1 << cluster_bits`.
    pub cluster_bits: u32,
    /// Size of the disk that the guest sees, as stored; see [`Header::virtual_size`].
    pub size: u64,
    /// How guest data is encrypted.
    pub crypt: Crypt,
    /// Entries in the active L1 table.
    pub l1_entries: u32,
    /// Where the active L1 table is.
    pub l1_offset: u64,
    /// Where the refcount table is.
    pub refcount_table_offset: u64,
    /// How many clusters it takes.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Where the snapshot table is.
    pub snapshots_offset: u64,
    /// See [`crate::features`]. Zero in version 2.
    pub incompatible: u64,
    /// See [`crate::features`]. Zero in version 2.
    pub compatible: u64,
    /// See [`crate::features`]. Zero in version 2.
    pub autoclear: u64,
    /// A refcount has `1 << refcount_order` bits.
    pub refcount_order: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Fixed fields behind those that we know, as found.
    pub unknown_fields: Vec<u8>,
    /// The header extensions.
    pub extensions: Extensions,
    /// The backing file's name as stored; no encoding is promised.
    pub backing_file: Option<Vec<u8>>,
}

/// Why the first cluster is not a header that we can work with. The texts are QEMU's.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
#[allow(missing_docs)]
pub enum HeaderError {
    #[error("Could not read qcow2 header: {0}")]
    Io(IoError),
    #[error("Image is not in qcow2 format")]
    NotQcow2,
    #[error("Unsupported qcow2 version {0}")]
    Version(u32),
    #[error("Unsupported cluster size: 2^{0}")]
    ClusterBits(u32),
    #[error("qcow2 header too short")]
    TooShort,
    #[error("qcow2 header exceeds cluster size")]
    LongerThanCluster,
    #[error("Invalid backing file offset")]
    BackingOffset,
    #[error("qcow2: unknown compression type: {0}")]
    Compression(u8),
    #[error("qcow2: Compression type incompatible feature bit must be set")]
    CompressionBitMissing,
    #[error("qcow2: Compression type incompatible feature bit must not be set")]
    CompressionBitSet,
    #[error("Unsupported qcow2 feature(s): {0}")]
    Features(String),
    #[error("Unsupported subcluster size: {0}")]
    SubclusterSize(u64),
    #[error("Reference count entry width too large; may not exceed 64 bits")]
    RefcountWidth,
    #[error("Image does not contain a reference count table")]
    NoRefcountTable,
    #[error("{0} too large")]
    TableTooLarge(&'static str),
    #[error("{0} offset invalid")]
    TableOffset(&'static str),
    #[error("Image is too big")]
    TooBig,
    #[error("L1 table is too small")]
    L1TooSmall,
    #[error("Unsupported encryption method {0}")]
    Crypt(u32),
    #[error("Header extension too large")]
    ExtensionTooLarge,
    #[error("ERROR: ext_backing_format: len={0} too large (>=16)")]
    FormatNameTooLong(usize),
    #[error("CRYPTO header extension only expected with LUKS encryption method")]
    UnexpectedCrypto,
    #[error("CRYPTO header extension size {0}, but expected size 16")]
    CryptoLength(usize),
    #[error("Encryption header offset '{offset}' is not a multiple of cluster size '{cluster_size}'")]
    CryptoOffset { offset: u64, cluster_size: u64 },
    #[error("Missing CRYPTO header for crypt method 2")]
    NoCrypto,
    #[error("bitmaps_ext: Invalid extension length")]
    BitmapsLength,
    #[error("bitmaps_ext: Reserved field is not zero")]
    BitmapsReserved,
    #[error("bitmaps_ext: Image has {0} bitmaps, exceeding the QEMU supported maximum of 65535")]
    TooManyBitmaps(u32),
    #[error("found bitmaps extension with zero bitmaps")]
    NoBitmaps,
    #[error("bitmaps_ext: invalid bitmap directory offset")]
    BitmapsOffset,
    #[error("bitmaps_ext: bitmap directory size ({0}) exceeds the maximum supported size (67107840)")]
    BitmapsDirectorySize(u64),
    #[error("Backing file name too long")]
    BackingNameTooLong,
    #[error("Could not refresh total sector count: File too large")]
    SizeOverflow,
}

/// What a header is read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Whatever an image can be used for.
    Use,
    /// To look what is wrong with it: it may lack the refcount table, or have too many snapshots.
    Check,
}

impl Header {
    /// Reads and checks the header of the image in `file`.
    pub async fn read(file: &Cx<'_>) -> Result<Self, HeaderError> {
        Self::read_for(file, Purpose::Use).await
    }

    /// The same for this purpose.
    pub async fn read_for(file: &Cx<'_>, purpose: Purpose) -> Result<Self, HeaderError> {
        let first = fetch(file, 512).await?;
        // Anything wrong with the cluster size is found again, in its turn, by `parse`.
        let bits = first.get(20..24).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
        let len = if CLUSTER_BITS.contains(&bits) { 1 << bits } else { 512 };
        let bytes = if len > 512 { fetch(file, len).await? } else { first };
        Self::parse_for(&bytes, purpose)
    }

    /// Bytes in, checked values out. `bytes` is the first cluster, or as much of it as the file has: what is missing
    /// counts as zeroes.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        Self::parse_for(bytes, Purpose::Use)
    }

    fn parse_for(bytes: &[u8], purpose: Purpose) -> Result<Self, HeaderError> {
        let raw = RawHeader::from_zero_padded(bytes);
        let fixed = raw.check_start()?;
        let cluster_size = 1u64 << raw.cluster_bits.get();
        let bytes = &bytes[..bytes.len().min(index(cluster_size))];
        let end = match raw.backing_offset.get() {
            0 => bytes.len(),
            offset => bytes.len().min(index(offset)),
        };
        let area = bytes.get(index(u64::from(fixed.length))..end).unwrap_or_default();
        let unknown = fixed.incompatible & !features::KNOWN_INCOMPATIBLE;
        if unknown != 0 {
            let table = extensions::find_feature_names(area);
            return Err(HeaderError::Features(features::describe_incompatible(unknown, table)));
        }
        raw.check_geometry(&fixed, purpose)?;
        let crypt = match raw.crypt.get() {
            0 => Crypt::None,
            1 => Crypt::Aes,
            Crypt::LUKS => Crypt::Luks,
            other => return Err(HeaderError::Crypt(other)),
        };
        let around = Around { cluster_size, crypt: raw.crypt.get(), autoclear: fixed.autoclear };
        let extensions = Extensions::parse(&pad(area, &raw), around)?;
        if crypt == Crypt::Luks && extensions.crypto.is_none() {
            return Err(HeaderError::NoCrypto);
        }
        let backing_file = raw.backing_name(bytes)?;
        if raw.size.get() > i64::MAX as u64 {
            return Err(HeaderError::SizeOverflow);
        }
        let known = index(u64::from(V3_LENGTH));
        let unknown_fields = match fixed.version {
            Version::V2 => Vec::new(),
            Version::V3 => zero_padded(bytes, known, index(u64::from(fixed.length)).saturating_sub(known)),
        };
        Ok(Self {
            version: fixed.version,
            cluster_bits: raw.cluster_bits.get(),
            size: raw.size.get(),
            crypt,
            l1_entries: raw.l1_entries.get(),
            l1_offset: raw.l1_offset.get(),
            refcount_table_offset: raw.refcount_table_offset.get(),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            snapshots: raw.snapshots.get(),
            snapshots_offset: raw.snapshots_offset.get(),
            incompatible: fixed.incompatible,
            compatible: fixed.compatible,
            autoclear: fixed.autoclear,
            refcount_order: fixed.refcount_order,
            compression: fixed.compression,
            unknown_fields,
            extensions,
            backing_file,
        })
    }

    /// Bytes per cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Size of the disk that the guest sees in bytes: a half sector at the end does not count, as in QEMU.
    pub fn virtual_size(&self) -> u64 {
        self.size & !511
    }

    /// Whether the image has an incompatible feature.
    pub fn has(&self, incompatible: u64) -> bool {
        self.incompatible & incompatible != 0
    }

    /// Whether L2 entries have 16 bytes.
    pub fn extended_l2(&self) -> bool {
        self.has(features::EXTENDED_L2)
    }

    /// Whether refcounts may be written late.
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible & features::LAZY_REFCOUNTS != 0
    }

    /// Bytes per L2 entry.
    pub fn l2_entry_size(&self) -> u64 {
        if self.extended_l2() { 16 } else { 8 }
    }

    /// Entries per L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Refcounts per refcount block.
    pub fn refcounts_per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.refcount_order)
    }

    /// The largest refcount that fits.
    pub fn max_refcount(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.refcount_order))
    }

    /// The active L1 table.
    pub fn l1_bytes(&self) -> u64 {
        u64::from(self.l1_entries) * 8
    }

    /// The backing file as the image names it. (Bytes that are not UTF-8 are shown with replacement characters.)
    pub fn backing_ref(&self) -> Option<BackingRef> {
        let file = String::from_utf8_lossy(self.backing_file.as_ref()?).into_owned();
        let format = self.extensions.backing_format.as_ref();
        Some(BackingRef { file, format: format.map(|f| String::from_utf8_lossy(f).into_owned()) })
    }

    /// Sets or removes the backing file and its format.
    pub fn set_backing_ref(&mut self, backing: Option<BackingRef>) {
        let (file, format) = match backing {
            None => (None, None),
            Some(BackingRef { file, format }) => (Some(file.into_bytes()), format.map(String::into_bytes)),
        };
        self.backing_file = file.filter(|name| !name.is_empty());
        self.extensions.backing_format = format.filter(|name| !name.is_empty());
    }

    /// Takes out the extension that belongs to bitmaps which do not fit the image any more. Whether there was one.
    pub(crate) fn drop_stale_bitmaps(&mut self) -> bool {
        self.extensions.unknown.retain(|(kind, _)| *kind != extensions::BITMAPS);
        std::mem::take(&mut self.extensions.bitmaps_stale)
    }

    /// The header as QEMU writes it, up to and including the backing file's name (the rest of the cluster is zero).
    /// Fails when it does not fit, or something in it is too long.
    pub fn serialise(&self) -> Result<Vec<u8>, HeaderError> {
        let mut bytes = self.serialise_extensions(true);
        let name_at = bytes.len();
        bytes.extend(self.backing_file.as_deref().unwrap_or_default());
        if bytes.len() as u64 > self.cluster_size() {
            return Err(HeaderError::LongerThanCluster);
        }
        self.put_fixed(&mut bytes, name_at)?;
        Ok(bytes)
    }

    /// Room for the fixed fields, and the extensions.
    pub(crate) fn serialise_extensions(&self, with_feature_names: bool) -> Vec<u8> {
        let mut bytes = vec![0; self.fixed_length()];
        let known = index(u64::from(V3_LENGTH));
        if self.version == Version::V3 {
            bytes[known..].copy_from_slice(&self.unknown_fields);
        }
        bytes.extend(self.extensions.serialise(with_feature_names && self.carries_feature_names()));
        bytes
    }

    /// Whether QEMU writes the feature name table: not into small clusters.
    fn carries_feature_names(&self) -> bool {
        self.version == Version::V3 && self.cluster_bits > 12
    }

    fn fixed_length(&self) -> usize {
        match self.version {
            Version::V2 => index(u64::from(V2_LENGTH)),
            Version::V3 => index(u64::from(V3_LENGTH)) + self.unknown_fields.len(),
        }
    }

    /// Fills in the fixed fields at the start of `bytes`; the backing file's name is at `name_at`.
    pub(crate) fn put_fixed(&self, bytes: &mut [u8], name_at: usize) -> Result<(), HeaderError> {
        let name = self.backing_file.as_deref().unwrap_or_default();
        if name.len() > MAX_BACKING_NAME {
            return Err(HeaderError::BackingNameTooLong);
        }
        let format = self.extensions.backing_format.as_deref().unwrap_or_default();
        if format.len() > extensions::MAX_FORMAT_NAME {
            return Err(HeaderError::FormatNameTooLong(format.len()));
        }
        let name_at = if name.is_empty() { 0 } else { name_at };
        let length = u32::try_from(self.fixed_length()).map_err(|_| HeaderError::LongerThanCluster)?;
        let raw = RawHeader {
            magic: MAGIC.into(),
            version: if self.version == Version::V2 { 2 } else { 3 }.into(),
            backing_offset: (name_at as u64).into(),
            backing_len: u32::try_from(name.len()).map_err(|_| HeaderError::BackingNameTooLong)?.into(),
            cluster_bits: self.cluster_bits.into(),
            size: self.size.into(),
            crypt: (self.crypt as u32).into(),
            l1_entries: self.l1_entries.into(),
            l1_offset: self.l1_offset.into(),
            refcount_table_offset: self.refcount_table_offset.into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            snapshots: self.snapshots.into(),
            snapshots_offset: self.snapshots_offset.into(),
            incompatible: self.incompatible.into(),
            compatible: self.compatible.into(),
            autoclear: self.autoclear.into(),
            refcount_order: self.refcount_order.into(),
            header_length: length.into(),
            compression: self.compression as u8,
            padding: [0; 7],
        };
        let known = index(u64::from(if self.version == Version::V2 { V2_LENGTH } else { V3_LENGTH }));
        bytes[..known].copy_from_slice(&raw.as_bytes()[..known]);
        Ok(())
    }
}

/// The fields whose meaning depends on the version, resolved.
struct Fixed {
    version: Version,
    length: u32,
    incompatible: u64,
    autoclear: u64,
    compatible: u64,
    refcount_order: u32,
    compression: Compression,
}

impl RawHeader {
    fn from_zero_padded(bytes: &[u8]) -> Self {
        let mut raw = Self::new_zeroed();
        let len = bytes.len().min(size_of::<Self>());
        raw.as_mut_bytes()[..len].copy_from_slice(&bytes[..len]);
        raw
    }

    /// What must be right before anything else can be looked at.
    fn check_start(&self) -> Result<Fixed, HeaderError> {
        if self.magic.get() != MAGIC {
            return Err(HeaderError::NotQcow2);
        }
        let version = match self.version.get() {
            2 => Version::V2,
            3 => Version::V3,
            other => return Err(HeaderError::Version(other)),
        };
        let bits = self.cluster_bits.get();
        if !CLUSTER_BITS.contains(&bits) {
            return Err(HeaderError::ClusterBits(bits));
        }
        let mut fixed = Fixed {
            version,
            length: V2_LENGTH,
            incompatible: 0,
            autoclear: 0,
            compatible: 0,
            refcount_order: 4,
            compression: Compression::Zlib,
        };
        if version == Version::V3 {
            fixed.length = self.header_length.get();
            fixed.incompatible = self.incompatible.get();
            fixed.compatible = self.compatible.get();
            fixed.autoclear = self.autoclear.get();
            fixed.refcount_order = self.refcount_order.get();
            if fixed.length < 104 {
                return Err(HeaderError::TooShort);
            }
        }
        if fixed.length > 1 << bits {
            return Err(HeaderError::LongerThanCluster);
        }
        if self.backing_offset.get() > 1 << bits {
            return Err(HeaderError::BackingOffset);
        }
        fixed.compression = self.check_compression(&fixed)?;
        Ok(fixed)
    }

    fn check_compression(&self, fixed: &Fixed) -> Result<Compression, HeaderError> {
        let kind = if fixed.length > 104 { self.compression } else { 0 };
        let bit = fixed.incompatible & features::COMPRESSION != 0;
        match kind {
            _ if fixed.version == Version::V2 => Ok(Compression::Zlib),
            0 if bit => Err(HeaderError::CompressionBitSet),
            0 => Ok(Compression::Zlib),
            1 if !bit => Err(HeaderError::CompressionBitMissing),
            1 => Ok(Compression::Zstd),
            other => Err(HeaderError::Compression(other)),
        }
    }

    /// Sizes and places of the tables.
    fn check_geometry(&self, fixed: &Fixed, purpose: Purpose) -> Result<(), HeaderError> {
        let bits = self.cluster_bits.get();
        let extended = fixed.incompatible & features::EXTENDED_L2 != 0;
        if extended && bits < MIN_EXTENDED_L2_BITS {
            return Err(HeaderError::SubclusterSize((1 << bits) / 32));
        }
        if fixed.refcount_order > 6 {
            return Err(HeaderError::RefcountWidth);
        }
        let clusters = self.refcount_table_clusters.get();
        if clusters == 0 && purpose == Purpose::Use {
            return Err(HeaderError::NoRefcountTable);
        }
        let table = |name, offset: U64, bytes: u64, max| {
            if bytes > max {
                return Err(HeaderError::TableTooLarge(name));
            }
            let offset = offset.get();
            if !offset.is_multiple_of(1 << bits) || offset > i64::MAX as u64 - bytes {
                return Err(HeaderError::TableOffset(name));
            }
            Ok(())
        };
        let refcount_bytes = u64::from(clusters) << bits;
        table("Reference count table", self.refcount_table_offset, refcount_bytes, MAX_REFCOUNT_TABLE_BYTES)?;
        let snapshot_bytes = u64::from(self.snapshots.get()) * SNAPSHOT_ENTRY;
        let max_snapshot_bytes = match purpose {
            Purpose::Use => u64::from(MAX_SNAPSHOTS) * SNAPSHOT_ENTRY,
            Purpose::Check => u64::MAX,
        };
        table("Snapshot table", self.snapshots_offset, snapshot_bytes, max_snapshot_bytes)?;
        let l1_entries = u64::from(self.l1_entries.get());
        table("Active L1 table", self.l1_offset, l1_entries * 8, MAX_L1_BYTES)?;
        // Bits of a guest offset that one L1 entry covers. A sum that overflows is reported later, as in QEMU.
        let covered = 2 * bits - if extended { 4 } else { 3 };
        let needed = self.size.get().wrapping_add((1 << covered) - 1) >> covered;
        if needed > i32::MAX as u64 {
            return Err(HeaderError::TooBig);
        }
        if l1_entries < needed {
            return Err(HeaderError::L1TooSmall);
        }
        Ok(())
    }

    fn backing_name(&self, bytes: &[u8]) -> Result<Option<Vec<u8>>, HeaderError> {
        let (offset, len) = (self.backing_offset.get(), u64::from(self.backing_len.get()));
        if offset == 0 {
            return Ok(None);
        }
        let room = (1u64 << self.cluster_bits.get()) - offset;
        if len > room.min(MAX_BACKING_NAME as u64) {
            return Err(HeaderError::BackingNameTooLong);
        }
        let name = zero_padded(bytes, index(offset), index(len));
        Ok(Some(until_nul(&name).to_vec()).filter(|name| !name.is_empty()))
    }
}

/// A name as programs in C read it, whatever is behind a byte 0: some of them count that one too.
pub(crate) fn until_nul(name: &[u8]) -> &[u8] {
    name.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// The extension area with the zeroes that a short file lacks, as far as any extension can reach.
fn pad<'a>(area: &'a [u8], raw: &RawHeader) -> std::borrow::Cow<'a, [u8]> {
    let start = if raw.version.get() == 2 { V2_LENGTH } else { raw.header_length.get() };
    let end = match raw.backing_offset.get() {
        0 => 1u64 << raw.cluster_bits.get(),
        offset => offset,
    };
    let len = index(end.saturating_sub(u64::from(start)));
    if area.len() >= len {
        return area.into();
    }
    let mut padded = area.to_vec();
    padded.resize(len, 0);
    padded.into()
}

/// `len` bytes from `start`, with zeroes where there are none.
fn zero_padded(bytes: &[u8], start: usize, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    let from = bytes.get(start..).unwrap_or_default();
    let have = from.len().min(len);
    out[..have].copy_from_slice(&from[..have]);
    out
}

/// An offset in the first cluster, which has at most 2 MiB, as an index.
fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

async fn fetch(file: &Cx<'_>, len: usize) -> Result<Vec<u8>, HeaderError> {
    let len = len.min(index(file.length()));
    let into = Iov::scratch(len);
    let range = ByteRange::between(0, len as u64);
    file.read(range, into.clone()).await.map_err(HeaderError::Io)?;
    Ok(into.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small valid image header.
    fn sample(version: Version) -> Header {
        let v3 = version == Version::V3;
        Header {
            version,
            cluster_bits: 16,
            size: 64 << 20,
            crypt: Crypt::None,
            l1_entries: 1,
            l1_offset: 0x30000,
            refcount_table_offset: 0x10000,
            refcount_table_clusters: 1,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            compression: Compression::Zlib,
            unknown_fields: if v3 { vec![9; 8] } else { Vec::new() },
            extensions: Extensions {
                backing_format: Some(b"qcow2".to_vec()),
                unknown: vec![(0x1234_5678, b"kept".to_vec())],
                ..Extensions::default()
            },
            backing_file: Some(b"base \xff.qcow2".to_vec()),
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        for version in [Version::V2, Version::V3] {
            let header = sample(version);
            let bytes = header.serialise().unwrap();
            assert_eq!(Header::parse(&bytes).unwrap(), header);
        }
    }

    #[test]
    fn a_header_that_does_not_fit_its_cluster_is_refused() {
        let mut header = sample(Version::V3);
        header.cluster_bits = 9;
        // No feature name table in small clusters.
        assert!(header.serialise().unwrap().len() < 200);
        header.backing_file = Some(vec![b'x'; 400]);
        assert_eq!(header.serialise(), Err(HeaderError::LongerThanCluster));
        header.cluster_bits = 16;
        header.backing_file = Some(vec![b'x'; 1024]);
        assert_eq!(header.serialise(), Err(HeaderError::BackingNameTooLong));
    }

    #[test]
    fn no_single_damaged_byte_makes_the_parser_panic() {
        let bytes = sample(Version::V3).serialise().unwrap();
        for at in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] = value;
                let _ = Header::parse(&damaged);
                let _ = Header::parse(&damaged[..at]);
            }
        }
    }
}

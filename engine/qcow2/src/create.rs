//! New images, byte for byte what `qemu-img create` makes.
//!
//! The place of everything is decided in memory first ([`crate::layout`]); then tables are written, and the header
//! last, after a flush: a power cut on the way leaves a file that is no image yet, not a broken one.

use std::collections::BTreeMap;

use underlay_graph::{BackingRef, ByteRange, Cx, IoError, Preallocation, WriteFlags, ZeroFlags};
use underlay_sys::Iov;

use crate::extensions::{Extensions, TIED};
use crate::features;
use crate::header::{self, Compression, Crypt, Header, HeaderError, Version};
use crate::layout::Layout;

/// The refcount of exactly one, in L1 and L2 entries.
const COPIED: u64 = 1 << 63;
/// What a disk writes whole or not at all.
const SECTOR: usize = 512;
/// Tables are written in pieces of at most this many bytes.
const PIECE: u64 = 1 << 20;

/// What to create. [`CreateOptions::new`] has QEMU's defaults.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the disk in bytes, a multiple of 512.
    pub size: u64,
    /// Option `compat`.
    pub version: Version,
    /// Bytes per cluster.
    pub cluster_size: u64,
    /// Bits per refcount.
    pub refcount_bits: u64,
    /// Option `compression_type`.
    pub compression: Compression,
    /// Option `lazy_refcounts`.
    pub lazy_refcounts: bool,
    /// Option `extended_l2`.
    pub extended_l2: bool,
    /// Backing file and its format, as to be stored; whether it exists is for the caller to find out.
    pub backing: Option<BackingRef>,
    /// What to reserve.
    pub preallocation: Preallocation,
    /// Option `data_file`: not supported.
    pub data_file: Option<String>,
    /// Option `data_file_raw`: not supported.
    pub data_file_raw: bool,
    /// Any of the options for encryption: not supported.
    pub encrypted: bool,
    /// The image is for the bitmaps of a disk that is elsewhere: it has [`crate::tie_place`].
    pub tied: bool,
    /// The file stays as long as it is and keeps its space, which somebody may have reserved for the image.
    pub keep_space: bool,
}

impl CreateOptions {
    /// QEMU's defaults for a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            version: Version::V3,
            cluster_size: 65536,
            refcount_bits: 16,
            compression: Compression::Zlib,
            lazy_refcounts: false,
            extended_l2: false,
            backing: None,
            preallocation: Preallocation::Off,
            data_file: None,
            data_file_raw: false,
            encrypted: false,
            tied: false,
            keep_space: false,
        }
    }
}

/// Why an image cannot be created. The texts are QEMU's, except for what QEMU supports and we do not.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
#[allow(missing_docs)]
pub enum CreateError {
    #[error("{0}")]
    Io(IoError),
    #[error("Image size must be a multiple of 512 bytes")]
    Size,
    #[error("The image size is too large for file format 'qcow2' (try using a larger cluster size)")]
    TooLarge,
    #[error("Cluster size must be a power of two between 512 and 2048k")]
    ClusterSize,
    #[error(
        "{0} only supported with compatibility level 1.1 and above (use version=v3 or \
             greater)"
    )]
    NeedsV3(&'static str),
    #[error("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes")]
    ExtendedL2ClusterSize,
    #[error("Backing file and preallocation can only be used at the same time if extended_l2 is on")]
    BackingAndPreallocation,
    #[error("Refcount width must be a power of two and may not exceed 64 bits")]
    RefcountBits,
    #[error(
        "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)"
    )]
    RefcountBitsV2,
    #[error("data-file-raw requires data-file")]
    DataFileRaw,
    #[error("Backing file and data-file-raw cannot be used at the same time")]
    BackingAndDataFileRaw,
    #[error("Backing format cannot be used without backing file")]
    FormatWithoutBacking,
    #[error("Could not assign backing file '{file}' with format '{format}': {reason}")]
    Backing { file: String, format: String, reason: IoError },
    #[error("{0} is not supported yet")]
    Unsupported(&'static str),
}

impl From<IoError> for CreateError {
    fn from(error: IoError) -> Self {
        Self::Io(error)
    }
}

impl CreateOptions {
    /// All that can be told without touching a file, in QEMU's order.
    pub fn check(&self) -> Result<(), CreateError> {
        let v2 = self.version == Version::V2;
        if !self.size.is_multiple_of(512) {
            return Err(CreateError::Size);
        }
        let bits = self.cluster_size.trailing_zeros();
        if !self.cluster_size.is_power_of_two() || !header::CLUSTER_BITS.contains(&bits) {
            return Err(CreateError::ClusterSize);
        }
        if self.extended_l2 && v2 {
            return Err(CreateError::NeedsV3("Extended L2 entries are"));
        }
        if self.extended_l2 && bits < header::MIN_EXTENDED_L2_BITS {
            return Err(CreateError::ExtendedL2ClusterSize);
        }
        let backing = self.backing.as_ref().filter(|b| !b.file.is_empty());
        if backing.is_some() && self.preallocation != Preallocation::Off && !self.extended_l2 {
            return Err(CreateError::BackingAndPreallocation);
        }
        if self.backing.as_ref().is_some_and(|b| b.file.is_empty() && b.format.is_some()) {
            return Err(CreateError::FormatWithoutBacking);
        }
        if self.lazy_refcounts && v2 {
            return Err(CreateError::NeedsV3("Lazy refcounts"));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err(CreateError::RefcountBits);
        }
        if self.refcount_bits != 16 && v2 {
            return Err(CreateError::RefcountBitsV2);
        }
        self.check_data_file(backing.is_some(), v2)?;
        if self.compression != Compression::Zlib && v2 {
            return Err(CreateError::NeedsV3("Non-zlib compression type is"));
        }
        if self.encrypted {
            return Err(CreateError::Unsupported("Encryption"));
        }
        if self.size > i64::MAX as u64 || self.l1_entries() * 8 > header::MAX_L1_BYTES {
            return Err(CreateError::TooLarge);
        }
        Ok(())
    }

    fn check_data_file(&self, backing: bool, v2: bool) -> Result<(), CreateError> {
        if self.data_file_raw && self.data_file.is_none() {
            return Err(CreateError::DataFileRaw);
        }
        if self.data_file_raw && backing {
            return Err(CreateError::BackingAndDataFileRaw);
        }
        match self.data_file {
            Some(_) if v2 => Err(CreateError::NeedsV3("External data files are")),
            Some(_) => Err(CreateError::Unsupported("An external data file")),
            None => Ok(()),
        }
    }

    fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    fn l2_entries(&self) -> u64 {
        self.cluster_size / self.l2_entry_size()
    }

    fn l1_entries(&self) -> u64 {
        self.size.div_ceil(self.cluster_size).div_ceil(self.l2_entries())
    }

    /// The header, but for what the layout decides.
    fn header(&self) -> Header {
        let set = |bit: u64, on: bool| if on { bit } else { 0 };
        let mut header = Header {
            version: self.version,
            cluster_bits: self.cluster_size.trailing_zeros(),
            size: self.size,
            crypt: Crypt::None,
            l1_entries: 0,
            l1_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: set(features::COMPRESSION, self.compression != Compression::Zlib)
                | set(features::EXTENDED_L2, self.extended_l2),
            compatible: set(features::LAZY_REFCOUNTS, self.lazy_refcounts),
            autoclear: 0,
            refcount_order: self.refcount_bits.trailing_zeros(),
            compression: self.compression,
            unknown_fields: Vec::new(),
            extensions: Extensions::default(),
            backing_file: None,
        };
        header.set_backing_ref(self.backing.clone());
        if self.tied {
            header.extensions.unknown.push((TIED, b"the bitmaps of the disk beside".to_vec()));
        }
        header
    }

    fn serialise(&self, header: &Header) -> Result<Vec<u8>, CreateError> {
        header.serialise().map_err(|error| {
            let Some(BackingRef { file, format }) = self.backing.clone() else {
                return IoError::EINVAL.with(error.to_string()).into();
            };
            let reason = match error {
                HeaderError::LongerThanCluster => IoError::ENOSPC,
                _ => IoError::EINVAL,
            };
            CreateError::Backing { file, format: format.unwrap_or_default(), reason }
        })
    }
}

/// One L2 table of a preallocated image: where it is, where its first data cluster is, how many it maps.
#[derive(Clone, Copy, Debug)]
struct Preallocated {
    table: u64,
    data: u64,
    clusters: u64,
}

/// Makes an image in `file`, which loses all its content.
pub async fn create(file: &Cx<'_>, options: &CreateOptions) -> Result<(), CreateError> {
    options.check()?;
    let mut header = options.header();
    // Before the file is touched: does the header fit its cluster?
    options.serialise(&header)?;
    let mut layout = Layout::new(header.cluster_bits, header.refcount_order);
    let l1_entries = options.l1_entries();
    let l1_bytes = l1_entries * 8;
    let l1 = match l1_bytes {
        0 => 0,
        bytes => layout.allocate(bytes.div_ceil(options.cluster_size)),
    };
    let tables = preallocate(&mut layout, options);
    let cluster = options.cluster_size;
    header.l1_entries = u32::try_from(l1_entries).map_err(|_| CreateError::TooLarge)?;
    header.l1_offset = l1 * cluster;
    header.refcount_table_offset = layout.table * cluster;
    header.refcount_table_clusters =
        u32::try_from(layout.table_clusters).map_err(|_| CreateError::TooLarge)?;
    if layout.table_clusters * cluster > header::MAX_REFCOUNT_TABLE_BYTES {
        return Err(CreateError::TooLarge);
    }

    let out = Writer { file, cluster };
    match options.keep_space && file.length() > 0 {
        true => out.forget_image().await?,
        false => out.empty_file().await?,
    }
    out.reserve(options, &tables, &layout, l1 * cluster + l1_bytes).await?;
    // Tables given up on the way come first, as their clusters may have been used again.
    out.refcounts(&layout, header.refcount_order).await?;
    out.l2_tables(options, &tables).await?;
    out.l1_table(l1 * cluster, l1_bytes, &tables).await?;
    let mut first = options.serialise(&header)?;
    first.resize(usize::try_from(cluster).map_err(|_| IoError::EINVAL)?, 0);
    // The first sector, which makes it an image, only when all the rest is there: a disk may tear what is longer.
    let rest = first.split_off(SECTOR.min(first.len()));
    if !rest.is_empty() {
        out.write(SECTOR as u64, &rest).await?;
    }
    file.flush().await?;
    out.write(0, &first).await?;
    file.flush().await?;
    Ok(())
}

fn preallocate(layout: &mut Layout, options: &CreateOptions) -> Vec<Preallocated> {
    let clusters = options.size.div_ceil(options.cluster_size);
    let (per_table, tables) = (options.l2_entries(), options.l1_entries());
    if options.preallocation == Preallocation::Off {
        return Vec::new();
    }
    let in_table = |i: u64| (clusters - i * per_table).min(per_table);
    if options.preallocation == Preallocation::Metadata {
        return (0..tables)
            .map(|i| {
                let table = layout.allocate(1);
                Preallocated { table, data: layout.allocate(in_table(i)), clusters: in_table(i) }
            })
            .collect();
    }
    let data = layout.allocate_area(clusters, tables);
    (0..tables)
        .map(|i| Preallocated {
            table: layout.allocate(1),
            data: data + i * per_table,
            clusters: in_table(i),
        })
        .collect()
}

/// Puts the parts of a new image into its file.
struct Writer<'a> {
    file: &'a Cx<'a>,
    cluster: u64,
}

impl Writer<'_> {
    async fn write(&self, at: u64, bytes: &[u8]) -> Result<(), IoError> {
        let range = ByteRange::new(at, bytes.len() as u64).ok_or(IoError::EFBIG)?;
        self.file.write(range, Iov::copy_of(bytes), WriteFlags::default()).await
    }

    /// Everything that was there is gone, durably: what is not written later reads as zeroes.
    async fn empty_file(&self) -> Result<(), IoError> {
        let resized = self.file.node().resize(self.file, 0, Preallocation::Off).await;
        match resized {
            Err(error) if error == IoError::ENOTSUP => {}
            other => other?,
        }
        self.file.flush().await
    }

    /// Whatever image was there is none any more, durably.
    async fn forget_image(&self) -> Result<(), IoError> {
        let head = ByteRange::between(0, self.file.length().min(SECTOR as u64));
        self.file.write_zeroes(head, ZeroFlags::default()).await?;
        self.file.flush().await
    }

    /// Gives the file its length, and the data its space.
    async fn reserve(
        &self,
        options: &CreateOptions,
        tables: &[Preallocated],
        layout: &Layout,
        l1_end: u64,
    ) -> Result<(), IoError> {
        let mut end = layout.end() * self.cluster;
        if tables.is_empty() {
            // The L1 table, last in the file, is no longer than its entries.
            end = if layout.end() * self.cluster == l1_end.next_multiple_of(self.cluster) {
                l1_end
            } else {
                end
            };
        }
        if let (Preallocation::Metadata, Some(last)) = (options.preallocation, tables.last()) {
            let data_end = (last.data + last.clusters) * self.cluster;
            if data_end == end && options.extended_l2 {
                let unused = options.size.next_multiple_of(self.cluster)
                    - options.size.next_multiple_of(self.cluster / 32);
                end -= unused;
            }
        }
        let how = match options.preallocation {
            Preallocation::Metadata => Preallocation::Off,
            other => other,
        };
        let length = self.file.length();
        if end > length {
            self.file.node().resize(self.file, end, how).await?;
        }
        if length == 0 {
            return Ok(());
        }
        // It was kept, or it is a device or an export that cannot be emptied. What is not written below must be zeroes.
        let reserved = matches!(options.preallocation, Preallocation::Falloc | Preallocation::Full);
        let flags = ZeroFlags { may_unmap: !(options.keep_space && reserved), no_fallback: false };
        self.file.write_zeroes(ByteRange::between(0, end.min(length)), flags).await
    }

    async fn l2_tables(&self, options: &CreateOptions, tables: &[Preallocated]) -> Result<(), IoError> {
        let entry = usize::try_from(options.l2_entry_size()).map_err(|_| IoError::EINVAL)?;
        // Preallocated subclusters of `metadata` show what is below; those of `falloc` and `full` too.
        for table in tables {
            let mut bytes = vec![0; usize::try_from(self.cluster).map_err(|_| IoError::EINVAL)?];
            for (i, slot) in (0..table.clusters).zip(bytes.chunks_exact_mut(entry)) {
                slot[..8].copy_from_slice(&(((table.data + i) * self.cluster) | COPIED).to_be_bytes());
            }
            self.write(table.table * self.cluster, &bytes).await?;
        }
        Ok(())
    }

    /// Its zeroes are written too, as QEMU does it: they take up room in the file.
    async fn l1_table(&self, at: u64, len: u64, tables: &[Preallocated]) -> Result<(), IoError> {
        let mut bytes: Vec<u8> =
            tables.iter().flat_map(|t| ((t.table * self.cluster) | COPIED).to_be_bytes()).collect();
        bytes.resize(usize::try_from(len).map_err(|_| IoError::EINVAL)?, 0);
        if bytes.is_empty() { Ok(()) } else { self.write(at, &bytes).await }
    }

    async fn refcounts(&self, layout: &Layout, order: u32) -> Result<(), IoError> {
        let per_block = 1u64 << (self.cluster.trailing_zeros() + 3 - order);
        let size = usize::try_from(self.cluster).map_err(|_| IoError::EINVAL)?;
        for (&index, &at) in &layout.blocks {
            let mut bytes = vec![0; size];
            let counted = ByteRange::between(index * per_block, (index + 1) * per_block);
            for (start, end) in layout.runs() {
                let run = counted.intersect(ByteRange::between(start, end));
                for cluster in run.start()..run.end() {
                    set_one(&mut bytes, cluster - index * per_block, order);
                }
            }
            self.write(at * self.cluster, &bytes).await?;
        }
        for (at, blocks) in &layout.stale {
            self.table(*at, blocks).await?;
        }
        self.table(layout.table, &layout.blocks).await
    }

    /// A refcount table, as far as it is used and to the end of the cluster.
    async fn table(&self, at: u64, blocks: &BTreeMap<u64, u64>) -> Result<(), IoError> {
        let entries = blocks.last_key_value().map_or(0, |(last, _)| last + 1);
        let len = (entries * 8).next_multiple_of(self.cluster);
        let mut table = vec![0; usize::try_from(len).map_err(|_| IoError::EINVAL)?];
        for (&index, &block) in blocks {
            let slot = usize::try_from(index * 8).map_err(|_| IoError::EINVAL)?;
            table[slot..slot + 8].copy_from_slice(&(block * self.cluster).to_be_bytes());
        }
        let piece = usize::try_from(PIECE).map_err(|_| IoError::EINVAL)?;
        for (i, bytes) in table.chunks(piece).enumerate() {
            self.write(at * self.cluster + i as u64 * PIECE, bytes).await?;
        }
        Ok(())
    }
}

/// Sets a refcount to 1 in an empty block.
fn set_one(block: &mut [u8], index: u64, order: u32) {
    let index = usize::try_from(index).expect("an index into a block");
    match order {
        0..=2 => {
            let bit = index << order;
            block[bit / 8] |= 1 << (bit % 8);
        }
        // Big endian: the last byte of the count.
        _ => {
            let width = 1 << (order - 3);
            block[index * width + width - 1] = 1;
        }
    }
}

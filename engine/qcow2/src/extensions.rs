//! Header extensions: typed pieces between the header's fixed fields and the backing file's name.
//!
//! Each is a type and a length (u32 each), the content, and padding to a multiple of 8. Extensions that we do not
//! know survive every rewrite. Texts of errors are QEMU's. Source: qcow2.rst, "Header extensions".

use crate::features;
use crate::header::{Crypt, HeaderError, until_nul};

/// Type of the backing format name.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Type of the external data file's name.
pub const DATA_FILE: u32 = 0x4441_5441;
/// Type of the note where the LUKS header is.
pub const CRYPTO: u32 = 0x0537_be77;
/// Type of the feature name table.
pub const FEATURE_NAMES: u32 = 0x6803_f857;
/// Type of the bitmaps extension.
pub const BITMAPS: u32 = 0x2385_2875;
/// Type of ours that says: the image has only the bitmaps of a disk that is elsewhere, and a place for what ties them
/// to it.
pub const TIED: u32 = 0x556e_6454;
/// The end marker.
const END: u32 = 0;

/// Longest backing format name in bytes. QEMU's limit.
pub(crate) const MAX_FORMAT_NAME: usize = 15;
/// Most bitmaps in an image. QEMU's limit.
pub(crate) const MAX_BITMAPS: u32 = 65535;
/// Largest bitmap directory in bytes. QEMU's limit: 1024 bytes for each bitmap.
pub(crate) const MAX_BITMAP_DIRECTORY: u64 = MAX_BITMAPS as u64 * 1024;

/// Where a part of the file is that belongs to an extension. Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
}

/// The bitmaps extension, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Number of bitmaps, at least 1.
    pub count: u32,
    /// Where the directory is; cluster aligned.
    pub directory: Region,
}

/// All extensions of a header, by meaning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// Name of the backing file's format.
    pub backing_format: Option<Vec<u8>>,
    /// Name of the external data file.
    pub data_file: Option<Vec<u8>>,
    /// Where the LUKS header is.
    pub crypto: Option<Region>,
    /// The bitmaps, when the autoclear bit says that they fit the image.
    pub bitmaps: Option<BitmapsExtension>,
    /// There is a bitmaps extension, but a program that does not know bitmaps has written to the image: QEMU warns and
    /// considers all bitmaps inconsistent. The extension is among the unknown ones then.
    pub bitmaps_stale: bool,
    /// Everything else, as found.
    pub unknown: Vec<(u32, Vec<u8>)>,
}

/// What of the fixed header matters for reading extensions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Around {
    pub cluster_size: u64,
    pub crypt: u32,
    pub autoclear: u64,
}

/// Type and content of an extension, and where the one after it starts.
type Found<'a> = (u32, &'a [u8], usize);

/// The next extension, or `None` at the end.
fn next(area: &[u8], at: usize) -> Result<Option<Found<'_>>, HeaderError> {
    if at >= area.len() {
        return Ok(None);
    }
    let word = |at: usize| {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(area.get(at..).unwrap_or_default()) {
            *to = *from;
        }
        u32::from_be_bytes(bytes)
    };
    let (kind, len) = (word(at), word(at + 4) as usize);
    let start = at + 8;
    let Some(content) = area.get(start..start.saturating_add(len)) else {
        return Err(HeaderError::ExtensionTooLarge);
    };
    if kind == END {
        return Ok(None);
    }
    Ok(Some((kind, content, start + len.next_multiple_of(8))))
}

/// The content of the feature name table, before anything else about the header is known to be right.
pub(crate) fn find_feature_names(area: &[u8]) -> &[u8] {
    let mut at = 0;
    while let Ok(Some((kind, content, after))) = next(area, at) {
        if kind == FEATURE_NAMES {
            return content;
        }
        at = after;
    }
    &[]
}

/// Bytes of `area` that its extensions take, end marker included.
pub(crate) fn length(area: &[u8]) -> usize {
    let mut at = 0;
    while let Ok(Some((_, _, after))) = next(area, at) {
        at = after;
    }
    (at + 8).min(area.len())
}

impl Extensions {
    /// Whether the image has only the bitmaps of a disk that is elsewhere.
    pub fn is_tied(&self) -> bool {
        self.unknown.iter().any(|(kind, _)| *kind == TIED)
    }

    /// Reads all extensions in `area`, the bytes from the end of the fixed header up to the backing name.
    pub(crate) fn parse(area: &[u8], around: Around) -> Result<Self, HeaderError> {
        let mut all = Self::default();
        let mut at = 0;
        while let Some((kind, content, after)) = next(area, at)? {
            all.take(kind, content, around)?;
            at = after;
        }
        Ok(all)
    }

    fn take(&mut self, kind: u32, content: &[u8], around: Around) -> Result<(), HeaderError> {
        match kind {
            BACKING_FORMAT if content.len() > MAX_FORMAT_NAME => {
                return Err(HeaderError::FormatNameTooLong(content.len()));
            }
            BACKING_FORMAT => self.backing_format = Some(until_nul(content).to_vec()),
            DATA_FILE => self.data_file = Some(content.to_vec()),
            CRYPTO => self.crypto = Some(crypto(content, around)?),
            // Ours is written anew with every header.
            FEATURE_NAMES => {}
            BITMAPS => match bitmaps(content, around)? {
                Some(found) => self.bitmaps = Some(found),
                None => {
                    self.bitmaps_stale = true;
                    self.unknown.push((kind, content.to_vec()));
                }
            },
            _ => self.unknown.push((kind, content.to_vec())),
        }
        Ok(())
    }

    /// All extensions and the end marker, in QEMU's order.
    pub(crate) fn serialise(&self, with_feature_names: bool) -> Vec<u8> {
        let mut out = Vec::new();
        if let Some(name) = &self.backing_format {
            push(&mut out, BACKING_FORMAT, name);
        }
        if let Some(name) = &self.data_file {
            push(&mut out, DATA_FILE, name);
        }
        if let Some(region) = self.crypto {
            push(&mut out, CRYPTO, &[region.offset.to_be_bytes(), region.len.to_be_bytes()].concat());
        }
        if with_feature_names {
            push(&mut out, FEATURE_NAMES, &features::name_table());
        }
        if let Some(bitmaps) = self.bitmaps {
            let mut content = bitmaps.count.to_be_bytes().to_vec();
            content.extend([0; 4]);
            content.extend(bitmaps.directory.len.to_be_bytes());
            content.extend(bitmaps.directory.offset.to_be_bytes());
            push(&mut out, BITMAPS, &content);
        }
        for (kind, content) in &self.unknown {
            push(&mut out, *kind, content);
        }
        push(&mut out, END, &[]);
        out
    }
}

fn push(out: &mut Vec<u8>, kind: u32, content: &[u8]) {
    out.extend(kind.to_be_bytes());
    // Contents come from a header, so they are shorter than a cluster.
    out.extend(u32::try_from(content.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(content);
    out.resize(out.len().next_multiple_of(8), 0);
}

fn quad(content: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    for (to, from) in bytes.iter_mut().zip(&content[at..]) {
        *to = *from;
    }
    u64::from_be_bytes(bytes)
}

fn crypto(content: &[u8], around: Around) -> Result<Region, HeaderError> {
    if around.crypt != Crypt::LUKS {
        return Err(HeaderError::UnexpectedCrypto);
    }
    if content.len() != 16 {
        return Err(HeaderError::CryptoLength(content.len()));
    }
    let region = Region { offset: quad(content, 0), len: quad(content, 8) };
    if !region.offset.is_multiple_of(around.cluster_size) {
        return Err(HeaderError::CryptoOffset { offset: region.offset, cluster_size: around.cluster_size });
    }
    Ok(region)
}

/// `None` when the extension is there but its autoclear bit is not set.
fn bitmaps(content: &[u8], around: Around) -> Result<Option<BitmapsExtension>, HeaderError> {
    if content.len() != 24 {
        return Err(HeaderError::BitmapsLength);
    }
    if around.autoclear & features::BITMAPS == 0 {
        return Ok(None);
    }
    let (first, directory) = (quad(content, 0), Region { offset: quad(content, 16), len: quad(content, 8) });
    let count = u32::try_from(first >> 32).unwrap_or(u32::MAX);
    if first & 0xffff_ffff != 0 {
        return Err(HeaderError::BitmapsReserved);
    }
    if count > MAX_BITMAPS {
        return Err(HeaderError::TooManyBitmaps(count));
    }
    if count == 0 {
        return Err(HeaderError::NoBitmaps);
    }
    if !directory.offset.is_multiple_of(around.cluster_size) {
        return Err(HeaderError::BitmapsOffset);
    }
    if directory.len > MAX_BITMAP_DIRECTORY {
        return Err(HeaderError::BitmapsDirectorySize(directory.len));
    }
    Ok(Some(BitmapsExtension { count, directory }))
}

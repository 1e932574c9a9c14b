//! Feature bits of a version 3 header: their meaning, their names, and the name table that images carry.
//!
//! An incompatible bit that we do not know forbids opening the image; the image's own table says what to call it.
//! Source: qcow2.rst, "Header" and "Feature name table".

/// Incompatible: refcounts may be stale, because the image was not closed cleanly.
pub const DIRTY: u64 = 1 << 0;
/// Incompatible: metadata is damaged; only repair may write.
pub const CORRUPT: u64 = 1 << 1;
/// Incompatible: guest data lives in another file.
pub const DATA_FILE: u64 = 1 << 2;
/// Incompatible: the compression type is not deflate.
pub const COMPRESSION: u64 = 1 << 3;
/// Incompatible: L2 entries have 16 bytes and clusters have subclusters.
pub const EXTENDED_L2: u64 = 1 << 4;
/// Every incompatible bit that this crate knows the meaning of.
pub const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;

/// Compatible: refcounts may be written late, under the dirty bit.
pub const LAZY_REFCOUNTS: u64 = 1 << 0;

/// Autoclear: the bitmaps extension describes the image as it is.
pub const BITMAPS: u64 = 1 << 0;
/// Autoclear: the external data file reads as a raw image.
pub const RAW_DATA_FILE: u64 = 1 << 1;
/// Autoclear, and our own: the regions that may have been written to since the bitmaps were stored are noted in the
/// header cluster.
pub const DIRTY_REGIONS: u64 = 1 << 62;
/// Every autoclear bit that this crate knows the meaning of.
pub const KNOWN_AUTOCLEAR: u64 = BITMAPS | RAW_DATA_FILE | DIRTY_REGIONS;

/// Bytes of one entry in the feature name table.
pub const ENTRY: usize = 48;

/// The table that QEMU writes: kind of feature (0 incompatible, 1 compatible, 2 autoclear), bit, name.
const TABLE: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// The content of the feature name table extension, as QEMU writes it.
pub fn name_table() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(TABLE.len() * ENTRY);
    for (kind, bit, name) in TABLE {
        let start = bytes.len();
        bytes.extend([kind, bit]);
        bytes.extend(name.as_bytes());
        bytes.resize(start + ENTRY, 0);
    }
    bytes
}

/// Names the incompatible bits in `bits`: first those that `table` (from the image) has names for, in its order, then
/// all others as one number. The words are QEMU's.
pub fn describe_incompatible(mut bits: u64, table: &[u8]) -> String {
    let mut names = Vec::new();
    for entry in table.chunks_exact(ENTRY) {
        let mask = 1u64.checked_shl(u32::from(entry[1])).unwrap_or(0);
        if entry[0] == 0 && bits & mask != 0 {
            let name = entry[2..].split(|&byte| byte == 0).next().unwrap_or_default();
            names.push(String::from_utf8_lossy(name).into_owned());
            bits &= !mask;
        }
    }
    if bits != 0 {
        names.push(format!("Unknown incompatible feature: {bits:x}"));
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_named_by_the_image_and_the_rest_by_number() {
        let mut table = vec![0, 5];
        table.extend(b"five");
        table.resize(ENTRY, 0);
        table.extend([0, 200]);
        table.resize(2 * ENTRY + 7, b'x');
        assert_eq!(describe_incompatible(1 << 5 | 1 << 7, &table), "five, Unknown incompatible feature: 80");
        assert_eq!(describe_incompatible(1 << 5, &table), "five");
        assert_eq!(name_table().len(), 384);
    }
}

//! Entries of L1 and L2 tables as values: what a word from the disk means, and how the table is laid out.
//!
//! A cluster is the unit of allocation; with extended L2 entries it has 32 subclusters that can each be data, zero or
//! borrowed from the backing file. Without them this module speaks of one subcluster of the cluster's size, so that the
//! code above need not care. Source: qcow2.rst, "L1 table entry", "L2 table entry", "Extended L2 Entries".

use crate::header::{Header, Version};

/// Bits of an entry that hold a host offset.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The refcount of what the entry points to is exactly 1.
pub const COPIED: u64 = 1 << 63;
/// L2: a compressed cluster.
pub const COMPRESSED: u64 = 1 << 62;
/// L2, version 3, not extended: reads as zero.
pub const ZERO: u64 = 1;
/// Host offsets end here: what an entry can hold.
pub const MAX_HOST: u64 = 1 << 55;
/// Largest slice of a table that is loaded and written as one piece, in bytes.
const SLICE: u64 = 4096;

/// One L2 entry; `map` is 0 without extended entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The first word.
    pub word: u64,
    /// Extended: bits 0-31 subcluster is data, bits 32-63 subcluster reads as zero.
    pub map: u64,
}

/// What an L2 entry says about one subcluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sub {
    /// The backing file shows.
    Below,
    /// Reads as zero.
    Zero,
    /// In the host cluster of the entry.
    Data,
    /// In the compressed extent of the entry.
    Compressed,
}

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// The host offset is not a multiple of the cluster size.
    Unaligned(u64),
    /// Subclusters that are data and zero at once, or data without a host cluster.
    Map,
}

/// Bytes of the file that a compressed cluster occupies: from any byte to the end of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// First byte.
    pub offset: u64,
    /// To the end of the last sector.
    pub len: u64,
}

/// How an image's tables are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// 16-byte L2 entries.
    pub extended: bool,
    /// Version 3: clusters can read as zero.
    pub v3: bool,
    /// log2 of the entries in an L2 table.
    pub l2_bits: u32,
    /// log2 of the entries in a slice of an L2 table.
    pub slice_bits: u32,
}

impl Layout {
    /// Of the image with this header.
    pub fn of(header: &Header) -> Self {
        Self::with_slices(header, SLICE)
    }

    /// The same with slices of (at most) `slice` bytes, a power of two of at least 512.
    pub fn with_slices(header: &Header, slice: u64) -> Self {
        let entry_bits = if header.extended_l2() { 4 } else { 3 };
        let slice_bytes = slice.clamp(512, header.cluster_size());
        Self {
            cluster_bits: header.cluster_bits,
            extended: header.extended_l2(),
            v3: header.version == Version::V3,
            l2_bits: header.cluster_bits - entry_bits,
            slice_bits: slice_bytes.ilog2() - entry_bits,
        }
    }

    /// Bytes in a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of the bytes in a subcluster.
    pub fn sub_bits(&self) -> u32 {
        if self.extended { self.cluster_bits - 5 } else { self.cluster_bits }
    }

    /// Bytes in a subcluster.
    pub fn sub(&self) -> u64 {
        1 << self.sub_bits()
    }

    /// Words of 8 bytes in an entry.
    pub fn words(&self) -> usize {
        if self.extended { 2 } else { 1 }
    }

    /// Words in a slice.
    pub fn slice_words(&self) -> usize {
        self.words() << self.slice_bits
    }

    /// Bytes in a slice.
    pub fn slice_bytes(&self) -> u64 {
        (self.slice_words() * 8) as u64
    }

    /// log2 of the guest bytes that a slice maps.
    pub fn slice_reach_bits(&self) -> u32 {
        self.slice_bits + self.cluster_bits
    }

    /// log2 of the guest bytes that an L2 table maps.
    pub fn table_reach_bits(&self) -> u32 {
        self.l2_bits + self.cluster_bits
    }

    /// The slice that maps a guest offset: its number among all slices of the disk.
    pub fn slice_of(&self, guest: u64) -> u64 {
        guest >> self.slice_reach_bits()
    }

    /// The L1 entry that leads to a slice.
    pub fn l1_of_slice(&self, slice: u64) -> u64 {
        slice >> (self.l2_bits - self.slice_bits)
    }

    /// Where in its L2 table a slice starts, in bytes.
    pub fn slice_in_table(&self, slice: u64) -> u64 {
        (slice & ((1 << (self.l2_bits - self.slice_bits)) - 1)) * self.slice_bytes()
    }

    /// Number of a guest offset's entry in its slice.
    pub fn entry_in_slice(&self, guest: u64) -> usize {
        let index = (guest >> self.cluster_bits) & ((1 << self.slice_bits) - 1);
        usize::try_from(index).unwrap_or(usize::MAX)
    }

    /// The entry `index` of a slice.
    pub fn get(&self, slice: &[u64], index: usize) -> Entry {
        if self.extended {
            Entry { word: slice[index * 2], map: slice[index * 2 + 1] }
        } else {
            Entry { word: slice[index], map: 0 }
        }
    }

    /// Sets the entry `index` of a slice.
    pub fn set(&self, slice: &mut [u64], index: usize, entry: Entry) {
        if self.extended {
            slice[index * 2] = entry.word;
            slice[index * 2 + 1] = entry.map;
        } else {
            slice[index] = entry.word;
        }
    }

    /// The host cluster of an entry that is not compressed: 0 when it has none.
    pub fn host(&self, entry: Entry) -> u64 {
        if entry.word & COMPRESSED != 0 { 0 } else { entry.word & OFFSET }
    }

    /// Whether the host cluster may be written to: there is one and nobody shares it.
    pub fn is_own(&self, entry: Entry) -> bool {
        entry.word & COMPRESSED == 0 && entry.word & COPIED != 0 && entry.word & OFFSET != 0
    }

    /// What an entry says about its subcluster `sub` (0 without extended entries).
    pub fn sub_state(&self, entry: Entry, sub: u32) -> Sub {
        if entry.word & COMPRESSED != 0 {
            return Sub::Compressed;
        }
        if self.extended {
            return match (entry.map >> (32 + sub) & 1, entry.map >> sub & 1) {
                (0, 0) => Sub::Below,
                (0, _) => Sub::Data,
                _ => Sub::Zero,
            };
        }
        if self.v3 && entry.word & ZERO != 0 {
            Sub::Zero
        } else if entry.word & OFFSET == 0 {
            Sub::Below
        } else {
            Sub::Data
        }
    }

    /// Whether the entry can be true.
    pub fn check(&self, entry: Entry) -> Result<(), Bad> {
        if entry.word & COMPRESSED != 0 {
            return Ok(());
        }
        let host = entry.word & OFFSET;
        if host & (self.cluster() - 1) != 0 {
            return Err(Bad::Unaligned(host));
        }
        let (data, zero) = (entry.map & 0xffff_ffff, entry.map >> 32);
        if self.extended && (data & zero != 0 || (host == 0 && data != 0)) {
            return Err(Bad::Map);
        }
        Ok(())
    }

    /// Where a compressed cluster is.
    pub fn packed(&self, entry: Entry) -> Packed {
        let bits = 62 - (self.cluster_bits - 8);
        let offset = entry.word & ((1 << bits) - 1);
        let sectors = (entry.word & !(COPIED | COMPRESSED)) >> bits;
        Packed { offset, len: (sectors + 1) * 512 - (offset & 511) }
    }

    /// The host clusters that an entry refers to: the first, counted from the beginning of the file, and how many.
    pub fn clusters_of(&self, entry: Entry) -> (u64, u64) {
        let bits = self.cluster_bits;
        if entry.word & COMPRESSED != 0 {
            let packed = self.packed(entry);
            let (first, last) = (packed.offset >> bits, (packed.offset + packed.len - 1) >> bits);
            return (first, last - first + 1);
        }
        let host = self.host(entry);
        (host >> bits, u64::from(host != 0))
    }

    /// The entry of a compressed cluster of `len` bytes at `offset`. `None` if it cannot be expressed.
    pub fn pack(&self, offset: u64, len: u64) -> Option<Entry> {
        let bits = 62 - (self.cluster_bits - 8);
        let last = offset.checked_add(len.checked_sub(1)?)?;
        let sectors = (last >> 9) - (offset >> 9);
        if last >> bits.min(55) != 0 || sectors >> (62 - bits) != 0 {
            return None;
        }
        Some(Entry { word: COMPRESSED | sectors << bits | offset, map: 0 })
    }

    /// The entry of an own cluster at `host` whose content is all data.
    pub fn data(&self, host: u64) -> Entry {
        Entry { word: COPIED | host, map: if self.extended { 0xffff_ffff } else { 0 } }
    }
}

/// The bits of the subclusters that `from..to` (offsets inside a cluster, aligned to subclusters) covers.
pub fn sub_mask(sub_bits: u32, from: u64, to: u64) -> u64 {
    let (first, end) = (from >> sub_bits, to >> sub_bits);
    ((1 << end) - 1) & !((1 << first) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(cluster_bits: u32, extended: bool) -> Layout {
        let l2_bits = cluster_bits - if extended { 4 } else { 3 };
        Layout { cluster_bits, extended, v3: true, l2_bits, slice_bits: l2_bits.min(9) }
    }

    #[test]
    fn compressed_extents_survive_packing() {
        for bits in 9..=21 {
            let layout = layout(bits, false);
            for (offset, len) in [(0, 1), (511, 2), (1000, 512), ((1 << 40) + 77, (1 << bits) - 1)] {
                let packed = layout.packed(layout.pack(offset, len).unwrap());
                assert_eq!(packed.offset, offset);
                assert!(
                    packed.len >= len && packed.len < len + 512 && (offset + packed.len).is_multiple_of(512)
                );
            }
            assert_eq!(layout.pack(1 << 55, 10), None);
        }
    }

    #[test]
    fn impossible_entries_are_seen() {
        let plain = layout(16, false);
        assert_eq!(plain.check(Entry { word: COPIED | 0x10200, map: 0 }), Err(Bad::Unaligned(0x10200)));
        // QEMU takes it for unallocated.
        assert!(plain.check(Entry { word: COPIED, map: 0 }).is_ok());
        assert!(plain.check(Entry { word: ZERO, map: 0 }).is_ok());
        let extended = layout(16, true);
        assert_eq!(extended.check(Entry { word: 0, map: 1 }), Err(Bad::Map));
        assert_eq!(extended.check(Entry { word: COPIED | 0x10000, map: 1 << 32 | 1 }), Err(Bad::Map));
        assert!(extended.check(Entry { word: 0, map: 0xffff_ffff << 32 }).is_ok());
        assert_eq!(sub_mask(11, 0, 1 << 16), 0xffff_ffff);
        assert_eq!(sub_mask(11, 1 << 11, 3 << 11), 0b110);
    }
}

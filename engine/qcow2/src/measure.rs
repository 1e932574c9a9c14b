//! How large an image would get, without making it. What is counted, and that a refcount table counts itself, was found
//! by comparing with `qemu-img measure`.

use crate::create::{CreateError, CreateOptions};
use crate::header;
use crate::live::Qcow2;

/// Bytes of a bitmap directory's entry without the name.
const DIRECTORY_ENTRY: u64 = 24;

/// Bytes of an image's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// Header and tables.
    pub metadata: u64,
    /// The same, and every cluster of the disk.
    pub fully_allocated: u64,
}

/// Measures an image that would be made with `options`.
pub fn measure(options: &CreateOptions) -> Result<Measure, CreateError> {
    options.check()?;
    let cluster = options.cluster_size;
    let data = options.size.div_ceil(cluster);
    let entry = if options.extended_l2 { 16 } else { 8 };
    let l2 = data.div_ceil(cluster / entry);
    let l1 = (l2 * 8).div_ceil(cluster);
    let metadata = (1 + l1 + l2 + refcounts(1 + l1 + l2 + data, options)) * cluster;
    let too_large = || CreateError::TooLarge;
    let fully_allocated = data.checked_mul(cluster).and_then(|data| data.checked_add(metadata));
    let fully_allocated = fully_allocated.filter(|all| i64::try_from(*all).is_ok()).ok_or_else(too_large)?;
    Ok(Measure { metadata, fully_allocated })
}

/// Clusters of the refcount table and its blocks, which count `others` clusters and themselves.
fn refcounts(others: u64, options: &CreateOptions) -> u64 {
    let per_block = options.cluster_size * 8 / options.refcount_bits.max(1);
    let (mut table, mut blocks) = (0, 0);
    loop {
        let next = (others + table + blocks).div_ceil(per_block);
        let next = ((next * 8).div_ceil(options.cluster_size), next);
        if next == (table, blocks) {
            return table + blocks;
        }
        (table, blocks) = next;
    }
}

impl Qcow2 {
    /// Bytes that the image's bitmaps would take in one with clusters of that many bytes. `None` for version 2, which
    /// cannot have any.
    pub fn measure_bitmaps(&self, cluster: u64) -> Option<u64> {
        if self.header().version < header::Version::V3 {
            return None;
        }
        let mut directory: u64 = 0;
        let mut clusters = 0;
        for bitmap in &self.stored().entries {
            let bits = self.size().div_ceil(1 << bitmap.granularity_bits);
            let data = bits.div_ceil(8).div_ceil(cluster);
            clusters += data + (data * 8).div_ceil(cluster);
            directory += (DIRECTORY_ENTRY + bitmap.name.len() as u64).next_multiple_of(8);
        }
        Some((clusters + directory.div_ceil(cluster)) * cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `qemu-img measure` prints them.
    #[test]
    fn sizes_are_the_references() {
        for (size, cluster_size, extended_l2, refcount_bits, metadata) in [
            (0, 65536, false, 16, 196_608),
            (1 << 30, 65536, false, 16, 393_216),
            (1 << 30, 512, false, 16, 21_385_216),
            (1 << 30, 65536, true, 16, 524_288),
            (1 << 30, 65536, false, 64, 524_288),
            (1 << 46, 65536, false, 16, 10_739_253_248),
            (1 << 50, 65536, false, 16, 171_825_102_848),
        ] {
            let options =
                CreateOptions { cluster_size, extended_l2, refcount_bits, ..CreateOptions::new(size) };
            let measured = measure(&options).expect("not too large");
            assert_eq!(measured.metadata, metadata, "{options:?}");
            assert_eq!(measured.fully_allocated, size + metadata);
        }
        assert_eq!(measure(&CreateOptions::new(7 << 60)), Err(CreateError::TooLarge));
    }
}

//! Counts all references of an image and compares them with its refcounts.

use crate::entry::{COMPRESSED, COPIED, Layout, OFFSET};
use crate::header::Header;
use crate::snapshots;
use crate::words::to_words;

use super::{Disk, run, view_of};

fn position(order: u32, index: u64) -> (usize, u32) {
    let bit = index << order;
    (usize::try_from(bit / 8).unwrap(), u32::try_from(bit % 8).unwrap())
}

pub fn put_count(block: &mut [u8], order: u32, index: u64, count: u64) {
    let (byte, bit) = position(order, index);
    if order < 3 {
        let mask = (1u8 << (1 << order)) - 1;
        block[byte] = block[byte] & !(mask << bit) | u8::try_from(count).unwrap() << bit;
    } else {
        let width = 1 << (order - 3);
        block[byte..byte + width].copy_from_slice(&count.to_be_bytes()[8 - width..]);
    }
}

fn get_count(block: &[u8], order: u32, index: u64) -> u64 {
    let (byte, bit) = position(order, index);
    if order < 3 {
        return u64::from(block[byte] >> bit & ((1 << (1 << order)) - 1));
    }
    block[byte..byte + (1 << (order - 3))].iter().fold(0, |all, b| all << 8 | u64::from(*b))
}

/// Errors (each said), and the number of leaked clusters.
pub fn check(image: &[u8]) -> (Vec<String>, u64) {
    let header = Header::parse(&image[..image.len().min(1 << 21)]).unwrap();
    let layout = Layout::of(&header);
    let cluster = header.cluster_size();
    let mut errors = Vec::new();
    let bytes = |at: u64, len: u64| {
        let at = usize::try_from(at).unwrap();
        let len = usize::try_from(len).unwrap();
        let mut out = image.get(at..(at + len).min(image.len())).unwrap_or_default().to_vec();
        out.resize(len, 0);
        out
    };
    let clusters = (image.len() as u64).div_ceil(cluster);
    let snapshots = run(snapshots::read(&view_of(Disk::new(image.to_vec(), 1)).cx(), &header)).unwrap();
    let mut refs = vec![0u64; usize::try_from(clusters + 4096).unwrap()];
    let mut own: Vec<u64> = Vec::new();
    // What the active tables refer to, and whether they say that it is theirs alone.
    let mut flags: Vec<(u64, bool)> = Vec::new();
    {
        let mut claim = |at: u64, len: u64, what: &str| {
            if at + len > (clusters + 1) * cluster {
                errors.push(format!("{what} {at:#x} is outside"));
            }
            for i in at / cluster..(at + len).div_ceil(cluster) {
                if let Some(count) = refs.get_mut(usize::try_from(i).unwrap()) {
                    *count += 1;
                }
            }
        };
        claim(0, cluster, "header");
        let table_len = u64::from(header.refcount_table_clusters) * cluster;
        claim(header.refcount_table_offset, table_len, "table");
        for block in to_words(&bytes(header.refcount_table_offset, table_len)).iter().filter(|b| **b != 0) {
            claim(*block, cluster, "block");
            own.push(*block);
        }
        claim(header.snapshots_offset, snapshots.len, "snapshots");
        let active = (header.l1_offset, header.l1_bytes());
        let inactive = snapshots.snapshots.iter().map(|snapshot| (snapshot.l1_offset, snapshot.l1_bytes()));
        for (number, (l1_offset, l1_bytes)) in std::iter::once(active).chain(inactive).enumerate() {
            let is_active = number == 0;
            claim(l1_offset, l1_bytes, "l1");
            for l1 in to_words(&bytes(l1_offset, l1_bytes)).iter().filter(|e| **e & OFFSET != 0) {
                claim(l1 & OFFSET, cluster, "l2");
                if is_active {
                    own.push(l1 & OFFSET);
                    flags.push((l1 & OFFSET, l1 & COPIED != 0));
                }
                let words = to_words(&bytes(l1 & OFFSET, cluster));
                for i in 0..1usize << layout.l2_bits {
                    let entry = layout.get(&words, i);
                    layout.check(entry).unwrap();
                    if entry.word & COMPRESSED != 0 {
                        let packed = layout.packed(entry);
                        claim(packed.offset, packed.len.min(cluster * clusters - packed.offset), "packed");
                    } else if layout.host(entry) != 0 {
                        claim(layout.host(entry), cluster, "data");
                        if is_active {
                            own.push(layout.host(entry));
                            flags.push((layout.host(entry), entry.word & COPIED != 0));
                        }
                    }
                }
            }
        }
    }
    let mut leaks = 0;
    let table =
        to_words(&bytes(header.refcount_table_offset, u64::from(header.refcount_table_clusters) * cluster));
    let mut block = Vec::new();
    let mut counts = Vec::new();
    for (i, refs) in refs.iter().enumerate() {
        let (number, index) =
            (i as u64 / header.refcounts_per_block(), i as u64 % header.refcounts_per_block());
        let at = table.get(usize::try_from(number).unwrap()).copied().unwrap_or(0);
        if index == 0 {
            block = if at == 0 { Vec::new() } else { bytes(at, cluster) };
        }
        let count = if block.is_empty() { 0 } else { get_count(&block, header.refcount_order, index) };
        if count < *refs {
            errors.push(format!("cluster {i}: refcount {count}, references {refs}"));
        }
        leaks += u64::from(count > *refs);
        counts.push(count);
    }
    for (at, flag) in flags {
        let count = usize::try_from(at / cluster).ok().and_then(|i| counts.get(i)).copied().unwrap_or(0);
        if flag != (count == 1) {
            errors.push(format!("{at:#x}: refcount {count}, flag {flag}"));
        }
    }
    own.sort_unstable();
    for pair in own.windows(2).filter(|pair| pair[0] == pair[1]) {
        errors.push(format!("{:#x} is used twice", pair[0]));
    }
    (errors, leaks)
}

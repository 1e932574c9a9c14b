//! Writing bitmaps to an image: their bits and tables, in clusters of their own that nothing refers to yet.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};

use underlay_graph::bitmap::{DirtyBitmap, Words};
use underlay_graph::bitmaps::PlanBitmap;
use underlay_graph::{ByteRange, Cx, IoError, Result, ZeroFlags};

use crate::bitmaps::{ALL_ONES, AUTO, MAX_BITMAP, StoredBitmap, bytes_of_bits};
use crate::commit::write_pieces;
use crate::live::Qcow2;
use crate::stored::Written;
use crate::words::to_bytes;

/// Bytes that may wait to be written together.
const WAITING: usize = 4 << 20;
/// So many zeroes are cheaper to have made than to be written.
const SHORT: u64 = 16 << 10;

/// Clusters for new bitmaps, which are given free again if it comes to nothing, and what goes there.
pub(crate) struct Writer<'a> {
    image: &'a Qcow2,
    pub(crate) cx: &'a Cx<'a>,
    taken: Vec<(u64, u64)>,
    pieces: Vec<(u64, Vec<u8>)>,
    waiting: usize,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(image: &'a Qcow2, cx: &'a Cx<'a>) -> Self {
        Self { image, cx, taken: Vec::new(), pieces: Vec::new(), waiting: 0 }
    }

    /// Puts bytes into clusters of their own; where. The rest of the last one is zero if that matters.
    pub(crate) async fn put(&mut self, mut bytes: Vec<u8>, zero_behind: bool) -> Result<u64> {
        let cluster = self.image.layout.cluster();
        let count = (bytes.len() as u64).div_ceil(cluster);
        let place = self.image.alloc_clusters(self.cx, count).await?;
        self.taken.push((place.host, count));
        if zero_behind && !place.fresh {
            let rest = ByteRange::new(place.host + bytes.len() as u64, count * cluster - bytes.len() as u64);
            let rest = rest.ok_or(IoError::EFBIG)?;
            let flags = ZeroFlags { may_unmap: true, no_fallback: false };
            match rest.len() {
                SHORT.. => self.cx.below().write_zeroes(rest, flags).await?,
                _ => bytes.resize(usize::try_from(count * cluster).map_err(|_| IoError::EFBIG)?, 0),
            }
        }
        self.waiting += bytes.len();
        self.pieces.push((place.host, bytes));
        if self.waiting > WAITING {
            self.write_out().await?;
        }
        Ok(place.host)
    }

    pub(crate) async fn write_out(&mut self) -> Result<()> {
        self.waiting = 0;
        write_pieces(self.cx, std::mem::take(&mut self.pieces)).await
    }

    /// Writes all bitmaps, and their tables: first those that the image has, in its order, then others, the newest
    /// first. Of those that are `written` and have not changed since, the image has the bits already.
    pub(crate) async fn bitmaps(
        &mut self,
        old: &[StoredBitmap],
        bitmaps: &[PlanBitmap],
        written: &mut Written,
    ) -> Result<Vec<StoredBitmap>> {
        let before = std::mem::take(written);
        let is_written = |bitmap: &PlanBitmap, now: &(Weak<DirtyBitmap>, u64)| {
            let then = before.get(&*bitmap.name);
            let fits = bitmap.successor.is_none() && bitmap.bits.size() == self.image.size();
            fits && then.is_some_and(|then| then.0.ptr_eq(&now.0) && then.1 == now.1)
        };
        let by_name: HashMap<&str, &PlanBitmap> =
            bitmaps.iter().map(|bitmap| (&*bitmap.name, bitmap)).collect();
        let known: HashSet<&str> = old.iter().map(|entry| entry.name.as_str()).collect();
        let mut entries = Vec::with_capacity(bitmaps.len());
        for entry in old {
            match by_name.get(entry.name.as_str()) {
                None => {}
                Some(bitmap) if bitmap.inconsistent => entries.push(entry.clone()),
                Some(bitmap) => {
                    let now = (Arc::downgrade(&bitmap.bits), bitmap.bits.changes());
                    entries.push(match is_written(bitmap, &now) {
                        true => StoredBitmap { flags: flags(bitmap), ..entry.clone() },
                        false => self.bitmap(bitmap, entry.raw_name.clone()).await?,
                    });
                    note(written, bitmap, now);
                }
            }
        }
        // What is not known cannot be stored anew.
        let is_new = |bitmap: &&PlanBitmap| !known.contains(&*bitmap.name) && !bitmap.inconsistent;
        for bitmap in bitmaps.iter().rev().filter(is_new) {
            let now = (Arc::downgrade(&bitmap.bits), bitmap.bits.changes());
            entries.push(self.bitmap(bitmap, bitmap.name.as_bytes().to_vec()).await?);
            note(written, bitmap, now);
        }
        Ok(entries)
    }

    /// Writes the bits of a bitmap, and its table.
    async fn bitmap(&mut self, bitmap: &PlanBitmap, raw_name: Vec<u8>) -> Result<StoredBitmap> {
        let bits = bitmap.to_keep();
        let granularity_bits = bits.granularity().ilog2();
        let (size, cluster) = (self.image.size(), self.image.layout.cluster());
        let len = bytes_of_bits(size, granularity_bits);
        if !(1..=MAX_BITMAP).contains(&len) {
            return Err(
                IoError::EINVAL.with(format!("Bitmap '{}' has a size that cannot be stored", bitmap.name))
            );
        }
        let entries = usize::try_from(len.div_ceil(cluster)).map_err(|_| IoError::EFBIG)?;
        let mut table = vec![0; entries];
        let mut clusters = Clusters::new(&bits, size.div_ceil(bits.granularity()), cluster);
        while let Some((index, bytes)) = clusters.next() {
            let slot = usize::try_from(index).map_err(|_| IoError::EFBIG)?;
            table[slot] = match bytes {
                Some(bytes) => self.put(bytes, true).await?,
                None => ALL_ONES,
            };
        }
        let table_offset = self.put(to_bytes(&table), false).await?;
        Ok(StoredBitmap {
            name: bitmap.name.to_string(),
            raw_name,
            flags: flags(bitmap),
            granularity_bits,
            table_offset,
            table_entries: u32::try_from(entries).map_err(|_| IoError::EFBIG)?,
        })
    }

    /// Nothing refers to what was written.
    pub(crate) async fn undo(self) {
        for (host, count) in self.taken {
            self.image.free_unused(self.cx, host, count).await;
        }
    }
}

/// The image has what a bitmap said.
fn note(written: &mut Written, bitmap: &PlanBitmap, said: (Weak<DirtyBitmap>, u64)) {
    if bitmap.successor.is_none() {
        written.insert(bitmap.name.to_string(), said);
    }
}

fn flags(bitmap: &PlanBitmap) -> u32 {
    if bitmap.enabled { AUTO } else { 0 }
}

/// The bits of a bitmap in clusters as they are stored, but for those in which none is set.
struct Clusters<'a> {
    bits: &'a DirtyBitmap,
    /// Granules of the disk, and in a cluster of bits.
    granules: u64,
    in_cluster: u64,
    /// No granule below this is needed any more.
    next: u64,
    /// Words that begin with the granule of this number.
    words: Option<(u64, Box<Words>)>,
}

impl<'a> Clusters<'a> {
    fn new(bits: &'a DirtyBitmap, granules: u64, cluster: u64) -> Self {
        Self { bits, granules, in_cluster: cluster * 8, next: 0, words: None }
    }

    /// Words from a granule at or behind `next` on, in front of which none is dirty.
    fn words(&mut self) -> Option<(u64, &[u64])> {
        let known =
            self.words.as_ref().is_some_and(|(first, words)| first + words.len() as u64 * 64 > self.next);
        if !known {
            self.words = self.bits.next_words(self.next).map(|(first, words)| (first, Box::new(words)));
        }
        let (first, words) = self.words.as_ref()?;
        let at = self.next.max(*first);
        let skipped = usize::try_from((at - first) / 64).ok()?;
        (at < self.granules).then_some((at, &words[skipped..]))
    }

    /// The number of a cluster, and its content unless all bits are set. (The last cluster may be longer than the disk:
    /// QEMU would believe that the bits behind the end are set as well.)
    fn next(&mut self) -> Option<(u64, Option<Vec<u8>>)> {
        loop {
            let (first, _) = self.words()?;
            let index = first / self.in_cluster;
            let start = index * self.in_cluster;
            let end = (start + self.in_cluster).min(self.granules);
            let mut bytes = vec![0; usize::try_from((end - start).div_ceil(8)).ok()?];
            let mut set = 0;
            while let Some((at, words)) = self.words().filter(|(at, _)| *at < end) {
                for (granule, word) in (at..end).step_by(64).zip(words) {
                    // Bits behind the end have no meaning.
                    let mask = if end - granule < 64 { (1 << (end - granule)) - 1 } else { u64::MAX };
                    set += u64::from((word & mask).count_ones());
                    let from = usize::try_from((granule - start) / 8).ok()?;
                    let to = bytes.len().min(from + 8);
                    bytes[from..to].copy_from_slice(&(word & mask).to_le_bytes()[..to - from]);
                }
                self.next = (at + words.len() as u64 * 64).min(end.next_multiple_of(64));
            }
            self.next = end.next_multiple_of(64);
            if set > 0 {
                return Some((index, if set == self.in_cluster { None } else { Some(bytes) }));
            }
        }
    }
}

//! The regions of the disk that may have been written to since the bitmaps in the image were last brought up to date,
//! kept durably: with it they are still good after a crash.
//!
//! Before the first write to a region its bit is set in the image and flushed; later writes there find it set, in
//! memory, and cost nothing. When the bitmaps have been stored again ([`Ahead::begin_epoch`] before, [`Ahead::forget`]
//! after), the bits of regions that nobody has written to meanwhile are taken back. After a crash, what was set is
//! dirty in every bitmap that was recording. What is told too much is at most the regions written to since the time
//! before last.
//!
//! The last quarter of the header cluster, which nobody else uses, is the place:
//!
//! | offset | size | |
//! | --- | --- | --- |
//! | 0 | 8 | `UnderLog` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | bytes of a region, as a power of two |
//! | 16 | 4 | how many bitmaps are not to be relied on in any case |
//! | 24 | 8 each | hashes of their names |
//! | 504 | 8 | a hash of what is before |
//! | 512 | | a bit for each region; region *i* of the disk has bit *i* modulo their number |
//!
//! An auto-clear feature bit ([`features::DIRTY_REGIONS`]) says that it holds. Programs that do not know the bit clear
//! it before they write to the image; then the bitmaps, which are marked as in use, are inconsistent for us as for
//! everybody.
//!
//! [`features::DIRTY_REGIONS`]: crate::features::DIRTY_REGIONS

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use underlay_graph::{ByteRange, Cx, Result, WriteFlags};
use underlay_sys::Iov;

const MAGIC: &[u8; 8] = b"UnderLog";
const VERSION: u32 = 1;
const SECTOR: u64 = 512;
const SECTOR_BYTES: usize = 512;
/// Of a sector.
const SECTOR_WORDS: usize = 64;
/// Where the names' hashes begin and end.
const HASHES: Range<usize> = 24..504;
/// The smallest header cluster with room for it.
const MIN_CLUSTER: u64 = 4096;
/// Most ranges that are told apart: as many as the largest place has bits.
const MAX_RANGES: u64 = 1 << 22;
/// Bytes of the smallest region, as a power of two.
const MIN_REGION_BITS: u32 = 20;

/// Where the regions are kept in an image with such clusters; `None` if they are too small.
pub(crate) fn place(cluster: u64) -> Option<ByteRange> {
    (cluster >= MIN_CLUSTER).then(|| ByteRange::between(cluster - cluster / 4, cluster))
}

/// Where a tied image ([`crate::extensions::TIED`]) has two sectors for whoever keeps it.
pub fn tie_place(cluster: u64) -> Option<ByteRange> {
    place(cluster).map(|place| ByteRange::between(place.start() - 2 * SECTOR, place.start()))
}

/// FNV-1a: for names and against damage, not against malice.
pub fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// See the module.
#[derive(Debug)]
pub struct Ahead {
    place: ByteRange,
    region_bits: AtomicU32,
    /// Hashes of the names of bitmaps that are not to be relied on.
    broken: Mutex<Vec<u64>>,
    /// Durable.
    covered: Box<[AtomicU64]>,
    /// Written to since the epoch began.
    touched: Box<[AtomicU64]>,
    /// Regions that somebody waits for.
    wanted: Mutex<BTreeSet<u64>>,
    /// Who writes to the place.
    turn: tokio::sync::Mutex<()>,
    /// Something was covered since the last epoch began.
    has_news: AtomicBool,
}

fn words(count: usize) -> Box<[AtomicU64]> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

impl Ahead {
    /// With nothing covered; `None` if the header cluster is too small. To be used after [`Ahead::restart`].
    pub fn new(cluster: u64) -> Option<Self> {
        let place = place(cluster)?;
        let count = place.buffer_len() / 8 - SECTOR_WORDS;
        let (covered, touched) = (words(count), words(count));
        let (region_bits, broken, wanted, turn, has_news) = Default::default();
        Some(Self { place, region_bits, broken, covered, touched, wanted, turn, has_news })
    }

    /// Nothing is covered, of a disk of `size` bytes. The bitmaps called `broken` are not to be relied on; false if
    /// they are too many. Nobody may ask at the same time.
    pub fn restart<'a>(&self, size: u64, broken: impl Iterator<Item = &'a str>) -> bool {
        let broken: Vec<_> = broken.map(|name| hash(name.as_bytes())).collect();
        let has_room = broken.len() * 8 <= HASHES.len();
        let region_bits = size.div_ceil(self.regions()).next_power_of_two().trailing_zeros();
        self.region_bits.store(region_bits.max(MIN_REGION_BITS), Ordering::SeqCst);
        *self.broken() = broken;
        self.covered.iter().chain(&self.touched).for_each(|word| word.store(0, Ordering::SeqCst));
        has_room
    }

    fn broken(&self) -> MutexGuard<'_, Vec<u64>> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn region_bits(&self) -> u32 {
        self.region_bits.load(Ordering::SeqCst)
    }

    /// What an image has. `None`: nothing that makes sense.
    pub async fn load(file: &Cx<'_>, cluster: u64) -> Result<Option<Self>> {
        let Some(place) = place(cluster) else { return Ok(None) };
        let into = Iov::scratch(place.buffer_len());
        file.read(place, into.clone()).await?;
        Ok(Self::parse(cluster, &into.to_vec()))
    }

    fn parse(cluster: u64, bytes: &[u8]) -> Option<Self> {
        let (head, table) = bytes.split_at_checked(SECTOR_BYTES)?;
        let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let quad = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
        let whole = quad(HASHES.end) == hash(&head[..HASHES.end]);
        let region_bits = word(12);
        let broken = usize::try_from(word(16)).ok()?;
        let sound = (MIN_REGION_BITS..63).contains(&region_bits) && broken <= HASHES.len() / 8;
        if !whole || !head.starts_with(MAGIC) || word(8) != VERSION || !sound {
            return None;
        }
        let ahead = Self::new(cluster)?;
        ahead.region_bits.store(region_bits, Ordering::SeqCst);
        ahead.broken().extend((0..broken).map(|n| quad(HASHES.start + n * 8)));
        for (word, bytes) in ahead.covered.iter().zip(table.chunks_exact(8)) {
            word.store(bytes.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte)), Ordering::SeqCst);
        }
        Some(ahead)
    }

    /// Writes all of it to an image, durably.
    pub async fn write(&self, file: &Cx<'_>) -> Result<()> {
        let _turn = self.turn.lock().await;
        let mut bytes = self.head();
        bytes.extend(self.covered.iter().flat_map(|word| word.load(Ordering::SeqCst).to_le_bytes()));
        file.write(self.place, Iov::copy_of(&bytes), WriteFlags::default()).await?;
        file.flush().await
    }

    fn head(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_be_bytes());
        bytes.extend(self.region_bits().to_be_bytes());
        let broken = self.broken();
        bytes.extend((broken.len() as u64).to_be_bytes().split_at(4).1);
        bytes.resize(HASHES.start, 0);
        bytes.extend(broken.iter().flat_map(|hash| hash.to_be_bytes()));
        bytes.resize(HASHES.end, 0);
        let sum = hash(&bytes);
        bytes.extend(sum.to_be_bytes());
        bytes
    }

    /// Whether a bitmap of that name is not to be relied on.
    pub fn is_broken(&self, name: &str) -> bool {
        self.broken().contains(&hash(name.as_bytes()))
    }

    fn regions(&self) -> u64 {
        self.covered.len() as u64 * 64
    }

    /// The words with bits for `range`, and which.
    fn masks(&self, range: ByteRange) -> impl Iterator<Item = (usize, u64)> {
        let count = self.regions();
        let bits = self.region_bits();
        let first = range.start() >> bits;
        let last = if range.is_empty() { first } else { ((range.end() - 1) >> bits) + 1 };
        let all = last - first >= count;
        let mut at = if all { 0 } else { first };
        let end = if all { count } else { last };
        std::iter::from_fn(move || {
            let bit = at % count;
            let stop = (at + (64 - bit % 64)).min(end);
            let len = stop.checked_sub(at).filter(|len| *len > 0)?;
            at = stop;
            let mask = (u64::MAX >> (64 - len)) << (bit % 64);
            Some((usize::try_from(bit / 64).unwrap_or(usize::MAX), mask))
        })
    }

    /// Whether it is durable already that `range` may be written to. What is written has been noted in the bitmaps by
    /// now.
    pub fn covers(&self, range: ByteRange) -> bool {
        let mut all = true;
        for (word, mask) in self.masks(range) {
            // First this, then the question: `forget` goes the other way round, so one of the two notices the other.
            if self.touched[word].load(Ordering::SeqCst) & mask != mask {
                self.touched[word].fetch_or(mask, Ordering::SeqCst);
            }
            all &= self.covered[word].load(Ordering::SeqCst) & mask == mask;
        }
        all
    }

    /// Makes that durable. Those who come at the same time share a flush.
    pub async fn cover(&self, file: &Cx<'_>, range: ByteRange) -> Result<()> {
        self.wanted().extend(self.missing(range));
        let _turn = self.turn.lock().await;
        if self.covers(range) {
            return Ok(());
        }
        let mut wanted = std::mem::take(&mut *self.wanted());
        // Taken along by somebody who failed.
        wanted.extend(self.missing(range));
        let before = self.snapshot();
        let mut now = before.clone();
        for region in wanted {
            now[usize::try_from(region / 64).unwrap_or(usize::MAX)] |= 1 << (region % 64);
        }
        self.has_news.store(true, Ordering::SeqCst);
        self.put(file, &before, &now).await?;
        file.flush().await?;
        self.covered.iter().zip(now).for_each(|(word, now)| word.store(now, Ordering::SeqCst));
        Ok(())
    }

    fn missing(&self, range: ByteRange) -> Vec<u64> {
        let missing = self.masks(range).flat_map(|(word, mask)| {
            let missing = mask & !self.covered[word].load(Ordering::SeqCst);
            (0..64).filter(move |bit| missing >> bit & 1 != 0).map(move |bit| word as u64 * 64 + bit)
        });
        missing.collect()
    }

    fn wanted(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn snapshot(&self) -> Vec<u64> {
        self.covered.iter().map(|word| word.load(Ordering::SeqCst)).collect()
    }

    /// Writes the sectors in which `now` is not `before`.
    async fn put(&self, file: &Cx<'_>, before: &[u64], now: &[u64]) -> Result<()> {
        let sectors = now.chunks(SECTOR_WORDS).zip(before.chunks(SECTOR_WORDS)).enumerate();
        for (sector, (now, _)) in sectors.filter(|(_, (now, before))| now != before) {
            let bytes: Vec<u8> = now.iter().flat_map(|word| word.to_le_bytes()).collect();
            let start = self.place.start() + (sector as u64 + 1) * SECTOR;
            let range = ByteRange::between(start, start + SECTOR);
            file.write(range, Iov::copy_of(&bytes), WriteFlags::default()).await?;
        }
        Ok(())
    }

    /// Whether anything was covered since the last epoch began.
    pub fn has_news(&self) -> bool {
        self.has_news.load(Ordering::SeqCst)
    }

    /// To be called before the bitmaps are looked at in order to store them.
    pub fn begin_epoch(&self) {
        self.has_news.store(false, Ordering::SeqCst);
        self.touched.iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }

    /// The bitmaps, as they were after the epoch had begun, are in the image now, durably: takes back the regions that
    /// nobody has written to since.
    pub async fn forget(&self, file: &Cx<'_>) -> Result<()> {
        let _turn = self.turn.lock().await;
        let before = self.snapshot();
        for ((covered, touched), before) in self.covered.iter().zip(&self.touched).zip(&before) {
            covered.fetch_and(touched.load(Ordering::SeqCst), Ordering::SeqCst);
            // Who was faster than that relies on what he has found.
            covered.fetch_or(touched.load(Ordering::SeqCst) & before, Ordering::SeqCst);
        }
        // Need not be durable.
        self.put(file, &before, &self.snapshot()).await
    }

    /// All that may have been written to, of a disk of `size` bytes; one range with more in it if it would be more than
    /// [`MAX_RANGES`].
    pub fn ranges(&self, size: u64) -> Vec<ByteRange> {
        let region = 1_u64 << self.region_bits();
        let count = self.regions();
        let runs = self.runs();
        // A disk that has grown since the size of a region was chosen has several regions for a bit.
        let rounds = size.div_ceil(region).div_ceil(count);
        if runs.is_empty() || size == 0 {
            return Vec::new();
        }
        if rounds.saturating_mul(runs.len() as u64) > MAX_RANGES {
            return vec![ByteRange::between(0, size)];
        }
        let place = |round: u64, bit: u64| (round * count + bit).saturating_mul(region).min(size);
        let all = (0..rounds).flat_map(|round| runs.iter().map(move |run| (round, run)));
        let all = all.map(|(round, run)| ByteRange::between(place(round, run.start), place(round, run.end)));
        all.filter(|range| !range.is_empty()).collect()
    }

    /// The runs of bits that are set.
    fn runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (index, word) in self.covered.iter().enumerate() {
            let mut word = word.load(Ordering::SeqCst);
            let mut at = index as u64 * 64;
            while word != 0 {
                let skip = word.trailing_zeros();
                let len = (word >> skip).trailing_ones();
                let start = at + u64::from(skip);
                match runs.last_mut().filter(|last| last.end == start) {
                    Some(last) => last.end += u64::from(len),
                    None => runs.push(start..start + u64::from(len)),
                }
                word = word.checked_shr(skip + len).unwrap_or(0);
                at = start + u64::from(len);
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{Disk, run, view_of};

    const CLUSTER: u64 = 65536;
    const HEADER: usize = 65536;
    const MIB: u64 = 1 << 20;

    fn at(mib: u64) -> ByteRange {
        ByteRange::between(mib * MIB + 5, mib * MIB + 6)
    }

    fn regions(ahead: &Ahead, size: u64) -> Vec<u64> {
        let ranges = ahead.ranges(size).into_iter();
        ranges.flat_map(|range| range.start() / MIB..range.end().div_ceil(MIB)).collect()
    }

    #[test]
    fn what_was_covered_survives() {
        let disk = Disk::new(vec![0; 2 * HEADER], 1);
        let view = view_of(disk.clone());
        let size = 10_000 * MIB + 3;
        let ahead = Ahead::new(CLUSTER).expect("room");
        assert!(ahead.restart(size, ["gone", "bad"].into_iter()));
        let kept = |disk: &Disk| {
            let view = view_of(Disk::new(disk.power_cut(1), 1));
            run(Ahead::load(&view.cx(), CLUSTER)).expect("a disk").expect("is there")
        };
        run(async {
            ahead.write(&view.cx()).await.expect("a disk");
            for mib in [3, 7, 9999, 10_000] {
                assert!(!ahead.covers(ByteRange::between(mib * MIB, mib * MIB + 1)));
                ahead.cover(&view.cx(), ByteRange::between(mib * MIB, mib * MIB + 1)).await.expect("a disk");
                assert!(ahead.covers(at(mib)) && !ahead.covers(at(mib + 1)));
            }
        });
        assert_eq!(regions(&kept(&disk), size), [3, 7, 9999, 10_000]);
        assert_eq!(kept(&disk).ranges(size).last().map(|range| range.len()), Some(MIB + 3));
        assert!(kept(&disk).is_broken("bad") && !kept(&disk).is_broken("good"));
        // One is written to while the bitmaps are being stored.
        ahead.begin_epoch();
        assert!(ahead.covers(at(7)));
        run(ahead.forget(&view.cx())).expect("a disk");
        run(view.cx().flush()).expect("a disk");
        assert_eq!(regions(&kept(&disk), size), [7]);
        assert!(ahead.covers(at(7)) && !ahead.covers(at(3)));
        // Not there, or not whole.
        let damaged = Disk::new(vec![0; 2 * HEADER], 1);
        assert!(run(Ahead::load(&view_of(damaged).cx(), CLUSTER)).expect("a disk").is_none());
        let mut bytes = disk.content();
        bytes[HEADER / 4 * 3 + 15] ^= 1;
        assert!(run(Ahead::load(&view_of(Disk::new(bytes, 1)).cx(), CLUSTER)).expect("a disk").is_none());
    }

    /// Regions share bits when the disk has grown beyond them.
    #[test]
    fn more_disk_than_regions() {
        let disk = Disk::new(vec![0; 4096], 1);
        let view = view_of(disk);
        let ahead = Ahead::new(4096).expect("room");
        assert!(!ahead.restart(MIB, std::iter::repeat_n("x", 61)));
        assert!(ahead.restart(64 * MIB, std::iter::empty()));
        assert_eq!(ahead.regions(), 4096);
        run(ahead.cover(&view.cx(), ByteRange::between(4095 * MIB, 4097 * MIB))).expect("a disk");
        assert_eq!(regions(&ahead, 4200 * MIB), [0, 4095, 4096]);
        // Not so many that it would take for ever, whatever an image says.
        assert_eq!(ahead.ranges(1 << 60), [ByteRange::between(0, 1 << 60)]);
        assert!(!ahead.covers(ByteRange::between(0, 10_000 * MIB)));
        run(ahead.cover(&view.cx(), ByteRange::between(100 * MIB, 10_000 * MIB))).expect("a disk");
        assert!(ahead.covers(ByteRange::between(0, 100_000 * MIB)));
        assert!(Ahead::new(2048).is_none());
    }

    /// A disk that fails: nothing is covered that is not durable, and those who waited for the same try themselves.
    #[test]
    fn a_disk_that_fails() {
        let disk = Disk::new(vec![0; HEADER], 1);
        let view = view_of(disk.clone());
        let ahead = Ahead::new(CLUSTER).expect("room");
        assert!(ahead.restart(64 * MIB, std::iter::empty()));
        disk.fail_after(Some(0));
        assert!(run(ahead.cover(&view.cx(), at(1))).is_err());
        assert!(!ahead.covers(at(1)));
        disk.fail_after(None);
        run(ahead.cover(&view.cx(), at(1))).expect("a disk");
        assert!(ahead.covers(at(1)));
    }
}

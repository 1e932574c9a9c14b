//! Rewriting the header cluster so that a power cut at any moment leaves an image that opens.
//!
//! A disk writes one 512-byte sector whole or not at all; more than that can tear. The fixed fields are in the first
//! sector, but extensions and the backing file's name usually reach into later ones. So a rewrite goes through
//! states that are each complete, and gets from one to the next by one write of the first sector:
//!
//! 1. what the new state has behind the first sector goes to places that the old state does not use; flush;
//! 2. the first sector, which now points there, is written; flush.
//!
//! For that the new name is put behind the old one when it would overlap it (the next rewrite finds the usual place
//! free again). Where the extensions themselves grow or shrink across the end of the first sector, two more states go
//! between: old and new header without the feature name table, which is there for error messages only. In the end
//! everything that is not used any more is zeroed.
//!
//! What cannot be done so (a 1 KiB cluster with two very long names, unknown extensions of more than 300 bytes) is
//! written behind the first sector first and in it last; a cut between the two can leave a name cut in two then, which
//! shows as a backing file that cannot be found, never as other data.

use std::ops::Range;

use underlay_graph::{ByteRange, Cx, IoError, Result, WriteFlags};
use underlay_sys::Iov;

use crate::ahead;
use crate::extensions;
use crate::features;
use crate::header::{Header, Version};
use crate::live::Qcow2;

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;
/// Where the three feature fields are.
const FEATURES: Range<u64> = 72..96;

/// Makes the feature bits on disk those of `header`: one sector, durable on return. What the bits promise (refcounts
/// written out, say) must have been flushed before. Version 2 has no feature bits: nothing happens.
pub async fn write_features(file: &Cx<'_>, header: &Header) -> Result<()> {
    if header.version == Version::V2 {
        return Ok(());
    }
    let fields = [header.incompatible, header.compatible, header.autoclear];
    let bytes = fields.map(u64::to_be_bytes).concat();
    let range = ByteRange::between(FEATURES.start, FEATURES.end);
    file.write(range, Iov::copy_of(&bytes), WriteFlags::default()).await?;
    file.flush().await
}

/// Makes the header cluster on disk that of `header`; durable on return, safe against power cuts as the module says.
/// Everything that the new header relies on must have been flushed before. EINVAL when it does not fit the cluster.
pub async fn write_header(file: &Cx<'_>, header: &Header) -> Result<()> {
    let room = ByteRange::between(0, room(header));
    let old = Iov::scratch(room.buffer_len());
    file.read(room, old.clone()).await?;
    let plan = plan(&old.to_vec(), header)?;
    for step in &plan.steps {
        apply(file, step).await?;
        file.flush().await?;
    }
    // Nobody reads what is zeroed here; it need not be durable.
    apply(file, &plan.leftovers).await
}

impl Qcow2 {
    /// Changes the header; durable on return. Everything that it relies on then must have been flushed before. After an
    /// error it is as it was, on disk too, or the image is unusable: nobody may go on whose header names tables that
    /// are not kept up to date.
    pub(crate) async fn switch_header(&self, cx: &Cx<'_>, edit: impl FnOnce(&mut Header)) -> Result<()> {
        let _turn = self.header_turn.lock().await;
        let old = self.header();
        let mut new = old.clone();
        edit(&mut new);
        if let Err(error) = write_header(&cx.below(), &new).await {
            if let Err(second) = write_header(&cx.below(), &old).await {
                tracing::error!(%second, "nobody knows which header is on disk");
                self.give_up();
            }
            return Err(error);
        }
        *self.header_mut() = new;
        Ok(())
    }
}

/// Bytes of the header cluster that belong to the header: not those where dirty regions are noted, or a tie is.
pub(crate) fn room(header: &Header) -> u64 {
    let cluster = header.cluster_size();
    if let Some(tie) = ahead::tie_place(cluster).filter(|_| header.extensions.is_tied()) {
        return tie.start();
    }
    let place = ahead::place(cluster).filter(|_| header.autoclear & features::DIRTY_REGIONS != 0);
    place.map_or(cluster, |place| place.start())
}

/// Where the header on disk ends, with its extensions and the backing file's name.
pub(crate) async fn header_end(file: &Cx<'_>, header: &Header) -> Result<u64> {
    let cluster = ByteRange::between(0, header.cluster_size());
    let bytes = Iov::scratch(cluster.buffer_len());
    file.read(cluster, bytes.clone()).await?;
    let end = State::on_disk(&bytes.to_vec()).and_then(|state| state.used.iter().map(|used| used.end).max());
    Ok(end.map_or(cluster.len(), |end| end as u64))
}

async fn apply(file: &Cx<'_>, writes: &[Write]) -> Result<()> {
    for write in writes {
        let range = ByteRange::between(write.at as u64, (write.at + write.bytes.len()) as u64);
        file.write(range, Iov::copy_of(&write.bytes), WriteFlags::default()).await?;
    }
    Ok(())
}

/// Some bytes for the header cluster.
#[derive(Clone, Debug, PartialEq)]
struct Write {
    at: usize,
    bytes: Vec<u8>,
}

/// What to write, in steps with a flush after each.
#[derive(Debug, Default)]
struct Plan {
    steps: Vec<Vec<Write>>,
    leftovers: Vec<Write>,
}

/// A complete content of the header cluster: `bytes`, of which only `used` matter.
#[derive(Clone, Debug)]
struct State {
    bytes: Vec<u8>,
    used: Vec<Range<usize>>,
}

impl State {
    /// What is on disk.
    fn on_disk(bytes: &[u8]) -> Option<Self> {
        Header::parse(bytes).ok()?;
        let word = |at: usize| bytes.get(at..at + 4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
        let index = |at| usize::try_from(word(at)?).ok();
        // Both were checked by `parse`: inside the cluster, so the upper half of the offset is zero.
        let (name_at, name_len) = (index(12)?, index(16)?);
        let start = if word(4)? == 2 { 72 } else { index(100)? };
        let area_end = if name_at == 0 { bytes.len() } else { name_at };
        let area = bytes.get(start..area_end).unwrap_or_default();
        let name = if name_at == 0 { 0..0 } else { name_at..(name_at + name_len).min(bytes.len()) };
        let used = vec![0..start + extensions::length(area), name];
        Some(Self { bytes: bytes.to_vec(), used })
    }

    /// What `header` looks like with its backing name at `name_at`, or right behind the extensions.
    fn of(header: &Header, cluster: usize, feature_names: bool, name_at: Option<usize>) -> Option<Self> {
        let mut bytes = header.serialise_extensions(feature_names);
        let end = bytes.len();
        let name = header.backing_file.as_deref().unwrap_or_default();
        let name_at = if name.is_empty() { end } else { name_at.unwrap_or(end) };
        if name_at < end || name_at + name.len() > cluster {
            return None;
        }
        bytes.resize(name_at, 0);
        bytes.extend(name);
        header.put_fixed(&mut bytes, name_at).ok()?;
        bytes.resize(cluster, 0);
        Some(Self { bytes, used: vec![0..end, name_at..name_at + name.len()] })
    }

    fn name(&self) -> Range<usize> {
        self.used.get(1).cloned().unwrap_or(0..0)
    }

    /// Bytes behind the first sector that matter.
    fn tail(&self) -> impl Iterator<Item = usize> + '_ {
        self.used.iter().flat_map(|range| range.start.max(SECTOR)..range.end)
    }
}

fn plan(old: &[u8], header: &Header) -> Result<Plan> {
    let unfit = || IoError::EINVAL.with("Header does not fit the first cluster");
    let cluster = old.len();
    let usual = State::of(header, cluster, true, None).ok_or_else(unfit)?;
    let Some(disk) = State::on_disk(old) else {
        // Nothing to preserve.
        return Ok(in_order(usual));
    };
    let behind = disk.used.iter().map(|r| r.end).max().unwrap_or(0).next_multiple_of(8);
    if let Some(plan) = through(&disk, vec![usual.clone()]) {
        return Ok(plan);
    }
    if let Some(plan) = State::of(header, cluster, true, Some(behind)).and_then(|s| through(&disk, vec![s])) {
        return Ok(plan);
    }
    let stages = || {
        let old_header = Header::parse(old).ok()?;
        let old_name = (!disk.name().is_empty()).then_some(disk.name().start);
        let mut states = vec![State::of(&old_header, cluster, false, old_name)?];
        let new_name = if overlap(&usual.name(), &disk.name()) { behind } else { usual.name().start };
        states.push(State::of(header, cluster, false, Some(new_name))?);
        states.push(State::of(header, cluster, true, Some(new_name))?);
        through(&disk, states)
    };
    Ok(stages().unwrap_or_else(|| in_order(usual)))
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// From the state on disk through `states`, each reached by one write of the first sector. `None` if one of them
/// needs a later byte that its predecessor needs to be different.
fn through(disk: &State, states: Vec<State>) -> Option<Plan> {
    let mut plan = Plan::default();
    let mut now = disk.clone();
    for next in states {
        let mut bytes = now.bytes.clone();
        for at in next.tail() {
            bytes[at] = next.bytes[at];
        }
        if now.tail().any(|at| bytes[at] != now.bytes[at]) {
            return None;
        }
        plan.steps.push(differences(&now.bytes, &bytes));
        let before = bytes.clone();
        let first = SECTOR.min(bytes.len());
        bytes[..first].copy_from_slice(&next.bytes[..first]);
        plan.steps.push(differences(&before, &bytes));
        now = State { bytes, used: next.used };
    }
    let mut clean = vec![0; now.bytes.len()];
    for range in now.used.iter().cloned().chain(std::iter::once(0..SECTOR.min(clean.len()))) {
        clean[range.clone()].copy_from_slice(&now.bytes[range]);
    }
    plan.leftovers = differences(&now.bytes, &clean);
    plan.steps.retain(|step| !step.is_empty());
    Some(plan)
}

/// Everything behind the first sector, then the first sector.
fn in_order(state: State) -> Plan {
    let mut first = state.bytes;
    let rest = first.split_off(SECTOR.min(first.len()));
    let mut steps = vec![vec![Write { at: 0, bytes: first }]];
    if !rest.is_empty() {
        steps.insert(0, vec![Write { at: SECTOR, bytes: rest }]);
    }
    Plan { steps, leftovers: Vec::new() }
}

/// Whole sectors in which two contents of the cluster differ, neighbours together.
fn differences(from: &[u8], to: &[u8]) -> Vec<Write> {
    let mut writes: Vec<Write> = Vec::new();
    for (i, (a, b)) in from.chunks(SECTOR).zip(to.chunks(SECTOR)).enumerate() {
        if a == b {
            continue;
        }
        match writes.last_mut() {
            Some(last) if last.at + last.bytes.len() == i * SECTOR => last.bytes.extend(b),
            _ => writes.push(Write { at: i * SECTOR, bytes: b.to_vec() }),
        }
    }
    writes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extensions::{BitmapsExtension, Extensions, Region};
    use crate::features;
    use crate::header::{Compression, Crypt};

    fn header(version: Version, cluster_bits: u32, name: Option<usize>, format: Option<&str>) -> Header {
        Header {
            version,
            cluster_bits,
            size: 1 << 20,
            crypt: Crypt::None,
            l1_entries: 100,
            l1_offset: 3 << cluster_bits,
            refcount_table_offset: 1 << cluster_bits,
            refcount_table_clusters: 1,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            compression: Compression::Zlib,
            unknown_fields: Vec::new(),
            extensions: Extensions {
                backing_format: format.map(|f| f.as_bytes().to_vec()),
                ..Extensions::default()
            },
            // Names of different lengths have different letters, so that a mixture shows.
            backing_file: name.map(|len| vec![b'a' + u8::try_from(len % 26).unwrap(); len]),
        }
    }

    /// Checks every state that a cut can leave: any prefix of steps, then any single sector more or less.
    fn assert_safe(old: &Header, new: &Header) {
        let mut disk = old.serialise().unwrap();
        disk.resize(1 << old.cluster_bits, 0);
        let plan = plan(&disk, new).unwrap();
        let check = |disk: &[u8]| {
            let found = Header::parse(disk).unwrap();
            assert!(found == *old || found == *new, "{found:?}");
        };
        for writes in plan.steps.iter().chain([&plan.leftovers]) {
            let sectors: Vec<_> = writes
                .iter()
                .flat_map(|w| w.bytes.chunks(SECTOR).enumerate().map(|(i, b)| (w.at + i * SECTOR, b)))
                .collect();
            for kept in 0..1u32 << sectors.len().min(6) {
                let mut torn = disk.clone();
                for (i, (at, bytes)) in sectors.iter().enumerate() {
                    if kept >> i.min(5) & 1 == 1 {
                        torn[*at..*at + bytes.len()].copy_from_slice(bytes);
                    }
                }
                check(&torn);
            }
            for (at, bytes) in sectors {
                disk[at..at + bytes.len()].copy_from_slice(bytes);
            }
        }
        assert_eq!(Header::parse(&disk).unwrap(), *new);
        let used = State::on_disk(&disk).unwrap().used;
        assert!((0..disk.len()).all(|i| disk[i] == 0 || used.iter().any(|r| r.contains(&i))));
    }

    #[test]
    fn no_cut_during_a_change_of_the_backing_file_loses_both_names() {
        let formats = [None, Some("raw"), Some("qcow2"), Some("fifteen--letter")];
        let names = [None, Some(5), Some(30), Some(440), Some(900), Some(1023)];
        for version in [Version::V2, Version::V3] {
            for bits in [12, 13, 16] {
                for (old_name, new_name) in names.iter().flat_map(|o| names.iter().map(move |n| (*o, *n))) {
                    for (old_format, new_format) in
                        formats.iter().flat_map(|o| formats.iter().map(move |n| (*o, *n)))
                    {
                        assert_safe(
                            &header(version, bits, old_name, old_format),
                            &header(version, bits, new_name, new_format),
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn no_cut_during_a_change_of_the_version_leaves_a_mixture() {
        for bits in [9, 12, 13, 16] {
            for name in
                [None, Some(30), Some(200), Some(900)].into_iter().filter(|n| bits > 9 || *n < Some(201))
            {
                for format in [None, Some("raw"), Some("fifteen--letter")] {
                    let versions = [Version::V2, Version::V3];
                    let [old, mut new] = versions.map(|version| header(version, bits, name, format));
                    assert_safe(&old, &new);
                    assert_safe(&new, &old);
                    new.compatible = features::LAZY_REFCOUNTS;
                    assert_safe(&new, &old);
                }
            }
        }
    }

    /// The extension of the bitmaps begins in the first sector and ends in the next.
    #[test]
    fn no_cut_during_a_change_of_the_bitmaps_mixes_two_directories() {
        let place = |count, offset, len| BitmapsExtension { count, directory: Region { offset, len } };
        let bitmaps =
            [None, Some(place(1, 0x5555_0000, 32)), Some(place(9, 0x0012_3456_7801_0000, 0x12_3456))];
        for (name, format) in [(None, None), (Some(30), Some("qcow2")), (Some(1000), None)] {
            for bits in [12, 13, 16] {
                let with = |bitmaps: Option<BitmapsExtension>| {
                    let mut header = header(Version::V3, bits, name, format);
                    header.autoclear = if bitmaps.is_some() { features::BITMAPS } else { 0 };
                    header.extensions.bitmaps = bitmaps;
                    header
                };
                for (old, new) in bitmaps.iter().flat_map(|old| bitmaps.iter().map(move |new| (*old, *new))) {
                    assert_safe(&with(old), &with(new));
                }
            }
        }
    }

    #[test]
    fn a_small_cluster_is_written_first_sector_last() {
        let old = header(Version::V3, 10, Some(400), None);
        let new = header(Version::V3, 10, Some(401), None);
        let mut disk = old.serialise().unwrap();
        disk.resize(1024, 0);
        let plan = plan(&disk, &new).unwrap();
        assert_eq!(plan.steps.len(), 2);
        assert_eq!(plan.steps[1][0].at, 0);
        let unfit = header(Version::V3, 9, Some(500), None);
        assert!(super::plan(&disk[..512], &unfit).is_err());
    }
}

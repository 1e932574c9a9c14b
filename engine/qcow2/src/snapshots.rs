//! The table of internal snapshots as it is on disk. Source: qcow2.rst, "Snapshots".

use underlay_graph::{ByteRange, Cx, IoError};
use underlay_sys::Iov;

use crate::header::{Header, MAX_L1_BYTES, MAX_SNAPSHOTS, Version, until_nul};
use crate::words::to_words;

/// Bytes of an entry's fixed part.
const FIXED: u64 = 40;
/// Most extra data of an entry in bytes. QEMU's limit.
pub(crate) const MAX_EXTRA: u32 = 1024;
/// Bytes of extra data that version 3 asks for.
const V3_EXTRA: u32 = 16;
/// Largest table in bytes. QEMU's limit.
const MAX_TABLE: u64 = 64 << 20;

/// One snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table is.
    pub l1_offset: u64,
    /// How many entries that has.
    pub l1_entries: u32,
    /// Its id, decimal.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was taken, seconds since 1970.
    pub seconds: u32,
    /// And nanoseconds.
    pub nanoseconds: u32,
    /// How long the guest had run, nanoseconds.
    pub clock: u64,
    /// Bytes of VM state.
    pub vm_state_size: u64,
    /// Size of the disk then; that of the image where the entry does not say.
    pub disk_size: u64,
    /// Instruction count of the guest, if known.
    pub icount: Option<u64>,
    /// Version 3 asks for more extra data than there is.
    pub incomplete: bool,
    /// Its id and its name as they are on disk.
    pub raw: (Vec<u8>, Vec<u8>),
    /// Extra data that we do not know, behind that which we do.
    pub unknown: Vec<u8>,
}

/// Bytes of extra data that we know: VM state size, disk size, instruction count.
const KNOWN_EXTRA: usize = 24;

impl Snapshot {
    /// Its entry, padded.
    fn serialise(&self) -> Vec<u8> {
        let (id, name) = &self.raw;
        let len = |bytes: &[u8]| u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes();
        let mut bytes = self.l1_offset.to_be_bytes().to_vec();
        bytes.extend(self.l1_entries.to_be_bytes());
        bytes.extend([len(id), len(name)].concat());
        bytes.extend([self.seconds, self.nanoseconds].map(u32::to_be_bytes).concat());
        bytes.extend(self.clock.to_be_bytes());
        // Who does not know the extra data sees none rather than a part of it.
        bytes.extend(u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        let extra = u32::try_from(KNOWN_EXTRA + self.unknown.len()).unwrap_or(u32::MAX);
        bytes.extend(extra.to_be_bytes());
        bytes.extend([self.vm_state_size, self.disk_size].map(u64::to_be_bytes).concat());
        bytes.extend(self.icount.unwrap_or(u64::MAX).to_be_bytes());
        bytes.extend(&self.unknown);
        bytes.extend(id);
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    /// Bytes of the L1 table.
    pub(crate) fn l1_bytes(&self) -> u64 {
        u64::from(self.l1_entries) * 8
    }
}

/// The table as it goes to disk. `TooBig` if it is longer than a table may be.
pub fn serialise(snapshots: &[Snapshot]) -> Result<Vec<u8>, SnapshotError> {
    let bytes: Vec<u8> = snapshots.iter().flat_map(Snapshot::serialise).collect();
    if bytes.len() as u64 > MAX_TABLE || snapshots.len() > MAX_SNAPSHOTS as usize {
        return Err(SnapshotError::TooBig);
    }
    Ok(bytes)
}

/// The table, and how long it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// All snapshots, in the table's order.
    pub snapshots: Vec<Snapshot>,
    /// Bytes of the table.
    pub len: u64,
    /// Numbers of entries with too much extra data, and how many bytes.
    pub excess: Vec<(u32, u32)>,
    /// Snapshots that are not in here, as the table would be too long.
    pub overhanging: u32,
}

/// Why the table cannot be used. The texts are QEMU's.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
#[allow(missing_docs)]
pub enum SnapshotError {
    #[error("{0}")]
    Io(IoError),
    #[error(
        "Too much extra metadata in snapshot table entry {0}\nYou can force-remove this extra metadata with qemu-img check -r all"
    )]
    Extra(u32),
    #[error("Snapshot table is too big")]
    TooBig,
    #[error("Snapshot table too large")]
    TooMany,
}

async fn bytes_at(file: &Cx<'_>, at: u64, len: u64) -> Result<Vec<u8>, SnapshotError> {
    let range = ByteRange::new(at, len).ok_or(SnapshotError::Io(IoError::EIO))?;
    let into = Iov::scratch(range.buffer_len());
    file.read(range, into.clone()).await.map_err(SnapshotError::Io)?;
    Ok(into.to_vec())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
}

fn quad(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) << 32 | u64::from(word(bytes, at + 4))
}

/// Reads the L1 table of a snapshot.
pub(crate) async fn l1(
    file: &Cx<'_>,
    header: &Header,
    snapshot: &Snapshot,
) -> Result<Box<[u64]>, SnapshotError> {
    let len = snapshot.l1_bytes();
    let end = snapshot.l1_offset.saturating_add(len);
    let wrong = |what: &str| SnapshotError::Io(IoError::EINVAL.with(format!("Snapshot L1 table {what}")));
    if len > MAX_L1_BYTES {
        return Err(wrong("too large"));
    }
    if !snapshot.l1_offset.is_multiple_of(header.cluster_size())
        || end > file.length().next_multiple_of(header.cluster_size())
    {
        return Err(wrong("offset invalid"));
    }
    Ok(to_words(&bytes_at(file, snapshot.l1_offset, len).await?))
}

/// Reads the snapshot table.
pub async fn read(file: &Cx<'_>, header: &Header) -> Result<Table, SnapshotError> {
    if header.snapshots > MAX_SNAPSHOTS {
        return Err(SnapshotError::TooMany);
    }
    let table = read_damaged(file, header).await?;
    match table.excess.first() {
        Some((number, _)) => Err(SnapshotError::Extra(*number)),
        None if table.overhanging > 0 => Err(SnapshotError::TooBig),
        None => Ok(table),
    }
}

/// The same with all that can be made of a damaged table. Of more snapshots than there can be, those count that have an
/// id.
pub(crate) async fn read_damaged(file: &Cx<'_>, header: &Header) -> Result<Table, SnapshotError> {
    let mut table = Table::default();
    let mut at = header.snapshots_offset;
    for number in 0..header.snapshots {
        let fixed = bytes_at(file, at, FIXED).await?;
        let extra_len = word(&fixed, 36);
        let (id_len, name_len) = (word(&fixed, 12) >> 16, word(&fixed, 12) & 0xffff);
        let rest = u64::from(extra_len) + u64::from(id_len) + u64::from(name_len);
        let len = (FIXED + rest).next_multiple_of(8);
        if header.snapshots > MAX_SNAPSHOTS && (id_len == 0 || number >= MAX_SNAPSHOTS) {
            table.overhanging = header.snapshots - number;
            break;
        }
        if extra_len > MAX_EXTRA {
            table.excess.push((number, extra_len));
        }
        if at - header.snapshots_offset + len > MAX_TABLE {
            table.overhanging = header.snapshots - number;
            break;
        }
        // Of too much extra data only that is read which we know.
        let skipped = if extra_len > MAX_EXTRA { u64::from(extra_len) } else { 0 };
        let bytes = bytes_at(file, at + FIXED + skipped, rest - skipped).await?;
        let (extra, names) = match skipped {
            0 => bytes.split_at(usize::try_from(extra_len).unwrap_or(0)),
            _ => (&bytes_at(file, at + FIXED, KNOWN_EXTRA as u64).await?[..], &bytes[..]),
        };
        let (id, name) = names.split_at(usize::try_from(id_len).unwrap_or(0));
        table.snapshots.push(Snapshot {
            l1_offset: quad(&fixed, 0),
            l1_entries: word(&fixed, 8),
            id: String::from_utf8_lossy(until_nul(id)).into_owned(),
            name: String::from_utf8_lossy(until_nul(name)).into_owned(),
            seconds: word(&fixed, 16),
            nanoseconds: word(&fixed, 20),
            clock: quad(&fixed, 24),
            vm_state_size: if extra.len() >= 8 { quad(extra, 0) } else { u64::from(word(&fixed, 32)) },
            disk_size: if extra.len() >= 16 { quad(extra, 8) } else { header.virtual_size() },
            icount: (extra.len() >= 24).then(|| quad(extra, 16)).filter(|count| *count != u64::MAX),
            incomplete: header.version == Version::V3 && extra_len < V3_EXTRA,
            raw: (id.to_vec(), name.to_vec()),
            unknown: extra.get(KNOWN_EXTRA..).unwrap_or_default().to_vec(),
        });
        at += len;
        table.len += if number + 1 == header.snapshots { FIXED + rest } else { len };
    }
    if table.overhanging > 0 || !table.excess.is_empty() {
        // Where a damaged table says it ends may be far behind the file.
        let left = file.length().saturating_sub(header.snapshots_offset);
        table.len = table.len.min(left.next_multiple_of(header.cluster_size()));
    }
    Ok(table)
}

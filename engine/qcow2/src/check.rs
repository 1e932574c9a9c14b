//! Finding out whether an image is consistent, and making it so.
//!
//! Everything in the file that the image refers to is counted, cluster by cluster ([`crate::walk`]); then the counts
//! are compared with the refcounts on disk ([`crate::refblocks`]), and every COPIED flag with the refcount that it
//! speaks of. Findings, their order and their words are those of `qemu-img check`. Tables are read once each, in one
//! piece. Memory is bounded by what the file really holds, not by what its tables claim.
//!
//! Repair writes in an order that a power cut cannot make worse: raised refcounts first, then lowered ones, then flags;
//! or, where the refcount structures themselves are unusable, new ones in unused clusters, to which the header then
//! changes over in one sector ([`crate::rebuild`]).

use std::collections::HashMap;
use std::ops::Range;

use underlay_graph::{ByteRange, Cx, IoError, WriteFlags};
use underlay_sys::Iov;

use crate::bitmaps::BitmapError;
use crate::counts::Counts;
use crate::features;
use crate::header::{Header, HeaderError, MAX_SNAPSHOTS, Purpose};
use crate::refblocks::RefcountBlocks;
use crate::snapshots::{self, SnapshotError};
use crate::update::{write_features, write_header};
use crate::walk::KnownTable;

/// Table entries that are looked at, at most: 8 PiB of 2 KiB clusters, or some minutes.
const BUDGET: u64 = 1 << 32;

/// What to repair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fix {
    /// Nothing.
    #[default]
    None,
    /// Refcounts that are too high, and COPIED flags when nothing else is wrong.
    Leaks,
    /// Everything that can be repaired.
    All,
}

/// Something found, or done about it; for stderr.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// A line (without its newline) printed as it is.
    Line(String),
    /// A line that programs print behind their name: `qemu-img: …`.
    Error(String),
}

/// Takes the findings as they come.
pub type Report<'a> = &'a mut (dyn FnMut(Finding) + Send + Sync);

/// The sums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Errors that are there (still, after a repair).
    pub corruptions: u64,
    /// Leaked clusters that are there (still).
    pub leaks: u64,
    /// Things that could not be checked.
    pub check_errors: u64,
    /// Errors repaired.
    pub corruptions_fixed: u64,
    /// Leaks repaired.
    pub leaks_fixed: u64,
    /// Entries of the snapshot table that are flawed, with [`Fix::All`]: [`crate::complete_snapshots`] is to be called
    /// when nothing else is wrong, and they count as repaired then.
    pub incomplete_snapshots: u64,
    /// Behind the last cluster in use, in bytes.
    pub image_end_offset: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Those that have a place in the file.
    pub allocated_clusters: u64,
    /// Those whose place is not behind that of the one before.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
}

/// Why a check ended early.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
#[allow(missing_docs)]
pub enum CheckError {
    /// Not an image that can be opened.
    #[error("{0}")]
    Header(#[from] HeaderError),
    #[error("{0}")]
    Bitmaps(#[from] BitmapError),
    /// The check was under way: QEMU says "Check failed: " and this.
    #[error("{0}")]
    Failed(IoError),
}

impl From<IoError> for CheckError {
    fn from(error: IoError) -> Self {
        Self::Failed(error)
    }
}

/// Whether the image in `file` is so damaged that it cannot be opened, but can be checked.
pub async fn can_only_be_checked(file: &Cx<'_>) -> bool {
    Header::read(file).await.is_err() && Header::read_for(file, Purpose::Check).await.is_ok()
}

/// Checks the image in `file`, which nobody else may be writing to, and repairs what `fix` says. The outcome is that
/// of this run; after a repair a second run without shows whether all is well.
pub async fn check(file: &Cx<'_>, fix: Fix, report: Report<'_>) -> Result<Outcome, CheckError> {
    let header = Header::read_for(file, Purpose::Check).await?;
    if header.has(features::DATA_FILE) {
        return Err(CheckError::Failed(IoError::ENOTSUP.with("An external data file is not supported yet")));
    }
    let mut checker = Checker::new(file, header, fix, report)?;
    checker.run().await?;
    Ok(checker.outcome)
}

/// A check under way.
pub(crate) struct Checker<'a, 'r> {
    pub file: &'a Cx<'a>,
    pub header: Header,
    pub fix: Fix,
    report: Report<'r>,
    pub outcome: Outcome,
    /// Bytes of the file.
    pub file_len: u64,
    /// Clusters of the file.
    pub clusters: u64,
    /// References found.
    pub counts: Counts,
    /// The refcount structures can only be made anew.
    pub unusable: bool,
    /// Metadata other than L2 tables, sorted: repairs of L2 tables must not touch it, whatever an L1 entry says. Bytes.
    reserved: Vec<Range<u64>>,
    /// L2 tables met so far.
    pub tables: HashMap<u64, KnownTable>,
    /// What is referred to behind the end of the file, in clusters, if that is to be repaired.
    pub behind: Vec<Range<u64>>,
    /// Table entries that may still be looked at.
    budget: u64,
}

impl<'a, 'r> Checker<'a, 'r> {
    fn new(file: &'a Cx<'a>, header: Header, fix: Fix, report: Report<'r>) -> Result<Self, CheckError> {
        let file_len = file.length();
        let clusters = file_len.div_ceil(header.cluster_size());
        let counts = Counts::new(clusters)?;
        let outcome = Outcome {
            total_clusters: header.virtual_size().div_ceil(header.cluster_size()),
            ..Outcome::default()
        };
        Ok(Self {
            file,
            header,
            fix,
            report,
            outcome,
            file_len,
            clusters,
            counts,
            unusable: false,
            reserved: Vec::new(),
            tables: HashMap::new(),
            behind: Vec::new(),
            budget: BUDGET,
        })
    }

    async fn run(&mut self) -> Result<(), CheckError> {
        let read = match self.fix {
            Fix::All => snapshots::read_damaged(self.file, &self.header).await,
            _ => snapshots::read(self.file, &self.header).await,
        };
        let snapshots = match read {
            Ok(table) => table,
            Err(SnapshotError::Io(error)) => return Err(error.into()),
            Err(error) => {
                let text = match error {
                    SnapshotError::TooMany => format!(
                        "ERROR snapshot table too large\n\
                         You can force-remove all {} overhanging snapshots with qemu-img check -r all",
                        self.header.snapshots - MAX_SNAPSHOTS
                    ),
                    error => format!("ERROR failed to read the snapshot table: {error}"),
                };
                (self.report)(Finding::Error(text));
                return Err(IoError::EFBIG.into());
            }
        };
        if self.fix != Fix::None {
            self.reserve(&snapshots).await?;
        }
        self.count_flaws(&snapshots);
        self.count_all(&snapshots).await?;
        let mut blocks = RefcountBlocks::read(self).await?;
        self.compare_and_repair(&mut blocks, &snapshots).await?;
        if self.outcome.check_errors == 0 {
            self.check_copied(&mut blocks).await?;
        }
        if self.fix != Fix::None && self.outcome.check_errors == 0 && self.outcome.corruptions == 0 {
            self.mark_clean().await?;
        }
        Ok(())
    }

    /// Notes where metadata is that must not be taken for an L2 table.
    async fn reserve(&mut self, snapshots: &snapshots::Table) -> Result<(), CheckError> {
        let cluster = self.header.cluster_size();
        let table = self.header.refcount_table_offset;
        let table_len = u64::from(self.header.refcount_table_clusters) * cluster;
        let mut all = vec![(0, cluster), (self.header.l1_offset, self.header.l1_bytes())];
        all.push((self.header.snapshots_offset, snapshots.len));
        all.push((table, table_len));
        all.extend(snapshots.snapshots.iter().map(|s| (s.l1_offset, u64::from(s.l1_entries) * 8)));
        all.extend(self.header.extensions.bitmaps.map(|b| (b.directory.offset, b.directory.len)));
        let entries = self.read(table, table_len).await?;
        all.extend(words(&entries).filter(|entry| *entry != 0).map(|entry| (entry & !511, cluster)));
        self.reserved =
            all.into_iter().filter(|r| r.1 > 0).map(|(at, len)| at..at.saturating_add(len)).collect();
        self.reserved.sort_unstable_by_key(|range| range.start);
        // So that ends are sorted too.
        let mut highest = 0;
        for range in &mut self.reserved {
            highest = highest.max(range.end);
            range.end = highest;
        }
        Ok(())
    }

    /// Whether the cluster at `table` can be written to as an L2 table without damage to anything else.
    pub fn may_repair(&self, table: u64) -> bool {
        let cluster = self.header.cluster_size();
        let before = self.reserved.partition_point(|range| range.start < table.saturating_add(cluster));
        let hit = before.checked_sub(1).is_some_and(|i| self.reserved[i].end > table);
        table.is_multiple_of(cluster) && !hit
    }

    async fn compare_and_repair(
        &mut self,
        blocks: &mut RefcountBlocks,
        snapshots: &snapshots::Table,
    ) -> Result<(), CheckError> {
        let before = self.outcome;
        self.compare(blocks, Fix::None);
        if self.fix == Fix::None {
            return Ok(());
        }
        if self.unusable && self.fix == Fix::Leaks {
            self.say("ERROR need to rebuild refcount structures");
            return Err(IoError::EIO.into());
        }
        if self.unusable {
            self.say("Rebuilding refcount structure");
            *blocks = self.rebuild(snapshots).await?;
            return Ok(());
        }
        if self.outcome.leaks > 0 || self.outcome.corruptions > 0 {
            self.outcome = before;
            self.compare(blocks, self.fix);
            blocks.write_back(self.file, self.header.cluster_size()).await?;
        }
        Ok(())
    }

    /// Makes the refcount structures anew, and counts again: what is still wrong then, is not repaired.
    async fn rebuild(&mut self, snapshots: &snapshots::Table) -> Result<RefcountBlocks, CheckError> {
        let (blocks, freed) = self.rebuild_refcounts().await?;
        let found = self.outcome;
        let Outcome { total_clusters, incomplete_snapshots, .. } = found;
        self.outcome = Outcome { total_clusters, incomplete_snapshots, ..Outcome::default() };
        self.file_len = self.file.length();
        self.clusters = self.file_len.div_ceil(self.header.cluster_size());
        self.counts = Counts::new(self.clusters)?;
        self.reserve(snapshots).await?;
        self.count_all(snapshots).await?;
        for (at, before) in freed {
            let now = self.counts.get(at);
            if now < before {
                self.say(format!("Repairing cluster {at} refcount={before} reference={now}"));
            }
        }
        self.outcome.image_end_offset = self.counts.end() * self.header.cluster_size();
        self.outcome.leaks_fixed = found.leaks_fixed + found.leaks;
        let left = self.outcome.corruptions;
        self.outcome.corruptions_fixed += found.corruptions_fixed + found.corruptions.saturating_sub(left);
        Ok(blocks)
    }

    async fn mark_clean(&mut self) -> Result<(), CheckError> {
        if self.header.drop_stale_bitmaps() {
            self.file.flush().await?;
            write_header(self.file, &self.header).await?;
        }
        if self.header.has(features::DIRTY | features::CORRUPT) {
            self.file.flush().await?;
            self.header.incompatible &= !(features::DIRTY | features::CORRUPT);
            write_features(self.file, &self.header).await?;
        }
        Ok(())
    }

    /// Accounts for looking at table entries. EFBIG when a hostile image has us look at far too many.
    pub fn spend(&mut self, entries: u64) -> Result<(), IoError> {
        self.budget = self
            .budget
            .checked_sub(entries)
            .ok_or_else(|| IoError::EFBIG.with("The image refers to more tables than can be checked"))?;
        Ok(())
    }

    pub fn say(&mut self, line: impl Into<String>) {
        (self.report)(Finding::Line(line.into()));
    }

    /// Says that something is wrong, and counts it.
    pub fn wrong(&mut self, line: impl Into<String>) {
        self.say(line);
        self.outcome.corruptions += 1;
    }

    /// Reads `len` bytes; what is behind the end of the file is zero.
    pub async fn read(&mut self, at: u64, len: u64) -> Result<Vec<u8>, IoError> {
        let range = ByteRange::new(at, len).ok_or(IoError::EIO)?;
        if range.start() >= self.file_len {
            return Ok(vec![0; range.buffer_len()]);
        }
        let into = Iov::scratch(range.buffer_len());
        self.file.read(range, into.clone()).await?;
        Ok(into.to_vec())
    }

    pub async fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), IoError> {
        let range = ByteRange::new(at, bytes.len() as u64).ok_or(IoError::EIO)?;
        self.file.write(range, Iov::copy_of(bytes), WriteFlags::default()).await
    }
}

/// A table's bytes as words.
pub(crate) fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|b| u64::from_be_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
}

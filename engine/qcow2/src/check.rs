//! Finding out whether an image is consistent, and making it so.
//!
//! Everything in the file that the image refers to is counted, cluster by cluster ([`crate::walk`]); then the counts are
//! compared with the refcounts on disk ([`crate::refblocks`]), and every COPIED flag with the refcount that it speaks of.
//! Findings, their order and their words are those of `qemu-img check`. Tables are read once each, in one piece.
//! Memory is bounded by what the file really holds, not by what its tables claim.
//!
//! Repair writes in an order that a power cut cannot make worse: raised refcounts first, then lowered ones, then flags; or,
//! where the refcount structures themselves are unusable, new ones in unused clusters, to which the header then
//! changes over in one sector ([`crate::rebuild`]).

use underlay_graph::{ByteRange, Cx, IoError, WriteFlags};
use underlay_sys::Iov;

use crate::bitmaps::BitmapError;
use crate::counts::Counts;
use crate::features;
use crate::header::{Header, HeaderError};
use crate::refblocks::RefcountBlocks;
use crate::snapshots::SnapshotError;
use crate::update::write_features;

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

/// Checks the image in `file`, which nobody else may be writing to, and repairs what `fix` says. The outcome is that
/// of this run; after a repair a second run without shows whether all is well.
pub async fn check(file: &Cx<'_>, fix: Fix, report: Report<'_>) -> Result<Outcome, CheckError> {
    let header = Header::read(file).await?;
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
    pub rebuild: bool,
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
        Ok(Self { file, header, fix, report, outcome, file_len, clusters, counts, rebuild: false })
    }

    async fn run(&mut self) -> Result<(), CheckError> {
        let snapshots = match crate::snapshots::read(self.file, &self.header).await {
            Ok(table) => table,
            Err(SnapshotError::Io(error)) => return Err(error.into()),
            Err(error) => {
                let text = format!("ERROR failed to read the snapshot table: {error}");
                (self.report)(Finding::Error(text));
                return Err(IoError::EFBIG.into());
            }
        };
        self.count_all(&snapshots).await?;
        let mut blocks = RefcountBlocks::read(self).await?;
        self.compare_and_repair(&mut blocks).await?;
        if self.outcome.check_errors == 0 {
            self.check_copied(&mut blocks).await?;
        }
        if self.fix != Fix::None && self.outcome.check_errors == 0 && self.outcome.corruptions == 0 {
            self.mark_clean().await?;
        }
        Ok(())
    }

    async fn compare_and_repair(&mut self, blocks: &mut RefcountBlocks) -> Result<(), CheckError> {
        let before = self.outcome;
        self.compare(blocks, Fix::None);
        if self.fix == Fix::None {
            return Ok(());
        }
        if self.rebuild && self.fix == Fix::Leaks {
            self.say("ERROR need to rebuild refcount structures");
            return Err(IoError::EIO.into());
        }
        if self.rebuild {
            self.say("Rebuilding refcount structure");
            *blocks = self.rebuild_refcounts().await?;
            self.outcome.leaks_fixed += self.outcome.leaks;
            self.outcome.corruptions_fixed += self.outcome.corruptions;
            (self.outcome.leaks, self.outcome.corruptions, self.outcome.check_errors) = (0, 0, 0);
            // What is wrong with other tables has been counted as repaired here; the second check tells.
            return Ok(());
        }
        if self.outcome.leaks != before.leaks || self.outcome.corruptions != before.corruptions {
            self.outcome = before;
            self.compare(blocks, self.fix);
            blocks.write_back(self.file, self.header.cluster_size()).await?;
        }
        Ok(())
    }

    async fn mark_clean(&mut self) -> Result<(), CheckError> {
        if self.header.has(features::DIRTY | features::CORRUPT) {
            self.file.flush().await?;
            self.header.incompatible &= !(features::DIRTY | features::CORRUPT);
            write_features(self.file, &self.header).await?;
        }
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

//! Long work on disks: streaming a chain into its top, committing it into its base, mirroring it elsewhere, backing it
//! up.
//!
//! A job is one function that reads from top to bottom ([`stream`], [`commit`], [`active`], [`mirror`],
//! [`backup`]); they share the frame
//! ([`job`]: states, verbs, pausing, speed, errors) and the one copy engine ([`copy`]). Jobs know nodes and their
//! wiring, not formats; names and QMP are the caller's.
//!
//! ```text
//!   a command ──► Jobs::stream ──► (Arc<Job>, JobTask)       the caller spawns the task on an I/O thread
//!   a command ──► Job::pause, … ──► flags ◄── checkpoint ── the task, between two chunks
//!                                   events ──► EventSink
//! ```
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod active;
pub mod backup;
pub mod backup_bitmap;
pub mod chain;
pub mod commit;
pub mod commit_now;
pub mod copy;
pub mod create;
pub mod error;
pub mod event;
pub mod filter;
mod follow;
mod group;
pub mod job;
pub mod jobs;
pub mod mirror;
mod mirror_top;
pub mod pace;
pub mod settings;
pub mod status;
pub mod stream;
#[cfg(test)]
mod tests;

pub use backup::{BackupArgs, BackupDraft, BackupSync, BackupTarget};
pub use backup_bitmap::{BackupBitmap, BitmapMode};
pub use commit::CommitArgs;
pub use create::Creation;
pub use error::JobError;
pub use event::{Action, EventSink, JobEvent, Progress};
pub use job::Job;
pub use jobs::{GRACE, JobTask, Jobs, Started};
pub use mirror::{MirrorArgs, SyncMode, Target};
pub use settings::{IoStatus, JobInfo, Kind, OnError, Settings};
pub use status::{Status, Verb};
pub use stream::{StreamArgs, StreamEnd};

use underlay_graph::View;

/// How an image (first) must call another (second) in its header, so that it will be found again.
pub type BackingNames = std::sync::Arc<dyn Fn(&View, &View) -> String + Send + Sync>;

//! What a job is told when it starts, and what the queries tell of it.

use underlay_graph::IoError;

use crate::event::Action;
use crate::status::Status;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// block-stream
    Stream,
    /// block-commit, active or not
    Commit,
    /// blockdev-mirror, drive-mirror
    Mirror,
    /// blockdev-create
    Create,
    /// x-blockdev-amend
    Amend,
    /// blockdev-backup, drive-backup
    Backup,
}

impl Kind {
    /// The name on the wire and in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stream => "stream",
            Self::Commit => "commit",
            Self::Mirror => "mirror",
            Self::Create => "create",
            Self::Amend => "amend",
            Self::Backup => "backup",
        }
    }

    /// Whether the block-job commands, queries and events are for it too: not for one that works on no node of the
    /// graph.
    pub fn is_block_job(self) -> bool {
        !matches!(self, Self::Create | Self::Amend)
    }
}

/// What to do when a request fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// The job fails.
    #[default]
    Report,
    /// The job goes on.
    Ignore,
    /// The job pauses when the disk is full, else it fails. (`auto` means the same.)
    Enospc,
    /// The job pauses.
    Stop,
}

impl OnError {
    /// What that means for an error. (A device does so for its guest as a job does for its work.)
    pub fn action(self, error: &IoError) -> Action {
        match self {
            Self::Report => Action::Report,
            Self::Ignore => Action::Ignore,
            Self::Stop => Action::Stop,
            Self::Enospc if error.is_no_space() => Action::Stop,
            Self::Enospc => Action::Report,
        }
    }
}

/// Whether an error has stopped the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoStatus {
    /// No.
    Ok,
    /// Yes.
    Failed,
    /// Yes: the disk is full.
    NoSpace,
}

impl IoStatus {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::NoSpace => "nospace",
        }
    }
}

/// What every command that starts a job says about it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The id that the client gave.
    pub id: Option<String>,
    /// The id to take when it gave none: the name of the backend. Empty: there is none.
    pub default_id: String,
    /// Bytes per second, 0 for no limit. Negative is refused.
    pub speed: i64,
    /// Go on from pending by itself.
    pub auto_finalize: bool,
    /// Vanish once concluded.
    pub auto_dismiss: bool,
    /// What to do when a request fails.
    pub on_error: OnError,
    /// The same for writes, where a job tells the two apart.
    pub on_target_error: Option<OnError>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            id: None,
            default_id: String::new(),
            speed: 0,
            auto_finalize: true,
            auto_dismiss: true,
            on_error: OnError::Report,
            on_target_error: None,
        }
    }
}

/// What the queries tell of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobInfo {
    /// The id; `device` of query-block-jobs.
    pub id: String,
    /// The kind of job.
    pub kind: Kind,
    /// Its state.
    pub status: Status,
    /// Bytes done.
    pub current: u64,
    /// Bytes to do.
    pub total: u64,
    /// Why it failed, from aborting on.
    pub error: Option<String>,
    /// Requests are under way.
    pub busy: bool,
    /// Held back by a user or by an error.
    pub paused: bool,
    /// In sync.
    pub ready: bool,
    /// Bytes per second, 0 for no limit.
    pub speed: u64,
    /// Whether an error has stopped it.
    pub io_status: IoStatus,
    /// See [`Settings`].
    pub auto_finalize: bool,
    /// See [`Settings`].
    pub auto_dismiss: bool,
    /// Of a mirror: every write of the guest is at the target too before it is acknowledged.
    pub actively_synced: Option<bool>,
}

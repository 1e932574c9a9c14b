//! What jobs tell the world.

use crate::settings::Kind;
use crate::status::Status;

/// Where events go. Called with the job's state locked, so that nobody sees them out of order: an implementation
/// queues the event and returns; it must not call back into the job.
pub trait EventSink: Send + Sync {
    /// Takes an event.
    fn emit(&self, event: JobEvent);
}

/// How far a job is, as the BLOCK_JOB_ events tell it. Bytes, and bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The kind of job.
    pub kind: Kind,
    /// Work in all.
    pub len: u64,
    /// Work done.
    pub offset: u64,
    /// The limit; 0 is none.
    pub speed: u64,
}

/// What happens on an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The job fails.
    Report,
    /// The job goes on.
    Ignore,
    /// The job pauses.
    Stop,
}

impl Action {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
        }
    }
}

/// An event. `id` is the job's id, which the older events call `device`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobEvent {
    /// JOB_STATUS_CHANGE
    StatusChange {
        /// The job.
        id: String,
        /// Its new state.
        status: Status,
    },
    /// BLOCK_JOB_READY
    Ready {
        /// The job.
        id: String,
        /// How far it is.
        progress: Progress,
    },
    /// BLOCK_JOB_PENDING
    Pending {
        /// The job.
        id: String,
        /// The kind of job.
        kind: Kind,
    },
    /// BLOCK_JOB_COMPLETED
    Completed {
        /// The job.
        id: String,
        /// How far it came.
        progress: Progress,
        /// What went wrong.
        error: Option<String>,
    },
    /// BLOCK_JOB_CANCELLED
    Cancelled {
        /// The job.
        id: String,
        /// How far it came.
        progress: Progress,
    },
    /// BLOCK_JOB_ERROR
    Error {
        /// The job.
        id: String,
        /// Whether it was a read; else a write.
        is_read: bool,
        /// What is done about it.
        action: Action,
    },
}

//! Why a command about a job is refused, and why a job stops. The texts are QEMU's; clients match on them.
//! Source: `design/qemu-surface.md` 14 and QEMU 10.0.2's answers.

use underlay_graph::error::{Class, strerror};
use underlay_graph::{GraphError, IoError};

use crate::status::{Status, Verb};

/// Why a command is refused.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum JobError {
    /// The block-job-… commands do not know the id.
    #[error("Block job '{0}' not found")]
    BlockJobNotFound(String),
    /// The job-… commands do not know the id.
    #[error("Job not found")]
    JobNotFound,
    /// Not now.
    #[error("Job '{id}' in state '{status}' cannot accept command verb '{verb}'")]
    WrongState {
        /// The job.
        id: String,
        /// Its state.
        status: Status,
        /// What was asked for.
        verb: Verb,
    },
    /// Paused twice.
    #[error("Job is already paused")]
    AlreadyPaused,
    /// Resumed without a pause.
    #[error("Can't resume a job that was not paused")]
    NotPaused,
    /// A soft cancel of a paused job.
    #[error("The block job for device '{0}' is currently paused")]
    CurrentlyPaused(String),
    /// The id is taken.
    #[error("Job ID '{0}' already in use")]
    IdInUse(String),
    /// The id is not well formed.
    #[error("Invalid job ID '{0}'")]
    InvalidId(String),
    /// Nothing to take the id from.
    #[error("An explicit job ID is required")]
    NoId,
    /// Only a mirror's copy mode can be changed.
    #[error("Job type does not support change")]
    NoChange,
    /// A mirror that blocks writes does not go back; the reference's does not either, and these are its words.
    #[error("Change to copy mode 'background' is not implemented")]
    NoWayBack,
    /// A speed below zero.
    #[error("Parameter 'speed' expects a non-negative value")]
    NegativeSpeed,
    /// The chain is not as the command says. The text is complete.
    #[error("{0}")]
    Chain(String),
    /// The change of the graph that starts the job is refused.
    #[error("{0}")]
    Graph(GraphError),
}

impl JobError {
    /// The class that a QMP client sees.
    pub fn class(&self) -> Class {
        match self {
            Self::BlockJobNotFound(_) => Class::DeviceNotActive, // historical, and clients match on it
            Self::Graph(error) => error.class(),
            _ => Class::Generic,
        }
    }
}

impl From<GraphError> for JobError {
    fn from(error: GraphError) -> Self {
        Self::Graph(error)
    }
}

/// Why a job ends before its work is done.
#[derive(Clone, Debug, PartialEq)]
pub enum Stop {
    /// A client wanted it.
    Cancelled,
    /// This went wrong; the text that clients see.
    Failed(String),
}

impl Stop {
    /// The text of the `error` member.
    pub fn text(&self) -> String {
        match self {
            Self::Cancelled => IoError::ECANCELED.to_string(),
            Self::Failed(text) => text.clone(),
        }
    }
}

impl From<&IoError> for Stop {
    /// A job's error is always the system's text for its number, whatever more is known.
    fn from(error: &IoError) -> Self {
        Self::Failed(strerror(error.errno()))
    }
}

impl From<IoError> for Stop {
    fn from(error: IoError) -> Self {
        Self::from(&error)
    }
}

impl From<GraphError> for Stop {
    fn from(error: GraphError) -> Self {
        match error {
            GraphError::Io(error) => error.into(),
            other => Self::Failed(other.to_string()),
        }
    }
}

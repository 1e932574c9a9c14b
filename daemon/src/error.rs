//! Why a command failed, as its client is told: a class and a sentence.

use std::fmt;

use underlay_drivers::OpenError;
use underlay_graph::{Class, GraphError, IoError};

/// See the module.
#[derive(Clone, Debug)]
pub struct CommandError {
    /// Nearly always generic.
    pub class: Class,
    /// The sentence, in QEMU's words where QEMU has some.
    pub desc: String,
}

/// What a command answers.
pub type CommandResult<T> = Result<T, CommandError>;

impl CommandError {
    /// A generic error.
    pub fn new(desc: impl Into<String>) -> Self {
        Self { class: Class::Generic, desc: desc.into() }
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for CommandError {}

impl From<GraphError> for CommandError {
    fn from(error: GraphError) -> Self {
        Self { class: error.class(), desc: error.to_string() }
    }
}

impl From<OpenError> for CommandError {
    fn from(error: OpenError) -> Self {
        Self { class: error.class(), desc: error.to_string() }
    }
}

impl From<IoError> for CommandError {
    fn from(error: IoError) -> Self {
        Self::new(error.to_string())
    }
}

impl From<underlay_jobs::JobError> for CommandError {
    fn from(error: underlay_jobs::JobError) -> Self {
        Self { class: error.class(), desc: error.to_string() }
    }
}

impl From<underlay_exports::ExportError> for CommandError {
    fn from(error: underlay_exports::ExportError) -> Self {
        Self::new(error.to_string())
    }
}

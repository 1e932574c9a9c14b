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
    /// A second sentence, for people at a command line.
    pub hint: Option<String>,
}

/// What a command answers.
pub type CommandResult<T> = Result<T, CommandError>;

impl CommandError {
    /// A generic error.
    pub fn new(desc: impl Into<String>) -> Self {
        Self { class: Class::Generic, desc: desc.into(), hint: None }
    }

    /// A generic error with a hint behind the first line.
    pub fn told(text: String) -> Self {
        match text.split_once('\n') {
            Some((desc, hint)) => Self { hint: Some(hint.to_owned()), ..Self::new(desc) },
            None => Self::new(text),
        }
    }

    /// What to print at a command line.
    pub fn in_full(&self) -> String {
        match &self.hint {
            Some(hint) => format!("{}\n{hint}", self.desc),
            None => self.desc.clone(),
        }
    }

    fn of(class: Class, error: &impl fmt::Display, cause: Option<&IoError>) -> Self {
        let hint = cause.and_then(IoError::hint).map(str::to_owned);
        Self { class, desc: error.to_string(), hint }
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
        let cause = if let GraphError::Io(cause) = &error { Some(cause) } else { None };
        Self::of(error.class(), &error, cause)
    }
}

impl From<OpenError> for CommandError {
    fn from(error: OpenError) -> Self {
        Self::of(error.class(), &error, error.cause())
    }
}

impl From<IoError> for CommandError {
    fn from(error: IoError) -> Self {
        Self::of(Class::Generic, &error, Some(&error))
    }
}

impl From<underlay_jobs::JobError> for CommandError {
    fn from(error: underlay_jobs::JobError) -> Self {
        Self::of(error.class(), &error, None)
    }
}

impl From<underlay_exports::ExportError> for CommandError {
    fn from(error: underlay_exports::ExportError) -> Self {
        Self::told(error.to_string())
    }
}

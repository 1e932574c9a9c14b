//! Why a node could not be opened.

use underlay_graph::{GraphError, IoError};

/// See the module. The texts are QEMU's.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OpenError {
    /// No such driver.
    #[error("Unknown driver '{0}'")]
    UnknownDriver(String),
    /// The format's driver has no such option.
    #[error("Block format '{driver}' does not support the option '{option}'")]
    UnknownFormatOption {
        /// The driver.
        driver: String,
        /// The option.
        option: String,
    },
    /// The protocol's driver has no such option.
    #[error("Block protocol '{driver}' doesn't support the option '{option}'")]
    UnknownProtocolOption {
        /// The driver.
        driver: String,
        /// The option.
        option: String,
    },
    /// Opening what is below an image failed.
    #[error("Could not open backing file: {0}")]
    Backing(Box<OpenError>),
    /// The driver could not open it.
    #[error("{0}")]
    Io(IoError),
    /// The image cannot be opened.
    #[error("{0}")]
    Qcow2(String),
    /// The graph would not have it.
    #[error("{0}")]
    Graph(#[from] GraphError),
    /// Anything that is said in one place only.
    #[error("{0}")]
    Text(String),
}

impl OpenError {
    /// An error that is said in one place only.
    pub fn text(text: String) -> Self {
        Self::Text(text)
    }

    /// The failed request behind it, if there is one: it may have a hint.
    pub fn cause(&self) -> Option<&IoError> {
        match self {
            Self::Backing(below) => below.cause(),
            Self::Io(error) | Self::Graph(underlay_graph::GraphError::Io(error)) => Some(error),
            _ => None,
        }
    }

    /// The class that a QMP client sees.
    pub fn class(&self) -> underlay_graph::Class {
        match self {
            Self::Graph(error) => error.class(),
            _ => underlay_graph::Class::Generic,
        }
    }
}

impl From<IoError> for OpenError {
    fn from(error: IoError) -> Self {
        Self::Io(error)
    }
}

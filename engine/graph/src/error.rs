//! What can go wrong with a request ([`IoError`]) and with a change of the graph ([`GraphError`]).

use std::fmt;
use std::sync::Arc;

/// The class that a QMP client sees; most errors are generic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// GenericError
    Generic,
    /// DeviceNotFound
    DeviceNotFound,
    /// DeviceNotActive
    DeviceNotActive,
}

/// Why a request failed: an error number as the kernel has them, and perhaps a sentence that says more.
#[derive(Clone, Debug)]
pub struct IoError {
    errno: i32,
    message: Option<Arc<str>>,
    hint: Option<Arc<str>>,
}

/// The result of a request.
pub type Result<T> = std::result::Result<T, IoError>;

impl IoError {
    /// Input/output error.
    pub const EIO: Self = Self::new(5);
    /// No space left on device.
    pub const ENOSPC: Self = Self::new(28);
    /// Invalid argument.
    pub const EINVAL: Self = Self::new(22);
    /// Operation not supported.
    pub const ENOTSUP: Self = Self::new(95);
    /// Operation not permitted.
    pub const EPERM: Self = Self::new(1);
    /// Permission denied.
    pub const EACCES: Self = Self::new(13);
    /// File too large.
    pub const EFBIG: Self = Self::new(27);
    /// Operation canceled.
    pub const ECANCELED: Self = Self::new(125);

    /// An error number without more to say.
    pub const fn new(errno: i32) -> Self {
        Self { errno, message: None, hint: None }
    }

    /// The same error with a sentence that replaces the system's own text.
    pub fn with(self, message: impl Into<String>) -> Self {
        Self { errno: self.errno, message: Some(message.into().into()), hint: self.hint }
    }

    /// The same error with a sentence, and a second one that tools print on a line of its own.
    pub fn with_hint(self, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into().into()), ..self.with(message) }
    }

    /// The error number's own text only, for where the reference says no more.
    pub fn plain(&self) -> Self {
        Self::new(self.errno)
    }

    /// What tools print below the message.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The same error with `context: ` in front of its text.
    pub fn context(self, context: impl fmt::Display) -> Self {
        let message = format!("{context}: {self}");
        self.with(message)
    }

    /// The error number, positive.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// Whether the disk was full.
    pub fn is_no_space(&self) -> bool {
        self.errno == Self::ENOSPC.errno
    }
}

impl PartialEq for IoError {
    fn eq(&self, other: &Self) -> bool {
        self.errno == other.errno
    }
}

impl From<std::io::Error> for IoError {
    fn from(error: std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno) => Self::new(errno),
            None => Self::EIO.with(error.to_string()),
        }
    }
}

/// The system's text for an error number, as `strerror` gives it.
pub fn strerror(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    match text.rfind(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.message {
            Some(message) => f.write_str(message),
            None => f.write_str(&strerror(self.errno)),
        }
    }
}

impl std::error::Error for IoError {}

/// Why the wiring cannot be changed so. The texts are QEMU's; clients match on them.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum GraphError {
    /// The request that was part of the change failed.
    #[error("{0}")]
    Io(IoError),
    /// No node has this name.
    #[error("Failed to find node with node-name='{0}'")]
    NodeNotFound(String),
    /// Neither a device nor a node has this name.
    #[error("Cannot find device='{0}' nor node-name='{0}'")]
    NeitherDeviceNorNode(String),
    /// The name is taken.
    #[error("Duplicate nodes with node-name='{0}'")]
    DuplicateName(String),
    /// Not a name.
    #[error("Invalid node-name: '{0}'")]
    InvalidName(String),
    /// A name of more than 31 characters.
    #[error("Node name too long")]
    NameTooLong,
    /// Something else refers to the node.
    #[error("Node {0} is in use")]
    InUse(String),
    /// The node was not made by blockdev-add.
    #[error("Node {0} is not owned by the monitor")]
    NotMonitorOwned(String),
    /// A job works on the node.
    #[error("Node '{node}' is busy: block device is in use by block job: {job}")]
    Busy {
        /// The node.
        node: String,
        /// The kind of job.
        job: &'static str,
    },
    /// A job relies on this backing link.
    #[error("Cannot change frozen 'backing' link from '{from}' to '{to}'")]
    Frozen {
        /// The overlay.
        from: String,
        /// Its backing node.
        to: String,
    },
    /// The wiring would have a loop.
    #[error("Making '{to}' a {role} child of '{from}' would create a cycle")]
    Cycle {
        /// The parent.
        from: String,
        /// The child.
        to: String,
        /// The kind of edge.
        role: &'static str,
    },
    /// A user wants to write to a read-only node.
    #[error("Block node is read-only")]
    ReadOnly,
    /// Two users of a node do not get on.
    #[error("{0}")]
    Conflict(Box<Conflict>),
    /// Anything that is said in one place only.
    #[error("{text}")]
    Other {
        /// The class that a QMP client sees.
        class: Class,
        /// The sentence.
        text: String,
    },
}

/// Two users of a node that do not get on.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
#[error(
    "Permission conflict on node '{node}': permissions '{perms}' are both required by {by} (uses node '{node}' as \
     '{by_role}' child) and unshared by {against} (uses node '{node}' as '{against_role}' child)."
)]
pub struct Conflict {
    /// The node.
    pub node: String,
    /// Names of the permissions, in a list.
    pub perms: String,
    /// The user that needs them.
    pub by: String,
    /// As what it uses the node.
    pub by_role: String,
    /// The user that does not let others have them.
    pub against: String,
    /// As what that uses the node.
    pub against_role: String,
}

impl GraphError {
    /// A generic error with a text of its own.
    pub fn new(text: impl Into<String>) -> Self {
        Self::Other { class: Class::Generic, text: text.into() }
    }

    /// What tools print below the message.
    pub fn hint(&self) -> Option<&str> {
        if let Self::Io(error) = self { error.hint() } else { None }
    }

    /// The class that a QMP client sees.
    pub fn class(&self) -> Class {
        match self {
            Self::Other { class, .. } => *class,
            _ => Class::Generic,
        }
    }
}

impl From<IoError> for GraphError {
    fn from(error: IoError) -> Self {
        Self::Io(error)
    }
}

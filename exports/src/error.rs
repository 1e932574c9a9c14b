//! What can go wrong with exports. The texts are QEMU's; clients match on them.

/// Why an export cannot be made, changed or served.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// A second server.
    #[error("NBD server already running")]
    AlreadyRunning,
    /// No server.
    #[error("NBD server not running")]
    NotRunning,
    /// The export id is taken.
    #[error("Block export id '{0}' is already in use")]
    IdInUse(String),
    /// The NBD name is taken.
    #[error("NBD server already has export named '{0}'")]
    NameInUse(String),
    /// Longer than [`underlay_nbd::MAX_NAME`].
    #[error("export name '{0}' too long")]
    NameTooLong(String),
    /// Longer than [`underlay_nbd::MAX_NAME`].
    #[error("description '{0}' too long")]
    DescriptionTooLong(String),
    /// A writable export of a read-only node.
    #[error("Cannot export read-only node as writable")]
    ReadOnlyNode,
    /// No such export.
    #[error("Export '{0}' is not found")]
    NotFound(String),
    /// It is going already.
    #[error("Export '{0}' is already shutting down")]
    ShuttingDown(String),
    /// A client is connected and the removal was a safe one.
    #[error("export '{0}' still in use")]
    StillInUse(String),
    /// The address cannot be listened on.
    #[error("Failed to listen on {address}: {error}")]
    Listen {
        /// The address, as a person writes it.
        address: String,
        /// The system's reason.
        error: std::io::Error,
    },
    /// The server was given no thread to run on.
    #[error("no I/O thread for the NBD server")]
    NoThread,
}

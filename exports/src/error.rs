//! What can go wrong with exports. The texts are QEMU's; clients match on them.

/// Why an export cannot be made, changed or served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// The NBD name is taken.
    #[error("NBD server already has export named '{0}'")]
    NameInUse(String),
    /// More than 4096 bytes.
    #[error("export name '{0}' too long")]
    NameTooLong(String),
    /// More than 4096 bytes.
    #[error("description '{0}' too long")]
    DescriptionTooLong(String),
    /// No such export.
    #[error("Export '{0}' is not found")]
    NotFound(String),
    /// It is being removed.
    #[error("Export '{0}' is already shutting down")]
    ShuttingDown(String),
    /// A client is connected. (QEMU adds the hint: Use mode='hard' to force client disconnect)
    #[error("export '{0}' still in use")]
    StillInUse(String),
    /// The address cannot be listened on.
    #[error("{0}")]
    Listen(String),
    /// The server was given no thread to run on.
    #[error("no I/O thread for the NBD server")]
    NoThread,
}

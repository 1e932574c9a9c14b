//! Everything that can be a node except qcow2, and how to open any of them.
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod beside;
pub mod create;
pub mod error;
pub mod filename;
pub mod filter;
pub mod format;
pub mod info;
pub mod names;
pub mod open;
pub mod options;
pub mod probe;
pub mod protocol;
pub mod reopen;
pub mod socket_address;
pub mod throttle;

pub use error::OpenError;
pub use open::{BackingPolicy, FindNode, Opener};
pub use options::NodeSpec;

//! Ways in for programs outside: disks of the graph, served over a protocol.
//!
//! An export owns a [`underlay_graph::Root`] that its owner made for it, and lives until its last client is gone.
#![forbid(unsafe_code)]

pub mod error;
pub mod nbd;

pub use error::ExportError;
pub use nbd::{Gone, NbdExport, NbdServer, ServerOptions};

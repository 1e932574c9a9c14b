//! How guests and tools reach a disk: each kind of export takes a [`underlay_graph::Root`] and serves it.
//!
//! No export knows the control protocol; errors carry the texts that QEMU's clients match on.
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod error;
pub mod guest;
pub mod listen;
pub mod nbd;

pub use error::ExportError;
pub use guest::{Guest, Operation, Took, Verdict};
pub use nbd::{ExportState, Gone, NamedBits, NbdExport, NbdServer, ServerOptions, Shown, ShownBitmaps};

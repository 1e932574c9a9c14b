//! What a disk is made of: nodes, the wiring between them, and the gates through which requests enter.
//!
//! A [`Node`] is one layer of a disk. The [`Plan`] is the editable wiring, owned by the [`Graph`]. A [`View`] is
//! the wiring as requests see it: immutable, reached through a [`Root`]'s gate, walked with a [`Cx`]. This crate
//! knows no driver: nodes come from outside.
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod align;
pub mod bitmap;
pub mod bitmaps;
mod bits;
mod chain;
pub mod error;
pub mod format;
mod gates;
pub mod graph;
pub mod info;
mod marks;
mod moment;
mod node;
pub mod perm;
pub mod plan;
pub mod range_lock;
pub mod reflink;
pub mod resize;
pub mod root;
mod snapshot;
pub mod status;
pub mod threshold;
pub mod units;
pub mod view;
pub mod walk;

#[cfg(test)]
mod tests;

pub use error::{Class, GraphError, IoError, Result};
pub use format::{Extent, Format, Place};
pub use graph::{Draft, Graph};
pub use info::{FormatInfo, InfoValue};
pub use node::{BackingRef, Discard, Kind, Limits, Node, Preallocation, WriteFlags, ZeroFlags};
pub use perm::{Access, Perms};
pub use plan::{NewNode, NodeId, NodeOptions, Plan, RootId, Wiring};
pub use root::Root;
pub use units::{ByteRange, NodeName};
pub use view::{Cx, Role, View};

//! The qcow2 image format.
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod ahead;
mod amend;
mod bitmap_writer;
pub mod bitmaps;
pub mod cache;
pub mod check;
mod cleaner;
pub mod commit;
pub mod compress;
mod copied;
mod counts;
pub mod cow;
mod crash_safe;
pub mod create;
pub mod empty;
pub mod entry;
pub mod extensions;
pub mod features;
pub mod frees;
pub mod header;
pub mod info;
mod layout;
pub mod live;
pub mod mapping;
pub mod measure;
pub mod metadata;
pub mod node;
pub mod packed;
pub mod populate;
mod rebuild;
mod refblocks;
pub mod refcount;
mod reserve;
pub mod resize;
mod shadow;
pub mod snapshot_changes;
pub mod snapshots;
mod stored;
#[cfg(test)]
mod tests;
pub mod update;
mod walk;
pub mod words;
pub mod zero;

pub use ahead::{hash, tie_place};
pub use check::{CheckError, Finding, Fix, Outcome, can_only_be_checked, check};
pub use create::{CreateError, CreateOptions, create};
pub use header::{Compression, Crypt, Header, HeaderError, Version};
pub use live::{CheckedOptions, Corruption, OnCorrupt, OnRepair, OpenError, OpenOptions, Qcow2};
pub use snapshot_changes::complete_snapshots;
pub use stored::check_new_bitmap;

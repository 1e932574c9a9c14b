//! The qcow2 image format.
#![forbid(unsafe_code)]

pub mod extensions;
pub mod features;
pub mod header;
pub mod update;

pub use header::{Compression, Crypt, Header, HeaderError, Version};

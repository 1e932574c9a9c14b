//! The storage daemon: the one place that knows everyone.
#![forbid(unsafe_code)]

mod args;
mod chardev;
mod command;
mod error;
mod event;
mod monitor;
mod state;
pub mod storage_daemon;

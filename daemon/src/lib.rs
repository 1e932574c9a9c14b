//! The storage daemon and the machine: the one place that knows everyone.
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod args;
mod chardev;
mod command;
mod device;
mod error;
mod event;
mod hmp;
mod life;
pub mod machine;
mod monitor;
mod number;
mod state;
pub mod storage_daemon;

//! The kernel's side of Underlay, and the only crate with `unsafe`.
//!
//! Everything above asks for memory ([`buf`]), time and tasks ([`rt`]), files ([`mod@file`]) and sockets ([`net`]) here
//! and nowhere else, so that the same code runs on a real machine and in the simulated world.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod address;
mod background;
pub mod buf;
pub mod buffers;
pub mod clock;
mod device;
mod driver;
mod exec;
pub mod file;
mod hints;
pub mod net;
pub mod pipe;
mod pool;
pub mod process;
pub mod pty;
mod reflink;
mod ring;
pub mod rt;
pub mod signal;
pub mod spoken;
pub mod stat;
pub mod stdio;
pub mod thread;
pub mod witness;

pub use buf::Iov;

#[cfg(test)]
mod tests;

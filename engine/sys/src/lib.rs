//! The kernel's side of Underlay, and the only crate with `unsafe`.
//!
//! Everything above asks for memory ([`buf`]), time and tasks ([`rt`]), files and sockets here and nowhere
//! else, so that the same code runs on a real machine and in the simulated world.

pub mod buf;
pub mod rt;

pub use buf::Iov;

//! QMP without sockets: JSON, the options that look like it, commands, events and sessions. ([`blocking`] is a small
//! client with a socket, for tools and tests.)
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod blocking;
pub mod client;
pub mod codec;
pub mod json;
pub mod keyval;
pub mod option_list;
pub mod schema;
pub mod session;

//! QMP without sockets: JSON, the options that look like it, commands, events and sessions.
#![forbid(unsafe_code)]

pub mod codec;
pub mod json;
pub mod keyval;
pub mod schema;
pub mod session;

//! The NBD server: QEMU's behaviour, one I/O thread per connection, many requests per system call.
//!
//! [`server`] owns the exports and the connections and accepts new ones; [`connection`] is the life of one
//! client: handshake, then a reader that starts requests as fast as they arrive; [`requests`] is what each
//! command does; [`outbox`] collects replies so that one `writev` carries many of them, and bounds what a
//! client can have under way.

mod connection;
mod export;
mod outbox;
mod requests;
mod server;

pub use export::{Gone, NbdExport};
pub use server::{NbdServer, ServerOptions};

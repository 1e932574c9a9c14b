//! The NBD protocol, both halves, without sockets: bytes in, events and bytes out.
//!
//! A connection starts with the [`handshake`], in which both sides agree on an export and on what they
//! understand ([`options`]). Then comes the [`transmission`]: requests one way, replies the other way, in any
//! order. [`status`] is the answer to a block status request. [`blocking`] is the client half with a socket, for
//! tools and tests.
//!
//! Source of all numbers: the public specification, `doc/proto.md` of the NetworkBlockDevice project.
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod blocking;
pub mod errno;
pub mod flags;
pub mod handshake;
pub mod options;
pub mod status;
pub mod transmission;

pub use errno::Errno;
pub use handshake::client::{ClientHandshake, Negotiated, Wish};
pub use handshake::server::{Agreed, ServerHandshake, Step};
pub use options::{ExportInfo, MetaContext};
pub use status::{Descriptor, Extents};
pub use transmission::{Chunk, Framing, Reply, Request};

/// The largest payload of a read or write that both halves handle, in bytes. QEMU has the same.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// The longest export name, description and meta context name, in bytes.
pub const MAX_NAME: usize = 4096;

/// The other side does not keep to the protocol; nothing more can be said on this connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ProtocolError(pub String);

impl ProtocolError {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

//! Requests and replies after the handshake, in the three shapes that they can have.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::errno::Errno;
use crate::flags::{CMD_PAYLOAD_LEN, REPLY_DONE};
use crate::{MAX_PAYLOAD, ProtocolError};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Commands.
pub mod command {
    /// Read `length` bytes.
    pub const READ: u16 = 0;
    /// Write the payload.
    pub const WRITE: u16 = 1;
    /// Goodbye, after everything under way.
    pub const DISCONNECT: u16 = 2;
    /// Make replied writes durable.
    pub const FLUSH: u16 = 3;
    /// Not needed any more.
    pub const TRIM: u16 = 4;
    /// Will be read soon.
    pub const CACHE: u16 = 5;
    /// Make the range read as zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Ask for the negotiated meta contexts.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Kinds of chunks.
pub mod chunk {
    /// Nothing but flags.
    pub const NONE: u16 = 0;
    /// Offset and bytes.
    pub const OFFSET_DATA: u16 = 1;
    /// Offset and length of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Context and descriptors of 32 bits.
    pub const BLOCK_STATUS: u16 = 5;
    /// Context and descriptors of 64 bits.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Kinds with this bit are errors.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// Error and sentence.
    pub const ERROR: u16 = ERROR_BIT + 1;
    /// Error, sentence and offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
}

/// Which headers were negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// Simple replies only.
    #[default]
    Simple,
    /// Reads are answered in chunks.
    Structured,
    /// Requests and replies have 64-bit lengths.
    Extended,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRequest {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    length: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawExtendedRequest {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    length: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSimpleReply {
    magic: U32,
    error: U32,
    cookie: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawStructuredReply {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    length: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawExtendedReply {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    offset: U64,
    length: U64,
}

/// One request, without its payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// CMD_…
    pub flags: u16,
    /// See [`command`].
    pub command: u16,
    /// The client's name for it; comes back in the reply.
    pub cookie: u64,
    /// Bytes.
    pub offset: u64,
    /// Bytes; of the range, or of the payload with [`CMD_PAYLOAD_LEN`].
    pub length: u64,
}

impl Request {
    /// How many bytes a header has.
    pub fn header_len(framing: Framing) -> usize {
        if framing == Framing::Extended { 32 } else { 28 }
    }

    /// Reads the header at the start of `bytes`; `None` when it is not complete.
    pub fn parse(framing: Framing, bytes: &[u8]) -> Result<Option<Self>, ProtocolError> {
        let (magic, wanted, request) = if framing == Framing::Extended {
            let Ok((raw, _)) = RawExtendedRequest::ref_from_prefix(bytes) else { return Ok(None) };
            let request = Self {
                flags: raw.flags.get(),
                command: raw.command.get(),
                cookie: raw.cookie.get(),
                offset: raw.offset.get(),
                length: raw.length.get(),
            };
            (raw.magic.get(), EXTENDED_REQUEST_MAGIC, request)
        } else {
            let Ok((raw, _)) = RawRequest::ref_from_prefix(bytes) else { return Ok(None) };
            let request = Self {
                flags: raw.flags.get(),
                command: raw.command.get(),
                cookie: raw.cookie.get(),
                offset: raw.offset.get(),
                length: raw.length.get().into(),
            };
            (raw.magic.get(), REQUEST_MAGIC, request)
        };
        if magic != wanted {
            return Err(ProtocolError::new(format!(
                "invalid magic (got 0x{magic:x}, expected 0x{wanted:x})"
            )));
        }
        Ok(Some(request))
    }

    /// Bytes of payload behind the header. QEMU's client (10.0) leaves out the flag of a write's payload with
    /// extended headers, too (observed); a write without a payload has no meaning anyway.
    pub fn payload_len(&self, framing: Framing) -> u64 {
        let flagged = framing == Framing::Extended && self.flags & CMD_PAYLOAD_LEN != 0;
        if flagged || self.command == command::WRITE { self.length } else { 0 }
    }

    /// Adds the header to `out`. EOVERFLOW as an error when the length needs extended headers.
    pub fn encode(&self, framing: Framing, out: &mut Vec<u8>) -> Result<(), ProtocolError> {
        let Self { flags, command, cookie, offset, length } = *self;
        if framing == Framing::Extended {
            let magic = EXTENDED_REQUEST_MAGIC.into();
            let raw = RawExtendedRequest {
                magic,
                flags: flags.into(),
                command: command.into(),
                cookie: cookie.into(),
                offset: offset.into(),
                length: length.into(),
            };
            out.extend(raw.as_bytes());
            return Ok(());
        }
        let length =
            u32::try_from(length).map_err(|_| ProtocolError::new("length needs extended headers"))?;
        let raw = RawRequest {
            magic: REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: cookie.into(),
            offset: offset.into(),
            length: length.into(),
        };
        out.extend(raw.as_bytes());
        Ok(())
    }
}

/// The 16 bytes of a simple reply.
pub fn simple_reply(error: Errno, cookie: u64) -> [u8; 16] {
    let raw =
        RawSimpleReply { magic: SIMPLE_REPLY_MAGIC.into(), error: error.0.into(), cookie: cookie.into() };
    zerocopy::transmute!(raw)
}

/// The header of one chunk of a structured or extended reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Whether it is the last one.
    pub done: bool,
    /// See [`chunk`].
    pub kind: u16,
    /// From the request.
    pub cookie: u64,
    /// The request's offset; only on the wire with extended headers.
    pub offset: u64,
    /// Bytes of payload that follow.
    pub length: u64,
}

impl Chunk {
    /// Adds the header to `out`.
    pub fn encode(&self, framing: Framing, out: &mut Vec<u8>) {
        let flags = if self.done { REPLY_DONE } else { 0 };
        if framing == Framing::Extended {
            let raw = RawExtendedReply {
                magic: EXTENDED_REPLY_MAGIC.into(),
                flags: flags.into(),
                kind: self.kind.into(),
                cookie: self.cookie.into(),
                offset: self.offset.into(),
                length: self.length.into(),
            };
            out.extend(raw.as_bytes());
        } else {
            let length = u32::try_from(self.length).expect("our own chunks are shorter than 4 GiB");
            let raw = RawStructuredReply {
                magic: STRUCTURED_REPLY_MAGIC.into(),
                flags: flags.into(),
                kind: self.kind.into(),
                cookie: self.cookie.into(),
                length: length.into(),
            };
            out.extend(raw.as_bytes());
        }
    }
}

/// Writes the chunks of one reply.
#[derive(Clone, Copy, Debug)]
pub struct Chunks {
    /// Structured or extended.
    pub framing: Framing,
    /// From the request.
    pub cookie: u64,
    /// From the request.
    pub offset: u64,
}

impl Chunks {
    fn header(&self, done: bool, kind: u16, length: u64, out: &mut Vec<u8>) {
        Chunk { done, kind, cookie: self.cookie, offset: self.offset, length }.encode(self.framing, out);
    }

    /// Success without more to say.
    pub fn none(&self, out: &mut Vec<u8>) {
        self.header(true, chunk::NONE, 0, out);
    }

    /// The head of a data chunk; `len` bytes read from `at` must follow.
    pub fn data(&self, done: bool, at: u64, len: u32, out: &mut Vec<u8>) {
        self.header(done, chunk::OFFSET_DATA, 8 + u64::from(len), out);
        out.extend(at.to_be_bytes());
    }

    /// `len` zeroes at `at`.
    pub fn hole(&self, done: bool, at: u64, len: u32, out: &mut Vec<u8>) {
        self.header(done, chunk::OFFSET_HOLE, 12, out);
        out.extend(at.to_be_bytes());
        out.extend(len.to_be_bytes());
    }

    /// Failure; ends the reply.
    pub fn error(&self, error: Errno, text: &str, out: &mut Vec<u8>) {
        let text = clip(text);
        self.header(true, chunk::ERROR, 6 + u64::from(text.1), out);
        out.extend(error.0.to_be_bytes());
        out.extend(text.1.to_be_bytes());
        out.extend(text.0.as_bytes());
    }

    /// The descriptors of one context.
    pub fn status(&self, done: bool, context: u32, list: &[crate::Descriptor], out: &mut Vec<u8>) {
        let count = u64::try_from(list.len()).unwrap_or(u64::MAX);
        if self.framing == Framing::Extended {
            self.header(done, chunk::BLOCK_STATUS_EXT, 8 + 16 * count, out);
            out.extend(context.to_be_bytes());
            out.extend(u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes());
            for descriptor in list {
                out.extend(descriptor.length.to_be_bytes());
                out.extend(u64::from(descriptor.flags).to_be_bytes());
            }
        } else {
            self.header(done, chunk::BLOCK_STATUS, 4 + 8 * count, out);
            out.extend(context.to_be_bytes());
            for descriptor in list {
                // `Extents` was told the framing's limit.
                out.extend(u32::try_from(descriptor.length).unwrap_or(u32::MAX).to_be_bytes());
                out.extend(descriptor.flags.to_be_bytes());
            }
        }
    }
}

/// The start of `text` that fits an error message, and its length.
fn clip(text: &str) -> (&str, u16) {
    let mut end = text.len().min(crate::MAX_NAME);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    (&text[..end], u16::try_from(end).unwrap_or(0))
}

/// The head of a reply, as the client receives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The whole reply, but for the data of a successful read.
    Simple {
        /// What went wrong.
        error: Errno,
        /// From the request.
        cookie: u64,
    },
    /// A chunk; its payload follows.
    Chunk(Chunk),
}

impl Reply {
    /// Reads the head at the start of `bytes`, and says how many bytes it had; `None` when it is not complete.
    pub fn parse(framing: Framing, bytes: &[u8]) -> Result<Option<(Self, usize)>, ProtocolError> {
        let Ok((magic, _)) = U32::read_from_prefix(bytes) else { return Ok(None) };
        match (magic.get(), framing) {
            (SIMPLE_REPLY_MAGIC, Framing::Simple | Framing::Structured) => {
                let Ok((raw, _)) = RawSimpleReply::ref_from_prefix(bytes) else { return Ok(None) };
                let reply = Self::Simple { error: Errno(raw.error.get()), cookie: raw.cookie.get() };
                Ok(Some((reply, 16)))
            }
            (STRUCTURED_REPLY_MAGIC, Framing::Structured) => {
                let Ok((raw, _)) = RawStructuredReply::ref_from_prefix(bytes) else { return Ok(None) };
                let chunk = Chunk {
                    done: raw.flags.get() & REPLY_DONE != 0,
                    kind: raw.kind.get(),
                    cookie: raw.cookie.get(),
                    offset: 0,
                    length: raw.length.get().into(),
                };
                chunk.bounded().map(|chunk| Some((Self::Chunk(chunk), 20)))
            }
            (EXTENDED_REPLY_MAGIC, Framing::Extended) => {
                let Ok((raw, _)) = RawExtendedReply::ref_from_prefix(bytes) else { return Ok(None) };
                let chunk = Chunk {
                    done: raw.flags.get() & REPLY_DONE != 0,
                    kind: raw.kind.get(),
                    cookie: raw.cookie.get(),
                    offset: raw.offset.get(),
                    length: raw.length.get(),
                };
                chunk.bounded().map(|chunk| Some((Self::Chunk(chunk), 32)))
            }
            (magic, _) => Err(ProtocolError::new(format!("invalid reply magic 0x{magic:x}"))),
        }
    }
}

impl Chunk {
    /// No honest chunk is longer than a read of the largest size with its offset.
    fn bounded(self) -> Result<Self, ProtocolError> {
        if self.length > u64::from(MAX_PAYLOAD) + 8 {
            return Err(ProtocolError::new(format!("a chunk of {} bytes", self.length)));
        }
        Ok(self)
    }
}

/// The payload of a chunk, as the client receives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload<'a> {
    /// Nothing.
    None,
    /// Bytes at an offset.
    Data(u64, &'a [u8]),
    /// Zeroes at an offset, and how many.
    Hole(u64, u32),
    /// The descriptors of one context.
    Status(u32, Vec<crate::Descriptor>),
    /// An error and a sentence.
    Error(Errno, String),
}

impl<'a> Payload<'a> {
    /// Reads the payload of a chunk of this kind.
    pub fn parse(kind: u16, bytes: &'a [u8]) -> Result<Self, ProtocolError> {
        Self::read(kind, bytes)
            .ok_or_else(|| ProtocolError::new(format!("malformed chunk of kind 0x{kind:x}")))
    }

    fn read(kind: u16, bytes: &'a [u8]) -> Option<Self> {
        match kind {
            chunk::NONE => bytes.is_empty().then_some(Self::None),
            chunk::OFFSET_DATA => {
                let (at, data) = U64::read_from_prefix(bytes).ok()?;
                (!data.is_empty()).then_some(Self::Data(at.get(), data))
            }
            chunk::OFFSET_HOLE => {
                let (at, rest) = U64::read_from_prefix(bytes).ok()?;
                let len = U32::read_from_bytes(rest).ok()?;
                Some(Self::Hole(at.get(), len.get()))
            }
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => crate::status::parse(kind, bytes),
            kind if kind & chunk::ERROR_BIT != 0 => {
                let (error, rest) = U32::read_from_prefix(bytes).ok()?;
                let (len, rest) = U16::read_from_prefix(rest).ok()?;
                let text = rest.get(..usize::from(len.get()))?;
                // An error without a number is still an error.
                let error = if error.get() == 0 { Errno::EINVAL } else { Errno(error.get()) };
                Some(Self::Error(error, String::from_utf8_lossy(text).into_owned()))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Descriptor;

    #[test]
    fn requests_survive_a_round_trip() {
        for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
            let request =
                Request { flags: 1, command: command::WRITE, cookie: 77, offset: 1 << 40, length: 4096 };
            let mut bytes = Vec::new();
            request.encode(framing, &mut bytes).unwrap();
            assert_eq!(bytes.len(), Request::header_len(framing));
            assert_eq!(Request::parse(framing, &bytes), Ok(Some(request)));
            assert_eq!(Request::parse(framing, &bytes[1..][..20.min(bytes.len() - 1)]), Ok(None));
            bytes[0] ^= 1;
            assert!(Request::parse(framing, &bytes).is_err());
        }
    }

    #[test]
    fn long_requests_need_extended_headers() {
        let request = Request { length: 1 << 33, ..Request::default() };
        assert!(request.encode(Framing::Structured, &mut Vec::new()).is_err());
        assert!(request.encode(Framing::Extended, &mut Vec::new()).is_ok());
    }

    #[test]
    fn chunks_survive_a_round_trip() {
        for framing in [Framing::Structured, Framing::Extended] {
            let chunks = Chunks { framing, cookie: 5, offset: 512 };
            let list = [Descriptor { length: 512, flags: 3 }, Descriptor { length: 1024, flags: 0 }];
            let mut out = Vec::new();
            chunks.hole(false, 512, 7, &mut out);
            chunks.error(Errno::EIO, "out of luck", &mut out);
            chunks.status(true, 9, &list, &mut out);
            let mut rest = &out[..];
            let mut seen = Vec::new();
            while let Some((Reply::Chunk(chunk), used)) = Reply::parse(framing, rest).unwrap() {
                let len = usize::try_from(chunk.length).unwrap();
                seen.push(Payload::parse(chunk.kind, &rest[used..used + len]).unwrap());
                assert_eq!(chunk.cookie, 5);
                rest = &rest[used + len..];
            }
            let wanted = [
                Payload::Hole(512, 7),
                Payload::Error(Errno::EIO, "out of luck".into()),
                Payload::Status(9, list.to_vec()),
            ];
            assert_eq!(seen, wanted);
        }
    }

    #[test]
    fn a_write_has_a_payload_whatever_its_flags() {
        let write = |flags| Request { command: command::WRITE, flags, length: 9, ..Request::default() };
        for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
            assert_eq!(write(0).payload_len(framing), 9);
            assert_eq!(write(CMD_PAYLOAD_LEN).payload_len(framing), 9);
        }
        let status = Request { command: command::BLOCK_STATUS, flags: CMD_PAYLOAD_LEN, ..write(0) };
        assert_eq!(Request { flags: CMD_PAYLOAD_LEN, ..status }.payload_len(Framing::Extended), 9);
        assert_eq!(Request { flags: 0, ..status }.payload_len(Framing::Extended), 0);
    }

    #[test]
    fn random_bytes_do_no_harm() {
        let mut state = 88_172_645_463_325_252_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_be_bytes()[0]
        };
        for _ in 0..20_000 {
            let len = random() % 48;
            let bytes: Vec<u8> = (0..len).map(|_| if random() % 2 == 0 { 0 } else { random() }).collect();
            for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
                let _ = Request::parse(framing, &bytes);
                for magic in [SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, EXTENDED_REPLY_MAGIC] {
                    let _ = Reply::parse(framing, &[&magic.to_be_bytes()[..], &bytes].concat());
                }
            }
            for kind in [0, 1, 2, 5, 6, 7, 0x8000, 0x8001, 0x8002] {
                let _ = Payload::parse(kind, &bytes);
            }
        }
    }

    #[test]
    fn an_endless_chunk_is_refused() {
        let mut out = Vec::new();
        Chunk { done: true, kind: 1, cookie: 0, offset: 0, length: 1 << 31 }
            .encode(Framing::Structured, &mut out);
        assert!(Reply::parse(Framing::Structured, &out).is_err());
    }
}

//! Options: the words of the handshake, and the payloads that they and their answers carry.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::MAX_NAME;

/// First eight bytes of a server: "NBDMAGIC".
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes, and the start of every option: "IHAVEOPT".
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Start of every answer to an option.
pub const ANSWER_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Choose an export and begin, the old way: no error can be told.
pub const EXPORT_NAME: u32 = 1;
/// Goodbye.
pub const ABORT: u32 = 2;
/// Names of the exports.
pub const LIST: u32 = 3;
/// Go on with TLS.
pub const STARTTLS: u32 = 5;
/// What GO would say.
pub const INFO: u32 = 6;
/// Choose an export and begin.
pub const GO: u32 = 7;
/// Replies in chunks from now on.
pub const STRUCTURED_REPLY: u32 = 8;
/// Which meta contexts are there.
pub const LIST_META_CONTEXT: u32 = 9;
/// Which meta contexts will be asked for.
pub const SET_META_CONTEXT: u32 = 10;
/// 64-bit lengths from now on.
pub const EXTENDED_HEADERS: u32 = 11;

/// Answer: done.
pub const REP_ACK: u32 = 1;
/// Answer: one export.
pub const REP_SERVER: u32 = 2;
/// Answer: one piece of information on an export.
pub const REP_INFO: u32 = 3;
/// Answer: one meta context.
pub const REP_META_CONTEXT: u32 = 4;
/// Answers from here on are errors; their payload is a sentence.
pub const REP_ERROR: u32 = 1 << 31;
/// The option is not known.
pub const REP_ERR_UNSUP: u32 = REP_ERROR + 1;
/// The server's owner does not want it.
pub const REP_ERR_POLICY: u32 = REP_ERROR + 2;
/// Not well-formed, or not now.
pub const REP_ERR_INVALID: u32 = REP_ERROR + 3;
/// Not on this machine.
pub const REP_ERR_PLATFORM: u32 = REP_ERROR + 4;
/// Only with TLS.
pub const REP_ERR_TLS_REQD: u32 = REP_ERROR + 5;
/// No such export.
pub const REP_ERR_UNKNOWN: u32 = REP_ERROR + 6;
/// The server is about to go.
pub const REP_ERR_SHUTDOWN: u32 = REP_ERROR + 7;
/// Only for clients that asked for block sizes.
pub const REP_ERR_BLOCK_SIZE_REQD: u32 = REP_ERROR + 8;
/// Too much data.
pub const REP_ERR_TOO_BIG: u32 = REP_ERROR + 9;
/// Only with extended headers.
pub const REP_ERR_EXT_HEADER_REQD: u32 = REP_ERROR + 10;

/// Information: size and transmission flags.
pub const INFO_EXPORT: u16 = 0;
/// Information: the name that the server uses.
pub const INFO_NAME: u16 = 1;
/// Information: a text for people.
pub const INFO_DESCRIPTION: u16 = 2;
/// Information: minimum, preferred and maximum block size.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// The name of an option, for messages.
pub fn option_name(option: u32) -> &'static str {
    match option {
        EXPORT_NAME => "export name",
        ABORT => "abort",
        LIST => "list",
        STARTTLS => "starttls",
        INFO => "info",
        GO => "go",
        STRUCTURED_REPLY => "structured reply",
        LIST_META_CONTEXT => "list meta context",
        SET_META_CONTEXT => "set meta context",
        EXTENDED_HEADERS => "extended headers",
        _ => "<unknown>",
    }
}

/// The server's first words.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Greeting {
    /// [`GREETING_MAGIC`]
    pub magic: U64,
    /// [`OPTION_MAGIC`]
    pub option_magic: U64,
    /// Handshake flags.
    pub flags: U16,
}

/// In front of every option's payload.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// [`OPTION_MAGIC`]
    pub magic: U64,
    /// Which option.
    pub option: U32,
    /// Bytes of payload.
    pub length: U32,
}

/// In front of every answer's payload.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct AnswerHeader {
    /// [`ANSWER_MAGIC`]
    pub magic: U64,
    /// The option that is answered.
    pub option: U32,
    /// REP_…
    pub kind: U32,
    /// Bytes of payload.
    pub length: U32,
}

/// Payload of an INFO_EXPORT answer, and the answer to EXPORT_NAME.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SizeAndFlags {
    /// Bytes.
    pub size: U64,
    /// Transmission flags.
    pub flags: U16,
}

/// Payload of an INFO_BLOCK_SIZE answer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BlockSizes {
    /// Requests are multiples of this.
    pub minimum: U32,
    /// Requests are fast at multiples of this.
    pub preferred: U32,
    /// No payload is larger.
    pub maximum: U32,
}

/// What a server tells about an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its name.
    pub name: String,
    /// A text for people; empty for none.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// Transmission flags, apart from those that depend on what was negotiated (DF, BLOCK_STAT_PAYLOAD).
    pub flags: u16,
    /// Requests must be multiples of this, if the client has been told so.
    pub minimum_block: u32,
    /// Requests are fast at multiples of this.
    pub preferred_block: u32,
    /// No payload is larger.
    pub maximum_block: u32,
    /// The meta contexts that can be asked for; the position is the context's id.
    pub contexts: Vec<String>,
}

/// A meta context as it was negotiated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContext {
    /// How block status replies call it.
    pub id: u32,
    /// `base:allocation`, …
    pub name: String,
}

/// Takes pieces off the front of a payload; nothing when they are not there.
#[derive(Debug)]
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (now, later) = self.0.split_at_checked(len)?;
        self.0 = later;
        Some(now)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        Some(U16::read_from_bytes(self.bytes(2)?).ok()?.get())
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        Some(U32::read_from_bytes(self.bytes(4)?).ok()?.get())
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        Some(U64::read_from_bytes(self.bytes(8)?).ok()?.get())
    }

    /// The name of an export.
    pub(crate) fn name(&mut self) -> Result<String, BadPayload> {
        let len = self.u32().ok_or(BadPayload::Short)?;
        let wanted = usize::try_from(len).ok().filter(|&len| len <= MAX_NAME);
        let len = wanted.ok_or_else(|| BadPayload::Text(format!("Invalid name length: {len}")))?;
        let bytes = self.bytes(len).ok_or(BadPayload::Short)?;
        // A name that is no text is nobody's name; it is answered like any other unknown one.
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    /// A length and as many bytes.
    pub(crate) fn counted(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok()?;
        self.bytes(len)
    }
}

/// Why a payload cannot be read, in the words of QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadPayload {
    /// A length inside points past the end.
    Short,
    /// Bytes are left over.
    Long,
    /// Something else, in a sentence.
    Text(String),
}

impl BadPayload {
    /// The sentence for the client.
    pub fn text(&self, option: u32) -> String {
        match self {
            Self::Short => format!("Inconsistent lengths in option {}", option_name(option)),
            Self::Long => format!("option '{}' has unexpected length", option_name(option)),
            Self::Text(text) => text.clone(),
        }
    }
}

/// Payload of INFO and GO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest {
    /// The export.
    pub name: String,
    /// What to tell about it.
    pub wants: Vec<u16>,
}

impl InfoRequest {
    /// Reads a payload.
    pub fn parse(payload: &[u8]) -> Result<Self, BadPayload> {
        let mut reader = Reader(payload);
        let name = reader.name()?;
        let count = reader.u16().ok_or(BadPayload::Short)?;
        let mut wants = Vec::new();
        for _ in 0..count {
            wants.push(reader.u16().ok_or(BadPayload::Short)?);
        }
        if reader.0.is_empty() { Ok(Self { name, wants }) } else { Err(BadPayload::Long) }
    }

    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_counted(&mut out, self.name.as_bytes());
        out.extend(u16::try_from(self.wants.len()).unwrap_or(u16::MAX).to_be_bytes());
        for want in self.wants.iter().take(usize::from(u16::MAX)) {
            out.extend(want.to_be_bytes());
        }
        out
    }
}

/// Payload of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaRequest {
    /// The export.
    pub name: String,
    /// Names of contexts, or beginnings of them when listing. None of them: everything, when listing.
    pub queries: Vec<String>,
}

impl MetaRequest {
    /// Reads a payload. Queries that are no text or longer than any name match nothing and become empty.
    pub fn parse(payload: &[u8]) -> Result<Self, BadPayload> {
        let mut reader = Reader(payload);
        let name = reader.name()?;
        let count = reader.u32().ok_or(BadPayload::Short)?;
        let mut queries = Vec::new();
        for _ in 0..count {
            let query = reader.counted().ok_or(BadPayload::Short)?;
            let query = if query.len() > MAX_NAME { &[] } else { query };
            queries.push(std::str::from_utf8(query).unwrap_or("").to_owned());
        }
        if reader.0.is_empty() { Ok(Self { name, queries }) } else { Err(BadPayload::Long) }
    }

    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_counted(&mut out, self.name.as_bytes());
        out.extend(u32::try_from(self.queries.len()).unwrap_or(u32::MAX).to_be_bytes());
        for query in &self.queries {
            put_counted(&mut out, query.as_bytes());
        }
        out
    }
}

fn put_counted(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(bytes);
}

/// Whether `query` chooses the context `name`. When listing, `base:` and `qemu:` (and `qemu:dirty-bitmap:`) stand
/// for all that begin so.
pub fn query_matches(query: &str, name: &str, listing: bool) -> bool {
    query == name || (listing && query.ends_with(':') && name.starts_with(query))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_survive_a_round_trip() {
        let info = InfoRequest { name: "disk".into(), wants: vec![INFO_NAME, INFO_BLOCK_SIZE] };
        assert_eq!(InfoRequest::parse(&info.encode()), Ok(info));
        let meta =
            MetaRequest { name: String::new(), queries: vec!["base:allocation".into(), "qemu:".into()] };
        assert_eq!(MetaRequest::parse(&meta.encode()), Ok(meta));
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        assert!(InfoRequest::parse(&[0xff; 40]).is_err());
        assert!(InfoRequest::parse(&[0, 0, 0, 1, b'a', 0, 1]).is_err());
        assert!(InfoRequest::parse(&[0, 0, 0, 1, b'a', 0, 0, 9]).is_err());
        assert!(MetaRequest::parse(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]).is_err());
    }

    #[test]
    fn only_listing_matches_beginnings() {
        assert!(query_matches("base:", "base:allocation", true));
        assert!(!query_matches("base:", "base:allocation", false));
        assert!(!query_matches("base", "base:allocation", true));
        assert!(query_matches("base:allocation", "base:allocation", false));
    }
}

//! The client's half of the handshake.
//!
//! It asks for the best headers that were wished for, then for the meta contexts, then for the export; servers
//! that know less are taken as they are, down to EXPORT_NAME.

use zerocopy::{FromBytes, IntoBytes};

use super::MAX_KEPT;
use crate::flags::{HANDSHAKE_FIXED_NEWSTYLE, HANDSHAKE_NO_ZEROES, HAS_FLAGS};
use crate::options::{self as opt, InfoRequest, MetaContext, MetaRequest};
use crate::transmission::Framing;
use crate::{MAX_PAYLOAD, ProtocolError};

/// What the client would like.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// The export's name.
    pub export: String,
    /// The best headers to ask for.
    pub framing: Framing,
    /// Meta contexts, in full. Those that the server does not have are left out of the result.
    pub contexts: Vec<String>,
    /// Only list the exports.
    pub list: bool,
}

/// What the server granted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// Bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    /// Text for people.
    pub description: String,
    /// Requests must be multiples of this.
    pub minimum_block: u32,
    /// Requests are fast at multiples of this.
    pub preferred_block: u32,
    /// No payload may be larger.
    pub maximum_block: u32,
    /// Headers.
    pub framing: Framing,
    /// Meta contexts.
    pub contexts: Vec<MetaContext>,
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Send the output, then feed more.
    NeedBytes,
    /// Requests may be sent (after the output, if there is any).
    Done(Negotiated),
    /// The exports, as names and descriptions.
    Listed(Vec<(String, String)>),
    /// The server does not want this; its sentence.
    Refused(String),
    /// It is no NBD server, or a broken one.
    Fail(ProtocolError),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Greeting,
    /// Waits for answers to this option.
    Asked(u32),
    /// Waits for the answer to EXPORT_NAME.
    OldWay,
    Over(Progress),
}

/// See the module.
#[derive(Debug)]
pub struct ClientHandshake {
    wish: Wish,
    input: Vec<u8>,
    output: Vec<u8>,
    state: State,
    no_zeroes: bool,
    granted: Negotiated,
    listed: Vec<(String, String)>,
}

type Parsed<T> = Result<T, ProtocolError>;

/// Takes an answer to `option` from the front of `input`: its kind and its payload; `None` when it has not come
/// as a whole.
pub(super) fn take_answer(input: &mut Vec<u8>, option: u32) -> Parsed<Option<(u32, Vec<u8>)>> {
    let Ok((header, rest)) = opt::AnswerHeader::read_from_prefix(input) else { return Ok(None) };
    if header.magic.get() != opt::ANSWER_MAGIC {
        return Err(ProtocolError::new("Unexpected option reply magic"));
    }
    if header.option.get() != option {
        return Err(ProtocolError::new(format!("Unexpected option type {}", header.option.get())));
    }
    let length = usize::try_from(header.length.get()).unwrap_or(usize::MAX);
    if length > MAX_KEPT {
        return Err(ProtocolError::new(format!("option reply is too long: {length}")));
    }
    let Some(payload) = rest.get(..length) else { return Ok(None) };
    let (kind, payload) = (header.kind.get(), payload.to_vec());
    input.drain(..size_of::<opt::AnswerHeader>() + length);
    Ok(Some((kind, payload)))
}

/// An option as it goes over the wire.
pub(super) fn encode_option(option: u32, payload: &[u8], output: &mut Vec<u8>) {
    let header = opt::OptionHeader {
        magic: opt::OPTION_MAGIC.into(),
        option: option.into(),
        length: u32::try_from(payload.len()).unwrap_or(u32::MAX).into(),
    };
    output.extend(header.as_bytes());
    output.extend(payload);
}

impl ClientHandshake {
    /// A new connection.
    pub fn new(wish: Wish) -> Self {
        let granted = Negotiated {
            minimum_block: 1,
            preferred_block: 4096,
            maximum_block: MAX_PAYLOAD,
            ..Negotiated::default()
        };
        Self {
            wish,
            input: Vec::new(),
            output: Vec::new(),
            state: State::Greeting,
            no_zeroes: false,
            granted,
            listed: Vec::new(),
        }
    }

    /// Adds received bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.extend(bytes);
    }

    /// Takes what is to be sent.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Bytes that came after the handshake.
    pub fn into_rest(self) -> Vec<u8> {
        self.input
    }

    /// Works on what has been fed.
    pub fn step(&mut self) -> Progress {
        loop {
            let went_on = match self.state.clone() {
                State::Over(progress) => return progress,
                State::Greeting => self.greeting(),
                State::Asked(option) => self.answer(option),
                State::OldWay => self.old_way(),
            };
            match went_on {
                Ok(true) => {}
                Ok(false) => return Progress::NeedBytes,
                Err(error) => self.state = State::Over(Progress::Fail(error)),
            }
        }
    }

    fn greeting(&mut self) -> Parsed<bool> {
        let Ok((greeting, _)) = opt::Greeting::read_from_prefix(&self.input) else { return Ok(false) };
        self.input.drain(..size_of::<opt::Greeting>());
        if greeting.magic.get() != opt::GREETING_MAGIC || greeting.option_magic.get() != opt::OPTION_MAGIC {
            return Err(ProtocolError::new("Bad initial magic received"));
        }
        let flags = greeting.flags.get() & (HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES);
        self.no_zeroes = flags & HANDSHAKE_NO_ZEROES != 0;
        self.output.extend(u32::from(flags).to_be_bytes());
        if flags & HANDSHAKE_FIXED_NEWSTYLE == 0 {
            self.ask_the_old_way();
        } else if self.wish.list {
            self.ask(opt::LIST, &[]);
        } else {
            match self.wish.framing {
                Framing::Simple => self.ask_export(),
                Framing::Structured => self.ask(opt::STRUCTURED_REPLY, &[]),
                Framing::Extended => self.ask(opt::EXTENDED_HEADERS, &[]),
            }
        }
        Ok(true)
    }

    fn ask(&mut self, option: u32, payload: &[u8]) {
        encode_option(option, payload, &mut self.output);
        self.state = State::Asked(option);
    }

    fn ask_export(&mut self) {
        if self.granted.framing != Framing::Simple
            && !self.wish.contexts.is_empty()
            && self.state != State::Asked(opt::SET_META_CONTEXT)
        {
            let queries = self.wish.contexts.clone();
            let request = MetaRequest { name: self.wish.export.clone(), queries };
            return self.ask(opt::SET_META_CONTEXT, &request.encode());
        }
        let request = InfoRequest { name: self.wish.export.clone(), wants: vec![opt::INFO_BLOCK_SIZE] };
        self.ask(opt::GO, &request.encode());
    }

    fn ask_the_old_way(&mut self) {
        let name = self.wish.export.clone();
        self.ask(opt::EXPORT_NAME, name.as_bytes());
        self.state = State::OldWay;
    }

    fn answer(&mut self, option: u32) -> Parsed<bool> {
        let Some((kind, payload)) = take_answer(&mut self.input, option)? else { return Ok(false) };
        if kind >= opt::REP_ERROR {
            self.refused(option, kind, &payload);
            return Ok(true);
        }
        let understood = match (option, kind) {
            (_, opt::REP_ACK) => {
                self.acknowledged(option);
                Some(())
            }
            (opt::LIST, opt::REP_SERVER) => self.one_export(&payload),
            (opt::SET_META_CONTEXT, opt::REP_META_CONTEXT) => self.one_context(&payload),
            (opt::GO, opt::REP_INFO) => self.one_info(&payload),
            _ => None,
        };
        understood.ok_or_else(|| {
            ProtocolError::new(format!("unexpected reply 0x{kind:x} to option {}", opt::option_name(option)))
        })?;
        Ok(true)
    }

    fn acknowledged(&mut self, option: u32) {
        match option {
            opt::LIST => self.state = State::Over(Progress::Listed(std::mem::take(&mut self.listed))),
            opt::EXTENDED_HEADERS => {
                self.granted.framing = Framing::Extended;
                self.ask_export();
            }
            opt::STRUCTURED_REPLY => {
                self.granted.framing = Framing::Structured;
                self.ask_export();
            }
            opt::GO => self.state = State::Over(Progress::Done(self.granted.clone())),
            _ => self.ask_export(),
        }
    }

    fn refused(&mut self, option: u32, kind: u32, payload: &[u8]) {
        match (option, kind) {
            (opt::EXTENDED_HEADERS, _) => self.ask(opt::STRUCTURED_REPLY, &[]),
            (opt::STRUCTURED_REPLY, _) => self.ask_export(),
            (opt::SET_META_CONTEXT, opt::REP_ERR_UNSUP) => self.ask_export(),
            (opt::GO, opt::REP_ERR_UNSUP) => self.ask_the_old_way(),
            _ => {
                let mut text = String::from_utf8_lossy(payload).into_owned();
                if text.is_empty() {
                    text = format!("error 0x{kind:x} for option {}", opt::option_name(option));
                }
                self.state = State::Over(Progress::Refused(text));
            }
        }
    }

    fn one_export(&mut self, payload: &[u8]) -> Option<()> {
        let mut reader = opt::Reader(payload);
        let name = String::from_utf8_lossy(reader.counted()?).into_owned();
        // A server that never stops listing is not listened to for ever.
        if self.listed.len() < 1 << 16 {
            self.listed.push((name, String::from_utf8_lossy(reader.0).into_owned()));
        }
        Some(())
    }

    fn one_context(&mut self, payload: &[u8]) -> Option<()> {
        let mut reader = opt::Reader(payload);
        let id = reader.u32()?;
        let name = std::str::from_utf8(reader.0).ok()?.to_owned();
        let wanted =
            self.wish.contexts.contains(&name) && self.granted.contexts.iter().all(|c| c.name != name);
        wanted.then(|| self.granted.contexts.push(MetaContext { id, name }))
    }

    fn one_info(&mut self, payload: &[u8]) -> Option<()> {
        let mut reader = opt::Reader(payload);
        match reader.u16()? {
            opt::INFO_EXPORT => {
                let head = opt::SizeAndFlags::read_from_bytes(reader.0).ok()?;
                (self.granted.size, self.granted.flags) = (head.size.get(), head.flags.get());
            }
            opt::INFO_DESCRIPTION => {
                self.granted.description = String::from_utf8_lossy(reader.0).into_owned()
            }
            opt::INFO_BLOCK_SIZE => {
                let sizes = opt::BlockSizes::read_from_bytes(reader.0).ok()?;
                let minimum = sizes.minimum.get();
                if !minimum.is_power_of_two() || minimum > 1 << 16 || sizes.maximum.get() < minimum {
                    return None;
                }
                self.granted.minimum_block = minimum;
                self.granted.preferred_block = sizes.preferred.get().max(minimum);
                self.granted.maximum_block = sizes.maximum.get().min(MAX_PAYLOAD);
            }
            _ => {}
        }
        Some(())
    }

    fn old_way(&mut self) -> Parsed<bool> {
        let Ok((head, rest)) = opt::SizeAndFlags::read_from_prefix(&self.input) else { return Ok(false) };
        let padding = if self.no_zeroes { 0 } else { 124 };
        if rest.len() < padding {
            return Ok(false);
        }
        self.input.drain(..size_of::<opt::SizeAndFlags>() + padding);
        // No other flags than that one may be zeroes.
        (self.granted.size, self.granted.flags) = (head.size.get(), head.flags.get() | HAS_FLAGS);
        self.state = State::Over(Progress::Done(self.granted.clone()));
        Ok(true)
    }
}

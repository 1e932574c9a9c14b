//! The client's half of a handshake that only looks: which exports are there, and what the server tells about each.
//!
//! It asks for the best headers first, because servers tell more to those who have them; then for the list, then for
//! each export, and says goodbye.

use zerocopy::FromBytes;

use super::client::{encode_option, take_answer};
use crate::flags::{HANDSHAKE_FIXED_NEWSTYLE, HANDSHAKE_NO_ZEROES};
use crate::options::{self as opt, InfoRequest, MetaRequest, Reader};
use crate::{Framing, ProtocolError};

/// Bytes of answers that are taken: a server that never stops is not listened to for ever.
const MOST: usize = 16 << 20;

/// Second eight bytes of a server that has one export and no options ("oldstyle").
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;

/// What a server tells about an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// A text for people.
    pub description: String,
    /// Bytes and transmission flags.
    pub size_and_flags: Option<(u64, u16)>,
    /// Minimum, preferred and maximum size of requests, in bytes.
    pub blocks: Option<(u32, u32, u32)>,
    /// Meta contexts.
    pub contexts: Vec<String>,
}

/// Everything that was learnt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Catalogue {
    /// The exports, in the server's order.
    pub exports: Vec<Listed>,
    /// The headers that the server would use.
    pub framing: Framing,
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Send the output, then feed more.
    NeedBytes,
    /// All is known. Send the output, a goodbye, before closing.
    Done(Catalogue),
    /// The server does not want this. A sentence, and a hint.
    Refused(String, Option<&'static str>),
    /// It is no NBD server, or a broken one.
    Fail(ProtocolError),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Greeting,
    /// Waits for answers to this option, which is about the export of this number.
    Asked(u32, usize),
    Over,
}

/// See the module.
#[derive(Debug)]
pub struct ListHandshake {
    input: Vec<u8>,
    output: Vec<u8>,
    state: State,
    end: Progress,
    found: Catalogue,
    /// Bytes of answers so far.
    taken: usize,
}

impl Default for ListHandshake {
    fn default() -> Self {
        Self {
            input: Vec::new(),
            output: Vec::new(),
            state: State::Greeting,
            end: Progress::NeedBytes,
            found: Catalogue::default(),
            taken: 0,
        }
    }
}

type Parsed<T> = Result<T, ProtocolError>;

impl ListHandshake {
    /// Adds received bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.extend(bytes);
    }

    /// Takes what is to be sent.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Whether the server has not even greeted.
    pub fn is_at_greeting(&self) -> bool {
        self.state == State::Greeting
    }

    /// Works on what has been fed.
    pub fn step(&mut self) -> Progress {
        loop {
            let went_on = match self.state {
                State::Over => return self.end.clone(),
                State::Greeting => self.greeting(),
                State::Asked(option, export) => self.answer(option, export),
            };
            match went_on {
                Ok(true) => {}
                Ok(false) => return Progress::NeedBytes,
                Err(error) => self.finish(Progress::Fail(error)),
            }
        }
    }

    fn finish(&mut self, end: Progress) {
        (self.state, self.end) = (State::Over, end);
    }

    fn ask(&mut self, option: u32, export: usize, payload: &[u8]) {
        encode_option(option, payload, &mut self.output);
        self.state = State::Asked(option, export);
    }

    fn greeting(&mut self) -> Parsed<bool> {
        let Ok((greeting, rest)) = opt::Greeting::read_from_prefix(&self.input) else { return Ok(false) };
        if greeting.magic.get() != opt::GREETING_MAGIC {
            return Err(ProtocolError::new("Bad initial magic received"));
        }
        if greeting.option_magic.get() == OLDSTYLE_MAGIC {
            return self.oldstyle();
        }
        if greeting.option_magic.get() != opt::OPTION_MAGIC {
            return Err(ProtocolError::new("Bad server magic received"));
        }
        let rest = rest.len();
        self.input.drain(..self.input.len() - rest);
        let flags = greeting.flags.get() & (HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES);
        if flags & HANDSHAKE_FIXED_NEWSTYLE == 0 {
            self.finish(Progress::Refused("Server does not support export lists".to_owned(), None));
            return Ok(true);
        }
        self.output.extend(u32::from(flags).to_be_bytes());
        self.ask(opt::EXTENDED_HEADERS, 0, &[]);
        Ok(true)
    }

    /// One export without a name: its size, two words of flags, and nothing to ask for.
    fn oldstyle(&mut self) -> Parsed<bool> {
        let mut reader = Reader(&self.input);
        let words = (reader.u64(), reader.u64(), reader.u64(), reader.u16(), reader.u16());
        let (Some(_), Some(_), Some(size), Some(_), Some(flags)) = words else { return Ok(false) };
        let export = Listed { size_and_flags: Some((size, flags)), ..Listed::default() };
        self.found.exports.push(export);
        let found = std::mem::take(&mut self.found);
        self.finish(Progress::Done(found));
        Ok(true)
    }

    fn answer(&mut self, option: u32, export: usize) -> Parsed<bool> {
        let Some((kind, payload)) = take_answer(&mut self.input, option)? else { return Ok(false) };
        // A head counts too: empty answers are no way to go on for ever.
        self.taken += size_of::<opt::AnswerHeader>() + payload.len();
        if self.taken > MOST {
            return Err(ProtocolError::new("the server's list does not end"));
        }
        if kind >= opt::REP_ERROR {
            self.refused(option, kind, export, &payload);
            return Ok(true);
        }
        let understood = match (option, kind) {
            (_, opt::REP_ACK) => {
                self.acknowledged(option, export);
                Some(())
            }
            (opt::LIST, opt::REP_SERVER) => self.one_export(&payload),
            (opt::INFO, opt::REP_INFO) => self.one_info(export, &payload),
            (opt::LIST_META_CONTEXT, opt::REP_META_CONTEXT) => self.one_context(export, &payload),
            _ => None,
        };
        understood.ok_or_else(|| {
            ProtocolError::new(format!("unexpected reply 0x{kind:x} to option {}", opt::option_name(option)))
        })?;
        Ok(true)
    }

    fn acknowledged(&mut self, option: u32, export: usize) {
        match option {
            opt::EXTENDED_HEADERS => self.found.framing = Framing::Extended,
            opt::STRUCTURED_REPLY => self.found.framing = Framing::Structured,
            _ => {}
        }
        self.next(option, export);
    }

    /// What an answered or refused option is followed by.
    fn next(&mut self, option: u32, export: usize) {
        match option {
            opt::EXTENDED_HEADERS | opt::STRUCTURED_REPLY => self.ask(opt::LIST, 0, &[]),
            opt::LIST => self.about(0),
            opt::INFO if self.found.framing != Framing::Simple => {
                let name = self.found.exports[export].name.clone();
                let request = MetaRequest { name, queries: Vec::new() };
                self.ask(opt::LIST_META_CONTEXT, export, &request.encode());
            }
            _ => self.about(export + 1),
        }
    }

    /// Asks about an export, or ends behind the last one.
    fn about(&mut self, export: usize) {
        let Some(listed) = self.found.exports.get(export) else {
            encode_option(opt::ABORT, &[], &mut self.output);
            let found = std::mem::take(&mut self.found);
            return self.finish(Progress::Done(found));
        };
        let wants = vec![opt::INFO_NAME, opt::INFO_DESCRIPTION, opt::INFO_BLOCK_SIZE];
        let request = InfoRequest { name: listed.name.clone(), wants };
        self.ask(opt::INFO, export, &request.encode());
    }

    fn refused(&mut self, option: u32, kind: u32, export: usize, payload: &[u8]) {
        match (option, kind) {
            (_, opt::REP_ERR_TLS_REQD)
                if option != opt::EXTENDED_HEADERS && option != opt::STRUCTURED_REPLY =>
            {
                let name = opt::option_name(option);
                let text = format!("TLS negotiation required before option {option} ({name})");
                self.finish(Progress::Refused(text, Some("Did you forget a valid tls-creds?")));
            }
            (opt::EXTENDED_HEADERS, _) => self.ask(opt::STRUCTURED_REPLY, 0, &[]),
            // A server may have exports and not tell about them.
            (opt::STRUCTURED_REPLY | opt::INFO | opt::LIST_META_CONTEXT, _) => self.next(option, export),
            _ => {
                let mut text = String::from_utf8_lossy(payload).into_owned();
                if text.is_empty() {
                    text = format!("error 0x{kind:x} for option {}", opt::option_name(option));
                }
                self.finish(Progress::Refused(text, None));
            }
        }
    }

    fn one_export(&mut self, payload: &[u8]) -> Option<()> {
        let mut reader = Reader(payload);
        let name = String::from_utf8_lossy(reader.counted()?).into_owned();
        let description = String::from_utf8_lossy(reader.0).into_owned();
        self.found.exports.push(Listed { name, description, ..Listed::default() });
        Some(())
    }

    fn one_info(&mut self, export: usize, payload: &[u8]) -> Option<()> {
        let mut reader = Reader(payload);
        let listed = self.found.exports.get_mut(export)?;
        match reader.u16()? {
            opt::INFO_EXPORT => listed.size_and_flags = Some((reader.u64()?, reader.u16()?)),
            opt::INFO_DESCRIPTION => listed.description = String::from_utf8_lossy(reader.0).into_owned(),
            opt::INFO_BLOCK_SIZE => listed.blocks = Some((reader.u32()?, reader.u32()?, reader.u32()?)),
            _ => {}
        }
        Some(())
    }

    fn one_context(&mut self, export: usize, payload: &[u8]) -> Option<()> {
        let mut reader = Reader(payload);
        reader.u32()?;
        let name = String::from_utf8_lossy(reader.0).into_owned();
        self.found.exports.get_mut(export)?.contexts.push(name);
        Some(())
    }
}

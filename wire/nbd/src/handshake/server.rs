//! The server's half of the handshake.
//!
//! Feed it what arrives, call [`ServerHandshake::step`] until it needs more, send what
//! [`ServerHandshake::take_output`] gives. It knows no exports: it asks. The sentences of its errors are QEMU's.

use zerocopy::{FromBytes, IntoBytes};

use super::{MAX_KEPT, MAX_SKIPPED};
use crate::flags::{BLOCK_STAT_PAYLOAD, HANDSHAKE_FIXED_NEWSTYLE, HANDSHAKE_NO_ZEROES, SEND_DF};
use crate::options::{
    self as opt, AnswerHeader, BadPayload, ExportInfo, Greeting, InfoRequest, MetaContext, MetaRequest,
};
use crate::transmission::Framing;
use crate::{MAX_NAME, ProtocolError};

/// What a client and this server agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The export.
    pub name: String,
    /// Headers.
    pub framing: Framing,
    /// The contexts that block status requests are about.
    pub contexts: Vec<MetaContext>,
    /// The client was told the block sizes because it asked for them, and keeps to them.
    pub knows_block_sizes: bool,
}

/// A question to the owner of the exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Which exports are there? [`ServerHandshake::answer_list`]
    List,
    /// What about this one? [`ServerHandshake::answer_export`]
    Export(String),
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send the output, then feed more.
    NeedBytes,
    /// Answer, then step on.
    Ask(Ask),
    /// Send the output, then go over to transmission with [`ServerHandshake::into_rest`].
    Done(Agreed),
    /// Send the output, then close: the client said goodbye.
    Abort,
    /// Close.
    Fail(ProtocolError),
}

/// The option that waits for an answer to [`Ask`].
#[derive(Debug)]
enum Pending {
    List,
    ExportName(String),
    Info { option: u32, request: InfoRequest },
    Meta { option: u32, request: MetaRequest },
}

#[derive(Debug, PartialEq, Eq, Clone)]
enum State {
    ClientFlags,
    Options,
    /// Skips the payload of an option that is too long.
    Skip {
        left: usize,
        option: u32,
    },
    Over(Step),
}

/// See the module.
#[derive(Debug)]
pub struct ServerHandshake {
    input: Vec<u8>,
    output: Vec<u8>,
    state: State,
    pending: Option<Pending>,
    no_zeroes: bool,
    framing: Framing,
    /// Contexts chosen, and for which export.
    contexts: (String, Vec<MetaContext>),
}

impl Default for ServerHandshake {
    fn default() -> Self {
        Self::new()
    }
}

impl ServerHandshake {
    /// A new connection; the greeting is in the output.
    pub fn new() -> Self {
        let greeting = Greeting {
            magic: opt::GREETING_MAGIC.into(),
            option_magic: opt::OPTION_MAGIC.into(),
            flags: (HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES).into(),
        };
        Self {
            input: Vec::new(),
            output: greeting.as_bytes().to_vec(),
            state: State::ClientFlags,
            pending: None,
            no_zeroes: false,
            framing: Framing::Simple,
            contexts: (String::new(), Vec::new()),
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

    /// Bytes that came after the handshake: the first requests.
    pub fn into_rest(self) -> Vec<u8> {
        self.input
    }

    /// Works on what has been fed.
    pub fn step(&mut self) -> Step {
        loop {
            if let Some(ask) = self.question() {
                return Step::Ask(ask);
            }
            let went_on = match self.state.clone() {
                State::Over(step) => return step,
                State::ClientFlags => self.client_flags(),
                State::Options => self.option(),
                State::Skip { left, option } => self.skip(left, option),
            };
            if !went_on {
                return Step::NeedBytes;
            }
        }
    }

    fn question(&self) -> Option<Ask> {
        Some(match self.pending.as_ref()? {
            Pending::List => Ask::List,
            Pending::ExportName(name) => Ask::Export(name.clone()),
            Pending::Info { request, .. } => Ask::Export(request.name.clone()),
            Pending::Meta { request, .. } => Ask::Export(request.name.clone()),
        })
    }

    fn fail(&mut self, text: impl Into<String>) {
        self.state = State::Over(Step::Fail(ProtocolError::new(text)));
    }

    fn client_flags(&mut self) -> bool {
        let Some((head, _)) = self.input.split_first_chunk::<4>() else { return false };
        let flags = u32::from_be_bytes(*head);
        self.input.drain(..4);
        let known = u32::from(HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES);
        if flags & !known != 0 {
            self.fail(format!("unknown client flags 0x{flags:x}"));
            return true;
        }
        self.no_zeroes = flags & u32::from(HANDSHAKE_NO_ZEROES) != 0;
        self.state = State::Options;
        true
    }

    fn option(&mut self) -> bool {
        let Ok((header, _)) = opt::OptionHeader::read_from_prefix(&self.input) else { return false };
        let (option, length) = (header.option.get(), header.length.get());
        if header.magic.get() != opt::OPTION_MAGIC {
            self.fail("Bad magic received");
            return true;
        }
        let kept = usize::try_from(length).unwrap_or(usize::MAX);
        if length > MAX_SKIPPED || (option == opt::EXPORT_NAME && kept > MAX_NAME) {
            self.fail(format!("len ({length}) is larger than max len ({MAX_SKIPPED})"));
            return true;
        }
        if kept > MAX_KEPT {
            self.input.drain(..16);
            self.state = State::Skip { left: kept, option };
            return true;
        }
        let Some(payload) = self.input.get(16..16 + kept) else { return false };
        let payload = payload.to_vec();
        self.input.drain(..16 + kept);
        self.take(option, &payload);
        true
    }

    fn skip(&mut self, left: usize, option: u32) -> bool {
        let now = left.min(self.input.len());
        self.input.drain(..now);
        if now < left {
            self.state = State::Skip { left: left - now, option };
            return false;
        }
        self.refuse(option, opt::REP_ERR_TOO_BIG, "option payload is too long");
        self.state = State::Options;
        true
    }

    fn take(&mut self, option: u32, payload: &[u8]) {
        let takes_none =
            matches!(option, opt::LIST | opt::STARTTLS | opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS);
        if takes_none && !payload.is_empty() {
            return self.refuse(option, opt::REP_ERR_INVALID, &BadPayload::Long.text(option));
        }
        match option {
            opt::EXPORT_NAME => {
                self.pending = Some(Pending::ExportName(String::from_utf8_lossy(payload).into_owned()));
            }
            opt::ABORT => {
                self.answer(option, opt::REP_ACK, &[]);
                self.state = State::Over(Step::Abort);
            }
            opt::LIST => self.pending = Some(Pending::List),
            opt::STARTTLS => self.refuse(option, opt::REP_ERR_POLICY, "TLS not configured"),
            opt::INFO | opt::GO => match InfoRequest::parse(payload) {
                Ok(request) => self.pending = Some(Pending::Info { option, request }),
                Err(bad) => self.refuse(option, opt::REP_ERR_INVALID, &bad.text(option)),
            },
            opt::STRUCTURED_REPLY => self.structured_reply(),
            opt::EXTENDED_HEADERS if self.framing == Framing::Extended => {
                self.refuse(option, opt::REP_ERR_INVALID, "extended headers already negotiated");
            }
            opt::EXTENDED_HEADERS => {
                self.framing = Framing::Extended;
                self.answer(option, opt::REP_ACK, &[]);
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.meta(option, payload),
            _ => {
                let text = format!("Unsupported option {option} ({})", opt::option_name(option));
                self.refuse(option, opt::REP_ERR_UNSUP, &text);
            }
        }
    }

    fn structured_reply(&mut self) {
        let option = opt::STRUCTURED_REPLY;
        match self.framing {
            Framing::Simple => {
                self.framing = Framing::Structured;
                self.answer(option, opt::REP_ACK, &[]);
            }
            Framing::Structured => {
                self.refuse(option, opt::REP_ERR_INVALID, "structured reply already negotiated");
            }
            Framing::Extended => {
                self.refuse(option, opt::REP_ERR_EXT_HEADER_REQD, "extended headers already negotiated");
            }
        }
    }

    fn meta(&mut self, option: u32, payload: &[u8]) {
        if option == opt::SET_META_CONTEXT {
            // Whatever comes of this one, the earlier choice is void.
            self.contexts = (String::new(), Vec::new());
            if self.framing == Framing::Simple {
                let name = opt::option_name(option);
                let text = format!("request option '{name}' when structured reply is not negotiated");
                return self.refuse(option, opt::REP_ERR_INVALID, &text);
            }
        }
        match MetaRequest::parse(payload) {
            Ok(request) => self.pending = Some(Pending::Meta { option, request }),
            Err(bad) => self.refuse(option, opt::REP_ERR_INVALID, &bad.text(option)),
        }
    }

    /// Answers [`Ask::List`] with names and descriptions.
    pub fn answer_list(&mut self, exports: &[(String, String)]) {
        self.pending = None;
        for (name, description) in exports {
            let mut payload = u32::try_from(name.len()).unwrap_or(0).to_be_bytes().to_vec();
            payload.extend(name.as_bytes());
            payload.extend(description.as_bytes());
            self.answer(opt::LIST, opt::REP_SERVER, &payload);
        }
        self.answer(opt::LIST, opt::REP_ACK, &[]);
    }

    /// Answers [`Ask::Export`].
    pub fn answer_export(&mut self, export: Option<&ExportInfo>) {
        let Some(pending) = self.pending.take() else { return };
        match (pending, export) {
            (Pending::List, _) => self.pending = Some(Pending::List),
            (Pending::ExportName(name), None) => self.fail(format!("export '{name}' not present")),
            (Pending::ExportName(_), Some(export)) => self.go_the_old_way(export),
            (Pending::Info { option, request: InfoRequest { name, .. } }, None)
            | (Pending::Meta { option, request: MetaRequest { name, .. } }, None) => {
                let text = format!("export '{}' not present", shown(&name));
                self.refuse(option, opt::REP_ERR_UNKNOWN, &text);
            }
            (Pending::Info { option, request }, Some(export)) => self.info(option, &request, export),
            (Pending::Meta { option, request }, Some(export)) => self.contexts(option, request, export),
        }
    }

    fn go_the_old_way(&mut self, export: &ExportInfo) {
        let head = opt::SizeAndFlags { size: export.size.into(), flags: self.flags(export).into() };
        self.output.extend(head.as_bytes());
        if !self.no_zeroes {
            self.output.extend([0; 124]);
        }
        self.done(export, false);
    }

    fn flags(&self, export: &ExportInfo) -> u16 {
        export.flags
            | match self.framing {
                Framing::Simple => 0,
                Framing::Structured => SEND_DF,
                Framing::Extended => SEND_DF | BLOCK_STAT_PAYLOAD,
            }
    }

    fn done(&mut self, export: &ExportInfo, knows_block_sizes: bool) {
        let (name, contexts) = std::mem::take(&mut self.contexts);
        let contexts = if name == export.name { contexts } else { Vec::new() };
        let agreed = Agreed { name: export.name.clone(), framing: self.framing, contexts, knows_block_sizes };
        self.state = State::Over(Step::Done(agreed));
    }

    fn info(&mut self, option: u32, request: &InfoRequest, export: &ExportInfo) {
        let asked_sizes = request.wants.contains(&opt::INFO_BLOCK_SIZE);
        if request.wants.contains(&opt::INFO_NAME) {
            self.piece(option, opt::INFO_NAME, export.name.as_bytes());
        }
        if !export.description.is_empty() {
            self.piece(option, opt::INFO_DESCRIPTION, export.description.as_bytes());
        }
        // Only who asks for block sizes is held to them; INFO does not commit to anything and tells the truth.
        let minimum = if asked_sizes || option == opt::INFO { export.minimum_block } else { 1 };
        let sizes = opt::BlockSizes {
            minimum: minimum.into(),
            preferred: export.preferred_block.into(),
            maximum: export.maximum_block.into(),
        };
        self.piece(option, opt::INFO_BLOCK_SIZE, sizes.as_bytes());
        let head = opt::SizeAndFlags { size: export.size.into(), flags: self.flags(export).into() };
        self.piece(option, opt::INFO_EXPORT, head.as_bytes());
        self.answer(option, opt::REP_ACK, &[]);
        if option == opt::GO {
            self.done(export, asked_sizes);
        }
    }

    fn piece(&mut self, option: u32, kind: u16, bytes: &[u8]) {
        let mut payload = kind.to_be_bytes().to_vec();
        payload.extend(bytes);
        self.answer(option, opt::REP_INFO, &payload);
    }

    fn contexts(&mut self, option: u32, request: MetaRequest, export: &ExportInfo) {
        let listing = option == opt::LIST_META_CONTEXT;
        let mut chosen: Vec<MetaContext> = Vec::new();
        for (id, name) in (0_u32..).zip(&export.contexts) {
            if !listing && chosen.iter().any(|earlier| earlier.name == *name) {
                // Listed as often as it is there, but chosen once.
                continue;
            }
            let all = listing && request.queries.is_empty();
            if all || request.queries.iter().any(|query| opt::query_matches(query, name, listing)) {
                chosen.push(MetaContext { id, name: name.clone() });
            }
        }
        for context in &chosen {
            // Ids mean nothing in a list; QEMU sends 0.
            let id = if listing { 0 } else { context.id };
            let mut payload = id.to_be_bytes().to_vec();
            payload.extend(context.name.as_bytes());
            self.answer(option, opt::REP_META_CONTEXT, &payload);
        }
        self.answer(option, opt::REP_ACK, &[]);
        if !listing {
            self.contexts = (request.name, chosen);
        }
    }

    fn answer(&mut self, option: u32, kind: u32, payload: &[u8]) {
        let header = AnswerHeader {
            magic: opt::ANSWER_MAGIC.into(),
            option: option.into(),
            kind: kind.into(),
            length: u32::try_from(payload.len()).unwrap_or(0).into(),
        };
        self.output.extend(header.as_bytes());
        self.output.extend(payload);
    }

    fn refuse(&mut self, option: u32, kind: u32, text: &str) {
        self.answer(option, kind, text.as_bytes());
    }
}

/// A name for an error message: long ones are cut, as QEMU does.
fn shown(name: &str) -> String {
    let mut chars = name.chars();
    let start: String = chars.by_ref().take(80).collect();
    if chars.next().is_some() { start + "..." } else { start }
}

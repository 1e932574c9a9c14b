//! One request: checked, carried out on the disk, answered.
//!
//! Errors and their sentences are those of qemu-storage-daemon 10.0.2, found by asking it.

use smallvec::SmallVec;
use tokio::sync::OwnedSemaphorePermit;
use underlay_graph::bitmap::DirtyBitmap;
use underlay_graph::status::status;
use underlay_graph::{ByteRange, IoError, WriteFlags, ZeroFlags};
use underlay_nbd::flags as bits;
use underlay_nbd::transmission::{Chunks, command, simple_reply};
use underlay_nbd::{Errno, Extents, Framing, MAX_PAYLOAD, MetaContext, Request};
use underlay_sys::Iov;

use super::export::Context;
use super::outbox::{Batch, Outbox};
use crate::guest::{Operation, Way};

/// Zeroes are looked for in blocks of this many bytes.
const GRAIN: u64 = 64 << 10;
/// Status calls under one entry through the gate, so that a change of the graph need not wait for all of them.
const CALLS: usize = 256;
/// Entries through the gate for one block status request; the answer may be shorter than the question.
const ENTRIES: usize = 512;
/// Zeroing and discarding goes in steps of this many bytes, for the same reason.
const STEP: u64 = 1 << 30;

/// What all requests of a connection share.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) framing: Framing,
    pub(crate) contexts: Vec<MetaContext>,
    /// What each context id of the export is about.
    pub(crate) kinds: Vec<Context>,
    /// As it was told to the client.
    pub(crate) size: u64,
    pub(crate) disk: Way,
    pub(crate) writable: bool,
    pub(crate) writethrough: bool,
}

/// Why a request failed.
struct Failure {
    error: Errno,
    text: String,
}

impl Failure {
    fn new(error: Errno, text: impl Into<String>) -> Self {
        Self { error, text: text.into() }
    }

    fn invalid(text: impl Into<String>) -> Self {
        Self::new(Errno::EINVAL, text)
    }
}

type Outcome<T> = Result<T, Failure>;

/// Says what failed; the number comes from below.
fn failed(what: &'static str) -> impl Fn(IoError) -> Failure {
    move |error| {
        let errno =
            if error == IoError::ECANCELED { Errno::ESHUTDOWN } else { Errno::from_linux(error.errno()) };
        Failure::new(errno, what)
    }
}

/// A piece of a read's answer.
enum Piece {
    Data(u64, Iov),
    Hole(u64, u32),
}

/// What a successful request has to say.
enum Answer {
    Done,
    Read(Vec<Piece>),
    /// All of the range in one piece; the common case.
    Whole(Iov),
    Status(Vec<(u32, Extents)>),
}

pub(crate) fn too_long(length: u64) -> String {
    format!("len ({length}) is larger than max len ({MAX_PAYLOAD})")
}

pub(crate) fn unsupported_flags(request: &Request) -> String {
    format!("unsupported flags for command {} (got 0x{:x})", command_name(request.command), request.flags)
}

fn command_name(command: u16) -> &'static str {
    match command {
        command::READ => "read",
        command::WRITE => "write",
        command::DISCONNECT => "disconnect",
        command::FLUSH => "flush",
        command::TRIM => "trim",
        command::CACHE => "cache",
        command::WRITE_ZEROES => "write zeroes",
        command::BLOCK_STATUS => "block status",
        _ => "<unknown>",
    }
}

impl Session {
    /// Memory that the reply may need.
    pub(crate) fn reply_memory(&self, request: &Request) -> u64 {
        match request.command {
            command::READ | command::CACHE => request.length.min(MAX_PAYLOAD.into()),
            // As many descriptors as there may be.
            command::BLOCK_STATUS => self.contexts.len() as u64 * (2 << 20),
            _ => 0,
        }
    }

    /// Carries out a request and pushes its reply. `payload` is what came with it.
    pub(crate) async fn work(
        &self,
        outbox: &Outbox,
        request: Request,
        payload: Option<Iov>,
        permit: OwnedSemaphorePermit,
    ) {
        let outcome = match self.check(&request) {
            Ok(()) => self.carry_out(&request, payload).await,
            Err(failure) => {
                self.count_refused(&request);
                Err(failure)
            }
        };
        outbox.push(Some(permit), |batch| match outcome {
            Ok(answer) => self.answer(&request, answer, batch),
            Err(failure) => self.fail(&request, &failure, batch),
        });
    }

    /// Pushes an error without doing anything.
    pub(crate) fn refuse(
        &self,
        outbox: &Outbox,
        request: &Request,
        permit: Option<OwnedSemaphorePermit>,
        text: &str,
    ) {
        self.count_refused(request);
        outbox.push(permit, |batch| self.fail(request, &Failure::invalid(text), batch));
    }

    fn count_refused(&self, request: &Request) {
        let operation = match request.command {
            command::READ | command::CACHE => Operation::Read,
            command::WRITE | command::WRITE_ZEROES => Operation::Write,
            command::FLUSH => Operation::Flush,
            command::TRIM => Operation::Discard,
            _ => return,
        };
        self.disk.refused(operation);
    }

    fn chunks(&self, request: &Request) -> Chunks {
        Chunks { framing: self.framing, cookie: request.cookie, offset: request.offset }
    }

    fn fail(&self, request: &Request, failure: &Failure, batch: &mut Batch) {
        let out = batch.bytes();
        if self.framing == Framing::Simple {
            out.extend(simple_reply(failure.error, request.cookie));
        } else {
            self.chunks(request).error(failure.error, &failure.text, out);
        }
    }

    fn answer(&self, request: &Request, answer: Answer, batch: &mut Batch) {
        let chunks = self.chunks(request);
        match answer {
            Answer::Whole(data) if self.framing == Framing::Simple => {
                batch.bytes().extend(simple_reply(Errno::OK, request.cookie));
                batch.payload(data);
            }
            Answer::Whole(data) => {
                let len = u32::try_from(data.len()).unwrap_or(0);
                chunks.data(true, request.offset, len, batch.bytes());
                batch.payload(data);
            }
            Answer::Read(pieces) => {
                let last = pieces.len().saturating_sub(1);
                for (index, piece) in pieces.into_iter().enumerate() {
                    match piece {
                        Piece::Hole(at, len) => chunks.hole(index == last, at, len, batch.bytes()),
                        Piece::Data(at, data) => {
                            let len = u32::try_from(data.len()).unwrap_or(0);
                            chunks.data(index == last, at, len, batch.bytes());
                            batch.payload(data);
                        }
                    }
                }
            }
            Answer::Status(contexts) => {
                let last = contexts.len().saturating_sub(1);
                for (index, (id, extents)) in contexts.iter().enumerate() {
                    chunks.status(index == last, *id, extents.list(), batch.bytes());
                }
            }
            // Reads of nothing are answered in chunks too; the rest only with extended headers.
            Answer::Done
                if self.framing == Framing::Extended
                    || (self.framing == Framing::Structured && request.command == command::READ) =>
            {
                chunks.none(batch.bytes());
            }
            Answer::Done => batch.bytes().extend(simple_reply(Errno::OK, request.cookie)),
        }
    }

    fn check(&self, request: &Request) -> Outcome<()> {
        let writes = matches!(request.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        let (valid, ranged) = match request.command {
            command::READ if self.framing != Framing::Simple => (bits::CMD_DF, true),
            command::READ | command::CACHE => (0, true),
            // The length has been the payload's, whether or not the flag said so.
            command::WRITE if self.framing == Framing::Extended => (bits::CMD_PAYLOAD_LEN, true),
            command::WRITE | command::TRIM => (0, true),
            command::FLUSH => (0, false),
            command::WRITE_ZEROES => (bits::CMD_NO_HOLE | bits::CMD_FAST_ZERO, true),
            command::BLOCK_STATUS if self.framing == Framing::Extended => {
                // With a payload, the length in the header is the payload's; the real one is checked later.
                let filtered = request.flags & bits::CMD_PAYLOAD_LEN != 0;
                (bits::CMD_REQ_ONE | bits::CMD_PAYLOAD_LEN, !filtered)
            }
            command::BLOCK_STATUS => (bits::CMD_REQ_ONE, true),
            other => return Err(Failure::invalid(format!("invalid request type ({other}) received"))),
        };
        let bounded = matches!(request.command, command::READ | command::WRITE | command::CACHE);
        if bounded && request.length > MAX_PAYLOAD.into() {
            return Err(Failure::invalid(too_long(request.length)));
        }
        if writes && !self.writable {
            return Err(Failure::invalid("Export is read-only"));
        }
        if ranged {
            self.range(request.offset, request.length)?;
        }
        if request.flags & !(valid | bits::CMD_FUA) != 0 {
            return Err(Failure::invalid(unsupported_flags(request)));
        }
        Ok(())
    }

    fn range(&self, offset: u64, length: u64) -> Outcome<ByteRange> {
        let range = ByteRange::new(offset, length).filter(|range| range.end() <= self.size);
        range.ok_or_else(|| {
            let size = self.size;
            Failure::invalid(format!("operation past EOF; From: {offset}, Len: {length}, Size: {size}"))
        })
    }

    async fn carry_out(&self, request: &Request, payload: Option<Iov>) -> Outcome<Answer> {
        if request.command == command::FLUSH {
            self.disk.flush().await.map_err(failed("flush failed"))?;
            return Ok(Answer::Done);
        }
        if request.command == command::BLOCK_STATUS {
            return self.block_status(request, payload).await;
        }
        let range = self.range(request.offset, request.length)?;
        if range.is_empty() {
            return Ok(Answer::Done);
        }
        match request.command {
            command::READ => {
                return self.read(request, range, Iov::scratch(range.buffer_len())).await;
            }
            command::CACHE => {
                let into = Iov::scratch(range.buffer_len());
                self.disk.read(range, into).await.map_err(failed("caching data failed"))?;
                return Ok(Answer::Done);
            }
            command::WRITE => {
                let from = payload.unwrap_or_default();
                let written = self.disk.write(range, from, WriteFlags::default()).await;
                written.map_err(failed("writing to file failed"))?;
            }
            command::TRIM => {
                for step in steps(range) {
                    self.disk.discard(step).await.map_err(failed("discard failed"))?;
                }
            }
            _ => {
                let flags = ZeroFlags {
                    may_unmap: request.flags & bits::CMD_NO_HOLE == 0,
                    no_fallback: request.flags & bits::CMD_FAST_ZERO != 0,
                };
                for step in steps(range) {
                    self.disk.write_zeroes(step, flags).await.map_err(failed("writing to file failed"))?;
                }
            }
        }
        let durable = request.flags & bits::CMD_FUA != 0 || self.writethrough;
        if durable {
            self.disk.flush().await.map_err(failed("flush failed"))?;
        }
        Ok(Answer::Done)
    }

    async fn read(&self, request: &Request, range: ByteRange, into: Iov) -> Outcome<Answer> {
        self.disk.read(range, into.clone()).await.map_err(failed("reading from file failed"))?;
        if self.framing == Framing::Simple || request.flags & bits::CMD_DF != 0 {
            return Ok(Answer::Whole(into));
        }
        let pieces = pieces(range, &into);
        if let [(_, false)] = pieces[..] {
            return Ok(Answer::Whole(into));
        }
        let piece = |(piece, zero): (ByteRange, bool)| {
            if zero {
                return Piece::Hole(piece.start(), u32::try_from(piece.len()).unwrap_or(0));
            }
            let at = usize::try_from(piece.start() - range.start()).unwrap_or(0);
            Piece::Data(piece.start(), into.slice(at, piece.buffer_len()))
        };
        Ok(Answer::Read(pieces.into_iter().map(piece).collect()))
    }

    /// Which contexts the client wants to hear about, and about which range.
    fn question(&self, request: &Request, payload: Option<&Iov>) -> Outcome<(Vec<MetaContext>, ByteRange)> {
        let (mut contexts, mut length) = (self.contexts.clone(), request.length);
        if request.flags & bits::CMD_PAYLOAD_LEN != 0 {
            let bad = || Failure::invalid("CMD_BLOCK_STATUS payload not valid");
            let payload =
                payload.filter(|payload| payload.len() <= 8 + 4 * contexts.len()).ok_or_else(bad)?;
            let payload = payload.to_vec();
            let (head, ids) = payload.split_first_chunk::<8>().ok_or_else(bad)?;
            let (ids, rest) = ids.as_chunks::<4>();
            let mut chosen = Vec::new();
            for id in ids {
                let id = u32::from_be_bytes(*id);
                let at = contexts.iter().position(|context| context.id == id).ok_or_else(bad)?;
                chosen.push(contexts.remove(at));
            }
            if chosen.is_empty() || !rest.is_empty() {
                return Err(bad());
            }
            chosen.sort_by_key(|context| context.id);
            (contexts, length) = (chosen, u64::from_be_bytes(*head));
        }
        if length == 0 {
            return Err(Failure::invalid("need non-zero length"));
        }
        if contexts.is_empty() {
            return Err(Failure::invalid("CMD_BLOCK_STATUS not negotiated"));
        }
        Ok((contexts, self.range(request.offset, length)?))
    }

    async fn block_status(&self, request: &Request, payload: Option<Iov>) -> Outcome<Answer> {
        let (contexts, range) = self.question(request, payload.as_ref())?;
        let one = request.flags & bits::CMD_REQ_ONE != 0;
        let mut answers: Vec<_> =
            contexts.into_iter().map(|context| (context, Extents::new(self.framing, one))).collect();
        let mut of_layers = Vec::new();
        for (context, extents) in &mut answers {
            match usize::try_from(context.id).ok().and_then(|id| self.kinds.get(id)) {
                Some(Context::Dirty(_, bits)) => dirty_extents(bits, range, extents),
                Some(kind) => of_layers.push((kind, extents)),
                None => {}
            }
        }
        let mut rest = if of_layers.is_empty() { range.split(0).0 } else { range };
        for _ in 0..ENTRIES {
            let inside = self.disk.root().enter().await.map_err(failed("can't get block status"))?;
            let cx = inside.cx();
            for _ in 0..CALLS {
                if rest.is_empty() {
                    break;
                }
                let found = status(&cx, rest, None).await.map_err(failed("can't get block status"))?;
                let len = found.len.clamp(1, rest.len());
                let mut room = false;
                for (kind, extents) in &mut of_layers {
                    let flags = match kind {
                        Context::Depth if found.allocated => found.depth.saturating_add(1),
                        Context::Depth => 0,
                        _ => {
                            let hole = if found.data { 0 } else { bits::STATE_HOLE };
                            hole | if found.zero { bits::STATE_ZERO } else { 0 }
                        }
                    };
                    room |= extents.push(len, flags);
                }
                rest = if room { rest.split(len).1 } else { rest.split(rest.len()).1 };
            }
            if rest.is_empty() {
                break;
            }
        }
        Ok(Answer::Status(answers.into_iter().map(|(context, extents)| (context.id, extents)).collect()))
    }
}

/// Tells of `range` what is dirty; behind the end of the bitmap nothing is.
fn dirty_extents(bitmap: &DirtyBitmap, range: ByteRange, extents: &mut Extents) {
    let mut rest = range;
    while !rest.is_empty() {
        let (dirty, len) = bitmap.run_at(rest);
        if !extents.push(len, if dirty { bits::STATE_DIRTY } else { 0 }) {
            return;
        }
        rest = rest.split(len).1;
    }
}

/// The parts of what was read that are data or zeroes, in turn. Looking at the bytes is cheaper than asking every
/// layer where its holes are, which file systems may need long to find, and says more.
fn pieces(range: ByteRange, read: &Iov) -> SmallVec<[(ByteRange, bool); 1]> {
    let mut pieces: SmallVec<[(ByteRange, bool); 1]> = SmallVec::new();
    let (mut rest, mut at) = (range, 0);
    while !rest.is_empty() {
        let (piece, after) = rest.split(GRAIN - rest.start() % GRAIN);
        let zero = read.slice(at, piece.buffer_len()).is_zero();
        at += piece.buffer_len();
        match pieces.last_mut() {
            Some((last, was)) if *was == zero => *last = ByteRange::between(last.start(), piece.end()),
            _ => pieces.push((piece, zero)),
        }
        rest = after;
    }
    pieces
}

fn steps(range: ByteRange) -> impl Iterator<Item = ByteRange> {
    let mut rest = range;
    std::iter::from_fn(move || {
        let (step, after) = rest.split(STEP);
        rest = after;
        (!step.is_empty()).then_some(step)
    })
}

//! What each command does. Errors, their texts and which flags are allowed where: as QEMU's server.

use underlay_graph::status::status;
use underlay_graph::{ByteRange, IoError, WriteFlags, ZeroFlags};
use underlay_nbd::transmission::{Chunks, command, simple_reply};
use underlay_nbd::{Errno, Extents, Framing, MAX_PAYLOAD, Request, flags};
use underlay_sys::Iov;

use super::connection::Session;
use super::export::{ALLOCATION_DEPTH, BASE_ALLOCATION};

/// Extents of a block status reply that are looked up before changes of the graph may come between.
const STATUS_STEPS: usize = 1024;

/// An error for the client.
#[derive(Debug)]
pub(super) struct Refusal {
    errno: Errno,
    text: String,
}

impl Refusal {
    pub(super) fn new(errno: Errno, text: impl Into<String>) -> Self {
        Self { errno, text: text.into() }
    }

    fn io(error: &IoError, text: &str) -> Self {
        Self { errno: Errno::from_linux(error.errno()), text: format!("{text}: {error}") }
    }
}

/// A good reply.
#[derive(Debug)]
enum Done {
    Plain,
    Data(Iov),
    Status(Vec<(u32, Extents)>),
}

/// Bytes of memory that the request needs until its reply is out.
pub(super) fn cost(request: &Request, payload: u64) -> usize {
    let data = if request.command == command::READ { request.length } else { 0 };
    usize::try_from(data.max(payload).min(MAX_PAYLOAD.into())).unwrap_or(0)
}

/// Runs a request and queues its reply.
pub(super) async fn run(session: &Session, request: Request, payload: Iov) {
    let bytes = cost(&request, payload.len() as u64);
    let result = perform(session, &request, payload).await;
    reply(session, &request, bytes, result);
}

/// Queues an error.
pub(super) fn refuse(session: &Session, request: &Request, bytes: usize, refusal: Refusal) {
    reply(session, request, bytes, Err(refusal));
}

fn reply(session: &Session, request: &Request, bytes: usize, result: Result<Done, Refusal>) {
    let framing = session.framing;
    let cookie = request.cookie;
    let chunks = Chunks { framing, cookie, offset: request.offset };
    let outbox = &session.outbox;
    match result {
        Err(refusal) if framing == Framing::Simple => {
            outbox.push(bytes, None, |out| out.extend(simple_reply(refusal.errno, cookie)));
        }
        Err(refusal) => outbox.push(bytes, None, |out| chunks.error(refusal.errno, &refusal.text, out)),
        Ok(Done::Data(data)) if framing == Framing::Simple => {
            outbox.push(bytes, Some(data), |out| out.extend(simple_reply(Errno::OK, cookie)));
        }
        Ok(Done::Data(data)) if data.is_empty() => outbox.push(bytes, None, |out| chunks.none(out)),
        Ok(Done::Data(data)) => {
            let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
            if data.is_zero() {
                return outbox.push(bytes, None, |out| chunks.hole(true, request.offset, len, out));
            }
            outbox.push(bytes, Some(data), |out| chunks.data(true, request.offset, len, out));
        }
        Ok(Done::Status(contexts)) => outbox.push(bytes, None, |out| {
            let last = contexts.len().saturating_sub(1);
            for (at, (id, extents)) in contexts.iter().enumerate() {
                chunks.status(at == last, *id, extents.list(), out);
            }
            if contexts.is_empty() {
                chunks.none(out);
            }
        }),
        Ok(Done::Plain) if framing == Framing::Extended => outbox.push(bytes, None, |out| chunks.none(out)),
        Ok(Done::Plain) => outbox.push(bytes, None, |out| out.extend(simple_reply(Errno::OK, cookie))),
    }
}

/// The name of a command, for messages.
fn name(command: u16) -> &'static str {
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

fn check_flags(framing: Framing, request: &Request) -> Result<(), Refusal> {
    let mut valid = flags::CMD_FUA;
    match request.command {
        command::READ if framing != Framing::Simple => valid |= flags::CMD_DF,
        command::WRITE if framing == Framing::Extended => {
            if request.flags & flags::CMD_PAYLOAD_LEN == 0 {
                return Err(Refusal::new(Errno::EINVAL, "write without a payload"));
            }
            valid |= flags::CMD_PAYLOAD_LEN;
        }
        command::WRITE_ZEROES => valid |= flags::CMD_NO_HOLE | flags::CMD_FAST_ZERO,
        command::BLOCK_STATUS => {
            valid |= flags::CMD_REQ_ONE;
            if framing == Framing::Extended {
                valid |= flags::CMD_PAYLOAD_LEN;
            }
        }
        _ => {}
    }
    if request.flags & !valid != 0 {
        let (name, got) = (name(request.command), request.flags);
        let text = format!("unsupported flags for command {name} (got 0x{got:x})");
        return Err(Refusal::new(Errno::EINVAL, text));
    }
    Ok(())
}

/// The range of the request, if it may touch it.
fn check_range(session: &Session, request: &Request, length: u64) -> Result<ByteRange, Refusal> {
    let writes = matches!(request.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
    if writes && !session.served.export.writable {
        return Err(Refusal::new(Errno::EPERM, "Export is read-only"));
    }
    let inside = request.offset.checked_add(length).is_some_and(|end| end <= session.size);
    ByteRange::new(request.offset, length).filter(|_| inside).ok_or_else(|| {
        let grows = matches!(request.command, command::WRITE | command::WRITE_ZEROES);
        let errno = if grows { Errno::ENOSPC } else { Errno::EINVAL };
        let (from, size) = (request.offset, session.size);
        Refusal::new(errno, format!("operation past EOF; From: {from}, Len: {length}, Size: {size}"))
    })
}

async fn perform(session: &Session, request: &Request, payload: Iov) -> Result<Done, Refusal> {
    check_flags(session.framing, request)?;
    let moves_data = matches!(request.command, command::READ | command::WRITE | command::CACHE);
    if moves_data && request.length > u64::from(MAX_PAYLOAD) {
        let text = format!("len ({}) is larger than max len ({MAX_PAYLOAD})", request.length);
        return Err(Refusal::new(Errno::EINVAL, text));
    }
    let export = &session.served.export;
    match request.command {
        command::READ => {
            let range = check_range(session, request, request.length)?;
            let into = Iov::scratch(range.buffer_len());
            if !range.is_empty() {
                let done = export.root.read(range, into.clone()).await;
                done.map_err(|error| Refusal::io(&error, "reading from file failed"))?;
            }
            Ok(Done::Data(into))
        }
        command::WRITE => {
            let range = check_range(session, request, request.length)?;
            if !range.is_empty() {
                let done = export.root.write(range, payload, WriteFlags::default()).await;
                done.map_err(|error| Refusal::io(&error, "writing to file failed"))?;
            }
            durable(session, request, export.writethrough).await
        }
        command::WRITE_ZEROES => {
            let range = check_range(session, request, request.length)?;
            if !range.is_empty() {
                let how = ZeroFlags {
                    may_unmap: request.flags & flags::CMD_NO_HOLE == 0,
                    no_fallback: request.flags & flags::CMD_FAST_ZERO != 0,
                };
                let done = export.root.write_zeroes(range, how).await;
                done.map_err(|error| Refusal::io(&error, "writing to file failed"))?;
            }
            durable(session, request, export.writethrough).await
        }
        command::TRIM => {
            let range = check_range(session, request, request.length)?;
            if !range.is_empty() {
                let done = export.root.discard(range).await;
                done.map_err(|error| Refusal::io(&error, "discard failed"))?;
            }
            durable(session, request, false).await
        }
        command::FLUSH => flush(session).await,
        // Everything below caches what it needs.
        command::CACHE => check_range(session, request, request.length).map(|_| Done::Plain),
        command::BLOCK_STATUS => block_status(session, request, &payload).await,
        unknown => Err(Refusal::new(Errno::EINVAL, format!("invalid request type ({unknown}) received"))),
    }
}

async fn durable(session: &Session, request: &Request, always: bool) -> Result<Done, Refusal> {
    if always || request.flags & flags::CMD_FUA != 0 { flush(session).await } else { Ok(Done::Plain) }
}

async fn flush(session: &Session) -> Result<Done, Refusal> {
    let done = session.served.export.root.flush().await;
    done.map(|()| Done::Plain).map_err(|error| Refusal::io(&error, "flush failed"))
}

/// The length that a block status request is about, and the contexts.
fn status_scope(session: &Session, request: &Request, payload: &Iov) -> Result<(u64, Vec<u32>), Refusal> {
    if session.contexts.is_empty() {
        return Err(Refusal::new(Errno::EINVAL, "CMD_BLOCK_STATUS not negotiated"));
    }
    if request.flags & flags::CMD_PAYLOAD_LEN == 0 {
        return Ok((request.length, session.contexts.clone()));
    }
    let bytes = payload.to_vec();
    let bad = || Refusal::new(Errno::EINVAL, "invalid payload of a block status request");
    let (length, ids) = bytes.split_first_chunk::<8>().ok_or_else(bad)?;
    let (ids, rest) = ids.as_chunks::<4>();
    let ids: Vec<u32> = ids.iter().map(|id| u32::from_be_bytes(*id)).collect();
    let known =
        ids.iter().enumerate().all(|(at, id)| session.contexts.contains(id) && !ids[..at].contains(id));
    if !rest.is_empty() || ids.is_empty() || !known {
        return Err(bad());
    }
    Ok((u64::from_be_bytes(*length), ids))
}

async fn block_status(session: &Session, request: &Request, payload: &Iov) -> Result<Done, Refusal> {
    let (length, contexts) = status_scope(session, request, payload)?;
    if length == 0 {
        return Err(Refusal::new(Errno::EINVAL, "need non-zero length"));
    }
    let mut range = check_range(session, request, length)?;
    let one = request.flags & flags::CMD_REQ_ONE != 0;
    let mut answers: Vec<_> = contexts.iter().map(|&id| (id, Extents::new(session.framing, one))).collect();
    let failed = |error: IoError| Refusal::io(&error, "block status failed");
    let mut wants_more = true;
    while wants_more && !range.is_empty() {
        let inside = session.served.export.root.enter().await.map_err(failed)?;
        for _ in 0..STATUS_STEPS {
            let status = status(&inside.cx(), range, None).await.map_err(failed)?;
            wants_more = false;
            for (id, extents) in &mut answers {
                let state = match *id {
                    BASE_ALLOCATION => {
                        (if status.data { 0 } else { flags::STATE_HOLE })
                            | (if status.zero { flags::STATE_ZERO } else { 0 })
                    }
                    ALLOCATION_DEPTH if status.allocated => status.depth + 1,
                    _ => 0,
                };
                wants_more |= extents.push(status.len, state);
            }
            range = range.split(status.len).1;
            if !wants_more || range.is_empty() {
                break;
            }
        }
    }
    Ok(Done::Status(answers))
}

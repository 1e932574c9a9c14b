//! One connection: the handshake, then requests from the socket until either side has enough.

use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use underlay_nbd::handshake::server::Ask;
use underlay_nbd::transmission::command;
use underlay_nbd::{Agreed, MAX_PAYLOAD, Request, ServerHandshake, Step};
use underlay_sys::net::Stream;
use underlay_sys::{Iov, rt};

use super::export::Membership;
use super::outbox::Outbox;
use super::request::{self, Session};
use super::{Handle, Shared};
use crate::guest::Way;

/// Bytes received at a time while requests are small.
const RECEIVE: usize = 256 << 10;
/// Bytes received at a time after a large payload, so that the next one mostly goes straight into its buffer.
const RECEIVE_LITTLE: usize = 4096;
/// From here on a payload is large.
const LARGE: u64 = 64 << 10;
/// Memory of requests and replies under way, in bytes.
const BUDGET: u32 = 64 << 20;
/// The budget is counted in pieces of this many bytes; every request costs at least one.
const PIECE: u32 = 4096;
/// After so many wake-ups in a row that found something to do, other tasks get their turn.
const TURNS: u32 = 16;

/// Serves one client to the end.
pub(crate) async fn serve(shared: &Arc<Shared>, handle: &Arc<Handle>) {
    watch(shared, handle);
    let Some((agreed, membership, rest, size)) = shake_hands(shared, handle).await else { return };
    handle.chosen.raise();
    let session = Session {
        framing: agreed.framing,
        contexts: agreed.contexts,
        kinds: membership.export().contexts(),
        size,
        disk: Way::new(membership.export().root.clone(), membership.export().guest.clone()),
        writable: membership.export().writable,
        writethrough: membership.export().writethrough,
    };
    transmit(handle, session, rest).await;
    drop(membership);
}

/// Drops the client if it takes too long to choose an export.
fn watch(shared: &Shared, handle: &Arc<Handle>) {
    let limit = shared.options.handshake_timeout;
    if limit.is_zero() {
        return;
    }
    let handle = Arc::downgrade(handle);
    rt::spawn(async move {
        rt::sleep(limit).await;
        if let Some(handle) = handle.upgrade()
            && !handle.chosen.is_raised()
        {
            tracing::debug!("an NBD client took too long to choose an export");
            handle.close();
        }
    });
}

async fn shake_hands(shared: &Shared, handle: &Arc<Handle>) -> Option<(Agreed, Membership, Vec<u8>, u64)> {
    let stream = &handle.stream;
    let mut handshake = ServerHandshake::new();
    let mut buffer = vec![0; 4096];
    let mut size = 0;
    loop {
        let step = handshake.step();
        if !matches!(step, Step::Ask(_)) {
            let output = handshake.take_output();
            stream.send_all(&output).await.ok()?;
        }
        match step {
            Step::NeedBytes => match stream.recv(&mut buffer).await {
                Ok(0) | Err(_) => return None,
                Ok(got) => handshake.feed(&buffer[..got]),
            },
            Step::Ask(Ask::List) => {
                shared.complete().await;
                handshake.answer_list(&shared.exports.names());
            }
            Step::Ask(Ask::Export(name)) => {
                let info = match shared.find(&name).await {
                    Some(entry) => entry.info(shared.options.max_connections != 1).await.ok(),
                    None => None,
                };
                size = info.as_ref().map_or(0, |info| info.size);
                handshake.answer_export(info.as_ref());
            }
            Step::Done(agreed) => {
                // Removed just now: the client sees the connection end.
                let membership = shared.exports.find(&agreed.name)?.join(handle)?;
                return Some((agreed, membership, handshake.into_rest(), size));
            }
            Step::Abort => return None,
            Step::Fail(error) => {
                tracing::debug!(%error, "NBD handshake failed");
                return None;
            }
        }
    }
}

/// Received bytes that are not parsed yet.
struct Received {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    little: bool,
}

impl Received {
    fn new(rest: &[u8]) -> Self {
        let mut bytes = vec![0; RECEIVE.max(rest.len())];
        bytes[..rest.len()].copy_from_slice(rest);
        Self { bytes, start: 0, end: rest.len(), little: false }
    }

    fn have(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Waits for more; false at the end of the stream.
    async fn more(&mut self, stream: &Stream) -> bool {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let limit = if self.little { self.end + RECEIVE_LITTLE } else { self.bytes.len() };
        let limit = limit.min(self.bytes.len());
        match stream.recv(&mut self.bytes[self.end..limit]).await {
            Ok(0) => false,
            Ok(got) => {
                self.end += got;
                true
            }
            Err(error) => {
                tracing::debug!(%error, "lost an NBD client");
                false
            }
        }
    }

    /// Fills `into` from what is there and then straight from the socket; false at the end of the stream.
    async fn payload(&mut self, stream: &Stream, into: &Iov) -> bool {
        let ready = into.len().min(self.end - self.start);
        into.write_at(0, &self.bytes[self.start..self.start + ready]);
        self.start += ready;
        if ready == into.len() {
            return true;
        }
        stream.recv_exact_iov(&into.slice(ready, into.len() - ready)).await.is_ok()
    }
}

/// The receiving side of the transmission phase.
struct Receiver {
    stream: Arc<Stream>,
    session: Arc<Session>,
    outbox: Arc<Outbox>,
    budget: Arc<Semaphore>,
    received: Received,
    /// Sends replies that the client does not take yet.
    sending: Option<rt::JoinHandle<()>>,
}

/// Receives and starts requests until the client goes, and waits for those under way.
async fn transmit(handle: &Handle, session: Session, rest: Vec<u8>) {
    let outbox = Arc::new(Outbox::new(handle.stream.clone()));
    let sender = {
        let outbox = outbox.clone();
        rt::spawn(async move { outbox.run().await })
    };
    let pieces = BUDGET / PIECE;
    let budget = Arc::new(Semaphore::new(usize::try_from(pieces).unwrap_or(0)));
    let mut receiver = Receiver {
        stream: handle.stream.clone(),
        session: Arc::new(session),
        outbox: outbox.clone(),
        budget: budget.clone(),
        received: Received::new(&rest),
        sending: None,
    };
    receiver.run().await;
    if let Some(sending) = receiver.sending.take() {
        sending.await;
    }
    outbox.flush().await;
    // Every request has its share of the budget until its reply is sent or nobody is there to take it.
    outbox.kick();
    drop(budget.acquire_many(pieces).await);
    outbox.close();
    sender.await;
}

impl Receiver {
    async fn run(&mut self) {
        let mut turns = 0;
        loop {
            while let Some(go_on) = self.next().await {
                if !go_on {
                    return;
                }
            }
            self.flush().await;
            turns += 1;
            if turns % TURNS == 0 {
                rt::yield_now().await;
            }
            if !self.received.more(&self.stream).await {
                return;
            }
        }
    }

    /// Works on the next request: `None` when it is not there yet, false when it was the last.
    async fn next(&mut self) -> Option<bool> {
        let framing = self.session.framing;
        let request = match Request::parse(framing, self.received.have()) {
            Ok(request) => request?,
            Err(error) => {
                tracing::debug!(%error, "an NBD client sends garbage");
                return Some(false);
            }
        };
        self.received.start += Request::header_len(framing);
        if request.command == command::DISCONNECT {
            return Some(false);
        }
        Some(self.take(request).await)
    }

    async fn take(&mut self, request: Request) -> bool {
        let payload = request.payload_len(self.session.framing);
        if payload > u64::from(MAX_PAYLOAD) {
            // There is no way to go on behind a payload like this.
            let text = request::too_long(payload);
            self.session.refuse(&self.outbox, &request, None, &text);
            return false;
        }
        if request.command == command::READ && self.outbox.is_dead() {
            // Requests that came before the client went away can still be received. What it wrote is written; nobody
            // wants to know what it asked.
            return true;
        }
        self.received.little = payload >= LARGE;
        let Some(permit) = self.admit(payload.max(self.session.reply_memory(&request))).await else {
            return false;
        };
        let mut from = None;
        if payload > 0 {
            let len = usize::try_from(payload).unwrap_or(0);
            let into = Iov::scratch(len);
            if len > self.received.have().len() {
                self.flush().await;
            }
            if !self.received.payload(&self.stream, &into).await {
                return false;
            }
            from = Some(into);
        }
        if payload > 0 && request.command != command::WRITE && request.command != command::BLOCK_STATUS {
            let text = request::unsupported_flags(&request);
            self.session.refuse(&self.outbox, &request, Some(permit), &text);
            return true;
        }
        self.start(request, from, permit).await;
        if self.outbox.is_heavy() {
            self.flush().await;
        }
        true
    }

    /// Sends the replies that there are. Those that the client does not take at once are left to a task: many clients
    /// send all they have before they read, and both sides would wait for each other.
    async fn flush(&mut self) {
        if !self.outbox.has_work() {
            return;
        }
        let outbox = self.outbox.clone();
        let mut work = Box::pin(async move { outbox.flush().await });
        let waits = std::future::poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx).is_pending())).await;
        if waits {
            self.sending = Some(rt::spawn(work));
        }
    }

    /// Waits until the connection's budget has room for a request with this many bytes.
    async fn admit(&mut self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let pieces = u32::try_from(bytes.div_ceil(u64::from(PIECE))).unwrap_or(u32::MAX);
        let pieces = pieces.clamp(1, BUDGET / PIECE);
        match self.budget.clone().try_acquire_many_owned(pieces) {
            Ok(permit) => Some(permit),
            Err(_) => {
                self.flush().await;
                self.budget.clone().acquire_many_owned(pieces).await.ok()
            }
        }
    }

    /// Runs the request at once; what must wait becomes a task.
    async fn start(&self, request: Request, payload: Option<Iov>, permit: OwnedSemaphorePermit) {
        let (session, outbox) = (self.session.clone(), self.outbox.clone());
        // A client that has other requests under way sends more as soon as they are answered.
        let others = self.budget.available_permits() + permit.num_permits()
            < usize::try_from(BUDGET / PIECE).unwrap_or(0);
        let waits_for_us = others || !self.received.have().is_empty();
        let mut work: Pin<Box<dyn Future<Output = ()> + Send>> =
            Box::pin(async move { session.work(&outbox, request, payload, permit).await });
        rt::press(waits_for_us);
        let waits = std::future::poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx).is_pending())).await;
        rt::press(false);
        if waits {
            let outbox = self.outbox.clone();
            rt::spawn(async move {
                work.await;
                outbox.kick();
            });
        }
    }
}

//! The life of one client, all on one I/O thread.

use std::future::Future;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Waker};

use underlay_nbd::handshake::server::Ask;
use underlay_nbd::transmission::command;
use underlay_nbd::{Agreed, Errno, Framing, MAX_PAYLOAD, Request, ServerHandshake, Step};
use underlay_sys::Iov;
use underlay_sys::net::Stream;
use underlay_sys::rt;

use super::export::Served;
use super::outbox::Outbox;
use super::requests::{self, Refusal};
use super::server::Shared;

/// Bytes of the receive buffer: two batches of 32 writes of 4 KiB.
const RECEIVE: usize = 256 << 10;
/// Payloads up to this size go through the receive buffer, so that one call receives many of them; of larger ones
/// the part that has not arrived yet is received straight into place.
const SMALL_PAYLOAD: usize = 64 << 10;

/// A client after the handshake.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) served: Arc<Served>,
    /// Bytes of the export, as the client was told.
    pub(super) size: u64,
    pub(super) framing: Framing,
    /// Ids of the negotiated contexts.
    pub(super) contexts: Vec<u32>,
    pub(super) outbox: Outbox,
}

/// Serves a client to its end; what goes wrong is this client's matter only.
pub(super) async fn serve(shared: Arc<Shared>, client: u64, stream: Arc<Stream>) {
    if let Err(error) = live(&shared, client, &stream).await {
        tracing::debug!(client, %error, "NBD connection ended");
    }
    stream.shutdown();
    shared.leave(client);
}

async fn live(shared: &Arc<Shared>, client: u64, stream: &Arc<Stream>) -> io::Result<()> {
    let in_time = Arc::new(AtomicBool::new(false));
    watch(shared, Arc::downgrade(stream), in_time.clone());
    let greeted = handshake(shared, stream).await?;
    let Some((agreed, size, rest)) = greeted else { return Ok(()) };
    let Some(served) = shared.attach(client, &agreed.name) else { return Ok(()) };
    in_time.store(true, Ordering::Relaxed);
    let session = Arc::new(Session {
        served,
        size,
        framing: agreed.framing,
        contexts: agreed.contexts.iter().map(|context| context.id).collect(),
        outbox: Outbox::new(stream.clone()),
    });
    let result = Reader::new(session.clone(), stream.clone(), &rest).run().await;
    session.flush();
    session.outbox.idle().await;
    result
}

/// Drops the client if the handshake takes too long.
fn watch(shared: &Shared, stream: Weak<Stream>, in_time: Arc<AtomicBool>) {
    let limit = shared.options.handshake_timeout;
    if limit.is_zero() {
        return;
    }
    rt::spawn(async move {
        rt::sleep(limit).await;
        if let (false, Some(stream)) = (in_time.load(Ordering::Relaxed), stream.upgrade()) {
            stream.shutdown();
        }
    });
}

/// What was agreed, the size of the export, and bytes that came too early; nothing when the client went away.
async fn handshake(shared: &Shared, stream: &Stream) -> io::Result<Option<(Agreed, u64, Vec<u8>)>> {
    let mut machine = ServerHandshake::new();
    let mut buffer = [0; 4096];
    let mut size = 0;
    loop {
        let step = machine.step();
        match step {
            Step::Ask(Ask::List) => {
                machine.answer_list(&shared.list());
                continue;
            }
            Step::Ask(Ask::Export(name)) => {
                let info = match shared.find(&name) {
                    Some(served) => served.export.info(shared.multi()).await.ok(),
                    None => None,
                };
                size = info.as_ref().map_or(0, |info| info.size);
                machine.answer_export(info.as_ref());
                continue;
            }
            _ => stream.send_all(&machine.take_output()).await?,
        }
        match step {
            Step::Done(agreed) => return Ok(Some((agreed, size, machine.into_rest()))),
            Step::Fail(error) => return Err(io::Error::other(error)),
            Step::Abort => return Ok(None),
            Step::NeedBytes | Step::Ask(_) => {}
        }
        let got = stream.recv(&mut buffer).await?;
        if got == 0 {
            return Ok(None);
        }
        machine.feed(&buffer[..got]);
    }
}

impl Session {
    /// Sends queued replies: at once as far as the socket takes them, the rest by a task of its own.
    fn flush(self: &Arc<Self>) {
        if self.outbox.claim() {
            let session = self.clone();
            start(async move { session.outbox.send().await });
        }
    }

    /// Sends queued replies once the tasks that are ready now have run, too.
    fn flush_soon(self: &Arc<Self>) {
        if self.outbox.claim() {
            let session = self.clone();
            rt::spawn(async move { session.outbox.send().await });
        }
    }
}

/// Runs a future as far as it goes now; if it must wait, it goes on as a task.
fn start(future: impl Future<Output = ()> + Send + 'static) {
    let mut future = Box::pin(future);
    if future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
        // The task polls it again at once, with a waker that counts.
        rt::spawn(future);
    }
}

/// Takes requests off the socket and starts them.
struct Reader {
    session: Arc<Session>,
    stream: Arc<Stream>,
    buffer: Vec<u8>,
    /// The part of `buffer` that holds received bytes.
    have: Range<usize>,
}

impl Reader {
    fn new(session: Arc<Session>, stream: Arc<Stream>, rest: &[u8]) -> Self {
        let mut buffer = vec![0; RECEIVE.max(rest.len())];
        buffer[..rest.len()].copy_from_slice(rest);
        Self { session, stream, buffer, have: 0..rest.len() }
    }

    /// Until the client says goodbye or goes away.
    async fn run(mut self) -> io::Result<()> {
        loop {
            while let Some((request, payload)) = self.next()? {
                if request.command == command::DISCONNECT {
                    return Ok(());
                }
                self.begin(request, payload).await?;
            }
            self.session.flush();
            if !self.receive().await? {
                return Ok(());
            }
        }
    }

    /// The next request whose payload is here or too large to wait for, and the payload's length.
    fn next(&mut self) -> io::Result<Option<(Request, usize)>> {
        let framing = self.session.framing;
        let bytes = &self.buffer[self.have.clone()];
        let Some(request) = Request::parse(framing, bytes).map_err(io::Error::other)? else {
            return Ok(None);
        };
        let header = Request::header_len(framing);
        let payload = usize::try_from(request.payload_len(framing)).unwrap_or(usize::MAX);
        if payload <= SMALL_PAYLOAD && bytes.len() < header + payload {
            return Ok(None);
        }
        self.have.start += header;
        Ok(Some((request, payload)))
    }

    async fn begin(&mut self, request: Request, payload: usize) -> io::Result<()> {
        let limit = usize::try_from(MAX_PAYLOAD).unwrap_or(0);
        let cost = requests::cost(&request, payload.min(limit) as u64);
        if !self.session.outbox.try_begin(cost) {
            self.session.flush();
            while !self.session.outbox.try_begin(cost) {
                self.session.outbox.room(cost).await;
            }
        }
        if payload > limit {
            // What follows is not worth reading, so nothing more can be understood.
            let text = format!("len ({payload}) is larger than max len ({limit})");
            requests::refuse(&self.session, &request, cost, Refusal::new(Errno::EINVAL, text));
            return Err(io::Error::other("a payload that is too large"));
        }
        let payload = match self.take_payload(payload).await {
            Ok(payload) => payload,
            Err(error) => {
                // Paid back; nobody reads the reply.
                requests::refuse(&self.session, &request, cost, Refusal::new(Errno::EIO, ""));
                return Err(error);
            }
        };
        let session = self.session.clone();
        let mut future = Box::pin(async move { requests::run(&session, request, payload).await });
        if future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            let session = self.session.clone();
            rt::spawn(async move {
                future.await;
                session.flush_soon();
            });
        }
        Ok(())
    }

    async fn take_payload(&mut self, len: usize) -> io::Result<Iov> {
        if len == 0 {
            return Ok(Iov::default());
        }
        let payload = Iov::scratch(len);
        let ready = len.min(self.have.len());
        payload.write_at(0, &self.buffer[self.have.start..self.have.start + ready]);
        self.have.start += ready;
        if ready < len {
            // Replies must not wait for a slow sender.
            self.session.flush();
            self.stream.recv_exact_iov(&payload.slice(ready, len - ready)).await?;
        }
        Ok(payload)
    }

    /// Receives more. False at the end.
    async fn receive(&mut self) -> io::Result<bool> {
        self.buffer.copy_within(self.have.clone(), 0);
        self.have = 0..self.have.len();
        let got = self.stream.recv(&mut self.buffer[self.have.end..]).await?;
        self.have.end += got;
        Ok(got > 0)
    }
}

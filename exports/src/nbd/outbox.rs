//! The replies of a connection on their way out: collected by whoever has one, sent many at a time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use smallvec::SmallVec;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use underlay_sys::Iov;
use underlay_sys::net::{Part, Stream};

/// Pieces in one system call; the kernel's limit is 1024.
const PARTS: usize = 512;

/// Payloads of so many bytes are worth a system call of their own: the client can begin with them, and they are still
/// in the processor's cache.
const HEAVY: usize = 256 << 10;

/// Replies that are sent together.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// Headers and small things, one behind the other.
    bytes: Vec<u8>,
    /// Where in `bytes` each payload belongs.
    payloads: Vec<(usize, Iov)>,
    /// How many bytes they have together.
    weight: usize,
    /// Room in the connection's budget, given back once sent.
    permits: Vec<OwnedSemaphorePermit>,
}

impl Batch {
    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.payloads.clear();
        self.weight = 0;
        self.permits.clear();
    }

    /// Where headers are to be added.
    pub(crate) fn bytes(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Adds a payload behind the bytes so far.
    pub(crate) fn payload(&mut self, payload: Iov) {
        self.weight += payload.len();
        self.payloads.push((self.bytes.len(), payload));
    }
}

#[derive(Debug, Default)]
struct Queue {
    batch: Batch,
    spare: Batch,
    sending: bool,
    dead: bool,
    closed: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Outbox {
    stream: Arc<Stream>,
    queue: Mutex<Queue>,
    wake: Notify,
}

impl Outbox {
    pub(crate) fn new(stream: Arc<Stream>) -> Self {
        Self { stream, queue: Mutex::default(), wake: Notify::new() }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one reply. `permit` goes when it has been sent, or cannot be.
    pub(crate) fn push(&self, permit: Option<OwnedSemaphorePermit>, write: impl FnOnce(&mut Batch)) {
        let mut queue = self.queue();
        if queue.dead {
            return;
        }
        write(&mut queue.batch);
        queue.batch.permits.extend(permit);
    }

    /// Makes [`Outbox::run`] send soon, after the tasks that are ready now.
    pub(crate) fn kick(&self) {
        self.wake.notify_one();
    }

    /// Sends what was pushed without anybody flushing, until [`Outbox::close`].
    pub(crate) async fn run(&self) {
        loop {
            self.flush().await;
            if self.queue().closed {
                return;
            }
            self.wake.notified().await;
        }
    }

    /// Ends [`Outbox::run`].
    pub(crate) fn close(&self) {
        self.queue().closed = true;
        self.wake.notify_one();
    }

    /// Whether there is nobody to send anything to.
    pub(crate) fn is_dead(&self) -> bool {
        self.queue().dead
    }

    /// Whether there is something to send that nobody sends.
    pub(crate) fn has_work(&self) -> bool {
        let queue = self.queue();
        !queue.sending && !queue.batch.is_empty()
    }

    /// Whether so much waits that it is better sent now than together with more.
    pub(crate) fn is_heavy(&self) -> bool {
        self.queue().batch.weight >= HEAVY
    }

    /// Sends everything that is queued, unless somebody is at it, who then sends that too.
    pub(crate) async fn flush(&self) {
        while let Some(mut batch) = self.take() {
            let result = send(&self.stream, &batch).await;
            batch.clear();
            let mut queue = self.queue();
            queue.sending = false;
            if let Err(error) = result {
                tracing::debug!(%error, "an NBD client does not take its replies");
                queue.dead = true;
                queue.batch.clear();
                // The receiving side notices by this that there is nobody to work for.
                self.stream.shutdown();
                return;
            }
            if batch.bytes.capacity() <= 1 << 20 {
                queue.spare = batch;
            }
        }
    }

    fn take(&self) -> Option<Batch> {
        let mut queue = self.queue();
        if queue.sending || queue.batch.is_empty() {
            return None;
        }
        queue.sending = true;
        let spare = std::mem::take(&mut queue.spare);
        Some(std::mem::replace(&mut queue.batch, spare))
    }
}

async fn send(stream: &Stream, batch: &Batch) -> std::io::Result<()> {
    if batch.payloads.is_empty() {
        return stream.send_all(&batch.bytes).await;
    }
    let mut parts: SmallVec<[Part<'_>; 64]> = SmallVec::new();
    let mut sent = 0;
    for (at, payload) in &batch.payloads {
        if *at > sent {
            parts.push(Part::Bytes(&batch.bytes[sent..*at]));
        }
        sent = *at;
        parts.push(Part::Iov(payload));
        if parts.len() >= PARTS {
            stream.send_parts(&parts).await?;
            parts.clear();
        }
    }
    if sent < batch.bytes.len() {
        parts.push(Part::Bytes(&batch.bytes[sent..]));
    }
    if parts.is_empty() { Ok(()) } else { stream.send_parts(&parts).await }
}

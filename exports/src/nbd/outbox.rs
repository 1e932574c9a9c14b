//! Replies on their way to one client, and the account of what it has under way.
//!
//! Whoever finishes a request puts the reply here. Nobody sends at once: the reader sends when it has started
//! everything that arrived, other tasks schedule one sending task behind all tasks that are about to finish
//! too. So one system call carries many replies. A request is paid back to the account only when its reply is
//! out (or can never be), which bounds both the requests at work and the data that a slow reader leaves here.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use underlay_nbd::MAX_PAYLOAD;
use underlay_sys::Iov;
use underlay_sys::net::{Part, Stream};

/// Most requests under way of one client.
const MAX_REQUESTS: usize = 256;
/// Most bytes of data under way of one client; at least two requests of the largest size fit.
const MAX_BYTES: usize = 64 << 20;
const _: () = assert!(MAX_BYTES as u64 >= 2 * MAX_PAYLOAD as u64);

#[derive(Debug)]
enum Item {
    /// A part of `heads`.
    Head(Range<usize>),
    Data(Iov),
}

#[derive(Debug, Default)]
struct Queue {
    heads: Vec<u8>,
    items: Vec<Item>,
    paid: Account,
}

#[derive(Clone, Copy, Debug, Default)]
struct Account {
    requests: usize,
    bytes: usize,
}

#[derive(Debug, Default)]
struct State {
    queue: Queue,
    /// An empty queue with memory, used in turns with the other.
    spare: Queue,
    under_way: Account,
    /// Somebody sends or will.
    sending: bool,
    /// The client is gone; replies are thrown away.
    dead: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Outbox {
    stream: Arc<Stream>,
    state: Mutex<State>,
    paid_back: Notify,
}

impl Outbox {
    pub(super) fn new(stream: Arc<Stream>) -> Self {
        Self { stream, state: Mutex::default(), paid_back: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Books a request with `bytes` of data, if there is room.
    pub(super) fn try_begin(&self, bytes: usize) -> bool {
        let mut state = self.state();
        let now = state.under_way;
        let fits = now.requests < MAX_REQUESTS && now.bytes.saturating_add(bytes) <= MAX_BYTES;
        if fits {
            state.under_way = Account { requests: now.requests + 1, bytes: now.bytes + bytes };
        }
        fits
    }

    /// Waits until a request is paid back, if `blocked` still holds.
    async fn wait_while(&self, blocked: impl Fn(&State) -> bool) {
        loop {
            let mut notified = std::pin::pin!(self.paid_back.notified());
            notified.as_mut().enable();
            if !blocked(&self.state()) {
                return;
            }
            notified.await;
        }
    }

    /// Waits until there is room for `bytes` more.
    pub(super) async fn room(&self, bytes: usize) {
        self.wait_while(|state| {
            let now = state.under_way;
            now.requests >= MAX_REQUESTS || now.bytes.saturating_add(bytes) > MAX_BYTES
        })
        .await;
    }

    /// Waits until nothing is under way.
    pub(super) async fn idle(&self) {
        self.wait_while(|state| state.under_way.requests > 0 || state.sending).await;
    }

    /// Queues the reply of a request that was booked with `bytes`. `write_head` adds its head; `data` follows.
    pub(super) fn push(&self, bytes: usize, data: Option<Iov>, write_head: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.state();
        let queue = &mut state.queue;
        queue.paid.requests += 1;
        queue.paid.bytes += bytes;
        let start = queue.heads.len();
        write_head(&mut queue.heads);
        let end = queue.heads.len();
        match queue.items.last_mut() {
            Some(Item::Head(last)) => last.end = end,
            _ => queue.items.push(Item::Head(start..end)),
        }
        queue.items.extend(data.map(Item::Data));
    }

    /// Whether somebody must send now: there are replies, and nobody sends. The caller then must call
    /// [`Outbox::send`].
    pub(super) fn claim(&self) -> bool {
        let mut state = self.state();
        let wanted = state.queue.paid.requests > 0 && !state.sending;
        state.sending |= wanted;
        wanted
    }

    /// Sends until the queue is empty. Only after [`Outbox::claim`].
    pub(super) async fn send(&self) {
        loop {
            let (mut queue, dead) = {
                let mut state = self.state();
                if state.queue.paid.requests == 0 {
                    state.sending = false;
                    break;
                }
                let empty = std::mem::take(&mut state.spare);
                (std::mem::replace(&mut state.queue, empty), state.dead)
            };
            let result = if dead { Ok(()) } else { self.write(&queue).await };
            let mut state = self.state();
            if result.is_err() {
                state.dead = true;
                // The reader must notice, too.
                self.stream.shutdown();
            }
            state.under_way.requests -= queue.paid.requests;
            state.under_way.bytes -= queue.paid.bytes;
            queue.heads.clear();
            queue.items.clear();
            queue.paid = Account::default();
            state.spare = queue;
            drop(state);
            self.paid_back.notify_waiters();
        }
        self.paid_back.notify_waiters();
    }

    async fn write(&self, queue: &Queue) -> std::io::Result<()> {
        let parts: Vec<Part<'_>> = queue.items.iter().map(|item| queue.part(item)).collect();
        self.stream.send_parts(&parts).await
    }
}

impl Queue {
    fn part<'a>(&'a self, item: &'a Item) -> Part<'a> {
        match item {
            Item::Head(range) => Part::Bytes(&self.heads[range.clone()]),
            Item::Data(iov) => Part::Iov(iov),
        }
    }
}

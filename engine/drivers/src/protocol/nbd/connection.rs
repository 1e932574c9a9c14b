//! One connection to an NBD server: many requests at a time, from any thread.
//!
//! Nobody is there only to receive. Whoever waits for his reply and finds nobody receiving does it, for himself and all
//! others, until his own reply has come; then the next one takes over. A reply's data goes from the socket straight
//! into the request's buffer, but for what came along with its header.
//!
//! Everything that the server says is checked against what was asked: a reply to no request, a chunk outside its
//! request, or too long, or a read that is not answered whole, ends the connection. Then every request on its way fails
//! as lost, and it is for [`super::link`] to say whether it is made again.

use std::collections::HashMap;
use std::future::Future;
use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::Notify;
use underlay_nbd::flags::CMD_PAYLOAD_LEN;
use underlay_nbd::handshake::client::Progress;
use underlay_nbd::transmission::{Payload, chunk, command};
use underlay_nbd::{
    Chunk, ClientHandshake, Descriptor, Errno, Framing, Negotiated, ProtocolError, Reply, Request, Wish,
};
use underlay_sys::net::{Address, Part, Stream};
use underlay_sys::{Iov, rt};

/// Bytes received ahead: headers, and what comes along with them.
const INPUT: usize = 16 << 10;
/// Most bytes of a chunk that is no data: more than 4,000 extents.
const MOST_OTHER: u64 = 64 << 10;

/// Most parts of a read that do not touch each other.
const MOST_PARTS: usize = 4096;

/// Why there is no connection.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// Nobody answers, or not as a server would.
    Io(std::io::Error),
    /// The server's own words.
    Server(String),
    /// It grants an export without saying how large that is.
    Silent,
}

/// Why a request failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The server says so.
    Server(Errno),
    /// The connection is gone; nobody knows whether the request was done.
    Lost,
}

/// What to ask for.
#[derive(Debug, Default)]
pub(crate) struct Ask {
    pub(crate) command: u16,
    pub(crate) flags: u16,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// What to write.
    pub(crate) payload: Option<Iov>,
    /// Where to read to.
    pub(crate) into: Option<Iov>,
}

#[derive(Debug)]
struct Waiting {
    request: Request,
    into: Option<Iov>,
    /// What of a read came so far, in order and apart from each other.
    covered: Vec<Range<u64>>,
    status: Vec<Descriptor>,
    error: Option<Errno>,
    /// Chunks that are no data.
    asides: usize,
    done: Option<Result<(), Failure>>,
    wake: Arc<Notify>,
}

/// Received bytes that nobody has looked at.
#[derive(Debug)]
struct Input {
    buffer: Box<[u8]>,
    have: Range<usize>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: Stream,
    granted: Negotiated,
    cookie: AtomicU64,
    waiting: Mutex<HashMap<u64, Waiting>>,
    sending: tokio::sync::Mutex<Vec<u8>>,
    receiving: tokio::sync::Mutex<Input>,
    dead: AtomicBool,
}

fn broken(error: ProtocolError) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, error.0)
}

fn nonsense(text: &str) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, text)
}

fn late<T>() -> std::io::Result<T> {
    Err(std::io::ErrorKind::TimedOut.into())
}

/// The handshake.
async fn agree(stream: &Stream, wish: Wish, buffer: &mut [u8]) -> Result<Negotiated, Refusal> {
    let mut machine = ClientHandshake::new(wish);
    let granted = loop {
        let progress = machine.step();
        stream.send_all(&machine.take_output()).await.map_err(Refusal::Io)?;
        match progress {
            Progress::NeedBytes => {}
            Progress::Done(granted) if granted.flags == 0 => return Err(Refusal::Silent),
            Progress::Done(granted) => break granted,
            Progress::Refused(text) => return Err(Refusal::Server(text)),
            Progress::Fail(error) => return Err(Refusal::Io(broken(error))),
            Progress::Listed(_) => return Err(Refusal::Io(nonsense("a list that nobody asked for"))),
        }
        let got = stream.recv(buffer).await.map_err(Refusal::Io)?;
        if got == 0 {
            return Err(Refusal::Io(std::io::ErrorKind::UnexpectedEof.into()));
        }
        machine.feed(&buffer[..got]);
    };
    // Replies cannot have come before requests.
    match machine.into_rest().is_empty() {
        true => Ok(granted),
        false => Err(Refusal::Io(nonsense("the server says more than it was asked"))),
    }
}

impl Connection {
    /// Connects and agrees on an export, with the best headers that both sides know. A server that has not got so far
    /// when [`rt::now`] reaches `deadline` is hung up on.
    pub(crate) async fn open(
        address: &Address,
        export: &str,
        contexts: Vec<String>,
        deadline: Option<Duration>,
    ) -> Result<Self, Refusal> {
        // Nothing is lost by giving up either of these midway.
        let connected = rt::by(deadline, Stream::connect(address)).await.unwrap_or_else(late);
        let stream = connected.map_err(Refusal::Io)?;
        let wish = Wish { export: export.to_owned(), framing: Framing::Extended, contexts, list: false };
        let mut buffer = vec![0; INPUT].into_boxed_slice();
        let agreed = rt::by(deadline, agree(&stream, wish, &mut buffer)).await;
        if agreed.is_none() {
            stream.shutdown();
        }
        let granted = agreed.unwrap_or_else(|| late().map_err(Refusal::Io))?;
        Ok(Self {
            stream,
            granted,
            cookie: AtomicU64::new(1),
            waiting: Mutex::default(),
            sending: tokio::sync::Mutex::default(),
            receiving: tokio::sync::Mutex::new(Input { buffer, have: 0..0 }),
            dead: AtomicBool::new(false),
        })
    }

    /// What was agreed on.
    pub(crate) fn granted(&self) -> &Negotiated {
        &self.granted
    }

    /// Whether nothing more can be asked.
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a request and waits for its reply; the descriptors of the first context, for a block status.
    pub(crate) async fn ask(&self, ask: Ask) -> Result<Vec<Descriptor>, Failure> {
        let cookie = self.cookie.fetch_add(1, Ordering::Relaxed);
        let extended = self.granted.framing == Framing::Extended;
        let flags = if extended && ask.payload.is_some() { ask.flags | CMD_PAYLOAD_LEN } else { ask.flags };
        let request = Request { flags, command: ask.command, cookie, offset: ask.offset, length: ask.length };
        let wake = Arc::new(Notify::new());
        let waiting = Waiting {
            request,
            into: ask.into,
            covered: Vec::new(),
            status: Vec::new(),
            error: None,
            asides: 0,
            done: None,
            wake: wake.clone(),
        };
        self.waiting().insert(cookie, waiting);
        if self.is_dead() || self.send(&request, ask.payload.as_ref()).await.is_err() {
            self.hang_up();
        }
        self.wait_for(cookie, &wake).await
    }

    async fn send(&self, request: &Request, payload: Option<&Iov>) -> std::io::Result<()> {
        let mut header = self.sending.lock().await;
        header.clear();
        request.encode(self.granted.framing, &mut header).map_err(broken)?;
        match payload {
            Some(payload) => self.stream.send_parts(&[Part::Bytes(&header), Part::Iov(payload)]).await,
            None => self.stream.send_all(&header).await,
        }
    }

    /// Says goodbye.
    pub(crate) async fn disconnect(&self) {
        if !self.is_dead() {
            let goodbye = Request { command: command::DISCONNECT, ..Request::default() };
            let _ = self.send(&goodbye, None).await;
            self.hang_up();
            self.lose_all(&*self.receiving.lock().await);
        }
    }

    fn take_done(&self, cookie: u64) -> Option<Result<Vec<Descriptor>, Failure>> {
        let mut all = self.waiting();
        all.get(&cookie)?.done.as_ref()?;
        let waiting = all.remove(&cookie)?;
        Some(waiting.done?.map(|()| waiting.status))
    }

    async fn wait_for(&self, cookie: u64, wake: &Notify) -> Result<Vec<Descriptor>, Failure> {
        loop {
            let mut told = pin!(wake.notified());
            told.as_mut().enable();
            if let Some(result) = self.take_done(cookie) {
                return result;
            }
            let Some(mut input) = either(told, pin!(self.receiving.lock())).await else { continue };
            loop {
                if let Some(result) = self.take_done(cookie) {
                    return result;
                }
                if self.is_dead() || self.receive(&mut input).await.is_err() {
                    self.hang_up();
                    self.lose_all(&input);
                }
            }
        }
    }

    /// The connection is of no use any more. Whoever receives notices, and tells everybody; so does the next who would.
    pub(crate) fn hang_up(&self) {
        self.dead.store(true, Ordering::Release);
        self.stream.shutdown();
    }

    /// Fails every request on its way. Only for who has the right to receive (`_input` shows it): a request that is
    /// told that it failed lets go of its buffer, into which nobody may be receiving then.
    fn lose_all(&self, _input: &Input) {
        for waiting in self.waiting().values_mut() {
            waiting.done.get_or_insert(Err(Failure::Lost));
            waiting.wake.notify_waiters();
        }
    }

    /// Takes one reply, or one chunk of one.
    async fn receive(&self, input: &mut Input) -> std::io::Result<()> {
        let reply = loop {
            let have = &input.buffer[input.have.clone()];
            if let Some((reply, used)) = Reply::parse(self.granted.framing, have).map_err(broken)? {
                input.have.start += used;
                break reply;
            }
            input.more(&self.stream).await?;
        };
        match reply {
            Reply::Simple { error, cookie } => self.simple(input, error, cookie).await,
            Reply::Chunk(head) if head.kind == chunk::OFFSET_DATA => self.data(input, head).await,
            Reply::Chunk(head) => self.other(input, head).await,
        }
    }

    fn request(&self, cookie: u64) -> std::io::Result<(Request, Option<Iov>)> {
        let all = self.waiting();
        let waiting = all.get(&cookie).filter(|waiting| waiting.done.is_none());
        let waiting = waiting.ok_or_else(|| nonsense("a reply to no request"))?;
        Ok((waiting.request, waiting.into.clone()))
    }

    async fn simple(&self, input: &mut Input, error: Errno, cookie: u64) -> std::io::Result<()> {
        let (request, into) = self.request(cookie)?;
        if self.granted.framing == Framing::Structured && request.command == command::READ {
            return Err(nonsense("a simple reply to a read"));
        }
        if !error.is_ok() {
            self.change(cookie, |waiting| waiting.error = Some(error));
        } else if let Some(into) = into {
            input.take(&self.stream, &into).await?;
            self.cover(cookie, request.offset, request.length)?;
        }
        self.finish(cookie)
    }

    async fn data(&self, input: &mut Input, head: Chunk) -> std::io::Result<()> {
        let (request, into) = self.request(head.cookie)?;
        let len = head.length.checked_sub(8).ok_or_else(|| nonsense("a chunk without its offset"))?;
        let mut at = [0; 8];
        input.take_bytes(&self.stream, &mut at).await?;
        let at = u64::from_be_bytes(at);
        let part = part(&request, into.as_ref(), at, len)?;
        self.cover(head.cookie, at, len)?;
        input.take(&self.stream, &part).await?;

        if head.done { self.finish(head.cookie) } else { Ok(()) }
    }

    async fn other(&self, input: &mut Input, head: Chunk) -> std::io::Result<()> {
        let (request, into) = self.request(head.cookie)?;
        if head.length > MOST_OTHER {
            return Err(nonsense("a chunk that is too long"));
        }
        let mut bytes = vec![0; usize::try_from(head.length).map_err(std::io::Error::other)?];
        input.take_bytes(&self.stream, &mut bytes).await?;
        self.count_aside(head.cookie)?;
        match Payload::parse(head.kind, &bytes).map_err(broken)? {
            Payload::None if !head.done => return Err(nonsense("a chunk that says nothing")),
            Payload::None | Payload::Data(..) => {}
            Payload::Hole(at, len) => {
                part(&request, into.as_ref(), at, len.into())?.fill(0);
                self.cover(head.cookie, at, len.into())?;
            }
            Payload::Status(id, list) => {
                let first = self.granted.contexts.first().is_some_and(|context| context.id == id);
                self.change(head.cookie, |waiting| {
                    if first && waiting.status.is_empty() {
                        waiting.status = list;
                    }
                });
            }
            Payload::Error(error, _) => self.change(head.cookie, |waiting| waiting.error = Some(error)),
        }
        if head.done { self.finish(head.cookie) } else { Ok(()) }
    }

    fn change(&self, cookie: u64, change: impl FnOnce(&mut Waiting)) {
        if let Some(waiting) = self.waiting().get_mut(&cookie) {
            change(waiting);
        }
    }

    /// Refuses a reply that never comes to its end.
    fn count_aside(&self, cookie: u64) -> std::io::Result<()> {
        let mut all = self.waiting();
        let Some(waiting) = all.get_mut(&cookie) else { return Ok(()) };
        waiting.asides += 1;
        if waiting.asides > MOST_PARTS { Err(nonsense("a reply in too many parts")) } else { Ok(()) }
    }

    /// Notes that `len` bytes at `at` of a read come. A byte that comes twice would hide one that never comes.
    fn cover(&self, cookie: u64, at: u64, len: u64) -> std::io::Result<()> {
        let mut all = self.waiting();
        match all.get_mut(&cookie) {
            Some(waiting) => cover(&mut waiting.covered, at, len),
            None => Ok(()),
        }
    }

    /// The reply is complete.
    fn finish(&self, cookie: u64) -> std::io::Result<()> {
        let mut all = self.waiting();
        let Some(waiting) = all.get_mut(&cookie) else { return Ok(()) };
        let is_whole = waiting.request.command != command::READ || whole(waiting);
        waiting.done = Some(match waiting.error {
            Some(error) => Err(Failure::Server(error)),
            None if is_whole => Ok(()),
            None => return Err(nonsense("a part of a read is missing, or came twice")),
        });
        waiting.wake.notify_waiters();
        Ok(())
    }
}

/// Whether every byte of a read came.
fn whole(waiting: &Waiting) -> bool {
    waiting.covered.iter().map(|range| range.end - range.start).sum::<u64>() == waiting.request.length
}

/// Adds a range to `covered`, joined with its neighbours; an error if a part of it is there or there are too many.
fn cover(covered: &mut Vec<Range<u64>>, at: u64, len: u64) -> std::io::Result<()> {
    let end = at.checked_add(len).ok_or_else(|| nonsense("a chunk outside its request"))?;
    if len == 0 {
        return Ok(());
    }
    let index = covered.partition_point(|range| range.end <= at);
    if covered.get(index).is_some_and(|next| next.start < end) {
        return Err(nonsense("a part of a read came twice"));
    }
    let before = index.checked_sub(1).filter(|before| covered[*before].end == at);
    let after = covered.get(index).is_some_and(|next| next.start == end);
    match (before, after) {
        (Some(before), true) => covered[before].end = covered.remove(index).end,
        (Some(before), false) => covered[before].end = end,
        (None, true) => covered[index].start = at,
        (None, false) if covered.len() < MOST_PARTS => covered.insert(index, at..end),
        (None, false) => return Err(nonsense("a read in too many parts")),
    }
    Ok(())
}

/// Where `len` bytes at the offset `at` of a read belong.
fn part(request: &Request, into: Option<&Iov>, at: u64, len: u64) -> std::io::Result<Iov> {
    if len == 0 {
        return Err(nonsense("a chunk of nothing"));
    }
    let start = at.checked_sub(request.offset);
    let inside = start.filter(|start| start.checked_add(len).is_some_and(|end| end <= request.length));
    let (Some(start), Some(into)) = (inside, into) else {
        return Err(nonsense("a chunk outside its request"));
    };
    let index = |number| usize::try_from(number).map_err(std::io::Error::other);
    Ok(into.slice(index(start)?, index(len)?))
}

impl Input {
    /// Receives more behind what is there.
    async fn more(&mut self, stream: &Stream) -> std::io::Result<()> {
        if self.have.is_empty() {
            self.have = 0..0;
        } else if self.have.end == self.buffer.len() {
            self.buffer.copy_within(self.have.clone(), 0);
            self.have = 0..self.have.len();
        }
        let got = stream.recv(&mut self.buffer[self.have.end..]).await?;
        if got == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        self.have.end += got;
        Ok(())
    }

    async fn take_bytes(&mut self, stream: &Stream, into: &mut [u8]) -> std::io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            if self.have.is_empty() {
                self.more(stream).await?;
            }
            let count = self.have.len().min(into.len() - done);
            into[done..done + count].copy_from_slice(&self.buffer[self.have.start..self.have.start + count]);
            self.have.start += count;
            done += count;
        }
        Ok(())
    }

    /// Fills `into`: with what is here, and the rest without a copy.
    async fn take(&mut self, stream: &Stream, into: &Iov) -> std::io::Result<()> {
        let here = self.have.len().min(into.len());
        into.write_at(0, &self.buffer[self.have.start..self.have.start + here]);
        self.have.start += here;
        if here == into.len() {
            return Ok(());
        }
        stream.recv_exact_iov(&into.slice(here, into.len() - here)).await
    }
}

/// Waits for `told` or for the output of `other`, which loses nothing when it is dropped.
pub(super) async fn either<T>(
    mut told: Pin<&mut impl Future<Output = ()>>,
    mut other: Pin<&mut impl Future<Output = T>>,
) -> Option<T> {
    std::future::poll_fn(|cx| {
        if told.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        other.as_mut().poll(cx).map(Some)
    })
    .await
}

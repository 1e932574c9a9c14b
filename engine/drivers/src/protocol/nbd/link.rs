//! A connection that is made anew when it is lost.
//!
//! With `reconnect-delay`, requests that were on their way when the connection was lost, and those that come meanwhile,
//! wait for so long and are then made (again): all of NBD's requests may be done twice. Without it they fail. Either
//! way a later request tries to connect again.
//!
//! The server that is found again may be another process, which does not have what the first one had not flushed.
//! Within the `reconnect-delay` all of that is done once more before anything else ([`super::unflushed`]). Where that
//! is not possible, no flush succeeds any more, until somebody undertakes to write all of it once more
//! ([`Link::forgive`]).
//!
//! A server that says that its connections are all the same (`CAN_MULTI_CONN`: a flush on one is for all) gets one for
//! each thread that asks for anything, up to [`MOST_CONNECTIONS`]. They are made in the background, and the first is
//! used until then. A server may say so and yet take no more: then it stays with the first. When a further one is lost
//! its requests go to the first.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use underlay_graph::{IoError, Result};
use underlay_nbd::flags::{CAN_MULTI_CONN, SEND_FLUSH};
use underlay_nbd::transmission::command::{FLUSH, READ, TRIM, WRITE, WRITE_ZEROES};
use underlay_nbd::{Descriptor, Negotiated};
use underlay_sys::{Iov, rt};

use super::connection::{Ask, Connection, Failure, Refusal, either};
use super::spec::NbdSpec;
use super::unflushed::{Begun, Unflushed};

/// How often it is tried to connect while somebody waits.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a server may take to agree on anything when nobody waits for longer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Why a flush fails after the server was lost.
const LOST: &str = "The server was lost for a while, and may not have kept what it had not flushed";
/// Without anybody's waiting: requests that come sooner than this after a failed attempt fail at once.
const REST: Duration = Duration::from_secs(1);

/// The largest disk, in bytes. QEMU's.
const LARGEST: u64 = (i64::MAX as u64) & !((1 << 30) - 1);

#[derive(Debug, Default)]
struct State {
    connection: Option<Arc<Connection>>,
    /// The next one, while the server gets what it may have lost.
    next: Option<Arc<Connection>>,
    /// When the connection was found lost; none if nobody wants to wait for another one.
    lost: Option<Duration>,
    /// When it was last tried to connect, in vain.
    tried: Option<Duration>,
}

/// Most connections to one server.
const MOST_CONNECTIONS: usize = 4;

/// The connections beside the first one.
#[derive(Debug, Default)]
struct Further {
    /// The threads that have asked for something, in the order of their first requests.
    threads: Vec<usize>,
    /// Each one's own connection, if it is there. The first thread has the first connection.
    own: [Option<Arc<Connection>>; MOST_CONNECTIONS],
    /// How often they were all given up, together with the first one. Who makes one now and then is too late.
    lost: u64,
    /// None, for now or for ever.
    closed: bool,
}

impl Further {
    /// Which connection is for the thread `number`, and whether it is the first to want it.
    fn place(&mut self, number: usize) -> (usize, bool) {
        match self.threads.iter().position(|thread| *thread == number) {
            Some(place) => (place, false),
            None if self.threads.len() < MOST_CONNECTIONS => {
                self.threads.push(number);
                (self.threads.len() - 1, true)
            }
            // There are more threads than connections.
            None => (number % MOST_CONNECTIONS, false),
        }
    }

    fn take_all(&mut self) -> impl Iterator<Item = Arc<Connection>> + use<> {
        (self.closed, self.lost) = (true, self.lost + 1);
        std::mem::take(&mut self.own).into_iter().flatten()
    }

    /// The first one is there again.
    fn begin_again(&mut self) {
        self.closed = false;
        self.threads.clear();
    }
}

/// The number of the thread that asks.
fn thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: usize = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    NUMBER.with(|number| *number)
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Link {
    spec: NbdSpec,
    granted: Negotiated,
    state: Mutex<State>,
    further: Arc<Mutex<Further>>,
    /// Without the data if there is no `reconnect-delay`: when the server comes back is up to chance then, and others
    /// may have written to it.
    unflushed: Unflushed,
    doubts: AtomicU64,
    /// The doubts that do not matter any more.
    forgiven: AtomicU64,
    /// No server will be asked for anything any more.
    given_up: AtomicBool,
    /// Nobody waits for a server any more, for now or for ever.
    hurry: Notify,
    /// One attempt at a time.
    attempt: tokio::sync::Mutex<()>,
}

async fn connect(spec: &NbdSpec, deadline: Option<Duration>) -> std::result::Result<Connection, Refusal> {
    let context = spec.context.as_deref().unwrap_or("base:allocation");
    Connection::open(&spec.server, &spec.export, vec![context.to_owned()], deadline).await
}

fn refused(spec: &NbdSpec, refusal: Refusal) -> IoError {
    match refusal {
        Refusal::Io(error)
            if error.kind() == std::io::ErrorKind::TimedOut && !spec.open_timeout.is_zero() =>
        {
            IoError::EIO.with("Connection attempt cancelled by timeout")
        }
        Refusal::Io(error) => match spec.server.misunderstood(&error) {
            Some(text) => IoError::EINVAL.with(text),
            None => IoError::from(error).context(format!("Failed to connect to '{}'", spec.server)),
        },
        Refusal::Silent => IoError::EINVAL.with("broken server omitted NBD_INFO_EXPORT"),
        Refusal::Server(text) => {
            IoError::EINVAL.with_hint("Requested export not available", format!("server reported: {text}"))
        }
    }
}

/// Whether a server grants what it did at first: requests are cut and asked for by that.
fn same(now: &Negotiated, then: &Negotiated) -> bool {
    (now.size, now.minimum_block, now.maximum_block, now.flags)
        == (then.size, then.minimum_block, then.maximum_block, then.flags)
        && now.framing == then.framing
        && now.contexts.is_empty() == then.contexts.is_empty()
}

/// Whether the server is there that this connection was made to.
async fn answers(connection: &Connection) -> bool {
    let length = u64::from(connection.granted().minimum_block.max(1));
    let into = Some(Iov::zeroed(usize::try_from(length).unwrap_or_default()));
    let read = connection.ask(Ask { command: READ, length, into, ..Ask::default() }).await;
    !matches!(read, Err(Failure::Lost))
}

fn lock(further: &Mutex<Further>) -> MutexGuard<'_, Further> {
    further.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    /// Connects for the first time, for up to `open-timeout`; 0: one attempt, for as long as it takes.
    pub(crate) async fn open(spec: NbdSpec) -> Result<Self> {
        let until = rt::now() + spec.open_timeout;
        let deadline = (!spec.open_timeout.is_zero()).then_some(until);
        let connection = loop {
            match connect(&spec, deadline).await {
                Ok(connection) => break connection,
                Err(Refusal::Io(_)) if rt::now() < until => rt::sleep(PAUSE).await,
                Err(refusal) => return Err(refused(&spec, refusal)),
            }
        };
        let granted = connection.granted().clone();
        if granted.size > LARGEST {
            return Err(IoError::EFBIG.with("Could not refresh total sector count: File too large"));
        }
        if let Some(context) = spec.context.as_ref().filter(|_| granted.contexts.is_empty()) {
            let text = format!("The server has no '{context}' for this export (option 'x-dirty-bitmap')");
            return Err(IoError::EINVAL.with(text));
        }
        let state = State { connection: Some(Arc::new(connection)), ..State::default() };
        let (state, attempt, further) = (Mutex::new(state), tokio::sync::Mutex::default(), Arc::default());
        let unflushed = Unflushed::new(!spec.reconnect_delay.is_zero());
        let (doubts, forgiven, given_up, hurry) = Default::default();
        Ok(Self { spec, granted, state, further, unflushed, doubts, forgiven, given_up, hurry, attempt })
    }

    /// Makes the connection for this place, while the first one is in use.
    fn connect_further(&self, place: usize, lost: u64) {
        let Some(first) = self.state().connection.clone() else { return };
        let (spec, granted, further) = (self.spec.clone(), self.granted.clone(), self.further.clone());
        rt::spawn(async move {
            let made = connect(&spec, Some(rt::now() + PATIENCE)).await;
            let Some(made) = made.ok().filter(|made| same(made.granted(), &granted)) else { return };
            let made = Arc::new(made);
            // It may have reached a new server before anybody noticed that the first one has gone, which had what was
            // written before. An answer by the first connection shows that it has not.
            let is_same_server = answers(&first).await;
            let taken = {
                let mut further = lock(&further);
                let taken = is_same_server && !further.closed && further.lost == lost;
                if taken {
                    further.own[place] = Some(made.clone());
                }
                taken
            };
            if !taken {
                made.disconnect().await;
            }
        });
    }

    /// This thread's own connection, if it is there and not the first.
    pub(super) fn own(&self) -> Option<Arc<Connection>> {
        if self.granted.flags & CAN_MULTI_CONN == 0 {
            return None;
        }
        let mut further = lock(&self.further);
        if further.closed {
            return None;
        }
        let (place, is_new) = further.place(thread_number());
        let own = &mut further.own[place];
        own.take_if(|connection| connection.is_dead());
        let (own, lost) = (own.clone(), further.lost);
        drop(further);
        if is_new && place > 0 {
            self.connect_further(place, lost);
        }
        own
    }

    /// What was agreed on at first; a server that comes back must say the same.
    pub(crate) fn granted(&self) -> &Negotiated {
        &self.granted
    }

    pub(crate) fn spec(&self) -> &NbdSpec {
        &self.spec
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often the server was found again, and may lack something that was acknowledged.
    pub(crate) fn doubts(&self) -> u64 {
        self.doubts.load(Ordering::SeqCst)
    }

    /// What was lost does not matter: it will be written once more.
    pub(crate) fn forgive(&self) {
        self.forgiven.store(self.doubts(), Ordering::SeqCst);
    }

    /// The server has lost something.
    fn doubt(&self) {
        self.doubts.fetch_add(1, Ordering::SeqCst);
        tracing::error!(server = %self.spec.server, "{LOST}");
    }

    fn check_doubts(&self) -> Result<()> {
        match self.forgiven.load(Ordering::SeqCst) == self.doubts() {
            true => Ok(()),
            false => Err(IoError::EIO.with(LOST)),
        }
    }

    /// Makes what was written durable; an error if some of it may be lost.
    pub(crate) async fn flush(&self) -> Result<()> {
        self.check_doubts()?;
        let moment = self.unflushed.flush_begins();
        // A server that cannot be asked for it keeps everything at once.
        if self.granted.flags & SEND_FLUSH != 0 {
            // The first connection answers for all, or is lost with the server that had what was written before. A
            // further one may have been made to another server since.
            self.ask_on(true, || Ask { command: FLUSH, ..Ask::default() }, None).await?;
        }
        // It may have been lost and found in this very request.
        self.check_doubts()?;
        self.unflushed.flushed(moment);
        Ok(())
    }

    /// Makes a request other than a flush, again if need be.
    pub(crate) async fn ask(&self, ask: impl Fn() -> Ask) -> Result<Vec<Descriptor>> {
        let first = ask();
        let is_write = matches!(first.command, WRITE | WRITE_ZEROES | TRIM);
        let begun = is_write.then(|| self.unflushed.begin(&first));
        let result = self.ask_on(false, ask, begun.as_ref()).await?;
        if begun.is_some_and(|begun| !begun.done()) {
            self.doubt();
        }
        Ok(result)
    }

    async fn ask_on(
        &self,
        on_first: bool,
        ask: impl Fn() -> Ask,
        begun: Option<&Begun<'_>>,
    ) -> Result<Vec<Descriptor>> {
        loop {
            let own = if on_first { None } else { self.own() };
            let is_own = own.is_some();
            let connection = match own {
                Some(own) => own,
                None => self.connection().await?,
            };
            if self.is_given_up() {
                return Err(IoError::EIO);
            }
            begun.into_iter().for_each(Begun::made);
            match connection.ask(ask()).await {
                Ok(descriptors) => return Ok(descriptors),
                Err(Failure::Server(error)) => return Err(IoError::new(error.to_linux())),
                Err(Failure::Lost) if self.is_given_up() => return Err(IoError::EIO),
                Err(Failure::Lost) if !is_own && self.spec.reconnect_delay.is_zero() => {
                    return Err(IoError::EIO);
                }
                Err(Failure::Lost) => {}
            }
        }
    }

    fn living(&self) -> Option<Arc<Connection>> {
        let mut state = self.state();
        if let Some(connection) = state.connection.as_ref().filter(|connection| !connection.is_dead()) {
            return Some(connection.clone());
        }
        if state.connection.take().is_some() {
            state.lost = Some(rt::now());
            // Nothing gets to the server before what it may have lost.
            lock(&self.further).take_all().for_each(|connection| connection.hang_up());
        }
        None
    }

    /// The connection, made anew if it was lost.
    async fn connection(&self) -> Result<Arc<Connection>> {
        if let Some(connection) = self.living() {
            return Ok(connection);
        }
        let _turn = self.attempt.lock().await;
        loop {
            if let Some(connection) = self.living() {
                return Ok(connection);
            }
            if self.is_given_up() {
                return Err(IoError::EIO);
            }
            let (until, tried) = (self.waits_until(), self.state().tried);
            if until.is_none() && tried.is_some_and(|tried| rt::now() < tried + REST) {
                return Err(IoError::EIO);
            }
            if let Some(connection) = self.try_again(until).await {
                return Ok(connection);
            }
            if until.is_none() {
                return Err(IoError::EIO);
            }
            rt::sleep(PAUSE).await;
        }
    }

    /// One attempt; `until`: somebody waits until then.
    async fn try_again(&self, until: Option<Duration>) -> Option<Arc<Connection>> {
        let made = self.connect_or_hurry(until).await;
        let mut made = made.filter(|made| same(made.granted(), &self.granted)).map(Arc::new);
        if let Some(connection) = made.clone() {
            self.state().next = Some(connection.clone());
            if self.is_given_up() || !self.restore(&connection, until.is_some()).await {
                made = None;
            }
        }
        let mut state = self.state();
        match &made {
            Some(connection) => {
                *state = State { connection: Some(connection.clone()), ..State::default() };
                if !self.is_given_up() {
                    lock(&self.further).begin_again();
                }
            }
            None => (state.tried, state.next) = (Some(rt::now()), None),
        }
        made
    }

    /// None too if somebody is in a hurry meanwhile. `until`: as for [`Self::try_again`].
    async fn connect_or_hurry(&self, until: Option<Duration>) -> Option<Connection> {
        let mut hurry = pin!(self.hurry.notified());
        hurry.as_mut().enable();
        // As long as it was not noticed.
        if self.is_given_up() || until.is_some() && self.waits_until().is_none() {
            return None;
        }
        let connected = connect(&self.spec, Some(until.unwrap_or_else(|| rt::now() + PATIENCE)));
        either(hurry, pin!(connected)).await?.ok()
    }

    /// How long requests wait for the server, if they do.
    fn waits_until(&self) -> Option<Duration> {
        let until = self.state().lost? + self.spec.reconnect_delay;
        (rt::now() < until).then_some(until)
    }

    /// Does once more, on a new connection, what the server may have lost, or notes that it has; whether the connection
    /// is still there.
    async fn restore(&self, connection: &Connection, in_time: bool) -> bool {
        let asks = if in_time { self.unflushed.again() } else { None };
        let mut is_restored = asks.is_some();
        for (number, ask) in asks.into_iter().flatten() {
            let command = ask.command;
            match connection.ask(ask).await {
                Err(Failure::Lost) => return false,
                // Nobody relies on a discard, nor on what was not acknowledged: who asked for that will ask again.
                Err(Failure::Server(error)) if self.unflushed.refused(number) && command != TRIM => {
                    tracing::error!(server = %self.spec.server, ?error, "the server does not take again what it may have lost");
                    is_restored = false;
                }
                _ => {}
            }
        }
        if !is_restored && self.unflushed.lost() {
            self.doubt();
        }
        true
    }

    /// Whether nobody waits for the server any more, or it has lost something.
    pub(crate) fn is_lost(&self) -> bool {
        if self.check_doubts().is_err() {
            return true;
        }
        if self.living().is_some() {
            return false;
        }
        self.is_given_up() || self.waits_until().is_none()
    }

    /// Fails what waits for a server that is not there now.
    pub(crate) fn stop_waiting(&self) {
        if self.living().is_none() {
            let next = {
                let mut state = self.state();
                state.lost = None;
                state.next.clone()
            };
            next.into_iter().for_each(|connection| connection.hang_up());
            self.hurry.notify_waiters();
        }
    }

    pub(crate) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::SeqCst)
    }

    /// Fails all requests, now and later.
    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
        let further = lock(&self.further).take_all();
        let (first, next) = {
            let state = self.state();
            (state.connection.clone(), state.next.clone())
        };
        further.chain(first).chain(next).for_each(|connection| connection.hang_up());
        self.hurry.notify_waiters();
    }

    /// Says goodbye.
    pub(crate) async fn close(&self) {
        let further = lock(&self.further).take_all();
        for connection in further {
            connection.disconnect().await;
        }
        let connection = self.state().connection.take();
        if let Some(connection) = connection {
            connection.disconnect().await;
        }
    }
}

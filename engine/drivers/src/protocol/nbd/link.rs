//! A connection that is made anew when it is lost.
//!
//! With `reconnect-delay`, requests that were on their way when the connection was lost, and those that come meanwhile, wait
//! for so long and are then made (again): all of NBD's requests may be done twice. Without it they fail. Either way a
//! later request tries to connect again.
//!
//! A server that says that its connections are all the same (`CAN_MULTI_CONN`: a flush on one is for all) gets one for each
//! thread that asks for anything, up to [`MOST_CONNECTIONS`]. They are made in the background, and the first is used until then. A
//! server may say so and yet take no more: then it stays with the first. When a further one is lost its requests go to the first.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use underlay_graph::{IoError, Result};
use underlay_nbd::flags::CAN_MULTI_CONN;
use underlay_nbd::transmission::command::{FLUSH, TRIM, WRITE, WRITE_ZEROES};
use underlay_nbd::{Descriptor, Negotiated};
use underlay_sys::rt;

use super::connection::{Ask, Connection, Failure, Refusal};
use super::spec::NbdSpec;

/// How often it is tried to connect while somebody waits.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a server may take to agree on anything when nobody waits for longer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Without anybody's waiting: requests that come sooner than this after a failed attempt fail at once.
const REST: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct State {
    connection: Option<Arc<Connection>>,
    /// When the connection was found lost.
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
    /// No more of them.
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
        self.closed = true;
        std::mem::take(&mut self.own).into_iter().flatten()
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
    /// Begun and acknowledged writes so far, and how many of them are known to be durable.
    written: AtomicU64,
    durable: AtomicU64,
    doubts: AtomicU64,
    /// No server will be asked for anything any more.
    given_up: AtomicBool,
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
        if let Some(context) = spec.context.as_ref().filter(|_| granted.contexts.is_empty()) {
            let text = format!("The server has no '{context}' for this export (option 'x-dirty-bitmap')");
            return Err(IoError::EINVAL.with(text));
        }
        let state = State { connection: Some(Arc::new(connection)), ..State::default() };
        let (state, attempt, further) = (Mutex::new(state), tokio::sync::Mutex::default(), Arc::default());
        let (written, durable, doubts, given_up) = Default::default();
        Ok(Self { spec, granted, state, further, written, durable, doubts, given_up, attempt })
    }

    /// Makes the connection for this place, while the first one is in use.
    fn connect_further(&self, place: usize) {
        let (spec, granted, further) = (self.spec.clone(), self.granted.clone(), self.further.clone());
        rt::spawn(async move {
            let made = connect(&spec, Some(rt::now() + PATIENCE)).await;
            let Some(made) = made.ok().filter(|made| same(made.granted(), &granted)) else { return };
            let made = Arc::new(made);
            let closed = {
                let mut further = lock(&further);
                if !further.closed {
                    further.own[place] = Some(made.clone());
                }
                further.closed
            };
            if closed {
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
        let (place, is_new) = further.place(thread_number());
        if is_new && place > 0 && !further.closed {
            self.connect_further(place);
        }
        let own = &mut further.own[place];
        own.take_if(|connection| connection.is_dead());
        own.clone()
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

    /// How often the server was found again with something unflushed: it may be another process, which does not have it.
    pub(crate) fn doubts(&self) -> u64 {
        self.doubts.load(Ordering::SeqCst)
    }

    /// Makes a request, again if need be.
    pub(crate) async fn ask(&self, ask: impl Fn() -> Ask) -> Result<Vec<Descriptor>> {
        let command = ask().command;
        let is_write = matches!(command, WRITE | WRITE_ZEROES | TRIM);
        // Counted twice: a flush that comes between the two need not be for it, and a server that is lost there has it.
        if is_write {
            self.written.fetch_add(1, Ordering::SeqCst);
        }
        let until_now = self.written.load(Ordering::SeqCst);
        // The first connection answers for all, or is lost with the server that had what was written before. A further one may have been
        // made to another server since.
        let result = self.ask_on(command == FLUSH, ask).await;
        if is_write {
            self.written.fetch_add(1, Ordering::SeqCst);
        }
        if command == FLUSH && result.is_ok() {
            self.durable.fetch_max(until_now, Ordering::SeqCst);
        }
        result
    }

    async fn ask_on(&self, on_first: bool, ask: impl Fn() -> Ask) -> Result<Vec<Descriptor>> {
        loop {
            let own = if on_first { None } else { self.own() };
            let is_own = own.is_some();
            let connection = match own {
                Some(own) => own,
                None => self.connection().await?,
            };
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
            let (lost, tried) = {
                let state = self.state();
                (state.lost.unwrap_or_default(), state.tried)
            };
            let until = lost + self.spec.reconnect_delay;
            if self.is_given_up() {
                return Err(IoError::EIO);
            }
            let waits = rt::now() < until;
            if !waits && tried.is_some_and(|tried| rt::now() < tried + REST) {
                return Err(IoError::EIO);
            }
            if let Some(connection) =
                self.try_again(Some(if waits { until } else { rt::now() + PATIENCE })).await
            {
                return Ok(connection);
            }
            if !waits {
                return Err(IoError::EIO);
            }
            rt::sleep(PAUSE).await;
        }
    }

    async fn try_again(&self, deadline: Option<Duration>) -> Option<Arc<Connection>> {
        let made = connect(&self.spec, deadline).await.ok();
        let made = made.filter(|made| same(made.granted(), &self.granted)).map(Arc::new);
        let mut state = self.state();
        match &made {
            Some(connection) => {
                let written = self.written.load(Ordering::SeqCst);
                if self.durable.fetch_max(written, Ordering::SeqCst) < written {
                    self.doubts.fetch_add(1, Ordering::SeqCst);
                }
                *state = State { connection: Some(connection.clone()), ..State::default() };
            }
            None => state.tried = Some(rt::now()),
        }
        made
    }

    /// Whether nobody waits for the server any more.
    pub(crate) fn is_lost(&self) -> bool {
        if self.living().is_some() {
            return false;
        }
        let lost = self.state().lost.unwrap_or_default();
        self.is_given_up() || rt::now() >= lost + self.spec.reconnect_delay
    }

    pub(crate) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::SeqCst)
    }

    /// Fails all requests, now and later.
    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
        let further = lock(&self.further).take_all();
        let first = self.state().connection.clone();
        further.chain(first).for_each(|connection| connection.hang_up());
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

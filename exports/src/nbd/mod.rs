//! The NBD server: listens, keeps the exports by name, and spreads connections over the I/O threads.
//!
//! ```text
//!   Listener ─ accept ─► connection (one task, one thread)
//!                          │  handshake: asks `Exports`
//!                          │  receive ─► request ─► Root     (polled at once; a task of its own if it must wait)
//!                          ▼                  │
//!                        Outbox ◄─ replies ───┘   one writev for many
//! ```
//!
//! A connection that fails, in whatever way, takes nothing with it but itself; what it had under way runs to its
//! end.

mod connection;
mod export;
mod outbox;
mod request;
mod shown;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use underlay_sys::net::{Address, Listener, Stream};
use underlay_sys::rt::StopSign;
use underlay_sys::thread::Spawner;

pub use export::{ExportState, Gone, NbdExport};
pub use shown::{NamedBits, Shown, ShownBitmaps};

use export::Exports;

use crate::ExportError;
use crate::listen::cannot_listen;

/// How a server treats its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerOptions {
    /// Clients at a time, others wait to be accepted; 0 for no limit. With 1, exports do not invite several.
    pub max_connections: u32,
    /// A client that has not chosen an export by then is dropped; zero for no limit.
    pub handshake_timeout: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { max_connections: 100, handshake_timeout: Duration::from_secs(10) }
    }
}

/// What all connections of a server share.
#[derive(Debug)]
pub(crate) struct Shared {
    options: ServerOptions,
    exports: Exports,
    /// Raised once the first exports are all there, if they come one by one.
    complete: Option<StopSign>,
    stop: StopSign,
    connections: Mutex<Vec<Arc<Handle>>>,
    /// A client that had chosen an export has left, and nobody else was connected.
    deserted: StopSign,
    /// Every connection holds one of [`ALL`] places; the server has stopped when it can have them all.
    places: Arc<Semaphore>,
}

/// More connections than descriptors exist.
const ALL: u32 = 1 << 28;

/// A connection as others see it: something to be closed.
#[derive(Debug)]
pub(crate) struct Handle {
    stream: Arc<Stream>,
    /// The client has chosen an export.
    chosen: StopSign,
}

impl Handle {
    /// Ends both directions: the connection's task notices and winds up.
    fn close(&self) {
        self.stream.shutdown();
    }
}

/// A running server. Dropping it closes it, but only [`NbdServer::stop`] waits for the end.
#[derive(Debug)]
pub struct NbdServer {
    shared: Arc<Shared>,
    address: String,
}

impl NbdServer {
    /// Listens on `address`. Connections go to the threads of `io` in turn; the first one also accepts.
    pub fn start(address: &Address, options: ServerOptions, io: Vec<Spawner>) -> Result<Self, ExportError> {
        Self::launch(listen(address)?, options, io, Vec::new(), None)
    }

    /// The same before all exports are there: who asks for one that is not waits until `complete` is raised.
    pub fn start_early(
        address: &Address,
        options: ServerOptions,
        io: Vec<Spawner>,
        complete: StopSign,
    ) -> Result<Self, ExportError> {
        Self::launch(listen(address)?, options, io, Vec::new(), Some(complete))
    }

    /// The same on a listener that is there, with exports that the first client finds already.
    pub fn serve(
        listener: Listener,
        options: ServerOptions,
        io: Vec<Spawner>,
        exports: Vec<NbdExport>,
    ) -> Result<Self, ExportError> {
        Self::launch(listener, options, io, exports, None)
    }

    fn launch(
        listener: Listener,
        options: ServerOptions,
        io: Vec<Spawner>,
        exports: Vec<NbdExport>,
        complete: Option<StopSign>,
    ) -> Result<Self, ExportError> {
        let first = io.first().cloned().ok_or(ExportError::NoThread)?;
        let address = listener.local_address();
        let shared = Arc::new(Shared {
            options,
            exports: Exports::default(),
            complete,
            stop: StopSign::default(),
            connections: Mutex::default(),
            deserted: StopSign::default(),
            places: Arc::new(Semaphore::new(usize::try_from(ALL).unwrap_or(Semaphore::MAX_PERMITS))),
        });
        for export in exports {
            shared.exports.add(export)?;
        }
        // Taken here and not by the task: who stops the server at once must wait for it too.
        let place = shared.places.clone().try_acquire_owned().map_err(|_| ExportError::NoThread)?;
        first.spawn(accept(shared.clone(), listener, io, place));
        Ok(Self { shared, address })
    }

    /// Where it listens, with the port that the system chose.
    pub fn local_address(&self) -> &str {
        &self.address
    }

    /// Offers an export to clients that connect from now on.
    pub fn add(&self, export: NbdExport) -> Result<(), ExportError> {
        self.shared.exports.add(export)
    }

    /// Takes an export away: new clients do not find it from now on, and [`Gone::wait`] waits for the old ones.
    /// Unless `hard`, this fails while a client is connected to it; with `hard` its clients are disconnected.
    pub fn remove(&self, name: &str, hard: bool) -> Result<Gone, ExportError> {
        self.shared.exports.remove(name, hard)
    }

    /// The exports, in the order in which they were added.
    pub fn exports(&self) -> Vec<ExportState> {
        self.shared.exports.states()
    }

    /// How many clients are connected, whether or not they have chosen an export.
    pub fn connections(&self) -> usize {
        self.shared.lock().len()
    }

    /// Waits until a client that had chosen an export has left as the last one that was connected. Clients that only
    /// look do not count.
    pub async fn deserted(&self) {
        self.shared.deserted.raised().await;
    }

    /// Drops all clients and exports and waits until everything that was under way has ended and the address is
    /// free.
    pub async fn stop(&self) {
        self.shared.close();
        // The acceptor and every connection give their place back at their very end.
        let all = self.shared.places.acquire_many(ALL).await;
        drop(all);
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Handle>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the first exports are there, or never will be.
    async fn complete(&self) {
        if let Some(complete) = &self.complete {
            until_stopped(&self.stop, complete.raised()).await;
        }
    }

    /// An export; one that is not there may be about to come.
    async fn find(&self, name: &str) -> Option<Arc<export::Entry>> {
        let found = self.exports.find(name);
        if found.is_some() {
            return found;
        }
        self.complete().await;
        self.exports.find(name)
    }

    fn close(&self) {
        self.stop.raise();
        self.exports.close();
        for connection in self.lock().iter() {
            connection.close();
        }
    }

    /// Enters a connection in the list; false when the server has stopped meanwhile.
    fn enter(&self, handle: &Arc<Handle>) -> bool {
        let mut connections = self.lock();
        if self.stop.is_raised() {
            return false;
        }
        connections.push(handle.clone());
        true
    }

    fn leave(&self, handle: &Arc<Handle>) {
        let mut connections = self.lock();
        connections.retain(|other| !Arc::ptr_eq(other, handle));
        if connections.is_empty() && handle.chosen.is_raised() {
            self.deserted.raise();
        }
    }
}

fn listen(address: &Address) -> Result<Listener, ExportError> {
    Listener::bind(address).map_err(|error| ExportError::Listen(cannot_listen(address, &error)))
}

/// Accepts clients until the server stops.
async fn accept(shared: Arc<Shared>, listener: Listener, io: Vec<Spawner>, place: OwnedSemaphorePermit) {
    let limit = match shared.options.max_connections {
        0 => Semaphore::MAX_PERMITS,
        limit => usize::try_from(limit).unwrap_or(Semaphore::MAX_PERMITS),
    };
    let clients = Arc::new(Semaphore::new(limit));
    let next = AtomicUsize::new(0);
    while let Some(permit) = until_stopped(&shared.stop, clients.clone().acquire_owned()).await {
        let Ok(permit) = permit else { break };
        match until_stopped(&shared.stop, listener.accept()).await {
            None => break,
            Some(Ok(stream)) => {
                let thread = &io[next.fetch_add(1, Ordering::Relaxed) % io.len()];
                welcome(&shared, stream, permit, thread);
            }
            Some(Err(error)) => {
                // Out of descriptors, or a client that was gone at once: others may have more luck later.
                tracing::warn!(%error, "cannot accept an NBD client");
                until_stopped(&shared.stop, underlay_sys::rt::sleep(Duration::from_millis(100))).await;
            }
        }
    }
    drop(listener);
    drop(place);
}

fn welcome(shared: &Arc<Shared>, stream: Stream, permit: OwnedSemaphorePermit, thread: &Spawner) {
    let handle = Arc::new(Handle { stream: Arc::new(stream), chosen: StopSign::default() });
    let Ok(place) = shared.places.clone().try_acquire_owned() else { return };
    if !shared.enter(&handle) {
        return;
    }
    let shared = shared.clone();
    thread.spawn(async move {
        connection::serve(&shared, &handle).await;
        handle.close();
        shared.leave(&handle);
        drop((permit, place));
    });
}

/// What `future` gives, or `None` if the sign is raised first. Only for futures that may be dropped midway: those
/// that wait without having begun anything.
async fn until_stopped<F: Future>(stop: &StopSign, future: F) -> Option<F::Output> {
    let mut stopped = std::pin::pin!(stop.raised());
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|cx| {
        if stopped.as_mut().poll(cx).is_ready() {
            return std::task::Poll::Ready(None);
        }
        future.as_mut().poll(cx).map(Some)
    })
    .await
}

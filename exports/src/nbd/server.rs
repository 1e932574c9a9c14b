//! The owner of exports and connections.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::Notify;
use underlay_sys::net::{Address, Listener, Stream};
use underlay_sys::rt::{self, StopSign};
use underlay_sys::thread::Spawner;

use super::connection;
use super::export::{Gone, NbdExport, Served};
use crate::ExportError;

/// How long the server lets the system recover when a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How the server treats its clients.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Clients beyond this number wait to be accepted; 0 for no limit.
    pub max_connections: u32,
    /// Clients that have not chosen an export by then are dropped; zero for no limit.
    pub handshake_timeout: Duration,
}

impl Default for ServerOptions {
    /// QEMU's: 100 connections, 10 seconds.
    fn default() -> Self {
        Self { max_connections: 100, handshake_timeout: Duration::from_secs(10) }
    }
}

/// A running server. Dropping it disconnects all clients.
#[derive(Debug)]
pub struct NbdServer {
    shared: Arc<Shared>,
    address: String,
}

/// What the server and its connections have in common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) options: ServerOptions,
    state: Mutex<State>,
    /// A connection has ended.
    left: Notify,
    stopping: StopSign,
    /// Raised once the address is free again.
    stopped: StopSign,
}

#[derive(Debug, Default)]
struct State {
    exports: BTreeMap<String, Arc<Served>>,
    clients: HashMap<u64, Client>,
    next_client: u64,
}

#[derive(Debug)]
struct Client {
    stream: Arc<Stream>,
    export: Option<Arc<Served>>,
}

impl State {
    fn users<'a>(&'a self, export: &'a Arc<Served>) -> impl Iterator<Item = &'a Client> {
        let uses = move |client: &&Client| client.export.as_ref().is_some_and(|of| Arc::ptr_eq(of, export));
        self.clients.values().filter(uses)
    }

    /// Takes an export out; its clients are thrown out and it is gone once they have left.
    fn take_out(&mut self, name: &str) -> Option<Gone> {
        let served = self.exports.remove(name)?;
        let mut used = false;
        for client in self.users(&served) {
            client.stream.shutdown();
            used = true;
        }
        if !used {
            served.gone.raise();
        }
        Some(Gone { name: name.to_owned(), sign: served.gone.clone() })
    }

    fn stop(&mut self) -> Vec<Gone> {
        let names: Vec<String> = self.exports.keys().cloned().collect();
        let gone = names.iter().filter_map(|name| self.take_out(name)).collect();
        for client in self.clients.values() {
            client.stream.shutdown();
        }
        gone
    }
}

impl NbdServer {
    /// Listens on `address`. The accept loop runs on the first of `io`; connections take turns on all of them.
    pub fn start(address: &Address, options: ServerOptions, io: Vec<Spawner>) -> Result<Self, ExportError> {
        let first = io.first().cloned().ok_or(ExportError::NoThread)?;
        let listener = Listener::bind(address)
            .map_err(|error| ExportError::Listen { address: shown(address), error })?;
        let address = listener.local_address();
        let shared = Arc::new(Shared {
            options,
            state: Mutex::default(),
            left: Notify::new(),
            stopping: StopSign::default(),
            stopped: StopSign::default(),
        });
        first.spawn(accept(shared.clone(), listener, io));
        Ok(Self { shared, address })
    }

    /// Where it listens, with the port that the system chose.
    pub fn local_address(&self) -> &str {
        &self.address
    }

    /// Serves one more disk.
    pub fn add(&self, export: NbdExport) -> Result<(), ExportError> {
        export.check()?;
        let mut state = self.shared.state();
        if state.exports.contains_key(&export.name) {
            return Err(ExportError::NameInUse(export.name));
        }
        let name = export.name.clone();
        state.exports.insert(name, Arc::new(Served { export, gone: StopSign::default() }));
        Ok(())
    }

    /// Whether a client is connected to the export.
    pub fn is_in_use(&self, name: &str) -> bool {
        let state = self.shared.state();
        state.exports.get(name).is_some_and(|served| state.users(served).next().is_some())
    }

    /// Takes an export away. Unless `hard`, fails while a client is connected to it; with `hard` its clients are
    /// disconnected, and requests under way still run to their end ([`Gone::wait`]).
    pub fn remove(&self, name: &str, hard: bool) -> Result<Gone, ExportError> {
        let mut state = self.shared.state();
        let served = state.exports.get(name).ok_or_else(|| ExportError::NotFound(name.to_owned()))?;
        if !hard && state.users(served).next().is_some() {
            return Err(ExportError::StillInUse(served.export.id.clone()));
        }
        state.take_out(name).ok_or_else(|| ExportError::NotFound(name.to_owned()))
    }

    /// Stops listening, removes all exports the hard way, and returns once the address is free.
    pub async fn stop(&self) -> Vec<Gone> {
        let gone = self.shared.stop();
        self.shared.stopped.raised().await;
        gone
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) -> Vec<Gone> {
        // The sign first: whoever is accepted from now on is not admitted.
        self.stopping.raise();
        self.state().stop()
    }

    /// Names and descriptions.
    pub(super) fn list(&self) -> Vec<(String, String)> {
        let state = self.state();
        state.exports.values().map(|s| (s.export.name.clone(), s.export.description.clone())).collect()
    }

    pub(super) fn find(&self, name: &str) -> Option<Arc<Served>> {
        self.state().exports.get(name).cloned()
    }

    pub(super) fn multi(&self) -> bool {
        self.options.max_connections != 1
    }

    /// Makes a client a user of the export of this name, unless it has been removed meanwhile.
    pub(super) fn attach(&self, client: u64, name: &str) -> Option<Arc<Served>> {
        let mut state = self.state();
        let served = state.exports.get(name)?.clone();
        state.clients.get_mut(&client)?.export = Some(served.clone());
        Some(served)
    }

    fn admit(&self, stream: &Arc<Stream>) -> Option<u64> {
        let mut state = self.state();
        if self.stopping.is_raised() {
            return None;
        }
        let id = state.next_client;
        state.next_client += 1;
        state.clients.insert(id, Client { stream: stream.clone(), export: None });
        Some(id)
    }

    /// The client has no request under way any more.
    pub(super) fn leave(&self, client: u64) {
        let mut state = self.state();
        if let Some(Client { export: Some(served), .. }) = state.clients.remove(&client) {
            let removed = state.exports.get(&served.export.name).is_none_or(|now| !Arc::ptr_eq(now, &served));
            if removed && state.users(&served).next().is_none() {
                served.gone.raise();
            }
        }
        drop(state);
        self.left.notify_one();
    }

    fn is_full(&self) -> bool {
        let limit = self.options.max_connections;
        limit > 0 && u32::try_from(self.state().clients.len()).is_ok_and(|count| count >= limit)
    }
}

async fn accept(shared: Arc<Shared>, listener: Listener, io: Vec<Spawner>) {
    let stopping = shared.stopping.clone();
    let mut turn = io.iter().cycle();
    while !stopping.is_raised() {
        if shared.is_full() {
            unless(&stopping, shared.left.notified()).await;
            continue;
        }
        match unless(&stopping, listener.accept()).await {
            Some(Ok(stream)) => {
                let stream = Arc::new(stream);
                if let (Some(client), Some(thread)) = (shared.admit(&stream), turn.next()) {
                    thread.spawn(connection::serve(shared.clone(), client, stream));
                }
            }
            Some(Err(error)) => {
                tracing::warn!(%error, "could not accept an NBD connection");
                unless(&stopping, rt::sleep(ACCEPT_PAUSE)).await;
            }
            None => {}
        }
    }
    drop(listener);
    shared.stopped.raise();
}

/// Waits for `future`, or gives up when the sign is raised.
async fn unless<F: Future>(sign: &StopSign, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut raised = pin!(sign.raised());
    std::future::poll_fn(|cx| {
        if raised.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        future.as_mut().poll(cx).map(Some)
    })
    .await
}

fn shown(address: &Address) -> String {
    match address {
        Address::Unix(path) => path.display().to_string(),
        Address::Inet { host, port } => format!("{host}:{port}"),
        Address::Fd(fd) => format!("file descriptor {fd}"),
    }
}

//! A connection that is made anew when it is lost.
//!
//! With `reconnect-delay`, requests that were on their way when the connection was lost, and those that come meanwhile, wait
//! for so long and are then made (again): all of NBD's requests may be done twice. Without it they fail. Either way a
//! later request tries to connect again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use underlay_graph::{IoError, Result};
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

/// See the module.
#[derive(Debug)]
pub(crate) struct Link {
    spec: NbdSpec,
    granted: Negotiated,
    state: Mutex<State>,
    /// One attempt at a time.
    attempt: tokio::sync::Mutex<()>,
}

async fn connect(spec: &NbdSpec, deadline: Option<Duration>) -> std::result::Result<Connection, Refusal> {
    Connection::open(&spec.server, &spec.export, vec!["base:allocation".to_owned()], deadline).await
}

fn refused(spec: &NbdSpec, refusal: Refusal) -> IoError {
    match refusal {
        Refusal::Io(error)
            if error.kind() == std::io::ErrorKind::TimedOut && !spec.open_timeout.is_zero() =>
        {
            IoError::EIO.with("Connection attempt cancelled by timeout")
        }
        Refusal::Io(error) => {
            IoError::from(error).context(format!("Failed to connect to '{}'", spec.address()))
        }
        Refusal::Server(text) => {
            IoError::EINVAL.with_hint("Requested export not available", format!("server reported: {text}"))
        }
    }
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
        let state = State { connection: Some(Arc::new(connection)), ..State::default() };
        Ok(Self { spec, granted, state: Mutex::new(state), attempt: tokio::sync::Mutex::default() })
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

    /// Makes a request, again if need be.
    pub(crate) async fn ask(&self, ask: impl Fn() -> Ask) -> Result<Vec<Descriptor>> {
        loop {
            let connection = self.connection().await?;
            match connection.ask(ask()).await {
                Ok(descriptors) => return Ok(descriptors),
                Err(Failure::Server(error)) => return Err(IoError::new(error.to_linux())),
                Err(Failure::Lost) if self.spec.reconnect_delay.is_zero() => return Err(IoError::EIO),
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
        let same = |connection: &Connection| {
            let (now, then) = (connection.granted(), &self.granted);
            // Requests are cut and asked for by what was granted at first.
            (now.size, now.minimum_block, now.maximum_block, now.flags)
                == (then.size, then.minimum_block, then.maximum_block, then.flags)
                && now.framing == then.framing
                && now.contexts.is_empty() == then.contexts.is_empty()
        };
        let made = connect(&self.spec, deadline).await.ok().filter(same).map(Arc::new);
        let mut state = self.state();
        match &made {
            Some(connection) => {
                *state = State { connection: Some(connection.clone()), ..State::default() };
            }
            None => state.tried = Some(rt::now()),
        }
        made
    }

    /// Says goodbye.
    pub(crate) async fn close(&self) {
        let connection = self.state().connection.take();
        if let Some(connection) = connection {
            connection.disconnect().await;
        }
    }
}

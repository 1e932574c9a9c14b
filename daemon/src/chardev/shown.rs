//! What a character device is called by query-chardev: what it is, or where it leads and who is there.

use std::sync::{Mutex, MutexGuard, PoisonError};

use underlay_sys::net::Stream;

/// See the module.
#[derive(Debug)]
pub struct Shown {
    what: What,
    /// The other side, while it is there.
    now: Mutex<Option<String>>,
}

#[derive(Debug)]
enum What {
    Plain(String),
    /// Where, and whether others connect.
    Socket(String, bool),
}

impl Shown {
    /// What is there all the time.
    pub fn plain(text: impl Into<String>) -> Self {
        Self { what: What::Plain(text.into()), now: Mutex::default() }
    }

    /// A socket at that place: `unix:PATH`, `tcp:HOST:PORT`, `telnet:HOST:PORT`.
    pub fn socket(place: String, server: bool) -> Self {
        Self { what: What::Socket(place, server), now: Mutex::default() }
    }

    fn now(&self) -> MutexGuard<'_, Option<String>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody is there.
    pub fn connected(&self, stream: &Stream) {
        let What::Socket(place, server) = &self.what else { return };
        let server = if *server { ",server=on" } else { "" };
        let text = match place.split_once(':') {
            Some((kind @ ("tcp" | "telnet"), _)) => {
                format!("{kind}:{}{server} <-> {}", stream.own_address(), stream.peer_address())
            }
            // The name that the socket has: it may be another one than we have used.
            Some(("unix", path)) if !path.contains(",abstract=on") => {
                let whose = if server.is_empty() { stream.peer_address() } else { stream.own_address() };
                format!("unix:{whose}{server}")
            }
            _ => format!("{place}{server}"),
        };
        *self.now() = Some(text);
    }

    /// Nobody is there any more.
    pub fn gone(&self) {
        *self.now() = None;
    }

    /// The name.
    pub fn filename(&self) -> String {
        match (&self.what, &*self.now()) {
            (What::Plain(text), _) | (_, Some(text)) => text.clone(),
            (What::Socket(place, server), None) => {
                format!("disconnected:{place}{}", if *server { ",server=on" } else { "" })
            }
        }
    }
}

//! The connection: commands go out from any thread, a thread of its own hears what comes, hands replies to those who
//! wait for them and events to whom they concern.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use underlay_qmp::client::{Client, Failure, Heard, Reply};
use underlay_qmp::json::{Object, Value};

/// Where the server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    Unix(String),
    /// Host and port.
    Inet(String),
}

impl Address {
    /// `host:port` with a number for a port is an internet address, anything else a path.
    pub(crate) fn parse(text: &str) -> Self {
        let is_port = |port: &str| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        match text.rsplit_once(':') {
            Some((host, port)) if !host.contains('/') && is_port(port) => Self::Inet(text.to_owned()),
            _ => Self::Unix(text.to_owned()),
        }
    }
}

#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Inet(TcpStream),
}

impl Stream {
    fn connect(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => UnixStream::connect(path).map(Self::Unix),
            Address::Inet(name) => TcpStream::connect(name).map(Self::Inet),
        }
    }

    fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
            Self::Inet(stream) => stream.try_clone().map(Self::Inet),
        }
    }

    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(into),
            Self::Inet(stream) => stream.read(into),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.write_all(bytes),
            Self::Inet(stream) => stream.write_all(bytes),
        }
    }

    fn shutdown(&self) {
        // It may be gone already.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Inet(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

/// What is told to the one who made the link, on the thread that hears.
#[derive(Debug)]
pub(crate) enum Told<'a> {
    Event(&'a Object),
    /// The connection is over, and why.
    Over(&'a str),
}

#[derive(Debug, Default)]
struct State {
    client: Client,
    replies: VecDeque<Sender<(Reply, Sender<()>)>>,
    greeting: Option<Object>,
    over: Option<String>,
    log: Option<File>,
}

impl State {
    fn log(&mut self, direction: &str, message: &Object) {
        if let Some(log) = &mut self.log {
            let line = format!("{direction} {}\n", Value::Object(message.clone()).as_it_came(false));
            if log.write_all(line.as_bytes()).is_err() {
                self.log = None;
            }
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for something to be there, for ever without a time.
    fn wait<T>(&self, time: Option<Duration>, look: impl Fn(&State) -> Option<T>) -> Option<T> {
        let missing = |state: &mut State| look(state).is_none();
        let state = self.lock();
        let state = match time {
            Some(time) => {
                let waited = self.changed.wait_timeout_while(state, time, missing);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.changed.wait_while(state, missing).unwrap_or_else(PoisonError::into_inner),
        };
        look(&state)
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Link {
    writer: Mutex<Stream>,
    shared: Arc<Shared>,
}

impl Link {
    /// Connects. All messages are written to `log`, too.
    pub(crate) fn connect(
        address: &Address,
        log: Option<File>,
        tell: impl FnMut(Told<'_>) + Send + 'static,
    ) -> io::Result<Self> {
        let stream = Stream::connect(address)?;
        let reader = stream.try_clone()?;
        let shared =
            Arc::new(Shared { state: Mutex::new(State { log, ..State::default() }), ..Shared::default() });
        let hearing = Arc::clone(&shared);
        std::thread::Builder::new().name("link".to_owned()).spawn(move || hear(reader, &hearing, tell))?;
        Ok(Self { writer: Mutex::new(stream), shared })
    }

    /// The greeting, if it comes in that time, or at all; or why the connection is over.
    pub(crate) fn greeting(&self, time: Option<Duration>) -> Option<Result<Object, String>> {
        self.shared.wait(time, |state| match (&state.greeting, &state.over) {
            (Some(greeting), _) => Some(Ok(greeting.clone())),
            (None, over) => over.clone().map(Err),
        })
    }

    /// Has a command executed, and does something with the reply before anything that came after it is told; or why
    /// there will be none.
    pub(crate) fn execute<T>(&self, message: &Object, then: impl FnOnce(Reply) -> T) -> Result<T, String> {
        let (sender, receiver) = channel();
        {
            // Held from the place in the queue to the last byte, so both are in the same order. The hearing thread
            // never needs it: it goes on when the server waits for us to read.
            let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
            let bytes = {
                let mut state = self.shared.lock();
                if let Some(reason) = &state.over {
                    return Err(reason.clone());
                }
                state.log("->", message);
                state.replies.push_back(sender);
                state.client.send(message)
            };
            // If it cannot be sent the connection is over, which the hearing thread finds out with a better reason.
            if writer.write_all(&bytes).is_err() {
                writer.shutdown();
            }
        }
        // The hearing thread goes on once `_done` is dropped.
        let (reply, _done) = receiver.recv().map_err(|_| self.over().unwrap_or_default())?;
        Ok(then(reply))
    }

    /// Why the connection is over, if it is.
    pub(crate) fn over(&self) -> Option<String> {
        self.shared.lock().over.clone()
    }

    /// Waits for the connection to end, that long at most.
    pub(crate) fn wait_for_end(&self, time: Duration) {
        self.shared.wait(Some(time), |state| state.over.as_ref().map(|_| ()));
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner).shutdown();
    }
}

fn hear(mut stream: Stream, shared: &Shared, mut tell: impl FnMut(Told<'_>)) {
    let mut bytes = vec![0; 1 << 16];
    let reason = loop {
        let read = match stream.read(&mut bytes) {
            Ok(0) => break "The server has closed the connection".to_owned(),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => break format!("The connection is lost: {error}"),
        };
        let heard = shared.lock().client.push(bytes.get(..read).unwrap_or_default());
        let heard = match heard {
            Ok(heard) => heard,
            Err(Failure::Lost(reason) | Failure::Refused(_, reason)) => {
                break format!("The server does not speak QMP: {reason}");
            }
        };
        for heard in heard {
            hand_on(heard, shared, &mut tell);
        }
    };
    stream.shutdown();
    tell(Told::Over(&reason));
    let mut state = shared.lock();
    state.over = Some(reason);
    // Whoever waits for a reply hears that there is none.
    state.replies.clear();
    shared.changed.notify_all();
}

fn hand_on(heard: Heard, shared: &Shared, tell: &mut impl FnMut(Told<'_>)) {
    match heard {
        Heard::Greeting(greeting) => {
            let mut state = shared.lock();
            state.log("<-", &greeting);
            state.greeting = Some(greeting);
            shared.changed.notify_all();
        }
        Heard::Event(event) => {
            shared.lock().log("<-", &event);
            tell(Told::Event(&event));
        }
        Heard::Reply(reply) => {
            let waiting = {
                let mut state = shared.lock();
                state.log("<-", &reply.message);
                state.replies.pop_front()
            };
            let (done, is_done) = channel();
            if waiting.is_some_and(|waiting| waiting.send((reply, done)).is_ok()) {
                // It comes as an error: nothing is ever sent.
                let _ = is_done.recv();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;

    use super::*;
    use crate::line::execute;

    #[test]
    fn addresses() {
        let inet = |text: &str| Address::parse(text) == Address::Inet(text.to_owned());
        assert!(inet("localhost:4444") && inet("[::1]:1") && inet(":1"));
        assert!(!inet("qmp.sock") && !inet("localhost") && !inet("/a:1") && !inet("a:b") && !inet("a:"));
    }

    /// Many threads ask at once while events come between; everybody gets the reply that is for him, and when the
    /// server goes everybody who waits hears it.
    #[test]
    fn everybody_gets_his_own_reply() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
        let address = Address::parse(&listener.local_addr().expect("an address").to_string());
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            stream.write_all(b"{\"QMP\": {}}").expect("sent");
            let lines = BufReader::new(stream.try_clone().expect("a handle")).lines();
            for line in lines.take(200) {
                let request = underlay_qmp::json::parse(line.expect("a line").as_bytes()).expect("JSON");
                let arguments =
                    request.as_object().and_then(|object| object.get("arguments")).expect("arguments");
                let reply = format!("{{\"event\": \"E\"}}\r\n{{\"return\": {arguments}}}\r\n");
                stream.write_all(reply.as_bytes()).expect("sent");
            }
        });
        let events = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&events);
        let tell = move |told: Told<'_>| heard.lock().expect("a list").push(format!("{told:?}"));
        let link = Link::connect(&address, None, tell).expect("connected");
        assert_eq!(link.greeting(None), Some(Ok(Object::new().with("QMP", Object::new()))));
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let link = &link;
                scope.spawn(move || {
                    for number in 0..50_u64 {
                        let arguments = Object::new().with("thread", thread).with("number", number);
                        let reply = link.execute(&execute("x", arguments.clone()), Reply::result);
                        assert_eq!(reply, Ok(Ok(arguments.into())));
                    }
                });
            }
        });
        server.join().expect("the server");
        let closed = "The server has closed the connection";
        assert_eq!(link.execute(&execute("x", Object::new()), drop), Err(closed.to_owned()));
        assert_eq!(link.over().as_deref(), Some(closed));
        assert_eq!(events.lock().expect("a list").len(), 201);
    }
}

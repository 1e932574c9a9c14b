//! The client's side over a blocking UNIX socket: for tools and tests.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

pub use crate::client::Failure;
use crate::client::{Client, Heard, Reply};
use crate::json::{Object, Value};

/// How long the daemon may take to listen, to answer, or to send an event that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// A monitor's client.
#[derive(Debug)]
pub struct Monitor {
    stream: UnixStream,
    client: Client,
    replies: VecDeque<Reply>,
    events: VecDeque<Object>,
}

impl Monitor {
    /// Connects, once the daemon listens, and negotiates.
    pub fn connect(path: &Path) -> Result<Self, Failure> {
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if begun.elapsed() > PATIENCE => {
                    return Err(Failure::Lost(format!("{}: {error}", path.display())));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        Self::negotiate(stream)
    }

    /// Negotiates on a connection.
    pub fn negotiate(stream: UnixStream) -> Result<Self, Failure> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let (replies, events) = (VecDeque::new(), VecDeque::new());
        let mut monitor = Self { stream, client: Client::default(), replies, events };
        monitor.execute("qmp_capabilities", Object::new())?;
        Ok(monitor)
    }

    /// Executes a command; events that come meanwhile are kept.
    pub fn execute(&mut self, command: &str, arguments: Object) -> Result<Value, Failure> {
        let bytes = self.client.execute(command, arguments);
        self.stream.write_all(&bytes)?;
        loop {
            if let Some(reply) = self.replies.pop_front() {
                return reply.result().map_err(|(_, desc)| Failure::Refused(command.to_owned(), desc));
            }
            self.hear()?;
        }
    }

    /// The next event, kept or waited for.
    pub fn next_event(&mut self) -> Result<Object, Failure> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            self.hear()?;
        }
    }

    /// Waits for an event called `name` whose data has `member` = `value`; earlier events are dropped.
    pub fn event(&mut self, name: &str, member: &str, value: &str) -> Result<Object, Failure> {
        loop {
            let event = self.next_event()?;
            let data = event.get("data").and_then(Value::as_object).cloned().unwrap_or_default();
            let fits = data.get(member).and_then(Value::as_str) == Some(value);
            if event.get("event").and_then(Value::as_str) == Some(name) && fits {
                return Ok(data);
            }
        }
    }

    /// Reads once, and keeps what there is.
    fn hear(&mut self) -> Result<(), Failure> {
        let mut bytes = [0; 1 << 16];
        let read = match self.stream.read(&mut bytes) {
            // Work that the kernel does for this thread elsewhere, not a signal of ours.
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            other => other?,
        };
        if read == 0 {
            return Err(Failure::Lost("the daemon closed it".to_owned()));
        }
        for heard in self.client.push(bytes.get(..read).unwrap_or_default())? {
            match heard {
                Heard::Greeting(_) => {}
                Heard::Reply(reply) => self.replies.push_back(reply),
                Heard::Event(event) => self.events.push_back(event),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;

    #[test]
    fn replies_and_events_are_told_apart() {
        let (client, server) = UnixStream::pair().expect("sockets");
        let answers = [
            "{\"QMP\": {}}\n{\"return\": {}}\n",
            "{\"event\": \"A\", \"data\": {\"id\": \"x\"}}\n{\"error\": {\"class\": \"C\", \"desc\": \"no\"}}\n",
            "{\"event\": \"B\", \"data\": {\"id\": \"y\"}}\n{\"return\": 7}\n",
        ];
        let server = std::thread::spawn(move || {
            for (answer, request) in answers.into_iter().zip(BufReader::new(&server).lines()) {
                request.expect("a request");
                (&server).write_all(answer.as_bytes()).expect("sent");
            }
        });
        let mut monitor = Monitor::negotiate(client).expect("negotiated");
        let refused = Failure::Refused("first".into(), "no".into());
        assert_eq!(monitor.execute("first", Object::new()), Err(refused));
        assert_eq!(monitor.execute("second", Object::new()), Ok(Value::Int(7)));
        let found = monitor.event("B", "id", "y").expect("kept");
        assert_eq!(found.get("id"), Some(&"y".into()));
        server.join().expect("the server");
        assert!(matches!(monitor.next_event(), Err(Failure::Lost(_))));
    }
}

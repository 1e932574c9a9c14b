//! The client's side over a blocking UNIX socket: for tools and tests.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::json::{self, Object, Value};

/// How long the daemon may take to listen, to answer, or to send an event that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why a call got no answer, or not the wanted one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The daemon refused the command: its name, and the daemon's sentence.
    #[error("{0}: {1}")]
    Refused(String, String),
    /// The connection is lost, or the daemon does not speak QMP.
    #[error("monitor: {0}")]
    Lost(String),
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Lost(error.to_string())
    }
}

impl From<Failure> for String {
    fn from(failure: Failure) -> Self {
        failure.to_string()
    }
}

/// A monitor's client.
#[derive(Debug)]
pub struct Monitor {
    reader: BufReader<UnixStream>,
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
        let mut monitor = Self { reader: BufReader::new(stream), events: VecDeque::new() };
        monitor.execute("qmp_capabilities", Object::new())?;
        Ok(monitor)
    }

    /// Executes a command; events that come meanwhile are kept.
    pub fn execute(&mut self, command: &str, arguments: Object) -> Result<Value, Failure> {
        let request = Object::new().with("execute", command).with("arguments", arguments);
        let line = format!("{}\n", Value::Object(request));
        self.reader.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut message = self.message()?;
            if let Some(result) = message.remove("return") {
                return Ok(result);
            }
            if let Some(error) = message.get("error").and_then(Value::as_object) {
                let desc = error.get("desc").and_then(Value::as_str).unwrap_or_default();
                return Err(Failure::Refused(command.to_owned(), desc.to_owned()));
            }
            self.keep(message);
        }
    }

    /// The next event, kept or waited for.
    pub fn next_event(&mut self) -> Result<Object, Failure> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let message = self.message()?;
            self.keep(message);
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

    /// Keeps a message if it is an event. Greetings are passed over: a client that comes while the reference's
    /// daemon still starts may get two.
    fn keep(&mut self, message: Object) {
        if message.get("event").is_some() {
            self.events.push_back(message);
        }
    }

    fn message(&mut self) -> Result<Object, Failure> {
        let mut line = Vec::new();
        if self.reader.read_until(b'\n', &mut line)? == 0 {
            return Err(Failure::Lost("the daemon closed it".to_owned()));
        }
        match json::parse(&line) {
            Ok(Value::Object(object)) => Ok(object),
            Ok(_) => Err(Failure::Lost("the daemon sent something that is no message".to_owned())),
            Err(error) => Err(Failure::Lost(error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_and_events_are_told_apart() {
        let (client, mut server) = UnixStream::pair().expect("sockets");
        let lines = "{\"QMP\": {}}\n{\"return\": {}}\n\
                     {\"event\": \"A\", \"data\": {\"id\": \"x\"}}\n{\"error\": {\"class\": \"C\", \"desc\": \"no\"}}\n\
                     {\"event\": \"B\", \"data\": {\"id\": \"y\"}}\n{\"return\": 7}\n";
        server.write_all(lines.as_bytes()).expect("sent");
        let mut monitor = Monitor::negotiate(client).expect("negotiated");
        let refused = Failure::Refused("first".into(), "no".into());
        assert_eq!(monitor.execute("first", Object::new()), Err(refused));
        assert_eq!(monitor.execute("second", Object::new()), Ok(Value::Int(7)));
        let found = monitor.event("B", "id", "y").expect("kept");
        assert_eq!(found.get("id"), Some(&"y".into()));
        drop(server);
        assert!(matches!(monitor.next_event(), Err(Failure::Lost(_))));
    }
}

//! A blocking QMP client, as small as the tour needs it.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use underlay_qmp::json::{self, Object, Value};

/// A monitor's client.
pub struct Monitor {
    reader: BufReader<UnixStream>,
    events: VecDeque<Object>,
}

/// How long the daemon may take to answer, or a job to end.
const PATIENCE: Duration = Duration::from_secs(60);

impl Monitor {
    /// Connects, once the daemon listens, and negotiates.
    pub fn connect(path: &Path) -> Result<Self, String> {
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if begun.elapsed() > PATIENCE => {
                    return Err(format!("{}: {error}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        stream.set_read_timeout(Some(PATIENCE)).map_err(|error| error.to_string())?;
        let mut monitor = Self { reader: BufReader::new(stream), events: VecDeque::new() };
        monitor.message()?;
        monitor.execute("qmp_capabilities", Object::new())?;
        Ok(monitor)
    }

    /// Executes a command; events that come meanwhile are kept.
    pub fn execute(&mut self, command: &str, arguments: Object) -> Result<Value, String> {
        let request = Object::new().with("execute", command).with("arguments", arguments);
        let line = format!("{}\n", Value::Object(request));
        self.reader.get_mut().write_all(line.as_bytes()).map_err(|error| format!("{command}: {error}"))?;
        loop {
            let mut message = self.message()?;
            if let Some(result) = message.remove("return") {
                return Ok(result);
            }
            if let Some(error) = message.get("error").and_then(Value::as_object) {
                let desc = error.get("desc").and_then(Value::as_str).unwrap_or_default();
                return Err(format!("{command}: {desc}"));
            }
            self.events.push_back(message);
        }
    }

    /// Waits for an event called `name` whose data has `member` = `value`; earlier events are dropped.
    pub fn event(&mut self, name: &str, member: &str, value: &str) -> Result<Object, String> {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.message()?,
            };
            let data = event.get("data").and_then(Value::as_object).cloned().unwrap_or_default();
            let fits = data.get(member).and_then(Value::as_str) == Some(value);
            if event.get("event").and_then(Value::as_str) == Some(name) && fits {
                return Ok(data);
            }
        }
    }

    fn message(&mut self) -> Result<Object, String> {
        let mut line = Vec::new();
        let count = self.reader.read_until(b'\n', &mut line).map_err(|error| format!("monitor: {error}"))?;
        if count == 0 {
            return Err("the daemon closed the monitor".to_owned());
        }
        match json::parse(&line) {
            Ok(Value::Object(object)) => Ok(object),
            Ok(_) => Err("the daemon sent something that is no message".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }
}

//! A line, from the typist's hands to the server and back: the same at the prompt and in scripts.

use std::time::Duration;

use underlay_qmp::client::Reply;
use underlay_qmp::json::{Object, Value};

use crate::line::{LineError, Typed, Typist, execute};
use crate::link::Link;
use crate::screen::harmless;

/// How long a server that was told to quit may take until it has closed the connection.
const FAREWELL: Duration = Duration::from_secs(10);

/// How messages are shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Manner {
    /// What is sent is shown, too.
    pub(crate) verbose: bool,
    /// Over several lines.
    pub(crate) pretty: bool,
}

impl Manner {
    pub(crate) fn show(self, message: &Object) -> String {
        Value::Object(message.clone()).as_it_came(self.pretty)
    }
}

/// Something to be shown.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Show<'a> {
    /// What is sent, or what the server says.
    Message(&'a str),
    /// An error of the server's.
    Error(&'a str),
}

/// What a line has come to.
#[derive(Debug)]
pub(crate) enum Done {
    /// All is well.
    Well,
    /// The server has refused it, or failed.
    Refused { command: String, class: String, desc: String },
}

/// Why a line came to nothing.
#[derive(Debug)]
pub(crate) enum Trouble {
    Line(LineError),
    /// The connection is over.
    Over(String),
}

/// How lines are understood.
#[derive(Debug)]
enum Tongue {
    Qmp(Typist),
    /// Lines go to the human monitor as they are; once the user has chosen a processor, for that one.
    Hmp {
        processor: Option<u64>,
    },
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Session {
    manner: Manner,
    tongue: Tongue,
}

impl Session {
    pub(crate) fn new(manner: Manner, human: bool) -> Self {
        let tongue = if human { Tongue::Hmp { processor: None } } else { Tongue::Qmp(Typist::default()) };
        Self { manner, tongue }
    }

    /// Whether a transaction has been begun and not ended.
    pub(crate) fn is_open(&self) -> bool {
        matches!(&self.tongue, Tongue::Qmp(typist) if typist.is_open())
    }

    /// Forgets a transaction that was begun.
    pub(crate) fn abandon(&mut self) {
        if let Tongue::Qmp(typist) = &mut self.tongue {
            typist.abandon();
        }
    }

    /// Executes a line, and shows what there is to show.
    pub(crate) fn line(
        &mut self,
        line: &str,
        link: &Link,
        show: &mut dyn FnMut(Show<'_>),
    ) -> Result<Done, Trouble> {
        let message = match &mut self.tongue {
            Tongue::Qmp(typist) => match typist.line(line).map_err(Trouble::Line)? {
                Typed::Nothing | Typed::More => return Ok(Done::Well),
                Typed::Message(message) => message,
            },
            Tongue::Hmp { .. } if line.trim().is_empty() => return Ok(Done::Well),
            Tongue::Hmp { processor } => human(line, processor_of(line).or(*processor)),
        };
        if self.manner.verbose {
            show(Show::Message(&self.manner.show(&message)));
        }
        let done = link.execute(&message, |reply| self.answer(line, reply, show)).map_err(Trouble::Over)?;
        let quits = message.get("execute").and_then(Value::as_str) == Some("quit");
        if quits && matches!(done, Done::Well) {
            // Who does something with the images next must not find them still in use.
            link.wait_for_end(FAREWELL);
        }
        Ok(done)
    }

    fn answer(&mut self, line: &str, reply: Reply, show: &mut dyn FnMut(Show<'_>)) -> Done {
        let text = self.manner.show(&reply.message);
        let command = reply.command.clone();
        match (reply.result(), &mut self.tongue) {
            (Err((class, desc)), _) => {
                show(Show::Error(&text));
                return Done::Refused { command, class, desc };
            }
            (Ok(Value::Str(said)), Tongue::Hmp { processor }) => {
                // Many commands of the human monitor say nothing when all is well.
                if said.is_empty() {
                    *processor = processor_of(line).or(*processor);
                } else {
                    show(Show::Message(harmless(&said).trim_end()));
                }
            }
            (Ok(_), _) => show(Show::Message(&text)),
        }
        Done::Well
    }
}

/// The message that has a line executed by the human monitor.
pub(crate) fn human(line: &str, processor: Option<u64>) -> Object {
    let mut arguments = Object::new().with("command-line", line.trim());
    if let Some(processor) = processor {
        arguments.insert("cpu-index", processor);
    }
    execute("human-monitor-command", arguments)
}

/// The processor that a line chooses: `cpu 1`. The server forgets it after each line.
fn processor_of(line: &str) -> Option<u64> {
    line.trim().strip_prefix("cpu ")?.trim().parse().ok()
}

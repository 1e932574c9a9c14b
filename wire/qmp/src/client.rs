//! The client's half of a conversation, without its socket: commands in, bytes out; bytes in, replies and events out.
//!
//! Commands of one connection are answered in their order (no capability is asked for that would change this), so a
//! reply belongs to the oldest command that has none yet. What a server may make us keep is bounded: one message,
//! and no reply that nobody has asked for.

use std::collections::VecDeque;

use crate::codec::{Piece, Splitter};
use crate::json::{self, Object, Value};

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

/// Something that the server said.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard {
    /// The greeting. The reference's daemon, while it still starts, may send two.
    Greeting(Object),
    /// The reply to the oldest command that had none.
    Reply(Reply),
    /// An event.
    Event(Object),
}

/// A reply.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// The command that it is for.
    pub command: String,
    /// The message.
    pub message: Object,
}

impl Reply {
    /// What the command gave, or the class and the sentence of its error.
    pub fn result(mut self) -> Result<Value, (String, String)> {
        if let Some(result) = self.message.remove("return") {
            return Ok(result);
        }
        let error = self.message.get("error").and_then(Value::as_object);
        let text = |name| error.and_then(|error| error.get(name)?.as_str()).unwrap_or_default().to_owned();
        Err((text("class"), text("desc")))
    }

    /// Whether the command was refused, or failed.
    pub fn is_error(&self) -> bool {
        self.message.get("return").is_none()
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Client {
    splitter: Splitter,
    waiting: VecDeque<String>,
}

impl Client {
    /// The bytes to send for a command.
    pub fn execute(&mut self, command: &str, arguments: Object) -> Vec<u8> {
        self.send(&Object::new().with("execute", command).with("arguments", arguments))
    }

    /// The bytes to send for a message that is complete already.
    pub fn send(&mut self, message: &Object) -> Vec<u8> {
        let command = message.get("execute").and_then(Value::as_str).unwrap_or_default();
        self.waiting.push_back(command.to_owned());
        let mut line = Value::Object(message.clone()).as_it_came(false);
        line.push('\n');
        line.into_bytes()
    }

    /// Takes bytes from the server. After an error the connection is of no use.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Heard>, Failure> {
        let pieces = self.splitter.push(bytes);
        pieces.into_iter().map(|piece| self.heard(piece)).collect()
    }

    fn heard(&mut self, piece: Piece) -> Result<Heard, Failure> {
        let lost = |text: &str| Failure::Lost(text.to_owned());
        let bytes = match piece {
            Piece::Value(bytes) => bytes,
            Piece::Garbage(text) => return Err(Failure::Lost(text)),
        };
        let message = match json::parse_message(&bytes) {
            Ok(Value::Object(message)) => message,
            Ok(_) => return Err(lost("the server sent something that is no message")),
            Err(error) => return Err(Failure::Lost(error.to_string())),
        };
        let has = |name| message.get(name).is_some();
        if has("event") {
            Ok(Heard::Event(message))
        } else if has("QMP") {
            Ok(Heard::Greeting(message))
        } else if has("return") || has("error") {
            let command = self.waiting.pop_front();
            let command = command.ok_or_else(|| lost("the server sent a reply that nobody asked for"))?;
            Ok(Heard::Reply(Reply { command, message }))
        } else {
            Err(lost("the server sent something that is no message"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_find_their_commands_and_events_come_between() {
        let mut client = Client::default();
        assert_eq!(client.execute("a", Object::new()), b"{\"execute\": \"a\", \"arguments\": {}}\n");
        let exact = Object::new().with("execute", "b").with("id", 7_u64);
        assert_eq!(client.send(&exact), b"{\"execute\": \"b\", \"id\": 7}\n");
        let input = b"{\"QMP\": {}}\r\n{\"return\": 1}{\"event\": \"E\"}\n{\"error\": {\"class\": \"C\", \"desc\": \"d\"}}";
        let bytewise: Vec<_> =
            input.iter().flat_map(|byte| client.push(&[*byte]).expect("messages")).collect();
        let mut replies = Vec::new();
        for heard in &bytewise {
            if let Heard::Reply(reply) = heard {
                replies.push((reply.command.as_str(), reply.is_error(), reply.clone().result()));
            }
        }
        let error = ("C".to_owned(), "d".to_owned());
        assert_eq!(replies, [("a", false, Ok(Value::Int(1))), ("b", true, Err(error))]);
        assert!(matches!(bytewise[..], [Heard::Greeting(_), _, Heard::Event(_), _]));
    }

    #[test]
    fn a_server_that_talks_nonsense_is_left() {
        for nonsense in ["{\"return\": {}}", "[]", "{}", "{]", "\u{7}", "{\"a\":1,\"a\":2}"] {
            assert!(Client::default().push(nonsense.as_bytes()).is_err(), "{nonsense}");
        }
    }
}

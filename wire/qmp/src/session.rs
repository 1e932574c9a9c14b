//! One monitor's conversation, without its socket: bytes in, commands out; results in, bytes out.

use std::time::Duration;

use crate::codec::{Piece, Splitter};
use crate::json::{self, Object, Value};
use crate::schema::{self, Input};

/// The class of an error, as clients see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// Nearly every error.
    GenericError,
    /// No such command, or not now.
    CommandNotFound,
    /// No such job.
    DeviceNotActive,
    /// No such device.
    DeviceNotFound,
}

impl ErrorClass {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
            Self::DeviceNotFound => "DeviceNotFound",
        }
    }
}

/// A command that may be executed: known, and with arguments that fit its description.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The command's name.
    pub command: &'static str,
    /// Its arguments, checked.
    pub arguments: Object,
    /// To be sent back with the reply.
    pub id: Option<Value>,
}

/// What a piece of input asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Incoming {
    /// To be executed; the reply goes through [`reply`].
    Request(Request),
    /// To be sent as it is.
    Reply(Value),
}

/// See the module.
#[derive(Debug, Default)]
pub struct Session {
    splitter: Splitter,
    negotiated: bool,
}

/// The greeting; `version` as query-version answers it.
pub fn greeting(version: Value) -> Value {
    // No capability is offered: commands of one monitor are executed in order, none out of band.
    let hello = Object::new().with("version", version).with("capabilities", Vec::new());
    Object::new().with("QMP", hello).into()
}

/// A reply to a request.
pub fn reply(result: Value, id: Option<Value>) -> Value {
    finish(Object::new().with("return", result), id)
}

/// The reply to a request that failed.
pub fn error(class: ErrorClass, desc: &str, id: Option<Value>) -> Value {
    let error = Object::new().with("class", class.as_str()).with("desc", desc);
    finish(Object::new().with("error", error), id)
}

fn finish(mut object: Object, id: Option<Value>) -> Value {
    if let Some(id) = id {
        object.insert("id", id);
    }
    object.into()
}

/// An event that happened `since` the UNIX epoch.
pub fn event(name: &str, data: Object, since: Duration) -> Value {
    let timestamp =
        Object::new().with("seconds", since.as_secs()).with("microseconds", u64::from(since.subsec_micros()));
    let mut object = Object::new().with("timestamp", timestamp).with("event", name);
    if !data.is_empty() {
        object.insert("data", data);
    }
    object.into()
}

impl Session {
    /// Takes bytes from the client.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Incoming> {
        let pieces = self.splitter.push(bytes);
        pieces.into_iter().map(|piece| self.incoming(piece)).collect()
    }

    /// Whether the client may get events: it has negotiated.
    pub fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    fn incoming(&mut self, piece: Piece) -> Incoming {
        let refuse = |desc: &str, id| Incoming::Reply(error(ErrorClass::GenericError, desc, id));
        let bytes = match piece {
            Piece::Value(bytes) => bytes,
            Piece::Garbage(text) => return refuse(&text, None),
        };
        let mut object = match json::parse_message(&bytes) {
            Ok(Value::Object(object)) => object,
            Ok(_) => return refuse("QMP input must be a JSON object", None),
            Err(error) => return refuse(&error.to_string(), None),
        };
        let id = object.remove("id");
        match self.request(object) {
            Ok(("qmp_capabilities", arguments)) => match self.negotiate(&arguments) {
                Ok(()) => Incoming::Reply(reply(Object::new().into(), id)),
                Err(desc) => refuse(&desc, id),
            },
            Ok((command, arguments)) => Incoming::Request(Request { command, arguments, id }),
            Err((class, desc)) => Incoming::Reply(error(class, &desc, id)),
        }
    }

    fn request(&self, mut object: Object) -> Result<(&'static str, Object), (ErrorClass, String)> {
        let generic = |desc: &str| (ErrorClass::GenericError, desc.to_owned());
        let execute = object.remove("execute");
        let arguments = object.remove("arguments");
        if let Some((name, _)) = object.iter_printed().next() {
            return Err(generic(&format!("QMP input member '{name}' is unexpected")));
        }
        let name = match execute {
            Some(Value::Str(name)) => name,
            Some(_) => return Err(generic("QMP input member 'execute' must be a string")),
            None => return Err(generic("QMP input lacks member 'execute'")),
        };
        let arguments = match arguments {
            None => Object::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err(generic("QMP input member 'arguments' must be an object")),
        };
        let unavailable = |desc: String| (ErrorClass::CommandNotFound, desc);
        if !self.negotiated && name != "qmp_capabilities" {
            let desc = "Expecting capabilities negotiation with 'qmp_capabilities'";
            return Err(unavailable(desc.to_owned()));
        }
        let Some(command) = schema::command(&name) else {
            return Err(unavailable(format!("The command {name} has not been found")));
        };
        let arguments = schema::check(arguments, command.arguments, Input::Json);
        let arguments = arguments.map_err(|error| generic(&error.to_string()))?;
        if self.negotiated && name == "qmp_capabilities" {
            let desc = "Capabilities negotiation is already complete, command ignored";
            return Err(unavailable(desc.to_owned()));
        }
        Ok((command.name, arguments))
    }

    fn negotiate(&mut self, arguments: &Object) -> Result<(), String> {
        let wanted = arguments.get("enable").and_then(Value::as_list).unwrap_or_default();
        if let Some(capability) = wanted.iter().find_map(Value::as_str) {
            return Err(format!("Capability {capability} not available"));
        }
        self.negotiated = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(session: &mut Session, input: &str) -> Vec<String> {
        let text = |incoming| match incoming {
            Incoming::Reply(value) => value.to_string(),
            Incoming::Request(request) => format!("execute {}", request.command),
        };
        session.push(input.as_bytes()).into_iter().map(text).collect()
    }

    /// The replies are those of the reference to the same input.
    #[test]
    fn answers_as_the_reference() {
        let mut session = Session::default();
        let generic = |desc: &str| format!(r#"{{"error": {{"class": "GenericError", "desc": "{desc}"}}}}"#);
        assert_eq!(
            said(&mut session, r#"{"execute":"query-version"}"#),
            [
                r#"{"error": {"class": "CommandNotFound", "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}}"#
            ]
        );
        let input = r#"{"execute":"qmp_capabilities","id":{"a":1}}{"execute":"qmp_capabilities"}[1] "x""#;
        assert_eq!(said(&mut session, input), [
            r#"{"return": {}, "id": {"a": 1}}"#.to_owned(),
            r#"{"error": {"class": "CommandNotFound", "desc": "Capabilities negotiation is already complete, command ignored"}}"#.to_owned(),
            generic("QMP input must be a JSON object"),
            generic("QMP input must be a JSON object"),
        ]);
        let input = r#"{"foo":1}{"execute":1}{"execute":"quit","arguments":1}{"execute":"nope","id":7}{"a":1,"a":2}{"execute":"quit"}"#;
        assert_eq!(said(&mut session, input), [
            generic("QMP input member 'foo' is unexpected"),
            generic("QMP input member 'execute' must be a string"),
            generic("QMP input member 'arguments' must be an object"),
            r#"{"id": 7, "error": {"class": "CommandNotFound", "desc": "The command nope has not been found"}}"#.to_owned(),
            generic("JSON parse error, duplicate key"),
            "execute quit".to_owned(),
        ]);
    }

    #[test]
    fn events_have_their_time() {
        let data = Object::new().with("id", "j").with("status", "created");
        let event = event("JOB_STATUS_CHANGE", data, Duration::from_micros(1_500_000));
        let text = r#"{"timestamp": {"seconds": 1, "microseconds": 500000}, "event": "JOB_STATUS_CHANGE", "data": {"status": "created", "id": "j"}}"#;
        assert_eq!(event.to_string(), text);
    }
}

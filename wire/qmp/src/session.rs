//! One monitor's conversation, without its socket: bytes in, commands out; results in, bytes out.

use std::time::Duration;

use crate::codec::{Piece, Splitter};
use crate::json::{self, Object, Value};
use crate::schema::{self, Input, Program};

/// The capability to execute commands out of band. Of the storage daemon's commands none may be (`allow-oob` is nowhere
/// in the reference's `query-qmp-schema`): whoever asks is told so at once, whatever waits.
const OUT_OF_BAND: &str = "oob";

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
    /// To be sent as it is, in its turn.
    Reply(Value),
    /// To be sent at once, ahead of what still waits: the answer to a request out of band.
    Urgent(Value),
}

/// See the module.
#[derive(Debug, Default)]
pub struct Session {
    program: Program,
    splitter: Splitter,
    negotiated: bool,
    /// The client may ask out of band.
    out_of_band: bool,
}

/// What a message asks for.
struct Order {
    name: String,
    arguments: Object,
    out_of_band: bool,
}

/// The greeting; `version` as query-version answers it.
pub fn greeting(version: Value) -> Value {
    let capabilities = vec![Value::from(OUT_OF_BAND)];
    let hello = Object::new().with("version", version).with("capabilities", capabilities);
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
    /// With a program.
    pub fn new(program: Program) -> Self {
        Self { program, ..Self::default() }
    }

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
        // Who names both kinds of request has to wait for the answer.
        let urgent = self.out_of_band && object.get("exec-oob").is_some() && object.get("execute").is_none();
        let answer = if urgent { Incoming::Urgent } else { Incoming::Reply };
        match self.order(object).and_then(|order| self.request(order)) {
            Ok(("qmp_capabilities", arguments)) => {
                self.negotiate(&arguments);
                answer(reply(Object::new().into(), id))
            }
            Ok((command, arguments)) => Incoming::Request(Request { command, arguments, id }),
            Err((class, desc)) => answer(error(class, &desc, id)),
        }
    }

    /// What a message says. Of several mistakes the first counts, in the order in which members are printed.
    fn order(&self, mut object: Object) -> Result<Order, (ErrorClass, String)> {
        let generic = |desc: String| (ErrorClass::GenericError, desc);
        let mut found: Option<(String, bool)> = None;
        for (member, value) in object.iter_printed() {
            match (member, value) {
                ("execute", Value::Str(_)) | ("exec-oob", Value::Str(_))
                    if self.knows(member) && found.is_some() =>
                {
                    return Err(generic("QMP input member 'execute' clashes with 'exec-oob'".to_owned()));
                }
                ("execute" | "exec-oob", Value::Str(name)) if self.knows(member) => {
                    found = Some((name.clone(), member == "exec-oob"));
                }
                ("execute" | "exec-oob", _) if self.knows(member) => {
                    return Err(generic(format!("QMP input member '{member}' must be a string")));
                }
                ("arguments", Value::Object(_)) => {}
                ("arguments", _) => {
                    return Err(generic("QMP input member 'arguments' must be an object".to_owned()));
                }
                _ => return Err(generic(format!("QMP input member '{member}' is unexpected"))),
            }
        }
        let Some((name, out_of_band)) = found else {
            return Err(generic("QMP input lacks member 'execute'".to_owned()));
        };
        let arguments = match object.remove("arguments") {
            Some(Value::Object(arguments)) => arguments,
            _ => Object::new(),
        };
        Ok(Order { name, arguments, out_of_band })
    }

    /// Whether a member of that name may say which command is meant.
    fn knows(&self, member: &str) -> bool {
        member == "execute" || self.out_of_band
    }

    fn request(&self, order: Order) -> Result<(&'static str, Object), (ErrorClass, String)> {
        let Order { name, arguments, out_of_band } = order;
        let generic = |desc: String| (ErrorClass::GenericError, desc);
        let unavailable = |desc: String| (ErrorClass::CommandNotFound, desc);
        if !self.negotiated && name != "qmp_capabilities" {
            let desc = "Expecting capabilities negotiation with 'qmp_capabilities'";
            return Err(unavailable(desc.to_owned()));
        }
        let Some(command) = self.program.command(&name) else {
            return Err(unavailable(format!("The command {name} has not been found")));
        };
        if out_of_band {
            return Err(generic(format!("The command {name} does not support OOB")));
        }
        let arguments = match schema::takes_more(command.name) {
            true => arguments,
            false => schema::check(arguments, command.arguments, Input::Json)
                .map_err(|error| generic(error.to_string()))?,
        };
        if self.negotiated && name == "qmp_capabilities" {
            let desc = "Capabilities negotiation is already complete, command ignored";
            return Err(unavailable(desc.to_owned()));
        }
        Ok((command.name, arguments))
    }

    /// The arguments fit their description: there is no other capability.
    fn negotiate(&mut self, arguments: &Object) {
        let wanted = arguments.get("enable").and_then(Value::as_list).unwrap_or_default();
        self.out_of_band = wanted.iter().any(|capability| capability.as_str() == Some(OUT_OF_BAND));
        self.negotiated = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(session: &mut Session, input: &str) -> Vec<String> {
        let text = |incoming| match incoming {
            Incoming::Reply(value) => value.to_string(),
            Incoming::Urgent(value) => format!("! {value}"),
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
    fn out_of_band_only_for_who_has_asked_for_it() {
        let input = "{'exec-oob':'quit','id':1}{'exec-oob':'nope'}{'execute':'quit','exec-oob':'quit'}{'exec-oob':1}{'execute':'quit'}";
        let mut session = Session::default();
        said(&mut session, "{'execute':'qmp_capabilities'}");
        let answers = said(&mut session, input);
        let unexpected = "QMP input member 'exec-oob' is unexpected";
        assert!(answers[..4].iter().all(|answer| answer.contains(unexpected) && !answer.starts_with('!')));
        let mut session = Session::default();
        said(&mut session, "{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}");
        assert_eq!(
            said(&mut session, input),
            [
                r#"! {"id": 1, "error": {"class": "GenericError", "desc": "The command quit does not support OOB"}}"#,
                r#"! {"error": {"class": "CommandNotFound", "desc": "The command nope has not been found"}}"#,
                r#"{"error": {"class": "GenericError", "desc": "QMP input member 'execute' clashes with 'exec-oob'"}}"#,
                r#"! {"error": {"class": "GenericError", "desc": "QMP input member 'exec-oob' must be a string"}}"#,
                "execute quit",
            ]
        );
    }

    #[test]
    fn events_have_their_time() {
        let data = Object::new().with("id", "j").with("status", "created");
        let event = event("JOB_STATUS_CHANGE", data, Duration::from_micros(1_500_000));
        let text = r#"{"timestamp": {"seconds": 1, "microseconds": 500000}, "event": "JOB_STATUS_CHANGE", "data": {"status": "created", "id": "j"}}"#;
        assert_eq!(event.to_string(), text);
    }
}

//! From what is typed to what is sent: a command and its arguments, or, over several lines, a transaction.

use underlay_qmp::json::{self, Object, Value};

use crate::tree::Arguments;
use crate::value;
use crate::words::{Word, cut};

/// Why a line cannot be sent. Where qmp-shell has a sentence for it, it is that one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LineError {
    /// A word that is no argument.
    #[error("Expected a key=value pair, got '{0}'")]
    NotAPair(String),
    /// A name with an empty part, or with too many.
    #[error("'{0}' is not the name of an argument")]
    Key(String),
    /// The same argument twice.
    #[error("Cannot set \"{0}\" multiple times")]
    Twice(String),
    /// An argument that has a value and members.
    #[error("Cannot use \"{0}\" as both leaf and non-leaf key")]
    LeafAndBranch(String),
    /// A list with a hole.
    #[error("\"{0}.{1}\" is missing")]
    Hole(String, usize),
    /// Members that are numbers beside some that are not.
    #[error("\"{0}\" cannot be both a list and an object")]
    ListAndObject(String),
    /// A quote or a bracket that is not closed.
    #[error("The value of '{0}' is not closed")]
    NotClosed(String),
    /// Something right behind a quote or bracket that closes a value.
    #[error("A blank must follow the value of '{0}'")]
    Trailing(String),
    /// Neither JSON nor what Python makes of it.
    #[error("The value of '{0}' is not sound: {1}")]
    Literal(String, String),
    /// A number of more than 64 bits.
    #[error("The number '{0}' does not fit 64 bits (in quotes it is a text)")]
    TooLarge(String),
    /// Not a command.
    #[error("'{0}' is not the name of a command")]
    Command(String),
    /// A whole message that is none.
    #[error("Not a message: {0}")]
    Message(String),
    /// `)` without what it closes.
    #[error("There is no transaction to close")]
    NoTransaction,
    /// A code of Unicode that stands for no character; no server takes it.
    #[error("There is something in the line that is no character")]
    NoCharacter,
    /// A `transaction(` that runs into the next word.
    #[error("A blank must follow 'transaction('")]
    Begin,
}

/// What a line comes to.
#[derive(Clone, Debug, PartialEq)]
pub enum Typed {
    /// Nothing: it was empty, or a comment.
    Nothing,
    /// A part of a transaction that goes on.
    More,
    /// A message to be sent.
    Message(Object),
}

/// Reads line after line.
#[derive(Debug, Default)]
pub struct Typist {
    actions: Option<Vec<Value>>,
}

impl Typist {
    /// Reads a line. A line with an error leaves things as they were.
    pub fn line(&mut self, line: &str) -> Result<Typed, LineError> {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            return Ok(Typed::Nothing);
        }
        if !line.chars().all(json::is_character) {
            return Err(LineError::NoCharacter);
        }
        if self.actions.is_none() && line.starts_with('{') {
            return message(line).map(Typed::Message);
        }
        let words = cut(line)?;
        let Some((first, rest)) = words.split_first() else { return Ok(Typed::Nothing) };
        if self.actions.is_some() {
            return self.action(&words);
        }
        if first.text == "transaction(" {
            self.actions = Some(Vec::new());
            return self.action(rest).inspect_err(|_| self.actions = None);
        }
        if first.text.starts_with("transaction(") {
            return Err(LineError::Begin);
        }
        if first.text == ")" {
            return Err(LineError::NoTransaction);
        }
        let (command, arguments) = command(&words)?;
        Ok(Typed::Message(execute(command, arguments)))
    }

    /// Whether a transaction has been begun and not ended.
    pub fn is_open(&self) -> bool {
        self.actions.is_some()
    }

    /// Forgets a transaction that was begun.
    pub fn abandon(&mut self) {
        self.actions = None;
    }

    /// Reads one action, or what ends the transaction, or both.
    fn action(&mut self, words: &[Word<'_>]) -> Result<Typed, LineError> {
        let (last, ends) = match words.split_last() {
            Some((last, before)) if last.text == ")" => (before, true),
            _ => (words, false),
        };
        if !last.is_empty() {
            let (name, data) = command(last)?;
            let action = Object::new().with("type", name).with("data", data);
            self.actions.get_or_insert_default().push(action.into());
        }
        if !ends {
            return Ok(Typed::More);
        }
        let actions = self.actions.take().unwrap_or_default();
        Ok(Typed::Message(execute("transaction", Object::new().with("actions", actions))))
    }
}

/// The message that has a command executed.
pub fn execute(command: &str, arguments: Object) -> Object {
    Object::new().with("execute", command).with("arguments", arguments)
}

/// A command's name and its arguments.
fn command<'a>(words: &[Word<'a>]) -> Result<(&'a str, Object), LineError> {
    let Some((first, rest)) = words.split_first() else { return Ok(("", Object::new())) };
    let in_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if !first.text.bytes().all(in_name) {
        return Err(LineError::Command(first.text.to_owned()));
    }
    let mut arguments = Arguments::default();
    for word in rest {
        let pair = word.text.split_once('=');
        let (key, text) = pair.ok_or_else(|| LineError::NotAPair(word.text.to_owned()))?;
        arguments.insert(key, value::parse(key, text)?)?;
    }
    Ok((first.text, arguments.finish()?))
}

/// A message that is typed as it is to be sent.
fn message(line: &str) -> Result<Object, LineError> {
    let refuse = |text: &str| Err(LineError::Message(text.to_owned()));
    match json::parse(line.as_bytes()) {
        Ok(Value::Object(message)) if message.get("execute").is_some_and(|name| name.as_str().is_some()) => {
            Ok(message)
        }
        Ok(_) => refuse("it lacks \"execute\" with the name of a command"),
        Err(error) => refuse(&error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn typed(lines: &str) -> String {
        let mut typist = Typist::default();
        let mut said = Vec::new();
        for line in lines.split('\n') {
            said.push(match typist.line(line) {
                Ok(Typed::Nothing) => "nothing".to_owned(),
                Ok(Typed::More) => "more".to_owned(),
                Ok(Typed::Message(message)) => Value::Object(message).as_it_came(false),
                Err(error) => format!("! {error}"),
            });
        }
        said.join("\n")
    }

    /// What qmp-shell 0.0.6 sends for the same lines.
    #[test]
    fn sends_what_qmp_shell_sends() {
        for (lines, sent) in [
            ("query-status", r#"{"execute": "query-status", "arguments": {}}"#),
            (
                r#"foo a=1 b=true f=1.5 j=a.b k={"x":1,"y":[1,2]} m=[1,"a",null] n= o=-3"#,
                r#"{"execute": "foo", "arguments": {"a": 1, "b": true, "f": "1.5", "j": "a.b", "k": {"x": 1, "y": [1, 2]}, "m": [1, "a", null], "n": "", "o": -3}}"#,
            ),
            (
                "transaction(\nblock-dirty-bitmap-add node=drive0 name=bitmap1\nblockdev-snapshot-sync node-name=a\n)",
                "more\nmore\nmore\n{\"execute\": \"transaction\", \"arguments\": {\"actions\": [\
                 {\"type\": \"block-dirty-bitmap-add\", \"data\": {\"node\": \"drive0\", \"name\": \"bitmap1\"}}, \
                 {\"type\": \"blockdev-snapshot-sync\", \"data\": {\"node-name\": \"a\"}}]}}",
            ),
            (
                "transaction( abort )",
                r#"{"execute": "transaction", "arguments": {"actions": [{"type": "abort", "data": {}}]}}"#,
            ),
            (
                "transaction( a\n b x=1 )",
                "more\n{\"execute\": \"transaction\", \"arguments\": {\"actions\": [\
                 {\"type\": \"a\", \"data\": {}}, {\"type\": \"b\", \"data\": {\"x\": 1}}]}}",
            ),
            ("transaction(\n)", "more\n{\"execute\": \"transaction\", \"arguments\": {\"actions\": []}}"),
            ("foo a", "! Expected a key=value pair, got 'a'"),
            ("foo a=1 a=2", "! Cannot set \"a\" multiple times"),
            ("foo a=2 a.b=1", "! Cannot use \"a\" as both leaf and non-leaf key"),
            ("\n  ", "nothing\nnothing"),
        ] {
            assert_eq!(typed(lines), sent, "{lines}");
        }
    }

    /// qmp-shell makes nested arguments of different parents children of one another, and sends anything as a command's
    /// name.
    #[test]
    fn is_better_than_there() {
        assert_eq!(
            typed("blockdev-add driver=qcow2 node-name=n file.driver=file file.filename=/x"),
            r#"{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "/x"}}}"#
        );
        assert_eq!(typed("# a comment"), "nothing");
        assert_eq!(typed("{'execute': 'x', 'id': 1}"), r#"{"execute": "x", "id": 1}"#);
        assert_eq!(
            typed("{'execute': 1}"),
            "! Not a message: it lacks \"execute\" with the name of a command"
        );
        assert_eq!(typed("{"), "! Not a message: JSON parse error, premature EOI");
        assert_eq!(typed(")"), "! There is no transaction to close");
        assert_eq!(typed("a=1 b"), "! 'a=1' is not the name of a command");
        assert_eq!(typed("transaction(a )"), "! A blank must follow 'transaction('");
    }

    #[test]
    fn an_error_leaves_a_transaction_as_it_was() {
        let lines = "transaction( bad action\na x=1\nbad action\nb )";
        assert_eq!(typed(lines).lines().next(), Some("! Expected a key=value pair, got 'action'"));
        let lines = "transaction(\nbad action\n\nb bad )\nx\n)\nquery-status";
        assert_eq!(
            typed(lines),
            "more\n! Expected a key=value pair, got 'action'\nnothing\n! Expected a key=value pair, got 'bad'\nmore\n\
             {\"execute\": \"transaction\", \"arguments\": {\"actions\": [{\"type\": \"x\", \"data\": {}}]}}\n\
             {\"execute\": \"query-status\", \"arguments\": {}}"
        );
        let mut typist = Typist::default();
        typist.line("transaction(").expect("begun");
        assert!(typist.is_open());
        typist.abandon();
        assert!(!typist.is_open());
    }

    proptest! {
        /// Whatever is typed gives a message that is JSON, or a sentence.
        #[test]
        fn anything_can_be_typed(
            lines in prop::collection::vec(
                prop_oneof![
                    ".{0,60}",
                    "(transaction\\( )?[a-z-]{1,6}( [a-c](\\.[a-c0-2]){0,3}=([{\\[\"'][a-zN :,\"'{}\\[\\]0-9\\\\]{0,12}|[-+0-9a-z_]{0,22}))*( \\))?",
                ],
                0..6,
            )
        ) {
            let mut typist = Typist::default();
            for line in lines {
                match typist.line(&line) {
                    Ok(Typed::Message(message)) => {
                        prop_assert!(message.get("execute").is_some());
                        let message = Value::Object(message);
                        let again = json::parse(message.as_it_came(false).as_bytes());
                        prop_assert_eq!(again.as_ref(), Ok(&message));
                    }
                    Ok(_) => {}
                    Err(error) => prop_assert!(error.to_string().len() > 10),
                }
            }
        }
    }
}

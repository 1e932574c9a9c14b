//! The options of `--chardev`: words that are known and read as what they should be.

use underlay_qmp::json::{Object, Value};

use crate::command::object::bad_id;
use crate::error::{CommandError, CommandResult};
use crate::number;

/// What options take on or off, whatever the kind of device.
const FLAGS: [&str; 17] = [
    "abstract",
    "append",
    "clipboard",
    "delay",
    "ipv4",
    "ipv6",
    "logappend",
    "mouse",
    "mux",
    "nodelay",
    "server",
    "signal",
    "telnet",
    "tight",
    "tn3270",
    "wait",
    "websocket",
];

/// What options take a number.
const NUMBERS: [&str; 8] = ["cols", "debug", "height", "reconnect", "reconnect-ms", "rows", "to", "width"];

/// What options take a text.
const TEXTS: [&str; 18] = [
    "backend",
    "chardev",
    "chardevs.0",
    "chardevs.1",
    "chardevs.2",
    "chardevs.3",
    "fd",
    "host",
    "input-path",
    "localaddr",
    "localport",
    "logfile",
    "name",
    "path",
    "port",
    "size",
    "tls-authz",
    "tls-creds",
];

/// Options to be taken out one by one.
pub struct Options {
    words: Object,
}

impl Options {
    /// Checks names and values; the device's name comes with the options.
    pub fn new(mut words: Object) -> CommandResult<(Option<String>, Self)> {
        let id = words.remove("id").and_then(|id| id.as_str().map(str::to_owned));
        if id.as_deref().is_some_and(|id| !underlay_graph::units::is_well_formed_id(id)) {
            return Err(bad_id());
        }
        for (name, value) in words.iter() {
            let word = value.as_str().unwrap_or_default();
            let expected = match name {
                flag if FLAGS.contains(&flag) => read_flag(word).is_none().then_some("'on' or 'off'"),
                number if NUMBERS.contains(&number) => {
                    number::of_option(name, word)?;
                    None
                }
                text if TEXTS.contains(&text) => None,
                _ => return Err(CommandError::new(format!("Invalid parameter '{name}'"))),
            };
            if let Some(expected) = expected {
                return Err(CommandError::new(format!("Parameter '{name}' expects {expected}")));
            }
        }
        Ok((id, Self { words }))
    }

    /// Of words that have been checked.
    pub fn of_words(words: Object) -> Self {
        Self { words }
    }

    /// A text, if it is given.
    pub fn text(&mut self, name: &str) -> Option<String> {
        match self.words.remove(name) {
            Some(Value::Str(text)) => Some(text),
            _ => None,
        }
    }

    /// A flag, if it is given.
    pub fn flag(&mut self, name: &str) -> Option<bool> {
        self.text(name).and_then(|word| read_flag(&word))
    }

    /// A number, if it is given; what is beyond `i64` counts as its largest.
    pub fn number(&mut self, name: &str) -> Option<i64> {
        let (minus, size) = self.text(name).and_then(|word| number::read(&word).ok())?;
        let size = i64::try_from(size).unwrap_or(i64::MAX);
        Some(if minus { -size } else { size })
    }

    /// Whether a flag is given with that value.
    pub fn flag_is(&self, name: &str, value: bool) -> bool {
        self.words.get(name).and_then(Value::as_str).and_then(read_flag) == Some(value)
    }

    /// Whether an option is given.
    pub fn has(&self, name: &str) -> bool {
        self.words.get(name).is_some()
    }

    /// Takes out what says no more than what holds anyway.
    pub fn drop_defaults(&mut self, defaults: &[(&str, bool)]) {
        for (name, default) in defaults {
            if self.flag_is(name, *default) {
                self.words.remove(name);
            }
        }
    }

    /// Nothing must be left that nobody has asked for.
    pub fn finish(self, kind: &str) -> CommandResult<()> {
        match self.words.iter().next() {
            None => Ok(()),
            Some((name, _)) => {
                Err(CommandError::new(format!("chardev: option '{name}' is not supported for '{kind}'")))
            }
        }
    }
}

fn read_flag(word: &str) -> Option<bool> {
    match word {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

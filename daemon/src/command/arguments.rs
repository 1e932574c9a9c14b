//! Taking a command's arguments out of its checked object.

use underlay_qmp::json::{Object, Value};

fn unsigned(value: &Value) -> Option<u64> {
    match value {
        Value::Int(number) => Some(number.cast_unsigned()),
        Value::UInt(number) => Some(*number),
        _ => None,
    }
}

/// Arguments whose names and types the description of the command vouches for.
#[derive(Debug)]
pub struct Arguments {
    object: Object,
}

impl Arguments {
    /// Of a request.
    pub fn new(object: Object) -> Self {
        Self { object }
    }

    /// A text that must be there.
    pub fn text(&mut self, name: &str) -> String {
        self.optional_text(name).unwrap_or_default()
    }

    /// A text that may be there.
    pub fn optional_text(&mut self, name: &str) -> Option<String> {
        match self.object.remove(name) {
            Some(Value::Str(text)) => Some(text),
            _ => None,
        }
    }

    /// A flag with a default.
    pub fn flag(&mut self, name: &str, default: bool) -> bool {
        match self.object.remove(name) {
            Some(Value::Bool(flag)) => flag,
            _ => default,
        }
    }

    /// A number with a default; one beyond `i64` counts as the largest.
    pub fn number(&mut self, name: &str, default: i64) -> i64 {
        match self.object.remove(name) {
            Some(Value::Int(number)) => number,
            Some(Value::UInt(_)) => i64::MAX,
            _ => default,
        }
    }

    /// A number without a sign; a negative one counts from the end of the range, as the reference has it.
    pub fn unsigned(&mut self, name: &str) -> u64 {
        self.object.remove(name).as_ref().and_then(unsigned).unwrap_or(0)
    }

    /// An object that may be there.
    pub fn object(&mut self, name: &str) -> Option<Arguments> {
        match self.object.remove(name) {
            Some(Value::Object(object)) => Some(Self { object }),
            _ => None,
        }
    }

    /// The objects of a list.
    pub fn objects(&mut self, name: &str) -> Vec<Arguments> {
        let Some(Value::List(list)) = self.object.remove(name) else { return Vec::new() };
        let objects = list.into_iter().filter_map(|value| match value {
            Value::Object(object) => Some(Self { object }),
            _ => None,
        });
        objects.collect()
    }

    /// A list of such numbers that may be there.
    pub fn numbers(&mut self, name: &str) -> Option<Vec<u64>> {
        let Some(Value::List(list)) = self.object.remove(name) else { return None };
        Some(list.iter().filter_map(unsigned).collect())
    }

    /// Whether an argument was given.
    pub fn has(&self, name: &str) -> bool {
        self.object.get(name).is_some()
    }

    /// A value of any type that may be there.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.object.remove(name)
    }

    /// Everything that is left.
    pub fn rest(self) -> Object {
        self.object
    }
}

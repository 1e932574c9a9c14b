//! Options as they are taken out one by one, each as what it must be.

use underlay_qmp::json::{Object, Value};

use super::size::{not_a_size, parse_size};
use super::{Child, Given, NodeSpec};
use crate::error::OpenError;

/// Options that are taken out one by one; what is left at the end is unknown.
pub(super) struct Fields {
    pub(super) object: Object,
    pub(super) prefix: String,
}

impl Fields {
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.object.remove(name)
    }

    pub(super) fn wrong_type(&self, name: &str, expected: &str) -> OpenError {
        OpenError::text(format!("Invalid parameter type for '{}{name}', expected: {expected}", self.prefix))
    }

    /// Those of `names` that are there, as they are.
    pub(super) fn given(&self, names: &[&'static str]) -> Given {
        names.iter().filter_map(|name| Some((*name, self.object.get(name)?.clone()))).collect()
    }

    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, OpenError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Str(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong_type(name, "string")),
        }
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<Option<bool>, OpenError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(Value::Str(text)) => match text.as_str() {
                "on" | "yes" | "true" | "y" => Ok(Some(true)),
                "off" | "no" | "false" | "n" => Ok(Some(false)),
                _ => Err(OpenError::text(format!("Parameter '{}{name}' expects 'on' or 'off'", self.prefix))),
            },
            Some(_) => Err(self.wrong_type(name, "boolean")),
        }
    }

    pub(super) fn size(&mut self, name: &str) -> Result<Option<u64>, OpenError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Int(size)) => {
                let negative = || format!("Value '{size}' is out of range for parameter '{name}'");
                u64::try_from(size).map(Some).map_err(|_| OpenError::text(negative()))
            }
            Some(Value::UInt(size)) => Ok(Some(size)),
            Some(Value::Str(text)) => {
                parse_size(&text).map(Some).ok_or_else(|| OpenError::text(not_a_size(&text, name)))
            }
            Some(_) => Err(OpenError::text(not_a_size("", name))),
        }
    }

    /// A number; one below zero counts as the largest.
    pub(super) fn number(&mut self, name: &str) -> Result<Option<u64>, OpenError> {
        let read = match self.take(name) {
            None => return Ok(None),
            Some(Value::Int(number)) => Some(u64::try_from(number).unwrap_or(u64::MAX)),
            Some(Value::UInt(number)) => Some(number),
            Some(Value::Str(text)) => match text.strip_prefix('-') {
                Some(rest) => rest.parse::<u64>().ok().map(|_| u64::MAX),
                None => text.parse().ok(),
            },
            Some(_) => None,
        };
        let wrong = || OpenError::text(format!("Parameter '{}{name}' expects a number", self.prefix));
        read.map(Some).ok_or_else(wrong)
    }

    pub(super) fn choice<T: Copy>(
        &mut self,
        name: &str,
        choices: &[(&str, T)],
    ) -> Result<Option<T>, OpenError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let found = choices.iter().find(|(choice, _)| *choice == text);
        let unknown =
            || OpenError::text(format!("Parameter '{}{name}' does not accept value '{text}'", self.prefix));
        found.map(|(_, value)| Some(*value)).ok_or_else(unknown)
    }

    pub(super) fn child(&mut self, name: &str, depth: u32) -> Result<Option<Child>, OpenError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Str(reference)) => Ok(Some(Child::Reference(reference))),
            Some(Value::Object(object)) => {
                let prefix = format!("{}{name}.", self.prefix);
                Ok(Some(Child::Inline(Box::new(NodeSpec::parse_at(object, prefix, depth + 1, true)?))))
            }
            Some(_) => Err(self.wrong_type(name, "string or object")),
        }
    }
}

/// Turns `{"file.driver": "x", "file.filename": "y"}` into `{"file": {"driver": "x", "filename": "y"}}`.
pub fn nest(object: Object) -> Object {
    let mut nested = Object::new();
    for (name, value) in object.into_iter() {
        match name.split_once('.') {
            Some((parent, rest)) => {
                let mut inner = match nested.remove(parent) {
                    Some(Value::Object(inner)) => inner,
                    _ => Object::new(),
                };
                inner.insert(rest, value);
                nested.insert(parent, Value::Object(inner));
            }
            None => match (nested.remove(&name), value) {
                (Some(Value::Object(mut before)), Value::Object(more)) => {
                    more.into_iter().for_each(|(name, value)| before.insert(&name, value));
                    nested.insert(&name, Value::Object(before));
                }
                (_, value) => nested.insert(&name, value),
            },
        }
    }
    let mut done = Object::new();
    for (name, value) in nested.into_iter() {
        let value = match value {
            Value::Object(inner) => Value::Object(nest(inner)),
            other => other,
        };
        done.insert(&name, value);
    }
    done
}

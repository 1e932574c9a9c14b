//! Holds a value against its description, with QEMU's words for what is wrong.

use super::ty::{Alternate, Member, Object, Type};
use crate::json::{self, Value};

/// Where a value comes from decides how strict its types are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// JSON: a number is a number.
    Json,
    /// A command line: everything is a string, to be read as what is wanted (`on`, `64k`).
    Words,
}

/// What is wrong with an argument; names are dotted (`file.driver`).
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ArgumentError {
    /// Not there.
    #[error("Parameter '{0}' is missing")]
    Missing(String),
    /// Not known.
    #[error("Parameter '{0}' is unexpected")]
    Unexpected(String),
    /// Of another type.
    #[error("Invalid parameter type for '{name}', expected: {expected}")]
    Type {
        /// The argument.
        name: String,
        /// What it should be.
        expected: String,
    },
    /// None of the words that there are.
    #[error("Parameter '{name}' does not accept value '{value}'")]
    Value {
        /// The argument.
        name: String,
        /// What was given.
        value: String,
    },
    /// A word that does not read as what is wanted.
    #[error("Parameter '{name}' expects {expected}")]
    Word {
        /// The argument.
        name: String,
        /// What it should be.
        expected: &'static str,
    },
}

/// Checks `object` and gives it back with every word turned into what was wanted.
pub fn check(object: json::Object, by: &Object, input: Input) -> Result<json::Object, ArgumentError> {
    checked_object(object, by, input, "")
}

fn checked_object(
    mut object: json::Object,
    by: &Object,
    input: Input,
    path: &str,
) -> Result<json::Object, ArgumentError> {
    let mut done = json::Object::new();
    take_members(&mut object, by.members, input, path, &mut done)?;
    if let Some(tag) = by.tag {
        let value = done.get(tag).and_then(Value::as_str).unwrap_or_default().to_owned();
        if let Some((_, case)) = by.cases.iter().find(|(name, _)| *name == value) {
            take_members(&mut object, case.members, input, path, &mut done)?;
        }
    }
    match object.iter().next() {
        Some((name, _)) => Err(ArgumentError::Unexpected(format!("{path}{name}"))),
        None => Ok(done),
    }
}

fn take_members(
    object: &mut json::Object,
    members: &[Member],
    input: Input,
    path: &str,
    done: &mut json::Object,
) -> Result<(), ArgumentError> {
    for member in members {
        let name = format!("{path}{}", member.name);
        match object.remove(member.name) {
            Some(value) => done.insert(member.name, checked(value, &member.ty, input, &name)?),
            None if member.optional => {}
            None => return Err(ArgumentError::Missing(name)),
        }
    }
    Ok(())
}

fn checked(value: Value, ty: &Type, input: Input, name: &str) -> Result<Value, ArgumentError> {
    let wrong = |expected: &str| ArgumentError::Type { name: name.to_owned(), expected: expected.to_owned() };
    match (ty, value) {
        (Type::Any, value) => Ok(value),
        (Type::Int | Type::Number | Type::Bool, Value::Str(word)) if input == Input::Words => {
            read(&word, ty, name)
        }
        (Type::Str, Value::Str(text)) => Ok(Value::Str(text)),
        (Type::Str, _) => Err(wrong("string")),
        (Type::Int, value @ (Value::Int(_) | Value::UInt(_))) => Ok(value),
        (Type::Int, _) => Err(wrong("integer")),
        (Type::Bool, Value::Bool(flag)) => Ok(Value::Bool(flag)),
        (Type::Bool, _) => Err(wrong("boolean")),
        (Type::Number, value @ (Value::Int(_) | Value::UInt(_) | Value::Float(_))) => Ok(value),
        (Type::Number, _) => Err(wrong("number")),
        (Type::Null, Value::Null) => Ok(Value::Null),
        (Type::Null, _) => Err(wrong("null")),
        (Type::Enum(words), Value::Str(text)) if words.values.contains(&text.as_str()) => {
            Ok(Value::Str(text))
        }
        (Type::Enum(_), Value::Str(value)) => Err(ArgumentError::Value { name: name.to_owned(), value }),
        (Type::Enum(_), _) => Err(wrong("string")),
        (Type::Object(by), Value::Object(object)) => {
            Ok(Value::Object(checked_object(object, by, input, &format!("{name}."))?))
        }
        (Type::Object(_), _) => Err(wrong("object")),
        (Type::List(item), Value::List(values)) => {
            let each = values
                .into_iter()
                .enumerate()
                .map(|(at, value)| checked(value, item, input, &format!("{name}[{at}]")));
            Ok(Value::List(each.collect::<Result<_, _>>()?))
        }
        (Type::List(_), _) => Err(wrong("array")),
        (Type::Alternate(alternate), value) => choose(value, alternate, input, name),
    }
}

fn choose(value: Value, alternate: &Alternate, input: Input, name: &str) -> Result<Value, ArgumentError> {
    let fits = |ty: &&Type| {
        matches!(
            (ty, &value),
            (Type::Object(_), Value::Object(_))
                | (Type::Str | Type::Enum(_), Value::Str(_))
                | (Type::Null, Value::Null)
                | (Type::Int, Value::Int(_) | Value::UInt(_))
        )
    };
    match alternate.choices.iter().find(fits) {
        Some(ty) => checked(value, ty, input, name),
        None => Err(ArgumentError::Type { name: name.to_owned(), expected: alternate.name.to_owned() }),
    }
}

/// Reads a word of a command line as a number or a flag.
fn read(word: &str, ty: &Type, name: &str) -> Result<Value, ArgumentError> {
    let wrong = |expected| ArgumentError::Word { name: name.to_owned(), expected };
    match ty {
        Type::Bool => match word {
            "on" | "yes" | "true" | "y" => Ok(Value::Bool(true)),
            "off" | "no" | "false" | "n" => Ok(Value::Bool(false)),
            _ => Err(wrong("'on' or 'off'")),
        },
        _ => number(word).ok_or_else(|| wrong("a number")),
    }
}

fn number(word: &str) -> Option<Value> {
    if let Ok(number) = word.parse::<i64>() {
        return Some(Value::Int(number));
    }
    let (digits, suffix) = word.split_at(word.len().checked_sub(1).filter(|at| word.is_char_boundary(*at))?);
    let shift = match suffix {
        "k" | "K" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        "P" | "p" => 50,
        _ => return u64::from_str_radix(word.strip_prefix("0x")?, 16).ok().map(Value::from),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift).map(Value::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::parse;
    use crate::schema::command;

    fn complaint(name: &str, arguments: &str) -> String {
        let Ok(Value::Object(object)) = parse(arguments.as_bytes()) else { panic!("{arguments}") };
        let command = command(name).expect("known");
        check(object, command.arguments, Input::Json)
            .map_or_else(|error| error.to_string(), |_| String::new())
    }

    /// The texts are those of the reference for the same arguments.
    #[test]
    fn complains_as_the_reference() {
        for (command, arguments, text) in [
            ("block-stream", "{}", "Parameter 'device' is missing"),
            (
                "block-stream",
                "{'device':'a','speed':'x'}",
                "Invalid parameter type for 'speed', expected: integer",
            ),
            (
                "block-stream",
                "{'device':'a','on-error':'x'}",
                "Parameter 'on-error' does not accept value 'x'",
            ),
            ("block-stream", "{'device':'a','foo':1}", "Parameter 'foo' is unexpected"),
            (
                "blockdev-add",
                "{'driver':'raw','node-name':'x','file':5}",
                "Invalid parameter type for 'file', expected: BlockdevRef",
            ),
            (
                "blockdev-add",
                "{'driver':'raw','node-name':'x','file':{'driver':'file'}}",
                "Parameter 'file.filename' is missing",
            ),
            ("blockdev-add", "{'driver':'foo'}", "Parameter 'driver' does not accept value 'foo'"),
            ("nbd-server-start", "{'addr':{'type':'unix'}}", "Parameter 'addr.data' is missing"),
            (
                "nbd-server-start",
                "{'addr':{'type':'inet','data':{'host':'x'}}}",
                "Parameter 'addr.data.port' is missing",
            ),
            ("query-version", "{'a':1}", "Parameter 'a' is unexpected"),
            ("blockdev-add", "{'driver':'qcow2','node-name':'x','file':'f','backing':null}", ""),
        ] {
            assert_eq!(complaint(command, arguments), text, "{command} {arguments}");
        }
    }

    #[test]
    fn words_become_values() {
        let object = crate::keyval::parse("raw,file=f,size=64k,read-only=on", Some("driver")).expect("valid");
        let checked = check(object, crate::schema::blockdev_options(), Input::Words).expect("fits");
        assert_eq!(checked.get("size"), Some(&Value::Int(65536)));
        assert_eq!(checked.get("read-only"), Some(&Value::Bool(true)));
    }
}

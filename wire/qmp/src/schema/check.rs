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
    /// Words of members where one word should be.
    #[error("Parameters '{0}.*' are unexpected")]
    Nested(String),
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

/// A name as the reference gives it where it says no more than the last part; items of lists have none.
fn last(name: &str) -> String {
    let last = name.rsplit('.').next().unwrap_or(name);
    let item = last.ends_with(']') || (last != name && last.bytes().all(|b| b.is_ascii_digit()));
    if item { "null".to_owned() } else { last.to_owned() }
}

fn checked(value: Value, ty: &Type, input: Input, name: &str) -> Result<Value, ArgumentError> {
    let wrong = |expected: &str| ArgumentError::Type { name: name.to_owned(), expected: expected.to_owned() };
    let number = matches!(ty, Type::Int | Type::U16 | Type::U32 | Type::U64 | Type::Number);
    match (ty, value) {
        (Type::Any, value) => Ok(value),
        (Type::Bool, Value::Str(word)) if input == Input::Words => read_flag(&word, name),
        (_, Value::Str(word)) if number && input == Input::Words => {
            let wrong = ArgumentError::Word { name: name.to_owned(), expected: "integer" };
            in_range(read_number(&word).ok_or(wrong)?, ty, name)
        }
        (Type::Str | Type::Enum(_) | Type::Bool, Value::Object(_) | Value::List(_))
            if input == Input::Words =>
        {
            Err(ArgumentError::Nested(name.to_owned()))
        }
        (_, Value::Object(_) | Value::List(_)) if number && input == Input::Words => {
            Err(ArgumentError::Nested(name.to_owned()))
        }
        (Type::Str, Value::Str(text)) => Ok(Value::Str(text)),
        (Type::Str, _) => Err(wrong("string")),
        (Type::Int | Type::U16 | Type::U32 | Type::U64, value @ (Value::Int(_) | Value::UInt(_))) => {
            in_range(value, ty, name)
        }
        (Type::Int, _) => Err(wrong("integer")),
        (Type::U16 | Type::U32 | Type::U64, _) => {
            Err(ArgumentError::Word { name: name.to_owned(), expected: "uint64" })
        }
        (Type::Bool, Value::Bool(flag)) => Ok(Value::Bool(flag)),
        (Type::Bool, _) => Err(wrong("boolean")),
        (Type::Number, value @ (Value::Int(_) | Value::UInt(_) | Value::Float(_))) => Ok(value),
        (Type::Number, _) => Err(wrong("number")),
        (Type::Null, Value::Null) => Ok(Value::Null),
        (Type::Null, _) => Err(wrong("null")),
        (Type::Enum(words), Value::Str(text)) if words.values.contains(&text.as_str()) => {
            Ok(Value::Str(text))
        }
        (Type::Enum(_), Value::Str(value)) => Err(ArgumentError::Value { name: last(name), value }),
        (Type::Enum(_), _) => Err(wrong("string")),
        (Type::Object(by), Value::Object(object)) => {
            Ok(Value::Object(checked_object(object, by, input, &format!("{name}."))?))
        }
        (Type::Object(_), _) => Err(wrong("object")),
        (Type::List(item), Value::List(values)) => {
            let each = values.into_iter().enumerate().map(|(at, value)| {
                let name = match input {
                    Input::Json => format!("{name}[{at}]"),
                    Input::Words => format!("{name}.{at}"),
                };
                checked(value, item, input, &name)
            });
            Ok(Value::List(each.collect::<Result<_, _>>()?))
        }
        (Type::List(_), _) => Err(wrong("array")),
        (Type::Alternate(alternate), value) => choose(value, alternate, input, name),
    }
}

/// A whole number, if its type can hold it.
fn in_range(value: Value, ty: &Type, name: &str) -> Result<Value, ArgumentError> {
    let wrong = |expected| ArgumentError::Word { name: last(name), expected };
    match ty {
        Type::Int if matches!(value, Value::UInt(_)) => {
            Err(ArgumentError::Type { name: name.to_owned(), expected: "integer".to_owned() })
        }
        Type::U16 if value.as_u64().is_none_or(|n| n > u64::from(u16::MAX)) => Err(wrong("uint16_t")),
        Type::U32 if value.as_u64().is_none_or(|n| n > u64::from(u32::MAX)) => Err(wrong("uint32_t")),
        _ => Ok(value),
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
        None => Err(ArgumentError::Type { name: last(name), expected: alternate.name.to_owned() }),
    }
}

/// Reads a word of a command line as a flag.
fn read_flag(word: &str, name: &str) -> Result<Value, ArgumentError> {
    match word {
        "on" | "yes" | "true" | "y" => Ok(Value::Bool(true)),
        "off" | "no" | "false" | "n" => Ok(Value::Bool(false)),
        _ => Err(ArgumentError::Word { name: name.to_owned(), expected: "'on' or 'off'" }),
    }
}

/// Reads a word of a command line as a whole number, as C does: hexadecimal after 0x, octal after 0. No suffixes:
/// the reference takes none here.
fn read_number(word: &str) -> Option<Value> {
    let word = word.trim_start();
    let (negative, digits) = match word.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, word.strip_prefix('+').unwrap_or(word)),
    };
    let (radix, digits) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(digits) => (16, digits),
        None if digits.len() > 1 && digits.starts_with('0') => (8, digits),
        None => (10, digits),
    };
    if digits.starts_with(['+', '-']) {
        return None;
    }
    let number = i128::from(u64::from_str_radix(digits, radix).ok()?);
    let number = if negative { -number } else { number };
    i64::try_from(number).map(Value::Int).ok().or_else(|| u64::try_from(number).map(Value::UInt).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::parse;
    use crate::schema::Program;

    fn complaint(name: &str, arguments: &str) -> String {
        let Ok(Value::Object(object)) = parse(arguments.as_bytes()) else { panic!("{arguments}") };
        let command = Program::Machine.command(name).expect("known");
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
            (
                "blockdev-add",
                "{'driver':'null-co','latency-ns':1.5}",
                "Parameter 'latency-ns' expects uint64",
            ),
            ("query-version", "{'a':1}", "Parameter 'a' is unexpected"),
            ("blockdev-add", "{'driver':'qcow2','node-name':'x','file':'f','backing':null}", ""),
        ] {
            assert_eq!(complaint(command, arguments), text, "{command} {arguments}");
        }
    }

    #[test]
    fn words_become_values() {
        let object =
            crate::keyval::parse("raw,file=f,size=0x10000,read-only=on", Some("driver")).expect("valid");
        let checked = check(object, crate::schema::blockdev_options(), Input::Words).expect("fits");
        assert_eq!(checked.get("size"), Some(&Value::Int(65536)));
        assert_eq!(checked.get("read-only"), Some(&Value::Bool(true)));
    }
}

//! `key=value,other.key=value`: options as they stand on a command line.
//!
//! Dots nest (`file.driver=file`), numbers in a row make lists (`a.0=x,a.1=y`), `,,` stands for a comma inside a
//! value, and the first word may leave its key out. An argument that begins with `{` is JSON instead.

use crate::json::{self, Object, Value};

/// Why an argument is no option list, in QEMU's words.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum KeyvalError {
    /// Neither `key=value` nor an implied key.
    #[error("Expected '=' after parameter '{0}'")]
    NoValue(String),
    /// Not a key.
    #[error("Invalid parameter '{0}'")]
    BadKey(String),
    /// A key that is both a value and a parent of others.
    #[error("Parameters '{0}.*' used inconsistently")]
    Inconsistent(String),
    /// A list with holes.
    #[error("Parameter '{0}.{1}' missing")]
    ListHole(String, usize),
    /// A key, or a part of one, that is too long.
    #[error("Parameter{0} '{1}' is too long")]
    TooLong(&'static str, String),
    /// A word that asks for help.
    #[error("Help is not available for this option")]
    NoHelp,
    /// Not JSON.
    #[error("{0}")]
    Json(#[from] json::ParseError),
    /// JSON, but no object.
    #[error("JSON object expected")]
    NotAnObject,
}

/// Deepest nesting by dots.
const MAX_DOTS: usize = 64;

/// Longest part of a key between dots, in bytes. Source: the reference refuses one more.
const MAX_PART: usize = 127;

/// The options in one command line argument; `implied` is the key that the first word may leave out.
pub fn parse(argument: &str, implied: Option<&str>) -> Result<Object, KeyvalError> {
    if argument.starts_with('{') {
        return match json::parse(argument.as_bytes())? {
            Value::Object(object) => Ok(object),
            _ => Err(KeyvalError::NotAnObject),
        };
    }
    let mut object = Object::new();
    let mut rest = argument;
    let mut implied = implied;
    let mut help = false;
    while !rest.is_empty() {
        let (key, after) = rest.split_at(rest.find(['=', ',']).unwrap_or(rest.len()));
        let value_follows = after.strip_prefix('=');
        match (value_follows, implied.take()) {
            (None, _) if matches!(key, "help" | "?") => {
                help = true;
                rest = after.strip_prefix(',').unwrap_or(after);
            }
            // The implied key's value knows no doubled commas.
            (None, Some(implied)) if !key.is_empty() => {
                object.insert(implied, key);
                rest = after.strip_prefix(',').unwrap_or(after);
            }
            (value, _) => {
                let parts = parts(key)?;
                let value = value.ok_or_else(|| KeyvalError::NoValue(key.to_owned()))?;
                let (value, after) = take_value(value);
                put(&mut object, &parts, value, "")?;
                rest = after;
            }
        }
    }
    let lists = lists(Value::Object(object), "")?;
    match lists {
        _ if help => Err(KeyvalError::NoHelp),
        Value::Object(object) => Ok(object),
        _ => Err(KeyvalError::NotAnObject),
    }
}

/// The value at the start of `text`, with doubled commas undone, and what follows the comma behind it.
pub(crate) fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(',') {
        value.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        match rest.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, rest),
        }
    }
    value.push_str(rest);
    (value, "")
}

/// The parts of a key between its dots: names, and behind the first also numbers. A name may begin with a vendor's
/// domain (`__org.example_name`), which is one part with it.
fn parts(key: &str) -> Result<Vec<&str>, KeyvalError> {
    let bad = || KeyvalError::BadKey(key.to_owned());
    let mut parts = Vec::new();
    let mut rest = key;
    loop {
        let len = part_len(rest).ok_or_else(bad)?;
        let (part, after) = rest.split_at(len);
        let number = part.bytes().all(|b| b.is_ascii_digit());
        if (number && parts.is_empty()) || parts.len() > MAX_DOTS {
            return Err(bad());
        }
        if len > MAX_PART {
            let what = if part == key { "" } else { " fragment" };
            return Err(KeyvalError::TooLong(what, part.to_owned()));
        }
        parts.push(part);
        match after.strip_prefix('.') {
            Some(after) => rest = after,
            None if after.is_empty() => return Ok(parts),
            None => return Err(bad()),
        }
    }
}

/// The length of the part of a key at the start of `text`; nothing if there is none.
fn part_len(text: &str) -> Option<usize> {
    let run = |text: &str, fits: fn(u8) -> bool| text.bytes().take_while(|b| fits(*b)).count();
    let digits = run(text, |b| b.is_ascii_digit());
    if digits > 0 {
        return Some(digits);
    }
    let mut prefix = 0;
    if let Some(domain) = text.strip_prefix("__") {
        prefix = 2 + run(domain, |b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-'));
        prefix = text.get(prefix..)?.starts_with('_').then_some(prefix + 1)?;
    }
    let name = text.get(prefix..)?;
    name.starts_with(|c: char| c.is_ascii_alphabetic())
        .then(|| prefix + run(name, |b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')))
}

fn put(object: &mut Object, parts: &[&str], value: String, above: &str) -> Result<(), KeyvalError> {
    let Some((&first, rest)) = parts.split_first() else { return Ok(()) };
    if rest.is_empty() {
        if matches!(object.get(first), Some(Value::Object(_))) {
            return Err(KeyvalError::Inconsistent(format!("{above}{first}")));
        }
        object.insert(first, value);
        return Ok(());
    }
    let mut inner = match object.remove(first) {
        None => Object::new(),
        Some(Value::Object(inner)) => inner,
        Some(_) => return Err(KeyvalError::Inconsistent(format!("{above}{first}"))),
    };
    put(&mut inner, rest, value, &format!("{above}{first}."))?;
    object.insert(first, inner);
    Ok(())
}

/// Objects whose members are all numbers are lists.
fn lists(value: Value, path: &str) -> Result<Value, KeyvalError> {
    let Value::Object(object) = value else { return Ok(value) };
    let numbers = object.iter().filter(|(name, _)| name.bytes().all(|b| b.is_ascii_digit())).count();
    if numbers == 0 || path.is_empty() {
        let mut done = Object::new();
        for (name, value) in object {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            done.insert(&name, lists(value, &path)?);
        }
        return Ok(Value::Object(done));
    }
    if numbers < object.len() {
        return Err(KeyvalError::Inconsistent(path.to_owned()));
    }
    let mut values = Vec::with_capacity(numbers);
    let mut numbered: std::collections::HashMap<_, _> =
        object.into_iter().filter_map(|(name, value)| Some((name.parse::<usize>().ok()?, value))).collect();
    for at in 0..numbers {
        let value = numbered.remove(&at);
        let value = value.ok_or_else(|| KeyvalError::ListHole(path.to_owned(), at))?;
        values.push(lists(value, &format!("{path}.{at}"))?);
    }
    Ok(Value::List(values))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(argument: &str) -> String {
        match parse(argument, Some("driver")) {
            Ok(object) => Value::Object(object).to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn keys_nest_and_commas_double() {
        for (argument, result) in [
            ("qcow2,file.driver=file", r#"{"driver": "qcow2", "file": {"driver": "file"}}"#),
            ("driver=file,filename=a,,b=c", r#"{"driver": "file", "filename": "a,b=c"}"#),
            ("raw,l.0=a,l.1=b", r#"{"driver": "raw", "l": ["a", "b"]}"#),
            ("raw,l.1=b,l.2=c", "Parameter 'l.0' missing"),
            ("raw,foo", "Expected '=' after parameter 'foo'"),
            ("raw,a=1,a.b=2", "Parameters 'a.*' used inconsistently"),
            ("raw,a b=1", "Invalid parameter 'a b'"),
            ("raw,a..b=1", "Invalid parameter 'a..b'"),
            (",", "Invalid parameter ''"),
            ("qcow2,,", "Invalid parameter ''"),
            ("driver=qcow2,,", r#"{"driver": "qcow2,"}"#),
            ("raw,", r#"{"driver": "raw"}"#),
            ("raw,=x", "Invalid parameter ''"),
            ("raw,1a=1", "Invalid parameter '1a'"),
            ("raw,5", "Invalid parameter '5'"),
            ("raw,a.1b=1", "Invalid parameter 'a.1b'"),
            ("raw,_a=1", "Invalid parameter '_a'"),
            ("raw,__a=1", "Invalid parameter '__a'"),
            ("raw,a._b=1", "Invalid parameter 'a._b'"),
            ("__org.b_c.d=1", r#"{"__org.b_c": {"d": "1"}}"#),
            ("raw,l.00=a", r#"{"driver": "raw", "l": ["a"]}"#),
            ("raw,l.0=a,l.x=b", "Parameters 'l.*' used inconsistently"),
            ("raw,a.b.c=2,a.b=1", "Parameters 'a.b.*' used inconsistently"),
            ("l.0.1=x", "Parameter 'l.0.0' missing"),
            ("[]", r#"{"driver": "[]"}"#),
            ("help", "Help is not available for this option"),
            ("raw,help,x", "Expected '=' after parameter 'x'"),
            ("?=1", "Invalid parameter '?'"),
            ("{", "JSON parse error, premature EOI"),
            (r#"{"a":1}x"#, "Expecting at most one JSON value"),
            (r#"{"size":1,"driver":"raw"}"#, r#"{"driver": "raw", "size": 1}"#),
        ] {
            assert_eq!(parsed(argument), result, "{argument}");
        }
    }
}

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
    /// Not JSON.
    #[error("{0}")]
    Json(#[from] json::ParseError),
    /// JSON, but no object.
    #[error("JSON object expected")]
    NotAnObject,
}

/// Deepest nesting by dots.
const MAX_DOTS: usize = 64;

/// The options in one command line argument; `implied` is the key that the first word may leave out.
pub fn parse(argument: &str, implied: Option<&str>) -> Result<Object, KeyvalError> {
    if argument.starts_with('{') {
        return match json::parse(argument.as_bytes())? {
            Value::Object(object) => Ok(object),
            _ => Err(KeyvalError::NotAnObject),
        };
    }
    let mut object = Object::new();
    for (at, word) in words(argument).into_iter().enumerate() {
        let (key, value) = match (word.split_once('='), implied) {
            (Some((key, _)), Some(implied)) if at == 0 && !is_key(key) && key.contains(',') => {
                (implied.to_owned(), word.clone())
            }
            (Some((key, value)), _) => (key.to_owned(), value.to_owned()),
            (None, Some(implied)) if at == 0 => (implied.to_owned(), word),
            (None, _) => return Err(KeyvalError::NoValue(word)),
        };
        if !is_key(&key) || key.split('.').count() > MAX_DOTS {
            return Err(KeyvalError::BadKey(key));
        }
        put(&mut object, &key, value, "")?;
    }
    lists(Value::Object(object), "").map(|value| match value {
        Value::Object(object) => object,
        _ => Object::new(),
    })
}

/// Cuts at single commas; doubled ones stay, as one.
fn words(argument: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut chars = argument.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                word.push(',');
            }
            ',' => words.push(std::mem::take(&mut word)),
            other => word.push(other),
        }
    }
    if !word.is_empty() || argument.is_empty() {
        words.push(word);
    }
    words.retain(|word| !word.is_empty());
    words
}

fn is_key(key: &str) -> bool {
    key.split('.').all(|part| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    })
}

fn put(object: &mut Object, key: &str, value: String, above: &str) -> Result<(), KeyvalError> {
    let Some((first, rest)) = key.split_once('.') else {
        if matches!(object.get(key), Some(Value::Object(_))) {
            return Err(KeyvalError::Inconsistent(format!("{above}{key}")));
        }
        object.insert(key, value);
        return Ok(());
    };
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
    for at in 0..numbers {
        let value = object.get(&at.to_string()).cloned();
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
            (r#"{"size":1,"driver":"raw"}"#, r#"{"driver": "raw", "size": 1}"#),
        ] {
            assert_eq!(parsed(argument), result, "{argument}");
        }
    }
}

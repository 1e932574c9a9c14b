//! The value of one argument: what stands behind the first `=` of a word.
//!
//! Whole numbers, `true`, `false` and `null` are what they say (also as Python writes them), brackets hold JSON or
//! Python's form of it, quotes hold a text whatever it looks like, and everything else is a text as it stands.

use underlay_qmp::json::{self, Value};

use crate::line::LineError;
use crate::words::quoted;

/// The value that `text` stands for; `key` is for messages.
pub(crate) fn parse(key: &str, text: &str) -> Result<Value, LineError> {
    match text.as_bytes().first() {
        Some(b'{' | b'[') => literal(key, &as_json(text)),
        Some(b'"' | b'\'') => literal(key, text),
        _ => bare(key, text),
    }
}

fn literal(key: &str, json: &str) -> Result<Value, LineError> {
    json::parse(json.as_bytes()).map_err(|error| LineError::Literal(key.to_owned(), error.to_string()))
}

fn bare(key: &str, text: &str) -> Result<Value, LineError> {
    if text.eq_ignore_ascii_case("true") || text.eq_ignore_ascii_case("false") {
        return Ok(Value::Bool(text.eq_ignore_ascii_case("true")));
    }
    if matches!(text, "null" | "None") {
        return Ok(Value::Null);
    }
    let Some(digits) = whole_number(text) else { return Ok(text.into()) };
    let number = digits.parse().map(Value::Int).or_else(|_| digits.parse().map(Value::UInt));
    number.map_err(|_| LineError::TooLarge(key.to_owned()))
}

/// The digits of a whole number as Python reads one (`-3`, `+5`, `08`, `1_000`), with its minus sign.
fn whole_number(text: &str) -> Option<String> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let sound = digits.split('_').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
    let sign = if text.starts_with('-') { "-" } else { "" };
    sound.then(|| format!("{sign}{}", digits.replace('_', "")))
}

/// JSON for what may be Python: True, False and None outside of texts.
fn as_json(text: &str) -> String {
    let mut json = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let word = rest.find(|c: char| !c.is_alphanumeric()).unwrap_or(rest.len());
        let len = match c {
            '"' | '\'' => quoted(rest, c).unwrap_or(rest.len()),
            _ => word.max(c.len_utf8()),
        };
        let (piece, after) = rest.split_at(len);
        json.push_str(match piece {
            "True" => "true",
            "False" => "false",
            "None" => "null",
            other => other,
        });
        rest = after;
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What qmp-shell 0.0.6 sends for the same words, but for those in the next test.
    #[test]
    fn values_are_those_of_qmp_shell() {
        for (text, value) in [
            ("1", "1"),
            ("-3", "-3"),
            ("08", "8"),
            ("+5", "5"),
            ("1_000", "1000"),
            ("1__0", "\"1__0\""),
            ("true", "true"),
            ("TRUE", "true"),
            ("False", "false"),
            ("none", "\"none\""),
            ("NULL", "\"NULL\""),
            ("1.5", "\"1.5\""),
            ("1e3", "\"1e3\""),
            ("0x10", "\"0x10\""),
            ("", "\"\""),
            ("b=c", "\"b=c\""),
            (r"x\ny", r#""x\\ny""#),
            (r#"{"x":1,"y":[1,2]}"#, r#"{"x": 1, "y": [1, 2]}"#),
            ("{'x':True,'y':None}", r#"{"x": true, "y": null}"#),
            (r#"[1,"a",null,1.5]"#, r#"[1, "a", null, 1.5]"#),
        ] {
            assert_eq!(parse("k", text).expect(text).as_it_came(false), value, "{text}");
        }
    }

    /// qmp-shell sends `null` as a text, keeps quotes as part of the text, and cannot read blanks in brackets.
    #[test]
    fn values_that_are_better_than_there() {
        for (text, value) in [
            ("null", "null"),
            ("None", "null"),
            ("\"5\"", "\"5\""),
            ("'null'", "\"null\""),
            ("'a b'", "\"a b\""),
            (r#""\"\u00e9\n""#, r#""\"\u00E9\n""#),
            (r#"{"None": "True False", "a": [ None ]}"#, r#"{"None": "True False", "a": [null]}"#),
            ("18446744073709551615", "18446744073709551615"),
        ] {
            assert_eq!(parse("k", text).expect(text).as_it_came(false), value, "{text}");
        }
        assert_eq!(parse("k", "18446744073709551616"), Err(LineError::TooLarge("k".into())));
        let error = parse("k", "{x}").expect_err("no JSON").to_string();
        assert_eq!(error, "The value of 'k' is not sound: JSON parse error, invalid keyword 'x'");
    }
}

//! Printing, with the members of each object in QEMU's order.
//!
//! QEMU keeps objects in a hash table of 512 buckets and prints bucket by bucket, the member that came last first.
//! Doing the same lets outputs be compared line by line. Source: `design/qemu-surface.md` section 2.

use std::fmt::{self, Write};

use super::{Object, Value};

/// The bucket of a member's name.
fn bucket(name: &str) -> u32 {
    let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
    let mut hash = 0x238F_13AF_u32.wrapping_mul(len);
    for (at, byte) in name.bytes().enumerate() {
        let shift = u32::try_from(at * 5 % 24).unwrap_or_default();
        hash = hash.wrapping_add(u32::from(byte) << shift);
    }
    1_103_515_243_u32.wrapping_mul(hash).wrapping_add(12345) % 512
}

/// The members in the order in which QEMU prints them.
pub(super) fn in_order(object: &Object) -> Vec<(&str, &Value)> {
    let mut members: Vec<_> = object.iter().collect();
    members.reverse();
    members.sort_by_key(|(name, _)| bucket(name));
    members
}

/// The names of an object's members in the order in which they are printed.
pub fn printed_order(object: &Object) -> Vec<String> {
    in_order(object).into_iter().map(|(name, _)| name.to_owned()).collect()
}

/// How to print.
#[derive(Clone, Copy)]
pub(super) struct Style {
    /// Over several lines, four blanks a level.
    pub(super) lines: bool,
    /// Members as they came, and nothing between the braces of an empty object; else all as QEMU.
    pub(super) as_it_came: bool,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        print(f, self, Style { lines: false, as_it_came: false }, 0)
    }
}

pub(super) fn to_text(value: &Value, style: Style) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = print(&mut out, value, style, 0);
    out
}

fn print(out: &mut impl Write, value: &Value, style: Style, depth: usize) -> fmt::Result {
    match value {
        Value::List(values) => {
            out.write_char('[')?;
            for (at, value) in values.iter().enumerate() {
                begin_item(out, style, at, depth)?;
                print(out, value, style, depth + 1)?;
            }
            end_items(out, style, values.is_empty(), depth)?;
            out.write_char(']')
        }
        Value::Object(object) => {
            out.write_char('{')?;
            let members = if style.as_it_came { object.iter().collect() } else { in_order(object) };
            for (at, (name, value)) in members.into_iter().enumerate() {
                begin_item(out, style, at, depth)?;
                string(out, name)?;
                out.write_str(": ")?;
                print(out, value, style, depth + 1)?;
            }
            end_items(out, style, object.is_empty(), depth)?;
            out.write_char('}')
        }
        scalar => print_scalar(out, scalar),
    }
}

fn begin_item(out: &mut impl Write, style: Style, at: usize, depth: usize) -> fmt::Result {
    match (style.lines, at) {
        (true, at) => {
            out.write_str(if at == 0 { "" } else { "," })?;
            new_line(out, depth + 1)
        }
        (false, 0) => Ok(()),
        (false, _) => out.write_str(", "),
    }
}

fn end_items(out: &mut impl Write, style: Style, empty: bool, depth: usize) -> fmt::Result {
    if style.lines && !(empty && style.as_it_came) { new_line(out, depth) } else { Ok(()) }
}

fn new_line(out: &mut impl Write, depth: usize) -> fmt::Result {
    write!(out, "\n{:width$}", "", width = depth * 4)
}

fn print_scalar(out: &mut impl Write, value: &Value) -> fmt::Result {
    match value {
        Value::Null => out.write_str("null"),
        Value::Bool(flag) => write!(out, "{flag}"),
        Value::Int(number) => write!(out, "{number}"),
        Value::UInt(number) => write!(out, "{number}"),
        Value::Float(number) => float(out, *number),
        Value::Str(text) => string(out, text),
        Value::List(_) | Value::Object(_) => Ok(()),
    }
}

/// A number with 17 digits, as C prints it with `%.17g`.
fn float(out: &mut impl Write, number: f64) -> fmt::Result {
    if !number.is_finite() {
        return out.write_str(&number.to_string().to_lowercase());
    }
    let text = format!("{number:.16e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..17).contains(&exponent) {
        let decimals = usize::try_from(16 - exponent).unwrap_or_default();
        return out.write_str(without_zeroes(&format!("{number:.decimals$}")));
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    write!(out, "{}e{sign}{:02}", without_zeroes(mantissa), exponent.unsigned_abs())
}

fn without_zeroes(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

/// A string as QEMU escapes it: ASCII only.
fn string(out: &mut impl Write, text: &str) -> fmt::Result {
    out.write_char('"')?;
    for c in text.chars() {
        match c {
            '"' => out.write_str("\\\"")?,
            '\\' => out.write_str("\\\\")?,
            '\u{8}' => out.write_str("\\b")?,
            '\u{c}' => out.write_str("\\f")?,
            '\n' => out.write_str("\\n")?,
            '\r' => out.write_str("\\r")?,
            '\t' => out.write_str("\\t")?,
            ' '..='~' => out.write_char(c)?,
            other => {
                let mut units = [0; 2];
                for unit in other.encode_utf16(&mut units) {
                    write!(out, "\\u{unit:04X}")?;
                }
            }
        }
    }
    out.write_char('"')
}

#[cfg(test)]
mod tests {
    use super::super::parse;

    #[test]
    fn members_come_in_qemus_order() {
        for (input, printed) in [
            (r#"{"id":1,"status":2}"#, r#"{"status": 2, "id": 1}"#),
            (
                r#"{"type":1,"device":2,"len":3,"offset":4,"speed":5}"#,
                r#"{"device": 2, "len": 3, "offset": 4, "speed": 5, "type": 1}"#,
            ),
            (r#"{"data":1,"event":2,"timestamp":3}"#, r#"{"timestamp": 3, "event": 2, "data": 1}"#),
            (r#"{"desc":1,"class":2}"#, r#"{"class": 2, "desc": 1}"#),
            (
                r#"[{},[],"a\"\\\u00e9\n",-1,1.5,null,true]"#,
                r#"[{}, [], "a\"\\\u00E9\n", -1, 1.5, null, true]"#,
            ),
        ] {
            assert_eq!(parse(input.as_bytes()).expect("valid").to_string(), printed);
        }
    }

    #[test]
    fn pretty_form() {
        let value = parse(br#"{"a":[1,{}],"b":[]}"#).expect("valid");
        assert_eq!(
            value.to_pretty(),
            "{\n    \"a\": [\n        1,\n        {\n        }\n    ],\n    \"b\": [\n    ]\n}"
        );
    }

    #[test]
    fn as_it_came() {
        let value = parse(br#"{"execute":"x","arguments":{"node-name":"n","driver":1,"a":[],"b":[{},2]}}"#);
        let value = value.expect("valid");
        let line = r#"{"execute": "x", "arguments": {"node-name": "n", "driver": 1, "a": [], "b": [{}, 2]}}"#;
        assert_eq!(value.as_it_came(false), line);
        let lines = "{\n    \"execute\": \"x\",\n    \"arguments\": {\n        \"node-name\": \"n\",\n        \
                     \"driver\": 1,\n        \"a\": [],\n        \"b\": [\n            {},\n            2\n        ]\n    }\n}";
        assert_eq!(value.as_it_came(true), lines);
    }
}

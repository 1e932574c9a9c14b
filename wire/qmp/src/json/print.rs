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

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::List(values) => {
                f.write_char('[')?;
                for (at, value) in values.iter().enumerate() {
                    f.write_str(if at == 0 { "" } else { ", " })?;
                    value.fmt(f)?;
                }
                f.write_char(']')
            }
            Self::Object(object) => {
                f.write_char('{')?;
                for (at, (name, value)) in in_order(object).into_iter().enumerate() {
                    f.write_str(if at == 0 { "" } else { ", " })?;
                    string(f, name)?;
                    f.write_str(": ")?;
                    value.fmt(f)?;
                }
                f.write_char('}')
            }
            scalar => print_scalar(f, scalar),
        }
    }
}

pub(super) fn pretty(value: &Value) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = print_pretty(&mut out, value, 0);
    out
}

fn print_pretty(out: &mut String, value: &Value, depth: usize) -> fmt::Result {
    let line = |out: &mut String, depth: usize| write!(out, "\n{:width$}", "", width = depth * 4);
    match value {
        Value::List(values) => {
            out.push('[');
            for (at, value) in values.iter().enumerate() {
                out.push_str(if at == 0 { "" } else { "," });
                line(out, depth + 1)?;
                print_pretty(out, value, depth + 1)?;
            }
            line(out, depth)?;
            out.push(']');
        }
        Value::Object(object) => {
            out.push('{');
            for (at, (name, value)) in in_order(object).into_iter().enumerate() {
                out.push_str(if at == 0 { "" } else { "," });
                line(out, depth + 1)?;
                string(out, name)?;
                out.push_str(": ");
                print_pretty(out, value, depth + 1)?;
            }
            line(out, depth)?;
            out.push('}');
        }
        scalar => print_scalar(out, scalar)?,
    }
    Ok(())
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
}

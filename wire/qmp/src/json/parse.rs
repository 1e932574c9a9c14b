//! Parsing, as lenient as QEMU: strings may stand in single quotes.

use std::collections::HashSet;

use super::{Object, Value};
use crate::codec::{Piece, Splitter};

/// Why some bytes are not JSON: the whole message, in QEMU's words.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct ParseError(pub String);

/// Parses exactly one value with nothing but blanks around it.
pub fn parse(bytes: &[u8]) -> Result<Value, ParseError> {
    let mut splitter = Splitter::default();
    let mut pieces = splitter.push(bytes);
    pieces.extend(splitter.end());
    let one_value = || Err(ParseError("Expecting at most one JSON value".to_owned()));
    let mut value = None;
    for piece in pieces {
        value = match piece {
            _ if value.is_some() => return one_value(),
            Piece::Value(bytes) => Some(parse_message(&bytes)?),
            Piece::Garbage(text) => return Err(ParseError(text)),
        };
    }
    match (value, splitter.is_within()) {
        (Some(value), false) => Ok(value),
        (Some(_), true) => one_value(),
        // What there is may be wrong before its end.
        (None, true) => parse_message(splitter.rest()).and_then(|_| error("premature EOI")),
        (None, false) => Err(ParseError("Expecting a JSON value".to_owned())),
    }
}

/// Parses a message of which a [`Splitter`] has said that it is one.
pub fn parse_message(bytes: &[u8]) -> Result<Value, ParseError> {
    Parser { bytes, at: 0 }.value()
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
}

fn error<T>(text: impl AsRef<str>) -> Result<T, ParseError> {
    Err(ParseError(format!("JSON parse error, {}", text.as_ref())))
}

impl Parser<'_> {
    fn blanks(&mut self) {
        while self.peek() == Some(b' ') {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn value(&mut self) -> Result<Value, ParseError> {
        self.blanks();
        match self.peek() {
            None => error("premature EOI"),
            Some(b'{') => self.object(),
            Some(b'[') => self.list(),
            Some(quote @ (b'"' | b'\'')) => Ok(Value::Str(self.string(quote)?)),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b'a'..=b'z') => self.keyword(),
            Some(_) => error("expecting value"),
        }
    }

    /// What should be here is not, or there is nothing more at all.
    fn missing<T>(&self, text: &str) -> Result<T, ParseError> {
        error(if self.peek().is_none() { "premature EOI" } else { text })
    }

    fn object(&mut self) -> Result<Value, ParseError> {
        self.at += 1;
        let mut object = Object::new();
        let mut names = HashSet::new();
        self.blanks();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(Value::Object(object));
        }
        loop {
            let Value::Str(name) = self.value()? else { return error("key is not a string in object") };
            self.blanks();
            if self.peek() != Some(b':') {
                return self.missing("missing : in object pair");
            }
            self.at += 1;
            let value = self.value()?;
            if !names.insert(name.clone()) {
                return error("duplicate key");
            }
            object.members.push((name, value));
            self.blanks();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b'}') => break self.at += 1,
                _ => return self.missing("expected separator in dict"),
            }
        }
        Ok(Value::Object(object))
    }

    fn list(&mut self) -> Result<Value, ParseError> {
        self.at += 1;
        let mut values = Vec::new();
        self.blanks();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(Value::List(values));
        }
        loop {
            values.push(self.value()?);
            self.blanks();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b']') => break self.at += 1,
                _ => return self.missing("expected separator in list"),
            }
        }
        Ok(Value::List(values))
    }

    fn keyword(&mut self) -> Result<Value, ParseError> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().take_while(|b| b.is_ascii_lowercase()).count();
        let word = &rest[..len];
        self.at += len;
        match word {
            b"true" => Ok(Value::Bool(true)),
            b"false" => Ok(Value::Bool(false)),
            b"null" => Ok(Value::Null),
            other => error(format!("invalid keyword '{}'", String::from_utf8_lossy(other))),
        }
    }

    fn number(&mut self) -> Result<Value, ParseError> {
        let rest = &self.bytes[self.at..];
        let digits = |from: usize| from + rest.iter().skip(from).take_while(|b| b.is_ascii_digit()).count();
        let mut len = digits(usize::from(rest.starts_with(b"-")));
        let whole = !matches!(rest.get(len), Some(b'.' | b'e' | b'E'));
        if rest.get(len) == Some(&b'.') {
            len = digits(len + 1);
        }
        if matches!(rest.get(len), Some(b'e' | b'E')) {
            len = digits(len + 1 + usize::from(matches!(rest.get(len + 1), Some(b'+' | b'-'))));
        }
        let text = std::str::from_utf8(rest.get(..len).unwrap_or(rest)).unwrap_or_default();
        self.at += text.len();
        if whole && let Ok(number) = text.parse() {
            return Ok(Value::Int(number));
        }
        if whole && let Ok(number) = text.parse() {
            return Ok(Value::UInt(number));
        }
        // Too large a number is infinite, in the reference too.
        text.parse().map(Value::Float).or_else(|_| error(format!("stray '{text}'")))
    }

    fn string(&mut self, quote: u8) -> Result<String, ParseError> {
        self.at += 1;
        let mut text = Vec::new();
        loop {
            let Some(byte) = self.peek() else { return error("premature EOI") };
            self.at += 1;
            match byte {
                b if b == quote => break,
                b'\\' => self.escape(&mut text)?,
                // The one overlong sequence that the reference takes.
                0xc0 if self.peek() == Some(0x80) => {
                    self.at += 1;
                    text.push(0);
                }
                other => text.push(other),
            }
        }
        match String::from_utf8(text) {
            Ok(text) if text.chars().all(is_character) => Ok(text),
            _ => error("invalid UTF-8 sequence in string"),
        }
    }

    fn escape(&mut self, text: &mut Vec<u8>) -> Result<(), ParseError> {
        let Some(byte) = self.peek() else { return error("premature EOI") };
        self.at += 1;
        let plain = match byte {
            b'"' | b'\'' | b'\\' | b'/' => byte,
            b'b' => 8,
            b'f' => 12,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'u' => return self.unicode(text),
            _ => return error("invalid escape sequence in string"),
        };
        text.push(plain);
        Ok(())
    }

    /// What follows `\u`: four digits, and as many again when they are the first half of a pair.
    fn unicode(&mut self, text: &mut Vec<u8>) -> Result<(), ParseError> {
        let start = self.at - 2;
        let mut end = self.at + 4;
        let mut code = self.hex4(self.at);
        if let Some(first @ 0xd800..=0xdbff) = code {
            let pair = self.bytes.get(end..end + 2).is_some_and(|next| next == b"\\u");
            code = None;
            if let (true, Some(second @ 0xdc00..=0xdfff)) = (pair, self.hex4(end + 2)) {
                code = Some(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00));
                end += 6;
            }
        }
        let Some(c) = code.and_then(char::from_u32).filter(|c| is_character(*c)) else {
            let token = &self.bytes[start..end.min(self.end_of_string(start))];
            return error(format!("{} is not a valid Unicode character", String::from_utf8_lossy(token)));
        };
        text.extend(c.encode_utf8(&mut [0; 4]).bytes());
        self.at = end;
        Ok(())
    }

    fn hex4(&self, at: usize) -> Option<u32> {
        let digits = self.bytes.get(at..at + 4).filter(|d| d.iter().all(u8::is_ascii_hexdigit))?;
        u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    }

    /// Behind the quote that ends a string, for messages: the next quote after `from`.
    fn end_of_string(&self, from: usize) -> usize {
        let quote = self.bytes[from..].iter().position(|b| matches!(b, b'"' | b'\''));
        quote.map_or(self.bytes.len(), |at| from + at + 1)
    }
}

/// Whether a code stands for a character at all: texts hold no others.
pub fn is_character(c: char) -> bool {
    let code = u32::from(c);
    code & 0xfffe != 0xfffe && !(0xfdd0..=0xfdef).contains(&code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_qemu_takes() {
        assert_eq!(parse(b"1 2"), Err(ParseError("Expecting at most one JSON value".into())));
        assert_eq!(parse(b"{"), Err(ParseError("JSON parse error, premature EOI".into())));
        for (text, why) in [
            ("{\"a\": \"b", "stray '\"b'"),
            ("{['a", "stray ''a'"),
            ("{\"a\": \"x\\", "stray '\"x\\'"),
            ("{\"a\": 1.", "stray '1.'"),
            ("{\"a\": -", "stray '-'"),
            ("{\"a\": 12", "premature EOI"),
            ("{\"a\": tru", "invalid keyword 'tru'"),
            ("{\"a\" 5", "missing : in object pair"),
            ("{\"a\": [1 2", "expected separator in list"),
            ("{\"a\":1,", "premature EOI"),
            ("{\"a\", {", "missing : in object pair"),
            ("{\"a\": 1, {\"b\": 2}", "key is not a string in object"),
        ] {
            assert_eq!(parse(text.as_bytes()), Err(ParseError(format!("JSON parse error, {why}"))), "{text}");
        }
        assert_eq!(parse(br#" 'a"b' "#), Ok(Value::Str("a\"b".into())));
        assert_eq!(parse(br#""\ud83d\ude00""#), Ok(Value::Str("\u{1f600}".into())));
        assert_eq!(parse(b"18446744073709551615"), Ok(Value::UInt(u64::MAX)));
        assert_eq!(parse(b"-9223372036854775808"), Ok(Value::Int(i64::MIN)));
        assert_eq!(parse(b"1e3"), Ok(Value::Float(1000.0)));
    }

    #[test]
    fn refuses_the_rest_without_a_panic() {
        let deep = [b'['; 5000];
        for bad in [
            &b"{"[..],
            b"[1,]",
            b"{'a'}",
            b"01",
            b"-",
            b"nul",
            b"\"\\x\"",
            b"\"\\ud800\"",
            b"\"\xff\"",
            b"",
            b"1 2",
            &deep,
        ] {
            assert!(parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
        let mut seed = 7_u64;
        for _ in 0..20_000 {
            let bytes: Vec<u8> = (0..12)
                .map(|_| {
                    seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    b"{}[]:,'\"\\u0d8-1.e tn\xc3\xa9"[usize::try_from((seed >> 40) % 22).expect("small")]
                })
                .collect();
            let _ = parse(&bytes);
        }
    }
}

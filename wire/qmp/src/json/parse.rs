//! Parsing, as lenient as QEMU: strings may stand in single quotes.

use super::{Object, Value};

/// Deepest nesting. Source: QEMU's limit.
const MAX_NESTING: usize = 1024;

/// Why some bytes are not JSON, in QEMU's words.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("JSON parse error, {0}")]
pub struct ParseError(pub String);

/// Parses exactly one value with nothing but blanks around it.
pub fn parse(bytes: &[u8]) -> Result<Value, ParseError> {
    let mut parser = Parser { bytes, at: 0, depth: 0 };
    let value = parser.value()?;
    parser.blanks();
    if parser.at < bytes.len() {
        return Err(parser.stray());
    }
    Ok(value)
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
    depth: usize,
}

fn error<T>(text: impl Into<String>) -> Result<T, ParseError> {
    Err(ParseError(text.into()))
}

impl Parser<'_> {
    fn blanks(&mut self) {
        while self.peek().is_some_and(|b| matches!(b, b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    /// The next token that is not blank, as a message names it.
    fn stray(&self) -> ParseError {
        let rest = &self.bytes[self.at..];
        let word = rest.iter().take_while(|b| b.is_ascii_alphanumeric() || **b == b'-').count().max(1);
        let token = String::from_utf8_lossy(rest.get(..word).unwrap_or(rest)).into_owned();
        if token.is_empty() {
            return ParseError("premature end of input".to_owned());
        }
        ParseError(format!("stray '{token}'"))
    }

    fn value(&mut self) -> Result<Value, ParseError> {
        self.blanks();
        match self.peek() {
            None => error("premature end of input"),
            Some(b'{') => self.nested(Self::object),
            Some(b'[') => self.nested(Self::list),
            Some(quote @ (b'"' | b'\'')) => Ok(Value::Str(self.string(quote)?)),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b'a'..=b'z') => self.keyword(),
            Some(_) => error("expecting value"),
        }
    }

    fn nested(&mut self, inner: fn(&mut Self) -> Result<Value, ParseError>) -> Result<Value, ParseError> {
        self.depth += 1;
        if self.depth > MAX_NESTING {
            return error("JSON nesting depth limit exceeded");
        }
        self.at += 1;
        let value = inner(self)?;
        self.depth -= 1;
        Ok(value)
    }

    fn object(&mut self) -> Result<Value, ParseError> {
        let mut object = Object::new();
        self.blanks();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(Value::Object(object));
        }
        loop {
            self.blanks();
            let name = match self.peek() {
                Some(quote @ (b'"' | b'\'')) => self.string(quote)?,
                None => return error("premature end of input"),
                Some(_) => return error("key is not a string in object"),
            };
            self.blanks();
            if self.peek() != Some(b':') {
                return error("missing : in object pair");
            }
            self.at += 1;
            let value = self.value()?;
            if object.get(&name).is_some() {
                return error("duplicate key");
            }
            object.members.push((name, value));
            self.blanks();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b'}') => break self.at += 1,
                _ => return error("expected separator in dict"),
            }
        }
        Ok(Value::Object(object))
    }

    fn list(&mut self) -> Result<Value, ParseError> {
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
                _ => return error("expected separator in list"),
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
        let len =
            rest.iter().take_while(|b| matches!(b, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E')).count();
        let text = std::str::from_utf8(&rest[..len]).unwrap_or_default();
        let digits = text.strip_prefix('-').unwrap_or(text);
        let whole = digits.bytes().all(|b| b.is_ascii_digit());
        let leading_zero =
            digits.len() > 1 && digits.starts_with('0') && digits.as_bytes()[1].is_ascii_digit();
        let bad = digits.is_empty()
            || !digits.as_bytes()[0].is_ascii_digit()
            || leading_zero
            || digits.ends_with('.');
        let token = || format!("invalid token '{text}'");
        if bad {
            return error(token());
        }
        self.at += len;
        if whole {
            if let Ok(number) = text.parse() {
                return Ok(Value::Int(number));
            }
            if let Ok(number) = text.parse() {
                return Ok(Value::UInt(number));
            }
        }
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(Value::Float(number)),
            _ => error(token()),
        }
    }

    fn string(&mut self, quote: u8) -> Result<String, ParseError> {
        self.at += 1;
        let mut text = Vec::new();
        loop {
            let Some(byte) = self.peek() else { return error("premature end of input") };
            self.at += 1;
            match byte {
                b if b == quote => break,
                b'\\' => self.escape(&mut text)?,
                0..=0x1f => return error("invalid token in string"),
                other => text.push(other),
            }
        }
        String::from_utf8(text).or_else(|_| error("invalid UTF-8 sequence in string"))
    }

    fn escape(&mut self, text: &mut Vec<u8>) -> Result<(), ParseError> {
        let Some(byte) = self.peek() else { return error("premature end of input") };
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

    fn unicode(&mut self, text: &mut Vec<u8>) -> Result<(), ParseError> {
        let first = self.hex4()?;
        let code = match first {
            0xd800..=0xdbff if self.bytes[self.at..].starts_with(b"\\u") => {
                self.at += 2;
                let second = self.hex4()?;
                if !(0xdc00..=0xdfff).contains(&second) {
                    return error("\\u escape is not a valid Unicode character");
                }
                0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)
            }
            other => other,
        };
        match char::from_u32(code) {
            Some(c) if code != 0 => text.extend(c.encode_utf8(&mut [0; 4]).bytes()),
            _ => return error(format!("\\u{first:04x} is not a valid Unicode character")),
        }
        Ok(())
    }

    fn hex4(&mut self) -> Result<u32, ParseError> {
        let digits = self.bytes.get(self.at..self.at + 4).and_then(|digits| std::str::from_utf8(digits).ok());
        let code = digits.filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        match code.and_then(|digits| u32::from_str_radix(digits, 16).ok()) {
            Some(code) => {
                self.at += 4;
                Ok(code)
            }
            None => error("invalid hex escape in string"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_qemu_takes() {
        assert_eq!(parse(b"'it''"), Err(ParseError("stray '''".into())));
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

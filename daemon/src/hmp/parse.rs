//! What was typed behind a command, by the description of its arguments ([`super::table`]). Texts are QEMU's.

use underlay_qmp::json::{Object, Value};

/// A mebibyte: the unit of sizes that say none.
const MIB: f64 = 1_048_576.0;

/// Reads the arguments of a command called `name`. The error is a line for the user.
pub fn arguments(name: &str, description: &str, typed: &str) -> Result<Object, String> {
    let mut parsed = Object::new();
    let mut text = Text(typed);
    let all: Vec<(&str, &str)> =
        description.split(',').filter_map(|argument| argument.split_once(':')).collect();
    for (at, (key, kind)) in all.iter().enumerate() {
        text.skip_blanks();
        if let Some(flag) = kind.strip_prefix('-') {
            if text
                .flag(flag, &all[at + 1..])
                .map_err(|option| format!("{name}: unsupported option -{option}"))?
            {
                parsed.insert(key, true);
            }
            continue;
        }
        let (kind, is_optional) = match kind.strip_suffix('?') {
            Some(kind) => (kind, true),
            None => (*kind, false),
        };
        if is_optional && text.0.is_empty() {
            continue;
        }
        if kind == "p" && !text.is_size() {
            continue;
        }
        let value = text.value(kind).map_err(|wrong| match wrong {
            Wrong::Missing(what) => format!("{name}: {what} expected"),
            Wrong::Text(text) => text,
        })?;
        parsed.insert(key, value);
    }
    text.skip_blanks();
    if text.0.is_empty() {
        Ok(parsed)
    } else {
        Err(format!("{name}: extraneous characters at the end of line"))
    }
}

/// The first word of a line, and the rest.
pub fn word(line: &str) -> (&str, &str) {
    let line = line.trim_start();
    let end = line.find(char::is_whitespace).unwrap_or(line.len());
    line.split_at(end)
}

/// Why an argument cannot be read.
enum Wrong {
    /// This is not there.
    Missing(&'static str),
    /// All that is to be said.
    Text(String),
}

/// What is left to read.
struct Text<'a>(&'a str);

impl Text<'_> {
    fn skip_blanks(&mut self) {
        self.0 = self.0.trim_start();
    }

    /// Whether the flag is here. The letter of a flag that this command does not have is an error.
    fn flag(&mut self, flag: &str, later: &[(&str, &str)]) -> Result<bool, char> {
        let Some(rest) = self.0.strip_prefix('-') else { return Ok(false) };
        if let Some(rest) = rest.strip_prefix(flag) {
            self.0 = rest;
            return Ok(true);
        }
        let letter = rest.chars().next().unwrap_or(' ');
        let comes =
            later.iter().any(|(_, kind)| kind.strip_prefix('-').is_some_and(|flag| flag.starts_with(letter)));
        if comes { Ok(false) } else { Err(letter) }
    }

    /// Whether what is next can be read as a size.
    fn is_size(&self) -> bool {
        Text(self.0).size().is_some()
    }

    fn value(&mut self, kind: &str) -> Result<Value, Wrong> {
        let string = |text: Option<String>, what| text.map(Value::Str).ok_or(Wrong::Missing(what));
        match kind {
            "B" => string(self.string(), "block device name"),
            "F" => string(self.string(), "filename"),
            "S" if self.0.is_empty() => Err(Wrong::Missing("string")),
            "S" => Ok(Value::Str(std::mem::take(&mut self.0).to_owned())),
            "O" => Ok(Value::Str(self.string().unwrap_or_default())),
            "o" | "p" => self.size().map(Value::from).ok_or(Wrong::Text("invalid size".to_owned())),
            "l" => {
                let mut sum = Expression(self.0);
                let number = sum.bits(0).map_err(Wrong::Text)?;
                self.0 = sum.0;
                Ok(Value::from(number))
            }
            _ => string(self.string(), "string"),
        }
    }

    /// A word, or what is between double quotes.
    fn string(&mut self) -> Option<String> {
        if self.0.is_empty() {
            return None;
        }
        let Some(quoted) = self.0.strip_prefix('"') else {
            let (word, rest) = word(self.0);
            self.0 = rest;
            return Some(word.to_owned());
        };
        let mut text = String::new();
        let mut letters = quoted.char_indices();
        while let Some((at, letter)) = letters.next() {
            match letter {
                '"' => {
                    self.0 = &quoted[at + 1..];
                    return Some(text);
                }
                '\\' => text.push(match letters.next()?.1 {
                    'n' => '\n',
                    'r' => '\r',
                    plain @ ('\\' | '\'' | '"') => plain,
                    _ => return None,
                }),
                other => text.push(other),
            }
        }
        None
    }

    /// A size, in MiB unless it has a suffix; hexadecimal ones have none.
    fn size(&mut self) -> Option<i64> {
        let typed = self.0.strip_prefix('+').unwrap_or(self.0);
        if let Some(hex) = typed.strip_prefix("0x").or_else(|| typed.strip_prefix("0X")) {
            let end = hex.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(hex.len());
            let number = i64::from_str_radix(&hex[..end], 16).ok()?;
            let size = number.checked_mul(1 << 20)?;
            if hex[end..].starts_with(|c: char| !c.is_whitespace()) {
                return None;
            }
            self.0 = &hex[end..];
            return Some(size);
        }
        self.0 = typed;
        let digits = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let whole = digits(self.0);
        let mut end = whole;
        if self.0[end..].starts_with('.') {
            end += 1 + digits(&self.0[end + 1..]);
        }
        if end == 0 {
            return None;
        }
        let number: f64 = self.0[..end].parse().ok()?;
        let unit = match self.0[end..].chars().next().map(|letter| letter.to_ascii_uppercase()) {
            Some('B') => Some(1.0),
            Some('K') => Some(1024.0),
            Some('M') => Some(MIB),
            Some('G') => Some(MIB * 1024.0),
            Some('T') => Some(MIB * MIB),
            Some('P') => Some(MIB * MIB * 1024.0),
            Some('E') => Some(MIB * MIB * MIB),
            _ => None,
        };
        let exact: Option<i64> = self.0[..whole].parse().ok();
        let rest = &self.0[end + usize::from(unit.is_some())..];
        let size = match (exact, unit) {
            (Some(exact), Some(1.0)) if end == whole => exact,
            // There is no part of a byte.
            (_, Some(1.0)) if number.fract() != 0.0 => return None,
            _ => {
                let bytes = number * unit.unwrap_or(MIB);
                if bytes >= 9_223_372_036_854_775_808.0 {
                    return None;
                }
                #[expect(clippy::cast_possible_truncation, reason = "it has been compared with the largest")]
                let bytes = bytes as i64;
                bytes
            }
        };
        self.0 = rest;
        Some(size)
    }
}

/// A sum of numbers being read.
struct Expression<'a>(&'a str);

impl Expression<'_> {
    fn next(&mut self) -> Option<char> {
        self.0 = self.0.trim_start();
        self.0.chars().next()
    }

    fn take(&mut self) {
        let mut letters = self.0.chars();
        letters.next();
        self.0 = letters.as_str().trim_start();
    }

    /// What bits of sums make.
    fn bits(&mut self, depth: usize) -> Result<i64, String> {
        let mut value = self.sum(depth)?;
        loop {
            match self.next() {
                Some(sign @ ('&' | '|' | '^')) => {
                    self.take();
                    let next = self.sum(depth)?;
                    value = match sign {
                        '&' => value & next,
                        '|' => value | next,
                        _ => value ^ next,
                    };
                }
                _ => return Ok(value),
            }
        }
    }

    fn sum(&mut self, depth: usize) -> Result<i64, String> {
        let mut value = self.product(depth)?;
        loop {
            // What follows a number without a sign between them is the next number.
            match self.0.trim_start().chars().next() {
                Some(sign @ ('+' | '-')) => {
                    self.take();
                    let next = self.product(depth)?;
                    value = if sign == '+' { value.wrapping_add(next) } else { value.wrapping_sub(next) };
                }
                _ => return Ok(value),
            }
        }
    }

    fn product(&mut self, depth: usize) -> Result<i64, String> {
        let mut value = self.one(depth)?;
        loop {
            match self.next() {
                Some('*') => {
                    self.take();
                    value = value.wrapping_mul(self.one(depth)?);
                }
                Some(sign @ ('/' | '%')) => {
                    self.take();
                    let by = self.one(depth)?;
                    if by == 0 {
                        return Err("division by zero".to_owned());
                    }
                    value = if sign == '/' { value.wrapping_div(by) } else { value.wrapping_rem(by) };
                }
                _ => return Ok(value),
            }
        }
    }

    /// A number with its signs, or a sum in parentheses; not too deep.
    fn one(&mut self, depth: usize) -> Result<i64, String> {
        if depth > 100 {
            return Err("number too large".to_owned());
        }
        match self.next() {
            None => Err("unexpected end of expression".to_owned()),
            Some('+') => {
                self.take();
                self.one(depth + 1)
            }
            Some('-') => {
                self.take();
                Ok(self.one(depth + 1)?.wrapping_neg())
            }
            Some('~') => {
                self.take();
                Ok(!self.one(depth + 1)?)
            }
            Some('(') => {
                self.take();
                let value = self.bits(depth + 1)?;
                if self.next() != Some(')') {
                    return Err("')' expected".to_owned());
                }
                self.take();
                Ok(value)
            }
            Some('\'') => self.letter(),
            // There is no processor that would have registers.
            Some('$') => Err("unknown register".to_owned()),
            Some(digit) if digit.is_ascii_digit() => self.number(),
            Some(other) => Err(format!("invalid char '{other}' in expression")),
        }
    }

    /// `'x'`: the letter's number.
    fn letter(&mut self) -> Result<i64, String> {
        let mut letters = self.0.chars().skip(1);
        let letter = letters.next().ok_or("character constant expected")?;
        let value = u8::try_from(letter).map_err(|_| "character constant expected")?;
        if letters.next() != Some('\'') {
            return Err("missing terminating ' character".to_owned());
        }
        self.0 = self.0[2 + letter.len_utf8()..].trim_start();
        Ok(i64::from(value))
    }

    fn number(&mut self) -> Result<i64, String> {
        let (radix, digits) = match self.0.strip_prefix("0x").or_else(|| self.0.strip_prefix("0X")) {
            Some(digits) if digits.starts_with(|c: char| c.is_ascii_hexdigit()) => (16, digits),
            _ if self.0.len() > 1 && self.0.starts_with('0') => (8, self.0),
            _ => (10, self.0),
        };
        // A zero in front of what is no octal digit is a number by itself.
        let end = digits.find(|c: char| !c.is_digit(radix)).unwrap_or(digits.len());
        let number = u64::from_str_radix(&digits[..end], radix).map_err(|_| "number too large".to_owned())?;
        self.0 = digits[end..].trim_start();
        Ok(number.cast_signed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(description: &str, typed: &str) -> String {
        match arguments("cmd", description, typed) {
            Ok(arguments) => Value::Object(arguments).as_it_came(false),
            Err(text) => text,
        }
    }

    /// What the reference says to the same lines.
    #[test]
    fn as_the_reference_reads_them() {
        let stream = "device:B,speed:o?,base:s?";
        assert_eq!(parsed(stream, ""), "cmd: block device name expected");
        assert_eq!(parsed(stream, " d0 1x"), r#"{"device": "d0", "speed": 1048576, "base": "x"}"#);
        assert_eq!(parsed("device:B,size:o", "d0"), "invalid size");
        assert_eq!(parsed("device:B,size:o", "d0 -1"), "invalid size");
        assert_eq!(parsed("device:B,size:o", "d0 99999999999999999999"), "invalid size");
        assert_eq!(parsed("device:B,size:o", "d0 1Mx"), "cmd: extraneous characters at the end of line");
        assert_eq!(parsed("size:o", "1.5G"), r#"{"size": 1610612736}"#);
        assert_eq!(parsed("size:o", "9223372036854775807b"), r#"{"size": 9223372036854775807}"#);
        let stream = "device:B,speed:p?,base:s?";
        assert_eq!(parsed(stream, "d0 A"), r#"{"device": "d0", "base": "A"}"#);
        assert_eq!(parsed(stream, "d0 0 A"), r#"{"device": "d0", "speed": 0, "base": "A"}"#);
        assert_eq!(parsed(stream, "d0 A B"), "cmd: extraneous characters at the end of line");
        let block = "nodes:-n,verbose:-v,device:B?";
        assert_eq!(parsed(block, "-v d1"), r#"{"verbose": true, "device": "d1"}"#);
        assert_eq!(parsed(block, "-v -n"), r#"{"verbose": true, "device": "-n"}"#);
        assert_eq!(parsed(block, "-nv"), r#"{"nodes": true, "device": "v"}"#);
        assert_eq!(parsed(block, "-x"), "cmd: unsupported option -x");
        assert_eq!(parsed("force:-f,device:B", "- d0"), "cmd: unsupported option - ");
        assert_eq!(parsed("force:-f,device:B", "-fx d0"), "cmd: extraneous characters at the end of line");
        assert_eq!(parsed("device:B,name:s", "d0"), "cmd: string expected");
        assert_eq!(parsed("target:F", ""), "cmd: filename expected");
        assert_eq!(parsed("device:B", "\"d0"), "cmd: block device name expected");
        assert_eq!(parsed("device:B", r#""a \"b\" c""#), r#"{"device": "a \"b\" c"}"#);
        assert_eq!(parsed("bps:l,iops:l", "1"), "unexpected end of expression");
        assert_eq!(parsed("bps:l", "1&3|4^1"), r#"{"bps": 4}"#);
        assert_eq!(parsed("bps:l", "'a'+1"), r#"{"bps": 98}"#);
        assert_eq!(parsed("bps:l", "'ab'"), "missing terminating ' character");
        assert_eq!(parsed("bps:l", "'"), "character constant expected");
        assert_eq!(parsed("bps:l", "'\u{e4}'"), r#"{"bps": 228}"#);
        assert_eq!(parsed("bps:l", "0x"), "cmd: extraneous characters at the end of line");
        assert_eq!(parsed("bps:l", "$pc"), "unknown register");
        assert_eq!(parsed("size:o", "0x10"), r#"{"size": 16777216}"#);
        assert_eq!(parsed("size:o", "0x1k"), "invalid size");
        assert_eq!(parsed("size:o", "0xffffffffffffffff"), "invalid size");
        assert_eq!(parsed("size:o", "+2"), r#"{"size": 2097152}"#);
        assert_eq!(parsed("size:o", "1.5b"), "invalid size");
        assert_eq!(parsed("bps:l", "a"), "invalid char 'a' in expression");
        assert_eq!(parsed("bps:l", "1+2*0x10 - -3"), r#"{"bps": 36}"#);
        assert_eq!(parsed("bps:l,iops:l", "(1+2)*3 4"), r#"{"bps": 9, "iops": 4}"#);
        assert_eq!(parsed("bps:l", "(1"), "')' expected");
        assert_eq!(parsed("bps:l", &"(".repeat(100_000)), "number too large");
        assert_eq!(parsed("bps:l", "5/0"), "division by zero");
        assert_eq!(parsed("", " x"), "cmd: extraneous characters at the end of line");
    }
}

//! Numbers as the commands take them: bytes with a suffix and a fraction, plain integers, pattern bytes.

/// Longest request, in bytes: the largest number of whole sectors below 2 GiB. Source: the reference's messages.
pub const LONGEST: u64 = (1 << 31) - 512;

const UNITS: [(char, u32); 7] = [('b', 0), ('k', 10), ('m', 20), ('g', 30), ('t', 40), ('p', 50), ('e', 60)];

enum Bad {
    NotANumber,
    TooLarge,
}

/// A number of bytes: decimal with an optional fraction and suffix (`1.5k`), or hexadecimal without.
pub fn bytes(text: &str) -> Result<u64, String> {
    read(text).map_err(|bad| match bad {
        Bad::NotANumber => {
            format!("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}")
        }
        Bad::TooLarge => format!("Parsing error: argument too large -- {text}"),
    })
}

fn read(text: &str) -> Result<u64, Bad> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let number = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) if !hex.is_empty() && hex.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            u64::from_str_radix(hex, 16).map_err(|_| Bad::TooLarge)?
        }
        Some(_) => return Err(Bad::NotANumber),
        None => decimal(digits)?,
    };
    // Offsets are signed in the reference.
    if negative || number > i64::MAX as u64 { Err(Bad::TooLarge) } else { Ok(number) }
}

fn decimal(text: &str) -> Result<u64, Bad> {
    let suffix = text.chars().next_back().filter(|letter| letter.is_ascii_alphabetic());
    let shift = match suffix {
        None => 0,
        Some(letter) => {
            let unit = UNITS.iter().find(|(unit, _)| *unit == letter.to_ascii_lowercase());
            unit.ok_or(Bad::NotANumber)?.1
        }
    };
    let digits = &text[..text.len() - suffix.map_or(0, char::len_utf8)];
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let are_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !are_digits(whole) || !are_digits(fraction) || (whole.is_empty() && fraction.is_empty()) {
        return Err(Bad::NotANumber);
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| Bad::TooLarge)? };
    let whole = whole.checked_mul(1 << shift).ok_or(Bad::TooLarge)?;
    // Of a fraction, what can make a difference.
    let fraction = &fraction[..fraction.len().min(18)];
    let part: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| Bad::NotANumber)? };
    if part == 0 {
        return Ok(whole);
    }
    if shift == 0 {
        return Err(Bad::NotANumber);
    }
    let tens = 10_u128.pow(u32::try_from(fraction.len()).unwrap_or(18));
    let part = ((part << shift) + tens / 2) / tens;
    u64::try_from(part).ok().and_then(|part| whole.checked_add(part)).ok_or(Bad::TooLarge)
}

/// The length of one request.
pub fn length(text: &str, hint: &str) -> Result<u64, String> {
    match bytes(text)? {
        length if length > LONGEST => Err(format!("length cannot exceed {LONGEST}{hint}, given {text}")),
        length => Ok(length),
    }
}

/// A byte to fill or compare with: decimal, hexadecimal or octal.
pub fn pattern(text: &str) -> Result<u8, String> {
    integer(text)
        .and_then(|value| u8::try_from(value).ok())
        .ok_or_else(|| format!("{text} is not a valid pattern byte"))
}

/// A whole number that is not negative; those that are too large count as the largest one.
pub fn integer(text: &str) -> Option<u64> {
    let text = text.strip_prefix('+').unwrap_or(text);
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if text.len() > 1 && text.starts_with('0') => (&text[1..], 8),
        None => (text, 10),
    };
    let valid = !digits.is_empty() && digits.chars().all(|digit| digit.is_digit(radix));
    valid.then(|| u64::from_str_radix(digits, radix).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::{bytes, integer, length, pattern};

    /// As the reference reads them.
    #[test]
    fn suffixes_fractions_and_what_is_none() {
        for (text, value) in [
            ("1.5k", 1536),
            ("0x10", 16),
            ("010", 10),
            (".5k", 512),
            ("+1", 1),
            ("1b", 1),
            ("1.0", 1),
            ("1.k", 1024),
            ("1.9999999k", 2048),
            ("0.3k", 307),
            ("0.5005k", 513),
            ("1.5e", 3 << 59),
            ("0x1b", 27),
            ("0x7fffffffffffffff", i64::MAX as u64),
        ] {
            assert_eq!(bytes(text), Ok(value), "{text}");
        }
        for text in ["1x", "0x1k", "1e3", "0.5", "1kb", "k", "0x", "1.e1", "0x1.8", "nan", "", "-x", "."] {
            let said = bytes(text).expect_err(text);
            assert!(said.starts_with("Parsing error: non-numeric argument"), "{text}: {said}");
        }
        for text in ["-1", "-0", "8E", "16E", "18446744073709551616", "99999999999E"] {
            assert_eq!(bytes(text), Err(format!("Parsing error: argument too large -- {text}")));
        }
        assert_eq!(length("2147483136", ""), Ok(2_147_483_136));
        assert_eq!(length("3G", ""), Err("length cannot exceed 2147483136, given 3G".to_owned()));
    }

    #[test]
    fn patterns_and_plain_numbers() {
        assert_eq!(pattern("0xff"), Ok(255));
        assert_eq!(pattern("010"), Ok(8));
        assert_eq!(pattern("256"), Err("256 is not a valid pattern byte".to_owned()));
        assert_eq!(pattern("1k"), Err("1k is not a valid pattern byte".to_owned()));
        assert_eq!(integer("-1"), None);
        assert_eq!(integer("99999999999999999999"), Some(u64::MAX));
    }
}

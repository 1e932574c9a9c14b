//! Numbers as the commands take them: bytes with a suffix and a fraction, plain integers, pattern bytes.

use underlay_img::sizes;

/// Longest request, in bytes: the largest number of whole sectors below 2 GiB. Source: the reference's messages.
pub const LONGEST: u64 = (1 << 31) - 512;

/// A number of bytes: decimal with an optional fraction and suffix (`1.5k`), or hexadecimal without. Offsets are signed
/// in the reference.
pub fn bytes(text: &str) -> Result<u64, String> {
    match sizes::parse(text) {
        Some(number) if i64::try_from(number).is_ok() => Ok(number),
        None if !sizes::is_out_of_range(text) => {
            Err(format!("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"))
        }
        _ => Err(format!("Parsing error: argument too large -- {text}")),
    }
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
        for text in
            ["1x", "0x1k", "1e3", "0.5", "1kb", "k", "0x", "1.e1", "0x1.8", "nan", "", "-x", "-1k", "."]
        {
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

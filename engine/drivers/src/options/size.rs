//! Sizes as people write them: `64k`, `1.5G`, `0x200`. Source: the reference, asked.

/// Why a text is not a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    NotANumber,
    /// It is a number, but less than nothing or more than 64 bits hold.
    OutOfRange,
}

/// A number of bytes with an optional fraction and suffix; `None` when it is none or too large.
pub fn parse_size(text: &str) -> Option<u64> {
    read(text).ok()
}

/// Whether this is the number of a size that cannot be: negative, or too large.
pub fn is_out_of_range(text: &str) -> bool {
    read(text) == Err(Wrong::OutOfRange)
}

/// What is wrong with the value of an option that is a size.
pub fn not_a_size(text: &str, name: &str) -> String {
    match is_out_of_range(text) {
        true => format!("Value '{text}' is out of range for parameter '{name}'"),
        false => format!(
            "Parameter '{name}' expects a non-negative number below 2^64\n\
             Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
             and exabytes, respectively."
        ),
    }
}

fn read(text: &str) -> Result<u64, Wrong> {
    let text = text.trim_start();
    if let Some(below_zero) = text.strip_prefix('-') {
        digits(below_zero)?;
        return Err(Wrong::OutOfRange);
    }
    let text = text.strip_prefix('+').unwrap_or(text);
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return hexadecimal(hex);
    }
    let (number, shift) = match text.char_indices().next_back() {
        Some((at, last)) => match "bkmgtpe".find(last.to_ascii_lowercase()) {
            Some(power) => (&text[..at], Some(10 * power)),
            None => (text, None),
        },
        None => return Err(Wrong::NotANumber),
    };
    match number.split_once('.') {
        None => digits(number)?.checked_mul(1 << shift.unwrap_or(0)).ok_or(Wrong::OutOfRange),
        Some((whole, fraction)) => with_fraction(whole, fraction, shift.unwrap_or(0)),
    }
}

fn hexadecimal(text: &str) -> Result<u64, Wrong> {
    match !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        true => u64::from_str_radix(text, 16).map_err(|_| Wrong::OutOfRange),
        false => Err(Wrong::NotANumber),
    }
}

fn digits(text: &str) -> Result<u64, Wrong> {
    match !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => text.parse().map_err(|_| Wrong::OutOfRange),
        false => Err(Wrong::NotANumber),
    }
}

/// To the nearest byte; of single bytes there is no fraction.
fn with_fraction(whole: &str, fraction: &str, shift: usize) -> Result<u64, Wrong> {
    /// More make no difference to a count of bytes.
    const MOST_PLACES: usize = 18;
    if whole.is_empty() && fraction.is_empty() || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Wrong::NotANumber);
    }
    let fraction = &fraction[..fraction.len().min(MOST_PLACES)];
    let part = |text: &str| if text.is_empty() { Ok(0) } else { digits(text) };
    let whole = part(whole).map_err(|_| Wrong::NotANumber)?;
    let parts = part(fraction)?;
    if shift == 0 && parts > 0 {
        return Err(Wrong::NotANumber);
    }
    let unit = fraction.bytes().fold(1, |unit, _| unit * 10_u128);
    let bytes = (u128::from(whole) << shift) + ((u128::from(parts) << shift) + unit / 2) / unit;
    u64::try_from(bytes).map_err(|_| Wrong::OutOfRange)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the reference reads them.
    #[test]
    fn sizes() {
        use Wrong::*;
        for (text, size) in [
            ("0", Ok(0)),
            ("64k", Ok(65536)),
            ("1G", Ok(1 << 30)),
            ("1B", Ok(1)),
            ("0x200", Ok(512)),
            ("0X1b", Ok(27)),
            ("0x1e", Ok(30)),
            ("010k", Ok(10 << 10)),
            (" 1k", Ok(1024)),
            ("+5", Ok(5)),
            ("1.5k", Ok(1536)),
            (".5K", Ok(512)),
            ("1.k", Ok(1024)),
            ("1.0", Ok(1)),
            ("1.5e", Ok(3 << 59)),
            ("3.9999999999k", Ok(4096)),
            ("0.00000000000000000000001E", Ok(0)),
            ("-1", Err(OutOfRange)),
            ("16E", Err(OutOfRange)),
            ("99999999999999999999", Err(OutOfRange)),
            ("18446744073709551615.5k", Err(OutOfRange)),
            ("99999999999999999999.5k", Err(NotANumber)),
        ] {
            assert_eq!(read(text), size, "{text}");
        }
        let none = [
            "", "k", ".", ".k", "1x", "-1k", "-0.5k", "1.5", "1.5b", "1.x", "1k ", "3kB", "0x", "0x1k",
            "1e3", "é",
        ];
        for text in none {
            assert_eq!(read(text), Err(NotANumber), "{text}");
        }
    }
}

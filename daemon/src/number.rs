//! Numbers in the words of options, as the reference reads them: decimal, octal (`010`) or hexadecimal (`0x8`), 64 bits
//! wide.

use std::num::IntErrorKind;

use crate::error::{CommandError, CommandResult};

/// Whether there is a minus before it, and the rest.
pub fn read(word: &str) -> Result<(bool, u64), IntErrorKind> {
    let word = word.trim_ascii_start();
    let (minus, digits) = match word.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, word.strip_prefix('+').unwrap_or(word)),
    };
    let (digits, radix) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (&digits[1..], 8),
        None => (digits, 10),
    };
    if digits.starts_with('+') {
        return Err(IntErrorKind::InvalidDigit);
    }
    let size = u64::from_str_radix(digits, radix).map_err(|error| *error.kind())?;
    Ok((minus, size))
}

/// The value of an option; one below zero counts from the largest down.
pub fn of_option(name: &str, word: &str) -> CommandResult<u64> {
    match read(word) {
        Ok((minus, size)) => Ok(if minus { size.wrapping_neg() } else { size }),
        Err(IntErrorKind::PosOverflow) => {
            Err(CommandError::new(format!("Value '{word}' is too large for parameter '{name}'")))
        }
        Err(_) => Err(CommandError::new(format!("Parameter '{name}' expects a number"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_words() {
        for (word, number) in [
            ("0", 0),
            (" 5", 5),
            ("+7", 7),
            ("010", 8),
            ("0x10", 16),
            ("-1", u64::MAX),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(of_option("n", word).ok(), Some(number), "{word}");
        }
        for word in ["", "x", "1k", "1.5", "5 ", "08", "0x", "--1", "-+1", "0x+1", "18446744073709551616"] {
            assert!(of_option("n", word).is_err(), "{word}");
        }
    }
}

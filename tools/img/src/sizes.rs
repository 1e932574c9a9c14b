//! Sizes as people write and read them.

use underlay_drivers::options::not_a_size;

use crate::Failure;

pub use underlay_drivers::options::{is_out_of_range, parse_size as parse};

/// At most three significant digits with a binary unit: `2.97 MiB`, `196 KiB`, `0 B`.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    // The unit is chosen so that three digits in front of the point are never exceeded after rounding.
    let mut unit = 0;
    let mut shifted = bytes;
    while unit + 1 < UNITS.len() && shifted >= 1000 {
        shifted >>= 10;
        unit += 1;
    }
    let scale = 1_u64 << (10 * unit);
    let value = bytes as f64 / scale as f64;
    format!("{} {}", three_digits(value), UNITS[unit])
}

/// A number as `%0.3g` prints one that is below 1000.
fn three_digits(value: f64) -> String {
    let places = match value {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        v if v >= 0.099_95 => 3,
        0.0 => 0,
        _ => 4,
    };
    let text = format!("{value:.places$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// A number of a command line, at most `i64::MAX`; `what` names it.
pub fn argument(text: &str, what: &str) -> Result<u64, Failure> {
    argument_in(text, what, 0..=i64::MAX.unsigned_abs())
}

/// A number of a command line in a range.
pub fn argument_in(text: &str, what: &str, range: std::ops::RangeInclusive<u64>) -> Result<u64, Failure> {
    match parse(text) {
        Some(number) if range.contains(&number) => Ok(number),
        None if !is_out_of_range(text) => Err(Failure::new(format!("Invalid {what} specified: '{text}'."))),
        _ => {
            let (least, most) = (range.start(), range.end());
            Err(Failure::new(format!("Invalid {what} specified. Must be between {least} and {most}.")))
        }
    }
}

/// The value of an option that is a size.
pub fn option(text: &str, name: &str) -> Result<u64, Failure> {
    parse(text).ok_or_else(|| Failure::new(not_a_size(text, name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As qemu-img prints them.
    #[test]
    fn three_significant_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.977 KiB"),
            (200_704, "196 KiB"),
            (197_120, "192 KiB"),
            (67_108_864, "64 MiB"),
            (3_110_000, "2.97 MiB"),
            (1 << 40, "1 TiB"),
            (1023 << 20, "0.999 GiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
        let said = |text| argument(text, "number").expect_err("refused").message.unwrap_or_default();
        assert_eq!(said("x"), "Invalid number specified: 'x'.");
        assert_eq!(said("-1k"), "Invalid number specified: '-1k'.");
        for text in ["-1", "9E", "99999999999999999999"] {
            assert_eq!(said(text), "Invalid number specified. Must be between 0 and 9223372036854775807.");
        }
    }
}

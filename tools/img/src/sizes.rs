//! Sizes as people write and read them.

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

/// A size with an optional suffix and fraction (`1.5G`); `None` when it is none or too large.
pub fn parse(text: &str) -> Option<u64> {
    if !text.contains('.') {
        return underlay_drivers::options::parse_size(text);
    }
    let (digits, shift) = match text.chars().next_back()? {
        'k' | 'K' => (&text[..text.len() - 1], 10),
        'm' | 'M' => (&text[..text.len() - 1], 20),
        'g' | 'G' => (&text[..text.len() - 1], 30),
        't' | 'T' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let (whole, fraction) = digits.split_once('.')?;
    let places = u32::try_from(fraction.len()).ok().filter(|places| *places <= 9)?;
    let whole: u128 = whole.parse().ok()?;
    let fraction: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
    let tens = 10_u128.pow(places);
    u64::try_from(((whole * tens + fraction) << shift) / tens).ok()
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
        assert_eq!(parse("1.5k"), Some(1536));
        assert_eq!(parse("64M"), Some(64 << 20));
        assert_eq!(parse("1.x"), None);
    }
}

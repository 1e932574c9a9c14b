//! How a finished request is reported.

use std::time::Duration;

/// A size as qemu-io prints it: three digits behind the point, zeroes cut off.
pub fn size(bytes: f64) -> String {
    const UNITS: [(&str, f64); 6] = [
        ("EiB", 1_152_921_504_606_846_976.0),
        ("PiB", 1_125_899_906_842_624.0),
        ("TiB", 1_099_511_627_776.0),
        ("GiB", 1_073_741_824.0),
        ("MiB", 1_048_576.0),
        ("KiB", 1024.0),
    ];
    let (unit, scale) = UNITS.into_iter().find(|(_, scale)| bytes >= *scale).unwrap_or(("bytes", 1.0));
    let text = format!("{:.3}", bytes / scale);
    let text = match text.strip_suffix(".000") {
        Some(whole) => whole.to_owned(),
        None => text,
    };
    format!("{text} {unit}")
}

/// The two lines behind a request.
pub fn request(verb: &str, done: u64, offset: u64, took: Duration) {
    let seconds = took.as_secs_f64().max(0.000_001);
    println!("{verb} {done}/{done} bytes at offset {offset}");
    println!(
        "{}, 1 ops; {:05.2} sec ({}/sec and {:.4} ops/sec)",
        size(done as f64),
        took.as_secs_f64(),
        size(done as f64 / seconds),
        1.0 / seconds
    );
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_as_the_reference_prints_them() {
        assert_eq!(size(65536.0), "64 KiB");
        assert_eq!(size(512.0), "512 bytes");
        assert_eq!(size(1536.0), "1.500 KiB");
        assert_eq!(size(1_048_576.0), "1 MiB");
    }
}

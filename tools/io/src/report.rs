//! What is said: results to standard output, complaints about words to standard error; or all of it to a monitor.
//!
//! Nobody may be reading any more: that must not stop the work that is under way.

use std::fmt::{self, Write as _};
use std::io::{BufWriter, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use underlay_sys::Iov;

/// Most bytes that a monitor gets for one command.
const MOST: usize = 4 << 20;

/// Where it is said. Clones say it in the same place.
#[derive(Clone, Debug)]
pub enum Out {
    /// The program's own streams.
    Streams,
    /// What a monitor will be told.
    Monitor(Arc<Mutex<Told>>),
}

/// See [`Out::Monitor`].
#[derive(Debug, Default)]
pub struct Told {
    text: String,
    /// There was more than fits.
    cut: bool,
}

impl Told {
    /// Whether there is room for more.
    fn add(&mut self, text: impl fmt::Display) -> bool {
        if !self.cut {
            // Writing to a string cannot fail.
            let _ = writeln!(self.text, "{text}");
            self.cut = self.text.len() > MOST;
        }
        !self.cut
    }
}

impl Out {
    /// For a monitor.
    pub fn monitor() -> Self {
        Self::Monitor(Arc::default())
    }

    fn told(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
        told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a monitor is told by now.
    pub fn text(&self) -> String {
        let Self::Monitor(told) = self else { return String::new() };
        let mut told = Self::told(told);
        let mut text = std::mem::take(&mut told.text);
        if told.cut {
            text.push_str("There is more than a monitor takes.\n");
        }
        text
    }

    /// A line of results.
    pub fn line(&self, text: impl fmt::Display) {
        match self {
            Self::Streams => drop(writeln!(std::io::stdout(), "{text}")),
            Self::Monitor(told) => drop(Self::told(told).add(text)),
        }
    }

    /// A line about what is wrong with the words.
    pub fn complain(&self, text: impl fmt::Display) {
        match self {
            Self::Streams => drop(writeln!(std::io::stderr(), "{text}")),
            Self::Monitor(_) => self.line(text),
        }
    }

    /// A buffer that was read at `offset`: sixteen bytes a line, as numbers and as text.
    pub fn dump(&self, buffer: &Iov, offset: u64) {
        let mut bytes = vec![0; PIECE];
        let mut out = BufWriter::new(std::io::stdout());
        for at in (0..buffer.len()).step_by(PIECE) {
            let len = PIECE.min(buffer.len() - at);
            buffer.read_at(at, &mut bytes[..len]);
            for (number, row) in bytes[..len].chunks(16).enumerate() {
                let row = row_of(row, offset.saturating_add(at as u64 + number as u64 * 16));
                let goes_on = match self {
                    Self::Streams => writeln!(out, "{row}").is_ok(),
                    Self::Monitor(told) => Self::told(told).add(row),
                };
                if !goes_on {
                    return;
                }
            }
        }
    }
}

/// Prints without ending the line.
pub fn prompt(text: &str) {
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// A size as the reference prints it: three digits behind the point, or none when they are zeroes.
pub fn size(bytes: f64) -> String {
    const UNITS: [(&str, f64); 6] = [
        ("EiB", 1_152_921_504_606_846_976.0),
        ("PiB", 1_125_899_906_842_624.0),
        ("TiB", 1_099_511_627_776.0),
        ("GiB", 1_073_741_824.0),
        ("MiB", 1_048_576.0),
        ("KiB", 1024.0),
    ];
    match UNITS.into_iter().find(|(_, scale)| bytes >= *scale) {
        Some((unit, scale)) => {
            let text = format!("{:.3}", bytes / scale);
            format!("{} {unit}", text.strip_suffix(".000").unwrap_or(&text))
        }
        None if bytes.fract() == 0.0 => format!("{bytes:.0} bytes"),
        None => format!("{bytes:.6} bytes"),
    }
}

/// Hours, minutes, seconds and hundredths.
fn clock(took: Duration) -> String {
    let seconds = took.as_secs();
    let hundredths = took.subsec_millis() / 10;
    format!("{}:{:02}:{:02}.{hundredths:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// A request that is done.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// What was done: `read`, `wrote`, `discard`.
    pub verb: &'static str,
    /// Bytes.
    pub count: u64,
    /// Bytes from the disk's start.
    pub offset: u64,
    /// How long it took.
    pub took: Duration,
}

impl Done {
    /// Says it: two lines for people, or one for programs.
    pub fn say(self, out: &Out, for_programs: bool) {
        let seconds = self.took.as_secs_f64().max(1e-9);
        let (rate, frequency) = (self.count as f64 / seconds, 1.0 / seconds);
        if for_programs {
            out.line(format_args!("{},1,{},{rate:.3},{frequency:.3}", self.count, clock(self.took)));
            return;
        }
        let took = match self.took.as_secs() {
            0 => format!("00.{:02} sec", self.took.subsec_millis() / 10),
            _ => clock(self.took),
        };
        out.line(format_args!("{} {1}/{1} bytes at offset {2}", self.verb, self.count, self.offset));
        out.line(format_args!(
            "{}, 1 ops; {took} ({}/sec and {frequency:.4} ops/sec)",
            size(self.count as f64),
            size(rate)
        ));
    }
}

/// Bytes that are looked at in one go.
const PIECE: usize = 64 << 10;

fn row_of(row: &[u8], place: u64) -> String {
    let numbers: String = row.iter().map(|byte| format!("{byte:02x} ")).collect();
    let text = row.iter().map(|byte| if byte.is_ascii_alphanumeric() { char::from(*byte) } else { '.' });
    format!("{place:08x}:  {numbers} {}", text.collect::<String>())
}

/// Whether all `count` bytes from `start` on are `byte`.
pub fn is_filled(buffer: &Iov, start: usize, count: usize, byte: u8) -> bool {
    let mut bytes = vec![0; PIECE];
    (start..start + count).step_by(PIECE).all(|at| {
        let len = PIECE.min(start + count - at);
        buffer.read_at(at, &mut bytes[..len]);
        bytes[..len].iter().all(|found| *found == byte)
    })
}

#[cfg(test)]
mod tests {
    use super::{Duration, Iov, clock, is_filled, row_of, size};

    #[test]
    fn sizes_and_times_as_the_reference_prints_them() {
        assert_eq!(size(65536.0), "64 KiB");
        assert_eq!(size(512.0), "512 bytes");
        assert_eq!(size(1536.0), "1.500 KiB");
        assert_eq!(size(1_048_576.0), "1 MiB");
        assert_eq!(size(787.497_687_4), "787.497687 bytes");
        assert_eq!(clock(Duration::from_millis(61_557)), "0:01:01.55");
        assert_eq!(row_of(b"a_9\x00", 4096), "00001000:  61 5f 39 00  a.9.");
    }

    #[test]
    fn one_wrong_byte_is_found_wherever_it_is() {
        let len = 3 * super::PIECE + 5;
        for wrong in [0, super::PIECE, len - 1] {
            let buffer = Iov::filled(len, 7);
            assert!(is_filled(&buffer, 0, len, 7));
            buffer.write_at(wrong, &[8]);
            assert!(!is_filled(&buffer, 0, len, 7));
            assert!(is_filled(&buffer, wrong, 1, 8) && is_filled(&buffer, wrong, 0, 9));
        }
    }
}

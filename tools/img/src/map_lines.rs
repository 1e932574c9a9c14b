//! What `map` prints, line by line. There may be millions of them: numbers and text are put together by hand, and on a
//! thread of their own, while the next extents are being looked for.

use std::io::{ErrorKind, Write};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use underlay_drivers::filename;
use underlay_graph::NodeId;
use underlay_graph::plan::Wires;
use underlay_graph::status::Status;

use crate::map::Joiner;
use crate::{Failure, Outcome};

/// An extent, and where it begins.
pub type Line = (u64, Status);

/// Lines that are handed over at once.
const BATCH: usize = 1024;
/// Batches that wait at most.
const AHEAD: usize = 4;
/// Bytes that are printed at once.
const PAGE: usize = 64 << 10;

/// Has extents printed in their order, neighbours that are alike in one.
pub struct Printer {
    batch: Vec<Line>,
    to: SyncSender<Vec<Line>>,
    thread: JoinHandle<Result<(Lines, Option<Line>), Failure>>,
}

impl Printer {
    pub fn new(mut lines: Lines) -> Result<Self, Failure> {
        let (to, from) = sync_channel::<Vec<Line>>(AHEAD);
        let print = move || {
            let mut joiner = Joiner::default();
            for (at, extent) in from.iter().flatten() {
                if let Some((at, extent)) = joiner.add(at, extent) {
                    lines.extent(at, &extent)?;
                }
            }
            Ok((lines, joiner.last))
        };
        let thread = std::thread::Builder::new().name("print".into()).spawn(print);
        let thread = thread.map_err(|error| Failure::new(format!("Cannot start a thread: {error}")))?;
        Ok(Self { batch: Vec::with_capacity(BATCH), to, thread })
    }

    /// What comes next. False if there is no use in more: [`Printer::end`] says why.
    pub fn extent(&mut self, at: u64, extent: Status) -> bool {
        self.batch.push((at, extent));
        self.batch.len() < BATCH || self.hand_over()
    }

    fn hand_over(&mut self) -> bool {
        let batch = std::mem::replace(&mut self.batch, Vec::with_capacity(BATCH));
        self.to.send(batch).is_ok()
    }

    /// Waits until all are printed but the last, which might have gone on. What has to come behind is the caller's.
    pub fn end(mut self) -> Result<(Lines, Option<Line>), Failure> {
        self.hand_over();
        drop(self.to);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Puts lines together and prints them.
pub struct Lines {
    out: Vec<u8>,
    /// For people; else JSON.
    human: Option<Human>,
    middle: Middle,
    first: bool,
}

/// What lines for people need: the names of the files.
struct Human {
    wires: Wires,
    known: Option<(NodeId, String)>,
}

impl Lines {
    /// As a list of objects.
    pub fn json() -> Self {
        Self { out: b"[".to_vec(), human: None, middle: Middle::default(), first: true }
    }

    /// As a table of what has data, with the names of files.
    pub fn human(wires: Wires) -> Self {
        let head = format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to");
        let human = Some(Human { wires, known: None });
        Self { out: head.into_bytes(), human, middle: Middle::default(), first: true }
    }

    /// One line.
    pub fn extent(&mut self, at: u64, s: &Status) -> Outcome {
        match &mut self.human {
            None => {
                if !std::mem::take(&mut self.first) {
                    self.out.extend(b",\n");
                }
                json_line(&mut self.out, &mut self.middle, at, s);
            }
            Some(human) => {
                if let Err(failure) = human.line(&mut self.out, at, s) {
                    self.flush()?;
                    return Err(failure);
                }
            }
        }
        if self.out.len() >= PAGE { self.flush() } else { Ok(()) }
    }

    /// Prints what there is so far.
    pub fn flush(&mut self) -> Outcome {
        let written = std::io::stdout().lock().write_all(&self.out);
        self.out.clear();
        let written = match written {
            // Who reads it has seen enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            other => other,
        };
        written.map_err(|error| Failure::new(format!("Cannot write to standard output: {error}")))
    }

    /// The last line; the reference tells of nothing, too, with its `start`.
    pub fn end(mut self, start: u64) -> Outcome {
        if self.human.is_none() {
            if self.first {
                let nothing =
                    "\"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \"data\": false";
                let line = format!("{{ \"start\": {start}, {nothing}, \"compressed\": false}}");
                self.out.extend(line.into_bytes());
            }
            self.out.extend(b"]\n");
        }
        self.flush()
    }
}

/// The middle of a line, which mostly is that of the line before.
#[derive(Default)]
struct Middle {
    of: Option<(u64, u32, [bool; 5])>,
    text: Vec<u8>,
}

impl Middle {
    fn text(&mut self, s: &Status) -> &[u8] {
        let of = Some((s.len, s.depth, [s.allocated, s.zero, s.data, s.encoded, s.offset.is_some()]));
        if self.of != of {
            self.of = of;
            self.text = format!(
                ", \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \"compressed\": {}{}",
                s.len,
                s.depth,
                s.allocated,
                s.zero,
                s.data,
                s.encoded,
                if s.offset.is_some() { ", \"offset\": " } else { "" }
            )
            .into_bytes();
        }
        &self.text
    }
}

fn json_line(out: &mut Vec<u8>, middle: &mut Middle, at: u64, s: &Status) {
    out.extend(b"{ \"start\": ");
    decimal(out, at);
    out.extend(middle.text(s));
    if let Some(offset) = s.offset {
        decimal(out, offset);
    }
    out.push(b'}');
}

fn decimal(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    // Four at a time: a quarter of the long divisions, which wait for each other.
    while number >= 10_000 {
        let mut four = number % 10_000;
        number /= 10_000;
        at -= 4;
        for digit in digits[at..at + 4].iter_mut().rev() {
            *digit = b'0' + (four % 10).to_le_bytes()[0];
            four /= 10;
        }
    }
    while number >= 10 {
        at -= 1;
        digits[at] = b'0' + (number % 10).to_le_bytes()[0];
        number /= 10;
    }
    if number > 0 || at == digits.len() {
        at -= 1;
        digits[at] = b'0' + number.to_le_bytes()[0];
    }
    out.extend(&digits[at..]);
}

impl Human {
    fn line(&mut self, out: &mut Vec<u8>, at: u64, s: &Status) -> Outcome {
        if !s.data || s.zero {
            return Ok(());
        }
        let (Some(offset), Some(file)) = (s.offset, s.file) else {
            return Err(Failure::new("File contains external, encrypted or compressed clusters."));
        };
        let hex = |number: u64| if number == 0 { "0".to_owned() } else { format!("{number:#x}") };
        let name = match &self.known {
            Some((known, name)) if *known == file => name.clone(),
            _ => filename::of(&self.wires.view(file)),
        };
        out.extend(format!("{:<16}{:<16}{:<16}{name}\n", hex(at), hex(s.len), hex(offset)).into_bytes());
        self.known = Some((file, name));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals() {
        for number in [0, 7, 10, 1_234_567_890, u64::MAX] {
            let mut out = Vec::new();
            decimal(&mut out, number);
            assert_eq!(out, number.to_string().into_bytes());
        }
    }
}

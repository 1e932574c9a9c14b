//! `map`: where the bytes of an image are.

use std::io::Write;

use underlay_drivers::filename;
use underlay_graph::status::Status;
use underlay_graph::walk::Walk;
use underlay_graph::{ByteRange, NodeId};

use crate::getopt::Known;
use crate::info::is_json;
use crate::open::{How, Image, image};
use crate::{Failure, Outcome, sizes};

const KNOWN: Known = Known {
    short: "f:s:l:hU",
    long: &[
        ("help", "h", false),
        ("format", "f", true),
        ("output", "output", true),
        ("object", "object", true),
        ("image-opts", "image-opts", false),
        ("force-share", "U", false),
        ("start-offset", "s", true),
        ("max-length", "l", true),
    ],
};

/// Asked about at a time, in bytes; answers are merged.
const STRIDE: u64 = 1 << 30;

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = crate::options("map", KNOWN, words)?;
    let (mut format, mut json, mut force_share, mut image_opts) = (None, false, false, false);
    let (mut start, mut most) = (0, u64::MAX);
    for (name, value) in options {
        match name.as_str() {
            "f" => format = Some(value),
            "output" => json = is_json(&value, "map")?,
            "U" => force_share = true,
            "s" => start = sizes::argument(&value, "start offset")?,
            "l" => most = sizes::argument(&value, "max length")?,
            "image-opts" => image_opts = true,
            "h" => {
                println!(
                    "Usage: qemu-img map [-f FMT] [--output=human|json] [-s OFFSET] [-l LENGTH] [-U] FILENAME"
                );
                return Ok(());
            }
            other => return Err(crate::unsupported(other)),
        }
    }
    let [name] = others.as_slice() else {
        return Err(Failure::usage("Expecting one image file name", "map"));
    };
    let how = How { format: format.as_deref(), image_opts, force_share, ..How::default() };
    let opened = image(name, how).await?;
    let printed = print(&opened, start, most, json).await;
    opened.close().await?;
    printed
}

/// Prints the extents of an image, neighbours that are alike in one.
async fn print(image: &Image, start: u64, most: u64, json: bool) -> Outcome {
    let failed = |error| Failure::new(format!("Could not read file metadata: {error}"));
    let inside = image.root.enter().await.map_err(failed)?;
    let cx = inside.cx();
    let end = cx.length().min(start.saturating_add(most));
    let mut rest = ByteRange::between(start, end);
    let mut printer = if json { Printer::json() } else { Printer::human(image) };
    let mut last: Option<(u64, Status)> = None;
    let mut walk = Walk::default();
    while !rest.is_empty() {
        let found = match walk.status(&cx, rest.split(STRIDE).0).await {
            Ok(found) => as_shown(found),
            Err(error) => {
                printer.flush()?;
                return Err(failed(error));
            }
        };
        match &mut last {
            Some((_, last)) if continues(last, &found) => last.len += found.len,
            _ => {
                if let Some((at, extent)) = last.replace((rest.start(), found)) {
                    printer.extent(at, &extent)?;
                }
            }
        }
        rest = rest.split(found.len).1;
    }
    if let Some((at, extent)) = last {
        printer.extent(at, &extent)?;
    }
    printer.end(start)
}

/// Behind the end of a short backing file it is the image above that shows zeroes, without having them. What raw takes
/// from the backing file of a format below it has no place that could be told.
fn as_shown(found: Status) -> Status {
    if found.past_end {
        return Status { depth: found.depth.saturating_sub(1), allocated: false, ..found };
    }
    let somewhere = found.data && !found.encoded && found.offset.is_none();
    Status { allocated: found.allocated && !somewhere, data: found.data && !somewhere, ..found }
}

fn continues(last: &Status, next: &Status) -> bool {
    let kind = |s: &Status| (s.depth, s.allocated, s.zero, s.data, s.encoded, s.file, s.offset.is_some());
    let follows = match (last.offset, next.offset) {
        (Some(before), Some(after)) => before.checked_add(last.len) == Some(after),
        _ => true,
    };
    kind(last) == kind(next) && follows
}

/// Bytes that are printed at once.
const PAGE: usize = 64 << 10;

/// Writes lines. There may be millions, so numbers and text are put together by hand.
struct Printer<'a> {
    out: Vec<u8>,
    /// For people; else JSON.
    human: Option<Human<'a>>,
    middle: Middle,
    first: bool,
}

/// What lines for people need: the names of the files.
struct Human<'a> {
    image: &'a Image,
    known: Option<(NodeId, String)>,
}

impl<'a> Printer<'a> {
    fn json() -> Self {
        Self { out: b"[".to_vec(), human: None, middle: Middle::default(), first: true }
    }

    fn human(image: &'a Image) -> Self {
        let head = format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to");
        let human = Some(Human { image, known: None });
        Self { out: head.into_bytes(), human, middle: Middle::default(), first: true }
    }

    fn extent(&mut self, at: u64, s: &Status) -> Outcome {
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

    fn flush(&mut self) -> Outcome {
        let written = std::io::stdout().lock().write_all(&self.out);
        self.out.clear();
        written.map_err(|error| Failure::new(format!("Cannot write to standard output: {error}")))
    }

    /// The last line; the reference tells of nothing, too, with its `start`.
    fn end(mut self, start: u64) -> Outcome {
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
    of: Option<(u32, [bool; 5])>,
    text: Vec<u8>,
}

impl Middle {
    fn text(&mut self, s: &Status) -> &[u8] {
        let of = Some((s.depth, [s.allocated, s.zero, s.data, s.encoded, s.offset.is_some()]));
        if self.of != of {
            self.of = of;
            self.text = format!(
                ", \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \"compressed\": {}{}",
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
    out.extend(b", \"length\": ");
    decimal(out, s.len);
    out.extend(middle.text(s));
    if let Some(offset) = s.offset {
        decimal(out, offset);
    }
    out.push(b'}');
}

fn decimal(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    // Two at a time: half the divisions.
    while number >= 10 {
        let pair = (number % 100).to_le_bytes()[0];
        number /= 100;
        at -= 2;
        digits[at] = b'0' + pair / 10;
        digits[at + 1] = b'0' + pair % 10;
    }
    if number > 0 || at == digits.len() {
        at -= 1;
        digits[at] = b'0' + number.to_le_bytes()[0];
    }
    out.extend(&digits[at..]);
}

impl Human<'_> {
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
            _ => filename::of(&self.image.wires().view(file)),
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

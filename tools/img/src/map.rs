//! `map`: where the bytes of an image are.

use underlay_graph::ByteRange;
use underlay_graph::status::Status;
use underlay_graph::walk::Walk;

use crate::getopt::Known;
use crate::help::Help;
use crate::info::is_json;
use crate::map_lines::{Lines, Printer};
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

/// See [`Help`].
pub const HELP: Help = Help {
    command: "map",
    usage: "Usage: qemu-img map [-f FMT] [--output=human|json] [-s OFFSET] [-l LENGTH] [-U] FILENAME",
    known: KNOWN,
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
            "h" => return HELP.print(),
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
    let printer = Printer::new(if json { Lines::json() } else { Lines::human(image.wires()) })?;
    let mut joiner = Joiner { rest: ByteRange::between(start, end), last: None, printer };
    let mut walk = Walk::default();
    while joiner.add_all(|range| walk.status_now(&cx, range)) {
        match walk.status(&cx, joiner.next()).await {
            Ok(found) if joiner.add(found) => {}
            Ok(_) => break,
            Err(error) => {
                joiner.printer.end()?.flush()?;
                return Err(failed(error));
            }
        }
    }
    if let Some((at, extent)) = joiner.last {
        joiner.printer.extent(at, extent);
    }
    joiner.printer.end()?.end(start)
}

/// Makes one of neighbours that are alike.
struct Joiner {
    /// What nobody has asked for yet.
    rest: ByteRange,
    /// What may go on.
    last: Option<(u64, Status)>,
    printer: Printer,
}

impl Joiner {
    /// What to ask for next.
    fn next(&self) -> ByteRange {
        self.rest.split(STRIDE).0
    }

    /// Adds what `ask` says, as long as it says anything; whether there is more.
    fn add_all(&mut self, mut ask: impl FnMut(ByteRange) -> Option<Status>) -> bool {
        while !self.rest.is_empty() {
            let Some(found) = ask(self.next()) else { return true };
            if !self.add(found) {
                return false;
            }
        }
        false
    }

    /// Adds what comes next. False if there is no use in more.
    fn add(&mut self, found: Status) -> bool {
        let found = as_shown(found);
        let at = self.rest.start();
        self.rest = self.rest.split(found.len).1;
        match &mut self.last {
            Some((_, last)) if continues(last, &found) => {
                last.len += found.len;
                true
            }
            _ => self.last.replace((at, found)).is_none_or(|(at, extent)| self.printer.extent(at, extent)),
        }
    }
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

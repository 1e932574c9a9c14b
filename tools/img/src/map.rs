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
    let mut printer = Printer::new(if json { Lines::json() } else { Lines::human(image.wires()) })?;
    let (mut walk, mut rest) = (Walk::default(), ByteRange::between(start, end));
    while !rest.is_empty() {
        let asked = rest.split(STRIDE).0;
        let found = match walk.status_now(&cx, asked) {
            Some(found) => found,
            None => match walk.status(&cx, asked).await {
                Ok(found) => found,
                Err(error) => {
                    let (mut lines, _) = printer.end()?;
                    lines.flush()?;
                    return Err(failed(error));
                }
            },
        };
        if !printer.extent(rest.start(), found) {
            break;
        }
        rest = rest.split(found.len).1;
    }
    let (mut lines, last) = printer.end()?;
    if let Some((at, extent)) = last {
        lines.extent(at, &extent)?;
    }
    lines.end(start)
}

/// Makes one of neighbours that are alike.
#[derive(Default)]
pub struct Joiner {
    /// What may go on.
    pub last: Option<(u64, Status)>,
}

impl Joiner {
    /// Adds what is at `at`, behind what came before. Gives what is complete now.
    pub fn add(&mut self, at: u64, found: Status) -> Option<(u64, Status)> {
        let found = as_shown(found);
        match &mut self.last {
            Some((_, last)) if continues(last, &found) => {
                last.len += found.len;
                None
            }
            _ => self.last.replace((at, found)),
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

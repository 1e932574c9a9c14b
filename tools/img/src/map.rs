//! `map`: where the bytes of an image are.

use underlay_drivers::filename;
use underlay_graph::ByteRange;
use underlay_graph::status::{Status, status};

use crate::getopt::{Known, parse};
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
    let (options, others) = parse(KNOWN, words)?;
    let (mut format, mut json, mut force_share) = (None, false, false);
    let (mut start, mut most) = (0, u64::MAX);
    for (name, value) in options {
        let size = || sizes::parse(&value).ok_or_else(|| Failure::new(format!("Invalid number: '{value}'")));
        match name.as_str() {
            "f" => format = Some(value),
            "output" => json = is_json(&value)?,
            "U" => force_share = true,
            "s" => start = size()?,
            "l" => most = size()?,
            "h" => {
                println!(
                    "Usage: qemu-img map [-f FMT] [--output=human|json] [-s OFFSET] [-l LENGTH] [-U] FILENAME"
                );
                return Ok(());
            }
            other => return Err(Failure::new(format!("option '{other}' is not supported yet"))),
        }
    }
    let [name] = others.as_slice() else {
        return Err(Failure::usage("Expecting one image file name", "map"));
    };
    let how = How { format: format.as_deref(), force_share, ..How::default() };
    let opened = image(name, how).await?;
    let extents = extents(&opened, start, most).await?;
    let printed = if json { print_json(&extents) } else { print_human(&opened, &extents) };
    opened.close().await?;
    printed
}

/// The extents of an image, neighbours that are alike in one.
async fn extents(image: &Image, start: u64, most: u64) -> Result<Vec<(u64, Status)>, Failure> {
    let failed = |error| Failure::new(format!("Failed to read image metadata: {error}"));
    let inside = image.root.enter().await.map_err(failed)?;
    let cx = inside.cx();
    let end = cx.length().min(start.saturating_add(most));
    let mut rest = ByteRange::between(start, end);
    let mut extents: Vec<(u64, Status)> = Vec::new();
    while !rest.is_empty() {
        let found = status(&cx, rest.split(STRIDE).0, None).await.map_err(failed)?;
        let at = rest.start();
        match extents.last_mut() {
            Some((_, last)) if continues(last, &found) => last.len += found.len,
            _ => extents.push((at, found)),
        }
        rest = rest.split(found.len).1;
    }
    Ok(extents)
}

fn continues(last: &Status, next: &Status) -> bool {
    let kind = |s: &Status| (s.depth, s.allocated, s.zero, s.data, s.encoded, s.file, s.offset.is_some());
    let follows = match (last.offset, next.offset) {
        (Some(before), Some(after)) => before.checked_add(last.len) == Some(after),
        _ => true,
    };
    kind(last) == kind(next) && follows
}

fn print_json(extents: &[(u64, Status)]) -> Outcome {
    let line = |(start, s): &(u64, Status)| {
        let offset = s.offset.map_or_else(String::new, |offset| format!(", \"offset\": {offset}"));
        format!(
            "{{ \"start\": {start}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \
             \"compressed\": {}{offset}}}",
            s.len, s.depth, s.allocated, s.zero, s.data, s.encoded
        )
    };
    let lines: Vec<_> = extents.iter().map(line).collect();
    println!("[{}]", lines.join(",\n"));
    Ok(())
}

fn print_human(image: &Image, extents: &[(u64, Status)]) -> Outcome {
    println!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to");
    let hex = |number: u64| if number == 0 { "0".to_owned() } else { format!("{number:#x}") };
    let wires = image.wires();
    for (start, s) in extents.iter().filter(|(_, s)| s.data && !s.zero) {
        let (Some(offset), Some(file)) = (s.offset, s.file) else {
            return Err(Failure::new("File contains external, encrypted or compressed clusters."));
        };
        let name = filename::of(&wires.view(file));
        println!("{:<16}{:<16}{:<16}{name}", hex(*start), hex(s.len), hex(offset));
    }
    Ok(())
}

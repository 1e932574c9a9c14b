//! `resize`: makes a disk larger, or smaller when that is asked for.

use underlay_graph::Preallocation;

use crate::getopt::{Known, parse};
use crate::open::{How, image};
use crate::{Failure, Outcome, sizes};

const KNOWN: Known = Known {
    short: "f:hq",
    long: &[
        ("help", "h", false),
        ("object", "object", true),
        ("image-opts", "image-opts", false),
        ("preallocation", "preallocation", true),
        ("shrink", "shrink", false),
    ],
};

pub async fn run(words: &[String]) -> Outcome {
    // The size comes last and may begin with a minus.
    let Some((size, words)) = words.split_last() else {
        return Err(Failure::usage("Expecting image file name and size", "resize"));
    };
    let (options, others) = parse(KNOWN, words)?;
    let (mut format, mut quiet, mut shrink, mut mode) = (None, false, false, Preallocation::Off);
    for (name, value) in options {
        match name.as_str() {
            "f" => format = Some(value),
            "q" => quiet = true,
            "shrink" => shrink = true,
            "preallocation" => {
                mode = match value.as_str() {
                    "off" => Preallocation::Off,
                    "metadata" => Preallocation::Metadata,
                    "falloc" => Preallocation::Falloc,
                    "full" => Preallocation::Full,
                    other => return Err(Failure::new(format!("Invalid preallocation mode '{other}'"))),
                }
            }
            "h" => {
                println!(
                    "Usage: qemu-img resize [-f FMT] [--preallocation=MODE] [-q] [--shrink] FILENAME [+|-]SIZE"
                );
                return Ok(());
            }
            other => return Err(Failure::new(format!("option '{other}' is not supported yet"))),
        }
    }
    let [name] = others.as_slice() else {
        return Err(Failure::usage("Expecting image file name and size", "resize"));
    };
    let (sign, digits) = match size.chars().next() {
        Some(sign @ ('+' | '-')) => (Some(sign), &size[1..]),
        _ => (None, size.as_str()),
    };
    let number = sizes::parse(digits).filter(|size| *size <= i64::MAX as u64).ok_or_else(|| {
        Failure::new(
            "Parameter 'size' expects a non-negative number below 2^64\n\
             Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
             and exabytes, respectively.",
        )
    })?;
    let how = How { format: format.as_deref(), write: true, resize: true, ..How::default() };
    let opened = image(name, how).await?;
    let error = |error: underlay_graph::IoError| Failure::new(error.to_string());
    let now = opened.root.length().await.map_err(error)?;
    let total = match sign {
        Some('+') => now.checked_add(number),
        Some(_) => now.checked_sub(number),
        None => Some(number),
    };
    let Some(total) = total.filter(|total| *total > 0) else {
        return Err(Failure::new("New image size must be positive"));
    };
    if total < now && !shrink {
        eprintln!(
            "qemu-img: Use the --shrink option to perform a shrink operation.\n\
             qemu-img: warning: Shrinking an image will delete all data beyond the shrunken image's end. Before \
             performing such an operation, make sure there is no important data there."
        );
        return Err(Failure::status(1));
    }
    {
        let inside = opened.root.enter().await.map_err(error)?;
        let cx = inside.cx();
        let total = total.next_multiple_of(512);
        cx.node().resize(&cx, total, mode).await.map_err(error)?;
        cx.flush().await.map_err(error)?;
    }
    opened.close().await?;
    if !quiet {
        println!("Image resized.");
    }
    Ok(())
}

//! `resize`: makes a disk larger, or smaller when that is asked for.

use underlay_graph::Preallocation;
use underlay_qcow2::Qcow2;
use underlay_qcow2::resize::trim_file;

use crate::getopt::Known;
use crate::open::{How, image};
use crate::{Failure, Outcome, sizes};

const KNOWN: Known = Known {
    short: "f:hq",
    long: &[
        ("help", "h", false),
        ("quiet", "q", false),
        ("format", "f", true),
        ("object", "object", true),
        ("image-opts", "image-opts", false),
        ("preallocation", "preallocation", true),
        ("shrink", "shrink", false),
    ],
};

pub async fn run(words: &[String]) -> Outcome {
    // The size comes last mostly, and may begin with a minus.
    let is_size = |word: &&String| {
        word.strip_prefix('-').is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
    };
    let (last, words) = match words.split_last().filter(|(last, _)| is_size(last)) {
        Some((last, words)) => (Some(last), words),
        None => (None, words),
    };
    let (options, others) = crate::options("resize", KNOWN, words)?;
    let mut image_opts = false;
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
            "image-opts" => image_opts = true,
            "h" => {
                println!(
                    "Usage: qemu-img resize [-f FMT] [--preallocation=MODE] [-q] [--shrink] FILENAME [+|-]SIZE"
                );
                return Ok(());
            }
            other => return Err(crate::unsupported(other)),
        }
    }
    let mut others = others;
    others.extend(last.cloned());
    let (name, size) = match others.as_slice() {
        [name, size] => (name, size),
        [] | [_] => return Err(Failure::usage("Expecting image file name and size", "resize")),
        _ => return Err(Failure::usage("Extra argument(s) in command line", "resize")),
    };
    let (sign, digits) = match size.chars().next() {
        Some(sign @ ('+' | '-')) => (Some(sign), &size[1..]),
        _ => (None, size.as_str()),
    };
    let number = sizes::option(digits, "size")?;
    let how = How { format: format.as_deref(), image_opts, write: true, resize: true, ..How::default() };
    let opened = image(name, how).await?;
    opened.warn_if_guessed();
    let error = |error: underlay_graph::IoError| Failure::with_hint(error.to_string(), error.hint());
    let now = opened.root.length().await.map_err(error)?;
    let signed = |number: u64| i64::try_from(number).is_ok();
    let total = match sign {
        Some('+') => now.checked_add(number),
        Some(_) => now.checked_sub(number),
        None => Some(number),
    };
    let Some(total) = total.filter(|total| *total > 0 && signed(*total)) else {
        return Err(Failure::new("New image size must be positive"));
    };
    if total <= now && mode != Preallocation::Off {
        return Err(Failure::new("Preallocation can only be used for growing images"));
    }
    if total < now && !shrink {
        eprintln!(
            "qemu-img: Use the --shrink option to perform a shrink operation.\n\
             qemu-img: warning: Shrinking an image will delete all data beyond the shrunken image's end. Before \
             performing such an operation, make sure there is no important data there."
        );
        return Err(Failure::status(1));
    }
    if total % 512 != 0 && !opened.is_raw() {
        return Err(Failure::new("The new size must be a multiple of 512"));
    }
    {
        let inside = opened.root.enter().await.map_err(error)?;
        let cx = inside.cx();
        // Such a node would take a smaller size for as good as its own.
        let file = if opened.is_raw() { cx.below() } else { cx };
        if file.node().driver() == "nbd" && total != now {
            return Err(Failure::new("Cannot resize NBD nodes"));
        }
        cx.node().resize(&cx, total, mode).await.map_err(error)?;
        cx.flush().await.map_err(error)?;
        if total < now && cx.node().as_any().is::<Qcow2>() {
            // What was freed has been written, and nobody else allocates anything.
            trim_file(&cx.below()).await.map_err(error)?;
        }
    }
    opened.close().await?;
    if !quiet {
        println!("Image resized.");
    }
    Ok(())
}

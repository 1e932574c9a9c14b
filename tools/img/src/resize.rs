//! `resize`: makes a disk larger, or smaller when that is asked for.

use underlay_graph::{Cx, IoError, Preallocation};
use underlay_qcow2::Qcow2;
use underlay_qcow2::resize::trim_file;
use underlay_sys::{complain, say};

use crate::getopt::{self, Known};
use crate::help::Help;
use crate::open::{How, Image, image};
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

/// See [`Help`].
pub const HELP: Help = Help {
    command: "resize",
    usage: "Usage: qemu-img resize [-f FMT] [--preallocation=MODE] [-q] [--shrink] FILENAME [+|-]SIZE",
    known: KNOWN,
};

/// What the command line asks for.
#[derive(Default)]
struct Asked {
    name: String,
    format: Option<String>,
    image_opts: bool,
    quiet: bool,
    shrink: bool,
    mode: Preallocation,
    /// More or less than now; else all of it.
    sign: Option<char>,
    number: u64,
}

pub async fn run(words: &[String]) -> Outcome {
    let Some(asked) = read(words)? else { return Ok(()) };
    let (format, image_opts) = (asked.format.as_deref(), asked.image_opts);
    let opened =
        image(&asked.name, How { format, image_opts, write: true, resize: true, ..How::default() }).await?;
    opened.warn_if_guessed();
    let now = opened.root.length().await.map_err(failed)?;
    let total = asked.total(now)?;
    if total % 512 != 0 && !opened.is_raw() {
        return Err(Failure::new("The new size must be a multiple of 512"));
    }
    resize(&opened, now, total, asked.mode).await?;
    opened.close().await?;
    if !asked.quiet {
        say!("Image resized.");
    }
    Ok(())
}

fn failed(error: IoError) -> Failure {
    Failure::with_hint(error.to_string(), error.hint())
}

/// What was being done when a limit was met, where the error itself does not say.
fn reserving(error: IoError, cx: &Cx<'_>, mode: Preallocation) -> IoError {
    let says_nothing = error.to_string() == error.plain().to_string();
    match mode {
        _ if !says_nothing || !cx.node().as_any().is::<Qcow2>() => error,
        Preallocation::Off => error,
        Preallocation::Metadata => error.context("Allocating clusters failed"),
        Preallocation::Falloc | Preallocation::Full => error.context("Failed to resize refcount structures"),
    }
}

/// `None`: it was only asked how to ask.
fn read(words: &[String]) -> Result<Option<Asked>, Failure> {
    let (negative, words) = take_negative(words);
    let (options, mut others) = crate::options("resize", KNOWN, &words)?;
    let mut asked = Asked::default();
    for (name, value) in options {
        match name.as_str() {
            "f" => asked.format = Some(value),
            "q" => asked.quiet = true,
            "shrink" => asked.shrink = true,
            "preallocation" => asked.mode = mode(&value)?,
            "image-opts" => asked.image_opts = true,
            "h" => return HELP.print().map(|()| None),
            other => return Err(crate::unsupported(other)),
        }
    }
    others.extend(negative);
    let (name, size) = match others.as_slice() {
        [name, size] => (name, size),
        [] | [_] => return Err(Failure::usage("Expecting image file name and size", "resize")),
        _ => return Err(Failure::usage("Extra argument(s) in command line", "resize")),
    };
    asked.name.clone_from(name);
    asked.sign = size.chars().next().filter(|first| matches!(first, '+' | '-'));
    asked.number = sizes::option(&size[asked.sign.map_or(0, char::len_utf8)..], "size")?;
    Ok(Some(asked))
}

/// Takes out a size that begins with a minus, and is no option: behind the file's name, or at the end.
fn take_negative(words: &[String]) -> (Option<String>, Vec<String>) {
    let is_size = |at: &usize| {
        let digits = words[*at].strip_prefix('-').unwrap_or_default();
        digits.starts_with(|first: char| first.is_ascii_digit())
    };
    let is_behind_name = |at: &usize| match getopt::parse(KNOWN, &words[..*at]) {
        Ok((_, others)) => others.len() == 1 && words[..*at].last() == others.first(),
        Err(_) => false,
    };
    let behind_name = (0..words.len()).filter(is_size).find(is_behind_name);
    let Some(at) = behind_name.or(words.len().checked_sub(1).filter(is_size)) else {
        return (None, words.to_vec());
    };
    let mut rest = words.to_vec();
    (Some(rest.remove(at)), rest)
}

fn mode(name: &str) -> Result<Preallocation, Failure> {
    match name {
        "off" => Ok(Preallocation::Off),
        "metadata" => Ok(Preallocation::Metadata),
        "falloc" => Ok(Preallocation::Falloc),
        "full" => Ok(Preallocation::Full),
        other => Err(Failure::new(format!("Invalid preallocation mode '{other}'"))),
    }
}

impl Asked {
    /// How long the disk will be, if it may.
    fn total(&self, now: u64) -> Result<u64, Failure> {
        let total = match self.sign {
            Some('+') => now.checked_add(self.number),
            Some(_) => now.checked_sub(self.number),
            None => Some(self.number),
        };
        let Some(total) = total.filter(|total| *total > 0 && i64::try_from(*total).is_ok()) else {
            return Err(Failure::new("New image size must be positive"));
        };
        if total <= now && self.mode != Preallocation::Off {
            return Err(Failure::new("Preallocation can only be used for growing images"));
        }
        if total < now && !self.shrink {
            complain!(
                "qemu-img: Use the --shrink option to perform a shrink operation.\n\
                 qemu-img: warning: Shrinking an image will delete all data beyond the shrunken image's end. Before \
                 performing such an operation, make sure there is no important data there."
            );
            return Err(Failure::status(1));
        }
        Ok(total)
    }
}

async fn resize(opened: &Image, now: u64, total: u64, mode: Preallocation) -> Outcome {
    let inside = opened.root.enter().await.map_err(failed)?;
    let cx = inside.cx();
    // Such a node would take a smaller size for as good as its own.
    let file = if opened.is_raw() { cx.below() } else { cx };
    match file.node().driver() {
        "nbd" if total != now => return Err(Failure::new("Cannot resize NBD nodes")),
        "host_device" if total != now && mode == Preallocation::Off => {
            return Err(Failure::new("Cannot resize device files"));
        }
        _ => {}
    }
    cx.node().resize(&cx, total, mode).await.map_err(|error| failed(reserving(error, &cx, mode)))?;
    cx.flush().await.map_err(failed)?;
    if total < now && cx.node().as_any().is::<Qcow2>() {
        // What was freed has been written, and nobody else allocates anything.
        trim_file(&cx.below()).await.map_err(failed)?;
    }
    Ok(())
}

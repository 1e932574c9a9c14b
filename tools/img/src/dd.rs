//! `dd`: copies blocks of one image into a new one.

use underlay_graph::{ByteRange, IoError, WriteFlags};
use underlay_sys::{Iov, complain};

use crate::create::{self, Refused};
use crate::getopt::Known;
use crate::help::Help;
use crate::open::{How, Image, image};
use crate::{Failure, Outcome, same_file, sizes};

const KNOWN: Known = Known {
    short: "hf:O:U",
    long: &[
        ("help", "h", false),
        ("object", "object", true),
        ("format", "f", true),
        ("output-format", "O", true),
        ("image-opts", "image-opts", false),
        ("force-share", "U", false),
    ],
};

/// See [`Help`].
pub const HELP: Help = Help {
    command: "dd",
    usage: "Usage: qemu-img dd [-f FMT] [-O FMT] [-U] [bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
    known: KNOWN,
};

/// Copied at a time, in bytes, whatever the blocks are: they only count.
const CHUNK: u64 = 2 << 20;

struct Request {
    format: Option<String>,
    image_opts: bool,
    force_share: bool,
    target_format: String,
    operands: Operands,
}

/// The words with an equals sign.
struct Operands {
    input: Option<String>,
    output: Option<String>,
    block: u64,
    count: Option<u64>,
    skip: u64,
}

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = crate::options("dd", KNOWN, words)?;
    let (mut format, mut image_opts, mut force_share) = (None, false, false);
    let mut target_format = "raw".to_owned();
    for (name, value) in options {
        match name.as_str() {
            "f" => format = Some(value),
            "O" => target_format = value,
            "U" => force_share = true,
            "image-opts" => image_opts = true,
            "h" => return HELP.print(),
            other => return Err(crate::unsupported(other)),
        }
    }
    let operands = Operands::parse(&others)?;
    copy(&Request { format, image_opts, force_share, target_format, operands }).await
}

impl Operands {
    fn parse(words: &[String]) -> Result<Self, Failure> {
        let mut operands = Self { input: None, output: None, block: 512, count: None, skip: 0 };
        for word in words {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            match name {
                "if" => operands.input = Some(value.to_owned()),
                "of" => operands.output = Some(value.to_owned()),
                "bs" => {
                    let most = u64::from(i32::MAX.unsigned_abs());
                    operands.block = sizes::argument_in(value, "bs", 1..=most)?;
                }
                "count" => operands.count = Some(blocks(value, "count")?),
                "skip" => operands.skip = blocks(value, "skip")?,
                other => return Err(Failure::new(format!("unrecognized operand {other}"))),
            }
        }
        Ok(operands)
    }
}

/// A number of blocks: without a suffix.
fn blocks(text: &str, what: &str) -> Result<u64, Failure> {
    if text.ends_with(|last: char| last.is_ascii_alphabetic()) {
        return Err(Failure::new(format!("Invalid {what} specified: '{text}'.")));
    }
    sizes::argument(text, what)
}

async fn copy(request: &Request) -> Outcome {
    let Operands { input, output, block, count, skip } = &request.operands;
    let (Some(input), Some(output)) = (input, output) else {
        return Err(Failure::new("Must specify both input and output files"));
    };
    if !matches!(request.target_format.as_str(), "raw" | "qcow2" | "file" | "null-co" | "null-aio") {
        return Err(Failure::new("Unknown file format"));
    }
    let how = How {
        format: request.format.as_deref(),
        image_opts: request.image_opts,
        force_share: request.force_share,
        ..How::default()
    };
    let from = image(input, how).await?;
    let end = from.length().await?;
    let end = count.map_or(end, |count| end.min(count.saturating_mul(*block)));
    let start = skip.saturating_mul(*block);
    if same_file::is_in(&from, output) {
        return Err(Failure::new(format!("{output}: input and output are the same file")));
    }
    if start > end {
        complain!("qemu-img: {input}: cannot skip to specified offset");
    }
    let range = ByteRange::between(start.min(end), end);
    let format = request.target_format.as_str();
    create::target(output, range.len(), format, None, Vec::new()).await.map_err(|refused| match refused {
        Refused::Option(failure) => failure,
        Refused::Create(failure) => {
            let text = failure.message.unwrap_or_default();
            Failure::new(format!("{output}: error while creating output image: {text}"))
        }
    })?;
    let to = image(output, How { format: Some(format), write: true, ..How::default() }).await?;
    let copied = copy_range(&from, &to, range).await;
    let (from, to) = (from.close().await, to.close().await);
    copied.and(from).and(to)
}

/// Everything is written, also what is zero.
async fn copy_range(from: &Image, to: &Image, range: ByteRange) -> Outcome {
    let reading = |error: IoError| {
        Failure::new(format!("error while reading from input image file: {}", error.plain()))
    };
    let writing =
        |error: IoError| Failure::new(format!("error while writing to output image file: {}", error.plain()));
    let mut rest = range;
    while !rest.is_empty() {
        let (here, after) = rest.split(CHUNK);
        rest = after;
        let bytes = Iov::scratch(here.buffer_len());
        from.root.read(here, bytes.clone()).await.map_err(reading)?;
        let at = here.start() - range.start();
        let target = ByteRange::between(at, at + here.len());
        to.root.write(target, bytes, WriteFlags::default()).await.map_err(writing)?;
    }
    Ok(())
}

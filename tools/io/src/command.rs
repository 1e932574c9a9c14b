//! The commands.

use std::time::Instant;

use underlay_graph::status::status;
use underlay_graph::{ByteRange, IoError, WriteFlags, ZeroFlags};
use underlay_img::getopt::{Known, parse};
use underlay_img::open::Image;
use underlay_img::sizes;
use underlay_sys::Iov;

use crate::report;

/// What comes after a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The next one.
    Done,
    /// The next one, but the exit status is 1.
    Failed,
    /// The end.
    Quit,
}

/// What writes fill with when nothing is said.
const FILL: u8 = 0xcd;
/// Longest request, in bytes.
const LONGEST: u64 = 2 << 30;

/// Executes one line.
pub async fn execute(image: &Image, line: &str) -> Next {
    let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let Some((name, rest)) = words.split_first() else { return Next::Done };
    let done = match name.as_str() {
        "q" | "quit" => return Next::Quit,
        "r" | "read" | "aio_read" => read(image, name, rest).await,
        "w" | "write" | "aio_write" => write(image, name, rest).await,
        "d" | "discard" => discard(image, rest).await,
        "f" | "flush" | "aio_flush" => {
            image.root.flush().await.map_err(|error| format!("flush failed: {error}"))
        }
        "l" | "length" => length(image).await,
        "map" => map(image).await,
        "a" | "alloc" => alloc(image, rest).await,
        other => {
            eprintln!("command \"{other}\" not found");
            Err(String::new())
        }
    };
    match done {
        Ok(()) => Next::Done,
        Err(text) => {
            if !text.is_empty() {
                println!("{text}");
            }
            Next::Failed
        }
    }
}

type Done = Result<(), String>;

fn number(text: &str) -> Result<u64, String> {
    sizes::parse(text).filter(|number| *number <= i64::MAX as u64).ok_or_else(|| {
        format!("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}")
    })
}

fn pattern(text: &str) -> Result<u8, String> {
    let value = number(text)?;
    u8::try_from(value).map_err(|_| format!("{text} is not a valid pattern byte"))
}

fn options(
    name: &str,
    short: &'static str,
    words: &[String],
) -> Result<(Vec<(String, String)>, ByteRange), String> {
    let parsed = parse(Known { short, long: &[] }, words);
    let (options, others) = parsed.map_err(|failure| failure.message.unwrap_or_default())?;
    let [offset, length] = others.as_slice() else {
        eprintln!("bad argument count {} to {name}, expected at least 2 arguments", others.len());
        return Err(String::new());
    };
    let (offset, length) = (number(offset)?, number(length)?);
    let range = ByteRange::new(offset, length).filter(|range| range.len() <= LONGEST);
    Ok((options, range.ok_or_else(|| format!("length cannot exceed {LONGEST}, given {length}"))?))
}

async fn read(image: &Image, name: &str, words: &[String]) -> Done {
    let (options, range) = options(name, "CP:qv", words)?;
    let (mut expected, mut quiet, mut verbose) = (None, false, false);
    for (option, value) in options {
        match option.as_str() {
            "P" => expected = Some(pattern(&value)?),
            "q" => quiet = true,
            "v" => verbose = true,
            _ => {}
        }
    }
    let into = Iov::zeroed(range.buffer_len());
    let begun = Instant::now();
    image
        .root
        .read(range, into.clone())
        .await
        .map_err(|error| format!("{} failed: {error}", verb(name, "read")))?;
    let took = begun.elapsed();
    let bytes = into.to_vec();
    let wrong = expected.is_some_and(|byte| bytes.iter().any(|found| *found != byte));
    if wrong {
        println!("Pattern verification failed at offset {}, {} bytes", range.start(), range.len());
    }
    if !quiet {
        if verbose {
            dump(&bytes, range.start());
        }
        report::request("read", range.len(), range.start(), took);
    }
    // Reported already.
    if wrong { Err(String::new()) } else { Ok(()) }
}

fn verb(name: &str, plain: &'static str) -> String {
    if name.starts_with("aio") { name.to_owned() } else { plain.to_owned() }
}

/// Sixteen bytes a line, as numbers and as text.
fn dump(bytes: &[u8], offset: u64) {
    for (at, line) in bytes.chunks(16).enumerate() {
        let numbers: Vec<_> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let text: String =
            line.iter().map(|b| if b.is_ascii_alphanumeric() { char::from(*b) } else { '.' }).collect();
        println!("{:08x}:  {:47}  {text}", offset + at as u64 * 16, numbers.join(" "));
    }
}

async fn write(image: &Image, name: &str, words: &[String]) -> Done {
    let (options, range) = options(name, "cCfnP:quz", words)?;
    let (mut byte, mut flags, mut zero, mut fua, mut quiet) =
        (FILL, WriteFlags::default(), false, false, false);
    let mut zeroes = ZeroFlags::default();
    for (option, value) in options {
        match option.as_str() {
            "P" => byte = pattern(&value)?,
            "c" => flags.compressed = true,
            "z" => zero = true,
            "u" => zeroes.may_unmap = true,
            "n" => zeroes.no_fallback = true,
            "f" => fua = true,
            "q" => quiet = true,
            _ => {}
        }
    }
    if zeroes != ZeroFlags::default() && !zero {
        return Err("-u and -n require -z to be specified".to_owned());
    }
    let begun = Instant::now();
    let mut done: Result<(), IoError> = match zero {
        true => image.root.write_zeroes(range, zeroes).await,
        false => image.root.write(range, Iov::filled(range.buffer_len(), byte), flags).await,
    };
    if fua && done.is_ok() {
        done = image.root.flush().await;
    }
    done.map_err(|error| format!("{} failed: {error}", verb(name, "write")))?;
    if !quiet {
        report::request("wrote", range.len(), range.start(), begun.elapsed());
    }
    Ok(())
}

async fn discard(image: &Image, words: &[String]) -> Done {
    let (options, range) = options("discard", "Cq", words)?;
    let begun = Instant::now();
    image.root.discard(range).await.map_err(|error| format!("discard failed: {error}"))?;
    if !options.iter().any(|(option, _)| option == "q") {
        report::request("discard", range.len(), range.start(), begun.elapsed());
    }
    Ok(())
}

async fn length(image: &Image) -> Done {
    let length = image.root.length().await.map_err(|error| format!("getlength: {error}"))?;
    println!("{}", report::size(length as f64));
    Ok(())
}

/// Whether the first bytes of `range` are in the top image, and how many are alike.
async fn allocated(image: &Image, range: ByteRange) -> Result<(bool, u64), String> {
    let said = |error: IoError| format!("Failed to query allocation status: {error}");
    let inside = image.root.enter().await.map_err(said)?;
    let cx = inside.cx();
    let mut rest = range;
    let mut first = None;
    while !rest.is_empty() {
        let found = status(&cx, rest, None).await.map_err(said)?;
        let here = found.allocated && found.depth == 0;
        if *first.get_or_insert(here) != here {
            break;
        }
        rest = rest.split(found.len).1;
    }
    Ok((first.unwrap_or(false), range.len() - rest.len()))
}

async fn map(image: &Image) -> Done {
    let length = image.root.length().await.map_err(|error| format!("getlength: {error}"))?;
    let mut rest = ByteRange::between(0, length);
    while !rest.is_empty() {
        let (here, len) = allocated(image, rest).await?;
        let (start, not) = (rest.start(), if here { "    " } else { "not " });
        let (of, at) = (report::size(len as f64), report::size(start as f64));
        println!("{of} ({len:#x}) bytes {not}allocated at offset {at} ({start:#x})");
        rest = rest.split(len).1;
    }
    Ok(())
}

async fn alloc(image: &Image, words: &[String]) -> Done {
    let (offset, length) = match words {
        [offset] => (number(offset)?, 512),
        [offset, length] => (number(offset)?, number(length)?),
        _ => {
            eprintln!("bad argument count {} to alloc, expected between 1 and 2 arguments", words.len());
            return Err(String::new());
        }
    };
    let range = ByteRange::new(offset, length).ok_or_else(|| "the range is too large".to_owned())?;
    let (mut rest, mut sum) = (range, 0);
    while !rest.is_empty() {
        let (here, len) = allocated(image, rest).await?;
        sum += if here { len } else { 0 };
        rest = rest.split(len).1;
    }
    println!("{sum}/{length} bytes allocated at offset {}", report::size(offset as f64));
    Ok(())
}

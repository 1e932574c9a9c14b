//! `compare`: whether two images have the same content.

use underlay_graph::ByteRange;
use underlay_graph::status::{Status, status};
use underlay_sys::Iov;

use crate::getopt::{Known, parse};
use crate::open::{How, Image, image};
use crate::{Failure, Outcome};

const KNOWN: Known = Known {
    short: "hf:F:T:pqsU",
    long: &[
        ("help", "h", false),
        ("object", "object", true),
        ("image-opts", "image-opts", false),
        ("force-share", "U", false),
    ],
};

/// Compared at a time, in bytes.
const CHUNK: u64 = 2 << 20;

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = parse(KNOWN, words)?;
    let (mut formats, mut quiet, mut strict, mut force_share) = ([None, None], false, false, false);
    for (name, value) in options {
        match name.as_str() {
            "f" => formats[0] = Some(value),
            "F" => formats[1] = Some(value),
            "q" => quiet = true,
            "s" => strict = true,
            "U" => force_share = true,
            // Progress is not worth a line here, and the cache mode matters for speed alone.
            "p" | "T" => {}
            "h" => {
                println!("Usage: qemu-img compare [-f FMT] [-F FMT] [-p] [-q] [-s] [-U] FILENAME1 FILENAME2");
                return Ok(());
            }
            other => {
                return Err(Failure {
                    status: 2,
                    ..Failure::new(format!("option '{other}' is not supported yet"))
                });
            }
        }
    }
    let [first, second] = others.as_slice() else {
        return Err(Failure::usage("Expecting two image file names", "compare"));
    };
    let trouble = |failure: Failure| Failure { status: 2, ..failure };
    let how = |at: usize| How { format: formats[at].as_deref(), force_share, ..How::default() };
    let first = image(first, how(0)).await.map_err(trouble)?;
    let second = image(second, how(1)).await.map_err(trouble)?;
    let difference = compare(&first, &second, strict, quiet).await.map_err(trouble)?;
    first.close().await.map_err(trouble)?;
    second.close().await.map_err(trouble)?;
    match difference {
        None => {
            if !quiet {
                println!("Images are identical.");
            }
            Ok(())
        }
        Some(text) => {
            if !quiet {
                println!("{text}");
            }
            Err(Failure::status(1))
        }
    }
}

async fn compare(
    first: &Image,
    second: &Image,
    strict: bool,
    quiet: bool,
) -> Result<Option<String>, Failure> {
    let failed = |error: underlay_graph::IoError| Failure::new(format!("Error while reading: {error}"));
    let lengths = (first.root.length().await.map_err(failed)?, second.root.length().await.map_err(failed)?);
    if lengths.0 != lengths.1 && strict {
        return Ok(Some("Strict mode: Image size mismatch!".to_owned()));
    }
    let (common, longest) = (lengths.0.min(lengths.1), lengths.0.max(lengths.1));
    let longer = if lengths.0 > lengths.1 { first } else { second };
    let mut rest = ByteRange::between(0, common);
    while !rest.is_empty() {
        let (one, other) =
            (look(first, rest).await.map_err(failed)?, look(second, rest).await.map_err(failed)?);
        let kind = |s: &Status| (s.allocated, s.data, s.zero, s.encoded);
        if strict && kind(&one) != kind(&other) {
            return Ok(Some(format!("Strict mode: Offset {} block status mismatch!", rest.start())));
        }
        let both = rest.split(one.len.min(other.len)).0;
        if one.zero && other.zero {
            rest = rest.split(both.len()).1;
            continue;
        }
        let chunk = both.split(CHUNK).0;
        let (bytes, others) = (content(first, &one, chunk).await, content(second, &other, chunk).await);
        if let Some(text) = mismatch(chunk, &bytes.map_err(failed)?, &others.map_err(failed)?) {
            return Ok(Some(text));
        }
        rest = rest.split(chunk.len()).1;
    }
    if common < longest && !quiet {
        println!("Warning: Image size mismatch!");
    }
    let mut rest = ByteRange::between(common, longest);
    while !rest.is_empty() {
        let found = look(longer, rest).await.map_err(failed)?;
        let chunk = if found.zero { rest.split(found.len).0 } else { rest.split(found.len.min(CHUNK)).0 };
        if !found.zero {
            let bytes = read(longer, chunk).await.map_err(failed)?;
            if let Some(text) = mismatch(chunk, &bytes, &vec![0; bytes.len()]) {
                return Ok(Some(text));
            }
        }
        rest = rest.split(chunk.len()).1;
    }
    Ok(None)
}

/// What the first bytes of `range` are.
async fn look(image: &Image, range: ByteRange) -> underlay_graph::Result<Status> {
    let inside = image.root.enter().await?;
    status(&inside.cx(), range, None).await
}

/// The bytes of a chunk; what is known to be zero is not read.
async fn content(image: &Image, found: &Status, chunk: ByteRange) -> underlay_graph::Result<Vec<u8>> {
    if found.zero { Ok(vec![0; chunk.buffer_len()]) } else { read(image, chunk).await }
}

fn mismatch(chunk: ByteRange, bytes: &[u8], others: &[u8]) -> Option<String> {
    if bytes == others {
        return None;
    }
    let at = bytes.iter().zip(others).position(|(a, b)| a != b)?;
    // In whole sectors, as the reference counts.
    Some(format!("Content mismatch at offset {}!", (chunk.start() + at as u64) / 512 * 512))
}

async fn read(image: &Image, range: ByteRange) -> underlay_graph::Result<Vec<u8>> {
    let into = Iov::scratch(range.buffer_len());
    image.root.read(range, into.clone()).await?;
    Ok(into.to_vec())
}

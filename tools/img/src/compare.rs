//! `compare`: whether two images have the same content.

use underlay_graph::ByteRange;
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
        return Err(Failure { status: 2, ..Failure::new("Expecting two image file names") });
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
    let mut rest = ByteRange::between(0, longest);
    while !rest.is_empty() {
        if rest.start() == common && !quiet {
            println!("Warning: Image size mismatch!");
        }
        let chunk = if rest.start() < common { rest.before(common) } else { rest }.split(CHUNK).0;
        let bytes = read(if rest.start() < common { first } else { longer }, chunk).await.map_err(failed)?;
        let other = match rest.start() < common {
            true => read(second, chunk).await.map_err(failed)?,
            false => vec![0; bytes.len()],
        };
        if let Some(at) = bytes.iter().zip(&other).position(|(a, b)| a != b) {
            // In whole sectors, as the reference counts.
            let at = (chunk.start() + at as u64) / 512 * 512;
            return Ok(Some(format!("Content mismatch at offset {at}!")));
        }
        rest = rest.split(chunk.len()).1;
    }
    Ok(None)
}

async fn read(image: &Image, range: ByteRange) -> underlay_graph::Result<Vec<u8>> {
    let into = Iov::scratch(range.buffer_len());
    image.root.read(range, into.clone()).await?;
    Ok(into.to_vec())
}

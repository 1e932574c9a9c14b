//! `measure`: how large an image's file would get.

use underlay_graph::{ByteRange, IoError};
use underlay_qcow2::measure::measure;
use underlay_qcow2::{CreateError, CreateOptions, Qcow2, Version};
use underlay_qmp::json::{Object, Value};
use underlay_sys::say;

use crate::create::{self, Refused};
use crate::getopt::Known;
use crate::help::Help;
use crate::info::is_json;
use crate::open::{How, Image, image};
use crate::snapshot::Wanted;
use crate::{Failure, Outcome, sizes};

const KNOWN: Known = Known {
    short: "hf:l:o:O:U",
    long: &[
        ("help", "h", false),
        ("image-opts", "image-opts", false),
        ("object", "object", true),
        ("output", "output", true),
        ("size", "size", true),
        ("force-share", "U", false),
        ("snapshot", "l", true),
        ("format", "f", true),
        ("target-format", "O", true),
        ("options", "o", true),
    ],
};

/// See [`Help`].
pub const HELP: Help = Help {
    command: "measure",
    usage: "Usage: qemu-img measure [-f FMT] [-O FMT] [-o OPTIONS] [--output=human|json] [-l SNAPSHOT] [-U] FILENAME | \
                     --size SIZE",
    known: KNOWN,
};

/// Asked about at a time, in bytes.
const STRIDE: u64 = 1 << 30;

#[derive(Debug, Default)]
struct Request {
    format: Option<String>,
    image_opts: bool,
    force_share: bool,
    snapshot: Option<Wanted>,
    target_format: Option<String>,
    options: Vec<(String, String)>,
    size: Option<u64>,
    json: bool,
}

/// Bytes, as they are told.
struct Sizes {
    required: u64,
    fully_allocated: u64,
    bitmaps: Option<u64>,
}

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = crate::options("measure", KNOWN, words)?;
    let mut request = Request::default();
    for (name, value) in options {
        match name.as_str() {
            "f" => request.format = Some(value),
            "l" => request.snapshot = Some(Wanted::parse("qemu-img", &value)?),
            "o" => request.options.extend(create::option_list(&value)?),
            "O" => request.target_format = Some(value),
            "U" => request.force_share = true,
            "image-opts" => request.image_opts = true,
            "output" => request.json = is_json(&value, "measure")?,
            "size" => request.size = Some(sizes::argument(&value, "image size")?),
            "h" => return HELP.print(),
            other => return Err(crate::unsupported(other)),
        }
    }
    if others.len() > 1 {
        return Err(Failure::new("At most one filename argument is allowed."));
    }
    let name = others.first();
    if name.is_none() && (request.image_opts || request.format.is_some() || request.snapshot.is_some()) {
        return Err(Failure::new("--image-opts, -f, and -l require a filename argument."));
    }
    match (name, request.size) {
        (None, None) => Err(Failure::new("Either --size N or one filename must be specified.")),
        (Some(_), Some(_)) => Err(Failure::new("--size N cannot be used together with a filename.")),
        (None, Some(size)) => {
            show(&of_target(size, None, &request).await?, request.json);
            Ok(())
        }
        (Some(name), None) => {
            let (format, image_opts) = (request.format.as_deref(), request.image_opts);
            let force_share = request.force_share;
            // A snapshot is looked at where nobody writes.
            let no_share = request.snapshot.is_some() && !force_share;
            let how = How { format, image_opts, force_share, no_share, ..How::default() };
            let opened = image(name, how).await?;
            let measured = async {
                if let Some(wanted) = &request.snapshot {
                    let failed = |error: IoError| Failure::new(error.to_string());
                    let inside = opened.root.enter().await.map_err(failed)?;
                    wanted.show(&inside.cx()).await.map_err(Failure::new)?;
                }
                of_target(opened.length().await?, Some(&opened), &request).await
            };
            let measured = measured.await;
            opened.close().await?;
            show(&measured?, request.json);
            Ok(())
        }
    }
}

fn show(sizes: &Sizes, json: bool) {
    if json {
        let mut object = Object::new();
        object.insert("required", sizes.required);
        object.insert("fully-allocated", sizes.fully_allocated);
        if let Some(bitmaps) = sizes.bitmaps {
            object.insert("bitmaps", bitmaps);
        }
        say!("{}", Value::Object(object).to_pretty());
        return;
    }
    say!("required size: {}", sizes.required);
    say!("fully allocated size: {}", sizes.fully_allocated);
    if let Some(bitmaps) = sizes.bitmaps {
        say!("bitmaps size: {bitmaps}");
    }
}

async fn of_target(size: u64, source: Option<&Image>, request: &Request) -> Result<Sizes, Failure> {
    let size = size.next_multiple_of(512);
    match request.target_format.as_deref().unwrap_or("raw") {
        "qcow2" => of_qcow2(size, source, request).await,
        "raw" => of_raw(size, request),
        other @ ("file" | "host_device" | "nbd") => {
            Err(Failure::new(format!("Block driver '{other}' does not support size measurement")))
        }
        other @ ("null-co" | "null-aio") => {
            Err(Failure::new(format!("Format driver '{other}' does not support image creation")))
        }
        other => Err(Failure::new(format!("Unknown file format '{other}'"))),
    }
}

/// A list of options that cannot be understood.
fn invalid(text: &str, format: &str) -> Failure {
    Failure::new(format!("{text}\nqemu-img: Invalid options for file format '{format}'"))
}

fn of_raw(size: u64, request: &Request) -> Result<Sizes, Failure> {
    // They make no difference.
    create::understood("raw", &request.options)
        .map_err(|failure| invalid(&failure.message.unwrap_or_default(), "raw"))?;
    Ok(Sizes { required: size, fully_allocated: size, bitmaps: None })
}

async fn of_qcow2(size: u64, source: Option<&Image>, request: &Request) -> Result<Sizes, Failure> {
    let mut list = request.options.clone();
    // What the backing file is makes no difference, but that there is one.
    let backed = list.iter().any(|(name, _)| name == "backing_file");
    list.retain(|(name, _)| !matches!(name.as_str(), "backing_file" | "backing_fmt"));
    let wanted = create::wanted(&list).map_err(|refused| match refused {
        Refused::Option(failure) => invalid(&failure.message.unwrap_or_default(), "qcow2"),
        Refused::Create(failure) => failure,
    })?;
    let is_v2 = match wanted.compat.as_deref() {
        None | Some("1.1") => false,
        // The newer names are only known where images are made.
        Some("0.10") => true,
        Some(other) => return Err(Failure::new(format!("Invalid compatibility level: '{other}'"))),
    };
    let preallocated = match wanted.preallocation.as_deref() {
        None | Some("off" | "metadata") => false,
        Some("falloc" | "full") => true,
        Some(other) => return Err(Failure::new(format!("invalid parameter value: {other}"))),
    };
    let CreateOptions { cluster_size, extended_l2, refcount_bits, .. } = wanted.options;
    // Only this one has anything to say about the version here.
    let version = if is_v2 && refcount_bits != 16 { Version::V2 } else { Version::V3 };
    let shape =
        CreateOptions { cluster_size, extended_l2, refcount_bits, version, ..CreateOptions::new(size) };
    let measured = measure(&shape).map_err(|error| match error {
        CreateError::TooLarge => {
            Failure::new("The image size is too large (try using a larger cluster size)")
        }
        // Its own word for the option.
        other => Failure::new(other.to_string().replace("version=v3", "compat=1.1")),
    })?;
    let mut sizes =
        Sizes { required: measured.metadata, fully_allocated: measured.fully_allocated, bitmaps: None };
    if let Some(source) = source {
        let data = data_clusters(source, cluster_size)
            .await
            .map_err(|error| Failure::new(format!("Unable to get block status: {error}")))?;
        sizes.required = measured.metadata + data * cluster_size;
        let node = source.wires().view(source.node());
        let qcow2 = node.node().as_any().downcast_ref::<Qcow2>().filter(|_| !is_v2);
        sizes.bitmaps = qcow2.and_then(|qcow2| qcow2.measure_bitmaps(cluster_size));
    }
    if preallocated || (backed && source.is_some()) {
        sizes.required = sizes.fully_allocated;
    }
    Ok(sizes)
}

/// How many clusters have anything that is not known to be zero.
async fn data_clusters(source: &Image, cluster: u64) -> Result<u64, IoError> {
    let mut rest = ByteRange::between(0, source.root.length().await?);
    // The first cluster that is not counted yet.
    let (mut next, mut count) = (0, 0);
    while !rest.is_empty() {
        let found = source.status(rest.split(STRIDE).0).await?;
        let (run, after) = rest.split(found.len);
        rest = after;
        if found.allocated && !found.zero {
            let first = (run.start() / cluster).max(next);
            let end = run.end().div_ceil(cluster);
            count += end.saturating_sub(first);
            next = next.max(end);
        }
    }
    Ok(count)
}

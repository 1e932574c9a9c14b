//! `create`: makes an image.

use underlay_drivers::create;
use underlay_drivers::names::resolve_backing;
use underlay_graph::{BackingRef, Preallocation};
use underlay_qcow2::{Compression, CreateOptions, Version};

use crate::getopt::{Known, parse};
use crate::open::{How, image};
use crate::{Failure, Outcome, sizes};

const KNOWN: Known =
    Known { short: "F:b:f:ho:qu6", long: &[("help", "h", false), ("object", "object", true)] };

/// What the command line asks for.
#[derive(Default)]
struct Request {
    format: String,
    backing: Option<String>,
    backing_format: Option<String>,
    options: Vec<(String, String)>,
    quiet: bool,
    unsafe_backing: bool,
}

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = parse(KNOWN, words)?;
    let mut request = Request { format: "raw".to_owned(), ..Request::default() };
    for (name, value) in options {
        match name.as_str() {
            "f" => request.format = value,
            "b" => request.backing = Some(value),
            "F" => request.backing_format = Some(value),
            "o" => request.options.extend(option_list(&value)?),
            "q" => request.quiet = true,
            "u" => request.unsafe_backing = true,
            "h" => {
                println!(
                    "Usage: qemu-img create [-f FMT] [-b BACKING [-F FMT]] [-o OPTIONS] [-q] [-u] FILENAME [SIZE]"
                );
                return Ok(());
            }
            other => return Err(Failure::new(format!("option '{other}' is not supported yet"))),
        }
    }
    let (name, size) = match others.as_slice() {
        [name] => (name, None),
        [name, size] => (name, Some(parse_size(size)?)),
        [] => return Err(Failure::usage("Expecting image file name", "create")),
        _ => return Err(Failure::new("Unexpected argument: ".to_owned() + &others[2])),
    };
    make(name, size, request).await.map_err(|failure| match failure.message {
        // Some errors name the file already.
        Some(message) if message.starts_with(&format!("{name}: ")) => Failure::new(message),
        Some(message) => Failure::new(format!("{name}: {message}")),
        None => failure,
    })
}

/// `a=b,c=d` with `,,` for a comma.
pub fn option_list(text: &str) -> Result<Vec<(String, String)>, Failure> {
    let marked = text.replace(",,", "\0");
    let words = marked.split(',').filter(|word| !word.is_empty()).map(|word| word.replace('\0', ","));
    let pair = |word: String| match word.split_once('=') {
        Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        None => Err(Failure::new(format!("Invalid parameter '{word}'"))),
    };
    words.map(pair).collect()
}

pub fn parse_size(text: &str) -> Result<u64, Failure> {
    let size = sizes::parse(text).filter(|size| *size <= i64::MAX as u64);
    size.ok_or_else(|| Failure::new(format!("Invalid image size specified: '{text}'.")))
}

async fn make(name: &str, size: Option<u64>, mut request: Request) -> Outcome {
    for (option, value) in std::mem::take(&mut request.options) {
        match option.as_str() {
            "backing_file" => request.backing = Some(value),
            "backing_fmt" => request.backing_format = Some(value),
            _ => request.options.push((option, value)),
        }
    }
    if request.backing.as_deref() == Some("") {
        return Err(Failure::new("Expected backing file name, got empty string"));
    }
    match request.format.as_str() {
        "qcow2" => make_qcow2(name, size, request).await,
        "raw" => make_raw(name, size, request).await,
        other => Err(Failure::new(format!("Unknown file format '{other}'"))),
    }
}

async fn make_raw(name: &str, size: Option<u64>, request: Request) -> Outcome {
    if request.backing.is_some() {
        return Err(Failure::new("Backing file not supported for file format 'raw'"));
    }
    let (mut size, mut mode) = (size, Preallocation::Off);
    let mut shown = String::new();
    for (option, value) in request.options {
        match option.as_str() {
            "size" => size = Some(parse_size(&value)?),
            "preallocation" => {
                mode = preallocation(&value)?;
                shown = format!(" preallocation={value}");
            }
            other => return Err(Failure::new(format!("Invalid parameter '{other}'"))),
        }
    }
    let size = size.ok_or_else(|| Failure::new("Image creation needs a size parameter"))?;
    if !request.quiet {
        println!("Formatting '{name}', fmt=raw size={size}{shown}");
    }
    create::raw(name, size.next_multiple_of(512), mode).await.map_err(|error| Failure::new(error.to_string()))
}

fn preallocation(value: &str) -> Result<Preallocation, Failure> {
    Ok(match value {
        "off" => Preallocation::Off,
        "metadata" => Preallocation::Metadata,
        "falloc" => Preallocation::Falloc,
        "full" => Preallocation::Full,
        other => {
            return Err(Failure::new(format!("Parameter 'preallocation' does not accept value '{other}'")));
        }
    })
}

async fn make_qcow2(name: &str, size: Option<u64>, request: Request) -> Outcome {
    let mut options = CreateOptions::new(0);
    let (mut size, mut compat, mut mode) = (size, None, None);
    for (option, value) in &request.options {
        let size_of = |value: &str| {
            sizes::parse(value).ok_or_else(|| Failure::new(format!("Parameter '{option}' expects a size")))
        };
        let flag = || match value.as_str() {
            "on" | "yes" | "true" | "y" => Ok(true),
            "off" | "no" | "false" | "n" => Ok(false),
            _ => Err(Failure::new(format!("Parameter '{option}' expects 'on' or 'off'"))),
        };
        match option.as_str() {
            "size" => size = Some(parse_size(value)?),
            "cluster_size" => options.cluster_size = size_of(value)?,
            "refcount_bits" => options.refcount_bits = size_of(value)?,
            "lazy_refcounts" => options.lazy_refcounts = flag()?,
            "extended_l2" => options.extended_l2 = flag()?,
            "compat" => {
                options.version = match value.as_str() {
                    "0.10" | "v2" => Version::V2,
                    "1.1" | "v3" => Version::V3,
                    other => {
                        return Err(Failure::new(format!(
                            "Parameter 'version' does not accept value '{other}'"
                        )));
                    }
                };
                compat = Some(value.clone());
            }
            "compression_type" => {
                options.compression = match value.as_str() {
                    "zlib" => Compression::Zlib,
                    "zstd" => Compression::Zstd,
                    other => {
                        let text = format!("Parameter 'compression-type' does not accept value '{other}'");
                        return Err(Failure::new(text));
                    }
                }
            }
            "preallocation" => {
                options.preallocation = preallocation(value)?;
                mode = Some(value.clone());
            }
            "encryption" | "encrypt.format" | "data_file" | "data_file_raw" => {
                return Err(Failure::new(format!("Option '{option}' is not supported yet")));
            }
            other => return Err(Failure::new(format!("Invalid parameter '{other}'"))),
        }
    }
    options.size = backing_and_size(name, size, &request, &mut options).await?;
    let zstd = options.compression == Compression::Zstd;
    let on = |flag| if flag { "on" } else { "off" };
    let mut line = format!(
        "Formatting '{name}', fmt=qcow2 cluster_size={} extended_l2={}",
        options.cluster_size,
        on(options.extended_l2)
    );
    let mut say = |text: String| line.push_str(&text);
    if let Some(mode) = mode {
        say(format!(" preallocation={mode}"));
    }
    say(format!(" compression_type={} size={}", if zstd { "zstd" } else { "zlib" }, options.size));
    if let Some(compat) = compat {
        say(format!(" compat={compat}"));
    }
    if let Some(backing) = &options.backing {
        say(format!(" backing_file={}", backing.file.replace(',', ",,")));
        if let Some(format) = &backing.format {
            say(format!(" backing_fmt={format}"));
        }
    }
    say(format!(" lazy_refcounts={} refcount_bits={}", on(options.lazy_refcounts), options.refcount_bits));
    if !request.quiet {
        println!("{line}");
    }
    options.size = options.size.next_multiple_of(512);
    create::qcow2(name, &options).await.map_err(|error| Failure::new(error.to_string()))
}

/// Looks at the backing file, which gives the size when none was given.
async fn backing_and_size(
    name: &str,
    size: Option<u64>,
    request: &Request,
    options: &mut CreateOptions,
) -> Result<u64, Failure> {
    let Some(backing) = &request.backing else {
        if request.backing_format.is_some() {
            return Err(Failure::new("Backing format cannot be used without backing file"));
        }
        return size.ok_or_else(|| Failure::new("Image creation needs a size parameter"));
    };
    if let Some(format) = request.backing_format.as_deref().filter(|format| !is_known(format)) {
        return Err(Failure::new(format!("Unknown backing file format '{format}'")));
    }
    if resolve_backing(name, backing) == name {
        let text = "Error: Trying to create an image with the same filename as the backing file";
        return Err(Failure::new(text));
    }
    options.backing = Some(BackingRef { file: backing.clone(), format: request.backing_format.clone() });
    if request.unsafe_backing {
        return size.ok_or_else(|| Failure::new("Image creation needs a size parameter"));
    }
    let how = How { format: request.backing_format.as_deref(), force_share: true, ..How::default() };
    let opened = image(&resolve_backing(name, backing), how).await;
    let below = opened.map_err(|failure| {
        let message = failure.message.unwrap_or_default();
        // The reference names the file once here.
        let file = format!("Could not open '{}': ", resolve_backing(name, backing));
        let message = message.strip_prefix(&file).filter(|rest| rest.starts_with(&file)).unwrap_or(&message);
        Failure::new(format!("{message}\nCould not open backing image."))
    })?;
    let length = below.root.length().await.map_err(|error| Failure::new(error.to_string()))?;
    let driver = below.wires().plan().node(below.node()).node.driver();
    below.close().await?;
    if request.backing_format.is_none() {
        let text = "Backing file specified without backing format";
        return Err(Failure::new(format!("{text}\nDetected format of {driver}.")));
    }
    Ok(size.unwrap_or(length))
}

fn is_known(format: &str) -> bool {
    matches!(format, "qcow2" | "raw" | "file" | "host_device" | "null-co" | "null-aio")
}

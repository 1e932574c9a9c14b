//! `amend`: changes what an image says of itself.

use underlay_graph::{IoError, Preallocation};
use underlay_qcow2::resize::trim_file;
use underlay_qcow2::{Header, Qcow2, Version};

use crate::create::{self, Refused};
use crate::getopt::Known;
use crate::help::Help;
use crate::open::{How, Image, check_cache, image};
use crate::progress::Progress;
use crate::{Failure, Outcome, option_help, sizes};

const KNOWN: Known = Known {
    short: "hf:t:o:pq",
    long: &[
        ("help", "h", false),
        ("object", "object", true),
        ("format", "f", true),
        ("image-opts", "image-opts", false),
        ("cache", "t", true),
        ("options", "o", true),
        ("force", "force", false),
        ("progress", "p", false),
        ("quiet", "q", false),
    ],
};

/// See [`Help`].
pub const HELP: Help = Help {
    command: "amend",
    usage: "Usage: qemu-img amend [-f FMT | --image-opts] [-t CACHE] [-p] [-q] -o OPTIONS FILENAME",
    known: KNOWN,
};

/// Options of `create` that stay what they were.
const FIXED: [&str; 5] = ["cluster_size", "compression_type", "encryption", "extended_l2", "preallocation"];

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = crate::options("amend", KNOWN, words)?;
    let (mut format, mut cache, mut image_opts) = (None, None, false);
    let (mut progress, mut quiet, mut list, mut help) = (false, false, None, false);
    for (name, value) in options {
        match name.as_str() {
            "f" => format = Some(value),
            "t" => cache = Some(value),
            "image-opts" => image_opts = true,
            "o" if option_help::is_asked(&value) => help = true,
            "o" => list.get_or_insert_with(Vec::new).extend(create::option_list(&value)?),
            "p" => progress = true,
            "q" => quiet = true,
            // Nothing that we change is unsafe.
            "force" => {}
            "h" => return HELP.print(),
            other => return Err(crate::unsupported(other)),
        }
    }
    if list.is_none() && !help {
        return Err(Failure::usage("Must specify options (-o)", "amend"));
    }
    let progress = Progress::new(progress && !quiet);
    if let Some(format) = format.as_deref().filter(|_| help) {
        return option_help::print_amendable(format);
    }
    let [name] = others.as_slice() else {
        return Err(Failure::new("Expecting one image file name"));
    };
    cache.map_or(Ok(()), |mode| check_cache(&mode, "cache"))?;
    let how = How { format: format.as_deref(), image_opts, write: true, resize: true, ..How::default() };
    let opened = image(name, how).await?;
    opened.warn_if_guessed();
    let driver = opened.wires().view(opened.node()).node().driver();
    if help || driver != "qcow2" {
        return option_help::print_amendable(driver);
    }
    let wanted = Wanted::read(list.unwrap_or_default())?;
    progress.show(0.0);
    let done = wanted.apply(opened, name, how).await;
    progress.show(100.0);
    done
}

/// What shall be other than it is.
#[derive(Default)]
struct Wanted {
    compat: Option<String>,
    lazy_refcounts: Option<bool>,
    refcount_bits: Option<u64>,
    size: Option<u64>,
    backing: Option<String>,
    backing_format: Option<String>,
    data_file: bool,
    data_file_raw: bool,
}

impl Wanted {
    fn read(list: Vec<(String, String)>) -> Result<Self, Failure> {
        let refused = |refused| match refused {
            Refused::Option(failure) | Refused::Create(failure) => failure,
        };
        let mut wanted = Self::default();
        for (name, value) in list {
            match name.as_str() {
                "backing_file" => wanted.backing = Some(value),
                "backing_fmt" => wanted.backing_format = Some(value),
                "compat" => wanted.compat = Some(value),
                "data_file" => wanted.data_file = true,
                "data_file_raw" => wanted.data_file_raw = create::flag(&name, &value).map_err(refused)?,
                "lazy_refcounts" => {
                    wanted.lazy_refcounts = Some(create::flag(&name, &value).map_err(refused)?);
                }
                "refcount_bits" => {
                    wanted.refcount_bits = Some(create::number(&name, &value).map_err(refused)?);
                }
                // No size at all is not asked for.
                "size" => wanted.size = Some(sizes::option(&value, &name)?).filter(|size| *size > 0),
                fixed if FIXED.contains(&fixed) => {
                    let text = format!(
                        "Invalid parameter '{fixed}'\nThis option is only supported for image creation"
                    );
                    return Err(Failure::new(text));
                }
                other => return Err(Failure::new(format!("Invalid parameter '{other}'"))),
            }
        }
        Ok(wanted)
    }

    /// The version that the image shall have, if it can be what is wanted.
    fn check(&self, header: &Header) -> Result<Version, Failure> {
        let refused = |text: &str| Err(Failure::new(text));
        let version = match self.compat.as_deref() {
            None => header.version,
            Some("0.10" | "v2") => Version::V2,
            Some("1.1" | "v3") => Version::V3,
            Some(other) => return refused(&format!("Unknown compatibility level {other}")),
        };
        if let Some(bits) = self.refcount_bits {
            if !bits.is_power_of_two() || bits > 64 {
                return refused("Refcount width must be a power of two and may not exceed 64 bits");
            }
            if version == Version::V2 && bits != 16 {
                return refused(
                    "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or \
                     greater)",
                );
            }
            if bits != 1 << header.refcount_order {
                return refused("Changing refcount_bits is not supported by this version of Underlay");
            }
        }
        if self.data_file {
            return refused("data-file can only be set for images that use an external data file");
        }
        if self.data_file_raw {
            return refused("data-file-raw cannot be set on existing images");
        }
        let now = header.backing_ref();
        let file = now.as_ref().map(|now| now.file.clone());
        let format = now.and_then(|now| now.format);
        let given = self.backing.is_some() || self.backing_format.is_some();
        if given && (file, format) != (self.backing.clone(), self.backing_format.clone()) {
            return refused("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.");
        }
        if version == Version::V2 && self.lazy_refcounts == Some(true) {
            return refused(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
            );
        }
        Ok(version)
    }

    /// Goes up first and down last: in between are all the possibilities.
    async fn apply(&self, mut opened: Image, name: &str, how: How<'_>) -> Outcome {
        let version = {
            let inside = opened.root.enter().await.map_err(told)?;
            let cx = inside.cx();
            let image = qcow2(cx.node())?;
            let version = self.check(&image.header())?;
            if version == Version::V3 {
                image.change_version(&cx, version).await.map_err(told)?;
            }
            version
        };
        if version == Version::V3 {
            opened.close().await?;
            opened = crate::open::image(name, how).await?;
        }
        let done = self.change(&opened, version).await;
        let closed = opened.close().await;
        done.and(closed)
    }

    async fn change(&self, opened: &Image, version: Version) -> Outcome {
        let inside = opened.root.enter().await.map_err(told)?;
        let cx = inside.cx();
        let image = qcow2(cx.node())?;
        if let Some(lazy) = self.lazy_refcounts.filter(|_| version == Version::V3) {
            image.set_lazy_refcounts(&cx, lazy).await.map_err(told)?;
        }
        if let Some(size) = self.size {
            let now = image.size();
            cx.node().resize(&cx, size, Preallocation::Off).await.map_err(told)?;
            cx.flush().await.map_err(told)?;
            if size < now {
                trim_file(&cx.below()).await.map_err(told)?;
            }
        }
        if version == Version::V2 {
            image.change_version(&cx, version).await.map_err(told)?;
        }
        Ok(())
    }
}

fn told(error: IoError) -> Failure {
    Failure::with_hint(error.to_string(), error.hint())
}

fn qcow2(node: &dyn underlay_graph::Node) -> Result<&Qcow2, Failure> {
    node.as_any().downcast_ref::<Qcow2>().ok_or_else(|| Failure::new("the image is not qcow2"))
}

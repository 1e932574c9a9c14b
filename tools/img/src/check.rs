//! `check`: whether an image's own tables agree.

use std::sync::Arc;

use underlay_graph::{Role, View};
use underlay_qcow2::{CheckError, Finding, Fix, Outcome as Found};
use underlay_qcow2::{can_only_be_checked, check, complete_snapshots};
use underlay_qmp::json::{Object, Value};
use underlay_sys::{complain, say};

use crate::getopt::Known;
use crate::help::Help;
use crate::info::is_json;
use crate::open::{How, Image, check_cache, image};
use crate::{Failure, Outcome};

const KNOWN: Known = Known {
    short: "hf:r:T:qU",
    long: &[
        ("help", "h", false),
        ("quiet", "q", false),
        ("cache", "T", true),
        ("format", "f", true),
        ("repair", "r", true),
        ("output", "output", true),
        ("object", "object", true),
        ("image-opts", "image-opts", false),
        ("force-share", "U", false),
    ],
};

/// See [`Help`].
pub const HELP: Help = Help {
    command: "check",
    usage: "Usage: qemu-img check [-f FMT] [--output=human|json] [-r leaks|all] [-q] [-U] FILENAME",
    known: KNOWN,
};

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = crate::options("check", KNOWN, words)?;
    let (mut format, mut json, mut quiet, mut force_share, mut fix) = (None, false, false, false, Fix::None);
    let (mut cache, mut image_opts) = (None, false);
    for (name, value) in options {
        match name.as_str() {
            "f" => format = Some(value),
            "output" => json = is_json(&value, "check")?,
            "q" => quiet = true,
            "U" => force_share = true,
            "T" => cache = Some(value),
            "r" => {
                fix = match value.as_str() {
                    "leaks" => Fix::Leaks,
                    "all" => Fix::All,
                    _ => {
                        let text = format!("--repair (-r) expects 'leaks' or 'all' not '{value}'");
                        return Err(Failure::usage(text, "check"));
                    }
                }
            }
            "image-opts" => image_opts = true,
            "h" => return HELP.print(),
            other => return Err(crate::unsupported(other)),
        }
    }
    let [name] = others.as_slice() else {
        return Err(Failure::usage("Expecting one image file name", "check"));
    };
    cache.map_or(Ok(()), |mode| check_cache(&mode, "source cache"))?;
    let how = How { format: format.as_deref(), image_opts, force_share, ..How::default() };
    let (opened, file) = match image(name, how).await {
        Ok(opened) => image_file(opened, fix).await?,
        Err(failure) => only_to_check(name, how).await.ok_or(failure)?,
    };
    let status = if fix == Fix::None {
        let status = checked(name, &file, fix, json, quiet).await;
        drop(file);
        close_after(status, opened).await?
    } else {
        drop(file);
        opened.close().await?;
        repair(name, how, fix, json, quiet).await?
    };
    if status == 0 { Ok(()) } else { Err(Failure::status(status)) }
}

/// An image and its file, if it can be checked.
async fn image_file(opened: Image, fix: Fix) -> Result<(Image, Arc<View>), Failure> {
    if fix != Fix::None {
        opened.warn_if_guessed();
    }
    let view = opened.wires().view(opened.node()).clone();
    let file = view.child(Role::File).filter(|_| view.node().driver() == "qcow2").cloned();
    drop(view);
    match file {
        Some(file) => Ok((opened, file)),
        None => {
            opened.close().await?;
            Err(Failure { status: 63, ..Failure::new("This image format does not support checks") })
        }
    }
}

/// The file of an image that cannot be opened, but be checked; twice, as there is no image.
async fn only_to_check(name: &str, how: How<'_>) -> Option<(Image, Arc<View>)> {
    if how.image_opts || !matches!(how.format, None | Some("qcow2")) {
        return None;
    }
    let opened = image(name, How { protocol: true, ..how }).await.ok()?;
    let file = opened.wires().view(opened.node()).clone();
    if can_only_be_checked(&file.cx()).await {
        return Some((opened, file));
    }
    drop(file);
    opened.close().await.ok()?;
    None
}

/// Repairs by way of the file: what is marked as corrupt is not opened for writing otherwise.
async fn repair(name: &str, how: How<'_>, fix: Fix, json: bool, quiet: bool) -> Result<i32, Failure> {
    let how = How { protocol: true, write: true, resize: true, ..how };
    let opened = image(name, how).await?;
    let file = opened.wires().view(opened.node()).clone();
    let status = match once(&file, fix).await {
        Ok(mut found) => {
            complete(&file, &mut found).await;
            told(name, &file, found, json, quiet).await
        }
        Err(failure) => Err(failure),
    };
    drop(file);
    close_after(status, opened).await
}

/// Writes a flawed snapshot table anew if nothing else is wrong. Otherwise, or when that fails, its entries stay what
/// they are.
async fn complete(file: &Arc<View>, found: &mut Found) {
    let entries = std::mem::take(&mut found.incomplete_snapshots);
    if entries == 0 {
        return;
    }
    let done = match found.corruptions > 0 || found.check_errors > 0 {
        true => Err("the image has other errors".to_owned()),
        false => complete_snapshots(file).await.map_err(|error| error.to_string()),
    };
    match done {
        Ok(()) => found.corruptions_fixed += entries,
        Err(why) => {
            complain!("qemu-img: ERROR failed to update snapshot table: {why}");
            found.corruptions += entries;
        }
    }
}

/// Closes an image also after a check that failed: what was repaired until then is flushed. That error is the one to
/// tell.
async fn close_after<T>(status: Result<T, Failure>, opened: Image) -> Result<T, Failure> {
    let closed = opened.close().await;
    let status = status?;
    closed.map(|()| status)
}

async fn once(file: &View, fix: Fix) -> Result<Found, Failure> {
    let mut say = |finding: Finding| match finding {
        Finding::Line(line) => complain!("{line}"),
        Finding::Error(line) => complain!("qemu-img: {line}"),
    };
    check(&file.cx(), fix, &mut say).await.map_err(|error| match error {
        CheckError::Failed(error) => Failure::new(format!("Check failed: {error}")),
        other => Failure::new(other.to_string()),
    })
}

async fn checked(name: &str, file: &View, fix: Fix, json: bool, quiet: bool) -> Result<i32, Failure> {
    told(name, file, once(file, fix).await?, json, quiet).await
}

/// Tells what was found, and after repairs what is still there.
async fn told(name: &str, file: &View, found: Found, json: bool, quiet: bool) -> Result<i32, Failure> {
    let mut found = found;
    let fixed = (found.leaks_fixed, found.corruptions_fixed);
    if fixed != (0, 0) {
        if !json && !quiet {
            say!(
                "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
                 Double checking the fixed image now...",
                fixed.0,
                fixed.1
            );
        }
        found = once(file, Fix::None).await?;
        (found.leaks_fixed, found.corruptions_fixed) = fixed;
    }
    if json && !quiet {
        say!("{}", Value::Object(as_json(name, &found)).to_pretty());
    } else if !json && !quiet {
        print_human(&found);
    }
    Ok(match (found.corruptions, found.check_errors, found.leaks) {
        (_, errors, _) if errors > 0 => {
            return Err(Failure::new("Check failed"));
        }
        (corruptions, _, _) if corruptions > 0 => 2,
        (_, _, leaks) if leaks > 0 => 3,
        _ => 0,
    })
}

fn print_human(found: &Found) {
    if found.corruptions == 0 && found.leaks == 0 && found.check_errors == 0 {
        say!("No errors were found on the image.");
    }
    if found.corruptions > 0 {
        say!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.",
            found.corruptions
        );
    }
    if found.leaks > 0 {
        say!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.",
            found.leaks
        );
    }
    if found.check_errors > 0 {
        say!("\n{} internal errors have occurred during the check.", found.check_errors);
    }
    if found.total_clusters > 0 && found.allocated_clusters > 0 {
        let share = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        say!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            found.allocated_clusters,
            found.total_clusters,
            share(found.allocated_clusters, found.total_clusters),
            share(found.fragmented_clusters, found.allocated_clusters),
            share(found.compressed_clusters, found.allocated_clusters)
        );
    }
    if found.image_end_offset > 0 {
        say!("Image end offset: {}", found.image_end_offset);
    }
}

fn as_json(name: &str, found: &Found) -> Object {
    let mut object =
        Object::new().with("filename", name).with("format", "qcow2").with("check-errors", found.check_errors);
    let counts = [
        ("image-end-offset", found.image_end_offset),
        ("corruptions", found.corruptions),
        ("leaks", found.leaks),
        ("corruptions-fixed", found.corruptions_fixed),
        ("leaks-fixed", found.leaks_fixed),
        ("total-clusters", found.total_clusters),
        ("allocated-clusters", found.allocated_clusters),
        ("fragmented-clusters", found.fragmented_clusters),
        ("compressed-clusters", found.compressed_clusters),
    ];
    for (name, count) in counts.into_iter().filter(|(_, count)| *count > 0) {
        object.insert(name, count);
    }
    object
}

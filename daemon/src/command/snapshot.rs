//! External snapshots: an overlay slides in between a disk and all its users.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use underlay_drivers::names::resolve_backing;
use underlay_drivers::options::{Backing, Child, DriverSpec};
use underlay_drivers::protocol::file::FileNode;
use underlay_drivers::{BackingPolicy, NodeSpec, Opener, filename};
use underlay_graph::{BackingRef, NewNode, NodeId, Plan, Preallocation, View};
use underlay_qcow2::CreateOptions;
use underlay_sys::say;

use super::arguments::Arguments;
use super::lookup::Names;
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// Arguments of blockdev-snapshot-sync.
#[derive(Clone, Debug)]
pub struct SnapshotSync {
    /// The disk, as a device.
    pub device: Option<String>,
    /// The disk, as a node.
    pub node_name: Option<String>,
    /// Where the overlay is or will be.
    pub snapshot_file: String,
    /// What the overlay will be called.
    pub snapshot_node_name: Option<String>,
    /// The overlay's format, qcow2 if absent.
    pub format: Option<String>,
    /// The file exists (mode `existing`) rather than being made (`absolute-paths`).
    pub existing: bool,
}

impl SnapshotSync {
    /// From the command's arguments.
    pub fn new(arguments: &mut Arguments) -> Self {
        Self {
            device: arguments.optional_text("device"),
            node_name: arguments.optional_text("node-name"),
            snapshot_file: arguments.text("snapshot-file"),
            snapshot_node_name: arguments.optional_text("snapshot-node-name"),
            format: arguments.optional_text("format"),
            existing: arguments.optional_text("mode").as_deref() == Some("existing"),
        }
    }
}

/// blockdev-snapshot-sync, done to a draft: the overlay is made and open.
pub async fn snapshot_sync(daemon: &Daemon, plan: &mut Plan, arguments: SnapshotSync) -> CommandResult<()> {
    let (device, node_name) = (arguments.device.as_deref(), arguments.node_name.as_deref());
    let names = Names::of(daemon);
    let disk = names.device_or_node(plan, device, node_name)?;
    names.not_busy(plan, disk, device.or(node_name).unwrap_or_default())?;
    match &arguments.snapshot_node_name {
        None if arguments.node_name.is_some() => {
            return Err(CommandError::new("New overlay node-name missing"));
        }
        Some(name) if plan.find(name).is_some() => {
            return Err(CommandError::new("New overlay node-name already in use"));
        }
        _ => {}
    }
    let format = arguments.format.as_deref().unwrap_or("qcow2");
    if !arguments.existing {
        create_overlay(plan, disk, &arguments.snapshot_file, format).await?;
    }
    let new = open_overlay(daemon, plan, disk, &arguments, format).await?;
    let overlay = plan.add(new)?;
    Ok(plan.put_on_top(disk, overlay)?)
}

/// blockdev-snapshot, done to a draft: with an overlay that blockdev-add has opened.
pub fn snapshot(daemon: &Daemon, plan: &mut Plan, node: &str, overlay: &str) -> CommandResult<()> {
    let names = Names::of(daemon);
    let disk = names.either(plan, node)?;
    names.not_busy(plan, disk, node)?;
    let overlay = names.either(plan, overlay)?;
    Ok(plan.put_on_top(disk, overlay)?)
}

/// Makes the overlay's file, naming the disk as what is below it.
async fn create_overlay(plan: &Plan, disk: NodeId, file: &str, format: &str) -> CommandResult<()> {
    let view = plan.wires().view(plan.skip_filters(disk));
    create_image(plan, file, format, view.cx().length(), Some(&view)).await
}

/// Makes an image file of `size` bytes, based on the image `below`. QEMU announces this on standard output, as qemu-img
/// does.
pub async fn create_image(
    plan: &Plan,
    file: &str,
    format: &str,
    size: u64,
    below: Option<&View>,
) -> CommandResult<()> {
    let known = matches!(format, "raw" | "file" | "host_device" | "null-co" | "null-aio");
    match (format, below) {
        ("qcow2", _) => {}
        ("raw", None) => {
            check_users_without_lock(plan, file)?;
            say!("Formatting '{file}', fmt=raw size={size}");
            return Ok(underlay_drivers::create::raw(file, size, Preallocation::Off).await?);
        }
        (_, Some(_)) if known => {
            let text = format!("Backing file not supported for file format '{format}'");
            return Err(CommandError::new(text));
        }
        (_, None) if known => {
            return Err(CommandError::new(format!(
                "Format driver '{format}' does not support image creation"
            )));
        }
        _ => return Err(CommandError::new(format!("Unknown file format '{format}'"))),
    }
    let mut options = CreateOptions::new(size.div_ceil(512).saturating_mul(512));
    let mut named = String::new();
    if let Some(below) = below {
        let (backing, driver) = (name_from(file, &filename::for_header(below)), below.node().driver());
        if backing == file {
            let text = "Error: Trying to create an image with the same filename as the backing file";
            return Err(CommandError::new(text));
        }
        named = format!(" backing_file={} backing_fmt={driver}", backing.replace(',', ",,"));
        options.backing = Some(BackingRef { file: backing, format: Some(driver.to_owned()) });
    }
    check_users_without_lock(plan, file)?;
    say!(
        "Formatting '{file}', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib \
         size={}{named} lazy_refcounts=off refcount_bits=16",
        options.size
    );
    Ok(underlay_drivers::create::qcow2(file, &options).await?)
}

/// Refuses when a node has this file and no lock on it (nobody uses the node yet, or it does without): an image that is
/// made there would be made in the place of its own. (A lock is met when the file is opened, and gives QEMU's error.)
fn check_users_without_lock(plan: &Plan, file: &str) -> CommandResult<()> {
    let NodeSpec { driver: DriverSpec::File(spec), .. } = NodeSpec::file(file) else { return Ok(()) };
    let Ok(found) = std::fs::metadata(&spec.filename) else { return Ok(()) };
    let is_it = |node: &FileNode| {
        let stat = node.handle().stat();
        !node.is_locked() && stat.is_ok_and(|own| (own.device, own.inode) == (found.dev(), found.ino()))
    };
    let mut nodes = plan.nodes().map(|(_, node)| node);
    match nodes.find(|node| node.node.as_any().downcast_ref().is_some_and(is_it)) {
        Some(node) => Err(CommandError::new(format!("'{file}' is in use by node '{}'", node.name))),
        None => Ok(()),
    }
}

/// How the image `from` must call the image `to`, a name that counts from our own folder: as it is, unless that
/// would lead elsewhere from where `from` lies. (QEMU writes the name as it is, and the overlay then cannot be
/// opened.)
pub fn name_from(from: &str, to: &str) -> String {
    if resolve_backing(from, to) == to || Path::new(to).is_absolute() {
        return to.to_owned();
    }
    match std::path::absolute(to) {
        Ok(path) if Path::new(to).exists() => path.to_string_lossy().into_owned(),
        _ => to.to_owned(),
    }
}

async fn open_overlay(
    daemon: &Daemon,
    plan: &Plan,
    disk: NodeId,
    arguments: &SnapshotSync,
    format: &str,
) -> CommandResult<NewNode> {
    let below = plan.node(disk);
    let like = below.options;
    let mut spec = NodeSpec::image(&arguments.snapshot_file, Some(format))?;
    spec.node_name = arguments.snapshot_node_name.clone();
    spec.cache_direct = Some(like.cache_direct);
    spec.cache_no_flush = Some(like.cache_no_flush);
    spec.discard = Some(like.discard);
    // Who could not write to the disk cannot write to its overlay either.
    spec.read_only = Some(below.read_only);
    if let DriverSpec::Qcow2 { backing, .. } = &mut spec.driver {
        *backing = Backing::None;
    }
    debug_assert!(!matches!(&spec.driver, DriverSpec::Qcow2 { file: Child::Reference(_), .. }));
    let opener = Opener::over(plan.wires(), BackingPolicy::Ignore, Some(daemon.on_corrupt()));
    Ok(opener.with_groups(&daemon.groups).open(spec).await?)
}

#[cfg(test)]
mod tests {
    use super::name_from;

    #[test]
    fn a_name_that_would_lead_elsewhere_is_made_absolute() {
        assert_eq!(name_from("b.qcow2", "a.qcow2"), "a.qcow2");
        assert_eq!(name_from("sub/b.qcow2", "/x/a.qcow2"), "/x/a.qcow2");
        assert_eq!(name_from("sub/b.qcow2", "json:{}"), "json:{}");

        assert!(name_from("sub/b.qcow2", "Cargo.toml").ends_with("/Cargo.toml"));
    }
}

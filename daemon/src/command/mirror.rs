//! blockdev-mirror, drive-mirror and block-job-change.

use underlay_drivers::names::resolve_backing;
use underlay_drivers::{BackingPolicy, NodeSpec, filename};
use underlay_graph::{NewNode, NodeId, Plan, Role, Wiring};
use underlay_jobs::mirror::check_granularity;
use underlay_jobs::{MirrorArgs, SyncMode, Target};

use super::arguments::Arguments;
use super::lookup::Names;
use super::{job, snapshot};
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// blockdev-mirror
pub async fn blockdev_mirror(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let plan = daemon.graph.plan();
    let (names, device) = (Names::of(daemon), arguments.text("device"));
    let source = names.either(&plan, &device)?;
    underlay_jobs::commit::check_root(&plan, source)?;
    let target = names.either(&plan, &arguments.text("target"))?;
    let job_id = names.job_id(&plan, &device, source);
    let is_zero = arguments.flag("target-is-zero", false);
    let mode = arguments.text("sync");
    let args = args(&plan, arguments, source, Target::Existing(target), &mode, job_id)?;
    drop(plan);
    let args = MirrorArgs { target_is_zero: is_zero, ..args };
    job::start(daemon, daemon.jobs.mirror(&daemon.graph, args).await?);
    Ok(())
}

/// drive-mirror: the target is a file, made for it unless the mode is `existing`.
pub async fn drive_mirror(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let plan = daemon.graph.plan();
    let (names, device) = (Names::of(daemon), arguments.text("device"));
    let source = names.either(&plan, &device)?;
    let job_id = names.job_id(&plan, &device, source);
    underlay_jobs::commit::check_root(&plan, source)?;
    let node_name = arguments.optional_text("node-name");
    if node_name.is_none() && arguments.has("replaces") {
        let text = "a node-name must be provided when replacing a named node of the graph";
        return Err(CommandError::new(text));
    }
    let (file, mode) = (arguments.text("target"), arguments.text("sync"));
    let existing = arguments.optional_text("mode").as_deref() == Some("existing");
    let wires = daemon.graph.wires();
    let own = plan.skip_filters(source);
    // What the copy leaves out is below it.
    let below = match mode.as_str() {
        "full" => None,
        "none" => Some(source),
        _ => plan.backing(own),
    };
    let own_format = wires.view(own).node().driver();
    let format = arguments.optional_text("format").or((!existing).then(|| own_format.to_owned()));
    if !existing {
        let view = below.map(|below| wires.view(plan.skip_filters(below)));
        let (format, size) = (format.as_deref().unwrap_or_default(), wires.view(source).cx().length());
        snapshot::create_image(&plan, &file, format, size, view.as_deref()).await?;
    }
    let mut node = open_target(daemon, source, &file, format.as_deref(), node_name).await?;
    let below = match existing {
        true => named_below(daemon, source, &file, &mut node).await?,
        false => below,
    };
    let target_is_new = !existing && below.is_none();
    let target = Target::New { node: Box::new(node), backing: below };
    let unmap = arguments.flag("unmap", true);
    let args = MirrorArgs { target_is_new, unmap, ..args(&plan, arguments, source, target, &mode, job_id)? };
    drop(plan);
    job::start(daemon, daemon.jobs.mirror(&daemon.graph, args).await?);
    Ok(())
}

/// Opens the target without what is below it.
async fn open_target(
    daemon: &Daemon,
    source: NodeId,
    file: &str,
    format: Option<&str>,
    node_name: Option<String>,
) -> CommandResult<NewNode> {
    let plan = daemon.graph.plan();
    let like = plan.get(source).map(|node| node.options).unwrap_or_default();
    let mut spec = NodeSpec::image(file, format)?;
    spec.node_name = node_name;
    spec.cache_direct = Some(like.cache_direct);
    spec.cache_no_flush = Some(like.cache_no_flush);
    // The guest will be there.
    spec.discard = Some(like.discard);
    spec.read_only = Some(false);
    let opener = daemon.opener(BackingPolicy::Ignore);
    Ok(opener.open(spec).await?)
}

/// What an existing target names as its backing file: an image of the source's chain, or else it gets what it names at
/// once.
async fn named_below(
    daemon: &Daemon,
    source: NodeId,
    file: &str,
    target: &mut NewNode,
) -> CommandResult<Option<NodeId>> {
    let Some(backing) = target.node.backing_ref() else { return Ok(None) };
    let name = resolve_backing(file, &backing.file);
    let found = filename::find_in_chain(&daemon.graph.wires(), source, &name);
    if found.is_none() {
        let mut spec = NodeSpec::image(&name, backing.format.as_deref())?;
        spec.cache_direct = Some(target.options.cache_direct);
        spec.cache_no_flush = Some(target.options.cache_no_flush);
        spec.read_only = Some(true);
        let below = daemon.opener(BackingPolicy::Follow).open(spec).await?;
        target.children.push((Role::Backing, Wiring::New(Box::new(below))));
    }
    Ok(found)
}

fn sync_mode(name: &str) -> CommandResult<SyncMode> {
    match name {
        "full" => Ok(SyncMode::Full),
        "top" => Ok(SyncMode::Top),
        "none" => Ok(SyncMode::None),
        other => Err(CommandError::new(format!("Sync mode '{other}' not supported"))),
    }
}

/// What both commands say alike.
fn args(
    plan: &Plan,
    arguments: &mut Arguments,
    source: NodeId,
    target: Target,
    mode: &str,
    job_id: String,
) -> CommandResult<MirrorArgs> {
    let replaces = match arguments.optional_text("replaces") {
        Some(name) => Some(
            plan.find(&name)
                .ok_or_else(|| CommandError::new(format!("Failed to find node with node-name='{name}'")))?,
        ),
        None => None,
    };
    let granularity = optional_number(arguments, "granularity").map(|n| u32::try_from(n).unwrap_or(u32::MAX));
    check_granularity(granularity)?;
    let sync = sync_mode(mode)?;
    Ok(MirrorArgs {
        settings: job::settings(arguments, job_id),
        source,
        target,
        replaces,
        sync,
        granularity,
        buf_size: optional_number(arguments, "buf-size"),
        write_blocking: arguments.optional_text("copy-mode").as_deref() == Some("write-blocking"),
        target_is_zero: false,
        target_is_new: false,
        unmap: true,
        filter_node_name: arguments.optional_text("filter-node-name"),
    })
}

fn optional_number(arguments: &mut Arguments, name: &str) -> Option<i64> {
    arguments.has(name).then(|| arguments.number(name, 0))
}

/// block-job-change. QEMU takes any other `type` as asking a mirror for the copy mode `background`.
pub fn change(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let job = daemon.jobs.block_job(&arguments.text("id"))?;
    Ok(job.change_copy_mode(arguments.optional_text("copy-mode").as_deref() == Some("write-blocking"))?)
}

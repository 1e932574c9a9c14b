//! blockdev-backup and drive-backup.

use underlay_drivers::filter::copy_before_write::{CbwOptions, OnCbwError};
use underlay_drivers::{BackingPolicy, NodeSpec, Opener};
use underlay_graph::plan::DetectZeroes;
use underlay_graph::{NewNode, NodeId, Plan, Role, Wiring};
use underlay_jobs::{BackupArgs, BackupBitmap, BackupDraft, BackupSync, BackupTarget, BitmapMode};

use super::arguments::Arguments;
use super::lookup::Names;
use super::{job, snapshot};
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// blockdev-backup
pub async fn blockdev_backup(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let args = blockdev_args(daemon, &daemon.graph.plan(), arguments)?;
    job::start(daemon, daemon.jobs.backup(&daemon.graph, args).await?);
    Ok(())
}

/// drive-backup: the target is a file, made for it unless the mode is `existing`.
pub async fn drive_backup(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let args = drive_args(daemon, &daemon.graph.plan(), arguments).await?;
    job::start(daemon, daemon.jobs.backup(&daemon.graph, args).await?);
    Ok(())
}

/// Either command as an action of a transaction: wired in the draft and shown, but not started.
pub async fn draft(
    daemon: &Daemon,
    plan: &mut Plan,
    kind: &str,
    arguments: &mut Arguments,
) -> CommandResult<BackupDraft> {
    let args = match kind {
        "drive-backup" => drive_args(daemon, plan, arguments).await?,
        _ => blockdev_args(daemon, plan, arguments)?,
    };
    let draft = daemon.jobs.draft_backup(&daemon.graph, plan, args)?;
    draft.enlist()?;
    Ok(draft)
}

fn blockdev_args(daemon: &Daemon, plan: &Plan, arguments: &mut Arguments) -> CommandResult<BackupArgs> {
    let (names, device) = (Names::of(daemon), arguments.text("device"));
    let source = names.either(plan, &device)?;
    let target = names.either(plan, &arguments.text("target"))?;
    let job_id = names.job_id(plan, &device, source);
    let args = args(plan, arguments, source, BackupTarget::Existing(target), job_id)?;
    names.free(plan, source, &device)?;
    Ok(args)
}

async fn drive_args(daemon: &Daemon, plan: &Plan, arguments: &mut Arguments) -> CommandResult<BackupArgs> {
    let (names, device) = (Names::of(daemon), arguments.text("device"));
    let source = names.either(plan, &device)?;
    names.free(plan, source, &device)?;
    let job_id = names.job_id(plan, &device, source);
    let file = arguments.text("target");
    let existing = arguments.optional_text("mode").as_deref() == Some("existing");
    let format = arguments.optional_text("format");
    let mut args = args(plan, arguments, source, BackupTarget::Existing(source), job_id)?;
    let wires = plan.wires();
    let own = plan.skip_filters(source);
    let format = format.or_else(|| (!existing).then(|| wires.view(own).node().driver().to_owned()));
    if args.sync == BackupSync::Top && plan.backing(own).is_none() {
        args.sync = BackupSync::Full;
    }
    // What the copy leaves out is below it.
    let below = match args.sync {
        BackupSync::Full | BackupSync::Bitmap => None,
        BackupSync::Top => plan.backing(own),
        BackupSync::None => Some(own),
    };
    if !existing {
        let view = below.map(|below| wires.view(plan.skip_filters(below)));
        let (format, size) = (format.as_deref().unwrap_or_default(), wires.view(source).cx().length());
        snapshot::create_image(plan, &file, format, size, view.as_deref()).await?;
    }
    let based_on = (args.sync == BackupSync::None).then_some(source);
    let target = open_target(daemon, plan, source, &file, format.as_deref(), based_on).await?;
    args.target = BackupTarget::New(Box::new(target));
    Ok(args)
}

/// Opens the target, over `based_on` if that is given: then it shows the disk as it was all the time.
async fn open_target(
    daemon: &Daemon,
    plan: &Plan,
    source: NodeId,
    file: &str,
    format: Option<&str>,
    based_on: Option<NodeId>,
) -> CommandResult<NewNode> {
    let like = plan.get(source).map(|node| node.options).unwrap_or_default();
    let mut spec = NodeSpec::image(file, format)?;
    spec.cache_direct = Some(like.cache_direct);
    spec.cache_no_flush = Some(like.cache_no_flush);
    spec.discard = Some(true);
    spec.detect_zeroes = DetectZeroes::Unmap;
    spec.read_only = Some(false);
    let policy = if based_on.is_some() { BackingPolicy::Ignore } else { BackingPolicy::Follow };
    let mut target = Opener::over(plan.wires(), policy, Some(daemon.on_corrupt())).open(spec).await?;
    if let Some(source) = based_on {
        if !target.node.supports_backing() {
            let (driver, view) = (target.node.driver(), target.view(&plan.wires()));
            let text = format!("Driver '{driver}' of node '{}' does not support backing files", view.name());
            return Err(CommandError::new(text));
        }
        target.children.push((Role::Backing, Wiring::Existing(source)));
    }
    Ok(target)
}

/// What both commands say alike.
fn args(
    plan: &Plan,
    arguments: &mut Arguments,
    source: NodeId,
    target: BackupTarget,
    job_id: String,
) -> CommandResult<BackupArgs> {
    let (sync, bitmap) = sync_mode(plan, arguments, source)?;
    let mut perf = arguments.object("x-perf").unwrap_or_else(|| Arguments::new(Default::default()));
    let workers = perf.number("max-workers", 64);
    let workers = i32::try_from(workers).ok().filter(|workers| *workers > 0);
    let workers = workers.ok_or_else(|| CommandError::new("max-workers must be between 1 and 2147483647"))?;
    let max_chunk = u64::try_from(perf.number("max-chunk", 0))
        .map_err(|_| CommandError::new("max-chunk must be zero (which means no limit) or positive"))?;
    let on_error = match arguments.optional_text("on-cbw-error").as_deref() {
        Some("break-snapshot") => OnCbwError::BreakSnapshot,
        _ => OnCbwError::BreakGuestWrite,
    };
    let how = CbwOptions {
        on_error,
        min_cluster: perf.unsigned("min-cluster-size"),
        max_chunk,
        compress: arguments.flag("compress", false),
        discard_source: arguments.flag("discard-source", false),
        no_reflink: !perf.flag("use-copy-range", true),
        ..CbwOptions::default()
    };
    Ok(BackupArgs {
        settings: job::settings(arguments, job_id),
        source,
        target,
        sync,
        bitmap,
        how,
        most_in_flight: usize::try_from(workers).unwrap_or(usize::MAX),
        filter_node_name: arguments.optional_text("filter-node-name"),
    })
}

/// What is to be copied, and the bitmap.
fn sync_mode(
    plan: &Plan,
    arguments: &mut Arguments,
    source: NodeId,
) -> CommandResult<(BackupSync, Option<BackupBitmap>)> {
    let refused = |text: String| Err(CommandError::new(text));
    let sync = arguments.text("sync");
    let (name, mode) = (arguments.optional_text("bitmap"), arguments.optional_text("bitmap-mode"));
    let copied = match &*sync {
        "incremental" | "bitmap" => BackupSync::Bitmap,
        "top" => BackupSync::Top,
        "none" => BackupSync::None,
        _ => BackupSync::Full,
    };
    let name = match (name, mode.is_some()) {
        (None, _) if copied == BackupSync::Bitmap => {
            return refused(format!("must provide a valid bitmap name for '{sync}' sync mode"));
        }
        (None, true) => return refused("Cannot specify bitmap sync mode without a bitmap".to_owned()),
        (None, false) => return Ok((copied, None)),
        (Some(name), _) => name,
    };
    if sync == "incremental" && mode.as_deref().is_some_and(|mode| mode != "on-success") {
        let text = "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'";
        return refused(text.to_owned());
    }
    if plan.bitmap(source, &name).is_err() {
        return refused(format!("Bitmap '{name}' could not be found"));
    }
    let mode = match mode.as_deref() {
        None if sync != "incremental" => {
            return refused("Bitmap sync mode must be given when providing a bitmap".to_owned());
        }
        Some("always") => BitmapMode::Always,
        Some("never") => BitmapMode::Never,
        _ => BitmapMode::OnSuccess,
    };
    if copied == BackupSync::None {
        return refused("sync mode 'none' does not produce meaningful bitmap outputs".to_owned());
    }
    if mode == BitmapMode::Never && copied != BackupSync::Bitmap {
        return refused(format!(
            "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{sync}'"
        ));
    }
    let bitmap = BackupBitmap { name, mode };
    bitmap.check(plan, source)?;
    Ok((copied, Some(bitmap)))
}

//! blockdev-mirror and block-job-change.

use underlay_jobs::{MirrorArgs, SyncMode};

use super::arguments::Arguments;
use super::{job, lookup};
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// blockdev-mirror
pub async fn blockdev_mirror(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let plan = daemon.graph.plan();
    let source = lookup::either(&plan, &arguments.text("device"))?;
    let target = lookup::either(&plan, &arguments.text("target"))?;
    let sync = match arguments.text("sync").as_str() {
        "full" => SyncMode::Full,
        "top" => SyncMode::Top,
        "none" => SyncMode::None,
        other => return Err(CommandError::new(format!("Sync mode '{other}' not supported"))),
    };
    let replaces = match arguments.optional_text("replaces") {
        Some(name) => Some(
            plan.find(&name)
                .ok_or_else(|| CommandError::new(format!("Failed to find node with node-name='{name}'")))?,
        ),
        None => None,
    };
    let args = MirrorArgs {
        settings: job::settings(arguments),
        source,
        target,
        replaces,
        sync,
        granularity: optional_number(arguments, "granularity").map(|n| u32::try_from(n).unwrap_or(u32::MAX)),
        buf_size: optional_number(arguments, "buf-size"),
        write_blocking: arguments.optional_text("copy-mode").as_deref() == Some("write-blocking"),
        target_is_zero: arguments.flag("target-is-zero", false),
        filter_node_name: arguments.optional_text("filter-node-name"),
    };
    drop(plan);
    job::start(daemon, daemon.jobs.mirror(&daemon.graph, args).await?);
    Ok(())
}

fn optional_number(arguments: &mut Arguments, name: &str) -> Option<i64> {
    arguments.has(name).then(|| arguments.number(name, 0))
}

/// block-job-change. QEMU takes any other `type` as asking a mirror for the copy mode `background`.
pub fn change(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let job = daemon.jobs.block_job(&arguments.text("id"))?;
    Ok(job.change_copy_mode(arguments.optional_text("copy-mode").as_deref() == Some("write-blocking"))?)
}

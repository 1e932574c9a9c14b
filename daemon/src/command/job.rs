//! Jobs: block-stream, block-commit, the verbs of both families, and their queries.

use std::sync::Arc;

use underlay_drivers::filename;
use underlay_graph::{NodeId, Plan, View};
use underlay_jobs::{
    CommitArgs, JobError, JobInfo, OnError, Settings, Started, Status, StreamArgs, StreamEnd,
};
use underlay_qmp::json::{Object, Value};

use super::arguments::Arguments;
use super::lookup::Names;
use super::snapshot;
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// block-stream
pub async fn stream(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let plan = daemon.graph.plan();
    let device = arguments.text("device");
    let names = ["base", "base-node", "bottom"].map(|name| arguments.optional_text(name));
    for (a, b) in [(0, 1), (0, 2), (2, 1)] {
        let spelled = ["base", "base-node", "bottom"];
        if names[a].is_some() && names[b].is_some() {
            let (a, b) = (spelled[a], spelled[b]);
            return Err(CommandError::new(format!("'{a}' and '{b}' cannot be specified at the same time")));
        }
    }
    let names_of = Names::of(daemon);
    let top = names_of.either(&plan, &device)?;
    names_of.free(&plan, top, &device)?;
    let settings = settings(arguments, names_of.job_id(&plan, &device, top));
    let [base, base_node, bottom] = names;
    let end = if let Some(base) = base {
        let found = filename::find_in_chain(&daemon.graph.wires(), top, &base);
        let missing = || CommandError::new(format!("Can't find '{base}' in the backing chain"));
        StreamEnd::Above(found.ok_or_else(missing)?)
    } else if let Some(base) = base_node {
        StreamEnd::Above(find_node(&plan, &base)?)
    } else if let Some(bottom) = bottom {
        StreamEnd::Bottom(find_node(&plan, &bottom)?)
    } else {
        StreamEnd::Whole
    };
    drop(plan);
    let args = StreamArgs {
        settings,
        top,
        end,
        backing_file: arguments.optional_text("backing-file"),
        backing_mask_protocol: arguments.flag("backing-mask-protocol", false),
        filter_node_name: arguments.optional_text("filter-node-name"),
        names: Arc::new(name_in_header),
    };
    start(daemon, daemon.jobs.stream(&daemon.graph, args).await?);
    Ok(())
}

/// block-commit
pub async fn commit(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let plan = daemon.graph.plan();
    let device = arguments.text("device");
    let names = Names::of(daemon);
    let root = names.root(&plan, &device)?;
    let settings = settings(arguments, names.job_id(&plan, &device, root));
    underlay_jobs::commit::check_root(&plan, root)?;
    let mut ends = [None, None];
    for (end, name) in ends.iter_mut().zip(["top", "base"]) {
        let node_key = format!("{name}-node");
        let (node, file) = (arguments.optional_text(&node_key), arguments.optional_text(name));
        *end = match (node, file) {
            (Some(_), Some(_)) => {
                return Err(CommandError::new(format!("'{node_key}' and '{name}' are mutually exclusive")));
            }
            (Some(node), None) => {
                let id = find_node(&plan, &node)?;
                if !plan.chain_with_filters(root).any(|at| at == id) {
                    return Err(CommandError::new(format!("'{node}' is not in this backing file chain")));
                }
                Some(id)
            }
            (None, Some(file)) => {
                Some(filename::find_in_chain(&daemon.graph.wires(), root, &file).ok_or_else(|| {
                    CommandError::new(match name {
                        "top" => format!("Top image file {file} not found"),
                        _ => format!("Can't find '{file}' in the backing chain"),
                    })
                })?)
            }
            (None, None) => None,
        };
    }
    drop(plan);
    let args = CommitArgs {
        settings,
        device: root,
        top: ends[0],
        base: ends[1],
        backing_file: arguments.optional_text("backing-file"),
        backing_mask_protocol: arguments.flag("backing-mask-protocol", false),
        filter_node_name: arguments.optional_text("filter-node-name"),
        names: Arc::new(name_in_header),
    };
    start(daemon, daemon.jobs.commit(&daemon.graph, args).await?);
    Ok(())
}

/// Gives a new job its thread.
pub fn start(daemon: &Daemon, started: Started) {
    daemon.job_thread().spawn_background(started.task);
}

/// What the commands that start a job say about it. `default_id` is that of its device.
pub fn settings(arguments: &mut Arguments, default_id: String) -> Settings {
    let mut policy = |name| {
        arguments.optional_text(name).map(|policy| match policy.as_str() {
            "ignore" => OnError::Ignore,
            "enospc" | "auto" => OnError::Enospc,
            "stop" => OnError::Stop,
            _ => OnError::Report,
        })
    };
    let on_error = policy("on-error").or(policy("on-source-error")).unwrap_or_default();
    let on_target_error = policy("on-target-error");
    Settings {
        // Nodes have no name as a device: the same complaint as for an empty name.
        id: Some(arguments.optional_text("job-id").unwrap_or(default_id)),
        default_id: String::new(),
        speed: arguments.number("speed", 0),
        auto_finalize: arguments.flag("auto-finalize", true),
        auto_dismiss: arguments.flag("auto-dismiss", true),
        on_error,
        on_target_error,
    }
}

fn find_node(plan: &Plan, name: &str) -> CommandResult<NodeId> {
    plan.find(name).ok_or_else(|| CommandError::new(format!("Cannot find device='' nor node-name='{name}'")))
}

/// How an image must call another in its header.
fn name_in_header(image: &View, below: &View) -> String {
    snapshot::name_from(&filename::of_file(image).unwrap_or_default(), &filename::for_header(below))
}

/// A verb of either family, on one job. `None`: not a verb.
pub async fn verb(daemon: &Daemon, command: &str, arguments: &mut Arguments) -> Option<CommandResult<()>> {
    let id = arguments.optional_text("device").or(arguments.optional_text("id")).unwrap_or_default();
    let (job, verb) = match command.strip_prefix("block-job-") {
        Some(verb) => (daemon.jobs.block_job(&id), verb),
        None => (daemon.jobs.job(&id), command.strip_prefix("job-")?),
    };
    let job = match job {
        Ok(job) => job,
        Err(error) => return Some(Err(error.into())),
    };
    let done: Result<(), JobError> = match (command, verb) {
        (_, "pause") => job.pause(),
        (_, "resume") => job.resume(),
        (_, "set-speed") => job.set_speed(arguments.number("speed", 0)),
        ("block-job-cancel", _) => job.block_cancel(arguments.flag("force", false)),
        (_, "cancel") => job.cancel(),
        (_, "complete") => job.complete(),
        (_, "finalize") => job.finalize().await,
        (_, "dismiss") => daemon.jobs.dismiss(&job).await,
        _ => return None,
    };
    if done.is_ok() && verb == "cancel" {
        job.after_cancel().await;
    }
    Some(done.map_err(CommandError::from))
}

/// query-jobs
pub fn query_jobs(daemon: &Daemon) -> Value {
    let describe = |job: JobInfo| {
        let mut object = Object::new()
            .with("id", job.id)
            .with("type", job.kind.as_str())
            .with("status", job.status.as_str())
            .with("current-progress", job.current)
            .with("total-progress", job.total);
        if let Some(error) = job.error {
            object.insert("error", error);
        }
        Value::Object(object)
    };
    Value::List(daemon.jobs.query().into_iter().map(describe).collect())
}

/// query-block-jobs
pub fn query_block_jobs(daemon: &Daemon) -> Value {
    let describe = |job: JobInfo| {
        let mut object = Object::new()
            .with("type", job.kind.as_str())
            .with("device", job.id)
            .with("len", job.total)
            .with("offset", job.current)
            .with("busy", job.busy)
            .with("paused", job.paused)
            .with("speed", job.speed)
            .with("io-status", job.io_status.as_str())
            .with("ready", matches!(job.status, Status::Ready | Status::Standby) || job.ready)
            .with("status", job.status.as_str())
            .with("auto-finalize", job.auto_finalize)
            .with("auto-dismiss", job.auto_dismiss);
        if let Some(error) = job.error {
            object.insert("error", error);
        }
        if let Some(synced) = job.actively_synced {
            object.insert("actively-synced", synced);
        }
        Value::Object(object)
    };
    let block_jobs = daemon.jobs.query().into_iter().filter(|job| job.kind.is_block_job());
    Value::List(block_jobs.map(describe).collect())
}

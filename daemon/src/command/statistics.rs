//! Statistics: query-blockstats, block-latency-histogram-set.

use underlay_graph::{NodeId, Plan, Role};
use underlay_qmp::json::{Object, Value};

use super::arguments::Arguments;
use super::query::{filtered, plan_chain, shown_backends};
use crate::device::latency::Histogram;
use crate::device::stats::HISTOGRAMS;
use crate::device::{Backend, plug};
use crate::error::{CommandError, CommandResult};
use crate::machine::Machine;
use crate::state::Daemon;

/// query-blockstats: per node when asked for, else per backend.
pub fn blockstats(daemon: &Daemon, query_nodes: bool) -> Value {
    let plan = daemon.graph.plan();
    if query_nodes {
        return Value::List(plan.nodes().map(|(id, _)| node_stats(&plan, id, 0)).collect());
    }
    Value::List(shown_backends(daemon).iter().map(|backend| backend_stats(&plan, backend)).collect())
}

fn backend_stats(plan: &Plan, backend: &Backend) -> Value {
    let disk = backend.disk(plan);
    let below = disk.map_or(Value::Null, |disk| node_stats_with_backing(plan, disk));
    let mut object = if let Value::Object(object) = below { object } else { Object::new() };
    let mut stats = device_stats(disk.map_or(0, |disk| plan.node(disk).highest_write()));
    backend.io.stats().describe(&mut stats);
    object.insert("device", &*backend.name);
    object.insert("stats", Value::Object(stats));
    if let Some(shown) = &backend.device {
        object.insert("qdev", &*shown.qdev);
    }
    Value::Object(object)
}

/// Statistics of an image with those of the images below it. Built from the bottom up: chains may be long.
fn node_stats_with_backing(plan: &Plan, id: NodeId) -> Value {
    let mut below = None;
    for id in plan_chain(plan, id).into_iter().take(MAX_STATS_DEPTH as usize).rev() {
        let mut stats = node_stats(plan, id, 0);
        if let (Value::Object(object), Some(below)) = (&mut stats, below.take()) {
            object.insert("backing", below);
        }
        below = Some(stats);
    }
    below.unwrap_or(Value::Null)
}

/// How deep the statistics of what is below are nested.
const MAX_STATS_DEPTH: u32 = 1000;

fn node_stats(plan: &Plan, id: NodeId, depth: u32) -> Value {
    let node = plan.node(id);
    let mut object = Object::new();
    object.insert("node-name", node.name.as_str());
    object.insert("stats", Value::Object(device_stats(node.highest_write())));
    let counts = node.node.counts();
    if !counts.is_empty() {
        let driver = Object::new().with("driver", node.node.driver());
        let specific = counts.into_iter().fold(driver, |object, (name, count)| object.with(name, count));
        object.insert("driver-specific", specific);
    }
    let below = node.child(Role::File).or_else(|| filtered(plan, id));
    if let Some(file) = below.filter(|_| depth < MAX_STATS_DEPTH) {
        object.insert("parent", node_stats(plan, file, depth + 1));
    }
    Value::Object(object)
}

/// The counters that QEMU keeps for devices; nodes have them too, and all but one stay at zero there.
fn device_stats(highest_write: u64) -> Object {
    let mut object = Object::new();
    for kind in ["rd", "wr", "flush", "unmap", "zone_append"] {
        let plural = if kind == "zone_append" { "zone_append" } else { kind };
        object.insert(&format!("{plural}_operations"), Value::Int(0));
        object.insert(&format!("{plural}_total_time_ns"), Value::Int(0));
        object.insert(&format!("failed_{plural}_operations"), Value::Int(0));
        object.insert(&format!("invalid_{plural}_operations"), Value::Int(0));
        if kind != "flush" {
            object.insert(&format!("{plural}_bytes"), Value::Int(0));
            object.insert(&format!("{plural}_merged"), Value::Int(0));
        }
    }
    object.insert("wr_highest_offset", highest_write);
    object.insert("account_invalid", Value::Bool(false));
    object.insert("account_failed", Value::Bool(false));
    object.insert("timed_stats", Value::List(Vec::new()));
    object
}

/// block-latency-histogram-set: as far as the first boundaries that cannot be.
pub fn set_histograms(machine: &Machine, arguments: &mut Arguments) -> CommandResult<()> {
    let id = arguments.text("id");
    let backend = machine.devices.at(&id);
    let backend = backend.map_err(|()| CommandError::new("Device does not have a block device backend"))?;
    let backend = backend.ok_or_else(|| plug::not_found(&id))?;
    let stats = backend.io.stats();
    let of_all = arguments.numbers("boundaries");
    let own = ["boundaries-read", "boundaries-write", "boundaries-zap", "boundaries-flush"];
    let wanted = own.map(|name| arguments.numbers(name).or_else(|| of_all.clone()));
    if wanted.iter().all(Option::is_none) {
        (0..HISTOGRAMS.len()).for_each(|which| stats.set_histogram(which, None));
        return Ok(());
    }
    for (which, boundaries) in wanted.into_iter().enumerate() {
        let Some(boundaries) = boundaries else { continue };
        let what = HISTOGRAMS[which].1;
        let wrong = || CommandError::new(format!("Device '{id}' set {what} boundaries fail"));
        stats.set_histogram(which, Some(Histogram::new(boundaries).ok_or_else(wrong)?));
    }
    Ok(())
}

//! What the human monitor shows of the answers to QMP's queries. The words and their places are QEMU's.

use std::fmt::Write;

use underlay_graph::info::SnapshotInfo;
use underlay_img::sizes::human;
use underlay_img::snapshot_lines;
use underlay_qmp::json::{Object, Value};

fn text<'a>(object: &'a Object, name: &str) -> &'a str {
    object.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn number(object: &Object, name: &str) -> i64 {
    match object.get(name) {
        Some(Value::Int(number)) => *number,
        Some(Value::UInt(number)) => number.cast_signed(),
        _ => 0,
    }
}

fn flag(object: &Object, name: &str) -> bool {
    object.get(name) == Some(&Value::Bool(true))
}

fn inner<'a>(object: &'a Object, name: &str) -> Option<&'a Object> {
    object.get(name).and_then(Value::as_object)
}

/// The objects in a list.
pub fn objects(list: &Value) -> Vec<&Object> {
    match list {
        Value::List(values) => values.iter().filter_map(Value::as_object).collect(),
        _ => Vec::new(),
    }
}

/// `info block`: devices (query-block), or nodes (query-named-block-nodes) when they are asked for or `wanted` is no
/// device.
pub fn block(devices: &Value, named: &Value, wanted: Option<&str>, is_nodes: bool, details: bool) -> String {
    let mut out = String::new();
    if !is_nodes {
        for (at, device) in objects(devices).into_iter().enumerate() {
            if wanted.is_some_and(|wanted| wanted != text(device, "device")) {
                continue;
            }
            if at > 0 {
                out.push('\n');
            }
            one_block(&mut out, Some(device), inner(device, "inserted"), details);
            if wanted.is_some() {
                return out;
            }
        }
        if wanted.is_none() {
            return out;
        }
    }
    for (at, node) in objects(named).into_iter().enumerate() {
        if wanted.is_some_and(|wanted| wanted != text(node, "node-name")) {
            continue;
        }
        if at > 0 {
            out.push('\n');
        }
        one_block(&mut out, None, Some(node), details);
    }
    out
}

/// Adds a line.
macro_rules! add {
    ($out:expr, $($text:tt)*) => {{
        // Writing to a string cannot fail.
        let _ = writeln!($out, $($text)*);
    }};
}

fn one_block(out: &mut String, device: Option<&Object>, inserted: Option<&Object>, details: bool) {
    let node = inserted.map(|inserted| text(inserted, "node-name")).unwrap_or_default();
    match device {
        Some(device) if !text(device, "device").is_empty() => {
            out.push_str(text(device, "device"));
            if !node.is_empty() {
                let _ = write!(out, " ({node})");
            }
        }
        // A device whose disk is a node of the user's has no name beside the node's.
        Some(device) if node.is_empty() => out.push_str(text(device, "qdev")),
        _ => out.push_str(node),
    }
    match inserted {
        Some(inserted) => {
            let encrypted = if flag(inserted, "encrypted") { ", encrypted" } else { "" };
            let read_only = if flag(inserted, "ro") { ", read-only" } else { "" };
            let (file, driver) = (text(inserted, "file"), text(inserted, "drv"));
            add!(out, ": {file} ({driver}{read_only}{encrypted})");
        }
        None => out.push_str(": [not inserted]\n"),
    }
    if let Some(device) = device {
        of_device(out, device);
    }
    if let Some(inserted) = inserted {
        of_medium(out, inserted);
        if details {
            out.push_str("\nImages:\n");
            let mut next = inner(inserted, "image");
            while let Some(image) = next {
                one_image(out, image);
                next = inner(image, "backing-image");
            }
        }
    }
}

fn of_device(out: &mut String, device: &Object) {
    if let Some(path) = device.get("qdev").and_then(Value::as_str) {
        add!(out, "    Attached to:      {path}");
    }
    let status = text(device, "io-status");
    if !status.is_empty() && status != "ok" {
        add!(out, "    I/O status:       {status}");
    }
    if flag(device, "removable") {
        let locked = if flag(device, "locked") { "" } else { "not " };
        let tray = if flag(device, "tray_open") { "open" } else { "closed" };
        add!(out, "    Removable device: {locked}locked, tray {tray}");
    }
}

fn of_medium(out: &mut String, inserted: &Object) {
    let cache = inner(inserted, "cache");
    let has = |name| cache.is_some_and(|cache| flag(cache, name));
    let mode = if has("writeback") { "writeback" } else { "writethrough" };
    let direct = if has("direct") { ", direct" } else { "" };
    let no_flush = if has("no-flush") { ", ignore flushes" } else { "" };
    add!(out, "    Cache mode:       {mode}{direct}{no_flush}");
    if let Some(backing) = inserted.get("backing_file").and_then(Value::as_str) {
        let depth = number(inserted, "backing_file_depth");
        add!(out, "    Backing file:     {backing} (chain depth: {depth})");
    }
    let zeroes = text(inserted, "detect_zeroes");
    if !zeroes.is_empty() && zeroes != "off" {
        add!(out, "    Detect zeroes:    {zeroes}");
    }
    let limits = ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"];
    if limits.iter().any(|limit| number(inserted, limit) != 0) {
        let names = [
            "bps",
            "bps_rd",
            "bps_wr",
            "bps_max",
            "bps_rd_max",
            "bps_wr_max",
            "iops",
            "iops_rd",
            "iops_wr",
            "iops_max",
            "iops_rd_max",
            "iops_wr_max",
            "iops_size",
        ];
        let values: Vec<String> =
            names.iter().map(|name| format!("{name}={}", number(inserted, name))).collect();
        add!(out, "    I/O throttling:   {} group={}", values.join(" "), text(inserted, "group"));
    }
}

/// ImageInfo, without what is below it.
fn one_image(out: &mut String, image: &Object) {
    let size = |name| u64::try_from(number(image, name)).unwrap_or(0);
    add!(out, "image: {}", text(image, "filename"));
    add!(out, "file format: {}", text(image, "format"));
    let virtual_size = size("virtual-size");
    add!(out, "virtual size: {} ({virtual_size} bytes)", human(virtual_size));
    match image.get("actual-size") {
        Some(_) => add!(out, "disk size: {}", human(size("actual-size"))),
        None => add!(out, "disk size: unavailable"),
    }
    if flag(image, "encrypted") {
        add!(out, "encrypted: yes");
    }
    if image.get("cluster-size").is_some() {
        add!(out, "cluster_size: {}", size("cluster-size"));
    }
    if flag(image, "dirty-flag") {
        add!(out, "cleanly shut down: no");
    }
    if let Some(name) = image.get("backing-filename").and_then(Value::as_str) {
        let full = text(image, "full-backing-filename");
        match full.is_empty() || full == name {
            true => add!(out, "backing file: {name}"),
            false => add!(out, "backing file: {name} (actual path: {full})"),
        }
        if let Some(format) = image.get("backing-filename-format").and_then(Value::as_str) {
            add!(out, "backing file format: {format}");
        }
    }
    let snapshots: Vec<SnapshotInfo> =
        image.get("snapshots").map(objects).unwrap_or_default().into_iter().map(snapshot).collect();
    if !snapshots.is_empty() {
        add!(out, "Snapshot list:");
        snapshot_lines(&snapshots).iter().for_each(|line| add!(out, "{line}"));
    }
    let specific = inner(image, "format-specific").and_then(|specific| inner(specific, "data"));
    if let Some(specific) = specific.filter(|specific| specific.iter().next().is_some()) {
        add!(out, "Format specific information:");
        fields(out, specific, 1);
    }
}

fn fields(out: &mut String, object: &Object, depth: usize) {
    for (name, value) in object.iter_printed() {
        field(out, &name.replace('-', " "), value, depth);
    }
}

fn field(out: &mut String, name: &str, value: &Value, depth: usize) {
    let indent = " ".repeat(depth * 4);
    match value {
        Value::Object(inner) => {
            add!(out, "{indent}{name}:");
            fields(out, inner, depth + 1);
        }
        Value::List(values) => {
            add!(out, "{indent}{name}:");
            for (at, value) in values.iter().enumerate() {
                field(out, &format!("[{at}]"), value, depth + 1);
            }
        }
        Value::Str(text) => add!(out, "{indent}{name}: {text}"),
        other => add!(out, "{indent}{name}: {other}"),
    }
}

/// SnapshotInfo
pub fn snapshot(object: &Object) -> SnapshotInfo {
    let small = |name| u32::try_from(number(object, name)).unwrap_or(0);
    let large = |name| number(object, name).cast_unsigned();
    SnapshotInfo {
        id: text(object, "id").to_owned(),
        name: text(object, "name").to_owned(),
        vm_state_size: large("vm-state-size"),
        seconds: small("date-sec"),
        nanoseconds: small("date-nsec"),
        clock: large("vm-clock-sec").wrapping_mul(1_000_000_000).wrapping_add(large("vm-clock-nsec")),
        icount: object.get("icount").map(|_| large("icount")),
    }
}

/// `info blockstats`, from query-blockstats.
pub fn blockstats(answer: &Value) -> String {
    let mut out = String::new();
    for one in objects(answer) {
        let (Some(device), Some(stats)) = (one.get("device").and_then(Value::as_str), inner(one, "stats"))
        else {
            continue;
        };
        out.push_str(device);
        out.push(':');
        let names = [
            ("rd_bytes", "rd_bytes"),
            ("wr_bytes", "wr_bytes"),
            ("rd_operations", "rd_operations"),
            ("wr_operations", "wr_operations"),
            ("flush_operations", "flush_operations"),
            ("wr_total_time_ns", "wr_total_time_ns"),
            ("rd_total_time_ns", "rd_total_time_ns"),
            ("flush_total_time_ns", "flush_total_time_ns"),
            ("rd_merged", "rd_merged"),
            ("wr_merged", "wr_merged"),
            ("idle_time_ns", "idle_time_ns"),
        ];
        for (shown, name) in names {
            let _ = write!(out, " {shown}={}", number(stats, name));
        }
        out.push('\n');
    }
    out
}

/// `info block-jobs`, from query-block-jobs.
pub fn block_jobs(answer: &Value) -> String {
    let mut out = String::new();
    for job in objects(answer) {
        let (kind, device) = (text(job, "type"), text(job, "device"));
        let what = match kind {
            "stream" => format!("Streaming device {device}"),
            _ => format!("Type {kind}, device {device}"),
        };
        let (offset, len, speed) = (number(job, "offset"), number(job, "len"), number(job, "speed"));
        add!(out, "{what}: Completed {offset} of {len} bytes, speed limit {speed} bytes/s");
    }
    if out.is_empty() { "No active jobs\n".to_owned() } else { out }
}

/// `info status`, from query-status.
pub fn status(answer: &Value) -> String {
    let Some(answer) = answer.as_object() else { return String::new() };
    let (running, status) = (flag(answer, "running"), text(answer, "status"));
    let mut out = format!("VM status: {}", if running { "running" } else { "paused" });
    if !running && status != "paused" {
        let _ = write!(out, " ({status})");
    }
    out + "\n"
}

/// `info version`, from query-version.
pub fn version(answer: &Value) -> String {
    let Some(answer) = answer.as_object() else { return String::new() };
    let part = |name| inner(answer, "qemu").map_or(0, |qemu| number(qemu, name));
    format!("{}.{}.{}{}\n", part("major"), part("minor"), part("micro"), text(answer, "package"))
}

/// `info snapshots`: what of the disks of query-block can be written to has which snapshots: those that all have, by
/// their names, and the others.
pub fn snapshots(devices: &Value) -> String {
    let of = |device: &Object| {
        let inserted = inner(device, "inserted").filter(|inserted| !flag(inserted, "ro"))?;
        let found = inner(inserted, "image")?.get("snapshots").map(objects).unwrap_or_default();
        Some((text(device, "device").to_owned(), found.into_iter().map(snapshot).collect::<Vec<_>>()))
    };
    let disks: Vec<(String, Vec<SnapshotInfo>)> = objects(devices).into_iter().filter_map(of).collect();
    let everywhere =
        |one: &SnapshotInfo| disks.iter().all(|(_, found)| found.iter().any(|other| other.name == one.name));
    if disks.iter().all(|(_, found)| found.is_empty()) {
        return "There is no snapshot available.\n".to_owned();
    }
    let mut out = "List of snapshots present on all disks:\n".to_owned();
    let first = disks.iter().map(|(_, found)| found).find(|found| !found.is_empty());
    let all = first.into_iter().flatten().filter(|one| everywhere(one)).cloned();
    // Each disk has another id for it.
    let all: Vec<_> = all.map(|one| SnapshotInfo { id: "--".to_owned(), ..one }).collect();
    match all.is_empty() {
        true => out.push_str("None\n"),
        false => snapshot_lines(&all).iter().for_each(|line| add!(out, "{line}")),
    }
    for (device, found) in &disks {
        let partial: Vec<_> = found.iter().filter(|one| !everywhere(one)).cloned().collect();
        if !partial.is_empty() {
            add!(out, "\nList of partial (non-loadable) snapshots on '{device}':");
            snapshot_lines(&partial).iter().for_each(|line| add!(out, "{line}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of query-block with snapshots of these names.
    fn disk(device: &str, read_only: bool, names: &[&str]) -> Value {
        let one =
            |(id, name): (usize, &&str)| Object::new().with("id", id.to_string()).with("name", *name).into();
        let found: Vec<Value> = names.iter().enumerate().map(one).collect();
        let image = Object::new().with("snapshots", Value::List(found));
        let inserted = Object::new().with("ro", read_only).with("image", image);
        Object::new().with("device", device).with("inserted", inserted).into()
    }

    /// The names in `info snapshots`, with where they are said to be.
    fn told(disks: Vec<Value>) -> Vec<String> {
        let text = snapshots(&Value::List(disks));
        let word = |line: &str, at| line.split_whitespace().nth(at).unwrap_or_default().to_owned();
        let mut place = String::new();
        let mut names = Vec::new();
        for line in text.lines() {
            match line.split_whitespace().next() {
                Some("List") => place = line.rsplit(' ').next().unwrap_or_default().to_owned(),
                None | Some("ID") => {}
                Some(first) => names.push(format!("{place} {first} {}", word(line, 1))),
            }
        }
        names
    }

    #[test]
    fn snapshots_of_all_disks_are_told_apart_from_those_of_some() {
        let both = vec![disk("a", false, &["x", "y"]), disk("b", false, &["y"])];
        assert_eq!(told(both), ["disks: -- y", "'a': 0 x"]);
        let none = vec![disk("a", false, &["x"]), disk("b", false, &[])];
        assert_eq!(told(none), ["disks: None ", "'a': 0 x"]);
        let read_only = vec![disk("a", false, &["x"]), disk("b", true, &[])];
        assert_eq!(told(read_only), ["disks: -- x"]);
        let nothing = Value::List(vec![disk("a", false, &[])]);
        assert_eq!(snapshots(&nothing), "There is no snapshot available.\n");
    }
}

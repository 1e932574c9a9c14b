//! What the graph looks like: query-named-block-nodes, query-block, x-debug-query-block-graph.
//!
//! Queries read the plan in force and never wait for a change of it.

use std::collections::HashMap;

use underlay_drivers::filename;
use underlay_drivers::names::resolve_backing;
use underlay_graph::bitmaps::PlanBitmap;
use underlay_graph::info::{cluster_size, dirty_flag};
use underlay_graph::plan::{DetectZeroes, Wires};
use underlay_graph::{FormatInfo, InfoValue, Kind, NodeId, Perms, Plan, Role, RootId, perm};
use underlay_qmp::json::{Object, Value};

use super::machine::describe_limits;
use crate::device::Backend;
use crate::state::Daemon;

/// Lengths are shown in whole sectors of this many bytes, rounded up.
const SECTOR: u64 = 512;

fn int(value: u64) -> Value {
    i64::try_from(value).map_or(Value::UInt(value), Value::Int)
}

fn text(value: impl Into<String>) -> Value {
    Value::Str(value.into())
}

/// query-named-block-nodes. `flat` leaves out the images below each image.
pub fn named_block_nodes(daemon: &Daemon, flat: bool) -> Value {
    let wires = daemon.graph.wires();
    Value::List(wires.plan().nodes().rev().map(|(id, _)| block_device_info(&wires, id, flat)).collect())
}

/// BlockDeviceInfo
fn block_device_info(wires: &Wires, id: NodeId, flat: bool) -> Value {
    let node = wires.plan().node(id);
    let view = wires.view(id);
    let info = node.node.image_info();
    let mut cache = Object::new();
    cache.insert("writeback", Value::Bool(true));
    cache.insert("direct", Value::Bool(node.options.cache_direct));
    cache.insert("no-flush", Value::Bool(node.options.cache_no_flush));
    let detect = match node.options.detect_zeroes {
        DetectZeroes::Off => "off",
        DetectZeroes::On => "on",
        DetectZeroes::Unmap => "unmap",
    };
    let mut object = Object::new();
    object.insert("file", text(filename::of(&view)));
    object.insert("node-name", text(node.name.as_str()));
    object.insert("ro", Value::Bool(node.read_only));
    object.insert("drv", text(node.node.driver()));
    object.insert("encrypted", Value::Bool(info.encrypted));
    object.insert("detect_zeroes", text(detect));
    object.insert("active", Value::Bool(true));
    // In front of `write_threshold`, with which it shares a bucket when printed.
    if let Some(backing) = view.child(Role::Backing).filter(|_| node.node.kind() != Kind::Filter) {
        object.insert("backing_file", text(filename::of(backing)));
    }
    for limit in ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"] {
        object.insert(limit, Value::Int(0));
    }
    // The reference shows it with a sign.
    object.insert("write_threshold", Value::Int(node.write_threshold().cast_signed()));
    object.insert("cache", Value::Object(cache));
    if !node.bitmaps.is_empty() {
        let bitmaps = node.bitmaps.iter().rev().map(dirty_bitmap).collect();
        object.insert("dirty-bitmaps", Value::List(bitmaps));
    }
    let depth = if flat { 0 } else { plan_chain(wires.plan(), id).len() - 1 };
    object.insert("backing_file_depth", int(depth as u64));
    object.insert("image", image_info(wires, id, flat));
    Value::Object(object)
}

/// BlockDirtyInfo
fn dirty_bitmap(bitmap: &PlanBitmap) -> Value {
    let mut object = Object::new()
        .with("name", &*bitmap.name)
        .with("recording", bitmap.enabled)
        .with("persistent", bitmap.persistent)
        .with("busy", bitmap.busy);
    if bitmap.inconsistent {
        object.insert("inconsistent", Value::Bool(true));
    }
    object.insert("granularity", int(bitmap.bits.granularity()));
    object.insert("count", int(bitmap.bits.count_whole()));
    Value::Object(object)
}

/// ImageInfo, with the images below nested in it unless `flat`. Built from the bottom up: chains may be long.
fn image_info(wires: &Wires, id: NodeId, flat: bool) -> Value {
    let plan = wires.plan();
    let chain: Vec<_> = if flat { vec![id] } else { plan_chain(plan, id) };
    let mut below = None;
    for id in chain.into_iter().rev() {
        let mut object = one_image(wires, id);
        if let Some(below) = below.take() {
            object.insert("backing-image", below);
        }
        below = Some(Value::Object(object));
    }
    below.unwrap_or(Value::Null)
}

/// What a filter filters.
pub fn filtered(plan: &Plan, id: NodeId) -> Option<NodeId> {
    let node = plan.node(id);
    let child = || node.child(Role::File).or(node.child(Role::Backing));
    (node.node.kind() == Kind::Filter).then(child).flatten()
}

/// The node itself and the images below it, and the filters between them that somebody knows of.
pub fn plan_chain(plan: &Plan, id: NodeId) -> Vec<NodeId> {
    let below = |id| filtered(plan, id).or(plan.node(id).child(Role::Backing));
    let known = |id: &NodeId| !plan.node(*id).implicit;
    std::iter::once(id).chain(std::iter::successors(below(id), |id| below(*id)).filter(known)).collect()
}

fn one_image(wires: &Wires, id: NodeId) -> Object {
    let view = wires.view(id);
    let node = view.node();
    let info = node.image_info();
    let mut object = Object::new();
    object.insert("filename", text(filename::of(&view)));
    object.insert("format", text(node.driver()));
    if !info.snapshots.is_empty() {
        let snapshots = info.snapshots.iter().map(underlay_drivers::info::snapshot).collect();
        object.insert("snapshots", Value::List(snapshots));
    }
    object.insert("virtual-size", int(view.cx().length().div_ceil(SECTOR).saturating_mul(SECTOR)));
    if let Some(size) = allocated_size(wires, id) {
        object.insert("actual-size", int(size));
    }
    if let Some(dirty) = dirty_flag(&view) {
        object.insert("dirty-flag", Value::Bool(dirty));
    }
    if let Some(size) = cluster_size(&view) {
        object.insert("cluster-size", int(size));
    }
    if info.encrypted {
        object.insert("encrypted", Value::Bool(true));
    }
    if let Some(backing) = node.backing_ref() {
        let own = filename::of_file(&view).unwrap_or_default();
        object.insert("full-backing-filename", text(resolve_backing(&own, &backing.file)));
        object.insert("backing-filename", text(backing.file));
        if let Some(format) = backing.format {
            object.insert("backing-filename-format", text(format));
        }
    }
    if let Some(specific) = info.format_specific {
        object.insert("format-specific", format_specific(specific));
    }
    object
}

/// Bytes that the image takes up on its medium.
fn allocated_size(wires: &Wires, id: NodeId) -> Option<u64> {
    let mut id = id;
    loop {
        let node = wires.plan().node(id);
        let below = node.child(Role::File).or(node.child(Role::Backing));
        let Some(below) = below else { return node.node.allocated_size() };
        id = below;
    }
}

fn format_specific(info: FormatInfo) -> Value {
    let mut object = Object::new();
    object.insert("type", text(info.kind));
    object.insert("data", fields(info.fields));
    Value::Object(object)
}

fn fields(fields: Vec<(&'static str, InfoValue)>) -> Value {
    let mut object = Object::new();
    for (name, value) in fields {
        object.insert(name, info_value(value));
    }
    Value::Object(object)
}

fn info_value(value: InfoValue) -> Value {
    match value {
        InfoValue::Bool(flag) => Value::Bool(flag),
        InfoValue::Int(number) => Value::Int(number),
        InfoValue::Text(words) => Value::Str(words),
        InfoValue::List(values) => Value::List(values.into_iter().map(info_value).collect()),
        InfoValue::Object(inner) => fields(inner),
    }
}

/// query-block: backends with names, and those that came with a device. A storage daemon has none.
pub fn block(daemon: &Daemon) -> Value {
    let wires = daemon.graph.wires();
    Value::List(shown_backends(daemon).iter().map(|backend| block_info(&wires, backend)).collect())
}

/// The backends that queries tell of.
pub fn shown_backends(daemon: &Daemon) -> Vec<Backend> {
    let backends = daemon.machine.iter().flat_map(|machine| machine.devices.backends());
    backends.filter(|backend| !backend.name.is_empty() || backend.device.is_some()).collect()
}

/// BlockInfo
fn block_info(wires: &Wires, backend: &Backend) -> Value {
    let mut object = Object::new().with("device", &*backend.name);
    if let Some(shown) = &backend.device {
        object.insert("qdev", &*shown.qdev);
        object.insert("io-status", backend.io.status().as_str());
    }
    object.insert("type", "unknown");
    object.insert("removable", backend.is_removable());
    object.insert("locked", false);
    if backend.has_tray() {
        object.insert("tray_open", backend.tray_open);
    }
    if let Some(disk) = backend.disk(wires.plan()) {
        let mut inserted = block_device_info(wires, disk, false);
        if let Value::Object(inserted) = &mut inserted {
            if backend.writethrough
                && let Some(Value::Object(cache)) = inserted.get_mut("cache")
            {
                cache.insert("writeback", false);
            }
            if let Some(group) = backend.io.group() {
                describe_limits(&group.limits(), group.name(), inserted);
            }
        }
        object.insert("inserted", inserted);
    }
    Value::Object(object)
}

/// x-debug-query-block-graph: nodes, roots and the edges between them with their permissions.
pub fn block_graph(daemon: &Daemon) -> Value {
    let plan = daemon.graph.plan();
    let mut graph = BlockGraph::default();
    for (id, root) in plan.roots() {
        let (kind, name) = match root.user.split_once(" job '") {
            Some((_, job)) => ("block-job", job.trim_end_matches('\'')),
            None => ("block-backend", backend_name(&root.user)),
        };
        let from = graph.vertex(Vertex::Root(id), kind, name);
        let to = graph.number(Vertex::Node(root.node));
        graph.edges.push(graph_edge(from, to, root.role, root.required, root.shared));
    }
    for (id, node) in plan.nodes() {
        let from = graph.vertex(Vertex::Node(id), "block-driver", node.name.as_str());
        let access = daemon.graph.access(id);
        // The child that was wired last comes first.
        for (role, child) in node.children.iter().rev() {
            let (required, shared) = perm::for_child(&*node.node, access, *role);
            let to = graph.number(Vertex::Node(*child));
            graph.edges.push(graph_edge(from, to, role.as_str(), required, shared));
        }
    }
    // And the other way round again in print.
    graph.nodes.reverse();
    graph.edges.reverse();
    let mut object = Object::new();
    object.insert("nodes", Value::List(graph.nodes));
    object.insert("edges", Value::List(graph.edges));
    Value::Object(object)
}

/// The name of a backend, from how it is called as a user.
fn backend_name(user: &str) -> &str {
    user.strip_prefix("block device '").map_or("", |name| name.trim_end_matches('\''))
}

/// What is numbered, in the order in which it is met, be it as somebody's child.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Vertex {
    Root(RootId),
    Node(NodeId),
}

#[derive(Default)]
struct BlockGraph {
    numbers: HashMap<Vertex, u64>,
    nodes: Vec<Value>,
    edges: Vec<Value>,
}

impl BlockGraph {
    fn number(&mut self, vertex: Vertex) -> u64 {
        let next = self.numbers.len() as u64 + 1;
        *self.numbers.entry(vertex).or_insert(next)
    }

    fn vertex(&mut self, vertex: Vertex, kind: &str, name: &str) -> u64 {
        let number = self.number(vertex);
        self.nodes.push(graph_node(number, kind, name));
        number
    }
}

fn graph_node(id: u64, kind: &str, name: &str) -> Value {
    let mut object = Object::new();
    object.insert("id", int(id));
    object.insert("type", text(kind));
    object.insert("name", text(name));
    Value::Object(object)
}

fn graph_edge(parent: u64, child: u64, name: &str, required: Perms, shared: Perms) -> Value {
    let perms = |perms: Perms| {
        // In the order in which QEMU lists them.
        let listed = [
            (Perms::RESIZE, "resize"),
            (Perms::WRITE_UNCHANGED, "write-unchanged"),
            (Perms::WRITE, "write"),
            (Perms::CONSISTENT_READ, "consistent-read"),
        ];
        Value::List(
            listed.into_iter().filter(|(perm, _)| perms.has(*perm)).map(|(_, name)| text(name)).collect(),
        )
    };
    let mut object = Object::new();
    object.insert("parent", int(parent));
    object.insert("child", int(child));
    object.insert("name", text(name));
    object.insert("perm", perms(required));
    object.insert("shared-perm", perms(shared));
    Value::Object(object)
}

//! What queries tell of nodes, their images, devices and their statistics, and the graph.

use super::defs::{BLOCKDEV_DRIVER, BLOCKDEV_OPTIONS_DETECT_ZEROES, NOTHING};
use super::ty::{Enum, Object, Type, opt, req};

pub(super) static QUERY_NAMED_BLOCK_NODES_ARG: Object =
    Object { members: &[opt("flat", Type::Bool)], tag: None, cases: &[] };

pub(super) static IMAGE_INFO_SNAPSHOTS: Object = Object {
    members: &[
        req("id", Type::Str),
        req("name", Type::Str),
        req("vm-state-size", Type::Int),
        req("date-sec", Type::Int),
        req("date-nsec", Type::Int),
        req("vm-clock-sec", Type::Int),
        req("vm-clock-nsec", Type::Int),
        opt("icount", Type::Int),
    ],
    tag: None,
    cases: &[],
};

pub(super) static FORMAT_SPECIFIC_TYPE: Enum = Enum { values: &["qcow2", "file"] };

pub(super) static IMAGE_INFO_FORMAT_SPECIFIC: Object = Object {
    members: &[req("type", Type::Enum(&FORMAT_SPECIFIC_TYPE)), req("data", Type::Any)],
    tag: None,
    cases: &[],
};

pub(super) static IMAGE_INFO: Object = Object {
    members: &[
        req("filename", Type::Str),
        req("format", Type::Str),
        opt("dirty-flag", Type::Bool),
        opt("actual-size", Type::Int),
        req("virtual-size", Type::Int),
        opt("cluster-size", Type::Int),
        opt("encrypted", Type::Bool),
        opt("compressed", Type::Bool),
        opt("backing-filename", Type::Str),
        opt("full-backing-filename", Type::Str),
        opt("backing-filename-format", Type::Str),
        opt("snapshots", Type::List(&Type::Object(&IMAGE_INFO_SNAPSHOTS))),
        opt("format-specific", Type::Object(&IMAGE_INFO_FORMAT_SPECIFIC)),
        opt("backing-image", Type::Object(&IMAGE_INFO)),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_DEVICE_INFO_CACHE: Object = Object {
    members: &[req("writeback", Type::Bool), req("direct", Type::Bool), req("no-flush", Type::Bool)],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_DEVICE_INFO_DIRTY_BITMAPS: Object = Object {
    members: &[
        opt("name", Type::Str),
        req("count", Type::Int),
        req("granularity", Type::Int),
        req("recording", Type::Bool),
        req("busy", Type::Bool),
        req("persistent", Type::Bool),
        opt("inconsistent", Type::Bool),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_DEVICE_INFO: Object = Object {
    members: &[
        req("file", Type::Str),
        opt("node-name", Type::Str),
        req("ro", Type::Bool),
        req("drv", Type::Str),
        opt("backing_file", Type::Str),
        req("backing_file_depth", Type::Int),
        req("active", Type::Bool),
        req("encrypted", Type::Bool),
        req("detect_zeroes", Type::Enum(&BLOCKDEV_OPTIONS_DETECT_ZEROES)),
        req("bps", Type::Int),
        req("bps_rd", Type::Int),
        req("bps_wr", Type::Int),
        req("iops", Type::Int),
        req("iops_rd", Type::Int),
        req("iops_wr", Type::Int),
        req("image", Type::Object(&IMAGE_INFO)),
        opt("bps_max", Type::Int),
        opt("bps_rd_max", Type::Int),
        opt("bps_wr_max", Type::Int),
        opt("iops_max", Type::Int),
        opt("iops_rd_max", Type::Int),
        opt("iops_wr_max", Type::Int),
        opt("bps_max_length", Type::Int),
        opt("bps_rd_max_length", Type::Int),
        opt("bps_wr_max_length", Type::Int),
        opt("iops_max_length", Type::Int),
        opt("iops_rd_max_length", Type::Int),
        opt("iops_wr_max_length", Type::Int),
        opt("iops_size", Type::Int),
        opt("group", Type::Str),
        req("cache", Type::Object(&BLOCK_DEVICE_INFO_CACHE)),
        req("write_threshold", Type::Int),
        opt("dirty-bitmaps", Type::List(&Type::Object(&BLOCK_DEVICE_INFO_DIRTY_BITMAPS))),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_INFO_IO_STATUS: Enum = Enum { values: &["ok", "failed", "nospace"] };

pub(super) static BLOCK_INFO: Object = Object {
    members: &[
        req("device", Type::Str),
        opt("qdev", Type::Str),
        req("type", Type::Str),
        req("removable", Type::Bool),
        req("locked", Type::Bool),
        opt("inserted", Type::Object(&BLOCK_DEVICE_INFO)),
        opt("tray_open", Type::Bool),
        opt("io-status", Type::Enum(&BLOCK_INFO_IO_STATUS)),
    ],
    tag: None,
    cases: &[],
};

pub(super) static QUERY_BLOCKSTATS_ARG: Object =
    Object { members: &[opt("query-nodes", Type::Bool)], tag: None, cases: &[] };

pub(super) static BLOCK_SET_WRITE_THRESHOLD_ARG: Object = Object {
    members: &[req("node-name", Type::Str), req("write-threshold", Type::U64)],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_WRITE_THRESHOLD_DATA: Object = Object {
    members: &[
        req("node-name", Type::Str),
        req("amount-exceeded", Type::U64),
        req("write-threshold", Type::U64),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_STATS_STATS_TIMED_STATS: Object = Object {
    members: &[
        req("interval_length", Type::Int),
        req("min_rd_latency_ns", Type::Int),
        req("max_rd_latency_ns", Type::Int),
        req("avg_rd_latency_ns", Type::Int),
        req("min_wr_latency_ns", Type::Int),
        req("max_wr_latency_ns", Type::Int),
        req("avg_wr_latency_ns", Type::Int),
        req("min_zone_append_latency_ns", Type::Int),
        req("max_zone_append_latency_ns", Type::Int),
        req("avg_zone_append_latency_ns", Type::Int),
        req("min_flush_latency_ns", Type::Int),
        req("max_flush_latency_ns", Type::Int),
        req("avg_flush_latency_ns", Type::Int),
        req("avg_rd_queue_depth", Type::Number),
        req("avg_wr_queue_depth", Type::Number),
        req("avg_zone_append_queue_depth", Type::Number),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_STATS_STATS_RD_LATENCY_HISTOGRAM: Object = Object {
    members: &[req("boundaries", Type::List(&Type::Int)), req("bins", Type::List(&Type::Int))],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_STATS_STATS: Object = Object {
    members: &[
        req("rd_bytes", Type::Int),
        req("wr_bytes", Type::Int),
        req("zone_append_bytes", Type::Int),
        req("unmap_bytes", Type::Int),
        req("rd_operations", Type::Int),
        req("wr_operations", Type::Int),
        req("zone_append_operations", Type::Int),
        req("flush_operations", Type::Int),
        req("unmap_operations", Type::Int),
        req("rd_total_time_ns", Type::Int),
        req("wr_total_time_ns", Type::Int),
        req("zone_append_total_time_ns", Type::Int),
        req("flush_total_time_ns", Type::Int),
        req("unmap_total_time_ns", Type::Int),
        req("wr_highest_offset", Type::Int),
        req("rd_merged", Type::Int),
        req("wr_merged", Type::Int),
        req("zone_append_merged", Type::Int),
        req("unmap_merged", Type::Int),
        opt("idle_time_ns", Type::Int),
        req("failed_rd_operations", Type::Int),
        req("failed_wr_operations", Type::Int),
        req("failed_zone_append_operations", Type::Int),
        req("failed_flush_operations", Type::Int),
        req("failed_unmap_operations", Type::Int),
        req("invalid_rd_operations", Type::Int),
        req("invalid_wr_operations", Type::Int),
        req("invalid_zone_append_operations", Type::Int),
        req("invalid_flush_operations", Type::Int),
        req("invalid_unmap_operations", Type::Int),
        req("account_invalid", Type::Bool),
        req("account_failed", Type::Bool),
        req("timed_stats", Type::List(&Type::Object(&BLOCK_STATS_STATS_TIMED_STATS))),
        opt("rd_latency_histogram", Type::Object(&BLOCK_STATS_STATS_RD_LATENCY_HISTOGRAM)),
        opt("wr_latency_histogram", Type::Object(&BLOCK_STATS_STATS_RD_LATENCY_HISTOGRAM)),
        opt("zone_append_latency_histogram", Type::Object(&BLOCK_STATS_STATS_RD_LATENCY_HISTOGRAM)),
        opt("flush_latency_histogram", Type::Object(&BLOCK_STATS_STATS_RD_LATENCY_HISTOGRAM)),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_STATS_DRIVER_SPECIFIC_FILE: Object = Object {
    members: &[
        req("discard-nb-ok", Type::Int),
        req("discard-nb-failed", Type::Int),
        req("discard-bytes-ok", Type::Int),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_STATS_DRIVER_SPECIFIC: Object = Object {
    members: &[req("driver", Type::Enum(&BLOCKDEV_DRIVER))],
    tag: Some("driver"),
    cases: &[
        ("copy-before-write", &NOTHING),
        ("file", &BLOCK_STATS_DRIVER_SPECIFIC_FILE),
        ("host_device", &BLOCK_STATS_DRIVER_SPECIFIC_FILE),
        ("nbd", &NOTHING),
        ("null-aio", &NOTHING),
        ("null-co", &NOTHING),
        ("qcow2", &NOTHING),
        ("raw", &NOTHING),
        ("snapshot-access", &NOTHING),
    ],
};

pub(super) static BLOCK_STATS: Object = Object {
    members: &[
        opt("device", Type::Str),
        opt("qdev", Type::Str),
        opt("node-name", Type::Str),
        req("stats", Type::Object(&BLOCK_STATS_STATS)),
        opt("driver-specific", Type::Object(&BLOCK_STATS_DRIVER_SPECIFIC)),
        opt("parent", Type::Object(&BLOCK_STATS)),
        opt("backing", Type::Object(&BLOCK_STATS)),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_GRAPH_NODES_TYPE: Enum =
    Enum { values: &["block-backend", "block-job", "block-driver"] };

pub(super) static BLOCK_GRAPH_NODES: Object = Object {
    members: &[
        req("id", Type::Int),
        req("type", Type::Enum(&BLOCK_GRAPH_NODES_TYPE)),
        req("name", Type::Str),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_GRAPH_EDGES_PERM: Enum =
    Enum { values: &["consistent-read", "write", "write-unchanged", "resize"] };

pub(super) static BLOCK_GRAPH_EDGES: Object = Object {
    members: &[
        req("parent", Type::Int),
        req("child", Type::Int),
        req("name", Type::Str),
        req("perm", Type::List(&Type::Enum(&BLOCK_GRAPH_EDGES_PERM))),
        req("shared-perm", Type::List(&Type::Enum(&BLOCK_GRAPH_EDGES_PERM))),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_GRAPH: Object = Object {
    members: &[
        req("nodes", Type::List(&Type::Object(&BLOCK_GRAPH_NODES))),
        req("edges", Type::List(&Type::Object(&BLOCK_GRAPH_EDGES))),
    ],
    tag: None,
    cases: &[],
};

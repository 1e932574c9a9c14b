//! The types of arguments, results and event data.
//!
//! Facts of the interface, as `query-qmp-schema` of the reference reports them, cut down to the drivers, exports and
//! kinds of job that there are here. [`super::check`] decodes by these tables and [`super::introspect`] publishes them, so what
//! is accepted and what is announced cannot differ.

use super::backup::*;
use super::bitmaps::*;
use super::jobs::{JOB_STATUS, JOB_TYPE};
use super::ty::{Alternate, Enum, Object, Type, opt, req};

pub(super) static QMP_CAPABILITY: Enum = Enum { values: &["oob"] };

pub(super) static QMP_CAPABILITIES_ARG: Object =
    Object { members: &[opt("enable", Type::List(&Type::Enum(&QMP_CAPABILITY)))], tag: None, cases: &[] };

pub(super) static NOTHING: Object = Object { members: &[], tag: None, cases: &[] };

pub(super) static QUERY_VERSION_RET_QEMU: Object = Object {
    members: &[req("major", Type::Int), req("minor", Type::Int), req("micro", Type::Int)],
    tag: None,
    cases: &[],
};

pub(super) static QUERY_VERSION_RET: Object = Object {
    members: &[req("qemu", Type::Object(&QUERY_VERSION_RET_QEMU)), req("package", Type::Str)],
    tag: None,
    cases: &[],
};

pub(super) static QUERY_COMMANDS_RET: Object =
    Object { members: &[req("name", Type::Str)], tag: None, cases: &[] };

pub(super) static QUERY_QMP_SCHEMA_RET_META_TYPE: Enum =
    Enum { values: &["builtin", "enum", "array", "object", "alternate", "command", "event"] };

pub(super) static QUERY_QMP_SCHEMA_RET: Object = Object {
    members: &[
        req("name", Type::Str),
        req("meta-type", Type::Enum(&QUERY_QMP_SCHEMA_RET_META_TYPE)),
        opt("features", Type::List(&Type::Str)),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCKDEV_DRIVER: Enum = Enum {
    values: &[
        "copy-before-write",
        "copy-on-read",
        "file",
        "host_device",
        "nbd",
        "null-aio",
        "null-co",
        "qcow2",
        "raw",
        "snapshot-access",
        "throttle",
    ],
};

pub(super) static BLOCKDEV_OPTIONS_DISCARD: Enum = Enum { values: &["ignore", "unmap"] };

pub(super) static BLOCKDEV_OPTIONS_CACHE: Object =
    Object { members: &[opt("direct", Type::Bool), opt("no-flush", Type::Bool)], tag: None, cases: &[] };

pub(super) static BLOCKDEV_OPTIONS_DETECT_ZEROES: Enum = Enum { values: &["off", "on", "unmap"] };

pub(super) static BLOCKDEV_OPTIONS_FILE_LOCKING: Enum = Enum { values: &["auto", "on", "off"] };

pub(super) static BLOCKDEV_OPTIONS_FILE_AIO: Enum = Enum { values: &["threads", "native", "io_uring"] };

pub(super) static BLOCKDEV_OPTIONS_FILE: Object = Object {
    members: &[
        req("filename", Type::Str),
        opt("pr-manager", Type::Str),
        opt("locking", Type::Enum(&BLOCKDEV_OPTIONS_FILE_LOCKING)),
        opt("aio", Type::Enum(&BLOCKDEV_OPTIONS_FILE_AIO)),
        opt("aio-max-batch", Type::Int),
        opt("drop-cache", Type::Bool),
        opt("x-check-cache-dropped", Type::Bool),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCKDEV_OPTIONS_NBD: Object = Object {
    members: &[
        req("server", Type::Object(&SOCKET_ADDRESS_FLAT)),
        opt("export", Type::Str),
        opt("tls-creds", Type::Str),
        opt("tls-hostname", Type::Str),
        opt("x-dirty-bitmap", Type::Str),
        opt("reconnect-delay", Type::U32),
        opt("open-timeout", Type::U32),
    ],
    tag: None,
    cases: &[],
};

pub(super) static SOCKET_ADDRESS_FLAT: Object = Object {
    members: &[req("type", Type::Enum(&SOCKET_ADDRESS_TYPE))],
    tag: Some("type"),
    cases: &[
        ("inet", &SOCKET_ADDRESS_INET_DATA),
        ("unix", &SOCKET_ADDRESS_UNIX_DATA),
        ("fd", &SOCKET_ADDRESS_FD_DATA),
    ],
};

pub(super) static BLOCKDEV_OPTIONS_NULL_AIO: Object = Object {
    members: &[opt("size", Type::Int), opt("latency-ns", Type::U64), opt("read-zeroes", Type::Bool)],
    tag: None,
    cases: &[],
};

pub(super) static BLOCKDEV_REF: Alternate =
    Alternate { name: "BlockdevRef", choices: &[Type::Object(&BLOCKDEV_OPTIONS), Type::Str] };

pub(super) static BLOCKDEV_REF_OR_NULL: Alternate = Alternate {
    name: "BlockdevRefOrNull",
    choices: &[Type::Object(&BLOCKDEV_OPTIONS), Type::Str, Type::Null],
};

pub(super) static OVERLAP_CHECK_TEMPLATE: Enum = Enum { values: &["none", "constant", "cached", "all"] };

pub(super) static OVERLAP_CHECK_FLAGS: Object = Object {
    members: &[
        opt("template", Type::Enum(&OVERLAP_CHECK_TEMPLATE)),
        opt("main-header", Type::Bool),
        opt("active-l1", Type::Bool),
        opt("active-l2", Type::Bool),
        opt("refcount-table", Type::Bool),
        opt("refcount-block", Type::Bool),
        opt("snapshot-table", Type::Bool),
        opt("inactive-l1", Type::Bool),
        opt("inactive-l2", Type::Bool),
        opt("bitmap-directory", Type::Bool),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCKDEV_OPTIONS_QCOW2_OVERLAP_CHECK: Alternate = Alternate {
    name: "Qcow2OverlapChecks",
    choices: &[Type::Object(&OVERLAP_CHECK_FLAGS), Type::Enum(&OVERLAP_CHECK_TEMPLATE)],
};

pub(super) static BLOCKDEV_OPTIONS_QCOW2_ENCRYPT_FORMAT: Enum = Enum { values: &["aes", "luks"] };

pub(super) static BLOCKDEV_OPTIONS_QCOW2_ENCRYPT_KEY: Object =
    Object { members: &[opt("key-secret", Type::Str)], tag: None, cases: &[] };

pub(super) static BLOCKDEV_OPTIONS_QCOW2_ENCRYPT: Object = Object {
    members: &[req("format", Type::Enum(&BLOCKDEV_OPTIONS_QCOW2_ENCRYPT_FORMAT))],
    tag: Some("format"),
    cases: &[("aes", &BLOCKDEV_OPTIONS_QCOW2_ENCRYPT_KEY), ("luks", &BLOCKDEV_OPTIONS_QCOW2_ENCRYPT_KEY)],
};

pub(super) static BLOCKDEV_OPTIONS_QCOW2: Object = Object {
    members: &[
        req("file", Type::Alternate(&BLOCKDEV_REF)),
        opt("backing", Type::Alternate(&BLOCKDEV_REF_OR_NULL)),
        opt("lazy-refcounts", Type::Bool),
        opt("pass-discard-request", Type::Bool),
        opt("pass-discard-snapshot", Type::Bool),
        opt("pass-discard-other", Type::Bool),
        opt("discard-no-unref", Type::Bool),
        opt("overlap-check", Type::Alternate(&BLOCKDEV_OPTIONS_QCOW2_OVERLAP_CHECK)),
        opt("cache-size", Type::Int),
        opt("l2-cache-size", Type::Int),
        opt("l2-cache-entry-size", Type::Int),
        opt("refcount-cache-size", Type::Int),
        opt("cache-clean-interval", Type::Int),
        opt("encrypt", Type::Object(&BLOCKDEV_OPTIONS_QCOW2_ENCRYPT)),
        opt("data-file", Type::Alternate(&BLOCKDEV_REF)),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCKDEV_OPTIONS_RAW: Object = Object {
    members: &[req("file", Type::Alternate(&BLOCKDEV_REF)), opt("offset", Type::Int), opt("size", Type::Int)],
    tag: None,
    cases: &[],
};

pub(super) static BLOCKDEV_OPTIONS_COPY_ON_READ: Object = Object {
    members: &[req("file", Type::Alternate(&BLOCKDEV_REF)), opt("bottom", Type::Str)],
    tag: None,
    cases: &[],
};

pub(super) static BLOCKDEV_OPTIONS_THROTTLE: Object = Object {
    members: &[req("throttle-group", Type::Str), req("file", Type::Alternate(&BLOCKDEV_REF))],
    tag: None,
    cases: &[],
};

pub(super) static BLOCKDEV_OPTIONS: Object = Object {
    members: &[
        req("driver", Type::Enum(&BLOCKDEV_DRIVER)),
        opt("node-name", Type::Str),
        opt("discard", Type::Enum(&BLOCKDEV_OPTIONS_DISCARD)),
        opt("cache", Type::Object(&BLOCKDEV_OPTIONS_CACHE)),
        opt("active", Type::Bool),
        opt("read-only", Type::Bool),
        opt("auto-read-only", Type::Bool),
        opt("force-share", Type::Bool),
        opt("detect-zeroes", Type::Enum(&BLOCKDEV_OPTIONS_DETECT_ZEROES)),
    ],
    tag: Some("driver"),
    cases: &[
        ("copy-before-write", &BLOCKDEV_OPTIONS_CBW),
        ("copy-on-read", &BLOCKDEV_OPTIONS_COPY_ON_READ),
        ("file", &BLOCKDEV_OPTIONS_FILE),
        ("host_device", &BLOCKDEV_OPTIONS_FILE),
        ("nbd", &BLOCKDEV_OPTIONS_NBD),
        ("null-aio", &BLOCKDEV_OPTIONS_NULL_AIO),
        ("null-co", &BLOCKDEV_OPTIONS_NULL_AIO),
        ("qcow2", &BLOCKDEV_OPTIONS_QCOW2),
        ("raw", &BLOCKDEV_OPTIONS_RAW),
        ("snapshot-access", &BLOCKDEV_OPTIONS_SNAPSHOT_ACCESS),
        ("throttle", &BLOCKDEV_OPTIONS_THROTTLE),
    ],
};

pub(super) static BLOCKDEV_REOPEN_ARG: Object = Object {
    members: &[req("options", Type::List(&Type::Object(&BLOCKDEV_OPTIONS)))],
    tag: None,
    cases: &[],
};

pub(super) static BLOCKDEV_DEL_ARG: Object =
    Object { members: &[req("node-name", Type::Str)], tag: None, cases: &[] };

pub(super) static BLOCKDEV_SNAPSHOT_SYNC_ARG_MODE: Enum = Enum { values: &["existing", "absolute-paths"] };

pub(super) static TRANSACTION_ACTION_KIND: Enum = Enum {
    values: &[
        "abort",
        "block-dirty-bitmap-add",
        "block-dirty-bitmap-remove",
        "block-dirty-bitmap-clear",
        "block-dirty-bitmap-enable",
        "block-dirty-bitmap-disable",
        "block-dirty-bitmap-merge",
        "blockdev-backup",
        "blockdev-snapshot",
        "blockdev-snapshot-internal-sync",
        "blockdev-snapshot-sync",
        "drive-backup",
    ],
};

pub(super) static TRANSACTION_ACTION: Object = Object {
    members: &[req("type", Type::Enum(&TRANSACTION_ACTION_KIND))],
    tag: Some("type"),
    cases: &[
        ("abort", &TRANSACTION_ABORT),
        ("block-dirty-bitmap-add", &TRANSACTION_BITMAP_ADD),
        ("block-dirty-bitmap-remove", &TRANSACTION_BITMAP),
        ("block-dirty-bitmap-clear", &TRANSACTION_BITMAP),
        ("block-dirty-bitmap-enable", &TRANSACTION_BITMAP),
        ("block-dirty-bitmap-disable", &TRANSACTION_BITMAP),
        ("block-dirty-bitmap-merge", &TRANSACTION_BITMAP_MERGE),
        ("blockdev-backup", &TRANSACTION_BLOCKDEV_BACKUP),
        ("blockdev-snapshot", &TRANSACTION_SNAPSHOT),
        ("blockdev-snapshot-internal-sync", &TRANSACTION_SNAPSHOT_INTERNAL),
        ("blockdev-snapshot-sync", &TRANSACTION_SNAPSHOT_SYNC),
        ("drive-backup", &TRANSACTION_DRIVE_BACKUP),
    ],
};

pub(super) static TRANSACTION_ABORT: Object =
    Object { members: &[req("data", Type::Object(&NOTHING))], tag: None, cases: &[] };

pub(super) static TRANSACTION_SNAPSHOT: Object =
    Object { members: &[req("data", Type::Object(&BLOCKDEV_SNAPSHOT_ARG))], tag: None, cases: &[] };

pub(super) static TRANSACTION_SNAPSHOT_SYNC: Object =
    Object { members: &[req("data", Type::Object(&BLOCKDEV_SNAPSHOT_SYNC_ARG))], tag: None, cases: &[] };

pub(super) static TRANSACTION_SNAPSHOT_INTERNAL: Object =
    Object { members: &[req("data", Type::Object(&BLOCKDEV_SNAPSHOT_INTERNAL))], tag: None, cases: &[] };

pub(super) static TRANSACTION_COMPLETION_MODE: Enum = Enum { values: &["individual", "grouped"] };

pub(super) static TRANSACTION_PROPERTIES: Object = Object {
    members: &[opt("completion-mode", Type::Enum(&TRANSACTION_COMPLETION_MODE))],
    tag: None,
    cases: &[],
};

pub(super) static TRANSACTION_ARG: Object = Object {
    members: &[
        req("actions", Type::List(&Type::Object(&TRANSACTION_ACTION))),
        opt("properties", Type::Object(&TRANSACTION_PROPERTIES)),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCKDEV_SNAPSHOT_SYNC_ARG: Object = Object {
    members: &[
        opt("device", Type::Str),
        opt("node-name", Type::Str),
        req("snapshot-file", Type::Str),
        opt("snapshot-node-name", Type::Str),
        opt("format", Type::Str),
        opt("mode", Type::Enum(&BLOCKDEV_SNAPSHOT_SYNC_ARG_MODE)),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCKDEV_SNAPSHOT_INTERNAL: Object =
    Object { members: &[req("device", Type::Str), req("name", Type::Str)], tag: None, cases: &[] };

pub(super) static BLOCKDEV_SNAPSHOT_DELETE_INTERNAL_SYNC_ARG: Object = Object {
    members: &[req("device", Type::Str), opt("id", Type::Str), opt("name", Type::Str)],
    tag: None,
    cases: &[],
};

pub(super) static BLOCKDEV_SNAPSHOT_ARG: Object =
    Object { members: &[req("node", Type::Str), req("overlay", Type::Str)], tag: None, cases: &[] };

pub(super) static CHANGE_BACKING_FILE_ARG: Object = Object {
    members: &[req("device", Type::Str), req("image-node-name", Type::Str), req("backing-file", Type::Str)],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_RESIZE_ARG: Object = Object {
    members: &[opt("device", Type::Str), opt("node-name", Type::Str), req("size", Type::Int)],
    tag: None,
    cases: &[],
};

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

pub(super) static SOCKET_ADDRESS_TYPE: Enum = Enum { values: &["inet", "unix", "fd"] };

pub(super) static SOCKET_ADDRESS_INET_DATA: Object = Object {
    members: &[
        req("host", Type::Str),
        req("port", Type::Str),
        opt("numeric", Type::Bool),
        opt("to", Type::U16),
        opt("ipv4", Type::Bool),
        opt("ipv6", Type::Bool),
        opt("keep-alive", Type::Bool),
        opt("mptcp", Type::Bool),
    ],
    tag: None,
    cases: &[],
};

pub(super) static SOCKET_ADDRESS_INET: Object =
    Object { members: &[req("data", Type::Object(&SOCKET_ADDRESS_INET_DATA))], tag: None, cases: &[] };

pub(super) static SOCKET_ADDRESS_UNIX_DATA: Object = Object {
    members: &[req("path", Type::Str), opt("abstract", Type::Bool), opt("tight", Type::Bool)],
    tag: None,
    cases: &[],
};

pub(super) static SOCKET_ADDRESS_UNIX: Object =
    Object { members: &[req("data", Type::Object(&SOCKET_ADDRESS_UNIX_DATA))], tag: None, cases: &[] };

pub(super) static SOCKET_ADDRESS_FD_DATA: Object =
    Object { members: &[req("str", Type::Str)], tag: None, cases: &[] };

pub(super) static SOCKET_ADDRESS_FD: Object =
    Object { members: &[req("data", Type::Object(&SOCKET_ADDRESS_FD_DATA))], tag: None, cases: &[] };

pub(super) static SOCKET_ADDRESS: Object = Object {
    members: &[req("type", Type::Enum(&SOCKET_ADDRESS_TYPE))],
    tag: Some("type"),
    cases: &[("inet", &SOCKET_ADDRESS_INET), ("unix", &SOCKET_ADDRESS_UNIX), ("fd", &SOCKET_ADDRESS_FD)],
};

pub(super) static NBD_SERVER_START_ARG: Object = Object {
    members: &[
        opt("handshake-max-seconds", Type::U32),
        opt("tls-creds", Type::Str),
        opt("tls-authz", Type::Str),
        opt("max-connections", Type::U32),
        req("addr", Type::Object(&SOCKET_ADDRESS)),
    ],
    tag: None,
    cases: &[],
};

pub(super) static NBD_SERVER_ADD_ARG: Object = Object {
    members: &[
        opt("name", Type::Str),
        opt("description", Type::Str),
        req("device", Type::Str),
        opt("writable", Type::Bool),
        opt("bitmap", Type::Str),
    ],
    tag: None,
    cases: &[],
};

pub(super) static EXPORT_REMOVE_MODE: Enum = Enum { values: &["safe", "hard"] };

pub(super) static NBD_SERVER_REMOVE_ARG: Object = Object {
    members: &[req("name", Type::Str), opt("mode", Type::Enum(&EXPORT_REMOVE_MODE))],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_EXPORT_OPTIONS_EXPORT_TYPE: Enum = Enum { values: &["nbd"] };

pub(super) static BITMAP_OF_NODE: Object =
    Object { members: &[req("node", Type::Str), req("name", Type::Str)], tag: None, cases: &[] };

pub(super) static BLOCK_EXPORT_OPTIONS_NBD_BITMAPS: Alternate =
    Alternate { name: "BlockDirtyBitmapOrStr", choices: &[Type::Str, Type::Object(&BITMAP_OF_NODE)] };

pub(super) static BLOCK_EXPORT_OPTIONS_NBD: Object = Object {
    members: &[
        opt("name", Type::Str),
        opt("description", Type::Str),
        opt("bitmaps", Type::List(&Type::Alternate(&BLOCK_EXPORT_OPTIONS_NBD_BITMAPS))),
        opt("allocation-depth", Type::Bool),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_EXPORT_OPTIONS: Object = Object {
    members: &[
        req("type", Type::Enum(&BLOCK_EXPORT_OPTIONS_EXPORT_TYPE)),
        req("id", Type::Str),
        opt("fixed-iothread", Type::Bool),
        opt("iothread", Type::Str),
        req("node-name", Type::Str),
        opt("writable", Type::Bool),
        opt("writethrough", Type::Bool),
        opt("allow-inactive", Type::Bool),
    ],
    tag: Some("type"),
    cases: &[("nbd", &BLOCK_EXPORT_OPTIONS_NBD)],
};

pub(super) static BLOCK_EXPORT_DEL_ARG: Object = Object {
    members: &[req("id", Type::Str), opt("mode", Type::Enum(&EXPORT_REMOVE_MODE))],
    tag: None,
    cases: &[],
};

pub(super) static QUERY_BLOCK_EXPORTS_RET: Object = Object {
    members: &[
        req("id", Type::Str),
        req("type", Type::Enum(&BLOCK_EXPORT_OPTIONS_EXPORT_TYPE)),
        req("node-name", Type::Str),
        req("shutting-down", Type::Bool),
    ],
    tag: None,
    cases: &[],
};

pub(super) static JOB_STATUS_CHANGE_DATA: Object = Object {
    members: &[req("id", Type::Str), req("status", Type::Enum(&JOB_STATUS))],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_JOB_READY_DATA: Object = Object {
    members: &[
        req("type", Type::Enum(&JOB_TYPE)),
        req("device", Type::Str),
        req("len", Type::Int),
        req("offset", Type::Int),
        req("speed", Type::Int),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_JOB_PENDING_DATA: Object =
    Object { members: &[req("type", Type::Enum(&JOB_TYPE)), req("id", Type::Str)], tag: None, cases: &[] };

pub(super) static BLOCK_JOB_COMPLETED_DATA: Object = Object {
    members: &[
        req("type", Type::Enum(&JOB_TYPE)),
        req("device", Type::Str),
        req("len", Type::Int),
        req("offset", Type::Int),
        req("speed", Type::Int),
        opt("error", Type::Str),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_JOB_CANCELLED_DATA: Object = Object {
    members: &[
        req("type", Type::Enum(&JOB_TYPE)),
        req("device", Type::Str),
        req("len", Type::Int),
        req("offset", Type::Int),
        req("speed", Type::Int),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_JOB_ERROR_DATA_OPERATION: Enum = Enum { values: &["read", "write"] };

pub(super) static BLOCK_JOB_ERROR_DATA_ACTION: Enum = Enum { values: &["ignore", "report", "stop"] };

pub(super) static BLOCK_JOB_ERROR_DATA: Object = Object {
    members: &[
        req("device", Type::Str),
        req("operation", Type::Enum(&BLOCK_JOB_ERROR_DATA_OPERATION)),
        req("action", Type::Enum(&BLOCK_JOB_ERROR_DATA_ACTION)),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_EXPORT_DELETED_DATA: Object =
    Object { members: &[req("id", Type::Str)], tag: None, cases: &[] };

pub(super) static BLOCK_IMAGE_CORRUPTED_DATA: Object = Object {
    members: &[
        req("device", Type::Str),
        opt("node-name", Type::Str),
        req("msg", Type::Str),
        opt("offset", Type::Int),
        opt("size", Type::Int),
        req("fatal", Type::Bool),
    ],
    tag: None,
    cases: &[],
};

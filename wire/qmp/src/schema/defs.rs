//! The types of arguments, results and event data.
//!
//! Facts of the interface, as `query-qmp-schema` of the reference reports them, cut down to the drivers, exports and
//! kinds of job that there are here. [`super::check`] decodes by these tables and [`super::introspect`] publishes them,
//! so what is accepted and what is announced cannot differ.

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

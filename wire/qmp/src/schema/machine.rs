//! What a machine is told beside what a storage daemon is: it runs and stops, and it has devices with disks in them.

use super::defs::NOTHING;
use super::objects::{OBJECT_PROPERTY_INFO, TYPENAME_ARG};
use super::ty::{Command, Enum, Event, Object, Type, opt, req};

pub(super) static COMMANDS: &[Command] = &[
    Command { name: "human-monitor-command", arguments: &HUMAN_MONITOR_ARG, returns: Type::Str },
    Command { name: "stop", arguments: &NOTHING, returns: Type::Object(&NOTHING) },
    Command { name: "cont", arguments: &NOTHING, returns: Type::Object(&NOTHING) },
    Command { name: "system_reset", arguments: &NOTHING, returns: Type::Object(&NOTHING) },
    Command { name: "system_powerdown", arguments: &NOTHING, returns: Type::Object(&NOTHING) },
    Command { name: "query-status", arguments: &NOTHING, returns: Type::Object(&STATUS_INFO) },
    Command { name: "query-name", arguments: &NOTHING, returns: Type::Object(&NAME_INFO) },
    Command { name: "query-uuid", arguments: &NOTHING, returns: Type::Object(&UUID_INFO) },
    Command { name: "query-target", arguments: &NOTHING, returns: Type::Object(&TARGET_INFO) },
    Command { name: "query-kvm", arguments: &NOTHING, returns: Type::Object(&KVM_INFO) },
    Command {
        name: "device-list-properties",
        arguments: &TYPENAME_ARG,
        returns: Type::List(&Type::Object(&OBJECT_PROPERTY_INFO)),
    },
    Command {
        name: "query-iothreads",
        arguments: &NOTHING,
        returns: Type::List(&Type::Object(&IOTHREAD_INFO)),
    },
    Command { name: "device_add", arguments: &DEVICE_ADD_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "device_del", arguments: &ID_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "blockdev-open-tray", arguments: &OPEN_TRAY_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "blockdev-close-tray", arguments: &CLOSE_TRAY_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "blockdev-remove-medium", arguments: &ID_ARG, returns: Type::Object(&NOTHING) },
    Command {
        name: "blockdev-insert-medium",
        arguments: &INSERT_MEDIUM_ARG,
        returns: Type::Object(&NOTHING),
    },
    Command {
        name: "blockdev-change-medium",
        arguments: &CHANGE_MEDIUM_ARG,
        returns: Type::Object(&NOTHING),
    },
    Command { name: "eject", arguments: &OPEN_TRAY_ARG, returns: Type::Object(&NOTHING) },
    Command {
        name: "block-latency-histogram-set",
        arguments: &LATENCY_HISTOGRAM_ARG,
        returns: Type::Object(&NOTHING),
    },
    Command { name: "block_set_io_throttle", arguments: &IO_THROTTLE_ARG, returns: Type::Object(&NOTHING) },
];

pub(super) static EVENTS: &[Event] = &[
    Event { name: "STOP", data: &NOTHING },
    Event { name: "RESUME", data: &NOTHING },
    Event { name: "RESET", data: &WHY_DATA },
    Event { name: "POWERDOWN", data: &NOTHING },
    Event { name: "SHUTDOWN", data: &WHY_DATA },
    Event { name: "DEVICE_DELETED", data: &DEVICE_DELETED_DATA },
    Event { name: "DEVICE_TRAY_MOVED", data: &DEVICE_TRAY_MOVED_DATA },
    Event { name: "BLOCK_IO_ERROR", data: &BLOCK_IO_ERROR_DATA },
];

static RUN_STATE: Enum = Enum {
    values: &[
        "debug",
        "inmigrate",
        "internal-error",
        "io-error",
        "paused",
        "postmigrate",
        "prelaunch",
        "finish-migrate",
        "restore-vm",
        "running",
        "save-vm",
        "shutdown",
        "suspended",
        "watchdog",
        "guest-panicked",
        "colo",
    ],
};

static STATUS_INFO: Object = Object {
    members: &[req("running", Type::Bool), req("status", Type::Enum(&RUN_STATE))],
    tag: None,
    cases: &[],
};

static NAME_INFO: Object = Object { members: &[opt("name", Type::Str)], tag: None, cases: &[] };

static UUID_INFO: Object = Object { members: &[req("UUID", Type::Str)], tag: None, cases: &[] };

static SYS_EMU_TARGET: Enum = Enum { values: &["x86_64"] };

static TARGET_INFO: Object =
    Object { members: &[req("arch", Type::Enum(&SYS_EMU_TARGET))], tag: None, cases: &[] };

static KVM_INFO: Object =
    Object { members: &[req("enabled", Type::Bool), req("present", Type::Bool)], tag: None, cases: &[] };

/// And whatever properties the device has: see [`super::takes_more`].
static DEVICE_ADD_ARG: Object = Object {
    members: &[req("driver", Type::Str), opt("bus", Type::Str), opt("id", Type::Str)],
    tag: None,
    cases: &[],
};

static ID_ARG: Object = Object { members: &[req("id", Type::Str)], tag: None, cases: &[] };

static OPEN_TRAY_ARG: Object = Object {
    members: &[opt("device", Type::Str), opt("id", Type::Str), opt("force", Type::Bool)],
    tag: None,
    cases: &[],
};

static CLOSE_TRAY_ARG: Object =
    Object { members: &[opt("device", Type::Str), opt("id", Type::Str)], tag: None, cases: &[] };

static INSERT_MEDIUM_ARG: Object =
    Object { members: &[req("id", Type::Str), req("node-name", Type::Str)], tag: None, cases: &[] };

static READ_ONLY_MODE: Enum = Enum { values: &["retain", "read-only", "read-write"] };

static CHANGE_MEDIUM_ARG: Object = Object {
    members: &[
        opt("device", Type::Str),
        opt("id", Type::Str),
        req("filename", Type::Str),
        opt("format", Type::Str),
        opt("force", Type::Bool),
        opt("read-only-mode", Type::Enum(&READ_ONLY_MODE)),
    ],
    tag: None,
    cases: &[],
};

static IO_THROTTLE_ARG: Object = Object {
    members: &[
        opt("device", Type::Str),
        opt("id", Type::Str),
        req("bps", Type::Int),
        req("bps_rd", Type::Int),
        req("bps_wr", Type::Int),
        req("iops", Type::Int),
        req("iops_rd", Type::Int),
        req("iops_wr", Type::Int),
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
    ],
    tag: None,
    cases: &[],
};

static SHUTDOWN_CAUSE: Enum = Enum {
    values: &[
        "none",
        "host-error",
        "host-qmp-quit",
        "host-qmp-system-reset",
        "host-signal",
        "host-ui",
        "guest-shutdown",
        "guest-reset",
        "guest-panic",
        "subsystem-reset",
        "snapshot-load",
    ],
};

static WHY_DATA: Object = Object {
    members: &[req("guest", Type::Bool), req("reason", Type::Enum(&SHUTDOWN_CAUSE))],
    tag: None,
    cases: &[],
};

static DEVICE_DELETED_DATA: Object =
    Object { members: &[opt("device", Type::Str), req("path", Type::Str)], tag: None, cases: &[] };

static DEVICE_TRAY_MOVED_DATA: Object = Object {
    members: &[req("device", Type::Str), req("id", Type::Str), req("tray-open", Type::Bool)],
    tag: None,
    cases: &[],
};

static IO_OPERATION: Enum = Enum { values: &["read", "write"] };

static ERROR_ACTION: Enum = Enum { values: &["ignore", "report", "stop"] };

static BLOCK_IO_ERROR_DATA: Object = Object {
    members: &[
        req("qom-path", Type::Str),
        req("device", Type::Str),
        opt("node-name", Type::Str),
        req("operation", Type::Enum(&IO_OPERATION)),
        req("action", Type::Enum(&ERROR_ACTION)),
        opt("nospace", Type::Bool),
        req("reason", Type::Str),
    ],
    tag: None,
    cases: &[],
};

static HUMAN_MONITOR_ARG: Object =
    Object { members: &[req("command-line", Type::Str), opt("cpu-index", Type::Int)], tag: None, cases: &[] };

static LATENCY_HISTOGRAM_ARG: Object = Object {
    members: &[
        req("id", Type::Str),
        opt("boundaries", Type::List(&Type::U64)),
        opt("boundaries-read", Type::List(&Type::U64)),
        opt("boundaries-write", Type::List(&Type::U64)),
        opt("boundaries-zap", Type::List(&Type::U64)),
        opt("boundaries-flush", Type::List(&Type::U64)),
    ],
    tag: None,
    cases: &[],
};

static IOTHREAD_INFO: Object = Object {
    members: &[
        req("id", Type::Str),
        req("thread-id", Type::Int),
        req("poll-max-ns", Type::Int),
        req("poll-grow", Type::Int),
        req("poll-shrink", Type::Int),
        req("aio-max-batch", Type::Int),
    ],
    tag: None,
    cases: &[],
};

//! The parts of the commands and events about jobs.

use super::defs::BLOCKDEV_SNAPSHOT_SYNC_ARG_MODE;
use super::query::BLOCK_INFO_IO_STATUS;
use super::ty::{Enum, Object, Type, opt, req};

pub(super) static BLOCKDEV_ON_ERROR: Enum = Enum { values: &["report", "ignore", "enospc", "stop", "auto"] };

pub(super) static BLOCK_STREAM_ARG: Object = Object {
    members: &[
        opt("job-id", Type::Str),
        req("device", Type::Str),
        opt("base", Type::Str),
        opt("base-node", Type::Str),
        opt("backing-file", Type::Str),
        opt("backing-mask-protocol", Type::Bool),
        opt("bottom", Type::Str),
        opt("speed", Type::Int),
        opt("on-error", Type::Enum(&BLOCKDEV_ON_ERROR)),
        opt("filter-node-name", Type::Str),
        opt("auto-finalize", Type::Bool),
        opt("auto-dismiss", Type::Bool),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_COMMIT_ARG: Object = Object {
    members: &[
        opt("job-id", Type::Str),
        req("device", Type::Str),
        opt("base-node", Type::Str),
        opt("base", Type::Str),
        opt("top-node", Type::Str),
        opt("top", Type::Str),
        opt("backing-file", Type::Str),
        opt("backing-mask-protocol", Type::Bool),
        opt("speed", Type::Int),
        opt("on-error", Type::Enum(&BLOCKDEV_ON_ERROR)),
        opt("filter-node-name", Type::Str),
        opt("auto-finalize", Type::Bool),
        opt("auto-dismiss", Type::Bool),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_JOB_SET_SPEED_ARG: Object =
    Object { members: &[req("device", Type::Str), req("speed", Type::Int)], tag: None, cases: &[] };

pub(super) static BLOCK_JOB_PAUSE_ARG: Object =
    Object { members: &[req("device", Type::Str)], tag: None, cases: &[] };

pub(super) static BLOCK_JOB_RESUME_ARG: Object =
    Object { members: &[req("device", Type::Str)], tag: None, cases: &[] };

pub(super) static BLOCK_JOB_CANCEL_ARG: Object =
    Object { members: &[req("device", Type::Str), opt("force", Type::Bool)], tag: None, cases: &[] };

pub(super) static BLOCK_JOB_COMPLETE_ARG: Object =
    Object { members: &[req("device", Type::Str)], tag: None, cases: &[] };

pub(super) static BLOCK_JOB_FINALIZE_ARG: Object =
    Object { members: &[req("id", Type::Str)], tag: None, cases: &[] };

pub(super) static BLOCK_JOB_DISMISS_ARG: Object =
    Object { members: &[req("id", Type::Str)], tag: None, cases: &[] };

pub(super) static JOB_TYPE: Enum =
    Enum { values: &["commit", "stream", "mirror", "backup", "create", "amend"] };

pub(super) static JOB_STATUS: Enum = Enum {
    values: &[
        "undefined",
        "created",
        "running",
        "paused",
        "ready",
        "standby",
        "waiting",
        "pending",
        "aborting",
        "concluded",
        "null",
    ],
};

pub(super) static QUERY_BLOCK_JOBS_RET: Object = Object {
    members: &[
        req("type", Type::Enum(&JOB_TYPE)),
        req("device", Type::Str),
        req("len", Type::Int),
        req("offset", Type::Int),
        req("busy", Type::Bool),
        req("paused", Type::Bool),
        req("speed", Type::Int),
        req("io-status", Type::Enum(&BLOCK_INFO_IO_STATUS)),
        req("ready", Type::Bool),
        req("status", Type::Enum(&JOB_STATUS)),
        req("auto-finalize", Type::Bool),
        req("auto-dismiss", Type::Bool),
        opt("error", Type::Str),
    ],
    tag: Some("type"),
    cases: &[("mirror", &QUERY_BLOCK_JOBS_RET_MIRROR)],
};

pub(super) static JOB_PAUSE_ARG: Object = Object { members: &[req("id", Type::Str)], tag: None, cases: &[] };

pub(super) static JOB_RESUME_ARG: Object = Object { members: &[req("id", Type::Str)], tag: None, cases: &[] };

pub(super) static JOB_CANCEL_ARG: Object = Object { members: &[req("id", Type::Str)], tag: None, cases: &[] };

pub(super) static JOB_COMPLETE_ARG: Object =
    Object { members: &[req("id", Type::Str)], tag: None, cases: &[] };

pub(super) static JOB_FINALIZE_ARG: Object =
    Object { members: &[req("id", Type::Str)], tag: None, cases: &[] };

pub(super) static JOB_DISMISS_ARG: Object =
    Object { members: &[req("id", Type::Str)], tag: None, cases: &[] };

pub(super) static QUERY_JOBS_RET: Object = Object {
    members: &[
        req("id", Type::Str),
        req("type", Type::Enum(&JOB_TYPE)),
        req("status", Type::Enum(&JOB_STATUS)),
        req("current-progress", Type::Int),
        req("total-progress", Type::Int),
        opt("error", Type::Str),
    ],
    tag: None,
    cases: &[],
};

pub(super) static QUERY_BLOCK_JOBS_RET_MIRROR: Object =
    Object { members: &[req("actively-synced", Type::Bool)], tag: None, cases: &[] };

pub(super) static MIRROR_SYNC_MODE: Enum = Enum { values: &["top", "full", "none", "incremental", "bitmap"] };

pub(super) static MIRROR_COPY_MODE: Enum = Enum { values: &["background", "write-blocking"] };

pub(super) static BLOCKDEV_MIRROR_ARG: Object = Object {
    members: &[
        opt("job-id", Type::Str),
        req("device", Type::Str),
        req("target", Type::Str),
        opt("replaces", Type::Str),
        req("sync", Type::Enum(&MIRROR_SYNC_MODE)),
        opt("speed", Type::Int),
        opt("granularity", Type::U32),
        opt("buf-size", Type::Int),
        opt("on-source-error", Type::Enum(&BLOCKDEV_ON_ERROR)),
        opt("on-target-error", Type::Enum(&BLOCKDEV_ON_ERROR)),
        opt("filter-node-name", Type::Str),
        opt("copy-mode", Type::Enum(&MIRROR_COPY_MODE)),
        opt("auto-finalize", Type::Bool),
        opt("auto-dismiss", Type::Bool),
        // Not of 10.0.2 but of later versions.
        opt("target-is-zero", Type::Bool),
    ],
    tag: None,
    cases: &[],
};

pub(super) static DRIVE_MIRROR_ARG: Object = Object {
    members: &[
        opt("job-id", Type::Str),
        req("device", Type::Str),
        req("target", Type::Str),
        opt("format", Type::Str),
        opt("node-name", Type::Str),
        opt("replaces", Type::Str),
        req("sync", Type::Enum(&MIRROR_SYNC_MODE)),
        opt("mode", Type::Enum(&BLOCKDEV_SNAPSHOT_SYNC_ARG_MODE)),
        opt("speed", Type::Int),
        opt("granularity", Type::U32),
        opt("buf-size", Type::Int),
        opt("on-source-error", Type::Enum(&BLOCKDEV_ON_ERROR)),
        opt("on-target-error", Type::Enum(&BLOCKDEV_ON_ERROR)),
        opt("unmap", Type::Bool),
        opt("copy-mode", Type::Enum(&MIRROR_COPY_MODE)),
        opt("auto-finalize", Type::Bool),
        opt("auto-dismiss", Type::Bool),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCK_JOB_CHANGE_ARG: Object = Object {
    members: &[req("id", Type::Str), req("type", Type::Enum(&JOB_TYPE))],
    tag: Some("type"),
    cases: &[("mirror", &BLOCK_JOB_CHANGE_ARG_MIRROR)],
};

pub(super) static BLOCK_JOB_CHANGE_ARG_MIRROR: Object =
    Object { members: &[req("copy-mode", Type::Enum(&MIRROR_COPY_MODE))], tag: None, cases: &[] };

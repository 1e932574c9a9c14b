//! All commands and events.
//!
//! Facts of the interface, as `query-qmp-schema` of the reference reports them, cut down to the drivers, exports and
//! kinds of job that there are here. [`super::check`] decodes by these tables and [`super::introspect`] publishes them,
//! so what is accepted and what is announced cannot differ.

use super::backup::*;
use super::bitmaps::*;
use super::create::*;
use super::defs::*;
use super::experimental::*;
use super::jobs::*;
use super::objects::*;
use super::query::*;
use super::ty::{Command, Event, Type};

/// All commands.
pub static COMMANDS: &[Command] = &[
    Command { name: "qmp_capabilities", arguments: &QMP_CAPABILITIES_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "query-version", arguments: &NOTHING, returns: Type::Object(&QUERY_VERSION_RET) },
    Command {
        name: "query-commands",
        arguments: &NOTHING,
        returns: Type::List(&Type::Object(&QUERY_COMMANDS_RET)),
    },
    Command {
        name: "query-qmp-schema",
        arguments: &NOTHING,
        returns: Type::List(&Type::Object(&QUERY_QMP_SCHEMA_RET)),
    },
    Command { name: "object-add", arguments: &OBJECT_OPTIONS, returns: Type::Object(&NOTHING) },
    Command { name: "object-del", arguments: &OBJECT_DEL_ARG, returns: Type::Object(&NOTHING) },
    Command {
        name: "qom-list",
        arguments: &QOM_LIST_ARG,
        returns: Type::List(&Type::Object(&OBJECT_PROPERTY_INFO)),
    },
    Command {
        name: "qom-list-types",
        arguments: &QOM_LIST_TYPES_ARG,
        returns: Type::List(&Type::Object(&OBJECT_TYPE_INFO)),
    },
    Command {
        name: "qom-list-properties",
        arguments: &TYPENAME_ARG,
        returns: Type::List(&Type::Object(&OBJECT_PROPERTY_INFO)),
    },
    Command { name: "qom-get", arguments: &QOM_GET_ARG, returns: Type::Any },
    Command { name: "qom-set", arguments: &QOM_SET_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "quit", arguments: &NOTHING, returns: Type::Object(&NOTHING) },
    Command { name: "blockdev-add", arguments: &BLOCKDEV_OPTIONS, returns: Type::Object(&NOTHING) },
    Command { name: "blockdev-reopen", arguments: &BLOCKDEV_REOPEN_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "blockdev-create", arguments: &BLOCKDEV_CREATE_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "x-blockdev-amend", arguments: &X_BLOCKDEV_AMEND_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "x-blockdev-change", arguments: &X_BLOCKDEV_CHANGE_ARG, returns: Type::Object(&NOTHING) },
    Command {
        name: "x-blockdev-set-iothread",
        arguments: &X_BLOCKDEV_SET_IOTHREAD_ARG,
        returns: Type::Object(&NOTHING),
    },
    Command { name: "blockdev-del", arguments: &BLOCKDEV_DEL_ARG, returns: Type::Object(&NOTHING) },
    Command {
        name: "blockdev-snapshot-sync",
        arguments: &BLOCKDEV_SNAPSHOT_SYNC_ARG,
        returns: Type::Object(&NOTHING),
    },
    Command {
        name: "blockdev-snapshot-internal-sync",
        arguments: &BLOCKDEV_SNAPSHOT_INTERNAL,
        returns: Type::Object(&NOTHING),
    },
    Command {
        name: "blockdev-snapshot-delete-internal-sync",
        arguments: &BLOCKDEV_SNAPSHOT_DELETE_INTERNAL_SYNC_ARG,
        returns: Type::Object(&IMAGE_INFO_SNAPSHOTS),
    },
    Command { name: "transaction", arguments: &TRANSACTION_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "blockdev-snapshot", arguments: &BLOCKDEV_SNAPSHOT_ARG, returns: Type::Object(&NOTHING) },
    Command {
        name: "change-backing-file",
        arguments: &CHANGE_BACKING_FILE_ARG,
        returns: Type::Object(&NOTHING),
    },
    Command {
        name: "block-set-write-threshold",
        arguments: &BLOCK_SET_WRITE_THRESHOLD_ARG,
        returns: Type::Object(&NOTHING),
    },
    Command { name: "block_resize", arguments: &BLOCK_RESIZE_ARG, returns: Type::Object(&NOTHING) },
    Command {
        name: "query-named-block-nodes",
        arguments: &QUERY_NAMED_BLOCK_NODES_ARG,
        returns: Type::List(&Type::Object(&BLOCK_DEVICE_INFO)),
    },
    Command { name: "query-block", arguments: &NOTHING, returns: Type::List(&Type::Object(&BLOCK_INFO)) },
    Command {
        name: "query-blockstats",
        arguments: &QUERY_BLOCKSTATS_ARG,
        returns: Type::List(&Type::Object(&BLOCK_STATS)),
    },
    Command { name: "block-dirty-bitmap-add", arguments: &DIRTY_BITMAP_ADD, returns: Type::Object(&NOTHING) },
    Command { name: "block-dirty-bitmap-remove", arguments: &DIRTY_BITMAP, returns: Type::Object(&NOTHING) },
    Command { name: "block-dirty-bitmap-clear", arguments: &DIRTY_BITMAP, returns: Type::Object(&NOTHING) },
    Command { name: "block-dirty-bitmap-enable", arguments: &DIRTY_BITMAP, returns: Type::Object(&NOTHING) },
    Command { name: "block-dirty-bitmap-disable", arguments: &DIRTY_BITMAP, returns: Type::Object(&NOTHING) },
    Command {
        name: "block-dirty-bitmap-merge",
        arguments: &DIRTY_BITMAP_MERGE,
        returns: Type::Object(&NOTHING),
    },
    Command {
        name: "x-debug-block-dirty-bitmap-sha256",
        arguments: &DIRTY_BITMAP,
        returns: Type::Object(&DIRTY_BITMAP_SHA256),
    },
    Command { name: "x-debug-query-block-graph", arguments: &NOTHING, returns: Type::Object(&BLOCK_GRAPH) },
    Command { name: "block-stream", arguments: &BLOCK_STREAM_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "block-commit", arguments: &BLOCK_COMMIT_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "drive-mirror", arguments: &DRIVE_MIRROR_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "blockdev-mirror", arguments: &BLOCKDEV_MIRROR_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "drive-backup", arguments: &DRIVE_BACKUP_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "blockdev-backup", arguments: &BLOCKDEV_BACKUP_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "block-job-change", arguments: &BLOCK_JOB_CHANGE_ARG, returns: Type::Object(&NOTHING) },
    Command {
        name: "block-job-set-speed",
        arguments: &BLOCK_JOB_SET_SPEED_ARG,
        returns: Type::Object(&NOTHING),
    },
    Command { name: "block-job-pause", arguments: &BLOCK_JOB_PAUSE_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "block-job-resume", arguments: &BLOCK_JOB_RESUME_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "block-job-cancel", arguments: &BLOCK_JOB_CANCEL_ARG, returns: Type::Object(&NOTHING) },
    Command {
        name: "block-job-complete",
        arguments: &BLOCK_JOB_COMPLETE_ARG,
        returns: Type::Object(&NOTHING),
    },
    Command {
        name: "block-job-finalize",
        arguments: &BLOCK_JOB_FINALIZE_ARG,
        returns: Type::Object(&NOTHING),
    },
    Command { name: "block-job-dismiss", arguments: &BLOCK_JOB_DISMISS_ARG, returns: Type::Object(&NOTHING) },
    Command {
        name: "query-block-jobs",
        arguments: &NOTHING,
        returns: Type::List(&Type::Object(&QUERY_BLOCK_JOBS_RET)),
    },
    Command { name: "job-pause", arguments: &JOB_PAUSE_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "job-resume", arguments: &JOB_RESUME_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "job-cancel", arguments: &JOB_CANCEL_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "job-complete", arguments: &JOB_COMPLETE_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "job-finalize", arguments: &JOB_FINALIZE_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "job-dismiss", arguments: &JOB_DISMISS_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "query-jobs", arguments: &NOTHING, returns: Type::List(&Type::Object(&QUERY_JOBS_RET)) },
    Command { name: "nbd-server-start", arguments: &NBD_SERVER_START_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "nbd-server-add", arguments: &NBD_SERVER_ADD_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "nbd-server-remove", arguments: &NBD_SERVER_REMOVE_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "nbd-server-stop", arguments: &NOTHING, returns: Type::Object(&NOTHING) },
    Command { name: "block-export-add", arguments: &BLOCK_EXPORT_OPTIONS, returns: Type::Object(&NOTHING) },
    Command { name: "block-export-del", arguments: &BLOCK_EXPORT_DEL_ARG, returns: Type::Object(&NOTHING) },
    Command {
        name: "query-block-exports",
        arguments: &NOTHING,
        returns: Type::List(&Type::Object(&QUERY_BLOCK_EXPORTS_RET)),
    },
];

/// All events.
pub static EVENTS: &[Event] = &[
    Event { name: "JOB_STATUS_CHANGE", data: &JOB_STATUS_CHANGE_DATA },
    Event { name: "BLOCK_JOB_READY", data: &BLOCK_JOB_READY_DATA },
    Event { name: "BLOCK_JOB_PENDING", data: &BLOCK_JOB_PENDING_DATA },
    Event { name: "BLOCK_JOB_COMPLETED", data: &BLOCK_JOB_COMPLETED_DATA },
    Event { name: "BLOCK_JOB_CANCELLED", data: &BLOCK_JOB_CANCELLED_DATA },
    Event { name: "BLOCK_JOB_ERROR", data: &BLOCK_JOB_ERROR_DATA },
    Event { name: "BLOCK_EXPORT_DELETED", data: &BLOCK_EXPORT_DELETED_DATA },
    Event { name: "BLOCK_WRITE_THRESHOLD", data: &BLOCK_WRITE_THRESHOLD_DATA },
    Event { name: "BLOCK_IMAGE_CORRUPTED", data: &BLOCK_IMAGE_CORRUPTED_DATA },
];

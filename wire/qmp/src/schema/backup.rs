//! The parts of the commands and nodes about backups.

use super::bitmaps::DIRTY_BITMAP;
use super::defs::{BLOCKDEV_REF, BLOCKDEV_SNAPSHOT_SYNC_ARG_MODE};
use super::jobs::{BLOCKDEV_ON_ERROR, MIRROR_SYNC_MODE};
use super::ty::{Enum, Object, Type, opt, req};

pub(super) static BITMAP_SYNC_MODE: Enum = Enum { values: &["on-success", "never", "always"] };

pub(super) static ON_CBW_ERROR: Enum = Enum { values: &["break-guest-write", "break-snapshot"] };

pub(super) static BACKUP_PERF: Object = Object {
    members: &[
        opt("use-copy-range", Type::Bool),
        opt("max-workers", Type::Int),
        opt("max-chunk", Type::Int),
        opt("min-cluster-size", Type::U64),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCKDEV_BACKUP_ARG: Object = Object {
    members: &[
        opt("job-id", Type::Str),
        req("device", Type::Str),
        req("sync", Type::Enum(&MIRROR_SYNC_MODE)),
        opt("speed", Type::Int),
        opt("bitmap", Type::Str),
        opt("bitmap-mode", Type::Enum(&BITMAP_SYNC_MODE)),
        opt("compress", Type::Bool),
        opt("on-source-error", Type::Enum(&BLOCKDEV_ON_ERROR)),
        opt("on-target-error", Type::Enum(&BLOCKDEV_ON_ERROR)),
        // Not of 10.0.2 but of later versions.
        opt("on-cbw-error", Type::Enum(&ON_CBW_ERROR)),
        opt("auto-finalize", Type::Bool),
        opt("auto-dismiss", Type::Bool),
        opt("filter-node-name", Type::Str),
        opt("discard-source", Type::Bool),
        opt("x-perf", Type::Object(&BACKUP_PERF)),
        req("target", Type::Str),
    ],
    tag: None,
    cases: &[],
};

pub(super) static DRIVE_BACKUP_ARG: Object = Object {
    members: &[
        opt("job-id", Type::Str),
        req("device", Type::Str),
        req("sync", Type::Enum(&MIRROR_SYNC_MODE)),
        opt("speed", Type::Int),
        opt("bitmap", Type::Str),
        opt("bitmap-mode", Type::Enum(&BITMAP_SYNC_MODE)),
        opt("compress", Type::Bool),
        opt("on-source-error", Type::Enum(&BLOCKDEV_ON_ERROR)),
        opt("on-target-error", Type::Enum(&BLOCKDEV_ON_ERROR)),
        // Not of 10.0.2 but of later versions.
        opt("on-cbw-error", Type::Enum(&ON_CBW_ERROR)),
        opt("auto-finalize", Type::Bool),
        opt("auto-dismiss", Type::Bool),
        opt("filter-node-name", Type::Str),
        opt("discard-source", Type::Bool),
        opt("x-perf", Type::Object(&BACKUP_PERF)),
        req("target", Type::Str),
        opt("format", Type::Str),
        opt("mode", Type::Enum(&BLOCKDEV_SNAPSHOT_SYNC_ARG_MODE)),
    ],
    tag: None,
    cases: &[],
};

pub(super) static TRANSACTION_BLOCKDEV_BACKUP: Object =
    Object { members: &[req("data", Type::Object(&BLOCKDEV_BACKUP_ARG))], tag: None, cases: &[] };

pub(super) static TRANSACTION_DRIVE_BACKUP: Object =
    Object { members: &[req("data", Type::Object(&DRIVE_BACKUP_ARG))], tag: None, cases: &[] };

pub(super) static BLOCKDEV_OPTIONS_CBW: Object = Object {
    members: &[
        req("file", Type::Alternate(&BLOCKDEV_REF)),
        req("target", Type::Alternate(&BLOCKDEV_REF)),
        opt("bitmap", Type::Object(&DIRTY_BITMAP)),
        opt("on-cbw-error", Type::Enum(&ON_CBW_ERROR)),
        opt("cbw-timeout", Type::U32),
        opt("min-cluster-size", Type::U64),
    ],
    tag: None,
    cases: &[],
};

pub(super) static BLOCKDEV_OPTIONS_SNAPSHOT_ACCESS: Object =
    Object { members: &[req("file", Type::Alternate(&BLOCKDEV_REF))], tag: None, cases: &[] };

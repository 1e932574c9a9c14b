//! The parts of object-add, object-del and of the commands that look at objects.

use super::ty::{Enum, Object, Type, opt, req};

static OBJECT_TYPE: Enum = Enum { values: &["iothread", "throttle-group"] };

pub(super) static OBJECT_OPTIONS: Object = Object {
    members: &[req("qom-type", Type::Enum(&OBJECT_TYPE)), req("id", Type::Str)],
    tag: Some("qom-type"),
    cases: &[("iothread", &IOTHREAD_PROPERTIES), ("throttle-group", &THROTTLE_GROUP_PROPERTIES)],
};

static IOTHREAD_PROPERTIES: Object = Object {
    members: &[
        opt("aio-max-batch", Type::Int),
        opt("thread-pool-min", Type::Int),
        opt("thread-pool-max", Type::Int),
        opt("poll-max-ns", Type::Int),
        opt("poll-grow", Type::Int),
        opt("poll-shrink", Type::Int),
    ],
    tag: None,
    cases: &[],
};

pub(super) static THROTTLE_LIMITS: Object = Object {
    members: &[
        opt("iops-total", Type::Int),
        opt("iops-total-max", Type::Int),
        opt("iops-total-max-length", Type::Int),
        opt("iops-read", Type::Int),
        opt("iops-read-max", Type::Int),
        opt("iops-read-max-length", Type::Int),
        opt("iops-write", Type::Int),
        opt("iops-write-max", Type::Int),
        opt("iops-write-max-length", Type::Int),
        opt("bps-total", Type::Int),
        opt("bps-total-max", Type::Int),
        opt("bps-total-max-length", Type::Int),
        opt("bps-read", Type::Int),
        opt("bps-read-max", Type::Int),
        opt("bps-read-max-length", Type::Int),
        opt("bps-write", Type::Int),
        opt("bps-write-max", Type::Int),
        opt("bps-write-max-length", Type::Int),
        opt("iops-size", Type::Int),
    ],
    tag: None,
    cases: &[],
};

static THROTTLE_GROUP_PROPERTIES: Object = Object {
    members: &[
        opt("limits", Type::Object(&THROTTLE_LIMITS)),
        opt("x-iops-total", Type::Int),
        opt("x-iops-total-max", Type::Int),
        opt("x-iops-total-max-length", Type::Int),
        opt("x-iops-read", Type::Int),
        opt("x-iops-read-max", Type::Int),
        opt("x-iops-read-max-length", Type::Int),
        opt("x-iops-write", Type::Int),
        opt("x-iops-write-max", Type::Int),
        opt("x-iops-write-max-length", Type::Int),
        opt("x-bps-total", Type::Int),
        opt("x-bps-total-max", Type::Int),
        opt("x-bps-total-max-length", Type::Int),
        opt("x-bps-read", Type::Int),
        opt("x-bps-read-max", Type::Int),
        opt("x-bps-read-max-length", Type::Int),
        opt("x-bps-write", Type::Int),
        opt("x-bps-write-max", Type::Int),
        opt("x-bps-write-max-length", Type::Int),
        opt("x-iops-size", Type::Int),
    ],
    tag: None,
    cases: &[],
};

/// A property of objects that is set at any time.
pub(super) static LIMITS_PROPERTY: Object =
    Object { members: &[req("limits", Type::Object(&THROTTLE_LIMITS))], tag: None, cases: &[] };

pub(super) static OBJECT_DEL_ARG: Object = Object { members: &[req("id", Type::Str)], tag: None, cases: &[] };

pub(super) static QOM_LIST_ARG: Object = Object { members: &[req("path", Type::Str)], tag: None, cases: &[] };

pub(super) static OBJECT_PROPERTY_INFO: Object = Object {
    members: &[
        req("name", Type::Str),
        req("type", Type::Str),
        opt("description", Type::Str),
        opt("default-value", Type::Any),
    ],
    tag: None,
    cases: &[],
};

pub(super) static QOM_LIST_TYPES_ARG: Object =
    Object { members: &[opt("implements", Type::Str), opt("abstract", Type::Bool)], tag: None, cases: &[] };

pub(super) static OBJECT_TYPE_INFO: Object = Object {
    members: &[req("name", Type::Str), opt("abstract", Type::Bool), opt("parent", Type::Str)],
    tag: None,
    cases: &[],
};

pub(super) static TYPENAME_ARG: Object =
    Object { members: &[req("typename", Type::Str)], tag: None, cases: &[] };

pub(super) static QOM_GET_ARG: Object =
    Object { members: &[req("path", Type::Str), req("property", Type::Str)], tag: None, cases: &[] };

pub(super) static QOM_SET_ARG: Object = Object {
    members: &[req("path", Type::Str), req("property", Type::Str), req("value", Type::Any)],
    tag: None,
    cases: &[],
};

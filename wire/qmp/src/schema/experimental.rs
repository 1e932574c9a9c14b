//! The parts of commands that the reference has on trial.

use super::defs::BLOCKDEV_DRIVER;
use super::ty::{Alternate, Enum, Object, Type, opt, req};

static ENCRYPTION_FORMAT: Enum = Enum { values: &["luks"] };

static KEYSLOT_STATE: Enum = Enum { values: &["active", "inactive"] };

static AMEND_LUKS: Object = Object {
    members: &[
        req("state", Type::Enum(&KEYSLOT_STATE)),
        opt("new-secret", Type::Str),
        opt("old-secret", Type::Str),
        opt("keyslot", Type::Int),
        opt("iter-time", Type::Int),
        opt("secret", Type::Str),
    ],
    tag: None,
    cases: &[],
};

static AMEND_ENCRYPTION: Object = Object {
    members: &[req("format", Type::Enum(&ENCRYPTION_FORMAT))],
    tag: Some("format"),
    cases: &[("luks", &AMEND_LUKS)],
};

static AMEND_QCOW2: Object =
    Object { members: &[opt("encrypt", Type::Object(&AMEND_ENCRYPTION))], tag: None, cases: &[] };

static AMEND_OPTIONS: Object = Object {
    members: &[req("driver", Type::Enum(&BLOCKDEV_DRIVER))],
    tag: Some("driver"),
    cases: &[("qcow2", &AMEND_QCOW2)],
};

pub(super) static X_BLOCKDEV_AMEND_ARG: Object = Object {
    members: &[
        req("job-id", Type::Str),
        req("node-name", Type::Str),
        req("options", Type::Object(&AMEND_OPTIONS)),
        opt("force", Type::Bool),
    ],
    tag: None,
    cases: &[],
};

pub(super) static X_BLOCKDEV_CHANGE_ARG: Object = Object {
    members: &[req("parent", Type::Str), opt("child", Type::Str), opt("node", Type::Str)],
    tag: None,
    cases: &[],
};

static STR_OR_NULL: Alternate = Alternate { name: "StrOrNull", choices: &[Type::Str, Type::Null] };

pub(super) static X_BLOCKDEV_SET_IOTHREAD_ARG: Object = Object {
    members: &[
        req("node-name", Type::Str),
        req("iothread", Type::Alternate(&STR_OR_NULL)),
        opt("force", Type::Bool),
    ],
    tag: None,
    cases: &[],
};

//! The commands about dirty bitmaps.

use super::ty::{Alternate, Object, Type, opt, req};

pub(super) static DIRTY_BITMAP: Object =
    Object { members: &[req("node", Type::Str), req("name", Type::Str)], tag: None, cases: &[] };

pub(super) static DIRTY_BITMAP_OR_STR: Alternate =
    Alternate { name: "BlockDirtyBitmapOrStr", choices: &[Type::Str, Type::Object(&DIRTY_BITMAP)] };

pub(super) static DIRTY_BITMAP_ADD: Object = Object {
    members: &[
        req("node", Type::Str),
        req("name", Type::Str),
        opt("granularity", Type::U32),
        opt("persistent", Type::Bool),
        opt("disabled", Type::Bool),
    ],
    tag: None,
    cases: &[],
};

pub(super) static DIRTY_BITMAP_MERGE: Object = Object {
    members: &[
        req("node", Type::Str),
        req("target", Type::Str),
        req("bitmaps", Type::List(&Type::Alternate(&DIRTY_BITMAP_OR_STR))),
    ],
    tag: None,
    cases: &[],
};

pub(super) static DIRTY_BITMAP_SHA256: Object =
    Object { members: &[req("sha256", Type::Str)], tag: None, cases: &[] };

pub(super) static TRANSACTION_BITMAP_ADD: Object =
    Object { members: &[req("data", Type::Object(&DIRTY_BITMAP_ADD))], tag: None, cases: &[] };

pub(super) static TRANSACTION_BITMAP: Object =
    Object { members: &[req("data", Type::Object(&DIRTY_BITMAP))], tag: None, cases: &[] };

pub(super) static TRANSACTION_BITMAP_MERGE: Object =
    Object { members: &[req("data", Type::Object(&DIRTY_BITMAP_MERGE))], tag: None, cases: &[] };

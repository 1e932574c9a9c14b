//! The parts of blockdev-create.

use super::defs::{BLOCKDEV_DRIVER, BLOCKDEV_OPTIONS_QCOW2_ENCRYPT_KEY, BLOCKDEV_REF};
use super::ty::{Enum, Object, Type, opt, req};

pub(super) static BLOCKDEV_CREATE_ARG: Object = Object {
    members: &[req("job-id", Type::Str), req("options", Type::Object(&BLOCKDEV_CREATE_OPTIONS))],
    tag: None,
    cases: &[],
};

static BLOCKDEV_CREATE_OPTIONS: Object = Object {
    members: &[req("driver", Type::Enum(&BLOCKDEV_DRIVER))],
    tag: Some("driver"),
    cases: &[("file", &BLOCKDEV_CREATE_OPTIONS_FILE), ("qcow2", &BLOCKDEV_CREATE_OPTIONS_QCOW2)],
};

static PREALLOC_MODE: Enum = Enum { values: &["off", "metadata", "falloc", "full"] };

static BLOCKDEV_CREATE_OPTIONS_FILE: Object = Object {
    members: &[
        req("filename", Type::Str),
        req("size", Type::U64),
        opt("preallocation", Type::Enum(&PREALLOC_MODE)),
        opt("nocow", Type::Bool),
        opt("extent-size-hint", Type::U64),
    ],
    tag: None,
    cases: &[],
};

static BLOCKDEV_QCOW2_VERSION: Enum = Enum { values: &["v2", "v3"] };

static QCOW2_COMPRESSION_TYPE: Enum = Enum { values: &["zlib", "zstd"] };

static QCRYPTO_BLOCK_FORMAT: Enum = Enum { values: &["qcow", "luks"] };

static QCRYPTO_BLOCK_CREATE_OPTIONS: Object = Object {
    members: &[req("format", Type::Enum(&QCRYPTO_BLOCK_FORMAT))],
    tag: Some("format"),
    cases: &[("qcow", &BLOCKDEV_OPTIONS_QCOW2_ENCRYPT_KEY), ("luks", &BLOCKDEV_OPTIONS_QCOW2_ENCRYPT_KEY)],
};

static BLOCKDEV_CREATE_OPTIONS_QCOW2: Object = Object {
    members: &[
        req("file", Type::Alternate(&BLOCKDEV_REF)),
        opt("data-file", Type::Alternate(&BLOCKDEV_REF)),
        opt("data-file-raw", Type::Bool),
        opt("extended-l2", Type::Bool),
        req("size", Type::U64),
        opt("version", Type::Enum(&BLOCKDEV_QCOW2_VERSION)),
        opt("backing-file", Type::Str),
        opt("backing-fmt", Type::Enum(&BLOCKDEV_DRIVER)),
        opt("encrypt", Type::Object(&QCRYPTO_BLOCK_CREATE_OPTIONS)),
        opt("cluster-size", Type::U64),
        opt("preallocation", Type::Enum(&PREALLOC_MODE)),
        opt("lazy-refcounts", Type::Bool),
        opt("refcount-bits", Type::Int),
        opt("compression-type", Type::Enum(&QCOW2_COMPRESSION_TYPE)),
    ],
    tag: None,
    cases: &[],
};

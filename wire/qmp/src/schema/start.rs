//! The types of options that only a command line takes.

use super::defs::SOCKET_ADDRESS_FLAT;
use super::ty::{Enum, Object, Type, opt, req};

static MONITOR_MODE: Enum = Enum { values: &["readline", "control"] };

pub(super) static MONITOR_OPTIONS: Object = Object {
    members: &[
        opt("id", Type::Str),
        opt("mode", Type::Enum(&MONITOR_MODE)),
        opt("pretty", Type::Bool),
        req("chardev", Type::Str),
    ],
    tag: None,
    cases: &[],
};

/// As nbd-server-start takes them, but with a flat address.
pub(super) static NBD_SERVER_OPTIONS: Object = Object {
    members: &[
        opt("handshake-max-seconds", Type::U32),
        opt("tls-creds", Type::Str),
        opt("tls-authz", Type::Str),
        opt("max-connections", Type::U32),
        req("addr", Type::Object(&SOCKET_ADDRESS_FLAT)),
    ],
    tag: None,
    cases: &[],
};

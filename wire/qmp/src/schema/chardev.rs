//! The parts of the commands about character devices.

use super::defs::{NOTHING, SOCKET_ADDRESS};
use super::ty::{Command, Enum, Object, Type, opt, req};

pub(super) static COMMANDS: &[Command] = &[
    Command { name: "query-chardev", arguments: &NOTHING, returns: Type::List(&Type::Object(&CHARDEV_INFO)) },
    Command {
        name: "query-chardev-backends",
        arguments: &NOTHING,
        returns: Type::List(&Type::Object(&CHARDEV_BACKEND_INFO)),
    },
    Command { name: "chardev-add", arguments: &CHARDEV_ADD_ARG, returns: Type::Object(&CHARDEV_RETURN) },
    Command { name: "chardev-change", arguments: &CHARDEV_ADD_ARG, returns: Type::Object(&CHARDEV_RETURN) },
    Command { name: "chardev-remove", arguments: &CHARDEV_ID_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "chardev-send-break", arguments: &CHARDEV_ID_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "ringbuf-write", arguments: &RINGBUF_WRITE_ARG, returns: Type::Object(&NOTHING) },
    Command { name: "ringbuf-read", arguments: &RINGBUF_READ_ARG, returns: Type::Str },
];

static CHARDEV_INFO: Object = Object {
    members: &[req("label", Type::Str), req("filename", Type::Str), req("frontend-open", Type::Bool)],
    tag: None,
    cases: &[],
};

static CHARDEV_BACKEND_INFO: Object = Object { members: &[req("name", Type::Str)], tag: None, cases: &[] };

static CHARDEV_RETURN: Object = Object { members: &[opt("pty", Type::Str)], tag: None, cases: &[] };

static CHARDEV_ID_ARG: Object = Object { members: &[req("id", Type::Str)], tag: None, cases: &[] };

static CHARDEV_ADD_ARG: Object = Object {
    members: &[req("id", Type::Str), req("backend", Type::Object(&CHARDEV_BACKEND))],
    tag: None,
    cases: &[],
};

static BACKEND_KIND: Enum =
    Enum { values: &["file", "pipe", "socket", "pty", "null", "mux", "stdio", "ringbuf", "memory"] };

static CHARDEV_BACKEND: Object = Object {
    members: &[req("type", Type::Enum(&BACKEND_KIND))],
    tag: Some("type"),
    cases: &[
        ("file", &FILE_WRAPPER),
        ("pipe", &PIPE_WRAPPER),
        ("socket", &SOCKET_WRAPPER),
        ("pty", &PTY_WRAPPER),
        ("null", &COMMON_WRAPPER),
        ("mux", &MUX_WRAPPER),
        ("stdio", &STDIO_WRAPPER),
        ("ringbuf", &RINGBUF_WRAPPER),
        ("memory", &RINGBUF_WRAPPER),
    ],
};

macro_rules! wrapped {
    ($wrapper:ident, $inner:ident: $($member:expr),*) => {
        static $wrapper: Object =
            Object { members: &[req("data", Type::Object(&$inner))], tag: None, cases: &[] };

        static $inner: Object = Object {
            members: &[opt("logfile", Type::Str), opt("logappend", Type::Bool), $($member),*],
            tag: None,
            cases: &[],
        };
    };
}

wrapped!(COMMON_WRAPPER, COMMON:);
wrapped!(FILE_WRAPPER, FILE: opt("in", Type::Str), req("out", Type::Str), opt("append", Type::Bool));
wrapped!(PIPE_WRAPPER, PIPE: req("device", Type::Str));
wrapped!(PTY_WRAPPER, PTY: opt("path", Type::Str));
wrapped!(MUX_WRAPPER, MUX: req("chardev", Type::Str));
wrapped!(STDIO_WRAPPER, STDIO: opt("signal", Type::Bool));
wrapped!(RINGBUF_WRAPPER, RINGBUF: opt("size", Type::Int));
wrapped!(SOCKET_WRAPPER, SOCKET:
    req("addr", Type::Object(&SOCKET_ADDRESS)),
    opt("tls-creds", Type::Str),
    opt("tls-authz", Type::Str),
    opt("server", Type::Bool),
    opt("wait", Type::Bool),
    opt("nodelay", Type::Bool),
    opt("telnet", Type::Bool),
    opt("tn3270", Type::Bool),
    opt("websocket", Type::Bool),
    opt("reconnect", Type::Int),
    opt("reconnect-ms", Type::Int)
);

static DATA_FORMAT: Enum = Enum { values: &["utf8", "base64"] };

static RINGBUF_WRITE_ARG: Object = Object {
    members: &[req("device", Type::Str), req("data", Type::Str), opt("format", Type::Enum(&DATA_FORMAT))],
    tag: None,
    cases: &[],
};

static RINGBUF_READ_ARG: Object = Object {
    members: &[req("device", Type::Str), req("size", Type::Int), opt("format", Type::Enum(&DATA_FORMAT))],
    tag: None,
    cases: &[],
};

//! What may be said over QMP: one description of every command and event, from which arguments are checked and
//! `query-qmp-schema` is answered.

mod backup;
mod bitmaps;
pub mod check;
mod commands;
mod create;
mod defs;
pub mod introspect;
mod jobs;
mod objects;
mod start;
pub mod ty;

pub use check::{ArgumentError, Input, check};
pub use commands::{COMMANDS, EVENTS};

/// The command called `name`.
pub fn command(name: &str) -> Option<&'static ty::Command> {
    COMMANDS.iter().find(|command| command.name == name)
}

/// The options of block nodes: what blockdev-add and `--blockdev` take.
pub fn blockdev_options() -> &'static ty::Object {
    &defs::BLOCKDEV_OPTIONS
}

/// The options of `--monitor`.
pub fn monitor_options() -> &'static ty::Object {
    &start::MONITOR_OPTIONS
}

/// The options of `--nbd-server`.
pub fn nbd_server_options() -> &'static ty::Object {
    &start::NBD_SERVER_OPTIONS
}

/// The options of exports: what block-export-add and `--export` take.
pub fn block_export_options() -> &'static ty::Object {
    &defs::BLOCK_EXPORT_OPTIONS
}

/// The options of objects: what object-add and `--object` take.
pub fn object_options() -> &'static ty::Object {
    &objects::OBJECT_OPTIONS
}

/// An object with the property `limits` of throttle groups, for qom-set.
pub fn limits_property() -> &'static ty::Object {
    &objects::LIMITS_PROPERTY
}

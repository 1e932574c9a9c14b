//! What may be said over QMP: one description of every command and event, from which arguments are checked and
//! `query-qmp-schema` is answered.

mod backup;
mod bitmaps;
mod chardev;
pub mod check;
mod commands;
mod create;
mod defs;
mod experimental;
pub mod introspect;
mod jobs;
mod machine;
mod objects;
mod query;
mod start;
pub mod ty;

pub use check::{ArgumentError, Input, check};

/// Who is talked to: not everybody has all commands and events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Program {
    /// `qemu-storage-daemon`
    #[default]
    StorageDaemon,
    /// `qemu-system-x86_64`: what the storage daemon has, and more.
    Machine,
}

impl Program {
    /// All commands.
    pub fn commands(self) -> impl Iterator<Item = &'static ty::Command> {
        let more = if self == Self::Machine { machine::COMMANDS } else { &[] };
        commands::COMMANDS.iter().chain(chardev::COMMANDS).chain(more)
    }

    /// All events.
    pub fn events(self) -> impl Iterator<Item = &'static ty::Event> {
        let more = if self == Self::Machine { machine::EVENTS } else { &[] };
        commands::EVENTS.iter().chain(more)
    }

    /// The command called `name`.
    pub fn command(self, name: &str) -> Option<&'static ty::Command> {
        self.commands().find(|command| command.name == name)
    }
}

/// Whether a command has arguments that only its handler knows.
pub fn takes_more(command: &str) -> bool {
    command == "device_add"
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

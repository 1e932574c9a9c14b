//! Drives that come and go while the machine is there: `drive_add`, `drive_del` of the human monitor.

use underlay_graph::Plan;
use underlay_graph::units::is_well_formed_id;
use underlay_qmp::json::Value;
use underlay_qmp::option_list;
use underlay_sys::complain;

use super::Machine;
use super::args::{DriveWords, Typed};
use super::drive::{self, Drive, Place};
use crate::command::lookup::Names;
use crate::command::{blockdev, export, object};
use crate::device::guest::Policies;
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// The kinds of `if=`, by the numbers that messages have for them.
const KINDS: [&str; 9] = ["none", "ide", "scsi", "floppy", "pflash", "mtd", "sd", "virtio", "xen"];

/// Adds a drive, as `-drive` does with the same words. It must be one without a device of its own.
pub async fn add(daemon: &Daemon, machine: &Machine, words: &str) -> CommandResult<()> {
    let options = option_list::parse(words, None).options;
    if let Some(id) = options.get("id").and_then(Value::as_str) {
        if !is_well_formed_id(id) {
            return Err(object::bad_id());
        }
        if machine.devices.named(id).is_some() {
            return Err(CommandError::new(format!("Duplicate ID '{id}' for drive")));
        }
    }
    let kind = options.get("if").and_then(Value::as_str).unwrap_or("ide");
    match KINDS.iter().position(|known| *known == kind) {
        Some(0) | None => {}
        Some(number) => return Err(CommandError::new(format!("Can't hot-add drive to type {number}"))),
    }
    // Names that are given without being asked for go on where they are.
    let counted = |name: String| {
        let number = name.strip_prefix("none")?.parse().ok()?;
        Some(Drive { name, place: Place::None(number) })
    };
    let others: Vec<_> =
        machine.devices.backends().into_iter().filter_map(|backend| counted(backend.name)).collect();
    let given = Typed { typed: String::new(), value: DriveWords { options, default_bus: "ide" } };
    drive::open(daemon, machine, false, given, &others, &|text| complain!("{text}")).await.map(drop)
}

/// Takes a drive away; a device that has it stays, empty. A node of blockdev-add goes as with blockdev-del.
pub async fn del(daemon: &Daemon, machine: &Machine, name: &str) -> CommandResult<()> {
    let plan = daemon.graph.plan();
    let Some(backend) = machine.devices.named(name) else {
        return match plan.find(name) {
            Some(_) => blockdev::del(daemon, name).await,
            None => Err(CommandError::new(format!("Device '{name}' not found"))),
        };
    };
    if let Some(disk) = backend.disk(&plan) {
        Names::of(daemon).not_busy(&plan, disk, name)?;
    }
    drop(plan);
    export::close_guests(daemon, backend.id).await?;
    let edit = |plan: &mut Plan| {
        if let Some(medium) = backend.medium {
            plan.remove_root(medium);
        }
        Ok(())
    };
    daemon.graph.change(edit).await?;
    if backend.device.is_none() {
        machine.devices.remove_backend(backend.id);
        return Ok(());
    }
    machine.devices.edit(backend.id, |backend| {
        (backend.name, backend.medium) = (String::new(), None);
        // Whoever still has the device is told of every error.
        backend.io.set_policies(Policies::REPORT);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use underlay_qmp::json::Object;
    use underlay_sys::thread::block_on;

    use super::super::args::Setting;
    use super::*;
    use crate::device::given::{Given, Input};
    use crate::device::plug;

    async fn said(daemon: &Daemon, machine: &Machine, line: &str) -> String {
        let (command, words) = line.split_once(' ').expect("a command and more");
        let done = match command {
            "drive_add" => add(daemon, machine, words).await,
            "drive_del" => del(daemon, machine, words).await,
            _ => {
                let options =
                    Object::new().with("driver", "virtio-blk").with("drive", words).with("id", words);
                let given = Given::read(options, Input::Json).expect("a device");
                plug::plug(daemon, machine, given, &|_| {}).await
            }
        };
        done.map_or_else(|error| error.desc, |()| String::new())
    }

    /// The texts are those of the reference's human monitor.
    #[test]
    fn drives_come_and_go() {
        let machine = Machine::new(&Setting::default());
        let daemon = Daemon::start(Some(machine.clone())).expect("threads");
        block_on(async {
            for (line, text) in [
                ("drive_add if=none,id=x,driver=null-co", ""),
                ("drive_add if=none,id=x,driver=null-co", "Duplicate ID 'x' for drive"),
                ("drive_add driver=null-co", "Can't hot-add drive to type 1"),
                ("drive_add if=virtio,driver=null-co", "Can't hot-add drive to type 7"),
                ("drive_add if=none,file=nope", "Could not open 'nope': No such file or directory"),
                ("drive_add if=none,id=y,werror=foo", "'foo' invalid write error action"),
                ("drive_add if=none,driver=null-co", ""),
                ("drive_add if=none,driver=null-co", ""),
                ("drive_del none1", ""),
                ("drive_del none1", "Device 'none1' not found"),
                ("device_add x", ""),
                ("drive_del x", ""),
                ("drive_del nope", "Device 'nope' not found"),
            ] {
                assert_eq!(said(&daemon, &machine, line).await, text, "{line}");
            }
            let backends = machine.devices.backends();
            let names: Vec<_> =
                backends.iter().map(|backend| (&*backend.name, backend.medium.is_some())).collect();
            assert_eq!(
                names,
                [("", false), ("none0", true)],
                "the device is empty, and the first of two drives is there"
            );
            assert_eq!(daemon.graph.plan().nodes().count(), 1);
            daemon.shut_down().await;
        });
    }
}

//! From a command line to a machine that is ready: kind by kind, each in the order in which it was given.

use std::sync::Arc;

use underlay_qmp::json::Object;
use underlay_sys::complain;

use super::Machine;
use super::args::{Setting, Typed};
use super::drive::{self, Drive, Place};
use super::running::RunState;
use crate::command::arguments::Arguments;
use crate::command::{blockdev, export, object};
use crate::device::given::{Given, Input};
use crate::device::plug;
use crate::error::CommandError;
use crate::life::{self, Ready};
use crate::monitor;
use crate::state::Daemon;
use crate::storage_daemon::has_empty_backing;

/// Carries out what a command line asks for.
pub async fn set_up(
    daemon: &Arc<Daemon>,
    machine: &Arc<Machine>,
    name: &str,
    setting: Setting,
) -> Result<Ready, String> {
    let remark = |typed: &str, text: &str| complain!("{name}: {typed}: {text}");
    let Setting { objects, chardevs, blockdevs, drives, monitors, devices, .. } = setting;
    for Typed { typed, value } in objects {
        object::add(daemon, Arguments::new(value)).map_err(|error| told(&typed, &error))?;
    }
    for Typed { typed, value } in chardevs {
        let added = daemon.chardevs.add(value, &|text| remark(&typed, text)).await;
        added.map_err(|error| told(&typed, &error))?;
    }
    for Typed { typed, value } in blockdevs {
        if has_empty_backing(&value) {
            let text = "Use of \"backing\": \"\" is deprecated; use \"backing\": null instead";
            remark(&typed, &format!("warning: {text}"));
        }
        blockdev::add(daemon, value).await.map_err(|error| told(&typed, &error))?;
    }
    let mut opened: Vec<Drive> = Vec::new();
    for given in drives {
        let typed = given.typed.clone();
        // The reference says this of nobody.
        let drive =
            drive::open(daemon, machine, setting.snapshot, given, &opened, &|text| complain!("{text}")).await;
        opened.push(drive.map_err(|error| told(&typed, &error))?);
    }
    for Typed { typed, value } in monitors {
        let taken = daemon.chardevs.take_for_monitor(Arguments::new(value), "readline");
        let (backend, mode) = taken.map_err(|error| told(&typed, &error))?;
        monitor::serve(daemon, backend, mode);
    }
    plug_drives(daemon, machine, &opened, true).await?;
    for Typed { typed, value: (options, input) } in devices {
        let plugged = match Given::read(options, input) {
            Ok(given) => plug::plug(daemon, machine, given, &|text| remark(&typed, text)).await,
            Err(error) => Err(error),
        };
        plugged.map_err(|error| told(&typed, &error))?;
    }
    plug_drives(daemon, machine, &opened, false).await?;
    for Typed { typed, value } in setting.nbd_servers {
        let started = export::server_start(daemon, &mut Arguments::new(value));
        started.map_err(|error| told(&typed, &error))?;
    }
    for Typed { typed, value } in setting.exports {
        let mut arguments = Arguments::new(value);
        arguments.optional_text("type");
        export::add(daemon, &mut arguments).await.map_err(|error| told(&typed, &error))?;
    }
    if !setting.paused && !setting.incoming {
        machine.running.set(RunState::Running);
    }
    life::keep_pid(setting.pid_file)
}

fn told(typed: &str, error: &CommandError) -> String {
    format!("{typed}: {}", error.in_full())
}

/// Plugs in the devices of disks that bring their own: IDE drives come with the machine, virtio ones after all others.
async fn plug_drives(
    daemon: &Daemon,
    machine: &Machine,
    drives: &[Drive],
    of_machine: bool,
) -> Result<(), String> {
    let mut number = machine.first_drive();
    let mut drives: Vec<_> = drives.iter().collect();
    // Those that come with the machine are in the order of their places.
    drives.sort_by_key(|drive| match drive.place {
        Place::Ide { bus, unit, .. } => (bus, unit),
        _ => (u32::MAX, 0),
    });
    for drive in drives {
        let options = Object::new().with("drive", &*drive.name);
        let (options, place) = match drive.place {
            Place::Virtio(_) if !of_machine => (options.with("driver", "virtio-blk-pci"), None),
            Place::Ide { bus, unit, cd } if of_machine => {
                let path = format!("/machine/unattached/device[{number}]");
                number += 1;
                let model = if cd { "ide-cd" } else { "ide-hd" };
                let bus = format!("ide.{bus}");
                let options = options.with("driver", model).with("bus", bus).with("unit", unit.to_string());
                (options, Some(path))
            }
            _ => continue,
        };
        let plugged = match Given::read(options, Input::Words) {
            Ok(given) => plug::plug_at(daemon, machine, given, place, &|_| {}).await,
            Err(error) => Err(error),
        };
        plugged.map_err(|error| error.in_full())?;
    }
    Ok(())
}

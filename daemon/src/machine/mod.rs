//! `underlay machine`, also under the name `qemu-system-x86_64`: a machine without a CPU. It has what monitors see of
//! one: it runs or is stopped, and it has devices with disks in them. Guests come by exports.

mod args;
mod compat;
mod drive;
mod help;
pub mod hot;
mod intervals;
mod options;
pub mod running;
mod set_up;

use std::path::Path;
use std::sync::Arc;
use underlay_sys::{complain, say_part};

use crate::device::Devices;
use crate::device::given::Given;
use crate::device::model::Bus;
use crate::life;
use crate::state::Daemon;
use args::{Asked, Setting};
use running::{RunState, Running};

/// A machine, as commands see it.
#[derive(Debug)]
pub struct Machine {
    /// `-name`
    pub name: Option<String>,
    /// `-uuid`
    pub uuid: String,
    /// Whether it runs.
    pub running: Arc<Running>,
    /// What is plugged in.
    pub devices: Devices,
    /// The machine is of the younger of the two kinds.
    is_q35: bool,
}

impl Machine {
    fn new(setting: &Setting) -> Arc<Self> {
        let running = Arc::<Running>::default();
        if setting.incoming {
            running.set(RunState::InMigrate);
        }
        Arc::new(Self {
            name: setting.name.clone(),
            uuid: setting.uuid.clone(),
            running,
            devices: Devices::default(),
            is_q35: setting.is_q35,
        })
    }

    /// The buses of a kind that the machine has without further devices, the first choice first.
    pub fn own_buses(&self, kind: Bus) -> Vec<String> {
        let ide: &[&str] = match self.is_q35 {
            true => &["ide.0", "ide.1", "ide.2", "ide.3", "ide.4", "ide.5"],
            false => &["ide.1", "ide.0"],
        };
        let names = match kind {
            Bus::Pci if self.is_q35 => &["pcie.0"],
            Bus::Pci => &["pci.0"],
            Bus::Ide => ide,
            Bus::Scsi | Bus::Other => &[],
        };
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// The type of the machine among all objects.
    pub fn kind(&self) -> &'static str {
        if self.is_q35 { "pc-q35-10.0-machine" } else { "pc-i440fx-10.0-machine" }
    }

    /// Whether an IDE bus has room for one drive only.
    pub fn has_one_unit_per_ide_bus(&self) -> bool {
        self.is_q35
    }

    /// The place among all objects of the first drive that comes with the machine.
    fn first_drive(&self) -> u32 {
        if self.is_q35 { 13 } else { 4 }
    }
}

/// Runs the machine to its end; the exit status.
pub fn main(program: &str, words: &[String]) -> i32 {
    let name = Path::new(program).file_name().map_or(program.into(), |name| name.to_string_lossy());
    let result = args::parse(words).and_then(|asked| match asked {
        Asked::Text(text) => {
            say_part!("{}", text.replace("%s", program));
            Ok(())
        }
        Asked::Run(setting) => {
            setting.remarks.iter().for_each(|remark| complain!("{name}: {remark}"));
            let machine = Machine::new(&setting);
            let (daemonize, started) = (setting.daemonize, machine.clone());
            life::run(
                daemonize,
                || Daemon::start(Some(started)),
                async |daemon| set_up::set_up(&daemon, &machine, &name, *setting).await,
            )
        }
    });
    match result {
        Ok(()) => 0,
        Err(error) => {
            complain!("{name}: {error}");
            1
        }
    }
}

/// Reads a command line as far as that goes without carrying anything out; what is wrong with it, if that is found so
/// early.
pub fn understood(words: &[String]) -> Result<(), String> {
    let Asked::Run(setting) = args::parse(words)? else { return Ok(()) };
    for args::Typed { typed, value: (options, input) } in setting.devices {
        let read = Given::read(options, input).and_then(|mut given| given.check());
        read.map_err(|error| format!("{typed}: {}", error.in_full()))?;
    }
    Ok(())
}

//! The options that there are, by what becomes of them. The names are those of the reference.

/// What becomes of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is carried out.
    Works,
    /// It is about what a machine without a CPU does not have.
    NoEffect,
    /// It would have an effect that there is not.
    Refused,
}

/// An option: its name, whether a word follows it, and what becomes of it.
pub type Entry = (&'static str, bool, Fate);

use Fate::{NoEffect, Refused, Works};

static OPTIONS: [Entry; 114] = [
    // What disks are made of, and monitors.
    ("blockdev", true, Works),
    ("drive", true, Works),
    ("hda", true, Works),
    ("hdb", true, Works),
    ("hdc", true, Works),
    ("hdd", true, Works),
    ("cdrom", true, Works),
    ("snapshot", false, Works),
    ("device", true, Works),
    ("object", true, Works),
    ("chardev", true, Works),
    ("mon", true, Works),
    ("qmp", true, Works),
    ("qmp-pretty", true, Works),
    ("monitor", true, Works),
    // Underlay's own.
    ("nbd-server", true, Works),
    ("export", true, Works),
    // The machine as a whole.
    ("machine", true, Works),
    ("M", true, Works),
    ("name", true, Works),
    ("uuid", true, Works),
    ("S", false, Works),
    ("incoming", true, Works),
    ("display", true, Works),
    ("nographic", false, Works),
    ("nodefaults", false, Works),
    ("pidfile", true, Works),
    ("daemonize", false, Works),
    ("help", false, Works),
    ("h", false, Works),
    ("version", false, Works),
    // There are no configuration files that could be read.
    ("no-user-config", false, Works),
    ("nodefconfig", false, Works),
    // CPU and memory.
    ("accel", true, NoEffect),
    ("cpu", true, NoEffect),
    ("smp", true, NoEffect),
    ("numa", true, NoEffect),
    ("m", true, NoEffect),
    ("mem-path", true, NoEffect),
    ("mem-prealloc", false, NoEffect),
    ("overcommit", true, NoEffect),
    ("enable-kvm", false, NoEffect),
    ("icount", true, NoEffect),
    ("rtc", true, NoEffect),
    ("gdb", true, NoEffect),
    ("s", false, NoEffect),
    ("d", true, NoEffect),
    ("D", true, NoEffect),
    ("dfilter", true, NoEffect),
    ("seed", true, NoEffect),
    ("perfmap", false, NoEffect),
    ("jitdump", false, NoEffect),
    ("plugin", true, NoEffect),
    // Firmware and kernels.
    ("boot", true, NoEffect),
    ("bios", true, NoEffect),
    ("pflash", true, NoEffect),
    ("L", true, NoEffect),
    ("kernel", true, NoEffect),
    ("shim", true, NoEffect),
    ("append", true, NoEffect),
    ("initrd", true, NoEffect),
    ("dtb", true, NoEffect),
    ("option-rom", true, NoEffect),
    ("acpitable", true, NoEffect),
    ("smbios", true, NoEffect),
    ("fw_cfg", true, NoEffect),
    ("no-fd-bootchk", false, NoEffect),
    ("win2k-hack", false, NoEffect),
    ("tpmdev", true, NoEffect),
    // Displays and sound.
    ("vga", true, NoEffect),
    ("vnc", true, NoEffect),
    ("spice", true, NoEffect),
    ("full-screen", false, NoEffect),
    ("k", true, NoEffect),
    ("audio", true, NoEffect),
    ("audiodev", true, NoEffect),
    // Networks, serial lines, USB.
    ("netdev", true, NoEffect),
    ("nic", true, NoEffect),
    ("net", true, NoEffect),
    ("serial", true, NoEffect),
    ("parallel", true, NoEffect),
    ("debugcon", true, NoEffect),
    ("usb", false, NoEffect),
    ("usbdevice", true, NoEffect),
    // What a guest does at its end, and how the program is watched.
    ("no-reboot", false, NoEffect),
    ("no-shutdown", false, NoEffect),
    ("action", true, NoEffect),
    ("watchdog-action", true, NoEffect),
    ("echr", true, NoEffect),
    ("msg", true, NoEffect),
    ("global", true, NoEffect),
    ("compat", true, NoEffect),
    ("sandbox", true, NoEffect),
    ("only-migratable", false, NoEffect),
    ("enable-sync-profile", false, NoEffect),
    ("xen-domid", true, NoEffect),
    ("xen-attach", false, NoEffect),
    ("xen-domid-restrict", false, NoEffect),
    // Disks and more that nobody would find.
    ("fda", true, Refused),
    ("fdb", true, Refused),
    ("mtdblock", true, Refused),
    ("sd", true, Refused),
    ("fsdev", true, Refused),
    ("virtfs", true, Refused),
    ("iscsi", true, Refused),
    ("add-fd", true, Refused),
    ("set", true, Refused),
    ("readconfig", true, Refused),
    ("loadvm", true, Refused),
    ("preconfig", false, Refused),
    ("dump-vmstate", true, Refused),
    ("trace", true, Refused),
    ("run-with", true, Refused),
    ("qtest", true, Refused),
];

/// The option of that name.
pub fn find(name: &str) -> Option<&'static Entry> {
    OPTIONS.iter().find(|(known, ..)| *known == name)
}

/// Names of machines: those of the younger kind, the others, and one without anything.
pub fn machine(name: &str) -> Option<bool> {
    let version = |rest: &str| {
        let (major, minor) = rest.split_once('.')?;
        (major.parse::<u32>().ok()? < 100 && minor.parse::<u32>().is_ok()).then_some(())
    };
    match name {
        "q35" => Some(true),
        "pc" | "isapc" | "microvm" | "none" => Some(false),
        _ if name.strip_prefix("pc-q35-").and_then(version).is_some() => Some(true),
        _ if name.strip_prefix("pc-i440fx-").and_then(version).is_some() => Some(false),
        _ => None,
    }
}

/// The answer to `-machine help`.
pub const MACHINES: &str = "\
Supported machines are:
none                 empty machine
pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-10.0)
pc-i440fx-10.0       Standard PC (i440FX + PIIX, 1996) (default)
q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-10.0)
pc-q35-10.0          Standard PC (Q35 + ICH9, 2009)
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_listed_once() {
        for (at, (name, ..)) in OPTIONS.iter().enumerate() {
            assert!(OPTIONS[..at].iter().all(|(other, ..)| other != name), "{name}");
        }
    }

    #[test]
    fn machines() {
        assert_eq!(machine("q35"), Some(true));
        assert_eq!(machine("pc-q35-9.2"), Some(true));
        assert_eq!(machine("pc-i440fx-10.0"), Some(false));
        assert_eq!(machine("pc-q35-"), None);
        assert_eq!(machine("foo"), None);
    }
}

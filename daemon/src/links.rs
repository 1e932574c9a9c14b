//! `underlay install-links`: the names by which QEMU's users know the programs.

use std::os::unix::fs::symlink;
use std::path::Path;

use underlay_sys::{complain, say};

const NAMES: [&str; 6] =
    ["qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon", "qemu-system-x86_64", "qmp-shell"];

/// Makes the links in the folder that is the one argument; the exit status. Nothing that is there is replaced,
/// except links to this very program.
pub fn install(words: &[String]) -> i32 {
    let [folder] = words else {
        complain!("Usage: underlay install-links DIR");
        return 1;
    };
    if folder == "--help" || folder == "-h" {
        say!("Usage: underlay install-links DIR\nMakes links to this program in DIR: {}", NAMES.join(", "));
        return 0;
    }
    match install_into(Path::new(folder)) {
        Ok(()) => 0,
        Err(error) => {
            complain!("underlay: {error}");
            1
        }
    }
}

fn install_into(folder: &Path) -> Result<(), String> {
    let program =
        std::env::current_exe().map_err(|error| format!("cannot tell where this program is: {error}"))?;
    for name in NAMES {
        let link = folder.join(name);
        if std::fs::read_link(&link).is_ok_and(|target| target == program) {
            continue;
        }
        symlink(&program, &link).map_err(|error| format!("cannot make {}: {error}", link.display()))?;
        say!("{} -> {}", link.display(), program.display());
    }
    Ok(())
}

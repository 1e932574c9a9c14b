//! One binary for everything: the storage daemon, the image tools, and what helps to try them.
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod links;

use std::path::Path;
use std::process::exit;

use underlay_daemon::{machine, storage_daemon};
use underlay_sys::{complain, complain_part, say, say_part};

const HELP: &str = "\
Usage: underlay COMMAND [arguments]

Live block operations: snapshots, streaming and committing of disk images under a running guest.

Commands:
  storage-daemon    serve disk images and change them while they are in use (qemu-storage-daemon)
  machine           a machine without a CPU: devices with disks, monitors, exports (qemu-system-x86_64)
  img               make, check and convert disk images (qemu-img)
  io                read and write in disk images (qemu-io)
  nbd               serve one disk image to NBD clients, or list what a server has (qemu-nbd)
  shell             type commands to a daemon that runs, or to QEMU (qmp-shell)
  tour              see a chain of images changed under a writing guest, and verified
  install-links DIR make symbolic links in DIR, so that the programs answer to QEMU's names
  help, version

Each command takes --help. Started by the name qemu-system-x86_64, qemu-storage-daemon, qemu-img, qemu-io, qemu-nbd
or qmp-shell, this is that program.
";

fn main() {
    underlay_sys::process::survive_long_files();
    underlay_sys::witness::be_one_if_asked(underlay_drivers::beside::tie::testimony);
    let mut words = std::env::args_os();
    let program = words.next().unwrap_or_default().to_string_lossy().into_owned();
    let name = Path::new(&program).file_name().and_then(|name| name.to_str()).unwrap_or_default();
    // Whatever is put in the place of bytes that are no text, it might be the name of another file.
    let rest: Vec<String> = match words.map(|word| word.into_string()).collect() {
        Ok(rest) => rest,
        Err(word) => {
            complain!("{name}: the argument {word:?} is not UTF-8, and names that are not are not supported");
            exit(1);
        }
    };
    exit(match name {
        "qemu-storage-daemon" => storage_daemon::main(&program, &rest),
        "qemu-system-x86_64" => machine::main(&program, &rest),
        "qemu-img" => underlay_img::main(&program, &rest),
        "qemu-io" => underlay_io::main(&program, &rest),
        "qemu-nbd" => underlay_nbd_server::main(&program, &rest),
        "qmp-shell" => underlay_shell::main(&program, &rest),
        _ => underlay(&rest),
    });
}

fn underlay(words: &[String]) -> i32 {
    let Some((command, rest)) = words.split_first() else {
        complain_part!("{HELP}");
        return 1;
    };
    match command.as_str() {
        "machine" => machine::main("qemu-system-x86_64", rest),
        "storage-daemon" => storage_daemon::main("qemu-storage-daemon", rest),
        "img" => underlay_img::main("qemu-img", rest),
        "io" => underlay_io::main("qemu-io", rest),
        "nbd" => underlay_nbd_server::main("qemu-nbd", rest),
        "shell" => underlay_shell::main("qmp-shell", rest),
        "tour" => underlay_tour::main(rest),
        "install-links" => links::install(rest),
        "help" | "--help" | "-h" => {
            say_part!("{HELP}");
            0
        }
        "version" | "--version" | "-V" => {
            say!("underlay {}", env!("CARGO_PKG_VERSION"));
            0
        }
        other => {
            complain!("underlay: there is no command '{other}'; see underlay --help");
            1
        }
    }
}

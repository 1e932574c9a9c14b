//! One binary for everything: the storage daemon, the image tools, and what helps to try them.
#![forbid(unsafe_code)]

mod links;

use std::path::Path;
use std::process::exit;

use underlay_daemon::{machine, storage_daemon};

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
    let mut words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    let program = words.next().unwrap_or_default();
    let rest: Vec<String> = words.collect();
    let name =
        Path::new(&program).file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    exit(match name.as_str() {
        "qemu-storage-daemon" => storage_daemon::main(&program, &rest),
        "qemu-system-x86_64" => machine::main(&program, &rest),
        "qemu-img" => img(&program, &rest),
        "qemu-io" => underlay_io::main(&program, &rest),
        "qemu-nbd" => underlay_nbd_server::main(&program, &rest),
        "qmp-shell" => underlay_shell::main(&program, &rest),
        _ => underlay(&rest),
    });
}

/// What it prints is often piped into something that stops reading.
fn img(program: &str, words: &[String]) -> i32 {
    underlay_sys::process::end_with_broken_pipe();
    underlay_img::main(program, words)
}

fn underlay(words: &[String]) -> i32 {
    let Some((command, rest)) = words.split_first() else {
        eprint!("{HELP}");
        return 1;
    };
    match command.as_str() {
        "machine" => machine::main("qemu-system-x86_64", rest),
        "storage-daemon" => storage_daemon::main("qemu-storage-daemon", rest),
        "img" => img("qemu-img", rest),
        "io" => underlay_io::main("qemu-io", rest),
        "nbd" => underlay_nbd_server::main("qemu-nbd", rest),
        "shell" => underlay_shell::main("qmp-shell", rest),
        "tour" => underlay_tour::main(rest),
        "install-links" => links::install(rest),
        "help" | "--help" | "-h" => {
            print!("{HELP}");
            0
        }
        "version" | "--version" | "-V" => {
            println!("underlay {}", env!("CARGO_PKG_VERSION"));
            0
        }
        other => {
            eprintln!("underlay: there is no command '{other}'; see underlay --help");
            1
        }
    }
}

//! The command line of qemu-io on Underlay's engine: reads and writes in disk images, command by command.
#![forbid(unsafe_code)]

mod command;
mod report;

use std::io::{BufRead, Write};

use underlay_img::getopt::{Known, parse};
use underlay_img::open::{How, Image, image};
use underlay_sys::thread::block_on;

const KNOWN: Known = Known {
    short: "hVc:d:f:rsnCmki:t:T:U",
    long: &[
        ("help", "h", false),
        ("version", "V", false),
        ("cmd", "c", true),
        ("format", "f", true),
        ("read-only", "r", false),
        ("nocache", "n", false),
        ("force-share", "U", false),
        ("image-opts", "image-opts", false),
        ("object", "object", true),
    ],
};

const HELP: &str = "\
Usage: qemu-io [OPTIONS]... [-c STRING]... FILE
Reads and writes in a disk image.

  -c, --cmd STRING     run this command (may be repeated); without it commands come from standard input
  -f, --format FMT     the image's format; probed when absent
  -r, --read-only      open for reading only
  -U, --force-share    share the image with whoever uses it
  -h, --help           this help
  -V, --version        the version

Commands: read, write, aio_read, aio_write, aio_flush, flush, discard, map, alloc, length, quit
";

/// Runs the program; the exit status.
pub fn main(program: &str, words: &[String]) -> i32 {
    let name = program.rsplit('/').next().unwrap_or(program);
    let (options, others) = match parse(KNOWN, words) {
        Ok(parsed) => parsed,
        Err(failure) => {
            eprintln!("{name}: {}", failure.message.unwrap_or_default());
            eprintln!("Try '{name} --help' for more information.");
            return 1;
        }
    };
    let (mut commands, mut format, mut read_only, mut force_share) = (Vec::new(), None, false, false);
    for (option, value) in options {
        match option.as_str() {
            "c" => commands.push(value),
            "f" => format = Some(value),
            "r" => read_only = true,
            "U" => force_share = true,
            "h" => {
                print!("{HELP}");
                return 0;
            }
            "V" => {
                println!("{name} version 10.0.2 (Underlay {})", env!("CARGO_PKG_VERSION"));
                return 0;
            }
            other => {
                eprintln!("{name}: option '-{other}' is not supported yet");
                return 1;
            }
        }
    }
    let [file] = others.as_slice() else {
        eprintln!("{name}: exactly one image must be given");
        return 1;
    };
    let how =
        How { format: format.as_deref(), write: !read_only, resize: false, force_share, no_backing: false };
    block_on(run(name, file, how, commands))
}

async fn run(name: &str, file: &str, how: How<'_>, commands: Vec<String>) -> i32 {
    let opened = match image(file, how).await {
        Ok(opened) => opened,
        Err(failure) => {
            let message = failure.message.unwrap_or_default();
            let reason =
                message.strip_prefix(&format!("Could not open '{file}': ")).unwrap_or(&message).to_owned();
            eprintln!("{name}: can't open device {file}: {reason}");
            return 1;
        }
    };
    let mut ok = true;
    if commands.is_empty() {
        ok &= interactive(&opened).await;
    }
    for line in commands {
        match command::execute(&opened, &line).await {
            command::Next::Failed => ok = false,
            command::Next::Quit => break,
            command::Next::Done => {}
        }
    }
    if let Err(failure) = opened.close().await {
        eprintln!("{name}: {}", failure.message.unwrap_or_default());
        ok = false;
    }
    i32::from(!ok)
}

async fn interactive(image: &Image) -> bool {
    let mut ok = true;
    let mut lines = std::io::stdin().lock().lines();
    loop {
        print!("qemu-io> ");
        let _ = std::io::stdout().flush();
        let Some(Ok(line)) = lines.next() else {
            println!();
            return ok;
        };
        match command::execute(image, &line).await {
            command::Next::Failed => ok = false,
            command::Next::Quit => return ok,
            command::Next::Done => {}
        }
    }
}

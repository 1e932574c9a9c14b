//! help: the commands, and what their options mean.

use crate::report::Out;
use crate::session::{Done, Fault};
use crate::table::{self, COMMANDS};

/// help
pub fn show(out: &Out, of_monitor: bool, name: Option<&str>) -> Done {
    let Some(name) = name else {
        for command in COMMANDS.iter().filter(|command| !of_monitor || command.is_of_monitors()) {
            out.line(command.line(command.name));
        }
        out.line("\nUse 'help commandname' for extended help.");
        return Ok(());
    };
    let command = table::find(name).filter(|command| !of_monitor || command.is_of_monitors());
    let command = command.ok_or_else(|| Fault::Plain(format!("command {name} not found")))?;
    out.line(command.line(name));
    if let Some(more) = more(command.name) {
        out.line(format_args!("\n{}", more.trim_end()));
        out.line("");
    }
    Ok(())
}

/// What there is to know beside the one line.
fn more(name: &str) -> Option<&'static str> {
    Some(match name {
        "aio_flush" => " Waits until every request of aio_read and aio_write is done.",
        "aio_read" => {
            "\
 Begins to read and goes on with the next command; the result is printed when it is there, at the latest by
 aio_flush or at the end. Errors and wrong patterns do not change the exit status.
 -C, -- report on one line, for programs
 -i, -- only say that an invalid request is made
 -P, -- the byte that is expected everywhere
 -q, -- no report
 -r, -- register the buffer (a hint without effect: none needs registration here)
 -v, -- show what was read"
        }
        "aio_write" => {
            "\
 Begins to write and goes on with the next command; the result is printed when it is there, at the latest by
 aio_flush or at the end. Errors do not change the exit status.
 -C, -- report on one line, for programs
 -f, -- durable when done
 -i, -- only say that an invalid request is made
 -P, -- the byte to write (0xcd)
 -q, -- no report
 -r, -- register the buffer (a hint without effect: none needs registration here)
 -u, -- with -z: the space may be given back
 -z, -- write zeroes without a buffer"
        }
        "alloc" => " Counts the bytes, of 512 or of count, that the image itself holds, not what is below it.",
        "break" | "resume" | "remove_break" | "wait_break" => {
            " Needs the driver blkdebug, which is not supported yet."
        }
        "discard" => {
            "\
 Tells the disk that the bytes are not needed any more.
 -C, -- report on one line, for programs
 -q, -- no report"
        }
        "flush" => " Returns when everything that was written is durable.",
        "open" => {
            "\
 Opens a disk for the commands that follow: 'open -r -o driver=qcow2 disk.img'.
 -r, -- for reading only
 -s, -- with a temporary snapshot: what is written is gone at the end
 -C, -- what is read from below the image is copied into it
 -n, -- past the page cache, as -t none
 -U, -- share the image with whoever uses it
 -k, -- as -i native
 -i, -- aio: threads, native or io_uring
 -t, -- cache: none, writeback, writethrough, directsync or unsafe
 -d, -- discard: ignore or unmap
 -o, -- options of the driver, as name=value,..."
        }
        "read" => {
            "\
 Reads from the disk: 'read -v 512 1k'.
 -b, -- from the VM state (not supported yet)
 -C, -- report on one line, for programs
 -l, -- with -P: how many bytes are verified
 -p, -- no meaning any more
 -P, -- the byte that is expected everywhere
 -q, -- no report
 -r, -- register the buffer (a hint without effect: none needs registration here)
 -s, -- with -P: from where on is verified
 -v, -- show what was read"
        }
        "readv" => {
            "\
 Reads from the disk, the sum of the lengths: 'readv -v 512 1k 1k'.
 -C, -- report on one line, for programs
 -P, -- the byte that is expected everywhere
 -q, -- no report
 -r, -- register the buffer (a hint without effect: none needs registration here)
 -v, -- show what was read"
        }
        "reopen" => {
            "\
 Closes the disk and opens it with other options: 'reopen -o l2-cache-size=1M'. If that fails it stays as it was.
 -r, -- for reading only
 -w, -- for writing
 -c, -- cache: none, writeback, writethrough, directsync or unsafe
 -o, -- options of the driver, as name=value,..."
        }
        "sigraise" => " Sends the program the signal of this number: 'sigraise 15'.",
        "truncate" => {
            "\
 Sets the length of the disk.
 -m, -- what to reserve when it grows: off, metadata, falloc or full"
        }
        "write" => {
            "\
 Writes to the disk: 'write -P 7 512 1k'.
 -b, -- to the VM state (not supported yet)
 -c, -- compressed
 -C, -- report on one line, for programs
 -f, -- durable when done
 -n, -- with -z: fail rather than write zeroes byte by byte
 -p, -- no meaning any more
 -P, -- the byte to write (0xcd)
 -q, -- no report
 -r, -- register the buffer (a hint without effect: none needs registration here)
 -s, -- the file whose content to write, over and over
 -u, -- with -z: the space may be given back
 -z, -- write zeroes without a buffer"
        }
        "writev" => {
            "\
 Writes to the disk, the sum of the lengths: 'writev 512 1k 1k'.
 -C, -- report on one line, for programs
 -f, -- durable when done
 -P, -- the byte to write (0xcd)
 -q, -- no report
 -r, -- register the buffer (a hint without effect: none needs registration here)"
        }
        zone if zone.starts_with("zone_") => " Needs a zoned device; the drivers for these are not supported yet.",
        _ => return None,
    })
}

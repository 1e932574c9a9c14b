//! aio_read, aio_write: requests that nobody waits for. They count as done once they are begun.

use std::time::Instant;

use underlay_graph::error::strerror;
use underlay_graph::{WriteFlags, ZeroFlags};
use underlay_sys::rt;

use crate::data::{Expected, FILL, Payload, Telling, put, range, vector};
use crate::number;
use crate::session::{Done, Fault, Session, options};

/// aio_read
pub fn read(session: &mut Session, name: &str, words: &[String]) -> Done {
    let (options, others) = options(name, "CiP:qrv", words)?;
    let (mut byte, mut show, mut telling) = (None, false, Telling::default());
    for (letter, value) in options {
        match letter {
            'C' => telling.for_programs = true,
            'i' => return invalid(session, "read"),
            'P' => byte = Some(number::pattern(&value)?),
            'q' => telling.quiet = true,
            'v' => show = true,
            _ => {}
        }
    }
    let (offset, length) = vector(&others)?;
    let range = range(offset, length, "readv")?;
    let into = session.buffer(range.buffer_len())?;
    let reader = session.disk()?.reader();
    let out = session.out.clone();
    let begun = Instant::now();
    session.pending.push(rt::spawn(async move {
        if let Err(error) = reader.read(range, into.clone()).await {
            return out.line(format_args!("readv failed: {}", strerror(error.errno())));
        }
        if let Some(byte) = byte {
            Expected::all(byte, length).verify(&into, offset, &out);
        }
        if show && !telling.quiet {
            out.dump(&into, offset);
        }
        telling.tell(&out, "read", range, begun);
    }));
    Ok(())
}

/// aio_write
pub fn write(session: &mut Session, name: &str, words: &[String]) -> Done {
    let (options, others) = options(name, "CfiP:qruz", words)?;
    let (mut byte, mut durable, mut registered, mut zeroes) = (FILL, false, false, false);
    let (mut may_unmap, mut telling) = (false, Telling::default());
    for (letter, value) in options {
        match letter {
            'C' => telling.for_programs = true,
            'f' => durable = true,
            'i' => return invalid(session, "write"),
            'P' => byte = number::pattern(&value)?,
            'q' => telling.quiet = true,
            'r' => registered = true,
            'u' => may_unmap = true,
            'z' => zeroes = true,
            _ => {}
        }
    }
    let complaint = if others.len() < 2 {
        return Err(Fault::Usage);
    } else if zeroes && others.len() != 2 {
        Some("-z supports only a single length parameter")
    } else if may_unmap && !zeroes {
        Some("-u requires -z to be specified")
    } else if zeroes && registered {
        Some("cannot combine zero write with registered I/O buffer")
    } else {
        None
    };
    if let Some(text) = complaint {
        return Err(Fault::Plain(text.to_owned()));
    }
    let (range, payload) = if zeroes {
        // Without a buffer, any length will do.
        let (offset, length) = (number::bytes(&others[0])?, number::bytes(&others[1])?);
        let flags = ZeroFlags { may_unmap, no_fallback: false };
        (range(offset, length, "aio_write")?, Payload::Zeroes(flags))
    } else {
        let (offset, length) = vector(&others)?;
        let range = range(offset, length, "aio_write")?;
        let from = session.buffer(range.buffer_len())?;
        from.fill(byte);
        (range, Payload::Bytes(from, WriteFlags::default()))
    };
    let disk = session.disk()?;
    let durable = durable || disk.request().modes.writethrough;
    let root = disk.root.clone();
    let out = session.out.clone();
    let begun = Instant::now();
    session.pending.push(rt::spawn(async move {
        match put(&root, range, payload, durable).await {
            Ok(()) => telling.tell(&out, "wrote", range, begun),
            Err(error) => out.line(format_args!("aio_write failed: {}", strerror(error.errno()))),
        }
    }));
    Ok(())
}

/// `-i`: a request that only counts in the statistics, which this program does not keep.
fn invalid(session: &Session, kind: &str) -> Done {
    session.out.line(format_args!("injecting invalid {kind} request"));
    Ok(())
}

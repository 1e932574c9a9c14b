//! aio_read, aio_write: requests that nobody waits for. They count as done once they are begun.

use std::sync::Arc;
use std::time::{Duration, Instant};

use underlay_graph::error::strerror;
use underlay_graph::{ByteRange, IoError, WriteFlags, ZeroFlags};
use underlay_sys::rt;

use crate::data::{Expected, FILL, Payload, Telling, put, vector};
use crate::monitor::{Accounts, Way};
use crate::number;
use crate::session::{Done, Fault, Session, options};

/// aio_read
pub fn read(session: &mut Session, name: &str, words: &[String]) -> Done {
    let (options, others) = options(name, "CiP:qrv", words)?;
    let (mut byte, mut show, mut telling) = (None, false, Telling::default());
    for (letter, value) in options {
        match letter {
            'C' => telling.for_programs = true,
            'i' => return invalid(session, Way::Read),
            'P' => byte = Some(number::pattern(&value)?),
            'q' => telling.quiet = true,
            'v' => show = true,
            _ => {}
        }
    }
    let (offset, length) = vector(&others)?;
    let Some(range) = range(session, offset, length, "readv") else { return Ok(()) };
    let into = session.buffer(range.buffer_len())?;
    let reader = session.disk()?.reader();
    let out = session.out.clone();
    let begun = Instant::now();
    let bill = Bill::new(session, Way::Read, range.len());
    session.pending.push(rt::spawn(async move {
        let result = reader.read(range, into.clone()).await;
        pay(bill, result.is_ok());
        if let Err(error) = result {
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
            'i' => return invalid(session, Way::Write),
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
        let Some(range) = range(session, offset, length, "aio_write") else { return Ok(()) };
        (range, Payload::Zeroes(flags))
    } else {
        let (offset, length) = vector(&others)?;
        let Some(range) = range(session, offset, length, "aio_write") else { return Ok(()) };
        let from = session.buffer(range.buffer_len())?;
        from.fill(byte);
        (range, Payload::Bytes(from, WriteFlags::default()))
    };
    let disk = session.disk()?;
    let durable = durable || disk.request().modes.writethrough;
    let root = disk.root.clone();
    let out = session.out.clone();
    let begun = Instant::now();
    let bill = if zeroes { None } else { Bill::new(session, Way::Write, range.len()) };
    session.pending.push(rt::spawn(async move {
        let result = put(&root, range, payload, durable).await;
        pay(bill, result.is_ok());
        match result {
            Ok(()) => telling.tell(&out, "wrote", range, begun),
            Err(error) => out.line(format_args!("aio_write failed: {}", strerror(error.errno()))),
        }
    }));
    Ok(())
}

/// Where, if there is such a place. If not, the request fails as one that was begun: it says so, and that is all.
fn range(session: &Session, offset: u64, length: u64, verb: &str) -> Option<ByteRange> {
    let range = ByteRange::new(offset, length);
    if range.is_none() {
        session.out.line(format_args!("{verb} failed: {}", strerror(IoError::EIO.errno())));
    }
    range
}

/// `-i`: a request that only counts in the statistics, which this program by itself does not keep.
fn invalid(session: &Session, way: Way) -> Done {
    let kind = if way == Way::Read { "read" } else { "write" };
    session.out.line(format_args!("injecting invalid {kind} request"));
    if let Some(accounts) = &session.accounts {
        accounts.invalid(way);
    }
    Ok(())
}

/// aio_flush
pub async fn flush(session: &mut Session) {
    session.drain().await;
    let bill = Bill::new(session, Way::Flush, 0);
    let flushed = match (&bill, &session.disk) {
        (Some(_), Some(disk)) => disk.root.flush().await,
        // This is about requests that are under way.
        _ => Ok(()),
    };
    pay(bill, flushed.is_ok());
}

/// A request that counts.
struct Bill {
    accounts: Arc<dyn Accounts>,
    way: Way,
    bytes: u64,
    begun: Duration,
}

impl Bill {
    fn new(session: &Session, way: Way, bytes: u64) -> Option<Self> {
        let accounts = session.accounts.clone()?;
        Some(Self { accounts, way, bytes, begun: rt::now() })
    }
}

fn pay(bill: Option<Bill>, went_well: bool) {
    if let Some(bill) = bill {
        bill.accounts.done(bill.way, bill.bytes, bill.begun, rt::now(), went_well);
    }
}

//! read, readv, write, writev, discard.

use std::time::Instant;

use underlay_graph::error::strerror;
use underlay_graph::{ByteRange, IoError, Root, WriteFlags, ZeroFlags};
use underlay_sys::Iov;

use crate::number::{self, LONGEST};
use crate::report::{self, Done as Finished, Out};
use crate::session::{Done, Fault, Given, Session, options};

/// What writes fill with when nothing is said.
pub const FILL: u8 = 0xcd;
/// Bytes by which buffers are off with `-m`. Source: the reference's documentation has no number; any will do that
/// no device asks for as its alignment.
const OFF: usize = 16;

/// Longest request of a monitor that needs a buffer, in bytes: it is a part of the memory of a daemon.
const LONGEST_OF_MONITOR: usize = 64 << 20;

/// How a request that succeeded is told.
#[derive(Clone, Copy, Debug, Default)]
pub struct Telling {
    /// Not at all.
    pub quiet: bool,
    /// On one line.
    pub for_programs: bool,
}

impl Telling {
    pub fn tell(self, out: &Out, verb: &'static str, range: ByteRange, begun: Instant) {
        if !self.quiet {
            let done = Finished { verb, count: range.len(), offset: range.start(), took: begun.elapsed() };
            done.say(out, self.for_programs);
        }
    }
}

/// The bytes from `offset` on; EIO where the address space ends.
pub fn range(offset: u64, length: u64, verb: &str) -> Result<ByteRange, Fault> {
    ByteRange::new(offset, length).ok_or_else(|| failed(verb, &IoError::EIO))
}

pub fn failed(verb: &str, error: &IoError) -> Fault {
    // Of a request that failed only the number is told.
    Fault::Plain(format!("{verb} failed: {}", strerror(error.errno())))
}

impl Session {
    /// A buffer; off the alignment that direct I/O wants, if that is asked for. Monitors get none that is very large.
    pub fn buffer(&self, length: usize) -> Result<Iov, Fault> {
        if self.is_of_monitor() && length > LONGEST_OF_MONITOR {
            let text = format!("length cannot exceed {LONGEST_OF_MONITOR} on a monitor, given {length}");
            return Err(Fault::Plain(text));
        }
        Ok(if self.misalign { Iov::zeroed(length + OFF).slice(OFF, length) } else { Iov::zeroed(length) })
    }
}

/// The VM state of an image is a part of its format that is not written yet.
fn no_vm_state() -> Fault {
    Fault::Words("-b: the VM state of images is not supported yet".to_owned())
}

/// What is expected of data that was read.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    pub byte: u8,
    pub start: u64,
    pub count: u64,
}

impl Expected {
    pub fn all(byte: u8, length: u64) -> Self {
        Self { byte, start: 0, count: length }
    }

    /// Whether `bytes`, read at `offset`, are so; says it if not.
    pub fn verify(self, bytes: &Iov, offset: u64, out: &Out) -> bool {
        let start = usize::try_from(self.start).unwrap_or(usize::MAX);
        let count = usize::try_from(self.count).unwrap_or(usize::MAX);
        let right = report::is_filled(bytes, start, count, self.byte);
        if !right {
            let place = offset.saturating_add(self.start);
            out.line(format_args!("Pattern verification failed at offset {place}, {count} bytes"));
        }
        right
    }
}

/// Reads, verifies, shows and tells.
async fn read_range(
    session: &Session,
    verb: &str,
    range: ByteRange,
    expected: Option<Expected>,
    show: bool,
    telling: Telling,
) -> Done {
    let into = session.buffer(range.buffer_len())?;
    let begun = Instant::now();
    let read = session.disk()?.reader().read(range, into.clone()).await;
    let took = begun.elapsed();
    read.map_err(|error| failed(verb, &error))?;
    let right = expected.is_none_or(|expected| expected.verify(&into, range.start(), &session.out));
    if !telling.quiet {
        if show {
            session.out.dump(&into, range.start());
        }
        let done = Finished { verb: "read", count: range.len(), offset: range.start(), took };
        done.say(&session.out, telling.for_programs);
    }
    if right { Ok(()) } else { Err(Fault::Silent) }
}

/// read
pub async fn read(session: &Session, name: &str, words: &[String]) -> Done {
    let (options, others) = options(name, "bCl:pP:qrs:v", words)?;
    let (mut byte, mut start, mut count, mut vm_state) = (None, None, None, false);
    let (mut show, mut telling) = (false, Telling::default());
    for (letter, value) in options {
        match letter {
            'b' => vm_state = true,
            'C' => telling.for_programs = true,
            'l' => count = Some(number::bytes(&value)?),
            'P' => byte = Some(number::pattern(&value)?),
            'q' => telling.quiet = true,
            's' => start = Some(number::bytes(&value)?),
            'v' => show = true,
            // -p has no meaning any more. -r: buffers need no registration to be used without a copy.
            _ => {}
        }
    }
    let [offset, length] = others.as_slice() else { return Err(Fault::Usage) };
    let (offset, length) = (number::bytes(offset)?, number::length(length, "")?);
    if byte.is_none() && (start.is_some() || count.is_some()) {
        return Err(Fault::Usage);
    }
    let start = start.unwrap_or(0);
    let count = count.or_else(|| length.checked_sub(start));
    let inside = count.and_then(|count| start.checked_add(count)).is_some_and(|end| end <= length);
    if !inside {
        return Err(Fault::Plain("pattern verification range exceeds end of read data".to_owned()));
    }
    if vm_state {
        aligned(offset, "offset")?;
        aligned(length, "count")?;
        return Err(no_vm_state());
    }
    let expected = byte.map(|byte| Expected { byte, start, count: count.unwrap_or(0) });
    read_range(session, "read", range(offset, length, "read")?, expected, show, telling).await
}

/// The offset and the sum of the lengths.
pub fn vector(words: &[String]) -> Result<(u64, u64), Fault> {
    let Some((offset, lengths)) = words.split_first().filter(|(_, lengths)| !lengths.is_empty()) else {
        return Err(Fault::Usage);
    };
    let offset = number::bytes(offset)?;
    let mut sum = 0_u64;
    for word in lengths {
        let length = number::bytes(word)?;
        if length > LONGEST {
            return Err(Fault::Plain(format!("Argument '{word}' exceeds maximum size {LONGEST}")));
        }
        sum = sum.saturating_add(length);
        if sum > LONGEST {
            let text = format!("The total number of bytes exceed the maximum size {LONGEST}");
            return Err(Fault::Plain(text));
        }
    }
    Ok((offset, sum))
}

/// readv
pub async fn readv(session: &Session, name: &str, words: &[String]) -> Done {
    let (options, others) = options(name, "CP:qrv", words)?;
    let (mut byte, mut show, mut telling) = (None, false, Telling::default());
    for (letter, value) in options {
        match letter {
            'C' => telling.for_programs = true,
            'P' => byte = Some(number::pattern(&value)?),
            'q' => telling.quiet = true,
            'v' => show = true,
            _ => {}
        }
    }
    let (offset, length) = vector(&others)?;
    let expected = byte.map(|byte| Expected::all(byte, length));
    read_range(session, "readv", range(offset, length, "readv")?, expected, show, telling).await
}

/// What a write puts on the disk.
#[derive(Clone, Debug)]
pub enum Payload {
    /// Bytes.
    Bytes(Iov, WriteFlags),
    /// Zeroes, without a buffer.
    Zeroes(ZeroFlags),
}

/// Writes, and makes it durable if that is asked for.
pub async fn put(root: &Root, range: ByteRange, payload: Payload, durable: bool) -> Result<(), IoError> {
    match payload {
        Payload::Bytes(from, flags) => root.write(range, from, flags).await?,
        Payload::Zeroes(flags) => root.write_zeroes(range, flags).await?,
    }
    if durable { root.flush().await } else { Ok(()) }
}

/// The options of write.
#[derive(Default)]
struct Writing {
    vm_state: bool,
    compressed: bool,
    durable: bool,
    no_fallback: bool,
    byte: Option<u8>,
    registered: bool,
    file: Option<String>,
    may_unmap: bool,
    zeroes: bool,
    telling: Telling,
}

impl Writing {
    fn parse(options: Vec<Given>) -> Result<Self, Fault> {
        let mut writing = Self::default();
        for (letter, value) in options {
            match letter {
                'b' => writing.vm_state = true,
                'c' => writing.compressed = true,
                'C' => writing.telling.for_programs = true,
                'f' => writing.durable = true,
                'n' => writing.no_fallback = true,
                'P' => writing.byte = Some(number::pattern(&value)?),
                'q' => writing.telling.quiet = true,
                'r' => writing.registered = true,
                's' => writing.file = Some(value),
                'u' => writing.may_unmap = true,
                'z' => writing.zeroes = true,
                // -p has no meaning any more.
                _ => {}
            }
        }
        Ok(writing)
    }

    /// What does not go together.
    fn conflict(&self) -> Option<&'static str> {
        let contents = [self.zeroes, self.byte.is_some(), self.file.is_some()];
        if self.vm_state && self.zeroes {
            Some("-b and -z cannot be specified at the same time")
        } else if self.durable && (self.vm_state || self.compressed) {
            Some("-f and -b or -c cannot be specified at the same time")
        } else if self.no_fallback && !self.zeroes {
            Some("-n requires -z to be specified")
        } else if self.may_unmap && !self.zeroes {
            Some("-u requires -z to be specified")
        } else if contents.iter().filter(|given| **given).count() > 1 {
            Some("Only one of -z, -P, and -s can be specified at the same time")
        } else {
            None
        }
    }

    fn payload(&self, session: &Session, length: usize) -> Result<Payload, Fault> {
        if self.zeroes {
            let (may_unmap, no_fallback) = (self.may_unmap, self.no_fallback);
            return Ok(Payload::Zeroes(ZeroFlags { may_unmap, no_fallback }));
        }
        let from = session.buffer(length)?;
        match &self.file {
            Some(file) => fill_from(session, &from, file)?,
            None => from.fill(self.byte.unwrap_or(FILL)),
        }
        Ok(Payload::Bytes(from, WriteFlags { compressed: self.compressed }))
    }
}

/// Fills a buffer with the content of a file, over and over.
fn fill_from(session: &Session, buffer: &Iov, file: &str) -> Done {
    use std::io::Read;
    if session.is_of_monitor() && std::fs::metadata(file).is_ok_and(|found| !found.is_file()) {
        // A pipe would keep everybody waiting.
        return Err(Fault::Words(format!("{file}: not a regular file")));
    }
    let mut content = Vec::new();
    let read = std::fs::File::open(file)
        .and_then(|opened| opened.take(buffer.len() as u64).read_to_end(&mut content));
    read.map_err(|error| Fault::Words(format!("{file}: {}", IoError::from(error))))?;
    if content.is_empty() && !buffer.is_empty() {
        return Err(Fault::Words(format!("{file}: file is empty")));
    }
    let mut at = 0;
    while at < buffer.len() {
        let len = content.len().min(buffer.len() - at);
        buffer.write_at(at, &content[..len]);
        at += len;
    }
    Ok(())
}

/// write
pub async fn write(session: &Session, name: &str, words: &[String]) -> Done {
    let (options, others) = options(name, "bcCfnpP:qrs:uz", words)?;
    let writing = Writing::parse(options)?;
    let [offset_word, length_word] = others.as_slice() else { return Err(Fault::Usage) };
    if let Some(text) = writing.conflict() {
        return Err(Fault::Plain(text.to_owned()));
    }
    let offset = number::bytes(offset_word)?;
    let length = match writing.no_fallback {
        true => number::bytes(length_word)?,
        false => number::length(length_word, " without -n")?,
    };
    if writing.vm_state || writing.compressed {
        aligned(offset, "offset")?;
        aligned(length, "count")?;
    }
    if writing.zeroes && writing.registered {
        return Err(Fault::Plain("cannot combine zero write with registered I/O buffer".to_owned()));
    }
    if writing.vm_state {
        return Err(no_vm_state());
    }
    let range = range(offset, length, "write")?;
    // Only data needs a buffer; its length is limited above.
    let buffer_len = if writing.zeroes { 0 } else { range.buffer_len() };
    let payload = writing.payload(session, buffer_len)?;
    let disk = session.disk()?;
    let durable = writing.durable || disk.request().modes.writethrough;
    let begun = Instant::now();
    put(&disk.root, range, payload, durable).await.map_err(|error| failed("write", &error))?;
    writing.telling.tell(&session.out, "wrote", range, begun);
    Ok(())
}

fn aligned(value: u64, name: &str) -> Done {
    match value.is_multiple_of(512) {
        true => Ok(()),
        false => Err(Fault::Plain(format!("{value} is not a sector-aligned value for '{name}'"))),
    }
}

/// writev
pub async fn writev(session: &Session, name: &str, words: &[String]) -> Done {
    let (options, others) = options(name, "CfP:qr", words)?;
    let (mut byte, mut durable, mut telling) = (FILL, false, Telling::default());
    for (letter, value) in options {
        match letter {
            'C' => telling.for_programs = true,
            'f' => durable = true,
            'P' => byte = number::pattern(&value)?,
            'q' => telling.quiet = true,
            _ => {}
        }
    }
    let (offset, length) = vector(&others)?;
    let range = range(offset, length, "writev")?;
    let from = session.buffer(range.buffer_len())?;
    from.fill(byte);
    let disk = session.disk()?;
    let durable = durable || disk.request().modes.writethrough;
    let payload = Payload::Bytes(from, WriteFlags::default());
    let begun = Instant::now();
    put(&disk.root, range, payload, durable).await.map_err(|error| failed("writev", &error))?;
    telling.tell(&session.out, "wrote", range, begun);
    Ok(())
}

/// discard
pub async fn discard(session: &Session, name: &str, words: &[String]) -> Done {
    let (options, others) = options(name, "Cq", words)?;
    let has = |wanted: char| options.iter().any(|(letter, _)| *letter == wanted);
    let telling = Telling { quiet: has('q'), for_programs: has('C') };
    let [offset, length] = others.as_slice() else { return Err(Fault::Usage) };
    let (offset, length) = (number::bytes(offset)?, number::length(length, "")?);
    let range = range(offset, length, "discard")?;
    let begun = Instant::now();
    session.disk()?.root.discard(range).await.map_err(|error| failed("discard", &error))?;
    telling.tell(&session.out, "discard", range, begun);
    Ok(())
}

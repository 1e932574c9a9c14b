//! A disk that an NBD server exports: the driver `nbd`.

mod connection;
mod link;
pub mod spec;
#[cfg(test)]
mod tests;
mod unflushed;

use std::any::Any;

use async_trait::async_trait;
use underlay_graph::{
    ByteRange, Cx, Extent, IoError, Kind, Limits, Node, Place, Preallocation, Result, WriteFlags, ZeroFlags,
};
use underlay_nbd::flags::{
    CMD_FAST_ZERO, CMD_NO_HOLE, CMD_REQ_ONE, READ_ONLY, SEND_FAST_ZERO, SEND_TRIM, SEND_WRITE_ZEROES,
    STATE_HOLE, STATE_ZERO,
};
use underlay_nbd::transmission::command;
use underlay_nbd::{Framing, MAX_PAYLOAD};
use underlay_sys::Iov;

use connection::Ask;
use link::Link;
use spec::NbdSpec;

/// Longest request without data where lengths have 32 bits: a multiple of every block size.
const LONGEST: u64 = 1 << 31;

/// See the module.
#[derive(Debug)]
pub struct NbdNode {
    link: Link,
    read_only: bool,
}

impl NbdNode {
    /// Connects to the server. An export that may only be read is refused for writing, unless `auto_read_only`.
    pub async fn open(spec: &NbdSpec, read_only: bool, auto_read_only: bool) -> Result<Self> {
        spec.check_export()?;
        let link = Link::open(spec.clone()).await?;
        let of_server = link.granted().flags & READ_ONLY != 0;
        if of_server && !read_only && !auto_read_only {
            link.close().await;
            return Err(IoError::EACCES.context("Could not open image"));
        }
        Ok(Self { link, read_only: read_only || of_server })
    }

    /// Whether it may only be read.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Where it is.
    pub fn spec(&self) -> &NbdSpec {
        self.link.spec()
    }

    fn can(&self, flag: u16) -> bool {
        self.link.granted().flags & flag != 0
    }

    /// The first part of `range` that one request may be about.
    fn first(&self, range: ByteRange) -> ByteRange {
        match self.link.granted().framing {
            Framing::Extended => range,
            _ => range.split(LONGEST).0,
        }
    }

    /// The same request for all of `range`, which has no data.
    async fn each(&self, command: u16, flags: u16, mut range: ByteRange) -> Result<()> {
        while !range.is_empty() {
            let here = self.first(range);
            let ask = || Ask { command, flags, offset: here.start(), length: here.len(), ..Ask::default() };
            self.link.ask(ask).await?;
            range = range.split(here.len()).1;
        }
        Ok(())
    }

    /// Cuts a transfer into pieces that the server takes, with the part of the buffer for each.
    fn pieces<'a>(&self, range: ByteRange, buffer: &'a Iov) -> impl Iterator<Item = (ByteRange, Iov)> + 'a {
        let granted = self.link.granted();
        let block = u64::from(granted.minimum_block.max(1));
        let most = u64::from(granted.maximum_block.min(MAX_PAYLOAD));
        let most = (most - most % block).max(block);
        let (mut rest, mut done) = (range, 0);
        std::iter::from_fn(move || {
            (!rest.is_empty()).then(|| {
                let (here, later) = rest.split(most);
                rest = later;
                let part = buffer.slice(done, here.buffer_len());
                done += here.buffer_len();
                (here, part)
            })
        })
    }
}

#[async_trait]
impl Node for NbdNode {
    fn driver(&self) -> &'static str {
        "nbd"
    }

    fn kind(&self) -> Kind {
        Kind::Protocol
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn length(&self, _cx: &Cx<'_>) -> u64 {
        self.link.granted().size
    }

    fn limits(&self, _cx: &Cx<'_>) -> Limits {
        Limits { request_alignment: self.link.granted().minimum_block.max(1), ..Limits::default() }
    }

    async fn read(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        // Formats read a little behind the end.
        let inside = range.before(self.length(cx).max(range.start()));
        into.slice(inside.buffer_len(), into.len() - inside.buffer_len()).fill(0);
        for (here, part) in self.pieces(inside, &into) {
            let ask = || Ask {
                command: command::READ,
                offset: here.start(),
                length: here.len(),
                into: Some(part.clone()),
                ..Ask::default()
            };
            self.link.ask(ask).await?;
        }
        Ok(())
    }

    async fn write(&self, cx: &Cx<'_>, range: ByteRange, from: Iov, flags: WriteFlags) -> Result<()> {
        if flags.compressed {
            return Err(IoError::ENOTSUP);
        }
        if range.end() > self.length(cx) {
            return Err(IoError::ENOSPC);
        }
        for (here, part) in self.pieces(range, &from) {
            let ask = || Ask {
                command: command::WRITE,
                offset: here.start(),
                length: here.len(),
                payload: Some(part.clone()),
                ..Ask::default()
            };
            self.link.ask(ask).await?;
        }
        Ok(())
    }

    async fn write_zeroes(&self, cx: &Cx<'_>, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if !self.can(SEND_WRITE_ZEROES) || flags.no_fallback && !self.can(SEND_FAST_ZERO) {
            return Err(IoError::ENOTSUP);
        }
        if range.end() > self.length(cx) {
            return Err(IoError::ENOSPC);
        }
        let no_hole = if flags.may_unmap { 0 } else { CMD_NO_HOLE };
        let fast = if flags.no_fallback { CMD_FAST_ZERO } else { 0 };
        self.each(command::WRITE_ZEROES, no_hole | fast, range).await
    }

    async fn discard(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        if !self.can(SEND_TRIM) {
            return Ok(());
        }
        self.each(command::TRIM, 0, range.before(self.length(cx).max(range.start()))).await
    }

    async fn flush(&self, _cx: &Cx<'_>) -> Result<()> {
        if self.read_only { Ok(()) } else { self.link.flush().await }
    }

    async fn map(&self, cx: &Cx<'_>, range: ByteRange) -> Result<Extent> {
        let whole = Extent::new(Place::Data(range.start()), range.len());
        let (length, granted) = (self.length(cx), self.link.granted());
        let block = u64::from(granted.minimum_block.max(1));
        let here = self.first(range.align_out(block).before(length));
        if granted.contexts.is_empty() || range.start() >= length {
            return Ok(whole);
        }
        let ask = || Ask {
            command: command::BLOCK_STATUS,
            flags: CMD_REQ_ONE,
            offset: here.start(),
            length: here.len(),
            ..Ask::default()
        };
        let found = self.link.ask(ask).await?;
        let Some(first) = found.first().filter(|first| first.length > 0) else { return Ok(whole) };
        let (mut flags, mut len) = (first.flags, first.length.min(here.len()));
        // Some servers change their mind within a block, and would then not be asked about the rest of it.
        if !len.is_multiple_of(block) && here.start() + len < length {
            (flags, len) = if len > block { (flags, len - len % block) } else { (0, block.min(here.len())) };
        }
        // Of a bitmap, what is dirty looks like a hole that is not zero.
        let place = match (flags & STATE_ZERO != 0, flags & STATE_HOLE != 0) {
            (true, _) => Place::Zero,
            (false, true) => Place::Unknown,
            (false, false) => Place::Data(range.start()),
        };
        let before = range.start() - here.start();
        Ok(Extent::new(place, (len - before).min(range.len())))
    }

    async fn resize(&self, cx: &Cx<'_>, size: u64, _preallocation: Preallocation) -> Result<()> {
        match size <= self.length(cx) {
            true => Ok(()),
            false => Err(IoError::EINVAL.with("Cannot grow NBD nodes")),
        }
    }

    fn doubts(&self) -> u64 {
        self.link.doubts()
    }

    fn forgive(&self) {
        self.link.forgive();
    }

    fn is_unusable(&self) -> bool {
        self.link.is_given_up()
    }

    fn is_lost(&self) -> bool {
        self.link.is_lost()
    }

    fn give_up(&self) {
        self.link.give_up();
    }

    fn stop_waiting(&self) {
        self.link.stop_waiting();
    }

    async fn close(&self, _cx: &Cx<'_>) -> Result<()> {
        self.link.close().await;
        Ok(())
    }

    fn exact_filename(&self) -> Option<String> {
        self.spec().name()
    }
}

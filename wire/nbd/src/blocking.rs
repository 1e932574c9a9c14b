//! The client half over a blocking socket: for tools, tests and benchmarks.
//!
//! Requests may be pipelined: [`Client::submit`] queues one, [`Client::complete`] sends what is queued and waits
//! for the next reply, in the server's order. The simple calls ([`Client::read`] and so on) are one of each; do not
//! mix them with requests under way.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::flags::CMD_PAYLOAD_LEN;
use crate::handshake::client::{ClientHandshake, Negotiated, Progress, Wish};
use crate::transmission::{Framing, Payload, Reply, Request, command};
use crate::{Descriptor, Errno, ProtocolError};

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    /// A UNIX socket.
    Unix(PathBuf),
    /// Host and port.
    Tcp(String),
}

impl Server {
    /// A UNIX socket.
    pub fn unix(path: impl AsRef<Path>) -> Self {
        Self::Unix(path.as_ref().to_owned())
    }
}

#[derive(Debug)]
enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn connect(server: &Server) -> io::Result<Self> {
        match server {
            Server::Unix(path) => UnixStream::connect(path).map(Self::Unix),
            Server::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                Ok(Self::Tcp(stream))
            }
        }
    }

    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let result = match self {
                Self::Unix(stream) => stream.read(into),
                Self::Tcp(stream) => stream.read(into),
            };
            match result {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.write_all(bytes),
            Self::Tcp(stream) => stream.write_all(bytes),
        }
    }
}

/// What a reply brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// From [`Client::submit`].
    pub cookie: u64,
    /// What went wrong, and the server's sentence (empty for simple replies).
    pub error: Option<(Errno, String)>,
    /// The data of a read.
    pub data: Vec<u8>,
    /// Descriptors by context id, of a block status request.
    pub status: Vec<(u32, Vec<Descriptor>)>,
}

impl Completion {
    fn ok(self) -> io::Result<Self> {
        match &self.error {
            None => Ok(self),
            Some((errno, _)) => Err(io::Error::from_raw_os_error(errno.to_linux())),
        }
    }
}

/// A connection. See the module.
#[derive(Debug)]
pub struct Client {
    socket: Socket,
    granted: Negotiated,
    out: Vec<u8>,
    input: Vec<u8>,
    /// The part of `input` that holds received and not yet parsed bytes.
    have: std::ops::Range<usize>,
    cookie: u64,
    waiting: HashMap<u64, Waiting>,
    /// Buffers given back with [`Client::recycle`].
    spare: Vec<Vec<u8>>,
}

#[derive(Debug)]
struct Waiting {
    request: Request,
    completion: Completion,
    /// Bytes of a read that came so far.
    covered: u64,
}

fn broken(error: ProtocolError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.0)
}

const INPUT: usize = 256 << 10;

impl Client {
    /// Connects with the best headers and the given meta contexts.
    pub fn connect(server: &Server, export: &str, contexts: &[&str]) -> io::Result<Self> {
        let contexts = contexts.iter().map(|&name| name.to_owned()).collect();
        Self::open(server, Wish { export: export.into(), framing: Framing::Extended, contexts, list: false })
    }

    /// Connects as wished.
    pub fn open(server: &Server, wish: Wish) -> io::Result<Self> {
        let mut socket = Socket::connect(server)?;
        let (progress, rest) = handshake(&mut socket, wish)?;
        let Progress::Done(granted) = progress else {
            return Err(io::Error::other("the server listed its exports"));
        };
        let mut input = vec![0; INPUT.max(rest.len())];
        input[..rest.len()].copy_from_slice(&rest);
        Ok(Self {
            socket,
            granted,
            out: Vec::new(),
            have: 0..rest.len(),
            input,
            cookie: 0,
            waiting: HashMap::new(),
            spare: Vec::new(),
        })
    }

    /// Names and descriptions of the server's exports.
    pub fn list(server: &Server) -> io::Result<Vec<(String, String)>> {
        let mut socket = Socket::connect(server)?;
        match handshake(&mut socket, Wish { list: true, ..Wish::default() })?.0 {
            Progress::Listed(list) => Ok(list),
            _ => Err(io::Error::other("the server did not list its exports")),
        }
    }

    /// What was negotiated.
    pub fn negotiated(&self) -> &Negotiated {
        &self.granted
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.granted.size
    }

    /// Requests without a reply yet.
    pub fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    /// Queues a request; `data` is for writes. Returns its cookie. Nothing is checked here: tests send nonsense.
    pub fn submit(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u64,
        data: &[u8],
    ) -> io::Result<u64> {
        self.cookie += 1;
        let has_payload = !data.is_empty() && self.granted.framing == Framing::Extended;
        let flags = if has_payload { flags | CMD_PAYLOAD_LEN } else { flags };
        let request = Request { flags, command, cookie: self.cookie, offset, length };
        request.encode(self.granted.framing, &mut self.out).map_err(broken)?;
        self.out.extend(data);
        let completion = Completion { cookie: self.cookie, ..Completion::default() };
        self.waiting.insert(self.cookie, Waiting { request, completion, covered: 0 });
        if self.out.len() > 1 << 20 {
            self.send()?;
        }
        Ok(self.cookie)
    }

    /// Queues a read.
    pub fn submit_read(&mut self, offset: u64, length: u32) -> io::Result<u64> {
        self.submit(command::READ, 0, offset, length.into(), &[])
    }

    /// Queues a write.
    pub fn submit_write(&mut self, offset: u64, data: &[u8]) -> io::Result<u64> {
        let length = u64::try_from(data.len()).map_err(io::Error::other)?;
        self.submit(command::WRITE, 0, offset, length, data)
    }

    /// Sends what is queued.
    pub fn send(&mut self) -> io::Result<()> {
        self.socket.write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    /// Whether [`Client::complete`] would perhaps find a reply without waiting.
    pub fn has_input(&self) -> bool {
        !self.have.is_empty()
    }

    /// Sends what is queued, unless there is a reply already, and waits for the next reply.
    pub fn complete(&mut self) -> io::Result<Completion> {
        loop {
            if let Some(completion) = self.take_reply()? {
                return Ok(completion);
            }
        }
    }

    /// Gives a read's buffer back for another read.
    pub fn recycle(&mut self, data: Vec<u8>) {
        if data.capacity() > 0 && self.spare.len() < 128 {
            self.spare.push(data);
        }
    }

    fn call(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u64,
        data: &[u8],
    ) -> io::Result<Completion> {
        let cookie = self.submit(command, flags, offset, length, data)?;
        loop {
            let completion = self.complete()?;
            if completion.cookie == cookie {
                return completion.ok();
            }
        }
    }

    /// Reads `length` bytes.
    pub fn read(&mut self, offset: u64, length: u32) -> io::Result<Vec<u8>> {
        Ok(self.call(command::READ, 0, offset, length.into(), &[])?.data)
    }

    /// Writes.
    pub fn write(&mut self, offset: u64, data: &[u8], flags: u16) -> io::Result<()> {
        let length = u64::try_from(data.len()).map_err(io::Error::other)?;
        self.call(command::WRITE, flags, offset, length, data).map(drop)
    }

    /// Makes writes durable.
    pub fn flush(&mut self) -> io::Result<()> {
        self.call(command::FLUSH, 0, 0, 0, &[]).map(drop)
    }

    /// Discards.
    pub fn trim(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.call(command::TRIM, 0, offset, length, &[]).map(drop)
    }

    /// Writes zeroes.
    pub fn zeroes(&mut self, offset: u64, length: u64, flags: u16) -> io::Result<()> {
        self.call(command::WRITE_ZEROES, flags, offset, length, &[]).map(drop)
    }

    /// Asks for the negotiated contexts; descriptors by context name.
    pub fn block_status(
        &mut self,
        offset: u64,
        length: u64,
        flags: u16,
    ) -> io::Result<Vec<(String, Vec<Descriptor>)>> {
        let status = self.call(command::BLOCK_STATUS, flags, offset, length, &[])?.status;
        let name = |id| self.granted.contexts.iter().find(|c| c.id == id).map(|c| c.name.clone());
        Ok(status.into_iter().filter_map(|(id, list)| Some((name(id)?, list))).collect())
    }

    /// Says goodbye; the server finishes what is under way.
    pub fn disconnect(mut self) -> io::Result<()> {
        let request = Request { command: command::DISCONNECT, ..Request::default() };
        request.encode(self.granted.framing, &mut self.out).map_err(broken)?;
        self.send()
    }

    fn fill(&mut self, wanted: usize) -> io::Result<()> {
        while self.have.len() < wanted {
            self.send()?;
            if self.have.start > 0 {
                self.input.copy_within(self.have.clone(), 0);
                self.have = 0..self.have.len();
            }
            if self.input.len() < wanted {
                self.input.resize(wanted, 0);
            }
            let got = self.socket.read(&mut self.input[self.have.end..])?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.have.end += got;
        }
        Ok(())
    }

    /// Takes `len` bytes into `into`, from the buffer first and the rest straight from the socket.
    fn take_exact(&mut self, into: &mut [u8]) -> io::Result<()> {
        let ready = into.len().min(self.have.len());
        into[..ready].copy_from_slice(&self.input[self.have.start..self.have.start + ready]);
        self.have.start += ready;
        let mut done = ready;
        while done < into.len() {
            self.send()?;
            let got = self.socket.read(&mut into[done..])?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += got;
        }
        Ok(())
    }

    fn take_reply(&mut self) -> io::Result<Option<Completion>> {
        self.fill(4)?;
        let (reply, used) = loop {
            let have = &self.input[self.have.clone()];
            match Reply::parse(self.granted.framing, have).map_err(broken)? {
                Some(found) => break found,
                None => self.fill(self.have.len() + 1)?,
            }
        };
        self.have.start += used;
        match reply {
            Reply::Simple { error, cookie } => self.simple(error, cookie).map(Some),
            Reply::Chunk(chunk) => {
                let cookie = chunk.cookie;
                let mut waiting = self.waiting.remove(&cookie).ok_or_else(|| stray(cookie))?;
                self.chunk(&mut waiting, chunk)?;
                if !chunk.done {
                    self.waiting.insert(cookie, waiting);
                    return Ok(None);
                }
                if waiting.completion.error.is_none()
                    && waiting.request.command == command::READ
                    && waiting.covered < waiting.request.length
                {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "the server left out a part of a read",
                    ));
                }
                Ok(Some(waiting.completion))
            }
        }
    }

    fn buffer(&mut self, length: u64) -> io::Result<Vec<u8>> {
        let len = usize::try_from(length).map_err(io::Error::other)?;
        let mut data = self.spare.pop().unwrap_or_default();
        data.resize(len, 0);
        Ok(data)
    }

    fn simple(&mut self, error: Errno, cookie: u64) -> io::Result<Completion> {
        let Waiting { request, mut completion, .. } =
            self.waiting.remove(&cookie).ok_or_else(|| stray(cookie))?;
        if !error.is_ok() {
            completion.error = Some((error, String::new()));
        } else if request.command == command::READ {
            let mut data = self.buffer(request.length)?;
            self.take_exact(&mut data)?;
            completion.data = data;
        }
        Ok(completion)
    }

    fn chunk(&mut self, waiting: &mut Waiting, chunk: crate::Chunk) -> io::Result<()> {
        use crate::transmission::chunk as kinds;
        if chunk.kind == kinds::OFFSET_DATA && chunk.length > 8 {
            self.fill(8)?;
            let mut at = [0; 8];
            self.take_exact(&mut at)?;
            let part = self.part(waiting, u64::from_be_bytes(at), chunk.length - 8)?;
            let mut data = std::mem::take(&mut waiting.completion.data);
            let result = self.take_exact(&mut data[part]);
            waiting.completion.data = data;
            return result;
        }
        let len = usize::try_from(chunk.length).map_err(io::Error::other)?;
        self.fill(len)?;
        let bytes = self.input[self.have.start..self.have.start + len].to_vec();
        self.have.start += len;
        match Payload::parse(chunk.kind, &bytes).map_err(broken)? {
            Payload::None | Payload::Data(..) => {}
            Payload::Hole(at, len) => {
                let part = self.part(waiting, at, len.into())?;
                waiting.completion.data[part].fill(0);
            }
            Payload::Status(id, list) => waiting.completion.status.push((id, list)),
            Payload::Error(error, text) => waiting.completion.error = Some((error, text)),
        }
        Ok(())
    }

    /// Where in the data of a read `len` bytes at `at` belong.
    fn part(&mut self, waiting: &mut Waiting, at: u64, len: u64) -> io::Result<std::ops::Range<usize>> {
        let request = waiting.request;
        let inside = at.checked_sub(request.offset).filter(|start| {
            request.command == command::READ
                && start.checked_add(len).is_some_and(|end| end <= request.length)
        });
        let start = inside.ok_or_else(|| broken(ProtocolError::new("a chunk outside its request")))?;
        if waiting.completion.data.is_empty() {
            waiting.completion.data = self.buffer(request.length)?;
        }
        waiting.covered += len;
        let start = usize::try_from(start).map_err(io::Error::other)?;
        Ok(start..start + usize::try_from(len).map_err(io::Error::other)?)
    }
}

fn stray(cookie: u64) -> io::Error {
    broken(ProtocolError::new(format!("a reply to no request (cookie {cookie})")))
}

fn handshake(socket: &mut Socket, wish: Wish) -> io::Result<(Progress, Vec<u8>)> {
    let mut machine = ClientHandshake::new(wish);
    let mut buffer = [0; 4096];
    loop {
        let progress = machine.step();
        socket.write_all(&machine.take_output())?;
        match progress {
            Progress::NeedBytes => {}
            Progress::Refused(text) => return Err(io::Error::other(text)),
            Progress::Fail(error) => return Err(broken(error)),
            done => return Ok((done, machine.into_rest())),
        }
        let got = socket.read(&mut buffer)?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        machine.feed(&buffer[..got]);
    }
}

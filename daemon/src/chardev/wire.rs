//! A connection of a character device: bytes in and out, whatever carries them.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use underlay_sys::net::Stream;
use underlay_sys::pipe::Pipe;
use underlay_sys::pty::Pty;
use underlay_sys::stdio;

use super::mux::Front;
use super::ring::Ring;
use super::telnet::{self, Filter};

/// What carries the bytes.
#[derive(Clone)]
pub enum Carrier {
    /// A socket.
    Socket(Arc<Stream>),
    /// Standard input and output.
    Stdio,
    /// A file for output.
    File(Arc<File>),
    /// Named pipes.
    Pipe(Arc<Pipe>),
    /// A terminal.
    Pty(Arc<Pty>),
    /// Memory for output.
    Ring(Arc<Ring>),
    /// What several monitors share.
    Front(Arc<Front>),
}

/// See the module. One task may read while another one writes.
#[derive(Clone)]
pub struct Wire {
    carrier: Carrier,
    telnet: Option<Arc<Mutex<Filter>>>,
    log: Option<Arc<File>>,
}

impl Wire {
    /// Over `carrier`. What is written goes to `log` too.
    pub fn new(carrier: Carrier, log: Option<Arc<File>>) -> Self {
        Self { carrier, telnet: None, log }
    }

    /// With telnet's commands in between.
    pub fn with_telnet(self) -> Self {
        Self { telnet: Some(Arc::default()), ..self }
    }

    /// Says what a server says first, before anything else is written.
    pub async fn hello(&self) -> io::Result<()> {
        match self.telnet {
            Some(_) => self.carry(&telnet::HELLO).await,
            None => Ok(()),
        }
    }

    /// Reads what is there, at least a byte; 0 at the end.
    pub async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = match &self.carrier {
                Carrier::Socket(stream) => stream.recv(into).await?,
                Carrier::Stdio => stdio::read(into).await?,
                Carrier::Pipe(pipe) => pipe.read(into).await?,
                Carrier::Pty(pty) => pty.read(into).await?,
                Carrier::Front(front) => front.read(into).await?,
                Carrier::File(_) | Carrier::Ring(_) => std::future::pending().await,
            };
            let Some(filter) = self.telnet.as_ref().filter(|_| count > 0) else { return Ok(count) };
            let kept = filter.lock().unwrap_or_else(PoisonError::into_inner).strip(&mut into[..count]);
            // Nothing but commands is not the end.
            if kept > 0 {
                return Ok(kept);
            }
        }
    }

    /// Writes all of `bytes`.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<()> {
        // Nobody is the worse for a log that is full.
        if let Some(Err(error)) = self.log.as_ref().map(|log| (&**log).write_all(bytes)) {
            tracing::debug!(%error, "the log lacks something");
        }
        match &self.carrier {
            // It writes by way of another one, whose carrier is none of these.
            Carrier::Front(front) => Box::pin(front.write(bytes)).await,
            _ => self.carry(bytes).await,
        }
    }

    async fn carry(&self, bytes: &[u8]) -> io::Result<()> {
        match &self.carrier {
            Carrier::Socket(stream) => stream.send_all(bytes).await,
            Carrier::Stdio => stdio::write_all(bytes).await,
            Carrier::File(file) => (&**file).write_all(bytes),
            Carrier::Ring(ring) => {
                ring.write(bytes);
                Ok(())
            }
            Carrier::Pipe(pipe) => pipe.write_all(bytes).await,
            Carrier::Pty(pty) => pty.write_all(bytes).await,
            Carrier::Front(_) => Ok(()),
        }
    }

    /// Hangs up, if that is possible: whoever waits in `read` gets the end.
    pub fn shut(&self) {
        if let Carrier::Socket(stream) = &self.carrier {
            stream.shutdown();
        }
    }
}

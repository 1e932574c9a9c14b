//! Sockets: UNIX and TCP, never blocking, with waiting left to the thread's driver.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use crate::buf::Iov;
use crate::driver::{self, MAX_PIECES, iovecs};

/// Where a socket is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A path.
    Unix(PathBuf),
    /// A host name or address (empty: any) and a port number or service name.
    Inet {
        /// Host.
        host: String,
        /// Port.
        port: String,
    },
    /// A socket that was handed to the process.
    Fd(i32),
}

fn resolve(host: &str, port: &str) -> io::Result<Vec<SocketAddr>> {
    let number: u16 = port
        .parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("invalid port number '{port}'")))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let host = if host.is_empty() { "0.0.0.0" } else { host };
    Ok((host, number).to_socket_addrs()?.collect())
}

/// A socket that waits for clients. A UNIX socket's path is removed with it.
#[derive(Debug)]
pub struct Listener {
    fd: Arc<OwnedFd>,
    unlink: Option<PathBuf>,
    name: String,
}

impl Listener {
    /// Binds and listens. A path with a dead socket on it is taken over.
    pub fn bind(address: &Address) -> io::Result<Self> {
        let (fd, unlink, name): (OwnedFd, _, _) = match address {
            Address::Unix(path) => {
                if UnixStream::connect(path)
                    .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
                {
                    std::fs::remove_file(path)?;
                }
                let listener = UnixListener::bind(path)?;
                listener.set_nonblocking(true)?;
                (listener.into(), Some(path.clone()), format!("unix:{}", path.display()))
            }
            Address::Inet { host, port } => {
                let listener = TcpListener::bind(&*resolve(host, port)?)?;
                listener.set_nonblocking(true)?;
                let name = format!("tcp:{}", listener.local_addr()?);
                (listener.into(), None, name)
            }
            Address::Fd(fd) => {
                let fd = driver::adopt(*fd)?;
                rustix::fs::fcntl_setfl(&fd, rustix::fs::fcntl_getfl(&fd)? | rustix::fs::OFlags::NONBLOCK)?;
                (fd, None, "fd".to_owned())
            }
        };
        Ok(Self { fd: Arc::new(fd), unlink, name })
    }

    /// The address as text.
    pub fn local_address(&self) -> String {
        self.name.clone()
    }

    /// Waits until a client is there.
    pub async fn readable(&self) -> io::Result<()> {
        driver::ready(&self.fd, libc::POLLIN).await
    }

    /// The next client.
    pub async fn accept(&self) -> io::Result<Stream> {
        loop {
            let flags = rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK;
            match rustix::net::accept_with(&*self.fd, flags) {
                Ok(fd) => return Ok(Stream::new(fd)),
                Err(rustix::io::Errno::AGAIN) => self.readable().await?,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.unlink {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A piece of a message to send.
#[derive(Debug)]
pub enum Part<'a> {
    /// Bytes.
    Bytes(&'a [u8]),
    /// A buffer.
    Iov(&'a Iov),
}

/// A connected socket. One task may receive while another sends.
#[derive(Debug)]
pub struct Stream {
    fd: Arc<OwnedFd>,
}

impl Stream {
    fn new(fd: OwnedFd) -> Self {
        // Fails on UNIX sockets, which have no delay to begin with.
        let _ = rustix::net::sockopt::set_tcp_nodelay(&fd, true);
        Self { fd: Arc::new(fd) }
    }

    /// Connects.
    pub async fn connect(address: &Address) -> io::Result<Self> {
        // Connecting blocks this thread: on one machine it is immediate, and it happens at start-up only.
        let fd: OwnedFd = match address {
            Address::Unix(path) => UnixStream::connect(path)?.into(),
            Address::Inet { host, port } => {
                let host = if host.is_empty() { "localhost" } else { host };
                TcpStream::connect(&*resolve(host, port)?)?.into()
            }
            Address::Fd(fd) => driver::adopt(*fd)?,
        };
        rustix::fs::fcntl_setfl(&fd, rustix::fs::fcntl_getfl(&fd)? | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self::new(fd))
    }

    /// Receives what is there, at least a byte; 0 at the end.
    pub async fn recv(&self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::net::recv(&*self.fd, &mut *into, rustix::net::RecvFlags::empty()) {
                Ok((_, count)) => return Ok(count),
                Err(rustix::io::Errno::AGAIN) => driver::ready(&self.fd, libc::POLLIN).await?,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Fills a buffer. `UnexpectedEof` when the other end closes before.
    pub async fn recv_exact_iov(&self, into: &Iov) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            let pieces = iovecs(&into.slice(done, into.len() - done));
            let count = libc::c_int::try_from(pieces.len()).expect("at most MAX_PIECES");
            // SAFETY: the pieces lie in memory that `into` keeps alive during the call; the count is theirs.
            let result = unsafe { libc::readv(self.fd.as_raw_fd(), pieces.as_ptr(), count) };
            match usize::try_from(result) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count,
                Err(_) => self.wait_after_error(libc::POLLIN).await?,
            }
        }
        Ok(())
    }

    /// Sends bytes.
    pub async fn send_all(&self, bytes: &[u8]) -> io::Result<()> {
        self.send_parts(&[Part::Bytes(bytes)]).await
    }

    /// Sends several parts, as few calls as the kernel allows.
    pub async fn send_parts(&self, parts: &[Part<'_>]) -> io::Result<()> {
        let mut sent = 0;
        while let Some(result) = self.send_from(parts, sent) {
            match usize::try_from(result) {
                Ok(count) => sent += count,
                Err(_) => self.wait_after_error(libc::POLLOUT).await?,
            }
        }
        Ok(())
    }

    /// One call for what is left after `skip` bytes; `None` when nothing is.
    fn send_from(&self, parts: &[Part<'_>], mut skip: usize) -> Option<isize> {
        let mut pieces = Vec::with_capacity(parts.len() * 2);
        for part in parts {
            let len = match part {
                Part::Bytes(bytes) => bytes.len(),
                Part::Iov(iov) => iov.len(),
            };
            if skip >= len {
                skip -= len;
                continue;
            }
            match part {
                Part::Bytes(bytes) => pieces.push(libc::iovec {
                    iov_base: bytes[skip..].as_ptr().cast_mut().cast(),
                    iov_len: len - skip,
                }),
                Part::Iov(iov) => pieces.extend(iovecs(&iov.slice(skip, len - skip))),
            }
            skip = 0;
            if pieces.len() >= MAX_PIECES {
                pieces.truncate(MAX_PIECES);
                break;
            }
        }
        if pieces.is_empty() {
            return None;
        }
        // SAFETY: all zeroes is a valid message header without address and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = pieces.as_mut_ptr();
        message.msg_iovlen = pieces.len();
        // SAFETY: the header and its pieces live during the call; the kernel only reads from the pieces.
        Some(unsafe { libc::sendmsg(self.fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) })
    }

    async fn wait_after_error(&self, events: i16) -> io::Result<()> {
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => driver::ready(&self.fd, events).await,
            error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            error => Err(error),
        }
    }

    /// Ends the connection in both directions; whoever waits on it wakes up.
    pub fn shutdown(&self) {
        let _ = rustix::net::shutdown(&*self.fd, rustix::net::Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{rt, thread::block_on};

    #[test]
    fn a_message_larger_than_any_buffer_arrives_whole() {
        let path = std::env::temp_dir().join(format!("underlay-net-{}", std::process::id()));
        let address = Address::Unix(path.clone());
        block_on(async {
            let listener = Listener::bind(&address).expect("binds");
            let client = Stream::connect(&address).await.expect("connects");
            let server = listener.accept().await.expect("accepts");
            let sending = rt::spawn(async move {
                let body = Iov::filled(3 << 20, 9);
                server.send_parts(&[Part::Bytes(b"head"), Part::Iov(&body)]).await.expect("sent");
                server
            });
            let mut head = [0; 4];
            assert_eq!(client.recv(&mut head).await.expect("received"), 4);
            let body = Iov::zeroed(3 << 20);
            client.recv_exact_iov(&body).await.expect("received");
            assert!(body.to_vec().iter().all(|b| *b == 9));
            sending.await.shutdown();
            assert_eq!(client.recv(&mut head).await.expect("the end"), 0);
        });
        assert!(!path.exists(), "the path goes with the listener");
    }
}

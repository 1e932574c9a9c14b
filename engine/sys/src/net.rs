//! Stream sockets: Unix and TCP.
//!
//! A call is tried at once; only when it would wait, readiness is asked of the ring (or of `poll(2)`).

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use smallvec::SmallVec;

use crate::buf::Iov;
use crate::{driver, pool};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// Most pieces of one `sendmsg`.
const MAX_PIECES: usize = 1024;

/// Where to listen or to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A socket in the file system.
    Unix(PathBuf),
    /// TCP, over IPv4 or IPv6.
    Inet {
        /// Name or number; empty: any.
        host: String,
        /// Number or name of a service.
        port: String,
    },
    /// A descriptor that the process was started with.
    Fd(i32),
}

fn would_block(error: rustix::io::Errno) -> bool {
    error == rustix::io::Errno::AGAIN || error == rustix::io::Errno::WOULDBLOCK
}

fn resolve(host: &str, port: &str, passive: bool) -> io::Result<Vec<SocketAddr>> {
    let port: u16 = port
        .parse()
        .map_err(|_| io::Error::new(ErrorKind::InvalidInput, format!("'{port}' is not a port number")))?;
    let host = match (host, passive) {
        ("", true) => "::",
        ("", false) => "localhost",
        (host, _) => host.trim_start_matches('[').trim_end_matches(']'),
    };
    let found: Vec<_> = (host, port).to_socket_addrs()?.collect();
    if found.is_empty() {
        return Err(io::Error::new(ErrorKind::NotFound, format!("no address for '{host}'")));
    }
    Ok(found)
}

fn socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
}

fn family(address: &SocketAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

/// Takes over a socket that the process was started with.
fn take_fd(fd: i32) -> io::Result<OwnedFd> {
    let fd = driver::adopt(fd)?;
    if rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) != rustix::fs::FileType::Socket {
        // Somebody's file, which must not be closed here.
        let _ = fd.into_raw_fd();
        return Err(io::Error::from_raw_os_error(libc::ENOTSOCK));
    }
    rustix::io::ioctl_fionbio(&fd, true)?;
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// Takes connections. Dropping it removes its socket from the file system.
#[derive(Debug)]
pub struct Listener {
    fd: Arc<OwnedFd>,
    path: Option<PathBuf>,
}

impl Listener {
    /// Listens at `address`. A socket file that nobody listens on any more is replaced.
    pub fn bind(address: &Address) -> io::Result<Self> {
        let fd = match address {
            Address::Unix(path) => bind_unix(path)?,
            Address::Inet { host, port } => bind_inet(&resolve(host, port, true)?)?,
            Address::Fd(fd) => take_fd(*fd)?,
        };
        let path = match address {
            Address::Unix(path) => Some(std::path::absolute(path)?),
            _ => None,
        };
        let listener = Self { fd: Arc::new(fd), path };
        rustix::net::listen(&*listener.fd, BACKLOG)?;
        Ok(listener)
    }

    /// Waits until a client is there.
    pub async fn readable(&self) -> io::Result<()> {
        driver::ready(&self.fd, libc::POLLIN).await
    }

    /// The next client.
    pub async fn accept(&self) -> io::Result<Stream> {
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match rustix::net::accept_with(&*self.fd, flags) {
                Ok(fd) => return Ok(Stream::new(fd)),
                Err(error) if would_block(error) => self.readable().await?,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The address as text: `unix:PATH`, `tcp:HOST:PORT` with the port that was bound, or `fd`.
    pub fn local_address(&self) -> String {
        match (&self.path, self.local_port()) {
            (Some(path), _) => format!("unix:{}", path.display()),
            (None, Some(_)) => format!("tcp:{}", describe(rustix::net::getsockname(&*self.fd).ok())),
            (None, None) => "fd".to_owned(),
        }
    }

    /// The port it listens on, when that is TCP: for port 0, which means any.
    pub fn local_port(&self) -> Option<u16> {
        let address = rustix::net::getsockname(&*self.fd).ok()?;
        Some(SocketAddr::try_from(address).ok()?.port())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Perhaps somebody removed it before us.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn describe(address: Option<rustix::net::SocketAddrAny>) -> String {
    let Some(address) = address else { return String::new() };
    if let Ok(inet) = SocketAddr::try_from(address.clone()) {
        return inet.to_string();
    }
    let unix = SocketAddrUnix::try_from(address).ok();
    let path = unix.as_ref().and_then(SocketAddrUnix::path_bytes).unwrap_or_default();
    String::from_utf8_lossy(path).into_owned()
}

fn unix_address(path: &Path) -> io::Result<SocketAddrUnix> {
    SocketAddrUnix::new(path.as_os_str().as_bytes()).map_err(|_| {
        io::Error::new(ErrorKind::InvalidInput, format!("UNIX socket path '{}' is too long", path.display()))
    })
}

fn bind_unix(path: &Path) -> io::Result<OwnedFd> {
    let address = unix_address(path)?;
    let fd = socket(AddressFamily::UNIX)?;
    match rustix::net::bind(&fd, &address) {
        Err(rustix::io::Errno::ADDRINUSE) => {}
        result => return Ok(result.map(|()| fd)?),
    }
    let is_socket = std::fs::symlink_metadata(path)
        .is_ok_and(|meta| std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type()));
    if !is_socket || somebody_listens(&address)? {
        return Err(io::Error::from_raw_os_error(libc::EADDRINUSE));
    }
    std::fs::remove_file(path)?;
    rustix::net::bind(&fd, &address)?;
    Ok(fd)
}

/// Whether a process that lives listens there. The kernel takes a killed process' requests down in its own time, and
/// its socket with them: until then it still takes connections that nobody will ever answer.
fn somebody_listens(address: &SocketAddrUnix) -> io::Result<bool> {
    let probe = socket(AddressFamily::UNIX)?;
    match rustix::net::connect(&probe, address) {
        Err(rustix::io::Errno::CONNREFUSED) => return Ok(false),
        Err(_) => return Ok(true),
        Ok(()) => {}
    }
    // A listener of another PID namespace has no number here; it counts as alive.
    let listener = sockopt::socket_peercred(&probe).ok().map(|peer| peer.pid);
    Ok(listener.is_none_or(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH)))
}

fn bind_inet(addresses: &[SocketAddr]) -> io::Result<OwnedFd> {
    let mut last = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
    for address in addresses {
        let bound = (|| {
            let fd = socket(family(address))?;
            sockopt::set_socket_reuseaddr(&fd, true)?;
            if address.is_ipv6() {
                sockopt::set_ipv6_v6only(&fd, false)?;
            }
            rustix::net::bind(&fd, address)?;
            Ok(fd)
        })();
        match bound {
            Ok(fd) => return Ok(fd),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// One piece of what is sent.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// Bytes of the caller.
    Bytes(&'a [u8]),
    /// A buffer.
    Iov(&'a Iov),
}

/// A connection. One task may receive while another one sends.
#[derive(Debug)]
pub struct Stream {
    fd: Arc<OwnedFd>,
    /// The last call took all that had come: waiting first saves a call that would find nothing.
    drained: AtomicBool,
}

impl Stream {
    fn new(fd: OwnedFd) -> Self {
        // Fails on Unix sockets, which have no need for it.
        let _ = sockopt::set_tcp_nodelay(&fd, true);
        Self::over(Arc::new(fd))
    }

    fn over(fd: Arc<OwnedFd>) -> Self {
        Self { fd, drained: AtomicBool::new(false) }
    }

    /// Takes over a connected socket.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self::new(fd))
    }

    /// Two ends of a connection inside the process.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (a, b) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        Ok((Self::new(a), Self::new(b)))
    }

    /// Connects to `address`.
    pub async fn connect(address: &Address) -> io::Result<Self> {
        match address {
            Address::Fd(fd) => Ok(Self::new(take_fd(*fd)?)),
            Address::Unix(path) => {
                let address = unix_address(path)?;
                let fd = Arc::new(socket(AddressFamily::UNIX)?);
                connected(&fd, rustix::net::connect(&*fd, &address)).await?;
                Ok(Self::over(fd))
            }
            Address::Inet { host, port } => {
                let mut last = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
                let (host, port) = (host.clone(), port.clone());
                for address in pool::run(move || resolve(&host, &port, false)).await?? {
                    let fd = Arc::new(socket(family(&address))?);
                    match connected(&fd, rustix::net::connect(&*fd, &address)).await {
                        Ok(()) => {
                            let _ = sockopt::set_tcp_nodelay(&*fd, true);
                            return Ok(Self::over(fd));
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    /// Receives some bytes; 0: the other side has closed.
    pub async fn recv(&self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            self.expect_data().await?;
            let len = into.len();
            // SAFETY: the kernel writes at most `len` bytes into the borrowed slice, during the call.
            let count = unsafe { libc::recv(self.fd.as_raw_fd(), into.as_mut_ptr().cast(), len, 0) };
            if let Some(count) = self.after(count, libc::POLLIN).await? {
                self.drained.store(count < len, Ordering::Relaxed);
                return Ok(count);
            }
        }
    }

    /// Fills `into`. `UnexpectedEof` when the other side closes before.
    pub async fn recv_exact_iov(&self, into: &Iov) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            self.expect_data().await?;
            let count = {
                let mut vecs = pieces(&[Part::Iov(into)], done);
                let mut message = message(&mut vecs);
                // SAFETY: the pieces lie inside the lease that the caller holds during the call.
                unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message.0, 0) }
            };
            match self.after(count, libc::POLLIN).await? {
                Some(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Some(count) => {
                    done += count;
                    self.drained.store(done < into.len(), Ordering::Relaxed);
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Sends everything.
    pub async fn send_all(&self, bytes: &[u8]) -> io::Result<()> {
        self.send_parts(&[Part::Bytes(bytes)]).await
    }

    /// Sends everything, in one call if the socket takes it.
    pub async fn send_parts(&self, parts: &[Part<'_>]) -> io::Result<()> {
        let total: usize = parts.iter().map(Part::len).sum();
        let mut done = 0;
        while done < total {
            let count = {
                let mut vecs = pieces(parts, done);
                let message = message(&mut vecs);
                // SAFETY: the pieces lie inside borrowed slices and leases, for the time of the call.
                unsafe { libc::sendmsg(self.fd.as_raw_fd(), &raw const message.0, libc::MSG_NOSIGNAL) }
            };
            done += self.after(count, libc::POLLOUT).await?.unwrap_or(0);
        }
        Ok(())
    }

    async fn expect_data(&self) -> io::Result<()> {
        match self.drained.swap(false, Ordering::Relaxed) {
            true => driver::ready(&self.fd, libc::POLLIN).await,
            false => Ok(()),
        }
    }

    /// What a call gave; `None` after waiting for `events`: try again.
    async fn after(&self, count: isize, events: i16) -> io::Result<Option<usize>> {
        if let Ok(count) = usize::try_from(count) {
            return Ok(Some(count));
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            ErrorKind::WouldBlock => driver::ready(&self.fd, events).await?,
            ErrorKind::Interrupted => {}
            _ => return Err(error),
        }
        Ok(None)
    }

    /// Ends both directions: whoever waits in `recv` gets the end.
    pub fn shutdown(&self) {
        // ENOTCONN: the other side was faster.
        let _ = rustix::net::shutdown(&*self.fd, rustix::net::Shutdown::Both);
    }

    /// Ends the sending direction.
    pub fn shutdown_send(&self) {
        let _ = rustix::net::shutdown(&*self.fd, rustix::net::Shutdown::Write);
    }

    /// The other side, as far as it has a name.
    pub fn peer_address(&self) -> String {
        describe(rustix::net::getpeername(&*self.fd).ok().flatten())
    }
}

async fn connected(fd: &Arc<OwnedFd>, result: rustix::io::Result<()>) -> io::Result<()> {
    match result {
        Ok(()) => Ok(()),
        // A Unix socket with a full backlog gives EAGAIN and cannot be waited for.
        Err(rustix::io::Errno::INPROGRESS) => {
            driver::ready(fd, libc::POLLOUT).await?;
            Ok(sockopt::socket_error(&**fd)??)
        }
        Err(error) => Err(error.into()),
    }
}

impl Part<'_> {
    fn len(&self) -> usize {
        match self {
            Part::Bytes(bytes) => bytes.len(),
            Part::Iov(iov) => iov.len(),
        }
    }
}

type Pieces = SmallVec<[libc::iovec; 8]>;

/// The pieces of `parts` from byte `skip` on, as many as one call takes.
fn pieces(parts: &[Part<'_>], skip: usize) -> Pieces {
    let mut skip = skip;
    let mut vecs = Pieces::new();
    let mut add = |at: *mut u8, len: usize| {
        if skip >= len {
            skip -= len;
        } else if vecs.len() < MAX_PIECES {
            // SAFETY: `skip < len`, so the result lies inside the piece.
            vecs.push(libc::iovec { iov_base: unsafe { at.add(skip) }.cast(), iov_len: len - skip });
            skip = 0;
        }
    };
    for part in parts {
        match part {
            Part::Bytes(bytes) => add(bytes.as_ptr().cast_mut(), bytes.len()),
            Part::Iov(iov) => iov.pieces().for_each(|(at, len)| add(at, len)),
        }
    }
    vecs
}

struct Message(libc::msghdr);

fn message(vecs: &mut Pieces) -> Message {
    // SAFETY: all zeroes is a value of this plain struct: no name, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vecs.as_mut_ptr();
    message.msg_iovlen = vecs.len();
    Message(message)
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

//! Stream sockets: Unix and TCP.
//!
//! A call is tried at once; only when it would wait, readiness is asked of the ring (or of `poll(2)`).

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::epoll;
use rustix::net::{AddressFamily, Protocol, SocketAddrUnix, SocketFlags, SocketType, ipproto, sockopt};
use smallvec::{SmallVec, smallvec};

pub use crate::address::{Abstract, Address, Inet};
use crate::address::{name_address, path_address};
use crate::buf::Iov;
use crate::{driver, pool, rt};

/// Connections that wait to be accepted: as many as the kernel lets. A client on a Unix socket that does not wait is
/// refused when there are more.
const BACKLOG: i32 = i32::MAX;
/// Most pieces of one `sendmsg`.
const MAX_PIECES: usize = 1024;
/// How often is asked for room among those who wait to be let in.
const FULL_HOUSE: Duration = Duration::from_millis(10);

fn would_block(error: rustix::io::Errno) -> bool {
    error == rustix::io::Errno::AGAIN || error == rustix::io::Errno::WOULDBLOCK
}

fn socket(family: AddressFamily) -> io::Result<OwnedFd> {
    socket_of(family, None)
}

fn socket_of(family: AddressFamily, protocol: Option<Protocol>) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, protocol)?)
}

/// A socket for `address`, with the wishes of `inet`. A listener hands keep-alive on to the connections that it takes.
fn inet_socket(inet: &Inet, address: &SocketAddr) -> io::Result<OwnedFd> {
    let protocol = (inet.mptcp == Some(true)).then_some(ipproto::MPTCP);
    let fd = socket_of(family(address), protocol)?;
    if inet.keep_alive == Some(true) {
        sockopt::set_socket_keepalive(&fd, true)?;
    }
    Ok(fd)
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
    /// One for each address; at least one.
    fds: SmallVec<[Arc<OwnedFd>; 1]>,
    /// Readable when one of them is: the only one itself, or an epoll instance.
    any: Arc<OwnedFd>,
    path: Option<PathBuf>,
}

impl Listener {
    /// Listens at `address`. A socket file that nobody listens on any more is replaced.
    pub fn bind(address: &Address) -> io::Result<Self> {
        let fds = match address {
            Address::Unix(path) => smallvec![listening(bind_unix(path)?)?],
            Address::Abstract(name) => smallvec![listening(bind_abstract(name)?)?],
            Address::Inet(inet) => bind_inet(inet)?,
            Address::Fd(fd) => smallvec![listening(take_fd(*fd)?)?],
        };
        let path = match address {
            Address::Unix(path) => Some(std::path::absolute(path)?),
            _ => None,
        };
        Ok(Self { any: any_of(&fds)?, fds, path })
    }

    /// Waits until a client is there.
    pub async fn readable(&self) -> io::Result<()> {
        driver::ready(&self.any, libc::POLLIN).await
    }

    /// The next client.
    pub async fn accept(&self) -> io::Result<Stream> {
        loop {
            for fd in &self.fds {
                if let Some(client) = accept_now(fd)? {
                    return Ok(client);
                }
            }
            self.readable().await?;
        }
    }

    /// The address as text: `unix:PATH`, `tcp:HOST:PORT` with the port that was bound, or `fd`.
    pub fn local_address(&self) -> String {
        match (&self.path, self.local_port()) {
            (Some(path), _) => format!("unix:{}", path.display()),
            (None, Some(_)) => format!("tcp:{}", describe(rustix::net::getsockname(&*self.fds[0]).ok())),
            (None, None) => "fd".to_owned(),
        }
    }

    /// The port it listens on, when that is TCP: for port 0, which means any.
    pub fn local_port(&self) -> Option<u16> {
        port_of(&self.fds[0])
    }
}

fn port_of(fd: &OwnedFd) -> Option<u16> {
    let address = rustix::net::getsockname(fd).ok()?;
    Some(SocketAddr::try_from(address).ok()?.port())
}

fn listening(fd: OwnedFd) -> io::Result<Arc<OwnedFd>> {
    rustix::net::listen(&fd, BACKLOG)?;
    Ok(Arc::new(fd))
}

/// A client that is there already.
fn accept_now(fd: &OwnedFd) -> io::Result<Option<Stream>> {
    loop {
        match rustix::net::accept_with(fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(fd) => return Ok(Some(Stream::new(fd))),
            Err(error) if would_block(error) => return Ok(None),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// What becomes readable when one of `fds` does.
fn any_of(fds: &[Arc<OwnedFd>]) -> io::Result<Arc<OwnedFd>> {
    if let [only] = fds {
        return Ok(only.clone());
    }
    let all = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for fd in fds {
        epoll::add(&all, &**fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
    }
    Ok(Arc::new(all))
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

fn bind_abstract(name: &Abstract) -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::UNIX)?;
    rustix::net::bind(&fd, &name_address(name)?)?;
    Ok(fd)
}

fn bind_unix(path: &Path) -> io::Result<OwnedFd> {
    let address = path_address(path)?;
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

/// Listens on the first port of the range on which all of the host's addresses are free.
fn bind_inet(inet: &Inet) -> io::Result<SmallVec<[Arc<OwnedFd>; 1]>> {
    let places = inet.places()?;
    let first = places.first().map_or(0, SocketAddr::port);
    let mut last = io::Error::new(ErrorKind::InvalidInput, "Failed to create a socket");
    for port in first..=inet.to.unwrap_or(first) {
        match bind_places(inet, &places, port) {
            Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => last = error,
            done => return done,
        }
    }
    Err(last)
}

/// Listens on one port of all addresses but those that this machine does not have, of which it must have one.
fn bind_places(inet: &Inet, places: &[SocketAddr], port: u16) -> io::Result<SmallVec<[Arc<OwnedFd>; 1]>> {
    let (mut fds, mut port) = (SmallVec::new(), port);
    let mut absent = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
    for place in places {
        match bind_place(inet, place, port) {
            Ok(fd) => {
                port = port_of(&fd).unwrap_or(port);
                fds.push(fd);
                // It takes IPv4 as well.
                if place.is_ipv6() && place.ip().is_unspecified() {
                    break;
                }
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT)) => {
                absent = error;
            }
            Err(error) => return Err(error),
        }
    }
    if fds.is_empty() { Err(absent) } else { Ok(fds) }
}

fn bind_place(inet: &Inet, place: &SocketAddr, port: u16) -> io::Result<Arc<OwnedFd>> {
    let fd = inet_socket(inet, place)?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    if place.is_ipv6() {
        sockopt::set_ipv6_v6only(&fd, !inet.takes_ipv4())?;
    }
    let mut place = *place;
    place.set_port(port);
    rustix::net::bind(&fd, &place)?;
    listening(fd)
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

/// Bytes that may be on their way through a Unix socket, if the system allows it. Its default is less than many a
/// request has: the two sides would wait for each other several times in each.
const ON_THEIR_WAY: usize = 1 << 20;

impl Stream {
    fn new(fd: OwnedFd) -> Self {
        let stream = Self::over(Arc::new(fd));
        stream.tune();
        stream
    }

    fn over(fd: Arc<OwnedFd>) -> Self {
        Self { fd, drained: AtomicBool::new(false) }
    }

    /// Each kind of socket has one of the two options that it needs: TCP finds the size of its buffers on its own.
    fn tune(&self) {
        if sockopt::set_tcp_nodelay(&*self.fd, true).is_err() {
            let _ = sockopt::set_socket_send_buffer_size(&*self.fd, ON_THEIR_WAY);
        }
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
            Address::Unix(path) => Self::connect_unix(&path_address(path)?).await,
            Address::Abstract(name) => Self::connect_unix(&name_address(name)?).await,
            Address::Inet(inet) => {
                let mut last = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
                let wanted = inet.clone();
                for target in pool::run(move || wanted.targets()).await?? {
                    let fd = Arc::new(inet_socket(inet, &target)?);
                    match connected(&fd, rustix::net::connect(&*fd, &target)).await {
                        Ok(()) => {
                            let stream = Self::over(fd);
                            stream.tune();
                            return Ok(stream);
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    async fn connect_unix(address: &SocketAddrUnix) -> io::Result<Self> {
        let fd = Arc::new(socket(AddressFamily::UNIX)?);
        let mut result = rustix::net::connect(&*fd, address);
        // So many others wait to be let in that there is no room to wait. That cannot be waited for.
        while result == Err(rustix::io::Errno::AGAIN) {
            rt::sleep(FULL_HOUSE).await;
            result = rustix::net::connect(&*fd, address);
        }
        connected(&fd, result).await?;
        let stream = Self::over(fd);
        stream.tune();
        Ok(stream)
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

    /// This side, as far as it has a name.
    pub fn own_address(&self) -> String {
        describe(rustix::net::getsockname(&*self.fd).ok())
    }

    /// The other side, as far as it has a name.
    pub fn peer_address(&self) -> String {
        describe(rustix::net::getpeername(&*self.fd).ok().flatten())
    }
}

async fn connected(fd: &Arc<OwnedFd>, result: rustix::io::Result<()>) -> io::Result<()> {
    match result {
        Ok(()) => Ok(()),
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

    /// Python's clients with a timeout, for one, do not wait.
    #[test]
    fn a_crowd_comes_at_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        let _listener = Listener::bind(&Address::Unix(path.clone())).expect("binds");
        let address = rustix::net::SocketAddrUnix::new(&path).expect("a path");
        let clients = (0..300).map(|_| {
            let fd = socket(AddressFamily::UNIX).expect("a socket");
            rustix::net::connect(&fd, &address).map(|()| fd)
        });
        assert_eq!(clients.filter(Result::is_ok).count(), 300);
    }

    #[test]
    fn one_listener_at_several_addresses() {
        let places = ["127.0.0.1:0", "127.0.0.2:0", "1.2.3.4:0"].map(|place| place.parse().expect("a place"));
        let inet = Inet { keep_alive: Some(true), ..Inet::new("127.0.0.1", "0") };
        let fds = bind_places(&inet, &places, 0).expect("binds");
        assert_eq!(fds.len(), 2, "one address is not this machine's");
        let listener = Listener { any: any_of(&fds).expect("epoll"), fds, path: None };
        let port = listener.local_port().expect("a port");
        for host in ["127.0.0.2", "127.0.0.1", "127.0.0.2"] {
            block_on(async {
                let client = rt::spawn(async move {
                    let address = Inet::new(host, port.to_string()).into();
                    Stream::connect(&address).await.expect("connects")
                });
                let server = listener.accept().await.expect("accepts");
                assert_eq!(sockopt::socket_keepalive(&*server.fd), Ok(true));
                assert!(client.await.peer_address().starts_with(host));
            });
        }
    }

    #[test]
    fn the_first_free_port_of_a_range() {
        block_on(async {
            let taken = Listener::bind(&Inet::new("127.0.0.1", "0").into()).expect("binds");
            let first = taken.local_port().expect("a port");
            let range = |to| Inet { to: Some(to), ..Inet::new("127.0.0.1", first.to_string()) }.into();
            let only = Listener::bind(&range(first)).expect_err("taken");
            assert_eq!(only.kind(), ErrorKind::AddrInUse);
            let last = first.saturating_add(200);
            let found = Listener::bind(&range(last)).expect("one of them is free").local_port();
            assert!(found.is_some_and(|port| port > first && port <= last), "{found:?}");
            assert_eq!(Listener::bind(&range(1)).expect_err("no range").kind(), ErrorKind::InvalidInput);
        });
    }

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

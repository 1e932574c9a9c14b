//! Where to listen or to connect to, and what names of hosts and services stand for.

use std::ffi::{CStr, CString};
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::path::PathBuf;

use rustix::net::SocketAddrUnix;

/// Where to listen or to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A UNIX socket that has a name, but no file.
    Abstract(Abstract),
    /// TCP, over IPv4 or IPv6.
    Inet(Inet),
    /// A descriptor that the process was started with.
    Fd(i32),
}

/// A name of the kernel's own for a UNIX socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Abstract {
    /// At most 106 bytes.
    pub name: String,
    /// Whether the name ends where it ends; otherwise zeroes fill it up to the longest name that there may be.
    pub tight: bool,
}

/// A host and a port, with wishes; `None` is no wish.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inet {
    /// Name or number; empty: any, which only a listener may ask for.
    pub host: String,
    /// Number or name of a service.
    pub port: String,
    /// A listener takes the first free port from `port` to this one.
    pub to: Option<u16>,
    /// IPv4 is wanted, or is not.
    pub ipv4: Option<bool>,
    /// IPv6 is wanted, or is not.
    pub ipv6: Option<bool>,
    /// The kernel asks from time to time whether the other side is still there.
    pub keep_alive: Option<bool>,
    /// Multipath TCP.
    pub mptcp: Option<bool>,
    /// A listener's host and port are numbers.
    pub numeric: Option<bool>,
}

/// Longest path of a UNIX socket, and longest name of one without a file. Source: unix(7), and QEMU's for the name.
const LONGEST: (usize, usize) = (107, 106);

impl Inet {
    /// Without wishes.
    pub fn new(host: impl Into<String>, port: impl Into<String>) -> Self {
        Self { host: host.into(), port: port.into(), ..Self::default() }
    }

    /// The family of addresses that is wanted; zero: any.
    fn family(&self) -> io::Result<libc::c_int> {
        match (self.ipv4, self.ipv6) {
            (Some(false), Some(false)) => {
                Err(io::Error::new(ErrorKind::InvalidInput, "Cannot disable IPv4 and IPv6 at same time"))
            }
            (Some(true), Some(true)) | (None, None) => Ok(libc::AF_UNSPEC),
            (Some(true), _) | (_, Some(false)) => Ok(libc::AF_INET),
            (_, Some(true)) | (Some(false), _) => Ok(libc::AF_INET6),
        }
    }

    /// The addresses to connect to, best first.
    pub(crate) fn targets(&self) -> io::Result<Vec<SocketAddr>> {
        look_up(&self.host, &self.port, self.family()?, libc::AI_V4MAPPED | libc::AI_ADDRCONFIG)
    }

    /// The addresses to listen on together.
    pub(crate) fn places(&self) -> io::Result<Vec<SocketAddr>> {
        let family = self.family()?;
        let numeric =
            if self.numeric == Some(true) { libc::AI_NUMERICHOST | libc::AI_NUMERICSERV } else { 0 };
        let mut found = look_up(&self.host, &self.port, family, libc::AI_PASSIVE | numeric)?;
        // First the one that may stand for all others.
        found.sort_by_key(|address| !(address.is_ipv6() && address.ip().is_unspecified()));
        Ok(found)
    }

    /// Whether a listener takes IPv4 where IPv6 can.
    pub(crate) fn takes_ipv4(&self) -> bool {
        self.ipv4 == Some(true) || (self.ipv4.is_none() && self.ipv6 != Some(true))
    }
}

impl Address {
    /// What to say of an error that came up before the kernel was asked for a connection or a listener.
    pub fn misunderstood(&self, error: &io::Error) -> Option<String> {
        match (self, error.kind()) {
            _ if error.raw_os_error().is_some() => None,
            (Self::Inet(_), ErrorKind::NotFound) => {
                Some(format!("address resolution failed for {self}: {error}"))
            }
            (_, ErrorKind::InvalidInput) => Some(error.to_string()),
            _ => None,
        }
    }
}

/// As messages call it.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Abstract(name) => f.write_str(&name.name),
            Self::Inet(inet) => write!(f, "{}:{}", inet.host, inet.port),
            Self::Fd(fd) => write!(f, "fd {fd}"),
        }
    }
}

impl From<Inet> for Address {
    fn from(inet: Inet) -> Self {
        Self::Inet(inet)
    }
}

/// The address of a UNIX socket with a file.
pub(crate) fn path_address(path: &std::path::Path) -> io::Result<SocketAddrUnix> {
    let bytes = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str());
    SocketAddrUnix::new(bytes).map_err(|_| too_long(&path.display().to_string(), LONGEST.0))
}

/// The address of a UNIX socket without a file.
pub(crate) fn name_address(name: &Abstract) -> io::Result<SocketAddrUnix> {
    if name.name.len() > LONGEST.1 {
        return Err(too_long(&name.name, LONGEST.1));
    }
    let mut bytes = name.name.clone().into_bytes();
    if !name.tight {
        bytes.resize(LONGEST.0, 0);
    }
    Ok(SocketAddrUnix::new_abstract_name(&bytes)?)
}

fn too_long(path: &str, longest: usize) -> io::Error {
    let text = format!("UNIX socket path '{path}' is too long\nPath must be less than {} bytes", longest + 1);
    io::Error::new(ErrorKind::InvalidInput, text)
}

/// Asks the system's resolver for stream addresses. Its own errors are of the kind `NotFound`, with its words.
fn look_up(host: &str, port: &str, family: libc::c_int, flags: libc::c_int) -> io::Result<Vec<SocketAddr>> {
    // The resolver takes larger numbers and drops what is too much.
    if port.bytes().all(|byte| byte.is_ascii_digit()) && !port.is_empty() && port.parse::<u16>().is_err() {
        return Err(unresolved(libc::EAI_SERVICE));
    }
    let name = |text: &str| CString::new(text).map_err(|_| unresolved(libc::EAI_NONAME));
    let passive = flags & libc::AI_PASSIVE != 0;
    let host = if host.is_empty() && passive { None } else { Some(name(host)?) };
    let port = name(if port.is_empty() { "0" } else { port })?;
    // SAFETY: all zeroes is a value of this plain struct: no wishes, null pointers.
    let mut hints: libc::addrinfo = unsafe { std::mem::zeroed() };
    hints.ai_family = family;
    hints.ai_flags = flags;
    hints.ai_socktype = libc::SOCK_STREAM;
    let mut list = std::ptr::null_mut();
    let host = host.as_ref().map_or(std::ptr::null(), |host| host.as_ptr());
    // SAFETY: the names end with a zero and outlive the call, `hints` has no pointers, `list` takes the result.
    let code = unsafe { libc::getaddrinfo(host, port.as_ptr(), &raw const hints, &raw mut list) };
    if code != 0 {
        return Err(unresolved(code));
    }
    let mut found = Vec::new();
    let mut at = list;
    // SAFETY: `at` is null or an entry of the list, which lives until it is freed below.
    while let Some(entry) = unsafe { at.as_ref() } {
        // SAFETY: the resolver gives each entry an address of the length it says, of the family it says.
        found.extend(unsafe { socket_address(entry) });
        at = entry.ai_next;
    }
    // SAFETY: the list comes from `getaddrinfo`, and nothing of it is kept.
    unsafe { libc::freeaddrinfo(list) };
    match found.is_empty() {
        true => Err(unresolved(libc::EAI_NONAME)),
        false => Ok(found),
    }
}

/// # Safety
/// `entry.ai_addr` must point to an address of `entry.ai_family`, of at least that family's length.
unsafe fn socket_address(entry: &libc::addrinfo) -> Option<SocketAddr> {
    match entry.ai_family {
        libc::AF_INET => {
            // SAFETY: an address of this family; see above.
            let address = unsafe { entry.ai_addr.cast::<libc::sockaddr_in>().read_unaligned() };
            let ip = std::net::Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
            Some(SocketAddr::from((ip, u16::from_be(address.sin_port))))
        }
        libc::AF_INET6 => {
            // SAFETY: an address of this family; see above.
            let address = unsafe { entry.ai_addr.cast::<libc::sockaddr_in6>().read_unaligned() };
            let ip = std::net::Ipv6Addr::from(address.sin6_addr.s6_addr);
            let port = u16::from_be(address.sin6_port);
            let address = std::net::SocketAddrV6::new(ip, port, address.sin6_flowinfo, address.sin6_scope_id);
            Some(SocketAddr::V6(address))
        }
        _ => None,
    }
}

fn unresolved(code: libc::c_int) -> io::Error {
    // SAFETY: the answer is a text that ends with a zero and is never freed.
    let text = unsafe { CStr::from_ptr(libc::gai_strerror(code)) };
    io::Error::new(ErrorKind::NotFound, text.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inet(host: &str, port: &str) -> Inet {
        Inet::new(host, port)
    }

    #[test]
    fn numbers_need_no_resolver() {
        let v4 = inet("127.0.0.1", "80").targets().expect("found");
        assert_eq!(v4, ["127.0.0.1:80".parse().expect("an address")]);
        let any = inet("", "5").places().expect("found");
        assert!(any.iter().all(|address| address.ip().is_unspecified() && address.port() == 5), "{any:?}");
        let only = Inet { ipv4: Some(true), ..inet("", "5") };
        assert_eq!(only.places().expect("found"), ["0.0.0.0:5".parse().expect("an address")]);
    }

    #[test]
    fn what_means_nothing_is_said_as_the_system_says_it() {
        let off = Inet { ipv4: Some(false), ipv6: Some(false), ..inet("127.0.0.1", "1") };
        for (wrong, kind, text) in [
            (off, ErrorKind::InvalidInput, "Cannot disable IPv4 and IPv6 at same time"),
            (inet("127.0.0.1", "70000"), ErrorKind::NotFound, "Servname not supported for ai_socktype"),
            (inet("a\0b", "1"), ErrorKind::NotFound, "Name or service not known"),
            (
                Inet { ipv6: Some(true), ..inet("127.0.0.1", "1") },
                ErrorKind::NotFound,
                "Address family for hostname not supported",
            ),
            (
                Inet { numeric: Some(true), ..inet("localhost", "1") },
                ErrorKind::NotFound,
                "Name or service not known",
            ),
        ] {
            let error = wrong.places().expect_err("means nothing");
            assert_eq!((error.kind(), error.to_string().as_str()), (kind, text), "{wrong:?}");
        }
    }

    #[test]
    fn names_without_files_end_or_are_filled_up() {
        let address = |name: &str, tight| name_address(&Abstract { name: name.to_owned(), tight });
        assert_eq!(address("x", true).expect("short").abstract_name().map(<[u8]>::len), Some(1));
        assert_eq!(address("x", false).expect("short").abstract_name().map(<[u8]>::len), Some(107));
        let longest = "x".repeat(106);
        assert!(address(&longest, true).is_ok() && address(&longest, false).is_ok());
        let error = address(&"x".repeat(107), true).expect_err("too long");
        assert!(error.to_string().ends_with("is too long\nPath must be less than 107 bytes"), "{error}");
    }
}

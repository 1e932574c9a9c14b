//! What is said when an address cannot be listened on or connected to: QEMU's sentences.

use std::io;

use underlay_graph::error::strerror;
use underlay_sys::net::Address;

/// The system's reason, without its number.
pub fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => strerror(errno),
        None => {
            let text = error.to_string();
            text.rsplit("address information: ").next().unwrap_or(&text).to_owned()
        }
    }
}

/// Why there is no listener on `address`.
pub fn cannot_listen(address: &Address, error: &io::Error) -> String {
    match (address, error.raw_os_error()) {
        (Address::Unix(_) | Address::Abstract(_), Some(errno)) => {
            format!("Failed to bind socket to {address}: {}", strerror(errno))
        }
        (Address::Inet(_), Some(errno)) if error.kind() == io::ErrorKind::AddrInUse => {
            format!("Failed to find an available port: {}", strerror(errno))
        }
        (Address::Inet(_), Some(errno)) => format!("Failed to bind socket: {}", strerror(errno)),
        _ => no_such(address, error),
    }
}

/// Why there is no connection to `address`.
pub fn cannot_connect(address: &Address, error: &io::Error) -> String {
    match (address, error.raw_os_error()) {
        (Address::Fd(_), _) | (_, None) => no_such(address, error),
        (_, Some(errno)) => format!("Failed to connect to '{address}': {}", strerror(errno)),
    }
}

/// Why an address is none.
fn no_such(address: &Address, error: &io::Error) -> String {
    match address {
        Address::Fd(fd) => format!("File descriptor '{fd}' is not a socket"),
        _ => address.misunderstood(error).unwrap_or_else(|| error.to_string()),
    }
}

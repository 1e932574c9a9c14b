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
        (Address::Unix(path), Some(errno)) => {
            format!("Failed to bind socket to {}: {}", path.display(), strerror(errno))
        }
        (Address::Inet { .. }, Some(errno)) => {
            format!("Failed to find an available port: {}", strerror(errno))
        }
        _ => no_such(address, error),
    }
}

/// Why there is no connection to `address`.
pub fn cannot_connect(address: &Address, error: &io::Error) -> String {
    match (address, error.raw_os_error()) {
        (Address::Unix(path), Some(errno)) => {
            format!("Failed to connect to '{}': {}", path.display(), strerror(errno))
        }
        (Address::Inet { host, port }, Some(errno)) => {
            format!("Failed to connect to '{host}:{port}': {}", strerror(errno))
        }
        _ => no_such(address, error),
    }
}

/// Why an address is none.
fn no_such(address: &Address, error: &io::Error) -> String {
    match address {
        Address::Unix(_) => format!("{error}\nPath must be less than 108 bytes"),
        Address::Inet { host, port } => {
            // Either there is no such port or no such host.
            let known = port.parse::<u16>().is_ok();
            let why = if known { reason(error) } else { "Servname not supported for ai_socktype".to_owned() };
            format!("address resolution failed for {host}:{port}: {why}")
        }
        Address::Fd(fd) => format!("File descriptor '{fd}' is not a socket"),
    }
}

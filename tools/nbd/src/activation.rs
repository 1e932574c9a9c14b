//! A socket that the program was started with, as systemd hands them over: `LISTEN_PID` names this process,
//! `LISTEN_FDS` counts the sockets, which begin with descriptor 3. Source: sd_listen_fds(3).

use underlay_sys::net::Address;

use crate::command_line::Placed;

/// The first descriptor that is handed over.
const FIRST: i32 = 3;

/// The socket, if there is one.
pub fn socket(placed_by: Placed) -> Result<Option<Address>, String> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    let is_for_us = number("LISTEN_PID") == Some(std::process::id());
    let count = number("LISTEN_FDS").filter(|_| is_for_us).unwrap_or(0);
    if count == 0 {
        return Ok(None);
    }
    if count > 1 {
        return Err("qemu-nbd does not support socket activation with LISTEN_FDS > 1".to_owned());
    }
    let conflicts = [
        (placed_by.interface, "The interface"),
        (placed_by.port, "TCP port number"),
        (placed_by.path, "Unix socket"),
    ];
    match conflicts.iter().find(|(given, _)| *given) {
        Some((_, what)) => Err(format!("{what} can't be set when using socket activation")),
        None => Ok(Some(Address::Fd(FIRST))),
    }
}

//! The human monitor: lines in, text out.
//!
//! What a line does is done by the handlers of QMP's commands ([`crate::command::execute`]).

use std::sync::Arc;

use underlay_qmp::json::Object;
use underlay_qmp::session::Request;

use crate::chardev::wire::Wire;
use crate::command;
use crate::state::Daemon;

const HELLO: &str = "QEMU 10.0.2 monitor - type 'help' for more information\r\n";
const PROMPT: &str = "(qemu) ";

/// Longest line that is taken, in bytes. Source: the reference takes no more characters.
const LONGEST: usize = 4095;

/// Talks to whoever is at the other end of `wire`, until they go.
pub async fn session(daemon: &Arc<Daemon>, wire: Wire) {
    daemon.ready.raised().await;
    let mut line = Vec::new();
    let mut buffer = [0; 4096];
    if wire.write(format!("{HELLO}{PROMPT}").as_bytes()).await.is_err() {
        return;
    }
    loop {
        let bytes = match wire.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => &buffer[..count],
        };
        for byte in bytes {
            match byte {
                b'\n' | b'\r' => {
                    let typed = String::from_utf8_lossy(&std::mem::take(&mut line)).into_owned();
                    let answer = execute(daemon, &typed).await.replace('\n', "\r\n");
                    if wire.write(format!("{answer}{PROMPT}").as_bytes()).await.is_err() {
                        return;
                    }
                }
                _ if line.len() < LONGEST => line.push(*byte),
                _ => {}
            }
        }
    }
}

/// Does what a line says; what is to be shown.
pub async fn execute(daemon: &Daemon, line: &str) -> String {
    let command = match line.split_whitespace().next() {
        None => return String::new(),
        Some("q" | "quit") => "quit",
        Some("s" | "stop") => "stop",
        Some("c" | "cont") => "cont",
        Some("system_reset") => "system_reset",
        Some(other) => return format!("unknown command: '{other}'\n"),
    };
    let request = Request { command, arguments: Object::new(), id: None };
    match command::execute(daemon, request).await {
        Ok(_) => String::new(),
        Err(error) => format!("Error: {error}\n"),
    }
}

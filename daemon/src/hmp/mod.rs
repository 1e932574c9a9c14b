//! The human monitor: lines in, text out.
//!
//! [`readline`] takes what is typed, [`complete`] says how it may go on, [`parse`] reads a line by the descriptions in
//! [`table`], [`run`] does what it says with the handlers of QMP's commands, and [`show`] has the words for the
//! answers.

mod complete;
mod disks;
mod parse;
mod readline;
mod run;
mod show;
mod table;

use std::sync::Arc;

use readline::{PROMPT, Readline, Typed};

use crate::chardev::wire::Wire;
use crate::state::Daemon;

const HELLO: &str = "QEMU 10.0.2 monitor - type 'help' for more information\r\n";

/// Talks to whoever is at the other end of `wire`, until they go. What they have typed is done, whether they still
/// listen or not.
pub async fn session(daemon: &Arc<Daemon>, wire: Wire) {
    daemon.ready.raised().await;
    let mut readline = Readline::default();
    let mut buffer = [0; 4096];
    let mut listens = wire.write(format!("{HELLO}{PROMPT}").as_bytes()).await.is_ok();
    loop {
        let bytes = match wire.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => &buffer[..count],
        };
        let mut out = Vec::new();
        for byte in bytes {
            match readline.push(*byte, &mut out) {
                Typed::Nothing => {}
                Typed::Complete(typed) => {
                    let typed = String::from_utf8_lossy(&typed);
                    let (words, len) = complete::completions(daemon, &typed);
                    readline.complete(words, len, &mut out);
                }
                Typed::Line(line) => {
                    listens = listens && wire.write(&out).await.is_ok();
                    out = match std::str::from_utf8(&line) {
                        Ok(line) => execute(daemon, line, readline.history()).await.into_bytes(),
                        // What stood in their place might be the name of another file.
                        Err(_) => b"Error: bytes that are not UTF-8 are not supported\r\n".to_vec(),
                    };
                    if daemon.quit.is_raised() {
                        // Nobody cares whether that gets there.
                        let _ = wire.write(&out).await;
                        return;
                    }
                    out.extend(PROMPT.bytes());
                }
            }
        }
        listens = listens && wire.write(&out).await.is_ok();
    }
}

/// Does what a line says; what is to be shown, for a terminal.
pub async fn execute(daemon: &Daemon, line: &str, history: &[Vec<u8>]) -> String {
    run::execute(daemon, line, history).await.replace('\n', "\r\n")
}

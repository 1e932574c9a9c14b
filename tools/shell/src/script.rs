//! Not on a terminal: lines from standard input, replies to standard output, and the first error ends it.

use std::io::{BufRead, Read, Write};

use crate::link::Link;
use crate::session::{Done, Session, Show, Trouble};

/// Longest line, in bytes.
const MAX_LINE: u64 = 16 << 20;

/// Executes what comes from `input`; or what to complain about.
pub(crate) fn run(mut session: Session, link: &Link, mut input: impl BufRead) -> Result<(), String> {
    let mut number = 0_u64;
    let mut bytes = Vec::new();
    loop {
        number += 1;
        let complain = |text: String| format!("line {number}: {text}");
        bytes.clear();
        let read = input.by_ref().take(MAX_LINE).read_until(b'\n', &mut bytes);
        match read.map_err(|error| format!("standard input: {error}"))? {
            0 if session.is_open() => return Err("the transaction at the end is not closed".to_owned()),
            0 => return Ok(()),
            _ if bytes.len() as u64 == MAX_LINE => return Err(complain("too long".to_owned())),
            _ => {}
        }
        let line = std::str::from_utf8(&bytes).map_err(|error| complain(error.to_string()))?;
        let mut lost = Ok(());
        let done = session.line(line, link, &mut |shown| {
            let (Show::Message(text) | Show::Error(text)) = shown;
            if lost.is_ok() {
                lost = print(text);
            }
        });
        match done {
            Ok(Done::Well) => lost?,
            Ok(Done::Refused { command, class, desc }) => {
                return Err(complain(format!("{command}: {class}: {desc}")));
            }
            Err(Trouble::Line(error)) => return Err(complain(error.to_string())),
            Err(Trouble::Over(reason)) => return Err(complain(reason)),
        }
    }
}

/// Prints a line, or several, in one go.
pub(crate) fn print(text: &str) -> Result<(), String> {
    let mut out = std::io::stdout().lock();
    let done = out.write_all(format!("{text}\n").as_bytes()).and_then(|()| out.flush());
    done.map_err(|error| format!("standard output: {error}"))
}

//! The command line of qemu-nbd on Underlay's NBD server: one disk for one or more clients, or a look at what
//! another server has.
//!
//! `command_line` understands the words, `server` serves, `list` looks, `activation` takes over a socket.
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod activation;
pub mod command_line;
mod list;
mod server;

use std::io::Write;

use command_line::{Refusal, Wish, understand};
use underlay_sys::thread::block_on;

/// Runs the program; the exit status.
pub fn main(program: &str, words: &[String]) -> i32 {
    let name = program.rsplit('/').next().unwrap_or(program);
    let done = match understand(words, &mut |warning| complain(&format!("{name}: {warning}"))) {
        Ok(Wish::Print(text)) => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            return 0;
        }
        Ok(Wish::List(address)) => block_on(list::run(&address)).map_err(Refusal::Text),
        Ok(Wish::Serve(serving)) => server::run(name, *serving).map_err(Refusal::Text),
        Err(refused) => Err(refused),
    };
    let Err(refused) = done else { return 0 };
    let see_help = format!("Try `{name} --help' for more information.");
    match refused {
        Refusal::Text(text) => complain(&format!("{name}: {text}")),
        Refusal::Option(text) => complain(&format!("{name}: {text}\n{name}: {see_help}")),
        Refusal::Count => complain(&format!("{name}: Invalid number of arguments\n{see_help}")),
    }
    1
}

/// Prints to standard error; nobody may be reading any more.
fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

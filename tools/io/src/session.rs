//! A run of commands on the disk that is open, if one is.

use std::sync::Arc;

use underlay_disk::Disk;
use underlay_img::getopt::{Known, parse};
use underlay_sys::rt;

use crate::monitor::Accounts;
use crate::report::Out;
use crate::table::{self, Command, Needs};
use crate::{aio, data, help, image, monitor};

/// How a command ends that does not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// All has been said.
    Silent,
    /// To standard output: a request failed, or a number is none.
    Plain(String),
    /// To standard error: the words do not belong together.
    Words(String),
    /// To standard error, behind the program's name: the disk would not.
    Disk(String),
    /// To standard output: how the command is called.
    Usage,
    /// To standard error, and how the command is called to standard output: there is no such option.
    Option(String),
}

/// What a command ends with.
pub type Done = Result<(), Fault>;

impl From<String> for Fault {
    fn from(text: String) -> Self {
        Self::Plain(text)
    }
}

/// What comes after a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The next one.
    Done,
    /// The next one, but the exit status is 1.
    Failed,
    /// The end.
    Quit,
}

/// What commands work on.
#[derive(Debug)]
pub struct Session {
    /// Where it all is said.
    pub out: Out,
    /// Under which name the program was started.
    pub program: String,
    /// The open disk.
    pub disk: Option<Disk>,
    /// Who counts requests.
    pub accounts: Option<Arc<dyn Accounts>>,
    /// Buffers that are not aligned as direct I/O needs them (`-m`).
    pub misalign: bool,
    /// Requests that nobody has waited for.
    pub pending: Vec<rt::JoinHandle<()>>,
}

/// An option's letter and its argument.
pub type Given = (char, String);

/// Reads the options of a command; in their order, and the words that are none.
pub fn options(
    name: &str,
    short: &'static str,
    words: &[String],
) -> Result<(Vec<Given>, Vec<String>), Fault> {
    let known = Known { short, long: &[] };
    let (options, others) = parse(known, words)
        .map_err(|failure| Fault::Option(format!("{name}: {}", failure.message.unwrap_or_default())))?;
    let letter = |(name, value): (String, String)| name.chars().next().map(|letter| (letter, value));
    Ok((options.into_iter().filter_map(letter).collect(), others))
}

/// The words of a line.
pub fn words(line: &str) -> Vec<String> {
    let words = line.trim_end_matches('\n').split(' ').filter(|word| !word.is_empty());
    words.map(str::to_owned).collect()
}

impl Session {
    /// Of a program of that name, with no disk yet.
    pub fn of_program(name: &str, misalign: bool) -> Self {
        Self {
            out: Out::Streams,
            program: name.to_owned(),
            disk: None,
            accounts: None,
            misalign,
            pending: Vec::new(),
        }
    }

    /// Whether it is a monitor whose commands these are.
    pub fn is_of_monitor(&self) -> bool {
        matches!(self.out, Out::Monitor(_))
    }

    /// The open disk; there always is one for commands that need it.
    pub fn disk(&self) -> Result<&Disk, Fault> {
        self.disk.as_ref().ok_or_else(no_disk)
    }

    /// Waits for all requests that are under way.
    pub async fn drain(&mut self) {
        for request in self.pending.drain(..) {
            request.await;
        }
    }

    /// Executes one line.
    pub async fn execute(&mut self, line: &str) -> Next {
        let words = words(line);
        let Some((name, rest)) = words.split_first() else { return Next::Done };
        let known = table::find(name).filter(|found| !self.is_of_monitor() || found.is_of_monitors());
        let Some(command) = known else {
            self.out.complain(format_args!("command \"{name}\" not found"));
            return Next::Failed;
        };
        if command.name == "quit" {
            return Next::Quit;
        }
        let Err(fault) = self.run(command, name, rest).await else { return Next::Done };
        match fault {
            Fault::Silent => {}
            Fault::Plain(text) => self.out.line(text),
            Fault::Words(text) => self.out.complain(text),
            Fault::Disk(text) if self.is_of_monitor() => self.out.complain(text),
            Fault::Disk(text) => self.out.complain(format_args!("{}: {text}", self.program)),
            Fault::Usage => self.out.line(command.line(command.name)),
            Fault::Option(text) => {
                self.out.complain(text);
                self.out.line(command.line(command.name));
            }
        }
        Next::Failed
    }

    async fn run(&mut self, command: &Command, name: &str, words: &[String]) -> Done {
        let lacks_disk = command.needs != Needs::Nothing && self.disk.is_none();
        if lacks_disk && !self.is_of_monitor() {
            return Err(no_disk());
        }
        if let Some(text) = command.wrong_count(name, words.len()) {
            return Err(Fault::Words(text));
        }
        if lacks_disk {
            return monitor::without_medium(command.name, words);
        }
        if command.needs == Needs::Writable && self.disk()?.is_read_only() {
            return Err(Fault::Disk("Block node is read-only".to_owned()));
        }
        match command.name {
            "abort" => std::process::abort(),
            "aio_flush" => {
                aio::flush(self).await;
                Ok(())
            }
            "aio_read" => aio::read(self, name, words),
            "aio_write" => aio::write(self, name, words),
            "alloc" => image::alloc(self, words).await,
            "close" => image::close(self).await,
            "discard" => data::discard(self, name, words).await,
            "flush" => {
                let flushed = self.disk()?.root.flush().await;
                flushed.map_err(|error| data::failed("flush", &error))
            }
            "help" => help::show(&self.out, self.is_of_monitor(), words.first().map(String::as_str)),
            "info" => image::info(self).await,
            "length" => image::length(self).await,
            "map" => image::map(self).await,
            "open" => image::open(self, name, words).await,
            "read" => data::read(self, name, words).await,
            "readv" => data::readv(self, name, words).await,
            "reopen" if self.is_of_monitor() => Err(monitor::no_reopen()),
            "reopen" => image::reopen(self, name, words).await,
            "sigraise" => sigraise(&words[0]),
            "sleep" => sleep(&words[0]).await,
            "truncate" => image::truncate(self, name, words).await,
            "write" => data::write(self, name, words).await,
            "writev" => data::writev(self, name, words).await,
            _ => unsupported(command.name, words),
        }
    }
}

fn no_disk() -> Fault {
    Fault::Words("no file open, try 'help open'".to_owned())
}

async fn sleep(word: &str) -> Done {
    let number = crate::number::integer(word);
    let milliseconds = number.ok_or_else(|| Fault::Plain(format!("{word} is not a valid number")))?;
    rt::sleep(std::time::Duration::from_millis(milliseconds)).await;
    Ok(())
}

fn sigraise(word: &str) -> Done {
    let number = crate::number::bytes(word)?;
    let signal = i32::try_from(number);
    // As in the reference, one more than there are does nothing.
    let signal = signal.ok().filter(|signal| *signal <= 65);
    let too_large = || Fault::Plain(format!("signal argument '{word}' is too large to be a valid signal"));
    let _ = underlay_sys::process::raise(signal.ok_or_else(too_large)?);
    Ok(())
}

/// Commands for drivers that we do not have: what the reference says when its disk has none of them either.
pub fn unsupported(name: &str, words: &[String]) -> Done {
    let what = match name {
        "break" => "Could not set breakpoint".to_owned(),
        "resume" => "Could not resume request".to_owned(),
        "remove_break" => format!("Could not remove breakpoint {}", words[0]),
        // The reference waits for ever.
        "wait_break" => "Could not wait for a breakpoint".to_owned(),
        zone => format!("{} failed", zone.replace('_', " ")),
    };
    Err(Fault::Plain(format!("{what}: Operation not supported")))
}

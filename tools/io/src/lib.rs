//! The command line of qemu-io on Underlay's engine: reads and writes in disk images, command by command.
//!
//! `table` says what there is, `session` runs a line, `data`, `aio`, `image` and `help` do the work, `report` prints.
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod aio;
mod data;
mod help;
mod image;
pub mod monitor;
mod number;
mod report;
mod session;
mod table;

use underlay_disk::{Request, Source, parse_options};
use underlay_img::getopt::{Known, parse};
use underlay_sys::complain;
use underlay_sys::thread::block_on;

use report::Out;
use session::{Next, Session};

const KNOWN: Known = Known {
    short: "hVc:d:f:rsCnmki:t:T:U",
    long: &[
        ("help", "h", false),
        ("version", "V", false),
        ("cmd", "c", true),
        ("format", "f", true),
        ("read-only", "r", false),
        ("snapshot", "s", false),
        ("copy-on-read", "C", false),
        ("nocache", "n", false),
        ("misalign", "m", false),
        ("native-aio", "k", false),
        ("aio", "i", true),
        ("cache", "t", true),
        ("discard", "d", true),
        ("trace", "T", true),
        ("force-share", "U", false),
        ("image-opts", "image-opts", false),
        ("object", "object", true),
    ],
};

const HELP: &str = "\
Usage: qemu-io [OPTIONS]... [-c STRING]... [FILE]
Reads and writes in a disk image.

  -c, --cmd=STRING      run this command (may be repeated); without it commands come from standard input
      --image-opts      FILE is a list of options: driver=qcow2,file.filename=disk.img
  -f, --format=FMT      the image's format; probed when absent
  -r, --read-only       open for reading only
  -n, --nocache         past the page cache, as -t none
  -t, --cache=MODE      none, writeback, writethrough, directsync or unsafe
  -d, --discard=MODE    ignore or unmap
  -i, --aio=MODE        threads, native or io_uring
  -k, --native-aio      as -i native
  -m, --misalign        use buffers that are not aligned as direct I/O needs them
  -C, --copy-on-read    copy into the image what is read from below it
  -s, --snapshot        write to a temporary overlay, which is gone at the end
  -U, --force-share     share the image with whoever uses it
  -h, --help            this help
  -V, --version         the version

Not supported yet: -T (--trace), --object.

'qemu-io -c help' lists the commands.
";

/// Longest line that is taken from standard input, in bytes.
const LONGEST_LINE: usize = 1 << 20;

/// What the command line asks for.
enum Wish {
    Run { commands: Vec<String>, disk: Option<Box<Request>>, misalign: bool },
    Print(String),
}

/// Why the command line is refused.
enum Refusal {
    Text(String),
    /// The text, if any, and how the program is called.
    Usage(Option<String>),
}

impl From<String> for Refusal {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// Runs the program; the exit status.
pub fn main(program: &str, words: &[String]) -> i32 {
    let name = program.rsplit('/').next().unwrap_or(program);
    let out = Out::Streams;
    let mut warn = |warning: &str| out.complain(format_args!("{name}: {warning}"));
    let refused = match understand(words, &mut warn) {
        Ok(Wish::Print(text)) => {
            report::prompt(&text);
            return 0;
        }
        Ok(Wish::Run { commands, disk, misalign }) => {
            let session = Session::of_program(name, misalign);
            match block_on(run(session, disk, commands)) {
                Ok(status) => return status,
                Err(text) => Refusal::Text(text),
            }
        }
        Err(refused) => refused,
    };
    match refused {
        Refusal::Text(text) => out.complain(format_args!("{name}: {text}")),
        Refusal::Usage(text) => {
            text.into_iter().for_each(|text| out.complain(format_args!("{name}: {text}")));
            report::prompt(HELP);
        }
    }
    1
}

/// Reads a command line as far as that goes without opening anything; whether it can be understood.
pub fn is_understood(words: &[String]) -> bool {
    let Ok(wish) = understand(words, &mut |_| ()) else { return false };
    let Wish::Run { commands, .. } = wish else { return true };
    commands.iter().all(|line| {
        let words: Vec<_> = session::words(line);
        let number = |word: &String| number::bytes(word).is_ok() || number::integer(word).is_some();
        let Some((name, rest)) = words.split_first() else { return true };
        let command = table::find(name);
        let fits = command.is_some_and(|command| command.wrong_count(name, rest.len()).is_none());
        fits && rest.iter().filter(|word| !word.starts_with('-')).all(number)
    })
}

fn understand(words: &[String], warn: &mut dyn FnMut(&str)) -> Result<Wish, Refusal> {
    let (options, others) = parse(KNOWN, words).map_err(|failure| Refusal::Usage(failure.message))?;
    let mut request = Request::named("");
    let (mut commands, mut misalign, mut image_opts) = (Vec::new(), false, false);
    for (option, value) in options {
        match option.as_str() {
            "c" => commands.push(value),
            "f" => request.format = Some(value),
            "r" => request.read_only = true,
            "n" => drop(request.modes.set_cache("none")),
            "m" => misalign = true,
            "k" => drop(request.modes.set_aio("native")),
            "U" => request.force_share = true,
            "image-opts" => image_opts = true,
            "h" => return Ok(Wish::Print(HELP.to_owned())),
            "V" => {
                return Ok(Wish::Print(format!(
                    "qemu-io version 10.0.2 (Underlay {})\n\
                     Copyright (c) 2026 The Underlay authors; the interface is that of QEMU 10.0.2\n",
                    env!("CARGO_PKG_VERSION")
                )));
            }
            "s" => request.temporary = true,
            "C" => request.modes.copy_on_read = true,
            "T" => return Err(image::not_yet("-T (--trace)").into()),
            "object" => return Err(image::not_yet("--object").into()),
            mode => image::set_mode(&mut request.modes, mode.chars().next().unwrap_or('i'), &value)?,
        }
    }
    let file = match others.as_slice() {
        [] => return Ok(Wish::Run { commands, disk: None, misalign }),
        [file] => file,
        _ => return Err(Refusal::Usage(None)),
    };
    if image_opts && request.format.is_some() {
        return Err("--image-opts and -f are mutually exclusive".to_owned().into());
    }
    request.source = if image_opts {
        let list = parse_options(file, None);
        list.warnings.iter().for_each(|warning| warn(warning));
        Source::Options(list.options)
    } else {
        Source::Name(file.clone())
    };
    Ok(Wish::Run { commands, disk: Some(Box::new(request)), misalign })
}

/// Opens the disk and executes the commands; the exit status.
async fn run(mut session: Session, disk: Option<Box<Request>>, commands: Vec<String>) -> Result<i32, String> {
    if let Some(request) = disk {
        session.open_disk(*request).await?;
    }
    let mut ok = true;
    if commands.is_empty() {
        ok = from_input(&mut session).await;
    }
    for line in commands {
        match session.execute(&line).await {
            Next::Failed => ok = false,
            Next::Quit => break,
            Next::Done => {}
        }
    }
    session.drain().await;
    if let Some(disk) = session.disk.take() {
        disk.close().await?;
    }
    Ok(i32::from(!ok))
}

/// Executes what comes from standard input, a command a line; whether all succeeded.
async fn from_input(session: &mut Session) -> bool {
    let mut input = Input::default();
    let mut ok = true;
    loop {
        report::prompt("qemu-io> ");
        let Some(line) = input.line().await else { return ok };
        match session.execute(&line).await {
            Next::Failed => ok = false,
            Next::Quit => return ok,
            Next::Done => {}
        }
    }
}

/// Standard input, read without holding up requests that are under way.
#[derive(Default)]
struct Input {
    bytes: Vec<u8>,
    ended: bool,
}

impl Input {
    /// The next line; `None` at the end. What is longer than any command comes in pieces.
    async fn line(&mut self) -> Option<String> {
        loop {
            let end = self.bytes.iter().position(|byte| *byte == b'\n');
            let whole = self.ended || self.bytes.len() >= LONGEST_LINE;
            if let Some(end) = end.or(whole.then_some(self.bytes.len())) {
                if end == self.bytes.len() && self.bytes.is_empty() {
                    return None;
                }
                let rest = self.bytes.split_off((end + 1).min(self.bytes.len()));
                let line = std::mem::replace(&mut self.bytes, rest);
                match String::from_utf8(line) {
                    Ok(line) => return Some(line),
                    // What stood in their place might be the name of another file.
                    Err(_) => complain!("bytes that are not UTF-8 are not supported"),
                }
                continue;
            }
            let mut more = [0; 4096];
            match underlay_sys::stdio::read(&mut more).await {
                Ok(0) | Err(_) => self.ended = true,
                Ok(count) => self.bytes.extend_from_slice(&more[..count]),
            }
        }
    }
}

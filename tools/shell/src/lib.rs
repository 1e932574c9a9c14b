//! qmp-shell's command line: a prompt for any QMP server, ours or QEMU's.
//!
//! `words`, `value`, `tree` and `line` understand what is typed; `link` is the connection; `session` brings both
//! together, and `script` or `prompt` around it. `vocabulary` knows what can be typed, `jobs` watches jobs, `screen`
//! keeps order on the terminal.
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod jobs;
pub mod line;
mod link;
mod prompt;
mod screen;
mod script;
mod session;
mod tree;
mod value;
pub mod vocabulary;
mod words;

use std::ffi::OsString;
use std::fs::File;
use std::io::{IsTerminal, Write, stdin, stdout};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use underlay_img::getopt::{Known, parse};
use underlay_qmp::client::Reply;
use underlay_qmp::json::{Object, Value};

use jobs::Jobs;
use line::execute;
use link::{Address, Link, Told};
use prompt::Prompt;
use screen::{Screen, harmless};
use session::{Manner, Session, human};
use vocabulary::Vocabulary;

const KNOWN: Known = Known {
    short: "hVHvpl:N",
    long: &[
        ("help", "h", false),
        ("version", "V", false),
        ("hmp", "H", false),
        ("verbose", "v", false),
        ("pretty", "p", false),
        ("logfile", "l", true),
        ("skip-negotiation", "N", false),
    ],
};

const HELP: &str = "\
Usage: qmp-shell [-H] [-v] [-p] [-l FILE] [-N] SERVER
Types commands to a QMP server: SERVER is the path of a UNIX socket, or host:port.

  -H, --hmp               lines go to the human monitor
  -v, --verbose           show what is sent, too
  -p, --pretty            JSON over several lines
  -l, --logfile=FILE      write all messages to FILE, too
  -N, --skip-negotiation  expect no greeting, negotiate nothing (for qemu-ga)
  -h, --help              this help
  -V, --version           the version

A line is a command and its arguments:
  blockdev-add driver=qcow2 node-name=n file.driver=file file.filename=/x
  blockdev-add driver=qcow2 node-name=n file={\"driver\": \"file\", 'filename': '/x'}
Dots nest, numbers between dots make lists. A value is a number, true, false or null, JSON in brackets (also as Python
writes it), a text in quotes, or a text as it stands. A line in braces is sent as it is; # begins a comment.

Several actions in one transaction, also in one line:
  transaction(
  blockdev-snapshot-sync node-name=a snapshot-file=b.qcow2 snapshot-node-name=b
  block-dirty-bitmap-add node=a name=bitmap0
  )

On a terminal events are shown as they come (TAB completes, Ctrl-D leaves). Otherwise lines are read from standard
input, each reply is printed as a line of JSON (with -v also what is sent, and events), and the first error ends it
with status 1.
";

/// Time after which the user is told that the server keeps him waiting.
const IMPATIENCE: Duration = Duration::from_secs(1);

/// What the command line asks for.
enum Wish {
    Print(String),
    Run(Options),
}

struct Options {
    server: String,
    manner: Manner,
    human: bool,
    negotiate: bool,
    log: Option<String>,
}

/// Runs the program; the exit status.
pub fn main(program: &str, words: &[String]) -> i32 {
    let name = program.rsplit('/').next().unwrap_or(program);
    let done = match understand(name, words) {
        Ok(Wish::Print(text)) => {
            let _ = stdout().write_all(text.as_bytes());
            return 0;
        }
        Ok(Wish::Run(options)) => run(options),
        Err(text) => {
            complain(&format!("{name}: {text}\nTry `{name} --help' for more information."));
            return 2;
        }
    };
    done.unwrap_or_else(|text| {
        complain(&format!("{name}: {text}"));
        1
    })
}

fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn understand(name: &str, words: &[String]) -> Result<Wish, String> {
    let (given, others) = parse(KNOWN, words).map_err(|failure| failure.message.unwrap_or_default())?;
    let manner = Manner { verbose: false, pretty: false };
    let mut options = Options { server: String::new(), manner, human: false, negotiate: true, log: None };
    for (option, value) in given {
        match option.as_str() {
            "h" => return Ok(Wish::Print(HELP.to_owned())),
            "V" => return Ok(Wish::Print(format!("{name} (Underlay {})\n", env!("CARGO_PKG_VERSION")))),
            "H" => options.human = true,
            "v" => options.manner.verbose = true,
            "p" => options.manner.pretty = true,
            "l" => options.log = Some(value),
            _ => options.negotiate = false,
        }
    }
    match <[String; 1]>::try_from(others) {
        Ok([server]) => Ok(Wish::Run(Options { server, ..options })),
        Err(others) if others.is_empty() => Err("a server is missing".to_owned()),
        Err(_) => Err("there can be only one server".to_owned()),
    }
}

/// Runs with these options; the exit status.
fn run(options: Options) -> Result<i32, String> {
    let manner = options.manner;
    if stdin().is_terminal() && stdout().is_terminal() {
        return at_a_terminal(&options);
    }
    let link = connect(&options, move |told| match told {
        // A reader that has gone is noticed at the next reply.
        Told::Event(event) if manner.verbose => drop(script::print(&manner.show(event))),
        Told::Event(_) | Told::Over(_) => {}
    })?;
    greet(&link, &options)?;
    if options.human {
        help_of_humans(&link)?;
    }
    script::run(Session::new(manner, options.human), &link, stdin().lock()).map(|()| 0)
}

fn at_a_terminal(options: &Options) -> Result<i32, String> {
    let manner = options.manner;
    let screen = Arc::new(Screen::new(colours_are_welcome()));
    let jobs = Arc::new(Jobs::default());
    let (shown, watched) = (Arc::clone(&screen), Arc::clone(&jobs));
    let link = connect(options, move |told| match told {
        Told::Event(event) => {
            watched.heard(event);
            shown.say(&shown.coloured("36", &manner.show(event)));
        }
        Told::Over(reason) => shown.say(&harmless(reason)),
    })?;
    let link = Arc::new(link);
    let version = greet(&link, options)?;
    let kind = if options.human { "HMP" } else { "QMP low-level" };
    screen.say(&format!("Welcome to the {kind} shell!\nConnected{version}\n"));
    let vocabulary = vocabulary(&link, options)?;
    if options.negotiate && jobs.look(&link, &screen) {
        let (link, jobs, screen) = (Arc::clone(&link), Arc::clone(&jobs), Arc::clone(&screen));
        let watch = std::thread::Builder::new().name("jobs".to_owned());
        watch.spawn(move || jobs.watch(&link, &screen)).map_err(|error| error.to_string())?;
    }
    let prompt = Prompt::new(&screen, vocabulary, history(options.human))?;
    Ok(prompt.run(Session::new(manner, options.human), &link, &jobs, &screen))
}

fn connect(options: &Options, tell: impl FnMut(Told<'_>) + Send + 'static) -> Result<Link, String> {
    let log = options.log.as_ref().map(|log| File::create(log).map_err(|error| format!("{log}: {error}")));
    let link = Link::connect(&Address::parse(&options.server), log.transpose()?, tell);
    link.map_err(|error| format!("Couldn't connect to {}: {error}", options.server))
}

/// Hears the greeting and negotiates; what to say about the server's version.
fn greet(link: &Link, options: &Options) -> Result<String, String> {
    if !options.negotiate {
        return Ok(String::new());
    }
    let greeting = link.greeting(Some(IMPATIENCE)).or_else(|| {
        complain("The server does not greet. Perhaps another client is connected; waiting.");
        link.greeting(None)
    });
    let greeting = greeting.unwrap_or_else(|| Err(String::new()))?;
    let capabilities = link.execute(&execute("qmp_capabilities", Object::new()), Reply::result)?;
    capabilities.map_err(|(class, desc)| format!("{class}: {desc}"))?;
    let mut version = Some(&greeting);
    for name in ["QMP", "version", "qemu"] {
        version = version.and_then(|object| object.get(name)?.as_object());
    }
    let number = |name: &str| version.and_then(|version| version.get(name)?.as_u64());
    let numbers = (number("major"), number("minor"), number("micro"));
    let (Some(major), Some(minor), Some(micro)) = numbers else { return Ok(String::new()) };
    Ok(format!(" to QEMU {major}.{minor}.{micro}"))
}

/// What the user can type, as far as the server tells.
fn vocabulary(link: &Link, options: &Options) -> Result<Vocabulary, String> {
    if options.human {
        return Ok(Vocabulary::from_names(commands_of_humans(&help_of_humans(link)?)));
    }
    // A guest's agent is told nothing that the user has not typed.
    if !options.negotiate {
        return Ok(Vocabulary::default());
    }
    let schema = link.execute(&execute("query-qmp-schema", Object::new()), Reply::result)?;
    Ok(schema.map(|schema| Vocabulary::from_schema(&schema)).unwrap_or_default())
}

/// The human monitor's help, or that there is no such monitor.
fn help_of_humans(link: &Link) -> Result<String, String> {
    match link.execute(&human("help", None), Reply::result)? {
        Ok(Value::Str(text)) => Ok(text),
        Ok(_) => Err("The server's human monitor does not answer with a text".to_owned()),
        Err((class, desc)) => {
            Err(format!("The server has no human monitor ({}: {})", harmless(&class), harmless(&desc)))
        }
    }
}

/// The commands in the human monitor's help, each at the start of a line, with its short forms: `c|cont  -- resume`.
fn commands_of_humans(help: &str) -> impl Iterator<Item = String> {
    let first = help.lines().filter_map(|line| line.split_whitespace().next());
    first.flat_map(|names| names.split('|')).map(str::to_owned)
}

/// Source: no-color.org; and what is known of dumb terminals.
fn colours_are_welcome() -> bool {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    !is_set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Where typed lines are remembered. Source: XDG base directories.
fn history(human: bool) -> Option<PathBuf> {
    let absolute = |value: OsString| Some(PathBuf::from(value)).filter(|path| path.is_absolute());
    let home = || std::env::var_os("HOME").and_then(absolute).map(|home| home.join(".local/state"));
    let state = std::env::var_os("XDG_STATE_HOME").and_then(absolute).or_else(home)?;
    Some(state.join("underlay").join(if human { "hmp-history" } else { "qmp-history" }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_human_monitors_commands() {
        let help = "announce_self [interfaces] -- x\nc|cont  -- resume emulation\n\ninfo [sub] -- y\n";
        assert_eq!(commands_of_humans(help).collect::<Vec<_>>(), ["announce_self", "c", "cont", "info"]);
    }
}

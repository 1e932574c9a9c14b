//! On a terminal: a prompt with a line editor, its history and completion, and everything that comes meanwhile.

use std::borrow::Cow;
use std::cell::Cell;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use rustyline::completion::{Completer, Pair};
use rustyline::config::{BellStyle, ColorMode, CompletionType, Config};
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::Validator;
use rustyline::{Context, Editor, ExternalPrinter, Helper};

use crate::jobs::Jobs;
use crate::link::Link;
use crate::screen::Screen;
use crate::session::{Session, Show, Trouble};
use crate::vocabulary::Vocabulary;

/// Lines that are remembered.
const MAX_HISTORY: usize = 1000;

/// Columns of a terminal that does not tell.
const COLUMNS: usize = 80;

/// What the editor asks us.
struct Help {
    screen: Arc<Screen>,
    vocabulary: Vocabulary,
    /// A transaction has been begun.
    open: Cell<bool>,
}

impl Helper for Help {}
impl Validator for Help {}
impl Hinter for Help {
    type Hint = String;
}

impl Highlighter for Help {
    fn highlight_prompt<'b, 's: 'b, 'p: 'b>(&'s self, prompt: &'p str, default: bool) -> Cow<'b, str> {
        if !default {
            return Cow::Borrowed(prompt);
        }
        let size = rustix::termios::tcgetwinsize(std::io::stdout());
        let columns = size.map(|size| usize::from(size.ws_col)).ok().filter(|columns| *columns > 0);
        Cow::Owned(self.screen.paint(prompt, columns.unwrap_or(COLUMNS)))
    }
}

impl Completer for Help {
    type Candidate = Pair;

    fn complete(&self, line: &str, at: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<Pair>)> {
        let (start, names) = self.vocabulary.complete(line.get(..at).unwrap_or_default(), self.open.get());
        let only = names.len() == 1;
        let pair = |name: String| {
            let blank = if only && !name.ends_with(['=', '.']) { " " } else { "" };
            Pair { replacement: format!("{name}{blank}"), display: name }
        };
        Ok((start, names.into_iter().map(pair).collect()))
    }
}

/// The line editor.
pub(crate) struct Prompt {
    editor: Editor<Help, DefaultHistory>,
    history: Option<PathBuf>,
}

impl Prompt {
    /// Remembers lines in the file `history`.
    pub(crate) fn new(
        screen: &Arc<Screen>,
        vocabulary: Vocabulary,
        history: Option<PathBuf>,
    ) -> Result<Self, String> {
        // What is coloured, and whether, is our own business: the editor is only to ask us about every prompt.
        let config = Config::builder()
            .max_history_size(MAX_HISTORY)
            .map_err(|error| error.to_string())?
            .history_ignore_space(true)
            .completion_type(CompletionType::List)
            .bell_style(BellStyle::None)
            .color_mode(ColorMode::Forced)
            .build();
        let mut editor = Editor::with_config(config).map_err(|error| error.to_string())?;
        editor.set_helper(Some(Help { screen: Arc::clone(screen), vocabulary, open: Cell::new(false) }));
        // A terminal that cannot be edited on shows everything as it comes.
        if let Ok(mut printer) = editor.create_external_printer() {
            let screen = Arc::clone(screen);
            let nudge = move |text| drop(printer.print(text));
            let wake = std::thread::Builder::new().name("wake".to_owned());
            wake.spawn(move || screen.wake(nudge)).map_err(|error| error.to_string())?;
        }
        let history = history.filter(|file| {
            let read = if file.exists() { editor.load_history(file) } else { make_history(file) };
            read.inspect_err(|error| screen.complain(&format!("{}: {error}", file.display()))).is_ok()
        });
        Ok(Self { editor, history })
    }

    /// Reads and executes lines until the user leaves or the connection ends; the exit status.
    pub(crate) fn run(mut self, mut session: Session, link: &Link, jobs: &Jobs, screen: &Screen) -> i32 {
        loop {
            let open = session.is_open();
            if let Some(help) = self.editor.helper() {
                help.open.set(open);
            }
            let prompt = if open { "TRANS> " } else { "(QEMU) " };
            let above = if jobs.are_running() { "\n" } else { "" };
            let read = self.editor.readline(&format!("{above}{prompt}"));
            screen.editor_is_gone();
            match read {
                Ok(lines) => {
                    // What is pasted comes in one.
                    for line in lines.lines() {
                        self.remember(line);
                        execute(line, &mut session, link, screen);
                    }
                    if link.over().is_some() {
                        return i32::from(lines.lines().last().is_none_or(|last| last.trim() != "quit"));
                    }
                }
                Err(ReadlineError::Interrupted) => session.abandon(),
                Err(ReadlineError::Eof) => return i32::from(link.over().is_some()),
                Err(error) => {
                    screen.complain(&error.to_string());
                    return 1;
                }
            }
        }
    }

    /// Adds a line to the history, at once also in the file: the shell may be killed.
    fn remember(&mut self, line: &str) {
        let line = line.trim_end();
        let added = !line.is_empty() && self.editor.add_history_entry(line).unwrap_or(false);
        if let Some(file) = self.history.as_ref().filter(|_| added) {
            // A disk that is full must not keep anybody from repairing it.
            let _ = self.editor.append_history(file);
        }
    }
}

fn execute(line: &str, session: &mut Session, link: &Link, screen: &Screen) {
    let done = session.line(line, link, &mut |shown| match shown {
        Show::Message(text) => screen.say(text),
        Show::Error(text) => screen.complain(text),
    });
    match done {
        Err(Trouble::Line(error)) => screen.complain(&error.to_string()),
        // An error has been shown, and the link has said why it is over.
        Ok(_) | Err(Trouble::Over(_)) => {}
    }
}

/// Makes an empty file that only its owner can read, and the folder for it.
fn make_history(file: &std::path::Path) -> rustyline::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    if let Some(folder) = file.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600).open(file)?.flush()?;
    Ok(())
}

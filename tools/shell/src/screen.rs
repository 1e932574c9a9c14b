//! What is on the terminal: replies, the prompt with what is being typed, and above it what comes meanwhile.
//!
//! While a line is edited only the editor writes. Whatever is to be shown waits here, the editor is woken, and when it
//! paints its prompt again it takes along what waits ([`Screen::paint`]). Nothing is lost or shown late when the line
//! ends just then: what the editor has not taken is still here ([`Screen::editor_is_gone`]).

use std::io::Write;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Most that waits for the editor, in bytes: a server can send faster than a terminal shows.
const MAX_WAITING: usize = 1 << 20;

/// Wakes the editor and leaves the terminal as it is: one row up, and down again.
const NUDGE: &str = "\x1b[A\n";

#[derive(Debug, Default)]
struct State {
    editing: bool,
    /// To be shown, in whole lines.
    waiting: String,
    /// Lines that were too much.
    dropped: u64,
    /// The line about jobs that is wanted above the prompt.
    progress: String,
    /// The editor has to paint again.
    stale: bool,
}

impl State {
    fn take(&mut self) -> String {
        let mut text = std::mem::take(&mut self.waiting);
        if self.dropped > 0 {
            text.push_str(&format!("({} events more than could be shown)\n", self.dropped));
            self.dropped = 0;
        }
        text
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Screen {
    state: Mutex<State>,
    changed: Condvar,
    /// Colours may be used.
    colours: bool,
}

impl Screen {
    pub(crate) fn new(colours: bool) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), colours }
    }

    /// Wakes the editor whenever something is to be shown; for a thread of its own.
    pub(crate) fn wake(&self, mut nudge: impl FnMut(String)) {
        loop {
            let mut state = self.lock();
            while !(state.editing && state.stale) {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.stale = false;
            drop(state);
            // Waits when the editor has just gone, until it is there again.
            nudge(NUDGE.to_owned());
        }
    }

    /// Shows lines, now or above the line that is being edited.
    pub(crate) fn say(&self, text: &str) {
        let mut state = self.lock();
        if !state.editing {
            write(text);
        } else if state.waiting.len() + text.len() < MAX_WAITING {
            state.waiting.push_str(text);
            state.waiting.push('\n');
        } else {
            state.dropped += 1;
        }
        self.nudge(state);
    }

    /// Shows an error.
    pub(crate) fn complain(&self, text: &str) {
        self.say(&self.coloured("31", text));
    }

    /// `text` in a colour, where colours may be used.
    pub(crate) fn coloured(&self, colour: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// The line about jobs that is to be above the prompt from now on.
    pub(crate) fn show_progress(&self, text: &str) {
        let mut state = self.lock();
        if state.progress != text {
            text.clone_into(&mut state.progress);
            self.nudge(state);
        }
    }

    /// The editor paints its prompt, of one row or two: what it is to write instead. `columns` wide is the terminal.
    pub(crate) fn paint(&self, prompt: &str, columns: usize) -> String {
        let mut state = self.lock();
        state.editing = true;
        let mut text = state.take();
        match prompt.split_once('\n') {
            None => text.push_str(prompt),
            Some((_, prompt)) => {
                let room = columns.saturating_sub(1);
                let progress: String = state.progress.chars().take(room).collect();
                text.push_str(&self.coloured("2", &progress));
                text.push('\n');
                text.push_str(prompt);
            }
        }
        text
    }

    /// The line has been typed, or was given up: what the editor has not shown is shown now.
    pub(crate) fn editor_is_gone(&self) {
        let mut state = self.lock();
        state.editing = false;
        let text = state.take();
        write(text.trim_end_matches('\n'));
    }

    fn nudge(&self, mut state: MutexGuard<'_, State>) {
        state.stale = state.editing;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes lines in one go. Nobody may be looking any more; the editor will notice.
fn write(text: &str) {
    if !text.is_empty() {
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(format!("{text}\n").as_bytes()).and_then(|()| out.flush());
    }
}

/// A text of the server's that is not JSON, made safe for a terminal: no control characters but ends of lines and
/// tabs.
pub(crate) fn harmless(text: &str) -> String {
    let safe = |c: &char| !c.is_control() || matches!(c, '\n' | '\t');
    text.chars().filter(safe).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_while_a_line_is_edited_stands_above_the_prompt() {
        let screen = Screen::new(false);
        assert_eq!(screen.paint("> ", 80), "> ");
        screen.say("a");
        screen.say("b\nc");
        assert_eq!(screen.paint("> ", 80), "a\nb\nc\n> ");
        assert_eq!(screen.paint("> ", 80), "> ");
        screen.show_progress("half way");
        screen.say("d");
        assert_eq!(screen.paint("\n> ", 5), "d\nhalf\n> ");
    }

    #[test]
    fn what_waits_is_bounded() {
        let screen = Screen::new(false);
        screen.paint("> ", 80);
        let long = "x".repeat(MAX_WAITING / 4);
        for _ in 0..10 {
            screen.say(&long);
        }
        let painted = screen.paint("> ", 80);
        assert!(painted.len() < MAX_WAITING + 100);
        assert!(painted.ends_with("\n(7 events more than could be shown)\n> "), "{}", painted.len());
    }

    #[test]
    fn the_server_does_not_steer_the_terminal() {
        assert_eq!(harmless("a\x1b[2J\r\n\tb\u{9b}1m\u{7f}é"), "a[2J\n\tb1mé");
        let screen = Screen::new(true);
        assert_eq!(screen.coloured("31", "x"), "\x1b[31mx\x1b[0m");
    }
}

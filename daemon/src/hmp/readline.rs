//! Typing a line into the monitor: what each byte does, and what is sent back so that a terminal shows it.
//!
//! The reference does this on every stream, terminal or not, and so do we, byte for byte: after each byte the cursor
//! goes to the line's beginning, the line is written anew and the rest of the terminal's line is cleared; or only the
//! cursor moves. No I/O: bytes in, bytes out. Lines are bytes; a letter that takes several comes one byte after the
//! other.

/// What is in front of each line.
pub const PROMPT: &str = "(qemu) ";
/// Longest line that is taken, in bytes. Source: the reference takes no more.
const LONGEST: usize = 4095;
/// Lines that are remembered. Source: the reference's history.
const REMEMBERED: usize = 64;
/// Columns of the terminal, for lists of completions.
const COLUMNS: usize = 80;

/// What a byte has led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed {
    /// Something to be shown, perhaps.
    Nothing,
    /// A line is complete.
    Line(Vec<u8>),
    /// The user wants to know how the line in front of the cursor may go on: [`Readline::complete`] shall be told.
    Complete(Vec<u8>),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Escape {
    #[default]
    None,
    /// ESC has come.
    Begun,
    /// `ESC [`, and a number perhaps.
    Bracket(u32),
    /// `ESC O`
    Letter,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Readline {
    line: Vec<u8>,
    cursor: usize,
    /// What the terminal shows.
    shown: Vec<u8>,
    shown_cursor: usize,
    escape: Escape,
    history: Vec<Vec<u8>>,
    /// The line of the history that is shown.
    at: Option<usize>,
}

impl Readline {
    /// Takes a byte; what is to be sent back goes to `out`.
    pub fn push(&mut self, byte: u8, out: &mut Vec<u8>) -> Typed {
        let typed = match self.escape {
            Escape::None => self.plain(byte, out),
            Escape::Begun => {
                self.escape = match byte {
                    b'[' => Escape::Bracket(0),
                    b'O' => Escape::Letter,
                    _ => Escape::None,
                };
                Typed::Nothing
            }
            Escape::Bracket(number) => {
                self.bracket(number, byte);
                Typed::Nothing
            }
            Escape::Letter => {
                self.escape = Escape::None;
                match byte {
                    b'H' => self.cursor = 0,
                    b'F' => self.cursor = self.line.len(),
                    _ => {}
                }
                Typed::Nothing
            }
        };
        self.show(out);
        typed
    }

    fn plain(&mut self, byte: u8, out: &mut Vec<u8>) -> Typed {
        match byte {
            b'\n' | b'\r' => {
                let line = std::mem::take(&mut self.line);
                self.remember(&line);
                self.cursor = 0;
                (self.shown, self.shown_cursor) = (Vec::new(), 0);
                out.extend(b"\r\n");
                return Typed::Line(line);
            }
            b'\t' => return Typed::Complete(self.line[..self.cursor].to_vec()),
            // Ctrl-A, Ctrl-D, Ctrl-E, Ctrl-U, Ctrl-W
            1 => self.cursor = 0,
            4 => self.delete(),
            5 => self.cursor = self.line.len(),
            21 => {
                self.line.drain(..self.cursor);
                self.cursor = 0;
            }
            23 => self.delete_word(),
            27 => self.escape = Escape::Begun,
            8 | 127 if self.cursor > 0 => {
                self.cursor -= 1;
                self.delete();
            }
            127 => {}
            32.. => self.insert(byte),
            _ => {}
        }
        Typed::Nothing
    }

    fn bracket(&mut self, number: u32, byte: u8) {
        self.escape = Escape::None;
        match byte {
            b'0'..=b'9' => {
                let number = number.saturating_mul(10).saturating_add(u32::from(byte - b'0'));
                self.escape = Escape::Bracket(number);
            }
            b'A' => self.older(),
            b'B' => self.newer(),
            b'C' => self.cursor = (self.cursor + 1).min(self.line.len()),
            b'D' => self.cursor = self.cursor.saturating_sub(1),
            b'H' => self.cursor = 0,
            b'F' => self.cursor = self.line.len(),
            b'~' => match number {
                1 => self.cursor = 0,
                3 => self.delete(),
                4 => self.cursor = self.line.len(),
                _ => {}
            },
            _ => {}
        }
    }

    fn insert(&mut self, byte: u8) {
        if self.line.len() < LONGEST {
            self.line.insert(self.cursor, byte);
            self.cursor += 1;
        }
    }

    fn delete(&mut self) {
        if self.cursor < self.line.len() {
            self.line.remove(self.cursor);
        }
    }

    fn delete_word(&mut self) {
        let before = &self.line[..self.cursor];
        let word_end = before.iter().rposition(|byte| !byte.is_ascii_whitespace()).map_or(0, |at| at + 1);
        let start = before[..word_end].iter().rposition(u8::is_ascii_whitespace).map_or(0, |at| at + 1);
        self.line.drain(start..self.cursor);
        self.cursor = start;
    }

    fn remember(&mut self, line: &[u8]) {
        self.at = None;
        if line.is_empty() {
            return;
        }
        // A line that comes again moves to the end.
        self.history.retain(|old| old != line);
        self.history.push(line.to_vec());
        if self.history.len() > REMEMBERED {
            self.history.remove(0);
        }
    }

    fn older(&mut self) {
        let at = self.at.unwrap_or(self.history.len());
        if let Some(at) = at.checked_sub(1) {
            self.go_to(at);
        }
    }

    fn newer(&mut self) {
        let Some(at) = self.at else { return };
        if at + 1 < self.history.len() {
            self.go_to(at + 1);
        } else {
            self.at = None;
            self.line.clear();
            self.cursor = 0;
        }
    }

    fn go_to(&mut self, at: usize) {
        if let Some(line) = self.history.get(at) {
            self.line.clone_from(line);
            self.cursor = self.line.len();
            self.at = Some(at);
        }
    }

    /// Lines typed before, oldest first.
    pub fn history(&self) -> &[Vec<u8>] {
        &self.history
    }

    /// How the line may go on: `words` that begin with the last `typed` bytes in front of the cursor.
    pub fn complete(&mut self, mut words: Vec<String>, typed: usize, out: &mut Vec<u8>) {
        words.sort_unstable();
        words.dedup();
        let Some(first) = words.first().cloned() else { return };
        let common = words.iter().fold(first.len(), |common, word| {
            first.bytes().zip(word.bytes()).take(common).take_while(|(a, b)| a == b).count()
        });
        first.bytes().take(common).skip(typed).for_each(|byte| self.insert(byte));
        if words.len() == 1 {
            if !first.ends_with('/') {
                self.insert(b' ');
            }
        } else {
            out.extend(b"\r\n");
            out.extend(columns(&words).bytes());
            out.extend(PROMPT.bytes());
            (self.shown, self.shown_cursor) = (Vec::new(), 0);
        }
        self.show(out);
    }

    /// Has the terminal show the line as it is.
    fn show(&mut self, out: &mut Vec<u8>) {
        if self.line != self.shown {
            (0..self.shown_cursor).for_each(|_| out.extend(b"\x1b[D"));
            out.extend(&self.line);
            out.extend(b"\x1b[K");
            self.shown.clone_from(&self.line);
            self.shown_cursor = self.line.len();
        }
        let (from, to) = (self.shown_cursor, self.cursor);
        (to..from).for_each(|_| out.extend(b"\x1b[D"));
        (from..to).for_each(|_| out.extend(b"\x1b[C"));
        self.shown_cursor = to;
    }
}

/// Words side by side.
fn columns(words: &[String]) -> String {
    let width = words.iter().map(String::len).max().unwrap_or(0).saturating_add(2).clamp(10, COLUMNS);
    let in_row = COLUMNS / width;
    let row = |row: &[String]| row.iter().map(|word| format!("{word:<width$}")).collect::<String>() + "\r\n";
    words.chunks(in_row).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(readline: &mut Readline, bytes: &[u8]) -> String {
        let mut out = Vec::new();
        bytes.iter().for_each(|byte| {
            readline.push(*byte, &mut out);
        });
        String::from_utf8_lossy(&out).replace("\x1b[D", "<").replace("\x1b[C", ">").replace("\x1b[K", "|")
    }

    /// What the reference sends for the same bytes.
    #[test]
    fn as_the_reference_answers() {
        let mut line = Readline::default();
        assert_eq!(typed(&mut line, b"foo\n"), "f|<fo|<<foo|\r\n");
        assert_eq!(typed(&mut line, b"\r"), "\r\n");
        assert_eq!(typed(&mut line, b"ab\x7f\x7f"), "a|<ab|<<a|<|");
        assert_eq!(typed(&mut line, b"abc\x02\x02X\n"), "a|<ab|<<abc|<<<abcX|\r\n");
        assert_eq!(typed(&mut line, b"\x1b[A"), "abcX|");
        assert_eq!(typed(&mut line, b"\x1b[A"), "<<<<foo|");
        assert_eq!(typed(&mut line, b"\x1b[B"), "<<<abcX|");
        assert_eq!(typed(&mut line, b"\x01"), "<<<<");
        assert_eq!(typed(&mut line, b"\x05"), ">>>>");
        assert_eq!(typed(&mut line, b"\x0b\x03"), "");
        assert_eq!(typed(&mut line, b"\x15"), "<<<<|");
        assert_eq!(typed(&mut line, b"x y\x17"), "x|<x |<<x y|<<<x |");
        assert_eq!(typed(&mut line, b"\x1b[D\x1b[3~z"), "<<x|<xz|");
    }

    #[test]
    fn completions_are_inserted_or_listed() {
        let mut line = Readline::default();
        typed(&mut line, b"inf");
        let mut out = Vec::new();
        line.complete(vec!["info".into()], 3, &mut out);
        assert_eq!(out, b"\x1b[D\x1b[D\x1b[Dinfo \x1b[K");
        out.clear();
        line.complete(vec!["d1".into(), "d0".into()], 0, &mut out);
        assert_eq!(out, b"\r\nd0        d1        \r\n(qemu) info d\x1b[K");
        let mut out = Vec::new();
        assert_eq!(line.push(b'\n', &mut out), Typed::Line(b"info d".to_vec()));
        assert_eq!(line.push(b'\t', &mut out), Typed::Complete(Vec::new()));
    }

    #[test]
    fn long_lines_and_long_histories_have_an_end() {
        let mut line = Readline::default();
        typed(&mut line, &[b'x'; 5000]);
        assert_eq!(line.line.len(), LONGEST);
        (0..100).for_each(|n| line.remember(format!("{n}").as_bytes()));
        assert_eq!(line.history().len(), REMEMBERED);
        (0..200).for_each(|_| line.older());
        assert_eq!(line.line, b"36");
    }
}

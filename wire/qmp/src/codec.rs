//! Cuts a stream of bytes into messages: several in one packet, one in many packets, garbage in between.
//!
//! One pass over the bytes, and memory bounded by the largest message. A line feed inside a string ends the message
//! as an error, so that a client that lost count is understood again from its next line on.

/// Longest message, in bytes. Source: QEMU's limit of one message.
pub const MAX_MESSAGE: usize = 64 << 20;

/// A piece of input.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// The bytes of one value, for the parser to judge.
    Value(Vec<u8>),
    /// Bytes that are no value, with what to say about them.
    Garbage(String),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// Between values.
    Outside,
    /// In a word or number that is no part of an object.
    Word,
    /// In an object, list or string; `quote` when inside a string.
    Inside { quote: Option<u8>, escaped: bool },
    /// Too long: everything up to the next line is dropped.
    Skipping,
}

/// See the module.
#[derive(Debug)]
pub struct Splitter {
    state: State,
    depth: usize,
    piece: Vec<u8>,
}

impl Default for Splitter {
    fn default() -> Self {
        Self { state: State::Outside, depth: 0, piece: Vec::new() }
    }
}

impl Splitter {
    /// Takes more bytes; gives the pieces that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for &byte in bytes {
            self.byte(byte, &mut pieces);
        }
        pieces
    }

    fn byte(&mut self, byte: u8, pieces: &mut Vec<Piece>) {
        match self.state {
            State::Skipping if byte == b'\n' => self.state = State::Outside,
            State::Skipping => {}
            State::Word if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.' | b'_') => {
                self.piece.push(byte);
            }
            State::Word => {
                self.done(pieces);
                self.outside(byte, pieces);
            }
            State::Outside => self.outside(byte, pieces),
            State::Inside { quote, escaped } => self.inside(byte, quote, escaped, pieces),
        }
        if self.piece.len() > MAX_MESSAGE {
            pieces.push(Piece::Garbage("JSON parse error, JSON token size limit exceeded".to_owned()));
            self.reset();
            self.state = State::Skipping;
        }
    }

    fn outside(&mut self, byte: u8, pieces: &mut Vec<Piece>) {
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => {}
            b'{' | b'[' | b'"' | b'\'' => {
                self.depth = usize::from(matches!(byte, b'{' | b'['));
                let quote = (self.depth == 0).then_some(byte);
                self.piece.push(byte);
                self.state = State::Inside { quote, escaped: false };
            }
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' => {
                self.piece.push(byte);
                self.state = State::Word;
            }
            // QEMU's parser waits for more after some of these; saying so at once helps the client more.
            other => {
                pieces.push(Piece::Garbage(format!("JSON parse error, stray '{}'", other.escape_ascii())))
            }
        }
    }

    fn inside(&mut self, byte: u8, quote: Option<u8>, escaped: bool, pieces: &mut Vec<Piece>) {
        self.piece.push(byte);
        let Some(end) = quote else {
            match byte {
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => self.depth -= 1,
                b'"' | b'\'' => self.state = State::Inside { quote: Some(byte), escaped: false },
                _ => {}
            }
            if self.depth == 0 {
                self.done(pieces);
            }
            return;
        };
        if byte == b'\n' {
            let at = self.piece.iter().rposition(|b| *b == end).unwrap_or(0);
            let token = String::from_utf8_lossy(&self.piece[at..]).into_owned();
            pieces.push(Piece::Garbage(format!("JSON parse error, stray '{token}'")));
            self.reset();
        } else if !escaped && byte == end {
            self.state = State::Inside { quote: None, escaped: false };
            if self.depth == 0 {
                self.done(pieces);
            }
        } else {
            self.state = State::Inside { quote, escaped: !escaped && byte == b'\\' };
        }
    }

    fn done(&mut self, pieces: &mut Vec<Piece>) {
        pieces.push(Piece::Value(std::mem::take(&mut self.piece)));
        self.reset();
    }

    fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(pieces: Vec<Piece>) -> Vec<String> {
        let text = |piece| match piece {
            Piece::Value(bytes) => String::from_utf8(bytes).expect("ASCII"),
            Piece::Garbage(text) => format!("!{text}"),
        };
        pieces.into_iter().map(text).collect()
    }

    #[test]
    fn packets_do_not_matter() {
        let input = br#" {"a": "}\"{"} [1,[2]]true{'b':{}} "x" 12 "#;
        let whole = values(Splitter::default().push(input));
        assert_eq!(whole, [r#"{"a": "}\"{"}"#, "[1,[2]]", "true", "{'b':{}}", "\"x\"", "12"]);
        let mut splitter = Splitter::default();
        let bytewise: Vec<_> = input.iter().flat_map(|b| splitter.push(&[*b])).collect();
        assert_eq!(values(bytewise), whole);
    }

    #[test]
    fn finds_back_after_garbage() {
        let pieces = Splitter::default().push(b"{\"exec\n}@{\"a\":1}");
        assert_eq!(pieces.last(), Some(&Piece::Value(b"{\"a\":1}".to_vec())));
    }

    #[test]
    fn memory_is_bounded() {
        let mut splitter = Splitter::default();
        let chunk = vec![b'a'; 1 << 20];
        splitter.push(b"{\"");
        let mut errors = 0;
        for _ in 0..100 {
            errors += splitter.push(&chunk).len();
            assert!(splitter.piece.len() <= MAX_MESSAGE + 1);
        }
        assert_eq!(errors, 1);
        assert_eq!(splitter.push(b"\n{}"), [Piece::Value(b"{}".to_vec())]);
    }
}

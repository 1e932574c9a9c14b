//! Cuts a stream of bytes into messages: several in one packet, one in many packets, garbage in between.
//!
//! One pass over the bytes, and memory bounded by the largest message. Where a message ends, and from where on a client
//! that sent garbage is understood again, is as the reference does it: braces and brackets are counted apart; a byte
//! that fits nowhere drops what came before it, and everything up to the next of `{}[]:,` or the line's end after it.

/// Longest message, in bytes. Source: QEMU's limit of one message.
pub const MAX_MESSAGE: usize = 64 << 20;

/// Most tokens in a message. Source: the reference refuses one more.
pub const MAX_TOKENS: usize = 2 << 20;

/// Deepest nesting. Source: the reference refuses one more.
pub const MAX_NESTING: i32 = 1024;

/// A piece of input.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// The bytes of one message, whose tokens are sound; the parser judges their order.
    Value(Vec<u8>),
    /// Bytes that are no message, with what to say about them.
    Garbage(String),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// Between tokens.
    Between,
    /// In a word of small letters.
    Word,
    Number(Number),
    String {
        quote: u8,
        escaped: bool,
    },
    /// After a byte that fits nowhere.
    Lost,
    /// Too long: everything up to the next line is dropped.
    Skipping,
}

/// How far into a number.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Number {
    Minus,
    Zero,
    Whole,
    Point,
    Fraction,
    E,
    Sign,
    Exponent,
}

impl Number {
    /// What `byte` makes of it; `Err(true)` if the number may end before it.
    fn next(self, byte: u8) -> Result<Self, bool> {
        use Number::{E, Exponent, Fraction, Minus, Point, Sign, Whole, Zero};
        match (self, byte) {
            (Minus, b'0') => Ok(Zero),
            (Minus, b'1'..=b'9') | (Whole, b'0'..=b'9') => Ok(Whole),
            (Zero | Whole, b'.') => Ok(Point),
            (Whole | Fraction, b'e' | b'E') => Ok(E),
            (Point | Fraction, b'0'..=b'9') => Ok(Fraction),
            (E, b'+' | b'-') => Ok(Sign),
            (E | Sign | Exponent, b'0'..=b'9') => Ok(Exponent),
            (Zero, b'0'..=b'9') | (Minus | Point | E | Sign, _) => Err(false),
            _ => Err(true),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Splitter {
    state: State,
    braces: i32,
    brackets: i32,
    tokens: usize,
    piece: Vec<u8>,
    /// Where in `piece` the token begins that is being read.
    token: usize,
}

impl Default for Splitter {
    fn default() -> Self {
        Self { state: State::Between, braces: 0, brackets: 0, tokens: 0, piece: Vec::new(), token: 0 }
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

    /// Whether a message has begun that is not complete.
    pub fn is_within(&self) -> bool {
        self.tokens > 0 || !matches!(self.state, State::Between | State::Lost | State::Skipping)
    }

    /// There are no more bytes: gives what that completes.
    pub fn end(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        match self.state {
            State::String { .. } => self.stray(0, &mut pieces),
            State::Number(number) if number.next(b' ') == Err(false) => self.stray(0, &mut pieces),
            // A number's end shows only in what follows it.
            _ => self.byte(b' ', &mut pieces),
        }
        pieces
    }

    /// What has come of a message that is not complete.
    pub fn rest(&self) -> &[u8] {
        &self.piece
    }

    fn byte(&mut self, byte: u8, pieces: &mut Vec<Piece>) {
        match self.state {
            State::Skipping if byte == b'\n' => self.state = State::Between,
            State::Skipping => {}
            State::Lost if !finds_back(byte) => {}
            State::Between | State::Lost => self.between(byte, pieces),
            State::Word if byte.is_ascii_lowercase() => self.piece.push(byte),
            State::Word => self.end_before(byte, pieces),
            State::Number(number) => match number.next(byte) {
                Ok(next) => {
                    self.piece.push(byte);
                    self.state = State::Number(next);
                }
                Err(true) => self.end_before(byte, pieces),
                Err(false) => self.stray(byte, pieces),
            },
            State::String { .. } if !(b' '..0xfe).contains(&byte) => self.stray(byte, pieces),
            State::String { quote, escaped } => {
                self.piece.push(byte);
                if byte == quote && !escaped {
                    self.token_done(pieces);
                } else {
                    self.state = State::String { quote, escaped: byte == b'\\' && !escaped };
                }
            }
        }
        if self.piece.len() > MAX_MESSAGE {
            self.refuse("JSON token size limit exceeded", pieces);
            self.state = State::Skipping;
        }
    }

    fn between(&mut self, byte: u8, pieces: &mut Vec<Piece>) {
        self.state = match byte {
            b' ' | b'\t' | b'\r' | b'\n' => {
                // One blank keeps tokens apart as well as a thousand.
                if self.piece.last().is_some_and(|last| *last != b' ') {
                    self.piece.push(b' ');
                }
                self.state = State::Between;
                return;
            }
            b'"' | b'\'' => State::String { quote: byte, escaped: false },
            b'a'..=b'z' => State::Word,
            b'-' => State::Number(Number::Minus),
            b'0' => State::Number(Number::Zero),
            b'1'..=b'9' => State::Number(Number::Whole),
            _ if is_structure(byte) => State::Between,
            _ => {
                self.token = self.piece.len();
                return self.stray(byte, pieces);
            }
        };
        self.token = self.piece.len();
        self.piece.push(byte);
        if self.state == State::Between {
            self.token_done(pieces);
        }
    }

    /// The token ends before `byte`, which begins what is next.
    fn end_before(&mut self, byte: u8, pieces: &mut Vec<Piece>) {
        self.token_done(pieces);
        self.between(byte, pieces);
    }

    fn token_done(&mut self, pieces: &mut Vec<Piece>) {
        self.state = State::Between;
        self.tokens += 1;
        match self.piece.get(self.token) {
            Some(b'{') => self.braces += 1,
            Some(b'}') => self.braces -= 1,
            Some(b'[') => self.brackets += 1,
            Some(b']') => self.brackets -= 1,
            _ => {}
        }
        if self.braces + self.brackets > MAX_NESTING {
            self.refuse("JSON nesting depth limit exceeded", pieces);
        } else if self.tokens > MAX_TOKENS {
            self.refuse("JSON token count limit exceeded", pieces);
        } else if self.braces < 0 || self.brackets < 0 || self.braces + self.brackets == 0 {
            pieces.push(Piece::Value(std::mem::take(&mut self.piece)));
            *self = Self::default();
        }
    }

    /// `byte` cannot stand here.
    fn stray(&mut self, byte: u8, pieces: &mut Vec<Piece>) {
        let mut token = self.piece.split_off(self.token);
        if byte != 0 {
            token.push(byte);
        }
        let text = format!("JSON parse error, stray '{}'", String::from_utf8_lossy(&token));
        self.refuse(&text, pieces);
        self.state = State::Lost;
    }

    fn refuse(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        pieces.push(Piece::Garbage(text.to_owned()));
        *self = Self::default();
    }
}

/// Whether a byte after one that fits nowhere is looked at again: control characters but tabs are.
fn finds_back(byte: u8) -> bool {
    is_structure(byte) || byte >= 0xfe || (byte < b' ' && byte != b'\t')
}

fn is_structure(byte: u8) -> bool {
    matches!(byte, b'{' | b'}' | b'[' | b']' | b':' | b',')
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

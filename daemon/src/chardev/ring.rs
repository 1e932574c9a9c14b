//! A character device that keeps the last bytes that were written to it: `ringbuf`, read and written by commands.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// Most bytes that one keeps.
pub const MOST: u64 = 64 << 20;

/// See the module.
#[derive(Debug)]
pub struct Ring {
    size: usize,
    bytes: Mutex<VecDeque<u8>>,
}

impl Ring {
    /// For so many bytes.
    pub fn new(size: usize) -> Self {
        Self { size, bytes: Mutex::default() }
    }

    /// The oldest bytes make room for new ones.
    pub fn write(&self, bytes: &[u8]) {
        let mut kept = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let new = &bytes[bytes.len().saturating_sub(self.size)..];
        let surplus = (kept.len() + new.len()).saturating_sub(self.size);
        kept.drain(..surplus);
        kept.extend(new);
    }

    /// Takes out the oldest bytes, so many at most.
    pub fn read(&self, most: usize) -> Vec<u8> {
        let mut kept = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let most = most.min(kept.len());
        kept.drain(..most).collect()
    }
}

/// As a text that ends at the first zero; what is no UTF-8 is replaced. Source: the reference does so.
pub fn to_text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes[..end].utf8_chunks().fold(String::new(), |mut text, chunk| {
        text.push_str(chunk.valid());
        // One for each run that could be a character, cut off as it may be.
        if !chunk.invalid().is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
        text
    })
}

const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// In base64. Source: RFC 4648, section 4.
pub fn to_base64(bytes: &[u8]) -> String {
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let byte = |at| u32::from(group.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for at in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * at) & 63) as usize];
            text.push(if at <= group.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

/// From base64; whole bytes only, and nothing but padding may be behind them. `None`: it is not that.
pub fn from_base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=');
    let mut bytes = Vec::new();
    for group in digits.as_bytes().chunks(4) {
        let mut bits = 0;
        for at in 0..4 {
            let value = match group.get(at) {
                Some(digit) => DIGITS.iter().position(|known| known == digit)?,
                None => 0,
            };
            bits = bits << 6 | u32::try_from(value).ok()?;
        }
        bytes.extend_from_slice(&bits.to_be_bytes()[1..][..group.len() * 3 / 4]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_bytes_are_kept() {
        let ring = Ring::new(4);
        ring.write(b"abc");
        assert_eq!(ring.read(1), b"a");
        ring.write(b"def");
        ring.write(b"");
        assert_eq!(ring.read(9), b"cdef");
        ring.write(b"0123456789");
        assert_eq!((ring.read(2), ring.read(9), ring.read(1)), (b"67".to_vec(), b"89".to_vec(), Vec::new()));
        let none = Ring::new(0);
        none.write(b"abc");
        assert!(none.read(9).is_empty());
    }

    #[test]
    fn base64_there_and_back() {
        // Source: RFC 4648, section 10.
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")]
        {
            assert_eq!(to_base64(bytes.as_bytes()), text);
            assert_eq!(from_base64(text).as_deref(), Some(bytes.as_bytes()));
        }
        assert_eq!(from_base64("//79+w=="), Some(vec![0xff, 0xfe, 0xfd, 0xfb]));
        assert_eq!(from_base64("YWJ").as_deref(), Some(&b"ab"[..]));
        for wrong in ["a%", "YW Jj", "YQ=b"] {
            assert_eq!(from_base64(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn texts_of_bytes() {
        assert_eq!(to_text(b"a\0b"), "a");
        assert_eq!(to_text(b"\xff\xff"), "\u{fffd}\u{fffd}");
        assert_eq!(to_text("€".as_bytes()), "€");
        assert_eq!(to_text(b"\xe2\x82"), "\u{fffd}");
    }
}

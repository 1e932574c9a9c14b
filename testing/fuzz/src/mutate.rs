//! Changes of inputs that know nothing of what they mean, or only that they are text.

use underlay_sim::Rng;

/// Inputs do not grow beyond this, in bytes.
const LONGEST: usize = 1 << 20;

/// Numbers that programs trip over.
pub fn number(rng: &mut Rng) -> u64 {
    let edge = 1u64 << rng.below(64);
    match rng.below(8) {
        0 => 0,
        1 => u64::MAX,
        2 => edge,
        3 => edge.wrapping_sub(1),
        4 => edge.wrapping_add(1),
        5 => rng.below(256),
        6 => u64::MAX - rng.below(1 << 16),
        _ => rng.number() >> rng.below(64),
    }
}

/// Puts a number over `width` bytes at `at`, big endian, as far as they are there.
pub fn poke(bytes: &mut [u8], at: usize, width: usize, number: u64) {
    let number = number.to_be_bytes();
    for (to, from) in bytes.iter_mut().skip(at).zip(&number[8 - width.min(8)..]) {
        *to = *from;
    }
}

fn place(bytes: &[u8], rng: &mut Rng) -> usize {
    rng.index(bytes.len() + 1)
}

/// One change of bytes.
pub fn bytes(bytes: &mut Vec<u8>, rng: &mut Rng) {
    let at = place(bytes, rng);
    let longest = 1 << rng.below(8);
    let len = rng.index(longest).min(bytes.len() - at);
    match rng.below(7) {
        0 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << rng.below(8)),
        1 => {
            let (width, value) = (rng.pick(&[1, 2, 4, 8]), number(rng));
            poke(bytes, at, width, value);
        }
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..at + len)),
        4 if bytes.len() + len <= LONGEST => {
            let copy = bytes[at..at + len].to_vec();
            let to = place(bytes, rng);
            bytes.splice(to..to, copy);
        }
        5 if bytes.len() < LONGEST => {
            let noise: Vec<u8> = (0..rng.below(16)).map(|_| rng.number().to_le_bytes()[0]).collect();
            bytes.splice(at..at, noise);
        }
        _ => {
            let copy = bytes[at..at + len].to_vec();
            let to = rng.index(bytes.len() - len + 1);
            bytes[to..to + len].copy_from_slice(&copy);
        }
    }
}

/// What texts for us are made of.
const PIECES: [&str; 44] = [
    "{",
    "}",
    "[",
    "]",
    "\"",
    "'",
    ":",
    ",",
    ",,",
    ".",
    "=",
    "==",
    "\\u0000",
    "\\ud800",
    "\\udc00",
    "\\",
    "\u{0}",
    "\u{ff}",
    "\u{1f600}",
    "%",
    "-",
    "0",
    "-1",
    "1e400",
    "18446744073709551616",
    "9223372036854775808",
    "null",
    "true",
    "on",
    "off",
    "driver",
    "file",
    "qcow2",
    "raw",
    "node-name",
    "filename",
    "backing",
    "json:",
    "64k",
    "execute",
    "arguments",
    "id",
    "\r\n",
    "\t",
];

/// One change of a text: pieces that mean something go in, or one of [`bytes`].
pub fn text(text: &mut Vec<u8>, rng: &mut Rng) {
    match rng.below(4) {
        0 if text.len() < LONGEST => {
            let (at, piece) = (place(text, rng), rng.pick(&PIECES));
            text.splice(at..at, piece.bytes());
        }
        1 if text.len() < LONGEST / 64 => {
            // Nesting and long names.
            let (at, piece) = (place(text, rng), rng.pick(&PIECES).repeat(rng.index(2000)));
            text.splice(at..at, piece.bytes());
        }
        _ => bytes(text, rng),
    }
}

//! Text for people, on standard output and standard error.
//!
//! Nobody need be there to read it: a pipe may have no reader any more, a log no room. That must not stop a change in
//! the midst of it, let alone a daemon, as the macros of the standard library would, which panic. So who wants to say
//! something says it with [`say!`](crate::say), [`complain!`](crate::complain) and their like, and need not care.

use std::fmt::Arguments;
use std::io::{self, Write};

/// Writes to standard output, if that is possible.
pub fn out(text: Arguments<'_>) {
    let _ = io::stdout().write_fmt(text);
}

/// Writes to standard error, if that is possible.
pub fn err(text: Arguments<'_>) {
    let _ = io::stderr().write_fmt(text);
}

/// Like `println!`, but nothing happens when that is not possible.
#[macro_export]
macro_rules! say {
    () => { $crate::spoken::out(format_args!("\n")) };
    ($($text:tt)*) => { $crate::spoken::out(format_args!("{}\n", format_args!($($text)*))) };
}

/// Like `print!`, but nothing happens when that is not possible.
#[macro_export]
macro_rules! say_part {
    ($($text:tt)*) => { $crate::spoken::out(format_args!($($text)*)) };
}

/// Like `eprintln!`, but nothing happens when that is not possible.
#[macro_export]
macro_rules! complain {
    ($($text:tt)*) => { $crate::spoken::err(format_args!("{}\n", format_args!($($text)*))) };
}

/// Like `eprint!`, but nothing happens when that is not possible.
#[macro_export]
macro_rules! complain_part {
    ($($text:tt)*) => { $crate::spoken::err(format_args!($($text)*)) };
}

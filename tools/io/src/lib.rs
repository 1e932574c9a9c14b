//! The command line of qemu-io on Underlay's engine.
#![forbid(unsafe_code)]

/// Runs the program; the exit status.
pub fn main(program: &str, _words: &[String]) -> i32 {
    eprintln!("{program}: not part of this version of Underlay");
    1
}

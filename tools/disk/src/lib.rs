//! One disk, opened as a program's command line says: by name and format or by a list of options, with a cache mode,
//! and opened again with others.
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod disk;
mod modes;
pub mod temporary;

pub use disk::{Disk, Reader, Request, Source, guessed_raw};
pub use modes::Modes;
pub use underlay_qmp::option_list::{OptionList, parse as parse_options};

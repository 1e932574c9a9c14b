//! What takes bytes from strangers.

pub mod blockdev;
pub mod command_line;
pub mod nbd;
pub mod qcow2;
pub mod qmp;
pub mod shell;

//! What takes bytes from strangers.

pub mod blockdev;
pub mod nbd;
pub mod qcow2;
pub mod qmp;
pub mod shell;

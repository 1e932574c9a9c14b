//! Standard input and output without blocking the thread. Both belong to other processes too: they stay as blocking as
//! they are.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use crate::driver;

/// A descriptor of our own for the same.
fn second(of: &'static OnceLock<Arc<OwnedFd>>, fd: &impl AsFd) -> io::Result<&'static Arc<OwnedFd>> {
    if let Some(fd) = of.get() {
        return Ok(fd);
    }
    let fd = Arc::new(driver::duplicate(fd)?);
    Ok(of.get_or_init(|| fd))
}

/// Reads what is there, at least a byte; 0 at the end.
pub async fn read(into: &mut [u8]) -> io::Result<usize> {
    static INPUT: OnceLock<Arc<OwnedFd>> = OnceLock::new();
    driver::read(second(&INPUT, &io::stdin())?, into).await
}

/// Writes all of `bytes`, behind what was printed.
pub async fn write_all(bytes: &[u8]) -> io::Result<()> {
    static OUTPUT: OnceLock<Arc<OwnedFd>> = OnceLock::new();
    io::stdout().flush()?;
    driver::write_all_blocking(second(&OUTPUT, &io::stdout())?, bytes).await
}

//! Standard input and output without blocking the thread.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use crate::driver;

fn input() -> io::Result<&'static Arc<OwnedFd>> {
    static INPUT: OnceLock<Arc<OwnedFd>> = OnceLock::new();
    if let Some(fd) = INPUT.get() {
        return Ok(fd);
    }
    let fd = Arc::new(driver::duplicate(&io::stdin())?);
    Ok(INPUT.get_or_init(|| fd))
}

/// Reads what is there, at least a byte; 0 at the end.
pub async fn read(into: &mut [u8]) -> io::Result<usize> {
    driver::read(input()?, into).await
}

/// Writes all of `bytes`.
pub async fn write_all(bytes: &[u8]) -> io::Result<()> {
    let mut output = io::stdout().lock();
    output.write_all(bytes)?;
    output.flush()
}

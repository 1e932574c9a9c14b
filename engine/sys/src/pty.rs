//! Pseudoterminals: the end that a terminal program does not see.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{self, OptionalActions};

use crate::{driver, rt};

/// How often it is looked whether somebody has opened the other end: the kernel does not tell.
const LOOK: Duration = Duration::from_millis(100);

/// One end. Dropping it removes its link.
#[derive(Debug)]
pub struct Pty {
    fd: Arc<OwnedFd>,
    name: String,
    link: Option<PathBuf>,
}

impl Pty {
    /// A new one, whose other end passes bytes as they are.
    pub fn open() -> io::Result<Self> {
        let fd = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        rustix::pty::grantpt(&fd)?;
        rustix::pty::unlockpt(&fd)?;
        let name = rustix::pty::ptsname(&fd, Vec::new())?.to_string_lossy().into_owned();
        let other = rustix::fs::open(&*name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
        let mut modes = termios::tcgetattr(&other)?;
        modes.make_raw();
        termios::tcsetattr(&other, OptionalActions::Now, &modes)?;
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd: Arc::new(fd), name, link: None })
    }

    /// The other end's file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes a symbolic link to the other end.
    pub fn link(&mut self, path: &Path) -> io::Result<()> {
        let path = std::path::absolute(path)?;
        std::os::unix::fs::symlink(&self.name, &path)?;
        self.link = Some(path);
        Ok(())
    }

    /// Waits until somebody has the other end open.
    pub async fn opened(&self) -> io::Result<()> {
        while self.is_alone()? {
            rt::sleep(LOOK).await;
        }
        Ok(())
    }

    fn is_alone(&self) -> io::Result<bool> {
        let mut polled = [PollFd::new(&*self.fd, PollFlags::empty())];
        rustix::event::poll(&mut polled, Some(&rustix::time::Timespec::default()))?;
        Ok(polled[0].revents().contains(PollFlags::HUP))
    }

    /// Reads what is there, at least a byte; 0 when nobody has the other end open any more.
    pub async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        match driver::read(&self.fd, into).await {
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(0),
            done => done,
        }
    }

    /// Writes all of `bytes`, as fast as somebody reads them; nowhere once nobody has the other end open.
    pub async fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() && !self.is_alone()? {
            rest = &rest[driver::write(&self.fd, rest).await?..];
        }
        Ok(())
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        if let Some(link) = &self.link {
            // Perhaps somebody removed it before us.
            let _ = std::fs::remove_file(link);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::thread::block_on;

    #[test]
    fn somebody_comes_talks_and_goes() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut pty = Pty::open().expect("a terminal");
        let link = folder.path().join("link");
        pty.link(&link).expect("linked");
        assert!(pty.is_alone().expect("asked"));
        let mut there =
            std::fs::OpenOptions::new().read(true).write(true).open(&link).expect("the other end");
        block_on(async {
            pty.opened().await.expect("asked");
            there.write_all(b"a\r\n\x03").expect("written");
            let mut buffer = [0; 8];
            assert_eq!(pty.read(&mut buffer).await.expect("read"), 4);
            assert_eq!(&buffer[..4], b"a\r\n\x03", "bytes as they are");
            pty.write_all(b"b\n").await.expect("written");
            let mut answer = [0; 2];
            there.read_exact(&mut answer).expect("read");
            assert_eq!(&answer, b"b\n");
            drop(there);
            pty.write_all(&[7; 1 << 20]).await.expect("for nobody");
            assert_eq!(pty.read(&mut buffer).await.expect("the end"), 0);
            assert!(pty.is_alone().expect("asked"));
        });
        drop(pty);
        assert!(!link.exists() && std::fs::symlink_metadata(&link).is_err());
    }
}

//! Named pipes: two of them for the two directions, or one file for both.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use crate::driver;

/// The two directions.
#[derive(Debug)]
pub struct Pipe {
    input: Arc<OwnedFd>,
    output: Arc<OwnedFd>,
}

fn open(path: &Path) -> io::Result<Arc<OwnedFd>> {
    // For both directions: nobody need be at the other end, now or later.
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(Arc::new(rustix::fs::open(path, flags, Mode::empty())?))
}

impl Pipe {
    /// `PATH.in` and `PATH.out`, or `PATH` if one of them is not there.
    pub fn open(path: &Path) -> io::Result<Self> {
        let with = |end: &str| {
            let mut name = path.as_os_str().to_owned();
            name.push(end);
            open(Path::new(&name))
        };
        if let (Ok(input), Ok(output)) = (with(".in"), with(".out")) {
            return Ok(Self { input, output });
        }
        let both = open(path)?;
        Ok(Self { input: both.clone(), output: both })
    }

    /// Reads what is there, at least a byte; 0 at the end.
    pub async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        driver::read(&self.input, into).await
    }

    /// Writes all of `bytes`, as fast as somebody reads them.
    pub async fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            rest = &rest[driver::write(&self.output, rest).await?..];
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::thread::block_on;

    #[test]
    fn two_pipes_or_one_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("p");
        assert!(Pipe::open(&path).is_err());
        for end in ["p.in", "p.out"] {
            let mode = Mode::RUSR | Mode::WUSR;
            let made = rustix::fs::mkfifoat(rustix::fs::CWD, folder.path().join(end), mode);
            made.expect("a pipe");
        }
        let pipe = Pipe::open(&path).expect("both are there");
        let open = |end| std::fs::OpenOptions::new().read(true).write(true).open(folder.path().join(end));
        let (mut there, mut back) = (open("p.in").expect("a pipe"), open("p.out").expect("a pipe"));
        there.write_all(b"ask").expect("written");
        block_on(async {
            let mut buffer = [0; 8];
            assert_eq!(pipe.read(&mut buffer).await.expect("read"), 3);
            assert_eq!(&buffer[..3], b"ask");
            pipe.write_all(b"answer").await.expect("written");
        });
        let mut answer = [0; 6];
        back.read_exact(&mut answer).expect("read");
        assert_eq!(&answer, b"answer");
        std::fs::remove_file(folder.path().join("p.out")).expect("removed");
        std::fs::write(&path, "").expect("a file");
        Pipe::open(&path).expect("one file for both");
    }
}

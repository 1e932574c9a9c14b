//! What a file system tells of a file, and when the kernel was started that tells it.

use std::io;
use std::os::fd::AsFd;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// A file as the file system has it. Times are in nanoseconds since the beginning of 1970, and come in steps of some
/// milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// Of the file system that the file is in.
    pub device: u64,
    /// The file's number there.
    pub inode: u64,
    /// Bytes.
    pub len: u64,
    /// Who may do what with it.
    pub mode: u32,
    /// When it was last written to.
    pub modified: i64,
    /// When it, its owner, its mode or its names last changed.
    pub changed: i64,
}

impl Stat {
    /// Of an open file.
    pub fn of(file: impl AsFd) -> io::Result<Self> {
        let stat = rustix::fs::fstat(file)?;
        let time = |seconds: i64, nanoseconds: u64| {
            seconds.saturating_mul(NANOSECONDS).saturating_add(i64::try_from(nanoseconds).unwrap_or(0))
        };
        Ok(Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            len: u64::try_from(stat.st_size).unwrap_or(0),
            mode: stat.st_mode & 0o7777,
            modified: time(stat.st_mtime, stat.st_mtime_nsec),
            changed: time(stat.st_ctime, stat.st_ctime_nsec),
        })
    }
}

const NANOSECONDS: i64 = 1_000_000_000;

/// What the clock on the wall says, in nanoseconds since the beginning of 1970.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// One run of the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Boot {
    /// Its name: no other run has it.
    pub id: u128,
    /// When it began, by the clock on the wall as it goes now: nanoseconds since the beginning of 1970.
    pub began: i64,
}

impl Boot {
    /// The run that this is.
    pub fn this() -> io::Result<Self> {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let digits: String = id.trim().chars().filter(|digit| *digit != '-').collect();
        let id = u128::from_str_radix(&digits, 16).map_err(io::Error::other)?;
        let up = clock_gettime(ClockId::Boottime);
        let up = up.tv_sec.saturating_mul(NANOSECONDS).saturating_add(up.tv_nsec);
        Ok(Self { id, began: now() - up })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_write_shows() {
        let mut file = tempfile::tempfile().expect("a file");
        let before = Stat::of(&file).expect("told");
        file.write_all(&[1; 1000]).expect("written");
        let after = Stat::of(&file).expect("told");
        assert_eq!((before.len, after.len, after.inode), (0, 1000, before.inode));
        assert!(after.modified >= before.modified && after.changed >= before.changed);
        let hour = 3600 * NANOSECONDS;
        assert!((after.modified - now()).abs() < hour);
    }

    #[test]
    fn the_kernel_stays_the_same() {
        let (one, two) = (Boot::this().expect("told"), Boot::this().expect("told"));
        assert!(one.id == two.id && one.id != 0 && one.began < now());
    }
}

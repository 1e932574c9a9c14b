//! The error numbers that NBD knows. They are Linux's, but only these may be on the wire.

/// An error as it is on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub u32);

impl Errno {
    /// No error.
    pub const OK: Self = Self(0);
    /// Operation not permitted: a write to a read-only export.
    pub const EPERM: Self = Self(1);
    /// Input/output error.
    pub const EIO: Self = Self(5);
    /// Out of memory.
    pub const ENOMEM: Self = Self(12);
    /// Invalid argument.
    pub const EINVAL: Self = Self(22);
    /// No space left on device; also writes past the end.
    pub const ENOSPC: Self = Self(28);
    /// Value too large.
    pub const EOVERFLOW: Self = Self(75);
    /// Not supported: fast zeroing that would not be fast.
    pub const ENOTSUP: Self = Self(95);
    /// The server is about to go.
    pub const ESHUTDOWN: Self = Self(108);

    /// The nearest thing that NBD can say for a Linux error number. What has no counterpart is EINVAL.
    pub fn from_linux(errno: i32) -> Self {
        match errno {
            1 | 30 => Self::EPERM,
            5 => Self::EIO,
            12 => Self::ENOMEM,
            27 | 28 | 122 => Self::ENOSPC,
            75 => Self::EOVERFLOW,
            95 => Self::ENOTSUP,
            108 => Self::ESHUTDOWN,
            _ => Self::EINVAL,
        }
    }

    /// The Linux error number, 0 for none. Unknown ones become EINVAL, as the specification asks.
    pub fn to_linux(self) -> i32 {
        match self.0 {
            0 | 1 | 5 | 12 | 22 | 28 | 75 | 95 | 108 => i32::try_from(self.0).unwrap_or(22),
            _ => 22,
        }
    }

    /// Whether there was no error.
    pub fn is_ok(self) -> bool {
        self.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_numbers_pass() {
        assert_eq!(Errno::from_linux(28), Errno::ENOSPC);
        assert_eq!(Errno::from_linux(27), Errno::ENOSPC);
        assert_eq!(Errno::from_linux(30), Errno::EPERM);
        assert_eq!(Errno::from_linux(9999), Errno::EINVAL);
        assert_eq!(Errno(9999).to_linux(), 22);
        assert_eq!(Errno::ENOTSUP.to_linux(), 95);
    }
}

//! The modes that command lines give by a word: cache, discard, aio.

use underlay_drivers::protocol::file::Aio;
use underlay_graph::plan::DetectZeroes;

/// How a disk is used, beside what it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Modes {
    /// Past the page cache.
    pub direct: bool,
    /// Flushes are not passed on.
    pub no_flush: bool,
    /// A flush after every write.
    pub writethrough: bool,
    /// Discards are passed on.
    pub discard: bool,
    /// `None`: the driver's choice.
    pub aio: Option<Aio>,
    /// What to do with writes of zeroes.
    pub detect_zeroes: DetectZeroes,
    /// What is read from below the image is copied into it.
    pub copy_on_read: bool,
}

impl Modes {
    /// A cache mode; false when there is none of this name.
    pub fn set_cache(&mut self, mode: &str) -> bool {
        let (direct, no_flush, writethrough) = match mode {
            "none" | "off" => (true, false, false),
            "directsync" => (true, false, true),
            "writeback" => (false, false, false),
            "writethrough" => (false, false, true),
            "unsafe" => (false, true, false),
            _ => return false,
        };
        (self.direct, self.no_flush, self.writethrough) = (direct, no_flush, writethrough);
        true
    }

    /// A discard mode; false when there is none of this name.
    pub fn set_discard(&mut self, mode: &str) -> bool {
        self.discard = match mode {
            "ignore" | "off" => false,
            "unmap" | "on" => true,
            _ => return false,
        };
        true
    }

    /// A way to the kernel; false when there is none of this name.
    pub fn set_aio(&mut self, mode: &str) -> bool {
        self.aio = Some(match mode {
            "threads" => Aio::Threads,
            "native" => Aio::Native,
            "io_uring" => Aio::IoUring,
            _ => return false,
        });
        true
    }

    /// What to do with writes of zeroes; false when there is no mode of this name.
    pub fn set_detect_zeroes(&mut self, mode: &str) -> bool {
        self.detect_zeroes = match mode {
            "off" => DetectZeroes::Off,
            "on" => DetectZeroes::On,
            "unmap" => DetectZeroes::Unmap,
            _ => return false,
        };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::Modes;

    #[test]
    fn a_cache_mode_replaces_all_of_the_one_before() {
        let mut modes = Modes { discard: true, ..Modes::default() };
        assert!(modes.set_cache("directsync"));
        assert!(modes.direct && modes.writethrough && !modes.no_flush);
        assert!(modes.set_cache("unsafe"));
        assert!(!modes.direct && !modes.writethrough && modes.no_flush && modes.discard);
        assert!(!modes.set_cache("fast"));
        assert!(modes.no_flush, "an unknown mode changes nothing");
    }
}

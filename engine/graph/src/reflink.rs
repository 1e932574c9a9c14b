//! Copies that share the storage of what they copy: on file systems that can do so (xfs, btrfs) a copy of any size
//! takes as long as a note of where it is.
//!
//! What is shared is not told from a copy by anybody, except that who first writes to either needs new room for it.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use underlay_sys::rt;

use crate::error::IoError;
use crate::units::ByteRange;
use crate::view::Cx;

/// Bytes of the first try.
const FIRST: u64 = 1 << 20;
/// Most bytes at once.
const MOST: u64 = 256 << 20;
/// The file's other users wait while storage is shared: no longer than this, if it can be helped.
const QUICK: Duration = Duration::from_millis(5);
/// What a copy of a MiB takes, about.
const COPY_OF_MIB: Duration = Duration::from_millis(1);
/// So many slow ones in a row, and there are no more.
const PATIENCE: u32 = 4;

/// Tries, for one who copies, as long as it works and pays: a file that is not on its disk yet has to be written first,
/// and one in many pieces takes its time.
#[derive(Debug)]
pub struct Reflinks {
    /// Bytes of the next try; 0: no more.
    stride: AtomicU64,
    /// Slow ones in a row.
    slow: AtomicU32,
}

impl Reflinks {
    /// If they are `wanted` at all.
    pub fn new(wanted: bool) -> Self {
        Self { stride: AtomicU64::new(if wanted { FIRST } else { 0 }), slow: AtomicU32::new(0) }
    }

    /// Most bytes to be asked for at once, a power of two; 0 when there is no use in asking.
    pub fn stride(&self) -> u64 {
        self.stride.load(Ordering::Relaxed)
    }

    /// Makes `to` have at `at` what is in `range` at `from`; false when it has to be copied, and nothing has happened
    /// or half of it.
    pub async fn copy(&self, from: &Cx<'_>, range: ByteRange, to: &Cx<'_>, at: u64) -> bool {
        let begun = rt::now();
        match from.reflink(range, to, at).await {
            Ok(()) => {
                self.learn(range.len(), rt::now().saturating_sub(begun));
                true
            }
            Err(error) => {
                // One that does not begin or end where blocks do says nothing about others.
                if error != IoError::EINVAL {
                    self.stride.store(0, Ordering::Relaxed);
                }
                false
            }
        }
    }

    fn learn(&self, len: u64, took: Duration) {
        let mib = u32::try_from(len >> 20).unwrap_or(u32::MAX);
        if took > COPY_OF_MIB.saturating_mul(mib).saturating_add(QUICK) {
            let given_up = self.slow.fetch_add(1, Ordering::Relaxed) + 1 >= PATIENCE;
            self.stride.store(if given_up { 0 } else { FIRST }, Ordering::Relaxed);
            return;
        }
        self.slow.store(0, Ordering::Relaxed);
        let change = |stride| match stride {
            0 => None,
            _ if took > QUICK => Some(FIRST.max(stride / 2)),
            // Not by others that were asked for before the last step.
            _ if len < stride => None,
            _ => Some(MOST.min(stride * 4)),
        };
        // Somebody else has learned meanwhile.
        let _ = self.stride.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn quick_ones_grow_and_those_that_hold_others_up_shrink() {
        let reflinks = Reflinks::new(true);
        for wanted in [1, 4, 16, 64, 256, 256] {
            assert_eq!(reflinks.stride(), wanted * MIB);
            reflinks.learn(reflinks.stride(), Duration::from_micros(100));
        }
        reflinks.learn(256 * MIB, Duration::from_millis(8));
        assert_eq!(reflinks.stride(), 128 * MIB);
        // A short run at the end of a file.
        reflinks.learn(MIB, Duration::from_micros(10));
        assert_eq!(reflinks.stride(), 128 * MIB);
    }

    #[test]
    fn slow_ones_are_given_up() {
        let reflinks = Reflinks::new(true);
        reflinks.learn(MIB, Duration::ZERO);
        for _ in 1..PATIENCE {
            reflinks.learn(MIB, Duration::from_millis(7));
            assert_eq!(reflinks.stride(), MIB);
        }
        reflinks.learn(MIB, Duration::from_millis(7));
        assert_eq!(reflinks.stride(), 0);
        reflinks.learn(MIB, Duration::ZERO);
        assert_eq!(reflinks.stride(), 0);
    }

    #[test]
    fn none_are_made_for_who_does_not_want_them() {
        assert_eq!(Reflinks::new(false).stride(), 0);
    }
}

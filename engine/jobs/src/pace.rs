//! The speed limit. Source: `design/qemu-surface.md` 5.5.
//!
//! Every chunk costs time at the given speed, and the job may be at most one slice of that time ahead; so a job
//! may begin with a chunk that is much larger than a slice, and then waits until that is paid for.

use std::time::Duration;

/// The job may be so much ahead of its speed.
const SLICE: Duration = Duration::from_millis(100);

/// What has been spent.
#[derive(Debug, Default)]
pub struct Pace {
    /// Everything up to now is paid for at this moment of the clock.
    paid_at: Duration,
}

impl Pace {
    /// Counts a chunk of `bytes` at `speed` bytes per second (0: no limit).
    pub fn spend(&mut self, now: Duration, bytes: u64, speed: u64) {
        if speed == 0 {
            self.paid_at = Duration::ZERO;
            return;
        }
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(speed);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.paid_at = self.paid_at.max(now).saturating_add(cost);
    }

    /// When the next chunk may be begun, if not now.
    pub fn wait_until(&self, now: Duration) -> Option<Duration> {
        let at = self.paid_at.saturating_sub(SLICE);
        (at > now).then_some(at)
    }

    /// Forgets the debt: the speed was changed.
    pub fn forget(&mut self) {
        self.paid_at = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_chunk_goes_at_once_and_is_paid_for_later() {
        let mut pace = Pace::default();
        let start = Duration::from_secs(5);
        assert_eq!(pace.wait_until(start), None);
        pace.spend(start, 524_288, 65_536);
        assert_eq!(pace.wait_until(start), Some(start + Duration::from_millis(7900)));
        assert_eq!(pace.wait_until(start + Duration::from_secs(8)), None);
        pace.forget();
        assert_eq!(pace.wait_until(start), None);
    }

    #[test]
    fn the_average_is_the_speed() {
        let mut pace = Pace::default();
        let (mut now, mut bytes) = (Duration::from_secs(1), 0_u64);
        while now < Duration::from_secs(11) {
            match pace.wait_until(now) {
                Some(at) => now = at,
                None => {
                    pace.spend(now, 65_536, 10_000_000);
                    bytes += 65_536;
                }
            }
        }
        assert!((99_000_000..=101_100_000).contains(&bytes), "{bytes}");
    }
}

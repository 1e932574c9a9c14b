//! A leaky bucket. What is read or written is poured in, and it leaks at the average rate; as long as it is not above
//! its brim, the next request may go on. A bucket with room for a burst has a second, small one inside, which leaks at
//! the rate of the burst, so that a burst too has its speed.
//!
//! ```text
//!   brim, without a burst: a tenth of a second at the average rate
//!   brim, with a burst:    max-length seconds at the rate `max`; above one second, with a small bucket of a tenth of a second
//! ```
//!
//! A request is poured in whole: one that is larger than the bucket goes on at once and is paid for by those after it.
//! Levels are exact: in billionths of a byte or request, so that a nanosecond of leaking is a whole number.

use std::time::Duration;

use super::limits::Rate;

/// One byte or request, as levels count it.
pub const ONE: u128 = 1_000_000_000;

/// How full it is. The rate is given with each call, as it may change.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bucket {
    level: u128,
    /// Of the small bucket inside.
    burst: u128,
    /// Up to when it has leaked.
    at: Duration,
}

impl Bucket {
    /// Lets out what leaks until `now`. Time that goes back is none.
    pub fn leak(&mut self, rate: &Rate, now: Duration) {
        let passed = now.saturating_sub(self.at).as_nanos();
        self.at = self.at.max(now);
        self.level = self.level.saturating_sub(passed.saturating_mul(u128::from(rate.average)));
        self.burst = self.burst.saturating_sub(passed.saturating_mul(u128::from(rate.max)));
    }

    /// How long to wait from the last leak on until a request may go on.
    pub fn wait(&self, rate: &Rate) -> Duration {
        let tenth = |rate: u64| u128::from(rate) * ONE / 10;
        let until = |level: u128, brim: u128, rate: u64| match (level.saturating_sub(brim), rate) {
            (0, _) | (_, 0) => Duration::ZERO,
            (above, rate) => {
                let nanos = above.div_ceil(u128::from(rate));
                Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
            }
        };
        if rate.max == 0 {
            return until(self.level, tenth(rate.average), rate.average);
        }
        let brim = u128::from(rate.max).saturating_mul(u128::from(rate.length)).saturating_mul(ONE);
        let wait = until(self.level, brim, rate.average);
        match rate.length > 1 {
            true => wait.max(until(self.burst, tenth(rate.max), rate.max)),
            false => wait,
        }
    }

    /// Pours in a request of `amount`, in billionths.
    pub fn pour(&mut self, rate: &Rate, amount: u128) {
        if rate.average > 0 {
            self.level = self.level.saturating_add(amount);
            self.burst = self.burst.saturating_add(amount);
        }
    }
}

//! The limits of a group: six rates and the size from which on a request counts as several.
//!
//! Numbers are as their users give them, even impossible ones: [`Limits::check`] has the last word on all together.
//! Source: the reference's answers.

/// The rates by the names that their users give them, in the order in which they are checked.
pub const RATES: [&str; 6] = ["bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write"];

/// No rate may be higher, nor a burst longer than so many bytes or requests.
const MOST: u64 = 1_000_000_000_000_000;

/// Bytes or requests per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// In the long run; 0: no limit.
    pub average: u64,
    /// `-max`: in a burst; 0: no bursts.
    pub max: u64,
    /// `-max-length`: seconds that a burst may take.
    pub length: u64,
}

/// See the module. The rates are those of [`RATES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The six rates.
    pub rates: [Rate; 6],
    /// `iops-size`: requests of more bytes than this count as several; 0: every request counts as one.
    pub iops_size: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { rates: [Rate { average: 0, max: 0, length: 1 }; 6], iops_size: 0 }
    }
}

/// Why limits make no sense. The texts are QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitsError {
    /// In total and by direction.
    #[error("bps/iops/max total values and read/write values cannot be used at the same time")]
    TotalAndDirection,
    /// A size of requests that are not counted.
    #[error("iops size requires an iops value to be set")]
    SizeWithoutRate,
    /// Too high, or negative.
    #[error("bps/iops/max values must be within [0, {MOST}]")]
    Range,
    /// A burst of no length.
    #[error("the burst length cannot be 0")]
    NoLength,
    /// The length of a burst that there is not.
    #[error("burst length set without burst rate")]
    LengthWithoutMax,
    /// A burst of too much.
    #[error("burst length too high for this burst rate")]
    TooLong,
    /// A burst above nothing.
    #[error("bps_max/iops_max require corresponding bps/iops values")]
    MaxWithoutAverage,
    /// A burst that is slower than the average.
    #[error("bps_max/iops_max cannot be lower than bps/iops")]
    MaxBelowAverage,
}

impl Rate {
    fn check(&self) -> Result<(), LimitsError> {
        let Self { average, max, length } = *self;
        match () {
            () if average > MOST || max > MOST => Err(LimitsError::Range),
            () if length == 0 => Err(LimitsError::NoLength),
            () if length > 1 && max == 0 => Err(LimitsError::LengthWithoutMax),
            () if max > 0 && length > MOST / max => Err(LimitsError::TooLong),
            () if max > 0 && average == 0 => Err(LimitsError::MaxWithoutAverage),
            () if max > 0 && max < average => Err(LimitsError::MaxBelowAverage),
            () => Ok(()),
        }
    }
}

impl Limits {
    /// Whether they make sense together.
    pub fn check(&self) -> Result<(), LimitsError> {
        let [bps_total, bps_read, bps_write, iops_total, iops_read, iops_write] = self.rates;
        let both = |total: u64, read: u64, write: u64| total > 0 && (read > 0 || write > 0);
        for (total, read, write) in [(bps_total, bps_read, bps_write), (iops_total, iops_read, iops_write)] {
            if both(total.average, read.average, write.average) || both(total.max, read.max, write.max) {
                return Err(LimitsError::TotalAndDirection);
            }
        }
        let counted = [iops_total, iops_read, iops_write].iter().any(|rate| rate.average > 0);
        if self.iops_size > 0 && !counted {
            return Err(LimitsError::SizeWithoutRate);
        }
        self.rates.iter().try_for_each(Rate::check)
    }

    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        self.rates.iter().all(|rate| rate.average == 0)
    }

    /// The names of all numbers: `bps-total`, `bps-total-max`, `bps-total-max-length`, …, `iops-size`.
    pub fn names() -> impl Iterator<Item = String> {
        let of_rate = |rate: &str| [rate.to_owned(), format!("{rate}-max"), format!("{rate}-max-length")];
        RATES.into_iter().flat_map(of_rate).chain(["iops-size".to_owned()])
    }

    /// The number with this name.
    pub fn number_mut(&mut self, name: &str) -> Option<&mut u64> {
        if name == "iops-size" {
            return Some(&mut self.iops_size);
        }
        let at = RATES.iter().position(|rate| {
            name.strip_prefix(rate).is_some_and(|rest| matches!(rest, "" | "-max" | "-max-length"))
        })?;
        let rate = &mut self.rates[at];
        Some(match name.strip_prefix(RATES[at]) {
            Some("-max") => &mut rate.max,
            Some("-max-length") => &mut rate.length,
            _ => &mut rate.average,
        })
    }

    /// The number with this name.
    pub fn number(mut self, name: &str) -> Option<u64> {
        self.number_mut(name).copied()
    }
}

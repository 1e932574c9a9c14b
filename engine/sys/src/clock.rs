//! The calendar of the place where the program runs.

/// A moment in local time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalTime {
    /// All four digits.
    pub year: i64,
    /// From 1.
    pub month: u32,
    /// From 1.
    pub day: u32,
    /// From 0.
    pub hour: u32,
    /// From 0.
    pub minute: u32,
    /// From 0.
    pub second: u32,
}

/// What the clock on the wall says `seconds` after the beginning of 1970 (UTC).
pub fn local_time(seconds: i64) -> LocalTime {
    // SAFETY: all zeroes is a value of this plain struct.
    let mut parts: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both point to values of this function; the time zone is read under the C library's lock.
    let done = unsafe { libc::localtime_r(&raw const seconds, &raw mut parts) };
    if done.is_null() {
        return LocalTime::default();
    }
    let number = |part: libc::c_int| u32::try_from(part).unwrap_or(0);
    LocalTime {
        year: i64::from(parts.tm_year) + 1900,
        month: number(parts.tm_mon) + 1,
        day: number(parts.tm_mday),
        hour: number(parts.tm_hour),
        minute: number(parts.tm_min),
        second: number(parts.tm_sec),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wherever this runs: never more than a day from UTC, and whole minutes apart.
    #[test]
    fn the_second_of_a_minute_is_everywhere_the_same() {
        let time = local_time(4_000_000_000);
        assert_eq!((time.year, time.month, time.second), (2096, 10, 40));
        assert!((1..=3).contains(&time.day), "{time:?}");
    }
}

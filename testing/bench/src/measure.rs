//! Samples, and what is made of them.

use serde::Serialize;

use crate::side::Side;

/// What can go wrong with a measurement is for a person to read.
pub type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// One value, and what the measured process needed for it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// In the unit of its part of the row; less is better.
    pub value: f64,
    /// Seconds of processor time.
    pub cpu: f64,
    /// Most memory, in MiB.
    pub peak: f64,
}

/// All samples of one row: for each round, one for each of its parts.
#[derive(Debug, Default)]
pub struct Samples {
    qemu: Vec<Vec<Sample>>,
    underlay: Vec<Vec<Sample>>,
    limit: Vec<f64>,
}

impl Samples {
    pub fn add(&mut self, side: Side, parts: Vec<Sample>) {
        match side {
            Side::Qemu => self.qemu.push(parts),
            Side::Underlay => self.underlay.push(parts),
        }
    }

    /// What the kernel alone needed, where that limits the row.
    pub fn add_limit(&mut self, value: Option<f64>) {
        self.limit.extend(value);
    }

    /// Median of what the kernel alone needed.
    pub fn limit(&self) -> Option<f64> {
        let mut values = self.limit.clone();
        values.sort_by(f64::total_cmp);
        (!values.is_empty()).then(|| median(&values))
    }

    /// What was measured for a part of the row.
    pub fn of(&self, side: Side, part: usize) -> Summary {
        let rounds = match side {
            Side::Qemu => &self.qemu,
            Side::Underlay => &self.underlay,
        };
        let samples: Vec<Sample> = rounds.iter().filter_map(|parts| parts.get(part)).copied().collect();
        let sorted = |of: fn(&Sample) -> f64| {
            let mut values: Vec<f64> = samples.iter().map(of).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let (values, cpu, peak) = (sorted(|s| s.value), sorted(|s| s.cpu), sorted(|s| s.peak));
        Summary {
            median: median(&values),
            minimum: values.first().copied().unwrap_or(0.0),
            maximum: values.last().copied().unwrap_or(0.0),
            cpu: median(&cpu),
            peak: peak.last().copied().unwrap_or(0.0),
        }
    }
}

/// The samples of one side.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Summary {
    pub median: f64,
    pub minimum: f64,
    pub maximum: f64,
    /// Median of the seconds of processor time.
    pub cpu: f64,
    /// Largest of the peaks of memory, in MiB.
    pub peak: f64,
}

/// The middle one of sorted values, or between the two middle ones.
pub fn median(sorted: &[f64]) -> f64 {
    let (low, high) = (sorted.len().saturating_sub(1) / 2, sorted.len() / 2);
    match (sorted.get(low), sorted.get(high)) {
        (Some(low), Some(high)) => (low + high) / 2.0,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[1.0, 2.0, 9.0]), 2.0);
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), 3.0);
    }

    #[test]
    fn parts_are_told_apart() {
        let mut samples = Samples::default();
        for value in [3.0, 1.0, 2.0] {
            let part = |value| Sample { value, cpu: value, peak: value };
            samples.add(Side::Qemu, vec![part(value), part(10.0 * value)]);
        }
        let second = samples.of(Side::Qemu, 1);
        assert_eq!((second.minimum, second.median, second.maximum), (10.0, 20.0, 30.0));
        assert_eq!(second.peak, 30.0);
        assert_eq!(samples.of(Side::Underlay, 0).median, 0.0);
        assert_eq!(samples.limit(), None);
        [Some(3.0), None, Some(1.0), Some(2.0)].into_iter().for_each(|value| samples.add_limit(value));
        assert_eq!(samples.limit(), Some(2.0));
    }
}

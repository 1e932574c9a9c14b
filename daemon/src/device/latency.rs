//! How long requests take: histograms of it, and the shortest, the longest and the average of a time that has just
//! passed.
//!
//! Nothing here asks for the time: it is given, in nanoseconds.

use underlay_qmp::json::{Object, Value};

/// How many requests took how long. Bin 0 is below the first boundary, bin n from boundary n - 1 on.
#[derive(Clone, Debug)]
pub struct Histogram {
    boundaries: Vec<u64>,
    bins: Vec<u64>,
}

fn numbers(numbers: &[u64]) -> Value {
    Value::List(numbers.iter().map(|number| Value::from(*number)).collect())
}

impl Histogram {
    /// With nothing in it. `None`: the boundaries are not above zero and ascending.
    pub fn new(boundaries: Vec<u64>) -> Option<Self> {
        let ascends = boundaries.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascends || boundaries.first() == Some(&0) {
            return None;
        }
        let bins = vec![0; boundaries.len() + 1];
        Some(Self { boundaries, bins })
    }

    /// A request took that long.
    pub fn count(&mut self, took: u64) {
        let bin = self.boundaries.partition_point(|boundary| *boundary <= took);
        if let Some(bin) = self.bins.get_mut(bin) {
            *bin += 1;
        }
    }

    /// BlockLatencyHistogramInfo
    pub fn describe(&self) -> Value {
        Object::new().with("boundaries", numbers(&self.boundaries)).with("bins", numbers(&self.bins)).into()
    }
}

/// What is known of some requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sum {
    count: u64,
    total: u64,
    min: u64,
    max: u64,
}

impl Sum {
    fn and(self, other: Self) -> Self {
        match (self.count, other.count) {
            (_, 0) => self,
            (0, _) => other,
            _ => Self {
                count: self.count + other.count,
                total: self.total.saturating_add(other.total),
                min: self.min.min(other.min),
                max: self.max.max(other.max),
            },
        }
    }

    fn average(self) -> u64 {
        self.total.checked_div(self.count).unwrap_or(0)
    }
}

/// Ways whose latencies an interval knows, as they are called; nothing appends to zones here.
pub const TIMED: [&str; 4] = ["rd", "wr", "flush", "zone_append"];

/// Nanoseconds of a second.
const SECOND: u64 = 1_000_000_000;

/// The requests of the last while. Time is cut into slots of two thirds of the interval's length, and what is told is
/// that of the present slot and the one before: of two thirds to four thirds of the length. Source: asking the
/// reference.
#[derive(Clone, Copy, Debug)]
pub struct Interval {
    seconds: u32,
    start: u64,
    slot: u64,
    present: [Sum; TIMED.len()],
    before: [Sum; TIMED.len()],
}

impl Interval {
    /// Of so many seconds, which must not be none.
    pub fn new(seconds: u32, now: u64) -> Self {
        Self { seconds, start: now, slot: 0, present: Default::default(), before: Default::default() }
    }

    fn slot_length(&self) -> u64 {
        (u64::from(self.seconds) * SECOND * 2 / 3).max(1)
    }

    /// Lets slots go that have become old; the time that what is left has taken so far.
    fn advance(&mut self, now: u64) -> u64 {
        let passed = now.saturating_sub(self.start);
        let (slot, into) = (passed / self.slot_length(), passed % self.slot_length());
        if slot > self.slot {
            self.before = if slot == self.slot + 1 { self.present } else { Default::default() };
            (self.present, self.slot) = (Default::default(), slot);
        }
        self.slot_length().saturating_add(into)
    }

    /// A request, in one of the ways of [`TIMED`], took that long and has ended now.
    pub fn count(&mut self, way: usize, took: u64, now: u64) {
        self.advance(now);
        if let Some(sum) = self.present.get_mut(way) {
            *sum = sum.and(Sum { count: 1, total: took, min: took, max: took });
        }
    }

    /// BlockDeviceTimedStats
    pub fn describe(&mut self, now: u64) -> Value {
        let elapsed = self.advance(now);
        let mut object = Object::new().with("interval_length", i64::from(self.seconds));
        for (at, way) in TIMED.iter().enumerate() {
            let sum = self.before[at].and(self.present[at]);
            object.insert(&format!("min_{way}_latency_ns"), sum.min);
            object.insert(&format!("max_{way}_latency_ns"), sum.max);
            object.insert(&format!("avg_{way}_latency_ns"), sum.average());
            if *way != "flush" {
                let depth = sum.total as f64 / elapsed as f64;
                object.insert(&format!("avg_{way}_queue_depth"), Value::Float(depth));
            }
        }
        object.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts() {
        let mut histogram = Histogram::new(vec![10, 50, 100]).expect("ascending");
        for took in [0, 9, 10, 49, 50, 99, 100, u64::MAX] {
            histogram.count(took);
        }
        assert_eq!(histogram.bins, [2, 2, 2, 2]);
        let mut all = Histogram::new(Vec::new()).expect("no boundaries");
        all.count(5);
        assert_eq!(all.describe().to_string(), r#"{"bins": [1], "boundaries": []}"#);
        for wrong in [vec![0], vec![5, 5], vec![5, 4], vec![1, 3, 2], vec![0, 1]] {
            assert!(Histogram::new(wrong.clone()).is_none(), "{wrong:?}");
        }
    }

    fn number(value: &Value, name: &str) -> u64 {
        let Value::Object(object) = value else { panic!("{value:?}") };
        object.get(name).and_then(Value::as_u64).unwrap_or_else(|| panic!("{name} in {value}"))
    }

    fn depth(value: &Value) -> f64 {
        let Value::Object(object) = value else { panic!("{value:?}") };
        match object.get("avg_rd_queue_depth") {
            Some(Value::Float(depth)) => *depth,
            other => panic!("{other:?}"),
        }
    }

    /// The numbers are those of the reference, asked every second.
    #[test]
    fn an_interval_forgets() {
        let at = |seconds: u64| 100 * SECOND + seconds * SECOND;
        let mut interval = Interval::new(6, at(0));
        interval.count(0, 20_411, at(0));
        for (second, elapsed) in [(0, 4), (1, 5), (2, 6), (3, 7), (4, 4), (5, 5), (7, 7)] {
            let told = interval.describe(at(second));
            assert_eq!(number(&told, "avg_rd_latency_ns"), 20_411, "{second}");
            let found = 20_411.0 / depth(&told) / SECOND as f64;
            assert!((found - f64::from(elapsed)).abs() < 1e-6, "{second}: {found}");
        }
        let told = interval.describe(at(8));
        assert_eq!((number(&told, "max_rd_latency_ns"), depth(&told)), (0, 0.0));
        // Long after.
        interval.count(1, 7, at(9));
        interval.count(1, 3, at(9));
        interval.count(1, 6, at(12));
        let told = interval.describe(at(15));
        let names = ["min_wr_latency_ns", "max_wr_latency_ns", "avg_wr_latency_ns", "min_rd_latency_ns"];
        assert_eq!(names.map(|name| number(&told, name)), [3, 7, 5, 0]);
        assert_eq!(number(&interval.describe(at(16)), "min_wr_latency_ns"), 6);
        assert_eq!(number(&interval.describe(at(1000)), "max_wr_latency_ns"), 0);
        assert_eq!(number(&interval.describe(at(1000)), "interval_length"), 6);
    }

    #[test]
    fn the_longest_interval() {
        let mut interval = Interval::new(u32::MAX, 1);
        interval.count(2, u64::MAX, 2);
        interval.count(2, u64::MAX, u64::MAX);
        assert_eq!(number(&interval.describe(u64::MAX), "max_flush_latency_ns"), u64::MAX);
    }
}

//! What guests did with the disk of a device: query-blockstats.
//!
//! Requests add to counters, and no more than that. Only where a histogram or an interval was asked for, they also look
//! at how long they took, one after the other.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use underlay_exports::{Operation, Took};
use underlay_qmp::json::{Object, Value};
use underlay_sys::rt;

use super::latency::{Histogram, Interval};

/// What was done in one way.
#[derive(Debug, Default)]
struct Count {
    bytes: AtomicU64,
    done: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
    nanos: AtomicU64,
}

/// The ways in which there are, as they are called.
const WAYS: [(Operation, &str); 4] = [
    (Operation::Read, "rd"),
    (Operation::Write, "wr"),
    (Operation::Flush, "flush"),
    (Operation::Discard, "unmap"),
];

/// What there may be a histogram of: how it is called, and what an error calls it. In the order in which a command sets
/// them.
pub const HISTOGRAMS: [(&str, &str); 4] =
    [("rd", "read"), ("wr", "write"), ("zone_append", "append write"), ("flush", "flush")];

/// What is known of latencies.
#[derive(Debug, Default)]
struct Watch {
    histograms: [Option<Histogram>; HISTOGRAMS.len()],
    intervals: Vec<Interval>,
}

/// See the module.
#[derive(Debug)]
pub struct Stats {
    counts: [Count; WAYS.len()],
    /// When a request ended last; 0: none ever did.
    last: AtomicU64,
    account_failed: AtomicBool,
    account_invalid: AtomicBool,
    /// Whether there is something in `watch`.
    watched: AtomicBool,
    watch: Mutex<Watch>,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            counts: Default::default(),
            last: AtomicU64::new(0),
            account_failed: AtomicBool::new(true),
            account_invalid: AtomicBool::new(true),
            watched: AtomicBool::new(false),
            watch: Mutex::default(),
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn count(operation: Operation) -> usize {
    match operation {
        Operation::Read => 0,
        Operation::Write => 1,
        Operation::Flush => 2,
        Operation::Discard => 3,
    }
}

impl Stats {
    fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether failed requests count as something that was done, and invalid ones. Nothing: as before.
    pub fn account(&self, failed: Option<bool>, invalid: Option<bool>) {
        for (account, wanted) in [(&self.account_failed, failed), (&self.account_invalid, invalid)] {
            if let Some(wanted) = wanted {
                account.store(wanted, Ordering::Relaxed);
            }
        }
    }

    /// Begins with an interval of so many seconds.
    pub fn add_interval(&self, seconds: u32) {
        self.watch().intervals.push(Interval::new(seconds, nanos(rt::now())));
        self.watched.store(true, Ordering::Release);
    }

    /// Begins with a histogram anew; nothing: ends it. `which` of [`HISTOGRAMS`].
    pub fn set_histogram(&self, which: usize, histogram: Option<Histogram>) {
        let mut watch = self.watch();
        if let Some(place) = watch.histograms.get_mut(which) {
            *place = histogram;
        }
        let watched = !watch.intervals.is_empty() || watch.histograms.iter().any(Option::is_some);
        self.watched.store(watched, Ordering::Release);
    }

    /// A request has ended.
    pub fn count(&self, operation: Operation, bytes: u64, when: Took, went_well: bool) {
        let Took { start, end } = when;
        let count = &self.counts[count(operation)];
        if went_well {
            count.done.fetch_add(1, Ordering::Relaxed);
            count.bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            count.failed.fetch_add(1, Ordering::Relaxed);
        }
        let took = nanos(end.saturating_sub(start));
        let accounts = went_well || self.account_failed.load(Ordering::Relaxed);
        if accounts {
            count.nanos.fetch_add(took, Ordering::Relaxed);
            self.last.store(nanos(end).max(1), Ordering::Relaxed);
        }
        if self.watched.load(Ordering::Acquire) {
            self.look(operation, took, nanos(end), accounts);
        }
    }

    fn look(&self, operation: Operation, took: u64, now: u64, accounts: bool) {
        let mut watch = self.watch();
        let (histogram, timed) = match operation {
            Operation::Read => (0, 0),
            Operation::Write => (1, 1),
            Operation::Flush => (3, 2),
            Operation::Discard => return,
        };
        if let Some(histogram) = &mut watch.histograms[histogram] {
            histogram.count(took);
        }
        if accounts {
            watch.intervals.iter_mut().for_each(|interval| interval.count(timed, took, now));
        }
    }

    /// A request was refused that asked for what cannot be.
    pub fn count_invalid(&self, operation: Operation) {
        self.counts[count(operation)].invalid.fetch_add(1, Ordering::Relaxed);
        if self.account_invalid.load(Ordering::Relaxed) {
            self.last.store(nanos(rt::now()).max(1), Ordering::Relaxed);
        }
    }

    /// Puts what was counted in place of the zeroes of a description that is there.
    pub fn describe(&self, object: &mut Object) {
        let int = |number: &AtomicU64| {
            Value::Int(i64::try_from(number.load(Ordering::Relaxed)).unwrap_or(i64::MAX))
        };
        for ((_, name), count) in WAYS.iter().zip(&self.counts) {
            object.insert(&format!("{name}_operations"), int(&count.done));
            object.insert(&format!("{name}_total_time_ns"), int(&count.nanos));
            object.insert(&format!("failed_{name}_operations"), int(&count.failed));
            object.insert(&format!("invalid_{name}_operations"), int(&count.invalid));
            if *name != "flush" {
                object.insert(&format!("{name}_bytes"), int(&count.bytes));
            }
        }
        let (last, now) = (self.last.load(Ordering::Relaxed), nanos(rt::now()));
        if last != 0 {
            object.insert("idle_time_ns", now.saturating_sub(last));
        }
        object.insert("account_invalid", self.account_invalid.load(Ordering::Relaxed));
        object.insert("account_failed", self.account_failed.load(Ordering::Relaxed));
        let mut watch = self.watch();
        let timed = watch.intervals.iter_mut().map(|interval| interval.describe(now)).collect();
        object.insert("timed_stats", Value::List(timed));
        for ((name, _), histogram) in HISTOGRAMS.iter().zip(&watch.histograms) {
            if let Some(histogram) = histogram {
                object.insert(&format!("{name}_latency_histogram"), histogram.describe());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use underlay_sys::thread::block_on;

    use super::*;

    fn told(stats: &Stats) -> Object {
        let mut object = Object::new();
        block_on(async { stats.describe(&mut object) });
        object
    }

    fn number(stats: &Stats, name: &str) -> u64 {
        told(stats).get(name).and_then(Value::as_u64).unwrap_or_else(|| panic!("{name}"))
    }

    fn took(start: Duration) -> Took {
        Took { start, end: start + Duration::from_nanos(30) }
    }

    const TOOK: Took = Took { start: Duration::from_nanos(100), end: Duration::from_nanos(130) };

    #[test]
    fn what_fails_counts_unless_told_otherwise() {
        let stats = Stats::default();
        assert!(told(&stats).get("idle_time_ns").is_none());
        stats.account(Some(false), None);
        stats.count(Operation::Read, 512, TOOK, false);
        assert!(told(&stats).get("idle_time_ns").is_none());
        assert_eq!(number(&stats, "rd_total_time_ns"), 0);
        stats.account(Some(true), None);
        stats.count(Operation::Read, 512, TOOK, false);
        stats.count(Operation::Read, 512, TOOK, true);
        let names = ["failed_rd_operations", "rd_operations", "rd_bytes", "rd_total_time_ns"];
        assert_eq!(names.map(|name| number(&stats, name)), [2, 1, 512, 60]);
        assert!(told(&stats).get("idle_time_ns").is_some());
    }

    #[test]
    fn what_is_invalid_counts_unless_told_otherwise() {
        let stats = Stats::default();
        stats.account(None, Some(false));
        block_on(async { stats.count_invalid(Operation::Discard) });
        assert!(told(&stats).get("idle_time_ns").is_none());
        stats.account(None, Some(true));
        block_on(async { stats.count_invalid(Operation::Discard) });
        assert_eq!(number(&stats, "invalid_unmap_operations"), 2);
        assert!(told(&stats).get("idle_time_ns").is_some());
    }

    /// Source: asking the reference.
    #[test]
    fn histograms_have_what_failed_and_intervals_only_what_counts() {
        let stats = Stats::default();
        block_on(async { stats.add_interval(1000) });
        stats.set_histogram(0, Histogram::new(vec![30]));
        stats.set_histogram(3, Histogram::new(vec![31]));
        stats.account(Some(false), None);
        let now = block_on(async { rt::now() });
        stats.count(Operation::Read, 512, took(now), false);
        stats.count(Operation::Flush, 0, took(now), true);
        stats.count(Operation::Discard, 512, took(now), true);
        let object = told(&stats);
        let shown = |name: &str| object.get(name).map(ToString::to_string);
        assert_eq!(shown("rd_latency_histogram").as_deref(), Some(r#"{"bins": [0, 1], "boundaries": [30]}"#));
        assert_eq!(
            shown("flush_latency_histogram").as_deref(),
            Some(r#"{"bins": [1, 0], "boundaries": [31]}"#)
        );
        assert_eq!(shown("wr_latency_histogram"), None);
        let timed = shown("timed_stats").expect("an interval");
        assert!(timed.contains("\"max_rd_latency_ns\": 0"), "{timed}");
        assert!(timed.contains("\"max_flush_latency_ns\": 30"), "{timed}");
        stats.set_histogram(0, None);
        assert!(told(&stats).get("rd_latency_histogram").is_none());
    }
}

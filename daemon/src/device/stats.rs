//! What guests did with the disk of a device: query-blockstats.

use std::time::Duration;

use underlay_exports::Operation;
use underlay_qmp::json::{Object, Value};
use underlay_sys::rt;

/// What was done in one way.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    bytes: u64,
    done: u64,
    failed: u64,
    time: Duration,
}

/// See the module.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    counts: [Count; 4],
    /// When a request ended last.
    last: Option<Duration>,
}

/// The ways in which there are, as they are called.
const WAYS: [(Operation, &str); 4] = [
    (Operation::Read, "rd"),
    (Operation::Write, "wr"),
    (Operation::Flush, "flush"),
    (Operation::Discard, "unmap"),
];

impl Stats {
    /// A request has ended.
    pub fn count(&mut self, operation: Operation, bytes: u64, took: Duration, went_well: bool) {
        self.last = Some(rt::now());
        let way = WAYS.iter().position(|(way, _)| *way == operation);
        let Some(count) = way.and_then(|way| self.counts.get_mut(way)) else { return };
        if went_well {
            count.done += 1;
            count.bytes = count.bytes.saturating_add(bytes);
        } else {
            count.failed += 1;
        }
        count.time = count.time.saturating_add(took);
    }

    /// Puts what was counted in place of the zeroes of a description that is there.
    pub fn describe(&self, object: &mut Object) {
        let int = |number: u64| Value::Int(i64::try_from(number).unwrap_or(i64::MAX));
        let nanos = |time: Duration| int(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        for ((_, name), count) in WAYS.iter().zip(&self.counts) {
            object.insert(&format!("{name}_operations"), int(count.done));
            object.insert(&format!("{name}_total_time_ns"), nanos(count.time));
            object.insert(&format!("failed_{name}_operations"), int(count.failed));
            if *name != "flush" {
                object.insert(&format!("{name}_bytes"), int(count.bytes));
            }
        }
        if let Some(last) = self.last {
            object.insert("idle_time_ns", nanos(rt::now().saturating_sub(last)));
        }
        object.insert("account_invalid", Value::Bool(true));
        object.insert("account_failed", Value::Bool(true));
    }
}

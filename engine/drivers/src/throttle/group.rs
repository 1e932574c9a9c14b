//! Disks that share limits.
//!
//! Each [`Member`] has its requests in a queue for each direction, and the heads of these queues stand in a queue of
//! the group. So members take turns, however many requests they have at once, and reads do not wait for a limit of
//! writes. The one in front pours its request into the buckets at once and then waits for its time: who comes first has
//! its place, whatever comes from the other direction.
//!
//! A member that is in a hurry (a change of the graph waits for its requests) waits for nothing; what it lets through
//! is poured in all the same, for the others and for later.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use underlay_sys::rt;

use super::bucket::{Bucket, ONE};
use super::limits::Limits;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Reads.
    Read,
    /// Writes, zeroes, discards.
    Write,
}

impl Direction {
    /// The rates that count it: in total, and its own.
    fn rates(self) -> [usize; 4] {
        match self {
            Self::Read => [0, 1, 3, 4],
            Self::Write => [0, 2, 3, 5],
        }
    }
}

/// Disks that share limits. See the module.
#[derive(Debug)]
pub struct Group {
    name: String,
    state: Mutex<State>,
    turns: [tokio::sync::Mutex<()>; 2],
    /// Other limits, or a member is in a hurry.
    changed: Notify,
}

#[derive(Debug)]
struct State {
    limits: Limits,
    buckets: [Bucket; 6],
    /// How often the limits were changed.
    version: u64,
}

/// A place in the buckets.
#[derive(Clone, Copy)]
struct Place {
    at: Duration,
    version: u64,
}

impl Group {
    /// With limits that make sense.
    pub fn new(name: &str, limits: Limits) -> Arc<Self> {
        let state = State { limits, buckets: Default::default(), version: 0 };
        let (turns, changed) = (Default::default(), Notify::new());
        Arc::new(Self { name: name.to_owned(), state: Mutex::new(state), turns, changed })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its limits.
    pub fn limits(&self) -> Limits {
        self.state().limits
    }

    /// Other limits from now on, also for requests that wait. The buckets are empty then.
    pub fn set_limits(&self, limits: Limits) {
        let mut state = self.state();
        let (buckets, version) = (Default::default(), state.version + 1);
        *state = State { limits, buckets, version };
        drop(state);
        self.changed.notify_waiters();
    }

    /// Pours a request in, and says when it may go on.
    fn take_place(&self, direction: Direction, bytes: u64) -> Place {
        let now = rt::now();
        let mut state = self.state();
        let State { limits, buckets, version } = &mut *state;
        let size = u128::from(limits.iops_size);
        let requests = match size {
            0 => ONE,
            size => (u128::from(bytes) * ONE / size).max(ONE),
        };
        let mut wait = Duration::ZERO;
        for index in direction.rates() {
            let (rate, bucket) = (&limits.rates[index], &mut buckets[index]);
            bucket.leak(rate, now);
            wait = wait.max(bucket.wait(rate));
            bucket.pour(rate, if index < 3 { u128::from(bytes) * ONE } else { requests });
        }
        Place { at: now.saturating_add(wait), version: *version }
    }
}

/// One disk of a group.
#[derive(Debug)]
pub struct Member {
    group: Arc<Group>,
    turns: [tokio::sync::Mutex<()>; 2],
    hurries: AtomicUsize,
}

impl Member {
    /// A new member.
    pub fn new(group: Arc<Group>) -> Self {
        Self { group, turns: Default::default(), hurries: AtomicUsize::new(0) }
    }

    /// Its group.
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Waits until a request of `bytes` may go on. To be awaited to its end.
    pub async fn pass(&self, direction: Direction, bytes: u64) {
        if self.group.state().limits.is_none() {
            return;
        }
        let queue = direction as usize;
        let _own = self.unless_in_a_hurry(self.turns[queue].lock()).await;
        let _shared = self.unless_in_a_hurry(self.group.turns[queue].lock()).await;
        let mut place = self.group.take_place(direction, bytes);
        loop {
            let changed = self.group.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            if self.group.state().version != place.version {
                place = self.group.take_place(direction, bytes);
            }
            if self.is_in_a_hurry() || rt::by(Some(place.at), changed).await.is_none() {
                return;
            }
        }
    }

    /// Whether requests are to wait for nothing. Counted: each `true` is taken back by a `false`.
    pub fn hurry(&self, on: bool) {
        match on {
            true => self.hurries.fetch_add(1, Ordering::SeqCst),
            false => self.hurries.fetch_sub(1, Ordering::SeqCst),
        };
        self.group.changed.notify_waiters();
    }

    fn is_in_a_hurry(&self) -> bool {
        self.hurries.load(Ordering::SeqCst) > 0
    }

    /// The output of `future`, which may be dropped midway; nothing when this member is in a hurry.
    async fn unless_in_a_hurry<F: Future>(&self, future: F) -> Option<F::Output> {
        let mut future = std::pin::pin!(future);
        loop {
            let changed = self.group.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            if self.is_in_a_hurry() {
                return None;
            }
            let output = std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
                std::task::Poll::Ready(output) => std::task::Poll::Ready(Some(output)),
                std::task::Poll::Pending => changed.as_mut().poll(cx).map(|()| None),
            });
            if let Some(output) = output.await {
                return Some(output);
            }
        }
    }
}

/// All groups, by their names.
#[derive(Debug, Default)]
pub struct Groups {
    groups: Mutex<BTreeMap<String, Arc<Group>>>,
}

impl Groups {
    fn groups(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Group>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The group with this name.
    pub fn get(&self, name: &str) -> Option<Arc<Group>> {
        self.groups().get(name).cloned()
    }

    /// All groups.
    pub fn all(&self) -> Vec<Arc<Group>> {
        self.groups().values().cloned().collect()
    }

    /// A new group; false when the name is taken.
    pub fn add(&self, group: Arc<Group>) -> bool {
        let mut groups = self.groups();
        let free = !groups.contains_key(group.name());
        if free {
            groups.insert(group.name().to_owned(), group);
        }
        free
    }

    /// The group goes from the list; disks that are in it stay in it.
    pub fn remove(&self, name: &str) -> Option<Arc<Group>> {
        self.groups().remove(name)
    }
}

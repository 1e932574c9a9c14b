//! Locks on byte ranges: work on overlapping ranges takes turns, other work runs in parallel.
//!
//! First come, first served: a lock waits for every earlier lock that it conflicts with, held or waiting, so
//! nobody starves. A task must not take a second lock of the same `RangeLock` while it holds one.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::units::ByteRange;

/// Whether others may be in the same range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// With other shared holders.
    Shared,
    /// Alone.
    Exclusive,
}

#[derive(Debug)]
struct Claim {
    id: u64,
    range: ByteRange,
    mode: Mode,
}

impl Claim {
    fn conflicts(&self, other: &Claim) -> bool {
        (self.mode == Mode::Exclusive || other.mode == Mode::Exclusive) && self.range.overlaps(other.range)
    }
}

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    held: Vec<Claim>,
    waiting: VecDeque<(Claim, oneshot::Sender<()>)>,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct RangeLock {
    state: Arc<Mutex<State>>,
}

impl RangeLock {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody before us is in `range`, then holds it until the guard goes.
    pub async fn lock(&self, range: ByteRange, mode: Mode) -> RangeGuard {
        let (id, wait) = {
            let mut state = self.state();
            let id = state.next_id;
            state.next_id += 1;
            let claim = Claim { id, range, mode };
            let free =
                state.held.iter().chain(state.waiting.iter().map(|(c, _)| c)).all(|c| !c.conflicts(&claim));
            if free {
                state.held.push(claim);
                (id, None)
            } else {
                let (sender, receiver) = oneshot::channel();
                state.waiting.push_back((claim, sender));
                (id, Some(receiver))
            }
        };
        let guard = RangeGuard { lock: self.clone(), id };
        if let Some(wait) = wait {
            wait.await.expect("a waiting claim is granted before it goes");
        }
        guard
    }

    /// Whether anybody holds or waits for a part of `range`.
    pub fn is_busy(&self, range: ByteRange) -> bool {
        let state = self.state();
        state.held.iter().chain(state.waiting.iter().map(|(c, _)| c)).any(|c| c.range.overlaps(range))
    }

    fn release(&self, id: u64) {
        let mut state = self.state();
        let state = &mut *state;
        state.held.retain(|claim| claim.id != id);
        state.waiting.retain(|(claim, _)| claim.id != id);
        let mut at = 0;
        while at < state.waiting.len() {
            let claim = &state.waiting[at].0;
            let before = state.waiting.iter().take(at).map(|(c, _)| c);
            if state.held.iter().chain(before).any(|c| c.conflicts(claim)) {
                at += 1;
                continue;
            }
            let Some((claim, sender)) = state.waiting.remove(at) else { break };
            state.held.push(claim);
            let _ = sender.send(());
        }
    }
}

/// Holds a range; see [`RangeLock::lock`].
#[derive(Debug)]
#[must_use = "the range is free again when this is dropped"]
pub struct RangeGuard {
    lock: RangeLock,
    id: u64,
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        self.lock.release(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn overlapping_ranges_take_turns_in_order() {
        let lock = RangeLock::default();
        let range = |a, b| ByteRange::between(a, b);
        let mut first = pin!(lock.lock(range(0, 10), Mode::Shared));
        let Poll::Ready(first) = poll(first.as_mut()) else { panic!("free") };
        let mut writer = pin!(lock.lock(range(5, 15), Mode::Exclusive));
        assert!(poll(writer.as_mut()).is_pending());
        let mut late = pin!(lock.lock(range(8, 9), Mode::Shared));
        assert!(poll(late.as_mut()).is_pending(), "may not overtake the writer");
        let mut elsewhere = pin!(lock.lock(range(20, 30), Mode::Exclusive));
        assert!(poll(elsewhere.as_mut()).is_ready());
        drop(first);
        let Poll::Ready(writer) = poll(writer.as_mut()) else { panic!("its turn") };
        assert!(poll(late.as_mut()).is_pending());
        drop(writer);
        assert!(poll(late.as_mut()).is_ready());
        assert!(!lock.is_busy(range(0, 100)));
    }
}

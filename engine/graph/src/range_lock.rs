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
    /// Until it is held: how many earlier claims it still conflicts with, and whom to tell when there is none.
    waits: Option<(usize, oneshot::Sender<()>)>,
}

impl Claim {
    fn conflicts(&self, range: ByteRange, mode: Mode) -> bool {
        (self.mode == Mode::Exclusive || mode == Mode::Exclusive) && self.range.overlaps(range)
    }
}

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    /// In the order in which they came.
    claims: VecDeque<Claim>,
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
            let before = state.claims.iter().filter(|claim| claim.conflicts(range, mode)).count();
            let (waits, wait) = match before {
                0 => (None, None),
                _ => {
                    let (sender, receiver) = oneshot::channel();
                    (Some((before, sender)), Some(receiver))
                }
            };
            state.claims.push_back(Claim { id, range, mode, waits });
            (id, wait)
        };
        let guard = RangeGuard { lock: self.clone(), id };
        if let Some(wait) = wait {
            wait.await.expect("a waiting claim is granted before it goes");
        }
        guard
    }

    /// Whether anybody holds or waits for a part of `range`.
    pub fn is_busy(&self, range: ByteRange) -> bool {
        self.state().claims.iter().any(|claim| claim.range.overlaps(range))
    }

    /// A client can have thousands of claims wait: those behind this one only count it off.
    fn release(&self, id: u64) {
        let mut state = self.state();
        let Ok(index) = state.claims.binary_search_by_key(&id, |claim| claim.id) else { return };
        let Some(gone) = state.claims.remove(index) else { return };
        for claim in state.claims.range_mut(index..) {
            if !claim.conflicts(gone.range, gone.mode) {
                continue;
            }
            let Some((before, sender)) = claim.waits.take() else { continue };
            if before > 1 {
                claim.waits = Some((before - 1, sender));
            } else {
                let _ = sender.send(());
            }
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

    /// Each conflicts with its neighbours only, and every third one gives up before its turn comes. Who goes through
    /// all pairs for each of them does not come to an end.
    #[test]
    fn a_long_staircase_is_gone_down_step_by_step() {
        const STEPS: u64 = 5000;
        let lock = RangeLock::default();
        let step = |n| lock.lock(ByteRange::between(10 * n, 10 * n + 11), Mode::Exclusive);
        let mut waiting: Vec<_> = (0..STEPS).map(|n| Box::pin(step(n))).collect();
        let asked: Vec<_> = waiting.iter_mut().map(|one| poll(one.as_mut())).collect();
        assert_eq!(asked.iter().filter(|one| one.is_ready()).count(), 1);
        drop(asked);
        for (n, mut one) in waiting.into_iter().enumerate().skip(1) {
            assert!(n % 3 == 0 || poll(one.as_mut()).is_ready(), "{n}");
        }
        assert!(!lock.is_busy(ByteRange::between(0, u64::MAX)));
    }

    /// What is held never conflicts, and who waits conflicts with somebody who came before.
    #[test]
    fn it_agrees_with_a_simple_model() {
        let mut seed = 1_u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        let lock = RangeLock::default();
        let mut all: Vec<(ByteRange, Mode, std::pin::Pin<Box<_>>, Option<RangeGuard>)> = Vec::new();
        for _ in 0..5000 {
            if random(2) == 0 || all.is_empty() {
                let start = random(64);
                let range = ByteRange::between(start, start + 1 + random(8));
                let mode = if random(2) == 0 { Mode::Shared } else { Mode::Exclusive };
                all.push((range, mode, Box::pin(lock.lock(range, mode)), None));
            } else {
                let one = usize::try_from(random(all.len() as u64)).unwrap();
                drop(all.remove(one));
            }
            for index in 0..all.len() {
                let (before, here) = all.split_at_mut(index);
                let (range, mode, future, guard) = &mut here[0];
                let conflict = |other: &(ByteRange, Mode, _, _)| {
                    (other.1 == Mode::Exclusive || *mode == Mode::Exclusive) && other.0.overlaps(*range)
                };
                let is_free = !before.iter().any(conflict);
                if guard.is_none()
                    && let Poll::Ready(granted) = poll(future.as_mut())
                {
                    *guard = Some(granted);
                }
                assert_eq!(guard.is_some(), is_free);
            }
        }
    }
}

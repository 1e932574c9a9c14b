//! A mark in a node: who has set it is told of the first write that goes beyond, and of no other.
//!
//! Writes to a node without one look at a number and go on.

use std::fmt::{self, Debug, Formatter};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Told how many bytes beyond the mark a write goes that is about to begin. Must not wait for anything.
pub type Crossed = Box<dyn FnOnce(u64) + Send>;

/// See the module.
#[derive(Default)]
pub(crate) struct Threshold {
    /// In bytes; 0: none.
    at: AtomicU64,
    crossed: Mutex<Option<Crossed>>,
}

impl Debug for Threshold {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Threshold").field(&self.at).finish()
    }
}

impl Threshold {
    /// In place of the one before; at 0: none any more.
    pub(crate) fn set(&self, at: u64, crossed: Crossed) {
        let mut place = self.crossed.lock().unwrap_or_else(PoisonError::into_inner);
        *place = (at != 0).then_some(crossed);
        self.at.store(at, Ordering::Relaxed);
    }

    /// Where it is; 0: nowhere.
    pub(crate) fn at(&self) -> u64 {
        self.at.load(Ordering::Relaxed)
    }

    /// Something is about to be written, up to `end`.
    pub(crate) fn writes_to(&self, end: u64) {
        let at = self.at();
        if at != 0 && end > at {
            self.cross(end);
        }
    }

    #[cold]
    fn cross(&self, end: u64) {
        let (exceeded, crossed) = {
            let mut crossed = self.crossed.lock().unwrap_or_else(PoisonError::into_inner);
            // Somebody may have been faster, or have moved it.
            let exceeded = end.saturating_sub(self.at());
            if exceeded == 0 {
                return;
            }
            self.at.store(0, Ordering::Relaxed);
            (exceeded, crossed.take())
        };
        if let Some(crossed) = crossed {
            crossed(exceeded);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn tells_once() {
        let threshold = Arc::new(Threshold::default());
        let told = Arc::<Mutex<Vec<u64>>>::default();
        let set = |at| {
            let told = told.clone();
            threshold.set(at, Box::new(move |exceeded| told.lock().unwrap().push(exceeded)));
        };
        threshold.writes_to(u64::MAX);
        set(4096);
        threshold.writes_to(4096);
        assert_eq!(threshold.at(), 4096);
        threshold.writes_to(4097);
        threshold.writes_to(4098);
        assert_eq!((threshold.at(), &*told.lock().unwrap()), (0, &vec![1]));
        set(10);
        set(0);
        threshold.writes_to(20);
        set(u64::MAX);
        threshold.writes_to(u64::MAX);
        set(10);
        set(20);
        thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(|| threshold.writes_to(25)))));
        assert_eq!(*told.lock().unwrap(), [1, 5]);
    }
}

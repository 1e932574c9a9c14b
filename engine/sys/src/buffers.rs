//! Buffers that are used again, so that copying does not fault fresh memory in for every piece.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Iov;

/// Most buffers that are kept while nobody uses them.
const KEPT: usize = 16;

/// See the module.
#[derive(Debug, Default)]
pub struct Buffers {
    free: Mutex<Vec<Iov>>,
}

impl Buffers {
    fn free(&self) -> MutexGuard<'_, Vec<Iov>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of at least `len` bytes with any content; give it back with [`Buffers::put`].
    pub fn take(&self, len: usize) -> Iov {
        let mut free = self.free();
        match free.iter().position(|buffer| buffer.len() >= len) {
            Some(at) => free.swap_remove(at),
            None => Iov::scratch(len),
        }
    }

    /// The buffer, as it was taken, is not in use any more.
    pub fn put(&self, buffer: Iov) {
        let mut free = self.free();
        if free.len() < KEPT {
            free.push(buffer);
        }
    }
}

//! Slices of tables in memory: a bounded cache with a fast, synchronous way in.
//!
//! A table (L2 table or refcount block) is loaded and written in slices of at most a few KiB, so that a small cache
//! serves a large disk. Slices live in shards, each behind its own read-write lock that is held for a few
//! instructions only, never across I/O. What is in the cache is the truth; the disk lags behind:
//!
//! * a *dirty* slice differs from the disk; a commit takes a copy of it, which makes it *pinned* until the copy
//!   has been written; a slice that is neither may be evicted (clock order) to make room for another;
//! * when writing fails the slice is dirty again.
//!
//! So what is evicted is always on disk, and a slice that is loaded is never older than what was in memory before.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use crate::words::Words;

/// Spreads small integers; the keys are our own numbers, not an attacker's choice of strings.
#[derive(Debug, Default)]
pub struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }
    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0.rotate_left(5) ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }
}

/// A map from numbers.
pub type NumberMap<T> = HashMap<u64, T, BuildHasherDefault<NumberHasher>>;

#[derive(Debug)]
struct Cached {
    words: Words,
    dirty: bool,
    /// Copies that are being written.
    pins: u32,
    /// Looked at since the clock's hand came by.
    used: AtomicBool,
}

#[derive(Debug, Default)]
struct Shard {
    slices: NumberMap<Cached>,
    /// Keys of all slices, and of some that are gone, in clock order.
    ring: Vec<u64>,
    hand: usize,
    dirty: Vec<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct SliceCache {
    shards: Arc<[RwLock<Shard>]>,
    /// Most slices in a shard, unless more are dirty.
    per_shard: AtomicUsize,
    dirty: AtomicUsize,
}

/// The slices of a cache, as long as it lives.
#[derive(Debug)]
pub struct Slices {
    shards: Weak<[RwLock<Shard>]>,
}

impl Slices {
    /// Drops those that nobody has used since the last time, but for those that are not on disk.
    pub fn drop_unused(&self) {
        let Some(shards) = self.shards.upgrade() else { return };
        for shard in &*shards {
            shard.write().unwrap_or_else(PoisonError::into_inner).drop_unused();
        }
    }
}

/// A copy of a dirty slice: its number and its words.
pub type Copy = (u64, Words);

impl SliceCache {
    /// A cache of at most `slices` slices (at least one).
    pub fn new(slices: usize) -> Self {
        let slices = slices.max(1);
        let shards = (slices / 8).clamp(1, 64).next_power_of_two();
        let shards = if shards > slices { 1 } else { shards };
        Self {
            shards: (0..shards).map(|_| RwLock::default()).collect(),
            per_shard: AtomicUsize::new((slices / shards).max(1)),
            dirty: AtomicUsize::new(0),
        }
    }

    /// Most slices that it holds while they are clean.
    pub fn capacity(&self) -> usize {
        self.per_shard.load(Ordering::Relaxed) * self.shards.len()
    }

    /// Holds at most so many from now on, but for a few in each shard. What is too much goes as others come.
    pub fn set_capacity(&self, slices: usize) {
        self.per_shard.store((slices / self.shards.len()).max(1), Ordering::Relaxed);
    }

    /// How many slices are in memory.
    #[cfg(test)]
    pub fn held(&self) -> usize {
        let held = |shard: &RwLock<Shard>| shard.read().unwrap_or_else(PoisonError::into_inner).slices.len();
        self.shards.iter().map(held).sum()
    }

    /// The slices, for who looks after them without keeping them.
    pub fn slices(&self) -> Slices {
        Slices { shards: Arc::downgrade(&self.shards) }
    }

    /// How many slices wait to be written.
    pub fn dirty_count(&self) -> usize {
        self.dirty.load(Ordering::Relaxed)
    }

    fn shard(&self, slice: u64) -> &RwLock<Shard> {
        let mask = self.shards.len() as u64 - 1;
        &self.shards[usize::try_from(slice & mask).unwrap_or(0)]
    }

    fn read(&self, slice: u64) -> RwLockReadGuard<'_, Shard> {
        self.shard(slice).read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, slice: u64) -> RwLockWriteGuard<'_, Shard> {
        self.shard(slice).write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a slice is there and nothing but zeroes that were never changed.
    pub fn is_blank(&self, slice: u64) -> bool {
        self.read(slice).slices.get(&slice).is_some_and(|cached| matches!(cached.words, Words::Zeroes(_)))
    }

    /// Looks at a slice, if it is there.
    pub fn view<R>(&self, slice: u64, look: impl FnOnce(&[u64]) -> R) -> Option<R> {
        let shard = self.read(slice);
        let cached = shard.slices.get(&slice)?;
        if !cached.used.load(Ordering::Relaxed) {
            cached.used.store(true, Ordering::Relaxed);
        }
        Some(look(&cached.words))
    }

    /// Changes a slice, if it is there; it is dirty from now on.
    pub fn update<R>(&self, slice: u64, change: impl FnOnce(&mut [u64]) -> R) -> Option<R> {
        let mut shard = self.write(slice);
        let shard = &mut *shard;
        let cached = shard.slices.get_mut(&slice)?;
        cached.used.store(true, Ordering::Relaxed);
        if !cached.dirty {
            cached.dirty = true;
            shard.dirty.push(slice);
            self.dirty.fetch_add(1, Ordering::Relaxed);
        }
        Some(change(&mut cached.words))
    }

    /// Puts a slice in that was loaded, unless it is there already.
    pub fn insert(&self, slice: u64, words: Words) {
        let mut shard = self.write(slice);
        if shard.slices.contains_key(&slice) {
            return;
        }
        let most = self.per_shard.load(Ordering::Relaxed);
        while shard.slices.len() >= most && shard.evict() {}
        shard.slices.insert(slice, Cached { words, dirty: false, pins: 0, used: AtomicBool::new(true) });
        shard.ring.push(slice);
    }

    /// Copies of all dirty slices. Each must be settled when it has been written, or could not be.
    pub fn take_dirty(&self) -> Vec<Copy> {
        let mut copies = Vec::new();
        for shard in &*self.shards {
            let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
            let shard = &mut *shard;
            for slice in shard.dirty.drain(..) {
                if let Some(cached) = shard.slices.get_mut(&slice) {
                    cached.dirty = false;
                    cached.pins += 1;
                    self.dirty.fetch_sub(1, Ordering::Relaxed);
                    copies.push((slice, cached.words.clone()));
                }
            }
        }
        copies.sort_unstable_by_key(|(slice, _)| *slice);
        copies
    }

    /// The copy of a slice has been `written`, or else the slice is dirty again.
    pub fn settle(&self, slice: u64, written: bool) {
        if !written {
            self.update(slice, |_| ());
        }
        if let Some(cached) = self.write(slice).slices.get_mut(&slice) {
            cached.pins -= 1;
        }
    }

    /// Forgets everything. Only for callers who know that nothing in here is needed.
    pub fn clear(&self) {
        for shard in &*self.shards {
            *shard.write().unwrap_or_else(PoisonError::into_inner) = Shard::default();
        }
        self.dirty.store(0, Ordering::Relaxed);
    }
}

impl Shard {
    fn drop_unused(&mut self) {
        let before = self.slices.len();
        self.slices.retain(|_, cached| {
            cached.dirty || cached.pins > 0 || cached.used.swap(false, Ordering::Relaxed)
        });
        if self.slices.len() < before {
            self.ring.retain(|slice| self.slices.contains_key(slice));
            self.ring.shrink_to_fit();
            self.slices.shrink_to_fit();
        }
    }

    /// Evicts one slice. False when all are needed.
    fn evict(&mut self) -> bool {
        // Two rounds: the first may only clear marks.
        for _ in 0..self.ring.len() * 2 {
            if self.ring.is_empty() {
                return false;
            }
            self.hand %= self.ring.len();
            let key = self.ring[self.hand];
            match self.slices.get(&key) {
                None => {
                    self.ring.swap_remove(self.hand);
                }
                Some(cached) if cached.dirty || cached.pins > 0 => self.hand += 1,
                Some(cached) if cached.used.swap(false, Ordering::Relaxed) => self.hand += 1,
                Some(_) => {
                    self.slices.remove(&key);
                    self.ring.swap_remove(self.hand);
                    return true;
                }
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(word: u64) -> Words {
        Words::Stored(vec![word].into())
    }

    #[test]
    fn a_cache_can_be_made_smaller_and_larger() {
        let cache = SliceCache::new(64);
        let fill = |from: u64| (from..from + 256).for_each(|slice| cache.insert(slice, words(slice)));
        fill(0);
        assert_eq!(cache.held(), 64);
        cache.update(255, |words| words[0] = 7);
        cache.set_capacity(16);
        fill(256);
        assert!(cache.held() <= 17, "what has to be written stays: {}", cache.held());
        assert_eq!(cache.view(255, |words| words[0]), Some(7));
        cache.set_capacity(128);
        fill(512);
        assert_eq!(cache.capacity(), 128);
        assert!(cache.held() > 100);
    }

    #[test]
    fn dirty_and_pinned_slices_stay_and_others_make_room() {
        let cache = SliceCache::new(4);
        assert_eq!(cache.capacity(), 4);
        for slice in 0..4 {
            cache.insert(slice, words(slice));
        }
        cache.update(1, |words| words[0] = 100);
        for slice in 10..30 {
            cache.insert(slice, words(slice));
        }
        assert_eq!(cache.view(1, |words| words[0]), Some(100));
        let copies = cache.take_dirty();
        assert_eq!(copies.iter().map(|(slice, words)| (*slice, words[0])).collect::<Vec<_>>(), [(1, 100)]);
        for slice in 30..50 {
            cache.insert(slice, words(slice));
        }
        assert!(cache.view(1, |_| ()).is_some(), "pinned until written");
        cache.settle(1, false);
        assert_eq!(cache.dirty_count(), 1, "dirty again after a failure");
        cache.take_dirty();
        cache.settle(1, true);
        for slice in 50..80 {
            cache.insert(slice, words(slice));
        }
        assert!(cache.view(1, |_| ()).is_none());
        let held = (0..100).filter(|&slice| cache.view(slice, |_| ()).is_some()).count();
        assert_eq!(held, 4);
    }

    #[test]
    fn unused_slices_go_at_the_second_look() {
        let cache = SliceCache::new(100);
        (0..50).for_each(|slice| cache.insert(slice, words(slice)));
        cache.update(7, |words| words[0] = 70);
        cache.update(8, |words| words[0] = 80);
        assert_eq!(cache.take_dirty().len(), 2);
        cache.update(8, |words| words[0] = 81);
        cache.slices().drop_unused();
        assert_eq!(cache.held(), 50, "all were used when they came");
        assert_eq!(cache.view(20, |words| words[0]), Some(20));
        cache.slices().drop_unused();
        let held: Vec<_> = (0..50).filter(|&slice| cache.view(slice, |_| ()).is_some()).collect();
        assert_eq!(held, [7, 8, 20], "pinned, dirty and used");
        cache.settle(7, true);
        cache.settle(8, true);
        (0..2).for_each(|_| cache.slices().drop_unused());
        assert_eq!(cache.held(), 1);
        assert_eq!(
            cache.take_dirty().iter().map(|(slice, words)| (*slice, words[0])).collect::<Vec<_>>(),
            [(8, 81)]
        );
        // There is room for as many as before.
        (100..200).for_each(|slice| cache.insert(slice, words(slice)));
        assert_eq!(cache.held(), cache.capacity());
        let slices = cache.slices();
        drop(cache);
        slices.drop_unused();
    }
}

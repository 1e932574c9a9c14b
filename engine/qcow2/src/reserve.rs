//! Places for data that is on its way, so that pieces of a disk that are written side by side lie in order all the
//! same.
//!
//! Who copies a disk with several hands reserves the places of each piece in turn, which is quick, and then writes the
//! pieces at the same time, which is not. A write finds the place that was reserved for it if it begins and ends where
//! the reservation does; any other write takes a new one. What was reserved and not used is given back on closing; a
//! crash before that leaks it, as it leaks any cluster that was allocated and not yet linked.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use underlay_graph::range_lock::Mode;
use underlay_graph::{ByteRange, Cx, Result};

use crate::cow::{How, first_part};
use crate::live::Qcow2;
use crate::refcount::Allocated;

/// Reserved runs of clusters by the guest offset of their first byte, with their number.
#[derive(Debug, Default)]
pub(crate) struct Reserved {
    /// Nearly always false, and then nobody takes the lock.
    any: AtomicBool,
    runs: Mutex<BTreeMap<u64, (Allocated, u64)>>,
}

impl Reserved {
    fn runs(&self) -> MutexGuard<'_, BTreeMap<u64, (Allocated, u64)>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The place reserved for `count` clusters from the guest offset `start` on. It is the caller's from now on.
    pub(crate) fn take(&self, start: u64, count: u64) -> Option<Allocated> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let mut runs = self.runs();
        runs.get(&start).filter(|(_, reserved)| *reserved == count)?;
        runs.remove(&start).map(|(place, _)| place)
    }

    fn put(&self, start: u64, place: Allocated, count: u64) {
        self.any.store(true, Ordering::Release);
        self.runs().insert(start, (place, count));
    }

    fn has(&self, start: u64) -> bool {
        self.runs().contains_key(&start)
    }
}

impl Qcow2 {
    /// Gives all clusters of `range` that have no place yet one, in order, for a write of just this range that follows.
    pub async fn reserve_places(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        self.begin_change(cx).await?;
        let _turn = self.ranges.lock(range.align_out(self.layout.cluster()), Mode::Exclusive).await;
        let mut rest = range;
        while !rest.is_empty() {
            let (here, later) = rest.split(self.in_slice(rest).len());
            self.reserve_in_slice(cx, here).await?;
            rest = later;
        }
        Ok(())
    }

    /// As [`Qcow2::write_held`] will go through the same range.
    async fn reserve_in_slice(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        self.ensure_table(cx, range.start()).await?;
        let mut rest = range;
        while !rest.is_empty() {
            let entries = self.entries(cx, rest).await?;
            let (how, part) = first_part(&self.layout, &entries, rest);
            let outer = part.align_out(self.layout.cluster());
            if how == How::New && !self.reserved.has(outer.start()) {
                let count = outer.len() >> self.layout.cluster_bits;
                let place = self.alloc_clusters(cx, count).await?;
                self.reserved.put(outer.start(), place, count);
            }
            rest = rest.split(part.len()).1;
        }
        Ok(())
    }

    /// Frees what was reserved and not used.
    pub(crate) async fn give_back_reserved(&self, cx: &Cx<'_>) {
        let runs = std::mem::take(&mut *self.reserved.runs());
        for (place, count) in runs.into_values() {
            self.free_unused(cx, place.host, count).await;
        }
    }
}

//! Reads through a deep chain at the price of two layers: which layer is the first that has anything in a region.
//!
//! Without this, a read of what only the base has asks every layer on the way down. A [`Chain`] remembers, for
//! regions of 64 KiB, that the layers above the remembered one have nothing there:
//!
//! ```text
//!   top ──┐            always asked: guests write to it
//!    1    │ nothing
//!    2    │ nothing    skipped
//!    …    │ nothing
//!   31 ◄──┘            asked, and if it has nothing for these bytes the walk goes on from here
//! ```
//!
//! What is remembered is true as long as nobody writes to a layer below the top. So a chain is told of every such
//! write, before the write is acknowledged ([`Blocks::wrote_to`]), and then never used again; the next change of the
//! wiring brings new views, and with them a new chain. Which request sees what is as it was without: whoever reads
//! after a write was acknowledged finds the chain gone.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use zerocopy::FromZeros;

use crate::format::Place;
use crate::plan::NodeId;
use crate::units::ByteRange;
use crate::view::{Cx, View};

/// Bytes of the disk that share an entry.
const REGION: u64 = 64 << 10;
/// Fewest layers below the top for which remembering is worth its memory.
const WORTHWHILE: usize = 2;
/// Most entries: 512 KiB, enough for all of a disk of 4 GiB and for the busy part of larger ones.
const MOST_ENTRIES: u64 = 64 << 10;

/// What is known about the layers below a node. See the module.
#[derive(Debug)]
pub(crate) struct Chain {
    /// The layers below the top, nearest first; the last is the one that has no backing node or hides it.
    layers: Vec<Arc<View>>,
    /// The start of a region, and in its low bits how many layers have nothing there; 0 is nothing known. A region has
    /// one possible place, by its number.
    entries: Box<[AtomicU64]>,
    alive: Arc<AtomicBool>,
}

/// The chains that rely on a node's not being written to.
#[derive(Debug, Default)]
pub(crate) struct Reliers {
    any: AtomicBool,
    chains: Mutex<Vec<Weak<AtomicBool>>>,
}

impl Reliers {
    fn add(&self, chain: &Arc<AtomicBool>) {
        let mut chains = self.chains.lock().unwrap_or_else(PoisonError::into_inner);
        chains.retain(|chain| chain.strong_count() > 0);
        chains.push(Arc::downgrade(chain));
        self.any.store(true, Ordering::SeqCst);
    }

    /// The node was written to. Nearly always nobody relies on it, and this is one look.
    pub(crate) fn end(&self) {
        if !self.any.load(Ordering::SeqCst) {
            return;
        }
        let mut chains = self.chains.lock().unwrap_or_else(PoisonError::into_inner);
        for chain in chains.drain(..).filter_map(|chain| chain.upgrade()) {
            chain.store(false, Ordering::SeqCst);
        }
        self.any.store(false, Ordering::SeqCst);
    }
}

impl Chain {
    /// The chain below `top`, if it is deep enough to be worth it.
    pub(crate) fn below(top: &View) -> Option<Self> {
        // Views outside a plan do not hear of each other's writes.
        if top.id == NodeId::DETACHED {
            return None;
        }
        let mut layers = Vec::new();
        let mut at = top;
        while let Some(next) = at.backing_of_format() {
            layers.push(next.clone());
            at = next;
        }
        // An entry's low bits hold the number of layers to skip.
        if layers.len() < WORTHWHILE || layers.len() as u64 >= REGION {
            return None;
        }
        let regions = top.cx().length().div_ceil(REGION).clamp(1, MOST_ENTRIES).next_power_of_two();
        let entries = <[AtomicU64]>::new_box_zeroed_with_elems(usize::try_from(regions).ok()?).ok()?;
        let alive = Arc::new(AtomicBool::new(true));
        for layer in &layers {
            layer.blocks.reliers.add(&alive);
        }
        Some(Self { layers, entries, alive })
    }

    /// The layer to ask next for the first bytes of `range`, of which the top has nothing, and for how many bytes that
    /// holds. `None` when it is not known: the layers are then asked one by one.
    pub(crate) fn first_with(&self, range: ByteRange) -> Option<(Cx<'_>, u64)> {
        let mut skip = None;
        let mut at = range.start();
        while at < range.end() {
            let start = at - at % REGION;
            let Some(here) = self.skip(start).or_else(|| self.learn(start)) else { break };
            if *skip.get_or_insert(here) != here {
                break;
            }
            at = start.saturating_add(REGION);
        }
        // After the entries were read: what was written before this moment has ended the chain already.
        if !self.alive.load(Ordering::SeqCst) {
            return None;
        }
        Some((self.layers.get(skip?)?.cx(), at.min(range.end()) - range.start()))
    }

    fn entry(&self, start: u64) -> Option<&AtomicU64> {
        let mask = self.entries.len() as u64 - 1;
        self.entries.get(usize::try_from((start / REGION) & mask).ok()?)
    }

    /// How many layers have nothing in the region, if that is remembered.
    fn skip(&self, start: u64) -> Option<usize> {
        let entry = self.entry(start)?.load(Ordering::Relaxed);
        let known = entry != 0 && entry - entry % REGION == start;
        known.then(|| usize::try_from(entry % REGION - 1).ok()).flatten()
    }

    /// Asks the layers, as far as they can answer without waiting.
    fn learn(&self, start: u64) -> Option<usize> {
        let region = ByteRange::new(start, REGION)?;
        let mut skip = 0;
        while let Some(layer) = self.layers.get(skip) {
            let cx = layer.cx();
            let Some(format) = cx.node().as_format().filter(|_| cx.backing().is_some()) else { break };
            if region.end() > cx.length() {
                break;
            }
            let extent = format.map_cached(region)?;
            if extent.place != Place::Below || extent.len < region.len() {
                break;
            }
            skip += 1;
        }
        self.entry(start)?.store(start | (skip as u64 + 1), Ordering::Relaxed);
        Some(skip)
    }
}

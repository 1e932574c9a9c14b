//! Clusters that lost a reference, on their way to being free.
//!
//! Nothing may be written into a dropped cluster while the disk still refers to it, or while a read or an in-place
//! write that looked the cluster up before is on its way. So a drop goes through two stations:
//!
//! 1. *pending*: the mapping in memory does not have it any more, the disk may;
//! 2. *quarantine*: a commit has made the drop durable. That commit also started a new epoch: whoever looks something
//!    up holds a lease on the epoch of that moment, so when all leases of the epochs up to this one are gone nobody can
//!    still use the old answer.
//!
//! Then the refcounts go down in memory (and reach the disk with the next commit), and the clusters can be given out
//! again. After a power cut what was on its way is a leak, never an error.

use std::collections::VecDeque;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use underlay_graph::{ByteRange, Cx, Result};
use underlay_sys::rt;

use crate::entry::{COMPRESSED, Entry};
use crate::live::Qcow2;

/// Whether the file may give the space of clusters back that are free then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// The guest does not need them any more: as `pass-discard-request` says.
    Request,
    /// They were replaced or moved: as `pass-discard-other` says.
    Other,
    /// Never: they hold compressed clusters, and others lie there too, or may come there at any time.
    Never,
}

/// A run of clusters that each lose one reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Free {
    /// Number of the first cluster.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// What becomes of their space.
    pub discard: Discard,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Frees {
    pending: Vec<Free>,
    pending_clusters: u64,
    quarantine: VecDeque<(watch::Receiver<()>, Vec<Free>)>,
}

/// Who holds it holds a lease. Nothing is ever sent: what matters is that the sender is there.
pub(crate) type Epoch = Arc<watch::Sender<()>>;

/// How long an image that nobody writes to any more waits, up to three times, for those who read what it has dropped.
const PATIENCE: Duration = Duration::from_secs(1);

impl Frees {
    fn drop_later(&mut self, free: Free) {
        self.pending_clusters += free.count;
        match self.pending.last_mut() {
            Some(last) if last.first + last.count == free.first && last.discard == free.discard => {
                last.count += free.count;
            }
            _ => self.pending.push(free),
        }
    }

    /// Drops whose change of the mapping has already happened in memory.
    pub(crate) fn take_pending(&mut self) -> Vec<Free> {
        self.pending_clusters = 0;
        std::mem::take(&mut self.pending)
    }

    /// The commit that took these failed.
    pub(crate) fn put_back(&mut self, frees: Vec<Free>) {
        frees.into_iter().for_each(|free| self.drop_later(free));
    }

    /// A batch that nobody can use any more.
    fn take_ready(&mut self) -> Option<Vec<Free>> {
        let (epoch, _) = self.quarantine.front()?;
        let is_over = epoch.has_changed().is_err();
        self.quarantine.pop_front_if(|_| is_over).map(|(_, frees)| frees)
    }

    /// Whether anything is on its way.
    pub(crate) fn is_empty(&self) -> bool {
        self.pending.is_empty() && self.quarantine.is_empty()
    }
}

impl Qcow2 {
    pub(crate) fn frees(&self) -> MutexGuard<'_, Frees> {
        self.frees.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A lease on everything that the mapping answers from now on.
    pub(crate) fn hold(&self) -> Epoch {
        self.epoch.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// `count` clusters from `host` on lost a reference, because the guest does not need them (`is_request`) or for
    /// another reason. The mapping in memory must not have it any more.
    pub(crate) fn drop_clusters(&self, host: u64, count: u64, is_request: bool) {
        let first = host >> self.layout.cluster_bits;
        let discard = if is_request { Discard::Request } else { Discard::Other };
        self.frees().drop_later(Free { first, count, discard });
    }

    /// An entry is not in the mapping any more: what it referred to loses a reference. For `is_request` see
    /// [`Qcow2::drop_clusters`].
    pub(crate) fn drop_entry(&self, entry: Entry, is_request: bool) {
        let (first, count) = self.layout.clusters_of(entry);
        if entry.word & COMPRESSED != 0 {
            self.frees().drop_later(Free { first, count, discard: Discard::Never });
        } else if count != 0 {
            self.drop_clusters(first << self.layout.cluster_bits, count, is_request);
        }
    }

    /// How many clusters wait for a commit.
    pub(crate) fn pending_clusters(&self) -> u64 {
        self.frees().pending_clusters
    }

    /// A commit has made these drops durable.
    pub(crate) fn quarantine(&self, frees: Vec<Free>) {
        if frees.is_empty() {
            return;
        }
        let mut epoch = self.epoch.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::take(&mut *epoch);
        self.frees().quarantine.push_back((old.subscribe(), frees));
    }

    /// Waits until nobody can use any more what is in quarantine, but not for ever: who reads may wait for a server
    /// that does not answer. What is left then leaks, unless the image is written to again.
    pub(crate) async fn until_reclaimable(&self) {
        let mut epochs: Vec<_> = self.frees().quarantine.iter().map(|(epoch, _)| epoch.clone()).collect();
        epochs.retain(|epoch| epoch.has_changed().is_ok());
        if epochs.is_empty() {
            return;
        }
        let over = async {
            for mut epoch in epochs {
                // An error says that the epoch is over.
                let _ = epoch.changed().await;
            }
        };
        rt::by(Some(rt::now() + PATIENCE), over).await;
    }

    /// Gives free what nobody can use any more.
    pub(crate) async fn reclaim(&self, cx: &Cx<'_>) {
        loop {
            let Some(batch) = self.frees().take_ready() else { return };
            for free in batch {
                let passed_on = match free.discard {
                    Discard::Request => self.options().pass_discard_request != Some(false),
                    Discard::Other => self.options().pass_discard_other,
                    Discard::Never => false,
                };
                if passed_on && let Err(error) = self.discard_unshared(cx, free).await {
                    tracing::debug!(%error, "the file kept discarded clusters");
                }
                if let Err(error) = self.lower(cx, free.first, free.count).await {
                    tracing::warn!(%error, first = free.first, count = free.count, "clusters leaked");
                }
            }
        }
    }

    /// Tells the file that nobody needs clusters, which are about to lose a reference, unless it is not their last one
    /// (snapshots have them too) or, in a damaged image, they are metadata.
    async fn discard_unshared(&self, cx: &Cx<'_>, free: Free) -> Result<()> {
        let bits = self.layout.cluster_bits;
        let discard = async |first: u64, end: u64| match first < end {
            true => cx.below().discard(ByteRange::between(first << bits, end << bits)).await,
            false => Ok(()),
        };
        let (mut first, end) = (free.first, free.first + free.count);
        if self.metadata().owner(first, end).is_some() {
            return Ok(());
        }
        for cluster in free.first..end {
            if self.refcount(cx, cluster).await? > 1 {
                discard(first, cluster).await?;
                first = cluster + 1;
            }
        }
        discard(first, end).await
    }
}

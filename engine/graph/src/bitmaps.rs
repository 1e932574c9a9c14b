//! Named dirty bitmaps of nodes, as part of the plan. Source: `design/qemu-surface.md` 7.
//!
//! A command edits the draft: nothing that a bitmap says is changed by that, so that to undo it is to drop the draft. A
//! bitmap that is cleared gets fresh bits. One that others are merged into gets fresh bits as well, which are filled at
//! the moment when the draft is put into force ([`Plan::at_the_moment`]): no request is inside then.

use std::sync::Arc;

use async_trait::async_trait;

use crate::bitmap::DirtyBitmap;
use crate::error::{GraphError, IoError, Result};
use crate::graph::LastStep;
use crate::info::cluster_size;
use crate::plan::{NodeId, Plan, Wires};
use crate::units::ByteRange;
use crate::view::{Cx, Tracker};

/// The smallest granularity.
pub const MIN_GRANULARITY: u64 = 512;
/// What the granularity is if nobody says: the node's cluster size, but within these.
const DEFAULT_GRANULARITY: std::ops::RangeInclusive<u64> = 4096..=65536;
/// Longest name in bytes.
const MAX_NAME: usize = 1023;

/// A named dirty bitmap of a node.
#[derive(Clone, Debug)]
pub struct PlanBitmap {
    /// Its name; no other bitmap of the node has it.
    pub name: Arc<str>,
    /// What it says.
    pub bits: Arc<DirtyBitmap>,
    /// While a job holds it: what was written since.
    pub successor: Option<Arc<DirtyBitmap>>,
    /// Records what is written: itself, or its successor.
    pub enabled: bool,
    /// The image keeps it when it is closed.
    pub persistent: bool,
    /// A job or an export holds it.
    pub busy: bool,
    /// It was in use when it was loaded: what it says is not known. Never enabled.
    pub inconsistent: bool,
}

impl PlanBitmap {
    /// A bitmap that is neither persistent nor held by anybody.
    pub fn new(name: &str, bits: DirtyBitmap, enabled: bool) -> Self {
        Self {
            name: name.into(),
            bits: Arc::new(bits),
            successor: None,
            enabled,
            persistent: false,
            busy: false,
            inconsistent: false,
        }
    }

    /// Who is to be told of writes.
    pub(crate) fn tracker(&self) -> Option<Arc<dyn Tracker>> {
        let bits = self.successor.as_ref().unwrap_or(&self.bits);
        self.enabled.then(|| bits.clone() as Arc<dyn Tracker>)
    }

    /// What an image should keep while a job may hold the bitmap: enough for every end of that job.
    pub fn to_keep(&self) -> Arc<DirtyBitmap> {
        match &self.successor {
            None => self.bits.clone(),
            Some(since) => {
                let both = DirtyBitmap::new(0, self.bits.granularity());
                merge_all(&both, [&self.bits, since]);
                Arc::new(both)
            }
        }
    }

    fn all_bits(&self) -> impl Iterator<Item = &Arc<DirtyBitmap>> {
        self.successor.iter().chain([&self.bits])
    }

    /// Gives it the node's length, if it has another.
    pub(crate) fn resize(&self, length: u64) -> bool {
        let other = self.all_bits().filter(|bits| bits.size() != length);
        other.map(|bits| bits.resize(length)).count() > 0
    }

    /// Whether an image keeps the same for both, or has what it needs to.
    pub(crate) fn is_kept_as(&self, other: &Self) -> bool {
        self.name == other.name && self.enabled == other.enabled && Arc::ptr_eq(&self.bits, &other.bits)
    }

    pub(crate) fn records_as(&self, other: &Self) -> bool {
        let same = |a: Option<&Arc<_>>, b: Option<&Arc<_>>| match (a, b) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (a, b) => a.is_none() && b.is_none(),
        };
        self.enabled == other.enabled && same(self.all_bits().next(), other.all_bits().next())
    }
}

/// Why a bitmap that is inconsistent cannot be used for anything.
pub fn inconsistent(name: &str) -> IoError {
    IoError::EINVAL.with_hint(
        format!("Bitmap '{name}' is inconsistent and cannot be used"),
        "Try block-dirty-bitmap-remove to delete this bitmap from disk",
    )
}

/// What somebody wants to do with a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To change what it says.
    Change,
    /// To rely on what it says.
    Rely,
    /// To take it away.
    Remove,
}

/// A bitmap to be made.
#[derive(Clone, Debug)]
pub struct NewBitmap<'a> {
    /// Its name.
    pub name: &'a str,
    /// Bytes per bit.
    pub granularity: Option<u64>,
    /// The image shall keep it.
    pub persistent: bool,
    /// Records from the moment on.
    pub enabled: bool,
}

/// What becomes of a bitmap that a job held.
#[derive(Clone, Debug)]
pub enum Release {
    /// What it said, and what was written since.
    Reclaim,
    /// Only what was written since, and what is still dirty in there, if there is one.
    Abdicate(Option<Arc<DirtyBitmap>>),
}

impl Plan {
    /// The bitmap of a node.
    pub fn bitmap(&self, node: NodeId, name: &str) -> std::result::Result<&PlanBitmap, GraphError> {
        let bitmaps = self.get(node).map(|node| &node.bitmaps);
        bitmaps
            .and_then(|bitmaps| bitmaps.iter().find(|bitmap| *bitmap.name == *name))
            .ok_or_else(|| GraphError::new(format!("Dirty bitmap '{name}' not found")))
    }

    /// The same for changing its state.
    fn bitmap_mut(&mut self, node: NodeId, name: &str) -> std::result::Result<&mut PlanBitmap, GraphError> {
        self.bitmap(node, name)?;
        let mut bitmaps = self.node_mut(node).bitmaps.iter_mut();
        Ok(bitmaps.find(|bitmap| *bitmap.name == *name).expect("was just found"))
    }

    /// A bitmap for somebody who wants to do something with it, if he may.
    pub fn bitmap_for(
        &self,
        node: NodeId,
        name: &str,
        purpose: Purpose,
    ) -> std::result::Result<&PlanBitmap, GraphError> {
        let bitmap = self.bitmap(node, name)?;
        let wrong = |what: &str| Err(GraphError::new(format!("Bitmap '{name}' {what}")));
        if bitmap.busy {
            return wrong("is currently in use by another operation and cannot be used");
        }
        if purpose != Purpose::Rely && bitmap.persistent && self.node(node).read_only {
            return wrong("is readonly and cannot be modified");
        }
        if purpose != Purpose::Remove && bitmap.inconsistent {
            return Err(inconsistent(name).into());
        }
        Ok(bitmap)
    }

    /// block-dirty-bitmap-add
    pub fn add_bitmap(&mut self, node: NodeId, new: &NewBitmap<'_>) -> std::result::Result<(), GraphError> {
        let name = new.name;
        let refused = |text: String| Err(GraphError::new(text));
        if name.is_empty() {
            return refused("Bitmap name cannot be empty".into());
        }
        let view = self.view(node);
        let default = || cluster_size(&view).unwrap_or(*DEFAULT_GRANULARITY.end());
        let granularity = new
            .granularity
            .unwrap_or_else(|| default().clamp(*DEFAULT_GRANULARITY.start(), *DEFAULT_GRANULARITY.end()));
        if !granularity.is_power_of_two() || granularity < MIN_GRANULARITY {
            return refused(format!("Granularity must be power of 2 and at least {MIN_GRANULARITY}"));
        }
        if new.persistent {
            let others = &self.node(node).bitmaps;
            let Some(store) = view.node().as_bitmap_store() else {
                let node = view.name();
                return refused(format!("Can't store persistent bitmaps to {node}: Operation not supported"));
            };
            store.check_new(&view.cx(), others, name, granularity)?;
        }
        if self.bitmap(node, name).is_ok() {
            return refused(format!("Bitmap already exists: {name}"));
        }
        if name.len() > MAX_NAME {
            return refused(format!("Bitmap name too long: {name}"));
        }
        let size = view.cx().length();
        if !DirtyBitmap::fits(size, granularity) {
            return refused(format!("Granularity {granularity} is too small for {size} bytes"));
        }
        let bitmap = PlanBitmap::new(name, DirtyBitmap::new(size, granularity), new.enabled);
        let bitmap = PlanBitmap { persistent: new.persistent, ..bitmap };
        self.node_mut(node).bitmaps.push(bitmap);
        Ok(())
    }

    /// Whether block-dirty-bitmap-remove may take it away. From now on nobody else may use it.
    pub fn give_up_bitmap(&mut self, node: NodeId, name: &str) -> std::result::Result<(), GraphError> {
        self.bitmap_for(node, name, Purpose::Remove)?;
        let bitmap = self.bitmap_mut(node, name)?;
        (bitmap.busy, bitmap.enabled) = (true, false);
        Ok(())
    }

    /// Takes a bitmap away that was given up.
    pub fn drop_bitmap(&mut self, node: NodeId, name: &str) {
        if self.get(node).is_some() {
            self.node_mut(node).bitmaps.retain(|bitmap| *bitmap.name != *name);
        }
    }

    /// block-dirty-bitmap-clear
    pub fn clear_bitmap(&mut self, node: NodeId, name: &str) -> std::result::Result<(), GraphError> {
        self.bitmap_for(node, name, Purpose::Change)?;
        let bitmap = self.bitmap_mut(node, name)?;
        bitmap.bits = fresh(&bitmap.bits);
        Ok(())
    }

    /// block-dirty-bitmap-enable, block-dirty-bitmap-disable
    pub fn enable_bitmap(
        &mut self,
        node: NodeId,
        name: &str,
        enabled: bool,
    ) -> std::result::Result<(), GraphError> {
        self.bitmap_for(node, name, Purpose::Rely)?;
        self.bitmap_mut(node, name)?.enabled = enabled;
        Ok(())
    }

    /// block-dirty-bitmap-merge: adds what the sources say, each a bitmap of some node.
    pub fn merge_bitmaps(
        &mut self,
        node: NodeId,
        target: &str,
        sources: &[(NodeId, &str)],
    ) -> std::result::Result<(), GraphError> {
        let into = &self.bitmap_for(node, target, Purpose::Change)?.bits;
        let size = into.size();
        let mut from = vec![into.clone()];
        for (other, name) in sources {
            from.push(self.bits_for_size(*other, name, size)?);
        }
        let merged = fresh(&from[0]);
        self.bitmap_mut(node, target)?.bits = merged.clone();
        sources.iter().for_each(|(other, _)| self.touch(*other));
        self.touch(node);
        self.at_the_moment(move || merge_all(&merged, &from));
        Ok(())
    }

    /// What a bitmap says about a disk of `size` bytes, for somebody who relies on it.
    pub fn bits_for_size(
        &self,
        node: NodeId,
        name: &str,
        size: u64,
    ) -> std::result::Result<Arc<DirtyBitmap>, GraphError> {
        let bits = &self.bitmap_for(node, name, Purpose::Rely)?.bits;
        if bits.size() == size {
            return Ok(bits.clone());
        }
        let own = bits.size();
        Err(GraphError::new(format!(
            "Bitmaps are of different sizes (destination size is {size}, source size is {own}) and can't be merged"
        )))
    }

    /// A job will work with a bitmap: nobody else may, and what is written from the moment on is noted beside it. What
    /// the job will do with it in the end is its `purpose`.
    pub fn hold_bitmap(
        &mut self,
        node: NodeId,
        name: &str,
        purpose: Purpose,
    ) -> std::result::Result<Arc<DirtyBitmap>, GraphError> {
        self.bitmap_for(node, name, purpose)?;
        let bitmap = self.bitmap_mut(node, name)?;
        bitmap.busy = true;
        bitmap.successor = bitmap.enabled.then(|| fresh(&bitmap.bits));
        let bits = bitmap.bits.clone();
        self.touch(node);
        Ok(bits)
    }

    /// The job that held a bitmap has ended.
    pub fn release_bitmap(&mut self, node: NodeId, name: &str, how: Release) {
        let Ok(bitmap) = self.bitmap_mut(node, name) else { return };
        bitmap.busy = false;
        let since = bitmap.successor.take();
        let now = fresh(&bitmap.bits);
        let before = std::mem::replace(&mut bitmap.bits, now.clone());
        if matches!(how, Release::Abdicate(_)) {
            // It shows as the newest: the reference lists what has taken its place.
            self.node_mut(node).bitmaps.sort_by_key(|bitmap| *bitmap.name == *name);
        }
        self.touch(node);
        // What the image has and what was noted since is no less. It is told later: a full disk must not keep a job
        // from its end, and after a crash nothing may be clean by a job of whose end nobody has heard.
        self.let_images_lag();
        self.at_the_moment(move || {
            let kept = match &how {
                Release::Reclaim => Some(&before),
                Release::Abdicate(rest) => rest.as_ref(),
            };
            merge_all(&now, kept.into_iter().chain(&since));
        });
    }

    /// An export shows a bitmap: nobody may change it until [`Plan::unlock_bitmap`].
    pub fn lock_bitmap(
        &mut self,
        node: NodeId,
        name: &str,
    ) -> std::result::Result<Arc<DirtyBitmap>, GraphError> {
        self.bitmap_for(node, name, Purpose::Rely)?;
        let bitmap = self.bitmap_mut(node, name)?;
        bitmap.busy = true;
        Ok(bitmap.bits.clone())
    }

    /// The export is gone.
    pub fn unlock_bitmap(&mut self, node: NodeId, name: &str) {
        if let Ok(bitmap) = self.bitmap_mut(node, name) {
            bitmap.busy = false;
        }
    }
}

/// Merges bitmaps of one disk, which may have grown since some of them were told: the rest of these is clean.
fn merge_all<'a>(into: &DirtyBitmap, from: impl IntoIterator<Item = &'a Arc<DirtyBitmap>>) {
    for bits in from {
        if bits.size() > into.size() {
            into.resize(bits.size());
        }
        into.merge(bits);
    }
}

fn fresh(like: &DirtyBitmap) -> Arc<DirtyBitmap> {
    Arc::new(DirtyBitmap::new(like.size(), like.granularity()))
}

/// An image that can keep dirty bitmaps.
#[async_trait]
pub trait BitmapStore: Send + Sync {
    /// What the image had when it was opened, for the node that comes into the plan.
    fn loaded(&self) -> Vec<PlanBitmap>;
    /// Whether the image could keep one more beside the other bitmaps of its node, only some of which may be
    /// persistent.
    fn check_new(
        &self,
        cx: &Cx<'_>,
        others: &[PlanBitmap],
        name: &str,
        granularity: u64,
    ) -> std::result::Result<(), GraphError>;
    /// The node may be written to from now on: what the image keeps is not valid until [`BitmapStore::store`], and says
    /// so durably.
    async fn begin(&self, cx: &Cx<'_>) -> Result<()>;
    /// Makes the image keep just these, and calls them valid: durable on return, and whatever happens on the way, none
    /// is called valid that says too little. No request is inside, and the node is not written to afterwards.
    async fn store(&self, cx: &Cx<'_>, bitmaps: &[PlanBitmap]) -> Result<()>;
    /// Whether the image is still as [`BitmapStore::store`] left it: whoever has written to it since, be it to its
    /// header, has had it call its bitmaps not valid.
    fn is_stored(&self) -> bool;
    /// Whether the image has a bitmap of that name, valid or not.
    fn has(&self, name: &str) -> bool;
    /// Takes one out, if the image has it: durable on return.
    async fn remove(&self, cx: &Cx<'_>, name: &str) -> Result<()>;

    /// Between [`BitmapStore::begin`] and [`BitmapStore::store`]: makes the image keep what these say by now
    /// ([`PlanBitmap::to_keep`]), not called valid, but as good as that together with what was covered since. Durable
    /// on return. Requests may be inside: what they write is in the bitmaps before it is covered, and covered before it
    /// is written. The node has been flushed since any of them was made cleaner.
    async fn refresh(&self, _cx: &Cx<'_>, _bitmaps: &[PlanBitmap]) -> Result<()> {
        Ok(())
    }
    /// Whether much was covered since it was last refreshed.
    fn is_worth_refreshing(&self) -> bool {
        false
    }
    /// Whether it is durable already that `range` may be written to. Asked before every write.
    fn covers(&self, _range: ByteRange) -> bool {
        true
    }
    /// Makes that durable.
    async fn cover(&self, _cx: &Cx<'_>, _range: ByteRange) -> Result<()> {
        Ok(())
    }
}

/// Takes bitmaps, by node and name, out of the images that keep them: the last step of a change that drops them.
#[derive(Debug)]
pub struct Forget(pub Vec<(NodeId, String)>);

#[async_trait]
impl LastStep for Forget {
    async fn run(self: Box<Self>, _old: &Wires, new: &Wires) -> std::result::Result<(), GraphError> {
        for (node, name) in self.0 {
            let view = new.view(node);
            if let Some(store) = view.node().as_bitmap_store() {
                store.remove(&view.cx(), &name).await?;
            }
        }
        Ok(())
    }
}

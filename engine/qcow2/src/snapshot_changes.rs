//! Internal snapshots: taken, deleted, applied and looked at.
//!
//! A snapshot is an L1 table of its own. The L2 tables and clusters that it has in common with the disk have a
//! reference for each way that leads to them, and no COPIED flag, so the guest's next write there goes to a new place
//! ([`crate::cow`]). All changes are made beside the tables in force ([`crate::shadow`]): the image has the old
//! snapshots or the new ones, whenever the power is cut. Nobody else may use the image while they are made.

use std::sync::{Arc, PoisonError, RwLockReadGuard};

use underlay_graph::info::SnapshotInfo;
use underlay_graph::{Cx, IoError, Node, Role, View};

use crate::entry::{COMPRESSED, COPIED, Entry, OFFSET};
use crate::header::{Header, MAX_L1_BYTES};
use crate::info::snapshot_info;
use crate::live::{Corruption, OpenOptions, Qcow2};
use crate::mapping::L1;
use crate::metadata::Owner;
use crate::shadow::{Bad, Freed, Shadow};
use crate::snapshots::{self, Snapshot, SnapshotError, Table};
use crate::words::to_bytes;

type Result<T, E = IoError> = std::result::Result<T, E>;

/// Longest name in bytes: more is cut off, as in the reference.
const MAX_NAME: usize = 255;

/// The snapshots of an open image.
#[derive(Debug, Default)]
pub(crate) struct Known {
    pub table: Table,
    infos: Arc<[SnapshotInfo]>,
    /// Why they are not known.
    pub error: Option<SnapshotError>,
}

impl Known {
    /// Those of the image in `file`.
    pub async fn read(file: &Cx<'_>, header: &Header) -> Self {
        Self::from(snapshots::read(file, header).await)
    }
}

impl From<std::result::Result<Table, SnapshotError>> for Known {
    fn from(read: std::result::Result<Table, SnapshotError>) -> Self {
        match read {
            Ok(table) => {
                let infos = table.snapshots.iter().map(snapshot_info).collect();
                Self { table, infos, error: None }
            }
            Err(error) => Self { error: Some(error), ..Self::default() },
        }
    }
}

/// Writes the snapshot table of the image in `file`, which nobody else uses, anew: without what is damaged, and with
/// everything that version 3 asks for in each entry.
pub async fn complete_snapshots(file: &Arc<View>) -> Result<()> {
    let options = OpenOptions { repair: true, ..OpenOptions::default() };
    let image = Qcow2::open(&file.cx(), options).await;
    let image = Arc::new(image.map_err(|error| IoError::EINVAL.with(error.to_string()))?);
    image.notice_snapshots(Known::from(snapshots::read_damaged(&file.cx(), &image.header()).await));
    let view = View::detached(image.clone(), [(Role::File, file.clone())]);
    let cx = view.cx();
    image.become_writable(&cx).await?;
    image.change_only_metadata();
    let done = image.complete(&cx).await;
    let closed = image.close(&cx).await;
    done.and(closed)
}

/// What is to be known of a new snapshot.
#[derive(Clone, Debug, Default)]
pub struct NewSnapshot {
    /// What it is called.
    pub name: String,
    /// When it is taken: seconds since 1970.
    pub seconds: u32,
    /// And nanoseconds.
    pub nanoseconds: u32,
    /// How long the guest has run, in nanoseconds.
    pub clock: u64,
    /// How many instructions the guest has executed, if that is known.
    pub icount: Option<u64>,
}

impl Qcow2 {
    pub(crate) fn known_snapshots(&self) -> RwLockReadGuard<'_, Known> {
        self.snapshots.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn notice_snapshots(&self, known: Known) {
        *self.snapshots.write().unwrap_or_else(PoisonError::into_inner) = known;
    }

    /// The internal snapshots, in the image's order.
    pub fn snapshots(&self) -> Arc<[SnapshotInfo]> {
        self.known_snapshots().infos.clone()
    }

    /// Why the snapshots are not known, if so.
    pub fn snapshots_error(&self) -> Option<IoError> {
        let text = match self.known_snapshots().error.as_ref()? {
            SnapshotError::Io(error) => return Some(error.clone().context("Could not read snapshots")),
            other => other.to_string(),
        };
        Some(match text.split_once('\n') {
            Some((text, hint)) => IoError::EFBIG.with_hint(text, hint),
            None => IoError::EFBIG.with(text),
        })
    }

    /// Takes a snapshot of the disk as it is; its id. EINVAL when the refcounts are too narrow for one more.
    pub async fn take_snapshot(&self, cx: &Cx<'_>, new: &NewSnapshot) -> Result<String> {
        let _turn = self.resizing.lock().await;
        self.get_ready(cx).await?;
        let outcome = self.try_take(cx, new).await;
        self.told(cx, outcome).await
    }

    /// Deletes the snapshot at this place of the list.
    pub async fn delete_snapshot(&self, cx: &Cx<'_>, place: usize) -> Result<()> {
        let _turn = self.resizing.lock().await;
        self.get_ready(cx).await?;
        let outcome = self.try_delete(cx, place).await;
        self.told(cx, outcome).await?.discard(self, cx).await;
        Ok(())
    }

    /// Makes the disk what it was when the snapshot at this place of the list was taken, its size included.
    pub async fn apply_snapshot(&self, cx: &Cx<'_>, place: usize) -> Result<()> {
        self.check_no_bitmaps()?;
        let _turn = self.resizing.lock().await;
        self.get_ready(cx).await?;
        let outcome = self.try_apply(cx, place).await;
        self.told(cx, outcome).await?.discard(self, cx).await;
        Ok(())
    }

    /// Fails if bitmaps say what was written since some moment: they would not know of a disk from another time.
    pub fn check_no_bitmaps(&self) -> Result<()> {
        match self.stored().directory().is_empty() {
            true => Ok(()),
            false => Err(IoError::new(16).with("Device has active dirty bitmaps")),
        }
    }

    async fn complete(&self, cx: &Cx<'_>) -> Result<()> {
        let _turn = self.resizing.lock().await;
        self.get_ready(cx).await?;
        let outcome = self.try_complete(cx).await;
        self.told(cx, outcome).await?.discard(self, cx).await;
        Ok(())
    }

    /// From now on the image, which nobody may be writing to, reads as it was when the snapshot at this place was
    /// taken.
    pub async fn show_snapshot(&self, cx: &Cx<'_>, place: usize) -> Result<()> {
        if self.is_writable() {
            return Err(IoError::EINVAL.with("Device is writable"));
        }
        let snapshot = self.snapshot(place)?;
        let entries = self.snapshot_l1(cx, &snapshot).await.map_err(|bad| match bad {
            Bad::Io(error) => error,
            Bad::Wrong(..) => IoError::EIO,
        })?;
        *self.l1_mut() = L1::new(snapshot.l1_offset, entries);
        self.l2.clear();
        self.set_size(snapshot.disk_size & !511);
        Ok(())
    }

    fn snapshot(&self, place: usize) -> Result<Snapshot> {
        let known = self.known_snapshots();
        known.table.snapshots.get(place).cloned().ok_or(IoError::new(2))
    }

    async fn snapshot_l1(&self, cx: &Cx<'_>, snapshot: &Snapshot) -> Result<Vec<u64>, Bad> {
        let mut l1 = snapshots::l1(&cx.below(), &self.header(), snapshot).await.map_err(failed)?.into_vec();
        // A disk that is larger than its table says is unallocated there.
        let needed = snapshot.disk_size.div_ceil(1 << self.layout.table_reach_bits());
        if needed * 8 > MAX_L1_BYTES {
            return Err(IoError::EFBIG.with("Snapshot L1 table too large").into());
        }
        let needed = usize::try_from(needed).map_err(|_| IoError::EFBIG)?;
        l1.resize(l1.len().max(needed), 0);
        Ok(l1)
    }

    /// Everything on disk, and all tables in order.
    async fn get_ready(&self, cx: &Cx<'_>) -> Result<()> {
        // The new table will have those of the old one that are known.
        self.snapshots_error().map_or(Ok(()), Err)?;
        self.begin_change(cx).await?;
        self.check_own_l1(cx).await?;
        self.check_own_refcount_table(cx).await?;
        self.settle(cx).await?;
        if self.l2.dirty_count() > 0 || self.refcounts.cache.dirty_count() > 0 {
            return Err(IoError::new(16));
        }
        Ok(())
    }

    /// The outcome, with what is wrong told to who wants to know.
    async fn told<T>(&self, cx: &Cx<'_>, outcome: Result<T, Bad>) -> Result<T> {
        match outcome {
            Ok(done) => Ok(done),
            Err(Bad::Io(error)) => Err(error),
            Err(Bad::Wrong(cluster, what)) => {
                let offset = cluster << self.layout.cluster_bits;
                let message = format!("Cluster at offset {offset:#x} {what}");
                let found = Corruption { message, offset: Some(offset), size: None, fatal: false };
                Err(self.corruption(cx, found).await)
            }
        }
    }

    /// The header names other tables than those that are known.
    pub(crate) async fn begin_anew(&self, cx: &Cx<'_>) -> Result<()> {
        *self.decoded.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.read_again(cx).await?;
        self.collect_metadata(cx).await;
        Ok(())
    }

    async fn try_take(&self, cx: &Cx<'_>, new: &NewSnapshot) -> Result<String, Bad> {
        let mut shadow = Shadow::begin(self, cx).await?;
        let mut l1 = self.l1().entries.clone();
        self.share_tree(&mut shadow, &mut l1).await?;
        let mut table = self.known_snapshots().table.clone();
        let id = next_id(&table);
        let mut name = new.name.clone();
        name.truncate(name.floor_char_boundary(MAX_NAME));
        let l1_offset = if l1.is_empty() { 0 } else { shadow.put(to_bytes(&l1)).await? };
        table.snapshots.push(Snapshot {
            l1_offset,
            l1_entries: shadow.header.l1_entries,
            raw: (id.clone().into_bytes(), name.clone().into_bytes()),
            id: id.clone(),
            name,
            seconds: new.seconds,
            nanoseconds: new.nanoseconds,
            clock: new.clock,
            vm_state_size: 0,
            disk_size: self.size(),
            icount: new.icount,
            incomplete: false,
            unknown: Vec::new(),
        });
        put_table(&mut shadow, &table).await?;
        shadow.finish(&l1).await?;
        Ok(id)
    }

    async fn try_complete(&self, cx: &Cx<'_>) -> Result<Freed, Bad> {
        let mut shadow = Shadow::begin(self, cx).await?;
        let table = self.known_snapshots().table.clone();
        put_table(&mut shadow, &table).await?;
        let l1 = self.l1().entries.clone();
        shadow.finish(&l1).await
    }

    async fn try_delete(&self, cx: &Cx<'_>, place: usize) -> Result<Freed, Bad> {
        let gone = self.snapshot(place)?;
        let mut shadow = Shadow::begin(self, cx).await?;
        let tree = snapshots::l1(&cx.below(), &self.header(), &gone).await.map_err(failed)?;
        lower_tree(&mut shadow, &tree, Owner::InactiveL2).await?;
        shadow.lower_run(gone.l1_offset, gone.l1_bytes(), Owner::InactiveL1)?;
        let mut table = self.known_snapshots().table.clone();
        table.snapshots.remove(place);
        put_table(&mut shadow, &table).await?;
        let mut l1 = self.l1().entries.clone();
        self.flag_tree(&mut shadow, &mut l1).await?;
        shadow.finish(&l1).await
    }

    async fn try_apply(&self, cx: &Cx<'_>, place: usize) -> Result<Freed, Bad> {
        let snapshot = self.snapshot(place)?;
        let mut l1 = self.snapshot_l1(cx, &snapshot).await?;
        let mut shadow = Shadow::begin(self, cx).await?;
        let old = self.l1().entries.clone();
        lower_tree(&mut shadow, &old, Owner::L2).await?;
        adopt_tree(&mut shadow, &mut l1).await?;
        shadow.header.size = snapshot.disk_size;
        shadow.finish(&l1).await
    }

    /// The active tree gets a second owner. Tables that have flags get copies without, in `l1` too.
    async fn share_tree(&self, shadow: &mut Shadow<'_>, l1: &mut [u64]) -> Result<(), Bad> {
        let used = used(l1);
        for some in used.chunks(shadow.batch()) {
            for (index, mut words) in read_tables(shadow, some, l1, Some(Owner::L2)).await? {
                let offset = l1[index] & OFFSET;
                change_references(shadow, &words, Shadow::raise)?;
                let cluster = offset >> self.layout.cluster_bits;
                l1[index] = offset;
                if without_flags(shadow, &mut words) {
                    shadow.lower(cluster, Some(Owner::L2))?;
                    l1[index] = shadow.put(to_bytes(&words)).await?;
                    shadow.raise(l1[index] >> self.layout.cluster_bits)?;
                } else {
                    shadow.raise(cluster)?;
                }
            }
        }
        Ok(())
    }

    /// Sets the flags of the active tree by its refcounts. Tables in which some change get copies.
    async fn flag_tree(&self, shadow: &mut Shadow<'_>, l1: &mut [u64]) -> Result<(), Bad> {
        let (layout, bits) = (self.layout, self.layout.cluster_bits);
        // What somebody else has too has nothing of its own.
        let (own, shared): (Vec<usize>, Vec<usize>) =
            used(l1).into_iter().partition(|index| shadow.count((l1[*index] & OFFSET) >> bits) == 1);
        shared.into_iter().for_each(|index| l1[index] &= OFFSET);
        for some in own.chunks(shadow.batch()) {
            for (index, mut words) in read_tables(shadow, some, l1, Some(Owner::L2)).await? {
                let offset = l1[index] & OFFSET;
                let mut changed = false;
                for number in 0..1 << layout.l2_bits {
                    let entry = layout.get(&words, number);
                    let host = layout.host(entry);
                    if host == 0 {
                        continue;
                    }
                    let flag = if shadow.count(host >> bits) == 1 { COPIED } else { 0 };
                    if entry.word & COPIED != flag {
                        changed = true;
                        let word = entry.word & !COPIED | flag;
                        layout.set(&mut words, number, Entry { word, ..entry });
                    }
                }
                l1[index] = offset | COPIED;
                if changed {
                    shadow.lower(offset >> bits, Some(Owner::L2))?;
                    l1[index] = shadow.put(to_bytes(&words)).await? | COPIED;
                }
            }
        }
        Ok(())
    }
}

fn failed(error: SnapshotError) -> Bad {
    match error {
        SnapshotError::Io(error) => Bad::Io(error),
        other => Bad::Io(IoError::EFBIG.with(other.to_string())),
    }
}

/// One more than the highest id that is a number.
fn next_id(table: &Table) -> String {
    let ids = table.snapshots.iter().filter_map(|snapshot| snapshot.id.parse::<u64>().ok());
    ids.max().unwrap_or(0).saturating_add(1).to_string()
}

/// The table of snapshots moves.
async fn put_table(shadow: &mut Shadow<'_>, table: &Table) -> Result<(), Bad> {
    let bytes = snapshots::serialise(&table.snapshots).map_err(failed)?;
    shadow.lower_run(shadow.header.snapshots_offset, table.len, Owner::Snapshots)?;
    shadow.header.snapshots = u32::try_from(table.snapshots.len()).map_err(|_| IoError::EFBIG)?;
    shadow.header.snapshots_offset = if bytes.is_empty() { 0 } else { shadow.put(bytes).await? };
    Ok(())
}

/// The entries with an L2 table.
fn used(l1: &[u64]) -> Vec<usize> {
    (0..l1.len()).filter(|index| l1[*index] & OFFSET != 0).collect()
}

/// The L2 tables of some entries, which must be known as what they are.
async fn read_tables(
    shadow: &mut Shadow<'_>,
    some: &[usize],
    l1: &[u64],
    owner: Option<Owner>,
) -> Result<Vec<(usize, Box<[u64]>)>, Bad> {
    let offsets: Vec<u64> = some.iter().map(|index| l1[*index] & OFFSET).collect();
    if let Some(owner) = owner {
        let metadata = shadow.image.metadata();
        for cluster in offsets.iter().map(|offset| offset >> shadow.image.layout.cluster_bits) {
            if metadata.owner(cluster, cluster + 1).map(|(_, owner)| owner) != Some(owner) {
                return Err(Bad::Wrong(cluster, "is an L2 table, but something else too"));
            }
        }
    }
    let tables = shadow.tables(&offsets).await?;
    Ok(some.iter().copied().zip(tables).collect())
}

/// Changes the count of each cluster that a table refers to, once for each reference.
fn change_references<'a>(
    shadow: &mut Shadow<'a>,
    words: &[u64],
    mut change: impl FnMut(&mut Shadow<'a>, u64) -> Result<(), Bad>,
) -> Result<(), Bad> {
    let layout = shadow.image.layout;
    for number in 0..1 << layout.l2_bits {
        let entry = layout.get(words, number);
        if entry.word == 0 {
            continue;
        }
        let (first, count) = layout.clusters_of(entry);
        if entry.word & COMPRESSED == 0 && layout.host(entry) & (layout.cluster() - 1) != 0 {
            return Err(Bad::Wrong(first, "is referred to by an unaligned L2 entry"));
        }
        (first..first + count).try_for_each(|cluster| change(shadow, cluster))?;
    }
    Ok(())
}

/// Takes the flags out of a table; whether there were any.
fn without_flags(shadow: &Shadow<'_>, words: &mut [u64]) -> bool {
    let layout = shadow.image.layout;
    let mut changed = false;
    for number in 0..1 << layout.l2_bits {
        let entry = layout.get(words, number);
        if entry.word & COPIED != 0 && entry.word & COMPRESSED == 0 {
            layout.set(words, number, Entry { word: entry.word & !COPIED, ..entry });
            changed = true;
        }
    }
    changed
}

/// A tree loses an owner.
async fn lower_tree(shadow: &mut Shadow<'_>, l1: &[u64], was: Owner) -> Result<(), Bad> {
    let owner = Some(was).filter(|was| *was == Owner::L2);
    let used = used(l1);
    for some in used.chunks(shadow.batch()) {
        for (index, words) in read_tables(shadow, some, l1, owner).await? {
            shadow.spend(words.len())?;
            change_references(shadow, &words, |shadow, cluster| shadow.lower(cluster, None))?;
            shadow.lower((l1[index] & OFFSET) >> shadow.image.layout.cluster_bits, Some(was))?;
        }
    }
    Ok(())
}

/// The tree of a snapshot gets a second owner, to which `l1` belongs. (Flags that a table has all the same are not for
/// it.)
async fn adopt_tree(shadow: &mut Shadow<'_>, l1: &mut [u64]) -> Result<(), Bad> {
    let used = used(l1);
    for some in used.chunks(shadow.batch()) {
        for (index, mut words) in read_tables(shadow, some, l1, None).await? {
            shadow.spend(words.len())?;
            change_references(shadow, &words, Shadow::raise)?;
            let offset = l1[index] & OFFSET;
            l1[index] = offset;
            if without_flags(shadow, &mut words) {
                l1[index] = shadow.put(to_bytes(&words)).await? | COPIED;
            } else {
                shadow.raise(offset >> shadow.image.layout.cluster_bits)?;
            }
        }
    }
    Ok(())
}

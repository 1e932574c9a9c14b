//! Zeroing and discarding: changes of the mapping without data.
//!
//! | | version 3 | version 2 |
//! | --- | --- | --- |
//! | zero | zero flag; the host cluster stays, or goes when it may be unmapped | without backing file: as discard; else refused, so that zeroes are written |
//! | discard | zero flag without host cluster; what is unallocated without a backing file stays so | without backing file: unallocated; else nothing happens |
//!
//! A part of a (sub)cluster is zeroed with it when the rest of it reads as zero already; otherwise zeroes are written
//! there. Discards leave parts of clusters alone.

use underlay_graph::range_lock::Mode;
use underlay_graph::status::status;
use underlay_graph::{ByteRange, Cx, IoError, Place, Result, ZeroFlags};
use underlay_sys::Iov;

use crate::entry::{COMPRESSED, COPIED, Entry, Layout, OFFSET, ZERO, sub_mask};
use crate::live::Qcow2;

/// All subclusters read as zero.
const ALL_ZERO: u64 = 0xffff_ffff << 32;

/// What to make of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    /// Zero, with or without keeping the host cluster.
    Zero { unmap: bool },
    /// Gone, but reading as zero.
    Hidden,
    /// Gone.
    Unallocated,
    /// Zero, but keeping the host cluster and its place (`discard-no-unref`).
    Kept,
}

/// The entry that follows `old` when all of its cluster is changed. `bare` tells that nothing is below.
fn change(layout: &Layout, old: Entry, to: To, bare: bool) -> Entry {
    let host = layout.host(old);
    let nothing = old.word & COMPRESSED == 0 && host == 0 && (old.word & ZERO == 0 || layout.extended);
    let hidden = Entry {
        word: if layout.extended { 0 } else { ZERO },
        map: if layout.extended { ALL_ZERO } else { 0 },
    };
    match to {
        To::Unallocated => Entry::default(),
        To::Hidden if nothing && old.map == 0 && bare => old,
        To::Hidden => hidden,
        To::Zero { unmap: false } | To::Kept if host != 0 => {
            let flag = if layout.extended { 0 } else { ZERO };
            Entry { word: (old.word & (COPIED | OFFSET)) | flag, map: hidden.map }
        }
        To::Zero { .. } => hidden,
        To::Kept => change(layout, old, To::Hidden, bare),
    }
}

impl Qcow2 {
    /// Makes the range read as zeroes.
    pub(crate) async fn zero(&self, cx: &Cx<'_>, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if !self.layout.v3 && self.has_backing(cx) {
            return Err(IoError::ENOTSUP);
        }
        let unit = if self.layout.v3 { self.layout.sub() } else { self.layout.cluster() };
        let inner = self.inner(range, unit);
        let (head, tail) = if inner.is_empty() {
            (range, ByteRange::between(range.end(), range.end()))
        } else {
            (ByteRange::between(range.start(), inner.start()), ByteRange::between(inner.end(), range.end()))
        };
        for part in [head, tail] {
            self.zero_part(cx, part, unit, flags).await?;
        }
        self.change_range(cx, inner, self.zero_to(flags), flags.may_unmap).await
    }

    fn zero_to(&self, flags: ZeroFlags) -> To {
        let unmap = flags.may_unmap && !self.options().discard_no_unref;
        if self.layout.v3 { To::Zero { unmap } } else { To::Unallocated }
    }

    /// The part of `range` that consists of whole units; the unit at the end of the disk counts as whole.
    fn inner(&self, range: ByteRange, unit: u64) -> ByteRange {
        let end = if range.end() >= self.size() { range.end().next_multiple_of(unit) } else { range.end() };
        ByteRange::between(range.start(), end).align_in(unit)
    }

    /// Zeroes less than a unit (or two neighbours).
    async fn zero_part(&self, cx: &Cx<'_>, part: ByteRange, unit: u64, flags: ZeroFlags) -> Result<()> {
        let mut rest = part;
        while !rest.is_empty() {
            let (here, later) = rest.split(unit - (rest.start() & (unit - 1)));
            let around = here.align_out(unit);
            let zeroed = {
                let _turn = self.ranges.lock(here.align_out(self.layout.cluster()), Mode::Exclusive).await;
                if self.hides(cx, here).await? {
                    true
                } else if self.no_data(cx, around, here).await? {
                    self.change_held(cx, around, self.zero_to(flags), flags.may_unmap).await?;
                    true
                } else {
                    false
                }
            };
            if !zeroed {
                if flags.no_fallback {
                    return Err(IoError::ENOTSUP);
                }
                let zeroes = Iov::zeroed(here.buffer_len());
                match self.write_fast(cx, here, &zeroes).await {
                    Some(written) => written?,
                    None => self.write_allocating(cx, here, zeroes).await?,
                }
            }
            rest = later;
        }
        Ok(())
    }

    /// Whether the image itself says zero, whatever is below.
    async fn hides(&self, cx: &Cx<'_>, range: ByteRange) -> Result<bool> {
        let mut rest = range.before(self.size());
        while !rest.is_empty() {
            let extent = self.map_slow(cx, rest).await?;
            if extent.place != Place::Zero {
                return Ok(false);
            }
            rest = rest.split(extent.len).1;
        }
        Ok(true)
    }

    /// Whether what `around` has outside of `here` is in no cluster and reads as zero, perhaps from below. (Own data
    /// could be written to at this very moment.)
    async fn no_data(&self, cx: &Cx<'_>, around: ByteRange, here: ByteRange) -> Result<bool> {
        let head = ByteRange::between(around.start(), here.start());
        let tail = ByteRange::between(here.end(), around.end());
        for part in [head, tail] {
            let mut rest = part.before(self.size());
            while !rest.is_empty() {
                let found = status(cx, rest, None).await?;
                if !found.zero || found.depth == 0 && found.data {
                    return Ok(false);
                }
                rest = rest.split(found.len).1;
            }
        }
        Ok(true)
    }

    /// Tells that nobody needs the range.
    pub(crate) async fn forget(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        if !self.layout.v3 && self.has_backing(cx) {
            // Old content of the backing file would show again. Source: QEMU 10.0, observed.
            return Ok(());
        }
        let to = match self.layout.v3 {
            true if self.options().discard_no_unref => To::Kept,
            true => To::Hidden,
            false => To::Unallocated,
        };
        self.change_range(cx, self.inner(range, self.layout.cluster()), to, true).await
    }

    /// Removes the mapping of whole clusters, so that even the backing file would show: for what is behind the end of
    /// the disk.
    pub(crate) async fn unmap(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        self.change_range(cx, range, To::Unallocated, true).await
    }

    /// Whether a change makes entries where there are none.
    fn needs_table(&self, cx: &Cx<'_>, to: To) -> bool {
        match to {
            To::Zero { .. } => true,
            To::Unallocated => false,
            To::Hidden | To::Kept => self.has_backing(cx),
        }
    }

    /// Changes all of `range`, a slice at a time.
    async fn change_range(&self, cx: &Cx<'_>, range: ByteRange, to: To, discard: bool) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let here = self.skip_or_slice(cx, rest, to);
            if let Some(here) = here.change {
                let _turn = self.ranges.lock(here.align_out(self.layout.cluster()), Mode::Exclusive).await;
                self.change_held(cx, here, to, discard).await?;
            }
            rest = rest.split(here.len).1;
            self.relieve(cx).await?;
        }
        Ok(())
    }

    /// The next piece of work: nothing, where there is no table and none is needed, else the part in the first slice.
    fn skip_or_slice(&self, cx: &Cx<'_>, range: ByteRange, to: To) -> Piece {
        let here = self.in_slice(range);
        let no_table = |extent: &underlay_graph::Extent| {
            extent.place == Place::Below
                && self.l1().get(range.start() >> self.layout.table_reach_bits()) & OFFSET == 0
        };
        if !self.needs_table(cx, to)
            && let Some(extent) = self.map_now(range)
            && no_table(&extent)
        {
            return Piece { len: extent.len, change: None };
        }
        Piece { len: here.len(), change: Some(here) }
    }

    /// Zeroes whole subclusters in one slice that are the caller's alone.
    pub(crate) async fn zero_held(&self, cx: &Cx<'_>, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.change_held(cx, self.inner(range, self.layout.sub()), self.zero_to(flags), false).await
    }

    /// Changes all of `range`, which lies in one slice and is the caller's alone.
    async fn change_held(&self, cx: &Cx<'_>, range: ByteRange, to: To, discard: bool) -> Result<()> {
        let layout = self.layout;
        let bare = !self.has_backing(cx);
        let entries = self.entries(cx, range).await?;
        let unchanged = |(i, old): (usize, &Entry)| {
            let here = in_cluster(&layout, range, i);
            self.changed(*old, here, to, bare) == Some(*old)
        };
        let absent = entries.is_empty() && !self.needs_table(cx, to);
        if absent || (!entries.is_empty() && entries.iter().enumerate().all(unchanged)) {
            return Ok(());
        }
        for (i, old) in entries.iter().enumerate() {
            let here = in_cluster(&layout, range, i);
            if self.changed(*old, here, to, bare).is_none() {
                // A part of a compressed cluster.
                let start = range.align_out(layout.cluster()).start() + ((i as u64) << layout.cluster_bits);
                let part =
                    ByteRange::between(start + here.0, start + here.1).intersect(range).before(self.size());
                if !part.is_empty() {
                    self.write_held(cx, part, Iov::zeroed(part.buffer_len())).await?;
                }
            }
        }
        self.ensure_table(cx, range.start()).await?;
        let first = layout.entry_in_slice(range.start());
        let count = usize::try_from(range.align_out(layout.cluster()).len() >> layout.cluster_bits)
            .map_err(|_| IoError::EFBIG)?;
        let gone = self
            .update_slice(cx, range.start(), |words| {
                let mut gone = Vec::new();
                for i in 0..count {
                    let old = layout.get(words, first + i);
                    let Some(new) = self.changed(old, in_cluster(&layout, range, i), to, bare) else {
                        continue;
                    };
                    if layout.host(new) == 0 && (old.word & COMPRESSED != 0 || layout.host(old) != 0) {
                        gone.push(old);
                    }
                    layout.set(words, first + i, new);
                }
                gone
            })
            .await?;
        for old in gone {
            self.drop_entry(old, discard);
        }
        Ok(())
    }

    /// The entry that follows `old` when bytes `here` of its cluster are changed. `None` for what cannot be changed in
    /// part.
    fn changed(&self, old: Entry, here: (u64, u64), to: To, bare: bool) -> Option<Entry> {
        let layout = &self.layout;
        if here == (0, layout.cluster()) {
            return Some(change(layout, old, to, bare));
        }
        if old.word & COMPRESSED != 0 || !layout.extended {
            return None;
        }
        let mask = sub_mask(layout.sub_bits(), here.0, here.1);
        Some(Entry { word: old.word, map: (old.map & !mask) | mask << 32 })
    }
}

struct Piece {
    len: u64,
    change: Option<ByteRange>,
}

/// Which bytes of the `i`th cluster that `range` touches are in it.
fn in_cluster(layout: &Layout, range: ByteRange, i: usize) -> (u64, u64) {
    let cluster = layout.cluster();
    let start = (range.start() & !(cluster - 1)) + ((i as u64) << layout.cluster_bits);
    (range.start().max(start) - start, range.end().min(start + cluster) - start)
}

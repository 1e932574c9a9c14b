//! Writes to guest data.
//!
//! A write to clusters that the image owns goes straight to them (the fast way: no lock, a lease keeps the clusters
//! from being given to others meanwhile). Any other write has its guest clusters for itself while it allocates host
//! clusters, writes the data together with what must be copied around it, and only then links them: until that moment
//! readers see the old content, and a failure leaves it in place. Writes to different clusters run in parallel.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::Ordering;

use underlay_graph::format::join;
use underlay_graph::range_lock::Mode;
use underlay_graph::{ByteRange, Cx, IoError, Place, Result, WriteFlags};
use underlay_sys::Iov;

use crate::entry::{COMPRESSED, Entry, Layout, Sub, sub_mask};
use crate::live::Qcow2;

/// In-place writes of one request that are under way at once.
const PARALLEL: usize = 16;

/// Bytes that take longer to copy than another thread takes to hear of it.
const MUCH: u64 = 32 << 10;

/// How a part of a write gets to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// Straight to the host offset of its first byte.
    InPlace(u64),
    /// To own clusters, from this one on, whose touched parts hold no data yet.
    Reuse(u64),
    /// To new clusters.
    New,
}

/// How the part of `range` in one cluster gets to the file.
fn how(layout: &Layout, entry: Entry, range: ByteRange) -> How {
    if !layout.is_own(entry) {
        return How::New;
    }
    let inside = range.start() & (layout.cluster() - 1);
    let host = layout.host(entry);
    let (first, last) = (inside >> layout.sub_bits(), (inside + range.len() - 1) >> layout.sub_bits());
    let all_data =
        (first..=last).all(|sub| layout.sub_state(entry, u32::try_from(sub).unwrap_or(0)) == Sub::Data);
    if all_data { How::InPlace(host + inside) } else { How::Reuse(host) }
}

/// The first part of `range` whose clusters all go the same way, to neighbouring places. `entries` belong to the
/// clusters of `range`.
pub(crate) fn first_part(layout: &Layout, entries: &[Entry], range: ByteRange) -> (How, ByteRange) {
    let cluster = layout.cluster();
    let mut result: Option<(How, u64)> = None;
    let mut rest = range;
    for (i, entry) in entries.iter().enumerate() {
        let (here, later) = rest.split(cluster - (rest.start() & (cluster - 1)));
        if here.is_empty() {
            break;
        }
        let this = how(layout, *entry, here);
        let follows = match (result, this) {
            (None, _) => true,
            (Some((How::InPlace(first), _)), How::InPlace(host)) => {
                host == first + (here.start() - range.start())
            }
            (Some((How::Reuse(first), _)), How::Reuse(host)) => host == first + i as u64 * cluster,
            (Some((How::New, _)), How::New) => true,
            _ => false,
        };
        if !follows {
            break;
        }
        result = Some((result.map_or(this, |(first, _)| first), here.end()));
        rest = later;
    }
    let (how, end) = result.unwrap_or((How::New, range.end()));
    (how, range.before(end))
}

/// Whether moving to a new cluster means to copy all of the old one.
fn moves_data(layout: &Layout, entry: Entry) -> bool {
    !layout.extended || entry.word & COMPRESSED != 0 || entry.map & 0xffff_ffff != 0
}

/// What must be written for `part` so that no subcluster is half new: the part and what is around it.
fn with_copies(layout: &Layout, how: How, entries: &[Entry], part: ByteRange) -> ByteRange {
    let cluster = layout.cluster();
    let granule = |entry: Entry, at: u64| match how {
        How::New if moves_data(layout, entry) => cluster,
        How::New => layout.sub(),
        _ => {
            let sub = u32::try_from((at & (cluster - 1)) >> layout.sub_bits()).unwrap_or(0);
            // A subcluster with data keeps the rest of it.
            if layout.sub_state(entry, sub) == Sub::Data { 1 } else { layout.sub() }
        }
    };
    let (first, last) = (entries.first().copied(), entries.last().copied());
    let start = part.start() & !(granule(first.unwrap_or_default(), part.start()) - 1);
    let end = part.end().next_multiple_of(granule(last.unwrap_or_default(), part.end() - 1));
    ByteRange::between(start, end)
}

impl Qcow2 {
    /// Where the first bytes of `range` may be written in place, and how many, if that is known without I/O.
    fn own_now(&self, range: ByteRange) -> Option<(u64, u64)> {
        let layout = &self.layout;
        let range = self.in_slice(range);
        self.l2.view(layout.slice_of(range.start()), |words| {
            let cluster = layout.cluster();
            let (mut rest, mut found) = (range, None);
            while !rest.is_empty() {
                let (here, later) = rest.split(cluster - (rest.start() & (cluster - 1)));
                let entry = layout.get(words, layout.entry_in_slice(here.start()));
                layout.check(entry).ok()?;
                let How::InPlace(host) = how(layout, entry, here) else { return found };
                let (first, len) = *found.get_or_insert((host, 0));
                if host != first + len {
                    return found;
                }
                found = Some((first, len + here.len()));
                rest = later;
            }
            found
        })?
    }

    /// Whether a write to `range` has to copy much more than it brings.
    pub(crate) fn copies_much(&self, cx: &Cx<'_>, range: ByteRange) -> bool {
        let whole = range.align_out(self.layout.cluster()).before(self.size().max(range.end()));
        if whole.len() - range.len() < MUCH {
            return false;
        }
        match self.map_now(whole).map(|extent| extent.place) {
            Some(Place::Below) => cx.backing().is_some(),
            Some(Place::Encoded) => true,
            _ => false,
        }
    }

    /// Writes, whatever it takes.
    pub(crate) async fn write_allocating(&self, cx: &Cx<'_>, range: ByteRange, from: Iov) -> Result<()> {
        {
            let _turn = self.ranges.lock(range.align_out(self.layout.cluster()), Mode::Exclusive).await;
            self.write_held(cx, range, from).await?;
        }
        self.relieve(cx).await
    }

    /// Writes inside one slice. The clusters are the caller's alone.
    async fn write_in_slice(&self, cx: &Cx<'_>, range: ByteRange, from: Iov) -> Result<()> {
        self.ensure_table(cx, range.start()).await?;
        let (mut rest, mut done) = (range, 0);
        while !rest.is_empty() {
            let entries = self.entries(cx, rest).await?;
            let (how, part) = first_part(&self.layout, &entries, rest);
            let data = from.slice(done, part.buffer_len());
            match how {
                How::InPlace(host) => self.write_in_place(cx, host, data).await?,
                _ => self.write_new(cx, how, &entries, part, data).await?,
            }
            done += part.buffer_len();
            rest = rest.split(part.len()).1;
        }
        Ok(())
    }

    /// Writes to own clusters.
    pub(crate) async fn write_in_place(&self, cx: &Cx<'_>, host: u64, from: Iov) -> Result<()> {
        self.check_data_place(cx, host, from.len() as u64).await?;
        let range = ByteRange::new(host, from.len() as u64).ok_or(IoError::EFBIG)?;
        cx.below().write(range, from, WriteFlags::default()).await
    }

    /// Writes `data` to clusters that get it now, and links it.
    async fn write_new(
        &self,
        cx: &Cx<'_>,
        how: How,
        entries: &[Entry],
        part: ByteRange,
        data: Iov,
    ) -> Result<()> {
        let cluster = self.layout.cluster();
        let outer = part.align_out(cluster);
        let count = outer.len() >> self.layout.cluster_bits;
        let entries = &entries[..entries.len().min(usize::try_from(count).map_err(|_| IoError::EFBIG)?)];
        let whole = with_copies(&self.layout, how, entries, part);
        let (host, fresh) = match how {
            How::Reuse(host) => {
                self.check_data_place(cx, host, outer.len()).await?;
                (host, false)
            }
            _ => {
                let new = match self.reserved.take(outer.start(), count) {
                    Some(reserved) => reserved,
                    None => self.alloc_clusters(cx, count).await?,
                };
                (new.host, new.fresh)
            }
        };
        let place = |at: u64| host + (at - outer.start());
        if let Err(error) = self.write_with_copies(cx, whole, part, data, fresh, place(whole.start())).await {
            if how == How::New {
                self.return_new(cx, host, count, fresh && error.is_no_space()).await;
            }
            return Err(error);
        }
        let old = self.link(cx, whole, outer, host, how == How::New).await?;
        for entry in old {
            self.drop_entry(entry, false);
        }
        Ok(())
    }

    /// Writes `whole` to `host`: `data` for `part` of it, and around that what reads there now.
    async fn write_with_copies(
        &self,
        cx: &Cx<'_>,
        whole: ByteRange,
        part: ByteRange,
        data: Iov,
        fresh: bool,
        host: u64,
    ) -> Result<()> {
        let head = self.content(cx, ByteRange::between(whole.start(), part.start())).await?;
        let tail = self.content(cx, ByteRange::between(part.end(), whole.end())).await?;
        let mut all = Iov::default();
        let mut at = host;
        let around = |content: Content, len: u64, all: &mut Iov| match content {
            Content::Bytes(bytes) => {
                all.append(bytes);
                true
            }
            // What has never been written to reads as zeroes already.
            Content::Zero if fresh => false,
            Content::Zero => {
                all.append(Iov::zeroed(usize::try_from(len).unwrap_or(0)));
                true
            }
        };
        let head_len = part.start() - whole.start();
        if head_len > 0 && !around(head, head_len, &mut all) {
            at += head_len;
        }
        all.append(data);
        let tail_len = whole.end() - part.end();
        let ends_early = tail_len > 0 && !around(tail, tail_len, &mut all);
        let range = ByteRange::new(at, all.len() as u64).ok_or(IoError::EFBIG)?;
        if whole != part && cx.below().limits().memory_alignment > 1 {
            // Pieces of any length do not go with O_DIRECT.
            let together = Iov::scratch(all.len());
            together.copy_from(&all);
            all = together;
        }
        cx.below().write(range, all, WriteFlags::default()).await?;
        if ends_early {
            self.data_end.fetch_max(host + whole.len(), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Gives back new clusters that could not be written; `emptied`, with the space that some of them have got
    /// meanwhile: on a full disk it may be all that there was.
    async fn return_new(&self, cx: &Cx<'_>, host: u64, count: u64, emptied: bool) {
        if emptied
            && let Some(range) = ByteRange::new(host, count << self.layout.cluster_bits)
            && let Err(error) = cx.below().discard(range).await
        {
            tracing::debug!(%error, "the file keeps the space of clusters that could not be written");
        }
        self.free_unused(cx, host, count).await;
    }

    /// What the guest reads in `range` now.
    async fn content(&self, cx: &Cx<'_>, range: ByteRange) -> Result<Content> {
        if self.reads_zero(cx, range).await? {
            return Ok(Content::Zero);
        }
        let bytes = Iov::scratch(range.buffer_len());
        underlay_graph::format::read(cx, range, bytes.clone()).await?;
        Ok(if bytes.is_zero() { Content::Zero } else { Content::Bytes(bytes) })
    }

    /// Whether this image alone tells that `range` reads as zeroes.
    pub(crate) async fn reads_zero(&self, cx: &Cx<'_>, range: ByteRange) -> Result<bool> {
        let below = cx.backing().map_or(0, |backing| backing.length());
        let mut rest = range.before(self.size());
        while !rest.is_empty() {
            let extent = match self.map_now(rest) {
                Some(extent) => extent,
                None => self.map_slow(cx, rest).await?,
            };
            match extent.place {
                Place::Zero => {}
                Place::Below if rest.start() >= below => {}
                _ => return Ok(false),
            }
            rest = rest.split(extent.len).1;
        }
        Ok(true)
    }

    /// The clusters of `outer` live at `host` from now on, with data in `whole`. Gives the entries whose clusters (or
    /// compressed extents) they replace.
    async fn link(
        &self,
        cx: &Cx<'_>,
        whole: ByteRange,
        outer: ByteRange,
        host: u64,
        new: bool,
    ) -> Result<Vec<Entry>> {
        let layout = self.layout;
        let cluster = layout.cluster();
        self.update_slice(cx, outer.start(), |words| {
            let mut replaced = Vec::new();
            let mut at = outer.start();
            while at < outer.end() {
                let index = layout.entry_in_slice(at);
                let old = layout.get(words, index);
                let mut entry = layout.data(host + (at - outer.start()));
                if layout.extended {
                    let from = whole.start().max(at) - at;
                    let to = (whole.end().min(at + cluster) - at).next_multiple_of(layout.sub());
                    let mask = sub_mask(layout.sub_bits(), from, to);
                    let before = if old.word & COMPRESSED != 0 { 0 } else { old.map };
                    entry.map = (before | mask) & !(mask << 32);
                }
                if new && (old.word & COMPRESSED != 0 || layout.host(old) != 0) {
                    replaced.push(old);
                }
                layout.set(words, index, entry);
                at += cluster;
            }
            replaced
        })
        .await
    }

    /// The fast way of a write, if all of it may go so: in place, runs that are apart side by side.
    pub(crate) async fn write_fast(&self, cx: &Cx<'_>, range: ByteRange, from: &Iov) -> Option<Result<()>> {
        let _lease = self.hold();
        let (host, len) = self.own_now(range)?;
        if len == range.len() {
            return Some(self.write_in_place(cx, host, from.clone()).await);
        }
        let mut runs = vec![(host, len)];
        let mut rest = range.split(len).1;
        while !rest.is_empty() {
            let (host, len) = self.own_now(rest)?;
            runs.push((host, len));
            rest = rest.split(len).1;
        }
        let mut done = 0;
        let mut write = |(host, len): (u64, u64)| -> Pin<Box<dyn Future<Output = Result<()>> + Send + '_>> {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            let data = from.slice(done, len);
            done += len;
            Box::pin(self.write_in_place(cx, host, data))
        };
        for group in runs.chunks(PARALLEL) {
            if let Err(error) = join(group.iter().map(|run| write(*run)).collect()).await {
                return Some(Err(error));
            }
        }
        Some(Ok(()))
    }

    /// The same as [`Qcow2::write_allocating`] without taking the clusters: they are the caller's already.
    pub(crate) async fn write_held(&self, cx: &Cx<'_>, range: ByteRange, from: Iov) -> Result<()> {
        let (mut rest, mut done) = (range, 0);
        while !rest.is_empty() {
            let (here, later) = rest.split(self.in_slice(rest).len());
            self.write_in_slice(cx, here, from.slice(done, here.buffer_len())).await?;
            done += here.buffer_len();
            rest = later;
        }
        Ok(())
    }
}

/// What a guest reads somewhere.
enum Content {
    Zero,
    Bytes(Iov),
}

//! Emptying an image: what `commit` does to one whose data has gone to the image below.
//!
//! What is left is what QEMU leaves: header, refcount table, one refcount block and an L1 table without entries, in
//! this order at the beginning of the file, and the file ends there. None of that may be overwritten while the header
//! still names what is there now, so the image moves twice, each time by one write of the first sector:
//!
//! 1. the same structures go to clusters that are free, away from where they shall be in the end; flush;
//! 2. the header names them: the image is empty; flush;
//! 3. they go to their places at the beginning, where nothing is in use any more but the header; flush;
//! 4. the header names those; flush; and the rest of the file is cut off.
//!
//! A power cut leaves the image as it was or empty. Where all that cannot be done, every entry is removed instead and
//! the file keeps its length: version 2, bitmaps, an L1 table so long that one refcount block would not count
//! everything, a full disk.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use underlay_graph::{ByteRange, Cx, IoError, Preallocation, Result, WriteFlags};
use underlay_sys::Iov;

use crate::frees::Frees;
use crate::header::{Header, MAX_REFCOUNT_TABLE_BYTES, Version};
use crate::live::Qcow2;
use crate::refblocks;

/// Where the header's fields are that say where the tables are: L1 u64, refcount table u64 and its clusters u32.
const PLACES: u64 = 40;

/// The structures of an image without content, in clusters that follow each other: refcount table, blocks, L1 table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bare {
    /// Number of the first cluster.
    start: u64,
    table: u64,
    /// Which blocks there are: that of the header, and those of these clusters.
    blocks: Vec<u64>,
    l1: u64,
}

impl Bare {
    /// With the first cluster at `start`. `None` if the refcount table would be too long.
    fn at(header: &Header, start: u64) -> Option<Self> {
        let per_block = header.refcounts_per_block();
        let l1 = header.l1_bytes().div_ceil(header.cluster_size());
        let mut bare = Self { start, table: 1, blocks: vec![0], l1 };
        loop {
            let (first, last) = (start / per_block, (bare.end() - 1) / per_block);
            let table = ((last + 1) * 8).div_ceil(header.cluster_size());
            if table * header.cluster_size() > MAX_REFCOUNT_TABLE_BYTES {
                return None;
            }
            let blocks: Vec<_> = (0..1).chain(first.max(1)..last + 1).collect();
            let next = Self { table, blocks, ..bare.clone() };
            if next == bare {
                return Some(bare);
            }
            bare = next;
        }
    }

    /// As many clusters as it can take up anywhere in front of `far`: there the refcount table is shorter, but two more
    /// blocks may be touched.
    fn longest(header: &Header, far: u64) -> Option<u64> {
        Some(Self::at(header, far)?.len() + 2)
    }

    fn len(&self) -> u64 {
        self.table + self.blocks.len() as u64 + self.l1
    }

    fn end(&self) -> u64 {
        self.start + self.len()
    }

    /// Everything as it goes to the file.
    fn content(&self, header: &Header) -> Result<Vec<u8>> {
        let (cluster, per_block) = (header.cluster_size(), header.refcounts_per_block());
        let index = |at: u64| usize::try_from(at).map_err(|_| IoError::EFBIG);
        let mut bytes = vec![0; index(self.len() * cluster)?];
        for (number, block) in self.blocks.iter().enumerate() {
            let at = self.table + number as u64;
            let entry = index(block * 8)?;
            bytes[entry..entry + 8].copy_from_slice(&((self.start + at) * cluster).to_be_bytes());
            let counts = &mut bytes[index(at * cluster)?..index((at + 1) * cluster)?];
            let used = (0..1).chain(self.start..self.end()).filter(|used| used / per_block == *block);
            used.for_each(|used| refblocks::set(counts, used % per_block, header.refcount_order, 1));
        }
        Ok(bytes)
    }

    /// Writes everything; durable on return.
    async fn write(&self, file: &Cx<'_>, header: &Header) -> Result<()> {
        let content = self.content(header)?;
        let at = self.start * header.cluster_size();
        let range = ByteRange::new(at, content.len() as u64).ok_or(IoError::EFBIG)?;
        file.write(range, Iov::copy_of(&content), WriteFlags::default()).await?;
        file.flush().await
    }

    /// Makes the header name this; durable on return.
    async fn take_over(&self, file: &Cx<'_>, header: &Header) -> Result<()> {
        let cluster = header.cluster_size();
        let l1 = (self.end() - self.l1) * cluster;
        let table = u32::try_from(self.table).map_err(|_| IoError::EFBIG)?;
        let mut fields = [l1, self.start * cluster].map(u64::to_be_bytes).concat();
        fields.extend(table.to_be_bytes());
        let range = ByteRange::between(PLACES, PLACES + fields.len() as u64);
        file.write(range, Iov::copy_of(&fields), WriteFlags::default()).await?;
        file.flush().await
    }
}

impl Qcow2 {
    /// See [`underlay_graph::Node::make_empty`]. An error after which nobody knows what is on disk makes the image
    /// unusable.
    pub(crate) async fn empty(&self, cx: &Cx<'_>) -> Result<()> {
        self.begin_change(cx).await?;
        self.settle(cx).await?;
        let header = self.header();
        let end = Bare::at(&header, 1).filter(|end| end.blocks.len() == 1 && end.table == 1);
        let own = header.version >= Version::V3
            && header.snapshots == 0
            && header.extensions.bitmaps.is_none()
            && header.extensions.unknown.is_empty();
        let moved = match end.filter(|_| own) {
            Some(end) => self.start_anew(cx, &header, &end).await?,
            None => false,
        };
        if !moved {
            let end = self.size().next_multiple_of(self.layout.cluster());
            self.unmap(cx, ByteRange::between(0, end)).await?;
            self.settle(cx).await?;
        }
        Ok(())
    }

    /// Moves the image to `end`, as the module says. Whether that was possible.
    async fn start_anew(&self, cx: &Cx<'_>, header: &Header, end: &Bare) -> Result<bool> {
        let file = cx.below();
        let Some(way) = self.place_on_the_way(cx, header, end).await? else { return Ok(false) };
        if let Err(error) = way.write(&file, header).await {
            self.free_unused(cx, way.start << self.layout.cluster_bits, way.len()).await;
            return if error.is_no_space() { Ok(false) } else { Err(error) };
        }
        let moved = async {
            way.take_over(&file, header).await?;
            end.write(&file, header).await?;
            end.take_over(&file, header).await?;
            // What is behind that nobody needs; it stays where it cannot be given back.
            let len = end.end() << self.layout.cluster_bits;
            if let Err(error) = file.node().resize(&file, len, Preallocation::Off).await {
                tracing::debug!(%error, "the file stays as long as it was");
            }
            self.data_end.store(0, Ordering::Relaxed);
            *self.frees() = Frees::default();
            *self.decoded.lock().unwrap_or_else(PoisonError::into_inner) = None;
            self.read_again(cx).await
        };
        if let Err(error) = moved.await {
            self.give_up();
            return Err(error);
        }
        self.collect_metadata(cx).await;
        Ok(true)
    }

    /// Free clusters for everything, behind those of `end`; they are taken, for this image as it still is. `None` if
    /// there are none.
    async fn place_on_the_way(&self, cx: &Cx<'_>, header: &Header, end: &Bare) -> Result<Option<Bare>> {
        // It will not be farther away than that.
        let far = self.refcounts.end().saturating_mul(2).max(end.end());
        let Some(longest) = Bare::longest(header, far) else { return Ok(None) };
        let mut in_the_way = Vec::new();
        let found = loop {
            match self.alloc_clusters(cx, longest).await {
                Err(error) => break Err(error),
                Ok(run) if run.host >= end.end() << self.layout.cluster_bits => break Ok(run.host),
                Ok(run) => in_the_way.push(run.host),
            }
        };
        for host in in_the_way {
            self.free_unused(cx, host, longest).await;
        }
        let host = match found {
            Ok(host) => host,
            Err(error) if error.is_no_space() => return Ok(None),
            Err(error) => return Err(error),
        };
        let bare = Bare::at(header, host >> self.layout.cluster_bits).filter(|bare| bare.len() <= longest);
        let used = bare.as_ref().map_or(0, Bare::len);
        self.free_unused(cx, host + (used << self.layout.cluster_bits), longest - used).await;
        Ok(bare)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::Shape;

    #[test]
    fn it_is_never_longer_than_expected_and_counts_itself() {
        for (bits, order, l1_entries) in [(9, 6, 32), (9, 6, 6400), (9, 4, 20_000), (12, 6, 1000)] {
            let shape = Shape { bits, order, extended: false, v3: true, zstd: false, size: 1 << 20 };
            let header = Header::parse(&shape.image(false)).expect("a header");
            let header = Header { l1_entries, ..header };
            for far in [400, 4000, 40_000] {
                let longest = Bare::longest(&header, far).expect("not too far");
                for start in (1..far).step_by(1 + usize::try_from(far / 400).expect("small")) {
                    let bare = Bare::at(&header, start).expect("not too far");
                    assert!(bare.len() <= longest, "{shape:?} {start} {far}: {bare:?} {longest}");
                    let per_block = header.refcounts_per_block();
                    let counted = (bare.start..bare.end()).all(|at| bare.blocks.contains(&(at / per_block)));
                    assert!(counted && bare.blocks[0] == 0, "{bare:?}");
                }
            }
        }
    }
}

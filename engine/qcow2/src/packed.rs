//! Compressed clusters in the image: reading them, and writing them one behind the other.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use underlay_graph::range_lock::Mode;
use underlay_graph::{ByteRange, Cx, IoError, Result, WriteFlags};
use underlay_sys::{Iov, rt};

use crate::compress::{Decoded, compress, decompress};
use crate::entry::{COMPRESSED, Entry};
use crate::live::Qcow2;

/// Bytes in which the length of compressed data is told. Source: qcow2.rst, "Compressed Clusters Descriptor".
const SECTOR: u64 = 512;

impl Qcow2 {
    fn decoded(&self) -> MutexGuard<'_, Option<Decoded>> {
        self.decoded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads `range`, which lies (or did, when the caller looked) in compressed clusters.
    pub(crate) async fn read_packed(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        let mut rest = range;
        let mut done = 0;
        while !rest.is_empty() {
            let cluster = self.layout.cluster();
            let (here, later) = rest.split(cluster - (rest.start() & (cluster - 1)));
            let target = into.slice(done, here.buffer_len());
            let entry = self.entry_at(cx, here.start()).await?;
            if entry.word & COMPRESSED == 0 {
                // Somebody has written to it meanwhile.
                underlay_graph::format::read(cx, here, target).await?;
            } else {
                let bytes = self.unpack(cx, entry).await?;
                let skip = usize::try_from(here.start() & (cluster - 1)).map_err(|_| IoError::EIO)?;
                target.write_at(0, &bytes[skip..skip + target.len()]);
            }
            done += here.buffer_len();
            rest = later;
        }
        Ok(())
    }

    /// The content of a compressed cluster.
    async fn unpack(&self, cx: &Cx<'_>, entry: Entry) -> Result<Arc<[u8]>> {
        if let Some(found) = self.decoded().as_ref().filter(|found| found.word == entry.word) {
            return Ok(found.bytes.clone());
        }
        let packed = self.layout.packed(entry);
        let range = ByteRange::new(packed.offset, packed.len).ok_or(IoError::EIO)?;
        let buffer = Iov::scratch(range.buffer_len());
        cx.below().read(range, buffer.clone()).await?;
        let how = self.header_mut().compression;
        let len = usize::try_from(self.layout.cluster()).map_err(|_| IoError::EIO)?;
        let bytes: Arc<[u8]> =
            rt::spread(async move { decompress(how, &buffer.to_vec(), len) }).await?.into();
        *self.decoded() = Some(Decoded { word: entry.word, bytes: bytes.clone() });
        Ok(bytes)
    }

    /// Stores whole clusters (or the tail of the disk) compressed, each as a normal cluster when that is not smaller.
    pub(crate) async fn write_packed(&self, cx: &Cx<'_>, range: ByteRange, from: Iov) -> Result<()> {
        let cluster = self.layout.cluster();
        let is_tail = range.end() == self.size();
        if !range.start().is_multiple_of(cluster) || !(range.end().is_multiple_of(cluster) || is_tail) {
            return Err(IoError::EINVAL.with("Compressed writes must cover whole clusters"));
        }
        let mut rest = range;
        let mut done = 0;
        while !rest.is_empty() {
            let (here, later) = rest.split(cluster);
            self.write_packed_cluster(cx, here, from.slice(done, here.buffer_len())).await?;
            done += here.buffer_len();
            rest = later;
        }
        Ok(())
    }

    async fn write_packed_cluster(&self, cx: &Cx<'_>, here: ByteRange, from: Iov) -> Result<()> {
        let how = self.header_mut().compression;
        let mut bytes = from.to_vec();
        bytes.resize(usize::try_from(self.layout.cluster()).map_err(|_| IoError::EINVAL)?, 0);
        let Some(packed) = compress(how, &bytes)? else {
            return self.write_allocating(cx, here, from).await;
        };
        let _turn = self.ranges.lock(here.align_out(self.layout.cluster()), Mode::Exclusive).await;
        self.ensure_table(cx, here.start()).await?;
        self.entries(cx, here).await?;
        let offset = self.alloc_packed(cx, packed.len() as u64).await?;
        let Some(entry) = self.layout.pack(offset, packed.len() as u64) else {
            return Err(IoError::EFBIG);
        };
        let place = ByteRange::new(offset, packed.len() as u64).ok_or(IoError::EFBIG)?;
        if let Err(error) = cx.below().write(place, Iov::copy_of(&packed), WriteFlags::default()).await {
            self.free_packed(cx, entry).await;
            return Err(error);
        }
        self.data_end.fetch_max(place.end().next_multiple_of(SECTOR), Ordering::Relaxed);
        *self.decoded() = None;
        let layout = self.layout;
        let index = layout.entry_in_slice(here.start());
        let swap = |words: &mut [u64]| {
            let old = layout.get(words, index);
            layout.set(words, index, entry);
            old
        };
        let old = self.update_slice(cx, here.start(), swap).await?;
        self.drop_entry(old, false);
        drop(_turn);
        self.relieve(cx).await
    }

    /// Finds `len` bytes for a compressed cluster: behind the last one while its host cluster has room, or runs over
    /// into a new cluster that follows directly, or at the start of a new one. Each cluster it touches counts one
    /// reference for it.
    async fn alloc_packed(&self, cx: &Cx<'_>, len: u64) -> Result<u64> {
        let bits = self.layout.cluster_bits;
        let _turn = self.packing.lock().await;
        let at = self.refcounts.state().packed;
        if at != 0
            && (at & (self.layout.cluster() - 1)) + len <= self.layout.cluster()
            && self.share(cx, at).await?
        {
            self.packed_until(at + len);
            return Ok(at);
        }
        let host = self.alloc_clusters(cx, 1).await?.host;
        // It may have been given free meanwhile.
        let at = self.refcounts.state().packed;
        if at != 0 && (at >> bits) + 1 == host >> bits {
            match self.share(cx, at).await {
                Ok(true) => {
                    self.packed_until(at + len);
                    return Ok(at);
                }
                Ok(false) => {}
                Err(error) => {
                    self.free_unused(cx, host, 1).await;
                    return Err(error);
                }
            }
        }
        self.packed_until(host + len);
        Ok(host)
    }

    /// One reference more for the cluster that is being filled; false when it cannot have one.
    async fn share(&self, cx: &Cx<'_>, at: u64) -> Result<bool> {
        let cluster = at >> self.layout.cluster_bits;
        loop {
            if let Some(shared) = self.refcounts.raise_used(cluster) {
                return Ok(shared);
            }
            self.refcount(cx, cluster).await?;
        }
    }

    /// The next compressed cluster may go here, unless this is the end of a host cluster.
    fn packed_until(&self, end: u64) {
        let full = end & (self.layout.cluster() - 1) == 0;
        self.refcounts.state().packed = if full { 0 } else { end };
    }

    async fn free_packed(&self, cx: &Cx<'_>, entry: Entry) {
        let (first, count) = self.layout.clusters_of(entry);
        self.free_unused(cx, first << self.layout.cluster_bits, count).await;
    }
}

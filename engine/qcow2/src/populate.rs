//! Copying from the backing file what the image still borrows, beside a guest that writes.

use underlay_graph::range_lock::Mode;
use underlay_graph::status::status;
use underlay_graph::{ByteRange, Cx, Place, Result, ZeroFlags};
use underlay_sys::Iov;

use crate::live::Qcow2;

/// Most bytes that are copied while a range is held. Guest writes to the range wait that long.
const CHUNK: u64 = 4 << 20;

impl Qcow2 {
    /// Makes the range independent of the backing node: data is copied, what reads as zero down there becomes zero.
    pub(crate) async fn copy_up(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        let cluster = self.layout.cluster();
        let mut rest = range.align_out(cluster).before(self.size());
        while !rest.is_empty() {
            let extent = self.map_slow(cx, rest).await?;
            if extent.place != Place::Below {
                rest = rest.split(extent.len).1;
                continue;
            }
            let (chunk, later) = rest.split(extent.len);
            let (chunk, more) = chunk.split(CHUNK.max(cluster) - (chunk.start() & (cluster - 1)));
            {
                let _turn = self.ranges.lock(chunk.align_out(cluster), Mode::Exclusive).await;
                self.copy_up_held(cx, chunk).await?;
            }
            self.relieve(cx).await?;
            rest = ByteRange::between(if more.is_empty() { later.start() } else { more.start() }, rest.end());
        }
        Ok(())
    }

    /// The same for a range that is the caller's alone.
    async fn copy_up_held(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let extent = self.map_slow(cx, rest).await?;
            let (here, later) = rest.split(extent.len);
            if extent.place == Place::Below {
                self.copy_up_run(cx, here).await?;
            }
            rest = later;
        }
        Ok(())
    }

    /// The same for a range that is all below.
    async fn copy_up_run(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        let sub = self.layout.sub();
        let Some(backing) = cx.backing() else { return Ok(()) };
        let mut rest = range;
        while !rest.is_empty() {
            // How far the backing reads as zero, and then how far it does not, in whole subclusters.
            let (zero, len) = zero_run(&backing, rest).await?;
            let at_end = len == rest.len();
            let len = match (zero, at_end) {
                (_, true) => len,
                (true, false) => (rest.start() + len) / sub * sub - rest.start(),
                (false, false) => (rest.start() + len).next_multiple_of(sub) - rest.start(),
            };
            if zero && self.layout.v3 && len > 0 {
                let (here, later) = rest.split(len);
                self.hide_held(cx, here).await?;
                rest = later;
                continue;
            }
            let (here, later) = rest.split(if len == 0 { sub } else { len });
            let bytes = Iov::scratch(here.buffer_len());
            backing.read(here, bytes.clone()).await?;
            self.write_held(cx, here, bytes).await?;
            rest = later;
        }
        Ok(())
    }

    /// Marks what is below as zero. The range is the caller's alone.
    async fn hide_held(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let (here, later) = rest.split(self.in_slice(rest).len());
            self.zero_held(cx, here, ZeroFlags::default()).await?;
            rest = later;
        }
        Ok(())
    }
}

/// Whether the first bytes of `range` read as zeroes in `backing`, and for how many bytes that holds. Data is one run
/// up to the next zeroes, so that it is copied in large pieces.
async fn zero_run(backing: &Cx<'_>, range: ByteRange) -> Result<(bool, u64)> {
    let mut rest = range;
    let mut first = None;
    while !rest.is_empty() {
        let (zero, len) = match rest.start() >= backing.length() {
            true => (true, rest.len()),
            false => {
                let found = status(backing, rest.before(backing.length()), None).await?;
                (found.zero, found.len)
            }
        };
        if first.is_some_and(|first| first != zero) {
            break;
        }
        first = Some(zero);
        rest = rest.split(len).1;
    }
    Ok((first.unwrap_or(true), range.len() - rest.len()))
}

//! Changing what an image says of itself: which version's rules it follows, and lazy refcounts.
//!
//! Version 3 can say all that version 2 can, so going up is one rewrite of the header. Going down takes out first what
//! version 2 has no words for: clusters that are zero by their entry alone. Until the header is rewritten the image is
//! a good one of version 3, after it a good one of version 2.

use underlay_graph::{ByteRange, Cx, IoError, Node, Place, Result, WriteFlags};
use underlay_sys::Iov;

use crate::features;
use crate::header::Version;
use crate::live::Qcow2;
use crate::update::{write_features, write_header};

/// Zeroes written at a time, in bytes.
const PIECE: u64 = 1 << 20;

impl Qcow2 {
    /// Has the image follow the rules of `version` from now on. An image that does another one's is to be closed then:
    /// this one goes on as what it was opened as. Whoever writes to it meanwhile is not supported.
    pub async fn change_version(&self, cx: &Cx<'_>, version: Version) -> Result<()> {
        let old = self.header();
        if old.version == version {
            return Ok(());
        }
        if version == Version::V2 {
            self.check_version_2_can_say_it()?;
        }
        self.begin_change(cx).await?;
        if version == Version::V2 {
            self.spell_out_zeroes(cx).await?;
        }
        // The new header is about what is on disk.
        self.settle(cx).await?;
        let _turn = self.header_turn.lock().await;
        let mut header = self.header();
        header.version = version;
        if version == Version::V2 {
            (header.compatible, header.autoclear) = (0, 0);
            header.unknown_fields.clear();
        }
        write_header(&cx.below(), &header).await?;
        *self.header_mut() = header;
        Ok(())
    }

    /// Sets or clears the wish for lazy refcounts.
    pub async fn set_lazy_refcounts(&self, cx: &Cx<'_>, lazy: bool) -> Result<()> {
        if self.header().lazy_refcounts() == lazy {
            return Ok(());
        }
        self.begin_change(cx).await?;
        let _turn = self.header_turn.lock().await;
        let mut header = self.header();
        header.compatible ^= features::LAZY_REFCOUNTS;
        write_features(&cx.below(), &header).await?;
        *self.header_mut() = header;
        Ok(())
    }

    /// Refuses images that make use of what only version 3 has.
    fn check_version_2_can_say_it(&self) -> Result<()> {
        let header = self.header();
        let refused = |text: String| Err(IoError::ENOTSUP.with(text));
        if header.refcount_order != 4 {
            return refused("compat=0.10 requires refcount_bits=16".to_owned());
        }
        if header.incompatible != 0 {
            let bits = header.incompatible;
            return refused(format!("Cannot downgrade an image with incompatible features {bits:#x} set"));
        }
        if header.extensions.bitmaps.is_some() || header.extensions.is_tied() {
            return refused("Cannot downgrade an image with persistent bitmaps".to_owned());
        }
        if header.snapshots > 0 {
            // Their tables would have to be looked through, too.
            return refused("Cannot downgrade an image with internal snapshots".to_owned());
        }
        Ok(())
    }

    /// Leaves no cluster that is zero by its entry alone.
    async fn spell_out_zeroes(&self, cx: &Cx<'_>) -> Result<()> {
        let cluster = self.layout.cluster();
        let mut rest = ByteRange::between(0, self.size());
        while !rest.is_empty() {
            let extent = self.map(cx, rest).await?;
            let (mut run, after) = rest.split(extent.len);
            rest = after;
            if extent.place != Place::Zero {
                continue;
            }
            if extent.kept.is_none() && !self.has_backing(cx) {
                self.unmap(cx, run.align_out(cluster)).await?;
                continue;
            }
            while !run.is_empty() {
                let (piece, more) = run.split(PIECE);
                self.write(cx, piece, Iov::zeroed(piece.buffer_len()), WriteFlags::default()).await?;
                run = more;
            }
        }
        Ok(())
    }
}

//! The image as a node of the graph.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use underlay_graph::bitmaps::BitmapStore;
use underlay_graph::format::Lease;
use underlay_graph::info::ImageInfo;
use underlay_graph::perm::Access;
use underlay_graph::{
    BackingRef, ByteRange, Cx, Extent, Format, Kind, Limits, Node, Preallocation, Result, View, WriteFlags,
    ZeroFlags,
};
use underlay_sys::Iov;

use crate::info::image_info;
use crate::live::Qcow2;
use crate::update::write_header;

#[async_trait]
impl Node for Qcow2 {
    fn driver(&self) -> &'static str {
        "qcow2"
    }

    fn kind(&self) -> Kind {
        Kind::Format
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn length(&self, _cx: &Cx<'_>) -> u64 {
        self.size()
    }

    fn unwritten_is_zero(&self, _cx: &Cx<'_>) -> bool {
        // What is preallocated is zeroed where it has to be.
        true
    }

    fn limits(&self, _cx: &Cx<'_>) -> Limits {
        let preferred_zero = u32::try_from(self.layout.sub()).unwrap_or(0);
        Limits { preferred_zero, ..Limits::default() }
    }

    fn as_format(&self) -> Option<&dyn Format> {
        Some(self)
    }

    fn as_bitmap_store(&self) -> Option<&dyn BitmapStore> {
        Some(self)
    }

    async fn read(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        self.usable()?;
        underlay_graph::format::read(cx, range, into).await
    }

    async fn write(&self, cx: &Cx<'_>, range: ByteRange, from: Iov, flags: WriteFlags) -> Result<()> {
        self.begin_change(cx).await?;
        if range.is_empty() {
            return Ok(());
        }
        if flags.compressed {
            return self.write_packed(cx, range, from).await;
        }
        match self.write_fast(cx, range, &from).await {
            Some(written) => written,
            None if self.copies_much(cx, range) => {
                let write = |view: Arc<View>| async move {
                    let cx = view.cx();
                    let image = cx.node().as_any().downcast_ref::<Self>();
                    image.expect("the view is of this image").write_allocating(&cx, range, from).await
                };
                cx.spread(write).await
            }
            None => self.write_allocating(cx, range, from).await,
        }
    }

    async fn write_zeroes(&self, cx: &Cx<'_>, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.begin_change(cx).await?;
        self.zero(cx, range, flags).await
    }

    async fn discard(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        self.begin_change(cx).await?;
        self.forget(cx, range).await
    }

    async fn flush(&self, cx: &Cx<'_>) -> Result<()> {
        if self.is_writable() { self.commit(cx).await } else { cx.below().flush().await }
    }

    fn map_now(&self, _cx: &Cx<'_>, range: ByteRange) -> Option<Extent> {
        self.map_fully_now(range)
    }

    async fn map(&self, cx: &Cx<'_>, range: ByteRange) -> Result<Extent> {
        self.map_fully(cx, range).await
    }

    fn map_ahead(&self, _cx: &Cx<'_>, range: ByteRange, more: &mut Vec<Extent>) {
        self.map_slice(range, more);
    }

    async fn populate(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        self.begin_change(cx).await?;
        self.copy_up(cx, range).await
    }

    async fn set_access(&self, cx: &Cx<'_>, access: Access) -> Result<()> {
        if access.writable {
            self.become_writable(cx).await
        } else if self.is_writable() {
            self.finish(cx).await?;
            self.become_read_only();
            Ok(())
        } else {
            Ok(())
        }
    }

    async fn close(&self, cx: &Cx<'_>) -> Result<()> {
        if self.is_writable() && self.usable().is_ok() { self.finish(cx).await } else { Ok(()) }
    }

    async fn resize(&self, cx: &Cx<'_>, size: u64, preallocation: Preallocation) -> Result<()> {
        self.change_size(cx, size, preallocation).await
    }

    fn image_info(&self) -> ImageInfo {
        image_info(&self.header(), &self.stored().directory(), &self.snapshots())
    }

    fn is_unusable(&self) -> bool {
        self.usable().is_err()
    }

    fn supports_backing(&self) -> bool {
        true
    }

    fn backing_ref(&self) -> Option<BackingRef> {
        self.header_mut().backing_ref()
    }

    fn can_be_emptied(&self) -> bool {
        true
    }

    async fn make_empty(&self, cx: &Cx<'_>) -> Result<()> {
        self.empty(cx).await
    }

    async fn set_backing_ref(&self, cx: &Cx<'_>, backing: Option<BackingRef>) -> Result<()> {
        self.begin_change(cx).await?;
        // The image must not rely on anything in memory once its note says something else.
        self.commit(cx).await?;
        let _turn = self.header_turn.lock().await;
        let mut header = self.header();
        header.set_backing_ref(backing);
        write_header(&cx.below(), &header).await?;
        *self.header_mut() = header;
        Ok(())
    }
}

#[async_trait]
impl Format for Qcow2 {
    fn map_cached(&self, range: ByteRange) -> Option<Extent> {
        self.map_now(range)
    }

    async fn read_encoded(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        self.read_packed(cx, range, into).await
    }

    fn lease(&self) -> Option<Lease> {
        Some(self.hold())
    }
}

impl Qcow2 {
    /// Writes everything back, also what the last commit gave free.
    pub(crate) async fn settle(&self, cx: &Cx<'_>) -> Result<()> {
        self.give_back_reserved(cx).await;
        self.commit(cx).await?;
        // A commit may leave lowered refcounts to write, whose blocks may have to be loaded, and so on: two more
        // suffice unless somebody still works on the image.
        for _ in 0..3 {
            if !self.is_behind() {
                break;
            }
            self.until_reclaimable().await;
            self.reclaim(cx).await;
            self.commit(cx).await?;
        }
        Ok(())
    }
    /// Nobody writes for now.
    async fn finish(&self, cx: &Cx<'_>) -> Result<()> {
        self.settle(cx).await?;
        self.fill_up(cx).await;
        Ok(())
    }

    /// Has the file end where its last data cluster does, or the sector of its last compressed data: there are readers
    /// who take it for damaged otherwise. We are none of them, so that it does not matter where that is not possible.
    async fn fill_up(&self, cx: &Cx<'_>) {
        let file = cx.below();
        let end = self.data_end.swap(0, Ordering::Relaxed);
        // A length may be told in whole sectors already that the file does not have.
        if file.length() <= end {
            let _ = file.node().resize(&file, end, Preallocation::Off).await;
        }
    }
}

//! One layer of a disk.

use std::any::Any;
use std::fmt::Debug;

use async_trait::async_trait;
use underlay_sys::Iov;

use crate::bitmaps::BitmapStore;
use crate::error::{IoError, Result};
use crate::format::{Extent, Format, Place};
use crate::info::ImageInfo;
use crate::perm::{Access, Perms};
use crate::units::{ByteRange, NodeName};
use crate::view::{Cx, Role};

/// What kind of layer a node is; decides how permissions pass through it and which children it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Gets its bytes from outside the graph (file, null-co).
    Protocol,
    /// Interprets the bytes of its `file` child (qcow2, raw).
    Format,
    /// Has the content of its one child and does something on the way (throttle).
    Filter,
}

/// How a node wants to be asked. All in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests must start and end at multiples of this; [`Cx`] takes care of others.
    pub request_alignment: u32,
    /// Buffers must be aligned so in memory. Every [`Iov`] made by `underlay-sys` is aligned to 4096.
    pub memory_alignment: u32,
    /// Largest request, `u32::MAX` for no limit.
    pub max_transfer: u32,
    /// Ranges aligned so are cheapest to zero or discard (the cluster size); 0 when that does not matter.
    pub preferred_zero: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { request_alignment: 1, memory_alignment: 1, max_transfer: u32::MAX, preferred_zero: 0 }
    }
}

/// How to write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// Store the clusters compressed. Only whole clusters, or the tail of the image.
    pub compressed: bool,
}

/// How to zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// The space may be given back (NBD: no NO_HOLE flag).
    pub may_unmap: bool,
    /// Fail with ENOTSUP rather than write zeroes byte by byte (NBD: FAST_ZERO).
    pub no_fallback: bool,
}

/// How to discard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Discard;

/// What to reserve when making or growing an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The tables, not the data.
    Metadata,
    /// Everything, by fallocate.
    Falloc,
    /// Everything, by writing zeroes.
    Full,
}

impl Preallocation {
    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }
}

/// The backing file as an image names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingRef {
    /// File name or `json:{…}`, as stored.
    pub file: String,
    /// Format name, when stored.
    pub format: Option<String>,
}

/// One layer of a disk: a protocol (file, null-co), a format (qcow2, raw) or a filter.
///
/// A node owns its state but not its children: it reaches them through `cx`, so the graph can be rewired without
/// the node taking part. Offsets are bytes in this node's address space. Requests come already checked by [`Cx`]:
/// aligned to the node's limits, writes inside its length or allowed to grow it. A future that one of these
/// methods returned is never dropped before its end.
#[async_trait]
pub trait Node: Debug + Send + Sync {
    /// The driver's name: `qcow2`, `file`, …
    fn driver(&self) -> &'static str;
    /// What kind of layer this is.
    fn kind(&self) -> Kind;
    /// For callers that know the driver, such as the image tool.
    fn as_any(&self) -> &dyn Any;
    /// Current length in bytes.
    fn length(&self, cx: &Cx<'_>) -> u64;
    /// How the node wants to be asked.
    fn limits(&self, _cx: &Cx<'_>) -> Limits {
        Limits::default()
    }
    /// The node as an image that can keep dirty bitmaps.
    fn as_bitmap_store(&self) -> Option<&dyn BitmapStore> {
        None
    }
    /// The node as a format, when it can say where a range lives.
    fn as_format(&self) -> Option<&dyn Format> {
        None
    }

    /// Fills `into`, `range.len()` bytes. Bytes past the end of the node read as zeroes.
    async fn read(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()>;
    /// Done when later reads see the data; durable only after a flush.
    async fn write(&self, cx: &Cx<'_>, range: ByteRange, from: Iov, flags: WriteFlags) -> Result<()>;
    /// Makes the range read as zeroes. ENOTSUP makes [`Cx`] write zeroes instead (unless `no_fallback`).
    async fn write_zeroes(&self, _cx: &Cx<'_>, _range: ByteRange, _flags: ZeroFlags) -> Result<()> {
        Err(IoError::ENOTSUP)
    }
    /// Tells that nobody needs the range any more; later reads may give anything that was ever there, or zeroes.
    async fn discard(&self, _cx: &Cx<'_>, _range: ByteRange) -> Result<()> {
        Ok(())
    }
    /// Makes everything durable whose write was done when the flush began.
    async fn flush(&self, _cx: &Cx<'_>) -> Result<()> {
        Ok(())
    }
    /// The answer of [`Node::map`] if it is known without waiting for anything.
    fn map_now(&self, _cx: &Cx<'_>, _range: ByteRange) -> Option<Extent> {
        None
    }
    /// Where the first bytes of `range` live in this layer. The default suits a node that simply has its bytes.
    async fn map(&self, _cx: &Cx<'_>, range: ByteRange) -> Result<Extent> {
        Ok(Extent::new(Place::Data(range.start()), range.len()))
    }
    /// For who goes through all of a node and was told what is just before `range`: appends to `more` what comes next,
    /// extent after extent, as far as that is at hand.
    fn map_ahead(&self, _cx: &Cx<'_>, _range: ByteRange, _more: &mut Vec<Extent>) {}
    /// Lets `to` share the storage of `range`, at `at` there, as if it were copied. An error is only that it cannot be:
    /// ENOTSUP, or EINVAL for just this range; what is there at `to` is not known then, and has to be written.
    async fn reflink_to(&self, _cx: &Cx<'_>, _range: ByteRange, _to: &Cx<'_>, _at: u64) -> Result<()> {
        Err(IoError::ENOTSUP)
    }
    /// The other half of it: `range` shares the storage of `from`, a protocol node, at `at` there.
    async fn reflink_from(&self, _cx: &Cx<'_>, _range: ByteRange, _from: &dyn Node, _at: u64) -> Result<()> {
        Err(IoError::ENOTSUP)
    }
    /// Copies from the backing node what the range still borrows from there, so that it reads the same without
    /// it. Safe beside writes to the same range: what a guest writes is never undone.
    async fn populate(&self, _cx: &Cx<'_>, _range: ByteRange) -> Result<()> {
        Err(IoError::ENOTSUP)
    }
    /// Changes the length. Growth reads as zeroes.
    async fn resize(&self, _cx: &Cx<'_>, _size: u64, _preallocation: Preallocation) -> Result<()> {
        Err(IoError::ENOTSUP.with("Image format driver does not support resize"))
    }

    /// A change of the graph waits for the requests inside: a node that makes requests wait lets them go on, from
    /// `true` to `false`. Several changes may do so at once.
    fn hurry(&self, _on: bool) {}

    /// Gets ready for what its users ask of it now: takes locks before writing starts, gives them up after it
    /// ended. Called with more before a change (children first; may fail, and is then called with the old
    /// access again), with less after it (parents first).
    async fn set_access(&self, _cx: &Cx<'_>, _access: Access) -> Result<()> {
        Ok(())
    }
    /// How often so far it lost sight of what keeps its bytes, with writes acknowledged and not flushed that may be
    /// gone. No flush succeeds after that, unless it is forgiven.
    fn doubts(&self) -> u64 {
        0
    }
    /// All of its content will be written once more: what was lost before does not matter, and flushes may succeed
    /// again.
    fn forgive(&self) {}

    /// Whether what nobody has written to reads as zeroes: in an image that was just made here, and behind what was its
    /// end until now. Not so where what was there before shows: in a block device, in an export. Ask by
    /// [`Cx::unwritten_is_zero`].
    fn unwritten_is_zero(&self, _cx: &Cx<'_>) -> bool {
        false
    }

    /// Before a node leaves the graph: everything written out, the image marked clean.
    async fn close(&self, cx: &Cx<'_>) -> Result<()> {
        self.flush(cx).await
    }

    /// Whether a format keeps bytes of its own in its file, which nobody else may then write to.
    fn keeps_metadata(&self) -> bool {
        self.kind() == Kind::Format
    }
    /// What the node requires of its child in `role` and shares with the child's other users, where the rules for
    /// its kind ([`crate::perm::for_child`]) do not suit it.
    fn child_access(&self, _access: Access, _role: Role) -> Option<(Perms, Perms)> {
        None
    }
    /// Whether what is written to the target must not overtake the target's readers ([`Cx::overwrite`]).
    fn serialises_target(&self) -> bool {
        false
    }
    /// The image down to which a filter relies on the chain below it: no link may change as far as that.
    fn relies_down_to(&self) -> Option<&NodeName> {
        None
    }
    /// Whether every request fails from now on, whatever happens: then there is nothing that a flush could save.
    fn is_unusable(&self) -> bool {
        false
    }
    /// Whether what it had is gone, or out of reach and nobody waits for that to change.
    fn is_lost(&self) -> bool {
        false
    }
    /// Nobody needs what is under way here, nor what would come: a node that waits for somebody else fails it all from
    /// now on, and is unusable.
    fn give_up(&self) {}
    /// Somebody who has used the node does not want to wait any longer: a node that waits for somebody else to come
    /// back fails what waits for that, and what comes until he is back.
    fn stop_waiting(&self) {}
    /// Waits for work of the node's own that may outlive the request which began it. While it waits no request is
    /// inside and none comes.
    async fn settle(&self) {}
    /// Whether the node can have a backing node.
    fn supports_backing(&self) -> bool {
        false
    }
    /// The backing file as the image names it now.
    fn backing_ref(&self) -> Option<BackingRef> {
        None
    }
    /// Rewrites the image's own note of its backing file. Everything that the new note relies on must have been
    /// flushed by the caller; the note itself is durable on return.
    async fn set_backing_ref(&self, _cx: &Cx<'_>, _backing: Option<BackingRef>) -> Result<()> {
        Err(IoError::ENOTSUP)
    }

    /// Whether [`Node::make_empty`] works.
    fn can_be_emptied(&self) -> bool {
        false
    }

    /// Removes all content, so that only what is below shows. The caller has made durable there what shall be kept, and
    /// nobody else uses the node meanwhile.
    async fn make_empty(&self, _cx: &Cx<'_>) -> Result<()> {
        Err(IoError::ENOTSUP)
    }

    /// The plain name that opens the same thing (`/images/a.qcow2`), when there is one; only protocols have it
    /// of their own.
    fn exact_filename(&self) -> Option<String> {
        None
    }
    /// Bytes that the image takes up on its medium, if that can be told. Only protocols know.
    fn allocated_size(&self) -> Option<u64> {
        None
    }
    /// What the node itself has counted, by the names that statistics have for it.
    fn counts(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
    /// What the node tells about its image.
    fn image_info(&self) -> ImageInfo {
        ImageInfo::default()
    }
}

//! The wiring as requests see it: immutable, shared, walked from the top down with a [`Cx`].

use std::future::Future;
use std::sync::{Arc, OnceLock, Weak};

use smallvec::SmallVec;
use underlay_sys::{Iov, rt};

use crate::align::{self, Blocks};
use crate::chain::Chain;
use crate::error::{IoError, Result};
use crate::format::Extent;
use crate::marks::Marks;
use crate::node::{Kind, Limits, Node, WriteFlags, ZeroFlags};
use crate::plan::{DetectZeroes, NodeId, NodeOptions};
use crate::range_lock::{Mode, RangeGuard};
use crate::units::{ByteRange, NodeName};

/// What a child is to its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Where a format keeps its bytes, or what a filter filters.
    File,
    /// What shows where an image has nothing of its own.
    Backing,
    /// Where a filter copies to.
    Target,
}

impl Role {
    /// The child's name in options and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Backing => "backing",
            Self::Target => "target",
        }
    }
}

/// Something that wants to know which ranges of a node were written: a dirty bitmap.
pub trait Tracker: Send + Sync + std::fmt::Debug {
    /// A write, zeroing or discard of `range` has ended, well or badly, or is about to begin.
    fn touched(&self, range: ByteRange);

    /// If to be told twice is the same as once, until it has [forgotten](Self::forgotten): to be told of a byte is to
    /// be told of the so many bytes around it, a power of two.
    fn granularity(&self) -> Option<u64> {
        None
    }

    /// Grows before it forgets anything, and after it has.
    fn forgotten(&self) -> u64 {
        0
    }
}

/// Who wants to know of writes.
#[derive(Debug, Default)]
pub(crate) struct Trackers {
    /// Before: what they know survives a crash.
    pub(crate) before: Marks,
    /// When they have ended.
    pub(crate) after: Marks,
}

/// One node and all below it, as it was wired at some moment.
#[derive(Debug)]
pub struct View {
    pub(crate) id: NodeId,
    pub(crate) name: NodeName,
    pub(crate) node: Arc<dyn Node>,
    pub(crate) children: SmallVec<[(Role, Arc<View>); 2]>,
    pub(crate) trackers: Trackers,
    pub(crate) options: NodeOptions,
    pub(crate) limits: Limits,
    pub(crate) blocks: Arc<Blocks>,
    /// Of the layers below that must not change under a reader, and that are not asked to read: what shows through this
    /// node is looked up in all layers at once.
    pub(crate) passed_by: SmallVec<[Arc<Blocks>; 1]>,
    /// Made when it is first of use.
    chain: OnceLock<Option<Chain>>,
    me: Weak<View>,
}

impl View {
    /// A view of a node that is in no plan (yet): for opening and creating images, and for tests.
    pub fn detached(node: Arc<dyn Node>, children: impl IntoIterator<Item = (Role, Arc<View>)>) -> Arc<Self> {
        Self::detached_as(NodeName::generated(0, 0), node, children)
    }

    /// The same with the name that the node will have.
    pub fn detached_as(
        name: NodeName,
        node: Arc<dyn Node>,
        children: impl IntoIterator<Item = (Role, Arc<View>)>,
    ) -> Arc<Self> {
        let options = NodeOptions { discard: true, ..NodeOptions::default() };
        Self::new(
            NodeId::DETACHED,
            name,
            node,
            children.into_iter().collect(),
            Trackers::default(),
            options,
            Arc::default(),
        )
    }

    /// The same images without the filters among them, for how they are called: nobody reads through it.
    pub fn without_filters(&self) -> Arc<Self> {
        let mut at = self;
        while at.node.kind() == Kind::Filter {
            let Some(below) = at.child(Role::File).or(at.child(Role::Backing)) else { break };
            at = below;
        }
        let children = at.children.iter().map(|(role, child)| (*role, child.without_filters()));
        Self::detached_as(at.name.clone(), at.node.clone(), children)
    }

    pub(crate) fn new(
        id: NodeId,
        name: NodeName,
        node: Arc<dyn Node>,
        children: SmallVec<[(Role, Arc<View>); 2]>,
        trackers: Trackers,
        options: NodeOptions,
        blocks: Arc<Blocks>,
    ) -> Arc<Self> {
        let limits = Limits::default();
        let chain = OnceLock::new();
        let passed_by = SmallVec::new();
        Arc::new_cyclic(|me| {
            let me = me.clone();
            let mut view =
                Self { id, name, node, children, trackers, options, limits, blocks, passed_by, chain, me };
            view.limits = view.node.limits(&Cx { view: &view });
            view.passed_by = view.backing_of_format().map_or_else(SmallVec::new, |below| below.to_pass_by());
            view
        })
    }

    /// The context of a request to this node. The caller sees to it that the wiring may be used now: it holds a
    /// gate, or is the one that changes the graph, or the node is in no plan.
    pub fn cx(&self) -> Cx<'_> {
        Cx { view: self }
    }

    /// The node's place in the plan.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// The node's name.
    pub fn name(&self) -> &NodeName {
        &self.name
    }

    /// The node itself.
    pub fn node(&self) -> &Arc<dyn Node> {
        &self.node
    }

    /// The child in `role`.
    pub fn child(&self, role: Role) -> Option<&Arc<View>> {
        self.children.iter().find(|(r, _)| *r == role).map(|(_, view)| view)
    }

    /// The backing node of a format node, which shows where the node has nothing.
    pub(crate) fn backing_of_format(&self) -> Option<&Arc<View>> {
        self.node.as_format().and_then(|_| self.child(Role::Backing))
    }

    /// What a reader of a layer above this one has to wait for, here and below.
    fn to_pass_by(&self) -> SmallVec<[Arc<Blocks>; 1]> {
        let mut all = SmallVec::new();
        // Any other node is asked to read.
        if self.node.as_format().is_some() {
            all.extend(self.blocks.is_serialised().then(|| self.blocks.clone()));
            all.extend(self.passed_by.iter().cloned());
        }
        all
    }

    /// What is known about the layers below, if there are many.
    pub(crate) fn chain(&self) -> Option<&Chain> {
        self.chain.get_or_init(|| Chain::below(self)).as_ref()
    }

    /// All children, in the order in which they were wired.
    pub fn children(&self) -> &[(Role, Arc<View>)] {
        &self.children
    }
}

/// What a request carries down the graph: the node it is at and, through it, what is below.
#[derive(Clone, Copy, Debug)]
pub struct Cx<'a> {
    view: &'a View,
}

/// Zeroes are written in pieces of at most this many bytes where a node cannot zero by itself.
const ZERO_PIECE: u64 = 1 << 20;

impl<'a> Cx<'a> {
    /// The view of the node the request is at.
    pub fn view(&self) -> &'a View {
        self.view
    }

    /// Does a part of the request that copies much: on another thread, if one has less to do than this one
    /// ([`rt::spread`]). The rest of the request waits for it.
    pub async fn spread<F, W>(&self, work: F) -> W::Output
    where
        F: FnOnce(Arc<View>) -> W,
        W: Future<Output: Send> + Send + 'static,
    {
        let view = self.view.me.upgrade().expect("who makes a request holds its view");
        rt::spread(work(view)).await
    }

    /// The node the request is at.
    pub fn node(&self) -> &'a dyn Node {
        &*self.view.node
    }

    /// The child in `role`.
    pub fn child(&self, role: Role) -> Option<Cx<'a>> {
        self.view.child(role).map(|view| Cx { view })
    }

    /// The `file` child, which formats and filters always have: the plan's check has seen it.
    pub fn below(&self) -> Cx<'a> {
        self.child(Role::File).expect("a format or filter node has a file child")
    }

    /// [`Node::unwritten_is_zero`], below all filters.
    pub fn unwritten_is_zero(&self) -> bool {
        let at = self.skip_filters();
        at.node().unwritten_is_zero(&at)
    }

    /// The backing child.
    pub fn backing(&self) -> Option<Cx<'a>> {
        self.child(Role::Backing)
    }

    /// Whether the image's header names a backing file that it was opened without: what reads as zeroes now will show
    /// something else then, unless the image holds the zeroes itself.
    pub fn lacks_backing(&self) -> bool {
        let at = self.skip_filters();
        at.node().backing_ref().is_some() && at.backing().is_none()
    }

    /// The first node at or below this one that is no filter.
    pub fn skip_filters(self) -> Cx<'a> {
        let mut at = self;
        while at.node().kind() == Kind::Filter {
            let Some(next) = at.child(Role::File).or(at.child(Role::Backing)) else { break };
            at = next;
        }
        at
    }

    /// The doubts of this node and all below it; see [`Node::doubts`].
    pub fn doubts(&self) -> u64 {
        let (mut sum, mut todo) = (0, vec![self.view]);
        while let Some(view) = todo.pop() {
            sum += view.node.doubts();
            todo.extend(view.children.iter().map(|(_, child)| &**child));
        }
        sum
    }

    /// Forgives the doubts of this node and all below it ([`Node::forgive`]). False if that cannot be: what a format
    /// keeps for itself is not written once more.
    pub fn forgive(&self) -> bool {
        if self.doubts() == 0 {
            return true;
        }
        self.node().forgive();
        !self.node().keeps_metadata() && self.view.children.iter().all(|(_, child)| child.cx().forgive())
    }

    /// Current length of the node in bytes.
    pub fn length(&self) -> u64 {
        self.node().length(self)
    }

    /// How the node wants to be asked.
    pub fn limits(&self) -> Limits {
        self.view.limits
    }

    /// Fills `into`; bytes past the end of the node read as zeroes.
    pub async fn read(&self, range: ByteRange, into: Iov) -> Result<()> {
        debug_assert_eq!(range.len(), into.len() as u64);
        let _place = self.view.blocks.reading(range).await;
        if !range.is_aligned(u64::from(self.view.limits.request_alignment)) {
            return align::read(self, range, into).await;
        }
        self.node().read(self, range, into).await
    }

    /// Writes `from`; done when later reads see it.
    pub async fn write(&self, range: ByteRange, from: Iov, flags: WriteFlags) -> Result<()> {
        debug_assert_eq!(range.len(), from.len() as u64);
        if self.view.options.detect_zeroes != DetectZeroes::Off && !flags.compressed && from.is_zero() {
            let may_unmap = self.view.options.detect_zeroes == DetectZeroes::Unmap;
            return self.write_zeroes(range, ZeroFlags { may_unmap, no_fallback: false }).await;
        }
        self.announce_write(range).await?;
        let result = if self.view.limits.request_alignment > 1 {
            align::write(self, range, from, flags).await
        } else {
            self.node().write(self, range, from, flags).await
        };
        self.touched(range);
        self.wrote(range, &result);
        result
    }

    /// Waits until nobody reads from `range`; readers who come later wait until the guard goes. For a target that is
    /// based on what the caller is about to let change ([`Node::serialises_target`]): a reader who has found nothing in
    /// the target, and is on his way below, must get there first.
    pub async fn overwrite(&self, range: ByteRange) -> RangeGuard {
        self.skip_filters().view.blocks.serialise().lock(range, Mode::Exclusive).await
    }

    /// Makes the range read as zeroes, by writing them where the node knows no better way.
    pub async fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.announce_write(range).await?;
        let result = self.zero(range, flags).await;
        self.wrote(range, &result);
        result
    }

    async fn zero(&self, range: ByteRange, mut flags: ZeroFlags) -> Result<()> {
        flags.may_unmap &= self.view.options.discard;
        let alignment = u64::from(self.view.limits.request_alignment);
        let inner = if alignment > 1 { range.align_in(alignment) } else { range };
        if inner.is_empty() {
            return self.write_out_zeroes(range, flags).await;
        }
        let head = ByteRange::between(range.start(), inner.start());
        let tail = ByteRange::between(inner.end(), range.end());
        if alignment > 1 && flags.no_fallback && !(head.is_empty() && tail.is_empty()) {
            return Err(IoError::ENOTSUP);
        }
        let result = {
            let _turn = match alignment {
                0 | 1 => None,
                _ => Some(self.view.blocks.shared(inner).await),
            };
            self.node().write_zeroes(self, inner, flags).await
        };
        self.touched(inner);
        match result {
            Err(error) if error == IoError::ENOTSUP && !flags.no_fallback => {
                self.write_out_zeroes(inner, flags).await?;
            }
            other => other?,
        }
        self.write_out_zeroes(head, flags).await?;
        self.write_out_zeroes(tail, flags).await
    }

    async fn write_out_zeroes(&self, mut range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        if flags.no_fallback {
            return Err(IoError::ENOTSUP);
        }
        let zeroes = Iov::zeroed(range.split(ZERO_PIECE).0.buffer_len());
        while !range.is_empty() {
            let (piece, rest) = range.split(ZERO_PIECE);
            let from = zeroes.slice(0, piece.buffer_len());
            let result = if self.view.limits.request_alignment > 1 {
                align::write(self, piece, from, WriteFlags::default()).await
            } else {
                self.node().write(self, piece, from, WriteFlags::default()).await
            };
            self.touched(piece);
            result?;
            range = rest;
        }
        Ok(())
    }

    /// Whether a discard here does anything.
    pub fn passes_discards(&self) -> bool {
        self.view.options.discard
    }

    /// Tells that the range is not needed any more; nothing happens on nodes opened with `discard=ignore`.
    pub async fn discard(&self, range: ByteRange) -> Result<()> {
        if !self.view.options.discard {
            return Ok(());
        }
        let range = range.align_in(u64::from(self.view.limits.request_alignment));
        if range.is_empty() {
            return Ok(());
        }
        self.announce(range).await?;
        let result = self.node().discard(self, range).await;
        self.touched(range);
        result
    }

    /// Lets `to` share the storage of `range`: [`Node::reflink_to`].
    pub async fn reflink(&self, range: ByteRange, to: &Cx<'_>, at: u64) -> Result<()> {
        let _place = self.view.blocks.reading(range).await;
        self.node().reflink_to(self, range, to, at).await
    }

    /// A write of what `from` has at `at`, by sharing its storage: [`Node::reflink_from`].
    pub async fn reflink_from(&self, range: ByteRange, from: &dyn Node, at: u64) -> Result<()> {
        let alignment = u64::from(self.view.limits.request_alignment);
        if !range.is_aligned(alignment) {
            return Err(IoError::EINVAL);
        }
        self.announce_write(range).await?;
        let _turn = match alignment {
            0 | 1 => None,
            _ => Some(self.view.blocks.shared(range).await),
        };
        let result = self.node().reflink_from(self, range, from, at).await;
        self.touched(range);
        self.wrote(range, &result);
        result
    }

    /// Makes durable what was written before.
    pub async fn flush(&self) -> Result<()> {
        self.node().flush(self).await
    }

    /// Copies from the backing node what the range still borrows from there.
    pub async fn populate(&self, range: ByteRange) -> Result<()> {
        self.node().populate(self, range).await
    }

    /// Where the first bytes of `range` live in this one layer.
    pub async fn map(&self, range: ByteRange) -> Result<Extent> {
        match self.node().map_now(self, range) {
            Some(extent) => Ok(extent),
            None => self.node().map(self, range).await,
        }
    }

    fn wrote(&self, range: ByteRange, result: &Result<()>) {
        if result.is_ok() {
            self.view.blocks.wrote_to(range.end());
        }
    }

    async fn announce_write(&self, range: ByteRange) -> Result<()> {
        self.view.blocks.threshold.writes_to(range.end());
        self.announce(range).await
    }

    /// Before a write: what shall survive a crash is told, and durable on return.
    async fn announce(&self, range: ByteRange) -> Result<()> {
        if self.view.trackers.before.is_empty() {
            return Ok(());
        }
        self.view.trackers.before.touched(range, || self.length());
        match self.node().as_bitmap_store() {
            Some(store) if !store.covers(range) => store.cover(self, range).await,
            _ => Ok(()),
        }
    }

    fn touched(&self, range: ByteRange) {
        self.view.blocks.reliers.end();
        self.view.trackers.after.touched(range, || self.length());
    }
}

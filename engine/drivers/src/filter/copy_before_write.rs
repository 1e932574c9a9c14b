//! The driver `copy-before-write`: what is about to be overwritten is first copied to the target, so that the disk as
//! it was when the filter came can be had all the time, from the two together ([`super::snapshot_access`]) or, once all
//! of it is copied, from the target alone (a backup job).
//!
//! ```text
//!   guest ──► copy-before-write ──► target    first, what is there now (once for a cluster)
//!                   │
//!                   └─────────────► file      then the write
//! ```

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use underlay_graph::info::cluster_size;
use underlay_graph::{
    Access, ByteRange, Cx, IoError, Kind, Limits, Node, Perms, Result, Role, View, WriteFlags, ZeroFlags,
};
use underlay_sys::{Iov, rt};

use super::copies::{CHUNK, Copies, CopyError, Ends, HowToCopy, LEAST_CLUSTER};

/// What gives way when a copy fails (`on-cbw-error`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCbwError {
    /// The write fails: `break-guest-write`.
    #[default]
    BreakGuestWrite,
    /// The disk as it was is lost: `break-snapshot`.
    BreakSnapshot,
}

/// Options of the filter.
#[derive(Clone, Copy, Debug, Default)]
pub struct CbwOptions {
    /// `on-cbw-error`
    pub on_error: OnCbwError,
    /// `cbw-timeout`: a copy that takes longer counts as failed; zero: it may take for ever.
    pub timeout: Duration,
    /// `min-cluster-size`, in bytes; 0: as the target has it.
    pub min_cluster: u64,
    /// Most bytes in one copy; 0: as we like it.
    pub max_chunk: u64,
    /// Compressed copies.
    pub compress: bool,
    /// Discard what has been copied from the disk.
    pub discard_source: bool,
    /// Copy every byte, though storage could be shared.
    pub no_reflink: bool,
    /// See [`HowToCopy::every_zero`].
    pub every_zero: bool,
}

/// See the module.
#[derive(Debug)]
pub struct CopyBeforeWrite {
    copies: Arc<Copies>,
    on_error: OnCbwError,
    timeout: Duration,
    /// Copies under way that may outlive the requests that began them.
    late: watch::Sender<usize>,
}

/// Bytes that are copied to `target` as a whole. An error says what is wrong with `min_cluster`.
pub fn cluster_for(target: &View, min_cluster: u64) -> std::result::Result<u64, String> {
    if i64::try_from(min_cluster).is_err() {
        return Err(format!("min-cluster-size too large: {min_cluster} > {}", i64::MAX));
    }
    if min_cluster != 0 && !min_cluster.is_power_of_two() {
        return Err("min-cluster-size needs to be a power of 2".to_owned());
    }
    let cluster = LEAST_CLUSTER.max(min_cluster).max(cluster_size(target).unwrap_or(0));
    Ok(cluster.next_power_of_two())
}

impl CopyBeforeWrite {
    /// For a disk that shall be copied to `target`. Errors are the reference's.
    pub fn new(source: &View, target: &View, options: CbwOptions) -> std::result::Result<Arc<Self>, String> {
        let cluster = cluster_for(target, options.min_cluster)
            .map_err(|why| format!("Cannot create block-copy-state: {why}"))?;
        let chunk = if options.max_chunk == 0 { CHUNK } else { options.max_chunk.min(CHUNK) };
        let chunk = (chunk - chunk % cluster).max(cluster);
        let CbwOptions { compress, discard_source, on_error, timeout, every_zero, .. } = options;
        // Who bounds the copies means copies.
        let reflink = !options.no_reflink && !compress && options.max_chunk == 0;
        let how = HowToCopy { cluster, chunk, compress, discard_source, reflink, every_zero };
        let copies = Copies::new(source.cx().length(), how);
        Ok(Arc::new(Self { copies, on_error, timeout, late: watch::channel(0).0 }))
    }

    /// What has been copied, and what not yet.
    pub fn copies(&self) -> &Arc<Copies> {
        &self.copies
    }

    /// The disk and its copy, for a context at this filter.
    pub fn ends<'a>(cx: &Cx<'a>) -> Ends<'a> {
        let target = cx.child(Role::Target).expect("copy-before-write has its target as long as it exists");
        Ends { source: cx.below(), target }
    }

    /// Copies what a change of `range` would destroy.
    async fn before_change(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        if !self.copies.is_wanted(range) {
            return Ok(());
        }
        let clusters = self.copies.clusters(range, cx.length());
        let result = match self.timeout.is_zero() {
            true => {
                let copies = self.copies.clone();
                let copy =
                    |view: Arc<View>| async move { copies.copy(Self::ends(&view.cx()), clusters).await };
                cx.spread(copy).await
            }
            false => self.copy_for_a_while(cx, clusters).await,
        };
        match (result, self.on_error) {
            (Err(failed), OnCbwError::BreakSnapshot) => {
                self.copies.lose(failed.error);
                Ok(())
            }
            (Err(failed), OnCbwError::BreakGuestWrite) => Err(failed.error),
            (Ok(()), _) => Ok(()),
        }
    }

    /// The copy goes on when the time is over, and has its clusters until it is done; only nobody waits for it.
    async fn copy_for_a_while(&self, cx: &Cx<'_>, clusters: ByteRange) -> std::result::Result<(), CopyError> {
        let child = |role| cx.view().child(role).cloned().expect("copy-before-write has its children");
        let (source, target) = (child(Role::File), child(Role::Target));
        let copies = self.copies.clone();
        let under_way = UnderWay::begin(&self.late);
        let copy = rt::spawn(async move {
            let ends = Ends { source: source.cx(), target: target.cx() };
            let result = copies.copy(ends, clusters).await;
            drop(under_way);
            result
        });
        let late = CopyError { error: IoError::new(ETIMEDOUT), is_read: false };
        rt::by(Some(rt::now() + self.timeout), copy).await.unwrap_or(Err(late))
    }
}

/// Source: Linux.
const ETIMEDOUT: i32 = 110;

/// Counts as a copy under way as long as it lives.
struct UnderWay(watch::Sender<usize>);

impl UnderWay {
    fn begin(late: &watch::Sender<usize>) -> Self {
        late.send_modify(|count| *count += 1);
        Self(late.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

#[async_trait]
impl Node for CopyBeforeWrite {
    fn driver(&self) -> &'static str {
        "copy-before-write"
    }
    fn kind(&self) -> Kind {
        Kind::Filter
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn length(&self, cx: &Cx<'_>) -> u64 {
        cx.below().length()
    }
    fn limits(&self, cx: &Cx<'_>) -> Limits {
        cx.below().limits()
    }
    fn child_access(&self, access: Access, role: Role) -> Option<(Perms, Perms)> {
        match (role, access.used) {
            (Role::File, false) => Some((Perms::NONE, Perms::ALL)),
            (Role::File, true) => {
                let discards = self.copies.how().discard_source;
                let write = if discards { Perms::WRITE } else { Perms::NONE };
                // Whoever wrote past the filter would destroy what it keeps.
                let shared = access.shared.without(Perms::WRITE | Perms::RESIZE);
                Some((access.required | Perms::CONSISTENT_READ | write, shared))
            }
            _ => None,
        }
    }
    fn serialises_target(&self) -> bool {
        true
    }
    async fn settle(&self) {
        // The sender lives as long as this node.
        let _ = self.late.subscribe().wait_for(|count| *count == 0).await;
    }
    async fn read(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        cx.below().read(range, into).await
    }
    async fn write(&self, cx: &Cx<'_>, range: ByteRange, from: Iov, flags: WriteFlags) -> Result<()> {
        self.before_change(cx, range).await?;
        cx.below().write(range, from, flags).await
    }
    async fn write_zeroes(&self, cx: &Cx<'_>, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.before_change(cx, range).await?;
        cx.below().write_zeroes(range, flags).await
    }
    async fn discard(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        self.before_change(cx, range).await?;
        cx.below().discard(range).await
    }
    async fn flush(&self, cx: &Cx<'_>) -> Result<()> {
        cx.below().flush().await
    }
    async fn close(&self, _cx: &Cx<'_>) -> Result<()> {
        Ok(())
    }
}

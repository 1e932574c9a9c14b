//! How an image is opened, and what of that can change later.

use std::fmt;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::{OnCorrupt, OpenError, Qcow2};
use crate::cache::SliceCache;
use crate::cleaner::Cleaner;
use crate::entry::Layout;
use crate::header::{Header, Version};
use crate::refcount::Refcounts;

/// Largest L2 cache that is used unless the user says otherwise, in bytes. QEMU's default.
const DEFAULT_L2_CACHE: u64 = 32 << 20;
/// Clusters of refcount blocks that are cached unless the user says otherwise. QEMU's default.
const DEFAULT_REFCOUNT_CLUSTERS: u64 = 4;

/// Told what a repair does, line by line.
pub type OnRepair = Arc<dyn Fn(&str) + Send + Sync>;

/// How to open an image. Sizes are in bytes.
#[derive(Clone, Default)]
pub struct OpenOptions {
    /// Option `l2-cache-size`.
    pub l2_cache_size: Option<u64>,
    /// Option `refcount-cache-size`.
    pub refcount_cache_size: Option<u64>,
    /// Option `cache-size`: both together.
    pub cache_size: Option<u64>,
    /// Option `l2-cache-entry-size`: a power of two from 512 up to the cluster size.
    pub l2_cache_entry_size: Option<u64>,
    /// Option `cache-clean-interval`: tables that are not used for so long leave memory.
    pub cache_clean_interval: Option<Duration>,
    /// Option `pass-discard-request`: discarded clusters are discarded in the file too. On unless false.
    pub pass_discard_request: Option<bool>,
    /// Option `pass-discard-other`: so are clusters that are freed for other reasons.
    pub pass_discard_other: bool,
    /// Option `lazy-refcounts`: refcounts may be behind. Ours never are, but not every image has room for the note.
    pub lazy_refcounts: bool,
    /// Option `pass-discard-snapshot`: so are those of snapshots that are deleted. On unless false.
    pub pass_discard_snapshot: Option<bool>,
    /// Option `discard-no-unref`: discarded clusters keep their place in the file.
    pub discard_no_unref: bool,
    /// Accept being written to although the dirty or corrupt bit is set: for repair.
    pub repair: bool,
    /// The bitmaps are not to be relied on, whatever the image says of them.
    pub distrust_bitmaps: bool,
    /// Told about corruption.
    pub on_corrupt: Option<OnCorrupt>,
    /// Told the lines of the repair that an image needs which was not closed cleanly; QEMU prints them on stderr.
    pub on_repair: Option<OnRepair>,
}

/// Options that an open image can have ([`Qcow2::check_options`]).
#[derive(Debug)]
pub struct CheckedOptions {
    options: OpenOptions,
    /// Bytes of its caches.
    l2_cache: u64,
    refcount_cache: u64,
}

impl fmt::Debug for OpenOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenOptions").field("l2_cache_size", &self.l2_cache_size).finish_non_exhaustive()
    }
}

impl Qcow2 {
    /// The options in force.
    pub fn options(&self) -> Arc<OpenOptions> {
        self.options.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the image can have other options. Not another `l2-cache-entry-size`, by which everything in memory is
    /// laid out.
    pub fn check_options(&self, options: OpenOptions) -> std::result::Result<CheckedOptions, OpenError> {
        let header = self.header();
        layout(&header, &options)?;
        let (l2_cache, refcount_cache) = cache_sizes(&header, &options)?;
        Ok(CheckedOptions { options, l2_cache, refcount_cache })
    }

    /// Other options from now on: what becomes of discarded clusters, the size of the caches, and how long tables stay
    /// there. Who is told of corruption and repairs stays.
    pub fn set_options(&self, checked: CheckedOptions) {
        let CheckedOptions { options, l2_cache, refcount_cache } = checked;
        self.l2.set_capacity(slices(l2_cache, self.layout.slice_bytes()));
        self.refcounts.cache.set_capacity(slices(refcount_cache, self.refcounts.slice_bytes()));
        let before = self.options();
        if before.cache_clean_interval != options.cache_clean_interval {
            let cleaner = cleaner(&options, &self.l2, &self.refcounts);
            *self.cleaner.lock().unwrap_or_else(PoisonError::into_inner) = cleaner;
        }
        let (on_corrupt, on_repair) = (before.on_corrupt.clone(), before.on_repair.clone());
        let options = OpenOptions { on_corrupt, on_repair, repair: before.repair, ..options };
        *self.options.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(options);
    }
}

pub(super) fn slices(bytes: u64, each: u64) -> usize {
    usize::try_from((bytes / each).max(1)).unwrap_or(usize::MAX)
}

pub(super) fn cleaner(options: &OpenOptions, l2: &SliceCache, refcounts: &Refcounts) -> Option<Cleaner> {
    let caches = || vec![l2.slices(), refcounts.cache.slices()];
    options.cache_clean_interval.map(|interval| Cleaner::start(interval, caches()))
}

pub(super) fn layout(header: &Header, options: &OpenOptions) -> std::result::Result<Layout, OpenError> {
    if options.lazy_refcounts && header.version < Version::V3 {
        let text = "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level";
        return Err(OpenError::Option(text.into()));
    }
    if options.discard_no_unref && header.version < Version::V3 {
        return Err(OpenError::Option("discard-no-unref is only supported since qcow2 version 3".into()));
    }
    match options.l2_cache_entry_size {
        None => Ok(Layout::of(header)),
        Some(size) if size.is_power_of_two() && (512..=header.cluster_size()).contains(&size) => {
            Ok(Layout::with_slices(header, size))
        }
        Some(_) => Err(OpenError::Option(format!(
            "L2 cache entry size must be a power of two between 512 and the cluster size ({})",
            header.cluster_size()
        ))),
    }
}

/// Bytes for L2 slices and for refcount slices, by QEMU's rules.
pub(super) fn cache_sizes(
    header: &Header,
    options: &OpenOptions,
) -> std::result::Result<(u64, u64), OpenError> {
    let err = |text: &str| Err(OpenError::Option(text.into()));
    let cluster = header.cluster_size();
    let whole_disk = header
        .virtual_size()
        .div_ceil(cluster)
        .saturating_mul(header.l2_entry_size())
        .next_multiple_of(cluster);
    let least_refcounts = DEFAULT_REFCOUNT_CLUSTERS * cluster;
    if options.cache_size.is_some()
        && options.l2_cache_size.is_some()
        && options.refcount_cache_size.is_some()
    {
        return err("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time");
    }
    if let Some(total) = options.cache_size {
        if options.l2_cache_size.is_some_and(|l2| l2 > total) {
            return err("l2-cache-size may not exceed cache-size");
        }
        if options.refcount_cache_size.is_some_and(|refcounts| refcounts > total) {
            return err("refcount-cache-size may not exceed cache-size");
        }
        return Ok(match (options.l2_cache_size, options.refcount_cache_size) {
            (Some(l2), _) => (l2, total - l2),
            (None, Some(refcounts)) => (total - refcounts, refcounts),
            (None, None) => {
                let l2 = total.saturating_sub(least_refcounts).min(whole_disk);
                (l2, total - l2)
            }
        });
    }
    let l2 = options.l2_cache_size.unwrap_or(DEFAULT_L2_CACHE).min(whole_disk.max(cluster));
    Ok((l2, options.refcount_cache_size.unwrap_or(least_refcounts)))
}

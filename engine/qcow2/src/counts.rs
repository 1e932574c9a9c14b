//! How often each cluster is referenced: a sparse array of counts.

use underlay_graph::IoError;

/// Counts per page.
pub(crate) const PAGE: u64 = 1024;
/// Most pages: half a petabyte of 2 KiB clusters. More would need too large an index.
const MAX_PAGES: u64 = 1 << 28;

/// One count per cluster. Only pages that were touched take memory.
#[derive(Debug)]
pub(crate) struct Counts {
    /// For each page 0, or one more than its place in `pages`.
    index: Vec<u32>,
    pages: Vec<(u64, Box<[u32]>)>,
}

impl Counts {
    /// For a file of `clusters` clusters and perhaps a few more. EFBIG when there are too many.
    pub fn new(clusters: u64) -> Result<Self, IoError> {
        let pages = clusters / PAGE + 2;
        if pages > MAX_PAGES {
            return Err(IoError::EFBIG);
        }
        let pages = usize::try_from(pages).map_err(|_| IoError::EFBIG)?;
        Ok(Self { index: vec![0; pages], pages: Vec::new() })
    }

    fn place(cluster: u64) -> Option<(usize, usize)> {
        Some((usize::try_from(cluster / PAGE).ok()?, usize::try_from(cluster % PAGE).ok()?))
    }

    /// The count of a cluster.
    pub fn get(&self, cluster: u64) -> u64 {
        let found = Self::place(cluster).and_then(|(page, slot)| {
            let at = *self.index.get(page)?;
            let at = usize::try_from(at.checked_sub(1)?).ok()?;
            Some(self.pages[at].1[slot])
        });
        u64::from(found.unwrap_or(0))
    }

    /// The count of a cluster, for changing it; EFBIG far behind the end that [`Counts::new`] was told.
    fn count_mut(&mut self, cluster: u64) -> Result<&mut u32, IoError> {
        let (page, slot) = Self::place(cluster).ok_or(IoError::EFBIG)?;
        let entry = self.index.get_mut(page).ok_or(IoError::EFBIG)?;
        if *entry == 0 {
            let size = usize::try_from(PAGE).map_err(|_| IoError::EFBIG)?;
            self.pages.push((cluster / PAGE, vec![0; size].into()));
            *entry = u32::try_from(self.pages.len()).map_err(|_| IoError::EFBIG)?;
        }
        let at = usize::try_from(*entry - 1).map_err(|_| IoError::EFBIG)?;
        Ok(&mut self.pages[at].1[slot])
    }

    /// Sets the count of a cluster; EFBIG far behind the end.
    pub fn set(&mut self, cluster: u64, count: u64) -> Result<(), IoError> {
        *self.count_mut(cluster)? = u32::try_from(count).unwrap_or(u32::MAX);
        Ok(())
    }

    /// Adds one, unless the count is `max` already: `false` then.
    pub fn add(&mut self, cluster: u64, max: u64) -> Result<bool, IoError> {
        let count = self.count_mut(cluster)?;
        let room = u64::from(*count) < max.min(u64::from(u32::MAX));
        *count += u32::from(room);
        Ok(room)
    }

    /// Makes room for clusters behind the end.
    pub fn grow(&mut self, clusters: u64) -> Result<(), IoError> {
        let pages = clusters / PAGE + 2;
        if pages > MAX_PAGES {
            return Err(IoError::EFBIG);
        }
        let pages = usize::try_from(pages).map_err(|_| IoError::EFBIG)?;
        if pages > self.index.len() {
            self.index.resize(pages, 0);
        }
        Ok(())
    }

    /// Behind the last cluster with a count; at least 1.
    pub fn end(&self) -> u64 {
        let last = |(page, counts): &(u64, Box<[u32]>)| {
            let at = counts.iter().rposition(|count| *count != 0)?;
            Some(page * PAGE + at as u64 + 1)
        };
        self.pages.iter().filter_map(last).max().unwrap_or(1)
    }

    /// The pages that were touched, in no order.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.iter().map(|(page, _)| *page)
    }
}

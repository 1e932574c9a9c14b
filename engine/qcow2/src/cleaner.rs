//! Tables that nobody has asked for in a while leave memory: the option `cache-clean-interval`.
//!
//! One timer for each image, on the thread that opened it; no I/O, as only what is on disk already is dropped.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use underlay_sys::rt;

use crate::cache::Slices;

/// Looks after the caches of an image until it is dropped.
#[derive(Debug)]
pub(crate) struct Cleaner {
    end: Arc<Notify>,
}

impl Cleaner {
    /// Drops what has not been used, every time that `interval` has passed. The caches may go before the cleaner.
    pub(crate) fn start(interval: Duration, caches: Vec<Slices>) -> Self {
        let end = Arc::new(Notify::new());
        let over = end.clone();
        rt::spawn(async move {
            while rt::by(Some(rt::now().saturating_add(interval)), over.notified()).await.is_none() {
                caches.iter().for_each(Slices::drop_unused);
            }
        });
        Self { end }
    }
}

impl Drop for Cleaner {
    fn drop(&mut self) {
        self.end.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use underlay_sys::thread::block_on;

    use super::*;
    use crate::cache::SliceCache;
    use crate::words::Words;

    #[test]
    fn what_nobody_uses_goes_and_the_timer_with_its_image() {
        let cache = SliceCache::new(64);
        let held = |slice| cache.view(slice, |_| ()).is_some();
        (0..3).for_each(|slice| cache.insert(slice, Words::Stored(vec![slice].into())));
        cache.update(1, |words| words[0] = 7);
        block_on(async {
            let cleaner = Cleaner::start(Duration::from_millis(1), vec![cache.slices()]);
            while cache.held() > 1 {
                rt::sleep(Duration::from_millis(1)).await;
            }
            assert!(held(1), "it has yet to be written");
            let end = cleaner.end.clone();
            drop(cleaner);
            while Arc::strong_count(&end) > 1 {
                rt::yield_now().await;
            }
        });
    }
}

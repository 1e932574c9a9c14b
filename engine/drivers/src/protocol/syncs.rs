//! Making a file durable, by several users at once.
//!
//! The kernel tells of a failed write-back once, and then forgets what could not be written. So nothing that is synced
//! later is durable, whatever the kernel says; and of two who sync at the same time one would hear of success. They do
//! it one after the other, and those who come while one is under way share the next.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use underlay_graph::{IoError, Result};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Syncs {
    turn: tokio::sync::Mutex<()>,
    /// How many have begun.
    begun: AtomicU64,
    /// The number of the last one that went well: all that was written before it began is durable.
    ended: AtomicU64,
    /// Something that was written may be lost.
    failed: AtomicBool,
}

impl Syncs {
    /// Syncs by `sync`, or shares one that begins later than this.
    pub(super) async fn share(&self, sync: impl Future<Output = io::Result<()>>) -> Result<()> {
        let wanted = self.begun.load(Ordering::Acquire) + 1;
        let _turn = self.turn.lock().await;
        if self.ended.load(Ordering::Acquire) < wanted { self.sync_now(sync).await } else { self.check() }
    }

    /// Syncs by `sync`, which does more than others who may share one.
    pub(super) async fn alone(&self, sync: impl Future<Output = io::Result<()>>) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.sync_now(sync).await
    }

    /// The turn is held.
    async fn sync_now(&self, sync: impl Future<Output = io::Result<()>>) -> Result<()> {
        self.check()?;
        let number = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let synced = sync.await;
        match &synced {
            Ok(()) => self.ended.store(number, Ordering::Release),
            Err(_) => self.failed.store(true, Ordering::Release),
        }
        Ok(synced?)
    }

    fn check(&self) -> Result<()> {
        if self.failed.load(Ordering::Acquire) { Err(IoError::EIO) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::poll_fn;
    use std::pin::Pin;
    use std::task::Poll;

    use underlay_sys::rt;
    use underlay_sys::thread::block_on;

    use super::*;

    /// A sync that others can come upon.
    async fn slow(count: &Cell<u32>, result: io::Result<()>) -> io::Result<()> {
        for _ in 0..8 {
            rt::yield_now().await;
        }
        count.set(count.get() + 1);
        result
    }

    type Work<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

    fn all(mut work: Vec<Work<'_>>) -> Vec<Result<()>> {
        let mut results = vec![None; work.len()];
        block_on(poll_fn(move |cx| {
            for (work, result) in work.iter_mut().zip(&mut results).filter(|(_, result)| result.is_none()) {
                if let Poll::Ready(ready) = work.as_mut().poll(cx) {
                    *result = Some(ready);
                }
            }
            results.iter().cloned().collect::<Option<_>>().map_or(Poll::Pending, Poll::Ready)
        }))
    }

    #[test]
    fn those_who_come_meanwhile_share_one() {
        let (syncs, count) = (Syncs::default(), Cell::new(0));
        let one = || syncs.share(slow(&count, Ok(())));
        assert_eq!(all((0..5).map(|_| -> Work<'_> { Box::pin(one()) }).collect()), vec![Ok(()); 5]);
        assert_eq!(count.get(), 2, "one for the first, and one for all others");
        block_on(one()).unwrap();
        assert_eq!(count.get(), 3, "an earlier one says nothing of what was written since");
        block_on(syncs.alone(slow(&count, Ok(())))).unwrap();
        assert_eq!(count.get(), 4);
    }

    #[test]
    fn nobody_hears_of_success_after_a_failure() {
        let (syncs, count) = (Syncs::default(), Cell::new(0));
        let fails = syncs.share(slow(&count, Err(io::Error::from_raw_os_error(28))));
        let beside = syncs.share(slow(&count, Ok(())));
        assert_eq!(all(vec![Box::pin(fails), Box::pin(beside)]), [Err(IoError::ENOSPC), Err(IoError::EIO)]);
        assert_eq!(block_on(syncs.alone(slow(&count, Ok(())))), Err(IoError::EIO));
        assert_eq!(count.get(), 1, "the kernel is not asked again");
    }
}

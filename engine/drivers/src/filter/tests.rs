//! The filter and the reader of the moment over disks in memory; beside guests and jobs they are tested with the backup
//! job.

use std::any::Any;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Semaphore;
use underlay_graph::{
    ByteRange, Cx, Extent, Format, IoError, Kind, Node, Place, Result, Role, View, WriteFlags, ZeroFlags,
    format,
};
use underlay_sys::Iov;
use underlay_sys::thread::block_on;

use super::copy_before_write::{CbwOptions, CopyBeforeWrite, OnCbwError};
use super::snapshot_access::SnapshotAccess;

const SIZE: u64 = 300 << 10;
const CLUSTER: u64 = 64 << 10;

/// A disk in memory, whose writes wait for a permit each, and its reads for others.
#[derive(Debug)]
struct Disk {
    bytes: Mutex<Vec<u8>>,
    permits: Semaphore,
    reads: Semaphore,
    broken: bool,
}

impl Disk {
    fn new(byte: u8, permits: usize, broken: bool) -> Arc<Self> {
        let bytes = Mutex::new(vec![byte; usize::try_from(SIZE).unwrap()]);
        let reads = Semaphore::new(1000);
        Arc::new(Self { bytes, permits: Semaphore::new(permits), reads, broken })
    }
}

fn here(range: ByteRange) -> std::ops::Range<usize> {
    let start = usize::try_from(range.start()).unwrap();
    start..start + range.buffer_len()
}

#[async_trait]
impl Node for Disk {
    fn driver(&self) -> &'static str {
        "disk"
    }
    fn kind(&self) -> Kind {
        Kind::Protocol
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn length(&self, _cx: &Cx<'_>) -> u64 {
        SIZE
    }
    async fn read(&self, _cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        self.reads.acquire().await.unwrap().forget();
        into.write_at(0, &self.bytes.lock().unwrap()[here(range)]);
        Ok(())
    }
    async fn write(&self, _cx: &Cx<'_>, range: ByteRange, from: Iov, _flags: WriteFlags) -> Result<()> {
        self.permits.acquire().await.unwrap().forget();
        if self.broken {
            return Err(IoError::ENOSPC);
        }
        self.bytes.lock().unwrap()[here(range)].copy_from_slice(&from.to_vec());
        Ok(())
    }
}

struct Bench {
    target: Arc<Disk>,
    filter: Arc<View>,
    access: Arc<View>,
}

fn bench(target: Arc<Disk>, options: CbwOptions) -> Bench {
    let disk = View::detached(Disk::new(1, 1000, false), []);
    let copy = View::detached(target.clone(), []);
    let node = CopyBeforeWrite::new(&disk, &copy, options).unwrap();
    let filter = View::detached(node, [(Role::File, disk), (Role::Target, copy)]);
    let access = View::detached(Arc::new(SnapshotAccess), [(Role::File, filter.clone())]);
    Bench { target, filter, access }
}

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

async fn read(view: &View, range: ByteRange) -> Result<Vec<u8>> {
    let into = Iov::zeroed(range.buffer_len());
    view.cx().read(range, into.clone()).await?;
    Ok(into.to_vec())
}

async fn write(view: &View, range: ByteRange, byte: u8) -> Result<()> {
    view.cx().write(range, Iov::filled(range.buffer_len(), byte), WriteFlags::default()).await
}

#[test]
fn a_cluster_is_copied_once_and_the_moment_stays() {
    block_on(async {
        let bench = bench(Disk::new(0, 1000, false), CbwOptions::default());
        // Two clusters, the second of them twice.
        for byte in [2, 3] {
            write(&bench.filter, range(CLUSTER - 512 * u64::from(byte % 2), 1024), byte).await.unwrap();
        }
        bench.filter.cx().write_zeroes(range(SIZE - 1, 1), ZeroFlags::default()).await.unwrap();
        let copied = bench.target.bytes.lock().unwrap().clone();
        for (at, byte) in copied.iter().enumerate() {
            let at = at as u64;
            assert_eq!(*byte == 1, !(2 * CLUSTER..4 * CLUSTER).contains(&at), "{at}");
        }
        assert_eq!(read(&bench.access, range(0, SIZE)).await.unwrap(), vec![1; copied.len()]);
        let now = read(&bench.filter, range(CLUSTER, 512)).await.unwrap();
        assert_eq!(now, vec![3; 512]);
        // Behind the end there is nothing.
        assert_eq!(read(&bench.access, range(SIZE - 1, 2)).await.unwrap(), vec![1, 0]);
        let refused = write(&bench.access, range(0, 512), 9).await.unwrap_err();
        assert_eq!(refused, IoError::ENOTSUP);
    });
}

#[test]
fn what_is_discarded_from_the_moment_is_not_copied_any_more() {
    block_on(async {
        let bench = bench(Disk::new(0, 0, false), CbwOptions::default());
        bench.access.cx().discard(range(CLUSTER - 1, CLUSTER + 2)).await.unwrap();
        // Without a permit a copy would hang.
        write(&bench.filter, range(CLUSTER, CLUSTER), 2).await.unwrap();
        assert_eq!(read(&bench.access, range(CLUSTER, 1)).await.unwrap_err(), IoError::EACCES);
        assert_eq!(bench.access.cx().map(range(CLUSTER, 1)).await.unwrap_err(), IoError::EACCES);
        assert_eq!(read(&bench.access, range(0, CLUSTER)).await.unwrap().len(), 64 << 10);
        let extent = bench.access.cx().map(range(0, SIZE)).await.unwrap();
        assert_eq!((extent.place, extent.len), (Place::Data(0), CLUSTER));
    });
}

#[test]
fn whom_a_failed_copy_breaks() {
    block_on(async {
        let bench =
            |on_error| bench(Disk::new(0, 1000, true), CbwOptions { on_error, ..CbwOptions::default() });
        let guest = bench(OnCbwError::BreakGuestWrite);
        assert_eq!(write(&guest.filter, range(0, 512), 2).await, Err(IoError::ENOSPC));
        assert_eq!(read(&guest.filter, range(0, 512)).await.unwrap(), vec![1; 512]);
        assert_eq!(read(&guest.access, range(0, 512)).await.unwrap(), vec![1; 512]);
        let snapshot = bench(OnCbwError::BreakSnapshot);
        write(&snapshot.filter, range(0, 512), 2).await.unwrap();
        assert_eq!(read(&snapshot.filter, range(0, 512)).await.unwrap(), vec![2; 512]);
        assert_eq!(read(&snapshot.access, range(SIZE - 1, 1)).await.unwrap_err(), IoError::EACCES);
    });
}

#[test]
fn a_slow_target_holds_nobody_but_a_change_of_the_graph() {
    block_on(async {
        let timeout = Duration::from_millis(1);
        let bench = bench(Disk::new(0, 0, false), CbwOptions { timeout, ..CbwOptions::default() });
        let late = write(&bench.filter, range(0, 512), 2).await.unwrap_err();
        assert_eq!(late.to_string(), "Connection timed out");
        let mut settled = Box::pin(bench.filter.node().settle());
        assert_eq!(settled.as_mut().poll(&mut Context::from_waker(Waker::noop())), Poll::Pending);
        bench.target.permits.add_permits(1);
        settled.await;
        // The copy has come, and nothing is left to do.
        write(&bench.filter, range(0, 512), 3).await.unwrap();
        assert_eq!(read(&bench.access, range(0, CLUSTER)).await.unwrap(), vec![1; 64 << 10]);
    });
}

#[test]
fn only_over_the_filter() {
    block_on(async {
        let disk = View::detached(Disk::new(1, 0, false), []);
        let access = View::detached(Arc::new(SnapshotAccess), [(Role::File, disk)]);
        assert_eq!(read(&access, range(0, 1)).await.unwrap_err(), IoError::ENOTSUP);
    });
}

/// An image that has nothing.
#[derive(Debug)]
struct Empty;

#[async_trait]
impl Node for Empty {
    fn driver(&self) -> &'static str {
        "empty"
    }
    fn kind(&self) -> Kind {
        Kind::Format
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn length(&self, _cx: &Cx<'_>) -> u64 {
        SIZE
    }
    fn as_format(&self) -> Option<&dyn Format> {
        Some(self)
    }
    async fn read(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        format::read(cx, range, into).await
    }
    async fn write(&self, _cx: &Cx<'_>, _range: ByteRange, _from: Iov, _flags: WriteFlags) -> Result<()> {
        Err(IoError::EPERM)
    }
}

#[async_trait]
impl Format for Empty {
    fn map_cached(&self, range: ByteRange) -> Option<Extent> {
        Some(Extent::new(Place::Below, range.len()))
    }
    async fn read_encoded(&self, _cx: &Cx<'_>, _range: ByteRange, _into: Iov) -> Result<()> {
        Err(IoError::EIO)
    }
}

/// On his way to what is below the target he has passed the target by; what is below must not change under him.
#[test]
fn a_target_waits_for_who_reads_through_an_overlay_of_it() {
    block_on(async {
        let slow = Disk::new(1, 0, false);
        slow.reads.forget_permits(1000);
        let disk = View::detached(slow.clone(), []);
        let file = || (Role::File, View::detached(Disk::new(0, 0, false), []));
        let target = View::detached(Arc::new(Empty), [file(), (Role::Backing, disk)]);
        // As the filter does when it comes.
        drop(target.cx().overwrite(range(0, CLUSTER)).await);
        let overlay = View::detached(Arc::new(Empty), [file(), (Role::Backing, target.clone())]);
        let mut reader = std::pin::pin!(read(&overlay, range(0, CLUSTER)));
        assert!(reader.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        let at_target = target.cx();
        let mut writer = std::pin::pin!(at_target.overwrite(range(512, 512)));
        assert!(writer.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        slow.reads.add_permits(1);
        assert_eq!(reader.await.unwrap(), vec![1; 64 << 10]);
        drop(writer.await);
    });
}

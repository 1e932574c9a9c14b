//! What the tests of the live path share: a disk in memory that remembers what a power cut may leave, small images
//! on it, and a check of all their references.

mod check;
mod crash_safe;
mod empty;
mod hostile;
mod model;
mod offline;
mod power;
mod reserve;
mod slices;
mod snapshots;
mod stored;

use std::any::Any;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use async_trait::async_trait;
use underlay_graph::perm::Access;
use underlay_graph::{
    ByteRange, Cx, IoError, Kind, Node, Perms, Preallocation, Result, Role, View, WriteFlags,
};
use underlay_sys::Iov;

use crate::extensions::Extensions;
use crate::header::{Compression, Crypt, Header, Version};
use crate::live::{OpenOptions, Qcow2};

const SECTOR: usize = 512;

/// Seeded noise.
#[derive(Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Runs a future to its end on this thread; whoever waits is simply asked again.
pub fn run<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let mut cx = Context::from_waker(Waker::noop());
    for _ in 0..50_000_000 {
        if let Poll::Ready(output) = future.as_mut().poll(&mut cx) {
            return output;
        }
    }
    panic!("nothing moves any more");
}

pub type Work<'a> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

#[derive(Debug)]
struct Bytes {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// All that was written to a sector since the last flush.
    versions: BTreeMap<usize, Vec<Vec<u8>>>,
    rng: Rng,
    /// Writes until everything fails.
    fail_after: Option<u64>,
    flushes: u64,
    /// What power cuts just before each flush may leave, when somebody wants to know.
    cuts: Option<Vec<Vec<u8>>>,
    forget: bool,
    /// Every request takes equally long.
    steady: bool,
    /// As a block device that has grown: behind the end there is something.
    rubbish: bool,
}

/// A disk in memory.
#[derive(Debug)]
pub struct Disk(Mutex<Bytes>);

impl Disk {
    pub fn new(content: Vec<u8>, seed: u64) -> Arc<Self> {
        let durable = content.clone();
        let (versions, rng) = (BTreeMap::new(), Rng::new(seed));
        Arc::new(Self(Mutex::new(Bytes {
            now: content,
            durable,
            versions,
            rng,
            fail_after: None,
            flushes: 0,
            cuts: None,
            forget: false,
            steady: false,
            rubbish: seed.is_multiple_of(3),
        })))
    }
    fn lock(&self) -> MutexGuard<'_, Bytes> {
        self.0.lock().unwrap()
    }
    pub fn content(&self) -> Vec<u8> {
        self.lock().now.clone()
    }
    pub fn flushes(&self) -> u64 {
        self.lock().flushes
    }
    pub fn fail_after(&self, writes: Option<u64>) {
        self.lock().fail_after = writes;
    }
    /// Nobody will ask what a power cut leaves.
    pub fn forget_cuts(self: Arc<Self>) -> Arc<Self> {
        self.lock().forget = true;
        self
    }
    /// Every request takes equally long from now on.
    pub fn steady(self: Arc<Self>) -> Arc<Self> {
        self.lock().steady = true;
        self
    }
    pub fn record_cuts(&self) {
        self.lock().cuts = Some(Vec::new());
    }
    pub fn take_cuts(&self) -> Vec<Vec<u8>> {
        self.lock().cuts.take().unwrap_or_default()
    }
    /// What a power cut now may leave: each sector that was not flushed in any of its versions.
    pub fn power_cut(&self, seed: u64) -> Vec<u8> {
        let bytes = self.lock();
        let mut rng = Rng::new(seed);
        let mut left = bytes.durable.clone();
        for (sector, versions) in &bytes.versions {
            let pick = rng.below(versions.len() as u64 + 1);
            let Some(version) = pick.checked_sub(1).map(|i| &versions[usize::try_from(i).unwrap()]) else {
                continue;
            };
            let end = sector * SECTOR + version.len();
            if left.len() < end {
                left.resize(end, 0);
            }
            left[sector * SECTOR..end].copy_from_slice(version);
        }
        left
    }
    async fn pause(&self) {
        let mut polls = {
            let mut bytes = self.lock();
            let steady = bytes.steady;
            let rng = &mut bytes.rng;
            // Mostly quick, sometimes slow enough for everything else to happen meanwhile.
            if steady {
                2
            } else if rng.below(12) == 0 {
                rng.below(120)
            } else {
                rng.below(4)
            }
        };
        std::future::poll_fn(move |_| {
            polls = polls.saturating_sub(1);
            if polls == 0 { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
    fn put(&self, at: usize, data: &[u8]) -> Result<()> {
        let mut bytes = self.lock();
        if let Some(left) = &mut bytes.fail_after {
            if *left == 0 {
                return Err(IoError::ENOSPC);
            }
            *left -= 1;
        }
        assert!(at + data.len() < 1 << 30, "a write far away");
        if bytes.now.len() < at + data.len() {
            let behind = if bytes.rubbish { 0xee } else { 0 };
            bytes.now.resize(at + data.len(), behind);
        }
        bytes.now[at..at + data.len()].copy_from_slice(data);
        if bytes.forget {
            return Ok(());
        }
        let (first, end) = (at / SECTOR, (at + data.len()).div_ceil(SECTOR));
        for sector in first..end {
            let to = bytes.now.len().min((sector + 1) * SECTOR);
            let version = bytes.now[sector * SECTOR..to].to_vec();
            bytes.versions.entry(sector).or_default().push(version);
        }
        Ok(())
    }
}

#[async_trait]
impl Node for Disk {
    fn driver(&self) -> &'static str {
        "memory"
    }
    fn kind(&self) -> Kind {
        Kind::Protocol
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn length(&self, _cx: &Cx<'_>) -> u64 {
        self.lock().now.len() as u64
    }
    fn unwritten_is_zero(&self, _cx: &Cx<'_>) -> bool {
        !self.lock().rubbish
    }
    async fn read(&self, _cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        self.pause().await;
        let bytes = self.lock();
        let start = usize::try_from(range.start()).unwrap_or(usize::MAX).min(bytes.now.len());
        let end = bytes.now.len().min(start.saturating_add(range.buffer_len()));
        into.fill(0);
        into.write_at(0, &bytes.now[start..end]);
        Ok(())
    }
    async fn write(&self, _cx: &Cx<'_>, range: ByteRange, from: Iov, _flags: WriteFlags) -> Result<()> {
        self.pause().await;
        let at = usize::try_from(range.start()).unwrap();
        // In two pieces: others may come between.
        let data = from.to_vec();
        let middle = data.len() / 2 / SECTOR * SECTOR;
        self.put(at, &data[..middle])?;
        self.pause().await;
        self.put(at + middle, &data[middle..])
    }
    async fn resize(&self, _cx: &Cx<'_>, size: u64, _preallocation: Preallocation) -> Result<()> {
        self.pause().await;
        self.lock().now.resize(usize::try_from(size).unwrap(), 0);
        Ok(())
    }
    /// What is discarded is lost.
    async fn discard(&self, _cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        self.pause().await;
        let start = usize::try_from(range.start()).unwrap();
        let end = self.lock().now.len().min(usize::try_from(range.end()).unwrap());
        if start < end { self.put(start, &vec![0xdd; end - start]) } else { Ok(()) }
    }
    async fn flush(&self, _cx: &Cx<'_>) -> Result<()> {
        if self.lock().cuts.is_some() {
            for _ in 0..4 {
                let seed = self.lock().rng.next();
                let cut = self.power_cut(seed);
                self.lock().cuts.iter_mut().for_each(|cuts| cuts.push(cut.clone()));
            }
        }
        {
            let mut bytes = self.lock();
            if bytes.fail_after == Some(0) {
                return Err(IoError::EIO);
            }
            if !bytes.forget {
                bytes.durable = bytes.now.clone();
                bytes.versions.clear();
            }
            bytes.flushes += 1;
        }
        self.pause().await;
        Ok(())
    }
}

/// What image to make.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub bits: u32,
    pub order: u32,
    pub extended: bool,
    pub v3: bool,
    pub zstd: bool,
    pub size: u64,
}

impl Shape {
    /// An empty image, laid out as qemu-img lays it out.
    pub fn image(&self, backing: bool) -> Vec<u8> {
        let cluster = 1u64 << self.bits;
        let entry = if self.extended { 16 } else { 8 };
        let reach = cluster / entry * cluster;
        let l1_entries = self.size.div_ceil(reach);
        let l1_clusters = (l1_entries * 8).div_ceil(cluster);
        let header = Header {
            version: if self.v3 { Version::V3 } else { Version::V2 },
            cluster_bits: self.bits,
            size: self.size,
            crypt: Crypt::None,
            l1_entries: u32::try_from(l1_entries).unwrap(),
            l1_offset: 3 * cluster,
            refcount_table_offset: cluster,
            refcount_table_clusters: 1,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: if self.extended { crate::features::EXTENDED_L2 } else { 0 }
                | if self.zstd { crate::features::COMPRESSION } else { 0 },
            compatible: 0,
            autoclear: 0,
            refcount_order: self.order,
            compression: if self.zstd { Compression::Zstd } else { Compression::Zlib },
            unknown_fields: Vec::new(),
            extensions: Extensions::default(),
            backing_file: backing.then(|| b"base".to_vec()),
        };
        let mut bytes = header.serialise().unwrap();
        assert!(bytes.len() as u64 <= cluster || self.bits < 10);
        bytes.truncate(usize::try_from(cluster).unwrap());
        bytes.resize(usize::try_from((3 + l1_clusters) * cluster).unwrap(), 0);
        let at = |offset: u64| usize::try_from(offset).unwrap();
        bytes[at(cluster)..at(cluster) + 8].copy_from_slice(&(2 * cluster).to_be_bytes());
        for used in 0..3 + l1_clusters {
            check::put_count(&mut bytes[at(2 * cluster)..at(3 * cluster)], self.order, used, 1);
        }
        bytes
    }
}

/// An open image with a disk below it and perhaps a backing disk.
pub struct Setup {
    pub image: Arc<Qcow2>,
    pub view: Arc<View>,
}

pub fn view_of(node: Arc<dyn Node>) -> Arc<View> {
    View::detached(node, [])
}

pub fn open(disk: Arc<Disk>, backing: Option<Arc<View>>, options: OpenOptions, write: bool) -> Setup {
    let file = view_of(disk);
    let image = Arc::new(run(Qcow2::open(&file.cx(), options)).unwrap());
    let children = [(Role::File, file)].into_iter().chain(backing.map(|view| (Role::Backing, view)));
    let view = View::detached(image.clone(), children);
    if write {
        let access = Access { writable: true, required: Perms::ALL, shared: Perms::ALL, used: true };
        run(image.set_access(&view.cx(), access)).unwrap();
    }
    Setup { image, view }
}

impl Setup {
    pub fn read(&self, start: u64, len: u64) -> Vec<u8> {
        let into = Iov::filled(usize::try_from(len).unwrap(), 0xee);
        run(self.view.cx().read(ByteRange::new(start, len).unwrap(), into.clone())).unwrap();
        into.to_vec()
    }
    pub fn write(&self, start: u64, bytes: &[u8]) -> Result<()> {
        let range = ByteRange::new(start, bytes.len() as u64).unwrap();
        run(self.view.cx().write(range, Iov::copy_of(bytes), WriteFlags::default()))
    }
    pub fn close(&self) {
        run(self.image.close(&self.view.cx())).unwrap();
    }
}

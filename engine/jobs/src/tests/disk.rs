//! An image in memory, with a backing file perhaps: what it holds now, and what a power cut would leave of it.

use std::any::Any;
use std::sync::{Mutex, MutexGuard};

use async_trait::async_trait;
use underlay_graph::range_lock::{Mode, RangeLock};
use underlay_graph::{
    BackingRef, ByteRange, Cx, Extent, IoError, Kind, Limits, Node, Place, Preallocation, Result, WriteFlags,
    ZeroFlags,
};
use underlay_sys::{Iov, rt};

use super::world::Lot;

pub const CLUSTER: u64 = 32 << 10;

#[derive(Clone, Debug, Default, PartialEq)]
pub enum Cluster {
    #[default]
    Below,
    Zero,
    Data(Vec<u8>),
}

/// What fails, and how often yet.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub writes: u32,
    pub populates: u32,
    pub flushes: u32,
    pub headers: u32,
    pub reads: u32,
}

#[derive(Debug, Default)]
pub struct State {
    pub clusters: Vec<Cluster>,
    pub size: u64,
    pub backing: Option<BackingRef>,
    pub durable: Vec<Cluster>,
    pub durable_backing: Option<BackingRef>,
    pub faults: Faults,
    pub mapped: u64,
    pub doubts: u64,
    pub forgiven: u64,
}

#[derive(Debug)]
pub struct Image {
    pub state: Mutex<State>,
    lot: Mutex<Lot>,
    ranges: RangeLock,
}

impl Image {
    pub fn new(size: u64, backing: Option<&str>, seed: u64) -> Self {
        let clusters = vec![Cluster::Below; usize::try_from(size.div_ceil(CLUSTER)).unwrap()];
        let backing = backing.map(|file| BackingRef { file: file.into(), format: Some("image".into()) });
        let state = State {
            durable: clusters.clone(),
            clusters,
            size,
            durable_backing: backing.clone(),
            backing,
            ..State::default()
        };
        Self { state: Mutex::new(state), lot: Mutex::new(Lot::new(seed)), ranges: RangeLock::default() }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    async fn dither(&self) {
        let times = self.lot.lock().unwrap().below(4);
        for _ in 0..times {
            rt::yield_now().await;
        }
    }

    fn fail(&self, which: impl Fn(&mut Faults) -> &mut u32, error: IoError) -> Result<()> {
        let mut state = self.state();
        let left = which(&mut state.faults);
        if *left == 0 {
            return Ok(());
        }
        *left -= 1;
        Err(error)
    }

    /// Cluster number, range in it.
    fn pieces(range: ByteRange) -> impl Iterator<Item = (usize, ByteRange)> {
        let mut rest = range;
        std::iter::from_fn(move || {
            (!rest.is_empty()).then(|| {
                let (piece, later) = rest.split(CLUSTER - rest.start() % CLUSTER);
                rest = later;
                (usize::try_from(piece.start() / CLUSTER).unwrap(), piece)
            })
        })
    }

    async fn cluster_bytes(&self, cx: &Cx<'_>, at: usize) -> Result<Vec<u8>> {
        let cluster = self.state().clusters[at].clone();
        let whole = usize::try_from(CLUSTER).unwrap();
        match (cluster, cx.backing()) {
            (Cluster::Data(bytes), _) => Ok(bytes),
            (Cluster::Below, Some(backing)) => {
                let into = Iov::scratch(whole);
                backing
                    .read(ByteRange::between(at as u64 * CLUSTER, (at as u64 + 1) * CLUSTER), into.clone())
                    .await?;
                Ok(into.to_vec())
            }
            _ => Ok(vec![0; whole]),
        }
    }
}

#[async_trait]
impl Node for Image {
    fn driver(&self) -> &'static str {
        "image"
    }
    fn kind(&self) -> Kind {
        Kind::Protocol
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn length(&self, _: &Cx<'_>) -> u64 {
        self.state().size
    }
    fn image_info(&self) -> underlay_graph::info::ImageInfo {
        underlay_graph::info::ImageInfo { cluster_size: Some(CLUSTER), ..Default::default() }
    }
    fn limits(&self, _: &Cx<'_>) -> Limits {
        Limits { preferred_zero: u32::try_from(CLUSTER).unwrap(), ..Limits::default() }
    }
    async fn read(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        self.dither().await;
        self.fail(|f| &mut f.reads, IoError::EIO)?;
        let size = self.state().size;
        let mut done = 0;
        for (at, piece) in Self::pieces(range) {
            let bytes = if piece.start() >= size {
                vec![0; usize::try_from(CLUSTER).unwrap()]
            } else {
                self.cluster_bytes(cx, at).await?
            };
            let from = usize::try_from(piece.start() % CLUSTER).unwrap();
            into.write_at(done, &bytes[from..from + piece.buffer_len()]);
            done += piece.buffer_len();
        }
        self.dither().await;
        Ok(())
    }
    async fn write(&self, cx: &Cx<'_>, range: ByteRange, from: Iov, _: WriteFlags) -> Result<()> {
        self.dither().await;
        self.fail(|f| &mut f.writes, IoError::ENOSPC)?;
        assert!(range.end() <= self.state().size);
        let mut done = 0;
        for (at, piece) in Self::pieces(range) {
            let _turn = self.ranges.lock(piece.align_out(CLUSTER), Mode::Exclusive).await;
            let mut bytes = self.cluster_bytes(cx, at).await?;
            self.dither().await;
            let skip = usize::try_from(piece.start() % CLUSTER).unwrap();
            from.read_at(done, &mut bytes[skip..skip + piece.buffer_len()]);
            done += piece.buffer_len();
            self.state().clusters[at] = Cluster::Data(bytes);
        }
        Ok(())
    }
    async fn write_zeroes(&self, cx: &Cx<'_>, range: ByteRange, _: ZeroFlags) -> Result<()> {
        self.dither().await;
        for (at, piece) in Self::pieces(range) {
            let _turn = self.ranges.lock(piece.align_out(CLUSTER), Mode::Exclusive).await;
            let whole = piece.len() == CLUSTER;
            let mut bytes = self.cluster_bytes(cx, at).await?;
            self.dither().await;
            let skip = usize::try_from(piece.start() % CLUSTER).unwrap();
            bytes[skip..skip + piece.buffer_len()].fill(0);
            self.state().clusters[at] = if whole { Cluster::Zero } else { Cluster::Data(bytes) };
        }
        Ok(())
    }
    async fn flush(&self, _: &Cx<'_>) -> Result<()> {
        self.fail(|f| &mut f.flushes, IoError::EIO)?;
        self.dither().await;
        let mut state = self.state();
        if state.doubts != state.forgiven {
            return Err(IoError::EIO);
        }
        state.durable = state.clusters.clone();
        Ok(())
    }
    async fn map(&self, _: &Cx<'_>, range: ByteRange) -> Result<Extent> {
        self.dither().await;
        let mut state = self.state();
        state.mapped += 1;
        let place = |at: usize| match state.clusters[at] {
            Cluster::Below => Place::Below,
            Cluster::Zero => Place::Zero,
            Cluster::Data(_) => Place::Data(0),
        };
        let mut pieces = Self::pieces(range);
        let (first, piece) = pieces.next().unwrap();
        let kind = place(first);
        let len = piece.len()
            + pieces.take_while(|(at, _)| place(*at) == kind).map(|(_, piece)| piece.len()).sum::<u64>();
        let place = if kind == Place::Data(0) { Place::Data(range.start()) } else { kind };
        Ok(Extent::new(place, len))
    }
    async fn populate(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        self.fail(|f| &mut f.populates, IoError::EIO)?;
        for (at, piece) in Self::pieces(range) {
            let _turn = self.ranges.lock(piece.align_out(CLUSTER), Mode::Exclusive).await;
            if self.state().clusters[at] == Cluster::Below {
                let bytes = self.cluster_bytes(cx, at).await?;
                self.dither().await;
                self.state().clusters[at] = Cluster::Data(bytes);
            }
        }
        Ok(())
    }
    async fn resize(&self, _: &Cx<'_>, size: u64, _: Preallocation) -> Result<()> {
        let mut state = self.state();
        state.size = size;
        state.clusters.resize(usize::try_from(size.div_ceil(CLUSTER)).unwrap(), Cluster::Below);
        Ok(())
    }
    fn supports_backing(&self) -> bool {
        true
    }
    fn doubts(&self) -> u64 {
        self.state().doubts
    }
    fn forgive(&self) {
        let mut state = self.state();
        state.forgiven = state.doubts;
    }
    fn backing_ref(&self) -> Option<BackingRef> {
        self.state().backing.clone()
    }
    fn can_be_emptied(&self) -> bool {
        true
    }
    async fn make_empty(&self, _: &Cx<'_>) -> Result<()> {
        self.fail(|f| &mut f.headers, IoError::EIO)?;
        self.dither().await;
        let mut state = self.state();
        state.clusters.fill(Cluster::Below);
        // Durable before anything else: the worst that could be.
        state.durable = state.clusters.clone();
        Ok(())
    }
    async fn set_backing_ref(&self, _: &Cx<'_>, backing: Option<BackingRef>) -> Result<()> {
        self.fail(|f| &mut f.headers, IoError::EIO)?;
        self.dither().await;
        let mut state = self.state();
        state.backing = backing.clone();
        state.durable_backing = backing;
        Ok(())
    }
}

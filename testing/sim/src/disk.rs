//! A disk in memory: slow, out of order, failing when told, and forgetful when the power goes.
//!
//! A write becomes visible in two parts at random moments before it is done, and a read sees some moment before it is.
//! Until the next flush each of its sectors may be lost by a power cut, whatever happens to the others. Once the
//! [`Power`] of a disk is cut every request fails, so that all tasks come to their ends; [`Disk::after_power_cut`] is
//! what the next start finds.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use underlay_graph::{
    ByteRange, Cx, Extent, IoError, Kind, Node, Place, Preallocation, Result, WriteFlags, ZeroFlags,
};
use underlay_sys::{Iov, rt};

use crate::SECTOR;
use crate::rng::Rng;

/// No image of a test is that long, in bytes: somebody writes far away.
const LONGEST: u64 = 1 << 28;
/// One in so many reflinks is refused.
const REFUSED: u64 = 4;

/// The power supply of any number of disks: goes at the nth write.
#[derive(Debug)]
pub struct Power {
    /// Writes until the cut; 0 is dark.
    left: AtomicU64,
}

impl Power {
    /// Goes when the `writes`th write begins; never for `u64::MAX`.
    pub fn until(writes: u64) -> Arc<Self> {
        Arc::new(Self { left: AtomicU64::new(writes) })
    }

    /// Goes now.
    pub fn cut(&self) {
        self.left.store(0, Ordering::SeqCst);
    }

    /// Whether it has gone.
    pub fn is_cut(&self) -> bool {
        self.left.load(Ordering::SeqCst) == 0
    }

    fn spend(&self) {
        let less = |left: u64| if left == u64::MAX { None } else { left.checked_sub(1) };
        let _ = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
    }

    fn check(&self) -> Result<()> {
        if self.is_cut() { Err(IoError::EIO.with("the power is gone")) } else { Ok(()) }
    }
}

/// Which requests fail.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Requests of the kind that succeed before.
    pub after: u64,
    /// With what.
    pub error: IoError,
    /// All later ones fail as well.
    pub sticky: bool,
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Read,
    Write,
    Flush,
}

#[derive(Debug)]
struct State {
    rng: Rng,
    now: Vec<u8>,
    durable: Vec<u8>,
    /// What sectors held since the last flush, oldest first, each with its moment.
    versions: BTreeMap<u64, Vec<(u64, Vec<u8>)>>,
    in_flight: BTreeMap<u64, (u64, Vec<u8>)>,
    moment: u64,
    faults: [Option<Fault>; 3],
    /// Bytes that the file may grow to.
    room: u64,
    /// When the last write began.
    written: Duration,
    /// Writes that somebody was told of, if he must be.
    announced: Option<Arc<AtomicU64>>,
    /// As a block device that has grown: what was behind the end until a write came is this.
    behind: u8,
}

/// The disk.
#[derive(Debug)]
pub struct Disk {
    power: Arc<Power>,
    state: Mutex<State>,
}

fn index(at: u64) -> usize {
    usize::try_from(at).expect("checked against LONGEST")
}

impl Disk {
    /// A disk that holds `content`, all of it durable.
    pub fn new(content: Vec<u8>, seed: u64, power: Arc<Power>) -> Arc<Self> {
        let state = State {
            rng: Rng::new(seed),
            durable: content.clone(),
            now: content,
            versions: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            moment: 0,
            faults: [None, None, None],
            room: LONGEST,
            written: Duration::ZERO,
            announced: None,
            behind: if seed.is_multiple_of(3) { 0xee } else { 0 },
        };
        Arc::new(Self { power, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What reads find now.
    pub fn content(&self) -> Vec<u8> {
        self.lock().now.clone()
    }

    /// From now on a write to it that is not among those `announced` is a mistake.
    pub fn must_be_announced(&self, announced: Option<Arc<AtomicU64>>) {
        self.lock().announced = announced;
    }

    /// When the last write began, or it was resized.
    pub fn written_at(&self) -> Duration {
        self.lock().written
    }

    /// It was written to at that time, before it came here.
    pub fn was_written_at(&self, time: Duration) {
        self.lock().written = time;
    }

    /// Reads fail so.
    pub fn fail_reads(&self, fault: Option<Fault>) {
        self.lock().faults[0] = fault;
    }

    /// Writes (of zeroes too) fail so.
    pub fn fail_writes(&self, fault: Option<Fault>) {
        self.lock().faults[1] = fault;
    }

    /// Flushes fail so.
    pub fn fail_flushes(&self, fault: Option<Fault>) {
        self.lock().faults[2] = fault;
    }

    /// Writes behind `room` bytes fail with ENOSPC.
    pub fn limit(&self, room: u64) {
        self.lock().room = room;
    }

    /// What a power cut now may leave: of each sector the flushed content or any later one, torn from its
    /// neighbours; writes under way as well.
    pub fn after_power_cut(&self, seed: u64) -> Vec<u8> {
        let state = self.lock();
        let mut rng = Rng::new(seed);
        // Some cuts keep nearly all, some nearly nothing.
        let keep = rng.below(5);
        let mut left = state.durable.clone();
        let mut put = |at: u64, data: &[u8]| {
            let end = index(at) + data.len();
            if left.len() < end {
                left.resize(end, 0);
            }
            left[index(at)..end].copy_from_slice(data);
        };
        for (sector, versions) in &state.versions {
            if rng.below(4) < keep {
                put(sector * SECTOR, &versions[rng.index(versions.len())].1);
            }
        }
        for (at, data) in state.in_flight.values() {
            let mut from = 0;
            while from < data.len() {
                let sector_end = SECTOR - (at + from as u64) % SECTOR;
                let to = data.len().min(from + index(sector_end));
                if rng.below(6) < keep {
                    put(at + from as u64, &data[from..to]);
                }
                from = to;
            }
        }
        left
    }

    async fn take_time(&self) {
        let micros = {
            let rng = &mut self.lock().rng;
            if rng.one_in(10) { rng.below(3000) } else { rng.below(200) }
        };
        rt::sleep(Duration::from_micros(micros)).await;
    }

    async fn begin(&self, op: Op) -> Result<()> {
        self.take_time().await;
        self.power.check()?;
        let slot = &mut self.lock().faults[op as usize];
        let Some(fault) = slot else { return Ok(()) };
        if fault.after > 0 {
            fault.after -= 1;
            return Ok(());
        }
        let error = fault.error.clone();
        if !fault.sticky {
            *slot = None;
        }
        Err(error)
    }

    async fn put(&self, at: u64, data: Vec<u8>) -> Result<()> {
        self.power.spend();
        let id = {
            let mut state = self.lock();
            if at + data.len() as u64 > state.room {
                return Err(IoError::ENOSPC);
            }
            state.moment += 1;
            state.wrote();
            let id = state.moment;
            state.in_flight.insert(id, (at, data.clone()));
            id
        };
        let result = self.begin(Op::Write).await;
        if self.power.is_cut() {
            // It stays in flight for good.
            return self.power.check();
        }
        if let Err(error) = result {
            self.lock().in_flight.remove(&id);
            return Err(error);
        }
        let split = {
            let sectors = data.len() as u64 / SECTOR;
            data.len().min(index(self.lock().rng.below(sectors + 1) * SECTOR))
        };
        self.lock().show(at, &data[..split]);
        self.take_time().await;
        self.power.check()?;
        let mut state = self.lock();
        state.show(at + split as u64, &data[split..]);
        state.in_flight.remove(&id);
        Ok(())
    }
}

impl State {
    /// A write begins.
    fn wrote(&mut self) {
        self.written = rt::now();
        let announced = self.announced.as_ref().is_none_or(|writes| writes.load(Ordering::SeqCst) > 0);
        assert!(announced, "somebody writes who has not said so");
    }

    /// Makes bytes visible, and remembers what the sectors hold now.
    fn show(&mut self, at: u64, data: &[u8]) {
        let end = at + data.len() as u64;
        assert!(end < LONGEST, "a write far away, at {at:#x}");
        if data.is_empty() {
            return;
        }
        if self.now.len() < index(end) {
            self.now.resize(index(end), self.behind);
        }
        self.now[index(at)..index(end)].copy_from_slice(data);
        self.moment += 1;
        for sector in at / SECTOR..end.div_ceil(SECTOR) {
            let to = self.now.len().min(index((sector + 1) * SECTOR));
            let version = (self.moment, self.now[index(sector * SECTOR)..to].to_vec());
            self.versions.entry(sector).or_default().push(version);
        }
    }

    /// All that was visible at `moment` is durable.
    fn settle(&mut self, moment: u64, len: usize) {
        if self.durable.len() < len {
            self.durable.resize(len, 0);
        }
        for (sector, versions) in &mut self.versions {
            let old = versions.partition_point(|(at, _)| *at <= moment);
            if let Some((_, data)) = versions.drain(..old).next_back() {
                let at = index(sector * SECTOR);
                if self.durable.len() < at + data.len() {
                    self.durable.resize(at + data.len(), 0);
                }
                self.durable[at..at + data.len()].copy_from_slice(&data);
            }
        }
        self.versions.retain(|_, versions| !versions.is_empty());
        // It may have got shorter; or longer since, and that be durable already.
        self.durable.truncate(len.max(self.now.len()));
    }
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
        self.lock().now.len() as u64
    }
    fn unwritten_is_zero(&self, _cx: &Cx<'_>) -> bool {
        self.lock().behind == 0
    }
    async fn read(&self, _cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        self.begin(Op::Read).await?;
        {
            let state = self.lock();
            into.fill(0);
            let end = range.end().min(state.now.len() as u64);
            if range.start() < end {
                into.write_at(0, &state.now[index(range.start())..index(end)]);
            }
        }
        // The bytes may be old when they arrive.
        self.take_time().await;
        Ok(())
    }
    async fn write(&self, _cx: &Cx<'_>, range: ByteRange, from: Iov, _flags: WriteFlags) -> Result<()> {
        self.put(range.start(), from.to_vec()).await
    }
    async fn write_zeroes(&self, _cx: &Cx<'_>, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if range.end() >= LONGEST || flags.no_fallback {
            return Err(IoError::ENOTSUP);
        }
        self.put(range.start(), vec![0; range.buffer_len()]).await
    }
    async fn discard(&self, cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        let range = range.before(self.length(cx));
        self.put(range.start(), vec![0; range.buffer_len()]).await
    }
    async fn reflink_to(&self, _cx: &Cx<'_>, range: ByteRange, to: &Cx<'_>, at: u64) -> Result<()> {
        to.reflink_from(ByteRange::between(at, at + range.len()), self, range.start()).await
    }
    async fn reflink_from(&self, _cx: &Cx<'_>, range: ByteRange, from: &dyn Node, at: u64) -> Result<()> {
        let from = from.as_any().downcast_ref::<Self>().ok_or(IoError::ENOTSUP)?;
        let data = from.lock().now.get(index(at)..index(at + range.len())).map(<[u8]>::to_vec);
        let mut data = data.ok_or(IoError::EINVAL)?;
        let refused = self.lock().rng.one_in(REFUSED);
        if refused {
            // Something may have happened all the same.
            data.truncate(data.len() / 2);
        }
        self.put(range.start(), data).await?;
        if refused { Err(IoError::EINVAL) } else { Ok(()) }
    }
    async fn flush(&self, _cx: &Cx<'_>) -> Result<()> {
        let (moment, len) = {
            let state = self.lock();
            (state.moment, state.now.len())
        };
        self.begin(Op::Flush).await?;
        self.lock().settle(moment, len);
        Ok(())
    }
    async fn map(&self, _cx: &Cx<'_>, range: ByteRange) -> Result<Extent> {
        let state = self.lock();
        let byte = |at: u64| state.now.get(usize::try_from(at).unwrap_or(usize::MAX)).copied().unwrap_or(0);
        let is_hole = |sector: u64| (sector * SECTOR..(sector + 1) * SECTOR).all(|at| byte(at) == 0);
        let first = range.start() / SECTOR;
        let hole = is_hole(first);
        let last = range.end().div_ceil(SECTOR);
        let end = (first + 1..last.min(first + 4096))
            .find(|s| is_hole(*s) != hole)
            .unwrap_or(last.min(first + 4096));
        let len = (end * SECTOR).min(range.end()) - range.start();
        Ok(Extent::new(if hole { Place::Zero } else { Place::Data(range.start()) }, len))
    }
    async fn resize(&self, _cx: &Cx<'_>, size: u64, _preallocation: Preallocation) -> Result<()> {
        self.begin(Op::Write).await?;
        let mut state = self.lock();
        state.wrote();
        if size > state.room.min(LONGEST) {
            return Err(IoError::ENOSPC);
        }
        let len = state.now.len() as u64;
        if size < len {
            let zeroes = vec![0; index(len - size)];
            state.show(size, &zeroes);
        }
        state.now.resize(index(size), 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use underlay_graph::View;

    use super::*;
    use crate::World;

    #[test]
    fn a_cut_keeps_what_was_flushed_and_any_sector_written_since() {
        let (mut all, mut none, mut torn) = (0, 0, 0);
        for seed in 0..300 {
            let disk = Disk::new(vec![1; 2048], seed, Power::until(u64::MAX));
            let view = View::detached(disk.clone(), []);
            World::new(seed).run(async {
                let cx = view.cx();
                let whole = ByteRange::between(0, 2048);
                cx.write(whole, Iov::filled(2048, 2), WriteFlags::default()).await.unwrap();
                cx.flush().await.unwrap();
                let last = ByteRange::between(1024, 2048);
                cx.write(last, Iov::filled(1024, 3), WriteFlags::default()).await.unwrap();
            });
            let left = disk.after_power_cut(seed);
            assert!(left[..1024].iter().all(|b| *b == 2));
            match (left[1024], left[1536]) {
                (2, 2) => none += 1,
                (3, 3) => all += 1,
                _ => torn += 1,
            }
        }
        assert!(all > 20 && none > 20 && torn > 20, "{all} {none} {torn}");
    }

    #[test]
    fn faults_come_when_told() {
        let disk = Disk::new(vec![0; 512], 1, Power::until(u64::MAX));
        let view = View::detached(disk.clone(), []);
        disk.fail_writes(Some(Fault { after: 1, error: IoError::ENOSPC, sticky: false }));
        World::new(1).run(async {
            let cx = view.cx();
            let range = ByteRange::between(0, 512);
            let write = || cx.write(range, Iov::filled(512, 7), WriteFlags::default());
            assert!(write().await.is_ok());
            assert_eq!(write().await, Err(IoError::ENOSPC));
            assert!(write().await.is_ok());
            disk.power.cut();
            assert_eq!(write().await, Err(IoError::EIO));
        });
    }
}

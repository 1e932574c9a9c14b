//! A raw disk in the simulated world and the file beside it that has its bitmaps: how both are after a power cut, after
//! the one who kept the bitmaps was killed, and after somebody else has written to the disk.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use underlay_drivers::beside::home::Home;
use underlay_drivers::beside::tie::{Mark, Note};
use underlay_graph::bitmaps::NewBitmap;
use underlay_graph::{ByteRange, IoError, Perms, Result, View, WriteFlags, ZeroFlags};
use underlay_sim::{Disk, Power, Rng, run_seeds};
use underlay_sys::stat::Boot;
use underlay_sys::{Iov, rt};

use crate::lab::{SMALL, add_user, build};

/// The clock on the wall when the world began.
const BEGINNING: i64 = 1_000_000_000_000_000_000;
/// File systems count time in steps of so many nanoseconds.
const STEP: i64 = 4_000_000;

/// How the one ends who keeps the bitmaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As he should, or not at all: the disks are as they are.
    Still,
    /// The power is cut.
    Cut,
    /// He is killed, and there is a witness.
    Killed,
}

/// See the module.
#[derive(Debug)]
pub struct SimHome {
    pub disk: Arc<Disk>,
    power: Arc<Power>,
    boot: Boot,
    /// Writes under way.
    writing: Arc<AtomicU64>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    side: Option<Arc<Disk>>,
    unfinished: Option<Arc<Disk>>,
    /// What the witness would note, and where.
    witness: Option<(u64, u64)>,
    /// The disk's times are durable up to this.
    synced: Duration,
    seed: u64,
}

fn wall(time: Duration) -> i64 {
    BEGINNING + i64::try_from(time.as_nanos()).unwrap()
}

fn stepped(time: Duration) -> i64 {
    wall(time) / STEP * STEP
}

fn disk_of(view: &View) -> &Disk {
    view.node().as_any().downcast_ref().unwrap()
}

impl SimHome {
    pub fn new(disk: &Arc<Disk>, power: &Arc<Power>, seed: u64) -> Arc<Self> {
        let state = Mutex::new(State { seed, ..State::default() });
        let boot = Boot { id: 1, began: BEGINNING - 1 };
        let (disk, power, writing) = (disk.clone(), power.clone(), Arc::default());
        Arc::new(Self { disk, power, boot, writing, state })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn check(&self) -> Result<()> {
        if self.power.is_cut() { Err(IoError::EIO.with("the power is gone")) } else { Ok(()) }
    }

    /// What there is after an end, in a world that goes on. Nobody writes any more.
    pub fn after(&self, end: End, seed: u64) -> Arc<Self> {
        let mut rng = Rng::new(seed ^ 0x5ca1e);
        let power = Power::until(u64::MAX);
        let left = |disk: &Arc<Disk>, written, seed| {
            let content = if end == End::Cut { disk.after_power_cut(seed) } else { disk.content() };
            let left = Disk::new(content, seed, power.clone());
            left.was_written_at(written);
            left
        };
        let state = self.state();
        let mut written = self.disk.written_at();
        let mut boot = self.boot;
        if end == End::Cut {
            // The last time that the file system has may be older than the last write.
            if rng.one_in(2) && state.synced < written {
                written = state.synced;
            }
            boot = Boot { id: boot.id + 1, began: wall(rt::now()) + 1 };
        }
        let disk = left(&self.disk, written, seed);
        let side = state.side.as_ref().map(|side| left(side, side.written_at(), seed ^ 1));
        let after = State { side, synced: written, seed, ..State::default() };
        let home = Arc::new(Self { disk, power, boot, writing: Arc::default(), state: Mutex::new(after) });
        if end == End::Killed
            && let (Some((at, session)), Some(side)) = (state.witness, home.state().side.as_mut())
        {
            let mark = home.mark().unwrap();
            let mut content = side.content();
            let at = usize::try_from(at).unwrap();
            let note = Note { session, mark }.to_bytes();
            content[at..at + note.len()].copy_from_slice(&note);
            *side = Disk::new(content, seed, home.power.clone());
        }
        home
    }

    /// The disk of the file beside, if there is one.
    pub fn side(&self) -> Option<Arc<Disk>> {
        self.state().side.clone()
    }

    /// Somebody writes to the disk who does not know of its bitmaps.
    pub async fn somebody_writes(&self) {
        // Nobody comes in the very moment when another has ended.
        rt::sleep(Duration::from_nanos(STEP.cast_unsigned())).await;
        self.disk.was_written_at(rt::now());
    }
}

#[async_trait]
impl Home for SimHome {
    fn name(&self) -> String {
        "disk.bitmaps".into()
    }

    async fn open(&self) -> Result<Option<Arc<View>>> {
        Ok(self.state().side.clone().map(|side| View::detached(side, [])))
    }

    async fn create(&self) -> Result<Arc<View>> {
        self.check()?;
        let mut state = self.state();
        state.seed += 1;
        let new = Disk::new(Vec::new(), state.seed, self.power.clone());
        new.was_written_at(rt::now());
        state.unfinished = Some(new.clone());
        Ok(View::detached(new, []))
    }

    async fn publish(&self, beside: &View) -> Result<()> {
        self.check()?;
        let mut state = self.state();
        assert!(state.side.is_none());
        state.side = state.unfinished.take();
        assert!(std::ptr::eq(&**state.side.as_ref().unwrap(), disk_of(beside)));
        Ok(())
    }

    async fn remove(&self, beside: &View) -> Result<()> {
        self.check()?;
        let mut state = self.state();
        state.side.take_if(|side| std::ptr::eq(&**side, disk_of(beside)));
        state.unfinished = None;
        self.disk.must_be_announced(None);
        Ok(())
    }

    fn mark(&self) -> Result<Mark> {
        let time = stepped(self.disk.written_at());
        let len = self.disk.content().len() as u64;
        Ok(Mark { inode: 7, len, modified: time, changed: time })
    }

    async fn sync(&self) -> Result<()> {
        let view = View::detached(self.disk.clone(), []);
        let written = self.disk.written_at();
        view.cx().flush().await?;
        self.state().synced = written;
        Ok(())
    }

    fn written_at(&self, beside: &View) -> Result<i64> {
        Ok(stepped(disk_of(beside).written_at()))
    }

    fn boot(&self) -> Result<Boot> {
        Ok(self.boot)
    }

    fn now(&self) -> i64 {
        wall(rt::now())
    }

    async fn call_witness(&self, _beside: &View, at: u64, session: u64) {
        self.state().witness = Some((at, session));
    }

    fn dismiss_witness(&self) {
        self.state().witness = None;
    }

    fn begin_write(&self) {
        self.writing.fetch_add(1, Ordering::SeqCst);
        // Those that began before the first bitmap was there were not.
        self.disk.must_be_announced(Some(self.writing.clone()));
    }

    fn end_write(&self) {
        self.writing.fetch_sub(1, Ordering::SeqCst);
    }

    async fn hear_witness(&self, _beside: &View) {}
}

/// Whatever changes the content of a disk with bitmaps beside it says so before: the disk looks (see
/// [`SimHome::begin_write`]).
#[test]
fn every_kind_of_write_is_announced() {
    run_seeds(20, |seed| async move {
        let mut rng = Rng::new(seed);
        let setup = build(&mut rng, 1, SMALL).await;
        let Some(home) = &setup.layers[0].home else { return };
        let node = setup.layers[0].node;
        setup.graph.let_bitmaps_last();
        let new = NewBitmap { name: "b", granularity: None, persistent: true, enabled: true };
        setup.graph.change(|plan| plan.add_bitmap(node, &new)).await.unwrap();
        assert!(home.side().is_some());
        let root = add_user(&setup.graph, node, Perms::WRITE).await;
        let range = ByteRange::between(0, 4096);
        root.write(range, Iov::filled(4096, 1), WriteFlags::default()).await.unwrap();
        root.write_zeroes(range, ZeroFlags::default()).await.unwrap();
        root.discard(range).await.unwrap();
        let other = View::detached(Disk::new(vec![7; 8192], seed, setup.power.clone()), []);
        let view = setup.graph.wires().view(node);
        while other.cx().reflink(range, &view.cx(), 0).await.is_err() {}
        assert_eq!(home.disk.content()[..4096], [7; 4096]);
        let bits = setup.graph.plan().bitmap(node, "b").unwrap().bits.clone();
        assert!(bits.any(range));
    });
}

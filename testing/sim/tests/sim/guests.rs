//! Guests on one disk: they write, read and flush at random, and know what they may read.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use underlay_graph::{ByteRange, Root, WriteFlags, ZeroFlags};
use underlay_sim::model::stamp;
use underlay_sim::{Model, Rng, SECTOR};
use underlay_sys::{Iov, rt};

use crate::lab::Setup;

/// What the guests share.
#[derive(Clone)]
pub struct Guests {
    pub root: Root,
    model: Arc<Mutex<Model>>,
    numbers: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    /// Errors are expected: the disks fail.
    errors: bool,
    /// They may write compressed.
    pub compress: bool,
    cluster: u64,
    sectors: u64,
}

impl Guests {
    pub fn new(setup: &Setup, errors: bool) -> Self {
        Self {
            root: setup.guest.clone(),
            model: Arc::new(Mutex::new(setup.model.clone())),
            numbers: Arc::new(AtomicU64::new(setup.numbers)),
            stop: Arc::default(),
            errors,
            compress: setup.layers.iter().all(|layer| !layer.raw),
            cluster: setup.cluster,
            sectors: setup.sectors,
        }
    }

    /// What they may read.
    pub fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap()
    }

    /// They have been told to stop.
    pub fn are_over(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// The same guests on disks that do not fail.
    pub fn on_sound_disks(&self) -> Self {
        Self { errors: false, stop: Arc::default(), ..self.clone() }
    }

    /// Others who use the same disk another way.
    pub fn through(&self, root: Root) -> Self {
        Self { root, ..self.clone() }
    }

    fn settle(&self, result: underlay_graph::Result<()>) -> bool {
        assert!(result.is_ok() || self.errors, "{result:?}");
        result.is_ok()
    }

    async fn step(&self, rng: &mut Rng) {
        let mut first = rng.below(self.sectors);
        let mut count = (1 + rng.below(2 * self.cluster / SECTOR + 2)).min(self.sectors - first);
        let action = rng.below(16);
        if action == 8 {
            first -= first % (self.cluster / SECTOR);
            count = (self.cluster / SECTOR).min(self.sectors - first);
        }
        let range = ByteRange::between(first * SECTOR, (first + count) * SECTOR);
        let number = self.numbers.fetch_add(1, Ordering::SeqCst);
        match action {
            0..=8 => {
                let flags = WriteFlags { compressed: self.compress && action == 8 };
                let bytes = Iov::copy_of(&stamp(first, count, number));
                let writing = self.model().begin_write(first, count, number, number);
                let ok = self.settle(self.root.write(range, bytes, flags).await);
                self.model().end_write(writing, ok);
            }
            9 | 10 => {
                let flags = ZeroFlags { may_unmap: rng.one_in(2), no_fallback: false };
                let writing = self.model().begin_write(first, count, 0, number);
                let ok = if action == 9 {
                    self.settle(self.root.write_zeroes(range, flags).await)
                } else {
                    self.settle(self.root.discard(range).await);
                    false
                };
                self.model().end_write(writing, ok);
            }
            11 => {
                let flush = self.model().begin_flush();
                if self.settle(self.root.flush().await) {
                    self.model().end_flush(&flush);
                }
            }
            _ => {
                let into = Iov::filled(range.buffer_len(), 0xee);
                let read = self.model().begin_read(first, count);
                if self.settle(self.root.read(range, into.clone()).await) {
                    self.model().end_read(&read, &into.to_vec()).unwrap();
                }
            }
        }
    }

    /// Starts `count` guests that work until they are stopped, or for `steps`.
    pub fn start(&self, rng: &mut Rng, count: u64, steps: u64) -> Running {
        let one = |seed| {
            let guests = self.clone();
            rt::spawn(async move {
                let mut rng = Rng::new(seed);
                for _ in 0..steps {
                    if guests.are_over() {
                        break;
                    }
                    guests.step(&mut rng).await;
                    rt::sleep(Duration::from_micros(rng.below(300))).await;
                }
            })
        };
        let tasks = (0..count).map(|_| one(rng.number())).collect();
        Running { guests: self.clone(), tasks }
    }

    /// Reads the whole disk and compares.
    pub async fn verify(&self) {
        let into = Iov::scratch(usize::try_from(self.sectors * SECTOR).unwrap());
        let read = self.model().begin_read(0, self.sectors);
        self.root.read(ByteRange::between(0, self.sectors * SECTOR), into.clone()).await.unwrap();
        self.model().end_read(&read, &into.to_vec()).unwrap();
    }
}
/// Guests at work.
pub struct Running {
    pub guests: Guests,
    tasks: Vec<rt::JoinHandle<()>>,
}

impl Running {
    /// They have done all that they wanted.
    pub async fn done(&mut self) {
        for task in self.tasks.drain(..) {
            task.await;
        }
    }

    /// They do what they are at, and no more.
    pub async fn stop(&mut self) {
        self.guests.stop.store(true, Ordering::SeqCst);
        self.done().await;
    }
}

//! A guest on the daemon's export: a thread that keeps several requests under way, and takes account of each in a
//! [`Model`], until it is stopped or the daemon dies.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use underlay_nbd::blocking::{Client, Completion, Server};
use underlay_nbd::flags::{CMD_FUA, CMD_NO_HOLE};
use underlay_nbd::transmission::command;
use underlay_sim::Rng;

use crate::model::{BYTES, Effect, Model};

/// A guest at work.
pub struct Guest {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    model: Arc<Mutex<Model>>,
    thread: JoinHandle<Account>,
}

/// What is left when a guest has stopped.
pub struct Account {
    /// What its disk may hold.
    pub model: Model,
    /// What must not be: reads that saw something else, requests that failed.
    pub wrong: Vec<String>,
    /// Requests answered.
    pub served: u64,
    /// Whether the connection was lost.
    pub lost: bool,
}

/// What was asked for.
enum Asked {
    Change { generation: u32, durable: bool },
    Flush { acknowledgements: u64 },
    Read { sectors: Range<usize> },
}

impl Guest {
    /// Connects and begins; `depth` is how many requests it keeps under way.
    pub fn start(socket: &Path, model: Model, seed: u64, depth: usize) -> Result<Self, String> {
        let client = Client::connect(&Server::unix(socket), "disk", &[]);
        let client = client.map_err(|error| format!("the guest cannot connect: {error}"))?;
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let model = Arc::new(Mutex::new(model));
        let worker = Worker {
            client,
            model: model.clone(),
            random: Rng::new(seed),
            asked: HashMap::new(),
            reading: Vec::new(),
            wrong: Vec::new(),
            served: served.clone(),
        };
        let stop_too = stop.clone();
        let thread = std::thread::spawn(move || worker.work(&stop_too, depth));
        Ok(Self { stop, served, model, thread })
    }

    /// Changes that have been acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        lock(&self.model).acknowledgements()
    }

    /// A copy of the disk is asked for.
    pub fn begin_copy(&self) {
        lock(&self.model).begin_copy();
    }

    /// The copy has begun: what it may hold.
    pub fn copy(&self) -> Model {
        lock(&self.model).copy()
    }

    /// Waits until `more` requests have been answered, or the guest has ended.
    pub fn serve(&self, more: u64) {
        let until = self.served.load(Ordering::Relaxed) + more;
        while self.served.load(Ordering::Relaxed) < until && !self.thread.is_finished() {
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Has the guest wait for its requests and leave.
    pub fn stop(self) -> Result<Account, String> {
        self.stop.store(true, Ordering::Relaxed);
        self.join()
    }

    /// Waits for the guest of a daemon that has died.
    pub fn join(self) -> Result<Account, String> {
        self.thread.join().map_err(|_| "the guest panicked".to_owned())
    }
}

struct Worker {
    client: Client,
    model: Arc<Mutex<Model>>,
    random: Rng,
    asked: HashMap<u64, Asked>,
    /// What is being read: not to be changed meanwhile.
    reading: Vec<Range<usize>>,
    wrong: Vec<String>,
    served: Arc<AtomicU64>,
}

fn lock(model: &Mutex<Model>) -> MutexGuard<'_, Model> {
    model.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Worker {
    fn model(&self) -> MutexGuard<'_, Model> {
        lock(&self.model)
    }

    fn work(mut self, stop: &AtomicBool, depth: usize) -> Account {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        let ended = self.requests(stop, depth).err();
        let lost = ended.is_some();
        if let Some(error) = ended
            && !matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
        {
            self.wrong.push(format!("the guest: {error}"));
        }
        let model = self.model().clone();
        Account { model, wrong: self.wrong, served: self.served.load(Ordering::Relaxed), lost }
    }

    fn requests(&mut self, stop: &AtomicBool, depth: usize) -> std::io::Result<()> {
        loop {
            let stopping = stop.load(Ordering::Relaxed);
            while !stopping && self.asked.len() < depth {
                self.ask()?;
            }
            if self.asked.is_empty() {
                return Ok(());
            }
            self.client.send()?;
            let completion = self.client.complete()?;
            self.answer(completion)?;
            self.served.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A range that nothing under way touches: small or large, on borders of pages and clusters or not.
    fn sectors(&mut self) -> Range<usize> {
        loop {
            let (unit, most) = self.random.pick(&[(1, 8), (8, 1), (8, 1), (8, 16), (128, 2)]);
            let len = unit * (1 + self.random.index(most));
            let all = self.model().len();
            let start = self.random.index(all / unit) * unit;
            let sectors = start..(start + len).min(all);
            let is_read =
                self.reading.iter().any(|other| other.start < sectors.end && sectors.start < other.end);
            if !is_read && !self.model().is_busy(&sectors) {
                return sectors;
            }
        }
    }

    fn ask(&mut self) -> std::io::Result<()> {
        let sectors = self.sectors();
        let (offset, length) = (bytes(sectors.start), bytes(sectors.len()));
        let durable = self.random.one_in(16);
        let flags = if durable { CMD_FUA } else { 0 };
        let (cookie, asked) = match self.random.below(16) {
            0 => {
                let acknowledgements = self.model().acknowledgements();
                (self.client.submit(command::FLUSH, 0, 0, 0, &[])?, Asked::Flush { acknowledgements })
            }
            1 => {
                self.reading.push(sectors.clone());
                (self.client.submit(command::READ, 0, offset, length, &[])?, Asked::Read { sectors })
            }
            2 => {
                let generation = self.model().begin(Effect::Discard, sectors).generation;
                let cookie = self.client.submit(command::TRIM, flags, offset, length, &[])?;
                (cookie, Asked::Change { generation, durable })
            }
            3 => {
                let generation = self.model().begin(Effect::Zeroes, sectors).generation;
                let no_hole = if self.random.one_in(2) { CMD_NO_HOLE } else { 0 };
                let cookie =
                    self.client.submit(command::WRITE_ZEROES, flags | no_hole, offset, length, &[])?;
                (cookie, Asked::Change { generation, durable })
            }
            _ => {
                let change = self.model().begin(Effect::Data, sectors);
                let content = self.model().content(&change);
                let cookie = self.client.submit(command::WRITE, flags, offset, length, &content)?;
                (cookie, Asked::Change { generation: change.generation, durable })
            }
        };
        self.asked.insert(cookie, asked);
        Ok(())
    }

    fn answer(&mut self, completion: Completion) -> std::io::Result<()> {
        if let Some((errno, text)) = &completion.error {
            return Err(std::io::Error::other(format!("a request failed: {errno:?} {text}")));
        }
        match self.asked.remove(&completion.cookie) {
            Some(Asked::Change { generation, durable }) => {
                self.model().acknowledge(generation, durable);
            }
            Some(Asked::Flush { acknowledgements }) => self.model().flushed(acknowledgements),
            Some(Asked::Read { sectors }) => {
                self.reading.retain(|other| *other != sectors);
                for (at, found) in sectors.zip(completion.data.chunks(BYTES)) {
                    let model = lock(&self.model);
                    if let Some(wrong) = model.judge(at, found) {
                        self.wrong.push(format!("live: {wrong:?}: {}", model.describe(at, found)));
                    }
                }
                self.client.recycle(completion.data);
            }
            None => {}
        }
        Ok(())
    }
}

fn bytes(sectors: usize) -> u64 {
    (sectors * BYTES) as u64
}

/// Reads a whole export of `sectors` sectors.
pub fn read_all(client: &mut Client, sectors: usize) -> std::io::Result<Vec<u8>> {
    const PIECE: u64 = 1 << 20;
    let mut all = Vec::with_capacity(sectors * BYTES);
    while all.len() < sectors * BYTES {
        let length = u32::try_from(PIECE.min((sectors * BYTES - all.len()) as u64)).unwrap_or(0);
        all.extend(client.read(all.len() as u64, length)?);
    }
    Ok(all)
}

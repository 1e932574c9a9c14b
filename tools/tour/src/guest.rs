//! A guest that writes and verifies over NBD all the time, and knows what every byte of its disk must be.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use underlay_nbd::blocking::{Client, Server};

/// Bytes that the guest reads and writes at a time.
const BLOCK: usize = 4096;

/// What the guest did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Account {
    /// Requests served.
    pub requests: u64,
    /// Blocks that were not what they had to be.
    pub errors: u64,
}

/// What the guest's disk holds at a moment, block by block: how often each was written.
#[derive(Clone, Debug)]
pub struct Moment(Vec<u64>);

impl Moment {
    /// Blocks of an export that are not what they were at this moment.
    pub fn differences(&self, socket: &Path, export: &str) -> Result<u64, String> {
        let said = |error: std::io::Error| format!("{export}: {error}");
        let client = Client::connect(&Server::unix(socket), export, &[]).map_err(said)?;
        let mut disk = Disk { client, versions: self.0.clone(), random: 1, errors: 0 };
        for block in 0..disk.versions.len() {
            disk.verify(block).map_err(said)?;
        }
        disk.client.disconnect().map_err(said)?;
        Ok(disk.errors)
    }
}

/// What the guest is told.
enum Order {
    /// To make no request until the next order, and to say what its disk holds.
    Rest(mpsc::Sender<Moment>),
    /// To go on, on this connection from now on if there is one.
    GoOn(Option<Box<Client>>),
}

/// A running guest.
pub struct Guest {
    orders: mpsc::Sender<Order>,
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    thread: JoinHandle<Result<Account, String>>,
    failed: mpsc::Receiver<()>,
}

impl Guest {
    /// Starts a guest on an export.
    pub fn start(socket: &Path, export: &str, seed: u64) -> Result<Self, String> {
        let client =
            Client::connect(&Server::unix(socket), export, &[]).map_err(|error| format!("guest: {error}"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let requests = Arc::new(AtomicU64::new(0));
        let (alive, failed) = mpsc::channel();
        let (orders, to_obey) = mpsc::channel();
        let (stop_too, requests_too) = (stop.clone(), requests.clone());
        let thread = std::thread::spawn(move || {
            let _alive = alive;
            Disk::new(client, seed).live(&stop_too, &requests_too, &to_obey)
        });
        Ok(Self { orders, stop, requests, thread, failed })
    }

    /// Requests served so far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Waits until the guest has been served `more` requests, or has stopped because of an error.
    pub fn work(&self, more: u64) {
        let until = self.requests() + more;
        while self.requests() < until && self.failed.try_recv() != Err(mpsc::TryRecvError::Disconnected) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// Has the guest flush, and rest: what its disk holds then.
    pub fn rest(&self) -> Result<Moment, String> {
        let (answer, moment) = mpsc::channel();
        let gone = "the guest has gone";
        self.orders.send(Order::Rest(answer)).map_err(|_| gone)?;
        moment.recv().map_err(|_| gone.to_owned())
    }

    /// Has it go on, at another server's export if one is named.
    pub fn go_on(&self, elsewhere: Option<(&Path, &str)>) -> Result<(), String> {
        let connect = |(socket, export): (&Path, &str)| {
            Client::connect(&Server::unix(socket), export, &[]).map_err(|error| format!("guest: {error}"))
        };
        let client = elsewhere.map(connect).transpose()?.map(Box::new);
        self.orders.send(Order::GoOn(client)).map_err(|_| "the guest has gone".to_owned())
    }

    /// Has the guest verify its whole disk and leave.
    pub fn finish(self) -> Result<Account, String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| "the guest panicked".to_owned())?
    }
}

/// The guest's disk and what it must contain.
struct Disk {
    client: Client,
    /// How often each block was written; 0 is never: zeroes.
    versions: Vec<u64>,
    random: u64,
    errors: u64,
}

impl Disk {
    fn new(client: Client, seed: u64) -> Self {
        let blocks = usize::try_from(client.size()).unwrap_or(0) / BLOCK;
        Self { client, versions: vec![0; blocks], random: seed | 1, errors: 0 }
    }

    fn random(&mut self, below: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from(self.random % below.max(1) as u64).unwrap_or(0)
    }

    /// Does what it is told, if it is told anything.
    fn obey(&mut self, orders: &mpsc::Receiver<Order>) -> std::io::Result<()> {
        let Ok(Order::Rest(answer)) = orders.try_recv() else { return Ok(()) };
        self.client.flush()?;
        // Nobody may be there to hear it any more; then nobody gives orders either.
        let _ = answer.send(Moment(self.versions.clone()));
        if let Ok(Order::GoOn(Some(client))) = orders.recv() {
            // The other server may be gone.
            let _ = std::mem::replace(&mut self.client, *client).disconnect();
        }
        Ok(())
    }

    fn live(
        mut self,
        stop: &AtomicBool,
        requests: &AtomicU64,
        orders: &mpsc::Receiver<Order>,
    ) -> Result<Account, String> {
        let said = |error: std::io::Error| format!("guest: {error}");
        while !stop.load(Ordering::Relaxed) {
            self.obey(orders).map_err(said)?;
            let block = self.random(self.versions.len());
            match self.random(8) {
                0..4 => self.write(block).map_err(said)?,
                4 => self.client.flush().map_err(said)?,
                _ => self.verify(block).map_err(said)?,
            }
            requests.fetch_add(1, Ordering::Relaxed);
        }
        for block in 0..self.versions.len() {
            self.verify(block).map_err(said)?;
        }
        let account = Account { requests: requests.load(Ordering::Relaxed), errors: self.errors };
        self.client.disconnect().map_err(said)?;
        Ok(account)
    }

    fn write(&mut self, block: usize) -> std::io::Result<()> {
        self.versions[block] += 1;
        let data = content(block, self.versions[block]);
        self.client.write((block * BLOCK) as u64, &data, 0)
    }

    fn verify(&mut self, block: usize) -> std::io::Result<()> {
        let length = u32::try_from(BLOCK).unwrap_or(0);
        let found = self.client.read((block * BLOCK) as u64, length)?;
        if found != content(block, self.versions[block]) {
            self.errors += 1;
        }
        Ok(())
    }
}

/// What a block holds in a version: its number and the version, over and over.
fn content(block: usize, version: u64) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK];
    }
    let mut unit = [0; 16];
    unit[..8].copy_from_slice(&(block as u64).to_le_bytes());
    unit[8..].copy_from_slice(&version.to_le_bytes());
    unit.repeat(BLOCK / 16)
}

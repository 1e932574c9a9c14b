//! A guest: requests of one size over NBD, so many at a time, on one or several connections.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use underlay_nbd::blocking::Client;

use crate::measure::{Outcome, median};

/// Pseudorandom numbers (xorshift): the same for both sides.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[3]
    }
}

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    Read,
    Write,
    Both,
}

/// In which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Random,
    Sequential,
    /// One request in each cluster of 64 KiB, in random order, and that is all.
    EachCluster,
    /// One request every so many bytes, and that is all.
    Every(u64),
}

impl Order {
    /// Whether it comes to its end by itself.
    fn ends(self) -> bool {
        matches!(self, Self::EachCluster | Self::Every(_))
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub mix: Mix,
    pub order: Order,
    pub bytes: u32,
    pub depth: usize,
}

/// 4 KiB at random.
pub fn random(mix: Mix, depth: usize) -> Load {
    Load { mix, order: Order::Random, bytes: 4096, depth }
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Served {
    /// Microseconds per request: time by number of requests.
    pub time: f64,
    /// 99th percentile of the requests' times, in microseconds.
    pub p99: f64,
}

const CLUSTER: u64 = 64 << 10;

/// The offsets of a load.
struct Offsets {
    load: Load,
    size: u64,
    blocks: u64,
    next: u64,
    random: Random,
    shuffled: Vec<u64>,
}

impl Offsets {
    fn new(load: Load, size: u64, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut shuffled = Vec::new();
        if load.order == Order::EachCluster {
            shuffled.extend((0..size / CLUSTER).map(|cluster| cluster * CLUSTER));
            for last in (1..shuffled.len()).rev() {
                let other = random.below(last as u64 + 1);
                shuffled.swap(last, usize::try_from(other).unwrap_or(0));
            }
        }
        Self { load, size, blocks: size / u64::from(load.bytes), next: 0, random, shuffled }
    }

    fn next(&mut self) -> Option<u64> {
        match self.load.order {
            Order::Random => Some(self.random.below(self.blocks) * u64::from(self.load.bytes)),
            Order::EachCluster => self.shuffled.pop(),
            Order::Every(step) => {
                let at = self.next;
                self.next += step;
                Some(at).filter(|at| at + u64::from(self.load.bytes) <= self.size)
            }
            Order::Sequential => {
                self.next = (self.next + 1) % self.blocks;
                Some(self.next * u64::from(self.load.bytes))
            }
        }
    }
}

/// When to stop.
#[derive(Clone, Copy)]
pub enum Until<'a> {
    Time(Duration),
    Told(&'a AtomicBool),
}

impl Until<'_> {
    fn is_over(self, begun: Instant) -> bool {
        match self {
            Self::Time(time) => begun.elapsed() >= time,
            Self::Told(stop) => stop.load(Ordering::Relaxed),
        }
    }
}

/// One connection's requests under way.
struct Guest {
    client: Client,
    offsets: Offsets,
    data: Vec<u8>,
    sent: HashMap<u64, Instant>,
    times: Vec<f64>,
}

impl Guest {
    fn submit(&mut self) -> Outcome<bool> {
        let Some(at) = self.offsets.next() else { return Ok(false) };
        let load = self.offsets.load;
        let write = match load.mix {
            Mix::Read => false,
            Mix::Write => true,
            Mix::Both => self.offsets.random.below(2) == 0,
        };
        let cookie = match write {
            true => self.client.submit_write(at, &self.data)?,
            false => self.client.submit_read(at, load.bytes)?,
        };
        self.sent.insert(cookie, Instant::now());
        Ok(true)
    }

    fn complete(&mut self) -> Outcome<()> {
        let completion = self.client.complete()?;
        if let Some((error, text)) = completion.error {
            return Err(format!("guest: {error:?} {text}").into());
        }
        if let Some(sent) = self.sent.remove(&completion.cookie) {
            self.times.push(sent.elapsed().as_secs_f64() * 1e6);
        }
        self.client.recycle(completion.data);
        Ok(())
    }
}

/// Runs a load on one connection.
pub fn run(client: Client, load: Load, until: Until<'_>, seed: u64) -> Outcome<Served> {
    let offsets = Offsets::new(load, client.size(), seed);
    let data = vec![0xa5; usize::try_from(load.bytes)?];
    let mut guest = Guest { client, offsets, data, sent: HashMap::new(), times: Vec::new() };
    let begun = Instant::now();
    let mut more = true;
    for _ in 0..load.depth {
        more = more && guest.submit()?;
    }
    while guest.client.in_flight() > 0 {
        guest.complete()?;
        more = more && !(guest.times.len().is_multiple_of(16) && !load.order.ends() && until.is_over(begun));
        if more {
            more = guest.submit()?;
        }
    }
    let time = begun.elapsed().as_secs_f64() * 1e6;
    let mut times = guest.times;
    times.sort_by(f64::total_cmp);
    let p99 = times.get(times.len() * 99 / 100).copied().unwrap_or(median(&times));
    Ok(Served { time: time / times.len().max(1) as f64, p99 })
}

/// Runs a load on several connections at once; the time is per request of all of them.
pub fn run_all(clients: Vec<Client>, load: Load, time: Duration) -> Outcome<Served> {
    let count = clients.len() as f64;
    let results: Vec<Result<Served, String>> = std::thread::scope(|scope| {
        let run = |(seed, client)| {
            scope.spawn(move || {
                run(client, load, Until::Time(time), seed as u64 + 1).map_err(|error| error.to_string())
            })
        };
        let threads: Vec<_> = clients.into_iter().enumerate().map(run).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|_| Err("a guest panicked".into()))
        };
        threads.into_iter().map(join).collect()
    });
    let all = results.into_iter().collect::<Result<Vec<_>, _>>()?;
    let per_second: f64 = all.iter().map(|served| 1.0 / served.time).sum();
    let p99 = all.iter().map(|served| served.p99).sum::<f64>() / count;
    Ok(Served { time: 1.0 / per_second, p99 })
}

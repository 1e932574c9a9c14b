//! Measures the NBD path alone: a server over a disk in memory, and a pipelining client.
//!
//! `nbd_null serve SOCKET [MIB [THREADS]]` serves until standard input ends (exports `disk` and read-only `ro`);
//! `nbd_null bench SOCKET EXPORT read|write BYTES DEPTH SECONDS [CLIENTS]` measures any NBD server.
#![forbid(unsafe_code)]

mod ram;

use std::io::Read as _;
use std::time::{Duration, Instant};

use underlay_exports::nbd::{NbdExport, NbdServer, ServerOptions};
use underlay_nbd::blocking::{Client, Server};
use underlay_sys::thread::{IoThread, block_on};
use underlay_sys::{net::Address, say};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> Outcome {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["serve", socket] => serve(socket, 1024, 1),
        ["serve", socket, mib] => serve(socket, mib.parse()?, 1),
        ["serve", socket, mib, threads] => serve(socket, mib.parse()?, threads.parse()?),
        ["bench", socket, export, what, bytes, depth, seconds, ref clients @ ..] => {
            let clients = clients.first().map_or(Ok(1), |text| text.parse())?;
            let seconds = seconds.parse()?;
            let load = Load { write: what == "write", bytes: bytes.parse()?, depth: depth.parse()?, seconds };
            bench(socket, export, load, clients)
        }
        _ => Err("see the top of the source".into()),
    }
}

fn serve(socket: &str, mib: usize, threads: usize) -> Outcome {
    let names = (0..threads.max(1)).map(|index| format!("io{index}"));
    let threads: Vec<IoThread> = names.map(|name| IoThread::start(&name)).collect::<Result<_, _>>()?;
    let options = ServerOptions { max_connections: 0, ..ServerOptions::default() };
    let spawners = threads.iter().map(IoThread::spawner).collect();
    let server = NbdServer::start(&Address::Unix(socket.into()), options, spawners)?;
    let disk = ram::Ram::new(mib << 20, false, 1);
    for (name, writable) in [("disk", true), ("ro", false)] {
        let root = block_on(ram::root(disk.clone()));
        server.add(NbdExport {
            id: name.into(),
            name: name.into(),
            description: String::new(),
            root,
            guest: None,
            writable,
            writethrough: false,
            allocation_depth: true,
            bitmaps: Vec::new(),
        })?;
    }
    std::io::stdin().read_to_end(&mut Vec::new())?;
    block_on(server.stop());
    Ok(())
}

#[derive(Clone, Copy)]
struct Load {
    write: bool,
    bytes: u32,
    depth: usize,
    seconds: u64,
}

fn bench(socket: &str, export: &str, load: Load, clients: usize) -> Outcome {
    let start = Instant::now();
    let run = |seed: u64| {
        move || -> std::io::Result<u64> {
            let client = Client::connect(&Server::unix(socket), export, &[])?;
            one_client(client, load, seed)
        }
    };
    let total: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=clients as u64).map(|seed| scope.spawn(run(seed))).collect();
        let results = threads.into_iter().map(|thread| thread.join().expect("the client does not panic"));
        results.sum::<std::io::Result<u64>>()
    })?;
    let time = start.elapsed();
    let per_second = total as f64 / time.as_secs_f64();
    let mib = per_second * f64::from(load.bytes) / f64::from(1 << 20);
    say!("{per_second:.0} op/s, {:.2} us/op, {mib:.0} MiB/s", 1e6 / per_second);
    Ok(())
}

fn one_client(mut client: Client, load: Load, seed: u64) -> std::io::Result<u64> {
    let data = vec![0xa5; usize::try_from(load.bytes).unwrap_or(0)];
    let blocks = (client.size() / u64::from(load.bytes)).max(1);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut submit = |client: &mut Client| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let at = state % blocks * u64::from(load.bytes);
        if load.write { client.submit_write(at, &data) } else { client.submit_read(at, load.bytes) }
    };
    for _ in 0..load.depth {
        submit(&mut client)?;
    }
    let end = Instant::now() + Duration::from_secs(load.seconds);
    let mut done = 0;
    loop {
        let completion = client.complete()?;
        if let Some((error, text)) = completion.error {
            return Err(std::io::Error::other(format!("{error:?} {text}")));
        }
        client.recycle(completion.data);
        done += 1;
        if done % 64 == 0 && Instant::now() > end {
            break;
        }
        submit(&mut client)?;
    }
    while client.in_flight() > 0 {
        client.complete()?;
        done += 1;
    }
    Ok(done)
}

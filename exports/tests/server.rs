//! The NBD server over a disk in memory, asked through real sockets.

#![allow(clippy::unwrap_used)]

#[path = "../examples/nbd_null/ram.rs"]
mod ram;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::task::Poll;
use std::time::Duration;

use underlay_exports::{ExportError, Guest, NbdExport, NbdServer, Operation, ServerOptions, Took, Verdict};
use underlay_nbd::blocking::{Client, Server};
use underlay_nbd::transmission::command;
use underlay_nbd::{Descriptor, Errno, Framing, Wish, flags};
use underlay_sys::net::Address;
use underlay_sys::thread::{IoThread, block_on};

const SIZE: usize = 8 << 20;

struct Lab {
    // Dropped before the threads that it runs on.
    server: NbdServer,
    _threads: Vec<IoThread>,
    dir: tempfile::TempDir,
}

impl Lab {
    /// Exports `disk` (writable) and `ro` of one disk in memory.
    fn new(options: ServerOptions, slow: bool, alignment: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let threads: Vec<_> = (0..2).map(|_| IoThread::start("io").unwrap()).collect();
        let spawners = threads.iter().map(IoThread::spawner).collect();
        let address = Address::Unix(dir.path().join("s"));
        let server = NbdServer::start(&address, options, spawners).unwrap();
        let node = ram::Ram::new(SIZE, slow, alignment);
        let lab = Self { server, _threads: threads, dir };
        for (name, writable) in [("disk", true), ("ro", false)] {
            let root = block_on(ram::root(node.clone()));
            lab.server.add(export(name, root, writable)).unwrap();
        }
        lab
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn server(&self) -> Server {
        Server::Unix(self.path())
    }

    fn open(&self, export: &str, framing: Framing) -> Client {
        let contexts = vec!["base:allocation".to_owned(), "qemu:allocation-depth".to_owned()];
        Client::open(&self.server(), Wish { export: export.into(), framing, contexts, list: false }).unwrap()
    }
}

fn export(name: &str, root: underlay_graph::Root, writable: bool) -> NbdExport {
    NbdExport {
        id: format!("id-{name}"),
        name: name.into(),
        description: String::new(),
        root,
        guest: None,
        writable,
        writethrough: false,
        allocation_depth: true,
        bitmaps: Vec::new(),
    }
}

/// Who comes while exports are still being added finds them all; one that never comes is not there.
#[test]
fn early_clients_find_what_is_about_to_come() {
    let dir = tempfile::tempdir().unwrap();
    let thread = IoThread::start("io").unwrap();
    let (address, complete) = (Address::Unix(dir.path().join("s")), underlay_sys::rt::StopSign::default());
    let server =
        NbdServer::start_early(&address, ServerOptions::default(), vec![thread.spawner()], complete.clone())
            .unwrap();
    let there = Server::Unix(dir.path().join("s"));
    let ask = |export: &str| {
        let (there, export) = (there.clone(), export.to_owned());
        std::thread::spawn(move || Client::connect(&there, &export, &[]).is_ok())
    };
    let (late, never) = (ask("late"), ask("never"));
    while server.connections() < 2 {
        std::thread::yield_now();
    }
    let root = || block_on(ram::root(ram::Ram::new(SIZE, false, 1)));
    server.add(export("there", root(), true)).unwrap();
    // That one need not wait.
    assert!(ask("there").join().unwrap());
    server.add(export("late", root(), true)).unwrap();
    complete.raise();
    assert!(late.join().unwrap() && !never.join().unwrap());
    block_on(server.stop());
}

/// Writes down what it is told.
#[derive(Debug, Default)]
struct Clerk {
    refused: std::sync::Mutex<Vec<Operation>>,
    done: std::sync::Mutex<Vec<(Operation, u64, bool)>>,
}

#[async_trait::async_trait]
impl Guest for Clerk {
    async fn admit(&self, _operation: Operation, _bytes: u64) -> underlay_graph::Result<()> {
        Ok(())
    }

    fn refused(&self, operation: Operation) {
        self.refused.lock().unwrap().push(operation);
    }

    fn done(
        &self,
        operation: Operation,
        bytes: u64,
        when: Took,
        result: &underlay_graph::Result<()>,
    ) -> Verdict {
        assert!(when.start <= when.end);
        self.done.lock().unwrap().push((operation, bytes, result.is_ok()));
        Verdict::Tell
    }
}

/// A lab with an export `counted`, and who counts.
fn counted() -> (Lab, std::sync::Arc<Clerk>) {
    let (lab, clerk) = (plain(), std::sync::Arc::<Clerk>::default());
    let root = block_on(ram::root(ram::Ram::new(SIZE, false, 1)));
    lab.server.add(NbdExport { guest: Some(clerk.clone()), ..export("counted", root, true) }).unwrap();
    (lab, clerk)
}

fn plain() -> Lab {
    Lab::new(ServerOptions::default(), false, 1)
}

/// The error of a request that must fail.
fn refused(client: &mut Client, command: u16, flags: u16, offset: u64, length: u64) -> (Errno, String) {
    let data = if command == command::WRITE { vec![1; usize::try_from(length).unwrap()] } else { Vec::new() };
    client.submit(command, flags, offset, length, &data).unwrap();
    client.complete().unwrap().error.expect("an error")
}

const ALL: [Framing; 3] = [Framing::Simple, Framing::Structured, Framing::Extended];

#[test]
fn guests_are_told_of_what_is_done_and_what_is_refused() {
    let (lab, clerk) = counted();
    let mut client = lab.open("counted", Framing::Structured);
    client.write(0, &[1; 512], 0).unwrap();
    client.read(0, 1024).unwrap();
    client.zeroes(512, 512, 0).unwrap();
    client.trim(0, 4096).unwrap();
    client.flush().unwrap();
    for refusing in [command::READ, command::WRITE, command::WRITE_ZEROES, command::TRIM] {
        refused(&mut client, refusing, 0, SIZE as u64, 512);
    }
    use Operation::{Discard, Flush, Read, Write};
    let done = [(Write, 512), (Read, 1024), (Write, 512), (Discard, 4096), (Flush, 0)];
    assert_eq!(*clerk.done.lock().unwrap(), done.map(|(operation, bytes)| (operation, bytes, true)));
    assert_eq!(*clerk.refused.lock().unwrap(), [Read, Write, Write, Discard]);
}

/// Tells the guest that all is well.
#[derive(Debug)]
struct Hider;

#[async_trait::async_trait]
impl Guest for Hider {
    async fn admit(&self, _operation: Operation, _bytes: u64) -> underlay_graph::Result<()> {
        Ok(())
    }

    fn done(
        &self,
        _operation: Operation,
        _bytes: u64,
        _when: Took,
        result: &underlay_graph::Result<()>,
    ) -> Verdict {
        if result.is_ok() { Verdict::Tell } else { Verdict::Hide }
    }
}

/// Memory is used again: what another client has read must not be in it.
#[test]
fn a_read_whose_error_is_hidden_gives_zeroes() {
    let lab = plain();
    let root = block_on(ram::root(ram::Ram::new(SIZE, false, 1)));
    lab.server
        .add(NbdExport { guest: Some(std::sync::Arc::new(Hider)), ..export("hidden", root, true) })
        .unwrap();
    let mut client = lab.open("hidden", Framing::Structured);
    client.write(0, &[7; 512], 0).unwrap();
    assert_eq!(client.read(0, 16).unwrap(), [7; 16]);
    // The disk fails at this length, with some bytes read.
    assert_eq!(client.read(0, 17).unwrap(), [0; 17]);
}

#[test]
fn data_comes_back_in_every_framing() {
    for slow in [false, true] {
        for alignment in [1, 512] {
            let lab = Lab::new(ServerOptions::default(), slow, alignment);
            for framing in ALL {
                let mut client = lab.open("disk", framing);
                assert_eq!(client.size(), SIZE as u64);
                let data: Vec<u8> = (0..300_000_u32).map(|n| (n % 251).to_le_bytes()[0]).collect();
                client.write(12_345, &data, flags::CMD_FUA).unwrap();
                assert_eq!(client.read(12_345, 300_000).unwrap(), data);
                client.zeroes(100_000, 100_000, 0).unwrap();
                let mut wanted = data.clone();
                wanted[100_000 - 12_345..200_000 - 12_345].fill(0);
                assert_eq!(client.read(12_345, 300_000).unwrap(), wanted);
                client.trim(0, SIZE as u64).unwrap();
                assert_eq!(client.read(0, 1 << 20).unwrap(), vec![0; 1 << 20]);
                client.flush().unwrap();
                client.disconnect().unwrap();
            }
        }
    }
}

#[test]
fn many_requests_are_under_way_at_once() {
    for slow in [false, true] {
        let lab = Lab::new(ServerOptions::default(), slow, 1);
        let mut client = lab.open("disk", Framing::Extended);
        for block in 0..200_u64 {
            client.submit_write(block * 4096, &[block.to_le_bytes()[0]; 4096]).unwrap();
        }
        for _ in 0..200 {
            assert_eq!(client.complete().unwrap().error, None);
        }
        let first = client.submit_read(0, 4096).unwrap();
        for block in 1..200_u64 {
            client.submit_read(block * 4096, 4096).unwrap();
        }
        for _ in 0..200 {
            let done = client.complete().unwrap();
            let block = done.cookie - first;
            assert_eq!(done.data, [block.to_le_bytes()[0]; 4096], "block {block}");
        }
    }
}

#[test]
fn more_than_the_budget_waits_its_turn() {
    let lab = plain();
    let mut client = lab.open("disk", Framing::Structured);
    client.write(0, &[7; 4096], 0).unwrap();
    for _ in 0..40 {
        client.submit(command::READ, flags::CMD_DF, 0, 8 << 20, &[]).unwrap();
    }
    for _ in 0..40 {
        let done = client.complete().unwrap();
        assert_eq!(done.data.len(), 8 << 20);
        client.recycle(done.data);
    }
}

#[test]
fn errors_are_those_of_the_reference() {
    let lab = plain();
    let mut client = lab.open("disk", Framing::Extended);
    let size = SIZE as u64;
    let past = format!("operation past EOF; From: {size}, Len: 512, Size: {size}");
    assert_eq!(refused(&mut client, command::READ, 0, size, 512), (Errno::EINVAL, past));
    let (errno, text) = refused(&mut client, command::READ, 0, 0, (32 << 20) + 1);
    assert_eq!((errno, &text[..]), (Errno::EINVAL, "len (33554433) is larger than max len (33554432)"));
    let (_, text) = refused(&mut client, command::READ, flags::CMD_NO_HOLE, 0, 512);
    assert_eq!(text, "unsupported flags for command read (got 0x2)");
    let (_, text) = refused(&mut client, 99, 0, 0, 512);
    assert_eq!(text, "invalid request type (99) received");
    let (_, text) = refused(&mut client, command::BLOCK_STATUS, 0, 0, 0);
    assert_eq!(text, "need non-zero length");
    assert_eq!(refused(&mut client, command::WRITE, 0, 0, 13).0, Errno::ENOSPC);
    assert_eq!(refused(&mut client, command::WRITE_ZEROES, flags::CMD_FAST_ZERO, 0, 512).0, Errno::ENOTSUP);
    assert!(refused(&mut client, command::READ, 0, u64::MAX, u64::MAX).1.starts_with("len"));
    assert!(refused(&mut client, command::TRIM, 0, u64::MAX, u64::MAX).1.starts_with("operation past EOF"));
    let mut reader = lab.open("ro", Framing::Extended);
    for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
        assert_eq!(refused(&mut reader, command, 0, 0, 512).1, "Export is read-only");
    }
    assert_eq!(reader.negotiated().flags, 0x158f);
    assert_eq!(client.negotiated().flags, 0x1ded);
    // After all this both still work.
    client.write(0, b"x", 0).unwrap();
    assert_eq!(reader.read(0, 1).unwrap(), b"x");
    assert_eq!(reader.read(0, 0).unwrap(), b"");
}

#[test]
fn block_status_tells_holes() {
    let lab = plain();
    for framing in [Framing::Structured, Framing::Extended] {
        let mut client = lab.open("disk", framing);
        client.write(64 << 10, &[1; 64 << 10], 0).unwrap();
        let status = client.block_status(0, SIZE as u64, 0).unwrap();
        let grain = 64 << 10;
        let rest = SIZE as u64 - 2 * grain;
        let wanted = [
            Descriptor { length: grain, flags: 3 },
            Descriptor { length: grain, flags: 0 },
            Descriptor { length: rest, flags: 3 },
        ];
        assert_eq!(status[0], ("base:allocation".to_owned(), wanted.to_vec()));
        let all = vec![Descriptor { length: SIZE as u64, flags: 1 }];
        assert_eq!(status[1], ("qemu:allocation-depth".to_owned(), all));
        let one = client.block_status(0, SIZE as u64, flags::CMD_REQ_ONE).unwrap();
        assert_eq!(one[0].1, wanted[..1]);
    }
    // A filter in the payload chooses the second context.
    let mut client = lab.open("disk", Framing::Extended);
    let mut payload = 65536_u64.to_be_bytes().to_vec();
    payload.extend(1_u32.to_be_bytes());
    client.submit(command::BLOCK_STATUS, 0, 0, 12, &payload).unwrap();
    let done = client.complete().unwrap();
    assert_eq!(done.status, [(1, vec![Descriptor { length: 65536, flags: 1 }])]);
}

#[test]
fn a_client_that_misbehaves_is_alone_with_it() {
    let lab = plain();
    let mut good = lab.open("disk", Framing::Extended);
    // Garbage instead of requests.
    let mut bad = lab.open("disk", Framing::Structured);
    bad.submit(command::WRITE, 0, 0, 8, b"8 bytes ").unwrap();
    bad.submit(command::WRITE, 0, 0, 4, b"more than four bytes, and then some more of them").unwrap();
    assert_eq!(bad.complete().unwrap().error, None);
    assert!((0..9).any(|_| bad.complete().is_err()));
    // A payload that nobody could want.
    let mut bad = lab.open("disk", Framing::Structured);
    bad.submit(command::WRITE, 0, 0, 1 << 30, b"").unwrap();
    assert_eq!(bad.complete().unwrap().error.unwrap().0, Errno::EINVAL);
    assert!(bad.submit(command::FLUSH, 0, 0, 0, &[]).and_then(|_| bad.complete()).is_err());
    // Gone in the middle of a payload.
    let mut bad = lab.open("disk", Framing::Simple);
    bad.submit(command::WRITE, 0, 0, 1 << 20, &[1; 1000]).unwrap();
    bad.send().unwrap();
    drop(bad);
    // Asks for much and never reads it.
    let mut bad = lab.open("disk", Framing::Simple);
    for _ in 0..64 {
        bad.submit_read(0, 8 << 20).unwrap();
    }
    bad.send().unwrap();
    // No NBD at all.
    let mut noise = UnixStream::connect(lab.path()).unwrap();
    noise.write_all(&[b'x'; 5000]).unwrap();
    good.write(0, b"still here", 0).unwrap();
    assert_eq!(good.read(0, 10).unwrap(), b"still here");
    block_on(lab.server.stop());
    drop(bad);
}

#[test]
fn what_a_client_that_has_gone_wrote_is_written_and_what_it_asked_for_is_not_read() {
    let (lab, clerk) = counted();
    let mut client = lab.open("counted", Framing::Structured);
    for _ in 0..1000 {
        client.submit(command::READ, flags::CMD_DF, 0, 8 << 20, &[]).unwrap();
    }
    client.submit_write(0, &[1; 512]).unwrap();
    client.send().unwrap();
    drop(client);
    wait_for_connections(&lab.server, 0);
    let done = clerk.done.lock().unwrap();
    assert_eq!(done.last(), Some(&(Operation::Write, 512, true)));
    // As many as the budget has room for, and those that were begun while these could not be sent.
    assert!(done.len() < 100, "{} requests", done.len());
}

#[test]
fn removing_waits_for_clients_or_throws_them_out() {
    let lab = plain();
    let mut client = lab.open("disk", Framing::Extended);
    client.write(0, b"x", 0).unwrap();
    assert_eq!(lab.server.exports()[0].connections, 1);
    let error = lab.server.remove("disk", false).unwrap_err();
    assert_eq!(error, ExportError::StillInUse("id-disk".into()));
    assert_eq!(error.to_string(), "export 'id-disk' still in use");
    assert_eq!(lab.server.remove("nope", true).unwrap_err(), ExportError::NotFound("nope".into()));
    block_on(lab.server.remove("ro", false).unwrap().wait());
    let gone = lab.server.remove("disk", true).unwrap();
    block_on(gone.wait());
    assert!(client.read(0, 1).is_err());
    assert!(lab.server.exports().is_empty());
    assert_eq!(Client::list(&lab.server()).unwrap(), []);
    let error = Client::connect(&lab.server(), "disk", &[]).unwrap_err();
    assert_eq!(error.to_string(), "export 'disk' not present");
    // The name is free again.
    let root = block_on(ram::root(ram::Ram::new(SIZE, false, 1)));
    lab.server.add(export("disk", root.clone(), true)).unwrap();
    assert_eq!(
        lab.server.add(export("disk", root, true)).unwrap_err(),
        ExportError::NameInUse("disk".into())
    );
    assert_eq!(lab.open("disk", Framing::Extended).size(), SIZE as u64);
}

#[test]
fn goodbye_comes_after_the_replies() {
    let lab = Lab::new(ServerOptions::default(), true, 1);
    let mut stream = UnixStream::connect(lab.path()).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    let mut out = vec![0, 0, 0, 3];
    out.extend(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk");
    for cookie in 0..50 {
        let request =
            underlay_nbd::Request { command: command::READ, cookie, length: 4096, ..Default::default() };
        request.encode(Framing::Simple, &mut out).unwrap();
    }
    let request = underlay_nbd::Request { command: command::DISCONNECT, ..Default::default() };
    request.encode(Framing::Simple, &mut out).unwrap();
    stream.write_all(&out).unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 10 + 50 * (16 + 4096));
}

#[test]
fn a_silent_client_is_dropped_and_makes_room() {
    let options = ServerOptions { max_connections: 1, handshake_timeout: Duration::from_millis(50) };
    let lab = Lab::new(options, false, 1);
    let mut silent = UnixStream::connect(lab.path()).unwrap();
    let mut all = Vec::new();
    // This one waits in the queue until the silent one is thrown out.
    let mut next = lab.open("disk", Framing::Structured);
    silent.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 18);
    assert_eq!(next.negotiated().flags & flags::CAN_MULTI_CONN, 0);
    next.write(0, b"x", 0).unwrap();
}

/// Whether the server has been deserted so far.
fn is_deserted(server: &NbdServer) -> bool {
    block_on(async {
        let mut deserted = std::pin::pin!(server.deserted());
        std::future::poll_fn(|cx| Poll::Ready(deserted.as_mut().poll(cx).is_ready())).await
    })
}

fn wait_for_connections(server: &NbdServer, count: usize) {
    while server.connections() != count {
        std::thread::yield_now();
    }
}

#[test]
fn a_server_is_deserted_by_the_last_client_that_chose_an_export() {
    let lab = plain();
    Client::list(&lab.server()).unwrap();
    wait_for_connections(&lab.server, 0);
    assert!(!is_deserted(&lab.server), "it only looked");
    let first = lab.open("disk", Framing::Simple);
    let second = lab.open("ro", Framing::Extended);
    first.disconnect().unwrap();
    wait_for_connections(&lab.server, 1);
    assert!(!is_deserted(&lab.server), "one is left");
    drop(second);
    block_on(lab.server.deserted());
}

//! The client against servers that go away and come back, and against servers that lie.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use underlay_graph::{ByteRange, IoError, Place, View, WriteFlags, ZeroFlags};
use underlay_nbd::flags::{CAN_MULTI_CONN, HAS_FLAGS, SEND_FLUSH, SEND_TRIM, SEND_WRITE_ZEROES};
use underlay_nbd::handshake::server::Ask;
use underlay_nbd::transmission::{Chunks, chunk, command};
use underlay_nbd::{Descriptor, ExportInfo, Framing, Request, ServerHandshake, Step};
use underlay_sys::Iov;
use underlay_sys::net::Address;
use underlay_sys::thread::block_on;

use super::NbdNode;
use super::connection;
use super::link::Link;
use super::spec::NbdSpec;

const SIZE: u64 = 1 << 20;

/// What a scripted server does with a request; false: hang up.
type Script = Box<dyn FnMut(&Request, Chunks, &mut Vec<u8>) -> bool + Send>;

fn handshake(stream: &mut UnixStream) -> Option<Framing> {
    handshake_of(stream, SIZE)
}

/// Grants an export of `size` bytes.
fn handshake_of(stream: &mut UnixStream, size: u64) -> Option<Framing> {
    handshake_as(stream, size, 0)
}

fn handshake_as(stream: &mut UnixStream, size: u64, more_flags: u16) -> Option<Framing> {
    let mut machine = ServerHandshake::new();
    let mut buffer = [0; 4096];
    loop {
        let step = machine.step();
        match step {
            Step::Ask(Ask::Export(name)) => {
                let flags = HAS_FLAGS | SEND_FLUSH | SEND_TRIM | SEND_WRITE_ZEROES | more_flags;
                let contexts = vec!["base:allocation".to_owned()];
                let (minimum_block, preferred_block, maximum_block) = (1, 4096, 32 << 20);
                machine.answer_export(Some(&ExportInfo {
                    name,
                    description: String::new(),
                    size,
                    flags,
                    minimum_block,
                    preferred_block,
                    maximum_block,
                    contexts,
                }));
            }
            Step::Ask(Ask::List) => machine.answer_list(&[]),
            Step::NeedBytes => {
                stream.write_all(&machine.take_output()).ok()?;
                let got = stream.read(&mut buffer).ok().filter(|got| *got > 0)?;
                machine.feed(&buffer[..got]);
            }
            Step::Done(agreed) => {
                stream.write_all(&machine.take_output()).ok()?;
                return Some(agreed.framing);
            }
            _ => return None,
        }
    }
}

/// Serves one connection after the other, each by a script of its own; no more than there are scripts.
fn serve(path: &Path, scripts: Vec<Script>) -> std::thread::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for mut script in scripts {
            let (mut stream, _) = listener.accept().unwrap();
            let Some(framing) = handshake(&mut stream) else { continue };
            answer(&mut stream, framing, &mut script);
        }
    })
}

/// Serves one connection by its script, until either side has had enough.
fn answer(stream: &mut UnixStream, framing: Framing, script: &mut Script) {
    let mut head = vec![0; Request::header_len(framing)];
    while stream.read_exact(&mut head).is_ok() {
        let request = Request::parse(framing, &head).unwrap().unwrap();
        if request.command == command::DISCONNECT {
            break;
        }
        let mut payload = vec![0; usize::try_from(request.payload_len(framing)).unwrap()];
        stream.read_exact(&mut payload).unwrap();
        let chunks = Chunks { framing, cookie: request.cookie, offset: request.offset };
        let mut out = Vec::new();
        let goes_on = script(&request, chunks, &mut out);
        // The client may have hung up on a liar.
        if stream.write_all(&out).is_err() || !goes_on {
            break;
        }
    }
}

/// Says yes to everything; reads give the byte 7.
fn honest() -> Script {
    Box::new(|request, chunks, out| {
        match request.command {
            command::READ => {
                let len = u32::try_from(request.length).unwrap();
                chunks.data(true, request.offset, len, out);
                out.extend(std::iter::repeat_n(7, usize::try_from(len).unwrap()));
            }
            command::BLOCK_STATUS => {
                let half = Descriptor { length: request.length / 2, flags: 3 };
                chunks.status(true, 0, &[half], out);
            }
            _ => chunks.none(out),
        }
        true
    })
}

fn spec(path: &Path, reconnect_delay: Duration, open_timeout: Duration) -> NbdSpec {
    let (server, export) = (Address::Unix(path.to_owned()), String::new());
    NbdSpec { server, export, reconnect_delay, open_timeout, context: None }
}

async fn open(path: &Path, reconnect_delay: u64) -> Arc<View> {
    let spec = spec(path, Duration::from_secs(reconnect_delay), Duration::ZERO);
    View::detached(Arc::new(NbdNode::open(&spec, false, false).await.unwrap()), [])
}

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

#[test]
fn every_kind_of_request() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let server = serve(&path, vec![honest()]);
    block_on(async {
        let view = open(&path, 0).await;
        let cx = view.cx();
        assert_eq!(cx.length(), SIZE);
        let into = Iov::zeroed(100_000);
        cx.read(range(4000, 100_000), into.clone()).await.unwrap();
        assert!(into.to_vec().iter().all(|byte| *byte == 7));
        cx.write(range(1, 70_000), Iov::filled(70_000, 1), WriteFlags::default()).await.unwrap();
        cx.write_zeroes(range(0, SIZE), ZeroFlags { may_unmap: true, no_fallback: false }).await.unwrap();
        cx.discard(range(0, 512)).await.unwrap();
        cx.flush().await.unwrap();
        let extent = cx.map(range(0, 8192)).await.unwrap();
        assert_eq!((extent.place, extent.len), (Place::Zero, 4096));
        cx.node().close(&cx).await.unwrap();
    });
    server.join().unwrap();
}

/// What the first read gets from a server that answers like this, on a client that does not wait.
fn read_from(script: Script) -> Result<(), IoError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let server = serve(&path, vec![script]);
    let result = block_on(async {
        let view = open(&path, 0).await;
        let cx = view.cx();
        let result = cx.read(range(0, 8192), Iov::zeroed(8192)).await;
        cx.node().close(&cx).await.unwrap();
        result
    });
    server.join().unwrap();
    result
}

#[test]
fn servers_that_lie() {
    type Lie = fn(&Request, Chunks, &mut Vec<u8>);
    fn head(kind: u16, done: bool, length: u64, chunks: &Chunks, out: &mut Vec<u8>) {
        underlay_nbd::Chunk { done, kind, cookie: chunks.cookie, offset: 0, length }
            .encode(chunks.framing, out);
    }
    let lies: [(&str, Lie); 15] = [
        ("a reply to nobody", |_, chunks, out| Chunks { cookie: 999, ..chunks }.none(out)),
        ("a success without data", |_, chunks, out| chunks.none(out)),
        ("half of the data", |_, chunks, out| {
            chunks.data(true, 0, 4096, out);
            out.extend([0; 4096]);
        }),
        ("data twice", |_, chunks, out| {
            for done in [false, true] {
                chunks.data(done, 0, 8192, out);
                out.extend([0; 8192]);
            }
        }),
        ("one half twice and the other never", |_, chunks, out| {
            for done in [false, true] {
                chunks.data(done, 0, 4096, out);
                out.extend([0; 4096]);
            }
        }),
        ("a hole over data", |_, chunks, out| {
            chunks.data(false, 0, 4096, out);
            out.extend([0; 4096]);
            chunks.hole(true, 2048, 4096, out);
        }),
        ("data behind the range", |_, chunks, out| {
            chunks.data(true, 8000, 8192, out);
            out.extend([0; 8192]);
        }),
        ("data far away", |_, chunks, out| chunks.data(true, u64::MAX, 8192, out)),
        ("a hole that is too long", |_, chunks, out| chunks.hole(true, 0, u32::MAX, out)),
        ("a chunk of 4 GiB", |_, chunks, out| chunks.data(true, 0, u32::MAX - 8, out)),
        ("noise", |_, _, out| out.extend([0x5a; 64])),
        ("a long error text", |_, chunks, out| {
            head(chunk::ERROR, true, 1 << 24, &chunks, out);
        }),
        ("a chunk that is too short for its offset", |_, chunks, out| {
            head(chunk::OFFSET_DATA, true, 7, &chunks, out);
        }),
        ("a chunk that says nothing", |_, chunks, out| head(chunk::NONE, false, 0, &chunks, out)),
        ("errors without an end", |_, chunks, out| {
            for _ in 0..5000 {
                head(chunk::ERROR, false, 6, &chunks, out);
                out.extend([0, 0, 0, 5, 0, 0]);
            }
        }),
    ];
    for (what, lie) in lies {
        let result = read_from(Box::new(move |request, chunks, out| {
            lie(request, chunks, out);
            true
        }));
        assert_eq!(result, Err(IoError::EIO), "{what}");
    }
    // Twice done is noticed after the fact: the answer was complete, what follows is to nobody.
    let fine = read_from(honest());
    assert_eq!(fine, Ok(()));
}

#[test]
fn what_the_server_says_is_what_the_guest_hears() {
    let full: Script = Box::new(|_, chunks, out| {
        chunks.error(underlay_nbd::Errno::from_linux(28), "full", out);
        true
    });
    assert_eq!(read_from(full), Err(IoError::ENOSPC));
}

#[test]
fn without_a_delay_requests_fail_and_later_ones_connect_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let hang_up: Script = Box::new(|_, _, _| false);
    let server = serve(&path, vec![hang_up, honest()]);
    block_on(async {
        let view = open(&path, 0).await;
        let cx = view.cx();
        let into = Iov::zeroed(4096);
        assert_eq!(cx.read(range(0, 4096), into.clone()).await, Err(IoError::EIO));
        cx.read(range(0, 4096), into.clone()).await.unwrap();
        assert_eq!(into.to_vec(), vec![7; 4096]);
        cx.node().close(&cx).await.unwrap();
    });
    server.join().unwrap();
}

#[test]
fn with_a_delay_requests_wait_for_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let mut left = 3;
    // Answers some and then hangs up in the middle of a reply.
    let dies: Script = Box::new(move |request, chunks, out| {
        left -= 1;
        if left > 0 {
            return honest()(request, chunks, out);
        }
        chunks.data(true, request.offset, 4096, out);
        out.extend([7; 100]);
        false
    });
    let server = serve(&path, vec![dies, honest()]);
    block_on(async {
        let view = open(&path, 600).await;
        let reads = (0..8_u64).map(|number| {
            let view = view.clone();
            underlay_sys::rt::spawn(async move {
                let into = Iov::zeroed(4096);
                view.cx().read(range(number * 4096, 4096), into.clone()).await.unwrap();
                assert_eq!(into.to_vec(), vec![7; 4096]);
            })
        });
        for read in reads.collect::<Vec<_>>() {
            read.await;
        }
        let cx = view.cx();
        cx.node().close(&cx).await.unwrap();
    });
    server.join().unwrap();
}

/// A server that accepts and then says nothing is waited for no longer than the user said.
#[test]
fn a_server_that_says_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let _silent = UnixListener::bind(&path).unwrap();
    block_on(async {
        let spec = spec(&path, Duration::ZERO, Duration::from_millis(50));
        let error = NbdNode::open(&spec, false, false).await.map(drop).unwrap_err();
        assert_eq!(error.to_string(), "Connection attempt cancelled by timeout");
    });
}

/// Requests wait for a server that came back without a word no longer than `reconnect-delay`, however many they are.
#[test]
fn a_server_that_comes_back_and_says_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let (done, all_done) = std::sync::mpsc::channel::<()>();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        handshake(&mut stream).unwrap();
        drop(stream);
        let silent = listener.accept();
        all_done.recv().unwrap();
        drop(silent);
    });
    block_on(async {
        let spec = spec(&path, Duration::from_millis(300), Duration::ZERO);
        let view = View::detached(Arc::new(NbdNode::open(&spec, false, false).await.unwrap()), []);
        let reads = (0..8_u64).map(|number| {
            let view = view.clone();
            underlay_sys::rt::spawn(async move {
                view.cx().read(range(number * 4096, 4096), Iov::zeroed(4096)).await
            })
        });
        for read in reads.collect::<Vec<_>>() {
            assert_eq!(read.await, Err(IoError::EIO));
        }
    });
    done.send(()).unwrap();
    server.join().unwrap();
}

/// A server whose connections are all the same: those that it takes are used, and when it ends them the first goes on.
#[test]
fn further_connections_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let (count, counts) = std::sync::mpsc::channel();
    let server = std::thread::spawn(move || {
        let mut lives = Vec::new();
        for number in 0..3 {
            let (mut stream, _) = listener.accept().unwrap();
            let framing = handshake_as(&mut stream, SIZE, CAN_MULTI_CONN).unwrap();
            let count = count.clone();
            // The second one ends after two requests.
            let mut left = if number == 1 { 2 } else { usize::MAX };
            let mut script: Script = Box::new(move |request, chunks, out| {
                count.send(number).unwrap();
                left -= 1;
                honest()(request, chunks, out) && left > 0
            });
            lives.push(std::thread::spawn(move || answer(&mut stream, framing, &mut script)));
        }
        lives.into_iter().for_each(|life| life.join().unwrap());
    });
    let spec = spec(&path, Duration::ZERO, Duration::ZERO);
    let link = Arc::new(block_on(Link::open(spec)).unwrap());
    for number in 0..3 {
        let link = link.clone();
        let reader = move || {
            block_on(async {
                let into = Iov::zeroed(4096);
                let ask = || connection::Ask {
                    command: command::READ,
                    length: 4096,
                    into: Some(into.clone()),
                    ..connection::Ask::default()
                };
                // Nobody waits for a further connection.
                link.ask(ask).await.unwrap();
                while number > 0 && link.own().is_none() {
                    underlay_sys::rt::yield_now().await;
                }
                for _ in 0..3 {
                    into.fill(0);
                    link.ask(ask).await.unwrap();
                    assert_eq!(into.to_vec(), vec![7; 4096]);
                }
            });
        };
        std::thread::spawn(reader).join().unwrap();
    }
    block_on(link.close());
    server.join().unwrap();
    let used: Vec<i32> = counts.iter().collect();
    // Three first requests, three more of the first thread, one that the second connection did not live to answer, and
    // one for each further connection, to see that the server is still the same.
    let by = |number| used.iter().filter(|used| **used == number).count();
    assert_eq!([by(0), by(1), by(2)], [9, 2, 3]);
}

/// A request for the first sector.
fn sector(command: u16, payload: Option<Iov>, into: Option<Iov>) -> connection::Ask {
    connection::Ask { command, length: 512, payload, into, ..connection::Ask::default() }
}

fn write_sector() -> connection::Ask {
    sector(command::WRITE, Some(Iov::filled(512, 1)), None)
}

fn read_sector() -> connection::Ask {
    sector(command::READ, None, Some(Iov::zeroed(512)))
}

/// Does `work` in a thread of its own: each has its own connection.
fn elsewhere(link: &Arc<Link>, work: impl AsyncFnOnce(&Link) + Send + 'static) {
    let link = link.clone();
    std::thread::spawn(move || block_on(work(&link))).join().unwrap();
}

/// A server that goes while a further connection is made: that one has reached the next server, which does not have
/// yet what was written to the first. It is not used.
#[test]
fn a_further_connection_to_another_server() {
    use command::{READ, WRITE};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let (tell, seen) = std::sync::mpsc::channel();
    let server = std::thread::spawn(move || {
        let next = || {
            let (mut stream, _) = listener.accept().unwrap();
            let framing = handshake_as(&mut stream, SIZE, CAN_MULTI_CONN).unwrap();
            (stream, framing)
        };
        let mut left = 2;
        let dies: Script = Box::new(move |request, chunks, out| {
            left -= 1;
            honest()(request, chunks, out) && left > 0
        });
        let [mut first, mut second, mut third] =
            [dies, honest(), honest()].map(|script| observed(tell.clone(), script));
        let (mut old, framing) = next();
        answer(&mut old, framing, &mut first);
        let (mut further, framing) = next();
        drop(old);
        answer(&mut further, framing, &mut second);
        let (mut new, framing) = next();
        answer(&mut new, framing, &mut third);
    });
    let spec = spec(&path, Duration::from_secs(600), Duration::ZERO);
    let link = Arc::new(block_on(Link::open(spec)).unwrap());
    elsewhere(&link, async |link| drop(link.ask(write_sector).await.unwrap()));
    elsewhere(&link, async |link| {
        link.ask(read_sector).await.unwrap();
        link.ask(read_sector).await.unwrap();
    });
    block_on(link.close());
    server.join().unwrap();
    let all: Vec<_> = seen.try_iter().map(|(command, _)| command).collect();
    assert_eq!(all, [WRITE, READ, WRITE, READ]);
}

/// Who gives up while a server that came back is told again, and says nothing to that, waits no longer.
#[test]
fn giving_up_on_a_server_that_came_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let (tell, told) = std::sync::mpsc::channel();
    let silent: Script = Box::new(move |_, _, _| {
        tell.send(()).unwrap();
        true
    });
    let server = serve(&path, vec![dies_of(command::READ), silent]);
    let spec = spec(&path, Duration::from_secs(600), Duration::ZERO);
    let link = Arc::new(block_on(Link::open(spec)).unwrap());
    let gives_up = {
        let link = link.clone();
        std::thread::spawn(move || {
            told.recv().unwrap();
            link.give_up();
        })
    };
    block_on(async {
        link.ask(write_sector).await.unwrap();
        assert_eq!(link.ask(read_sector).await.unwrap_err(), IoError::EIO);
        link.close().await;
    });
    gives_up.join().unwrap();
    server.join().unwrap();
}

/// A server that comes back and grants less than before is not taken.
#[test]
fn a_server_that_comes_back_with_less() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        handshake(&mut stream).unwrap();
        drop(stream);
        let (mut stream, _) = listener.accept().unwrap();
        handshake_of(&mut stream, SIZE / 2);
    });
    block_on(async {
        let view = open(&path, 0).await;
        let cx = view.cx();
        for _ in 0..2 {
            assert_eq!(cx.read(range(0, 4096), Iov::zeroed(4096)).await, Err(IoError::EIO));
        }
    });
    server.join().unwrap();
}

/// Hangs up when it is asked for that.
fn dies_of(command: u16) -> Script {
    Box::new(move |request, chunks, out| request.command != command && honest()(request, chunks, out))
}

/// Says yes to everything, and tells of it.
fn observed(seen: std::sync::mpsc::Sender<(u16, u64)>, mut script: Script) -> Script {
    Box::new(move |request, chunks, out| {
        seen.send((request.command, request.offset)).unwrap();
        script(request, chunks, out)
    })
}

/// What was written before a server went, and not flushed, is written to the next one before anything else; in order.
#[test]
fn a_server_that_comes_back_is_told_again() {
    use command::{FLUSH, READ, TRIM, WRITE, WRITE_ZEROES};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let (tell, seen) = std::sync::mpsc::channel();
    let scripts = [dies_of(READ), dies_of(WRITE_ZEROES), dies_of(FLUSH), dies_of(READ), honest()];
    let server = serve(&path, scripts.map(|script| observed(tell.clone(), script)).into());
    block_on(async {
        let view = open(&path, 600).await;
        let cx = view.cx();
        let write = |at| cx.write(range(at, 512), Iov::filled(512, 1), WriteFlags::default());
        write(0).await.unwrap();
        cx.flush().await.unwrap();
        write(512).await.unwrap();
        cx.write_zeroes(range(1024, 512), ZeroFlags::default()).await.unwrap();
        write(2048).await.unwrap();
        cx.discard(range(4096, 512)).await.unwrap();
        // The first server goes, the second one before it was told all, and the third one before anything is durable.
        cx.read(range(0, 512), Iov::zeroed(512)).await.unwrap();
        cx.flush().await.unwrap();
        // The fourth one had nothing to forget.
        cx.read(range(0, 512), Iov::zeroed(512)).await.unwrap();
        assert_eq!(cx.doubts(), 0);
        cx.node().close(&cx).await.unwrap();
    });
    server.join().unwrap();
    let again = [(WRITE, 512), (WRITE_ZEROES, 1024), (WRITE, 2048), (TRIM, 4096)];
    let first = [&[(WRITE, 0), (FLUSH, 0)], &again[..], &[(READ, 0)]].concat();
    let second = again[..2].to_vec();
    let third = [&again[..], &[(READ, 0), (FLUSH, 0)]].concat();
    let fourth = [&again[..], &[(FLUSH, 0), (READ, 0)]].concat();
    let all: Vec<_> = seen.try_iter().filter(|(command, _)| *command != command::DISCONNECT).collect();
    assert_eq!(all, [first, second, third, fourth, vec![(READ, 0)]].concat());
}

/// No flush succeeds after something was lost for good: here a server is found again by chance, and there it does not
/// take again what it had.
#[test]
fn what_is_lost_is_not_durable() {
    let refuses: fn() -> Script = || {
        Box::new(|request, chunks, out| {
            match request.command {
                command::WRITE => chunks.error(underlay_nbd::Errno::ENOSPC, "", out),
                _ => return honest()(request, chunks, out),
            }
            true
        })
    };
    for (delay, second) in [(0, honest()), (600, refuses())] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let server = serve(&path, vec![dies_of(command::READ), second]);
        block_on(async {
            let view = open(&path, delay).await;
            let cx = view.cx();
            cx.write(range(0, 512), Iov::filled(512, 1), WriteFlags::default()).await.unwrap();
            let read = cx.read(range(0, 512), Iov::zeroed(512)).await;
            assert_eq!(read.is_ok(), delay > 0);
            for _ in 0..2 {
                assert_eq!(cx.flush().await.unwrap_err().errno(), IoError::EIO.errno());
            }
            assert_eq!(cx.doubts(), 1);
            assert!(cx.node().is_lost(), "nobody need keep it");
            // Whoever writes all of it once more can go on.
            assert!(cx.forgive());
            cx.flush().await.unwrap();
            assert!(!cx.node().is_lost());
            cx.node().close(&cx).await.unwrap();
        });
        server.join().unwrap();
    }
}

/// What nobody has been told of may be refused when it is made again: only the one who asked for it hears of that.
#[test]
fn what_was_under_way_may_be_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let second = |request: &Request| request.command == command::WRITE && request.offset == 512;
    let dies: Script =
        Box::new(move |request, chunks, out| !second(request) && honest()(request, chunks, out));
    let refuses: Script = Box::new(move |request, chunks, out| match second(request) {
        true => {
            chunks.error(underlay_nbd::Errno::ENOSPC, "", out);
            true
        }
        false => honest()(request, chunks, out),
    });
    let server = serve(&path, vec![dies, refuses]);
    block_on(async {
        let view = open(&path, 600).await;
        let cx = view.cx();
        let write = |at| cx.write(range(at, 512), Iov::filled(512, 1), WriteFlags::default());
        write(0).await.unwrap();
        assert_eq!(write(512).await, Err(IoError::ENOSPC));
        cx.flush().await.unwrap();
        assert_eq!(cx.doubts(), 0);
        cx.node().close(&cx).await.unwrap();
    });
    server.join().unwrap();
}

/// A write that fails with its server is no loss to anybody: the one who is told makes it again.
#[test]
fn what_failed_is_not_lost() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let server = serve(&path, vec![dies_of(command::WRITE), honest()]);
    block_on(async {
        let view = open(&path, 0).await;
        let cx = view.cx();
        let write = || cx.write(range(0, 512), Iov::filled(512, 1), WriteFlags::default());
        assert_eq!(write().await, Err(IoError::EIO));
        write().await.unwrap();
        cx.flush().await.unwrap();
        assert_eq!(cx.doubts(), 0);
        cx.node().close(&cx).await.unwrap();
    });
    server.join().unwrap();
}

/// Parts in any order make a whole read.
#[test]
fn parts_in_any_order() {
    let parts: Script = Box::new(|_, chunks, out| {
        for (done, at) in [(false, 4096), (false, 0), (true, 6144)] {
            chunks.data(done, at, 2048, out);
            out.extend([0; 2048]);
            if at == 0 {
                chunks.hole(false, 2048, 2048, out);
            }
        }
        true
    });
    assert_eq!(read_from(parts), Ok(()));
}

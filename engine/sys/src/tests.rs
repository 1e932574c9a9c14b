//! Files, sockets, tasks and threads, on io_uring and without it.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::buf::Iov;
use crate::exec::Core;
use crate::file::{Allocate, File, OpenOptions};
use crate::net::{Address, Inet, Listener, Part, Stream};
use crate::rt;
use crate::thread::IoThread;

/// Runs a test with each driver.
fn both<F: Future<Output = ()> + Send>(test: impl Fn() -> F) {
    for threads in [false, true] {
        Core::with_threads(std::sync::Arc::default(), threads).expect("an executor").block_on(test());
    }
}

const RW: OpenOptions =
    OpenOptions { write: true, create: true, create_new: false, truncate: true, direct: false };

fn scratch() -> tempfile::TempDir {
    // Not in a memory file system: the interesting paths are those of real ones.
    tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a directory")
}

#[test]
fn tasks_run_and_timers_fire_in_order() {
    both(|| async {
        let log = Arc::new(std::sync::Mutex::new(Vec::new()));
        let handles: Vec<_> = [3_u64, 1, 2]
            .into_iter()
            .map(|n| {
                let log = log.clone();
                rt::spawn(async move {
                    rt::sleep(Duration::from_millis(n * 3)).await;
                    log.lock().expect("no panic").push(n);
                    n
                })
            })
            .collect();
        let mut sum = 0;
        for handle in handles {
            sum += handle.await;
        }
        assert_eq!((sum, log.lock().expect("no panic").clone()), (6, vec![1, 2, 3]));
        rt::yield_now().await;
    });
}

#[test]
fn work_goes_to_another_thread_and_back() {
    let thread = IoThread::start("test-io").expect("a thread");
    let spawner = thread.spawner();
    both(|| {
        let spawner = spawner.clone();
        async move {
            for n in 0..100 {
                let name = spawner.run(async move { (n, std::thread::current().name().map(str::to_owned)) });
                assert_eq!(name.await, (n, Some("test-io".to_owned())));
            }
        }
    });
}

#[test]
fn a_stopping_thread_finishes_what_can_run() {
    let thread = IoThread::start("test-io").expect("a thread");
    let count = Arc::new(AtomicUsize::new(0));
    for _ in 0..100 {
        let count = count.clone();
        thread.spawner().spawn(async move {
            rt::yield_now().await;
            count.fetch_add(1, Ordering::SeqCst);
        });
    }
    thread.spawner().spawn(std::future::pending());
    thread.spawner().spawn(async {
        let (a, _b) = Stream::pair().expect("a pair");
        let mut byte = [0];
        let _ = a.recv(&mut byte).await;
    });
    drop(thread);
    assert_eq!(count.load(Ordering::SeqCst), 100);
}

#[test]
fn files_read_what_was_written() {
    let dir = scratch();
    both(|| async {
        for direct in [false, true] {
            let file = File::open(&dir.path().join("a"), OpenOptions { direct, ..RW }).expect("opened");
            for len in [4096, 300 << 10] {
                let mut data = Iov::filled(4096, 7);
                data.append(Iov::filled(len - 4096, 9));
                file.write_at(8192, &data).await.expect("written");
                file.data_sync().await.expect("synced");
                assert_eq!(file.len().expect("a length"), 8192 + len as u64);
                let back = Iov::filled(len + 8192, 1);
                file.read_at(4096, &back).await.expect("read");
                assert!(back.slice(0, 4096).is_zero() && back.slice(len + 4096, 4096).is_zero());
                assert_eq!(back.slice(4096, len).to_vec(), data.to_vec());
            }
            let beyond = Iov::filled(4096, 1);
            file.read_at(1 << 40, &beyond).await.expect("read");
            assert!(beyond.is_zero());
        }
    });
}

#[test]
fn direct_requests_may_come_from_any_memory() {
    let dir = scratch();
    both(|| async {
        let file = File::open(&dir.path().join("a"), OpenOptions { direct: true, ..RW }).expect("opened");
        // Off the alignment of any disk, and in pieces that are no multiples of it.
        let mut data = Iov::filled(8192, 7).slice(24, 8000);
        data.append(Iov::filled(200, 9).slice(8, 192));
        file.write_at(4096, &data).await.expect("written");
        let back = Iov::zeroed(12288 + 8).slice(8, 12288);
        file.read_at(0, &back).await.expect("read");
        assert!(back.slice(0, 4096).is_zero());
        assert_eq!(back.slice(4096, 8192).to_vec(), data.to_vec());
    });
}

#[test]
fn an_odd_end_of_file_reads_with_zeroes() {
    let dir = scratch();
    both(|| async {
        let path = dir.path().join("odd");
        let file = File::open(&path, RW).expect("opened");
        file.write_at(0, &Iov::filled(5000, 3)).await.expect("written");
        for direct in [false, true] {
            let file = File::open(&path, OpenOptions { direct, ..OpenOptions::default() }).expect("opened");
            let back = Iov::filled(16384, 1);
            file.read_at(0, &back).await.expect("read");
            assert_eq!(back.slice(0, 5000).to_vec(), [3; 5000]);
            assert!(back.slice(5000, 11384).is_zero());
        }
    });
}

#[test]
fn many_pieces_are_written_in_several_calls() {
    let dir = scratch();
    both(|| async {
        let mut data = Iov::default();
        for n in 0..3000_u32 {
            data.append(Iov::copy_of(&[n.to_le_bytes()[0]; 100]));
        }
        let file = File::open(&dir.path().join("many"), RW).expect("opened");
        file.write_at(1, &data).await.expect("written");
        let back = Iov::zeroed(300_000);
        file.read_at(1, &back).await.expect("read");
        assert_eq!(back.to_vec(), data.to_vec());
    });
}

#[test]
fn holes_are_made_and_found() {
    let dir = scratch();
    both(|| async {
        let file = File::open(&dir.path().join("h"), RW).expect("opened");
        file.write_at(0, &Iov::filled(1 << 20, 5)).await.expect("written");
        file.data_sync().await.expect("synced");
        let before = file.allocated_bytes().expect("allocation");
        assert!(before >= 1 << 20);
        let supported = match file.allocate(Allocate::PunchHole, 256 << 10, 256 << 10).await {
            Ok(()) => true,
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
                false
            }
        };
        if supported {
            assert!(file.allocated_bytes().expect("allocation") < before);
            assert_eq!(file.seek_hole(0).expect("sought"), Some(256 << 10));
            assert_eq!(file.seek_data(256 << 10).expect("sought"), Some(512 << 10));
        }
        assert_eq!(file.seek_data(1 << 30).expect("sought"), None);
        if file.allocate(Allocate::Zero, (1 << 20) - 4096, 8192).await.is_ok() {
            assert_eq!(file.len().expect("a length"), (1 << 20) + 4096);
        }
        file.set_len(123).expect("cut");
        assert_eq!(file.len().expect("a length"), 123);
    });
}

async fn echo(listener: Listener) {
    let stream = listener.accept().await.expect("accepted");
    let mut buffer = vec![0; 10_000];
    loop {
        let count = stream.recv(&mut buffer).await.expect("received");
        if count == 0 {
            return;
        }
        stream.send_all(&buffer[..count]).await.expect("sent");
    }
}

async fn talk(address: Address) {
    let stream = Arc::new(Stream::connect(&address).await.expect("connected"));
    let data: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    let body = Iov::copy_of(&data);
    let sender = stream.clone();
    let sending = rt::spawn(async move {
        sender.send_parts(&[Part::Bytes(b"head"), Part::Iov(&body), Part::Bytes(b"")]).await.expect("sent");
    });
    let back = Iov::zeroed(data.len() + 4);
    stream.recv_exact_iov(&back).await.expect("received");
    sending.await;
    assert_eq!(back.slice(0, 4).to_vec(), b"head");
    assert_eq!(back.slice(4, data.len()).to_vec(), data);
    stream.shutdown_send();
    assert_eq!(stream.recv(&mut [0]).await.expect("the end"), 0);
}

#[test]
fn sockets_carry_data_both_ways() {
    let dir = tempfile::tempdir().expect("a directory");
    both(|| async {
        let path = dir.path().join("s");
        let listener = Listener::bind(&Address::Unix(path.clone())).expect("bound");
        assert_eq!(listener.local_address(), format!("unix:{}", path.display()));
        let server = rt::spawn(echo(listener));
        talk(Address::Unix(path.clone())).await;
        server.await;
        assert!(!path.exists());

        let any = Address::from(Inet::new("127.0.0.1", "0"));
        let listener = Listener::bind(&any).expect("bound");
        let port = listener.local_port().expect("a port").to_string();
        let server = rt::spawn(echo(listener));
        talk(Inet::new("127.0.0.1", port.as_str()).into()).await;
        server.await;
        let refused = Stream::connect(&Inet::new("127.0.0.1", port).into()).await;
        assert_eq!(refused.expect_err("nobody listens").raw_os_error(), Some(libc::ECONNREFUSED));
    });
}

#[test]
fn a_socket_file_left_behind_is_replaced() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
    let listener = Listener::bind(&Address::Unix(path.clone())).expect("bound again");
    assert!(Listener::bind(&Address::Unix(path.clone())).is_err(), "somebody listens");
    drop(listener);
    std::fs::write(&path, "precious").expect("written");
    assert!(Listener::bind(&Address::Unix(path.clone())).is_err());
    assert_eq!(std::fs::read(&path).expect("read"), b"precious");
}

#[test]
fn shutdown_ends_a_waiting_receiver() {
    both(|| async {
        let (a, b) = Stream::pair().expect("a pair");
        let a = Arc::new(a);
        let receiver = a.clone();
        let waiting = rt::spawn(async move { receiver.recv(&mut [0]).await });
        rt::yield_now().await;
        a.shutdown();
        assert_eq!(waiting.await.expect("the end"), 0);
        assert!(b.send_all(b"x").await.is_err());
    });
}

#[test]
fn futures_can_be_tasks() {
    fn task<F: Future + Send>(_: F) {}
    async fn all(file: File, stream: Stream, listener: Listener) {
        let iov = Iov::zeroed(1);
        let _ = file.read_at(0, &iov).await;
        let _ = file.write_at(0, &iov).await;
        let _ = file.data_sync().await;
        let _ = file.allocate(Allocate::Zero, 0, 1).await;
        let _ = stream.recv(&mut [0]).await;
        let _ = stream.recv_exact_iov(&iov).await;
        let _ = stream.send_parts(&[Part::Iov(&iov)]).await;
        let _ = listener.accept().await;
        let _ = Stream::connect(&Address::Fd(0)).await;
    }
    task(async { all(todo(), todo(), todo()).await });
    fn todo<T>() -> T {
        unreachable!("only the types matter")
    }
}

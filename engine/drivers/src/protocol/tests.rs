//! File nodes on real files.

use std::path::Path;
use std::sync::Arc;

use underlay_graph::{
    Access, ByteRange, NodeOptions, Perms, Place, Preallocation, View, WriteFlags, ZeroFlags,
};
use underlay_sys::Iov;
use underlay_sys::thread::{IoThread, block_on};

use super::file::{Aio, FileNode, Locking};
use super::null::NullNode;
use crate::error::OpenError;
use crate::options::{FileSpec, NullSpec};

fn spec(path: &Path) -> FileSpec {
    let filename = path.to_str().expect("plain").to_owned();
    FileSpec { driver: "file", filename, locking: Locking::Auto, aio: Aio::Threads }
}

async fn open(path: &Path, read_only: bool) -> Result<Arc<View>, OpenError> {
    let node = FileNode::open(&spec(path), &NodeOptions::default(), read_only, false).await?;
    Ok(View::detached(Arc::new(node), []))
}

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).expect("a range")
}

async fn content(view: &View) -> Vec<u8> {
    let all = range(0, view.cx().length());
    let into = Iov::scratch(all.buffer_len());
    view.cx().read(all, into.clone()).await.expect("read");
    into.to_vec()
}

const ZERO: ZeroFlags = ZeroFlags { may_unmap: false, no_fallback: false };

#[test]
fn what_was_written_is_read_and_the_file_grows() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a");
    std::fs::write(&path, [1; 1024]).expect("written");
    block_on(async {
        let view = open(&path, false).await.expect("opened");
        let (node, cx) = (view.node(), view.cx());
        assert_eq!(node.length(&cx), 1024);
        node.write(&cx, range(512, 4096), Iov::filled(4096, 2), WriteFlags::default())
            .await
            .expect("written");
        assert_eq!(node.length(&cx), 4608);
        for may_unmap in [false, true] {
            let flags = ZeroFlags { may_unmap, ..ZERO };
            cx.write_zeroes(range(1024, 1024), flags).await.expect("zeroed");
            node.write_zeroes(&cx, range(1 << 20, 512), flags).await.expect("zeroed");
        }
        assert_eq!(node.length(&cx), (1 << 20) + 512);
        cx.discard(range(0, 512)).await.expect("discarded");
        node.flush(&cx).await.expect("flushed");
        let bytes = content(&view).await;
        assert_eq!(&bytes[512..1024], [2; 512]);
        assert_eq!(&bytes[1024..2048], [0; 1024]);
        assert_eq!(&bytes[2048..4608], [2; 2560]);
        assert!(bytes[4608..].iter().all(|byte| *byte == 0));
        node.close(&cx).await.expect("closed");
        assert_eq!(std::fs::metadata(&path).expect("there").len(), (1 << 20) + 512);
    });
}

#[test]
fn holes_are_mapped_as_zeroes() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a");
    std::fs::write(&path, []).expect("written");
    block_on(async {
        let view = open(&path, false).await.expect("opened");
        let (node, cx) = (view.node(), view.cx());
        node.resize(&cx, 1 << 20, Preallocation::Off).await.expect("grown");
        cx.write(range(64 << 10, 64 << 10), Iov::filled(64 << 10, 1), WriteFlags::default())
            .await
            .expect("written");
        let mut at = 0;
        let mut found = Vec::new();
        while at < 1 << 20 {
            let extent = node.map(&cx, ByteRange::between(at, 1 << 20)).await.expect("mapped");
            found.push((at >> 10, extent.len >> 10, extent.place == Place::Zero));
            at += extent.len;
        }
        assert_eq!(found, [(0, 64, true), (64, 64, false), (128, 896, true)]);
        node.resize(&cx, 2 << 20, Preallocation::Falloc).await.expect("grown");
        node.resize(&cx, 3 << 20, Preallocation::Full).await.expect("grown");
        assert!(node.allocated_size().expect("known") >= 2 << 20);
        let refused = node.resize(&cx, 4 << 20, Preallocation::Metadata).await.expect_err("no tables here");
        assert_eq!(refused.to_string(), "Unsupported preallocation mode: metadata");
        node.resize(&cx, 512, Preallocation::Off).await.expect("cut");
        assert_eq!(content(&view).await, [0; 512]);
    });
}

#[test]
fn two_writers_are_kept_apart() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a");
    std::fs::write(&path, [0; 512]).expect("written");
    let writer = Access {
        writable: true,
        required: Perms::CONSISTENT_READ | Perms::WRITE,
        shared: Perms::CONSISTENT_READ | Perms::WRITE_UNCHANGED,
        used: true,
    };
    let reader = Access { writable: false, required: Perms::CONSISTENT_READ, shared: Perms::ALL, used: true };
    block_on(async {
        let a = open(&path, false).await.expect("opened");
        let b = open(&path, false).await.expect("opened");
        a.node().set_access(&a.cx(), writer).await.expect("free");
        let refused = b.node().set_access(&b.cx(), writer).await.expect_err("taken");
        assert_eq!(refused.to_string(), "Failed to get \"write\" lock");
        let shy = Access { shared: Perms::CONSISTENT_READ, ..reader };
        let refused = b.node().set_access(&b.cx(), shy).await.expect_err("taken");
        assert_eq!(refused.to_string(), "Failed to get shared \"write\" lock");
        b.node().set_access(&b.cx(), reader).await.expect("readers get on");
        a.node().set_access(&a.cx(), Access::UNUSED).await.expect("given up");
        b.node().set_access(&b.cx(), writer).await.expect("free again");
        b.node().close(&b.cx()).await.expect("closed");
        a.node().set_access(&a.cx(), writer).await.expect("free again");
    });
}

#[test]
fn a_node_becomes_writable_and_stays_with_its_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let (path, moved) = (dir.path().join("a"), dir.path().join("b"));
    std::fs::write(&path, [7; 512]).expect("written");
    block_on(async {
        let view = open(&path, true).await.expect("opened");
        let (node, cx) = (view.node(), view.cx());
        let zeroes = Iov::zeroed(512);
        node.write(&cx, range(0, 512), zeroes.clone(), WriteFlags::default()).await.expect_err("read-only");
        std::fs::rename(&path, &moved).expect("moved");
        std::fs::write(&path, [8; 512]).expect("another one");
        let access = Access { writable: true, required: Perms::WRITE, shared: Perms::ALL, used: true };
        node.set_access(&cx, access).await.expect("writable");
        node.write(&cx, range(0, 512), zeroes, WriteFlags::default()).await.expect("written");
        assert_eq!(std::fs::read(&path).expect("read"), [8; 512]);
        assert_eq!(std::fs::read(&moved).expect("read"), [0; 512]);
    });
}

#[test]
fn growing_from_several_threads_loses_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a");
    std::fs::write(&path, []).expect("written");
    block_on(async {
        let view = open(&path, false).await.expect("opened");
        let threads: Vec<_> =
            ["one", "two"].into_iter().map(|name| IoThread::start(name).expect("a thread")).collect();
        let work = |turn: u64| {
            let view = view.clone();
            async move {
                for n in (turn..400).step_by(2) {
                    let (node, cx, here) = (view.node(), view.cx(), range(n * 4096, 4096));
                    match n % 8 {
                        0 => node.write_zeroes(&cx, here, ZERO).await.expect("zeroed"),
                        _ => node
                            .write(&cx, here, Iov::filled(4096, 1), WriteFlags::default())
                            .await
                            .expect("written"),
                    }
                }
            }
        };
        let (one, two) = (threads[0].spawner(), threads[1].spawner());
        let there = underlay_sys::rt::spawn({
            let first = work(0);
            async move { one.run(first).await }
        });
        two.run(work(1)).await;
        there.await;
        for (n, block) in content(&view).await.chunks(4096).enumerate() {
            let expected = u8::from(n % 8 != 0);
            assert!(block.iter().all(|byte| *byte == expected), "block {n}");
        }
    });
}

/// Where blocks are larger than sectors, to write the last sectors would make the file longer.
#[test]
fn a_file_that_ends_within_a_block_has_no_writers_who_may_not_resize() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a");
    std::fs::write(&path, [1; 4097 + 512]).expect("written");
    block_on(async {
        let file = FileNode::open(&spec(&path), &NodeOptions::default(), false, false).await.expect("opened");
        let view = View::detached(Arc::new(file), []);
        let file = view.node().as_any().downcast_ref::<FileNode>().expect("a file");
        let allowed = async |required: Perms| {
            let access = Access { writable: true, required, shared: Perms::ALL, used: true };
            view.node().set_access(&view.cx(), access).await
        };
        allowed(Perms::WRITE).await.expect("sectors are blocks");
        file.alignment.store(4096, std::sync::atomic::Ordering::Relaxed);
        let error = allowed(Perms::WRITE).await.expect_err("refused").to_string();
        assert!(error.starts_with("Cannot get 'write' permission without 'resize'"), "{error}");
        allowed(Perms::WRITE | Perms::RESIZE).await.expect("it may grow");
        allowed(Perms::CONSISTENT_READ).await.expect("nothing is written");
        view.node().resize(&view.cx(), 8192, Preallocation::Off).await.expect("resized");
        allowed(Perms::WRITE).await.expect("it ends with a block");
    });
}

#[test]
fn what_cannot_be_opened_is_said_so() {
    let dir = tempfile::tempdir().expect("a directory");
    block_on(async {
        let missing = dir.path().join("missing");
        let error = open(&missing, false).await.expect_err("missing");
        let text = format!("Could not open '{}': No such file or directory", missing.display());
        assert_eq!(error.to_string(), text);
        let error = open(dir.path(), false).await.expect_err("a folder");
        assert_eq!(error.to_string(), format!("Could not open '{}': Is a directory", dir.path().display()));
        for other in [dir.path(), Path::new("/dev/null")] {
            let error = open(other, true).await.expect_err("not a file");
            let text = format!("'file' driver requires '{}' to be a regular file", other.display());
            assert_eq!(error.to_string(), text);
        }
    });
}

#[test]
fn a_null_node_forgets() {
    let spec =
        NullSpec { driver: "null-co", size: 1 << 20, latency_ns: 1000, read_zeroes: true, given: Vec::new() };
    let view = View::detached(Arc::new(NullNode::new(&spec)), []);
    block_on(async {
        view.cx().write(range(0, 4096), Iov::filled(4096, 1), WriteFlags::default()).await.expect("written");
        assert!(content(&view).await.iter().all(|byte| *byte == 0));
        let extent = view.node().map(&view.cx(), range(0, 8192)).await.expect("mapped");
        assert_eq!((extent.place, extent.len), (Place::Zero, 8192));
    });
}

/// Requests that start and end anywhere, from memory that starts anywhere, on a file that goes past the page cache.
#[test]
fn direct_requests_may_be_unaligned() {
    // Not in a memory file system, which may not know such files.
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a directory");
    let path = dir.path().join("a");
    let mut model: Vec<u8> = (0..1_u32 << 20).map(|at| at.to_le_bytes()[1]).collect();
    std::fs::write(&path, &model).expect("written");
    block_on(async {
        let options = NodeOptions { cache_direct: true, ..NodeOptions::default() };
        let node = match FileNode::open(&spec(&path), &options, false, false).await {
            Ok(node) => node,
            Err(error) => return println!("not tested, as files here are never direct: {error}"),
        };
        let view = View::detached(Arc::new(node), []);
        let cx = view.cx();
        assert!(cx.limits().request_alignment >= 512, "{:?}", cx.limits());
        let mut seed = 1_u64;
        let mut dice = |sides: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % sides
        };
        for turn in 0_u8..200 {
            let start = dice(1 << 20);
            let here = range(start, 1 + dice(((1 << 20) - start).min(20_000)));
            let (from, to) = (usize::try_from(here.start()).unwrap(), usize::try_from(here.end()).unwrap());
            let memory =
                Iov::filled(here.buffer_len() + 7, turn).slice(usize::from(turn % 7), here.buffer_len());
            match turn % 4 {
                0 | 1 => {
                    cx.write(here, memory, WriteFlags::default()).await.expect("written");
                    model[from..to].fill(turn);
                }
                2 => {
                    cx.write_zeroes(here, ZERO).await.expect("zeroed");
                    model[from..to].fill(0);
                }
                _ => {
                    cx.read(here, memory.clone()).await.expect("read");
                    assert!(memory.to_vec() == model[from..to], "{here:?}");
                }
            }
        }
        cx.node().flush(&cx).await.expect("flushed");
        assert!(content(&view).await == model);
        view.node().close(&cx).await.expect("closed");
    });
    assert!(std::fs::read(&path).expect("there") == model);
}

/// Where the file system of the folder for temporary files cannot share storage, it says so.
#[test]
fn files_share_storage_or_say_that_they_cannot() {
    let dir = tempfile::tempdir().expect("a directory");
    let (from, to) = (dir.path().join("a"), dir.path().join("b"));
    let source: Vec<u8> = (0..1_u32 << 20).map(|at| u8::try_from(at / 4096 % 251).unwrap_or(0)).collect();
    std::fs::write(&from, &source).expect("written");
    std::fs::write(&to, vec![9; 1 << 20]).expect("written");
    let mut wanted = vec![9; 1 << 20];
    block_on(async {
        let (from, to) = (open(&from, true).await.expect("opened"), open(&to, false).await.expect("opened"));
        let odd = from.cx().reflink(range(100, 4096), &to.cx(), 0).await;
        assert!(odd.is_err(), "not on whole blocks");
        match from.cx().reflink(range(65536, 131_072), &to.cx(), 524_288).await {
            Ok(()) => wanted[524_288..655_360].copy_from_slice(&source[65536..196_608]),
            Err(error) => assert_ne!(error, underlay_graph::IoError::EINVAL),
        }
        assert_eq!(content(&to).await, wanted);
        let spec = NullSpec {
            driver: "null-co",
            size: 1 << 20,
            latency_ns: 0,
            read_zeroes: true,
            given: Vec::new(),
        };
        let null = View::detached(Arc::new(NullNode::new(&spec)), []);
        let refused = from.cx().reflink(range(0, 4096), &null.cx(), 0).await;
        assert_eq!(refused.expect_err("no file"), underlay_graph::IoError::ENOTSUP);
    });
}

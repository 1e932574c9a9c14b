//! Two I/O threads: one is full of writes that copy much, and the other one takes some of them, beside work of its own
//! on the same image.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use common::{Memory, run};
use underlay_graph::perm::Access;
use underlay_graph::{ByteRange, Node, Perms, Role, View, WriteFlags, ZeroFlags};
use underlay_qcow2::{CreateOptions, OpenOptions, Qcow2, create};
use underlay_sys::Iov;
use underlay_sys::rt;
use underlay_sys::thread::{IoThread, block_on};

const CLUSTER: u64 = 64 << 10;
const BLOCK: u64 = 4096;
const SIZE: u64 = 64 * CLUSTER;
/// The first clusters show what is below, the next are compressed, and the last are discarded again and again.
const COMPRESSED: u64 = 40 * CLUSTER;
const DISCARDED: u64 = 56 * CLUSTER;
const ROUNDS: u64 = 40;

fn of(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

fn open(disk: Memory, base: Arc<View>) -> (Arc<Memory>, Arc<Qcow2>, Arc<View>) {
    let (disk, file) = disk.view();
    let image = Arc::new(run(Qcow2::open(&file.cx(), OpenOptions::default())).unwrap());
    let view = View::detached(image.clone(), [(Role::File, file), (Role::Backing, base)]);
    let access = Access { writable: true, required: Perms::ALL, shared: Perms::ALL, used: true };
    run(image.set_access(&view.cx(), access)).unwrap();
    (disk, image, view)
}

fn content(view: &View) -> Vec<u8> {
    let all = Iov::scratch(SIZE as usize);
    run(view.cx().read(of(0, SIZE), all.clone())).unwrap();
    all.to_vec()
}

/// A write of one block, begun at once.
async fn write(view: &View, block: u64, byte: u8) {
    let data = Iov::filled(BLOCK as usize, byte);
    view.cx().write(of(block * BLOCK, BLOCK), data, WriteFlags::default()).await.unwrap();
}

/// Blocks of all clusters, each once in a round, so that many copies are wanted at once.
async fn write_rounds(view: &View, model: &mut [u8]) {
    for round in 0..ROUNDS {
        rt::press(true);
        let mut writes: Vec<Pin<Box<dyn Future<Output = ()> + Send + '_>>> = Vec::new();
        for cluster in 0..DISCARDED / CLUSTER {
            // Not the same clusters from the start in each round.
            if (cluster + round) % 3 == 0 || round >= 3 {
                let block = cluster * (CLUSTER / BLOCK) + (cluster * 7 + round) % (CLUSTER / BLOCK);
                let byte = (1 + round * 5 + cluster) as u8;
                model[(block * BLOCK) as usize..][..BLOCK as usize].fill(byte);
                writes.push(Box::pin(write(view, block, byte)));
            }
        }
        std::future::poll_fn(|cx| {
            writes.retain_mut(|write| write.as_mut().poll(cx).is_pending());
            if writes.is_empty() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        rt::press(false);
    }
}

#[test]
fn who_is_helped_writes_the_same() {
    let threads = IoThread::start_crew("helped", 2).unwrap();
    let below: Vec<u8> = (0..SIZE).map(|at| (at / 512 % 251) as u8).collect();
    let (base, base_view) = Memory::from_bytes(&below).view();
    let (file, file_view) = Memory::default().view();
    let options = CreateOptions::new(SIZE);
    run(create(&file_view.cx(), &options)).unwrap();
    let (disk, image, view) = open(Memory::from_bytes(&file.to_vec()), base_view.clone());
    let mut model = below;
    for at in (COMPRESSED..DISCARDED).step_by(CLUSTER as usize) {
        let byte = (at / CLUSTER) as u8;
        model[at as usize..][..CLUSTER as usize].fill(byte);
        let data = Iov::filled(CLUSTER as usize, byte);
        run(view.cx().write(of(at, CLUSTER), data, WriteFlags { compressed: true })).unwrap();
    }
    model[DISCARDED as usize..].fill(0);
    base.readers.lock().unwrap().clear();

    let is_over = Arc::new(AtomicBool::new(false));
    let (there, over) = (view.clone(), is_over.clone());
    let beside = async move {
        while !over.load(Ordering::Relaxed) {
            let cx = there.cx();
            cx.write_zeroes(of(DISCARDED, SIZE - DISCARDED), ZeroFlags::default()).await.unwrap();
            cx.flush().await.unwrap();
            cx.discard(of(DISCARDED, SIZE - DISCARDED)).await.unwrap();
            rt::yield_now().await;
        }
    };
    let here = view.clone();
    let writes = async move {
        write_rounds(&here, &mut model).await;
        is_over.store(true, Ordering::Relaxed);
        model
    };
    let (first, second) = (threads[0].spawner(), threads[1].spawner());
    let beside = std::thread::spawn(move || block_on(second.run(beside)));
    let model = block_on(first.run(writes));
    beside.join().unwrap();

    assert_eq!(base.readers.lock().unwrap().len(), 2, "nobody was helped, or nobody did anything alone");
    assert!(content(&view) == model);
    run(image.close(&view.cx())).unwrap();
    let (_, _, again) = open(Memory::from_bytes(&disk.to_vec()), base_view);
    assert!(content(&again) == model);
}

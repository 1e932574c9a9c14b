//! Several slices of an L2 table read together, into a cache that has hardly room for them.

use std::any::Any;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use async_trait::async_trait;
use underlay_graph::{ByteRange, Cx, Kind, Node, Place, Result, Role, View, WriteFlags};
use underlay_sys::Iov;

use super::{Disk, Setup, Shape, open, run, view_of};
use crate::live::OpenOptions;

const CLUSTER: u64 = 4096;
/// Bytes that a slice of 512 bytes maps.
const REACH: u64 = 64 * CLUSTER;

const SHAPE: Shape = Shape { bits: 12, order: 4, extended: false, v3: true, zstd: false, size: 8 * REACH };

fn two_slices() -> OpenOptions {
    OpenOptions { l2_cache_size: Some(1024), l2_cache_entry_size: Some(512), ..OpenOptions::default() }
}

#[test]
fn a_read_across_more_slices_than_there_is_room_for_comes_to_its_end() {
    let disk = Disk::new(SHAPE.image(false), 1).forget_cuts();
    let setup = open(disk.clone(), None, two_slices(), true);
    for slice in 0..8 {
        setup.write(slice * REACH, &[u8::try_from(slice).unwrap() + 1; 512]).unwrap();
    }
    setup.close();
    let found = open(disk, None, two_slices(), false).read(0, SHAPE.size);
    let reach = usize::try_from(REACH).unwrap();
    assert!(found.chunks(reach).zip(1..).all(|(bytes, number)| bytes[..512].iter().all(|b| *b == number)));
}

/// A disk on which reads of two slices arrive late, with the bytes of when they began.
#[derive(Debug)]
struct Late {
    disk: Arc<Disk>,
    hold: AtomicBool,
}

#[async_trait]
impl Node for Late {
    fn driver(&self) -> &'static str {
        "late"
    }
    fn kind(&self) -> Kind {
        Kind::Protocol
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn length(&self, cx: &Cx<'_>) -> u64 {
        self.disk.length(cx)
    }
    fn unwritten_is_zero(&self, _cx: &Cx<'_>) -> bool {
        true
    }
    async fn read(&self, cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        self.disk.read(cx, range, into).await?;
        let is_held = || range.len() == 1024 && self.hold.load(Ordering::SeqCst);
        std::future::poll_fn(|_| if is_held() { Poll::Pending } else { Poll::Ready(()) }).await;
        Ok(())
    }
    async fn write(&self, cx: &Cx<'_>, range: ByteRange, from: Iov, flags: WriteFlags) -> Result<()> {
        self.disk.write(cx, range, from, flags).await
    }
    async fn flush(&self, cx: &Cx<'_>) -> Result<()> {
        self.disk.flush(cx).await
    }
}

#[test]
fn a_slice_that_was_written_while_it_was_read_with_others_is_not_old_afterwards() {
    let disk = Disk::new(SHAPE.image(false), 1).forget_cuts();
    let first = open(disk.clone(), None, OpenOptions::default(), true);
    for slice in 0..8 {
        first.write(slice * REACH, &[1; 512]).unwrap();
    }
    first.close();
    let late = Arc::new(Late { disk: disk.clone(), hold: AtomicBool::new(true) });
    let Setup { image, .. } = open(disk, None, two_slices(), true);
    let view = View::detached(image.clone(), [(Role::File, view_of(late.clone()))]);
    let setup = Setup { image, view };
    // The second slice is in memory, the first is not.
    setup.read(REACH, 512);
    let across = ByteRange::between(0, 2 * REACH);
    let both = Iov::scratch(across.buffer_len());
    let cx = setup.view.cx();
    let mut reading = pin!(cx.read(across, both.clone()));
    let mut poll = || reading.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    for _ in 0..1000 {
        assert!(poll().is_pending());
    }
    // Meanwhile it changes, gets to the disk, and makes room for others.
    setup.write(REACH + CLUSTER, &[2; 512]).unwrap();
    run(cx.flush()).unwrap();
    for slice in 2..8 {
        setup.read(slice * REACH, 512);
    }
    late.hold.store(false, Ordering::SeqCst);
    while poll().is_pending() {}
    assert_eq!(setup.read(REACH + CLUSTER, 512), [2; 512]);
}

/// Nodes are asked for much at once; what they say is what they would have said one by one.
#[test]
fn a_walk_finds_what_single_questions_find() {
    for (seed, extended) in (0..20).map(|seed| (seed, seed % 2 == 1)) {
        let shape = Shape { bits: if extended { 14 } else { 12 }, extended, size: 3 * REACH, ..SHAPE };
        let base = open(Disk::new(shape.image(false), seed).forget_cuts(), None, two_slices(), true);
        let setup = open(
            Disk::new(shape.image(true), seed).forget_cuts(),
            Some(base.view.clone()),
            two_slices(),
            true,
        );
        let mut number = seed;
        for step in 0..40 {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (at, len) = ((number >> 20) % (shape.size / 512) * 512, 512 << (number >> 50 & 7));
            let range = ByteRange::between(at, shape.size.min(at + len));
            let view = if step % 3 == 0 { &base.view } else { &setup.view };
            match number >> 60 {
                0..4 => run(view.cx().write_zeroes(range, Default::default())).unwrap(),
                4..6 => run(view.cx().discard(range)).unwrap(),
                _ => run(view.cx().write(range, Iov::filled(range.buffer_len(), 7), WriteFlags::default()))
                    .unwrap(),
            }
        }
        let cx = setup.view.cx();
        let mut walk = underlay_graph::walk::Walk::default();
        let mut rest = ByteRange::between(0, shape.size);
        while !rest.is_empty() {
            let found = run(walk.status(&cx, rest)).unwrap();
            let single = run(underlay_graph::status::status(
                &cx,
                ByteRange::between(rest.start(), rest.start() + found.len),
                None,
            ));
            assert_eq!(single.unwrap(), found, "seed {seed} at {:#x}", rest.start());
            assert_eq!(walk.status_now(&cx, rest), Some(found), "what was said is known");
            rest = rest.split(found.len).1;
        }
    }
}

/// Slices of nothing but zeroes are one answer with what is before them, up to the first one that was ever changed.
#[test]
fn neighbouring_slices_of_zeroes_are_one_answer() {
    let disk = Disk::new(SHAPE.image(false), 1).forget_cuts();
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    setup.write(0, &[1; 512]).unwrap();
    setup.write(7 * REACH + CLUSTER, &[7; 512]).unwrap();
    setup.close();
    let setup =
        open(disk, None, OpenOptions { l2_cache_entry_size: Some(512), ..OpenOptions::default() }, true);
    let below = |start: u64| {
        let found = run(setup.view.cx().map(ByteRange::between(start, SHAPE.size))).unwrap();
        (found.place == Place::Below).then_some(start + found.len)
    };
    assert_eq!(below(0), None);
    // The first question loads them all, and is answered for what it asks about the first.
    below(CLUSTER);
    assert_eq!(below(CLUSTER), Some(7 * REACH));
    assert_eq!(below(REACH + 5 * CLUSTER), Some(7 * REACH));
    assert_eq!(below(7 * REACH), Some(7 * REACH + CLUSTER));
    setup.write(4 * REACH + 2 * CLUSTER, &[4; 512]).unwrap();
    assert_eq!(below(REACH), Some(4 * REACH));
    assert_eq!(below(4 * REACH), Some(4 * REACH + 2 * CLUSTER));
    assert_eq!(below(4 * REACH + 3 * CLUSTER), Some(7 * REACH));
}

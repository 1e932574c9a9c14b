//! Random requests against a byte model, on images of all shapes, one after another and many at once.

use std::sync::Arc;

use underlay_graph::format::join;
use underlay_graph::{ByteRange, IoError, Node, Result, WriteFlags, ZeroFlags};
use underlay_sys::Iov;

use super::{Disk, Rng, Setup, Shape, Work, check::check, open, run, view_of};
use crate::live::OpenOptions;

pub fn shapes() -> Vec<Shape> {
    let mut all = Vec::new();
    for bits in 9..=21u32 {
        let size = (1u64 << bits).saturating_mul(40).min(6 << 20) + 1536;
        all.push(Shape { bits, order: bits % 7, extended: false, v3: true, zstd: bits % 2 == 0, size });
        all.push(Shape { bits, order: 4, extended: false, v3: false, zstd: false, size });
        if bits >= 14 {
            all.push(Shape { bits, order: (bits + 3) % 7, extended: true, v3: true, zstd: false, size });
        }
    }
    all
}

fn noise(rng: &mut Rng, len: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len / 8 + 1).flat_map(|_| rng.next().to_be_bytes()).collect();
    bytes.truncate(usize::try_from(len).unwrap());
    bytes
}

/// A range that likes cluster borders.
fn range(rng: &mut Rng, shape: &Shape) -> ByteRange {
    let cluster = 1u64 << shape.bits;
    let point = |rng: &mut Rng| {
        let at = rng.below(shape.size + 1);
        match rng.below(3) {
            0 => at / cluster * cluster,
            1 => at / 512 * 512,
            _ => at,
        }
    };
    let (a, b) = (point(rng), point(rng));
    let (start, end) = (a.min(b), a.max(b));
    let end = if rng.below(3) > 0 { end.min(start + 3 * cluster) } else { end };
    ByteRange::between(start, end)
}

struct Model {
    now: Vec<u8>,
}

impl Model {
    fn part(&mut self, range: ByteRange) -> &mut [u8] {
        &mut self.now[usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()]
    }
}

fn step(setup: &Setup, shape: &Shape, model: &mut Model, rng: &mut Rng, backing: bool) {
    let range = range(rng, shape);
    if range.is_empty() {
        return;
    }
    let cx = setup.view.cx();
    match rng.below(12) {
        0..=4 => {
            let bytes = noise(rng, range.len());
            model.part(range).copy_from_slice(&bytes);
            run(cx.write(range, Iov::copy_of(&bytes), WriteFlags::default())).unwrap();
        }
        5 | 6 => {
            model.part(range).fill(0);
            let may_unmap = rng.below(2) == 0;
            run(cx.write_zeroes(range, ZeroFlags { may_unmap, no_fallback: false })).unwrap();
        }
        7 => {
            run(cx.discard(range)).unwrap();
            let size = shape.size;
            let end = if range.end() == size { size.next_multiple_of(1 << shape.bits) } else { range.end() };
            let inner = ByteRange::between(range.start(), end).align_in(1 << shape.bits).before(size);
            if shape.v3 || !backing {
                model.part(inner).fill(0);
            }
        }
        8 => {
            run(cx.populate(range)).unwrap();
        }
        9 | 10 => {
            let inner = range.align_in(1 << shape.bits);
            let mut bytes = noise(rng, inner.len());
            bytes.iter_mut().enumerate().filter(|(i, _)| i % 5 > 0).for_each(|(_, b)| *b = 9);
            model.part(inner).copy_from_slice(&bytes);
            if !inner.is_empty() {
                run(cx.write(inner, Iov::copy_of(&bytes), WriteFlags { compressed: true })).unwrap();
            }
        }
        _ => run(cx.flush()).unwrap(),
    }
    let look = self::range(rng, shape);
    let expected = model.part(look).to_vec();
    let found = setup.read(look.start(), look.len());
    assert!(
        found == expected,
        "{range} then {look}: {:?}",
        found.iter().zip(&expected).position(|(a, b)| a != b)
    );
}

fn small_caches() -> OpenOptions {
    OpenOptions {
        l2_cache_size: Some(2048),
        refcount_cache_size: Some(1024),
        l2_cache_entry_size: Some(512),
        ..OpenOptions::default()
    }
}

#[test]
fn requests_one_after_another_on_images_of_all_shapes() {
    for (i, shape) in shapes().into_iter().enumerate() {
        for backing in [false, true] {
            let mut rng = Rng::new(i as u64 * 2 + u64::from(backing) + 1);
            let below = if backing { noise(&mut rng, shape.size * 3 / 4) } else { Vec::new() };
            let base = backing.then(|| view_of(Disk::new(below.clone(), 7)));
            let disk = Disk::new(shape.image(backing && shape.bits > 9), i as u64).forget_cuts();
            let mut now = below;
            now.resize(usize::try_from(shape.size).unwrap(), 0);
            let mut model = Model { now };
            for _ in 0..2 {
                let options = if i % 2 == 0 { small_caches() } else { OpenOptions::default() };
                let options = OpenOptions { pass_discard_other: i % 3 > 0, ..options };
                let setup = open(disk.clone(), base.clone(), options, true);
                for _ in 0..(if shape.bits > 16 { 14 } else { 60 }) {
                    step(&setup, &shape, &mut model, &mut rng, backing);
                }
                setup.close();
                let (errors, leaks) = check(&disk.content());
                assert!(errors.is_empty() && leaks == 0, "{shape:?}: {leaks} leaks, {errors:?}");
            }
            let again = open(disk, base, OpenOptions::default(), false);
            assert!(again.read(0, shape.size) == model.now, "{shape:?} after opening again");
        }
    }
}

/// Guests that each write to their own places, all at once, over the same clusters.
#[test]
fn requests_all_at_once_do_not_disturb_each_other() {
    for seed in 0..150u64 {
        let bits = [9, 12, 14, 16][usize::try_from(seed % 4).unwrap()];
        let extended = bits >= 14 && seed % 3 == 0;
        let shape = Shape { bits, order: 4, extended, v3: true, zstd: false, size: (20 << bits) + 512 };
        let mut rng = Rng::new(seed + 1000);
        let below = noise(&mut rng, shape.size / 2);
        let base = view_of(Disk::new(below.clone(), seed));
        let disk = Disk::new(shape.image(bits > 9), seed);
        let setup = open(disk.clone(), Some(base.clone()), small_caches(), true);
        let mut model = below;
        model.resize(usize::try_from(shape.size).unwrap(), 0);
        // Each guest owns every sixth sector (of a fine grain), so that all share clusters.
        let guests = 6;
        let grain = (1u64 << bits) / 8;
        let plans: Vec<Vec<(ByteRange, Option<Vec<u8>>)>> = (0..guests)
            .map(|guest| {
                let mut plan = Vec::new();
                for _ in 0..25 {
                    let slots = shape.size / grain / guests;
                    let at = (rng.below(slots) * guests + guest) * grain;
                    let range = ByteRange::between(at, (at + grain).min(shape.size));
                    let bytes = (rng.below(4) > 0).then(|| noise(&mut rng, range.len()));
                    plan.push((range, bytes));
                }
                plan
            })
            .collect();
        for plan in &plans {
            for (range, bytes) in plan {
                let part = &mut model
                    [usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()];
                match bytes {
                    Some(bytes) => part.copy_from_slice(bytes),
                    None => part.fill(0),
                }
            }
        }
        let cx = setup.view.cx();
        let mut work: Vec<Work<'_>> = plans
            .iter()
            .map(|plan| -> Work<'_> {
                Box::pin(async move {
                    for (range, bytes) in plan {
                        match bytes {
                            Some(bytes) => {
                                cx.write(*range, Iov::copy_of(bytes), WriteFlags::default()).await?;
                            }
                            None => {
                                cx.write_zeroes(*range, ZeroFlags { may_unmap: true, no_fallback: false })
                                    .await?
                            }
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        work.push(Box::pin(async move {
            for i in 0..shape.size >> (bits + 1) {
                cx.populate(ByteRange::between(i << (bits + 1), (i + 1) << (bits + 1)).before(shape.size))
                    .await?;
            }
            Ok(())
        }));
        work.push(Box::pin(async move {
            for _ in 0..10 {
                cx.flush().await?;
                let into = Iov::scratch(usize::try_from(shape.size).unwrap());
                cx.read(ByteRange::between(0, shape.size), into).await?;
            }
            Ok(())
        }));
        run(join(work)).unwrap();
        let found = setup.read(0, shape.size);
        assert!(found == model, "seed {seed}: {:?}", found.iter().zip(&model).position(|(a, b)| a != b));
        setup.close();
        let (errors, leaks) = check(&disk.content());
        assert!(errors.is_empty() && leaks == 0, "seed {seed}: {leaks} leaks, {errors:?}");
        let again = open(disk, None, OpenOptions::default(), false);
        assert!(
            again.read(0, shape.size) == model,
            "seed {seed}: populated, so the backing file is not needed"
        );
    }
}

/// Searches for room in a fragmented image, several at once, each longer than the cache of refcounts.
#[test]
fn searches_for_room_do_not_send_each_other_back_for_ever() {
    let shape = Shape { bits: 9, order: 6, extended: false, v3: true, zstd: false, size: 2048 << 9 };
    let disk = Disk::new(shape.image(false), 5).forget_cuts().steady();
    let setup = open(disk.clone(), None, small_caches(), true);
    setup.write(0, &vec![1; 1024 << 9]).unwrap();
    for hole in 0..500 {
        run(setup.view.cx().discard(ByteRange::new(hole << 10, 512).unwrap())).unwrap();
    }
    setup.close();
    let setup = open(disk, None, small_caches(), true);
    let cx = setup.view.cx();
    let guests = (0..24u64).map(|guest| -> Work<'_> {
        let range = ByteRange::new((1024 + guest * 40) << 9, (8 + guest) << 9).unwrap();
        Box::pin(
            async move { cx.write(range, Iov::filled(range.buffer_len(), 2), WriteFlags::default()).await },
        )
    });
    run(join(guests.collect())).unwrap();
    assert_eq!(setup.read((1024 + 5 * 40) << 9, 13 << 9), vec![2; 13 << 9]);
}

/// A cluster that is rewritten, discarded and given to others while reads and writes of it are under way.
#[test]
fn clusters_are_not_reused_under_a_read_or_write() {
    for seed in 0..200u64 {
        let shape = Shape { bits: 12, order: 4, extended: false, v3: true, zstd: false, size: 16 << 12 };
        let disk = Disk::new(shape.image(false), seed);
        let setup = open(disk.clone(), None, OpenOptions::default(), true);
        let cx = setup.view.cx();
        let cluster = |i: u64| ByteRange::between(i << 12, (i + 1) << 12);
        let fill = |i: u64| Iov::filled(4096, u8::try_from(i + 1).unwrap());
        let mut work: Vec<Work<'_>> = Vec::new();
        for guest in 0..8u64 {
            work.push(Box::pin(async move {
                for round in 0..12 {
                    let mine = cluster(guest);
                    cx.write(mine, fill(guest), WriteFlags::default()).await?;
                    let parts: Vec<Work<'_>> = vec![
                        Box::pin(async move { cx.write(mine, fill(guest), WriteFlags::default()).await }),
                        Box::pin(async move {
                            let into = Iov::scratch(4096);
                            cx.read(mine, into.clone()).await?;
                            let own = u8::try_from(guest + 1).unwrap();
                            let seen = into.to_vec();
                            let foreign = seen.iter().find(|b| **b != 0 && **b != own);
                            foreign
                                .map_or(Ok(()), |b| Err(IoError::EIO.with(format!("guest {guest} saw {b}"))))
                        }),
                        Box::pin(async move {
                            if round % 2 == 0 { cx.discard(mine).await } else { cx.flush().await }
                        }),
                        Box::pin(async move { cx.flush().await }),
                    ];
                    join(parts).await?;
                }
                cx.write(cluster(guest), fill(guest), WriteFlags::default()).await
            }));
        }
        let outcome: Result<()> = run(join(work));
        outcome.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        for guest in 0..8 {
            assert!(setup.read(guest << 12, 4096).iter().all(|b| u64::from(*b) == guest + 1), "seed {seed}");
        }
        setup.close();
        let (errors, leaks) = check(&disk.content());
        assert!(errors.is_empty() && leaks == 0, "seed {seed}: {leaks} leaks, {errors:?}");
    }
}

#[test]
fn the_walk_over_nothing_is_short() {
    let shape = Shape { bits: 16, order: 4, extended: false, v3: true, zstd: false, size: 1 << 40 };
    let setup = open(Disk::new(shape.image(false), 1), None, OpenOptions::default(), true);
    let all = ByteRange::between(0, 1 << 40);
    assert_eq!(run(setup.image.map(&setup.view.cx(), all)).unwrap().len, 1 << 40);
    setup.write((1 << 39) + 5, b"here").unwrap();
    let first = run(setup.image.map(&setup.view.cx(), all)).unwrap();
    assert_eq!(first.len, 1 << 39);
    let _: Arc<dyn Node> = setup.image;
}

/// The same image from several threads at once, as several I/O threads use it.
#[test]
fn threads_share_an_image() {
    for (seed, bits) in [(1u64, 9), (2, 12), (3, 16)] {
        let extended = bits == 16;
        let shape = Shape { bits, order: 4, extended, v3: true, zstd: false, size: 96 << bits };
        let disk = Disk::new(shape.image(false), seed).forget_cuts();
        let setup = open(disk.clone(), None, small_caches(), true);
        let grain = 1u64 << (bits - 3);
        let slots = shape.size / grain / 4;
        let expected: Vec<std::collections::BTreeMap<u64, u8>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4u64)
                .map(|thread| {
                    let view = &setup.view;
                    scope.spawn(move || {
                        let mut mine = std::collections::BTreeMap::new();
                        let mut rng = Rng::new(seed * 10 + thread);
                        let cx = view.cx();
                        for step in 0..300u32 {
                            let at = (rng.below(slots) * 4 + thread) * grain;
                            let range = ByteRange::between(at, at + grain);
                            let byte = u8::try_from(step % 250 + 1).unwrap();
                            match rng.below(12) {
                                0 => run(cx.flush()).unwrap(),
                                1 | 2 => {
                                    let flags = ZeroFlags { may_unmap: true, no_fallback: false };
                                    run(cx.write_zeroes(range, flags)).unwrap();
                                    mine.insert(at, 0);
                                }
                                _ => {
                                    let from = Iov::filled(range.buffer_len(), byte);
                                    run(cx.write(range, from, WriteFlags::default())).unwrap();
                                    mine.insert(at, byte);
                                }
                            }
                        }
                        mine
                    })
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).collect()
        });
        let found = setup.read(0, shape.size);
        for (at, byte) in expected.iter().flatten() {
            let part = &found[usize::try_from(*at).unwrap()..usize::try_from(at + grain).unwrap()];
            assert!(part.iter().all(|b| b == byte), "seed {seed}: {at:#x}");
        }
        setup.close();
        let (errors, leaks) = check(&disk.content());
        assert!(errors.is_empty() && leaks == 0, "seed {seed}: {leaks} leaks, {errors:?}");
    }
}

//! Power cuts and failing disks: whatever is left must be sound and contain every flushed write.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use underlay_graph::format::join;
use underlay_graph::{ByteRange, View, WriteFlags, ZeroFlags};
use underlay_sys::Iov;

use super::{Disk, Rng, Shape, Work, check::check, open, run, view_of};
use crate::live::{OpenOptions, Qcow2};

/// What each sector may read as after a cut: the last flushed value and everything written since.
#[derive(Debug, Default)]
struct May {
    sectors: BTreeMap<u64, Vec<u64>>,
}

impl May {
    fn begin(&mut self, sector: u64, value: u64) {
        self.sectors.entry(sector).or_insert_with(|| vec![u64::MAX]).push(value);
    }
}

fn stamp(value: u64) -> Vec<u8> {
    value.to_be_bytes().repeat(64)
}

fn shape(seed: u64) -> Shape {
    let bits = [9, 10, 12, 14, 16][usize::try_from(seed % 5).unwrap()];
    let extended = bits >= 14 && seed.is_multiple_of(2);
    let order = [4, 0, 6, 3][usize::try_from(seed / 5 % 4).unwrap()];
    let v3 = !seed.is_multiple_of(7) || extended || order != 4;
    Shape { bits, order, extended, v3, zstd: false, size: 48 << bits.max(11) }
}

fn options(seed: u64) -> OpenOptions {
    let pass_discard_other = !seed.is_multiple_of(3);
    if seed.is_multiple_of(2) {
        return OpenOptions { pass_discard_other, ..OpenOptions::default() };
    }
    OpenOptions {
        pass_discard_other,
        l2_cache_size: Some(1024),
        refcount_cache_size: Some(512),
        l2_cache_entry_size: Some(512),
        ..OpenOptions::default()
    }
}

/// The first whole cluster from `range` on that is the guest's own.
fn whole_cluster(view: &View, range: ByteRange, sectors: &std::ops::Range<u64>) -> Option<ByteRange> {
    let cluster = view.node().as_any().downcast_ref::<Qcow2>()?.header().cluster_size();
    let start = range.start().next_multiple_of(cluster);
    (start + cluster <= sectors.end * 512).then(|| ByteRange::between(start, start + cluster))
}

/// One guest writes, zeroes, discards and flushes sectors of its own, and notes what may be read of them.
async fn guest(
    view: &View,
    may: &Mutex<May>,
    seed: u64,
    sectors: std::ops::Range<u64>,
) -> underlay_graph::Result<()> {
    let cx = view.cx();
    let mut rng = Rng::new(seed);
    let span = sectors.end - sectors.start;
    for step in 0..30 {
        let first = sectors.start + rng.below(span);
        let count = (1 + rng.below(20)).min(sectors.end - first);
        let range = ByteRange::between(first * 512, (first + count) * 512);
        match rng.below(11) {
            10 => {
                // One whole cluster, compressed.
                let Some(range) = whole_cluster(view, range, &sectors) else { continue };
                let (first, count) = (range.start() / 512, range.len() / 512);
                let value = seed << 20 | step << 8 | 2;
                (first..first + count).for_each(|s| may.lock().unwrap().begin(s, value));
                let bytes = stamp(value).repeat(usize::try_from(count).unwrap());
                cx.write(range, Iov::copy_of(&bytes), WriteFlags { compressed: true }).await?;
            }
            0..=5 => {
                let value = seed << 20 | step << 8 | 1;
                (first..first + count).for_each(|s| may.lock().unwrap().begin(s, value));
                let bytes = stamp(value).repeat(usize::try_from(count).unwrap());
                cx.write(range, Iov::copy_of(&bytes), WriteFlags::default()).await?;
            }
            6 => {
                (first..first + count).for_each(|s| may.lock().unwrap().begin(s, 0));
                cx.write_zeroes(range, ZeroFlags { may_unmap: step % 2 == 0, no_fallback: false }).await?;
            }
            7 => {
                (first..first + count).for_each(|s| may.lock().unwrap().begin(s, 0));
                cx.discard(range).await?;
                // What a discard leaves is known by looking.
                let into = Iov::scratch(range.buffer_len());
                cx.read(range, into.clone()).await?;
                let bytes = into.to_vec();
                for s in 0..count {
                    let at = usize::try_from(s * 512).unwrap();
                    let value = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
                    may.lock().unwrap().begin(first + s, value);
                }
            }
            8 => cx.populate(range).await?,
            _ => {
                // What was written before the flush began is all that may be read after it (or what comes later).
                let before: Vec<(u64, u64, usize)> = {
                    let may = may.lock().unwrap();
                    may.sectors
                        .range(sectors.clone())
                        .filter_map(|(s, values)| Some((*s, *values.last()?, values.len())))
                        .collect()
                };
                cx.flush().await?;
                let mut may = may.lock().unwrap();
                for (sector, value, len) in before {
                    if let Some(values) = may.sectors.get_mut(&sector) {
                        let later = values.split_off(len);
                        *values = vec![value];
                        values.extend(later);
                    }
                }
            }
        }
    }
    Ok(())
}

fn assert_left(left: Vec<u8>, base: Arc<View>, may: &May, shape: &Shape, text: &str) {
    let (errors, _) = check(&left);
    assert!(errors.is_empty(), "{text} {shape:?}: {errors:?}");
    let again = open(Disk::new(left, 5), Some(base), OpenOptions::default(), true);
    let bytes = again.read(0, shape.size);
    for (sector, values) in &may.sectors {
        let at = usize::try_from(*sector * 512).unwrap();
        let value = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let whole = bytes[at..at + 512].chunks(8).all(|c| c == value.to_be_bytes());
        let allowed = values.iter().any(|v| *v == value || (*v == u64::MAX && value == original(*sector)));
        assert!(whole && allowed, "{text} {shape:?}: sector {sector} reads {value:#x}, may be {values:x?}");
    }
}

/// What the backing file has.
fn original(sector: u64) -> u64 {
    if sector % 16 < 8 { 0xbac0 + sector } else { 0 }
}

#[test]
fn a_power_cut_at_any_moment_leaves_a_sound_image_with_every_flushed_write() {
    for seed in 0..300u64 {
        let shape = shape(seed);
        let base: Vec<u8> = (0..shape.size / 512).flat_map(|sector| stamp(original(sector))).collect();
        let base = view_of(Disk::new(base, seed));
        let disk = Disk::new(shape.image(shape.bits > 9), seed);
        let setup = open(disk.clone(), Some(base.clone()), options(seed), true);
        let may = Mutex::new(May::default());
        let third = shape.size / 512 / 3;
        let mut work: Vec<Work<'_>> = (0..3)
            .map(|i| -> Work<'_> {
                Box::pin(guest(&setup.view, &may, seed * 3 + i + 1, i * third..(i + 1) * third))
            })
            .collect();
        let (disk, base, shape, may) = (&disk, &base, &shape, &may);
        work.push(Box::pin(async move {
            let mut rng = Rng::new(seed + 77);
            for cut in 0..8 {
                let mut polls = 1 + rng.below(80);
                std::future::poll_fn(move |_| {
                    polls -= 1;
                    if polls == 0 { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
                })
                .await;
                {
                    let left = disk.power_cut(seed * 100 + cut);
                    assert_left(
                        left,
                        base.clone(),
                        &may.lock().unwrap(),
                        shape,
                        &format!("seed {seed} cut {cut}"),
                    );
                }
            }
            Ok(())
        }));
        run(join(work)).unwrap();
        setup.close();
        let (errors, leaks) = check(&disk.content());
        assert!(errors.is_empty() && leaks == 0, "seed {seed} {shape:?}: {leaks} leaks, {errors:?}");
    }
}

/// The moment before a flush is the worst: everything since the last one may be there or not.
#[test]
fn growing_refcount_blocks_and_tables_is_safe_at_every_flush() {
    for (bits, order, size) in [(9, 6, 4 << 20), (9, 3, 2 << 20), (10, 6, 3 << 20), (9, 0, 5 << 20)] {
        let shape = Shape { bits, order, extended: false, v3: true, zstd: false, size };
        let disk = Disk::new(shape.image(false), u64::from(bits + order));
        let setup = open(disk.clone(), None, options(0), true);
        let mut rng = Rng::new(9);
        for round in 0..40u8 {
            disk.record_cuts();
            let chunk = size / 40;
            for at in [u64::from(round) * chunk, rng.below(size - chunk)] {
                setup.write(at, &vec![round; usize::try_from(chunk).unwrap()]).unwrap();
            }
            if round % 3 == 0 {
                let at = rng.below(size - 400_000) / 512 * 512;
                run(setup.view.cx().discard(ByteRange::between(at, at + 400_000))).unwrap();
            }
            run(setup.view.cx().flush()).unwrap();
            for cut in disk.take_cuts() {
                let (errors, _) = check(&cut);
                assert!(errors.is_empty(), "{shape:?} round {round}: {errors:?}");
            }
        }
        assert!(
            setup.image.header().refcount_table_clusters > 1 || (bits, order) != (9, 6),
            "{shape:?}: the table has grown"
        );
        setup.close();
        let (errors, leaks) = check(&disk.content());
        assert!(errors.is_empty() && leaks == 0, "{shape:?}: {leaks} leaks, {errors:?}");
    }
}

#[test]
fn a_disk_that_fails_loses_nothing_that_was_flushed_and_works_again_later() {
    for seed in 0..120u64 {
        let shape = shape(seed);
        let base: Vec<u8> = (0..shape.size / 512).flat_map(|sector| stamp(original(sector))).collect();
        let base = view_of(Disk::new(base, seed));
        let disk = Disk::new(shape.image(shape.bits > 9), seed);
        let setup = open(disk.clone(), Some(base.clone()), options(seed), true);
        let may = Mutex::new(May::default());
        let sectors = shape.size / 512;
        disk.fail_after(Some(seed * 3 % 100));
        let _ = run(guest(&setup.view, &may, seed + 1, 0..sectors));
        let left = disk.power_cut(seed);
        assert_left(left, base.clone(), &may.lock().unwrap(), &shape, &format!("seed {seed} while failing"));
        disk.fail_after(None);
        // The request that failed may have happened or not: now it is known.
        let now = setup.read(0, shape.size);
        for (sector, values) in &mut may.lock().unwrap().sectors {
            let at = usize::try_from(*sector * 512).unwrap();
            let value = u64::from_be_bytes(now[at..at + 8].try_into().unwrap());
            assert!(values.contains(&value) || (values.contains(&u64::MAX) && value == original(*sector)));
            *values = vec![value];
        }
        run(guest(&setup.view, &may, seed + 1000, 0..sectors)).unwrap();
        setup.close();
        assert_left(disk.content(), base, &may.lock().unwrap(), &shape, &format!("seed {seed} at the end"));
        let (errors, leaks) = check(&disk.content());
        assert!(errors.is_empty(), "seed {seed} {shape:?}: {leaks} leaks, {errors:?}");
    }
}

#[test]
fn a_flush_without_changes_of_metadata_is_one_flush() {
    let shape = Shape { bits: 16, order: 4, extended: false, v3: true, zstd: false, size: 1 << 20 };
    let disk = Disk::new(shape.image(false), 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    setup.write(0, &[1; 4096]).unwrap();
    run(setup.view.cx().flush()).unwrap();
    let before = disk.flushes();
    setup.write(4096, &[2; 4096]).unwrap();
    run(setup.view.cx().flush()).unwrap();
    assert_eq!(disk.flushes(), before + 1);
}

//! Bitmaps of an image that is not closed: they say all that was written, and not much more.

use std::sync::Arc;

use underlay_graph::bitmap::DirtyBitmap;
use underlay_graph::bitmaps::{BitmapStore, PlanBitmap};
use underlay_graph::{ByteRange, Node, Preallocation};

use super::{Disk, Rng, Setup, Shape, open, run};
use crate::features;
use crate::live::OpenOptions;

const MIB: u64 = 1 << 20;

fn shape(seed: u64) -> Shape {
    let bits = [12, 13, 16][usize::try_from(seed % 3).unwrap()];
    Shape { bits, order: 4, extended: false, v3: true, zstd: false, size: 16 * MIB + 512 }
}

fn opened(content: Vec<u8>, write: bool) -> Setup {
    open(Disk::new(content, 1), None, OpenOptions::default(), write)
}

fn new(name: &str, size: u64, granularity: u64, enabled: bool) -> PlanBitmap {
    PlanBitmap { persistent: true, ..PlanBitmap::new(name, DirtyBitmap::new(size, granularity), enabled) }
}

/// As the graph does it.
fn write(setup: &Setup, bitmaps: &[PlanBitmap], range: ByteRange) {
    for bitmap in bitmaps.iter().filter(|bitmap| bitmap.enabled) {
        bitmap.successor.as_ref().unwrap_or(&bitmap.bits).set(range);
    }
    if !setup.image.covers(range) {
        run(setup.image.cover(&setup.view.cx(), range)).unwrap();
    }
    setup.write(range.start(), &vec![7; range.buffer_len()]).unwrap();
}

/// Says at least what `bits` say, and no granule more than those of `more`.
fn is_between(found: &DirtyBitmap, bits: &DirtyBitmap, more: &DirtyBitmap) -> bool {
    let count = found.count();
    let with_bits = found.copy();
    with_bits.merge(bits);
    let most = bits.copy();
    most.merge(more);
    let with_most = most.copy();
    with_most.merge(found);
    with_bits.count() == count && with_most.count() == most.count()
}

/// Random work with a power cut at the end of each round, after which the work goes on.
#[test]
fn a_power_cut_loses_nothing_of_a_bitmap() {
    let mut extra = 0;
    for seed in 0..150 {
        let mut rng = Rng::new(seed);
        let shape = shape(seed);
        let mut content = shape.image(false);
        let mut known: Vec<PlanBitmap> = Vec::new();
        // Regions that were written to since the time before the last refresh.
        let noted = DirtyBitmap::new(shape.size, MIB);
        for round in 0..4 {
            let disk = Disk::new(content, seed);
            let setup = open(disk.clone(), None, OpenOptions::default(), true);
            let cx = setup.view.cx();
            let mut bitmaps = setup.image.loaded();
            assert_eq!(bitmaps.len(), known.len(), "seed {seed} round {round}");
            for bitmap in &bitmaps {
                let before = known.iter().find(|known| known.name == bitmap.name).unwrap();
                let nothing = DirtyBitmap::new(shape.size, MIB);
                let more = if bitmap.enabled { &noted } else { &nothing };
                assert!(
                    !bitmap.inconsistent && bitmap.enabled == before.enabled,
                    "seed {seed} round {round}"
                );
                assert!(is_between(&bitmap.bits, &before.to_keep(), more), "seed {seed} round {round}");
                extra += u64::from(bitmap.bits.count() > before.to_keep().count());
            }
            run(setup.image.begin(&cx)).unwrap();
            let mut since = DirtyBitmap::new(shape.size, MIB);
            for step in 0..rng.below(12) {
                match rng.below(8) {
                    0 => {
                        let name = format!("{round}.{step}");
                        bitmaps.push(new(&name, shape.size, 512 << rng.below(9), rng.below(4) > 0));
                        run(setup.image.refresh(&cx, &bitmaps)).unwrap();
                    }
                    1 if !bitmaps.is_empty() => {
                        let at = usize::try_from(rng.below(bitmaps.len() as u64)).unwrap();
                        let granularity = bitmaps[at].bits.granularity();
                        match rng.below(3) {
                            0 => run(setup.image.remove(&cx, &bitmaps.remove(at).name)).unwrap(),
                            1 => bitmaps[at].bits = Arc::new(DirtyBitmap::new(shape.size, granularity)),
                            _ => bitmaps[at].enabled ^= true,
                        }
                        run(setup.image.refresh(&cx, &bitmaps)).unwrap();
                    }
                    2 if !bitmaps.is_empty() => {
                        // Only what was written to since the last time is noted from now on.
                        run(setup.image.refresh(&cx, &bitmaps)).unwrap();
                        noted.clear(ByteRange::between(0, shape.size));
                        noted.merge(&since);
                        since = DirtyBitmap::new(shape.size, MIB);
                    }
                    _ => {
                        let start = rng.below(shape.size / 512) * 512;
                        let end = (start + 512 + rng.below(64) * 512).min(shape.size);
                        write(&setup, &bitmaps, ByteRange::between(start, end));
                        noted.set(ByteRange::between(start, end));
                        since.set(ByteRange::between(start, end));
                    }
                }
            }
            if rng.below(6) == 0 {
                run(setup.image.store(&cx, &bitmaps)).unwrap();
                setup.close();
                noted.clear(ByteRange::between(0, shape.size));
                assert_eq!(setup.image.header().autoclear & features::DIRTY_REGIONS, 0);
            }
            content = disk.power_cut(seed + round);
            known = bitmaps;
        }
    }
    assert!(extra > 50, "nothing was noted: {extra}");
}

/// A program that does not know about the notes has written to the image: they say nothing any more.
#[test]
fn a_foreign_writer_ends_the_notes() {
    let shape = shape(2);
    let disk = Disk::new(shape.image(false), 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    run(setup.image.begin(&setup.view.cx())).unwrap();
    let bitmaps = [new("a", shape.size, 65536, true)];
    run(setup.image.refresh(&setup.view.cx(), &bitmaps)).unwrap();
    write(&setup, &bitmaps, ByteRange::between(MIB, MIB + 512));
    run(setup.view.cx().flush()).unwrap();
    let crashed = disk.content();
    let found = opened(crashed.clone(), false).image.loaded();
    assert!(!found[0].inconsistent && found[0].bits.any(ByteRange::between(MIB, MIB + 512)));
    assert!(!found[0].bits.any(ByteRange::between(2 * MIB, shape.size)));
    // What QEMU does on opening: clears the auto-clear bits that it does not know.
    let mut foreign = crashed.clone();
    foreign[88] &= 0x3f;
    assert!(opened(foreign, false).image.loaded()[0].inconsistent);
    // We ourselves, without keeping the bitmaps.
    let setup = opened(crashed.clone(), true);
    setup.write(0, &[1; 512]).unwrap();
    assert_eq!(setup.image.header().autoclear, 0);
    // A place that was overwritten.
    let mut damaged = crashed;
    damaged[49152 + 13] ^= 1;
    assert!(opened(damaged, false).image.loaded()[0].inconsistent);
}

/// One that was not good before stays so, beside others that are.
#[test]
fn what_was_inconsistent_stays_so() {
    let shape = shape(2);
    let disk = Disk::new(shape.image(false), 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    run(setup.image.begin(&setup.view.cx())).unwrap();
    run(setup.image.refresh(&setup.view.cx(), &[new("old", shape.size, 65536, true)])).unwrap();
    let mut content = disk.content();
    content[88] &= 0x3f;
    let disk = Disk::new(content, 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    let mut bitmaps = setup.image.loaded();
    assert!(bitmaps[0].inconsistent);
    run(setup.image.begin(&setup.view.cx())).unwrap();
    bitmaps.push(new("new", shape.size, 65536, true));
    run(setup.image.refresh(&setup.view.cx(), &bitmaps)).unwrap();
    write(&setup, &bitmaps[1..], ByteRange::between(0, 512));
    let found = opened(disk.content(), false).image.loaded();
    let of = |name: &str| found.iter().find(|bitmap| &*bitmap.name == name).unwrap();
    assert!(of("old").inconsistent && !of("new").inconsistent);
    assert!(of("new").bits.any(ByteRange::between(0, 512)));
}

/// The disk gets another size while bitmaps are in use.
#[test]
fn a_resize_and_a_crash() {
    let shape = shape(2);
    for size in [5 * MIB, 40 * MIB] {
        let disk = Disk::new(shape.image(false), 1);
        let setup = open(disk.clone(), None, OpenOptions::default(), true);
        let cx = setup.view.cx();
        run(setup.image.begin(&cx)).unwrap();
        let bitmaps = [new("a", shape.size, 512, true)];
        run(setup.image.refresh(&cx, &bitmaps)).unwrap();
        write(&setup, &bitmaps, ByteRange::between(4 * MIB, 4 * MIB + 512));
        run(setup.image.resize(&cx, size, Preallocation::Off)).unwrap();
        bitmaps[0].bits.resize(size);
        write(&setup, &bitmaps, ByteRange::between(size - 512, size));
        for refreshed in [false, true] {
            if refreshed {
                run(setup.image.refresh(&cx, &bitmaps)).unwrap();
            }
            let found = opened(disk.content(), false).image.loaded();
            assert!(!found[0].inconsistent && found[0].bits.size() == size);
            assert!(is_between(&found[0].bits, &bitmaps[0].bits, &{
                let regions = DirtyBitmap::new(size, MIB);
                regions.merge(&bitmaps[0].bits);
                regions
            }));
        }
    }
}

/// Written to after the bitmaps were stored, without notes: what is in the image does not count as good again before it
/// is.
#[test]
fn notes_that_begin_late() {
    let shape = shape(2);
    let disk = Disk::new(shape.image(false), 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    let cx = setup.view.cx();
    run(setup.image.begin(&cx)).unwrap();
    let bitmaps = [new("a", shape.size, 65536, true)];
    run(setup.image.refresh(&cx, &bitmaps)).unwrap();
    run(setup.image.store(&cx, &bitmaps)).unwrap();
    let late = ByteRange::between(5 * MIB, 5 * MIB + 512);
    write(&setup, &bitmaps, late);
    run(cx.flush()).unwrap();
    let tells = |content: Vec<u8>| {
        let found = opened(content, false).image.loaded();
        assert!(found[0].inconsistent || found[0].bits.any(late));
        !found[0].inconsistent
    };
    // As after a change of the graph that failed.
    disk.record_cuts();
    run(setup.image.begin(&cx)).unwrap();
    disk.take_cuts().into_iter().for_each(|cut| {
        tells(cut);
    });
    assert!(!tells(disk.content()));
    disk.record_cuts();
    run(setup.image.refresh(&cx, &bitmaps)).unwrap();
    disk.take_cuts().into_iter().for_each(|cut| {
        tells(cut);
    });
    assert!(tells(disk.content()));
}

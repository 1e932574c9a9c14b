//! Bitmaps that an image keeps: what is stored is loaded, whatever the power cut.

use std::collections::BTreeMap;
use std::sync::Arc;

use underlay_graph::bitmap::DirtyBitmap;
use underlay_graph::bitmaps::{BitmapStore, PlanBitmap};
use underlay_graph::{ByteRange, Cx, Node, Preallocation};

use super::{Disk, Rng, Setup, Shape, open, run, view_of};
use crate::check::{Finding, Fix, Outcome, check};
use crate::live::{OpenOptions, Qcow2};

fn shape(seed: u64) -> Shape {
    let bits = [9, 10, 12, 14, 16][usize::try_from(seed % 5).unwrap()];
    Shape { bits, order: 4, extended: false, v3: true, zstd: false, size: (8 << 20) + 512 * (seed % 3) }
}

/// All that is dirty.
fn ranges(bits: &DirtyBitmap) -> Vec<ByteRange> {
    let (mut all, mut from) = (Vec::new(), 0);
    while let Some(run) = bits.peek(from, u64::MAX) {
        from = run.end().next_multiple_of(bits.granularity());
        all.push(run);
    }
    all
}

/// What a bitmap says: granularity, whether it is enabled and known, its bits.
type Said = (u64, bool, bool, Vec<ByteRange>);

fn said(bitmaps: &[PlanBitmap]) -> BTreeMap<String, Said> {
    let one = |bitmap: &PlanBitmap| {
        let said = (bitmap.bits.granularity(), bitmap.enabled, bitmap.inconsistent, ranges(&bitmap.bits));
        (bitmap.name.to_string(), said)
    };
    bitmaps.iter().map(one).collect()
}

fn random_bits(rng: &mut Rng, size: u64, granularity: u64) -> DirtyBitmap {
    let bits = DirtyBitmap::new(size, granularity);
    match rng.below(4) {
        0 => {}
        1 => bits.set(ByteRange::between(0, size)),
        _ => {
            for _ in 0..rng.below(20) {
                let start = rng.below(size);
                bits.set(ByteRange::between(start, (start + 1 + rng.below(100_000)).min(size)));
            }
        }
    }
    bits
}

/// Some of those that there are, as they are or changed, and new ones.
fn random_bitmaps(rng: &mut Rng, size: u64, mut all: Vec<PlanBitmap>) -> Vec<PlanBitmap> {
    all.retain(|_| rng.below(4) > 0);
    for bitmap in &mut all {
        match rng.below(3) {
            0 => bitmap.bits.set(ByteRange::between(rng.below(size), size)),
            1 => bitmap.enabled = !bitmap.enabled,
            _ => {}
        }
    }
    for name in ["a", "b", "the third", "d"] {
        let is_new = all.iter().all(|bitmap| *bitmap.name != *name);
        if is_new && rng.below(4) > 0 {
            let granularity = 512 << rng.below(10);
            let bits = random_bits(rng, size, granularity);
            let bitmap = PlanBitmap::new(name, bits, rng.below(2) == 0);
            all.push(PlanBitmap { persistent: true, ..bitmap });
        }
    }
    all
}

fn checked(cx: &Cx<'_>) -> Outcome {
    let mut lines = Vec::new();
    let mut note = |finding: Finding| lines.push(finding);
    let outcome = run(check(cx, Fix::None, &mut note)).expect("it can be checked");
    assert_eq!((outcome.corruptions, outcome.check_errors), (0, 0), "{lines:?}");
    outcome
}

fn opened(content: Vec<u8>) -> Setup {
    open(Disk::new(content, 1), None, OpenOptions::default(), false)
}

/// What an image of this content has, which must be sound. Also how many clusters leak.
fn loaded(content: Vec<u8>) -> (BTreeMap<String, Said>, u64) {
    let disk = Disk::new(content.clone(), 1);
    let outcome = checked(&view_of(disk).cx());
    (said(&opened(content).image.loaded()), outcome.leaks)
}

fn begin(image: &Qcow2, setup: &Setup) {
    run(image.begin(&setup.view.cx())).unwrap();
}

#[test]
fn what_is_stored_is_loaded() {
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        let shape = shape(seed);
        let disk = Disk::new(shape.image(false), seed).forget_cuts();
        for round in 0..4 {
            let setup = open(disk.clone(), None, OpenOptions::default(), true);
            let before = setup.image.loaded();
            begin(&setup.image, &setup);
            setup.write(rng.below(100) * 4096, &[7; 5000]).unwrap();
            let bitmaps = random_bitmaps(&mut rng, shape.size, before);
            run(setup.image.store(&setup.view.cx(), &bitmaps)).unwrap();
            setup.close();
            let (found, leaks) = loaded(disk.content());
            assert_eq!((found, leaks), (said(&bitmaps), 0), "seed {seed} round {round}");
        }
    }
}

#[test]
fn a_bitmap_that_a_job_holds_keeps_what_was_written_since() {
    let shape = shape(4);
    let disk = Disk::new(shape.image(false), 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    begin(&setup.image, &setup);
    let (bits, since) = (DirtyBitmap::new(shape.size, 4096), DirtyBitmap::new(shape.size, 4096));
    bits.set(ByteRange::between(0, 4096));
    since.set(ByteRange::between(8192, 12288));
    let held = PlanBitmap { persistent: true, ..PlanBitmap::new("held", bits, true) };
    let held = PlanBitmap { busy: true, successor: Some(Arc::new(since)), ..held };
    run(setup.image.store(&setup.view.cx(), &[held])).unwrap();
    setup.close();
    let expected = vec![ByteRange::between(0, 4096), ByteRange::between(8192, 12288)];
    assert_eq!(loaded(disk.content()).0["held"], (4096, true, false, expected));
}

#[test]
fn an_image_that_was_not_closed_says_that_its_bitmaps_are_not_known() {
    let shape = shape(4);
    let disk = Disk::new(shape.image(false), 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    begin(&setup.image, &setup);
    let bitmap = |name| PlanBitmap {
        persistent: true,
        ..PlanBitmap::new(name, random_bits(&mut Rng::new(5), shape.size, 512), true)
    };
    let stored = [bitmap("a"), bitmap("b")];
    setup.write(0, &[1; 512]).unwrap();
    run(setup.image.store(&setup.view.cx(), &stored)).unwrap();
    assert_eq!(loaded(disk.content()).0, said(&stored));
    // A write after all: nothing that is on disk then may be relied on.
    setup.write(0, &[1; 512]).unwrap();
    let unknown = |name: &str| (name.to_owned(), (512, false, true, Vec::new()));
    let (found, leaked) = loaded(disk.content());
    assert_eq!(found, BTreeMap::from(["a", "b"].map(unknown)));
    // Nobody learns more by opening and closing it; one can be removed.
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    let mut bitmaps = setup.image.loaded();
    begin(&setup.image, &setup);
    assert!(run(setup.image.resize(&setup.view.cx(), 1 << 20, Preallocation::Off)).is_err());
    run(setup.image.remove(&setup.view.cx(), "a")).unwrap();
    run(setup.image.remove(&setup.view.cx(), "a")).unwrap();
    // Also not if somebody believes that it is still there.
    bitmaps.push(PlanBitmap { inconsistent: true, ..bitmap("a") });
    run(setup.image.store(&setup.view.cx(), &bitmaps)).unwrap();
    setup.close();
    let (found, leaks) = loaded(disk.content());
    assert_eq!((found, leaks), (BTreeMap::from([unknown("b")]), leaked));
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    begin(&setup.image, &setup);
    run(setup.image.remove(&setup.view.cx(), "b")).unwrap();
    setup.close();
    let header = setup.image.header();
    assert_eq!((header.autoclear, header.extensions.bitmaps), (0, None));
    assert_eq!(loaded(disk.content()), (BTreeMap::new(), leaked));
}

/// Its bitmaps cannot be stored, and are not known from then on. What is stored later is none of their old tables.
#[test]
fn a_disk_that_loses_its_length_can_be_opened() {
    let shape = shape(4);
    let disk = Disk::new(shape.image(false), 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    begin(&setup.image, &setup);
    let bitmap =
        PlanBitmap { persistent: true, ..PlanBitmap::new("a", DirtyBitmap::new(shape.size, 4096), true) };
    run(setup.image.store(&setup.view.cx(), std::slice::from_ref(&bitmap))).unwrap();
    begin(&setup.image, &setup);
    run(setup.image.resize(&setup.view.cx(), 0, Preallocation::Off)).unwrap();
    bitmap.bits.resize(0);
    run(setup.image.store(&setup.view.cx(), &[bitmap])).unwrap_err();
    setup.close();
    for _ in 0..2 {
        let setup = open(disk.clone(), None, OpenOptions::default(), true);
        let known = setup.image.loaded();
        assert!(known[0].inconsistent);
        begin(&setup.image, &setup);
        run(setup.image.store(&setup.view.cx(), &known)).unwrap();
        setup.close();
    }
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    begin(&setup.image, &setup);
    run(setup.image.remove(&setup.view.cx(), "a")).unwrap();
    setup.close();
    assert_eq!(loaded(disk.content()).0, BTreeMap::new());
}

/// An image with two bitmaps, and where its directory is and the table of the first.
fn with_bitmaps() -> (Vec<u8>, usize, usize) {
    let shape = Shape { bits: 16, order: 4, extended: false, v3: true, zstd: false, size: 64 << 20 };
    let disk = Disk::new(shape.image(false), 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    begin(&setup.image, &setup);
    let bitmap = |name| {
        let bits = DirtyBitmap::new(shape.size, 512);
        bits.set(ByteRange::between(0, 512));
        PlanBitmap { persistent: true, ..PlanBitmap::new(name, bits, true) }
    };
    run(setup.image.store(&setup.view.cx(), &[bitmap("b"), bitmap("a")])).unwrap();
    setup.close();
    let bytes = disk.content();
    let directory = setup.image.header().extensions.bitmaps.unwrap().directory.offset;
    let directory = usize::try_from(directory).unwrap();
    let table = u64::from_be_bytes(bytes[directory..directory + 8].try_into().unwrap());
    (bytes, directory, usize::try_from(table).unwrap())
}

/// What is wrong with an image that was changed so, as QEMU says it.
fn refused(at: usize, value: &[u8]) -> Option<String> {
    let mut bytes = with_bitmaps().0;
    bytes[at..at + value.len()].copy_from_slice(value);
    let file = view_of(Disk::new(bytes, 1));
    run(Qcow2::open(&file.cx(), OpenOptions::default())).err().map(|error| error.to_string())
}

#[test]
fn what_is_wrong_with_bitmaps_is_told_as_qemu_tells_it() {
    let (_, directory, table) = with_bitmaps();
    let broken = "Could not read bitmap_table table from image for bitmap 'a': Invalid argument";
    let constraints = "Bitmap 'a' doesn't satisfy the constraints";
    for (at, value, text) in [
        (table, &2u64.to_be_bytes()[..], Some(broken)),
        (table, &0x70001u64.to_be_bytes(), Some(broken)),
        (table, &(1u64 << 60).to_be_bytes(), Some(broken)),
        (table, &0x30200u64.to_be_bytes(), Some(broken)),
        (table, &1u64.to_be_bytes(), None),
        (table, &(1u64 << 55).to_be_bytes(), None),
        (directory + 8, &2u32.to_be_bytes(), Some("Could not read bitmap 'a' from image: Invalid argument")),
        (directory + 8, &0u32.to_be_bytes(), Some(constraints)),
        (directory + 12, &5u32.to_be_bytes(), Some(constraints)),
        (directory + 16, &[2], Some(constraints)),
        (directory + 17, &[8], Some(constraints)),
        (directory + 17, &[32], Some(constraints)),
        (directory + 18, &[0, 0], Some("Bitmap '' doesn't satisfy the constraints")),
        (directory + 20, &[0, 0, 0, 8], Some("Bitmap extra data is not supported")),
        (directory + 20, &[0, 16, 0, 0], Some("Broken bitmap directory")),
        (directory + 24, b"b", Some("Bitmap already exists: b")),
        (directory, &[0, 0, 0, 0, 0, 0, 1, 0], Some(constraints)),
        // Where no file reaches, everything is zero.
        (directory, &(1u64 << 40).to_be_bytes(), None),
    ] {
        assert_eq!(refused(at, value).as_deref(), text, "{value:?} at {at:#x}");
    }
}

/// Tables and data made to lie on each other and on everything else: nothing there is damaged when the bitmaps are
/// stored, removed and stored again, and no cluster is given free that others need.
#[test]
fn bitmaps_that_lie_elsewhere_do_no_harm_there() {
    let (sound, directory, table) = with_bitmaps();
    let places = [1u64, 2, 3, 4, 5, 6, 7, 8, 1 << 20].map(|cluster| cluster << 16);
    for at in [directory, directory + 32, table, 528] {
        for place in places {
            let mut bytes = sound.clone();
            bytes[at..at + 8].copy_from_slice(&place.to_be_bytes());
            let disk = Disk::new(bytes.clone(), 1);
            let file = view_of(disk.clone());
            if run(Qcow2::open(&file.cx(), OpenOptions::default())).is_err() {
                continue;
            }
            let setup = open(disk.clone(), None, OpenOptions::default(), true);
            let (cx, bitmaps) = (setup.view.cx(), setup.image.loaded());
            if run(setup.image.begin(&cx)).is_ok() {
                let _ = setup.write(0, &[7; 512]);
                bitmaps.iter().for_each(|bitmap| bitmap.bits.set(ByteRange::between(0, 1 << 20)));
                let _ = run(setup.image.store(&cx, &bitmaps));
                let _ = run(setup.image.remove(&cx, "a"));
                let _ = setup.write(1 << 20, &[8; 512]);
                let _ = run(setup.image.store(&cx, &bitmaps[1..]));
                let _ = run(setup.image.close(&cx));
            }
            let after = disk.content();
            let header = crate::header::Header::parse(&after).unwrap();
            assert_eq!((header.l1_offset, header.refcount_table_offset), (3 << 16, 1 << 16));
            // Header, tables and blocks are counted still.
            assert!((0..4).all(|cluster| after[(2 << 16) + 2 * cluster + 1] > 0), "{at:#x} {place:#x}");
            assert_eq!(after[1 << 16..(1 << 16) + 8], sound[1 << 16..(1 << 16) + 8], "{at:#x} {place:#x}");
        }
    }
}

#[test]
fn a_disk_does_not_get_so_long_that_a_bitmap_could_not_be_kept() {
    let shape = Shape { bits: 16, order: 4, extended: false, v3: true, zstd: false, size: 1 << 20 };
    let disk = Disk::new(shape.image(false), 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    let bitmap = PlanBitmap::new("fine", DirtyBitmap::new(shape.size, 512), true);
    let bitmap = PlanBitmap { persistent: true, ..bitmap };
    begin(&setup.image, &setup);
    run(setup.image.store(&setup.view.cx(), std::slice::from_ref(&bitmap))).unwrap();
    begin(&setup.image, &setup);
    let resize = |size| run(setup.image.resize(&setup.view.cx(), size, Preallocation::Off));
    assert!(resize((1 << 41) + 512).is_err());
    resize(1 << 41).unwrap();
    let longer = PlanBitmap { bits: Arc::new(DirtyBitmap::new(1 << 41, 512)), ..bitmap };
    longer.bits.set(ByteRange::between((1 << 41) - 1, 1 << 41));
    run(setup.image.store(&setup.view.cx(), std::slice::from_ref(&longer))).unwrap();
    setup.close();
    assert_eq!(loaded(disk.content()), (said(&[longer]), 0));
}

/// Cuts the power at every flush, while bitmaps are stored, marked and removed and a guest writes.
#[test]
fn a_power_cut_leaves_bitmaps_as_they_were_or_as_they_are_or_unknown() {
    let mut seen = [0; 3];
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        let shape = shape(seed);
        let disk = Disk::new(shape.image(seed % 2 == 0), seed);
        let mut before = Vec::new();
        for round in 0..4 {
            let setup = open(disk.clone(), None, OpenOptions::default(), true);
            let mut loaded_now = setup.image.loaded();
            disk.record_cuts();
            begin(&setup.image, &setup);
            let untouched = disk.take_cuts();
            disk.record_cuts();
            setup.write(rng.below(100) * 4096, &[7; 5000]).unwrap();
            if rng.below(2) == 0 {
                run(setup.image.remove(&setup.view.cx(), "b")).unwrap();
                loaded_now.retain(|bitmap| *bitmap.name != *"b");
            }
            run(setup.view.cx().flush()).unwrap();
            let written = disk.take_cuts();
            disk.record_cuts();
            let bitmaps = random_bitmaps(&mut rng, shape.size, loaded_now);
            run(setup.image.store(&setup.view.cx(), &bitmaps)).unwrap();
            setup.close();
            let storing = disk.take_cuts();
            let context = format!("seed {seed} round {round}");
            let (old, new) = (said(&before), said(&bitmaps));
            for cut in untouched {
                judge(&loaded(cut).0, &[&old], &mut seen, &context);
            }
            for cut in written {
                judge(&loaded(cut).0, &[&old], &mut seen, &context);
            }
            for cut in storing {
                judge(&loaded(cut).0, &[&old, &new], &mut seen, &context);
            }
            before = bitmaps;
        }
    }
    // Not for nothing.
    assert!(seen.iter().all(|count| *count > 100), "{seen:?}");
}

/// Every bitmap says what it says in one of `known`, or that it is not known what it says.
fn judge(found: &BTreeMap<String, Said>, known: &[&BTreeMap<String, Said>], seen: &mut [u32; 3], at: &str) {
    seen[0] += u32::from(found.is_empty());
    for (name, said) in found {
        if said.2 {
            seen[1] += 1;
            continue;
        }
        seen[2] += 1;
        assert!(known.iter().any(|known| known.get(name) == Some(said)), "{at}: {name} {said:?} {known:?}");
    }
}

/// A disk that fails at any write while bitmaps are stored: the image is sound, and says the old or that it does not
/// know.
#[test]
fn a_disk_that_fails_keeps_the_image_sound() {
    let mut failed = 0;
    for seed in 0..200 {
        let mut rng = Rng::new(seed);
        let shape = shape(seed);
        let disk = Disk::new(shape.image(false), seed);
        let setup = open(disk.clone(), None, OpenOptions::default(), true);
        begin(&setup.image, &setup);
        let first = random_bitmaps(&mut rng, shape.size, Vec::new());
        run(setup.image.store(&setup.view.cx(), &first)).unwrap();
        begin(&setup.image, &setup);
        setup.write(0, &[7; 5000]).unwrap();
        let before = said(&first);
        let second = random_bitmaps(&mut rng, shape.size, first);
        disk.fail_after(Some(rng.below(12)));
        let outcome = run(setup.image.store(&setup.view.cx(), &second));
        let cut = disk.power_cut(seed);
        disk.fail_after(None);
        failed += u32::from(outcome.is_err());
        let expected = said(&second);
        judge(&loaded(cut).0, &[&before, &expected], &mut [0; 3], &format!("seed {seed}"));
        if outcome.is_err() && !setup.image.is_unusable() {
            // Once more, now that there is room.
            run(setup.image.store(&setup.view.cx(), &second)).unwrap();
            setup.close();
            assert_eq!(loaded(disk.content()).0, expected, "seed {seed}");
        }
    }
    assert!(failed > 50, "{failed}");
}

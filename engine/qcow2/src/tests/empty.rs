//! Emptying an image: a power cut or a failing disk leaves it as it was, or empty.

use std::sync::Arc;

use underlay_graph::{ByteRange, View};

use super::{Disk, Rng, Setup, Shape, check::check, open, run, view_of};
use crate::live::OpenOptions;

const SHAPES: [(u32, u32, bool, bool); 8] = [
    (9, 4, false, true),
    (9, 6, false, true),
    (12, 0, false, true),
    (12, 4, false, false),
    (14, 4, true, true),
    (16, 4, false, true),
    (16, 6, true, true),
    (16, 3, false, true),
];

fn shape(seed: u64) -> Shape {
    let (bits, order, extended, v3) = SHAPES[usize::try_from(seed % 8).unwrap()];
    Shape { bits, order, extended, v3, zstd: false, size: 48 << bits.max(11) }
}

/// An image that random writes have left, and what its guest sees: by now its base has that too.
fn committed(seed: u64, disk: &Arc<Disk>, shape: Shape) -> (Setup, Vec<u8>, Arc<View>) {
    let mut rng = Rng::new(seed);
    let old = vec![0x11; usize::try_from(shape.size).unwrap()];
    let setup = open(disk.clone(), Some(view_of(Disk::new(old, seed))), OpenOptions::default(), true);
    for byte in 0..30 {
        let at = rng.below(shape.size - 512) / 512 * 512;
        let len = ((1 + rng.below(64)) * 512).min(shape.size - at);
        setup.write(at, &vec![byte; usize::try_from(len).unwrap()]).unwrap();
        if byte % 5 == 0 {
            let at = rng.below(shape.size - 512) / 512 * 512;
            run(setup.view.cx().discard(ByteRange::between(at, shape.size.min(at + 100_000)))).unwrap();
        }
    }
    run(setup.view.cx().flush()).unwrap();
    let content = setup.read(0, shape.size);
    let base = view_of(Disk::new(content.clone(), seed));
    (setup, content, base)
}

fn assert_shows(left: Vec<u8>, content: &[u8], base: &Arc<View>, text: &str) {
    let (errors, _) = check(&left);
    assert!(errors.is_empty(), "{text}: {errors:?}");
    let again = open(Disk::new(left, 1), Some(base.clone()), OpenOptions::default(), true);
    assert!(again.read(0, content.len() as u64) == content, "{text}: another content");
}

#[test]
fn a_power_cut_leaves_the_image_as_it_was_or_empty() {
    for seed in 0..40 {
        let shape = shape(seed);
        let disk = Disk::new(shape.image(shape.bits > 9), seed);
        let (setup, content, base) = committed(seed, &disk, shape);
        let before = disk.content().len();
        disk.record_cuts();
        run(setup.image.empty(&setup.view.cx())).unwrap();
        let cuts = disk.take_cuts();
        assert!(!cuts.is_empty(), "{shape:?}");
        for (number, cut) in cuts.into_iter().enumerate() {
            assert_shows(cut, &content, &base, &format!("seed {seed} {shape:?} cut {number}"));
        }
        // Nothing is left in it, and it still works.
        let again = open(disk.clone(), Some(base.clone()), OpenOptions::default(), false);
        assert!(again.read(0, shape.size) == content, "seed {seed} {shape:?}");
        let l1 = again.image.header().l1_bytes().div_ceil(1 << shape.bits);
        let fits = shape.v3 && 3 + l1 <= again.image.header().refcounts_per_block();
        assert_eq!(disk.content().len() as u64 == (3 + l1) << shape.bits, fits, "{shape:?} {before}");
        setup.write(0, &[0x77; 5120]).unwrap();
        setup.close();
        let (errors, leaks) = check(&disk.content());
        assert!(errors.is_empty() && leaks == 0, "seed {seed} {shape:?}: {leaks} leaks, {errors:?}");
        assert_eq!(setup.read(0, 1024), vec![0x77; 1024]);
    }
}

#[test]
fn a_disk_that_fails_or_is_full_leaves_it_too() {
    for seed in 0..160 {
        let shape = shape(seed);
        let disk = Disk::new(shape.image(shape.bits > 9), seed);
        let (setup, content, base) = committed(seed, &disk, shape);
        disk.fail_after(Some(seed / 8));
        let done = run(setup.image.empty(&setup.view.cx()));
        disk.fail_after(None);
        let text = format!("seed {seed} {shape:?} {done:?}");
        assert_shows(disk.power_cut(seed), &content, &base, &text);
        // Only what is on its way to the disk may have changed in memory: closing it must not make it worse.
        let _ = run(underlay_graph::Node::close(&*setup.image, &setup.view.cx()));
        assert_shows(disk.content(), &content, &base, &text);
    }
}

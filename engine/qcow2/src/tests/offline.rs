//! Creating, repairing and resizing: power cuts at any moment, and other users at the same time.

use std::sync::Arc;

use underlay_graph::format::join;
use underlay_graph::{BackingRef, Node, Preallocation};

use super::{Disk, Rng, Shape, Work, check, open, run, view_of};
use crate::check::{Finding, Fix, Outcome};
use crate::create::CreateOptions;
use crate::header::Header;
use crate::live::OpenOptions;

pub fn shapes() -> [Shape; 4] {
    let shape = |bits, order, extended, v3| Shape { bits, order, extended, v3, zstd: false, size: 1 << 20 };
    [shape(9, 4, false, true), shape(12, 6, false, true), shape(14, 4, true, true), shape(9, 4, false, false)]
}

pub fn check_ours(disk: &Arc<Disk>, fix: Fix) -> (Outcome, Vec<String>) {
    let mut lines = Vec::new();
    let view = view_of(disk.clone());
    let mut report = |finding| {
        let (Finding::Line(line) | Finding::Error(line)) = finding;
        lines.push(line);
    };
    let outcome = run(crate::check::check(&view.cx(), fix, &mut report)).unwrap();
    (outcome, lines)
}

/// An image in which every second 4 KiB have been written.
fn filled(shape: &Shape) -> Vec<u8> {
    let disk = Disk::new(shape.image(false), 1).forget_cuts();
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    for i in 0..shape.size / 8192 {
        setup.write(i * 8192, &[u8::try_from(i % 250).unwrap() + 1; 4096]).unwrap();
    }
    setup.close();
    disk.content()
}

pub fn content(image: Vec<u8>) -> Vec<u8> {
    let setup = open(Disk::new(image, 2).forget_cuts(), None, OpenOptions::default(), false);
    setup.read(0, setup.image.size())
}

#[test]
fn a_cut_while_creating_leaves_no_image_or_a_whole_one() {
    for (seed, preallocation) in
        [Preallocation::Off, Preallocation::Metadata, Preallocation::Full].into_iter().enumerate()
    {
        let garbage: Vec<u8> = shapes()[0].image(false).into_iter().cycle().take(3 << 20).collect();
        let disk = Disk::new(garbage, seed as u64);
        let backing = Some(BackingRef { file: "b".repeat(700), format: None });
        let options = CreateOptions {
            cluster_size: 16384,
            extended_l2: true,
            backing,
            preallocation,
            ..CreateOptions::new(1 << 20)
        };
        disk.record_cuts();
        run(crate::create::create(&view_of(disk.clone()).cx(), &options)).unwrap();
        let whole = disk.content();
        let mut images = 0;
        for cut in disk.take_cuts() {
            let Ok(header) = Header::parse(&cut) else { continue };
            if header.backing_file.is_none() {
                // What was there before.
                continue;
            }
            images += 1;
            assert!(header == Header::parse(&whole).unwrap());
            assert_eq!(check::check(&cut), (Vec::new(), 0));
        }
        assert!(images > 0);
        assert_eq!(check_ours(&disk, Fix::None).0.corruptions, 0);
    }
}

/// Damages refcounts and flags, not what the guest reads.
fn damage(image: &mut [u8], rng: &mut Rng) {
    let header = Header::parse(image).unwrap();
    let quad = |image: &[u8], at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let index = |at: u64| usize::try_from(at).unwrap();
    let table = index(header.refcount_table_offset);
    for _ in 0..1 + rng.below(6) {
        match rng.below(4) {
            0 => {
                let l1 = index(header.l1_offset);
                image[l1] ^= 0x80 * u8::from(quad(image, l1) != 0);
            }
            1 if rng.below(4) == 0 => image[table..table + 8].fill(0),
            _ => {
                let block = index(quad(image, table));
                if block != 0 {
                    let at = block + index(rng.below(header.cluster_size().min(512)));
                    image[at] = u8::try_from(rng.below(3)).unwrap();
                }
            }
        }
    }
}

#[test]
fn a_cut_while_repairing_makes_nothing_worse() {
    for (number, shape) in shapes().iter().enumerate() {
        let sound = filled(shape);
        let before = content(sound.clone());
        for seed in 0..30 {
            let mut rng = Rng::new(seed * 10 + number as u64);
            let mut image = sound.clone();
            damage(&mut image, &mut rng);
            let disk = Disk::new(image, seed);
            disk.record_cuts();
            check_ours(&disk, Fix::All);
            let (left, lines) = check_ours(&disk, Fix::None);
            assert_eq!((left.corruptions, left.leaks), (0, 0), "{shape:?} {seed} {lines:?}");
            assert!(content(disk.content()) == before, "{shape:?} {seed}");
            for cut in disk.take_cuts() {
                assert!(content(cut.clone()) == before, "{shape:?} {seed}");
                let disk = Disk::new(cut, seed).forget_cuts();
                check_ours(&disk, Fix::All);
                let (left, lines) = check_ours(&disk, Fix::None);
                assert_eq!((left.corruptions, left.leaks), (0, 0), "{shape:?} {seed} {lines:?}");
            }
        }
    }
}

#[test]
fn a_cut_while_resizing_leaves_one_size_or_the_other() {
    for (number, shape) in shapes().iter().enumerate() {
        let sound = filled(shape);
        let before = content(sound.clone());
        for (seed, size) in [0, 512, 300 << 10, (1 << 20) + 512, 5 << 20, 40 << 20].into_iter().enumerate() {
            let disk = Disk::new(sound.clone(), (seed * 10 + number) as u64);
            let setup = open(disk.clone(), None, OpenOptions::default(), true);
            disk.record_cuts();
            run(setup.image.resize(&setup.view.cx(), size, Preallocation::Off)).unwrap();
            setup.close();
            let mut cuts = disk.take_cuts();
            cuts.push(disk.content());
            for cut in cuts {
                let (errors, _) = check::check(&cut);
                assert!(errors.is_empty(), "{shape:?} to {size}: {errors:?}");
                let left = content(cut.clone());
                assert!([before.len() as u64, size].contains(&(left.len() as u64)));
                let kept = left.len().min(before.len());
                // A shrink throws away what it said it would; nothing else.
                let sure = kept.min(usize::try_from(size).unwrap());
                assert!(left[..sure] == before[..sure], "{shape:?} to {size}");
                assert!(left[kept..].iter().all(|b| *b == 0), "{shape:?} to {size}");
                // Nothing that was cut off comes back.
                let again = open(Disk::new(cut, 3).forget_cuts(), None, OpenOptions::default(), true);
                run(again.image.resize(&again.view.cx(), 3 << 20, Preallocation::Off)).unwrap();
                let bytes = again.read(0, 3 << 20);
                assert!(bytes[left.len().min(bytes.len())..].iter().all(|b| *b == 0), "{shape:?} to {size}");
            }
        }
    }
}

#[test]
fn a_guest_writes_while_the_disk_grows() {
    for seed in 0..40 {
        let shape = shapes()[usize::try_from(seed % 4).unwrap()];
        let disk = Disk::new(shape.image(false), seed);
        let setup = open(disk.clone(), None, OpenOptions::default(), true);
        let cx = setup.view.cx();
        disk.record_cuts();
        let guest = |region: u64| {
            let cx = &cx;
            async move {
                for i in 0..16u8 {
                    let at = region * (256 << 10) + u64::from(i) * 9000;
                    let range = underlay_graph::ByteRange::between(at, at + 5000);
                    let bytes = underlay_sys::Iov::filled(5000, i + 1);
                    cx.write(range, bytes, underlay_graph::WriteFlags::default()).await?;
                    if i % 5 == 4 {
                        cx.flush().await?;
                    }
                }
                Ok(())
            }
        };
        let mut work: Vec<Work<'_>> = (0..4).map(|region| Box::pin(guest(region)) as Work<'_>).collect();
        let grow = async {
            for size in [2, 9, 33] {
                setup.image.resize(&cx, size << 20, Preallocation::Off).await?;
            }
            setup.image.resize(&cx, 1 << 20, Preallocation::Off).await
        };
        work.push(Box::pin(grow));
        run(join(work)).unwrap();
        setup.close();
        for cut in disk.take_cuts() {
            let (errors, _) = check::check(&cut);
            assert!(errors.is_empty(), "{shape:?} {seed}: {errors:?}");
        }
        let left = content(disk.content());
        assert_eq!(check::check(&disk.content()), (Vec::new(), 0));
        for region in 0..4 {
            for i in 0..16 {
                let at = region * (256 << 10) + i * 9000;
                assert!(left[at..at + 5000].iter().all(|b| usize::from(*b) == i + 1), "{shape:?} {seed}");
            }
        }
    }
}

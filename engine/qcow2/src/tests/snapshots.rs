//! Internal snapshots: random histories against a byte model, power cuts, full disks, and tables that lie.

use std::sync::Arc;

use underlay_graph::{ByteRange, IoError, Node, Preallocation, View, WriteFlags, ZeroFlags};
use underlay_sys::Iov;

use super::{Disk, Rng, Setup, Shape, check::check, open, run, view_of};
use crate::header::Header;
use crate::live::OpenOptions;
use crate::snapshot_changes::NewSnapshot;

fn new(name: &str) -> NewSnapshot {
    NewSnapshot { name: name.into(), seconds: 5, nanoseconds: 6, clock: 7, icount: Some(0) }
}

impl Setup {
    fn take(&self, name: &str) -> underlay_graph::Result<String> {
        run(self.image.take_snapshot(&self.view.cx(), &new(name)))
    }
    fn delete(&self, place: usize) -> underlay_graph::Result<()> {
        run(self.image.delete_snapshot(&self.view.cx(), place))
    }
    fn apply(&self, place: usize) -> underlay_graph::Result<()> {
        run(self.image.apply_snapshot(&self.view.cx(), place))
    }
    fn all(&self) -> Vec<u8> {
        self.read(0, self.image.size())
    }
    fn names(&self) -> Vec<String> {
        self.image.snapshots().iter().map(|snapshot| format!("{} {}", snapshot.id, snapshot.name)).collect()
    }
}

fn assert_sound(disk: &Disk, text: &str) {
    let (errors, leaks) = check(&disk.content());
    assert!(errors.is_empty() && leaks == 0, "{text}: {leaks} leaks, {errors:?}");
}

/// What an image shows: its disk, and that of each snapshot.
fn content(image: Vec<u8>, base: Option<&Arc<View>>) -> (Vec<u8>, Vec<Vec<u8>>) {
    let disk = Disk::new(image, 3).forget_cuts();
    let opened = || open(disk.clone(), base.cloned(), OpenOptions::default(), false);
    let now = opened();
    let one = |place| {
        let old = opened();
        run(old.image.show_snapshot(&old.view.cx(), place)).unwrap();
        old.all()
    };
    (now.all(), (0..now.image.snapshots().len()).map(one).collect())
}

fn shape(seed: u64) -> Shape {
    let bits = [9, 10, 12, 14, 16][usize::try_from(seed % 5).unwrap()];
    let extended = bits >= 14 && seed.is_multiple_of(2);
    let order = [4, 3, 6, 5][usize::try_from(seed / 5 % 4).unwrap()];
    let v3 = !seed.is_multiple_of(7) || extended || order != 4;
    Shape { bits, order, extended, v3, zstd: false, size: (40 << bits) + 512 }
}

struct History {
    shape: Shape,
    rng: Rng,
    now: Vec<u8>,
    old: Vec<Vec<u8>>,
    /// As the model is without the last change of the snapshots.
    before: Option<(Vec<u8>, Vec<Vec<u8>>)>,
}

impl History {
    fn range(&mut self) -> ByteRange {
        let size = self.now.len() as u64;
        let sector = self.rng.below(size / 512);
        let len = (1 + self.rng.below(4 << self.shape.bits >> 9)).min(size / 512 - sector);
        ByteRange::between(sector * 512, (sector + len) * 512)
    }

    fn part(&mut self, range: ByteRange) -> &mut [u8] {
        &mut self.now[usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()]
    }

    /// One request of a guest.
    fn request(&mut self, setup: &Setup, backing: bool) {
        let (cx, cluster) = (setup.view.cx(), 1 << self.shape.bits);
        let range = self.range();
        match self.rng.below(9) {
            0..=4 => {
                let byte = u8::try_from(self.rng.below(256)).unwrap();
                self.part(range).fill(byte);
                let from = Iov::filled(range.buffer_len(), byte);
                run(cx.write(range, from, WriteFlags::default())).unwrap();
            }
            5 => {
                self.part(range).fill(0);
                let may_unmap = self.rng.below(2) == 0;
                run(cx.write_zeroes(range, ZeroFlags { may_unmap, no_fallback: false })).unwrap();
            }
            6 => {
                run(cx.discard(range)).unwrap();
                let inner = range.align_in(cluster);
                if self.shape.v3 || !backing {
                    self.part(inner).fill(0);
                    // Whether the tail of the disk goes too is not the question here.
                    let tail = ByteRange::between(inner.end().max(range.start()), range.end());
                    let found = setup.read(tail.start(), tail.len());
                    self.part(tail).copy_from_slice(&found);
                }
            }
            7 => {
                let inner = range.align_in(cluster);
                if !inner.is_empty() {
                    let mut bytes = vec![9; inner.buffer_len()];
                    bytes[7] = u8::try_from(self.rng.below(256)).unwrap();
                    self.part(inner).copy_from_slice(&bytes);
                    run(cx.write(inner, Iov::copy_of(&bytes), WriteFlags { compressed: true })).unwrap();
                }
            }
            _ => run(cx.flush()).unwrap(),
        }
    }

    /// One change of the snapshots.
    fn change(&mut self, setup: &Setup) {
        let count = self.old.len();
        let place = usize::try_from(self.rng.below(count.max(1) as u64)).unwrap();
        // What is below is not part of a snapshot: what it shows stays the same here.
        let before = (self.now.clone(), self.old.clone());
        match self.rng.below(5) {
            0 | 1 if count < 6 => {
                setup.take(&format!("s{count}")).unwrap();
                self.old.push(self.now.clone());
            }
            2 | 3 if count > 0 => {
                setup.delete(place).unwrap();
                self.old.remove(place);
            }
            4 if count > 0 => {
                setup.apply(place).unwrap();
                self.now = self.old[place].clone();
            }
            _ => {}
        }
        self.before = Some(before);
    }
}

#[test]
fn snapshots_are_what_the_disk_was_in_any_history() {
    for seed in 0..60u64 {
        let shape = shape(seed);
        let backing = seed % 3 == 0 && shape.bits > 9;
        let len = usize::try_from(shape.size).unwrap();
        let mut rng = Rng::new(seed + 5);
        let below: Vec<u8> =
            (0..len / 512 / 2).flat_map(|_| [u8::try_from(rng.below(256)).unwrap(); 512]).collect();
        let base = backing.then(|| view_of(Disk::new(below.clone(), 7)));
        let mut now = if backing { below } else { Vec::new() };
        now.resize(len, 0);
        let disk = Disk::new(shape.image(backing), seed).forget_cuts();
        let mut history = History { shape, rng, now, old: Vec::new(), before: None };
        for round in 0..3 {
            let setup = open(disk.clone(), base.clone(), OpenOptions::default(), true);
            for _ in 0..5 {
                for _ in 0..8 {
                    history.request(&setup, backing);
                }
                history.change(&setup);
                assert!(setup.all() == history.now, "seed {seed} {shape:?}");
            }
            setup.close();
            assert_sound(&disk, &format!("seed {seed} round {round} {shape:?}"));
            let (now, old) = content(disk.content(), base.as_ref());
            assert!(now == history.now && old == history.old, "seed {seed} round {round} {shape:?}");
        }
        let setup = open(disk.clone(), base.clone(), OpenOptions::default(), true);
        for _ in 0..history.old.len() {
            setup.delete(0).unwrap();
        }
        setup.close();
        assert_sound(&disk, &format!("seed {seed}, all snapshots deleted"));
        assert!(content(disk.content(), base.as_ref()) == (history.now, Vec::new()));
    }
}

#[test]
fn a_power_cut_leaves_the_old_snapshots_or_the_new_ones() {
    for seed in 0..40u64 {
        let shape = Shape { size: (12 << shape(seed).bits) + 512, ..shape(seed) };
        let disk = Disk::new(shape.image(false), seed);
        let now = vec![0; usize::try_from(shape.size).unwrap()];
        let mut history = History { shape, rng: Rng::new(seed), now, old: Vec::new(), before: None };
        let setup = open(disk.clone(), None, OpenOptions::default(), true);
        for step in 0..12 {
            for _ in 0..4 {
                history.request(&setup, false);
            }
            run(setup.view.cx().flush()).unwrap();
            disk.record_cuts();
            history.change(&setup);
            let mut cuts = disk.take_cuts();
            cuts.push(disk.power_cut(seed));
            let after = (history.now.clone(), history.old.clone());
            for (number, cut) in cuts.into_iter().enumerate() {
                let text = format!("seed {seed} step {step} cut {number} {shape:?}");
                let (errors, _) = check(&cut);
                assert!(errors.is_empty(), "{text}: {errors:?}");
                let found = content(cut, None);
                assert!(found == after || Some(&found) == history.before.as_ref(), "{text}");
            }
            assert_eq!(content(disk.power_cut(9), None), after, "durable on return");
        }
    }
}

#[test]
fn a_full_disk_leaves_everything_as_it_was() {
    for seed in 0..20u64 {
        let shape = shape(seed);
        let disk = Disk::new(shape.image(false), seed);
        let now = vec![0; usize::try_from(shape.size).unwrap()];
        let mut history = History { shape, rng: Rng::new(seed), now, old: Vec::new(), before: None };
        let setup = open(disk.clone(), None, OpenOptions::default(), true);
        for step in 0..10 {
            history.request(&setup, false);
            history.request(&setup, false);
            if setup.image.snapshots().is_empty() {
                setup.take("first").unwrap();
                history.old.push(history.now.clone());
            }
            run(setup.view.cx().flush()).unwrap();
            run(setup.image.settle(&setup.view.cx())).unwrap();
            disk.fail_after(Some((seed + step) % 5));
            let failed = match step % 3 {
                0 => setup.take("more").is_err(),
                1 => setup.delete(0).is_err(),
                _ => setup.apply(0).is_err(),
            };
            disk.fail_after(None);
            let text = format!("seed {seed} step {step} {shape:?}");
            assert!(failed, "{text}");
            if setup.image.usable().is_err() {
                // The header could not be written, nor be written back. It is one or the other.
                assert!(check(&disk.power_cut(1)).0.is_empty(), "{text}");
                break;
            }
            assert!(setup.all() == history.now, "{text}");
            assert_eq!(setup.names(), ["1 first"], "{text}");
        }
        if setup.image.usable().is_ok() {
            setup.close();
            assert_sound(&disk, &format!("seed {seed}"));
            assert!(content(disk.content(), None) == (history.now, history.old));
        }
    }
}

#[test]
fn narrow_refcounts_have_room_for_few_snapshots() {
    for (order, room) in [(0, 0), (1, 2), (2, 14)] {
        let shape = Shape { bits: 12, order, extended: false, v3: true, zstd: false, size: 20 << 12 };
        let disk = Disk::new(shape.image(false), 1);
        let setup = open(disk.clone(), None, OpenOptions::default(), true);
        setup.write(5000, &[1; 9000]).unwrap();
        for number in 0..room {
            setup.take(&number.to_string()).unwrap();
        }
        assert_eq!(setup.take("one too many").unwrap_err(), IoError::EINVAL);
        if room > 0 {
            // One owner goes before the other comes.
            setup.apply(0).unwrap();
            setup.write(5000, &[2; 9000]).unwrap();
            setup.take("the disk has its own data again").unwrap();
        }
        setup.close();
        assert_sound(&disk, &format!("order {order}"));
    }
}

#[test]
fn the_disk_gets_its_size_back() {
    let shape = Shape { bits: 12, order: 4, extended: false, v3: true, zstd: false, size: 20 << 12 };
    let disk = Disk::new(shape.image(false), 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    setup.write(0, &[1; 20 << 12]).unwrap();
    setup.take("small").unwrap();
    let resize = |size| run(setup.image.resize(&setup.view.cx(), size, Preallocation::Off)).unwrap();
    resize(4000 << 12);
    setup.write(3000 << 12, &[2; 4096]).unwrap();
    setup.take("large").unwrap();
    resize(10 << 12);
    for (place, size) in [(0, 20), (1, 4000), (0, 20)] {
        setup.apply(place).unwrap();
        assert_eq!(setup.image.size(), size << 12);
        assert!(setup.read(0, 20 << 12).iter().all(|byte| *byte == 1));
    }
    setup.close();
    assert_sound(&disk, "sizes");
    let shape = Shape { v3: false, ..shape };
    let setup = open(Disk::new(shape.image(false), 1), None, OpenOptions::default(), true);
    setup.take("old").unwrap();
    let refused = run(setup.image.resize(&setup.view.cx(), 40 << 12, Preallocation::Off)).unwrap_err();
    assert_eq!(refused.to_string(), "Can't resize a v2 image which has snapshots");
}

/// What is said of a snapshot comes back, whatever it is; and extra data that nobody knows stays.
#[test]
fn entries_are_kept_as_they_are() {
    let shape = Shape { bits: 12, order: 4, extended: false, v3: true, zstd: false, size: 20 << 12 };
    let disk = Disk::new(shape.image(false), 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    setup.take("é".repeat(200).as_str()).unwrap();
    assert_eq!(setup.image.snapshots()[0].name, "é".repeat(127), "whole letters of 255 bytes");
    setup.close();
    let mut bytes = disk.content();
    let header = Header::parse(&bytes).unwrap();
    let at = usize::try_from(header.snapshots_offset).unwrap();
    // 8 bytes more, and an id that is not UTF-8.
    let name = bytes[at + 65..at + 65 + 254].to_vec();
    bytes[at + 39] = 32;
    bytes[at + 64..at + 72].copy_from_slice(b"stranger");
    bytes[at + 72] = 0xff;
    bytes[at + 73..at + 73 + 254].copy_from_slice(&name);
    let disk = Disk::new(bytes, 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    setup.take("b").unwrap();
    let again = open(Disk::new(disk.content(), 1), None, OpenOptions::default(), false);
    let infos = again.image.snapshots();
    assert_eq!((infos[0].id.as_str(), infos[1].id.as_str()), ("\u{fffd}", "1"));
    assert_eq!((infos[1].seconds, infos[1].nanoseconds, infos[1].clock, infos[1].icount), (5, 6, 7, Some(0)));
    let known = again.image.known_snapshots().table.snapshots[0].clone();
    assert_eq!((known.unknown.as_slice(), known.raw.0.as_slice()), (&b"stranger"[..], &[0xff][..]));
}

/// Tables of a snapshot that point at everything: an error, or a change that is sound; never a write to what is not its
/// own.
#[test]
fn tables_that_lie() {
    let shape = Shape { bits: 12, order: 4, extended: false, v3: true, zstd: false, size: 60 << 12 };
    let disk = Disk::new(shape.image(false), 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    setup.write(0, &[1; 12 << 12]).unwrap();
    setup.take("a").unwrap();
    setup.write(0, &[2; 4 << 12]).unwrap();
    setup.take("b").unwrap();
    setup.write(0, &[3; 6 << 12]).unwrap();
    setup.close();
    let image = disk.content();
    let header = Header::parse(&image).unwrap();
    let known = setup.image.known_snapshots().table.clone();
    let word = |at: u64| {
        let at = usize::try_from(at).unwrap();
        u64::from_be_bytes(image[at..at + 8].try_into().unwrap())
    };
    let l1 = known.snapshots[0].l1_offset;
    let l2 = word(l1) & crate::entry::OFFSET;
    let spots = [
        header.snapshots_offset,
        header.snapshots_offset + 8,
        header.snapshots_offset + 32,
        l1,
        l1 + 8,
        l2,
        60,
        64,
    ];
    let places = [
        0,
        1 << 12,
        header.refcount_table_offset,
        header.l1_offset,
        word(header.l1_offset) & crate::entry::OFFSET,
        l1,
        l2,
        header.snapshots_offset,
        100 << 12,
        0x1234,
        1 << 40,
        u64::MAX,
        1 << 62 | 5,
        (u64::MAX >> 9) << 9,
    ];
    for (spot, place) in spots.iter().flat_map(|spot| places.iter().map(move |place| (*spot, *place))) {
        let mut bytes = image.clone();
        let at = usize::try_from(spot).unwrap();
        bytes[at..at + 8].copy_from_slice(&place.to_be_bytes());
        for what in 0..4 {
            let disk = Disk::new(bytes.clone(), 1);
            let file = view_of(disk.clone());
            let Ok(image) = run(crate::live::Qcow2::open(&file.cx(), OpenOptions::default())) else {
                continue;
            };
            let image = Arc::new(image);
            let view = View::detached(image.clone(), [(underlay_graph::Role::File, file)]);
            let access = underlay_graph::perm::Access {
                writable: what < 3,
                required: underlay_graph::Perms::ALL,
                shared: underlay_graph::Perms::ALL,
                used: true,
            };
            if run(image.set_access(&view.cx(), access)).is_err() {
                continue;
            }
            let cx = view.cx();
            let done = match what {
                0 => run(image.take_snapshot(&cx, &new("c"))).map(|_| ()),
                1 => run(image.delete_snapshot(&cx, 0)),
                2 => run(image.apply_snapshot(&cx, 0)),
                _ => run(image.show_snapshot(&cx, 0)),
            };
            let now = disk.content();
            if done.is_err() {
                // Nothing but what was free has been written to, but for the mark of a corrupt image.
                let header = Header::parse(&now).unwrap();
                assert_eq!(header.snapshots_offset, Header::parse(&bytes).unwrap().snapshots_offset);
                let same = |range: std::ops::Range<usize>| now[range.clone()] == bytes[range];
                assert!(same(0..72) && same(80..4096), "{spot:#x} {place:#x} {what}");
                assert!(same(usize::try_from(l1).unwrap()..usize::try_from(l1 + 8192).unwrap()));
            } else {
                assert!(Header::parse(&now).is_ok());
            }
        }
    }
}

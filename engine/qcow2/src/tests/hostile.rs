//! Images that were damaged or made to do harm: a clear error, and nothing is damaged further.

use std::sync::{Arc, Mutex};

use underlay_graph::perm::Access;
use underlay_graph::{ByteRange, Node, Perms, WriteFlags};
use underlay_sys::Iov;

use super::{Disk, Rng, Setup, Shape, check::check, open, run};
use crate::features;
use crate::header::Header;
use crate::live::{Corruption, OnRepair, OpenOptions};

const SHAPE: Shape = Shape { bits: 16, order: 4, extended: false, v3: true, zstd: false, size: 4 << 20 };
const L2: usize = 4 << 16;
const L1: usize = 3 << 16;

/// An image with 256 KiB of data (L2 table in cluster 4, data from cluster 5 on), and then some bytes changed.
fn damaged(shape: Shape, pokes: &[(usize, u64)]) -> Vec<u8> {
    let disk = Disk::new(shape.image(false), 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    setup.write(0, &vec![1; 256 << 10]).unwrap();
    setup.close();
    let mut bytes = disk.content();
    for (at, value) in pokes {
        bytes[*at..at + 8].copy_from_slice(&value.to_be_bytes());
    }
    bytes
}

type Told = Arc<Mutex<Vec<Corruption>>>;

fn watched(bytes: Vec<u8>, write: bool) -> (Arc<Disk>, Setup, Told) {
    let told = Told::default();
    let tell = told.clone();
    let on_corrupt = Some(Arc::new(move |found| tell.lock().unwrap().push(found)) as crate::live::OnCorrupt);
    let disk = Disk::new(bytes, 1);
    let setup = open(disk.clone(), None, OpenOptions { on_corrupt, ..OpenOptions::default() }, write);
    (disk, setup, told)
}

fn read(setup: &Setup, at: u64) -> underlay_graph::Result<()> {
    run(setup.view.cx().read(ByteRange::between(at, at + 512), Iov::scratch(512)))
}

#[test]
fn writes_never_reach_metadata() {
    let cases: [(usize, u64, u64, &str); 9] = [
        (1 << 16, 4 << 16, 1 << 20, "Preventing invalid write on metadata (overlaps with several tables)"),
        (1 << 16, 1 << 40, 1 << 20, "Preventing invalid write on metadata (overlaps with several tables)"),
        (L2, 1 << 63 | 3 << 16, 0, "Preventing invalid write on metadata (overlaps with active L1 table)"),
        (L2, 1 << 63 | 2 << 16, 0, "Preventing invalid write on metadata (overlaps with refcount block)"),
        (L2, 1 << 63 | 4 << 16, 0, "Preventing invalid write on metadata (overlaps with active L2 table)"),
        (L2, 1 << 63 | 0x50200, 0, "Data cluster offset 0x50200 unaligned (guest offset: 0)"),
        (
            L2,
            1 << 63 | 1 << 40,
            0,
            "Data cluster at offset 0x10000000000 is behind the end of the image file",
        ),
        (L1, 1 << 63 | 0x40200, 1 << 20, "L2 table offset 0x40200 unaligned (L1 index: 0)"),
        (2 << 16, 0, 1 << 20, "Preventing invalid write on metadata (overlaps with qcow2_header)"),
    ];
    for (at, value, guest, text) in cases {
        let bytes = damaged(SHAPE, &[(at, value)]);
        let (disk, setup, told) = watched(bytes.clone(), true);
        assert_eq!(setup.write(guest, &[7; 512]).unwrap_err().errno(), 5, "{text}");
        let told = told.lock().unwrap().clone();
        assert_eq!(told.len(), 1);
        assert!(told[0].fatal && told[0].message == text, "{told:?}");
        assert!(setup.write(2 << 20, &[7; 512]).is_err() && read(&setup, 2 << 20).is_err(), "unusable");
        // Only the mark has been set.
        let mut after = disk.content();
        assert!(Header::parse(&after).unwrap().has(features::CORRUPT));
        after[72..80].copy_from_slice(&bytes[72..80]);
        assert!(
            after[..bytes.len()] == bytes[..],
            "{text}: {:?}",
            after.iter().zip(&bytes).position(|(a, b)| a != b)
        );
    }
}

/// Every table entry made to point at every place that is not for it: nothing there is changed, the header above all.
#[test]
fn tables_that_point_at_each_other_are_never_written_through() {
    let [header, table, block, l1, l2, data] = [0u64, 1, 2, 3, 4, 5].map(|cluster| cluster << 16);
    let places = [header, table, block, l1, l2, data, 9 << 16, 1 << 40, (1 << 56) - (1 << 16)];
    let entries =
        [(table, "refcount table"), (l1, "L1"), (l2, "L2"), (40, "L1 offset"), (48, "table offset")];
    for (entry, name) in entries {
        // Tables behind the end of the file are empty, and the file grows when they are written.
        let far = |place: u64| entry < table && place >= 1 << 40;
        for place in places.into_iter().filter(|place| !far(*place)) {
            let copied: &[u64] = if entry == l1 || entry == l2 { &[0, 1 << 63] } else { &[0] };
            for flags in copied {
                let text = format!("{name} entry at {place:#x} with {flags:#x}");
                let bytes = damaged(SHAPE, &[(usize::try_from(entry).unwrap(), place | flags)]);
                let disk = Disk::new(bytes.clone(), 1);
                let file = super::view_of(disk.clone());
                if run(crate::live::Qcow2::open(&file.cx(), OpenOptions::default())).is_err() {
                    continue;
                }
                let setup = open(disk.clone(), None, OpenOptions::default(), false);
                let cx = setup.view.cx();
                let access = Access { writable: true, required: Perms::ALL, shared: Perms::ALL, used: true };
                if run(setup.image.set_access(&cx, access)).is_ok() {
                    for guest in [0, 1 << 16, 2 << 20, 3 << 20] {
                        let _ = read(&setup, guest);
                        let _ = setup.write(guest, &[7; 512]);
                        let _ = run(cx.flush());
                    }
                    let _ = run(cx.discard(ByteRange::between(0, 1 << 20)));
                    let _ = run(setup.image.close(&cx));
                }
                let after = disk.content();
                let same = |from: u64, to: u64| {
                    let part = usize::try_from(from).unwrap()..usize::try_from(to).unwrap();
                    after[part.clone()] == bytes[part]
                };
                // In the header the mark may have been set, and a new refcount table.
                assert!(same(0, 48) && same(60, 72) && same(96, 1 << 16), "{text}: the header was changed");
                // The first entries may be given new tables, if they said that there are none.
                assert!(same(table + 8, block), "{text}: the refcount table was changed");
                assert!(same(l1 + 8, l2), "{text}: the L1 table was changed");
            }
        }
    }
}

#[test]
fn a_reader_reports_damage_and_goes_on() {
    let (disk, setup, told) = watched(damaged(SHAPE, &[(L2, 1 << 63 | 0x50200)]), false);
    let before = disk.content();
    assert_eq!(read(&setup, 0).unwrap_err().errno(), 5);
    assert_eq!(read(&setup, 0).unwrap_err().errno(), 5);
    assert!(read(&setup, 65536).is_ok());
    let told = told.lock().unwrap();
    assert_eq!(told.len(), 1);
    assert_eq!(
        told[0].to_string(),
        "qcow2: Image is corrupt: Cluster allocation offset 0x50200 unaligned (L2 offset: 0x40000, L2 index: 0); \
         further non-fatal corruption events will be suppressed"
    );
    assert!(disk.content() == before);
}

#[test]
fn damaged_compressed_clusters_are_errors() {
    for value in [1 << 62 | 5 << 16, 3 << 62 | 5 << 16, 1 << 62 | 0xff_ff05_0000, 1 << 62 | ((1 << 62) - 1)] {
        let (_, setup, _) = watched(damaged(SHAPE, &[(L2, value)]), true);
        assert_eq!(read(&setup, 0).unwrap_err().errno(), 5, "{value:#x}");
    }
}

#[test]
fn corrupt_images_are_not_written_to() {
    let (disk, _, _) = watched(damaged(SHAPE, &[(72, features::CORRUPT)]), false);
    let setup = open(disk.clone(), None, OpenOptions::default(), false);
    let error = run(setup.image.become_writable(&setup.view.cx())).unwrap_err();
    assert_eq!(error.to_string(), "qcow2: Image is corrupt; cannot be opened read/write");
    open(disk, None, OpenOptions { repair: true, ..OpenOptions::default() }, true);
}

#[test]
fn unknown_autoclear_bits_go_at_once_and_the_bitmaps_bit_with_the_first_write() {
    let bytes = damaged(SHAPE, &[(88, 1 << 40)]);
    let disk = Disk::new(bytes, 1);
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    assert_eq!(Header::parse(&disk.content()).unwrap().autoclear, 0);
    setup.image.header_mut().autoclear = features::BITMAPS;
    let range = ByteRange::between(0, 512);
    run(setup.view.cx().write(range, Iov::zeroed(512), WriteFlags::default())).unwrap();
    assert_eq!(setup.image.header().autoclear, 0);
}

/// Snapshots and other programs leave clusters that are shared, or not known to be unshared: they are copied.
#[test]
fn clusters_without_the_copied_flag_are_never_written_to() {
    let l1 = 4 << 16;
    let entry = |i: u64| (L2 + usize::try_from(i).unwrap() * 8, (5 + i) << 16);
    let bytes = damaged(SHAPE, &[(L1, l1), entry(0), entry(1), entry(2), entry(3)]);
    let before = bytes.clone();
    let (disk, setup, told) = watched(bytes, true);
    setup.write(100, &[7; 70_000]).unwrap();
    run(setup.view.cx().write_zeroes(ByteRange::between(2 << 16, 3 << 16), Default::default())).unwrap();
    setup.write((2 << 16) + 5, &[8; 5]).unwrap();
    setup.write(3 << 16, &[9; 65536]).unwrap();
    assert!(
        disk.content()[L2..9 << 16] == before[L2..9 << 16],
        "the old table and clusters are as they were"
    );
    setup.close();
    let mut expected = vec![1; 256 << 10];
    expected[100..70_100].fill(7);
    expected[2 << 16..3 << 16].fill(0);
    expected[(2 << 16) + 5..(2 << 16) + 10].fill(8);
    expected[3 << 16..].fill(9);
    assert!(setup.read(0, 256 << 10) == expected);
    let (errors, leaks) = check(&disk.content());
    assert!(errors.is_empty() && leaks == 0 && told.lock().unwrap().is_empty(), "{leaks} leaks, {errors:?}");
}

/// An image that QEMU left behind with its dirty bit set: references without counts.
#[test]
fn a_dirty_image_is_repaired_before_it_is_written_to() {
    let mut bytes = damaged(SHAPE, &[(72, features::DIRTY)]);
    bytes[(2 << 16) + 10..(2 << 16) + 18].fill(0);
    assert!(!check(&bytes).0.is_empty());
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = told.clone();
    let on_repair = Some(Arc::new(move |line: &str| tell.lock().unwrap().push(line.to_owned())) as OnRepair);
    let disk = Disk::new(bytes.clone(), 1);
    open(disk.clone(), None, OpenOptions::default(), false);
    assert!(disk.content() == bytes, "reading leaves it alone");
    let setup = open(disk.clone(), None, OpenOptions { on_repair, ..OpenOptions::default() }, true);
    assert!(!Header::parse(&disk.content()).unwrap().has(features::DIRTY));
    setup.write(1 << 20, &[3; 65536]).unwrap();
    assert!(setup.read(0, 256 << 10).iter().all(|b| *b == 1));
    setup.close();
    let (errors, leaks) = check(&disk.content());
    assert!(errors.is_empty() && leaks == 0, "{leaks} leaks, {errors:?}");
    assert!(!told.lock().unwrap().is_empty());
}

/// Random damage to the metadata: requests may fail, nothing panics or hangs.
#[test]
fn no_damage_makes_it_panic() {
    for seed in 0..400u64 {
        let mut rng = Rng::new(seed + 1);
        let extended = seed % 3 == 0;
        let bits = if extended { 14 } else { [9, 12][usize::try_from(seed % 2).unwrap()] };
        let shape =
            Shape { bits, order: 4, extended, v3: seed % 5 > 0 || extended, zstd: false, size: 300 << 10 };
        let mut bytes = damaged(shape, &[]);
        for _ in 0..1 + rng.below(6) {
            // Tables are near the start.
            let at = (1 << bits) + usize::try_from(rng.below(8 << bits)).unwrap();
            let value = match rng.below(3) {
                0 => rng.next() << 16 | rng.next(),
                1 => 1 << 63 | rng.below(20) << bits,
                _ => (rng.below(3) << 62) | (rng.next() % (1 << 40)),
            };
            bytes[at / 8 * 8..at / 8 * 8 + 8].copy_from_slice(&value.to_be_bytes());
        }
        let disk = Disk::new(bytes, seed);
        let setup = open(disk, None, OpenOptions::default(), false);
        let cx = setup.view.cx();
        let _ = run(setup.image.become_writable(&cx));
        for _ in 0..30 {
            let at = rng.below(shape.size - 8192);
            let range = ByteRange::between(at, at + 1 + rng.below(8191));
            let _ = match rng.below(6) {
                0 => run(cx.read(range, Iov::scratch(range.buffer_len()))),
                1 => run(cx.discard(range)),
                2 => run(cx.write_zeroes(range, underlay_graph::ZeroFlags::default())),
                3 => run(cx.flush()),
                _ => run(cx.write(range, Iov::filled(range.buffer_len(), 3), WriteFlags::default())),
            };
        }
    }
}

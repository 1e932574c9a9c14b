//! A whole image on a disk in memory: checked, opened, read, mapped, written to, closed, checked again.
//!
//! Whatever the image says: no panic, an end, memory within bounds, and it is an image still. And if a check found it
//! sound, then it still is after the writes, it has what was written, and everything else reads as before.

use std::collections::BTreeSet;
use std::sync::Arc;

use underlay_graph::bitmap::DirtyBitmap;
use underlay_graph::bitmaps::{BitmapStore, PlanBitmap};
use underlay_graph::perm::Access;
use underlay_graph::{ByteRange, Cx, Node, Perms, Role, View, WriteFlags, ZeroFlags};
use underlay_qcow2::header::Version;
use underlay_qcow2::snapshot_changes::NewSnapshot;
use underlay_qcow2::{CreateOptions, Fix, Header, OpenOptions, Qcow2, check, create};
use underlay_sim::{Disk, Power, Rng, World};
use underlay_sys::Iov;

use crate::mutate::{self, number, poke};

/// What the file may grow by, in bytes: behind that the disk is full.
const ROOM: u64 = 8 << 20;
/// Bytes of a read, at most.
const READ: u64 = 64 << 10;

/// Only the header.
pub fn header(data: &[u8]) {
    let Ok(header) = Header::parse(data) else { return };
    let _ = (header.l1_bytes(), header.refcounts_per_block(), header.max_refcount(), header.backing_ref());
    if let Ok(bytes) = header.serialise() {
        let again = Header::parse(&bytes).expect("what we write is a header");
        assert_eq!(format!("{again:?}"), format!("{header:?}"), "a header must survive being written");
    }
}

/// The whole image.
pub fn run(data: &[u8]) {
    let seed = data.iter().fold(data.len() as u64, |hash, &byte| hash.wrapping_mul(31) ^ u64::from(byte));
    World::new(seed).run(exercise(data, seed));
}

async fn exercise(data: &[u8], seed: u64) {
    let disk = Disk::new(data.to_vec(), seed, Power::until(u64::MAX));
    disk.limit(data.len() as u64 + ROOM);
    let file = View::detached(disk.clone(), []);
    let sound = is_sound(&file.cx()).await;
    let mut rng = Rng::new(seed);
    let Ok(image) = Qcow2::open(&file.cx(), OpenOptions::default()).await else { return };
    let image = Arc::new(image);
    let view = View::detached(image.clone(), [(Role::File, file.clone())]);
    let cx = view.cx();
    let places = places(image.size(), &mut rng);
    let before = read(&cx, &places).await;
    let access = Access { writable: true, required: Perms::ALL, shared: Perms::ALL, used: true };
    let mut bitmaps = image.loaded();
    let keeps_bitmaps = rng.one_in(2);
    if image.set_access(&cx, access).await.is_err() || keeps_bitmaps && image.begin(&cx).await.is_err() {
        return;
    }
    let written = change(&cx, &places, &mut rng).await;
    // The disk reads the same with other snapshots.
    change_snapshots(&cx, &image, &mut rng).await;
    let after = read(&cx, &places).await;
    let stored = keeps_bitmaps && change_bitmaps(&cx, &image, &mut bitmaps, &places, &mut rng).await;
    let closed = image.close(&cx).await;
    let left = Header::parse(&disk.content());
    assert!(left.is_ok(), "the header was destroyed: {left:?}");
    if sound && stored && closed.is_ok() {
        let again = Qcow2::open(&file.cx(), OpenOptions::default()).await.expect("a sound image").loaded();
        assert_eq!(said(&again), said(&bitmaps), "bitmaps are not what was stored");
    }
    if sound && closed.is_ok() {
        assert!(is_sound(&file.cx()).await, "a sound image was damaged");
        for (at, (before, after)) in before.iter().zip(&after).enumerate() {
            match written.get(at) {
                Some(Some(byte)) => {
                    assert!(
                        after.as_ref().is_none_or(|after| after.iter().all(|b| b == byte)),
                        "a write is lost"
                    );
                }
                // The change failed: either is fine.
                Some(None) => {}
                None => {
                    assert_eq!(before.is_some(), after.is_some(), "{} fails or does not fail", places[at]);
                    assert!(before == after, "{} reads differently", places[at]);
                }
            }
        }
    }
    apply(&file, &mut rng).await;
    let was_sound = sound && is_sound(&file.cx()).await;
    assert!(was_sound || !sound || closed.is_err(), "a sound image was damaged by a snapshot");
    // Whatever it finds and does, it ends; and there is nothing to repair where nothing is broken.
    let _ = check(&file.cx(), Fix::All, &mut |_| {}).await;
    assert!(!was_sound || is_sound(&file.cx()).await, "a repair broke a sound image");
}

/// Takes a snapshot, or deletes one, or neither.
async fn change_snapshots(cx: &Cx<'_>, image: &Qcow2, rng: &mut Rng) {
    let count = image.snapshots().len();
    match rng.below(4) {
        0 | 1 => {
            let new = NewSnapshot { name: "new".to_owned(), seconds: 7, ..NewSnapshot::default() };
            let taken = image.take_snapshot(cx, &new).await.is_ok();
            assert_eq!(image.snapshots().len(), count + usize::from(taken));
        }
        2 if count > 0 => {
            let deleted = image.delete_snapshot(cx, rng.index(count)).await.is_ok();
            assert_eq!(image.snapshots().len(), count - usize::from(deleted));
        }
        _ => {}
    }
}

/// The disk becomes what it was at some snapshot, if that is possible; and that is what the snapshot shows.
async fn apply(file: &Arc<View>, rng: &mut Rng) {
    let Ok(image) = Qcow2::open(&file.cx(), OpenOptions::default()).await else { return };
    let count = image.snapshots().len();
    if count == 0 {
        return;
    }
    let place = rng.index(count);
    let shown = Arc::new(image);
    let view = View::detached(shown.clone(), [(Role::File, file.clone())]);
    let shows = shown.show_snapshot(&view.cx(), place).await.is_ok();
    let places = places(shown.size(), rng);
    let before = read(&view.cx(), &places).await;
    let Ok(image) = Qcow2::open(&file.cx(), OpenOptions::default()).await else { return };
    let image = Arc::new(image);
    let view = View::detached(image.clone(), [(Role::File, file.clone())]);
    let access = Access { writable: true, required: Perms::ALL, shared: Perms::ALL, used: true };
    if image.set_access(&view.cx(), access).await.is_ok() {
        let applied = image.apply_snapshot(&view.cx(), place).await.is_ok();
        if applied && shows {
            assert_eq!(image.size(), shown.size(), "another size");
            let after = read(&view.cx(), &places).await;
            let same = |(a, b): (&Option<Vec<u8>>, &Option<Vec<u8>>)| a.is_none() || b.is_none() || a == b;
            assert!(before.iter().zip(&after).all(same), "another content");
        }
        let _ = image.close(&view.cx()).await;
    }
}

async fn is_sound(file: &Cx<'_>) -> bool {
    let outcome = check(file, Fix::None, &mut |_| {}).await;
    outcome.is_ok_and(|outcome| outcome.corruptions == 0 && outcome.check_errors == 0)
}

/// Ranges that do not touch each other, from the start, the end and between.
fn places(size: u64, rng: &mut Rng) -> Vec<ByteRange> {
    let mut ends: Vec<u64> = [0, size].into_iter().chain((0..10).map(|_| rng.below(size.max(1)))).collect();
    ends.extend((0..6).map(|_| rng.below(size.clamp(1, 1 << 17))));
    ends.sort_unstable();
    ends.windows(2)
        .filter_map(|pair| {
            let len = (pair[1] - pair[0]).min(1 + rng.below(READ));
            ByteRange::new(pair[0], len).filter(|range| !range.is_empty())
        })
        .collect()
}

async fn read(cx: &Cx<'_>, places: &[ByteRange]) -> Vec<Option<Vec<u8>>> {
    let mut found = Vec::new();
    for range in places {
        let _ = cx.map(*range).await;
        let into = Iov::filled(range.buffer_len(), 0xa5);
        found.push(cx.read(*range, into.clone()).await.is_ok().then(|| into.to_vec()));
    }
    found
}

/// Changes the first places; what they hold now, unless it failed.
async fn change(cx: &Cx<'_>, places: &[ByteRange], rng: &mut Rng) -> Vec<Option<u8>> {
    let mut written = Vec::new();
    for range in places.iter().take(places.len() / 2) {
        let byte = rng.number().to_le_bytes()[0];
        let (done, holds) = match rng.below(6) {
            0 => (cx.write_zeroes(*range, ZeroFlags { may_unmap: true, no_fallback: false }).await, 0),
            1 => {
                // A discard may leave anything.
                let _ = cx.discard(*range).await;
                written.push(None);
                continue;
            }
            _ => (cx.write(*range, Iov::filled(range.buffer_len(), byte), WriteFlags::default()).await, byte),
        };
        written.push(done.is_ok().then_some(holds));
        if rng.one_in(4) {
            let _ = cx.flush().await;
        }
    }
    written
}

/// What there is to know of bitmaps, in no order.
fn said(bitmaps: &[PlanBitmap]) -> BTreeSet<(String, u64, u64, bool, bool)> {
    let one = |bitmap: &PlanBitmap| {
        let bits = &bitmap.bits;
        (bitmap.name.to_string(), bits.granularity(), bits.count(), bitmap.enabled, bitmap.inconsistent)
    };
    bitmaps.iter().map(one).collect()
}

/// Some change, some go and one comes; then the image keeps them. Whether it does.
async fn change_bitmaps(
    cx: &Cx<'_>,
    image: &Qcow2,
    bitmaps: &mut Vec<PlanBitmap>,
    places: &[ByteRange],
    rng: &mut Rng,
) -> bool {
    if let Some(first) = bitmaps.first().filter(|_| rng.one_in(3)) {
        let name = first.name.clone();
        if image.remove(cx, &name).await.is_err() {
            return false;
        }
        bitmaps.remove(0);
    }
    for bitmap in bitmaps.iter().filter(|bitmap| bitmap.enabled) {
        places.iter().filter(|_| rng.one_in(2)).for_each(|place| bitmap.bits.set(*place));
    }
    let granularity = 512 << rng.below(12);
    if image.check_new(cx, bitmaps, "one more", granularity).is_ok() && image.size() / granularity < 1 << 24 {
        let bits = DirtyBitmap::new(image.size(), granularity);
        places.iter().for_each(|place| bits.set(*place));
        let is_new = bitmaps.iter().all(|bitmap| *bitmap.name != *"one more");
        let bitmap = PlanBitmap { persistent: true, ..PlanBitmap::new("one more", bits, true) };
        bitmaps.extend(Some(bitmap).filter(|_| is_new));
    }
    image.store(cx, bitmaps).await.is_ok()
}

/// Small images of all kinds, with some data in them.
pub fn seeds() -> Vec<Vec<u8>> {
    let size = 200 << 10;
    let plain = CreateOptions { cluster_size: 512, ..CreateOptions::new(size) };
    let many = [
        plain.clone(),
        CreateOptions { version: Version::V2, cluster_size: 4096, ..plain.clone() },
        CreateOptions { refcount_bits: 1, cluster_size: 1024, ..plain.clone() },
        CreateOptions { refcount_bits: 64, ..plain.clone() },
        CreateOptions { extended_l2: true, cluster_size: 16384, ..plain.clone() },
        CreateOptions { size: 1 << 40, cluster_size: 4096, ..plain },
    ];
    many.iter().enumerate().map(|(seed, options)| filled(options, seed as u64)).collect()
}

/// The same, cut behind the header's cluster.
pub fn seeds_of_headers() -> Vec<Vec<u8>> {
    let headers = seeds().into_iter().chain(
        crate::TARGETS
            .iter()
            .take(1)
            .flat_map(|target| crate::runner::corpus(target).into_iter().map(|(_, bytes)| bytes)),
    );
    headers
        .map(|mut bytes| {
            bytes.truncate(512);
            bytes
        })
        .collect()
}

fn filled(options: &CreateOptions, seed: u64) -> Vec<u8> {
    World::new(seed).run(async {
        let disk = Disk::new(Vec::new(), seed, Power::until(u64::MAX));
        let file = View::detached(disk.clone(), []);
        create(&file.cx(), options).await.expect("options that fit together");
        let image = Qcow2::open(&file.cx(), OpenOptions::default()).await.expect("our own image");
        let image = Arc::new(image);
        let view = View::detached(image.clone(), [(Role::File, file.clone())]);
        let access = Access { writable: true, required: Perms::ALL, shared: Perms::ALL, used: true };
        image.set_access(&view.cx(), access).await.expect("our own image");
        let mut rng = Rng::new(seed);
        let places = places(options.size, &mut rng);
        image.begin(&view.cx()).await.expect("our own image");
        change(&view.cx(), &places, &mut rng).await;
        if options.refcount_bits > 1 {
            for name in ["one", "two"] {
                let new = NewSnapshot { name: name.to_owned(), ..NewSnapshot::default() };
                image.take_snapshot(&view.cx(), &new).await.expect("our own image");
                change(&view.cx(), &places, &mut rng).await;
            }
        }
        let mut bitmaps = Vec::new();
        change_bitmaps(&view.cx(), &image, &mut bitmaps, &places, &mut rng).await;
        image.close(&view.cx()).await.expect("our own image");
        disk.content()
    })
}

/// Where fields of the header are, and how wide: qcow2.rst, "Header".
const FIELDS: [(usize, usize); 22] = [
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 1),
    (112, 4),
    (116, 4),
    (120, 8),
    (128, 8),
];

/// One change that knows where the header's fields and the tables are.
pub fn mutate(bytes: &mut Vec<u8>, rng: &mut Rng) {
    let field = |at: usize| {
        let word = bytes.get(at..at.saturating_add(8)).and_then(|word| word.try_into().ok());
        word.map_or(0, u64::from_be_bytes)
    };
    let bits = u32::try_from(field(20) >> 32).unwrap_or(9).clamp(9, 21);
    let (l1, refcounts) = (field(40), field(48));
    let entry = |table: u64, rng: &mut Rng| usize::try_from(table).ok()?.checked_add(rng.index(12) * 8);
    let inside = |table: u64, rng: &mut Rng| {
        let at = entry(table, rng)?;
        let word = bytes.get(at..at.checked_add(8)?)?.try_into().ok()?;
        entry(u64::from_be_bytes(word) & 0x00ff_ffff_ffff_fe00, rng)
    };
    // The bitmap directory, behind a table of feature names if there is one; its first entry, and that one's table.
    let is_bitmaps = |at: &usize| bytes.get(*at..at + 4) == Some(&0x2385_2875_u32.to_be_bytes());
    let extension = [112, 112 + 8 + 384].into_iter().find(is_bitmaps).unwrap_or(112);
    let directory = field(extension + 24);
    let (at, width) = match rng.below(11) {
        7 => (Some(extension + 8 * rng.index(4)), 8),
        8 => (entry(directory, rng), rng.pick(&[1, 2, 4, 8])),
        9 => (entry(field(usize::try_from(directory).unwrap_or(0)), rng), 8),
        0 | 1 => {
            let (at, width) = rng.pick(&FIELDS);
            (Some(at), width)
        }
        2 => (entry(l1, rng), 8),
        3 | 4 => (inside(l1, rng), 8),
        5 => (entry(refcounts, rng), 8),
        6 => (inside(refcounts, rng), rng.pick(&[1, 2, 8])),
        _ => return mutate::bytes(bytes, rng),
    };
    let Some(at) = at else { return };
    // To another cluster, at the header, at itself, at the tables, at the end of the file, with flags; or anything.
    let clusters = (bytes.len() as u64 >> bits) + 2;
    let place = match rng.below(7) {
        6 => directory,
        0 => l1,
        1 => refcounts,
        2 => at as u64 >> bits << bits,
        3 => bytes.len() as u64,
        _ => rng.below(clusters) << bits,
    };
    let flags = rng.pick(&[0, 0, 1, 1 << 63, 1 << 63, 1 << 63 | 1, 1 << 62, 1 << 62 | 1 << 63]);
    let value = if rng.one_in(3) { number(rng) } else { place | flags };
    let value = if width < 8 && rng.one_in(2) { rng.below(4) } else { value };
    poke(bytes, at, width, value);
}

//! Damaged headers are refused with the words of `qemu-img info`, and headers that we write are read by it.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::path::Path;

use common::{Memory, have_qemu_img, qemu_img, run};
use underlay_graph::BackingRef;
use underlay_qcow2::update::{write_features, write_header};
use underlay_qcow2::{CreateOptions, Header, Version, create, features};

/// Where the first extension of an image without backing file starts: its feature name table.
const EXTENSION: usize = 112;

fn image(options: &CreateOptions) -> Vec<u8> {
    let (memory, view) = Memory::default().view();
    run(create(&view.cx(), options)).unwrap();
    memory.to_vec()
}

/// One damaged header: fields by offset, size and value.
type Damage<'a> = (&'a str, &'a [(usize, usize, u64)]);

fn damaged(image: &[u8], pokes: &[(usize, usize, u64)]) -> Vec<u8> {
    let mut bytes = image.to_vec();
    for (at, size, value) in pokes {
        bytes[*at..at + size].copy_from_slice(&value.to_be_bytes()[8 - size..]);
    }
    bytes
}

fn compare(dir: &Path, name: &str, bytes: &[u8]) -> Option<String> {
    std::fs::write(dir.join("image"), bytes).unwrap();
    let (status, _, stderr) = qemu_img(dir, &["info", "-f", "qcow2", "image"]);
    let theirs = match status {
        0 => None,
        _ => Some(stderr.trim_start_matches("qemu-img: Could not open 'image': ").trim_end().to_owned()),
    };
    let ours = Header::parse(bytes).err().map(|error| error.to_string());
    (ours != theirs).then(|| format!("{name}: theirs {theirs:?}, ours {ours:?}"))
}

const FIELDS: &[Damage<'_>] = &[
    ("nothing", &[]),
    ("magic", &[(0, 4, 1)]),
    ("version 1", &[(4, 4, 1)]),
    ("version 4", &[(4, 4, 4)]),
    ("clusters 8", &[(20, 4, 8)]),
    ("clusters 22", &[(20, 4, 22)]),
    ("clusters huge", &[(20, 4, u32::MAX as u64)]),
    ("length 0", &[(100, 4, 0)]),
    ("length 103", &[(100, 4, 103)]),
    ("length 104", &[(100, 4, 104)]),
    ("length 108", &[(100, 4, 108)]),
    ("length 120", &[(100, 4, 120)]),
    ("length cluster", &[(100, 4, 65536)]),
    ("length too long", &[(100, 4, 65544)]),
    ("order 7", &[(96, 4, 7)]),
    ("order huge", &[(96, 4, u32::MAX as u64)]),
    ("unknown bit", &[(72, 8, 1 << 40)]),
    ("unknown bits and known ones", &[(72, 8, 0xff01)]),
    ("compression bit", &[(72, 8, 8)]),
    ("compression type", &[(104, 1, 1)]),
    ("compression both", &[(72, 8, 8), (104, 1, 1)]),
    ("compression unknown", &[(104, 1, 2)]),
    ("compression unknown and bit", &[(72, 8, 8), (104, 1, 7)]),
    ("compression in a short header", &[(100, 4, 104), (72, 8, 8)]),
    ("encryption 3", &[(32, 4, 3)]),
    ("encryption luks", &[(32, 4, 2)]),
    ("backing in the table", &[(8, 8, 120), (16, 4, 5)]),
    ("backing behind the cluster", &[(8, 8, 65537)]),
    ("backing at the end", &[(8, 8, 65536), (16, 4, 5)]),
    ("backing too long", &[(8, 8, 600), (16, 4, 1024)]),
    ("backing over the end", &[(8, 8, 65000), (16, 4, 1000)]),
    ("size 1 TiB", &[(24, 8, 1 << 40)]),
    ("size 4 EiB", &[(24, 8, 1 << 62)]),
    ("size 8 EiB", &[(24, 8, 1 << 63)]),
    ("size all", &[(24, 8, u64::MAX)]),
    ("l1 empty", &[(36, 4, 0)]),
    ("l1 too large", &[(36, 4, 4_194_305)]),
    ("l1 unaligned", &[(40, 8, 1)]),
    ("l1 negative", &[(40, 8, 1 << 63)]),
    ("refcount table unaligned", &[(48, 8, 0x10200)]),
    ("refcount table at the end", &[(48, 8, 0x7fff_ffff_ffff_0000)]),
    ("refcount table empty", &[(56, 4, 0)]),
    ("refcount table too large", &[(56, 4, 129)]),
    ("snapshots too many", &[(60, 4, 65537)]),
    ("snapshots unaligned", &[(64, 8, 1)]),
    ("snapshots negative", &[(64, 8, 1 << 63)]),
    ("subclusters", &[(72, 8, 16), (20, 4, 13)]),
    ("order of checks 1", &[(4, 4, 9), (20, 4, 99)]),
    ("order of checks 2", &[(20, 4, 99), (100, 4, 0)]),
    ("order of checks 3", &[(96, 4, 9), (72, 8, 1 << 20)]),
    ("order of checks 4", &[(96, 4, 9), (32, 4, 5)]),
    ("order of checks 5", &[(8, 8, 1 << 40), (104, 1, 7)]),
    ("order of checks 6", &[(104, 1, 7), (72, 8, 1 << 30)]),
    ("order of checks 7", &[(32, 4, 5), (56, 4, 0)]),
    ("order of checks 8", &[(60, 4, 100_000), (36, 4, 0)]),
    ("order of checks 9", &[(36, 4, 0), (40, 8, 1)]),
    ("order of checks 10", &[(32, 4, 2), (8, 8, 600), (16, 4, 3000)]),
    ("order of checks 11", &[(36, 4, 0), (8, 8, 600), (16, 4, 3000)]),
    ("order of checks 12", &[(72, 8, 16), (20, 4, 13), (96, 4, 9)]),
    ("order of checks 13", &[(24, 8, 1 << 62), (36, 4, u32::MAX as u64)]),
    ("extension too long", &[(EXTENSION + 4, 4, u32::MAX as u64)]),
    ("extension to the end", &[(EXTENSION + 4, 4, 65536 - 120)]),
    ("extension over the end", &[(EXTENSION + 4, 4, 65536 - 119)]),
    ("end marker too long", &[(EXTENSION, 4, 0), (EXTENSION + 4, 4, u32::MAX as u64)]),
    ("format too long", &[(EXTENSION, 4, 0xe279_2aca), (EXTENSION + 4, 4, 16)]),
    ("crypto unexpected", &[(EXTENSION, 4, 0x0537_be77), (EXTENSION + 4, 4, 16)]),
    ("crypto length", &[(32, 4, 2), (EXTENSION, 4, 0x0537_be77), (EXTENSION + 4, 4, 15)]),
    ("crypto offset", &[(32, 4, 2), (EXTENSION, 4, 0x0537_be77), (EXTENSION + 4, 4, 16)]),
    ("unknown extension", &[(EXTENSION, 4, 0x1234_5678)]),
    ("too long and unknown bit", &[(EXTENSION + 4, 4, u32::MAX as u64), (72, 8, 1 << 20)]),
    ("bitmaps length", &[(88, 8, 1), (EXTENSION, 4, 0x2385_2875), (EXTENSION + 4, 4, 23)]),
];

/// The bitmaps extension: count, reserved, directory size, directory offset.
const BITMAPS: &[(&str, u64, u64, u64, u64)] = &[
    ("no bitmaps", 0, 0, 32, 65536),
    ("too many bitmaps", 65536, 0, 32, 65536),
    ("reserved", 1, 1, 32, 65536),
    ("directory too large", 1, 0, 1 << 26, 65536),
    ("directory unaligned", 1, 0, 32, 65537),
    ("count and reserved", 1 << 20, 1, 1 << 50, 7),
    ("count and offset", 1 << 20, 0, 1 << 50, 7),
    ("offset and size", 1, 0, 1 << 50, 7),
];

#[test]
fn damaged_headers_are_refused_in_the_words_of_qemu() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let v3 = image(&CreateOptions::new(64 << 20));
    let v2 = image(&CreateOptions { version: Version::V2, ..CreateOptions::new(64 << 20) });
    let mut differences = Vec::new();
    for (name, pokes) in FIELDS {
        differences.extend(compare(dir.path(), name, &damaged(&v3, pokes)));
    }
    for (name, count, reserved, size, offset) in BITMAPS {
        let (e, kind) = (EXTENSION, 0x2385_2875);
        let pokes = [(88, 8, 1), (e, 4, kind), (e + 4, 4, 24), (e + 8, 4, *count), (e + 12, 4, *reserved)];
        let bytes =
            damaged(&damaged(&v3, &pokes), &[(e + 16, 8, *size), (e + 24, 8, *offset), (e + 32, 8, 0)]);
        differences.extend(compare(dir.path(), name, &bytes));
    }
    for len in [0, 3, 4, 50, 72, 100, 104, 111, 112, 200, 600] {
        differences.extend(compare(dir.path(), &format!("cut to {len}"), &v3[..len]));
        differences.extend(compare(dir.path(), &format!("version 2 cut to {len}"), &v2[..len]));
    }
    for (name, pokes) in FIELDS.iter().filter(|(_, pokes)| pokes.iter().all(|poke| poke.0 < 72)) {
        differences.extend(compare(dir.path(), &format!("version 2, {name}"), &damaged(&v2, pokes)));
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn a_changed_backing_file_is_read_by_qemu() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for version in [Version::V2, Version::V3] {
        for cluster_size in [512, 4096, 8192, 65536] {
            let (memory, view) = Memory::default().view();
            run(create(&view.cx(), &CreateOptions { version, cluster_size, ..CreateOptions::new(1 << 20) }))
                .unwrap();
            for (len, format) in [(20, "raw"), (200, "qcow2"), (7, "raw"), (300, "qcow2")] {
                let mut header = run(Header::read(&view.cx())).unwrap();
                let file = "n".repeat(len);
                header.set_backing_ref(Some(BackingRef { file: file.clone(), format: Some(format.into()) }));
                run(write_header(&view.cx(), &header)).unwrap();
                memory.save(&dir.path().join("image"));
                let (status, stdout, stderr) = qemu_img(dir.path(), &["info", "--output=json", "image"]);
                assert_eq!(status, 0, "{stderr}");
                assert!(stdout.contains(&format!("\"backing-filename\": \"{file}\"")), "{stdout}");
                assert!(stdout.contains(&format!("\"backing-filename-format\": \"{format}\"")), "{stdout}");
            }
            let mut header = run(Header::read(&view.cx())).unwrap();
            header.set_backing_ref(None);
            header.incompatible |= features::DIRTY;
            run(write_header(&view.cx(), &header)).unwrap();
            header.incompatible &= !features::DIRTY;
            run(write_features(&view.cx(), &header)).unwrap();
            memory.save(&dir.path().join("image"));
            let (status, stdout, _) = qemu_img(dir.path(), &["check", "image"]);
            assert!(status == 0 && stdout.starts_with("No errors"), "{stdout}");
        }
    }
}

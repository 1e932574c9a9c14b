//! Images made here equal those that qemu-img makes, byte for byte; and where it refuses, so do we, in its words.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Memory, have_qemu_img, qemu_img, run};
use underlay_graph::{BackingRef, Preallocation};
use underlay_qcow2::{Compression, CreateOptions, Version, create};

/// The `-o` argument for the same options.
fn arguments(o: &CreateOptions) -> String {
    let on = |b: bool| if b { "on" } else { "off" };
    format!(
        "compat={},cluster_size={},refcount_bits={},compression_type={},lazy_refcounts={},extended_l2={},preallocation={}",
        if o.version == Version::V2 { "0.10" } else { "1.1" },
        o.cluster_size,
        o.refcount_bits,
        o.compression.as_str(),
        on(o.lazy_refcounts),
        on(o.extended_l2),
        match o.preallocation {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        }
    )
}

fn compare(o: &CreateOptions) {
    let dir = tempfile::tempdir().unwrap();
    let options = arguments(o);
    let size = o.size.to_string();
    let mut line = vec!["create", "-q", "-f", "qcow2", "-u", "-o", &options];
    if let Some(backing) = &o.backing {
        line.extend(["-b", &backing.file]);
        if let Some(format) = &backing.format {
            line.extend(["-F", format]);
        }
    }
    line.extend(["theirs", &size]);
    let (status, _, stderr) = qemu_img(dir.path(), &line);
    let (memory, view) = Memory::default().view();
    let ours = run(create(&view.cx(), o));
    match ours {
        Err(error) => assert_eq!(format!("qemu-img: theirs: {error}\n"), stderr, "{line:?}"),
        Ok(()) => {
            assert_eq!((status, &*stderr), (0, ""), "{line:?}");
            let theirs = std::fs::read(dir.path().join("theirs")).unwrap();
            let ours = memory.to_vec();
            let differs = ours.iter().zip(&theirs).position(|(a, b)| a != b);
            assert!(
                ours.len() == theirs.len() && differs.is_none(),
                "{line:?}: lengths {:#x} {:#x}, first difference {differs:x?}",
                ours.len(),
                theirs.len()
            );
        }
    }
}

fn each(mut try_it: impl FnMut(CreateOptions)) {
    for cluster_bits in [9, 10, 12, 14, 16, 21] {
        for refcount_bits in [1, 8, 16, 64] {
            for preallocation in [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc] {
                for size in [0, 512, 1025 << 10, 6 << 20] {
                    try_it(CreateOptions {
                        cluster_size: 1 << cluster_bits,
                        refcount_bits,
                        preallocation,
                        ..CreateOptions::new(size)
                    });
                }
            }
        }
    }
}

#[test]
fn the_matrix_of_options_gives_the_same_bytes() {
    if !have_qemu_img() {
        return;
    }
    each(|o| compare(&o));
}

#[test]
fn features_and_backing_files_give_the_same_bytes() {
    if !have_qemu_img() {
        return;
    }
    let backing = |len, format: &str| Some(BackingRef { file: "b".repeat(len), format: Some(format.into()) });
    for version in [Version::V2, Version::V3] {
        for cluster_size in [512, 1024, 65536] {
            for b in
                [None, backing(5, "raw"), backing(300, "qcow2"), backing(800, "qcow2"), backing(1023, "raw")]
            {
                for extended_l2 in [false, true] {
                    for preallocation in [Preallocation::Off, Preallocation::Metadata, Preallocation::Full] {
                        compare(&CreateOptions {
                            version,
                            cluster_size,
                            backing: b.clone(),
                            extended_l2,
                            preallocation,
                            ..CreateOptions::new(1 << 20)
                        });
                    }
                }
            }
        }
    }
    for (lazy_refcounts, compression) in
        [(true, Compression::Zlib), (false, Compression::Zstd), (true, Compression::Zstd)]
    {
        for version in [Version::V2, Version::V3] {
            compare(&CreateOptions { version, lazy_refcounts, compression, ..CreateOptions::new(1 << 30) });
        }
    }
}

#[test]
fn large_tables_give_the_same_bytes() {
    if !have_qemu_img() {
        return;
    }
    let with = |cluster_size, refcount_bits, preallocation, size| {
        compare(&CreateOptions { cluster_size, refcount_bits, preallocation, ..CreateOptions::new(size) });
    };
    with(512, 64, Preallocation::Off, 8 << 30);
    with(512, 16, Preallocation::Off, 8 << 30);
    with(512, 64, Preallocation::Metadata, 9 << 20);
    with(512, 16, Preallocation::Metadata, 20 << 20);
    with(512, 64, Preallocation::Falloc, 9 << 20);
    with(1024, 64, Preallocation::Falloc, 40 << 20);
    with(512, 16, Preallocation::Off, 253 << 29);
}

#[test]
fn refusals_are_worded_as_qemu_does() {
    if !have_qemu_img() {
        return;
    }
    let sizes = [0, 3, 256, 1000, 4 << 20];
    for cluster_size in sizes {
        compare(&CreateOptions { cluster_size, ..CreateOptions::new(1 << 20) });
    }
    for refcount_bits in [0, 7, 128] {
        compare(&CreateOptions { refcount_bits, ..CreateOptions::new(1 << 20) });
    }
    let v2 = CreateOptions { version: Version::V2, ..CreateOptions::new(1 << 20) };
    compare(&CreateOptions { refcount_bits: 8, ..v2.clone() });
    compare(&CreateOptions { lazy_refcounts: true, refcount_bits: 7, ..v2.clone() });
    compare(&CreateOptions { extended_l2: true, cluster_size: 8192, ..v2.clone() });
    compare(&CreateOptions { compression: Compression::Zstd, refcount_bits: 8, ..v2 });
    compare(&CreateOptions { extended_l2: true, cluster_size: 8192, ..CreateOptions::new(1 << 20) });
    compare(&CreateOptions { cluster_size: 512, ..CreateOptions::new(1 << 40) });
    compare(&CreateOptions::new(1 << 62));
}

/// What was in a file that is kept does not show in the new image: but for the rest of the file it is the same as in an
/// empty one.
#[test]
fn a_file_that_keeps_its_space_gives_the_same_image() {
    for (preallocation, before) in [
        (Preallocation::Off, 1 << 20),
        (Preallocation::Off, 1000),
        (Preallocation::Metadata, 100 << 10),
        (Preallocation::Falloc, 3 << 20),
        (Preallocation::Full, 1 << 20),
    ] {
        let options = CreateOptions {
            preallocation,
            cluster_size: 4096,
            keep_space: true,
            ..CreateOptions::new(2 << 20)
        };
        let (empty, view) = Memory::default().view();
        run(create(&view.cx(), &options)).unwrap();
        let (kept, view) = Memory::from_bytes(&vec![0xaa; before]).view();
        run(create(&view.cx(), &options)).unwrap();
        let (empty, kept) = (empty.to_vec(), kept.to_vec());
        assert_eq!(kept.len(), before.max(empty.len()));
        assert!(kept[..empty.len()] == empty, "{preallocation:?} over {before} bytes");
    }
}

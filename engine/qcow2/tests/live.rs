//! The same requests through qemu-io and through the live path: the images must be the same, byte by byte where the
//! order of allocation is the same, and in what the guest reads always.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Memory, have_qemu_img, qemu_img, qemu_io, run};
use underlay_graph::perm::Access;
use underlay_graph::{ByteRange, Node, Perms, Role, View, WriteFlags, ZeroFlags};
use underlay_qcow2::{OpenOptions, Qcow2};
use underlay_sys::Iov;

#[derive(Clone, Copy, Debug)]
enum Op {
    Write(u8, u64, u64),
    Zero(u64, u64),
    Unmap(u64, u64),
    Discard(u64, u64),
    Compressed(u8, u64, u64),
}

impl Op {
    fn command(self) -> String {
        match self {
            Op::Write(byte, at, len) => format!("write -q -P {byte} {at} {len}"),
            Op::Zero(at, len) => format!("write -q -z {at} {len}"),
            Op::Unmap(at, len) => format!("write -q -z -u {at} {len}"),
            Op::Discard(at, len) => format!("discard -q {at} {len}"),
            Op::Compressed(byte, at, len) => format!("write -q -c -P {byte} {at} {len}"),
        }
    }

    fn run(self, view: &View) {
        let cx = view.cx();
        let range = |at, len| ByteRange::new(at, len).unwrap();
        let buffer = |byte, len| Iov::filled(usize::try_from(len).unwrap(), byte);
        match self {
            Op::Write(byte, at, len) => {
                run(cx.write(range(at, len), buffer(byte, len), WriteFlags::default()))
            }
            Op::Compressed(byte, at, len) => {
                run(cx.write(range(at, len), buffer(byte, len), WriteFlags { compressed: true }))
            }
            Op::Zero(at, len) => run(cx.write_zeroes(range(at, len), ZeroFlags::default())),
            Op::Unmap(at, len) => {
                run(cx.write_zeroes(range(at, len), ZeroFlags { may_unmap: true, no_fallback: false }))
            }
            Op::Discard(at, len) => run(cx.discard(range(at, len))),
        }
        .unwrap_or_else(|error| panic!("{self:?}: {error}"));
    }
}

fn open(disk: Memory, base: Option<Memory>) -> (Arc<Memory>, Arc<Qcow2>, Arc<View>) {
    let (disk, file) = disk.view();
    let image = Arc::new(run(Qcow2::open(&file.cx(), OpenOptions::default())).unwrap());
    let backing = base.map(|base| (Role::Backing, base.view().1));
    let view = View::detached(image.clone(), [(Role::File, file)].into_iter().chain(backing));
    let access = Access { writable: true, required: Perms::ALL, shared: Perms::ALL, used: true };
    run(image.set_access(&view.cx(), access)).unwrap();
    (disk, image, view)
}

struct Case<'a> {
    options: &'a str,
    size: u64,
    backing: bool,
    same_bytes: bool,
}

/// Runs `ops` on both sides and compares.
fn compare(dir: &Path, case: &Case<'_>, ops: &[Op]) {
    let base: Vec<u8> = (0..case.size / 2).map(|i| u8::try_from(i / 512 % 251).unwrap()).collect();
    std::fs::write(dir.join("base"), &base).unwrap();
    let size = case.size.to_string();
    let mut create = vec!["create", "-q", "-f", "qcow2"];
    if case.backing {
        create.extend(["-b", "base", "-F", "raw"]);
    }
    if !case.options.is_empty() {
        create.extend(["-o", case.options]);
    }
    create.extend(["theirs", &size]);
    assert_eq!(qemu_img(dir, &create).0, 0, "{create:?}");
    let (disk, image, view) =
        open(Memory::load(&dir.join("theirs")), case.backing.then(|| Memory::from_bytes(&base)));
    ops.iter().for_each(|op| op.run(&view));
    let read = Iov::scratch(usize::try_from(case.size).unwrap());
    run(view.cx().read(ByteRange::new(0, case.size).unwrap(), read.clone())).unwrap();
    run(image.close(&view.cx())).unwrap();
    disk.save(&dir.join("ours"));

    let commands: Vec<String> = ops.iter().map(|op| op.command()).collect();
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    for group in commands.chunks(100) {
        qemu_io(dir, "theirs", group);
    }
    let (status, out, err) = qemu_img(dir, &["check", "ours"]);
    assert_eq!(status, 0, "{}: {out}{err}", case.options);
    let (status, out, err) = qemu_img(dir, &["compare", "ours", "theirs"]);
    assert_eq!(status, 0, "{}: {out}{err}", case.options);
    assert_eq!(qemu_img(dir, &["convert", "-O", "raw", "theirs", "raw"]).0, 0);
    assert!(std::fs::read(dir.join("raw")).unwrap() == read.to_vec(), "{}: our own reading", case.options);
    // We read what they wrote.
    let (_, _, view) =
        open(Memory::load(&dir.join("theirs")), case.backing.then(|| Memory::from_bytes(&base)));
    let again = Iov::scratch(read.len());
    run(view.cx().read(ByteRange::new(0, case.size).unwrap(), again.clone())).unwrap();
    assert!(again.to_vec() == read.to_vec(), "{}: their image read by us", case.options);
    if case.same_bytes {
        let mut ours = std::fs::read(dir.join("ours")).unwrap();
        let mut theirs = std::fs::read(dir.join("theirs")).unwrap();
        let len = ours.len().max(theirs.len());
        ours.resize(len, 0);
        theirs.resize(len, 0);
        let different = ours.iter().zip(&theirs).position(|(a, b)| a != b);
        assert_eq!(different, None, "{}: first difference", case.options);
    }
}

#[test]
fn sequential_and_scattered_writes_give_the_same_image() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for bits in [9u32, 12, 16, 21] {
        let cluster = 1u64 << bits;
        let options = format!("cluster_size={cluster}");
        let size = (cluster * 300).min(16 << 20);
        let case = |backing| Case { options: &options, size, backing, same_bytes: true };
        let sequential: Vec<Op> = (0..size / cluster)
            .map(|i| Op::Write(u8::try_from(i % 250 + 1).unwrap(), i * cluster, cluster))
            .collect();
        compare(dir.path(), &case(false), &sequential);
        let scattered: Vec<Op> = (0..150u64.min(size / cluster * 2))
            .map(|i| {
                let at = i * 7919 * 512 % (size - 3 * cluster);
                Op::Write(u8::try_from(i % 250 + 1).unwrap(), at, 1 + i * 37 % (2 * cluster.min(65536)))
            })
            .collect();
        compare(dir.path(), &case(false), &scattered);
        compare(dir.path(), &case(bits > 9), &scattered);
    }
}

#[test]
fn zeroes_discards_and_compressed_clusters_give_the_same_image() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let c = 65536u64;
    // Without what gives clusters free: QEMU uses them again at once, we only when that cannot hurt.
    let ops = [
        Op::Write(1, 0, 6 * c),
        Op::Zero(0, c),
        Op::Zero(2 * c, 4096),
        Op::Zero(8 * c + 100, 4096),
        Op::Write(2, 100, 300),
        Op::Write(4, 8 * c + 70, 1),
        Op::Zero(9 * c, 2 * c),
        Op::Zero(12 * c + 1, 3 * c),
    ];
    for options in ["", "extended_l2=on", "compat=0.10", "refcount_bits=1", "refcount_bits=64"] {
        for backing in [false, true] {
            let same_bytes = options != "compat=0.10";
            let case = Case { options, size: 4 << 20, backing, same_bytes };
            compare(dir.path(), &case, &ops);
        }
    }
    let packed: Vec<Op> =
        (0..20u64).map(|i| Op::Compressed(u8::try_from(i + 1).unwrap(), i * c, c)).collect();
    for options in ["", "compression_type=zstd", "cluster_size=4096", "refcount_bits=1", "refcount_bits=2"] {
        let case = Case { options, size: 4 << 20, backing: false, same_bytes: false };
        let mut ops = packed.clone();
        ops.push(Op::Write(77, 3 * c + 5, 100));
        ops.push(Op::Compressed(78, 30 * c, c));
        compare(dir.path(), &case, &ops);
    }
}

#[test]
fn random_requests_read_the_same() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut state = 88172645463325252u64;
    let mut random = |end: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % end
    };
    let all = [
        "cluster_size=512",
        "cluster_size=4096,refcount_bits=8",
        "extended_l2=on,cluster_size=16384",
        "compat=0.10",
        "",
        "extended_l2=on,lazy_refcounts=on",
    ];
    for options in all {
        let size = if options == "cluster_size=512" { 256 << 10 } else { 3 << 20 } + 512;
        let mut ops = Vec::new();
        for i in 0..120u64 {
            let at = random(size);
            let len = 1 + random((size - at).min(200_000));
            ops.push(match random(8) {
                0 => Op::Zero(at, len),
                1 => Op::Unmap(at, len),
                2 => Op::Discard(at / 512 * 512, len.next_multiple_of(512).min(size - at / 512 * 512)),
                _ => Op::Write(u8::try_from(i + 1).unwrap(), at, len),
            });
        }
        compare(
            dir.path(),
            &Case { options, size, backing: options != "cluster_size=512", same_bytes: false },
            &ops,
        );
    }
}

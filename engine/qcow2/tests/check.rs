//! The same findings, in the same order and words, as `qemu-img check` has on damaged images; and repairs that leave
//! the image as consistent as its do.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::fmt::Write as _;
use std::path::Path;

use common::{Memory, have_qemu_img, qemu_img, qemu_io, run};
use underlay_graph::Preallocation;
use underlay_qcow2::{CheckError, CreateOptions, Finding, Fix, Outcome, check, create};

const COPIED: u64 = 1 << 63;
const FAR: u64 = 1 << 40;

/// An image in memory with the places of its parts, for damaging it.
#[derive(Clone)]
struct Image {
    bytes: Vec<u8>,
}

impl Image {
    fn load(dir: &Path, name: &str) -> Self {
        Self { bytes: std::fs::read(dir.join(name)).unwrap() }
    }
    fn quad(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.bytes[at as usize..at as usize + 8].try_into().unwrap())
    }
    fn put(mut self, at: u64, value: u64) -> Self {
        self.bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
        self
    }
    fn put32(mut self, at: u64, value: u32) -> Self {
        self.bytes[at as usize..at as usize + 4].copy_from_slice(&value.to_be_bytes());
        self
    }
    fn put16(mut self, at: u64, value: u16) -> Self {
        self.bytes[at as usize..at as usize + 2].copy_from_slice(&value.to_be_bytes());
        self
    }
    fn cut(mut self, len: usize) -> Self {
        self.bytes.truncate(len);
        self
    }
    fn cluster(&self) -> u64 {
        1 << (self.quad(16) & 0xff)
    }
    fn l1(&self) -> u64 {
        self.quad(40)
    }
    fn l2(&self, i: u64) -> u64 {
        self.quad(self.l1() + 8 * i) & 0x00ff_ffff_ffff_fe00
    }
    fn table(&self) -> u64 {
        self.quad(48)
    }
    fn block(&self) -> u64 {
        self.quad(self.table())
    }
    fn snapshots(&self) -> u64 {
        self.quad(64)
    }
    /// Where the refcount of the cluster at `offset` is, with 16-bit refcounts.
    fn count(&self, offset: u64) -> u64 {
        self.block() + offset / self.cluster() * 2
    }
}

/// What `qemu-img check` would print.
struct Printed {
    status: i32,
    stderr: String,
    stdout: String,
}

fn ours_once(
    file: &std::sync::Arc<underlay_graph::View>,
    fix: Fix,
    stderr: &mut String,
) -> Result<Outcome, CheckError> {
    let mut report = |finding| {
        let _ = match finding {
            Finding::Line(line) => writeln!(stderr, "{line}"),
            Finding::Error(line) => writeln!(stderr, "qemu-img: {line}"),
        };
    };
    run(check(&file.cx(), fix, &mut report))
}

fn ours(image: &Image, fix: Fix) -> (Printed, Vec<u8>) {
    let (memory, view) = Memory::from_bytes(&image.bytes).view();
    let (mut stderr, mut stdout) = (String::new(), String::new());
    let mut result = ours_once(&view, fix, &mut stderr);
    if let Ok(done) = &result
        && done.leaks_fixed + done.corruptions_fixed > 0
    {
        write!(
            stdout,
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
             Double checking the fixed image now...\n",
            done.leaks_fixed, done.corruptions_fixed
        )
        .unwrap();
        result = ours_once(&view, Fix::None, &mut stderr);
    }
    let status = match result {
        Ok(outcome) => summary(&outcome, &mut stdout, &mut stderr),
        Err(CheckError::Failed(error)) => {
            writeln!(stderr, "qemu-img: Check failed: {error}").unwrap();
            1
        }
        Err(error) => {
            writeln!(stderr, "qemu-img: Could not open 'image': {error}").unwrap();
            1
        }
    };
    (Printed { status, stderr, stdout }, memory.to_vec())
}

fn summary(o: &Outcome, stdout: &mut String, stderr: &mut String) -> i32 {
    if o.corruptions + o.leaks + o.check_errors == 0 {
        stdout.push_str("No errors were found on the image.\n");
    }
    if o.corruptions > 0 {
        write!(
            stdout,
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n",
            o.corruptions
        )
        .unwrap();
    }
    if o.leaks > 0 {
        write!(
            stdout,
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
            o.leaks
        )
        .unwrap();
    }
    if o.check_errors > 0 {
        write!(stdout, "\n{} internal errors have occurred during the check.\n", o.check_errors).unwrap();
        stderr.push_str("qemu-img: Check failed\n");
    }
    if o.total_clusters != 0 && o.allocated_clusters != 0 {
        let percent = |part: u64, all: u64| part as f64 * 100.0 / all as f64;
        writeln!(
            stdout,
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            o.allocated_clusters,
            o.total_clusters,
            percent(o.allocated_clusters, o.total_clusters),
            percent(o.fragmented_clusters, o.allocated_clusters),
            percent(o.compressed_clusters, o.allocated_clusters)
        )
        .unwrap();
    }
    writeln!(stdout, "Image end offset: {}", o.image_end_offset).unwrap();
    match o {
        _ if o.check_errors > 0 => 1,
        _ if o.corruptions > 0 => 2,
        _ if o.leaks > 0 => 3,
        _ => 0,
    }
}

fn theirs(dir: &Path, image: &Image, fix: Fix) -> Printed {
    std::fs::write(dir.join("image"), &image.bytes).unwrap();
    let mut line = vec!["check", "-f", "qcow2"];
    match fix {
        Fix::None => {}
        Fix::Leaks => line.extend(["-r", "leaks"]),
        Fix::All => line.extend(["-r", "all"]),
    }
    line.push("image");
    let (status, stdout, stderr) = qemu_img(dir, &line);
    Printed { status, stderr, stdout }
}

/// Compares some modes of check. (Not all where QEMU grows the file up to where a stray pointer points, fails half-way,
/// or complains about something else on closing the image.)
fn compare_modes(dir: &Path, name: &str, image: &Image, modes: &[Fix]) -> Vec<String> {
    let mut differences = Vec::new();
    for &fix in modes {
        let theirs = theirs(dir, image, fix);
        let (ours, repaired) = ours(image, fix);
        if (ours.status, &ours.stderr, &ours.stdout) != (theirs.status, &theirs.stderr, &theirs.stdout) {
            differences.push(format!(
                "=== {name}, {fix:?}\n--- theirs: {}\n{}{}--- ours: {}\n{}{}",
                theirs.status, theirs.stderr, theirs.stdout, ours.status, ours.stderr, ours.stdout
            ));
        }
        if fix != Fix::None && ours.status == 0 {
            std::fs::write(dir.join("image"), &repaired).unwrap();
            let (status, _, stderr) = qemu_img(dir, &["check", "-f", "qcow2", "image"]);
            if status != 0 {
                differences.push(format!("=== {name}, {fix:?}: our repair leaves\n{stderr}"));
            }
        }
    }
    differences
}

const ALL: [Fix; 3] = [Fix::None, Fix::Leaks, Fix::All];
const READ_ONLY: [Fix; 1] = [Fix::None];
const SMALL: [Fix; 2] = [Fix::None, Fix::Leaks];

fn make_images(dir: &Path) {
    let create = |name: &str, options: &str| {
        assert_eq!(qemu_img(dir, &["create", "-q", "-f", "qcow2", "-o", options, name, "8M"]).0, 0);
    };
    create("base", "cluster_size=4k");
    qemu_io(dir, "base", &["write -P 1 0 64k", "write -P 2 2M 16k", "write -P 3 6M 8k", "write -z 100k 8k"]);
    create("packed", "cluster_size=4k");
    let packed =
        ["write -c -P 1 0 64k", "write -c -P 2 2M 16k", "write -P 3 6M 8k", "write -c -P 4 6208k 32k"];
    qemu_io(dir, "packed", &packed);
    std::fs::copy(dir.join("base"), dir.join("snap")).unwrap();
    assert_eq!(qemu_img(dir, &["snapshot", "-c", "one", "snap"]).0, 0);
    qemu_io(dir, "snap", &["write -P 4 0 32k"]);
    assert_eq!(qemu_img(dir, &["snapshot", "-c", "two", "snap"]).0, 0);
    qemu_io(dir, "snap", &["write -P 5 16k 32k"]);
    std::fs::copy(dir.join("base"), dir.join("bitmaps")).unwrap();
    assert_eq!(qemu_img(dir, &["bitmap", "--add", "bitmaps", "b0"]).0, 0);
    assert_eq!(qemu_img(dir, &["bitmap", "--add", "-g", "64k", "bitmaps", "bitmap1"]).0, 0);
    qemu_io(dir, "bitmaps", &["write 1M 64k"]);
    create("extended", "cluster_size=16k,extended_l2=on");
    qemu_io(dir, "extended", &["write -P 1 0 64k", "write -P 2 2M 5k", "write -z 6M 8k"]);
    create("narrow", "cluster_size=4k,refcount_bits=1");
    qemu_io(dir, "narrow", &["write 0 64k"]);
    create("wide", "cluster_size=512,refcount_bits=64");
    qemu_io(dir, "wide", &["write 0 1M"]);
    create("old", "compat=0.10,cluster_size=1k");
    qemu_io(dir, "old", &["write 0 1M", "write 5M 1M"]);
    create("default", "lazy_refcounts=on");
    qemu_io(dir, "default", &["write 1M 3M"]);
}

fn cases(dir: &Path) -> Vec<(&'static str, Image, &'static [Fix])> {
    let load = |name| Image::load(dir, name);
    let mut all: Vec<(&'static str, Image, &'static [Fix])> = Vec::new();
    for name in ["base", "packed", "snap", "bitmaps", "extended", "narrow", "wide", "old", "default"] {
        all.push((name, load(name), &ALL));
    }
    let b = load("base");
    let l2 = b.l2(0);
    let first = b.quad(l2);
    let len = b.bytes.len() as u64;
    let mut add = |name, image: Image, modes| all.push((name, image, modes));
    add("leak behind the end", b.clone().put16(b.count(400 * 4096), 1), &ALL);
    add("too high", b.clone().put16(b.count(0x6000), 2), &ALL);
    add("zero", b.clone().put16(b.count(0x6000), 0), &ALL);
    add("zero of an L2 table", b.clone().put16(b.count(l2), 0), &ALL);
    add("too high of an L2 table", b.clone().put16(b.count(l2), 2), &ALL);
    add("zero of the header", b.clone().put16(b.count(0), 0), &ALL);
    add("zero of the block", b.clone().put16(b.count(b.block()), 0), &ALL);
    add("too high of the block", b.clone().put16(b.count(b.block()), 2), &ALL);
    add("zero of the table", b.clone().put16(b.count(b.table()), 0), &ALL);
    add("mixed", b.clone().put16(b.count(0x6000), 0).put16(b.count(0x7000), 5), &ALL);
    add("flag missing", b.clone().put(l2, first & !COPIED), &ALL);
    add("L2 flag missing", b.clone().put(b.l1(), l2), &ALL);
    add("many flags missing", b.clone().put(b.l1(), l2).put(l2, 0x5000).put(l2 + 8, 0x6000), &ALL);
    add("zero cluster with flag", b.clone().put(l2 + 200, COPIED | 1), &ALL);
    add("unaligned", b.clone().put(l2 + 8, first | 512), &ALL);
    add(
        "two unaligned",
        b.clone().put(l2 + 8, (first + 4096) | 1024).put(l2 + 16, (first + 8192) | 2048),
        &ALL,
    );
    add("twice", b.clone().put(l2 + 8, first), &ALL);
    add("far", b.clone().put(l2 + 8, COPIED | FAR), &ALL);
    add("very far", b.clone().put(l2 + 8, COPIED | ((1 << 56) - 4096)), &ALL);
    add("at the end", b.clone().put(l2 + 8, COPIED | len), &ALL);
    add("on the L1 table", b.clone().put(l2 + 8, COPIED | b.l1()), &ALL);
    add("on the header", b.clone().put(l2 + 8, COPIED), &ALL);
    add("reserved bits", b.clone().put(l2 + 8, (first + 4096) | 2), &ALL);
    add("reserved high bits", b.clone().put(l2 + 8, (first + 4096) | 1 << 57), &ALL);
    add("L1 unaligned", b.clone().put(b.l1(), COPIED | l2 | 512), &SMALL);
    add("L1 reserved bits", b.clone().put(b.l1(), COPIED | l2 | 1), &ALL);
    add("L1 reserved high bits", b.clone().put(b.l1(), COPIED | l2 | 1 << 57), &ALL);
    add("L1 far", b.clone().put(b.l1(), COPIED | FAR), &ALL);
    add("L1 very far", b.clone().put(b.l1(), COPIED | ((1 << 56) - 4096)), &ALL);
    add("L1 twice", b.clone().put(b.l1() + 8, COPIED | l2), &ALL);
    add("L1 to the refcount table", b.clone().put(b.l1(), COPIED | b.table()), &ALL);
    add("L1 at the end", b.clone().put(b.l1() + 8, COPIED | len), &ALL);
    add("L1 only a flag", b.clone().put(b.l1() + 16, COPIED), &ALL);
    add("L1 table far", b.clone().put(40, FAR), &ALL);
    add("L1 table on the header", b.clone().put(40, 0), &ALL);
    add("block unaligned", b.clone().put(b.table(), b.block() | 512), &SMALL);
    add("block reserved bits", b.clone().put(b.table(), b.block() | 1), &SMALL);
    add("block far", b.clone().put(b.table(), FAR), &SMALL);
    add("second block far", b.clone().put(b.table() + 8, FAR), &SMALL);
    add("second block unaligned", b.clone().put(b.table() + 8, 0x1200), &ALL);
    add("second block on the table", b.clone().put(b.table() + 8, b.table()), &ALL);
    add("second block is the first", b.clone().put(b.table() + 8, b.block()), &ALL);
    add("no block", b.clone().put(b.table(), 0), &ALL);
    add("second block on data", b.clone().put(b.table() + 8, 0x1c000), &ALL);
    add("last block at the end", b.clone().put(b.table() + 4088, len), &SMALL);
    add("refcount table far", b.clone().put(48, FAR), &ALL);
    add("refcount table on the header", b.clone().put(48, 0), &SMALL);
    add("refcount table too long", b.clone().put32(56, 2), &SMALL);
    for len in [0x1c000, 0x1b800, 0x1a000, 0x1cc00] {
        add("cut off", b.clone().cut(len), &ALL);
    }
    add("zero cluster on data", b.clone().put(l2 + 160, COPIED | 0x1c001), &ALL);
    add("zero cluster without flag", b.clone().put(l2, 0x5001), &ALL);
    add("zero cluster unaligned", b.clone().put(l2, COPIED | 0x5201), &ALL);
    add("dirty", b.clone().put(72, 1), &ALL);
    add("dirty and wrong", b.clone().put(72, 1).put16(b.count(0x6000), 2), &ALL);
    add("corrupt", b.clone().put(72, 2), &ALL);
    add("table shared", b.clone().put(b.l1() + 8, COPIED | l2).put16(b.count(l2), 2), &ALL);
    add("packed with flag", b.clone().put(l2, 3 << 62 | 0x5000), &ALL);
    add("packed far", b.clone().put(l2, 1 << 62 | FAR), &ALL);
    add("packed across the end", b.clone().put(l2, 1 << 62 | 7 << 58 | 0x1cf00), &ALL);
    add("snapshot table far", b.clone().put32(60, 1).put(64, FAR), &READ_ONLY);
    let s = load("snap");
    let table = s.quad(s.snapshots());
    add("snapshot far", s.clone().put(s.snapshots(), FAR), &ALL);
    add("snapshot unaligned", s.clone().put(s.snapshots(), table + 512), &ALL);
    add("snapshot too large", s.clone().put32(s.snapshots() + 8, 0xff_ffff), &ALL);
    add("snapshot entry far", s.clone().put(table, FAR), &ALL);
    add("snapshot entry flag", s.clone().put(table, s.quad(table) ^ COPIED), &ALL);
    add("snapshot table zero", s.clone().put16(s.count(table), 0), &ALL);
    add("snapshot list zero", s.clone().put16(s.count(s.snapshots()), 0), &ALL);
    add("snapshot data", s.clone().put16(s.count(0x5000), 7), &ALL);
    add("snapshot list far", s.clone().put(64, FAR), &READ_ONLY);
    add("snapshot extra", s.clone().put32(s.snapshots() + 36, 2000), &SMALL);
    add("snapshot id", s.clone().put16(s.snapshots() + 12, 60000), &READ_ONLY);
    let m = load("bitmaps");
    let ext = m.bytes.windows(4).position(|w| w == [0x23, 0x85, 0x28, 0x75]).unwrap() as u64;
    let directory = m.quad(ext + 24);
    let table = m.quad(directory);
    add("bitmap table zero", m.clone().put16(m.count(table), 0), &[Fix::None, Fix::All]);
    add("bitmap directory zero", m.clone().put16(m.count(directory), 0), &[Fix::None, Fix::All]);
    add("bitmap far", m.clone().put(directory, FAR), &SMALL[..1]);
    add("bitmap unaligned", m.clone().put(directory, table + 512), &READ_ONLY);
    add("bitmap huge", m.clone().put32(directory + 8, u32::MAX), &READ_ONLY);
    add("bitmap reserved", m.clone().put(table, m.quad(table) | 2), &READ_ONLY);
    add("bitmap data far", m.clone().put(table, FAR), &READ_ONLY);
    add("bitmap data unaligned", m.clone().put(table, m.quad(table) | 512), &READ_ONLY);
    add("bitmap unknown flag", m.clone().put32(directory + 12, 8), &READ_ONLY);
    add("bitmap count", m.clone().put32(ext + 8, 5), &READ_ONLY);
    add("bitmap directory length", m.clone().put(ext + 16, m.quad(ext + 16) + 8), &READ_ONLY);
    add(
        "everything",
        m.clone().put(m.l1() + 8, FAR).put(table, FAR + 4096).put(m.table() + 8, FAR + 8192),
        &READ_ONLY,
    );
    let e = load("extended");
    let l2 = e.l2(0);
    let first = e.quad(l2);
    add("both data and zero", e.clone().put(l2 + 8, u64::MAX), &ALL);
    add("data without place", e.clone().put(l2, 0), &ALL);
    add("extended zero bit", e.clone().put(l2, first | 1), &ALL);
    add("extended packed", e.clone().put(l2, 1 << 62 | 0x14000), &ALL);
    add("extended packed with flag", e.clone().put(l2, 3 << 62 | 0x14000), &ALL);
    add("extended unaligned", e.clone().put(l2, COPIED | 0x14200), &ALL);
    add("extended unaligned, no data", e.clone().put(l2, COPIED | 0x14200).put(l2 + 8, 0), &ALL);
    let n = load("narrow");
    let l2 = n.l2(0);
    add("overflow", n.clone().put(l2 + 8, n.quad(l2)).put(l2 + 16, n.quad(l2)), &ALL);
    add(
        "narrow zero",
        {
            let mut i = n.clone();
            let at = i.block() as usize;
            i.bytes[at] = 0xfe;
            i
        },
        &ALL,
    );
    let w = load("wide");
    add("wide", w.clone().put(w.block() + 80, 1 << 33).put(w.block() + 88, 0), &ALL);
    all
}

#[test]
fn findings_and_repairs_are_those_of_qemu_img() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    make_images(dir.path());
    let differences: Vec<String> = cases(dir.path())
        .iter()
        .flat_map(|(name, image, modes)| compare_modes(dir.path(), name, image, modes))
        .collect();
    assert!(differences.is_empty(), "{} differ:\n{}", differences.len(), differences.join("\n"));
}

/// Pokes values like those of tables into tables.
fn random_damage(image: &mut Image, seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = |end: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % end
    };
    let tables = [image.l1(), image.l2(0), image.table(), image.block()];
    let clusters = image.bytes.len() as u64 / image.cluster();
    for _ in 0..1 + next(5) {
        let at = tables[next(4) as usize] + 8 * next(24);
        let target = next(clusters + 2) * image.cluster();
        let value = match next(8) {
            0 => 0,
            1 => COPIED,
            2 => COPIED | target | 1 << next(12),
            3 => target,
            4 => 1 << 62 | next(image.bytes.len() as u64) | next(8) << 58,
            5 => next(1 << 20) << 44 | next(1 << 20),
            6 => target | 1,
            _ => COPIED | target,
        };
        // (A refcount table entry with bit 9 to 11 set would have QEMU mark the image as corrupt on the way.)
        let is_table = (image.table()..image.table() + image.cluster()).contains(&at);
        let value = if is_table { value & !0xe00 } else { value };
        *image = image.clone().put(at, value);
    }
}

#[test]
fn findings_on_random_damage_are_those_of_qemu_img() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    make_images(dir.path());
    let seeds: u64 = std::env::var("UNDERLAY_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    let mut differences = Vec::new();
    for seed in 0..seeds {
        let name = ["base", "packed", "snap", "bitmaps"][(seed % 4) as usize];
        let mut image = Image::load(dir.path(), name);
        random_damage(&mut image, seed + 1);
        differences.extend(compare_modes(dir.path(), &format!("{name}, seed {seed}"), &image, &READ_ONLY));
    }
    assert!(differences.is_empty(), "{} differ:\n{}", differences.len(), differences.join("\n"));
}

#[test]
fn four_million_names_for_one_table_cost_one_walk() {
    let (memory, view) = Memory::default().view();
    run(create(
        &view.cx(),
        &CreateOptions { preallocation: Preallocation::Metadata, ..CreateOptions::new(256 << 20) },
    ))
    .unwrap();
    let mut image = Image { bytes: memory.to_vec() };
    let entry = image.quad(image.l1());
    let at = (image.bytes.len() as u64).next_multiple_of(65536);
    let entries: u32 = 4 << 20;
    image.bytes.resize(at as usize, 0);
    image.bytes.extend(entry.to_be_bytes().repeat(entries as usize));
    let image = image.put32(36, entries).put(40, at);
    let (_, view) = Memory::from_bytes(&image.bytes).view();
    let mut lines = 0;
    let outcome = run(check(&view.cx(), Fix::None, &mut |_| lines += 1)).unwrap();
    // The table's count overflows time and again, those of its clusters once; then none of them is right on disk, and
    // the new L1 table's 512 clusters are not counted there.
    let overflows = u64::from(entries) - 65535 + 4096;
    assert_eq!(outcome.corruptions, overflows + 1 + 4096 + 512);
    assert_eq!(outcome.corruptions, lines - outcome.leaks);
    assert_eq!(outcome.allocated_clusters, 4096 * u64::from(entries));
}

/// New refcounts do not go where tables were that the file ends before.
#[test]
fn what_is_behind_the_end_stays_free() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    make_images(dir.path());
    let mut rebuilt = 0;
    for name in ["base", "snap", "wide", "old"] {
        let image = Image::load(dir.path(), name);
        let (l1, entries) = (image.l1() as usize, image.quad(32) as u32 as usize);
        for cut in (600..image.bytes.len().min(1 << 17)).step_by(3001) {
            let mut damaged = image.clone();
            damaged.bytes.truncate(cut);
            let mut left = damaged.bytes.clone();
            left.resize(left.len().max(l1 + entries * 8), 0);
            let (_, mut repaired) = ours(&damaged, Fix::All);
            rebuilt += usize::from(repaired[48..60] != damaged.bytes[48..60]);
            repaired.resize(repaired.len().max(left.len()), 0);
            // A flag may be repaired.
            let offset = |word: &[u8]| u64::from_be_bytes(word.try_into().unwrap()) & !COPIED;
            let table =
                |bytes: &[u8]| bytes[l1..l1 + entries * 8].chunks(8).map(offset).collect::<Vec<u64>>();
            assert_eq!(table(&repaired), table(&left), "{name} cut off at {cut}");
        }
    }
    assert!(rebuilt > 10, "{rebuilt}");
}

//! Growing and shrinking: sizes, contents, and images that `qemu-img check` has nothing to say about.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::sync::Arc;

use common::{Memory, have_qemu_img, qemu_img, qemu_io, run};
use underlay_graph::perm::Access;
use underlay_graph::{BackingRef, ByteRange, Node, Perms, Preallocation, Role, View, WriteFlags};
use underlay_qcow2::resize::trim_file;
use underlay_qcow2::{CreateOptions, Fix, OpenOptions, Qcow2, Version, check, create};
use underlay_sys::Iov;

struct Disk {
    memory: Arc<Memory>,
    file: Arc<View>,
    view: Arc<View>,
}

impl Disk {
    fn new(options: &CreateOptions, base: Option<&[u8]>) -> Self {
        let (memory, file) = Memory::default().view();
        run(create(&file.cx(), options)).unwrap();
        Self::open(memory, file, base)
    }

    fn open(memory: Arc<Memory>, file: Arc<View>, base: Option<&[u8]>) -> Self {
        let image = Arc::new(run(Qcow2::open(&file.cx(), OpenOptions::default())).unwrap());
        let backing = base.map(|bytes| (Role::Backing, Memory::from_bytes(bytes).view().1));
        let view = View::detached(image.clone(), [(Role::File, file.clone())].into_iter().chain(backing));
        let access = Access { writable: true, required: Perms::ALL, shared: Perms::ALL, used: true };
        run(image.set_access(&view.cx(), access)).unwrap();
        Self { memory, file, view }
    }

    fn resize(&self, size: u64, how: Preallocation) -> underlay_graph::Result<()> {
        run(self.view.node().resize(&self.view.cx(), size, how))
    }

    fn write(&self, byte: u8, at: u64, len: u64) {
        let range = ByteRange::new(at, len).unwrap();
        run(self.view.cx().write(range, Iov::filled(len as usize, byte), WriteFlags::default())).unwrap();
    }

    fn content(&self) -> Vec<u8> {
        let range = ByteRange::between(0, self.view.cx().length());
        let into = Iov::filled(range.buffer_len(), 0xee);
        run(self.view.cx().read(range, into.clone())).unwrap();
        into.to_vec()
    }

    /// Closes, checks with both checks, and gives the size in the header.
    fn finish(&self, leaks: bool) -> u64 {
        run(self.view.node().close(&self.view.cx())).unwrap();
        let mut lines = Vec::new();
        let outcome = run(check(&self.file.cx(), Fix::None, &mut |finding| lines.push(finding))).unwrap();
        assert_eq!((outcome.corruptions, outcome.check_errors), (0, 0), "{lines:?}");
        assert!(leaks || outcome.leaks == 0, "{lines:?}");
        if have_qemu_img() {
            let dir = tempfile::tempdir().unwrap();
            self.memory.save(&dir.path().join("image"));
            std::fs::write(dir.path().join("base"), "").unwrap();
            let (status, stdout, stderr) = qemu_img(dir.path(), &["check", "-f", "qcow2", "image"]);
            assert!(status == 0, "{stdout}{stderr}");
        }
        self.view.cx().length()
    }
}

#[test]
fn growth_moves_the_l1_table_and_reads_as_zeroes() {
    for version in [Version::V2, Version::V3] {
        let options = CreateOptions { version, cluster_size: 512, ..CreateOptions::new(1 << 20) };
        let disk = Disk::new(&options, None);
        disk.write(7, 0, 1 << 20);
        disk.resize(5 << 20, Preallocation::Off).unwrap();
        disk.write(9, (5 << 20) - 512, 512);
        let content = disk.content();
        assert!(content[..1 << 20].iter().all(|b| *b == 7));
        assert!(content[1 << 20..(5 << 20) - 512].iter().all(|b| *b == 0));
        assert!(content[(5 << 20) - 512..].iter().all(|b| *b == 9));
        assert_eq!(disk.finish(false), 5 << 20);
        // Everything is still there when the image is opened again.
        let again = Disk::open(disk.memory.clone(), disk.file.clone(), None);
        assert_eq!(again.content(), content);
    }
}

#[test]
fn growth_over_a_longer_backing_file_does_not_show_it() {
    let base = vec![3; 3 << 20];
    for version in [Version::V2, Version::V3] {
        let backing = Some(BackingRef { file: "base".into(), format: Some("raw".into()) });
        let size = (1 << 20) + 1536;
        let disk = Disk::new(&CreateOptions { version, backing, ..CreateOptions::new(size) }, Some(&base));
        disk.resize(4 << 20, Preallocation::Off).unwrap();
        let content = disk.content();
        assert!(content[..size as usize].iter().all(|b| *b == 3));
        assert!(content[size as usize..].iter().all(|b| *b == 0));
        disk.finish(false);
    }
}

#[test]
fn what_was_cut_off_never_shows_again() {
    for cluster_size in [512, 4096, 65536] {
        for keep in [0, 512, 100 << 10, (1 << 20) - 512] {
            let disk = Disk::new(&CreateOptions { cluster_size, ..CreateOptions::new(3 << 20) }, None);
            disk.write(5, 0, 3 << 20);
            disk.resize(keep, Preallocation::Off).unwrap();
            disk.finish(false);
            disk.resize(3 << 20, Preallocation::Off).unwrap();
            let content = disk.content();
            assert!(content[..keep as usize].iter().all(|b| *b == 5), "{cluster_size} {keep}");
            assert!(content[keep as usize..].iter().all(|b| *b == 0), "{cluster_size} {keep}");
            assert_eq!(disk.finish(false), 3 << 20);
        }
    }
}

#[test]
fn preallocated_growth_maps_everything() {
    for how in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for extended_l2 in [false, true] {
            let disk = Disk::new(&CreateOptions { extended_l2, ..CreateOptions::new(1 << 20) }, None);
            disk.write(5, 100, 1000);
            disk.resize(9 << 20, how).unwrap();
            assert!(disk.content()[1100..].iter().all(|b| *b == 0));
            disk.finish(false);
            let mut lines = Vec::new();
            let outcome = run(check(&disk.file.cx(), Fix::None, &mut |line| lines.push(line))).unwrap();
            assert_eq!((outcome.allocated_clusters, outcome.total_clusters), (129, 144), "{how:?}");
        }
    }
}

#[test]
fn a_shrunk_file_loses_its_end() {
    let disk = Disk::new(&CreateOptions::new(8 << 20), None);
    disk.write(5, 0, 8 << 20);
    disk.resize(1 << 20, Preallocation::Off).unwrap();
    disk.finish(false);
    run(trim_file(&disk.file.cx())).unwrap();
    assert!(disk.file.cx().length() <= (1 << 20) + (6 << 16), "{}", disk.file.cx().length());
    disk.finish(false);
}

#[test]
fn clusters_in_use_that_are_not_counted_stay() {
    let disk = Disk::new(&CreateOptions::new(8 << 20), None);
    disk.write(5, 0, 8 << 20);
    run(disk.view.node().close(&disk.view.cx())).unwrap();
    // The refcounts behind the first eight clusters are lost.
    let block = ByteRange::between((2 << 16) + 16, 3 << 16);
    run(disk.file.cx().write(block, Iov::zeroed(block.buffer_len()), WriteFlags::default())).unwrap();
    let before = disk.memory.to_vec();
    run(trim_file(&disk.file.cx())).unwrap();
    assert_eq!(disk.memory.to_vec(), before);
}

#[test]
fn impossible_sizes_are_refused_in_the_words_of_qemu() {
    let disk = Disk::new(&CreateOptions { cluster_size: 512, ..CreateOptions::new(1 << 20) }, None);
    let text = |size, how| disk.resize(size, how).unwrap_err().to_string();
    assert_eq!(text(1000, Preallocation::Off), "The new size must be a multiple of 512");
    assert_eq!(text(1 << 40, Preallocation::Off), "Failed to grow the L1 table: File too large");
    assert_eq!(disk.finish(false), 1 << 20);
}

#[test]
fn an_image_that_was_not_closed_is_repaired_when_it_is_written_to() {
    let dir = tempfile::tempdir().unwrap();
    if !have_qemu_img() {
        return;
    }
    assert_eq!(
        qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "i", "4M"]).0,
        0
    );
    qemu_io(dir.path(), "i", &["write -P 6 0 1M"]);
    let mut bytes = std::fs::read(dir.path().join("i")).unwrap();
    bytes[79] |= 1;
    // Two counts that were never written.
    bytes[0x20000 + 12..0x20000 + 16].fill(0);
    let (memory, file) = Memory::from_bytes(&bytes).view();
    let disk = Disk::open(memory, file, None);
    disk.write(8, 2 << 20, 1 << 20);
    let content = disk.content();
    assert!(content[..1 << 20].iter().all(|b| *b == 6) && content[2 << 20..3 << 20].iter().all(|b| *b == 8));
    disk.finish(false);
}

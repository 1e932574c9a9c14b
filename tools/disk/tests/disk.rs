//! Disks over real files: opened, reopened, resized, and guarded when their format was guessed.

use std::path::Path;

use underlay_disk::{Disk, Request};
use underlay_graph::{ByteRange, IoError, Preallocation, WriteFlags};
use underlay_sys::Iov;
use underlay_sys::thread::block_on;

const LENGTH: u64 = 1 << 20;

fn raw_file(folder: &Path) -> String {
    let path = folder.join("disk.raw");
    std::fs::File::create(&path).and_then(|file| file.set_len(LENGTH)).expect("a file");
    path.to_string_lossy().into_owned()
}

async fn write(disk: &Disk, at: u64, bytes: &[u8]) -> Result<(), IoError> {
    let range = ByteRange::new(at, bytes.len() as u64).expect("a range");
    disk.root.write(range, Iov::copy_of(bytes), WriteFlags::default()).await
}

#[test]
fn a_guessed_raw_disk_cannot_be_made_to_look_like_an_image() {
    let folder = tempfile::tempdir().expect("a folder");
    let name = raw_file(folder.path());
    block_on(async {
        let disk = Disk::open(Request::named(&name)).await.expect("opens");
        assert!(disk.is_guessed_raw());
        let mut header = b"QFI\xfb\0\0\0\x03".to_vec();
        header.resize(1024, 0);
        assert_eq!(write(&disk, 0, &header).await, Err(IoError::EPERM));
        // Nor piece by piece.
        write(&disk, 4, &header[4..8]).await.expect("no magic yet");
        assert_eq!(write(&disk, 0, &header[..4]).await, Err(IoError::EPERM));
        write(&disk, 512, &header).await.expect("elsewhere it is data");
        disk.close().await.expect("closes");
        let given = Request { format: Some("raw".to_owned()), ..Request::named(&name) };
        let disk = Disk::open(given).await.expect("opens");
        assert!(!disk.is_guessed_raw());
        write(&disk, 0, &header).await.expect("said to be raw");
        disk.close().await.expect("closes");
    });
}

#[test]
fn a_failed_reopen_leaves_the_disk_as_it_was() {
    let folder = tempfile::tempdir().expect("a folder");
    let request = Request { format: Some("raw".to_owned()), ..Request::named(raw_file(folder.path())) };
    block_on(async {
        let disk = Disk::open(request.clone()).await.expect("opens");
        let read_only = Request { read_only: true, ..request.clone() };
        let disk = disk.reopen(read_only).await.expect("reopens");
        assert!(disk.is_read_only());
        let wrong = Request { format: Some("qcow2".to_owned()), ..request };
        let (disk, error) = disk.reopen(wrong).await.map(|_| ()).expect_err("no qcow2 image");
        assert_eq!(error, "Image is not in qcow2 format");
        let disk = disk.expect("still there");
        assert!(disk.is_read_only());
        disk.close().await.expect("closes");
    });
}

#[test]
fn resizing_needs_no_lasting_permission() {
    let folder = tempfile::tempdir().expect("a folder");
    let name = raw_file(folder.path());
    block_on(async {
        let disk = Disk::open(Request::named(&name)).await.expect("opens");
        disk.resize(2 * LENGTH, Preallocation::Off).await.expect("grows");
        assert_eq!(disk.root.length().await, Ok(2 * LENGTH));
        let plan = disk.wires();
        let root = plan.plan().roots().next().expect("its user").1.clone();
        assert!(!root.required.has(underlay_graph::Perms::RESIZE));
        write(&disk, 2 * LENGTH - 1, b"x").await.expect("inside now");
        disk.close().await.expect("closes");
    });
    assert_eq!(std::fs::metadata(&name).expect("there").len(), 2 * LENGTH);
}

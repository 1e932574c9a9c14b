//! Real files: what is there before and after, and whoever else may have been at them. Power cuts and kills are in the
//! simulated world (`testing/sim`), kills of a real process in the daemon's tests.

use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use underlay_graph::bitmaps::{Forget, NewBitmap};
use underlay_graph::graph::LastStep;
use underlay_graph::plan::NewRoot;
use underlay_graph::{ByteRange, Graph, GraphError, NodeId, Perms, Root, WriteFlags};
use underlay_sys::Iov;
use underlay_sys::thread::block_on;

use crate::{BackingPolicy, NodeSpec, Opener};

const SIZE: u64 = 8 << 20;
const GRANULE: u64 = 65536;

/// A folder with a disk.
struct Lab {
    folder: tempfile::TempDir,
}

/// The disk, open.
struct Open {
    graph: Arc<Graph>,
    node: NodeId,
}

/// A bitmap: its name, dirty bytes, and whether it is good.
type Seen = (String, u64, bool);

impl Lab {
    fn new() -> Self {
        let lab = Self { folder: tempfile::tempdir().expect("a folder") };
        let disk = File::create(lab.disk()).expect("a disk");
        disk.set_len(SIZE).expect("room");
        disk.set_permissions(Permissions::from_mode(0o640)).expect("ours");
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn disk(&self) -> PathBuf {
        self.path("disk")
    }

    fn side(&self) -> PathBuf {
        self.path("disk.bitmaps")
    }

    fn is_beside(&self) -> bool {
        self.side().symlink_metadata().is_ok()
    }

    fn open(&self, read_only: bool) -> Open {
        self.try_open("disk", read_only).expect("opens")
    }

    fn try_open(&self, name: &str, read_only: bool) -> Result<Open, String> {
        let graph = Graph::new();
        graph.let_bitmaps_last();
        let node = self.add(&graph, name, read_only)?;
        Ok(Open { graph, node })
    }

    fn add(&self, graph: &Graph, name: &str, read_only: bool) -> Result<NodeId, String> {
        let path = self.path(name);
        let mut spec = NodeSpec::image(path.to_str().expect("a name"), Some("raw")).expect("a disk");
        (spec.read_only, spec.discard) = (Some(read_only), Some(true));
        let new = block_on(Opener::new(graph, BackingPolicy::Follow, None).open(spec));
        let new = new.map_err(|error| error.to_string())?;
        let added = block_on(graph.change(|plan| {
            let node = plan.add(new)?;
            plan.node_mut(node).monitor_owned = true;
            Ok(node)
        }));
        added.map_err(|error| error.to_string())
    }

    /// A disk with a bitmap that says what was written, closed.
    fn with_bitmap() -> Self {
        let lab = Self::new();
        let disk = lab.open(false);
        disk.add("b").expect("added");
        disk.write(3 * GRANULE);
        disk.close();
        lab
    }

    fn seen(&self) -> Vec<Seen> {
        let disk = self.open(true);
        let seen = disk.seen();
        disk.close();
        seen
    }
}

impl Open {
    fn add(&self, name: &str) -> Result<(), GraphError> {
        let new = NewBitmap { name, granularity: Some(GRANULE), persistent: true, enabled: true };
        block_on(self.graph.change(|plan| plan.add_bitmap(self.node, &new)))
    }

    fn remove(&self, name: &str) {
        let edit = |plan: &mut underlay_graph::Plan| {
            plan.give_up_bitmap(self.node, name)?;
            plan.drop_bitmap(self.node, name);
            let step: Box<dyn LastStep> = Box::new(Forget(vec![(self.node, name.to_owned())]));
            Ok(((), Some(step)))
        };
        block_on(self.graph.change_with(edit)).expect("removed");
    }

    fn user(&self, required: Perms) -> Result<Root, GraphError> {
        let (user, role) = ("guest".into(), "root");
        let root = NewRoot {
            user,
            role,
            node: self.node,
            required,
            shared: Perms::ALL,
            pinned: false,
            drained: None,
        };
        let id = block_on(self.graph.change(|plan| Ok(plan.add_root(root))))?;
        Ok(self.graph.root(id).expect("is there"))
    }

    fn write(&self, at: u64) {
        let root = self.user(Perms::CONSISTENT_READ | Perms::WRITE).expect("may write");
        let range = ByteRange::between(at, at + 512);
        block_on(root.write(range, Iov::filled(512, 7), WriteFlags::default())).expect("written");
        block_on(self.graph.change(|plan| {
            plan.remove_root(root.id());
            Ok(())
        }))
        .expect("gone");
    }

    fn resize(&self, size: u64) -> Result<(), GraphError> {
        #[derive(Debug)]
        struct Resize(NodeId, u64);
        #[async_trait::async_trait]
        impl LastStep for Resize {
            async fn run(
                self: Box<Self>,
                _old: &underlay_graph::plan::Wires,
                new: &underlay_graph::plan::Wires,
            ) -> Result<(), GraphError> {
                let view = new.view(self.0);
                Ok(view.node().resize(&view.cx(), self.1, Default::default()).await?)
            }
        }
        let step: Box<dyn LastStep> = Box::new(Resize(self.node, size));
        block_on(self.graph.change_with(|plan| {
            plan.touch(self.node);
            Ok(((), Some(step)))
        }))
    }

    fn seen(&self) -> Vec<Seen> {
        let plan = self.graph.plan();
        let bitmaps = plan.node(self.node).bitmaps.iter();
        bitmaps.map(|it| (it.name.to_string(), it.bits.count(), !it.inconsistent)).collect()
    }

    fn close(self) {
        block_on(self.graph.change(|plan| {
            plan.node_mut(self.node).monitor_owned = false;
            Ok(())
        }))
        .expect("closed");
        assert_eq!(self.graph.plan().nodes().count(), 0);
    }
}

fn good(count: u64) -> Vec<Seen> {
    vec![("b".to_owned(), count * GRANULE, true)]
}

fn bad() -> Vec<Seen> {
    vec![("b".to_owned(), 0, false)]
}

#[test]
fn the_file_comes_with_the_first_bitmap_and_goes_with_the_last() {
    let lab = Lab::new();
    let disk = lab.open(false);
    disk.write(0);
    assert!(!lab.is_beside());
    disk.add("b").expect("added");
    assert!(lab.is_beside());
    assert_eq!(lab.side().metadata().expect("a file").permissions().mode() & 0o777, 0o640);
    disk.add("c").expect("added");
    disk.write(GRANULE);
    disk.remove("c");
    assert!(lab.is_beside());
    disk.close();
    // The next ones find it, and leave it.
    for _ in 0..2 {
        assert_eq!(lab.seen(), good(1));
    }
    let disk = lab.open(false);
    assert_eq!(disk.seen(), good(1));
    disk.write(2 * GRANULE);
    disk.close();
    assert_eq!(lab.seen(), good(2));
    let disk = lab.open(false);
    disk.remove("b");
    assert!(!lab.is_beside());
    disk.add("b").expect("added");
    disk.close();
    assert_eq!(lab.seen(), good(0));
    assert_eq!(fs::read_dir(lab.folder.path()).expect("a folder").count(), 2);
}

#[test]
fn to_read_changes_nothing() {
    let lab = Lab::with_bitmap();
    let before = fs::read(lab.side()).expect("a file");
    assert_eq!(lab.seen(), good(1));
    assert!(fs::read(lab.side()).expect("a file") == before);
}

/// Whatever anybody does to the disk, or to what is beside it.
#[test]
fn nothing_is_believed_after_somebody_else_was_there() {
    type Deed = fn(&Lab);
    let deeds: &[(&str, Deed)] = &[
        ("writes", |lab| {
            let disk = OpenOptions::new().write(true).open(lab.disk()).expect("opens");
            disk.write_all_at(&[1], 12345).expect("written");
        }),
        ("writes what is there already", |lab| {
            let disk = OpenOptions::new().read(true).write(true).open(lab.disk()).expect("opens");
            let mut bytes = [0; 512];
            disk.read_exact_at(&mut bytes, 512).expect("read");
            disk.write_all_at(&bytes, 512).expect("written");
        }),
        ("writes, and gives it the old time", |lab| {
            let disk = OpenOptions::new().write(true).open(lab.disk()).expect("opens");
            let time = disk.metadata().and_then(|told| told.modified()).expect("told");
            disk.write_all_at(&[1], 12345).expect("written");
            disk.set_times(FileTimes::new().set_modified(time)).expect("set");
        }),
        ("makes it longer", |lab| {
            let disk = OpenOptions::new().write(true).open(lab.disk()).expect("opens");
            disk.set_len(2 * SIZE).expect("longer");
        }),
        ("makes it shorter and long again", |lab| {
            let disk = OpenOptions::new().write(true).open(lab.disk()).expect("opens");
            disk.set_len(SIZE / 2).and_then(|()| disk.set_len(SIZE)).expect("done");
        }),
        ("puts a copy in its place", |lab| {
            fs::copy(lab.disk(), lab.path("copy")).expect("copied");
            let old = lab.disk().metadata().and_then(|told| told.modified()).expect("told");
            let copy = OpenOptions::new().write(true).open(lab.path("copy")).expect("opens");
            copy.set_times(FileTimes::new().set_modified(old)).expect("set");
            fs::rename(lab.path("copy"), lab.disk()).expect("renamed");
        }),
        ("puts the bitmaps of another disk there", |lab| {
            let other = Lab::with_bitmap();
            fs::copy(other.side(), lab.side()).expect("copied");
        }),
        ("puts older bitmaps there", |lab| {
            fs::copy(lab.side(), lab.path("old")).expect("copied");
            let disk = lab.open(false);
            disk.write(5 * GRANULE);
            disk.close();
            fs::rename(lab.path("old"), lab.side()).expect("renamed");
        }),
        ("damages the stamp", |lab| {
            let side = OpenOptions::new().write(true).open(lab.side()).expect("opens");
            side.write_all_at(&[0xff], 48 * 1024 - 1024 + 100).expect("written");
        }),
    ];
    for (what, deed) in deeds {
        let lab = Lab::with_bitmap();
        assert_eq!(lab.seen(), good(1), "before somebody {what}");
        deed(&lab);
        // Not now, nor after it was used again, however that ended.
        for _ in 0..2 {
            assert_eq!(lab.seen(), bad(), "somebody {what}");
        }
        let disk = lab.open(false);
        disk.write(0);
        drop(disk);
        assert_eq!(lab.seen(), bad(), "somebody {what}");
        let disk = lab.open(false);
        disk.add("new").expect("added");
        disk.write(0);
        disk.close();
        let seen = lab.seen();
        let find = |name: &str| seen.iter().find(|it| it.0 == name).map(|it| (it.1, it.2));
        assert_eq!((find("b"), find("new")), (Some((0, false)), Some((GRANULE, true))), "somebody {what}");
    }
}

/// A process that has died without a witness, as those of tests do: what it wrote is not known, unless it wrote
/// nothing.
#[test]
fn without_a_witness_only_an_untouched_disk_is_believed() {
    let lab = Lab::with_bitmap();
    drop(lab.open(false));
    assert_eq!(lab.seen(), good(1));
    let disk = lab.open(false);
    disk.write(0);
    drop(disk);
    assert_eq!(lab.seen(), bad());
}

#[test]
fn what_is_no_file_of_bitmaps_is_left_alone() {
    type Make = fn(&Lab);
    let makes: &[Make] = &[
        |lab| fs::write(lab.side(), "notes of somebody").expect("written"),
        |lab| fs::write(lab.side(), "").expect("written"),
        |lab| fs::create_dir(lab.side()).expect("made"),
        |lab| {
            let other = Lab::with_bitmap();
            fs::copy(other.side(), lab.path("else")).expect("copied");
            symlink(lab.path("else"), lab.side()).expect("linked");
        },
        |lab| {
            let made = Command::new("mkfifo").arg(lab.side()).status().expect("mkfifo");
            assert!(made.success());
        },
        |lab| {
            // Somebody's image of that name.
            let side = lab.side();
            let options = underlay_qcow2::CreateOptions::new(SIZE);
            block_on(crate::create::qcow2(side.to_str().expect("a name"), &options)).expect("made");
        },
    ];
    for (number, make) in makes.iter().enumerate() {
        let lab = Lab::new();
        make(&lab);
        // Not what a FIFO has: nobody writes there.
        let content = || {
            let path = [lab.path("else"), lab.side()].into_iter().find(|path| path.is_file());
            path.map(|path| fs::read(path).expect("a file"))
        };
        let before = content();
        let disk = lab.open(false);
        assert_eq!(disk.seen(), []);
        let refused = disk.add("b").expect_err("something is in the way").to_string();
        assert!(refused.contains("disk.bitmaps' is in the way"), "{number}: {refused}");
        disk.write(0);
        disk.close();
        assert!(before == content(), "{number}");
    }
}

/// A file whose bytes somebody has chosen: the disk opens, and nothing is believed that was good before.
#[test]
fn a_damaged_file_does_not_keep_the_disk_from_being_used() {
    let lab = Lab::with_bitmap();
    let whole = fs::read(lab.side()).expect("a file");
    let mut seed = 1_u64;
    for _ in 0..150 {
        let mut bytes = whole.clone();
        for _ in 0..3 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let at = usize::try_from(seed >> 33).expect("small") % 600;
            bytes[at] = u8::try_from(seed >> 56).expect("a byte");
        }
        fs::write(lab.side(), &bytes).expect("written");
        let seen = lab.seen();
        assert!(seen.iter().all(|it| !it.2 || *it == good(1)[0] || it.0 != "b"), "{seen:?}");
        let Ok(disk) = lab.try_open("disk", false) else { continue };
        drop(disk);
    }
}

#[test]
fn it_cannot_be_made() {
    let lab = Lab::new();
    // In the place of the unfinished file.
    fs::create_dir(lab.path("disk.bitmaps.new")).expect("made");
    let disk = lab.open(false);
    let refused = disk.add("b").expect_err("cannot be made").to_string();
    assert!(refused.starts_with("Could not create '") && refused.contains("disk.bitmaps'"), "{refused}");
    assert_eq!(disk.seen(), []);
    assert!(!lab.is_beside());
    disk.write(0);
    // What a crash has left is made anew.
    fs::remove_dir(lab.path("disk.bitmaps.new")).expect("removed");
    fs::write(lab.path("disk.bitmaps.new"), "half").expect("written");
    disk.add("b").expect("added");
    disk.close();
    assert_eq!(lab.seen(), good(0));
    // A link in its place is not followed.
    let lab = Lab::new();
    fs::write(lab.path("victim"), "mine").expect("written");
    symlink(lab.path("victim"), lab.path("disk.bitmaps.new")).expect("linked");
    let disk = lab.open(false);
    disk.add("b").expect("added");
    disk.close();
    assert_eq!(fs::read(lab.path("victim")).expect("a file"), b"mine");
}

#[test]
fn whatever_name_leads_to_the_disk() {
    let lab = Lab::with_bitmap();
    symlink("disk", lab.path("link")).expect("linked");
    let disk = lab.try_open("link", false).expect("opens");
    assert_eq!(disk.seen(), good(1));
    disk.write(6 * GRANULE);
    disk.close();
    assert_eq!(lab.seen(), good(2));
    // Under another name it has other bitmaps, and those of the first are told.
    fs::hard_link(lab.disk(), lab.path("other")).expect("linked");
    let disk = lab.try_open("other", false).expect("opens");
    assert_eq!(disk.seen(), []);
    disk.write(7 * GRANULE);
    disk.close();
    assert_eq!(lab.seen(), bad());
}

#[test]
fn the_bitmaps_follow_the_length_of_the_disk() {
    let lab = Lab::with_bitmap();
    let disk = lab.open(false);
    disk.resize(2 * SIZE).expect("longer");
    disk.write(SIZE + GRANULE);
    assert_eq!(disk.seen(), good(2));
    disk.close();
    assert_eq!(lab.seen(), good(2));
    let disk = lab.open(false);
    disk.resize(SIZE + 512).expect("shorter");
    disk.close();
    assert_eq!(lab.seen(), good(1));
    assert_eq!(lab.disk().metadata().expect("a file").size(), SIZE + 512);
    // Somebody else has changed it.
    File::options().write(true).open(lab.disk()).and_then(|disk| disk.set_len(SIZE)).expect("shorter");
    let disk = lab.open(false);
    assert_eq!(disk.seen(), bad());
    disk.add("c").expect("added");
    disk.resize(2 * SIZE).expect("longer");
    disk.write(SIZE);
    disk.close();
    assert_eq!(lab.seen().iter().map(|it| (it.1, it.2)).collect::<Vec<_>>(), [(0, false), (GRANULE, true)]);
}

#[test]
fn nobody_else_may_write_to_the_file_meanwhile() {
    let lab = Lab::with_bitmap();
    let disk = lab.open(false);
    let said = lab.try_open("disk", false).err().expect("refused");
    assert!(said.contains("lock"), "{said}");
    // Nor past the disk, in the same process.
    let plan = disk.graph.plan();
    let file = plan.node(disk.node).child(underlay_graph::Role::File).expect("a file");
    let past = Open { graph: disk.graph.clone(), node: file };
    assert!(past.user(Perms::WRITE).is_err());
    assert!(past.user(Perms::CONSISTENT_READ).is_ok());
}

/// It was opened, and its bitmaps read; then somebody has written; then it shall be written to.
#[test]
fn somebody_writes_between_reading_and_writing() {
    let lab = Lab::with_bitmap();
    let disk = lab.open(true);
    assert_eq!(disk.seen(), good(1));
    let file = File::options().write(true).open(lab.disk()).expect("opens");
    file.write_all_at(&[1], 777).expect("written");
    let writable = |plan: &mut underlay_graph::Plan| {
        plan.set_read_only(disk.node, false);
        Ok(())
    };
    let said = block_on(disk.graph.change(writable)).expect_err("refused").to_string();
    assert!(said.contains("Somebody else has written to the disk"), "{said}");
    disk.close();
    assert_eq!(lab.seen(), bad());
}

#[test]
fn disks_without_a_place_beside_them() {
    let refused = |spec: &str| {
        let options = match underlay_qmp::json::parse(spec.as_bytes()) {
            Ok(underlay_qmp::json::Value::Object(options)) => options,
            other => panic!("{other:?}"),
        };
        let graph = Graph::new();
        let spec = NodeSpec::parse(options).expect("a disk");
        let new = block_on(Opener::new(&graph, BackingPolicy::Follow, None).open(spec)).expect("opens");
        let node = block_on(graph.change(|plan| {
            let node = plan.add(new)?;
            plan.node_mut(node).monitor_owned = true;
            Ok(node)
        }))
        .expect("added");
        Open { graph, node }.add("b").expect_err("no place").to_string()
    };
    let lab = Lab::new();
    let disk = lab.disk().display().to_string();
    let window =
        format!(r#"{{"driver":"raw","size":1048576,"file":{{"driver":"file","filename":"{disk}"}}}}"#);
    assert!(refused(&window).ends_with("The disk is only a part of its file"));
    let unlocked =
        format!(r#"{{"driver":"raw","file":{{"driver":"file","locking":"off","filename":"{disk}"}}}}"#);
    assert!(refused(&unlocked).ends_with("is not locked against other programs"));
    let null = r#"{"driver":"raw","file":{"driver":"null-co","size":1048576}}"#;
    assert!(refused(null).ends_with("'null-co' is not a file of this host"));
    assert!(!lab.is_beside());
}

/// QEMU's tools see the bitmaps, and what they change is told.
#[test]
fn the_reference_looks_and_touches() {
    let qemu_img = |lab: &Lab, words: &[&str]| {
        Command::new("qemu-img").current_dir(lab.folder.path()).args(words).output()
    };
    let lab = Lab::with_bitmap();
    let Ok(info) = qemu_img(&lab, &["info", "disk.bitmaps"]) else {
        println!("skipped: qemu-img is not installed");
        return;
    };
    assert!(String::from_utf8_lossy(&info.stdout).contains("name: b"));
    assert!(qemu_img(&lab, &["check", "disk.bitmaps"]).expect("runs").status.success());
    assert_eq!(lab.seen(), good(1));
    let added = qemu_img(&lab, &["bitmap", "--add", "disk.bitmaps", "c"]).expect("runs");
    assert!(added.status.success());
    let seen = lab.seen();
    assert!(seen.len() == 2 && seen.iter().all(|it| !it.2), "{seen:?}");
    let lab = Lab::with_bitmap();
    let made = qemu_img(&lab, &["create", "-f", "raw", "disk", "8M"]).expect("runs");
    assert!(made.status.success());
    assert_eq!(lab.seen(), bad());
}

/// The clock may be such that nothing can be told apart.
#[test]
fn a_disk_from_the_future_is_not_believed() {
    let lab = Lab::new();
    let disk = lab.open(false);
    disk.add("b").expect("added");
    let future = std::time::SystemTime::now() + Duration::from_secs(3600);
    let file = File::options().write(true).open(lab.disk()).expect("opens");
    file.set_times(FileTimes::new().set_modified(future)).expect("set");
    disk.close();
    assert_eq!(lab.seen(), bad());
}

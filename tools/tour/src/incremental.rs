//! The stop at which the daemon is killed: a full backup and two incremental ones, by a bitmap that outlives it.

use std::path::{Path, PathBuf};

use indicatif::HumanBytes;
use underlay_graph::BackingRef;
use underlay_qcow2::CreateOptions;
use underlay_qmp::blocking::Monitor;
use underlay_qmp::json::{Object, Value};
use underlay_sys::{say, thread::block_on};

use crate::guest::{Guest, Moment};
use crate::{DISK, Daemon, PER_LAYER, Summary};

/// The backups, each on the one before it.
const BACKUPS: [&str; 3] = ["full.qcow2", "inc1.qcow2", "inc2.qcow2"];

/// A daemon of its own, with the guest's disk.
struct Place {
    folder: PathBuf,
    daemon: Daemon,
    monitor: Monitor,
}

impl Place {
    fn start(folder: &Path) -> Result<Self, String> {
        let daemon = Daemon::start(folder, "mortal-")?;
        let monitor = Monitor::connect(&folder.join("mortal-qmp.sock"))?;
        let mut place = Self { folder: folder.to_owned(), daemon, monitor };
        place.add("disk", "mortal.qcow2", false)?;
        place.export("disk", true)?;
        Ok(place)
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("mortal-nbd.sock")
    }

    fn add(&mut self, node: &str, file: &str, read_only: bool) -> Result<(), String> {
        let file = Object::new().with("driver", "file").with("filename", file);
        let image = Object::new().with("driver", "qcow2").with("node-name", node).with("file", file);
        self.monitor.execute("blockdev-add", image.with("read-only", read_only))?;
        Ok(())
    }

    fn export(&mut self, node: &str, writable: bool) -> Result<(), String> {
        let export = Object::new().with("type", "nbd").with("id", node).with("node-name", node);
        self.monitor.execute("block-export-add", export.with("writable", writable))?;
        Ok(())
    }

    fn del(&mut self, node: &str) -> Result<(), String> {
        self.monitor.execute("blockdev-del", Object::new().with("node-name", node))?;
        Ok(())
    }

    /// Runs a backup of what the disk is now while the guest goes on; what the disk was, and bytes copied.
    fn back_up(&mut self, guest: &Guest, number: usize) -> Result<(Moment, u64), String> {
        make(&self.folder, BACKUPS[number], number.checked_sub(1).map(|below| BACKUPS[below]))?;
        self.add("target", BACKUPS[number], false)?;
        let moment = guest.rest()?;
        let backup = Object::new().with("job-id", "job0").with("device", "disk").with("target", "target");
        let bitmap = Object::new().with("node", "disk").with("name", "bitmap0").with("persistent", true);
        let action = |kind: &str, data| Value::from(Object::new().with("type", kind).with("data", data));
        match number {
            0 => {
                let add = action("block-dirty-bitmap-add", bitmap);
                let backup = action("blockdev-backup", backup.with("sync", "full"));
                let actions = Value::List(vec![add, backup]);
                self.monitor.execute("transaction", Object::new().with("actions", actions))?;
            }
            _ => {
                let backup = backup.with("sync", "incremental").with("bitmap", "bitmap0");
                self.monitor.execute("blockdev-backup", backup)?;
            }
        }
        guest.go_on(None)?;
        let done = self.monitor.event("BLOCK_JOB_COMPLETED", "device", "job0")?;
        if let Some(error) = done.get("error").and_then(Value::as_str) {
            return Err(format!("backup {number}: {error}"));
        }
        self.monitor.event("JOB_STATUS_CHANGE", "status", "null")?;
        self.del("target")?;
        Ok((moment, done.get("len").and_then(Value::as_u64).unwrap_or(0)))
    }

    /// What the bitmap calls dirty, in bytes; nothing if it cannot be relied on.
    fn dirty(&mut self) -> Result<Option<u64>, String> {
        let nodes = self.monitor.execute("query-named-block-nodes", Object::new().with("flat", true))?;
        let nodes = nodes.as_list().unwrap_or_default().iter().filter_map(Value::as_object);
        let bitmaps = nodes.filter_map(|node| node.get("dirty-bitmaps")?.as_list()).flatten();
        let mut good =
            bitmaps.filter_map(Value::as_object).filter(|bitmap| bitmap.get("inconsistent").is_none());
        Ok(good.next().and_then(|bitmap| bitmap.get("count")?.as_u64()))
    }

    /// Blocks of a backup that are not what the disk was.
    fn compare(&mut self, number: usize, moment: &Moment) -> Result<u64, String> {
        self.add("restored", BACKUPS[number], true)?;
        self.export("restored", false)?;
        let wrong = moment.differences(&self.socket(), "restored")?;
        self.monitor
            .execute("block-export-del", Object::new().with("id", "restored").with("mode", "hard"))?;
        self.monitor.event("BLOCK_EXPORT_DELETED", "id", "restored")?;
        self.del("restored")?;
        Ok(wrong)
    }
}

fn make(folder: &Path, file: &str, below: Option<&str>) -> Result<(), String> {
    let file = folder.join(file);
    let backing = below.map(|below| BackingRef { file: below.to_owned(), format: Some("qcow2".to_owned()) });
    let options = CreateOptions { backing, ..CreateOptions::new(DISK) };
    block_on(underlay_drivers::create::qcow2(&file.to_string_lossy(), &options))
        .map_err(|error| error.to_string())
}

/// Backs the disk up, kills the daemon, and backs up what has changed: twice. Then compares all three.
pub(crate) fn visit(folder: &Path, summary: &mut Summary) -> Result<(), String> {
    say!("\n== incremental backup: a full one, the daemon killed, and two of what has changed");
    make(folder, "mortal.qcow2", None)?;
    let mut place = Place::start(folder)?;
    let guest = Guest::start(&place.socket(), "disk", 0x2545_f491_4f6c_dd1d)?;
    guest.work(PER_LAYER);
    let (mut moments, mut sizes) = (Vec::new(), Vec::new());
    let mut after_crash = None;
    for number in 0..BACKUPS.len() {
        let (moment, size) = place.back_up(&guest, number)?;
        moments.push(moment);
        sizes.push(size);
        guest.work(PER_LAYER / 4);
        if number == 0 {
            guest.rest()?;
            // The guest has flushed; the daemon has had no time to put anything in order.
            drop(place);
            place = Place::start(folder)?;
            after_crash = place.dirty()?;
            guest.go_on(Some((&place.socket(), "disk")))?;
        }
    }
    let mut wrong = u64::from(after_crash.is_none());
    for (number, moment) in moments.iter().enumerate() {
        wrong += place.compare(number, moment)?;
    }
    let account = guest.finish()?;
    place.monitor.execute("quit", Object::new())?;
    let ended = place.daemon.child.wait().map_err(|error| format!("the daemon: {error}"))?;
    wrong += u64::from(!ended.success());
    let sizes: Vec<_> = sizes.iter().map(|size| HumanBytes(*size).to_string()).collect();
    say!(
        "   copied  {}; {} to copy after the crash",
        sizes.join(", then "),
        HumanBytes(after_crash.unwrap_or(DISK))
    );
    let verdict = if wrong + account.errors == 0 { "every byte as it must be" } else { "DIFFERENT" };
    say!("   all three restored; {verdict}");
    summary.guest.requests += account.requests;
    summary.guest.errors += account.errors + wrong;
    Ok(())
}

//! Incremental backups with a persistent bitmap, by a daemon that is killed again and again: each of its lives is one
//! backup more, on top of all before, whether those came to their ends or not. In the end the last one is the disk, and
//! each that was done is the disk of its moment.
//!
//! ```text
//!   daemon ─► the bitmap is good ─► guest, backup N ─► SIGKILL ─┐
//!     ▲                                                         │
//!     └─────────────────────────────────────────────────────────┘
//!
//!   empty ◄── backup 0 ◄── backup 1 (killed) ◄── backup 2 ◄── … the last = the disk
//! ```
//!
//! A backup that was killed has told nobody whether it was done, and then whether the bitmap is what it was before or
//! what was written since. So nobody needs to know: on top of it, the next one is right in either case.

use std::fs::File;
use std::path::Path;

use underlay_graph::BackingRef;
use underlay_qcow2::{CreateOptions, Version};
use underlay_qmp::blocking::{Failure, Monitor};
use underlay_qmp::json::{Object, Value};
use underlay_sim::Rng;

use crate::daemon::{Daemon, blockdev};
use crate::guest::Guest;
use crate::judge::{Found, Programs, check, examine_copy, read};
use crate::model::{BYTES, Model};
use crate::operation::make;
use crate::plan::{DISK, Moment, Plan};

/// How often the daemon is killed.
const LIVES: usize = 3;
/// The node of the disk, and the bitmap's name.
const NODE: &str = "disk";
const BITMAP: &str = "changes";

/// A backup that was done, and what it may hold.
type Done = (String, Model);

/// A round on its way.
struct Round<'a> {
    programs: &'a Programs,
    folder: &'a Path,
    plan: &'a Plan,
    /// The disk's image.
    disk: &'static str,
    random: Rng,
    model: Model,
    /// Images, each on top of the one before.
    chain: Vec<String>,
    done: Vec<Done>,
    found: Found,
}

/// Plays a round. What was found, or all that is wrong.
pub fn play(programs: &Programs, folder: &Path, plan: &Plan) -> Result<Found, Vec<String>> {
    let mut round = Round::set(programs, folder, plan).map_err(|wrong| vec![wrong])?;
    for life in 0..LIVES {
        round.live(life).map_err(|wrong| at_life(life, wrong))?;
    }
    round.end().map_err(|wrong| at_life(LIVES, wrong))?;
    Ok(round.found)
}

fn at_life(life: usize, mut wrong: Vec<String>) -> Vec<String> {
    wrong.insert(0, format!("in life {life}:"));
    wrong
}

fn one(wrong: impl Into<String>) -> Vec<String> {
    vec![wrong.into()]
}

/// The size of an image of a backup: as the disk's, but whatever else it likes.
fn options(plan: &Plan, below: Option<&str>) -> CreateOptions {
    let backing = below.map(|below| BackingRef { file: below.to_owned(), format: Some("qcow2".to_owned()) });
    CreateOptions { backing, ..plan.create.clone() }
}

impl<'a> Round<'a> {
    /// An empty disk, raw or with clusters that leave room for the notes.
    fn set(programs: &'a Programs, folder: &'a Path, plan: &'a Plan) -> Result<Self, String> {
        let disk = if plan.variant.is_multiple_of(2) { "disk.raw" } else { "disk.qcow2" };
        if disk == "disk.raw" {
            let made = File::create(folder.join(disk)).and_then(|file| file.set_len(DISK));
            made.map_err(|error| error.to_string())?;
        } else {
            let cluster_size = plan.create.cluster_size.max(4096);
            let options = CreateOptions { version: Version::V3, cluster_size, ..plan.create.clone() };
            make(folder, disk, &options)?;
        }
        let first = "backup.qcow2".to_owned();
        make(folder, &first, &options(plan, None))?;
        let sectors = usize::try_from(DISK).map_err(|error| error.to_string())? / BYTES;
        Ok(Self {
            programs,
            folder,
            plan,
            disk,
            random: Rng::new(!plan.seed),
            model: Model::new(plan.seed | 1 << 63, sectors),
            chain: vec![first],
            done: Vec::new(),
            found: Found::default(),
        })
    }

    fn start(&self) -> Result<(Daemon, Monitor), Vec<String>> {
        Daemon::start(&self.programs.daemon, self.folder, self.plan, self.disk, NODE).map_err(one)
    }

    /// From the start of the daemon to its end.
    fn live(&mut self, life: usize) -> Result<(), Vec<String>> {
        let (daemon, mut monitor) = self.start()?;
        let mut client = daemon.client().map_err(one)?;
        if life == 0 {
            let bitmap = Object::new().with("node", NODE).with("name", BITMAP).with("persistent", true);
            let granularity = self.random.pick(&[512_u64, 4096, 65536, 1 << 20]);
            let added = monitor.execute("block-dirty-bitmap-add", bitmap.with("granularity", granularity));
            added.map_err(|error| one(error.to_string()))?;
        } else {
            expect_good(&mut monitor)?;
            self.take_stock(&mut client)?;
        }
        let guest = Guest::start(&daemon.nbd(), self.model.clone(), self.random.number(), self.plan.depth);
        let guest = guest.map_err(one)?;
        let mut killer = daemon.killer(self.plan);
        if self.random.one_in(3) {
            // While there is only the guest, perhaps.
            killer.reached(Moment::Issued);
        }
        guest.serve(self.plan.per_layer);
        killer.reached(Moment::Issued);
        let outcome = self.backup(&mut monitor, Some(&guest), &mut |status| {
            killer.reached(Moment::Status(status));
        });
        let mut wrong = Vec::new();
        wrong.extend(killer.finish().err());
        if daemon.hung() {
            wrong.push("the daemon hung".to_owned());
        }
        if let Err(refused @ Failure::Refused(..)) = outcome {
            wrong.push(refused.to_string());
        }
        let account = guest.join().map_err(one)?;
        wrong.extend(account.wrong);
        self.found.served += account.served;
        self.found.in_flight += account.model.in_flight();
        self.model = account.model;
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }

    /// What the kill has left is what there is from now on.
    fn take_stock(&mut self, client: &mut underlay_nbd::blocking::Client) -> Result<Vec<u8>, Vec<String>> {
        let found = read(client, &self.model)?;
        let is_behind = |(at, bytes): &(usize, &[u8])| self.model.is_behind(*at, bytes);
        self.found.behind += found.chunks(BYTES).enumerate().filter(is_behind).count();
        self.model.settle(&found);
        Ok(found)
    }

    /// One more backup on top of the others.
    fn backup(
        &mut self,
        monitor: &mut Monitor,
        guest: Option<&Guest>,
        reached: &mut dyn FnMut(&'static str),
    ) -> Result<(), Failure> {
        let (below, above) =
            (self.chain.last().cloned().unwrap_or_default(), format!("backup{}.qcow2", self.chain.len()));
        make(self.folder, &above, &options(self.plan, Some(&below))).map_err(Failure::Lost)?;
        let target = blockdev(self.plan, &above, &above.replace('.', "-"));
        monitor.execute("blockdev-add", target)?;
        self.chain.push(above.clone());
        let mut arguments = Object::new()
            .with("job-id", "job0")
            .with("device", NODE)
            .with("target", above.replace('.', "-"))
            .with("sync", "incremental")
            .with("bitmap", BITMAP);
        if self.plan.speed > 0 {
            arguments.insert("speed", self.plan.speed);
        }
        if let Some(guest) = guest {
            guest.begin_copy();
        }
        monitor.execute("blockdev-backup", arguments)?;
        let copy = guest.map_or_else(|| self.model.clone(), Guest::copy);
        follow(monitor, reached)?;
        self.done.push((above, copy));
        self.found.copied = true;
        Ok(())
    }

    /// The last backup is the disk, and the others are what they were when they were made.
    fn end(&mut self) -> Result<(), Vec<String>> {
        let (daemon, mut monitor) = self.start()?;
        let mut client = daemon.client().map_err(one)?;
        expect_good(&mut monitor)?;
        let disk = self.take_stock(&mut client)?;
        self.backup(&mut monitor, None, &mut |_| ()).map_err(|error| one(error.to_string()))?;
        drop(client);
        daemon.quit(monitor).map_err(one)?;
        let last = self.chain.last().cloned().unwrap_or_default();
        for image in &self.chain {
            self.found.leaks += check(self.programs, self.folder, image).map_err(one)?;
        }
        for (image, model) in &self.done {
            let restored = examine_copy(self.programs, self.folder, self.plan, image, model);
            let restored = restored.map_err(|mut wrong| {
                wrong.insert(0, format!("{image}:"));
                wrong
            })?;
            if *image == last && restored != disk {
                return Err(one("the last backup is not the disk"));
            }
        }
        Ok(())
    }
}

/// The bitmap is there, and can be relied on.
fn expect_good(monitor: &mut Monitor) -> Result<(), Vec<String>> {
    let nodes = monitor.execute("query-named-block-nodes", Object::new());
    let nodes = nodes.map_err(|error| one(error.to_string()))?;
    let nodes = nodes.as_list().unwrap_or_default().iter().filter_map(Value::as_object);
    let bitmaps = nodes.filter_map(|node| node.get("dirty-bitmaps")?.as_list()).flatten();
    let bitmaps: Vec<_> = bitmaps.filter_map(Value::as_object).collect();
    let is = |bitmap: &Object, flag| matches!(bitmap.get(flag), Some(Value::Bool(true)));
    match bitmaps.as_slice() {
        [bitmap] if is(bitmap, "recording") && !is(bitmap, "inconsistent") && !is(bitmap, "busy") => Ok(()),
        [] => Err(one("the bitmap is gone")),
        [bitmap, ..] => Err(one(format!("the bitmap is not good: {}", Value::Object((*bitmap).clone())))),
    }
}

/// Waits for the end of the job.
fn follow(monitor: &mut Monitor, reached: &mut dyn FnMut(&'static str)) -> Result<(), Failure> {
    loop {
        let event = monitor.next_event()?;
        let data = event.get("data").and_then(Value::as_object).cloned().unwrap_or_default();
        match event.get("event").and_then(Value::as_str) {
            Some("JOB_STATUS_CHANGE") => {
                let now = data.get("status").and_then(Value::as_str).unwrap_or_default();
                ["waiting", "pending", "concluded"]
                    .into_iter()
                    .filter(|it| *it == now)
                    .for_each(&mut *reached);
            }
            Some("BLOCK_JOB_COMPLETED") => {
                return match data.get("error").and_then(Value::as_str) {
                    Some(error) => Err(Failure::Refused("the job".to_owned(), error.to_owned())),
                    None => Ok(()),
                };
            }
            _ => {}
        }
    }
}

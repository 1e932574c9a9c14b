//! The operations: what is sent to the monitor, and what must hold of the files if the daemon dies at any moment of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use underlay_graph::BackingRef;
use underlay_qcow2::CreateOptions;
use underlay_qmp::blocking::{Failure, Monitor};
use underlay_qmp::json::{Object, Value};
use underlay_sim::Rng;
use underlay_sys::thread::block_on;

use crate::daemon::{Daemon, Killer, blockdev};
use crate::guest::{Account, Guest};
use crate::model::{BYTES, Model};
use crate::plan::{DISK, Moment, Operation, Plan, Snapshots};

/// What must be found after the kill.
#[derive(Clone, Debug)]
pub struct Expected {
    /// The images of which one has the guest's disk, the likeliest first: a kill in the midst of a change leaves two.
    pub tops: Vec<String>,
    /// The sizes that the disk may have.
    pub sizes: Vec<u64>,
    /// All images that are whole.
    pub images: Vec<String>,
    /// How many of the guest's changes the last snapshot has flushed.
    pub flushed: u64,
    /// An image that is a copy of the guest's disk, and what it may hold.
    pub copy: Option<(String, Model)>,
    /// An image, an internal snapshot of it, and what that may hold.
    pub snapshot: Option<(String, String, Model)>,
}

/// How a job is told where to copy to.
enum Target {
    /// As a node, on this backing node.
    Added(Value),
    /// By its name, with this `mode`.
    Named(&'static str),
}

/// A round on its way: the daemon lives.
pub struct Stage<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// Where everything lies.
    pub folder: &'a Path,
    /// The daemon.
    pub daemon: Daemon,
    /// Its monitor.
    pub monitor: Monitor,
    /// What must be found.
    pub expected: Expected,
    guest: Option<Guest>,
    account: Option<Account>,
    /// How many layers there are.
    layers: usize,
}

/// The name of a layer's node.
fn node(layer: usize) -> String {
    format!("layer{layer}")
}

/// The file that a mirror copies to.
const COPY: &str = "copy.qcow2";

/// The name of a layer's file.
fn file(layer: usize) -> String {
    format!("layer{layer}.qcow2")
}

/// Makes an image.
pub fn make(folder: &Path, name: &str, options: &CreateOptions) -> Result<(), String> {
    let path: PathBuf = folder.join(name);
    block_on(underlay_drivers::create::qcow2(&path.to_string_lossy(), options))
        .map_err(|error| error.to_string())
}

impl<'a> Stage<'a> {
    /// The daemon on a new image, and the guest at work.
    pub fn set(program: &Path, folder: &'a Path, plan: &'a Plan) -> Result<Self, String> {
        make(folder, &file(0), &plan.create)?;
        let (daemon, monitor) = Daemon::start(program, folder, plan, &file(0), &node(0))?;
        let sectors = usize::try_from(DISK).map_err(|error| error.to_string())? / BYTES;
        let guest =
            Guest::start(&daemon.nbd(), Model::new(plan.seed | 1 << 63, sectors), plan.seed, plan.depth)?;
        let expected = Expected {
            tops: vec![file(0)],
            sizes: vec![DISK],
            images: vec![file(0)],
            flushed: 0,
            copy: None,
            snapshot: None,
        };
        let (guest, account, layers) = (Some(guest), None, 1);
        Ok(Self { plan, folder, daemon, monitor, expected, guest, account, layers })
    }

    /// Builds the chain, then does what the plan says until the daemon is dead. What the guest knows.
    pub fn play(mut self) -> Result<(Expected, Account), String> {
        let chain = if self.plan.operation == Operation::Write { 2 } else { 4 };
        for _ in 1..chain {
            self.serve(self.plan.per_layer);
            self.snapshot()?;
        }
        self.serve(self.plan.per_layer);
        let mut killer = self.daemon.killer(self.plan);
        let mut random = Rng::new(!self.plan.seed);
        let outcome = match self.plan.operation {
            Operation::Write => {
                killer.reached(Moment::Issued);
                Ok(())
            }
            Operation::Snapshot => self.snapshots(&mut killer, &mut random),
            Operation::Internal => self.internal_snapshots(&mut killer, &mut random),
            Operation::Stream | Operation::Commit | Operation::Active => self.job(&mut killer, &mut random),
            Operation::Mirror => self.mirror(&mut killer, &mut random),
            Operation::Backup => self.backup(&mut killer, &mut random),
            Operation::Incremental => return Err("incremental backups have rounds of their own".to_owned()),
            Operation::Resize => self.resizes(&mut killer, &mut random),
        };
        killer.finish()?;
        if self.daemon.hung() {
            return Err("the daemon hung".to_owned());
        }
        if let Err(refused @ Failure::Refused(..)) = outcome {
            return Err(refused.to_string());
        }
        if let Some(guest) = self.guest.take() {
            self.account = Some(guest.join()?);
        }
        let mut account = self.account.take().ok_or("no guest")?;
        account.model.flushed(self.expected.flushed);
        Ok((self.expected, account))
    }

    fn serve(&self, requests: u64) {
        if let Some(guest) = &self.guest {
            guest.serve(requests);
        }
    }

    /// A snapshot of the guest's image. Until the answer, either image may be the one with the guest's disk.
    fn snapshot(&mut self) -> Result<(), Failure> {
        let (below, above) = (self.layers - 1, self.layers);
        if self.plan.snapshots != Snapshots::Sync {
            let backing = BackingRef { file: file(below), format: Some("qcow2".to_owned()) };
            let options = CreateOptions { backing: Some(backing), ..self.plan.create.clone() };
            make(self.folder, &file(above), &options).map_err(Failure::Lost)?;
        }
        let sync = Object::new()
            .with("node-name", node(below))
            .with("snapshot-file", file(above))
            .with("snapshot-node-name", node(above))
            .with("format", "qcow2");
        let (command, arguments) = match self.plan.snapshots {
            Snapshots::Sync => ("blockdev-snapshot-sync", sync),
            Snapshots::Existing => ("blockdev-snapshot-sync", sync.with("mode", "existing")),
            Snapshots::Added => {
                let added = blockdev(self.plan, &file(above), &node(above)).with("backing", Value::Null);
                self.monitor.execute("blockdev-add", added)?;
                let arguments = Object::new().with("node", node(below)).with("overlay", node(above));
                ("blockdev-snapshot", arguments)
            }
        };
        // A snapshot makes all that it covers durable, too: the image below is never written again.
        let acknowledged = self.guest.as_ref().map_or(0, Guest::acknowledged);
        self.expected.tops = vec![file(above), file(below)];
        self.monitor.execute(command, arguments)?;
        self.expected.flushed = acknowledged;
        self.expected.tops = vec![file(above)];
        self.expected.images.push(file(above));
        self.layers += 1;
        Ok(())
    }

    fn snapshots(&mut self, killer: &mut Killer, random: &mut Rng) -> Result<(), Failure> {
        killer.reached(Moment::Issued);
        for _ in 0..12 {
            self.snapshot()?;
            self.serve(random.below(60));
        }
        Ok(())
    }

    /// Snapshots inside the guest's image: the newest is of the moment at which it was asked for.
    fn internal_snapshots(&mut self, killer: &mut Killer, random: &mut Rng) -> Result<(), Failure> {
        let device = Object::new().with("device", node(self.layers - 1));
        let mut names: Vec<String> = Vec::new();
        killer.reached(Moment::Issued);
        for number in 0..60 {
            self.serve(random.below(40));
            if names.len() > 1 && random.one_in(3) {
                let gone = names.remove(random.index(names.len() - 1));
                let command = "blockdev-snapshot-delete-internal-sync";
                self.monitor.execute(command, device.clone().with("name", gone))?;
            }
            let Some(guest) = &self.guest else { return Ok(()) };
            let (name, acknowledged) = (format!("s{number}"), guest.acknowledged());
            guest.begin_copy();
            let arguments = device.clone().with("name", name.as_str());
            self.monitor.execute("blockdev-snapshot-internal-sync", arguments)?;
            self.expected.snapshot = Some((file(self.layers - 1), name.clone(), guest.copy()));
            self.expected.flushed = acknowledged;
            names.push(name);
        }
        Ok(())
    }

    /// A job: stream or commit, to its end or the daemon's.
    fn job(&mut self, killer: &mut Killer, random: &mut Rng) -> Result<(), Failure> {
        let variant = self.plan.variant;
        let (command, layers): (_, &[(&str, usize)]) = match self.plan.operation {
            Operation::Stream => {
                let variants: [&[(&str, usize)]; 3] = [
                    &[("device", 3)],
                    &[("device", 3), ("base-node", 0)],
                    &[("device", 2), ("base-node", 0)],
                ];
                ("block-stream", variants[variant % 3])
            }
            Operation::Commit => {
                let variants: [&[(&str, usize)]; 3] = [
                    &[("device", 3), ("base-node", 0), ("top-node", 1)],
                    &[("device", 3), ("base-node", 0), ("top-node", 2)],
                    &[("device", 3), ("base-node", 1), ("top-node", 2)],
                ];
                ("block-commit", variants[variant % 3])
            }
            _ => {
                let variants: [&[(&str, usize)]; 2] =
                    [&[("device", 3), ("base-node", 0)], &[("device", 3), ("base-node", 1)]];
                ("block-commit", variants[variant % 2])
            }
        };
        let mut arguments = Object::new().with("job-id", "job0");
        for (name, layer) in layers {
            arguments.insert(name, node(*layer));
        }
        if self.plan.speed > 0 {
            arguments.insert("speed", self.plan.speed);
        }
        killer.reached(Moment::Issued);
        self.monitor.execute(command, arguments)?;
        self.follow(file(variant % 2), killer, random)
    }

    /// A mirror of the guest's disk to a new image, which the daemon makes or we.
    fn mirror(&mut self, killer: &mut Killer, random: &mut Rng) -> Result<(), Failure> {
        let (sync, is_ours, is_added) = match self.plan.variant {
            0 => ("full", true, true),
            1 => ("full", false, false),
            2 => ("top", false, false),
            3 => ("none", false, false),
            4 => ("top", true, true),
            _ => ("top", true, false),
        };
        if is_ours {
            self.make_copy((sync == "top").then_some(2))?;
        }
        let mode = if self.plan.write_blocking[0] { "write-blocking" } else { "background" };
        let mut arguments = Object::new()
            .with("job-id", "job0")
            .with("device", node(3))
            .with("sync", sync)
            .with("copy-mode", mode);
        if self.plan.speed > 0 {
            arguments.insert("speed", self.plan.speed);
        }
        let target = match (is_added, is_ours) {
            (true, _) => Target::Added(if sync == "top" { Value::from(node(2)) } else { Value::Null }),
            (false, true) => Target::Named("existing"),
            (false, false) => Target::Named("absolute-paths"),
        };
        let command = if is_added { "blockdev-mirror" } else { "drive-mirror" };
        self.name_target(target, &mut arguments)?;
        killer.reached(Moment::Issued);
        self.monitor.execute(command, arguments)?;
        if !is_ours {
            self.expected.images.push(COPY.to_owned());
        }
        self.follow(COPY.to_owned(), killer, random)
    }

    /// Makes the image to copy to, on a layer or on nothing.
    fn make_copy(&mut self, below: Option<usize>) -> Result<(), Failure> {
        let backing = below.map(|at| BackingRef { file: file(at), format: Some("qcow2".to_owned()) });
        let options = CreateOptions { backing, ..self.plan.create.clone() };
        make(self.folder, COPY, &options).map_err(Failure::Lost)?;
        self.expected.images.push(COPY.to_owned());
        Ok(())
    }

    /// The arguments that say where to copy to.
    fn name_target(&mut self, target: Target, arguments: &mut Object) -> Result<(), Failure> {
        match target {
            Target::Added(backing) => {
                let added = blockdev(self.plan, COPY, "copy").with("backing", backing);
                self.monitor.execute("blockdev-add", added)?;
                arguments.insert("target", "copy");
            }
            Target::Named(mode) => {
                arguments.insert("target", COPY);
                arguments.insert("format", "qcow2");
                arguments.insert("mode", mode);
            }
        }
        Ok(())
    }

    /// A backup of the guest's disk to a new image, which the daemon makes or we.
    fn backup(&mut self, killer: &mut Killer, random: &mut Rng) -> Result<(), Failure> {
        let (sync, is_ours, is_added, compress) = match self.plan.variant {
            0 => ("full", true, true, false),
            1 => ("full", false, false, false),
            2 => ("top", false, false, false),
            3 => ("top", true, true, true),
            4 => ("full", true, true, true),
            _ => ("none", true, true, false),
        };
        if is_ours {
            let below = match sync {
                "top" => Some(2),
                // What was overwritten, on top of what was not.
                "none" => Some(3),
                _ => None,
            };
            self.make_copy(below)?;
        }
        let mut arguments = Object::new()
            .with("job-id", "job0")
            .with("device", node(3))
            .with("sync", sync)
            .with("compress", compress);
        if self.plan.speed > 0 {
            arguments.insert("speed", self.plan.speed);
        }
        let target = match (is_added, sync) {
            (true, "top") => Target::Added(Value::from(node(2))),
            (true, "none") => Target::Added(Value::from(node(3))),
            (true, _) => Target::Added(Value::Null),
            (false, _) => Target::Named("absolute-paths"),
        };
        let command = if is_added { "blockdev-backup" } else { "drive-backup" };
        self.name_target(target, &mut arguments)?;
        if let Some(guest) = &self.guest {
            guest.begin_copy();
        }
        killer.reached(Moment::Issued);
        self.monitor.execute(command, arguments)?;
        let copy = self.guest.as_ref().map(Guest::copy);
        if !is_ours {
            self.expected.images.push(COPY.to_owned());
        }
        if sync == "none" {
            std::thread::sleep(Duration::from_micros(random.below(30_000)));
            self.monitor.execute("block-job-cancel", Object::new().with("device", "job0"))?;
            return self.monitor.event("BLOCK_JOB_CANCELLED", "device", "job0").map(|_| ());
        }
        self.follow(COPY.to_owned(), killer, random)?;
        self.expected.copy = copy.map(|model| (COPY.to_owned(), model));
        Ok(())
    }

    /// The job is ready, and has been for a while: brings it to its end. An active commit goes to the image `base`, a
    /// mirror too unless it is cancelled.
    fn end(&mut self, base: &str, killer: &mut Killer) -> Result<(), Failure> {
        let is_mirror = self.plan.operation == Operation::Mirror;
        if is_mirror && self.plan.write_blocking[1] && !self.plan.write_blocking[0] {
            let change = Object::new().with("id", "job0").with("type", "mirror");
            self.monitor.execute("block-job-change", change.with("copy-mode", "write-blocking"))?;
        }
        let command = if self.is_cancelled() { "block-job-cancel" } else { "block-job-complete" };
        if !self.is_cancelled() {
            // From here on the guest's disk is in the base at some moment that only the daemon knows.
            self.expected.tops = vec![base.to_owned(), file(3)];
        }
        killer.reached(Moment::Completing);
        self.monitor.execute(command, Object::new().with("device", "job0"))?;
        Ok(())
    }

    fn is_cancelled(&self) -> bool {
        self.plan.operation == Operation::Mirror && self.plan.cancel
    }

    /// Follows a job's events; an active commit or a mirror goes to the image `base`.
    fn follow(&mut self, base: String, killer: &mut Killer, random: &mut Rng) -> Result<(), Failure> {
        loop {
            let event = self.monitor.next_event()?;
            let data = event.get("data").and_then(Value::as_object).cloned().unwrap_or_default();
            match event.get("event").and_then(Value::as_str) {
                Some("JOB_STATUS_CHANGE") => {
                    let now = data.get("status").and_then(Value::as_str).unwrap_or_default();
                    for status in ["ready", "waiting", "pending", "concluded"] {
                        if now == status {
                            killer.reached(Moment::Status(status));
                        }
                    }
                }
                Some("BLOCK_JOB_READY") => {
                    std::thread::sleep(Duration::from_micros(random.below(15_000)));
                    self.end(&base, killer)?;
                }
                Some("BLOCK_JOB_COMPLETED") => {
                    if let Some(error) = data.get("error").and_then(Value::as_str) {
                        return Err(Failure::Refused("the job".to_owned(), error.to_owned()));
                    }
                    let is_switched = matches!(self.plan.operation, Operation::Active | Operation::Mirror);
                    if is_switched && !self.is_cancelled() {
                        self.expected.tops = vec![base];
                    }
                    return Ok(());
                }
                _ => {}
            }
        }
    }

    /// Other sizes, never less than what the guest uses. An image that a guest may write cannot be resized, so the
    /// guest leaves for each.
    fn resizes(&mut self, killer: &mut Killer, random: &mut Rng) -> Result<(), Failure> {
        let (mut size, top) = (DISK, node(self.layers - 1));
        killer.reached(Moment::Issued);
        loop {
            let Some(guest) = self.guest.take() else { return Ok(()) };
            let account = guest.stop().map_err(Failure::Lost)?;
            let (model, is_over) = (account.model.clone(), account.lost || !account.wrong.is_empty());
            self.account = Some(account);
            if is_over {
                return Ok(());
            }
            let export = Object::new().with("id", "guest");
            self.monitor.execute("block-export-del", export.clone().with("mode", "hard"))?;
            self.monitor.event("BLOCK_EXPORT_DELETED", "id", "guest")?;
            let most = random.pick(&[2, 1 << 10, 1 << 21]);
            let next = DISK + 512 * random.below(most);
            self.expected.sizes = vec![size, next];
            let arguments = Object::new().with("node-name", top.as_str()).with("size", next);
            self.monitor.execute("block_resize", arguments)?;
            (size, self.expected.sizes) = (next, vec![next]);
            let export = export.with("type", "nbd").with("node-name", top.as_str());
            self.monitor.execute("block-export-add", export.with("name", "disk").with("writable", true))?;
            let guest = Guest::start(&self.daemon.nbd(), model, random.number(), self.plan.depth);
            self.guest = Some(guest.map_err(Failure::Lost)?);
            self.account = None;
            self.serve(random.below(60));
        }
    }
}

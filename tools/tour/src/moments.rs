//! Stops at which a copy must be the disk of a moment: the guest rests at that moment, only to say what its disk holds.

use std::path::Path;

use underlay_qcow2::CreateOptions;
use underlay_qmp::blocking::Monitor;
use underlay_qmp::json::Object;
use underlay_sys::thread::block_on;

use crate::cases::{Case, End};
use crate::guest::Guest;
use crate::{DISK, Daemon, Stop, job_end};

/// What became of a job.
#[derive(Default)]
pub(crate) struct Copied {
    /// Bytes it went through.
    pub(crate) bytes: u64,
    /// Blocks of its copy that are wrong.
    pub(crate) wrong: u64,
    /// Where the guest is now.
    pub(crate) far: Option<Far>,
}

/// The second daemon.
pub(crate) struct Far {
    daemon: Daemon,
    monitor: Monitor,
}

impl Far {
    /// A second daemon, with an empty disk for the guest.
    fn start(folder: &Path) -> Result<Self, String> {
        let daemon = Daemon::start(folder, "far-")?;
        let mut monitor = Monitor::connect(&folder.join("far-qmp.sock"))?;
        let (file, options) = (folder.join("far.qcow2"), CreateOptions::new(DISK));
        let made = block_on(underlay_drivers::create::qcow2(&file.to_string_lossy(), &options));
        made.map_err(|error| error.to_string())?;
        let file = Object::new().with("driver", "file").with("filename", "far.qcow2");
        let disk = Object::new().with("driver", "qcow2").with("node-name", "far").with("file", file);
        monitor.execute("blockdev-add", disk)?;
        let export = Object::new().with("type", "nbd").with("id", "far").with("node-name", "far");
        monitor.execute("block-export-add", export.with("name", "disk").with("writable", true))?;
        Ok(Self { daemon, monitor })
    }

    /// Ends it; whether that went well.
    pub(crate) fn end(mut self) -> Result<bool, String> {
        self.monitor.execute("quit", Object::new())?;
        let ended = self.daemon.child.wait().map_err(|error| format!("the second daemon: {error}"))?;
        Ok(ended.success())
    }
}

impl Stop {
    /// Runs the case's job.
    pub(crate) fn copy_a_moment(
        &self,
        monitor: &mut Monitor,
        case: &Case,
        guest: &Guest,
    ) -> Result<Copied, String> {
        if case.end == End::Migrate {
            return self.migrate(monitor, case, guest);
        }
        let (bytes, moment) = match case.end {
            End::Backup => {
                let moment = guest.rest()?;
                self.start_job(monitor, case)?;
                guest.go_on(None)?;
                self.watch_job(monitor, false)?;
                (job_end(monitor, case)?, moment)
            }
            _ => {
                self.start_job(monitor, case)?;
                self.watch_job(monitor, true)?;
                let moment = guest.rest()?;
                monitor.execute("block-job-cancel", Object::new().with("device", "job0"))?;
                let bytes = job_end(monitor, case)?;
                guest.go_on(None)?;
                (bytes, moment)
            }
        };
        let file = Object::new().with("driver", "file").with("filename", self.file("E"));
        let copy = Object::new().with("driver", "qcow2").with("node-name", "copy").with("file", file);
        monitor.execute("blockdev-add", copy.with("read-only", true))?;
        let export = Object::new().with("type", "nbd").with("id", "copy").with("node-name", "copy");
        monitor.execute("block-export-add", export)?;
        let wrong = moment.differences(&self.folder.join("nbd.sock"), "copy")?;
        monitor.execute("block-export-del", Object::new().with("id", "copy").with("mode", "hard"))?;
        monitor.event("BLOCK_EXPORT_DELETED", "id", "copy")?;
        monitor.execute("blockdev-del", Object::new().with("node-name", "copy"))?;
        Ok(Copied { bytes, wrong, far: None })
    }

    /// The storage migration of the document: a second daemon exports an empty disk, the job copies to it, and when
    /// both are the same the job ends and the guest goes on there.
    fn migrate(&self, monitor: &mut Monitor, case: &Case, guest: &Guest) -> Result<Copied, String> {
        let far = Far::start(&self.folder)?;
        self.start_job(monitor, case)?;
        self.watch_job(monitor, true)?;
        let moment = guest.rest()?;
        monitor.execute("block-job-cancel", Object::new().with("device", "job0"))?;
        let bytes = job_end(monitor, case)?;
        let socket = self.folder.join("far-nbd.sock");
        let wrong = moment.differences(&socket, "disk")?;
        guest.go_on(Some((&socket, "disk")))?;
        Ok(Copied { bytes, wrong, far: Some(far) })
    }
}

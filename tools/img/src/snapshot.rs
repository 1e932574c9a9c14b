//! `snapshot`: lists, takes, applies and deletes internal snapshots; and how other subcommands find one.

use std::time::{Duration, SystemTime};

use underlay_graph::info::SnapshotInfo;
use underlay_graph::{Cx, IoError};
use underlay_qcow2::Qcow2;
use underlay_qcow2::snapshot_changes::NewSnapshot;
use underlay_qmp::json::Value;
use underlay_sys::{complain, say};

use crate::getopt::Known;
use crate::help::Help;
use crate::open::{How, Image, image};
use crate::{Failure, Outcome, snapshot_list};

const KNOWN: Known = Known {
    short: "hf:la:c:d:qU",
    long: &[
        ("help", "h", false),
        ("format", "f", true),
        ("image-opts", "image-opts", false),
        ("object", "object", true),
        ("quiet", "q", false),
        ("force-share", "U", false),
        ("list", "l", false),
        ("apply", "a", true),
        ("create", "c", true),
        ("delete", "d", true),
    ],
};

/// See [`Help`].
pub const HELP: Help = Help {
    command: "snapshot",
    usage: "\
Usage: qemu-img snapshot [-l | -a SNAPSHOT | -c SNAPSHOT | -d SNAPSHOT] [-f FMT | --image-opts] [-q] [-U] FILENAME",
    known: KNOWN,
};

/// What to do.
#[derive(Debug)]
enum Action {
    List,
    Apply(String),
    Create(String),
    Delete(String),
}

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = crate::options("snapshot", KNOWN, words)?;
    let (mut action, mut image_opts, mut force_share, mut format) = (None, false, false, None);
    for (name, value) in options {
        let wanted = match name.as_str() {
            "h" => return HELP.print(),
            "f" => {
                format = Some(value);
                continue;
            }
            "image-opts" => {
                image_opts = true;
                continue;
            }
            // Nothing is said anyway.
            "q" => continue,
            "U" => {
                force_share = true;
                continue;
            }
            "l" => Action::List,
            "a" => Action::Apply(value),
            "c" => Action::Create(value),
            "d" => Action::Delete(value),
            other => return Err(crate::unsupported(other)),
        };
        if action.replace(wanted).is_some() {
            return Err(Failure::usage("Cannot mix '-l', '-a', '-c', '-d'", "snapshot"));
        }
    }
    let [name] = others.as_slice() else {
        return Err(Failure::usage("Expecting one image file name", "snapshot"));
    };
    let action = action.unwrap_or(Action::List);
    let write = !matches!(action, Action::List);
    let resize = matches!(action, Action::Apply(_));
    let how = How { format: format.as_deref(), image_opts, force_share, write, resize, ..How::default() };
    let opened = image(name, how).await?;
    if write {
        opened.warn_if_guessed();
    }
    let done = perform(&opened, &action).await;
    let closed = opened.close().await;
    done.and(closed)
}

async fn perform(opened: &Image, action: &Action) -> Outcome {
    let failed = |error: IoError| Failure::with_hint(error.to_string(), error.hint());
    let inside = opened.root.enter().await.map_err(failed)?;
    let cx = inside.cx();
    // A filter has the snapshots of what it filters.
    let cx = cx.skip_filters();
    let qcow2 = cx.node().as_any().downcast_ref::<Qcow2>();
    if let Some(error) = qcow2.and_then(Qcow2::snapshots_error) {
        return Err(failed(error));
    }
    let known = qcow2.map(Qcow2::snapshots).unwrap_or_default();
    match (action, qcow2) {
        (Action::List, _) if known.is_empty() => Ok(()),
        (Action::List, _) => {
            say!("Snapshot list:");
            snapshot_list::lines(&known).iter().for_each(|line| say!("{line}"));
            Ok(())
        }
        (Action::Create(name), Some(qcow2)) => {
            let taken = qcow2.take_snapshot(&cx, &new(name)).await;
            taken.map_err(|error| refused("create", name, &error))?;
            Ok(())
        }
        (Action::Create(name), None) => Err(refused("create", name, &IoError::ENOTSUP)),
        (Action::Apply(name), Some(qcow2)) => apply(qcow2, &cx, name, &known).await,
        (Action::Apply(name), None) => {
            // Another time: the reference tries below the image and opens it anew.
            opened.warn_if_guessed();
            Err(refused("apply", name, &"Block driver does not support snapshots"))
        }
        (Action::Delete(name), qcow2) => {
            let place = known.iter().position(|snapshot| snapshot.name == *name);
            let (Some(qcow2), Some(place)) = (qcow2, place) else {
                return Err(refused("delete", name, &"snapshot not found"));
            };
            let deleted = qcow2.delete_snapshot(&cx, place).await;
            deleted.map_err(|error| refused("delete", name, &error))
        }
    }
}

async fn apply(qcow2: &Qcow2, cx: &Cx<'_>, name: &str, known: &[SnapshotInfo]) -> Outcome {
    qcow2.check_no_bitmaps().map_err(|error| refused("apply", name, &error))?;
    let Some(place) = by_id_or_name(known, name) else {
        return Err(refused("apply", name, &"Failed to load snapshot: No such file or directory"));
    };
    qcow2.apply_snapshot(cx, place).await.map_err(|error| refused("apply", name, &error))
}

fn refused(what: &str, name: &str, why: &dyn std::fmt::Display) -> Failure {
    Failure::new(format!("Could not {what} snapshot '{name}': {why}"))
}

/// A snapshot that is taken now, without a guest.
fn new(name: &str) -> NewSnapshot {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    NewSnapshot {
        name: name.to_owned(),
        seconds: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
        // The reference's clock has microseconds.
        nanoseconds: now.subsec_micros() * 1000,
        clock: 0,
        icount: Some(0),
    }
}

/// The place of the snapshot with an id, or else that with a name.
fn by_id_or_name(known: &[SnapshotInfo], wanted: &str) -> Option<usize> {
    let by_id = known.iter().position(|snapshot| snapshot.id == wanted);
    by_id.or_else(|| known.iter().position(|snapshot| snapshot.name == wanted))
}

/// Which snapshot an image is to be read as, as `convert -l` says it.
#[derive(Clone, Debug, PartialEq)]
pub enum Wanted {
    /// An id or a name.
    Either(String),
    /// An id, a name or both.
    Exactly {
        /// The id.
        id: Option<String>,
        /// The name.
        name: Option<String>,
    },
}

impl Wanted {
    /// From the argument of `-l` of that program.
    pub fn parse(program: &str, text: &str) -> Result<Self, Failure> {
        if !text.starts_with("snapshot.") {
            return Ok(Self::Either(text.to_owned()));
        }
        let list = underlay_disk::parse_options(text, None);
        for warning in list.warnings {
            complain!("{program}: {warning}");
        }
        let (mut id, mut name) = (None, None);
        for (key, value) in list.options {
            let text_of = |value: Value| value.as_str().map(str::to_owned);
            match key.as_str() {
                "snapshot.id" => id = text_of(value),
                "snapshot.name" => name = text_of(value),
                other => {
                    return Err(Failure::new(format!(
                        "Invalid parameter '{other}'\nqemu-img: Failed in parsing snapshot param '{text}'"
                    )));
                }
            }
        }
        Ok(Self::Exactly { id, name })
    }

    fn find(&self, known: &[SnapshotInfo]) -> Option<usize> {
        let is = |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|wanted| wanted == found);
        match self {
            Self::Either(wanted) => by_id_or_name(known, wanted),
            Self::Exactly { id: None, name: None } => None,
            Self::Exactly { id, name } => {
                known.iter().position(|snapshot| is(id, &snapshot.id) && is(name, &snapshot.name))
            }
        }
    }

    /// Has an image that nobody writes to read as it was then. The text of an error is the reference's.
    pub async fn show(&self, cx: &Cx<'_>) -> Result<(), String> {
        let failed = |why: &dyn std::fmt::Display| format!("Failed to load snapshot: {why}");
        let Some(qcow2) = cx.node().as_any().downcast_ref::<Qcow2>() else {
            let driver = cx.node().driver();
            return Err(failed(&format_args!(
                "Block format '{driver}' used by device '' does not support temporarily loading internal snapshots"
            )));
        };
        let place = self.find(&qcow2.snapshots()).ok_or_else(|| failed(&"Can't find snapshot"))?;
        qcow2.show_snapshot(cx, place).await.map_err(|error| failed(&error))
    }
}

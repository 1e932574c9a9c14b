//! transaction: several actions in one change of the graph, all or none of them.
//!
//! Each action is done in its turn to one draft of the graph, as those before it have left it: a backup may copy the
//! overlay that a snapshot has just brought. Files are made and opened on the way, and jobs are shown. Then the draft
//! is put into force: it is the one moment of all snapshots and backups. If any of it is refused, nothing has happened
//! but for files that were made, as with QEMU. A command that could be an action is a transaction of one.

use underlay_graph::graph::LastStep;
use underlay_graph::{Draft, Plan};
use underlay_jobs::BackupDraft;
use underlay_jobs::backup::start_all;

use super::arguments::Arguments;
use super::bitmap::GivenUp;
use super::internal_snapshot::{AtTheMoment, Take};
use super::lookup::Names;
use super::snapshot::{self, SnapshotSync};
use super::{backup, bitmap, job};
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// transaction
pub async fn transaction(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let properties = arguments.object("properties");
    let grouped = properties
        .and_then(|mut properties| properties.optional_text("completion-mode"))
        .is_some_and(|mode| mode == "grouped");
    let with_kind = |mut action: Arguments| (action.text("type"), action);
    let wanted: Vec<_> = arguments.objects("actions").into_iter().map(with_kind).collect();
    if let Some((kind, _)) = wanted.iter().find(|(kind, _)| grouped && !is_backup(kind)) {
        // Only jobs can be completed together.
        return Err(CommandError::new(format!(
            "Action '{kind}' does not support transaction property completion-mode = grouped"
        )));
    }
    let mut draft = daemon.graph.draft().await;
    let mut done = Done::default();
    let mut result = Ok(());
    for (kind, mut action) in wanted {
        let data = action.object("data").unwrap_or_else(|| Arguments::new(Default::default()));
        result = done.action(daemon, &mut draft.plan, &kind, data).await;
        if result.is_err() {
            break;
        }
    }
    if result.is_ok() {
        result = done.put_in_force(draft).await;
    }
    let backups = done.backups;
    match &result {
        Ok(()) => start_all(backups, grouped).into_iter().for_each(|job| job::start(daemon, job)),
        Err(_) => backups.into_iter().rev().for_each(BackupDraft::withdraw),
    }
    result
}

/// A command by itself that could be an action other than a job; `None` if it is something else.
pub async fn alone(daemon: &Daemon, command: &str, arguments: &mut Arguments) -> Option<CommandResult<()>> {
    let snapshots = ["blockdev-snapshot", "blockdev-snapshot-sync", "blockdev-snapshot-internal-sync"];
    if !snapshots.contains(&command) && !command.starts_with("block-dirty-bitmap-") {
        return None;
    }
    let mut draft = daemon.graph.draft().await;
    let mut done = Done::default();
    let arguments = std::mem::replace(arguments, Arguments::new(Default::default()));
    Some(match done.action(daemon, &mut draft.plan, command, arguments).await {
        Ok(()) => done.put_in_force(draft).await,
        Err(error) => Err(error),
    })
}

/// What actions have done apart from the draft.
#[derive(Default)]
struct Done {
    /// Not only to bitmaps.
    to_nodes: bool,
    given_up: Vec<GivenUp>,
    takes: Vec<Take>,
    /// Shown already.
    backups: Vec<BackupDraft>,
}

impl Done {
    async fn action(
        &mut self,
        daemon: &Daemon,
        plan: &mut Plan,
        kind: &str,
        mut data: Arguments,
    ) -> CommandResult<()> {
        if let Some(action) = bitmap::Action::new(kind, &mut data) {
            self.given_up.extend(action.apply(&Names::of(daemon), plan)?);
            return Ok(());
        }
        self.to_nodes = true;
        match kind {
            "blockdev-snapshot-sync" => {
                snapshot::snapshot_sync(daemon, plan, SnapshotSync::new(&mut data)).await?;
            }
            "blockdev-snapshot" => {
                snapshot::snapshot(daemon, plan, &data.text("node"), &data.text("overlay"))?;
            }
            "blockdev-snapshot-internal-sync" => {
                self.takes.push(Take::new(daemon, plan, &mut data, &self.takes)?);
            }
            "abort" => return Err(CommandError::new("Transaction aborted using Abort action")),
            _ if is_backup(kind) => self.backups.push(backup::draft(daemon, plan, kind, &mut data).await?),
            other => return Err(CommandError::new(format!("Action '{other}' is not supported yet"))),
        }
        // What users do not get on is for each action to say, and not for the draft as a whole.
        plan.check()?;
        Ok(())
    }

    async fn put_in_force(&mut self, mut draft: Draft<'_>) -> CommandResult<()> {
        let mut step = bitmap::let_go(&mut draft.plan, std::mem::take(&mut self.given_up));
        if !self.to_nodes {
            draft.plan.wait_at_most(bitmap::PATIENCE);
        }
        let takes = std::mem::take(&mut self.takes);
        if !takes.is_empty() {
            let with_takes: Box<dyn LastStep> = Box::new(AtTheMoment { takes, rest: step });
            step = Some(with_takes);
        }
        Ok(draft.put_in_force(step).await?)
    }
}

fn is_backup(kind: &str) -> bool {
    matches!(kind, "blockdev-backup" | "drive-backup")
}

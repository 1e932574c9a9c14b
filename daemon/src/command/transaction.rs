//! transaction: several actions in one change of the graph, all or none of them.
//!
//! Each action is prepared in its turn (files are made and opened, jobs are shown); then one change of the plan does what
//! all of them want: it is the one moment of all snapshots and backups. If any of it is refused, nothing has happened
//! but for files that were made, as with QEMU.

use underlay_graph::graph::LastStep;
use underlay_graph::{GraphError, NodeId, Plan};
use underlay_jobs::BackupDraft;
use underlay_jobs::backup::start_all;

use super::arguments::Arguments;
use super::internal_snapshot::{AtTheMoment, Take};
use super::lookup::Names;
use super::snapshot::{self, Prepared, SnapshotSync};
use super::{backup, bitmap, job};
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// An action that is prepared.
enum Action {
    /// One edit of the plan.
    Snapshot(Option<Prepared>),
    /// An edit of the plan.
    Bitmap(bitmap::Action),
    /// A snapshot inside an image.
    Internal(Take),
    /// A job to start.
    Backup(Box<BackupDraft>),
}

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
    let mut actions: Vec<Action> = Vec::new();
    // To see what is wrong with an action before a later one makes files.
    let mut trial = Plan::clone(&daemon.graph.plan());
    let mut result = Ok(());
    for (kind, action) in wanted {
        let earlier = Earlier {
            names: actions.iter().filter_map(Action::brings).collect(),
            targets: actions.iter().filter_map(Action::target).collect(),
        };
        match prepare(daemon, &kind, action, earlier, &mut trial).await {
            Ok(action) => actions.push(action),
            Err(error) => {
                result = Err(error);
                break;
            }
        }
    }
    if result.is_ok() {
        let names = Names::of(daemon);
        let edit = |plan: &mut Plan| {
            actions.iter_mut().try_for_each(|action| action.apply(&names, plan))?;
            let rest = bitmap::finish(&names, plan, actions.iter().filter_map(Action::bitmap));
            let takes: Vec<Take> = actions.iter().filter_map(Action::internal).cloned().collect();
            if takes.is_empty() {
                return Ok(((), rest));
            }
            let step: Box<dyn LastStep> = Box::new(AtTheMoment { takes, rest });
            Ok(((), Some(step)))
        };
        result = daemon.graph.change_with(edit).await.map_err(CommandError::from);
    }
    let backups = actions.into_iter().filter_map(Action::into_backup);
    match &result {
        Ok(()) => start_all(backups.collect(), grouped).into_iter().for_each(|job| job::start(daemon, job)),
        Err(_) => backups.rev().for_each(BackupDraft::withdraw),
    }
    result
}

/// What the actions before one will have changed.
struct Earlier {
    /// Names of nodes that they bring.
    names: Vec<String>,
    /// Nodes that backups write to.
    targets: Vec<NodeId>,
}

impl Action {
    fn apply(&mut self, names: &Names, plan: &mut Plan) -> Result<(), GraphError> {
        match self {
            Self::Snapshot(prepared) => prepared.take().map_or(Ok(()), |prepared| prepared.apply(plan)),
            Self::Bitmap(action) => action.apply(names, plan),
            Self::Internal(take) => take.apply(plan),
            Self::Backup(draft) => draft.wire(plan),
        }
    }

    fn bitmap(&self) -> Option<&bitmap::Action> {
        match self {
            Self::Bitmap(action) => Some(action),
            _ => None,
        }
    }

    fn internal(&self) -> Option<&Take> {
        match self {
            Self::Internal(take) => Some(take),
            _ => None,
        }
    }

    fn into_backup(self) -> Option<BackupDraft> {
        match self {
            Self::Backup(draft) => Some(*draft),
            _ => None,
        }
    }

    /// The name of the node that it brings along.
    fn brings(&self) -> Option<String> {
        match self {
            Self::Snapshot(Some(prepared)) => prepared.brings.clone(),
            _ => None,
        }
    }

    fn target(&self) -> Option<NodeId> {
        match self {
            Self::Backup(draft) => draft.target(),
            _ => None,
        }
    }
}

fn is_backup(kind: &str) -> bool {
    matches!(kind, "blockdev-backup" | "drive-backup")
}

async fn prepare(
    daemon: &Daemon,
    kind: &str,
    mut action: Arguments,
    earlier: Earlier,
    trial: &mut Plan,
) -> CommandResult<Action> {
    let mut data = action.object("data").unwrap_or_else(|| Arguments::new(Default::default()));
    if let Some(action) = bitmap::Action::new(kind, &mut data) {
        if !earlier.names.contains(&action.node) {
            action.apply(&Names::of(daemon), trial)?;
        }
        return Ok(Action::Bitmap(action));
    }
    match kind {
        "blockdev-snapshot-sync" => {
            let arguments = SnapshotSync::new(&mut data);
            let prepared = snapshot::prepare_sync(daemon, arguments, &earlier.names).await?;
            Ok(Action::Snapshot(Some(prepared)))
        }
        "blockdev-snapshot" => {
            let prepared = snapshot::prepare(daemon, &data.text("node"), &data.text("overlay"))?;
            Ok(Action::Snapshot(Some(prepared)))
        }
        "blockdev-snapshot-internal-sync" => Ok(Action::Internal(Take::new(daemon, &mut data)?)),
        "abort" => Err(CommandError::new("Transaction aborted using Abort action")),
        _ if is_backup(kind) => {
            let draft = backup::draft(daemon, trial, kind, &mut data, &earlier.targets).await?;
            Ok(Action::Backup(Box::new(draft)))
        }
        other => Err(CommandError::new(format!("Action '{other}' is not supported yet"))),
    }
}

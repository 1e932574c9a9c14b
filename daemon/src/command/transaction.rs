//! transaction: several actions in one change of the graph, all or none of them.
//!
//! Each action is prepared in its turn (files are made and opened); then one change of the plan does what all of them
//! want. If any of it is refused, nothing has happened but for files that were made, as with QEMU.

use underlay_graph::Plan;

use super::arguments::Arguments;
use super::snapshot::{self, Prepared, SnapshotSync};
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// transaction
pub async fn transaction(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let properties = arguments.object("properties");
    let grouped = properties
        .and_then(|mut properties| properties.optional_text("completion-mode"))
        .is_some_and(|mode| mode == "grouped");
    let mut prepared: Vec<Prepared> = Vec::new();
    for action in arguments.objects("actions") {
        let taken: Vec<_> = prepared.iter().filter_map(|action| action.brings.clone()).collect();
        prepared.push(prepare(daemon, action, &taken, grouped).await?);
    }
    let edit = |plan: &mut Plan| prepared.into_iter().try_for_each(|action| action.apply(plan));
    Ok(daemon.graph.change(edit).await?)
}

async fn prepare(
    daemon: &Daemon,
    mut action: Arguments,
    taken: &[String],
    grouped: bool,
) -> CommandResult<Prepared> {
    let kind = action.text("type");
    let mut data = action.object("data").unwrap_or_else(|| Arguments::new(Default::default()));
    // Only jobs can be completed together.
    if grouped {
        return Err(CommandError::new(format!(
            "Action '{kind}' does not support transaction property completion-mode = grouped"
        )));
    }
    match kind.as_str() {
        "blockdev-snapshot-sync" => snapshot::prepare_sync(daemon, SnapshotSync::new(&mut data), taken).await,
        "blockdev-snapshot" => snapshot::prepare(daemon, &data.text("node"), &data.text("overlay")),
        "abort" => Err(CommandError::new("Transaction aborted using Abort action")),
        other => Err(CommandError::new(format!("Action '{other}' is not supported yet"))),
    }
}

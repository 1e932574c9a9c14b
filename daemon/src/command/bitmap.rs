//! block-dirty-bitmap-*: each an edit of the plan, alone or in a transaction.

use std::time::Duration;

use sha2::{Digest, Sha256};
use underlay_graph::bitmap::DirtyBitmap;
use underlay_graph::bitmaps::{Forget, NewBitmap};
use underlay_graph::graph::LastStep;
use underlay_graph::{GraphError, NodeId, Plan};
use underlay_qmp::json::{Object, Value};

use super::arguments::Arguments;
use super::lookup::Names;
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// How long a command that only changes bitmaps waits for the requests that are under way. QEMU's do not wait at all:
/// a job's target that does not answer must not hold up the guest for them.
pub const PATIENCE: Duration = Duration::from_secs(15);

/// What to do with a bitmap of a node.
#[derive(Debug)]
pub struct Action {
    node: String,
    name: String,
    verb: Verb,
}

#[derive(Debug)]
enum Verb {
    Add { granularity: Option<u64>, persistent: bool, enabled: bool },
    Remove,
    Clear,
    Enable(bool),
    Merge(Vec<Source>),
}

/// A bitmap to be merged.
#[derive(Debug)]
struct Source {
    node: String,
    name: String,
}

impl Action {
    /// From a command's arguments, or `None` if the command is about something else.
    pub fn new(command: &str, arguments: &mut Arguments) -> Option<Self> {
        let verb = match command.strip_prefix("block-dirty-bitmap-")? {
            "add" => Verb::Add {
                granularity: arguments
                    .has("granularity")
                    .then(|| u64::try_from(arguments.number("granularity", 0)).unwrap_or(0)),
                persistent: arguments.flag("persistent", false),
                enabled: !arguments.flag("disabled", false),
            },
            "remove" => Verb::Remove,
            "clear" => Verb::Clear,
            "enable" => Verb::Enable(true),
            "disable" => Verb::Enable(false),
            "merge" => Verb::Merge(Vec::new()),
            _ => return None,
        };
        let node = arguments.text("node");
        Some(match verb {
            Verb::Merge(_) => {
                let verb = Verb::Merge(sources(arguments, &node));
                Self { node, name: arguments.text("target"), verb }
            }
            verb => Self { node, name: arguments.text("name"), verb },
        })
    }

    /// Does it to a draft. A bitmap that it gives up is to be let go of after all other actions.
    pub fn apply(&self, names: &Names, plan: &mut Plan) -> Result<Option<GivenUp>, GraphError> {
        let (name, node) = (&*self.name, find(names, plan, &self.node)?);
        if let Verb::Add { granularity, persistent, enabled } = self.verb {
            let node = node.ok_or_else(|| GraphError::NeitherDeviceNorNode(self.node.clone()))?;
            plan.add_bitmap(node, &NewBitmap { name, granularity, persistent, enabled })?;
            return Ok(None);
        }
        let node = node.ok_or_else(|| not_found(&self.node))?;
        match &self.verb {
            Verb::Add { .. } => {}
            Verb::Remove => {
                plan.give_up_bitmap(node, name)?;
                return Ok(Some(GivenUp { node, name: name.to_owned() }));
            }
            Verb::Clear => plan.clear_bitmap(node, name)?,
            Verb::Enable(enabled) => plan.enable_bitmap(node, name, *enabled)?,
            Verb::Merge(sources) => {
                // What is wrong with the target comes first.
                plan.merge_bitmaps(node, name, &[])?;
                let find =
                    |source: &Source| find(names, plan, &source.node)?.ok_or_else(|| not_found(&source.node));
                let nodes = sources.iter().map(find).collect::<Result<Vec<_>, _>>()?;
                let names = sources.iter().map(|source| &*source.name);
                plan.merge_bitmaps(node, name, &nodes.into_iter().zip(names).collect::<Vec<_>>())?;
            }
        }
        Ok(None)
    }
}

/// A bitmap that nobody may use any more.
#[derive(Debug)]
pub struct GivenUp {
    node: NodeId,
    name: String,
}

/// After all actions were done to a draft: lets go of bitmaps that are given up. Images that keep them forget them in
/// the step.
pub fn let_go(plan: &mut Plan, given_up: Vec<GivenUp>) -> Option<Box<dyn LastStep>> {
    let mut stored = Vec::new();
    for GivenUp { node, name } in given_up {
        let is_stored = plan.bitmap(node, &name).is_ok_and(|bitmap| bitmap.persistent);
        plan.drop_bitmap(node, &name);
        if is_stored {
            plan.touch(node);
            stored.push((node, name));
        }
    }
    if stored.is_empty() { None } else { Some(Box::new(Forget(stored))) }
}

fn find(names: &Names, plan: &Plan, name: &str) -> Result<Option<NodeId>, GraphError> {
    names.find(plan, name).map_err(|error| GraphError::new(error.desc))
}

fn not_found(node: &str) -> GraphError {
    GraphError::new(format!("Node '{node}' not found"))
}

fn sources(arguments: &mut Arguments, node: &str) -> Vec<Source> {
    let Some(Value::List(list)) = arguments.take("bitmaps") else { return Vec::new() };
    let source = |value| match value {
        Value::Str(name) => Some(Source { node: node.to_owned(), name }),
        Value::Object(object) => {
            let mut elsewhere = Arguments::new(object);
            Some(Source { node: elsewhere.text("node"), name: elsewhere.text("name") })
        }
        _ => None,
    };
    list.into_iter().filter_map(source).collect()
}

/// x-debug-block-dirty-bitmap-sha256
pub fn sha256(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<Value> {
    let plan = daemon.graph.plan();
    let (node, name) = (arguments.text("node"), arguments.text("name"));
    let found = Names::of(daemon).find(&plan, &node)?;
    let node = found.ok_or_else(|| CommandError::from(not_found(&node)))?;
    let hash = hash(&plan.bitmap(node, &name)?.bits);
    Ok(Object::new().with("sha256", hash).into())
}

/// Of the bits as little-endian words of 64, as many as there are granules for.
fn hash(bits: &DirtyBitmap) -> String {
    let mut hasher = Sha256::new();
    let words = bits.size().div_ceil(bits.granularity()).div_ceil(64).max(1);
    let mut done = 0;
    let zeroes = |hasher: &mut Sha256, count: u64| (0..count).for_each(|_| hasher.update([0; 8]));
    bits.for_each_chunk(|first, chunk| {
        zeroes(&mut hasher, first / 64 - done);
        done = first / 64;
        for word in chunk.iter().take(usize::try_from(words - done).unwrap_or(usize::MAX)) {
            hasher.update(word.to_le_bytes());
        }
        done = words.min(done + chunk.len() as u64);
    });
    zeroes(&mut hasher, words - done);
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

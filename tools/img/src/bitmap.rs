//! `bitmap`: changes the persistent bitmaps of an image; and how `convert` copies them.

use underlay_graph::bitmaps::{Forget, NewBitmap};
use underlay_graph::graph::LastStep;
use underlay_graph::{Graph, GraphError, NodeId, Plan};
use underlay_qcow2::{Qcow2, Version};
use underlay_sys::complain;

use crate::getopt::Known;
use crate::help::Help;
use crate::open::{How, Image, image, image_in};
use crate::{Failure, Outcome, sizes};

const KNOWN: Known = Known {
    short: "b:f:F:g:h",
    long: &[
        ("help", "h", false),
        ("object", "object", true),
        ("image-opts", "image-opts", false),
        ("format", "f", true),
        ("source-file", "b", true),
        ("source-format", "F", true),
        ("granularity", "g", true),
        ("add", "add", false),
        ("remove", "remove", false),
        ("clear", "clear", false),
        ("enable", "enable", false),
        ("disable", "disable", false),
        ("merge", "merge", true),
    ],
};

/// See [`Help`].
pub const HELP: Help = Help {
    command: "bitmap",
    usage: "\
Usage: qemu-img bitmap (--add [-g SIZE] | --remove | --clear | --enable | --disable | --merge SOURCE)...
         [-f FMT | --image-opts] [-b SOURCE_FILENAME [-F SOURCE_FMT]] FILENAME BITMAP",
    known: KNOWN,
};

/// What to do with the bitmap.
#[derive(Debug)]
enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    /// Adds what this one says.
    Merge(String),
}

impl Action {
    fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

/// Where the bitmap is, and the one that is merged into it.
struct Place<'a> {
    graph: &'a Graph,
    node: NodeId,
    name: &'a str,
    source: NodeId,
    granularity: Option<u64>,
}

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = crate::options("bitmap", KNOWN, words)?;
    let (mut actions, mut image_opts) = (Vec::new(), false);
    let (mut format, mut source, mut source_format, mut granularity) = (None, None, None, None);
    for (name, value) in options {
        match name.as_str() {
            "h" => return HELP.print(),
            "image-opts" => image_opts = true,
            "f" => format = Some(value),
            "b" => source = Some(value),
            "F" => source_format = Some(value),
            "g" => granularity = Some(sizes::argument(&value, "granularity")?).filter(|size| *size > 0),
            "add" => actions.push(Action::Add),
            "remove" => actions.push(Action::Remove),
            "clear" => actions.push(Action::Clear),
            "enable" => actions.push(Action::Enable),
            "disable" => actions.push(Action::Disable),
            "merge" => actions.push(Action::Merge(value)),
            other => return Err(crate::unsupported(other)),
        }
    }
    if actions.is_empty() {
        return Err(Failure::new(NO_ACTION));
    }
    if granularity.is_some() && !actions.iter().any(|action| matches!(action, Action::Add)) {
        return Err(Failure::new("granularity only supported with --add"));
    }
    if source.is_some() && !actions.iter().any(|action| matches!(action, Action::Merge(_))) {
        return Err(Failure::new("Merge bitmap source file only supported with --merge"));
    }
    if source_format.is_some() && source.is_none() {
        return Err(Failure::new("-F only supported with -b"));
    }
    let [name, bitmap] = others.as_slice() else {
        return Err(Failure::new("Expecting filename and bitmap name"));
    };
    // What is below has nothing to say about bitmaps.
    let how = How { format: format.as_deref(), image_opts, write: true, no_backing: true, ..How::default() };
    let opened = image(name, how).await?;
    let done = on(&opened, source.as_deref(), source_format.as_deref(), bitmap, granularity, &actions).await;
    // What was done before an error stays.
    let closed = opened.close().await;
    done.and(closed)
}

const NO_ACTION: &str = "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge";

/// Does everything that is asked for to a bitmap of an image.
async fn on(
    opened: &Image,
    source: Option<&str>,
    source_format: Option<&str>,
    name: &str,
    granularity: Option<u64>,
    actions: &[Action],
) -> Outcome {
    let (graph, node) = (opened.graph(), opened.node());
    let other = match source {
        None => None,
        Some(source) => {
            let how = How { format: source_format, no_backing: true, ..How::default() };
            Some(image_in(graph.clone(), source, how).await?)
        }
    };
    opened.warn_if_guessed();
    let source = other.as_ref().map_or(node, Image::node);
    let place = Place { graph, node, name, source, granularity };
    let mut done = Ok(());
    for action in actions {
        done = place.act(action).await.map_err(|error| {
            let text = format!("Operation {} on bitmap {name} failed: {error}", action.name());
            Failure::with_hint(text, error.hint())
        });
        if done.is_err() {
            break;
        }
    }
    match other {
        Some(other) => done.and(other.close().await),
        None => done,
    }
}

impl Place<'_> {
    async fn act(&self, action: &Action) -> Result<(), GraphError> {
        let (node, name) = (self.node, self.name);
        if matches!(action, Action::Remove) {
            return self.remove().await;
        }
        self.graph
            .change(|plan| match action {
                Action::Add => {
                    // As in the reference, whose number is shorter: none of these is a size that can be.
                    let too_large = |size: u64| u32::try_from(size).is_err();
                    let granularity = self.granularity.map(|size| if too_large(size) { 0 } else { size });
                    plan.add_bitmap(node, &NewBitmap { name, granularity, persistent: true, enabled: true })
                }
                Action::Clear => plan.clear_bitmap(node, name),
                Action::Enable => plan.enable_bitmap(node, name, true),
                Action::Disable => plan.enable_bitmap(node, name, false),
                Action::Merge(from) => plan.merge_bitmaps(node, name, &[(self.source, from)]),
                Action::Remove => Ok(()),
            })
            .await
    }

    async fn remove(&self) -> Result<(), GraphError> {
        let edit = |plan: &mut Plan| {
            plan.give_up_bitmap(self.node, self.name)?;
            plan.drop_bitmap(self.node, self.name);
            plan.touch(self.node);
            let step: Box<dyn LastStep> = Box::new(Forget(vec![(self.node, self.name.to_owned())]));
            Ok(((), Some(step)))
        };
        self.graph.change_with(edit).await
    }
}

/// Whether an image can keep bitmaps.
fn keeps_bitmaps(image: &Image) -> bool {
    let view = image.wires().view(image.node());
    let qcow2 = view.node().as_any().downcast_ref::<Qcow2>();
    qcow2.is_some_and(|qcow2| qcow2.header().version >= Version::V3)
}

/// Whether the bitmaps of an image can be copied; those that are broken may be left out.
pub fn check_source(source: &Image, skip_broken: bool) -> Outcome {
    if !keeps_bitmaps(source) {
        return Err(Failure::new("Source lacks bitmap support"));
    }
    let plan = source.wires();
    let bitmaps = &plan.plan().node(source.node()).bitmaps;
    let broken = bitmaps.iter().rev().find(|bitmap| bitmap.inconsistent);
    match broken.filter(|_| !skip_broken) {
        None => Ok(()),
        Some(broken) => Err(Failure::new(format!(
            "Cannot copy inconsistent bitmap '{}'\nTry --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to \
             delete it",
            broken.name
        ))),
    }
}

/// Whether bitmaps can be copied to an image.
pub fn check_target(target: &Image) -> Outcome {
    if keeps_bitmaps(target) {
        return Ok(());
    }
    let driver = target.wires().view(target.node()).node().driver();
    Err(Failure::new(format!("Format driver '{driver}' does not support bitmaps")))
}

/// Copies all bitmaps but the broken ones.
pub async fn copy_all(source: &Image, target: &Image) -> Outcome {
    let wires = source.wires();
    for bitmap in wires.plan().node(source.node()).bitmaps.iter().rev() {
        let name = &*bitmap.name;
        if bitmap.inconsistent {
            complain!("qemu-img: warning: Skipping inconsistent bitmap '{name}'");
            continue;
        }
        let granularity = Some(bitmap.bits.granularity());
        let new = NewBitmap { name, granularity, persistent: true, enabled: bitmap.enabled };
        let added = target.graph().change(|plan| {
            plan.add_bitmap(target.node(), &new)?;
            Ok(plan.bitmap(target.node(), name)?.bits.clone())
        });
        let bits =
            added.await.map_err(|error| Failure::new(format!("Failed to create bitmap {name}: {error}")))?;
        if bits.size() != bitmap.bits.size() {
            let place = Place {
                graph: target.graph(),
                node: target.node(),
                name,
                source: target.node(),
                granularity,
            };
            place.remove().await.map_err(|error| Failure::new(error.to_string()))?;
            return Err(Failure::new(format!(
                "Failed to populate bitmap {name}: Bitmaps are of different sizes (destination size is {}, source size \
                 is {}) and can't be merged",
                bits.size(),
                bitmap.bits.size()
            )));
        }
        // It was made just now, and nobody else knows it.
        bits.merge(&bitmap.bits);
    }
    Ok(())
}

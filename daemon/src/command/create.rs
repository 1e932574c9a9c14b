//! blockdev-create: makes an image, as a job.
//!
//! What the description of the command lets through is the job's to complain about, as in QEMU: all but the job's id
//! and a driver that makes nothing.

use std::sync::Arc;

use underlay_drivers::create::{self, NewFile};
use underlay_drivers::{BackingPolicy, NodeSpec, Opener};
use underlay_graph::plan::NewRoot;
use underlay_graph::{BackingRef, Graph, GraphError, NodeId, Perms, Preallocation, RootId};
use underlay_jobs::Creation;

use underlay_qcow2::{Compression, CreateError, CreateOptions, Version};
use underlay_qmp::json::{Object, Value};

use super::arguments::Arguments;
use super::blockdev::UNNAMED_USER;
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// blockdev-create
pub async fn blockdev_create(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let id = arguments.text("job-id");
    let mut options = arguments.object("options").unwrap_or_else(|| Arguments::new(Object::new()));
    let creation: Creation = match options.text("driver").as_str() {
        "file" => {
            let new = new_file(&mut options);
            Box::pin(async move { create::file(&new).await.map_err(|error| error.to_string()) })
        }
        "qcow2" => {
            let (graph, groups) = (daemon.graph.clone(), daemon.groups.clone());
            let on_corrupt = daemon.on_corrupt();
            let file = options.take("file");
            Box::pin(async move {
                let opener =
                    Opener::new(&graph, BackingPolicy::Follow, Some(on_corrupt)).with_groups(&groups);
                let made = make_qcow2(&graph, &opener, file, options).await;
                made.map_err(|error| error.desc)
            })
        }
        _ => return Err(CommandError::new("Driver does not support blockdev-create")),
    };
    super::job::start(daemon, daemon.jobs.create(id, creation).await?);
    Ok(())
}

fn preallocation(options: &mut Arguments) -> Preallocation {
    match options.optional_text("preallocation").as_deref() {
        Some("metadata") => Preallocation::Metadata,
        Some("falloc") => Preallocation::Falloc,
        Some("full") => Preallocation::Full,
        _ => Preallocation::Off,
    }
}

fn new_file(options: &mut Arguments) -> NewFile {
    NewFile {
        filename: options.text("filename"),
        size: options.number("size", 0),
        preallocation: preallocation(options),
        nocow: options.flag("nocow", false),
        extent_size: options.has("extent-size-hint").then(|| options.number("extent-size-hint", 0)),
    }
}

async fn make_qcow2(
    graph: &Arc<Graph>,
    opener: &Opener,
    file: Option<Value>,
    options: Arguments,
) -> CommandResult<()> {
    let root = take_file(graph, opener, file).await?;
    let made = match graph.root(root) {
        Some(root) => match root.enter().await {
            Ok(inside) => match qcow2_options(options) {
                Ok(options) => create::qcow2_into(&inside.cx(), &options).await.map_err(CommandError::from),
                Err(error) => Err(error),
            },
            Err(error) => Err(error.into()),
        },
        None => Err(CommandError::new("The node was removed in the meantime")),
    };
    let left = graph.change(|plan| {
        plan.remove_root(root);
        Ok(())
    });
    let left = left.await;
    made?;
    Ok(left?)
}

/// Claims the node for the image, opened if its options were given: nobody else may write to it meanwhile.
async fn take_file(graph: &Arc<Graph>, opener: &Opener, file: Option<Value>) -> CommandResult<RootId> {
    let spec = match file {
        Some(Value::Object(options)) => Err(NodeSpec::parse(options)?),
        Some(Value::Str(name)) => Ok(name),
        _ => return Err(CommandError::new("A block device must be specified for \"file\"")),
    };
    let take = |plan: &mut underlay_graph::Plan, node: NodeId| {
        Ok(plan.add_root(NewRoot {
            user: UNNAMED_USER.to_owned(),
            role: "root",
            node,
            required: Perms::WRITE | Perms::RESIZE,
            shared: Perms::ALL,
            pinned: true,
            drained: None,
        }))
    };
    let taken = match spec {
        Ok(name) => {
            graph
                .change(|plan| {
                    let found = plan.find(&name);
                    let node = found.ok_or_else(|| GraphError::NeitherDeviceNorNode(name.clone()))?;
                    take(plan, node)
                })
                .await
        }
        Err(spec) => {
            let new = opener.open(spec).await?;
            graph
                .change(|plan| {
                    let node = plan.add(new)?;
                    take(plan, node)
                })
                .await
        }
    };
    Ok(taken?)
}

fn qcow2_options(mut options: Arguments) -> CommandResult<CreateOptions> {
    let size = options.number("size", 0);
    let backing_format = options.optional_text("backing-fmt");
    let backing = match options.optional_text("backing-file") {
        None if backing_format.is_some() => return Err(refused(&CreateError::FormatWithoutBacking)),
        None => None,
        Some(file) if file.is_empty() => None,
        Some(file) => Some(BackingRef { file, format: backing_format }),
    };
    // What no unsigned number can be is as wrong as zero.
    let count = |number: i64| u64::try_from(number).unwrap_or(0);
    let defaults = CreateOptions::new(0);
    let wanted = CreateOptions {
        size: count(size),
        version: match options.optional_text("version").as_deref() {
            Some("v2") => Version::V2,
            _ => Version::V3,
        },
        cluster_size: match options.has("cluster-size") {
            true => count(options.number("cluster-size", 0)),
            false => defaults.cluster_size,
        },
        refcount_bits: match options.has("refcount-bits") {
            true => count(options.number("refcount-bits", 0)),
            false => defaults.refcount_bits,
        },
        compression: match options.optional_text("compression-type").as_deref() {
            Some("zstd") => Compression::Zstd,
            _ => Compression::Zlib,
        },
        lazy_refcounts: options.flag("lazy-refcounts", false),
        extended_l2: options.flag("extended-l2", false),
        preallocation: preallocation(&mut options),
        data_file: options.take("data-file").map(|_| "data-file".to_owned()),
        data_file_raw: options.flag("data-file-raw", false),
        encrypted: options.take("encrypt").is_some(),
        backing,
        ..defaults
    };
    wanted.check().map_err(|error| refused(&error))?;
    if size < 0 {
        return Err(CommandError::new("Could not resize image: Image size cannot be negative"));
    }
    Ok(wanted)
}

fn refused(error: &CreateError) -> CommandError {
    CommandError::new(error.to_string())
}

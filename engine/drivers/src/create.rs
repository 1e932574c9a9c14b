//! Making image files.

use std::path::Path;

use underlay_graph::{IoError, NodeOptions, View};
use underlay_qcow2::CreateOptions;
use underlay_sys::file::{File, OpenOptions};

use crate::error::OpenError;
use crate::names::plain_path;
use crate::options::{DriverSpec, NodeSpec};
use crate::protocol::file::FileNode;
use crate::protocol::nbd::{self, NbdNode};

/// Makes (or empties) the file `name` and writes a qcow2 image into it. The file is locked meanwhile, so that an
/// image in use is not overwritten; it is durable on return.
pub async fn qcow2(name: &str, options: &CreateOptions) -> Result<(), OpenError> {
    options.check().map_err(|error| OpenError::text(error.to_string()))?;
    let view = exclusive_file(name).await?;
    let cx = view.cx();
    let made = write_image(&cx, options).await;
    let closed = cx.node().close(&cx).await;
    made?;
    Ok(closed?)
}

/// Opens the file `name`, made if need be, for nobody else. An export is there or not, and is not locked.
async fn exclusive_file(name: &str) -> Result<std::sync::Arc<View>, OpenError> {
    if nbd::spec::is_name(name) {
        let node = NbdNode::open(&nbd::spec::NbdSpec::parse(name)?, false, false).await?;
        return Ok(View::detached(std::sync::Arc::new(node), []));
    }
    let could_not = |error: std::io::Error| {
        OpenError::Io(IoError::from(error).context(format!("Could not create '{name}'")))
    };
    let open = OpenOptions { write: true, create: true, ..OpenOptions::default() };
    drop(File::open(Path::new(plain_path(name)), open).map_err(could_not)?);
    let spec = NodeSpec::file(name);
    let DriverSpec::File(spec) = spec.driver else {
        return Err(OpenError::text(format!("'{name}' is not a file")));
    };
    let options_of_node = NodeOptions { discard: true, ..NodeOptions::default() };
    let node = std::sync::Arc::new(FileNode::open(&spec, &options_of_node, false, false).await?);
    let view = View::detached(node, []);
    let cx = view.cx();
    cx.node().set_access(&cx, crate::protocol::file::EXCLUSIVE).await?;
    Ok(view)
}

async fn write_image(cx: &underlay_graph::Cx<'_>, options: &CreateOptions) -> Result<(), OpenError> {
    cx.node().resize(cx, 0, underlay_graph::Preallocation::Off).await?;
    underlay_qcow2::create(cx, options).await.map_err(|error| OpenError::text(error.to_string()))?;
    Ok(cx.flush().await?)
}

/// Makes (or empties) the file `name` as a raw image of `size` bytes.
pub async fn raw(
    name: &str,
    size: u64,
    preallocation: underlay_graph::Preallocation,
) -> Result<(), OpenError> {
    let view = exclusive_file(name).await?;
    let cx = view.cx();
    let emptied = cx.node().resize(&cx, 0, underlay_graph::Preallocation::Off).await;
    let mut sized = match emptied {
        Ok(()) => cx.node().resize(&cx, size, preallocation).await,
        error => error,
    };
    if sized.is_ok() && size > 0 {
        // As the reference does: programs that probe a file's alignment want something to read.
        let head = underlay_graph::ByteRange::between(0, size.min(4096));
        sized = cx.write(head, underlay_sys::Iov::zeroed(head.buffer_len()), Default::default()).await;
    }
    let closed = cx.node().close(&cx).await;
    sized?;
    Ok(closed?)
}

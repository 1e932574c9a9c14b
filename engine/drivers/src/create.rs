//! Making image files.

use std::path::Path;
use std::sync::Arc;

use underlay_graph::{ByteRange, Cx, IoError, NodeOptions, Preallocation, View};
use underlay_qcow2::CreateOptions;
use underlay_sys::Iov;
use underlay_sys::file::{File, OpenOptions};

use crate::error::OpenError;
use crate::options::{DriverSpec, FileSpec, NodeSpec};
use crate::protocol::file::{Aio, FileNode, Locking};
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

/// Writes a qcow2 image into a node of the graph, which keeps its length and its space.
pub async fn qcow2_into(cx: &Cx<'_>, options: &CreateOptions) -> Result<(), OpenError> {
    let options = CreateOptions { keep_space: true, ..options.clone() };
    underlay_qcow2::create(cx, &options).await.map_err(|error| OpenError::text(error.to_string()))
}

/// Opens the file `name`, made if need be, for nobody else. An export is there or not, and is not locked.
async fn exclusive_file(name: &str) -> Result<Arc<View>, OpenError> {
    if nbd::spec::is_name(name) {
        let opened = NbdNode::open(&nbd::spec::NbdSpec::parse(name)?, false, false).await;
        let node = opened.map_err(|error| only_existing("nbd", &error))?;
        return Ok(View::detached(Arc::new(node), []));
    }
    let DriverSpec::File(spec) = NodeSpec::file(name).driver else {
        return Err(OpenError::text(format!("'{name}' is not a file")));
    };
    exclusive(&spec).await
}

/// Opens a file, made if need be, for nobody else.
async fn exclusive(spec: &FileSpec) -> Result<Arc<View>, OpenError> {
    let name = &spec.filename;
    let could_not = |error: std::io::Error| {
        OpenError::Io(IoError::from(error).context(format!("Could not create '{name}'")))
    };
    let (path, open) = (Path::new(name), OpenOptions { write: true, create: true, ..OpenOptions::default() });
    let is_new = !path.exists();
    drop(File::open(path, open).map_err(could_not)?);
    // A guest may soon have nothing but this file. Who may not read the folder has to trust the file system.
    if is_new && let Err(error) = File::sync_folder(path).await {
        tracing::debug!(file = name, %error, "it is not certain that the new file will be found after a power cut");
    }
    let options_of_node = NodeOptions { discard: true, ..NodeOptions::default() };
    let opened = FileNode::open(spec, &options_of_node, false, false).await;
    let node = Arc::new(opened.map_err(|error| match path.is_file() {
        true => error,
        false => only_existing("host_device", &error),
    })?);
    let view = View::detached(node, []);
    let cx = view.cx();
    cx.node().set_access(&cx, crate::protocol::file::EXCLUSIVE).await?;
    Ok(view)
}

/// What `driver` reaches cannot be made, only used if it is there; which it is not.
fn only_existing(driver: &str, error: &impl std::fmt::Display) -> OpenError {
    OpenError::text(format!(
        "Protocol driver '{driver}' does not support creating new images, so an existing image must be selected as \
         the target; however, opening the given target as an existing image failed: {error}"
    ))
}

async fn write_image(cx: &Cx<'_>, options: &CreateOptions) -> Result<(), OpenError> {
    cx.node().resize(cx, 0, Preallocation::Off).await?;
    underlay_qcow2::create(cx, options).await.map_err(|error| OpenError::text(error.to_string()))?;
    Ok(cx.flush().await?)
}

/// Makes (or empties) the file `name` as a raw image of `size` bytes.
pub async fn raw(name: &str, size: u64, preallocation: Preallocation) -> Result<(), OpenError> {
    let view = exclusive_file(name).await?;
    if preallocation != Preallocation::Off && !view.cx().unwritten_is_zero() {
        let text = format!("Unsupported preallocation mode '{}'", preallocation.name());
        return Err(OpenError::text(text));
    }
    filled(&view, size, preallocation).await
}

/// A file to make. The fields are blockdev-create's.
#[derive(Clone, Debug)]
pub struct NewFile {
    /// Path, taken as it is.
    pub filename: String,
    /// Bytes; a negative number is refused when the file is there.
    pub size: i64,
    /// What to reserve.
    pub preallocation: Preallocation,
    /// Ask that it be overwritten in place.
    pub nocow: bool,
    /// Ask that it grow in extents of so many bytes.
    pub extent_size: Option<i64>,
}

/// Makes (or empties) a file.
pub async fn file(new: &NewFile) -> Result<(), OpenError> {
    let extent_size = new.extent_size.map(u32::try_from).transpose();
    let extent_size = extent_size.map_err(|_| OpenError::text("Extent size hint is too large".to_owned()))?;
    let spec = FileSpec {
        driver: "file",
        filename: new.filename.clone(),
        locking: Locking::default(),
        aio: Aio::default(),
    };
    let view = exclusive(&spec).await?;
    let cx = view.cx();
    cx.node().resize(&cx, 0, Preallocation::Off).await?;
    // Wishes: most file systems do not know them.
    let open = OpenOptions { write: true, ..OpenOptions::default() };
    let empty = File::open(Path::new(&new.filename), open).map_err(IoError::from)?;
    let asked = [
        new.nocow.then(|| empty.no_copy_on_write()),
        extent_size.filter(|bytes| *bytes > 0).map(|bytes| empty.extent_size(bytes)),
    ];
    for error in asked.into_iter().flatten().filter_map(Result::err) {
        tracing::debug!(file = new.filename, %error, "a wish about the new file was not granted");
    }
    let size = u64::try_from(new.size);
    let size = size.map_err(|_| IoError::EINVAL.context("Could not resize file"))?;
    filled(&view, size, new.preallocation).await
}

/// Empties a file and gives it its size, and closes it.
async fn filled(view: &View, size: u64, preallocation: Preallocation) -> Result<(), OpenError> {
    let cx = view.cx();
    let emptied = cx.node().resize(&cx, 0, Preallocation::Off).await;
    let mut sized = match emptied {
        Ok(()) => cx.node().resize(&cx, size, preallocation).await,
        error => error,
    };
    if sized.is_ok() && size > 0 {
        // As the reference does: programs that probe a file's alignment want something to read.
        let head = if cx.unwritten_is_zero() { size.clamp(512, 4096) } else { 512 };
        let head = ByteRange::between(0, head);
        sized = cx.write(head, Iov::zeroed(head.buffer_len()), Default::default()).await;
    }
    let closed = cx.node().close(&cx).await;
    sized?;
    Ok(closed?)
}

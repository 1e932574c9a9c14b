//! Making image files.

use std::path::Path;
use std::sync::Arc;

use underlay_graph::{ByteRange, Cx, IoError, NodeOptions, Preallocation, View};
use underlay_qcow2::{CreateError, CreateOptions};
use underlay_sys::Iov;
use underlay_sys::file::{File, OpenOptions};

use crate::error::OpenError;
use crate::names::{has_protocol, plain_path};
use crate::options::{DriverSpec, FileSpec, NodeSpec};
use crate::protocol::file::{Aio, FileNode, Locking};
use crate::protocol::nbd::{self, NbdNode};

/// Makes (or empties) the file `name` and writes a qcow2 image into it. The file is locked meanwhile, so that an
/// image in use is not overwritten; it is durable on return.
pub async fn qcow2(name: &str, options: &CreateOptions) -> Result<(), OpenError> {
    qcow2_as_wished(name, options, Wishes::default()).await
}

/// The same with wishes about the file that it is stored in. A file that was not there before goes again if there will
/// be no image in it.
pub async fn qcow2_as_wished(name: &str, options: &CreateOptions, wishes: Wishes) -> Result<(), OpenError> {
    options.check().map_err(|error| OpenError::text(error.to_string()))?;
    wishes.check()?;
    let (view, is_new) = exclusive_file(name).await?;
    let cx = view.cx();
    let made = write_image(&cx, options, wishes).await;
    // Nobody else has had it yet: it is still locked.
    if made.is_err() && is_new {
        // The name may be a link to it.
        let removed = std::fs::canonicalize(plain_path(name)).and_then(std::fs::remove_file);
        if let Err(error) = removed {
            tracing::debug!(file = name, %error, "the file of an image that could not be made is left");
        }
    }
    let closed = cx.node().close(&cx).await;
    made?;
    Ok(closed?)
}

/// Wishes about a new file, which it can take only while nothing is in it. Most file systems do not know them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wishes {
    /// That it be overwritten in place.
    pub nocow: bool,
    /// That it grow in extents of so many bytes.
    pub extent_size: Option<i64>,
}

impl Wishes {
    /// Refuses what no file system could grant.
    fn check(self) -> Result<(), OpenError> {
        match self.extent_size.map(u32::try_from) {
            Some(Err(_)) => Err(OpenError::text("Extent size hint is too large".to_owned())),
            _ => Ok(()),
        }
    }

    /// Asks for them; `path` is that of an empty file.
    fn ask(self, path: &str) -> Result<(), IoError> {
        let extent_size =
            self.extent_size.and_then(|bytes| u32::try_from(bytes).ok()).filter(|bytes| *bytes > 0);
        if !self.nocow && extent_size.is_none() {
            return Ok(());
        }
        let open = OpenOptions { write: true, ..OpenOptions::default() };
        let empty = File::open(Path::new(path), open).map_err(IoError::from)?;
        let asked =
            [self.nocow.then(|| empty.no_copy_on_write()), extent_size.map(|bytes| empty.extent_size(bytes))];
        for error in asked.into_iter().flatten().filter_map(Result::err) {
            tracing::debug!(file = path, %error, "a wish about the new file was not granted");
        }
        Ok(())
    }
}

/// Writes a qcow2 image into a node of the graph, which keeps its length and its space.
pub async fn qcow2_into(cx: &Cx<'_>, options: &CreateOptions) -> Result<(), OpenError> {
    let options = CreateOptions { keep_space: true, ..options.clone() };
    underlay_qcow2::create(cx, &options).await.map_err(|error| OpenError::text(error.to_string()))
}

/// Opens the file `name`, made if need be, for nobody else; and whether it was made. An export is there or not, and is
/// not locked.
async fn exclusive_file(name: &str) -> Result<(Arc<View>, bool), OpenError> {
    if nbd::spec::is_name(name) {
        let opened = NbdNode::open(&nbd::spec::NbdSpec::parse(name)?, false, false).await;
        let node = opened.map_err(|error| only_existing("nbd", &error))?;
        return Ok((View::detached(Arc::new(node), []), false));
    }
    let scheme = name.split(':').next().filter(|_| has_protocol(name));
    if let Some(unknown) = scheme.filter(|scheme| !matches!(*scheme, "file" | "null-co" | "null-aio")) {
        return Err(OpenError::text(format!("Unknown protocol '{unknown}'")));
    }
    let DriverSpec::File(spec) = NodeSpec::file(name).driver else {
        return Err(OpenError::text(format!("'{name}' is not a file")));
    };
    exclusive(&spec).await
}

/// Opens a file, made if need be, for nobody else; and whether it was made.
async fn exclusive(spec: &FileSpec) -> Result<(Arc<View>, bool), OpenError> {
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
    Ok((view, is_new))
}

/// What `driver` reaches cannot be made, only used if it is there; which it is not.
fn only_existing(driver: &str, error: &impl std::fmt::Display) -> OpenError {
    OpenError::text(format!(
        "Protocol driver '{driver}' does not support creating new images, so an existing image must be selected as \
         the target; however, opening the given target as an existing image failed: {error}"
    ))
}

/// Empties the file, and asks for what only an empty one takes.
async fn emptied(cx: &Cx<'_>, wishes: Wishes) -> Result<(), IoError> {
    cx.node().resize(cx, 0, Preallocation::Off).await?;
    cx.node().exact_filename().map_or(Ok(()), |name| wishes.ask(plain_path(&name)))
}

/// Writes an image into the file, or leaves it empty.
async fn write_image(cx: &Cx<'_>, options: &CreateOptions, wishes: Wishes) -> Result<(), OpenError> {
    emptied(cx, wishes).await?;
    let made = underlay_qcow2::create(cx, options).await;
    if made.is_err() {
        // Half an image could be taken for another disk.
        let emptied = cx.node().resize(cx, 0, Preallocation::Off).await;
        tracing::debug!(?emptied, "an image could not be made");
    }
    made.map_err(|error| match error {
        CreateError::Io(error) if options.preallocation == Preallocation::Metadata && error.is_no_space() => {
            OpenError::Io(error.context("Could not resize image: Allocating clusters failed"))
        }
        error => OpenError::text(error.to_string()),
    })?;
    Ok(cx.flush().await?)
}

/// Makes (or empties) the file `name` as a raw image of `size` bytes.
pub async fn raw(name: &str, size: u64, preallocation: Preallocation) -> Result<(), OpenError> {
    raw_as_wished(name, size, preallocation, Wishes::default()).await
}

/// The same with wishes about the file.
pub async fn raw_as_wished(
    name: &str,
    size: u64,
    preallocation: Preallocation,
    wishes: Wishes,
) -> Result<(), OpenError> {
    wishes.check()?;
    let (view, _) = exclusive_file(name).await?;
    if preallocation != Preallocation::Off && !view.cx().unwritten_is_zero() {
        let text = format!("Unsupported preallocation mode '{}'", preallocation.name());
        return Err(OpenError::text(text));
    }
    filled(&view, size, preallocation, wishes).await
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
    /// See [`Wishes`].
    pub nocow: bool,
    /// See [`Wishes`].
    pub extent_size: Option<i64>,
}

/// Makes (or empties) a file.
pub async fn file(new: &NewFile) -> Result<(), OpenError> {
    let wishes = Wishes { nocow: new.nocow, extent_size: new.extent_size };
    wishes.check()?;
    let spec = FileSpec {
        driver: "file",
        filename: new.filename.clone(),
        locking: Locking::default(),
        aio: Aio::default(),
    };
    let (view, _) = exclusive(&spec).await?;
    let Ok(size) = u64::try_from(new.size) else {
        let cx = view.cx();
        cx.node().resize(&cx, 0, Preallocation::Off).await?;
        return Err(IoError::EINVAL.context("Could not resize file").into());
    };
    filled(&view, size, new.preallocation, wishes).await
}

/// Empties a file and gives it its size, and closes it.
async fn filled(
    view: &View,
    size: u64,
    preallocation: Preallocation,
    wishes: Wishes,
) -> Result<(), OpenError> {
    let cx = view.cx();
    let emptied = emptied(&cx, wishes).await;
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

//! The exports of a server, by name, and who uses them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use underlay_graph::Root;
use underlay_graph::bitmap::DirtyBitmap;
use underlay_nbd::{ExportInfo, MAX_NAME, MAX_PAYLOAD, flags};

use super::Handle;
use crate::{ExportError, Guest};

/// A disk that clients can choose by name.
#[derive(Clone, Debug)]
pub struct NbdExport {
    /// What the control side calls it; used in messages.
    pub id: String,
    /// What clients call it.
    pub name: String,
    /// A text for people; empty for none.
    pub description: String,
    /// The way to the disk. Its plan must forbid others to resize the disk.
    pub root: Root,
    /// What stands in between.
    pub guest: Option<Arc<dyn Guest>>,
    /// Whether clients may write; the root must have the permission.
    pub writable: bool,
    /// Flush after every write.
    pub writethrough: bool,
    /// Offer the meta context `qemu:allocation-depth`.
    pub allocation_depth: bool,
    /// Offer the meta context `qemu:dirty-bitmap:NAME` for each; nobody may change them but guests that write.
    pub bitmaps: Vec<(String, Arc<DirtyBitmap>)>,
}

/// What block status can be about.
#[derive(Clone, Debug)]
pub(crate) enum Context {
    /// Holes and zeroes.
    Allocation,
    /// Which layer has it.
    Depth,
    /// What is dirty.
    Dirty(String, Arc<DirtyBitmap>),
}

impl Context {
    fn name(&self) -> String {
        match self {
            Self::Allocation => "base:allocation".to_owned(),
            Self::Depth => "qemu:allocation-depth".to_owned(),
            Self::Dirty(name, _) => format!("qemu:dirty-bitmap:{name}"),
        }
    }
}

impl NbdExport {
    /// Its contexts; their places are their ids.
    pub(crate) fn contexts(&self) -> Vec<Context> {
        let depth = self.allocation_depth.then_some(Context::Depth);
        let bitmaps = self.bitmaps.iter().map(|(name, bits)| Context::Dirty(name.clone(), bits.clone()));
        [Context::Allocation].into_iter().chain(depth).chain(bitmaps).collect()
    }
}

/// What there is to tell about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportState {
    /// See [`NbdExport::id`].
    pub id: String,
    /// See [`NbdExport::name`].
    pub name: String,
    /// It is being removed.
    pub shutting_down: bool,
    /// Clients that have chosen it.
    pub connections: usize,
}

#[derive(Debug, Default)]
struct Users {
    closing: bool,
    connections: Vec<Arc<Handle>>,
}

/// An export and its clients.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) export: NbdExport,
    users: Mutex<Users>,
    left: Notify,
}

impl Entry {
    fn users(&self) -> MutexGuard<'_, Users> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a connection a user of the export; `None` when it is being removed.
    pub(crate) fn join(self: &Arc<Self>, handle: &Arc<Handle>) -> Option<Membership> {
        let mut users = self.users();
        if users.closing {
            return None;
        }
        users.connections.push(handle.clone());
        Some(Membership { entry: self.clone(), handle: handle.clone() })
    }

    /// What the handshake tells about the export. The error is that of asking the disk for its length.
    pub(crate) async fn info(&self, several_clients: bool) -> underlay_graph::Result<ExportInfo> {
        let export = &self.export;
        let inside = export.root.enter().await?;
        let cx = inside.cx();
        let limits = cx.limits();
        let size = cx.length() & !511;
        let minimum = limits.request_alignment.clamp(1, 64 << 10);
        // Clients do not take an end within a block; what lies across it is done for them.
        let minimum = if size.is_multiple_of(u64::from(minimum)) { minimum } else { 1 };
        let mut flags = flags::HAS_FLAGS | flags::SEND_FLUSH | flags::SEND_FUA | flags::SEND_CACHE;
        if export.writable {
            flags |= flags::SEND_TRIM | flags::SEND_WRITE_ZEROES | flags::SEND_FAST_ZERO;
        } else {
            flags |= flags::READ_ONLY;
        }
        if several_clients {
            flags |= flags::CAN_MULTI_CONN;
        }
        Ok(ExportInfo {
            name: export.name.clone(),
            description: export.description.clone(),
            size,
            flags,
            minimum_block: minimum,
            preferred_block: minimum.max(4096),
            maximum_block: (limits.max_transfer.min(MAX_PAYLOAD) & !(minimum - 1)).max(minimum),
            contexts: export.contexts().iter().map(Context::name).collect(),
        })
    }
}

/// A connection's use of an export; ends when dropped.
#[derive(Debug)]
pub(crate) struct Membership {
    entry: Arc<Entry>,
    handle: Arc<Handle>,
}

impl Membership {
    pub(crate) fn export(&self) -> &NbdExport {
        &self.entry.export
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.entry.users().connections.retain(|other| !Arc::ptr_eq(other, &self.handle));
        self.entry.left.notify_waiters();
    }
}

/// An export on its way out.
#[derive(Debug)]
#[must_use = "the export's disk is in use until [`Gone::wait`] returns"]
pub struct Gone {
    exports: Arc<Mutex<Vec<Arc<Entry>>>>,
    entry: Arc<Entry>,
}

impl Gone {
    /// Waits until no client uses the export any more, then forgets it: its name may be used again.
    pub async fn wait(self) {
        loop {
            let left = self.entry.left.notified();
            let mut left = std::pin::pin!(left);
            left.as_mut().enable();
            if self.entry.users().connections.is_empty() {
                break;
            }
            left.await;
        }
        lock(&self.exports).retain(|other| !Arc::ptr_eq(other, &self.entry));
    }
}

/// All exports, in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct Exports {
    list: Arc<Mutex<Vec<Arc<Entry>>>>,
}

fn lock(list: &Mutex<Vec<Arc<Entry>>>) -> MutexGuard<'_, Vec<Arc<Entry>>> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Exports {
    pub(crate) fn add(&self, export: NbdExport) -> Result<(), ExportError> {
        if export.name.len() > MAX_NAME {
            return Err(ExportError::NameTooLong(export.name));
        }
        if export.description.len() > MAX_NAME {
            return Err(ExportError::DescriptionTooLong(export.description));
        }
        let mut list = lock(&self.list);
        if list.iter().any(|other| other.export.name == export.name) {
            return Err(ExportError::NameInUse(export.name));
        }
        list.push(Arc::new(Entry { export, users: Mutex::default(), left: Notify::new() }));
        Ok(())
    }

    pub(crate) fn remove(&self, name: &str, hard: bool) -> Result<Gone, ExportError> {
        let found = lock(&self.list).iter().find(|entry| entry.export.name == name).cloned();
        let Some(entry) = found else { return Err(ExportError::NotFound(name.to_owned())) };
        let mut users = entry.users();
        if users.closing {
            return Err(ExportError::ShuttingDown(entry.export.id.clone()));
        }
        if !hard && !users.connections.is_empty() {
            return Err(ExportError::StillInUse(entry.export.id.clone()));
        }
        users.closing = true;
        for connection in &users.connections {
            connection.close();
        }
        drop(users);
        Ok(Gone { exports: self.list.clone(), entry })
    }

    /// Nobody may choose any of them from now on.
    pub(crate) fn close(&self) {
        for entry in lock(&self.list).iter() {
            entry.users().closing = true;
        }
    }

    pub(crate) fn find(&self, name: &str) -> Option<Arc<Entry>> {
        lock(&self.list).iter().find(|entry| entry.export.name == name && !entry.users().closing).cloned()
    }

    pub(crate) fn names(&self) -> Vec<(String, String)> {
        let list = lock(&self.list);
        let open = list.iter().filter(|entry| !entry.users().closing);
        open.map(|entry| (entry.export.name.clone(), entry.export.description.clone())).collect()
    }

    pub(crate) fn states(&self) -> Vec<ExportState> {
        let list = lock(&self.list);
        let state = |entry: &Arc<Entry>| {
            let users = entry.users();
            ExportState {
                id: entry.export.id.clone(),
                name: entry.export.name.clone(),
                shutting_down: users.closing,
                connections: users.connections.len(),
            }
        };
        list.iter().map(state).collect()
    }
}

//! One export: a root of the graph, and what clients are told about it.

use underlay_graph::{Result, Root};
use underlay_nbd::{ExportInfo, MAX_NAME, MAX_PAYLOAD, flags};
use underlay_sys::rt::StopSign;

use crate::ExportError;

/// The context that every export has; its id is its position.
pub(super) const BASE_ALLOCATION: u32 = 0;
/// The context of exports made with `allocation_depth`.
pub(super) const ALLOCATION_DEPTH: u32 = 1;

/// An export as its owner describes it.
#[derive(Clone, Debug)]
pub struct NbdExport {
    /// The owner's id for it; only error messages show it.
    pub id: String,
    /// What clients ask for; may be empty (the default export).
    pub name: String,
    /// A text for people, empty for none.
    pub description: String,
    /// The way into the disk. Its owner takes it out of the graph once the export is [`Gone`].
    pub root: Root,
    /// Clients may write.
    pub writable: bool,
    /// Every write is durable before its reply.
    pub writethrough: bool,
    /// Offers the context `qemu:allocation-depth`.
    pub allocation_depth: bool,
}

impl NbdExport {
    pub(super) fn check(&self) -> std::result::Result<(), ExportError> {
        if self.name.len() > MAX_NAME {
            return Err(ExportError::NameTooLong(self.name.clone()));
        }
        if self.description.len() > MAX_NAME {
            return Err(ExportError::DescriptionTooLong(self.description.clone()));
        }
        Ok(())
    }

    /// What a client is told. Source of flags and sizes: `design/qemu-surface.md` 9.2.
    pub(super) async fn info(&self, multi: bool) -> Result<ExportInfo> {
        let (length, limits) = {
            let inside = self.root.enter().await?;
            (inside.cx().length(), inside.cx().limits())
        };
        let mut can = flags::HAS_FLAGS | flags::SEND_FLUSH | flags::SEND_FUA | flags::SEND_CACHE;
        if multi {
            can |= flags::CAN_MULTI_CONN;
        }
        can |= match self.writable {
            true => flags::SEND_TRIM | flags::SEND_WRITE_ZEROES | flags::SEND_FAST_ZERO,
            false => flags::READ_ONLY,
        };
        let mut contexts = vec!["base:allocation".to_owned()];
        if self.allocation_depth {
            contexts.push("qemu:allocation-depth".to_owned());
        }
        let minimum = limits.request_alignment.max(1);
        Ok(ExportInfo {
            name: self.name.clone(),
            description: self.description.clone(),
            size: length & !511,
            flags: can,
            minimum_block: minimum,
            preferred_block: minimum.max(4096),
            maximum_block: limits.max_transfer.min(MAX_PAYLOAD),
            contexts,
        })
    }
}

/// An export in a server.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) export: NbdExport,
    /// Raised when it was removed and its last client has left.
    pub(super) gone: StopSign,
}

/// The end of a removed export.
#[derive(Clone, Debug)]
pub struct Gone {
    pub(super) name: String,
    pub(super) sign: StopSign,
}

impl Gone {
    /// The export's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until the last client has left and no request is under way. Not bound to any thread.
    pub async fn wait(&self) {
        self.sign.raised().await;
    }
}

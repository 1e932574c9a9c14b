//! What becomes of an image whose metadata is found to be wrong.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use underlay_graph::{Cx, IoError, Result};

use super::Qcow2;
use crate::features;
use crate::update::write_features;

/// What QEMU answers once an image is unusable: ENOMEDIUM.
const NO_MEDIUM: IoError = IoError::new(123);

/// Something is wrong with an image's metadata; the members of the event BLOCK_IMAGE_CORRUPTED.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// What, as QEMU says it.
    pub message: String,
    /// Where in the file, when that is known.
    pub offset: Option<u64>,
    /// For how many bytes, when that is known.
    pub size: Option<u64>,
    /// The image is unusable from now on.
    pub fatal: bool,
}

impl fmt::Display for Corruption {
    /// The line that QEMU prints on stderr.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = &self.message;
        match self.fatal {
            true => write!(
                f,
                "qcow2: Marking image as corrupt: {what}; further corruption events will be suppressed"
            ),
            false => write!(
                f,
                "qcow2: Image is corrupt: {what}; further non-fatal corruption events will be suppressed"
            ),
        }
    }
}

/// A number as C's `%#x` prints it.
pub(crate) fn hex(number: u64) -> String {
    if number == 0 { "0".into() } else { format!("{number:#x}") }
}

/// Told about the first corruption of each kind (fatal or not).
pub type OnCorrupt = Arc<dyn Fn(Corruption) + Send + Sync>;

impl Qcow2 {
    /// An error once the image is unusable.
    pub(crate) fn usable(&self) -> Result<()> {
        if self.corrupt.load(Ordering::Relaxed) { Err(NO_MEDIUM) } else { Ok(()) }
    }

    /// Nothing can be relied on any more: every request fails from now on. What is on disk is sound.
    pub(crate) fn give_up(&self) {
        self.corrupt.store(true, Ordering::SeqCst);
    }

    /// Reports a corruption. A fatal one marks the image and makes it unusable; nothing is fatal for an image that
    /// nobody writes to. Gives the error for the request.
    pub(crate) async fn corruption(&self, cx: &Cx<'_>, mut found: Corruption) -> IoError {
        found.fatal &= self.is_writable();
        let first = match found.fatal {
            true => !self.corrupt.swap(true, Ordering::SeqCst),
            false => !self.warned.swap(true, Ordering::SeqCst),
        };
        if !first {
            return IoError::EIO;
        }
        tracing::error!("{found}");
        let fatal = found.fatal;
        // Before anything is waited for: other requests fail from now on, and their users should know why.
        if let Some(tell) = &self.options().on_corrupt {
            tell(found);
        }
        if fatal {
            let _turn = self.header_turn.lock().await;
            self.header_mut().incompatible |= features::CORRUPT;
            let header = self.header();
            if let Err(error) = write_features(&cx.below(), &header).await {
                tracing::error!(%error, "the image could not be marked as corrupt");
            }
        }
        IoError::EIO
    }
}

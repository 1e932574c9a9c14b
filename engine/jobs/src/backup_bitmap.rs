//! The dirty bitmap of a backup. From the moment on it is the job's: what is written then is noted beside it, and in
//! the end becomes part of it again. Source: `design/qemu-surface.md` 7.3.
//!
//! ```text
//!                 success              failure
//!   on-success    written since        as it was, and written since
//!   never         as it was, and …     as it was, and …
//!   always        written since        not copied, and written since
//! ```

use std::sync::Arc;

use underlay_graph::bitmap::DirtyBitmap;
use underlay_graph::bitmaps::{Purpose, Release};
use underlay_graph::{GraphError, NodeId, Plan};

/// What becomes of the bitmap (`bitmap-mode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapMode {
    /// A backup that succeeds clears it.
    OnSuccess,
    /// It stays as it is.
    Never,
    /// What is copied is cleared, even if the backup fails.
    Always,
}

/// The bitmap of a backup, on the disk that is copied.
#[derive(Clone, Debug)]
pub struct BackupBitmap {
    /// Its name.
    pub name: String,
    /// What becomes of it.
    pub mode: BitmapMode,
}

impl BackupBitmap {
    fn purpose(&self) -> Purpose {
        match self.mode {
            BitmapMode::Never => Purpose::Rely,
            BitmapMode::OnSuccess | BitmapMode::Always => Purpose::Change,
        }
    }

    /// Refuses what a job that copies `source` could not take.
    pub fn check(&self, plan: &Plan, source: NodeId) -> Result<(), GraphError> {
        plan.bitmap_for(source, &self.name, self.purpose()).map(|_| ())
    }

    /// Takes it for such a job: what it says.
    pub(crate) fn hold(&self, plan: &mut Plan, source: NodeId) -> Result<Arc<DirtyBitmap>, GraphError> {
        plan.hold_bitmap(source, &self.name, self.purpose())
    }

    /// What becomes of it after a backup that succeeded.
    pub(crate) fn on_success(&self) -> Release {
        match self.mode {
            BitmapMode::Never => Release::Reclaim,
            BitmapMode::OnSuccess | BitmapMode::Always => Release::Abdicate(None),
        }
    }

    /// The same after one that failed, and that may not have copied `rest`, if that is less than what the bitmap said.
    pub(crate) fn on_failure(&self, rest: Option<DirtyBitmap>) -> Release {
        match rest {
            Some(rest) if self.mode == BitmapMode::Always => Release::Abdicate(Some(Arc::new(rest))),
            _ => Release::Reclaim,
        }
    }
}

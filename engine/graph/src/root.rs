//! Gates: requests enter the graph through a root, and changes of the graph wait here for them to leave.

use std::sync::Arc;

use tokio::sync::{RwLock, RwLockReadGuard};
use underlay_sys::Iov;

use crate::error::{IoError, Result};
use crate::node::{WriteFlags, ZeroFlags};
use crate::plan::RootId;
use crate::units::ByteRange;
use crate::view::{Cx, View};

/// Told when a root's requests are about to be held back, and when they may go on: a job that shows as paused.
pub trait Drained: Send + Sync + std::fmt::Debug {
    /// From now on requests wait.
    fn begin(&self);
    /// Requests pass again.
    fn end(&self);
}

/// The gate of one root and the view behind it. `None` before the root's plan is in force and after it left.
#[derive(Debug, Default)]
pub(crate) struct Door {
    pub(crate) view: RwLock<Option<Arc<View>>>,
}

/// A user's way into the graph. Every request holds the gate's read side from its first byte to its last.
#[derive(Clone, Debug)]
pub struct Root {
    pub(crate) id: RootId,
    pub(crate) door: Arc<Door>,
}

/// A request inside the graph. A task that holds one must not enter again nor ask for a change.
#[derive(Debug)]
pub struct Inside<'a> {
    view: RwLockReadGuard<'a, Option<Arc<View>>>,
}

impl Inside<'_> {
    /// The context at the root's node.
    pub fn cx(&self) -> Cx<'_> {
        self.view.as_ref().expect("checked on entering").cx()
    }
}

impl Root {
    /// Its place in the plan.
    pub fn id(&self) -> RootId {
        self.id
    }

    /// Enters, once no change is under way. ECANCELED when the root has left the graph.
    pub async fn enter(&self) -> Result<Inside<'_>> {
        let view = self.door.view.read().await;
        if view.is_none() {
            return Err(IoError::ECANCELED);
        }
        Ok(Inside { view })
    }

    /// Current length of the disk in bytes.
    pub async fn length(&self) -> Result<u64> {
        Ok(self.enter().await?.cx().length())
    }

    /// Fills `into`. EIO when the range is not inside the disk.
    pub async fn read(&self, range: ByteRange, into: Iov) -> Result<()> {
        let inside = self.enter().await?;
        let cx = inside.cx();
        check(&cx, range)?;
        cx.read(range, into).await
    }

    /// Writes `from`. EIO when the range is not inside the disk.
    pub async fn write(&self, range: ByteRange, from: Iov, flags: WriteFlags) -> Result<()> {
        let inside = self.enter().await?;
        let cx = inside.cx();
        check(&cx, range)?;
        cx.write(range, from, flags).await
    }

    /// Makes the range read as zeroes.
    pub async fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        let inside = self.enter().await?;
        let cx = inside.cx();
        check(&cx, range)?;
        cx.write_zeroes(range, flags).await
    }

    /// Tells that the range is not needed any more.
    pub async fn discard(&self, range: ByteRange) -> Result<()> {
        let inside = self.enter().await?;
        let cx = inside.cx();
        check(&cx, range)?;
        cx.discard(range).await
    }

    /// Makes everything durable whose write was done before.
    pub async fn flush(&self) -> Result<()> {
        self.enter().await?.cx().flush().await
    }

    /// See [`crate::Node::populate`].
    pub async fn populate(&self, range: ByteRange) -> Result<()> {
        let inside = self.enter().await?;
        let cx = inside.cx();
        check(&cx, range)?;
        cx.populate(range).await
    }
}

fn check(cx: &Cx<'_>, range: ByteRange) -> Result<()> {
    if range.end() > cx.length() { Err(IoError::EIO) } else { Ok(()) }
}

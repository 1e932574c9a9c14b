//! A snapshot: an image that has been opened comes between a disk and its users.

use crate::{Access, GraphError, Kind, NodeId, Perms, Plan, Role};

impl Plan {
    /// Wires `overlay` between `disk` and its users; `disk` is only read from then on.
    pub fn put_on_top(&mut self, disk: NodeId, overlay: NodeId) -> Result<(), GraphError> {
        // A job may be writing to it (`allow-write-only-overlay`): a mirror whose target gets what is below it before
        // the end.
        let access = self.check()?.get(&overlay).copied().unwrap_or(Access::UNUSED);
        if access.required.has(Perms::CONSISTENT_READ) {
            return Err(GraphError::new("The overlay is already in use"));
        }
        let node = &self.node(overlay).node;
        if node.kind() == Kind::Filter {
            return Err(GraphError::new("Filters cannot be used as overlays"));
        }
        if self.node(overlay).child(Role::Backing).is_some() {
            return Err(GraphError::new("The overlay already has a backing image"));
        }
        if !node.supports_backing() {
            return Err(GraphError::new("The overlay does not support backing images"));
        }
        let unused = self.roots_of(disk).next().is_none() && self.parents(disk).next().is_none();
        self.replace(disk, overlay, |parent| parent == overlay)?;
        self.set_child(overlay, Role::Backing, Some(disk))?;
        if !self.node(disk).read_only {
            // A flush of the overlay is none of what is below it. Below a filter an image may stay writable for others.
            self.flush_before(disk);
            self.set_read_only(disk, true);
        }
        // Nobody uses the disk yet: the overlay would go as soon as it came. The monitor keeps it, as it keeps the
        // disk.
        if unused {
            self.node_mut(overlay).monitor_owned = true;
        }
        Ok(())
    }
}

//! Who may read, write and resize a node, decided in one place.
//!
//! Every use of a node (an edge from a parent, or a root) *requires* some permissions and *shares* some with the
//! node's other users. A plan is sound when what each use requires is shared by all others; what a node's users
//! require passes on to its children by the rules of [`for_child`]. Source: `design/qemu-surface.md` 4.2.

use std::fmt;
use std::ops::{BitAnd, BitOr};

use crate::node::{Kind, Node};
use crate::view::Role;

/// A set of permissions.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Perms(u8);

impl Perms {
    /// Reading what was written last.
    pub const CONSISTENT_READ: Self = Self(1);
    /// Writing what a reader could notice.
    pub const WRITE: Self = Self(2);
    /// Writing what reads the same as before, as streaming does.
    pub const WRITE_UNCHANGED: Self = Self(4);
    /// Changing the length.
    pub const RESIZE: Self = Self(8);
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Everything.
    pub const ALL: Self = Self(15);

    /// The four permissions with the numbers that QEMU's file locks give them, and their names.
    pub const NAMES: [(Self, &'static str); 4] = [
        (Self::CONSISTENT_READ, "consistent read"),
        (Self::WRITE, "write"),
        (Self::WRITE_UNCHANGED, "write unchanged"),
        (Self::RESIZE, "resize"),
    ];

    /// Whether all of `other` are in.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether none is in.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// All that are in this one and not in `other`.
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl BitOr for Perms {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Perms {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl fmt::Display for Perms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = Self::NAMES.iter().filter(|(p, _)| self.has(*p)).map(|(_, n)| *n).collect();
        f.write_str(&names.join(", "))
    }
}

impl fmt::Debug for Perms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{self}}}")
    }
}

/// What the users of a node ask of it, all together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The node is open for writing (though perhaps nobody writes).
    pub writable: bool,
    /// What at least one user requires.
    pub required: Perms,
    /// What all users share.
    pub shared: Perms,
    /// There are users at all.
    pub used: bool,
}

impl Access {
    /// Of a node that nobody uses.
    pub const UNUSED: Self = Self { writable: false, required: Perms::NONE, shared: Perms::ALL, used: false };

    /// Enough for both.
    pub fn both(self, other: Self) -> Self {
        Self {
            writable: self.writable || other.writable,
            required: self.required | other.required,
            shared: self.shared & other.shared,
            used: self.used || other.used,
        }
    }
}

/// What `node` with `access` requires of its child in `role`, and what it shares with the child's other users.
pub fn for_child(node: &dyn Node, access: Access, role: Role) -> (Perms, Perms) {
    use Perms as P;
    if let Some(own) = node.child_access(access, role) {
        return own;
    }
    match (node.kind(), role) {
        // What is copied there is for nobody to rely on yet.
        (_, Role::Target) => (P::WRITE, P::ALL.without(P::RESIZE)),
        (Kind::Filter, _) => (access.required, access.shared),
        (_, Role::File) => {
            let mut required = access.required | P::CONSISTENT_READ;
            if required.has(P::WRITE_UNCHANGED) {
                required = required | P::WRITE;
            }
            if access.writable {
                required = required | P::WRITE | P::RESIZE;
            }
            (required, P::CONSISTENT_READ | P::WRITE_UNCHANGED)
        }
        (_, Role::Backing) => {
            let mut shared = P::CONSISTENT_READ | P::WRITE_UNCHANGED;
            if access.shared.has(P::WRITE) {
                shared = shared | P::WRITE | P::RESIZE;
            }
            (access.required & P::CONSISTENT_READ, shared)
        }
    }
}

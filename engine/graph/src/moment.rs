//! What a draft wants done when it is put into force, beside its wiring.

use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

use crate::NodeId;

type Action = Box<dyn FnOnce() + Send + Sync>;

/// See the module.
#[derive(Default)]
pub(crate) struct Moment {
    actions: Vec<Action>,
    /// Images may go on keeping the bitmaps that they have: that says enough.
    pub(crate) may_lag: bool,
    /// What was written to these is made durable first.
    pub(crate) flushes: Vec<NodeId>,
    /// If requests under way have not ended by then, the draft is dropped.
    pub(crate) patience: Option<Duration>,
    /// If these go, nobody needs what was written to them.
    pub(crate) given_up: HashSet<NodeId>,
}

impl Moment {
    pub(crate) fn push(&mut self, action: impl FnOnce() + Send + Sync + 'static) {
        self.actions.push(Box::new(action));
    }

    pub(crate) fn act(&mut self) {
        self.actions.drain(..).for_each(|action| action());
    }
}

impl fmt::Debug for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} actions", self.actions.len())
    }
}

/// It belongs to one draft, not to what is copied from it.
impl Clone for Moment {
    fn clone(&self) -> Self {
        Self::default()
    }
}

//! The states of a job and the verbs that each accepts, as tables. Source: `design/qemu-surface.md` 5.1.

use std::fmt;

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Checked, not started.
    Created,
    /// Working.
    Running,
    /// Would work, but is held back.
    Paused,
    /// In sync; waits for `complete`.
    Ready,
    /// Ready, and held back.
    Standby,
    /// Its work is done; waits for the other jobs of its group.
    Waiting,
    /// Waits for `finalize`.
    Pending,
    /// Failed or cancelled; cleans up.
    Aborting,
    /// Over; waits for `dismiss`.
    Concluded,
    /// Gone.
    Null,
}

/// What a client may ask of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// job-cancel
    Cancel,
    /// job-pause
    Pause,
    /// job-resume
    Resume,
    /// block-job-set-speed
    SetSpeed,
    /// job-complete
    Complete,
    /// job-finalize
    Finalize,
    /// job-dismiss
    Dismiss,
    /// block-job-change
    Change,
}

impl Status {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Created,
        Self::Running,
        Self::Paused,
        Self::Ready,
        Self::Standby,
        Self::Waiting,
        Self::Pending,
        Self::Aborting,
        Self::Concluded,
        Self::Null,
    ];

    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    /// Whether a job may go from here to `to`.
    pub fn may_become(self, to: Self) -> bool {
        use Status::{Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting};
        match self {
            Created => matches!(to, Running | Aborting | Null),
            Running => matches!(to, Paused | Ready | Waiting | Aborting),
            Paused => to == Running,
            Ready => matches!(to, Standby | Waiting | Aborting),
            Standby => to == Ready,
            Waiting => matches!(to, Pending | Aborting),
            Pending => matches!(to, Aborting | Concluded),
            Aborting => matches!(to, Aborting | Concluded),
            Concluded => to == Null,
            Null => false,
        }
    }

    /// In sync, and not on its way to its end yet.
    pub fn is_ready(self) -> bool {
        matches!(self, Self::Ready | Self::Standby)
    }

    /// Whether a client may ask for `verb` now.
    pub fn allows(self, verb: Verb) -> bool {
        use Status::{Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby};
        match verb {
            Verb::Cancel => !matches!(self, Aborting | Concluded | Null),
            Verb::Pause | Verb::Resume | Verb::SetSpeed | Verb::Change => {
                matches!(self, Created | Running | Paused | Ready | Standby)
            }
            Verb::Complete => matches!(self, Ready | Standby),
            Verb::Finalize => self == Pending,
            Verb::Dismiss => self == Concluded,
        }
    }
}

impl Verb {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Cancel,
        Self::Pause,
        Self::Resume,
        Self::SetSpeed,
        Self::Complete,
        Self::Finalize,
        Self::Dismiss,
        Self::Change,
    ];

    /// The name in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed => "set-speed",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
            Self::Change => "change",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of the source, row by row: from; to created, running, paused, ready, standby, waiting, pending,
    /// aborting, concluded, null.
    const TRANSITIONS: [&str; 10] = [
        ".x.....x.x",
        "..xx.x.x..",
        ".x........",
        "....xx.x..",
        "...x......",
        "......xx..",
        ".......xx.",
        ".......xx.",
        ".........x",
        "..........",
    ];

    /// Verb by verb: allowed in created, running, …, null.
    const VERBS: [&str; 7] =
        ["xxxxxxx...", "xxxxx.....", "xxxxx.....", "xxxxx.....", "...xx.....", "......x...", "........x."];

    #[test]
    fn every_transition_is_as_in_the_table() {
        for (from, row) in Status::ALL.into_iter().zip(TRANSITIONS) {
            for (to, cell) in Status::ALL.into_iter().zip(row.chars()) {
                assert_eq!(from.may_become(to), cell == 'x', "{from} to {to}");
            }
        }
    }

    #[test]
    fn every_verb_is_allowed_where_the_table_says() {
        for (verb, row) in Verb::ALL.into_iter().zip(VERBS) {
            for (status, cell) in Status::ALL.into_iter().zip(row.chars()) {
                assert_eq!(status.allows(verb), cell == 'x', "{verb} in {status}");
            }
        }
    }
}

//! The three stream cases and the five commit cases of "Live Block Device Operations", and ways of its live disk
//! synchronization and backup.

/// How a case's job ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By itself.
    Itself,
    /// It gets ready and is then completed: the guest goes over to the target.
    Complete,
    /// It gets ready and is then cancelled: the target is a copy of that moment.
    Cancel,
    /// By itself, and the target is a copy of the moment when it began.
    Backup,
    /// It gets ready and is then cancelled, and the guest goes on at a second daemon, which has the target.
    Migrate,
}

/// One case: what to do with the chain A <- B <- C <- D, and what must come of it.
#[derive(Debug)]
pub struct Case {
    /// What it shows.
    pub title: &'static str,
    /// The command.
    pub command: &'static str,
    /// Its arguments besides the job's id: nodes and files are named by their letters.
    pub arguments: &'static [(&'static str, &'static str)],
    /// How it ends.
    pub end: End,
    /// The chain afterwards, base first.
    pub result: &'static str,
}

/// All cases, in the order of the document.
pub const CASES: [Case; 14] = [
    Case {
        title: "stream 1: merge everything into the active layer",
        command: "block-stream",
        arguments: &[("device", "D")],
        end: End::Itself,
        result: "D",
    },
    Case {
        title: "stream 2: merge B and C into the active layer",
        command: "block-stream",
        arguments: &[("device", "D"), ("base-node", "A")],
        end: End::Itself,
        result: "AD",
    },
    Case {
        title: "stream 3: merge B into C, below the active layer",
        command: "block-stream",
        arguments: &[("device", "C"), ("base-node", "A")],
        end: End::Itself,
        result: "ACD",
    },
    Case {
        title: "commit 1: B into A",
        command: "block-commit",
        arguments: &[("device", "D"), ("base-node", "A"), ("top-node", "B")],
        end: End::Itself,
        result: "ACD",
    },
    Case {
        title: "commit 2: B and C into A",
        command: "block-commit",
        arguments: &[("device", "D"), ("base-node", "A"), ("top-node", "C")],
        end: End::Itself,
        result: "AD",
    },
    Case {
        title: "commit 3: B, C and the active layer into A",
        command: "block-commit",
        arguments: &[("device", "D"), ("base-node", "A"), ("top-node", "D")],
        end: End::Complete,
        result: "A",
    },
    Case {
        title: "commit 4: C into B",
        command: "block-commit",
        arguments: &[("device", "D"), ("base-node", "B"), ("top-node", "C")],
        end: End::Itself,
        result: "ABD",
    },
    Case {
        title: "commit 5: C and the active layer into B",
        command: "block-commit",
        arguments: &[("device", "D"), ("base-node", "B"), ("top-node", "D")],
        end: End::Complete,
        result: "AB",
    },
    Case {
        title: "mirror 1: the whole disk into E, and the guest over to it",
        command: "drive-mirror",
        arguments: &[("device", "D"), ("target", "E"), ("node-name", "E"), ("sync", "full")],
        end: End::Complete,
        result: "E",
    },
    Case {
        title: "mirror 2: the active layer into E, blocking writes, and the guest over to it",
        command: "drive-mirror",
        arguments: &[
            ("device", "D"),
            ("target", "E"),
            ("node-name", "E"),
            ("sync", "top"),
            ("copy-mode", "write-blocking"),
        ],
        end: End::Complete,
        result: "ABCE",
    },
    Case {
        title: "mirror 3: the whole disk into E, and stop there: a copy of that moment",
        command: "drive-mirror",
        arguments: &[("device", "D"), ("target", "E"), ("node-name", "E"), ("sync", "full")],
        end: End::Cancel,
        result: "ABCD",
    },
    Case {
        title: "backup 1: the whole disk, as it is now, into E",
        command: "drive-backup",
        arguments: &[("device", "D"), ("target", "E"), ("sync", "full")],
        end: End::Backup,
        result: "ABCD",
    },
    Case {
        title: "backup 2: the active layer, as it is now, into E",
        command: "drive-backup",
        arguments: &[("device", "D"), ("target", "E"), ("sync", "top")],
        end: End::Backup,
        result: "ABCD",
    },
    Case {
        title: "migration: the disk to a second daemon, over NBD, and the guest after it",
        command: "drive-mirror",
        arguments: &[
            ("device", "D"),
            ("target", "nbd+unix:///disk?socket=far-nbd.sock"),
            ("sync", "full"),
            ("mode", "existing"),
            ("format", "raw"),
        ],
        end: End::Migrate,
        result: "ABCD",
    },
];

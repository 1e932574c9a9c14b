//! The three stream cases and the five commit cases of "Live Block Device Operations", and two ways of its live disk
//! synchronization.

/// One case: what to do with the chain A <- B <- C <- D, and what must come of it.
#[derive(Debug)]
pub struct Case {
    /// What it shows.
    pub title: &'static str,
    /// The command.
    pub command: &'static str,
    /// Its arguments besides the job's id: nodes and files are named by their letters.
    pub arguments: &'static [(&'static str, &'static str)],
    /// The guest's own image is committed or mirrored: the job gets ready and is then completed.
    pub active: bool,
    /// The chain afterwards, base first.
    pub result: &'static str,
}

/// All cases, in the order of the document.
pub const CASES: [Case; 10] = [
    Case {
        title: "stream 1: merge everything into the active layer",
        command: "block-stream",
        arguments: &[("device", "D")],
        active: false,
        result: "D",
    },
    Case {
        title: "stream 2: merge B and C into the active layer",
        command: "block-stream",
        arguments: &[("device", "D"), ("base-node", "A")],
        active: false,
        result: "AD",
    },
    Case {
        title: "stream 3: merge B into C, below the active layer",
        command: "block-stream",
        arguments: &[("device", "C"), ("base-node", "A")],
        active: false,
        result: "ACD",
    },
    Case {
        title: "commit 1: B into A",
        command: "block-commit",
        arguments: &[("device", "D"), ("base-node", "A"), ("top-node", "B")],
        active: false,
        result: "ACD",
    },
    Case {
        title: "commit 2: B and C into A",
        command: "block-commit",
        arguments: &[("device", "D"), ("base-node", "A"), ("top-node", "C")],
        active: false,
        result: "AD",
    },
    Case {
        title: "commit 3: B, C and the active layer into A",
        command: "block-commit",
        arguments: &[("device", "D"), ("base-node", "A"), ("top-node", "D")],
        active: true,
        result: "A",
    },
    Case {
        title: "commit 4: C into B",
        command: "block-commit",
        arguments: &[("device", "D"), ("base-node", "B"), ("top-node", "C")],
        active: false,
        result: "ABD",
    },
    Case {
        title: "commit 5: C and the active layer into B",
        command: "block-commit",
        arguments: &[("device", "D"), ("base-node", "B"), ("top-node", "D")],
        active: true,
        result: "AB",
    },
    Case {
        title: "mirror 1: the whole disk into E, and the guest over to it",
        command: "drive-mirror",
        arguments: &[("device", "D"), ("target", "E"), ("node-name", "E"), ("sync", "full")],
        active: true,
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
        active: true,
        result: "ABCE",
    },
];

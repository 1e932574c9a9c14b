//! The commands for a monitor: on a disk that somebody else has open, with all that is said in one text.
//!
//! Requests that nobody waits for are over, too, when the text is there.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use underlay_disk::Disk;
use underlay_graph::IoError;

use crate::report::Out;
use crate::session::{self, Done, Fault, Session};
pub use crate::table::Needs;
use crate::table::find;

/// In which way a disk is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Bytes are read.
    Read,
    /// Bytes are written.
    Write,
    /// What was written is made durable.
    Flush,
}

/// The statistics of a device whose disk it is. As in the reference, the requests of aio_read, aio_write (of bytes, not
/// of zeroes) and aio_flush count.
pub trait Accounts: Debug + Send + Sync {
    /// A request has ended; times are those of [`rt::now`](underlay_sys::rt::now).
    fn done(&self, way: Way, bytes: u64, begun: Duration, ended: Duration, went_well: bool);
    /// A request was only told of.
    fn invalid(&self, way: Way);
}

/// What the command of a line needs to be there.
pub fn needs(line: &str) -> Needs {
    let words = session::words(line);
    let command = words.first().and_then(|name| find(name)).filter(|command| command.is_of_monitors());
    command.map_or(Needs::Nothing, |command| command.needs)
}

/// Executes a line; what is to be said. Without a disk it is about a drive that has no medium.
pub async fn execute(disk: Option<Disk>, accounts: Option<Arc<dyn Accounts>>, line: &str) -> String {
    let out = Out::monitor();
    let mut session = Session {
        out: out.clone(),
        program: String::new(),
        disk,
        accounts,
        misalign: false,
        pending: Vec::new(),
    };
    // What is to be known is in the text.
    let _ = session.execute(line).await;
    session.drain().await;
    out.text()
}

/// What a command says when there is no medium. The reference crashes at some of them.
pub fn without_medium(name: &str, words: &[String]) -> Done {
    let missing = "No medium found";
    Err(match name {
        "aio_flush" | "flush" => return Ok(()),
        "aio_read" => Fault::Plain(format!("readv failed: {missing}")),
        "aio_write" | "discard" | "read" | "readv" | "write" | "writev" => {
            Fault::Plain(format!("{name} failed: {missing}"))
        }
        "alloc" | "info" | "reopen" => Fault::Disk(missing.to_owned()),
        "length" => Fault::Plain(format!("getlength: {missing}")),
        "map" => Fault::Disk(format!("Failed to query image length: {missing}")),
        "truncate" => Fault::Disk("No medium inserted".to_owned()),
        name => return session::unsupported(name, words),
    })
}

/// Another user of the disk would be in for a surprise.
pub fn no_reopen() -> Fault {
    Fault::Disk(format!("reopen: {}; use blockdev-reopen", IoError::ENOTSUP))
}

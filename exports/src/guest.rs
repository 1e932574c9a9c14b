//! What stands between a guest's requests and its disk: a machine that is stopped, limits, accounts, and what is done
//! about errors. An export without such a [`Guest`] sends requests straight to the disk.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use underlay_graph::{ByteRange, Result, Root, WriteFlags, ZeroFlags};
use underlay_sys::{Iov, rt};

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Bytes are read.
    Read,
    /// Bytes are written, or made zero.
    Write,
    /// What was written is made durable.
    Flush,
    /// Bytes are given up.
    Discard,
}

/// What becomes of a request that was carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The guest is told how it went.
    Tell,
    /// The guest is told that all is well.
    Hide,
    /// It is carried out once more, after it was admitted again.
    Again,
}

/// When a request was carried out, by [`rt::now`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Took {
    /// It began.
    pub start: Duration,
    /// It ended.
    pub end: Duration,
}

/// See the module.
#[async_trait]
pub trait Guest: Debug + Send + Sync {
    /// Waits until a request may go on. An error is the guest's answer: it will never go on.
    async fn admit(&self, operation: Operation, bytes: u64) -> Result<()>;

    /// Whether what the guest reads from below the image is copied into it.
    fn copies_on_read(&self) -> bool {
        false
    }

    /// Told of a request that was refused before it was admitted: it asked for what cannot be.
    fn refused(&self, _operation: Operation) {}

    /// Told of how an admitted request went.
    fn done(&self, operation: Operation, bytes: u64, when: Took, result: &Result<()>) -> Verdict;
}

/// A guest's way to its disk.
#[derive(Clone, Debug)]
pub struct Way {
    root: Root,
    guest: Option<Arc<dyn Guest>>,
}

impl Way {
    /// To the disk of `root`.
    pub fn new(root: Root, guest: Option<Arc<dyn Guest>>) -> Self {
        Self { root, guest }
    }

    /// The disk itself, for questions that are nobody's I/O.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// See [`Root::read`].
    pub async fn read(&self, range: ByteRange, into: Iov) -> Result<()> {
        let copies = self.guest.as_ref().is_some_and(|guest| guest.copies_on_read());
        let read = || {
            let into = into.clone();
            async move {
                // It is read wherever it is when it could not be copied.
                if copies && let Err(error) = self.root.populate(range).await {
                    tracing::debug!(%error, "what was read could not be copied");
                }
                let result = self.root.read(range, into.clone()).await;
                if result.is_err() {
                    // An error may be hidden: nobody may see what was in this memory before.
                    into.fill(0);
                }
                result
            }
        };
        self.ask(Operation::Read, range.len(), read).await
    }

    /// See [`Root::write`].
    pub async fn write(&self, range: ByteRange, from: Iov, flags: WriteFlags) -> Result<()> {
        self.ask(Operation::Write, range.len(), || self.root.write(range, from.clone(), flags)).await
    }

    /// See [`Root::write_zeroes`].
    pub async fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.ask(Operation::Write, range.len(), || self.root.write_zeroes(range, flags)).await
    }

    /// See [`Root::discard`].
    pub async fn discard(&self, range: ByteRange) -> Result<()> {
        self.ask(Operation::Discard, range.len(), || self.root.discard(range)).await
    }

    /// See [`Root::flush`].
    pub async fn flush(&self) -> Result<()> {
        self.ask(Operation::Flush, 0, || self.root.flush()).await
    }

    /// A request was refused: it asked for what cannot be.
    pub fn refused(&self, operation: Operation) {
        if let Some(guest) = &self.guest {
            guest.refused(operation);
        }
    }

    async fn ask<F>(&self, operation: Operation, bytes: u64, request: impl Fn() -> F) -> Result<()>
    where
        F: Future<Output = Result<()>>,
    {
        let Some(guest) = &self.guest else { return request().await };
        loop {
            guest.admit(operation, bytes).await?;
            let start = rt::now();
            let result = request().await;
            match guest.done(operation, bytes, Took { start, end: rt::now() }, &result) {
                Verdict::Tell => return result,
                Verdict::Hide => return Ok(()),
                Verdict::Again => {}
            }
        }
    }
}

//! One piece of a copy, done beside others.

use std::sync::Arc;

use tokio::sync::oneshot;
use underlay_graph::{ByteRange, IoError, WriteFlags, ZeroFlags};
use underlay_qcow2::Qcow2;
use underlay_sys::{Iov, complain, rt};

use crate::open::Image;
use crate::{Failure, Outcome};

/// When a piece may take its places in the target: when the sender of `come` has gone. Then the next piece may.
pub(super) struct Turn {
    pub(super) come: oneshot::Receiver<()>,
    pub(super) next: oneshot::Sender<()>,
}

/// One run to copy.
pub(super) struct Piece {
    pub(super) input: Arc<Image>,
    pub(super) output: Arc<Image>,
    pub(super) run: ByteRange,
    /// Where the input begins in the output.
    pub(super) start: u64,
    /// The source reads zeroes there.
    pub(super) zero: bool,
    /// So does the target, as long as nothing is written.
    pub(super) known_zero: bool,
    pub(super) compressed: bool,
    /// So many zeroes in a row, in bytes, are not written as data; of a compressed target the size of its clusters.
    pub(super) sparse: u64,
    /// What cannot be read becomes zero; quietly or not.
    pub(super) salvage: Option<bool>,
}

impl Piece {
    /// Has it copied by the lane with this number; what becomes of it can be received.
    pub(super) fn start(self, turn: Turn, lane: usize) -> oneshot::Receiver<Outcome> {
        let (to, from) = oneshot::channel();
        rt::spawn_background(lane, async move {
            // Nobody waits any more after an error.
            let _ = to.send(self.copy(turn).await);
        });
        from
    }

    async fn copy(self, turn: Turn) -> Outcome {
        let (compressed, sparse) = (self.compressed, self.sparse);
        let at = self.start + self.run.start();
        let writing = |error: IoError| Failure::new(format!("error while writing at byte {at}: {error}"));
        let zeroes = ZeroFlags { may_unmap: true, no_fallback: false };
        let target = ByteRange::between(at, at + self.run.len());
        if self.zero {
            let _ = turn.come.await;
            return self.output.root.write_zeroes(target, zeroes).await.map_err(writing);
        }
        let data = Iov::scratch(self.run.buffer_len());
        if let Err(error) = self.input.root.read(self.run, data.clone()).await {
            let Some(quiet) = self.salvage else {
                return Err(Failure::new(format!(
                    "error while reading at byte {}: {}",
                    self.run.start(),
                    error.plain()
                )));
            };
            self.salvage(&data, quiet).await;
        }
        let runs = runs(&data, sparse);
        let _ = turn.come.await;
        if !compressed {
            self.reserve(at, &runs).await.map_err(writing)?;
            drop(turn.next);
        }
        for (from, len, is_zero) in runs {
            let range = ByteRange::between(at + from as u64, at + (from + len) as u64);
            if is_zero && self.known_zero {
                continue;
            }
            let done = match is_zero {
                true => self.output.root.write_zeroes(range, zeroes).await,
                false => self.write(range, data.slice(from, len), compressed.then_some(sparse)).await,
            };
            done.map_err(writing)?;
        }
        Ok(())
    }

    /// Writes to the target, compressed if its clusters are told. One that another input has a part of is not.
    async fn write(&self, range: ByteRange, data: Iov, clusters: Option<u64>) -> Result<(), IoError> {
        let inside = self.output.root.enter().await?;
        let cx = inside.cx();
        let whole = match clusters.filter(|cluster| range.start().is_multiple_of(*cluster)) {
            Some(_) if range.end() == cx.length() => range.len(),
            Some(cluster) => range.len() - range.len() % cluster,
            None => 0,
        };
        let (packed, plain) = range.split(whole);
        let (first, rest) =
            (data.slice(0, packed.buffer_len()), data.slice(packed.buffer_len(), plain.buffer_len()));
        for (part, data, compressed) in [(packed, first, true), (plain, rest, false)] {
            if !part.is_empty() {
                cx.write(part, data, WriteFlags { compressed }).await?;
            }
        }
        Ok(())
    }

    /// Gives the data among `runs` of the piece at `at` its places in a target that hands them out.
    async fn reserve(&self, at: u64, runs: &[(usize, usize, bool)]) -> Result<(), IoError> {
        let inside = self.output.root.enter().await?;
        let cx = inside.cx();
        let Some(qcow2) = cx.node().as_any().downcast_ref::<Qcow2>() else { return Ok(()) };
        for (from, len, _) in runs.iter().filter(|(_, _, is_zero)| !is_zero) {
            let range = ByteRange::between(at + *from as u64, at + (from + len) as u64);
            qcow2.reserve_places(&cx, range).await?;
        }
        Ok(())
    }

    /// Reads what can be read, sector by sector.
    async fn salvage(&self, data: &Iov, quiet: bool) {
        let mut rest = self.run;
        while !rest.is_empty() {
            let (sector, after) = rest.split(512);
            rest = after;
            let at = usize::try_from(sector.start() - self.run.start()).unwrap_or(0);
            let into = data.slice(at, sector.buffer_len());
            if let Err(error) = self.input.root.read(sector, into.clone()).await {
                if !quiet {
                    complain!(
                        "qemu-img: warning: error while reading offset {}: {}",
                        sector.start(),
                        error.plain()
                    );
                }
                into.fill(0);
            }
        }
    }
}

/// Cuts a buffer into runs of data and, of at least `sparse` bytes each, of zeroes.
fn runs(data: &Iov, sparse: u64) -> Vec<(usize, usize, bool)> {
    let unit = usize::try_from(sparse).unwrap_or(0);
    if unit == 0 {
        return vec![(0, data.len(), false)];
    }
    let mut runs: Vec<(usize, usize, bool)> = Vec::new();
    let mut at = 0;
    while at < data.len() {
        let len = unit.min(data.len() - at);
        let zero = data.slice(at, len).is_zero();
        match runs.last_mut() {
            Some((_, total, kind)) if *kind == zero => *total += len,
            _ => runs.push((at, len, zero)),
        }
        at += len;
    }
    runs
}

//! What the kernel alone needs for the bytes of a row: loops that only read and write, with no format, no protocol and
//! nobody who waits for anything else. No program that copies these bytes so is faster on this machine.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::available_parallelism;
use std::time::Instant;

use crate::image;
use crate::measure::Outcome;
use crate::rows::Bench;

const MIB: u64 = 1 << 20;

/// A source of so many bytes, and an empty file.
fn files(bench: &Bench, bytes: u64) -> Outcome<(File, File)> {
    bench.empty_folder()?;
    let (from, to) = (bench.path("from"), bench.path("to"));
    image::raw(&from, bytes)?;
    let files = (File::open(from)?, File::create(to)?);
    bench.warm_up(2 * bytes)?;
    Ok(files)
}

/// A number in `0..count`, another one for each turn, and far from those before; `count` is a power of two.
fn scattered(turn: u64, count: u64) -> u64 {
    turn.wrapping_mul(0x9e37_79b1) & (count - 1)
}

/// Copies 1 GiB from one file to another. Gives seconds.
pub fn of_a_gigabyte(bench: &Bench) -> Outcome<f64> {
    copy(bench, bench.size(1 << 30), MIB, true)
}

/// Copies `bytes` in pieces, on all processors. The pieces are read in order, or here and there; they are written one
/// behind the other. Gives seconds.
pub fn copy(bench: &Bench, bytes: u64, piece: u64, in_order: bool) -> Outcome<f64> {
    let (from, to) = files(bench, bytes)?;
    let (count, turns) = (bytes / piece, AtomicU64::new(0));
    let work = || -> std::io::Result<()> {
        let mut buffer = vec![0; usize::try_from(piece).unwrap_or(usize::MAX)];
        loop {
            let turn = turns.fetch_add(1, Ordering::Relaxed);
            if turn >= count {
                return Ok(());
            }
            let at = if in_order { turn } else { scattered(turn, count) };
            from.read_exact_at(&mut buffer, at * piece)?;
            to.write_all_at(&buffer, turn * piece)?;
        }
    };
    let begun = Instant::now();
    on_all_processors(work)?;
    Ok(begun.elapsed().as_secs_f64())
}

fn on_all_processors(work: impl Fn() -> std::io::Result<()> + Sync) -> Outcome<()> {
    let threads = available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(&work)).collect();
        running
            .into_iter()
            .try_for_each(|thread| Ok(thread.join().map_err(|_| "a copying thread panicked")??))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_pieces_are_each_taken_once() {
        let mut all: Vec<_> = (0..1024).map(|turn| scattered(turn, 1024)).collect();
        assert_ne!(all[..4], [0, 1, 2, 3]);
        all.sort_unstable();
        assert!(all.iter().copied().eq(0..1024));
    }
}

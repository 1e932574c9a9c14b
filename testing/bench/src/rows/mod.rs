//! The rows: one kind of work each, with the target that it has to meet.

mod bitmaps;
mod during;
mod follow;
mod guest;
mod jobs;
mod raw;
mod start;
mod tools;

use std::path::PathBuf;

use crate::image;
use crate::measure::{Outcome, Sample};
use crate::side::{Programs, Side};

/// What is needed to measure anything.
pub struct Bench {
    pub programs: Programs,
    /// Where the images lie; emptied between samples.
    pub folder: PathBuf,
    /// How long a load runs.
    pub seconds: f64,
    /// Everything is small: it need only work.
    pub quick: bool,
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

impl Bench {
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A size in bytes, or a small one for a quick run.
    pub fn size(&self, bytes: u64) -> u64 {
        if self.quick { (bytes / 64).max(16 * MIB) } else { bytes }
    }

    /// See [`image::warm_up`].
    pub fn warm_up(&self, bytes: u64) -> Outcome<()> {
        if self.quick { Ok(()) } else { image::warm_up(&self.folder, bytes) }
    }

    pub fn empty_folder(&self) -> Outcome<()> {
        for entry in std::fs::read_dir(&self.folder)? {
            let entry = entry?;
            match entry.file_type()?.is_dir() {
                true => std::fs::remove_dir_all(entry.path())?,
                false => std::fs::remove_file(entry.path())?,
            }
        }
        Ok(())
    }

    /// One sample of a row, in an empty folder.
    pub fn sample(&self, row: &Row, side: Side) -> Outcome<Vec<Sample>> {
        self.empty_folder()?;
        (row.work)(self, side).map_err(|error| format!("{} on {side:?}: {error}", row.name).into())
    }

    /// What the kernel alone needs for the work of a row, if the row says.
    pub fn limit(&self, row: &Row) -> Outcome<Option<f64>> {
        row.limit.map(|limit| limit(self)).transpose()
    }
}

/// What a part of a row has to reach.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// QEMU's value divided by ours is at least this.
    Ratio(f64),
    /// Our value is at most this.
    Value(f64),
    /// Only for information.
    None,
}

/// One value of a row.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub name: &'static str,
    pub unit: &'static str,
    pub target: Target,
}

type Limit = fn(&Bench) -> Outcome<f64>;
type Work = Box<dyn Fn(&Bench, Side) -> Outcome<Vec<Sample>>>;

/// A row: does the work on one side, and gives a sample for each part.
pub struct Row {
    pub name: &'static str,
    pub about: &'static str,
    pub parts: Vec<Part>,
    work: Work,
    /// What the kernel alone needs for the same bytes ([`crate::limit`]), in the unit of the only part.
    limit: Option<Limit>,
    /// Whether it means anything here.
    condition: fn(&Bench) -> Outcome<bool>,
}

impl Row {
    /// A row with a single value.
    fn one(
        name: &'static str,
        about: &'static str,
        (unit, target): (&'static str, Target),
        work: impl Fn(&Bench, Side) -> Outcome<Sample> + 'static,
    ) -> Self {
        let parts = vec![Part { name: "", unit, target }];
        Self::of_parts(name, about, parts, move |bench, side| Ok(vec![work(bench, side)?]))
    }

    /// A row with several values.
    fn of_parts(
        name: &'static str,
        about: &'static str,
        parts: Vec<Part>,
        work: impl Fn(&Bench, Side) -> Outcome<Vec<Sample>> + 'static,
    ) -> Self {
        Self { name, about, parts, work: Box::new(work), limit: None, condition: |_| Ok(true) }
    }

    fn limited_by(self, limit: Limit) -> Self {
        Self { limit: Some(limit), ..self }
    }

    fn only_where(self, condition: fn(&Bench) -> Outcome<bool>) -> Self {
        Self { condition, ..self }
    }

    /// Whether it means anything on this machine.
    pub fn is_for(&self, bench: &Bench) -> Outcome<bool> {
        bench.empty_folder()?;
        (self.condition)(bench)
    }
}

/// All rows, in the order of the targets.
pub fn all() -> Vec<Row> {
    let kinds = [
        guest::rows,
        jobs::rows,
        during::rows,
        follow::rows,
        raw::rows,
        bitmaps::rows,
        tools::rows,
        start::rows,
    ];
    kinds.into_iter().flat_map(|rows| rows()).collect()
}

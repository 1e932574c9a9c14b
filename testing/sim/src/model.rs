//! What a guest may read of its disk, sector by sector: while several of its requests are in flight, and after a
//! power cut.
//!
//! Every sector written says which sector it is and which write it comes from, so a stale, torn or misplaced one
//! is recognised at once.

use std::collections::BTreeSet;

use crate::SECTOR;

/// What a sector says: the number of the write that it comes from, 0 for zeroes.
pub type Value = u64;

/// The bytes of `count` sectors from `first` on, written by `value`.
pub fn stamp(first: u64, count: u64, value: Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    for sector in first..first + count {
        for _ in 0..SECTOR / 16 {
            bytes.extend(if value == 0 { 0 } else { sector }.to_be_bytes());
            bytes.extend(value.to_be_bytes());
        }
    }
    bytes
}

/// What the bytes of a sector say; `None` for bytes that nobody wrote there.
fn parse(sector: u64, bytes: &[u8]) -> Option<Value> {
    let value = Value::from_be_bytes(bytes.get(8..16)?.try_into().ok()?);
    (stamp(sector, 1, value) == bytes).then_some(value)
}

#[derive(Clone, Debug, Default)]
struct Sector {
    /// What may be read now.
    now: BTreeSet<Value>,
    /// What may be read after a power cut.
    cut: BTreeSet<Value>,
    /// Every write with the moment at which it began.
    begun: Vec<(u64, Value)>,
}

/// The model of one disk.
#[derive(Clone, Debug)]
pub struct Model {
    sectors: Vec<Sector>,
    moment: u64,
    in_flight: BTreeSet<Value>,
    /// What could be read at moments gone by, oldest first; see [`Model::remember`].
    history: Vec<Looking>,
}

/// A write under way.
#[derive(Debug)]
#[must_use = "its end matters"]
pub struct Writing {
    first: u64,
    /// What each sector held for sure before this write began.
    before: Vec<BTreeSet<Value>>,
    write: u64,
}

/// A read or a flush under way.
#[derive(Clone, Debug)]
#[must_use = "its end matters"]
pub struct Looking {
    first: u64,
    moment: u64,
    seen: Vec<BTreeSet<Value>>,
}

fn at(sector: u64) -> usize {
    usize::try_from(sector).expect("a small disk")
}

impl Model {
    /// A disk of zeroes.
    pub fn new(sectors: u64) -> Self {
        let mut model =
            Self { sectors: Vec::new(), moment: 0, in_flight: BTreeSet::new(), history: Vec::new() };
        model.resize(sectors);
        model
    }

    /// The disk has another length from now on: what is behind it is gone, and what is new is zeroes.
    pub fn resize(&mut self, sectors: u64) {
        let zero = Sector { now: [0].into(), cut: [0].into(), begun: Vec::new() };
        self.sectors.resize(at(sectors), zero);
    }

    /// A write of `value` (0: zeroes) begins; `write` is a number of its own.
    pub fn begin_write(&mut self, first: u64, count: u64, value: Value, write: u64) -> Writing {
        self.moment += 1;
        let (moment, in_flight) = (self.moment, &self.in_flight);
        let before = self.sectors[at(first)..at(first + count)].iter_mut().map(|sector| {
            // Zeroes carry no number, so whose they are is not known: they may stay.
            let sure =
                sector.now.iter().copied().filter(|v| *v != 0 && !in_flight.contains(v) && *v != value);
            let zero_is_sure = sector.now.len() == 1 && value != 0 && sector.now.contains(&0);
            let sure: BTreeSet<_> = sure.chain(zero_is_sure.then_some(0)).collect();
            sector.now.insert(value);
            sector.cut.insert(value);
            sector.begun.push((moment, value));
            sure
        });
        let before = before.collect();
        self.in_flight.insert(write);
        if !self.history.is_empty() {
            self.history.push(self.begin_flush());
        }
        Writing { first, before, write }
    }

    /// It ended. Unless it was well and `certain` (a discard is not), what was before may be there still.
    pub fn end_write(&mut self, writing: Writing, certain: bool) {
        self.moment += 1;
        self.in_flight.remove(&writing.write);
        if !certain {
            return;
        }
        for (sector, before) in self.sectors[at(writing.first)..].iter_mut().zip(writing.before) {
            // Zeroes written meanwhile by somebody else cannot be told from those before.
            let zeroes_since = sector.begun.iter().rev().any(|(_, v)| *v == 0);
            sector.now.retain(|v| !before.contains(v) || *v == 0 && zeroes_since);
        }
    }

    /// A read begins.
    pub fn begin_read(&self, first: u64, count: u64) -> Looking {
        let seen = self.sectors[at(first)..at(first + count)].iter().map(|s| s.now.clone()).collect();
        Looking { first, moment: self.moment, seen }
    }

    /// It ended with `bytes`; what is wrong with them, if anything.
    pub fn end_read(&self, looking: &Looking, bytes: &[u8]) -> Result<(), String> {
        let chunks = bytes.chunks(at(SECTOR));
        for ((number, seen), bytes) in (looking.first..).zip(&looking.seen).zip(chunks) {
            let sector = &self.sectors[at(number)];
            let value = parse(number, bytes);
            let later = |v| sector.begun.iter().any(|(moment, w)| *moment > looking.moment && *w == v);
            if !value.is_some_and(|v| seen.contains(&v) || later(v)) {
                return Err(format!(
                    "sector {number}: {} instead of one of {seen:?}",
                    describe(value, bytes)
                ));
            }
        }
        Ok(())
    }

    /// A flush begins.
    pub fn begin_flush(&self) -> Looking {
        self.begin_read(0, self.sectors.len() as u64)
    }

    /// It ended well: what was over before it began is safe.
    pub fn end_flush(&mut self, looking: &Looking) {
        for (sector, seen) in self.sectors.iter_mut().zip(&looking.seen) {
            let begun = &sector.begun;
            let later = |v: Value| begun.iter().any(|(moment, w)| *moment > looking.moment && *w == v);
            sector.cut.retain(|v| seen.contains(v) || later(*v));
        }
    }

    /// From now on it is remembered what the disk was like, for [`Model::check_copy`].
    pub fn remember(&mut self) {
        self.history = vec![self.begin_flush()];
    }

    /// Ends what [`Model::remember`] began: a model that knows of nothing later, for copies of a moment that is over.
    pub fn moment_over(&mut self) -> Self {
        let until = self.clone();
        self.history.clear();
        until
    }

    /// Compares a part of a copy of a moment since [`Model::remember`].
    pub fn check_part(&self, first: u64, bytes: &[u8]) -> Result<(), String> {
        let since = self.history.first().ok_or("nothing was remembered")?;
        let seen = since.seen[at(first)..].to_vec();
        self.end_read(&Looking { first, moment: since.moment, seen }, bytes)
    }

    /// Compares a copy of the whole disk, which must be what it was like at one moment since [`Model::remember`]: a
    /// copy that has a write lacks none that was over when that write began.
    pub fn check_copy(&self, bytes: &[u8]) -> Result<(), String> {
        let begun = |(number, bytes): (u64, &[u8])| {
            let value = parse(number, bytes).filter(|value| *value != 0)?;
            let begun = &self.sectors[at(number)].begun;
            begun.iter().find(|(_, write)| *write == value).map(|(moment, _)| *moment)
        };
        let youngest = (0..).zip(bytes.chunks(at(SECTOR))).filter_map(begun).max().unwrap_or(0);
        let since = self.history.iter().rfind(|look| look.moment <= youngest).or(self.history.first());
        let since = since.ok_or("nothing was remembered")?;
        self.end_read(since, bytes)
            .map_err(|wrong| format!("in a copy that has a write of moment {youngest}, {wrong}"))
    }

    /// Compares a whole disk, read after a power cut.
    pub fn check_after_cut(&self, bytes: &[u8]) -> Result<(), String> {
        for ((number, sector), bytes) in (0..).zip(&self.sectors).zip(bytes.chunks(at(SECTOR))) {
            let value = parse(number, bytes);
            if !value.is_some_and(|v| sector.cut.contains(&v)) {
                let what = describe(value, bytes);
                return Err(format!("after the cut, sector {number}: {what} instead of {:?}", sector.cut));
            }
        }
        Ok(())
    }
}

fn describe(value: Option<Value>, bytes: &[u8]) -> String {
    match value {
        Some(value) => format!("write {value}"),
        None => format!("bytes that nobody wrote there, {:02x?}…", &bytes[..bytes.len().min(16)]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_beside_writes_and_cuts() {
        let mut model = Model::new(2);
        let first = model.begin_write(0, 1, 7, 7);
        let read = model.begin_read(0, 1);
        assert!(model.end_read(&read, &stamp(0, 1, 0)).is_ok());
        assert!(model.end_read(&read, &stamp(0, 1, 7)).is_ok());
        assert!(model.end_read(&read, &stamp(1, 1, 7)).is_err());
        model.end_write(first, true);
        let read = model.begin_read(0, 1);
        assert!(model.end_read(&read, &stamp(0, 1, 0)).is_err());
        assert!(model.check_after_cut(&stamp(0, 2, 0)).is_ok());
        let flush = model.begin_flush();
        model.end_flush(&flush);
        assert!(model.check_after_cut(&stamp(0, 2, 0)).is_err());
        let after = [stamp(0, 1, 7), stamp(1, 1, 0)].concat();
        assert!(model.check_after_cut(&after).is_ok());
    }

    #[test]
    fn a_moment_that_is_over_knows_of_nothing_later() {
        let mut model = Model::new(2);
        let write = |model: &mut Model, number| {
            let writing = model.begin_write(1, 1, number, number);
            model.end_write(writing, true);
        };
        write(&mut model, 7);
        model.remember();
        write(&mut model, 8);
        let moment = model.moment_over();
        write(&mut model, 9);
        for (value, is_it) in [(0, false), (7, true), (8, true), (9, false)] {
            assert_eq!(moment.check_part(1, &stamp(1, 1, value)).is_ok(), is_it, "{value}");
            let whole = [stamp(0, 1, 0), stamp(1, 1, value)].concat();
            assert_eq!(moment.check_copy(&whole).is_ok(), is_it, "{value}");
        }
    }

    #[test]
    fn a_copy_is_of_one_moment() {
        let mut model = Model::new(2);
        let write = |model: &mut Model, sector, number| {
            let writing = model.begin_write(sector, 1, number, number);
            model.end_write(writing, true);
        };
        write(&mut model, 0, 7);
        model.remember();
        write(&mut model, 0, 8);
        write(&mut model, 1, 9);
        let copy = |first, second| [stamp(0, 1, first), stamp(1, 1, second)].concat();
        for (first, second, is_a_moment) in
            [(7, 0, true), (8, 0, true), (8, 9, true), (7, 9, false), (0, 0, false)]
        {
            assert_eq!(model.check_copy(&copy(first, second)).is_ok(), is_a_moment, "{first} {second}");
        }
    }
}

//! What the guest's disk may hold, sector by sector.
//!
//! Every write has a number (its generation), and fills its sectors with units of 16 bytes that say which disk, sector
//! and generation they belong to. So whatever is found on the disk tells where it comes from.

use std::ops::Range;

use underlay_sim::SECTOR;

/// Bytes of a sector.
pub const BYTES: usize = 512;
const _: () = assert!(BYTES as u64 == SECTOR);
/// Bytes of a unit: the disk (8), the sector (4), the generation (4).
const UNIT: usize = 16;

/// What a request does to its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// They hold the request's generation.
    Data,
    /// They are zeroes.
    Zeroes,
    /// They are zeroes, or what they were.
    Discard,
}

/// A request that changes something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its number, from 1.
    pub generation: u32,
    /// What it does.
    pub effect: Effect,
    /// To which sectors.
    pub sectors: Range<usize>,
}

/// What a sector holds after a change was acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    /// When that was, counted in acknowledgements.
    acknowledged: u64,
    /// The generation that it holds; 0 is zeroes.
    value: u32,
    /// Or zeroes, because of a discard.
    or_zero: bool,
    /// Or parts of several, whatever they are: a kill came in the midst of a write.
    mixed: bool,
}

/// What is known of one sector: the state that the last flush covered, and all since then, oldest first. (A write
/// that no flush has covered may be lost: where it lies is known to the daemon alone until then, as in QEMU.)
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sector(Vec<State>);

/// The guest's disk: what was acknowledged, what was flushed, what was under way.
#[derive(Clone, Debug)]
pub struct Model {
    disk: u64,
    sectors: Vec<Sector>,
    generation: u32,
    acknowledgements: u64,
    flushed_upto: u64,
    /// What was there after so many acknowledgements is not forgotten: a copy may show it.
    keep: u64,
    in_flight: Vec<Change>,
}

/// What is wrong with a sector, worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wrong {
    /// A sector that no request was changing holds parts of several.
    Torn,
    /// Something that was never written there.
    Foreign,
    /// A write that a completed flush covered is missing.
    FlushedLost,
}

impl Model {
    /// A disk of zeroes.
    pub fn new(disk: u64, sectors: usize) -> Self {
        Self {
            disk,
            sectors: vec![Sector(vec![State::known(0, 0)]); sectors],
            generation: 0,
            acknowledgements: 0,
            flushed_upto: 0,
            keep: u64::MAX,
            in_flight: Vec::new(),
        }
    }

    /// How many sectors there are.
    pub fn len(&self) -> usize {
        self.sectors.len()
    }

    /// Acknowledged changes so far.
    pub fn acknowledgements(&self) -> u64 {
        self.acknowledgements
    }

    /// Changes without an answer.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether a change to some of these sectors is under way.
    pub fn is_busy(&self, sectors: &Range<usize>) -> bool {
        self.in_flight.iter().any(|change| overlap(&change.sectors, sectors))
    }

    /// A change begins. None of its sectors is busy.
    pub fn begin(&mut self, effect: Effect, sectors: Range<usize>) -> Change {
        self.generation += 1;
        let change = Change { generation: self.generation, effect, sectors };
        self.in_flight.push(change.clone());
        change
    }

    /// What a write puts on the disk.
    pub fn content(&self, change: &Change) -> Vec<u8> {
        change
            .sectors
            .clone()
            .flat_map(|at| unit(self.disk, at, change.generation).repeat(BYTES / UNIT))
            .collect()
    }

    /// The change was acknowledged; with `durable` (FUA) it is on the disk, too.
    pub fn acknowledge(&mut self, generation: u32, durable: bool) {
        let Some(at) = self.in_flight.iter().position(|change| change.generation == generation) else {
            return;
        };
        let change = self.in_flight.swap_remove(at);
        self.acknowledgements += 1;
        let (now, keep) = (self.acknowledgements, self.keep);
        let upto = self.flushed_upto.min(keep);
        for sector in &mut self.sectors[change.sectors] {
            sector.forget_before(upto);
            let was = sector.last();
            sector.0.push(match change.effect {
                Effect::Data => State::known(now, generation),
                Effect::Zeroes => State::known(now, 0),
                Effect::Discard => State { acknowledged: now, or_zero: true, ..was },
            });
            if durable {
                sector.forget_before(now.min(keep));
            }
        }
    }

    /// A flush completed that was sent after `acknowledgements` changes had been acknowledged.
    pub fn flushed(&mut self, acknowledgements: u64) {
        self.flushed_upto = self.flushed_upto.max(acknowledgements);
    }

    /// A copy of the disk is asked for that shows it at some moment from now on.
    pub fn begin_copy(&mut self) {
        self.keep = self.acknowledgements;
    }

    /// That moment is over: what the copy may hold.
    pub fn copy(&mut self) -> Self {
        let keep = std::mem::replace(&mut self.keep, u64::MAX);
        Self { flushed_upto: keep, keep: u64::MAX, ..self.clone() }
    }

    /// What is wrong with what was found in the sector, if anything is.
    pub fn judge(&self, at: usize, found: &[u8]) -> Option<Wrong> {
        let mut sector = self.sectors[at].clone();
        sector.forget_before(self.flushed_upto);
        let change = self.in_flight.iter().find(|change| change.sectors.contains(&at));
        let wrong = found.chunks(UNIT).filter_map(|unit| self.judge_unit(at, &sector, change, unit)).max();
        let may_be_torn = change.is_some() || sector.0.iter().any(|state| state.mixed);
        wrong.or_else(|| (!may_be_torn && is_mixed(found)).then_some(Wrong::Torn))
    }

    fn judge_unit(&self, at: usize, sector: &Sector, change: Option<&Change>, found: &[u8]) -> Option<Wrong> {
        let generation = self.generation_of(at, found).filter(|&generation| generation <= self.generation);
        let Some(generation) = generation else { return Some(Wrong::Foreign) };
        let under_way = change.map(|change| match change.effect {
            Effect::Data => change.generation,
            Effect::Zeroes | Effect::Discard => 0,
        });
        let fine = under_way == Some(generation)
            || sector
                .0
                .iter()
                .any(|state| state.mixed || generation == state.value || generation == 0 && state.or_zero);
        (!fine).then_some(Wrong::FlushedLost)
    }

    /// Whether an acknowledged write is missing there that no flush has covered: allowed, but worth counting.
    pub fn is_behind(&self, at: usize, found: &[u8]) -> bool {
        let last = self.sectors[at].last();
        let busy = self.in_flight.iter().any(|change| change.sectors.contains(&at));
        !busy && !last.or_zero && !last.mixed && self.generation_of(at, &found[..UNIT]) != Some(last.value)
    }

    /// The generation of a unit that was found in a sector, 0 for zeroes; `None` if it does not belong there.
    fn generation_of(&self, at: usize, found: &[u8]) -> Option<u32> {
        if found.iter().all(|&byte| byte == 0) {
            return Some(0);
        }
        let generation = found.get(12..UNIT)?.try_into().map(u32::from_le_bytes).ok()?;
        (generation > 0 && found == unit(self.disk, at, generation)).then_some(generation)
    }

    /// A sentence about what was found, for people.
    pub fn describe(&self, at: usize, found: &[u8]) -> String {
        let last = self.sectors[at].last();
        let change = self.in_flight.iter().find(|change| change.sectors.contains(&at));
        let mut seen = Vec::new();
        for found in found.chunks(UNIT) {
            let what = match self.generation_of(at, found) {
                Some(generation) => format!("generation {generation}"),
                None => format!("bytes {found:02x?}"),
            };
            if seen.last() != Some(&what) {
                seen.push(what);
            }
        }
        let under_way = change.map_or(String::new(), |change| {
            format!(", {:?} of generation {} under way", change.effect, change.generation)
        });
        let or_zero = if last.or_zero { " or zeroes" } else { "" };
        let flushed = if last.acknowledged <= self.flushed_upto { "flushed" } else { "not flushed" };
        format!(
            "sector {at}: {} instead of generation {}{or_zero} ({flushed}){under_way}",
            seen.join(", "),
            last.value
        )
    }

    /// Takes what was found (and judged to be fine) as what the disk holds from now on; nothing is under way.
    pub fn settle(&mut self, found: &[u8]) {
        for (at, bytes) in found.chunks(BYTES).enumerate().take(self.sectors.len()) {
            let value = self.generation_of(at, &bytes[..UNIT]).unwrap_or(0);
            self.sectors[at] = Sector(vec![State { mixed: is_mixed(bytes), ..State::known(0, value) }]);
        }
        self.in_flight.clear();
    }
}

impl State {
    fn known(acknowledged: u64, value: u32) -> Self {
        Self { acknowledged, value, or_zero: false, mixed: false }
    }
}

impl Sector {
    fn last(&self) -> State {
        self.0.last().copied().unwrap_or(State::known(0, 0))
    }

    /// A flush has covered what was acknowledged up to `upto`: what was before that does not come back.
    fn forget_before(&mut self, upto: u64) {
        let covered = self.0.iter().rposition(|state| state.acknowledged <= upto);
        self.0.drain(..covered.unwrap_or(0));
    }
}

fn is_mixed(sector: &[u8]) -> bool {
    sector.chunks(UNIT).any(|unit| unit != &sector[..UNIT])
}

fn unit(disk: u64, sector: usize, generation: u32) -> [u8; UNIT] {
    let mut unit = [0; UNIT];
    unit[..8].copy_from_slice(&disk.to_le_bytes());
    unit[8..12].copy_from_slice(&u32::try_from(sector).unwrap_or(u32::MAX).to_le_bytes());
    unit[12..].copy_from_slice(&generation.to_le_bytes());
    unit
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sector(model: &Model, change: &Change) -> Vec<u8> {
        model.content(change)[..BYTES].to_vec()
    }

    #[test]
    fn what_may_be_found_depends_on_what_was_acknowledged_and_flushed() {
        let mut model = Model::new(7, 8);
        let old = model.begin(Effect::Data, 2..4);
        model.acknowledge(old.generation, false);
        model.flushed(model.acknowledgements());
        let new = model.begin(Effect::Data, 2..3);
        let (was, is) = (sector(&model, &old), sector(&model, &new));
        let half = [&was[..BYTES / 2], &is[BYTES / 2..]].concat();
        assert_eq!(model.judge(2, &was), None, "in flight: as if it never came");
        assert_eq!(model.judge(2, &is), None, "in flight: done");
        assert_eq!(model.judge(2, &half), None, "in flight: half done");
        assert_eq!(model.judge(2, &[0; BYTES]), Some(Wrong::FlushedLost));
        assert_eq!(model.judge(3, &was), Some(Wrong::Foreign), "sector 2's data in sector 3");
        model.acknowledge(new.generation, false);
        assert_eq!((model.judge(2, &was), model.is_behind(2, &was)), (None, true), "not flushed yet");
        assert_eq!(model.judge(2, &[0; BYTES]), Some(Wrong::FlushedLost));
        assert_eq!(model.judge(2, &half), Some(Wrong::Torn));
        model.flushed(model.acknowledgements());
        assert_eq!(model.judge(2, &was), Some(Wrong::FlushedLost));
        assert_eq!(model.judge(2, &is), None);
    }

    #[test]
    fn a_flush_covers_only_what_was_acknowledged_before_it_was_sent() {
        let mut model = Model::new(7, 8);
        let sent = model.acknowledgements();
        let change = model.begin(Effect::Data, 0..1);
        model.acknowledge(change.generation, false);
        model.flushed(sent);
        assert_eq!(model.judge(0, &[0; BYTES]), None);
        let change = model.begin(Effect::Data, 0..1);
        model.acknowledge(change.generation, true);
        assert_eq!(model.judge(0, &[0; BYTES]), Some(Wrong::FlushedLost), "FUA");
    }

    #[test]
    fn a_discard_may_do_nothing_and_zeroes_may_not() {
        let mut model = Model::new(7, 8);
        let data = model.begin(Effect::Data, 0..2);
        model.acknowledge(data.generation, false);
        let bytes = sector(&model, &data);
        let discard = model.begin(Effect::Discard, 0..1);
        model.acknowledge(discard.generation, false);
        assert_eq!((model.judge(0, &bytes), model.judge(0, &[0; BYTES])), (None, None));
        let half = [&bytes[..BYTES / 2], &[0; BYTES / 2]].concat();
        assert_eq!(model.judge(0, &half), Some(Wrong::Torn));
        let zeroes = model.begin(Effect::Zeroes, 0..1);
        model.acknowledge(zeroes.generation, true);
        assert_eq!(model.judge(0, &bytes), Some(Wrong::FlushedLost));
        assert_eq!(model.judge(0, &[0; BYTES]), None);
    }

    #[test]
    fn a_copy_is_of_a_moment_between_question_and_answer() {
        let mut model = Model::new(7, 1);
        let write = |model: &mut Model, durable| {
            let change = model.begin(Effect::Data, 0..1);
            model.acknowledge(change.generation, durable);
            sector(model, &change)
        };
        let mut all = vec![write(&mut model, false), write(&mut model, false)];
        model.begin_copy();
        all.extend([write(&mut model, true), write(&mut model, false)]);
        model.flushed(model.acknowledgements());
        let copy = model.copy();
        all.push(write(&mut model, false));
        let judged: Vec<_> = all.iter().map(|found| copy.judge(0, found)).collect();
        assert_eq!(judged, [Some(Wrong::FlushedLost), None, None, None, Some(Wrong::Foreign)]);
        assert_eq!(model.judge(0, &all[2]), Some(Wrong::FlushedLost), "the disk itself is on");
    }

    #[test]
    fn what_was_found_after_a_kill_is_known_from_then_on() {
        let mut model = Model::new(7, 2);
        let change = model.begin(Effect::Data, 0..2);
        let bytes = model.content(&change);
        let half = [&bytes[..BYTES / 2], &[0; BYTES / 2]].concat();
        let found = [&half[..], &bytes[BYTES..]].concat();
        assert_eq!((model.judge(0, &half), model.judge(1, &bytes[BYTES..])), (None, None));
        model.settle(&found);
        assert_eq!((model.judge(0, &half), model.judge(1, &bytes[BYTES..])), (None, None));
        assert_eq!(model.judge(1, &[0; BYTES]), Some(Wrong::FlushedLost));
    }
}

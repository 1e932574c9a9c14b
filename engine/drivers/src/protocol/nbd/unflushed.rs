//! What a server has acknowledged and perhaps not made durable, kept to be done once more should the server be lost.
//!
//! A server that is killed and started again, or whose machine loses its power, comes back without it. As many bytes
//! and requests are kept as [`MOST_BYTES`] and [`MOST_REQUESTS`] say, from one flush to the next. When it is more than
//! that, nothing is kept until the next flush, and a server that is lost meanwhile may have lost something for good.
//! Who will not have it done once more keeps no bytes, and learns only whether there is something that may be lost.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use underlay_sys::Iov;

use super::connection::Ask;

/// Most bytes of data kept.
const MOST_BYTES: usize = 64 << 20;
/// Most requests kept.
const MOST_REQUESTS: usize = 16 << 10;

#[derive(Debug)]
struct Kept {
    /// The request with a copy of its data; none if data is not kept, or there was no room for it.
    ask: Option<Ask>,
    /// Whether the server has acknowledged it.
    done: bool,
    /// It was made of a server that was lost, and has not been made again: if it is acknowledged, that was the lost
    /// one.
    is_late: bool,
}

#[derive(Debug)]
struct State {
    /// The number of the next request.
    next: u64,
    /// Begun and not known to be durable, in the order in which they were begun. Who writes to the same place twice,
    /// one after the other, gets them done again in this order.
    requests: BTreeMap<u64, Kept>,
    /// Of data in `requests`.
    bytes: usize,
    /// Whether there is room for what begins now.
    has_room: bool,
    /// Of the requests before this number, some are not here any more.
    dropped_before: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Unflushed {
    keeps_data: bool,
    state: Mutex<State>,
}

/// A request that is on its way. Dropped, nobody relies on it: it failed, or its user has gone.
#[derive(Debug)]
pub(super) struct Begun<'a> {
    all: &'a Unflushed,
    number: u64,
}

/// The moment when a flush begins: requests before this number were acknowledged then.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment(u64);

impl Unflushed {
    /// With the data of requests, or without.
    pub(super) fn new(keeps_data: bool) -> Self {
        let requests = BTreeMap::new();
        let state = State { next: 1, requests, bytes: 0, has_room: true, dropped_before: 0 };
        Self { keeps_data, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request that is about to be made.
    pub(super) fn begin(&self, ask: &Ask) -> Begun<'_> {
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        let more = if self.keeps_data { bytes(ask) } else { 0 };
        if state.bytes.saturating_add(more) > MOST_BYTES || state.requests.len() >= MOST_REQUESTS {
            state.drop_all();
        }
        let kept = (self.keeps_data && state.has_room).then(|| copy_of(ask));
        state.bytes += kept.as_ref().map_or(0, bytes);
        state.requests.insert(number, Kept { ask: kept, done: false, is_late: false });
        Begun { all: self, number }
    }

    /// A flush begins. What begins from now on is kept.
    pub(super) fn flush_begins(&self) -> Moment {
        let mut state = self.state();
        state.has_room = true;
        let pending = state.requests.iter().find(|(_, kept)| !kept.done);
        Moment(pending.map_or(state.next, |(number, _)| *number))
    }

    /// What was acknowledged at that moment is durable.
    pub(super) fn flushed(&self, since: Moment) {
        let mut state = self.state();
        let later = state.requests.split_off(&since.0);
        state.bytes = later.values().filter_map(|kept| kept.ask.as_ref()).map(bytes).sum();
        state.requests = later;
        if state.dropped_before <= since.0 {
            state.dropped_before = 0;
        }
    }

    /// All that is to be done again, in order, with their numbers. None if something is missing.
    pub(super) fn again(&self) -> Option<Vec<(u64, Ask)>> {
        let state = self.state();
        let asks = || state.requests.iter().map(|(number, kept)| Some((*number, same(kept.ask.as_ref()?))));
        if state.dropped_before == 0 { asks().collect() } else { None }
    }

    /// The server that was found refuses this one. Whether it was acknowledged, so that it is lost now; if not, it is
    /// not acknowledged any more by what the other server has said.
    pub(super) fn refused(&self, number: u64) -> bool {
        match self.state().requests.get_mut(&number) {
            Some(kept) => {
                kept.is_late = true;
                kept.done
            }
            None => false,
        }
    }

    /// The server was lost with all that it had acknowledged; whether that was anything.
    pub(super) fn lost(&self) -> bool {
        let mut state = self.state();
        let anything = state.dropped_before > 0 || state.requests.values().any(|kept| kept.done);
        state.drop_all();
        (state.has_room, state.dropped_before) = (true, 0);
        state.requests.values_mut().for_each(|kept| kept.is_late = true);
        anything
    }
}

impl State {
    /// Drops what the server has acknowledged, and the data of what is on its way.
    fn drop_all(&mut self) {
        self.requests.retain(|_, kept| !kept.done);
        self.requests.values_mut().for_each(|kept| kept.ask = None);
        (self.bytes, self.has_room, self.dropped_before) = (0, false, self.next);
    }
}

impl Begun<'_> {
    /// It is made now, on a connection that is there. May be called again, when that was lost.
    pub(super) fn made(&self) {
        if let Some(kept) = self.all.state().requests.get_mut(&self.number) {
            kept.is_late = false;
        }
    }

    /// The server has acknowledged it. False: that was one that has been lost since.
    pub(super) fn done(self) -> bool {
        match self.all.state().requests.get_mut(&self.number) {
            Some(kept) if !kept.is_late => {
                kept.done = true;
                true
            }
            _ => false,
        }
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        let mut state = self.all.state();
        if state.requests.get(&self.number).is_some_and(|kept| !kept.done)
            && let Some(kept) = state.requests.remove(&self.number)
        {
            state.bytes -= kept.ask.as_ref().map_or(0, bytes);
        }
    }
}

fn bytes(ask: &Ask) -> usize {
    ask.payload.as_ref().map_or(0, Iov::len)
}

/// The same request with the same data.
fn same(ask: &Ask) -> Ask {
    Ask { payload: ask.payload.clone(), into: None, ..*ask }
}

/// The same request with data of its own: its user's buffer may change as soon as it is acknowledged.
fn copy_of(ask: &Ask) -> Ask {
    let payload = ask.payload.as_ref().map(|from| {
        let copy = Iov::scratch(from.len());
        copy.copy_from(from);
        copy
    });
    Ask { payload, into: None, ..*ask }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(offset: u64, len: usize) -> Ask {
        Ask { offset, length: len as u64, payload: Some(Iov::filled(len, 1)), ..Ask::default() }
    }

    fn again(all: &Unflushed) -> Option<Vec<u64>> {
        Some(all.again()?.into_iter().map(|(_, ask)| ask.offset).collect())
    }

    #[test]
    fn what_was_acknowledged_before_a_flush_is_durable_after_it() {
        let all = Unflushed::new(true);
        let (first, second) = (all.begin(&write(1, 8)), all.begin(&write(2, 8)));
        first.done();
        let flush = all.flush_begins();
        second.done();
        all.begin(&write(3, 8)).done();
        assert_eq!(again(&all), Some(vec![1, 2, 3]));
        all.flushed(flush);
        assert_eq!(again(&all), Some(vec![2, 3]));
        // A flush that failed says nothing.
        let _ = all.flush_begins();
        assert_eq!(again(&all), Some(vec![2, 3]));
        all.flushed(all.flush_begins());
        assert_eq!(again(&all), Some(vec![]));
        assert_eq!(all.state().bytes, 0);
    }

    #[test]
    fn what_failed_is_not_done_again() {
        let all = Unflushed::new(true);
        drop(all.begin(&write(1, 8)));
        all.begin(&write(2, 8)).done();
        assert_eq!(again(&all), Some(vec![2]));
        assert_eq!(all.state().bytes, 8);
    }

    #[test]
    fn too_much_is_forgotten_until_the_next_flush() {
        let all = Unflushed::new(true);
        let half = MOST_BYTES / 2 + 1;
        let slow = all.begin(&write(1, 8));
        all.begin(&write(2, half)).done();
        assert_eq!(again(&all).map(|all| all.len()), Some(2));
        all.begin(&write(3, half)).done();
        assert_eq!(again(&all), None);
        assert_eq!(all.state().bytes, 0, "nothing is kept that cannot help");
        // The slow one was not acknowledged, so this flush is not for it, nor for what came after it.
        let flush = all.flush_begins();
        all.begin(&write(4, 8)).done();
        all.flushed(flush);
        assert_eq!(again(&all), None);
        slow.done();
        all.flushed(all.flush_begins());
        all.begin(&write(5, 8)).done();
        assert_eq!(again(&all), Some(vec![5]));
    }

    #[test]
    fn who_knows_of_a_loss_begins_anew() {
        let all = Unflushed::new(true);
        for at in 0..=MOST_REQUESTS as u64 {
            all.begin(&write(at, 1)).done();
        }
        assert_eq!(again(&all), None);
        assert!(all.lost());
        all.begin(&write(7, 8)).done();
        assert_eq!(again(&all), Some(vec![7]));
    }

    #[test]
    fn without_data_only_what_was_acknowledged_counts() {
        let all = Unflushed::new(false);
        drop(all.begin(&write(1, 8)));
        assert_eq!(again(&all), Some(vec![]));
        let (late, repeated) = (all.begin(&write(2, 8)), all.begin(&write(3, 8)));
        assert!(!all.lost(), "nothing was acknowledged yet");
        repeated.made();
        assert!(repeated.done());
        assert!(!late.done(), "by the server that is gone");
        assert_eq!(again(&all), None);
        assert!(all.lost());
        assert!(!all.lost());
        assert_eq!(all.state().bytes, 0);
    }

    #[test]
    fn what_is_refused_is_not_acknowledged_by_the_other_server() {
        let all = Unflushed::new(true);
        let (told, asks_again) = (all.begin(&write(1, 8)), all.begin(&write(2, 8)));
        all.begin(&write(3, 8)).done();
        let numbers: Vec<u64> = all.again().unwrap().iter().map(|(number, _)| *number).collect();
        let refused: Vec<bool> = numbers.iter().map(|number| all.refused(*number)).collect();
        assert_eq!(refused, [false, false, true]);
        asks_again.made();
        assert!(asks_again.done());
        assert!(!told.done(), "by the server that is gone");
    }

    #[test]
    fn the_data_is_what_it_was() {
        let all = Unflushed::new(true);
        let ask = write(0, 8);
        all.begin(&ask).done();
        ask.payload.unwrap().fill(2);
        assert_eq!(all.again().unwrap()[0].1.payload.as_ref().unwrap().to_vec(), [1; 8]);
    }
}

//! What ties a file of bitmaps to the disk beside it, and when that holds.
//!
//! The bitmaps say what was written by whoever has kept them. So they are good only if nobody else has written to the
//! disk since. What is known of that:
//!
//! * **Closed.** All was written, and how the file of the disk was then (its number, length and times) was noted. It is
//!   tied as long as all of that is still so.
//! * **Open.** Whoever keeps the bitmaps is at work, or has died. If he has died alone, a witness has noted how the
//!   file was then ([`underlay_sys::witness`]), or after his last write if none was under way: as above. Without a
//!   witness, he has died together with the kernel, or with his witness. The former is believed if another kernel runs
//!   now, nobody has written since that was started, and nobody before later than was announced ([`Stamp::until`]),
//!   which is seconds at most.
//!
//! Two sectors are kept, each with a hash of itself, so that half of one is none: the stamp, and behind it what the
//! witness notes.

use underlay_sys::stat::{Boot, Stat};
use underlay_sys::witness::{PAGE, WORDS};

const STAMP: &[u8; 8] = b"UnderTie";
const NOTE: &[u8; 8] = b"UnderEnd";
const VERSION: u64 = 1;
/// Where the hash of a sector is.
const HASH: usize = PAGE - 8;

/// The file of a disk at some moment. Times are in nanoseconds since the beginning of 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// Which file it is.
    pub inode: u64,
    /// Bytes.
    pub len: u64,
    /// When it was last written to.
    pub modified: i64,
    /// When anything about it last changed.
    pub changed: i64,
}

impl Mark {
    /// Of no file: never so.
    pub const NONE: Self = Self { inode: 0, len: 0, modified: i64::MAX, changed: i64::MAX };

    /// What the file system tells.
    pub fn of(stat: &Stat) -> Self {
        Self { inode: stat.inode, len: stat.len, modified: stat.modified, changed: stat.changed }
    }

    /// Its last time of any kind.
    pub fn last(&self) -> i64 {
        self.modified.max(self.changed)
    }

    fn words(&self) -> [u64; 4] {
        [self.inode, self.len, self.modified.cast_unsigned(), self.changed.cast_unsigned()]
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        let [inode, len, modified, changed] = words.try_into().ok()?;
        Some(Self { inode, len, modified: modified.cast_signed(), changed: changed.cast_signed() })
    }
}

/// What whoever keeps the bitmaps says of himself and the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// He may write.
    pub open: bool,
    /// His number; later ones are larger.
    pub session: u64,
    /// The disk when he began, or when he had ended.
    pub mark: Mark,
    /// The run of the kernel in which he began.
    pub boot: u128,
    /// He will not write later than that without saying so first: nanoseconds since the beginning of 1970.
    pub until: i64,
}

fn sector(magic: &[u8; 8], words: &[u64]) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    bytes[..8].copy_from_slice(magic);
    for (slot, word) in bytes[8..HASH].chunks_exact_mut(8).zip(words) {
        slot.copy_from_slice(&word.to_be_bytes());
    }
    let sum = underlay_qcow2::hash(&bytes[..HASH]);
    bytes[HASH..].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// The words of a sector that is whole.
fn words<const N: usize>(magic: &[u8; 8], bytes: &[u8]) -> Option<[u64; N]> {
    let bytes: &[u8; PAGE] = bytes.try_into().ok()?;
    let word = |at: usize| bytes[at..at + 8].iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
    let whole = bytes.starts_with(magic) && word(HASH) == underlay_qcow2::hash(&bytes[..HASH]);
    whole.then(|| std::array::from_fn(|n| word(8 + n * 8)))
}

impl Stamp {
    /// As a sector.
    pub fn to_bytes(&self) -> [u8; PAGE] {
        let boot = [self.boot >> 64, self.boot & u128::from(u64::MAX)];
        let [high, low] = boot.map(|half| u64::try_from(half).unwrap_or(0));
        let [inode, len, modified, changed] = self.mark.words();
        let until = self.until.cast_unsigned();
        let open = u64::from(self.open);
        sector(STAMP, &[VERSION, open, self.session, high, low, until, inode, len, modified, changed])
    }

    /// From a sector, if it is one.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let words: [u64; 10] = words(STAMP, bytes)?;
        let [VERSION, open @ (0 | 1), session, high, low, until, ..] = words else { return None };
        Some(Self {
            open: open == 1,
            session,
            mark: Mark::from_words(&words[6..])?,
            boot: u128::from(high) << 64 | u128::from(low),
            until: until.cast_signed(),
        })
    }

    /// Whether nobody else has written to the disk, as far as can be told from how it is `now` and what a witness has
    /// noted.
    pub fn holds(&self, note: Option<&Note>, now: &Mark, boot: &Boot) -> bool {
        if self.mark == *now {
            return true;
        }
        if !self.open {
            return false;
        }
        if let Some(note) = note.filter(|note| note.session == self.session) {
            return note.mark == *now;
        }
        let is_same_file = now.inode == self.mark.inode && now.len == self.mark.len;
        is_same_file && boot.id != self.boot && now.last() <= self.until && now.last() < boot.began
    }

    /// Whether its witness may still have something to say.
    pub fn awaits_witness(&self, note: Option<&Note>, boot: &Boot) -> bool {
        self.open && self.boot == boot.id && note.is_none_or(|note| note.session != self.session)
    }
}

/// What a witness notes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note {
    /// Whose witness.
    pub session: u64,
    /// The disk after his last write.
    pub mark: Mark,
}

impl Note {
    /// As a sector.
    pub fn to_bytes(&self) -> [u8; PAGE] {
        let [inode, len, modified, changed] = self.mark.words();
        sector(NOTE, &[VERSION, self.session, inode, len, modified, changed])
    }

    /// From a sector, if it is one.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let words: [u64; 6] = words(NOTE, bytes)?;
        let [VERSION, session, ..] = words else { return None };
        Some(Self { session, mark: Mark::from_words(&words[2..])? })
    }
}

/// A write that has not shown in the times of the file so many nanoseconds after it began is somebody else's.
const SLOW: i64 = 50_000_000;

/// What whoever keeps the bitmaps tells his witness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// Writes under way.
    pub writing: u64,
    /// When the last of them began, in nanoseconds since the beginning of 1970.
    pub began: i64,
    /// The disk when there were none.
    pub still: Mark,
}

impl Told {
    /// As words.
    pub fn to_words(self) -> [u64; WORDS] {
        let [inode, len, modified, changed] = self.still.words();
        [self.writing, self.began.cast_unsigned(), inode, len, modified, changed, 0]
    }

    /// What a witness notes when he sees the disk as `now`.
    fn noted(words: &[u64; WORDS], now: Mark) -> Mark {
        let [writing, began, ..] = *words;
        match writing {
            // Exactly, however late he came.
            0 => Mark::from_words(&words[2..6]).unwrap_or(Mark::NONE),
            _ if now.last() <= began.cast_signed().saturating_add(SLOW) => now,
            _ => Mark::NONE,
        }
    }
}

/// What a witness writes down; for [`underlay_sys::witness::be_one_if_asked`].
pub fn testimony(session: u64, words: &[u64; WORDS], stat: &Stat) -> [u8; PAGE] {
    Note { session, mark: Told::noted(words, Mark::of(stat)) }.to_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: Mark = Mark { inode: 7, len: 4096, modified: 1000, changed: 1000 };
    const STAMP: Stamp = Stamp { open: true, session: 5, mark: BEFORE, boot: 1, until: 3000 };
    const SAME: Boot = Boot { id: 1, began: 500 };
    const NEXT: Boot = Boot { id: 2, began: 2500 };

    fn at(time: i64) -> Mark {
        Mark { modified: time, changed: time, ..BEFORE }
    }

    #[test]
    fn sectors_come_back_whole_or_not_at_all() {
        let note = Note { session: 5, mark: at(-3) };
        for open in [false, true] {
            let stamp = Stamp { open, boot: u128::MAX - 5, ..STAMP };
            assert_eq!(Stamp::parse(&stamp.to_bytes()), Some(stamp));
        }
        assert_eq!(Note::parse(&note.to_bytes()), Some(note));
        assert!(Note::parse(&STAMP.to_bytes()).is_none() && Stamp::parse(&note.to_bytes()).is_none());
        for at in 0..PAGE {
            let mut bytes = STAMP.to_bytes();
            bytes[at] ^= 0x10;
            assert_eq!(Stamp::parse(&bytes), None, "{at}");
        }
        assert!(Stamp::parse(&[0; PAGE]).is_none() && Stamp::parse(&[]).is_none());
    }

    #[test]
    fn a_closed_disk_must_be_as_it_was() {
        let closed = Stamp { open: false, ..STAMP };
        let note = Note { session: 5, mark: at(1500) };
        for boot in [SAME, NEXT] {
            assert!(closed.holds(None, &BEFORE, &boot));
            for other in [
                at(1001),
                Mark { inode: 8, ..BEFORE },
                Mark { len: 4097, ..BEFORE },
                Mark { changed: 1001, ..BEFORE },
            ] {
                assert!(!closed.holds(None, &other, &boot));
            }
            assert!(!closed.holds(Some(&note), &at(1500), &boot));
        }
    }

    #[test]
    fn one_who_died_is_believed_if_there_is_a_witness() {
        let note = |session| Note { session, mark: at(1500) };
        for boot in [SAME, NEXT] {
            assert!(STAMP.holds(Some(&note(5)), &at(1500), &boot));
            assert!(!STAMP.holds(Some(&note(5)), &at(1501), &boot));
            assert!(!STAMP.awaits_witness(Some(&note(5)), &boot));
        }
        // Nobody has written, whatever became of the witness.
        assert!(STAMP.holds(None, &BEFORE, &SAME));
        // Killed together with his witness, or the witness of another.
        assert!(!STAMP.holds(None, &at(1500), &SAME) && !STAMP.holds(Some(&note(4)), &at(1500), &SAME));
        assert!(STAMP.awaits_witness(Some(&note(4)), &SAME) && !STAMP.awaits_witness(None, &NEXT));
    }

    #[test]
    fn a_witness_who_comes_late_is_not_deceived() {
        let told = |writing| Told { writing, began: 2000, still: at(1500) }.to_words();
        // Somebody else has written before he came.
        assert_eq!(Told::noted(&told(0), at(1600)), at(1500));
        assert_eq!(Told::noted(&told(0), at(1500)), at(1500));
        // One of the two has.
        assert_eq!(Told::noted(&told(2), at(2000 + SLOW)), at(2000 + SLOW));
        assert_eq!(Told::noted(&told(2), at(2001 + SLOW)), Mark::NONE);
    }

    #[test]
    fn the_kernel_has_died_with_him() {
        assert!(STAMP.holds(None, &at(2499), &NEXT));
        // Somebody has written since it was started again, or before, but later than was announced.
        assert!(!STAMP.holds(None, &at(2500), &NEXT));
        assert!(!STAMP.holds(None, &at(3001), &Boot { began: 9000, ..NEXT }));
        assert!(!STAMP.holds(None, &Mark { changed: 2600, ..at(2400) }, &NEXT));
        // Another file, or another length.
        assert!(!STAMP.holds(None, &Mark { inode: 8, ..at(2400) }, &NEXT));
        assert!(!STAMP.holds(None, &Mark { len: 8192, ..at(2400) }, &NEXT));
    }
}

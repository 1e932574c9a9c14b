//! QEMU's image locks: which permissions an open image is used with, told to other processes by byte-range locks.
//!
//! Byte 100 + n of the file is locked (shared) for every permission n that is required here, byte 200 + n for every
//! one that is not shared with others. Whoever wants a permission looks whether somebody holds its byte of the other
//! range. Source: `design/qemu-surface.md` 4.2.

use underlay_graph::{Access, IoError, Perms, Result};
use underlay_sys::file::File;

const REQUIRED: u64 = 100;
const UNSHARED: u64 = 200;

/// What an open file has locked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    required: Perms,
    unshared: Perms,
}

impl Held {
    /// What `access` asks for; a node that shares by force asks for nothing of others.
    pub fn wanted(access: Access, force_share: bool) -> Self {
        let unshared = if force_share { Perms::NONE } else { Perms::ALL.without(access.shared) };
        let required = if force_share { Perms::NONE } else { access.required };
        Self { required, unshared }
    }
}

/// Locks what is wanted and not held yet, then looks for others who object. On failure `held` is as it was.
pub fn gain(file: &File, name: &str, held: &mut Held, wanted: Held) -> Result<()> {
    let before = *held;
    let all = Held { required: held.required | wanted.required, unshared: held.unshared | wanted.unshared };
    let gained = take(file, before, all).and_then(|()| nobody_objects(file, name, before, all));
    if gained.is_err() {
        release(file, all, before);
        return gained;
    }
    *held = all;
    Ok(())
}

/// Gives back what is held and not wanted any more.
pub fn give_up(file: &File, held: &mut Held, wanted: Held) {
    let keep = Held { required: held.required & wanted.required, unshared: held.unshared & wanted.unshared };
    release(file, *held, keep);
    *held = keep;
}

fn bytes(held: Held) -> impl Iterator<Item = u64> {
    let numbered = (0..).zip(Perms::NAMES);
    numbered.flat_map(move |(n, (perm, _))| {
        let required = held.required.has(perm).then_some(REQUIRED + n);
        required.into_iter().chain(held.unshared.has(perm).then_some(UNSHARED + n))
    })
}

fn take(file: &File, before: Held, all: Held) -> Result<()> {
    let have: Vec<_> = bytes(before).collect();
    for byte in bytes(all).filter(|byte| !have.contains(byte)) {
        file.lock_shared(byte)
            .map_err(|error| IoError::from(error).with(format!("Failed to lock byte {byte}")))?;
    }
    Ok(())
}

fn release(file: &File, all: Held, keep: Held) {
    let kept: Vec<_> = bytes(keep).collect();
    for byte in bytes(all).filter(|byte| !kept.contains(byte)) {
        // Unlocking what we hold cannot fail; and closing the file would release it all the same.
        let _ = file.unlock(byte);
    }
}

fn nobody_objects(file: &File, name: &str, before: Held, all: Held) -> Result<()> {
    let hint = || format!("Is another process using the image [{name}]?");
    for (n, (perm, label)) in (0..).zip(Perms::NAMES) {
        if all.required.has(perm) && !before.required.has(perm) && file.is_locked_by_others(UNSHARED + n)? {
            let text = format!("Failed to get \"{label}\" lock");
            return Err(IoError::new(11).with_hint(text, hint()));
        }
        if all.unshared.has(perm) && !before.unshared.has(perm) && file.is_locked_by_others(REQUIRED + n)? {
            let text = format!("Failed to get shared \"{label}\" lock");
            return Err(IoError::new(11).with_hint(text, hint()));
        }
    }
    Ok(())
}

/// Takes on a second open file of the same image all locks that the first one has. Both are ours, so nobody is
/// asked.
pub fn carry_over(file: &File, held: &mut Held, from: Held) -> Result<()> {
    take(file, *held, from)?;
    *held = from;
    Ok(())
}

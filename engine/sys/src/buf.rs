//! Data buffers as leases.
//!
//! An [`Iov`] is a counted handle on memory: the kernel, a request and a reply may all hold the same bytes, and
//! none of them can free the memory under the others. No reference into that memory is ever given out: bytes
//! are copied in and out, and the kernel reads and writes through raw pointers. Whoever lends a buffer to a
//! read must not look at it before the read is done; doing so gives stale or mixed bytes, never undefined
//! behaviour of the program around it (the copies below are plain `memcpy`s of initialised memory).

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use smallvec::SmallVec;

/// Alignment of every allocation, in bytes: enough for `O_DIRECT` on every device that we have met.
pub const ALIGNMENT: usize = 4096;

/// One allocation, zeroed at birth, given up with its last lease.
struct Memory {
    at: NonNull<u8>,
    /// Its real size: a size class of the pool, or any larger number.
    size: usize,
}

// SAFETY: `Memory` owns its allocation; it is only reached through raw copies that never make references.
unsafe impl Send for Memory {}
// SAFETY: as above; concurrent copies are the caller's ordering problem (module doc), not aliasing of references.
unsafe impl Sync for Memory {}

impl Memory {
    /// Memory of at least `len` bytes, the first `len` of them zero.
    fn zeroed(len: usize) -> Self {
        let size = pool::size_for(len);
        if let Some(at) = pool::take(size) {
            // SAFETY: an allocation of `size >= len` bytes that nobody else has.
            unsafe { std::ptr::write_bytes(at.as_ptr(), 0, len) };
            return Self { at, size };
        }
        Self::fresh(size)
    }

    fn fresh(size: usize) -> Self {
        let layout = Self::layout(size);
        let at = match size > pool::LARGEST {
            true => map(size),
            // SAFETY: `layout` has a size of at least one byte.
            false => NonNull::new(unsafe { alloc_zeroed(layout) }),
        };
        let Some(at) = at else { handle_alloc_error(layout) };
        Self { at, size }
    }

    /// Memory of at least `len` bytes, perhaps used before, so that their content is anything.
    fn scratch(len: usize) -> Self {
        let size = pool::size_for(len);
        match pool::take(size) {
            Some(at) => Self { at, size },
            None => Self::fresh(size),
        }
    }

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size.max(1), ALIGNMENT).expect("a buffer length fits isize")
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.size > pool::LARGEST {
            // SAFETY: mapped in `fresh` with this very size, and nobody holds a lease any more.
            unsafe { libc::munmap(self.at.as_ptr().cast(), self.size) };
        } else if !pool::keep(self.at, self.size) {
            // SAFETY: allocated in `fresh` with this very layout, and nobody holds a lease any more.
            unsafe { dealloc(self.at.as_ptr(), Self::layout(self.size)) }
        }
    }
}

/// Zeroed memory of which the kernel gives each page when it is first written to: a client that announces much and
/// sends little costs little. (The allocator would write zeroes to all of it.)
fn map(size: usize) -> Option<NonNull<u8>> {
    let (rights, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, where there is none.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), size, rights, flags, -1, 0) };
    NonNull::new(at.cast()).filter(|_| at != libc::MAP_FAILED)
}

/// Memory that was used and will be again: each thread keeps some, by size, so that a request costs neither an
/// allocation nor the zeroing of one.
mod pool {
    use std::alloc::dealloc;
    use std::cell::RefCell;
    use std::ptr::NonNull;

    use super::{ALIGNMENT, Memory};

    /// Largest size that is kept, in bytes.
    pub(super) const LARGEST: usize = 2 << 20;
    /// Powers of two from [`ALIGNMENT`] to [`LARGEST`].
    const CLASSES: usize = 10;
    const _: () = assert!(ALIGNMENT << (CLASSES - 1) == LARGEST);
    /// Bytes that a thread keeps at most.
    const BUDGET: usize = 8 << 20;

    struct Kept {
        free: [Vec<NonNull<u8>>; CLASSES],
        bytes: usize,
    }

    impl Drop for Kept {
        fn drop(&mut self) {
            for (class, list) in self.free.iter().enumerate() {
                for at in list {
                    // SAFETY: kept in `keep` from a `Memory` of this very size, and nobody has it any more.
                    unsafe { dealloc(at.as_ptr(), Memory::layout(ALIGNMENT << class)) }
                }
            }
        }
    }

    thread_local! {
        static KEPT: RefCell<Kept> =
            const { RefCell::new(Kept { free: [const { Vec::new() }; CLASSES], bytes: 0 }) };
    }

    /// What to allocate for `len` bytes.
    pub(super) fn size_for(len: usize) -> usize {
        if len > LARGEST { len } else { len.max(ALIGNMENT).next_power_of_two() }
    }

    fn class(size: usize) -> Option<usize> {
        let class = (size / ALIGNMENT).checked_ilog2()? as usize;
        (ALIGNMENT.checked_shl(u32::try_from(class).ok()?)? == size && class < CLASSES).then_some(class)
    }

    pub(super) fn take(size: usize) -> Option<NonNull<u8>> {
        let class = class(size)?;
        let take = |kept: &RefCell<Kept>| {
            let mut kept = kept.borrow_mut();
            let at = kept.free[class].pop()?;
            kept.bytes -= size;
            Some(at)
        };
        KEPT.try_with(take).ok().flatten()
    }

    /// Takes the memory over; `false` when there is enough already, or the thread is about to end.
    pub(super) fn keep(at: NonNull<u8>, size: usize) -> bool {
        let Some(class) = class(size) else { return false };
        let keep = |kept: &RefCell<Kept>| {
            let mut kept = kept.borrow_mut();
            let fits = kept.bytes + size <= BUDGET;
            if fits {
                kept.bytes += size;
                kept.free[class].push(at);
            }
            fits
        };
        KEPT.try_with(keep).unwrap_or(false)
    }
}

#[derive(Clone)]
struct Segment {
    memory: Arc<Memory>,
    start: usize,
    len: usize,
}

impl Segment {
    fn ptr(&self) -> *mut u8 {
        // SAFETY: `start` is inside (or one past) the allocation, by construction in `Iov`.
        unsafe { self.memory.at.as_ptr().add(self.start) }
    }
}

/// A lease on a run of bytes, perhaps in several pieces. Cloning and slicing share the memory.
#[derive(Clone, Default)]
pub struct Iov {
    segments: SmallVec<[Segment; 1]>,
    len: usize,
}

impl fmt::Debug for Iov {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Iov({} bytes in {} pieces)", self.len, self.segments.len())
    }
}

impl Iov {
    /// New zeroed memory of `len` bytes, aligned to [`ALIGNMENT`].
    pub fn zeroed(len: usize) -> Self {
        Self::of(Memory::zeroed(len), len)
    }

    fn of(memory: Memory, len: usize) -> Self {
        let mut segments = SmallVec::new();
        segments.push(Segment { memory: Arc::new(memory), start: 0, len });
        Self { segments, len }
    }

    /// New memory for a reader to fill; its first content is unspecified (but initialised) bytes.
    pub fn scratch(len: usize) -> Self {
        Self::of(Memory::scratch(len), len)
    }

    /// New memory with a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let iov = Self::scratch(bytes.len());
        iov.write_at(0, bytes);
        iov
    }

    /// New memory of `len` bytes, each of them `byte`.
    pub fn filled(len: usize, byte: u8) -> Self {
        let iov = Self::scratch(len);
        iov.fill(byte);
        iov
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is not a single byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A lease on `len` bytes from `start`. Panics when they are not all there, which is a bug of the caller.
    pub fn slice(&self, start: usize, len: usize) -> Self {
        let end = start.checked_add(len).expect("no overflow");
        assert!(end <= self.len, "slice {start}+{len} of {} bytes", self.len);
        let mut segments = SmallVec::new();
        self.each(start, len, |segment| segments.push(segment));
        Self { segments, len }
    }

    /// Adds the pieces of `more` at the end.
    pub fn append(&mut self, more: Self) {
        self.len += more.len;
        self.segments.extend(more.segments);
    }

    /// Copies `bytes` in, from offset `at` on.
    pub fn write_at(&self, at: usize, bytes: &[u8]) {
        let mut rest = bytes;
        self.each(at, bytes.len(), |piece| {
            let (now, later) = rest.split_at(piece.len);
            // SAFETY: `piece` lies inside its allocation; `now` is a distinct borrowed slice of the same length.
            unsafe { std::ptr::copy(now.as_ptr(), piece.ptr(), now.len()) };
            rest = later;
        });
    }

    /// Copies `into.len()` bytes out, from offset `at` on.
    pub fn read_at(&self, at: usize, into: &mut [u8]) {
        let mut done = 0;
        self.each(at, into.len(), |piece| {
            // SAFETY: `piece` lies inside its allocation; the target slice has room for it from `done` on.
            unsafe { std::ptr::copy(piece.ptr(), into[done..].as_mut_ptr(), piece.len) };
            done += piece.len;
        });
    }

    /// Copies all bytes of `from` over the first bytes of this one.
    pub fn copy_from(&self, from: &Iov) {
        let mut at = 0;
        from.each(0, from.len, |source| {
            let mut taken = 0;
            self.each(at, source.len, |target| {
                // SAFETY: both lie inside their allocations; `copy` allows them to overlap.
                unsafe { std::ptr::copy(source.ptr().add(taken), target.ptr(), target.len) };
                taken += target.len;
            });
            at += source.len;
        });
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        for piece in &self.segments {
            // SAFETY: `piece` lies inside its allocation.
            unsafe { std::ptr::write_bytes(piece.ptr(), byte, piece.len) };
        }
    }

    /// A copy of everything.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.read_at(0, &mut bytes);
        bytes
    }

    /// Whether every byte is zero.
    pub fn is_zero(&self) -> bool {
        self.segments.iter().all(|piece| {
            // SAFETY: initialised memory inside its allocation, borrowed for this expression only; nobody
            // writes to it meanwhile, as a writer's lease is not for looking at (module doc).
            let bytes = unsafe { std::slice::from_raw_parts(piece.ptr(), piece.len) };
            is_zero(bytes)
        })
    }

    /// Address and length of each piece, for system calls in this crate.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = (*mut u8, usize)> {
        self.segments.iter().map(|piece| (piece.ptr(), piece.len))
    }

    fn each(&self, start: usize, len: usize, mut f: impl FnMut(Segment)) {
        let (mut skip, mut left) = (start, len);
        for segment in &self.segments {
            if left == 0 {
                return;
            }
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let take = left.min(segment.len - skip);
            f(Segment { memory: segment.memory.clone(), start: segment.start + skip, len: take });
            (skip, left) = (0, left - take);
        }
        assert!(left == 0, "{len} bytes at {start} of {} bytes", self.len);
    }
}

/// Whether every byte of `bytes` is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (head, chunks) = bytes.split_at(bytes.len() % 64);
    head.iter().all(|&b| b == 0)
        && chunks.chunks_exact(64).all(|chunk| chunk.iter().fold(0, |all, &b| all | b) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_share_memory_across_pieces() {
        let mut iov = Iov::copy_of(b"abc");
        iov.append(Iov::copy_of(b"defgh"));
        let middle = iov.slice(2, 4);
        assert_eq!(middle.to_vec(), b"cdef");
        middle.write_at(0, b"CDEF");
        assert_eq!(iov.to_vec(), b"abCDEFgh");
        let other = Iov::zeroed(8);
        assert!(other.is_zero());
        other.copy_from(&iov);
        assert_eq!(other.to_vec(), b"abCDEFgh");
        assert!(!other.is_zero());
    }

    #[test]
    fn memory_is_used_again_but_zeroed_memory_is_zero() {
        let first = |iov: &Iov| iov.pieces().next().map(|(at, _)| at);
        let used = Iov::filled(5000, 7);
        let at = first(&used);
        drop(used);
        let again = Iov::scratch(8192);
        assert_eq!(first(&again), at);
        assert_eq!(again.slice(0, 5000).to_vec(), [7; 5000]);
        drop(again);
        let zeroed = Iov::zeroed(8000);
        assert!(zeroed.is_zero());
        assert_eq!(first(&zeroed), at);
        let other = std::thread::spawn(|| Iov::scratch(1 << 20)).join().expect("no panic");
        drop(other);
        for len in [0, 1, 4095, 4097, 2 << 20, (2 << 20) + 1, 5 << 20] {
            let many: Vec<_> = (0..20).map(|_| Iov::scratch(len)).collect();
            assert!(many.iter().all(|iov| iov.len() == len));
        }
    }

    #[test]
    #[should_panic(expected = "slice")]
    fn a_slice_outside_is_refused() {
        let _ = Iov::zeroed(4).slice(2, 3);
    }
}

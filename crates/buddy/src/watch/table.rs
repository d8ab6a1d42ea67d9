//! The table's memory, and which entry a frame has.

use core::ptr::NonNull;

use kmem_hal::sync::AtomicPtr;

/// Entries start on lines of their own.
pub(super) const LINE: u64 = 64;

/// Bytes that `count` values of `T` take.
pub(super) const fn room<T>(count: usize) -> u64 {
    (size_of::<T>() as u64 * count as u64).next_multiple_of(LINE)
}

/// Memory that is handed out in parts, once.
#[derive(Debug)]
pub struct Carving {
    next: NonNull<u8>,
    left: u64,
}

impl Carving {
    /// Takes over `left` bytes.
    ///
    /// # Safety
    ///
    /// They are aligned to [`LINE`], valid for ever, and nobody else's.
    pub(super) unsafe fn new(next: NonNull<u8>, left: u64) -> Self {
        Self { next, left }
    }

    /// `count` values made by `make`; none where they do not fit, which the plan rules out.
    pub(super) fn slice<T: 'static>(
        &mut self,
        count: usize,
        mut make: impl FnMut(usize) -> T,
    ) -> &'static [T] {
        const { assert!(align_of::<T>() <= LINE as usize) };
        let bytes = room::<T>(count);
        if bytes == 0 || bytes > self.left {
            debug_assert!(bytes == 0, "the plan and the build disagree");
            return &[];
        }
        let first = self.next.cast::<T>();
        for at in 0..count {
            // SAFETY: `bytes` bytes from `next` are this value's, and aligned (contract of `new`; parts are whole lines).
            unsafe { first.add(at).write(make(at)) };
        }
        // SAFETY: as above.
        self.next = unsafe { self.next.add(bytes as usize) };
        self.left -= bytes;
        // SAFETY: `count` values were just written, in memory that is valid for ever and nobody else's.
        unsafe { core::slice::from_raw_parts(first.as_ptr(), count) }
    }
}

/// A run of usable frames and the place of its first one in the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub first: u64,
    pub end: u64,
    pub place: usize,
}

/// A policy's table and what finds a frame in it.
pub(super) struct Table<W: 'static> {
    pub runs: &'static [Run],
    pub watch: W,
}

impl<W> Table<W> {
    /// The place of frame `first`, if `count` frames from there are in one run.
    pub fn place(&self, first: u64, count: u64) -> Option<usize> {
        let after = self.runs.partition_point(|run| run.first <= first);
        let run = self.runs.get(after.checked_sub(1)?)?;
        let fits = first < run.end && count <= run.end - first;
        fits.then(|| run.place + (first - run.first) as usize)
    }
}

/// A table that may not be there yet.
pub(super) type Slot<W> = AtomicPtr<Table<W>>;

//! Carving: one piece of memory that is handed out in parts, once.

use core::mem::MaybeUninit;
use core::ptr::NonNull;

/// A line of the processor's caches, in bytes.
pub(crate) const LINE: u64 = 64;

/// What parts on no line of their own are rounded to.
const WORD: u64 = 8;

/// Bytes that `count` values of `T` take on lines of their own.
pub(crate) const fn room<T>(count: usize) -> u64 {
    tight::<T>(count).next_multiple_of(LINE)
}

/// Bytes that they take in a [`block`](Carving::block).
pub(crate) const fn tight<T>(count: usize) -> u64 {
    (size_of::<T>() as u64 * count as u64).next_multiple_of(WORD)
}

/// Memory that is handed out in parts: each on lines of its own, those of a [`block`](Self::block) in a row.
#[derive(Debug)]
pub struct Carving {
    next: NonNull<u8>,
    left: u64,
    unit: u64,
}

impl Carving {
    /// Takes over `left` bytes.
    ///
    /// # Safety
    ///
    /// They are aligned to [`LINE`], valid for ever, and nobody else's.
    pub(crate) unsafe fn new(next: NonNull<u8>, left: u64) -> Self {
        let unit = LINE;
        Self { next, left, unit }
    }

    /// The next `bytes` bytes as a carving whose parts follow each other: for what is used together or hardly ever.
    pub(crate) fn block(&mut self, bytes: u64) -> Self {
        let block = Self {
            next: self.next,
            left: bytes.min(self.left),
            unit: WORD,
        };
        self.advance(block.left.next_multiple_of(self.unit).min(self.left));
        block
    }

    fn advance(&mut self, bytes: u64) {
        // SAFETY: callers pass at most `left`, which this value owns.
        self.next = unsafe { self.next.add(bytes as usize) };
        self.left -= bytes;
    }

    /// `count` values made by `make`; none where they do not fit, which the plan rules out.
    pub(crate) fn slice<T: 'static>(
        &mut self,
        count: usize,
        mut make: impl FnMut(usize) -> T,
    ) -> &'static mut [T] {
        // SAFETY: every place is written to.
        unsafe {
            self.places(count, |place, index| {
                place.write(make(index));
            })
        }
    }

    /// `count` values, each made in its place by `build`.
    ///
    /// # Safety
    ///
    /// `build` leaves a value in the place.
    pub(crate) unsafe fn places<T: 'static>(
        &mut self,
        count: usize,
        mut build: impl FnMut(&mut MaybeUninit<T>, usize),
    ) -> &'static mut [T] {
        const { assert!(align_of::<T>() as u64 <= LINE) };
        let bytes = (size_of::<T>() as u64 * count as u64).next_multiple_of(self.unit);
        let first = self.next.cast::<MaybeUninit<T>>();
        if bytes == 0 || bytes > self.left || !first.is_aligned() {
            debug_assert!(bytes == 0, "the plan and the build disagree");
            return &mut [];
        }
        for index in 0..count {
            // SAFETY: `bytes` bytes from `next` are this value's, and aligned as was just seen.
            build(unsafe { first.add(index).as_mut() }, index);
        }
        self.advance(bytes);
        // SAFETY: `count` values were just built, in memory that is valid for ever and nobody else's.
        unsafe { core::slice::from_raw_parts_mut(first.cast().as_ptr(), count) }
    }
}

//! A short list in an array.
//!
//! Invariant `T1`: the first `count` items were written.

use core::mem::MaybeUninit;

/// At most `N` items; pushing more is a bug of this crate that loses the item and is seen by the tests.
pub(crate) struct List<T: Copy, const N: usize> {
    items: [MaybeUninit<T>; N],
    count: usize,
}

impl<T: Copy, const N: usize> List<T, N> {
    /// An empty list.
    #[inline(always)]
    pub(crate) const fn new() -> Self {
        Self {
            items: [const { MaybeUninit::uninit() }; N],
            count: 0,
        }
    }

    #[inline(always)]
    pub(crate) fn push(&mut self, item: T) {
        debug_assert!(self.count < N, "a list is as long as its longest use");
        if let Some(place) = self.items.get_mut(self.count) {
            place.write(item);
            self.count += 1;
        }
    }

    /// Takes every item out.
    pub(crate) fn clear(&mut self) {
        self.count = 0;
    }

    /// Pushes every item of `items`.
    pub(crate) fn extend(&mut self, items: &[T]) {
        for &item in items {
            self.push(item);
        }
    }
}

impl<T: Copy, const N: usize> core::ops::Deref for List<T, N> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: T1, and `count` is at most `N`.
        unsafe { core::slice::from_raw_parts(self.items.as_ptr().cast(), self.count) }
    }
}

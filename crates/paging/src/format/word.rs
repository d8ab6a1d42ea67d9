//! The word of an entry in memory: 32 or 64 bits, always reached as an atomic.
//!
//! The hardware and other CPUs write a live table, so every access is atomic; a relaxed load and a release store are
//! plain moves on x86. Which of them may be plain stores is the business of the cursor, not of this file.

use kmem_hal::sync::{AtomicU32, AtomicU64, Ordering};
use kmem_hal::{Frame, PhysMap};

mod sealed {
    pub trait Sealed {}
    impl Sealed for u32 {}
    impl Sealed for u64 {}
}

/// A word of 32 or 64 bits in a table.
pub trait Word: sealed::Sealed + 'static {
    /// The atomic that a table consists of.
    type Atomic: Send + Sync;

    /// The words of the table in `frame`.
    ///
    /// # Safety
    ///
    /// As [`PhysMap::words`].
    unsafe fn words<M: PhysMap>(map: &M, frame: Frame) -> &[Self::Atomic];

    /// Reads a word; what its writer stored before is visible.
    fn load(entry: &Self::Atomic) -> u64;

    /// Writes a word; what was stored before it is visible to whoever reads it.
    fn store(entry: &Self::Atomic, word: u64);

    /// Reads a word of a table that nobody else changes; says nothing of other memory, so that the compiler may move what is around it.
    fn load_private(entry: &Self::Atomic) -> u64;

    /// Clears a word of such a table. Readers may be in it still.
    fn clear_private(entry: &Self::Atomic);

    /// Exchanges a word in one locked step.
    fn swap(entry: &Self::Atomic, word: u64) -> u64;

    /// Clears the bits of a word that are not in `keep`, in one locked step.
    fn and(entry: &Self::Atomic, keep: u64);

    /// Writes `new` where the word is `current`.
    ///
    /// # Errors
    ///
    /// The word found, where it was another.
    fn compare_exchange(entry: &Self::Atomic, current: u64, new: u64) -> Result<(), u64>;
}

macro_rules! word {
    ($word:ty, $atomic:ty, $words:ident) => {
        impl Word for $word {
            type Atomic = $atomic;

            #[inline(always)]
            unsafe fn words<M: PhysMap>(map: &M, frame: Frame) -> &[$atomic] {
                // SAFETY: the caller's promise is passed on.
                unsafe { map.$words(frame) }
            }

            #[inline(always)]
            fn load(entry: &$atomic) -> u64 {
                u64::from(entry.load(Ordering::Acquire))
            }

            #[inline(always)]
            fn store(entry: &$atomic, word: u64) {
                entry.store(word as $word, Ordering::Release);
            }

            #[inline(always)]
            fn load_private(entry: &$atomic) -> u64 {
                u64::from(entry.load(Ordering::Relaxed))
            }

            #[inline(always)]
            fn clear_private(entry: &$atomic) {
                entry.store(0, Ordering::Relaxed);
            }

            #[inline(always)]
            fn swap(entry: &$atomic, word: u64) -> u64 {
                u64::from(entry.swap(word as $word, Ordering::AcqRel))
            }

            #[inline(always)]
            fn and(entry: &$atomic, keep: u64) {
                entry.fetch_and(keep as $word, Ordering::AcqRel);
            }

            #[inline(always)]
            fn compare_exchange(entry: &$atomic, current: u64, new: u64) -> Result<(), u64> {
                entry
                    .compare_exchange(
                        current as $word,
                        new as $word,
                        Ordering::AcqRel,
                        Ordering::Acquire,
                    )
                    .map(drop)
                    .map_err(u64::from)
            }
        }
    };
}

word!(u32, AtomicU32, words32);
word!(u64, AtomicU64, words);

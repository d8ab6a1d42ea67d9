//! What a tree maps ranges to: a word, usually a handle.
//!
//! Readers of a shared tree load a value with one atomic load, so a value is what fits into 64 bits: a pointer to a
//! VMA, an index into a table of VMAs, a packed set of flags. A value stands for *every* page of its range. Where a
//! range is cut, the lower part keeps the value and the upper part gets [`Value::split`] of it, so that a value that
//! counts from the start of its range (a file offset) can follow.
//!
//! ```text
//!   [ 10 ..= 19 ] = v          store(12..=13, x)          [10..=11] = v   [12..=13] = x   [14..=19] = v.split(4)
//! ```
//!
//! Merging is never done behind the caller's back: [`Mergeable`] (or a closure) says when two ranges that touch may
//! become one, and only the calls that say so merge. Linux's rule is a page long and lives in `kmem-cow-mm`.

use core::fmt;
use core::ptr::NonNull;

use kmem_hal::{Page, PageRange};

/// A `Copy` value that fits into 64 bits.
///
/// `from_word(to_word(v))` must be `v`.
pub trait Value: Copy {
    /// The value as a word.
    fn to_word(self) -> u64;

    /// The value that [`to_word`](Self::to_word) made this word of.
    fn from_word(word: u64) -> Self;

    /// The value of the upper part of a range that is cut `pages` pages above its first page.
    ///
    /// The same value unless overridden.
    #[doc(alias = "vma_split")]
    #[must_use]
    fn split(self, pages: u64) -> Self {
        let _ = pages;
        self
    }
}

/// A value that knows when two ranges that touch are one.
pub trait Mergeable: Value {
    /// The value of `left` and `right` as one range; `None` where they must stay two.
    ///
    /// Called only with ranges that touch: `left.range.last() + 1 == right.range.first()`.
    #[doc(alias = "can_vma_merge_after")]
    #[doc(alias = "can_vma_merge_before")]
    fn merge(left: &Entry<Self>, right: &Entry<Self>) -> Option<Self>;
}

/// A range of the tree with its value.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entry<V> {
    /// The pages, the last one inclusive.
    pub range: PageRange,
    /// What they map to.
    pub value: V,
}

impl<V: Value> Entry<V> {
    /// The part of the entry inside `range`, its value split where the lower part is cut off; `None` where they are
    /// apart.
    #[must_use]
    pub fn clipped(&self, range: PageRange) -> Option<Self> {
        let inside = self.range.intersection(range)?;
        let cut = inside.first().number() - self.range.first().number();
        Some(Self {
            range: inside,
            value: if cut == 0 {
                self.value
            } else {
                self.value.split(cut)
            },
        })
    }
}

impl<V> Entry<V> {
    /// The range's first page.
    #[must_use]
    #[inline]
    pub fn first(&self) -> Page {
        self.range.first()
    }

    /// The range's last page, inclusive.
    #[must_use]
    #[inline]
    pub fn last(&self) -> Page {
        self.range.last()
    }

    /// Whether the entry ends right below `other`.
    #[must_use]
    pub fn touches(&self, other: &Self) -> bool {
        self.range.last().number() + 1 == other.range.first().number()
    }
}

impl<V: fmt::Debug> fmt::Debug for Entry<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "[{:#x}..={:#x}] {:?}",
            self.range.first().number(),
            self.range.last().number(),
            self.value
        )
    }
}

macro_rules! integer_values {
    ($($integer:ty)*) => {$(
        impl Value for $integer {
            #[inline]
            fn to_word(self) -> u64 {
                self as u64
            }
            #[inline]
            fn from_word(word: u64) -> Self {
                // The word came from `to_word` of the same type, so nothing is lost.
                word as $integer
            }
        }
        impl Mergeable for $integer {
            /// Equal values merge.
            fn merge(left: &Entry<Self>, right: &Entry<Self>) -> Option<Self> {
                (left.value == right.value).then_some(left.value)
            }
        }
    )*};
}

integer_values!(u8 u16 u32 u64 usize);

impl Value for () {
    fn to_word(self) -> u64 {
        0
    }
    fn from_word(_word: u64) -> Self {}
}

impl Mergeable for () {
    fn merge(_left: &Entry<Self>, _right: &Entry<Self>) -> Option<Self> {
        Some(())
    }
}

impl<T> Value for NonNull<T> {
    #[inline]
    fn to_word(self) -> u64 {
        self.as_ptr().expose_provenance() as u64
    }
    #[inline]
    fn from_word(word: u64) -> Self {
        let pointer = core::ptr::with_exposed_provenance_mut(word as usize);
        // Never null: the word came from `to_word`. A word of 0 would be a misuse, and dangles instead.
        NonNull::new(pointer).unwrap_or(NonNull::dangling())
    }
}

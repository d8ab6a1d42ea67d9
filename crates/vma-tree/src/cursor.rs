//! Cursors: a place in the tree that one can walk from, look around at, and edit at.
//!
//! A cursor stands on an entry, or in the hole before one, or at the end. A mutable cursor keeps its place through its
//! own edits: it remembers pages, not nodes, and a step after an edit costs one descent.

use core::fmt;

use kmem_hal::{AllocError, ObjectAlloc, Page, PageRange};

use crate::node::Node;
use crate::stock::{Exclusive, Sharing};
use crate::store::Removed;
use crate::tree::RangeTree;
use crate::value::{Entry, Mergeable, Value};

/// A place in a tree.
///
/// # Examples
///
/// ```
/// use kmem_hal::{FixedPool, Page, PageRange};
/// use kmem_vma_tree::{Node, RangeTree};
///
/// let nodes = FixedPool::<Node, 4>::new();
/// let mut tree: RangeTree<u8, _> = RangeTree::new_in(&nodes);
/// for i in 0..3 {
///     tree.store(PageRange::single(Page::new(10 * i).unwrap()), Some(i as u8), &mut |_| ())?;
/// }
/// let mut cursor = tree.cursor(Page::new(10).unwrap());
/// assert_eq!(cursor.entry().unwrap().value, 1);
/// assert_eq!(cursor.peek_next().unwrap().value, 2);
/// assert_eq!(cursor.previous().unwrap().value, 0);
/// assert!(cursor.previous().is_none());
/// assert_eq!(cursor.next().unwrap().value, 0);
/// # Ok::<(), kmem_hal::AllocError>(())
/// ```
#[doc(alias = "ma_state")]
#[doc(alias = "vma_iterator")]
pub struct Cursor<
    'a,
    V: Value,
    A: ObjectAlloc<Node<W>>,
    S: Sharing = Exclusive,
    const W: usize = 32,
> {
    tree: &'a RangeTree<V, A, S, W>,
    place: Place,
}

/// A place: below the space, at a page, or above the space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Below,
    At(Page),
    Above,
}

impl Place {
    fn entry<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize>(
        self,
        tree: &RangeTree<V, A, S, W>,
    ) -> Option<Entry<V>> {
        match self {
            Self::At(page) => tree.get(page),
            Self::Below | Self::Above => None,
        }
    }

    /// The entry after the one here.
    fn next<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize>(
        self,
        tree: &RangeTree<V, A, S, W>,
    ) -> Option<Entry<V>> {
        match self {
            Self::Below => tree.first(),
            Self::Above => None,
            Self::At(page) => {
                let from = match tree.first_at_or_after(page)? {
                    here if here.range.contains(page) => here.last().checked_add(1)?,
                    above => return Some(above),
                };
                tree.first_at_or_after(from)
            }
        }
    }

    /// The entry before the one here.
    fn previous<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize>(
        self,
        tree: &RangeTree<V, A, S, W>,
    ) -> Option<Entry<V>> {
        match self {
            Self::Below => None,
            Self::Above => tree.last(),
            // An entry that covers the page does not end before it.
            Self::At(page) => tree.last_before(page),
        }
    }

    /// Goes to `entry`, or to `end` where there is none.
    fn go<V: Value>(&mut self, entry: Option<Entry<V>>, end: Self) -> Option<Entry<V>> {
        *self = entry.map_or(end, |entry| Self::At(entry.first()));
        entry
    }
}

impl<'a, V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Cursor<'a, V, A, S, W> {
    /// The entry that the cursor stands on; `None` in a hole and at both ends.
    #[must_use]
    pub fn entry(&self) -> Option<Entry<V>> {
        self.place.entry(self.tree)
    }

    /// The entry after this place.
    #[must_use]
    pub fn peek_next(&self) -> Option<Entry<V>> {
        self.place.next(self.tree)
    }

    /// The entry before this place.
    #[must_use]
    pub fn peek_previous(&self) -> Option<Entry<V>> {
        self.place.previous(self.tree)
    }

    /// Steps to the entry after this place; past the last one the cursor stands at the end.
    #[doc(alias = "vma_next")]
    #[doc(alias = "mas_next")]
    #[expect(clippy::should_implement_trait, reason = "a cursor also steps back")]
    pub fn next(&mut self) -> Option<Entry<V>> {
        let next = self.peek_next();
        self.place.go(next, Place::Above)
    }

    /// Steps to the entry before this place; past the first one the cursor stands at the beginning.
    #[doc(alias = "vma_prev")]
    #[doc(alias = "mas_prev")]
    pub fn previous(&mut self) -> Option<Entry<V>> {
        let previous = self.peek_previous();
        self.place.go(previous, Place::Below)
    }

    /// Moves to `page`.
    #[doc(alias = "mas_set")]
    pub fn seek(&mut self, page: Page) {
        self.place = Place::At(page);
    }

    /// The entries from here on, ascending.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Entry<V>> + use<'a, V, A, S, W> {
        let from = match self.place {
            Place::Below => Some(Page::ZERO),
            Place::At(page) => Some(page),
            Place::Above => None,
        };
        from.map(|page| self.tree.iter_from(page))
            .into_iter()
            .flatten()
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Clone
    for Cursor<'_, V, A, S, W>
{
    fn clone(&self) -> Self {
        Self { ..*self }
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> fmt::Debug
    for Cursor<'_, V, A, S, W>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cursor({:?})", self.place)
    }
}

/// A place in a tree, to edit at.
///
/// # Examples
///
/// Changing what one walks over:
///
/// ```
/// use kmem_hal::{FixedPool, Page, PageRange};
/// use kmem_vma_tree::{Node, RangeTree};
///
/// let nodes = FixedPool::<Node, 16>::new();
/// let mut tree: RangeTree<u64, _> = RangeTree::new_in(&nodes);
/// for i in 0..50 {
///     tree.store(PageRange::single(Page::new(2 * i).unwrap()), Some(i), &mut |_| ())?;
/// }
/// let mut cursor = tree.cursor_mut(Page::ZERO);
/// let mut at = cursor.entry();
/// while let Some(entry) = at {
///     if entry.value % 2 == 1 {
///         cursor.erase(entry.range, &mut |_| ())?;
///     }
///     at = cursor.next();
/// }
/// assert_eq!(tree.len(), 25);
/// # Ok::<(), kmem_hal::AllocError>(())
/// ```
pub struct CursorMut<'a, V: Value, A: ObjectAlloc<Node<W>>, const W: usize = 32> {
    tree: &'a mut RangeTree<V, A, Exclusive, W>,
    place: Place,
}

impl<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> CursorMut<'_, V, A, W> {
    /// The entry that the cursor stands on; `None` in a hole and at both ends.
    #[must_use]
    pub fn entry(&self) -> Option<Entry<V>> {
        self.place.entry(self.tree)
    }

    /// The entry after this place.
    #[must_use]
    pub fn peek_next(&self) -> Option<Entry<V>> {
        self.place.next(self.tree)
    }

    /// The entry before this place.
    #[must_use]
    pub fn peek_previous(&self) -> Option<Entry<V>> {
        self.place.previous(self.tree)
    }

    /// Steps to the entry after this place; past the last one the cursor stands at the end.
    #[expect(clippy::should_implement_trait, reason = "a cursor also steps back")]
    pub fn next(&mut self) -> Option<Entry<V>> {
        let next = self.peek_next();
        self.place.go(next, Place::Above)
    }

    /// Steps to the entry before this place; past the first one the cursor stands at the beginning.
    pub fn previous(&mut self) -> Option<Entry<V>> {
        let previous = self.peek_previous();
        self.place.go(previous, Place::Below)
    }

    /// Moves to `page`.
    pub fn seek(&mut self, page: Page) {
        self.place = Place::At(page);
    }

    /// [`RangeTree::store`]; the cursor stays at its page.
    ///
    /// # Errors
    ///
    /// As there.
    #[doc(alias = "mas_store")]
    pub fn store(
        &mut self,
        range: PageRange,
        value: V,
        removed: Removed<'_, V>,
    ) -> Result<(), AllocError> {
        self.tree.store(range, Some(value), removed)
    }

    /// Erases what is in `range`; the cursor stays at its page.
    ///
    /// # Errors
    ///
    /// As [`RangeTree::store`].
    #[doc(alias = "mas_erase")]
    pub fn erase(&mut self, range: PageRange, removed: Removed<'_, V>) -> Result<(), AllocError> {
        self.tree.store(range, None, removed)
    }

    /// [`RangeTree::store_merged`]; the cursor stands on the merged entry.
    ///
    /// # Errors
    ///
    /// As [`RangeTree::store`].
    pub fn store_merged(
        &mut self,
        range: PageRange,
        value: V,
        removed: Removed<'_, V>,
    ) -> Result<Entry<V>, AllocError>
    where
        V: Mergeable,
    {
        let merged = self.tree.store_merged(range, value, removed)?;
        self.place = Place::At(merged.first());
        Ok(merged)
    }

    /// Gives the entry that the cursor stands on another value; the one before, or `None` in a hole.
    ///
    /// # Errors
    ///
    /// As [`RangeTree::store`].
    pub fn replace(&mut self, value: V) -> Result<Option<V>, AllocError> {
        let Some(entry) = self.entry() else {
            return Ok(None);
        };
        self.tree.store(entry.range, Some(value), &mut |_| ())?;
        Ok(Some(entry.value))
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> fmt::Debug for CursorMut<'_, V, A, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CursorMut({:?})", self.place)
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// A cursor at `page`.
    #[must_use]
    pub fn cursor(&self, page: Page) -> Cursor<'_, V, A, S, W> {
        Cursor {
            tree: self,
            place: Place::At(page),
        }
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> RangeTree<V, A, Exclusive, W> {
    /// A cursor at `page` that edits.
    pub fn cursor_mut(&mut self, page: Page) -> CursorMut<'_, V, A, W> {
        CursorMut {
            tree: self,
            place: Place::At(page),
        }
    }
}

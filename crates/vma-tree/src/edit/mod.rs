//! Editing: one descent finds the place, one word makes the change.
//!
//! Every edit is a *splice*: the pages `cut` map to something else, and what hangs over the cut's ends stays.
//!
//! ```text
//!   in a leaf       [a][bbbb][c] . . .      1. build the pieces       bb  x  b
//!                        └cut┘              2. in place, or a copy of the leaf and one store into its parent
//!
//!   across leaves       P                   1. what is left of both leaves and the piece between go into 0 to 3 leaves,
//!                    /  |  \                   what is left of both parents into 0 to 3 parents, and so up,
//!                   L   M   R               2. until one old node is replaced by one new node: one store publishes
//!                     └cut┘                 3. then the books are kept, pieces shown and the old nodes retired
//! ```
//!
//! Nothing that a reader can reach changes before that one store, and all memory has been taken before it. So a reader
//! sees all of an edit or nothing, and an edit that finds no memory has changed nothing. A leaf or an inner node that
//! overflows or runs low is the same case: its neighbour is drawn into the rebuilding. Where nobody reads meanwhile, a leaf
//! that overflows is split where it stands, if its parent has room.
//!
//! Invariants
//! - `E1`: the boundary above a leaf that is not the last is the last page of its last range. So a gap lies in one leaf
//!   whole, and a lookup of the next range above never leaves the leaf.
//! - `E2`: the gap on record for a child is the largest gap in the pages that the child answers for, without the free pages
//!   above the tree's last range. Those are known from the page after that range, which is on record for the tree: no
//!   search from above, where that gap is large and beyond the limit, looks at it in vain.
//! - `E3`: one writer edits at a time (`&mut RangeTree`, or the contract of `SharedTree::writer`).
//! - `E4`: the writer's finger is unset, or it is the way from the root to a leaf of the tree with the pages that the leaf
//!   answers for: whoever replaces a node on it by another unsets it. So an edit near the last one needs no descent. The
//!   hole that it names is a guess: who takes it looks whether it is one.
//! - `E5`: what was removed is shown when the edit is whole (records, counts, finger), or before anything has changed. So a caller's
//!   closure that unwinds leaves a tree behind in which nothing is missing.
//!
//! Cost: N ranges, height h = log N; in a leaf one descent and at most one node; across leaves O(h) nodes and O(k) for
//! k ranges removed.

mod general;
mod leaf;
mod merge;
mod modify;
mod rebuild;
mod split;
mod sweep;

use kmem_hal::sync::Ordering;
use kmem_hal::{AllocError, ObjectAlloc, Page, PageRange};

use crate::list::List;
use crate::node::{Coding, Node, NodePtr, Raw, to_word};
use crate::path::Path;
use crate::plant::Plant;
use crate::stock::{GARBAGE_LIMIT, Sharing};
use crate::tree::RangeTree;
use crate::value::{Entry, Value};

/// The pieces that take the place of the ranges a cut touches: lower rest, new range, upper rest.
pub(crate) type Pieces = List<Raw, 3>;

/// The pages of an edit and what they become.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) value: Option<u64>,
    /// The pages whose ranges are handed to the caller: not those of neighbours that the new range is merged with.
    pub(crate) shown: (u64, u64),
}

/// Shows a removed range, clipped to what is shown.
#[inline(always)]
pub(crate) fn show<V: Value>(raw: Raw, cut: &Cut, removed: &mut dyn FnMut(Entry<V>)) {
    let (first, last) = (cut.shown.0.max(raw.first), cut.shown.1.min(raw.last));
    if first <= last {
        show_part(raw, (first, last), removed);
    }
}

#[inline(always)]
fn show_part<V: Value>(raw: Raw, (first, last): (u64, u64), removed: &mut dyn FnMut(Entry<V>)) {
    let whole = entry::<V>(raw);
    if let Some(inside) = PageRange::new(Page::from_number(first), Page::from_number(last))
        && let Some(piece) = whole.clipped(inside)
    {
        removed(piece);
    }
}

/// The entry of a raw range.
#[inline(always)]
pub(crate) fn entry<V: Value>(raw: Raw) -> Entry<V> {
    Entry {
        // SAFETY: a `Raw` is a page range: of a caller, a part of one, or read from a leaf as it was written (N1, R2).
        range: unsafe { PageRange::from_numbers_unchecked(raw.first, raw.last) },
        value: V::from_word(raw.value),
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// Makes the pages of `cut` what it says.
    ///
    /// The caller is the one writer (`E3`).
    pub(crate) fn splice(
        &self,
        cut: Cut,
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<(), AllocError> {
        self.admit()?;
        self.with_finger(|path| {
            if self.aim(path, cut.first) {
                self.splice_at(path, &cut, removed)
            } else {
                self.store_first(cut)
            }
        })
    }

    /// Runs `edit` with the writer's finger: the way to the leaf that was edited last, or nothing (`E4`).
    ///
    /// Not to be nested.
    #[inline(always)]
    pub(crate) fn with_finger<R>(&self, edit: impl FnOnce(&mut Path<W>) -> R) -> R {
        self.finger.with_mut(|path| {
            // SAFETY: E3: the finger is the one writer's, and edits are not nested.
            edit(unsafe { &mut *path })
        })
    }

    /// Leads the path to the leaf that answers for `first`; `false` in an empty tree.
    #[inline(always)]
    pub(crate) fn aim(&self, path: &mut Path<W>, first: u64) -> bool {
        if path.answers(first) {
            return true;
        }
        // SAFETY: E3: nobody else edits; nodes in the tree are alive (K1).
        unsafe { path.find(self.root_word(), first) }
    }

    /// Refuses an edit where too much garbage waits for readers.
    #[inline(always)]
    pub(crate) fn admit(&self) -> Result<(), AllocError> {
        if S::SHARED && self.stock.garbage() >= GARBAGE_LIMIT {
            self.stock.collect(&self.sharing);
            if self.stock.garbage() >= GARBAGE_LIMIT && self.stock.hold.get() == 0 {
                return Err(AllocError::Busy);
            }
        }
        Ok(())
    }

    /// The first range of an empty tree.
    fn store_first(&self, cut: Cut) -> Result<(), AllocError> {
        let Some(value) = cut.value else {
            return Ok(());
        };
        let raw = [Raw {
            first: cut.first,
            last: cut.last,
            value,
        }];
        let Some(coding) = Coding::choose(0, &raw) else {
            return Err(AllocError::Unsatisfiable);
        };
        let node = self.stock.take(&self.alloc)?;
        // SAFETY: the node is ours until it is published.
        unsafe { node.as_ref() }.write_leaf(coding, &raw);
        self.begin_edit();
        self.set_root(to_word(node) | 1);
        self.set_top(cut.last + 1);
        self.count_edit(1, 0);
        Ok(())
    }

    /// Makes `node` the child that the path takes at `level`, or the root. The one store that readers see.
    pub(super) fn publish(&self, path: &Path<W>, level: usize, node: NodePtr<W>) {
        self.begin_edit();
        if level == path.height() {
            self.set_root(to_word(node) | level as u64);
        } else {
            let order = self.planted.order(Plant::NoPublishFence, Ordering::Release);
            path.node(level).set_child(path.slot(level), node, order);
        }
    }

    /// Moves the boundary above the child that the path takes at `level` down or up to `last`, inside a hole (`N7`).
    pub(super) fn move_boundary(&self, path: &Path<W>, level: usize, last: u64) {
        let order = self
            .planted
            .order(Plant::NoBoundaryRelease, Ordering::Release);
        path.move_boundary(level, last, order);
    }

    /// Takes a node out for good.
    pub(super) fn retire(&self, node: NodePtr<W>) {
        if S::SHARED && !self.planted.is(Plant::NoGrace) {
            self.stock.retire(&self.sharing, node);
        } else {
            self.stock.give(node);
        }
    }

    /// Finds out anew where the last range ends.
    pub(crate) fn measure_top(&self) {
        // SAFETY: E3: nobody else edits; nodes in the tree are alive.
        let path = unsafe { Path::<W>::new(self.root_word(), Page::MAX.number()) };
        self.set_top(path.map_or(0, |path| path.leaf().end() + 1));
    }

    /// Records the largest gap of the leaf that answers for `page` anew.
    pub(super) fn refresh_gap(&self, page: u64) {
        // SAFETY: E3: nobody else edits; nodes in the tree are alive.
        if let Some(path) = unsafe { Path::<W>::new(self.root_word(), page) } {
            self.measure_gap(&path);
        }
    }
}

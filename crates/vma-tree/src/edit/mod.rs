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
//!                     └cut┘                 3. then the old nodes are swept: pieces shown, nodes retired
//! ```
//!
//! Nothing that a reader can reach changes before that one store, and all memory has been taken before it. So a reader
//! sees all of an edit or nothing, and an edit that finds no memory has changed nothing. A leaf or an inner node that
//! overflows or runs low is the same case: its neighbour is drawn into the rebuilding.
//!
//! Invariants
//! - `E1`: the boundary above a leaf that is not the last is the last page of its last range. So a gap lies in one leaf
//!   whole, and a lookup of the next range above never leaves the leaf.
//! - `E2`: the gap on record for a child is the largest gap in the pages that the child answers for.
//! - `E3`: one writer edits at a time (`&mut RangeTree`, or the contract of `SharedTree::writer`).
//!
//! Cost: N ranges, height h = log N; in a leaf one descent and at most one node; across leaves O(h) nodes and O(k) for
//! k ranges removed.

mod rebuild;
mod sweep;

use kmem_hal::{AllocError, ObjectAlloc, Page, PageRange};

use crate::list::List;
use crate::node::{Coding, Node, NodePtr, Raw, saturate, to_word};
use crate::path::Path;
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
}

/// Shows removed pieces, clipped to the cut.
pub(crate) fn show<V: Value>(raw: Raw, cut: Cut, removed: &mut dyn FnMut(Entry<V>)) {
    if let Some(whole) = entry::<V>(raw)
        && let Some(inside) = PageRange::new(
            Page::from_number(cut.first.max(raw.first)),
            Page::from_number(cut.last.min(raw.last)),
        )
        && let Some(piece) = whole.clipped(inside)
    {
        removed(piece);
    }
}

/// The entry of a raw range.
#[inline(always)]
pub(crate) fn entry<V: Value>(raw: Raw) -> Option<Entry<V>> {
    Some(Entry {
        range: PageRange::new(Page::from_number(raw.first), Page::from_number(raw.last))?,
        value: V::from_word(raw.value),
    })
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
        if S::SHARED && self.stock.garbage() >= GARBAGE_LIMIT {
            self.stock.collect(&self.sharing);
            if self.stock.garbage() >= GARBAGE_LIMIT && self.stock.hold.get() == 0 {
                return Err(AllocError::Busy);
            }
        }
        // SAFETY: E3: nobody else edits; nodes in the tree are alive (K1).
        let Some(path) = (unsafe { Path::new(self.root_word(), cut.first) }) else {
            return self.plant(cut);
        };
        let done = self.splice_at(&path, cut, removed);
        self.stock.trim(&self.alloc);
        done
    }

    /// [`splice`](Self::splice) where the way to the cut's first page is known.
    pub(crate) fn splice_at(
        &self,
        path: &Path<W>,
        cut: Cut,
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<(), AllocError> {
        let leaf = path.leaf();
        let from = leaf.first_at_or_after(cut.first);
        let mut pieces = Pieces::new(Raw::EMPTY);
        if from < leaf.count() {
            let raw = leaf.raw(from);
            if raw.first < cut.first {
                pieces.push(Raw {
                    last: cut.first - 1,
                    ..raw
                });
            }
        }
        if let Some(value) = cut.value {
            pieces.push(Raw {
                first: cut.first,
                last: cut.last,
                value,
            });
        }
        if cut.last > path.high {
            // SAFETY: as above; the tree is not empty.
            let Some(right) = (unsafe { Path::new(self.root_word(), cut.last) }) else {
                return Ok(());
            };
            let to = right.leaf().rank(cut.last);
            self.push_rest(&right, to, cut, &mut pieces);
            return self.rebuild((path, from), (&right, to), &pieces, cut, removed);
        }
        let mut to = from;
        while to < leaf.count() && leaf.range(to).0 <= cut.last {
            to += 1;
        }
        if to > from {
            self.push_rest(path, to, cut, &mut pieces);
        } else if pieces.is_empty() {
            return Ok(());
        }
        let count = leaf.count() - (to - from) + pieces.len();
        let grows = pieces.len() >= to - from;
        let enough = grows || path.height() == 1 || count >= Node::<W>::LEAF_LOW;
        if count > 0 && enough && leaf.can_replace(from, to, &pieces) {
            self.edit_leaf(path, (from, to), &pieces, cut, removed)
        } else {
            self.rebuild((path, from), (path, to), &pieces, cut, removed)
        }
    }

    /// Pushes what the last range of the cut has above it.
    #[inline(always)]
    fn push_rest(&self, right: &Path<W>, to: usize, cut: Cut, pieces: &mut Pieces) {
        if let Some(at) = to.checked_sub(1) {
            let raw = right.leaf().raw(at);
            if raw.last > cut.last {
                let above = cut.last + 1 - raw.first;
                pieces.push(Raw {
                    first: cut.last + 1,
                    last: raw.last,
                    value: V::from_word(raw.value).split(above).to_word(),
                });
            }
        }
    }

    /// The first range of an empty tree.
    fn plant(&self, cut: Cut) -> Result<(), AllocError> {
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
        self.set_root(to_word(node) | 1);
        self.count_edit(1, 0);
        Ok(())
    }

    /// Replaces the ranges `from .. to` of a leaf that can hold the result.
    fn edit_leaf(
        &self,
        path: &Path<W>,
        (from, to): (usize, usize),
        pieces: &[Raw],
        cut: Cut,
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<(), AllocError> {
        let leaf = path.leaf();
        let copy: Option<NodePtr<W>> = if self.planted.copies(S::SHARED) {
            Some(self.stock.take(&self.alloc)?)
        } else {
            None
        };
        // What the change does to the gaps beside it.
        let is_last = path.is_last();
        let below = leaf.free_from(from, path.low);
        let (mut free, mut old_gap) = (below, 0);
        for slot in from..to {
            let (first, last) = leaf.range(slot);
            old_gap = old_gap.max(first - free);
            free = last + 1;
        }
        let at_end = to == leaf.count();
        let end = if !at_end {
            leaf.range(to).0
        } else if is_last {
            Page::LIMIT
        } else {
            free
        };
        old_gap = old_gap.max(end - free);
        let (mut free, mut new_gap) = (below, 0);
        for raw in pieces {
            new_gap = new_gap.max(raw.first - free);
            free = raw.last + 1;
        }
        let lowered = at_end && !is_last && free <= path.high;
        if !at_end || is_last {
            new_gap = new_gap.max(end - free);
        }
        match copy {
            Some(copy) => {
                // SAFETY: the node is ours until it is published.
                let new = unsafe { copy.as_ref() };
                leaf.replace_into(new, from, to, pieces);
                self.publish(path, 1, copy);
                for slot in from..to {
                    show(leaf.raw(slot), cut, removed);
                }
                self.retire(path.pointer(0));
                self.finish_leaf(path, new, (old_gap, new_gap), lowered.then(|| free - 1));
            }
            None => {
                for slot in from..to {
                    show(leaf.raw(slot), cut, removed);
                }
                leaf.replace(from, to, pieces);
                self.finish_leaf(
                    path,
                    path.node(0),
                    (old_gap, new_gap),
                    lowered.then(|| free - 1),
                );
            }
        }
        self.count_edit(pieces.len(), to - from);
        Ok(())
    }

    /// Records what the edit of a leaf did to gaps and boundaries (`E1`, `E2`).
    #[inline(always)]
    fn finish_leaf(
        &self,
        path: &Path<W>,
        leaf: &Node<W>,
        (old_gap, new_gap): (u64, u64),
        lowered: Option<u64>,
    ) {
        let Some(recorded) = path.recorded_gap() else {
            return;
        };
        if let Some(last) = lowered {
            path.lower_boundary(1, last);
        }
        let (old_gap, new_gap) = (saturate(old_gap), saturate(new_gap));
        if new_gap >= recorded {
            path.record_gap(1, new_gap);
        } else if old_gap >= recorded {
            let gap = leaf.leaf().largest_gap(path.low, path.is_last());
            path.record_gap(1, saturate(gap));
        }
        if lowered.is_some() {
            self.refresh_gap(path.high + 1);
        }
    }

    /// Makes `node` the child that the path takes at `level`, or the root. The one store that readers see.
    pub(super) fn publish(&self, path: &Path<W>, level: usize, node: NodePtr<W>) {
        if level == path.height() {
            self.set_root(to_word(node) | level as u64);
        } else {
            let order = self.planted.publish();
            path.node(level).set_child(path.slot(level), node, order);
        }
    }

    /// Takes a node out for good.
    pub(super) fn retire(&self, node: NodePtr<W>) {
        if self.planted.waits(S::SHARED) {
            self.stock.retire(&self.sharing, node);
        } else {
            self.stock.give(node);
        }
    }

    /// Records the largest gap of the leaf that answers for `page` anew.
    pub(super) fn refresh_gap(&self, page: u64) {
        // SAFETY: E3: nobody else edits; nodes in the tree are alive.
        if let Some(path) = unsafe { Path::<W>::new(self.root_word(), page) } {
            let gap = path.leaf().largest_gap(path.low, path.is_last());
            path.record_gap(1, saturate(gap));
        }
    }
}

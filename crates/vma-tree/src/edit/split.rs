//! A full leaf of a tree that nobody reads meanwhile is split where it stands.
//!
//! ```text
//!        P                      P          P gets a child in place: no node above is looked at
//!        |                    /   \
//!   [ a b c d e f ]      [ a b c ] [ d e f ]          the edit goes on in one of the two
//! ```
//!
//! The same ranges lie in two leaves afterwards, so a split changes nothing that anybody sees and need not be undone. It is a
//! tenth of what [`rebuild`](super::rebuild) needs, which does it where readers look on, where the parent is full too, or where
//! the pieces cannot be written with the leaf's coding.

use kmem_hal::{AllocError, ObjectAlloc};

use super::leaf::Hole;
use crate::node::{Child, Leaf, Node, saturate, to_word};
use crate::path::Path;
use crate::stock::Sharing;
use crate::tree::RangeTree;
use crate::value::Value;

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// [`insert`](Self::insert) into a full leaf; `false`, and nothing has changed, where it cannot be split. The range fits.
    #[inline(never)]
    pub(crate) fn insert_split(
        &self,
        path: &mut Path<W>,
        hole: &Hole,
        (first, last): (u64, u64),
        value: u64,
    ) -> Result<bool, AllocError> {
        let Some(below) = self.split_leaf(path, first, (hole.at, hole.at))? else {
            return Ok(false);
        };
        // The hole lies in one of the two whole.
        let hole = hole.moved(hole.at.checked_sub(below).unwrap_or(hole.at));
        self.insert(path, &hole, (first, last), value)?;
        Ok(true)
    }

    /// Splits the path's leaf, in which an edit touches the ranges `from .. to`, and leads the path to the half that answers for
    /// `first` and all that the edit touches. Gives how many ranges stay below; `None`, and nothing has changed, where that
    /// cannot be.
    #[inline]
    pub(super) fn split_leaf(
        &self,
        path: &mut Path<W>,
        first: u64,
        (from, to): (usize, usize),
    ) -> Result<Option<usize>, AllocError> {
        let leaf = path.leaf();
        let is_root = path.height() == 1;
        if S::SHARED || !(is_root || path.node(1).children() < Node::<W>::CHILDREN) {
            return Ok(None);
        }
        let Some(at) = split_position(&leaf, path.is_last(), (from, to)) else {
            return Ok(None);
        };
        let root = if is_root {
            Some(self.stock.take(&self.alloc)?)
        } else {
            None
        };
        let upper = match self.stock.take(&self.alloc) {
            Ok(node) => node,
            Err(error) => {
                if let Some(root) = root {
                    self.stock.give(root);
                }
                return Err(error);
            }
        };
        // SAFETY: the node is ours.
        let (below, above) = leaf.split_into(at, unsafe { upper.as_ref() });
        // E1: the hole between the two leaves is the upper one's.
        let last = below.end();
        let below_gap = saturate(below.largest_gap(path.low()));
        let above_gap = saturate(above.largest_gap(last + 1));
        let Some(root) = root else {
            // E2: the larger of the two gaps is the one on record for the leaf; so nothing changes above.
            let (parent, slot) = (path.node(1), path.slot(1));
            parent.set_gap(slot, below_gap);
            parent.insert_child(slot, last + 1, upper, above_gap);
            path.split(upper, last, at <= from);
            return Ok(Some(at));
        };
        let children = [
            Child {
                node: path.pointer(0),
                last,
                gap: below_gap,
            },
            Child {
                node: upper,
                last: path.high(),
                gap: above_gap,
            },
        ];
        // SAFETY: the node is ours.
        unsafe { root.as_ref() }.write_inner(&children);
        self.set_root(to_word(root) | 2);
        // SAFETY: E3: nobody else edits; nodes in the tree are alive (K1).
        Ok(unsafe { path.find(self.root_word(), first) }.then_some(at))
    }
}

/// How many ranges stay below, so that the ranges `from .. to`, what is next to them, and the holes beside them lie on one side.
fn split_position<const W: usize>(
    leaf: &Leaf<'_, W>,
    is_last: bool,
    (from, to): (usize, usize),
) -> Option<usize> {
    let count = leaf.count();
    let at = if from == to && from == count && is_last {
        // An ascending series of new ranges leaves nearly full leaves behind, as a descending one does.
        count - 1
    } else if from == to && from == 0 {
        1
    } else {
        let half = count.div_ceil(2);
        if half <= from || half > to {
            half
        } else if from > 0 {
            from
        } else {
            to + 1
        }
    };
    (0 < at && at < count).then_some(at)
}

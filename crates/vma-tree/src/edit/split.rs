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
use crate::node::{Child, Coding, Leaf, Node, NodePtr, Raw, saturate, to_word};
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
        if !Self::has_place_above(path) {
            return Ok(None);
        }
        let Some(at) = split_position(&leaf, path.is_last(), (from, to)) else {
            return Ok(None);
        };
        let nodes = self.take_above(path)?;
        // SAFETY: the node is ours.
        let (below, above) = leaf.split_into(at, unsafe { nodes.upper.as_ref() });
        // E1: the hole between the two leaves is the upper one's.
        let last = below.end();
        let below_gap = saturate(below.largest_gap(path.low()));
        let above_gap = saturate(above.largest_gap(last + 1));
        // E2: the larger of the two gaps is the one on record for the leaf; so nothing changes above.
        let done = self.put_above(path, &nodes, last, (below_gap, above_gap), at <= from);
        debug_assert!(!done || path.answers(first));
        Ok(done.then_some(at))
    }

    /// Puts a range into the hole above the tree's last range, in a leaf of its own, since it cannot be written with the others: what lies
    /// at the top of a space lies far from the rest. `false`, and nothing has changed, where that cannot be.
    #[inline(never)]
    pub(crate) fn insert_apart(
        &self,
        path: &mut Path<W>,
        hole: &Hole,
        (first, last): (u64, u64),
        value: u64,
    ) -> Result<bool, AllocError> {
        let leaf = path.leaf();
        if hole.at < leaf.count() || !Self::has_place_above(path) {
            return Ok(false);
        }
        let raw = [Raw { first, last, value }];
        let Some(coding) = Coding::choose(hole.low, &raw) else {
            return Ok(false);
        };
        let nodes = self.take_above(path)?;
        // SAFETY: the node is ours.
        unsafe { nodes.upper.as_ref() }.write_leaf(coding, &raw);
        let below_gap = if path.height() == 1 {
            saturate(leaf.largest_gap(path.low()))
        } else {
            path.recorded_gap()
        };
        if !self.put_above(path, &nodes, hole.low - 1, (below_gap, 0), true) {
            return Ok(false);
        }
        self.set_top(last + 1);
        self.count_edit(1, 0);
        path.record_gap(1, saturate(first - hole.low));
        Ok(true)
    }

    /// Whether another leaf can be put above the path's where it stands.
    #[inline(always)]
    fn has_place_above(path: &Path<W>) -> bool {
        let is_root = path.height() == 1;
        !S::SHARED && (is_root || path.node(1).children() < Node::<W>::CHILDREN)
    }

    /// The nodes for that.
    fn take_above(&self, path: &Path<W>) -> Result<Above<W>, AllocError> {
        let upper = self.stock.take(&self.alloc)?;
        if path.height() > 1 {
            return Ok(Above { upper, root: None });
        }
        match self.stock.take(&self.alloc) {
            Ok(root) => Ok(Above {
                upper,
                root: Some(root),
            }),
            Err(error) => {
                self.stock.give(upper);
                Err(error)
            }
        }
    }

    /// Puts the upper leaf, which answers for the pages above `last`, above the path's, and leads the path to it if `above`. The largest
    /// gaps of the two are recorded in their parent.
    #[inline(always)]
    fn put_above(
        &self,
        path: &mut Path<W>,
        nodes: &Above<W>,
        last: u64,
        (below_gap, above_gap): (u32, u32),
        above: bool,
    ) -> bool {
        let Some(root) = nodes.root else {
            let (parent, slot) = (path.node(1), path.slot(1));
            parent.set_gap(slot, below_gap);
            parent.insert_child(slot, last + 1, nodes.upper, above_gap);
            path.split(nodes.upper, last, above);
            return true;
        };
        let children = [
            Child {
                node: path.pointer(0),
                last,
                gap: below_gap,
            },
            Child {
                node: nodes.upper,
                last: path.high(),
                gap: above_gap,
            },
        ];
        // SAFETY: the node is ours.
        unsafe { root.as_ref() }.write_inner(&children);
        self.set_root(to_word(root) | 2);
        let page = if above { last + 1 } else { last };
        // SAFETY: E3: nobody else edits; nodes in the tree are alive (K1).
        unsafe { path.find(self.root_word(), page) }
    }
}

/// The nodes that put another leaf above one: the leaf, and a new root where the lower one was the root.
struct Above<const W: usize> {
    upper: NodePtr<W>,
    root: Option<NodePtr<W>>,
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

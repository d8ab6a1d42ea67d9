//! Checking a tree's invariants, and its statistics.
//!
//! For tests, fuzzers and a kernel's debug build (`CONFIG_DEBUG_VM_MAPLE_TREE`). One walk over every node, no memory.

use core::fmt;

use kmem_hal::{ObjectAlloc, Page};

use crate::node::{Node, NodePtr, from_word, saturate};
use crate::path::{HEIGHT_MASK, MAX_HEIGHT};
use crate::stock::Sharing;
use crate::tree::RangeTree;
use crate::value::Value;

/// Which invariant of a tree does not hold, and near which page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Broken {
    /// `N1`: the ranges of a leaf do not ascend, or there are none.
    Leaf(u64),
    /// `N2`: the pivots of an inner node do not ascend, or a child is missing.
    Inner(u64),
    /// `N1`, `N6`: the order of a leaf does not name every slot once, or is not that of a tree that is shared.
    Order(u64),
    /// A range lies outside the pages that its leaf answers for.
    Outside(u64),
    /// `E1`: the boundary above a leaf is not the end of its last range.
    Boundary(u64),
    /// `E2`: the largest gap on record is not the largest gap.
    Gap(u64),
    /// `E2`: the page on record is not the one after the last range.
    Top(u64),
    /// The number of ranges is not [`RangeTree::len`].
    Count(u64),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, page) = match self {
            Self::Leaf(page) => ("ranges of a leaf do not ascend (N1)", page),
            Self::Inner(page) => ("pivots of an inner node do not ascend (N2)", page),
            Self::Order(page) => ("the order of a leaf is none (N1, N6)", page),
            Self::Outside(page) => ("a range lies outside of its leaf", page),
            Self::Boundary(page) => ("a boundary is not the end of a range (E1)", page),
            Self::Gap(page) => ("a recorded gap is wrong (E2)", page),
            Self::Top(page) => ("the end of the last range is recorded wrong (E2)", page),
            Self::Count(count) => return write!(f, "{count} ranges were counted"),
        };
        write!(f, "{what}, near page {page:#x}")
    }
}

impl core::error::Error for Broken {}

/// How full a tree is.
///
/// `Display` prints it as a small table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TreeStats {
    /// Ranges.
    pub ranges: usize,
    /// Levels of nodes.
    pub height: usize,
    /// Leaves.
    pub leaves: usize,
    /// Inner nodes.
    pub inner: usize,
    /// Children of all inner nodes.
    pub children: usize,
    /// Spare nodes that the tree keeps for its next edits.
    pub spare: usize,
    /// Nodes taken out of the tree that readers may still look at.
    pub garbage: usize,
    /// Bytes of a node.
    pub node_bytes: usize,
    /// Ranges that a leaf holds.
    pub ranges_per_leaf: usize,
}

impl TreeStats {
    /// Bytes of the nodes in the tree.
    #[must_use]
    pub fn bytes(&self) -> usize {
        (self.leaves + self.inner) * self.node_bytes
    }

    /// Occupied places of the leaves, in percent.
    #[must_use]
    pub fn fill_percent(&self) -> usize {
        (self.ranges * 100)
            .checked_div(self.leaves * self.ranges_per_leaf)
            .unwrap_or(0)
    }

    /// Bytes of tree per range, in hundredths.
    #[must_use]
    pub fn centibytes_per_range(&self) -> usize {
        (self.bytes() * 100).checked_div(self.ranges).unwrap_or(0)
    }
}

impl fmt::Display for TreeStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_range = self.centibytes_per_range();
        writeln!(f, "ranges        {:>8}", self.ranges)?;
        writeln!(f, "height        {:>8}", self.height)?;
        writeln!(f, "leaves        {:>8}", self.leaves)?;
        writeln!(f, "inner nodes   {:>8}", self.inner)?;
        writeln!(f, "leaf fill     {:>7}%", self.fill_percent())?;
        writeln!(f, "bytes         {:>8}", self.bytes())?;
        writeln!(
            f,
            "bytes/range   {:>5}.{:02}",
            per_range / 100,
            per_range % 100
        )?;
        writeln!(f, "spare nodes   {:>8}", self.spare)?;
        write!(f, "garbage nodes {:>8}", self.garbage)
    }
}

/// A node on a walk, with the pages it answers for.
pub(crate) struct Visit<'a, const W: usize> {
    pub(crate) node: &'a Node<W>,
    pub(crate) level: usize,
    pub(crate) low: u64,
    pub(crate) high: u64,
    /// The gap that its parent has on record; `None` at the root.
    pub(crate) recorded: Option<u32>,
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// Visits every node, parents before children, ascending, until `visit` says no.
    pub(crate) fn walk<E>(
        &self,
        visit: &mut dyn FnMut(&Visit<'_, W>) -> Result<(), E>,
    ) -> Result<(), E> {
        let root = self.root_word();
        let Some(node) = from_word::<W>(root) else {
            return Ok(());
        };
        let top = ((root & HEIGHT_MASK) as usize - 1).min(MAX_HEIGHT - 1);
        let mut nodes: [NodePtr<W>; MAX_HEIGHT] = [node; MAX_HEIGHT];
        let mut next = [0_usize; MAX_HEIGHT];
        let mut bounds = [(0, Page::MAX.number()); MAX_HEIGHT];
        let mut recorded = None;
        let mut level = top;
        let mut fresh = true;
        loop {
            // SAFETY: nobody edits while `&self` of this tree is out, so the nodes stay.
            let node = unsafe { nodes[level].as_ref() };
            let (low, high) = bounds[level];
            if fresh {
                visit(&Visit {
                    node,
                    level,
                    low,
                    high,
                    recorded,
                })?;
            }
            let slot = next[level];
            if level > 0
                && slot < node.children()
                && let Some(child) = node.child(slot)
            {
                next[level] += 1;
                recorded = Some(node.gap(slot));
                level -= 1;
                nodes[level] = child;
                next[level] = 0;
                bounds[level] = (node.first_of(slot, low), node.last_of(slot, high));
                fresh = true;
            } else if level == top {
                return Ok(());
            } else {
                level += 1;
                fresh = false;
            }
        }
    }

    /// Checks every invariant of the tree.
    ///
    /// # Errors
    ///
    /// The first invariant that does not hold.
    #[doc(alias = "mt_validate")]
    #[doc(alias = "validate_mm")]
    pub fn check(&self) -> Result<(), Broken> {
        let mut count = 0;
        self.walk(&mut |at| {
            let is_last = at.high == Page::MAX.number();
            let gap = if at.level == 0 {
                let leaf = at.node.leaf();
                let order = leaf.order();
                let in_place = !S::SHARED || order == Node::<W>::SORTED;
                if !order.is_whole(Node::<W>::RANGES) || !in_place {
                    return Err(Broken::Order(at.low));
                }
                if leaf.count() == 0 || leaf.count() > Node::<W>::RANGES {
                    return Err(Broken::Leaf(at.low));
                }
                let mut free = at.low;
                for slot in 0..leaf.count() {
                    let (first, last) = leaf.range(slot);
                    if last < first || first < free {
                        return Err(if slot == 0 {
                            Broken::Outside(first)
                        } else {
                            Broken::Leaf(first)
                        });
                    }
                    if last > at.high {
                        return Err(Broken::Outside(last));
                    }
                    free = last + 1;
                }
                if leaf.rank(Page::MAX.number()) != leaf.count() {
                    return Err(Broken::Leaf(at.low));
                }
                if !is_last && free != at.high + 1 {
                    return Err(Broken::Boundary(at.high));
                }
                count += leaf.count();
                saturate(leaf.largest_gap(at.low))
            } else {
                let children = at.node.children();
                if children == 0 || children > Node::<W>::CHILDREN {
                    return Err(Broken::Inner(at.low));
                }
                let mut low = at.low;
                for slot in 0..children {
                    let last = at.node.last_of(slot, at.high);
                    let is_final = slot + 1 == children;
                    if last < low || at.node.child(slot).is_none() || (last == at.high) != is_final
                    {
                        return Err(Broken::Inner(last));
                    }
                    low = last + 1;
                }
                if at.node.child_for(Page::MAX.number()) != children - 1 {
                    return Err(Broken::Inner(at.low));
                }
                at.node.largest_child_gap()
            };
            if at.recorded.is_some_and(|recorded| recorded != gap) {
                return Err(Broken::Gap(at.low));
            }
            Ok(())
        })?;
        let top = self.last().map_or(0, |last| last.last().number() + 1);
        if self.top() != top {
            return Err(Broken::Top(top));
        }
        if count == self.len() {
            Ok(())
        } else {
            Err(Broken::Count(count as u64))
        }
    }

    /// How full the tree is.
    #[must_use]
    pub fn stats(&self) -> TreeStats {
        let mut stats = TreeStats {
            height: self.height(),
            spare: self.stock.spares(),
            garbage: self.stock.garbage(),
            node_bytes: size_of::<Node<W>>(),
            ranges_per_leaf: Node::<W>::RANGES,
            ..TreeStats::default()
        };
        let walked: Result<(), ()> = self.walk(&mut |at| {
            if at.level == 0 {
                stats.leaves += 1;
                stats.ranges += at.node.leaf().count();
            } else {
                stats.inner += 1;
                stats.children += at.node.children();
            }
            Ok(())
        });
        debug_assert!(walked.is_ok());
        stats
    }
}

//! After the change: what was in the nodes that were replaced is shown, and they are retired.

use super::rebuild::Drawn;
use super::{Cut, show};
use crate::node::{Node, NodePtr};
use crate::path::{MAX_HEIGHT, Path};
use crate::stock::Sharing;
use crate::tree::RangeTree;
use crate::value::{Entry, Value};
use kmem_hal::ObjectAlloc;

/// The nodes that an edit replaced: those below level `top` that lie on or between two paths, or were drawn in.
///
/// They are as they were: what replaced them is new (`E3`, and nodes are copied, never changed). They are retired when the value is
/// dropped, also where a caller who is shown their ranges unwinds.
pub(super) struct Old<'t, V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> {
    pub(super) tree: &'t RangeTree<V, A, S, W>,
    pub(super) before: &'t Path<W>,
    pub(super) after: &'t Path<W>,
    pub(super) top: usize,
    pub(super) drawn: &'t [Drawn; MAX_HEIGHT],
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Old<'_, V, A, S, W> {
    /// How many ranges lay from position `from` of the first leaf up to (not including) `to` of the last.
    pub(super) fn ranges(&self, from: usize, to: usize) -> usize {
        let (first, last) = (self.before.pointer(0), self.after.pointer(0));
        if first == last {
            return to - from;
        }
        let mut ranges = 0;
        self.walk(&mut |level, node| {
            if level == 0 && node != last {
                // SAFETY: K1: the node was in the tree and is not retired yet.
                ranges += unsafe { node.as_ref() }.leaf().count();
            }
        });
        ranges - from + to
    }

    /// Shows the ranges that the cut removed, ascending.
    pub(super) fn show(&self, cut: &Cut, removed: &mut dyn FnMut(Entry<V>)) {
        self.walk(&mut |level, node| {
            if level > 0 {
                return;
            }
            // SAFETY: K1: the node was in the tree and is not retired yet.
            let leaf = unsafe { node.as_ref() }.leaf();
            for raw in leaf.raws(leaf.first_at_or_after(cut.first), leaf.count()) {
                if raw.first > cut.last {
                    break;
                }
                show(raw, cut, removed);
            }
        });
    }

    /// Visits the nodes on and between the paths, children before parents, ascending. The visitor may retire a node.
    fn walk(&self, visit: &mut dyn FnMut(usize, NodePtr<W>)) {
        let (before, after, top) = (self.before, self.after, self.top);
        let mut nodes = [before.pointer(top - 1); MAX_HEIGHT];
        let mut next = [0_usize; MAX_HEIGHT];
        let mut ends = [0_usize; MAX_HEIGHT];
        let enter = |level: usize, node: NodePtr<W>| {
            if level == 0 {
                return (0, 0);
            }
            let start = if node == before.pointer(level) {
                before.slot(level)
            } else {
                0
            };
            let end = if node == after.pointer(level) {
                after.slot(level) + 1
            } else {
                // SAFETY: K1: the node was in the tree and is not retired yet.
                unsafe { node.as_ref() }.children()
            };
            (start, end)
        };
        let mut level = top - 1;
        (next[level], ends[level]) = enter(level, nodes[level]);
        loop {
            // SAFETY: K1: the node was in the tree and is not retired yet.
            let node = unsafe { nodes[level].as_ref() };
            if next[level] < ends[level]
                && let Some(child) = node.child(next[level])
            {
                next[level] += 1;
                level -= 1;
                nodes[level] = child;
                (next[level], ends[level]) = enter(level, child);
                continue;
            }
            visit(level, nodes[level]);
            level += 1;
            if level == top {
                return;
            }
        }
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Drop for Old<'_, V, A, S, W> {
    fn drop(&mut self) {
        let (before, after) = (self.before, self.after);
        // Which neighbours were drawn in is read from the old parents, before those are retired.
        for (level, which) in self.drawn.iter().enumerate().take(self.top) {
            let (parent, slot) = match which {
                Drawn::Nothing => continue,
                Drawn::Below => (before.node(level + 1), before.slot(level + 1) - 1),
                Drawn::Above => (after.node(level + 1), after.slot(level + 1) + 1),
            };
            if let Some(node) = parent.child(slot) {
                self.tree.retire(node);
            }
        }
        self.walk(&mut |_, node| self.tree.retire(node));
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// Retires every node between the paths, which are the tree's ends.
    pub(crate) fn sweep_all(&self, before: &Path<W>, after: &Path<W>) {
        drop(Old {
            tree: self,
            before,
            after,
            top: before.height(),
            drawn: &[Drawn::Nothing; MAX_HEIGHT],
        });
    }
}

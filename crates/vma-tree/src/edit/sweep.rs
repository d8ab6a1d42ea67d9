//! After the change: the nodes that were replaced are visited once, shown and retired.

use super::rebuild::Drawn;
use super::{Cut, show};
use crate::node::Node;
use crate::node::NodePtr;
use crate::path::{MAX_HEIGHT, Path};
use crate::stock::Sharing;
use crate::tree::RangeTree;
use crate::value::{Entry, Value};
use kmem_hal::ObjectAlloc;

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// Retires every node between the paths, which are the tree's ends.
    pub(crate) fn sweep_all(&self, before: &Path<W>, after: &Path<W>) {
        let cut = Cut {
            first: 0,
            last: u64::MAX,
            value: None,
            shown: (0, u64::MAX),
        };
        let drawn = [Drawn::Nothing; MAX_HEIGHT];
        self.sweep(before, after, before.height(), &drawn, &cut, None);
    }

    /// Shows the ranges of the old tree that the cut removed and retires every node below `top` that lies on or between
    /// the paths, or was drawn in; gives how many ranges the cut touched (0 where nobody wants to see them).
    ///
    /// The old nodes are as they were: what replaced them is new (`E3`, and nodes are copied, never changed).
    pub(super) fn sweep(
        &self,
        before: &Path<W>,
        after: &Path<W>,
        top: usize,
        drawn: &[Drawn; MAX_HEIGHT],
        cut: &Cut,
        mut removed: Option<&mut dyn FnMut(Entry<V>)>,
    ) -> usize {
        // Which neighbours were drawn in is read from the old parents, before anything is retired.
        for (level, which) in drawn.iter().enumerate().take(top) {
            let (parent, slot) = match which {
                Drawn::Nothing => continue,
                Drawn::Below => (before.node(level + 1), before.slot(level + 1) - 1),
                Drawn::Above => (after.node(level + 1), after.slot(level + 1) + 1),
            };
            if let Some(node) = parent.child(slot) {
                self.retire(node);
            }
        }
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
        let mut touched = 0;
        (next[level], ends[level]) = enter(level, nodes[level]);
        loop {
            // SAFETY: K1: the node was in the tree and is not retired yet.
            let node = unsafe { nodes[level].as_ref() };
            if level == 0 {
                if let Some(removed) = &mut removed {
                    let leaf = node.leaf();
                    for raw in leaf.raws(leaf.first_at_or_after(cut.first), leaf.count()) {
                        if raw.first > cut.last {
                            break;
                        }
                        touched += 1;
                        show(raw, cut, removed);
                    }
                }
            } else if next[level] < ends[level]
                && let Some(child) = node.child(next[level])
            {
                next[level] += 1;
                level -= 1;
                nodes[level] = child;
                (next[level], ends[level]) = enter(level, child);
                continue;
            }
            self.retire(nodes[level]);
            level += 1;
            if level == top {
                return touched;
            }
        }
    }
}

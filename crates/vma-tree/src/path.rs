//! The way from the root to a leaf, and how the largest gaps along it are kept.
//!
//! Level 0 is the leaf, level `height - 1` the root. A path belongs to whoever may edit the tree, or to a tree that
//! nobody edits: it holds no claim on the nodes.

use core::mem::MaybeUninit;

use kmem_hal::Page;

use crate::node::{Leaf, Node, NodePtr, from_word};

/// More levels than a tree in any memory has: with 4 children at least, 16 levels are 2^32 nodes or 1 TiB of them.
pub(crate) const MAX_HEIGHT: usize = 16;

/// The low bits of the root's word: the number of levels.
pub(crate) const HEIGHT_MASK: u64 = 63;

pub(crate) struct Path<const W: usize> {
    nodes: [MaybeUninit<NodePtr<W>>; MAX_HEIGHT],
    slots: [u8; MAX_HEIGHT],
    height: usize,
    /// The first page that the leaf answers for.
    pub(crate) low: u64,
    /// The last page that the leaf answers for.
    pub(crate) high: u64,
}

impl<const W: usize> Path<W> {
    /// The way to the leaf that answers for `page`; `None` in an empty tree.
    ///
    /// # Safety
    ///
    /// `root` is the word of a tree whose nodes are alive and not edited by anybody else while the path is used.
    #[inline(always)]
    pub(crate) unsafe fn new(root: u64, page: u64) -> Option<Self> {
        let mut path = Self {
            nodes: [const { MaybeUninit::uninit() }; MAX_HEIGHT],
            slots: [0; MAX_HEIGHT],
            height: (root & HEIGHT_MASK) as usize,
            low: 0,
            high: Page::MAX.number(),
        };
        let mut node = from_word(root)?;
        let mut level = path.height - 1;
        while level > 0 {
            // SAFETY: N4, and the contract: the node is alive.
            let inner: &Node<W> = unsafe { node.as_ref() };
            let slot = inner.child_for(page);
            path.low = inner.first_of(slot, path.low);
            path.high = inner.last_of(slot, path.high);
            path.nodes[level].write(node);
            path.slots[level] = slot as u8;
            node = inner.child(slot)?;
            level -= 1;
        }
        path.nodes[0].write(node);
        Some(path)
    }

    /// Number of levels.
    #[inline(always)]
    pub(crate) fn height(&self) -> usize {
        self.height
    }

    /// The pointer to the node at `level`.
    #[inline(always)]
    pub(crate) fn pointer(&self, level: usize) -> NodePtr<W> {
        debug_assert!(level < self.height);
        // SAFETY: `new` wrote every level below the height.
        unsafe { self.nodes[level].assume_init() }
    }

    /// The node at `level`.
    #[inline(always)]
    pub(crate) fn node(&self, level: usize) -> &Node<W> {
        // SAFETY: `new`'s contract: the nodes stay alive while the path is used.
        unsafe { self.nodes[level].assume_init_ref().as_ref() }
    }

    /// The leaf.
    #[inline(always)]
    pub(crate) fn leaf(&self) -> Leaf<'_, W> {
        self.node(0).leaf()
    }

    /// Which child of the node at `level` (1 or above) the path takes.
    #[inline(always)]
    pub(crate) fn slot(&self, level: usize) -> usize {
        usize::from(self.slots[level])
    }

    /// Whether the leaf is the tree's last.
    #[inline(always)]
    pub(crate) fn is_last(&self) -> bool {
        self.high == Page::MAX.number()
    }

    /// The pages that the node at `level` answers for.
    pub(crate) fn bounds(&self, level: usize) -> (u64, u64) {
        let (mut low, mut high) = (0, Page::MAX.number());
        for above in (level + 1..self.height).rev() {
            let (inner, slot) = (self.node(above), self.slot(above));
            low = inner.first_of(slot, low);
            high = inner.last_of(slot, high);
        }
        (low, high)
    }

    /// The largest gap that the leaf's parent has on record for it; `None` where the leaf is the root.
    #[inline]
    pub(crate) fn recorded_gap(&self) -> Option<u32> {
        (self.height > 1).then(|| self.node(1).gap(self.slot(1)))
    }

    /// Records the largest gap of the child that the path takes at `level`, and what follows from it above.
    pub(crate) fn record_gap(&self, level: usize, mut gap: u32) {
        for level in level..self.height {
            let (inner, slot) = (self.node(level), self.slot(level));
            let old = inner.gap(slot);
            if old == gap {
                return;
            }
            inner.set_gap(slot, gap);
            if level + 1 == self.height {
                return;
            }
            let recorded = self.node(level + 1).gap(self.slot(level + 1));
            if gap < recorded {
                if old < recorded {
                    return;
                }
                gap = inner.largest_child_gap();
            }
        }
    }

    /// Moves the boundary above the child taken at `level` down to `last`, wherever it is kept.
    pub(crate) fn lower_boundary(&self, level: usize, last: u64) {
        for level in level..self.height {
            let (inner, slot) = (self.node(level), self.slot(level));
            if slot + 1 < inner.children() {
                inner.set_last_of(slot, last);
                return;
            }
        }
    }

    /// Steps to the next leaf upwards; `false` (and nothing changed) after the last.
    #[inline]
    pub(crate) fn next_leaf(&mut self) -> bool {
        for level in 1..self.height {
            let slot = self.slot(level) + 1;
            if slot < self.node(level).children() {
                self.slots[level] = slot as u8;
                return self.fall(level, false);
            }
        }
        false
    }

    /// Steps to the next leaf downwards; `false` (and nothing changed) before the first.
    #[inline]
    pub(crate) fn previous_leaf(&mut self) -> bool {
        for level in 1..self.height {
            if let Some(slot) = self.slot(level).checked_sub(1) {
                self.slots[level] = slot as u8;
                return self.fall(level, true);
            }
        }
        false
    }

    /// Goes down from the slot taken at `level`, to the first or the last leaf below. The bounds are not kept.
    fn fall(&mut self, mut level: usize, to_last: bool) -> bool {
        while level > 0 {
            let Some(child) = self.node(level).child(self.slot(level)) else {
                return false;
            };
            level -= 1;
            self.nodes[level].write(child);
            if level > 0 {
                self.slots[level] = if to_last {
                    (self.node(level).children() - 1) as u8
                } else {
                    0
                };
            }
        }
        true
    }
}

//! The way from the root to a leaf, and how the largest gaps along it are kept.
//!
//! Level 0 is the leaf, level `height - 1` the root. A path belongs to whoever may edit the tree, or to a tree that
//! nobody edits: it holds no claim on the nodes.

use core::mem::MaybeUninit;

use kmem_hal::Page;
use kmem_hal::sync::Ordering;

use crate::node::{Leaf, Node, NodePtr, from_word};

/// More levels than a tree in any memory has: with 4 children at least, 16 levels are 2^32 nodes or 1 TiB of them.
pub(crate) const MAX_HEIGHT: usize = 16;

/// More nodes than a tree in any memory has.
pub(crate) const MAX_NODES: u64 = 1 << 32;

/// The low bits of the root's word: the number of levels.
pub(crate) const HEIGHT_MASK: u64 = 63;

pub(crate) struct Path<const W: usize> {
    nodes: [MaybeUninit<NodePtr<W>>; MAX_HEIGHT],
    slots: [MaybeUninit<u8>; MAX_HEIGHT],
    height: usize,
    /// The pages that the leaf answers for; none where the path leads nowhere.
    low: u64,
    high: u64,
    /// Where in the leaf the last edit left a hole, or 0: a guess (`E4`).
    pub(crate) hole: usize,
}

impl<const W: usize> Path<W> {
    /// A path that leads nowhere yet.
    #[inline(always)]
    pub(crate) const fn unset() -> Self {
        Self {
            nodes: [const { MaybeUninit::uninit() }; MAX_HEIGHT],
            slots: [const { MaybeUninit::uninit() }; MAX_HEIGHT],
            height: 0,
            // Beyond every page.
            low: u64::MAX,
            high: u64::MAX,
            hole: 0,
        }
    }

    /// The way to the leaf that answers for `page`; `None` in an empty tree.
    ///
    /// # Safety
    ///
    /// As [`find`](Self::find).
    #[inline]
    pub(crate) unsafe fn new(root: u64, page: u64) -> Option<Self> {
        let mut path = Self::unset();
        // SAFETY: by contract.
        unsafe { path.find(root, page) }.then_some(path)
    }

    /// Leads the path to the leaf that answers for `page`; `false` (and the path is of no use) in an empty tree.
    ///
    /// # Safety
    ///
    /// `root` is the word of a tree whose nodes are alive and not edited by anybody else while the path is used.
    #[inline(always)]
    pub(crate) unsafe fn find(&mut self, root: u64, page: u64) -> bool {
        let Some(mut node) = from_word(root) else {
            *self = Self::unset();
            return false;
        };
        let height = (root & HEIGHT_MASK) as usize;
        let mut level = height - 1;
        let (mut low, mut high) = (0, Page::MAX.number());
        while level > 0 {
            // SAFETY: N4, and the contract: the node is alive.
            let inner: &Node<W> = unsafe { node.as_ref() };
            let slot = inner.child_for(page);
            self.take(level, node, slot);
            let Some(child) = inner.child(slot) else {
                *self = Self::unset();
                return false;
            };
            node = child;
            // SAFETY: as above.
            unsafe { node.as_ref() }.fetch();
            low = inner.first_of(slot, low);
            high = inner.last_of(slot, high);
            level -= 1;
        }
        self.nodes[0].write(node);
        self.height = height;
        self.hole = 0;
        (self.low, self.high) = (low, high);
        true
    }

    /// Whether the leaf answers for `page`.
    #[inline(always)]
    pub(crate) fn answers(&self, page: u64) -> bool {
        page.wrapping_sub(self.low) <= self.high.wrapping_sub(self.low)
    }

    /// Notes the node at `level` and which of its children is taken.
    #[inline(always)]
    fn take(&mut self, level: usize, node: NodePtr<W>, slot: usize) {
        debug_assert!(level < MAX_HEIGHT);
        // SAFETY: the height is below `MAX_HEIGHT` (no edit makes a tree higher), and levels are below it.
        unsafe {
            self.nodes.get_unchecked_mut(level).write(node);
            self.slots.get_unchecked_mut(level).write(slot as u8);
        }
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
        // SAFETY: `find` wrote every level below the height, which is at most `MAX_HEIGHT`.
        unsafe { self.nodes.get_unchecked(level).assume_init() }
    }

    /// The node at `level`.
    #[inline(always)]
    pub(crate) fn node(&self, level: usize) -> &Node<W> {
        debug_assert!(level < self.height);
        // SAFETY: as in `pointer`; `find`'s contract: the nodes stay alive while the path is used.
        unsafe { self.nodes.get_unchecked(level).assume_init_ref().as_ref() }
    }

    /// Notes that another node took the leaf's place.
    #[inline(always)]
    pub(crate) fn replace_leaf(&mut self, node: NodePtr<W>) {
        self.nodes[0].write(node);
    }

    /// The leaf.
    #[inline(always)]
    pub(crate) fn leaf(&self) -> Leaf<'_, W> {
        self.node(0).leaf()
    }

    /// Which child of the node at `level` (1 or above) the path takes.
    #[inline(always)]
    pub(crate) fn slot(&self, level: usize) -> usize {
        debug_assert!(level > 0 && level < self.height);
        // SAFETY: as in `pointer`: `find` wrote a slot at every level but 0.
        usize::from(unsafe { self.slots.get_unchecked(level).assume_init() })
    }

    /// Whether the leaf is the tree's last.
    #[inline(always)]
    pub(crate) fn is_last(&self) -> bool {
        self.high == Page::MAX.number()
    }

    /// The first page that the leaf answers for.
    #[inline(always)]
    pub(crate) fn low(&self) -> u64 {
        self.low
    }

    /// The last page that the leaf answers for.
    #[inline(always)]
    pub(crate) fn high(&self) -> u64 {
        self.high
    }

    /// Notes that another leaf was put above the present one, below the same parent, and answers for the pages above `last`; the
    /// path leads to it if `above`.
    #[inline]
    pub(crate) fn split(&mut self, upper: NodePtr<W>, last: u64, above: bool) {
        self.hole = 0;
        if above {
            self.take(1, self.pointer(1), self.slot(1) + 1);
            self.replace_leaf(upper);
            self.low = last + 1;
        } else {
            self.high = last;
        }
    }

    /// Notes that the boundary above the leaf was moved.
    pub(crate) fn set_high(&mut self, high: u64) {
        self.high = high;
    }

    /// The pages that the node at `level` answers for. Usually the parent knows both ends.
    #[inline]
    pub(crate) fn bounds(&self, level: usize) -> (u64, u64) {
        let low = (level + 1..self.height)
            .find(|&above| self.slot(above) > 0)
            .map_or(0, |above| self.node(above).first_of(self.slot(above), 0));
        let high = (level + 1..self.height)
            .find(|&above| self.slot(above) + 1 < self.node(above).children())
            .map_or(Page::MAX.number(), |above| {
                self.node(above).last_of(self.slot(above), 0)
            });
        (low, high)
    }

    /// The largest gap that the leaf's parent has on record for it. The leaf is not the root.
    #[inline(always)]
    pub(crate) fn recorded_gap(&self) -> u32 {
        self.node(1).gap(self.slot(1))
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

    /// Moves the boundary above the child taken at `level` to `last`, wherever it is kept.
    pub(crate) fn move_boundary(&self, level: usize, last: u64, order: Ordering) {
        for level in level..self.height {
            let (inner, slot) = (self.node(level), self.slot(level));
            if slot + 1 < inner.children() {
                inner.set_last_of(slot, last, order);
                return;
            }
        }
    }

    /// Steps to the next leaf downwards; `false` (and nothing changed) before the first.
    #[inline]
    pub(crate) fn previous_leaf(&mut self) -> bool {
        for level in 1..self.height {
            if let Some(slot) = self.slot(level).checked_sub(1) {
                self.take(level, self.pointer(level), slot);
                let fell = self.fall(level);
                (self.low, self.high) = self.bounds(0);
                return fell;
            }
        }
        false
    }

    /// Goes down from the slot taken at `level`, to the last leaf below.
    fn fall(&mut self, mut level: usize) -> bool {
        while level > 0 {
            let Some(child) = self.node(level).child(self.slot(level)) else {
                return false;
            };
            level -= 1;
            // SAFETY: N4: a child of a node in the tree is alive; `find`'s contract.
            let node = unsafe { child.as_ref() };
            let slot = if level > 0 { node.children() - 1 } else { 0 };
            self.take(level, child, slot);
        }
        true
    }
}

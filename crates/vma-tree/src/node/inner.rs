//! The inner node: pivots, children, and the largest gap below each child.

use kmem_hal::sync::Ordering;

use super::{Node, NodePtr, UNUSED, from_word, to_word};

/// A child as an inner node describes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Child<const W: usize> {
    pub(crate) node: NodePtr<W>,
    /// The last page that the child answers for.
    pub(crate) last: u64,
    /// The largest gap below it, saturated.
    pub(crate) gap: u32,
}

/// A number of pages as the nodes keep it.
#[inline(always)]
pub(crate) fn saturate(pages: u64) -> u32 {
    u32::try_from(pages).unwrap_or(u32::MAX)
}

impl<const W: usize> Node<W> {
    const PIVOTS: usize = Self::CHILDREN - 1;
    const GAPS: usize = Self::PIVOTS + Self::CHILDREN;

    /// Writes an inner node into a node that no reader can reach.
    pub(crate) fn write_inner(&self, children: &[Child<W>]) {
        for slot in Self::GAPS..W {
            self.set_word(slot, 0);
        }
        for slot in 0..Self::PIVOTS {
            let used = slot + 1 < children.len();
            self.set_word(slot, if used { children[slot].last } else { UNUSED });
        }
        for (slot, child) in children.iter().enumerate() {
            self.set_word(Self::PIVOTS + slot, to_word(child.node));
            self.set_half(slot + 1, child.gap);
        }
        self.set_half(0, children.len() as u32);
    }

    /// Adds a child above those of a node that is not full and that no reader can reach.
    pub(crate) fn append_child(&self, last_of_previous: u64, child: Child<W>) {
        let count = self.children();
        if let Some(below) = count.checked_sub(1) {
            self.set_word(below, last_of_previous);
        }
        self.set_word(Self::PIVOTS + count, to_word(child.node));
        self.set_half(count + 1, child.gap);
        self.set_half(0, count as u32 + 1);
    }

    fn half(&self, index: usize) -> u32 {
        (self.word(Self::GAPS + index / 2) >> (32 * (index & 1))) as u32
    }

    fn set_half(&self, index: usize, value: u32) {
        let shift = 32 * (index & 1);
        let word = self.word(Self::GAPS + index / 2);
        let word = word & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
        self.set_word(Self::GAPS + index / 2, word);
    }

    /// How many children. Only for the writer.
    #[inline(always)]
    pub(crate) fn children(&self) -> usize {
        self.half(0) as usize
    }

    /// The child whose pages contain `page`. No branch depends on a pivot.
    #[inline(always)]
    pub(crate) fn child_for(&self, page: u64) -> usize {
        // One step of a binary search, then all that is left at once: the loads do not wait for each other.
        let step = Self::PIVOTS.div_ceil(2);
        let half = usize::from(self.word(step - 1) < page) * step;
        let mut at = half;
        for next in 0..Self::PIVOTS - step {
            at += usize::from(self.word(half + next) < page);
        }
        at
    }

    /// Child `slot`.
    #[inline(always)]
    pub(crate) fn child(&self, slot: usize) -> Option<NodePtr<W>> {
        from_word(self.at(Self::PIVOTS + slot).load(Ordering::Acquire))
    }

    /// Publishes another node as child `slot`.
    pub(crate) fn set_child(&self, slot: usize, node: NodePtr<W>, order: Ordering) {
        self.at(Self::PIVOTS + slot).store(to_word(node), order);
    }

    /// The last page of child `slot`; `top`, the last page of the node, for its last child.
    #[inline(always)]
    pub(crate) fn last_of(&self, slot: usize, top: u64) -> u64 {
        if slot >= Self::PIVOTS {
            return top;
        }
        let pivot = self.word(slot);
        if pivot == UNUSED { top } else { pivot }
    }

    /// The first page of child `slot`; `low`, the first page of the node, for its first child.
    #[inline(always)]
    pub(crate) fn first_of(&self, slot: usize, low: u64) -> u64 {
        match slot.checked_sub(1) {
            Some(below) => self.word(below) + 1,
            None => low,
        }
    }

    /// Moves the boundary above child `slot`, which is not the last, inside a hole.
    pub(crate) fn set_last_of(&self, slot: usize, last: u64) {
        self.at(slot).store(last, Ordering::Release);
    }

    /// The largest gap below child `slot`.
    #[inline(always)]
    pub(crate) fn gap(&self, slot: usize) -> u32 {
        self.half(slot + 1)
    }

    /// Sets the largest gap below child `slot`. Only for the writer; readers do not look.
    pub(crate) fn set_gap(&self, slot: usize, gap: u32) {
        self.set_half(slot + 1, gap);
    }

    /// The largest gap below the node.
    pub(crate) fn largest_child_gap(&self) -> u32 {
        // Half word 0 is the count; those of children that do not exist are 0.
        let mut largest = (self.word(Self::GAPS) >> 32) as u32;
        for word in Self::GAPS + 1..W {
            let word = self.word(word);
            largest = largest.max(word as u32).max((word >> 32) as u32);
        }
        largest
    }

    /// The children with a gap of at least `need` (not 0) on record, one bit each. No branch depends on a record.
    #[inline]
    pub(crate) fn children_with_gap(&self, need: u32) -> u16 {
        // Half word 0 is the count; those of children that do not exist are 0.
        let mut bits = 0_u32;
        for (half, gap) in self.halves().into_iter().enumerate() {
            bits |= if gap >= need { 1 << half } else { 0 };
        }
        (bits >> 1) as u16
    }

    /// The count and the gap records, unpacked. Only for the writer, who alone looks at them and may read them as plain
    /// memory.
    #[inline(always)]
    fn halves(&self) -> [u32; 14] {
        let mut halves = [0; 14];
        for index in 0..W - Self::GAPS {
            let word = self.leaf_word(Self::GAPS + index);
            halves[2 * index] = word as u32;
            halves[2 * index + 1] = (word >> 32) as u32;
        }
        halves
    }

    /// Child `slot` with its description.
    pub(crate) fn describe(&self, slot: usize, top: u64) -> Option<Child<W>> {
        Some(Child {
            node: self.child(slot)?,
            last: self.last_of(slot, top),
            gap: self.gap(slot),
        })
    }
}

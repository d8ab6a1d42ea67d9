//! The inner node: pivots, children, and the largest gap below each child.

use kmem_hal::sync::Ordering;

use super::{Node, NodePtr, UNUSED, count_above, from_word, to_word};

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
            self.set_word(
                slot,
                if used {
                    children[slot].last + 1
                } else {
                    UNUSED
                },
            );
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
            self.set_word(below, last_of_previous + 1);
        }
        self.set_word(Self::PIVOTS + count, to_word(child.node));
        self.set_half(count + 1, child.gap);
        self.set_half(0, count as u32 + 1);
    }

    /// Puts a child that begins with page `first` above child `slot` of a node that is not full. Not under readers.
    pub(crate) fn insert_child(&self, slot: usize, first: u64, node: NodePtr<W>, gap: u32) {
        let count = self.children();
        for at in (slot + 1..count).rev() {
            self.set_word(at, self.word(at - 1));
            self.set_word(Self::PIVOTS + at + 1, self.word(Self::PIVOTS + at));
        }
        self.set_word(slot, first);
        self.set_word(Self::PIVOTS + slot + 1, to_word(node));
        // The records move up by half a word.
        let place = Self::GAPS + (slot + 2) / 2;
        for word in (place + 1..=Self::GAPS + count.div_ceil(2)).rev() {
            self.set_word(word, self.word(word) << 32 | self.word(word - 1) >> 32);
        }
        if slot.is_multiple_of(2) {
            self.set_word(place, self.word(place) << 32);
        }
        self.set_half(slot + 2, gap);
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
        // All pivots at once: no load waits for another, and the sums hardly do.
        let third = Self::PIVOTS.div_ceil(3);
        let mut above = [0; 3];
        for slot in 0..Self::PIVOTS {
            let sum = &mut above[slot / third];
            *sum = count_above(*sum, self.word(slot), !page);
        }
        Self::PIVOTS - (above[0] + above[1] + above[2]) as usize
    }

    /// Child `slot`, for the writer or where nobody edits.
    #[inline(always)]
    pub(crate) fn child(&self, slot: usize) -> Option<NodePtr<W>> {
        self.child_by(slot, Ordering::Relaxed)
    }

    /// [`child`](Self::child) with a reader's ordering.
    #[inline(always)]
    pub(crate) fn child_by(&self, slot: usize, order: Ordering) -> Option<NodePtr<W>> {
        from_word(self.at(Self::PIVOTS + slot).load(order))
    }

    /// Publishes another node as child `slot`.
    pub(crate) fn set_child(&self, slot: usize, node: NodePtr<W>, order: Ordering) {
        self.at(Self::PIVOTS + slot).store(to_word(node), order);
    }

    /// The last page of child `slot`; `top`, the last page of the node, for its last child.
    #[inline(always)]
    pub(crate) fn last_of(&self, slot: usize, top: u64) -> u64 {
        // No branch: which child it is cannot be foreseen.
        let pivot = self.word(slot.min(Self::PIVOTS - 1));
        let is_last = slot >= Self::PIVOTS || pivot == UNUSED;
        core::hint::select_unpredictable(is_last, top, pivot.wrapping_sub(1))
    }

    /// The first page of child `slot`; `low`, the first page of the node, for its first child.
    #[inline(always)]
    pub(crate) fn first_of(&self, slot: usize, low: u64) -> u64 {
        let below = self.word(slot.saturating_sub(1));
        core::hint::select_unpredictable(slot == 0, low, below)
    }

    /// Moves the boundary above child `slot`, which is not the last, inside a hole.
    pub(crate) fn set_last_of(&self, slot: usize, last: u64, order: Ordering) {
        self.at(slot).store(last + 1, order);
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

    /// The lowest child from `from` on with a gap of at least `need` (not 0) on record.
    #[inline(always)]
    pub(crate) fn first_with_gap(&self, from: usize, need: u32) -> Option<usize> {
        // Half word 0 is the count; those of children that do not exist are 0.
        let half = from + 1;
        let mut word = half / 2;
        let mut two = self.gap_words(word)?;
        if !half.is_multiple_of(2) {
            two &= !u64::from(u32::MAX);
        }
        let upper = u64::from(need) << 32;
        loop {
            if two as u32 >= need {
                return Some(2 * word - 1);
            }
            if two >= upper {
                return Some(2 * word);
            }
            word += 1;
            two = self.gap_words(word)?;
        }
    }

    /// The highest child below `to` with a gap of at least `need` (not 0) on record.
    #[inline(always)]
    pub(crate) fn last_with_gap(&self, to: usize, need: u32) -> Option<usize> {
        let half = to;
        let mut word = half / 2;
        let mut two = self.gap_words(word)?;
        if half.is_multiple_of(2) {
            two &= u64::from(u32::MAX);
        }
        let upper = u64::from(need) << 32;
        loop {
            if two >= upper {
                return Some(2 * word);
            }
            if word == 0 {
                // Half word 0 is the count.
                return None;
            }
            if two as u32 >= need {
                return Some(2 * word - 1);
            }
            word -= 1;
            two = self.gap_words(word)?;
        }
    }

    /// Two gap records, or the count and one. Only for the writer, who alone looks at them and may read them as plain
    /// memory.
    #[inline(always)]
    fn gap_words(&self, word: usize) -> Option<u64> {
        (Self::GAPS + word < W).then(|| self.leaf_word(Self::GAPS + word))
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

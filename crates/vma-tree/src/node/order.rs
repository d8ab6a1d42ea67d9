//! Where the ranges of a leaf lie: their slots, in ascending order, as the nibbles of a word.
//!
//! Source: Mao, Kohler, Morris, "Cache craftiness for fast multicore key-value storage" (Masstree), EuroSys 2012: the
//! permutation word.

/// Where the nibble of a position begins; within the word whatever the position is.
#[inline(always)]
pub(super) fn bits(position: usize) -> u32 {
    (4 * position as u32) & 63
}

/// Which slot each position has: nibble `i` is the slot of the range at position `i`, ascending.
///
/// The nibbles from the number of ranges on are the free slots. So a range is put between two others, or taken out, by
/// turning a few nibbles of one word, and no range moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Order(pub(super) u64);

impl Order {
    /// Every position has the slot of its own number, of so many.
    pub(crate) const fn sorted(slots: usize) -> Self {
        Self(0x0edc_ba98_7654_3210 & ((1 << (4 * slots)) - 1))
    }

    /// The bits of the nibbles below `position`, which is at most 15.
    #[inline(always)]
    fn below(position: usize) -> u64 {
        debug_assert!(position <= 15);
        (1 << bits(position)) - 1
    }

    /// The slot of the range at `position`.
    #[inline(always)]
    pub(super) fn slot(self, position: usize) -> usize {
        ((self.0 >> bits(position)) & 15) as usize
    }

    /// Puts a free slot to `position`: the last of `slots`, which the nibbles above push out of its place.
    #[inline(always)]
    pub(super) fn open(&mut self, position: usize, slots: usize) {
        let below = Self::below(position);
        let free = self.0 >> (4 * (slots - 1));
        let above = ((self.0 & !below) << 4) & Self::below(slots);
        self.0 = (self.0 & below) | above | (free << bits(position));
    }

    /// Makes the slot at `position` free: the last of `slots`.
    #[inline(always)]
    pub(super) fn close(&mut self, position: usize, slots: usize) -> usize {
        let below = Self::below(position);
        let gone = self.slot(position);
        self.0 = (self.0 & below) | ((self.0 >> 4) & !below) | ((gone as u64) << (4 * (slots - 1)));
        gone
    }

    /// Whether every one of `slots` occurs once.
    pub(crate) fn is_whole(self, slots: usize) -> bool {
        let seen = (0..slots).fold(0_u32, |seen, position| seen | 1 << self.slot(position));
        seen == (1 << slots) - 1 && self.0 & !Self::below(slots) == 0
    }
}

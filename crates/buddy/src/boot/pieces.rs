//! A sorted array of disjoint intervals in which the higher rank wins: the core of the boot map.
//!
//! Firmware lists are unsorted, overlap and contradict each other. Each interval that arrives is laid over what is
//! there; where two overlap, the one of the higher rank keeps the bytes. The result does not depend on the order in
//! which the intervals arrive.
//!
//! ```text
//!   have     [---- usable ----)        [-- usable --)
//!   insert            [==== reserved ====)
//!   result   [- usable )[==== reserved ====)[usable )
//! ```
//!
//! Invariants
//! - `I1`: `items[..len]` are sorted by start, disjoint and non-empty.
//! - `I2`: two items that touch have different kinds (merged otherwise).
//! - `I3`: a failed insert changes nothing.
//!
//! Costs: an insert moves the tail of the array; building a map of n intervals is O(n^2) moves, 256 at most.
//! No heap, no recursion.

/// What an interval is; the greater of two wins where they overlap.
pub(crate) trait Rank: Copy + PartialEq {
    /// The kind's precedence.
    fn rank(self) -> u32;
}

/// The half-open interval `start..end` in bytes, and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece<K> {
    pub start: u64,
    pub end: u64,
    pub kind: K,
}

/// Up to `N` disjoint pieces.
#[derive(Clone, Debug)]
pub(crate) struct Pieces<K, const N: usize> {
    items: [Option<Piece<K>>; N],
    len: usize,
}

impl<K: Rank, const N: usize> Pieces<K, N> {
    pub const fn new() -> Self {
        Self {
            items: [const { None }; N],
            len: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn iter(&self) -> impl Iterator<Item = Piece<K>> + Clone + '_ {
        self.items[..self.len].iter().filter_map(|item| *item)
    }

    /// The piece that contains `at`.
    pub fn find(&self, at: u64) -> Option<Piece<K>> {
        let after = self.items[..self.len]
            .partition_point(|item| item.as_ref().is_some_and(|piece| piece.start <= at));
        self.items[..after]
            .last()
            .copied()
            .flatten()
            .filter(|piece| at < piece.end)
    }

    /// Lays `start..end` over the pieces.
    ///
    /// # Errors
    ///
    /// The number of pieces that would be needed, where that is more than `N`.
    pub fn insert(&mut self, start: u64, end: u64, kind: K) -> Result<(), usize> {
        let new = Piece { start, end, kind };
        let growth = self.growth(new);
        if self.len + growth > N {
            return Err(self.len + growth);
        }
        let mut at = start;
        let mut index = self.items[..self.len]
            .partition_point(|item| item.as_ref().is_some_and(|piece| piece.end <= start));
        while at < end {
            match self.get(index) {
                // A gap before the next piece, or after the last one: the new piece fills it.
                next if next.is_none_or(|next| at < next.start) => {
                    let stop = next.map_or(end, |next| end.min(next.start));
                    index = self.fill(
                        index,
                        Piece {
                            start: at,
                            end: stop,
                            kind,
                        },
                    );
                    at = stop;
                }
                None => break,
                // An overlap with a piece that wins or is the same.
                Some(old) if old.kind.rank() >= kind.rank() => {
                    at = old.end;
                    index += 1;
                }
                // An overlap with a piece that loses: up to three parts.
                Some(old) => {
                    let stop = end.min(old.end);
                    if old.start < at {
                        self.place(index, Piece { end: at, ..old });
                        index += 1;
                    }
                    self.items[index] = Some(Piece {
                        start: at,
                        end: stop,
                        kind,
                    });
                    if stop < old.end {
                        self.place(index + 1, Piece { start: stop, ..old });
                    }
                    index += 1;
                    at = stop;
                }
            }
        }
        self.merge();
        Ok(())
    }

    /// Cuts `start..end` out of the pieces of exactly `kind`.
    ///
    /// # Errors
    ///
    /// The number of pieces that would be needed, where that is more than `N`.
    pub fn remove(&mut self, start: u64, end: u64, kind: K) -> Result<(), usize> {
        let inside = self
            .iter()
            .any(|piece| piece.kind == kind && piece.start < start && end < piece.end);
        if inside && self.len == N {
            return Err(N + 1);
        }
        let mut index = 0;
        while let Some(piece) = self.get(index) {
            let (from, to) = (piece.start.max(start), piece.end.min(end));
            if piece.kind != kind || from >= to {
                index += 1;
                continue;
            }
            match (piece.start < from, to < piece.end) {
                (false, false) => {
                    self.items.copy_within(index + 1..self.len, index);
                    self.len -= 1;
                    continue;
                }
                (true, false) => self.items[index] = Some(Piece { end: from, ..piece }),
                (false, true) => self.items[index] = Some(Piece { start: to, ..piece }),
                (true, true) => {
                    self.items[index] = Some(Piece { end: from, ..piece });
                    self.place(index + 1, Piece { start: to, ..piece });
                }
            }
            index += 1;
        }
        Ok(())
    }

    fn get(&self, index: usize) -> Option<Piece<K>> {
        self.items[..self.len].get(index).copied().flatten()
    }

    /// Puts a piece at `index`, moving the tail up. `insert` has checked the room.
    fn place(&mut self, index: usize, piece: Piece<K>) {
        self.items.copy_within(index..self.len, index + 1);
        self.items[index] = Some(piece);
        self.len += 1;
    }

    /// Fills the gap before `index`: by a neighbour of the same kind that touches it, else by a new piece; the index of what follows.
    fn fill(&mut self, index: usize, piece: Piece<K>) -> usize {
        let left = index.checked_sub(1).and_then(|left| self.get(left));
        if let Some(left) = left.filter(|left| left.end == piece.start && left.kind == piece.kind) {
            self.items[index - 1] = Some(Piece {
                end: piece.end,
                ..left
            });
            return index;
        }
        let right = self.get(index);
        if let Some(right) =
            right.filter(|right| right.start == piece.end && right.kind == piece.kind)
        {
            self.items[index] = Some(Piece {
                start: piece.start,
                ..right
            });
            return index;
        }
        self.place(index, piece);
        index + 1
    }

    /// How many pieces laying `new` over the others adds at most, before merging.
    fn growth(&self, new: Piece<K>) -> usize {
        let mut growth = 0;
        let mut at = new.start;
        // What the piece that ends at `at` will be.
        let mut left: Option<K> = None;
        let mut right: Option<K> = None;
        for old in self.iter().filter(|old| old.end >= new.start) {
            if old.end == new.start {
                left = Some(old.kind);
                continue;
            }
            if old.start >= new.end {
                right = (old.start == new.end).then_some(old.kind);
                break;
            }
            if at < old.start && left != Some(new.kind) && old.kind != new.kind {
                growth += 1;
            }
            left = Some(old.kind);
            if old.kind.rank() < new.kind.rank() {
                growth += usize::from(old.start < new.start) + usize::from(new.end < old.end);
                left = Some(new.kind);
            }
            at = old.end;
        }
        let last = at < new.end && left != Some(new.kind) && right != Some(new.kind);
        growth + usize::from(last)
    }

    /// Joins neighbours of one kind (`I2`).
    fn merge(&mut self) {
        let mut kept = 0;
        for index in 1..self.len {
            match (self.items[kept], self.items[index]) {
                (Some(left), Some(right)) if left.end == right.start && left.kind == right.kind => {
                    self.items[kept] = Some(Piece {
                        end: right.end,
                        ..left
                    });
                }
                (_, right) => {
                    kept += 1;
                    self.items[kept] = right;
                }
            }
        }
        if self.len > 0 {
            self.len = kept + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Kind(u32);
    impl Rank for Kind {
        fn rank(self) -> u32 {
            self.0
        }
    }

    /// Every list of three intervals over 8 bytes with ranks 0..3, against one byte at a time.
    #[test]
    fn agrees_with_bytes() {
        let mut seed = 1u64;
        let mut random = move |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        for _ in 0..20_000 {
            let mut pieces = Pieces::<Kind, 32>::new();
            let mut bytes = [None; 40];
            for _ in 0..random(9) {
                let start = random(39);
                let end = start + 1 + random(39 - start);
                let kind = random(3) as u32;
                if random(4) == 0 {
                    pieces.remove(start, end, Kind(kind)).unwrap();
                    for byte in &mut bytes[start as usize..end as usize] {
                        if *byte == Some(kind) {
                            *byte = None;
                        }
                    }
                } else {
                    pieces.insert(start, end, Kind(kind)).unwrap();
                    for byte in &mut bytes[start as usize..end as usize] {
                        *byte = (*byte).max(Some(kind));
                    }
                }
            }
            for (at, byte) in bytes.iter().enumerate() {
                let found = pieces.find(at as u64).map(|piece| piece.kind.0);
                assert_eq!(found, *byte, "byte {at} of {pieces:?}");
            }
            let mut previous: Option<Piece<Kind>> = None;
            for piece in pieces.iter() {
                assert!(piece.start < piece.end);
                if let Some(left) = previous {
                    assert!(left.end <= piece.start);
                    assert!(
                        left.end < piece.start || left.kind != piece.kind,
                        "{pieces:?}"
                    );
                }
                previous = Some(piece);
            }
        }
    }

    #[test]
    fn full_names_the_count_and_changes_nothing() {
        let mut pieces = Pieces::<Kind, 2>::new();
        pieces.insert(0, 10, Kind(0)).unwrap();
        assert_eq!(pieces.insert(4, 5, Kind(1)), Err(3));
        assert_eq!(pieces.len(), 1);
        assert_eq!(pieces.remove(4, 5, Kind(0)), Ok(()));
        assert_eq!(pieces.remove(7, 8, Kind(0)), Err(3));
        assert_eq!(pieces.len(), 2);
    }
}

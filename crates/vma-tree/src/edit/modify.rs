//! Giving what is in a range other values, piece by piece.
//!
//! Each piece is an edit of its own. So that none fails half-way, the nodes for all of them are taken before the first, where
//! there are several.

use kmem_hal::{AllocError, ObjectAlloc, PageRange};

use super::merge::{part_above, part_below};
use crate::node::Node;
use crate::reserve::Held;
use crate::stock::Sharing;
use crate::store::{Change, MergeRule, Neighbours};
use crate::tree::RangeTree;
use crate::value::Value;

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// `modify_by` for the one writer.
    pub(crate) fn rewrite(
        &self,
        range: PageRange,
        change: Change<'_, V>,
        merge: MergeRule<'_, V>,
    ) -> Result<(), AllocError> {
        let mut pieces = self.range(range).take(2).count();
        let mut _held = None;
        if pieces > 1 {
            // Each piece may need a new leaf of its own; those that reach over leaves need a path's worth.
            pieces = self.range(range).count();
            let need = 2 * pieces + (pieces / 4 + 3) * (3 * self.height() + 4);
            _held = Some(Held::new(self, need)?);
        }
        self.rewrite_each(range, change, merge)
    }

    fn rewrite_each(
        &self,
        range: PageRange,
        change: Change<'_, V>,
        merge: MergeRule<'_, V>,
    ) -> Result<(), AllocError> {
        let mut left = range;
        while let Some(found) = self.first_at_or_after(left.first()) {
            let Some(piece) = found.clipped(left) else {
                break;
            };
            let around = Neighbours {
                below: part_below(found, piece.first()).or_else(|| self.last_before(piece.first())),
                above: part_above(found, piece.last()).or_else(|| {
                    let next = piece.last().checked_add(1)?;
                    self.first_at_or_after(next)
                }),
            };
            match change(piece, around) {
                Some(value) => {
                    // A piece that is a whole entry, keeps its value and merges with nobody stays as it is.
                    let same =
                        value.to_word() == found.value.to_word() && piece.range == found.range;
                    let alone = around.below.is_none_or(|below| !below.touches(&found))
                        && around.above.is_none_or(|above| !found.touches(&above));
                    if !(same && alone) {
                        self.write_merged(piece.range, value, &mut |_| (), &mut *merge)?;
                    }
                }
                None => self.write(piece.range, None, &mut |_| ())?,
            }
            let next = piece.last().checked_add(1);
            match next.and_then(|next| PageRange::new(next, range.last())) {
                Some(rest) => left = rest,
                None => break,
            }
        }
        Ok(())
    }
}

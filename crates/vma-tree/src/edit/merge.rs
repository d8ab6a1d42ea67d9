//! A store that merges: the new range and what touches it below and above become one, where the rule says so.
//!
//! ```text
//!   [aaa][ new ] . [c]         the rule is asked for (a, new), then for (what came of it, c) if those touch
//!   [aaaaaaaaaa] . [c]         one edit: no reader sees a range that was stored and not merged yet
//! ```
//!
//! The neighbours lie in the leaf of the range's first page, but where the range reaches an end of the leaf. Those few are
//! looked up, and the range as it is merged is spliced like any other.

use kmem_hal::{AllocError, ObjectAlloc, Page, PageRange};

use super::leaf::Hole;
use super::{Cut, entry};
use crate::node::{Node, Raw};
use crate::path::Path;
use crate::stock::Sharing;
use crate::store::Removed;
use crate::tree::RangeTree;
use crate::value::{Entry, Value};

/// `entry` below `page`.
pub(super) fn part_below<V: Value>(entry: Entry<V>, page: Page) -> Option<Entry<V>> {
    let last = page.checked_sub(1)?.min(entry.last());
    entry.clipped(PageRange::new(entry.first(), last)?)
}

/// `entry` above `page`.
pub(super) fn part_above<V: Value>(entry: Entry<V>, page: Page) -> Option<Entry<V>> {
    entry.clipped(PageRange::new(page.checked_add(1)?, entry.last())?)
}

/// Two entries that touch, as one with this value.
#[inline(always)]
fn joined<V: Value>(below: &Entry<V>, above: &Entry<V>, value: V) -> Entry<V> {
    entry(Raw {
        first: below.first().number(),
        last: above.last().number(),
        value: value.to_word(),
    })
}

/// Lets `middle` grow over `below`, which touches it, where the rule says so.
#[inline(always)]
fn join_below<V: Value, M>(middle: &mut Entry<V>, below: &Entry<V>, merge: &mut M) -> bool
where
    M: FnMut(&Entry<V>, &Entry<V>) -> Option<V> + ?Sized,
{
    let Some(value) = merge(below, middle) else {
        return false;
    };
    *middle = joined(below, middle, value);
    true
}

/// Lets `middle` grow over `above`, which touches it, where the rule says so.
#[inline(always)]
fn join_above<V: Value, M>(middle: &mut Entry<V>, above: &Entry<V>, merge: &mut M) -> bool
where
    M: FnMut(&Entry<V>, &Entry<V>) -> Option<V> + ?Sized,
{
    let Some(value) = merge(middle, above) else {
        return false;
    };
    *middle = joined(middle, above, value);
    true
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// `store_merged_by` for the one writer.
    #[inline]
    pub(crate) fn write_merged<M>(
        &self,
        range: PageRange,
        value: V,
        removed: Removed<'_, V>,
        merge: &mut M,
    ) -> Result<Entry<V>, AllocError>
    where
        M: FnMut(&Entry<V>, &Entry<V>) -> Option<V> + ?Sized,
    {
        self.admit()?;
        let mut middle = Entry { range, value };
        let first = range.first().number();
        self.with_finger(|path| {
            if self.aim(path, first) {
                self.merge_at(path, &mut middle, removed, merge)
            } else {
                Ok(false)
            }
        })
        .and_then(|done| {
            if done {
                Ok(middle)
            } else {
                self.write_merged_across(range, value, removed, merge)
            }
        })
    }

    /// [`write_merged`](Self::write_merged) where the way to the range's first page is known. Makes `middle` the range as
    /// it is merged; `false`, and nothing has changed, where neighbours may lie in other leaves.
    #[inline(always)]
    fn merge_at<M>(
        &self,
        path: &mut Path<W>,
        middle: &mut Entry<V>,
        removed: Removed<'_, V>,
        merge: &mut M,
    ) -> Result<bool, AllocError>
    where
        M: FnMut(&Entry<V>, &Entry<V>) -> Option<V> + ?Sized,
    {
        let range = middle.range;
        let (first, last) = (range.first().number(), range.last().number());
        let leaf = path.leaf();
        if let Some(hole) = Hole::left_by_last_edit(path, &leaf, (first, last)) {
            return self.merge_in_hole(path, middle, &hole, removed, merge);
        }
        let rank = leaf.rank(first);
        if let Some(hole) = Hole::find(path, &leaf, rank, (first, last)) {
            return self.merge_in_hole(path, middle, &hole, removed, merge);
        }
        self.merge_ranked(path, middle, rank, removed, merge)
    }

    /// [`merge_at`](Self::merge_at) where the range lies in a hole of the leaf.
    #[inline(always)]
    fn merge_in_hole<M>(
        &self,
        path: &mut Path<W>,
        middle: &mut Entry<V>,
        hole: &Hole,
        removed: Removed<'_, V>,
        merge: &mut M,
    ) -> Result<bool, AllocError>
    where
        M: FnMut(&Entry<V>, &Entry<V>) -> Option<V> + ?Sized,
    {
        let leaf = path.leaf();
        let (first, last) = (middle.first().number(), middle.last().number());
        let at = hole.at;
        let mut lower = false;
        if hole.low == first {
            if at > 0 {
                lower = join_below(middle, &entry(leaf.raw(at - 1)), merge);
            } else if first > 0 {
                // The range below is another leaf's.
                return Ok(false);
            }
        }
        let mut upper = false;
        if last + 1 == hole.end && at < leaf.count() {
            upper = join_above(middle, &entry(leaf.raw(at)), merge);
        }
        let grown = Raw {
            first: middle.first().number(),
            last: middle.last().number(),
            value: middle.value.to_word(),
        };
        if lower && upper {
            // A leaf that would hold too little is joined with its neighbour below.
            let enough = leaf.count() > Node::<W>::LEAF_LOW || path.height() == 1;
            if enough && leaf.fits_pages(grown.last - grown.first) {
                self.heal(path, hole, grown)?;
                return Ok(true);
            }
        } else if lower || upper {
            if leaf.fits(grown.first, grown.last) {
                let at = at - usize::from(lower);
                self.fill(path, at, grown, (hole, (first, last)))?;
                return Ok(true);
            }
        } else if self.has_room(&leaf, (first, last)) {
            self.insert(path, hole, (first, last), grown.value)?;
            return Ok(true);
        } else if leaf.fits(first, last) {
            if self.insert_split(path, hole, (first, last), grown.value)? {
                return Ok(true);
            }
        } else if self.insert_apart(path, hole, (first, last), grown.value)? {
            return Ok(true);
        }
        let cut = Cut {
            first: grown.first,
            last: grown.last,
            value: Some(grown.value),
            shown: (first, last),
        };
        let touched = (at - usize::from(lower), at + usize::from(upper));
        self.edit_merged(path, &cut, touched, removed)?;
        Ok(true)
    }

    /// [`merge_at`](Self::merge_at) for the rest of the cases: `rank` ranges begin at or below the range's first page.
    #[inline(never)]
    fn merge_ranked<M>(
        &self,
        path: &mut Path<W>,
        middle: &mut Entry<V>,
        rank: usize,
        removed: Removed<'_, V>,
        merge: &mut M,
    ) -> Result<bool, AllocError>
    where
        M: FnMut(&Entry<V>, &Entry<V>) -> Option<V> + ?Sized,
    {
        let range = middle.range;
        let (first, last) = (range.first().number(), range.last().number());
        let leaf = path.leaf();
        let (mut from, mut to) = leaf.touched(rank, first, last);
        // E1: a neighbour that touches lies in another leaf only where the range reaches an end of this one.
        let over_end = to == leaf.count() && last >= leaf.end() && !path.is_last();
        let at_start = from == 0 && path.low() == first;
        if over_end || at_start {
            return Ok(false);
        }
        let lowest = (to > from).then(|| leaf.raw(from));
        let highest = if to > from + 1 {
            Some(leaf.raw(to - 1))
        } else {
            lowest
        };
        // What touches below: the lower rest of the lowest range, or the range below.
        let below = match lowest {
            Some(raw) if raw.first < first => Some((
                Raw {
                    last: first - 1,
                    ..raw
                },
                0,
            )),
            _ if from > 0 => Some((leaf.raw(from - 1), 1)).filter(|(raw, _)| raw.last + 1 == first),
            _ => None,
        };
        let mut merged = false;
        if let Some((below, more)) = below
            && join_below(middle, &entry(below), merge)
        {
            merged = true;
            from -= more;
        }
        let above = match highest {
            Some(raw) if raw.last > last => {
                let value = V::from_word(raw.value).split(last + 1 - raw.first);
                Some((
                    Raw {
                        first: last + 1,
                        last: raw.last,
                        value: value.to_word(),
                    },
                    0,
                ))
            }
            _ if to < leaf.count() => {
                Some((leaf.raw(to), 1)).filter(|(raw, _)| raw.first == last + 1)
            }
            _ => None,
        };
        if let Some((above, more)) = above
            && join_above(middle, &entry(above), merge)
        {
            merged = true;
            to += more;
        }
        let cut = Cut {
            first: middle.first().number(),
            last: middle.last().number(),
            value: Some(middle.value.to_word()),
            shown: (first, last),
        };
        let done = match lowest {
            Some(raw) if !merged && raw.first <= first && last <= raw.last => {
                self.overlay(path, (from, raw), &cut, removed)?
            }
            Some(_) if merged && to == from + 2 => self.shift(path, from, &cut, removed)?,
            _ => false,
        };
        if done {
            return Ok(true);
        }
        self.edit_merged(path, &cut, (from, to), removed)?;
        Ok(true)
    }

    /// [`write_merged`](Self::write_merged) where neighbours may lie in other leaves.
    #[inline(never)]
    fn write_merged_across<M>(
        &self,
        range: PageRange,
        value: V,
        removed: Removed<'_, V>,
        merge: &mut M,
    ) -> Result<Entry<V>, AllocError>
    where
        M: FnMut(&Entry<V>, &Entry<V>) -> Option<V> + ?Sized,
    {
        let mut middle = Entry { range, value };
        // The entry below, whole or the part of it that lies below the range.
        let below = range.first().checked_sub(1).and_then(|page| {
            let whole = self.get(page)?;
            part_below(whole, range.first())
        });
        if let Some(below) = below {
            join_below(&mut middle, &below, merge);
        }
        let above = range.last().checked_add(1).and_then(|page| {
            let whole = self.get(page)?;
            part_above(whole, range.last())
        });
        if let Some(above) = above {
            join_above(&mut middle, &above, merge);
        }
        self.splice(
            Cut {
                first: middle.first().number(),
                last: middle.last().number(),
                value: Some(middle.value.to_word()),
                shown: (range.first().number(), range.last().number()),
            },
            removed,
        )?;
        Ok(middle)
    }
}

// Huge leaves: they are split and merged, and moved whole where the distance allows it.

use kmem_hal::{AllocError, Order, Page, PageRange};
use kmem_paging::format::Format;
use kmem_paging::{Attributes, HugeError, MoveError};

use super::model::Slot;
use super::{Step, World, at};

impl<F: Format> World<F> {
    /// Splits a huge leaf.
    pub(super) fn split(&mut self, step: &Step) -> Option<AllocError> {
        let Step { half, page, .. } = *step;
        let result = self.changing(half, |cursor, gather| cursor.split(at(page), gather));
        match (result, self.find(page)) {
            (
                Ok(()),
                Some((
                    first,
                    Slot::Leaf {
                        frame,
                        order,
                        attributes,
                    },
                )),
            ) if order > Order::ZERO => {
                self.split_model(first, frame, order, attributes);
            }
            (Err(HugeError::Memory(error)), _) => return Some(error),
            (Err(HugeError::NotPossible), Some((_, slot))) => assert_eq!(slot.pages(), 1),
            (Err(HugeError::NotPossible), None) => {}
            other => panic!("{other:?}"),
        }
        None
    }

    /// Makes a table of leaves one.
    pub(super) fn merge(&mut self, step: &Step) -> Option<AllocError> {
        let Step {
            half, page, extra, ..
        } = *step;
        let orders = self.orders();
        let position = usize::from(extra) % (orders.len() - 1);
        let (small, order) = (orders[position], orders[position + 1]);
        let first = page >> order.get() << order.get();
        let result = self.changing(half, |cursor, gather| {
            cursor.merge(at(first), order, gather)
        });
        match (result, self.mergeable(first, small, order)) {
            (Ok(()), Some(slot)) => {
                for index in 0..order.frames() / small.frames() {
                    self.model.remove(&(first + index * small.frames()));
                }
                self.model.insert(first, slot);
            }
            (Err(HugeError::NotPossible), None) => {}
            other => panic!("{other:?}"),
        }
        None
    }

    /// Moves a range to other pages.
    pub(super) fn relocate(&mut self, step: &Step) -> Option<AllocError> {
        let Step {
            page,
            range,
            count,
            extra,
            ..
        } = *step;
        let to = self.areas[usize::from(extra) % self.areas.len()] + u64::from(extra >> 3);
        let mut gather = self.table.gather::<1>();
        let result = self
            .table
            .move_range(range, at(to.min(Page::LIMIT - 1)), &mut gather);
        gather.commit(drop);
        drop(gather);
        let inside_half = PageRange::with_count(at(to), count)
            .is_some_and(|target| self.half(to).contains_range(target) && !target.overlaps(range));
        match result {
            Ok(moved) => {
                assert!(inside_half && self.inside_free(to, count));
                let distance = to.wrapping_sub(page);
                let mut from = self.inside(page, count);
                // Leaves that do not fit at the target are cut.
                while let Some(&(
                    first,
                    Slot::Leaf {
                        frame,
                        order,
                        attributes,
                    },
                )) = from
                    .iter()
                    .find(|(_, slot)| distance & (slot.pages() - 1) != 0)
                {
                    self.split_model(first, frame, order, attributes);
                    from = self.inside(page, count);
                }
                assert_eq!(
                    moved,
                    from.iter().map(|(_, slot)| slot.pages()).sum::<u64>()
                );
                for (first, _) in &from {
                    self.model.remove(first);
                }
                for (first, slot) in from {
                    self.model.insert(first.wrapping_add(distance), slot);
                }
            }
            Err(MoveError::OutOfRange) => assert!(!inside_half),
            Err(MoveError::Occupied) => {
                assert!(inside_half && !self.inside_free(to, count))
            }
            Err(MoveError::Memory(error)) => return Some(error),
            Err(other) => panic!("{other}"),
        }
        None
    }

    /// What merging the small leaves from `first` on would give.
    fn mergeable(&self, first: u64, small: Order, order: Order) -> Option<Slot> {
        let mut joined: Option<(u64, Attributes)> = None;
        for index in 0..order.frames() / small.frames() {
            let offset = index * small.frames();
            let Some(&Slot::Leaf {
                frame,
                order: found,
                attributes,
            }) = self.model.get(&(first + offset))
            else {
                return None;
            };
            let (base, all) = joined.get_or_insert((frame, attributes));
            all.accessed |= attributes.accessed;
            all.dirty |= attributes.dirty;
            let same = Attributes {
                accessed: all.accessed,
                dirty: all.dirty,
                ..attributes
            };
            if found != small || frame != *base + offset || same != *all {
                return None;
            }
        }
        let (frame, attributes) = joined?;
        (frame % order.frames() == 0).then(|| Slot::Leaf {
            frame,
            order,
            attributes: self.expressed(order, &attributes),
        })
    }
}

// Operations that leave the frames where they are: attributes, rights, accessed and dirty bits, and looks.

use kmem_hal::{AllocError, Order};
use kmem_paging::format::Format;
use kmem_paging::{Attributes, ChangeError, Entry, Harvest, Rights};

use super::model::{Slot, same};
use super::{Step, World, at};

impl<F: Format> World<F> {
    /// Gives leaves other attributes.
    pub(super) fn update(&mut self, step: &Step) -> Option<AllocError> {
        let (range, attributes) = (step.range, step.attributes);
        let result = self.changing(step.half, |cursor, gather| {
            cursor.update(range, gather, |_| Some(attributes))
        });
        self.changed(step, result, |_| attributes)
    }

    /// Gives leaves other rights.
    pub(super) fn protect(&mut self, step: &Step) -> Option<AllocError> {
        let (range, rights) = (step.range, step.attributes.rights);
        let result = self.changing(step.half, |cursor, gather| {
            cursor.protect(range, rights, gather)
        });
        self.changed(step, result, |attributes| attributes.rights(rights))
    }

    /// What a change of all leaves of a range comes to; it said how many pages are another than before.
    fn changed(
        &mut self,
        step: &Step,
        result: Result<u64, ChangeError>,
        how: impl Fn(Attributes) -> Attributes,
    ) -> Option<AllocError> {
        match result {
            Ok(pages) => assert_eq!(pages, self.change(step.page, step.count, how)),
            Err(ChangeError::Memory(error)) => return Some(error),
            Err(other) => panic!("{other}"),
        }
        None
    }

    /// Reads accessed and dirty bits, and clears them.
    pub(super) fn harvest(&mut self, step: &Step) -> Option<AllocError> {
        let Step {
            half,
            page,
            range,
            count,
            extra,
            ..
        } = *step;
        let bits = Harvest::from_bits_truncate(extra);
        let mut shown = Vec::new();
        let result = self.changing(half, |cursor, gather| {
            cursor.harvest(range, bits, gather, |leaf| shown.push(leaf.page.number()))
        });
        let found = match result {
            Ok(found) => found,
            Err((ChangeError::Memory(error), _)) => return Some(error),
            Err((other, _)) => panic!("{other}"),
        };
        let mut expected = kmem_paging::Harvested::default();
        let mut visible = Vec::new();
        for (first, slot) in self.inside(page, count) {
            if let Slot::Leaf {
                frame,
                order,
                mut attributes,
            } = slot
            {
                let accessed = attributes.accessed && bits.contains(Harvest::ACCESSED);
                let dirty = attributes.dirty && bits.contains(Harvest::DIRTY);
                if accessed || dirty {
                    visible.push(first);
                    expected.accessed += u64::from(attributes.accessed) * order.frames();
                    expected.dirty += u64::from(attributes.dirty) * order.frames();
                }
                attributes.accessed &= !accessed;
                attributes.dirty &= !dirty;
                self.model.insert(
                    first,
                    Slot::Leaf {
                        frame,
                        order,
                        attributes,
                    },
                );
            }
        }
        assert_eq!((found, shown), (expected, visible));
        None
    }

    /// What a fault does with a leaf that is there.
    pub(super) fn relax(&mut self, step: &Step) -> Option<AllocError> {
        let Step {
            page, attributes, ..
        } = *step;
        let entry = self.table.lock_entry(at(page));
        let result =
            entry.is_some_and(|mut entry| entry.relax(attributes.rights, attributes.dirty));
        let Some((
            _,
            Slot::Leaf {
                frame,
                order: Order::ZERO,
                attributes: old,
            },
        )) = self.find(page)
        else {
            assert!(!result, "no single page is there");
            return None;
        };
        let new = self.expressed(
            Order::ZERO,
            &Attributes {
                rights: attributes.rights,
                accessed: true,
                dirty: attributes.dirty || old.dirty,
                ..old
            },
        );
        let lost = old.rights.difference(new.rights);
        let gained = new.rights.difference(old.rights);
        let takes = old.rights.grants_access()
            && (!lost.is_empty()
                // A page that becomes the user's is the kernel's to touch no more (SMEP, SMAP).
                || gained.intersects(Rights::GLOBAL | Rights::USER)
                || new.memory_type != old.memory_type);
        assert_eq!(result, !takes, "{old:?} {new:?}");
        if result {
            self.model.insert(
                page,
                Slot::Leaf {
                    frame,
                    order: Order::ZERO,
                    attributes: new,
                },
            );
        }
        None
    }

    /// Looks at a page through a cursor and without.
    pub(super) fn look(&mut self, step: &Step) -> Option<AllocError> {
        let Step { half, page, .. } = *step;
        let mut cursor = self.table.cursor(half).unwrap();
        let found = cursor.own(at(page)).unwrap();
        assert_eq!(found, cursor.query(at(page)));
        assert_eq!(found, self.table.query(at(page)));
        match (found, self.find(page)) {
            (Entry::Empty, None) => {}
            (Entry::Payload(payload), Some((_, Slot::Payload(number)))) => {
                assert_eq!(payload.number(), number);
            }
            (Entry::Leaf(leaf), Some((first, slot))) => same(first, &slot, &leaf),
            other => panic!("{other:?}"),
        }
        None
    }
}

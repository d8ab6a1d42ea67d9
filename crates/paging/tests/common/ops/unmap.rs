// Unmapping, with a look at what goes and without, in gathers that are soon full.

use kmem_hal::{AllocError, PageRange};
use kmem_paging::format::Format;
use kmem_paging::{ChangeError, Cleared};

use super::model::{Slot, same};
use super::{Step, World};

impl<F: Format> World<F> {
    /// Unmaps with a look at everything that goes.
    pub(super) fn unmap_shown(&mut self, step: &Step) -> Option<AllocError> {
        let Step {
            half,
            page,
            range,
            count,
            ..
        } = *step;
        let mut cleared = Vec::new();
        let mut gather = self.table.gather::<3>();
        let mut cursor = self.table.cursor(half).unwrap();
        let mut rest = range;
        let mut failed = None;
        // How many pages it said that there were, where one call did it all.
        let mut pages = None;
        loop {
            let result = cursor.unmap_with(rest, &mut gather, |what| cleared.push(what));
            match result {
                Ok(found) => {
                    pages = (rest == range).then_some(found);
                    break;
                }
                Err(ChangeError::Full { next }) => {
                    assert!(gather.is_full());
                    let pool = &mut self.pool;
                    gather.commit(|handle| pool.free(handle));
                    rest = PageRange::new(next, range.last()).unwrap();
                }
                Err(ChangeError::Memory(error)) => {
                    assert!(cleared.is_empty());
                    failed = Some(error);
                    break;
                }
                Err(other) => panic!("{other}"),
            }
        }
        drop(cursor);
        let pool = &mut self.pool;
        gather.commit(|handle| pool.free(handle));
        drop(gather);
        if failed.is_some() {
            return failed;
        }
        let expected = self.inside(page, count);
        let there = expected.iter().map(|(_, slot)| slot.pages()).sum();
        assert!(
            pages.is_none_or(|pages: u64| pages == there),
            "{pages:?} of {there}"
        );
        for ((first, slot), what) in expected.iter().zip(&cleared) {
            self.model.remove(first);
            match (slot, what) {
                (Slot::Payload(number), Cleared::Payload(page, payload)) => {
                    assert_eq!((page.number(), payload.number()), (*first, *number));
                }
                (Slot::Leaf { .. }, Cleared::Leaf(leaf)) => same(*first, slot, leaf),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(expected.len(), cleared.len());
        None
    }

    /// Unmaps without a look at what goes: a page of a held table by itself, well-filled tables whole.
    pub(super) fn unmap(&mut self, range: PageRange) -> Option<AllocError> {
        let single = range.count() == 1;
        let mut payloads = Vec::new();
        let pool = &mut self.pool;
        let mut gather = self.table.gather::<3>();
        let mut cursor = self.table.cursor(range).unwrap();
        let mut rest = range;
        let whole = loop {
            let result = if single {
                cursor.own(range.first()).unwrap();
                cursor.unmap(range, &mut gather)
            } else {
                cursor.unmap_giving(rest, &mut gather, |payload| payloads.push(payload.number()))
            };
            match result {
                // How many pages it said that there were, where one call did it all.
                Ok(pages) => break (rest == range).then_some(pages),
                Err(ChangeError::Full { next }) => {
                    gather.commit_with(
                        |handle| pool.free(handle),
                        |payload| payloads.push(payload.number()),
                    );
                    rest = PageRange::new(next, range.last()).unwrap();
                }
                Err(ChangeError::Memory(error)) => {
                    assert_eq!(rest, range, "memory is no reason to stop half-way");
                    return Some(error);
                }
                Err(other) => panic!("{other}"),
            }
        };
        drop(cursor);
        gather.commit_with(
            |handle| pool.free(handle),
            |payload| payloads.push(payload.number()),
        );
        drop(gather);
        let mut expected = Vec::new();
        let mut there = 0;
        for (first, slot) in self.inside(range.first().number(), range.count()) {
            self.model.remove(&first);
            there += slot.pages();
            if let Slot::Payload(number) = slot {
                expected.push(number);
            }
        }
        assert!(
            whole.is_none_or(|pages| pages == there),
            "{whole:?} of {there}"
        );
        if !single {
            payloads.sort_unstable();
            expected.sort_unstable();
            assert_eq!(payloads, expected);
        }
        None
    }
}

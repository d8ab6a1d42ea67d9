// Huge leaves: they are split and merged, and ranges that may have some are moved to other pages.

use kmem_hal::Order;
use kmem_paging::format::Format;
use kmem_paging::{HugeError, MoveError};

use super::model::{
    Item, expressed, find, inside, is_free, mergeable, refuses_cuts, refuses_splits, split_item,
};
use super::{World, at, pages};

impl<F: Format> World<F> {
    pub(super) fn split(&mut self, space: usize) {
        let (page, order) = self.huge_page();
        let page = page + self.rng.below(order.frames());
        let of = &mut self.spaces[space];
        let mut gather = of.table.gather::<16>();
        let mut cursor = of.table.cursor(pages(page, 1)).unwrap();
        let result = cursor.split(at(page), &mut gather);
        drop(cursor);
        match (result, find(&of.model, page)) {
            (Ok(()), Some((first, Item::Leaf { order, .. }))) if order > Order::ZERO => {
                split_item::<F>(&mut of.model, first);
            }
            (Err(HugeError::NotPossible), Some((_, item))) => {
                assert!(item.pages() == 1 || refuses_splits::<F>(&item));
            }
            (Err(HugeError::NotPossible), None) | (Err(HugeError::Memory(_)), _) => {}
            other => panic!("{other:?}"),
        }
        let (from, to) = self.touched(page, 1);
        self.settle(space, gather, from, to - from);
    }

    pub(super) fn merge(&mut self, space: usize) {
        let (page, order) = self.huge_page();
        let quiet = self
            .spaces
            .iter()
            .chain(&self.kernel)
            .all(|space| space.waiting.is_empty());
        let of = &mut self.spaces[space];
        let mut gather = of.table.gather::<16>();
        let mut cursor = of.table.cursor(pages(page, order.frames())).unwrap();
        let result = cursor.merge(at(page), order, &mut gather);
        drop(cursor);
        match (result, mergeable(&of.model, page, order)) {
            (Ok(()), Some(mut item)) => {
                // With one dirty page all of it is dirty; where one is not known, nothing is.
                for offset in 0..order.frames() {
                    of.model.remove(&(page + offset));
                }
                if let Item::Leaf { attributes, .. } = &mut item {
                    *attributes = expressed::<F>(attributes);
                }
                of.model.insert(page, item);
                if quiet {
                    // Every translation of the small leaves is gone before the large one is there, and before the commit.
                    let found = self
                        .env
                        .machine
                        .audit(page << 12, (page + order.frames()) << 12);
                    assert!(found.is_empty(), "{}", found[0]);
                }
            }
            (Err(HugeError::NotPossible), None) => {}
            other => panic!("{other:?}"),
        }
        self.settle(space, gather, page, order.frames());
    }

    /// Moves a range to other pages.
    pub(super) fn relocate(&mut self, space: usize, page: u64, count: u64) {
        let to = self.page();
        let lower = self.lower();
        let of = &mut self.spaces[space];
        let mut gather = of.table.gather::<16>();
        let result = of.table.move_range(pages(page, count), at(to), &mut gather);
        let apart = to + count <= page || page + count <= to;
        let fits = to + count <= lower.last().number() + 1;
        if result.is_ok() {
            assert!(apart && fits && is_free(&of.model, to, count));
            let distance = to.wrapping_sub(page);
            let mut from = inside::<F>(&mut of.model, page, count);
            while let Some(&(first, _)) = from
                .iter()
                .find(|(_, item)| distance & (item.pages() - 1) != 0)
            {
                split_item::<F>(&mut of.model, first);
                from = inside::<F>(&mut of.model, page, count);
            }
            for (first, _) in &from {
                of.model.remove(first);
            }
            for (first, item) in from {
                of.model.insert(first.wrapping_add(distance), item);
            }
        } else if apart && fits && is_free(&of.model, to, count) {
            match result {
                Err(MoveError::Indivisible { at }) => {
                    let distance = to.wrapping_sub(page);
                    let (first, item) = find(&of.model, at.number()).unwrap();
                    let cuts = [page, page + count];
                    assert!(
                        refuses_cuts::<F>(&of.model, cuts, first)
                            || refuses_splits::<F>(&item) && distance & (item.pages() - 1) != 0
                    );
                }
                other => assert!(matches!(other, Err(MoveError::Memory(_))), "{other:?}"),
            }
            drop(gather);
            return self.unchanged(space);
        }
        let (from, end) = self.touched(page, count);
        // The target may still be what it was before, if that waits.
        if !self.spaces[space].waiting.is_empty() || !gather.is_empty() {
            self.spaces[space].wait(to, count);
        }
        self.settle(space, gather, from, end - from);
        if self.spaces[space].gathers.is_empty() {
            self.spaces[space].waiting.clear();
        }
    }
}

// A child with copies of a range: both sides lose the right to write, and each page of the child is the parent's.

use std::collections::BTreeMap;

use kmem_hal::{AllocError, PageRange};
use kmem_paging::format::Format;
use kmem_paging::{Attributes, ForkError, ForkItem, ForkStep, TableError};

use super::model::{Slot, same};
use super::{Table, World};

impl<F: Format> World<F> {
    /// Copies a range into a child, which is held against the model and taken down; both sides lose the right to write.
    pub(super) fn fork(&mut self, range: PageRange) -> Option<AllocError> {
        let child = match Table::<F>::empty_like(self.machine.env(), &self.table) {
            Ok(child) => child,
            Err(TableError::Memory(error)) => return Some(error),
            Err(other) => panic!("{other}"),
        };
        let mut given = BTreeMap::new();
        let pool = &mut self.pool;
        let mut gather = self.table.gather::<1>();
        let result = self
            .table
            .fork_into(&child, range, &mut gather, |item| match item {
                ForkItem::Payload(page, payload) => {
                    given.insert(page.number(), Slot::Payload(payload.number()));
                    ForkStep::Payload(payload)
                }
                ForkItem::Leaf(leaf) => {
                    let handle = pool.alloc(leaf.order);
                    let attributes = leaf.attributes.write_protected();
                    let slot = Slot::Leaf {
                        frame: handle.first().number(),
                        order: leaf.order,
                        attributes,
                    };
                    given.insert(leaf.page.number(), slot);
                    ForkStep::Leaf {
                        handle,
                        child: attributes,
                        parent: Some(attributes),
                    }
                }
            });
        gather.commit(drop);
        drop(gather);
        let failed = match result {
            Ok(copied) => {
                assert_eq!(copied, given.values().map(Slot::pages).sum::<u64>());
                let (page, count) = (range.first().number(), range.count());
                let there = self.inside(page, count);
                assert!(there.iter().map(|(page, _)| page).eq(given.keys()));
                self.change(page, count, Attributes::write_protected);
                None
            }
            Err((ForkError::Memory(error), None)) => {
                assert!(given.is_empty(), "memory is no reason to stop half-way");
                Some(error)
            }
            Err((other, _)) => panic!("{other}"),
        };
        let given = std::cell::RefCell::new(given);
        let pool = &mut self.pool;
        child.destroy(
            |leaf, handle| {
                let slot = given.borrow_mut().remove(&leaf.page.number()).unwrap();
                same(leaf.page.number(), &slot, &leaf);
                pool.free(handle);
            },
            |page, payload| {
                let slot = given.borrow_mut().remove(&page.number());
                assert_eq!(slot, Some(Slot::Payload(payload.number())));
            },
        );
        assert!(given.into_inner().is_empty());
        failed
    }
}

// Operations that fill pages: one page, a huge one, a range, a page in place of another, a payload. What is refused is refused for the
// reason that the flat map gives, and want of memory changes nothing.

use kmem_hal::{Frame, FrameSink, FrameSource, Order, OwnedFrame};
use kmem_paging::format::Format;
use kmem_paging::{
    Attributes, ChangeError, Entry, MapError, MemoryType, Payload, Replaced, Rights, SoftBit,
};

use super::super::modes::request;
use super::model::{Item, expressed, find, is_free, same};
use super::{NO_ACCESS_KEY, NO_WRITE_KEY, World, at, pages};

impl<F: Format> World<F> {
    pub(super) fn page(&mut self) -> u64 {
        let area = self.areas[self.rng.below(self.areas.len() as u64) as usize];
        area + self.rng.below(24)
    }

    pub(super) fn attributes(&mut self) -> Attributes {
        let rights = [
            Rights::READ | Rights::USER,
            Rights::USER_DATA,
            Rights::USER_DATA,
            Rights::USER_DATA,
            Rights::USER_CODE,
            Rights::KERNEL_DATA,
            Rights::empty(),
            Rights::all().difference(Rights::GLOBAL),
        ][self.rng.below(8) as usize];
        let mut attributes = Attributes::new(rights);
        let seed = self.rng.next();
        if seed & 3 == 0 {
            attributes = attributes.accessed();
        }
        if seed & 12 == 0 {
            attributes = attributes.accessed().dirty();
        }
        if seed & 0x30 == 0 {
            attributes = attributes.soft(SoftBit::<F, 1>::BIT);
        }
        if seed & 0xc0 == 0 {
            attributes = attributes.memory_type(
                [
                    MemoryType::Uncached,
                    MemoryType::WriteThrough,
                    MemoryType::WriteCombining,
                ][(seed >> 8) as usize % 3],
            );
        }
        if F::PROTECTION_KEYS > 1 && seed & 0x7000 == 0 {
            attributes =
                attributes.pkey([NO_ACCESS_KEY, NO_WRITE_KEY, 15][(seed >> 16) as usize % 3]);
        }
        if !F::can_encode(1, Frame::ZERO, &attributes) {
            attributes = attributes.memory_type(MemoryType::WriteBack);
        }
        attributes
    }

    /// A frame of the caller's, which the fuse does not count.
    pub(super) fn alloc(&self, order: Order) -> Option<OwnedFrame> {
        self.env.pool.set_fuse(None);
        let frame = self.env.pool.alloc(&request::<F>(order)).ok();
        self.env.pool.set_fuse(self.fuse);
        frame
    }

    pub(super) fn map(&mut self, space: usize, page: u64) {
        let attributes = self.attributes();
        let Some(frame) = self.alloc(Order::ZERO) else {
            return;
        };
        let number = frame.first().number();
        let of = &mut self.spaces[space];
        let mut cursor = of.table.cursor(pages(page, 1)).unwrap();
        match cursor.map(at(page), frame, attributes) {
            Ok(()) => {
                assert!(is_free(&of.model, page, 1));
                let item = Item::Leaf {
                    frame: number,
                    order: Order::ZERO,
                    attributes: expressed::<F>(&attributes),
                    dirty: Some(attributes.dirty),
                };
                of.model.insert(page, item);
                drop(cursor);
                self.filled(space, page, 1);
            }
            Err((error, frame)) => {
                self.env.pool.free(frame);
                match error {
                    MapError::Occupied => assert!(find(&of.model, page).is_some()),
                    MapError::Memory(_) => {
                        drop(cursor);
                        self.unchanged(space);
                    }
                    other => panic!("{other}"),
                }
            }
        }
    }

    /// Where huge leaves of the second level live: two of them.
    pub(super) fn huge_page(&mut self) -> (u64, Order) {
        let order = F::LEVELS[1].order();
        let first = self.areas[2] + self.rng.below(2) * order.frames();
        (first, order)
    }

    pub(super) fn map_huge(&mut self, space: usize) {
        let (page, order) = self.huge_page();
        let attributes = self.attributes();
        if !is_free(&self.spaces[space].model, page, order.frames()) {
            // Make room: what lives there goes.
            return self.unmap(space, page, order.frames());
        }
        let Some(block) = self.alloc(order) else {
            return;
        };
        let number = block.first().number();
        let of = &mut self.spaces[space];
        let mut cursor = of.table.cursor(pages(page, order.frames())).unwrap();
        match cursor.map(at(page), block, attributes) {
            Ok(()) => {
                let item = Item::Leaf {
                    frame: number,
                    order,
                    attributes: expressed::<F>(&attributes),
                    dirty: Some(attributes.dirty),
                };
                of.model.insert(page, item);
                drop(cursor);
                self.filled(space, page, order.frames());
            }
            Err((error, block)) => {
                assert!(matches!(error, MapError::Memory(_)), "{error}");
                self.env.pool.free(block);
                drop(cursor);
                self.unchanged(space);
            }
        }
    }

    pub(super) fn map_range(&mut self, space: usize, page: u64, count: u64) {
        let attributes = self.attributes();
        let env = self.env;
        let of = &mut self.spaces[space];
        let range = pages(page, count);
        let mut given = Vec::new();
        let mut cursor = of.table.cursor(range).unwrap();
        let result = cursor.map_range(range, Order::ZERO, attributes, |page, _| {
            let frame = env.pool.alloc(&request::<F>(Order::ZERO)).ok()?;
            given.push((page.number(), frame.first().number()));
            Some(frame)
        });
        drop(cursor);
        let end = match result {
            Ok(()) => page + count,
            Err(stopped) => {
                if let Some(frame) = stopped.handle {
                    env.pool.free(frame);
                }
                match stopped.error {
                    MapError::Occupied => {
                        assert!(find(&of.model, stopped.at.number()).is_some())
                    }
                    MapError::Memory(_) => assert_eq!((stopped.at, given.len()), (at(page), 0)),
                    MapError::OutOfRange => {}
                    other => panic!("{other}"),
                }
                stopped.at.number()
            }
        };
        for (page, frame) in given.into_iter().filter(|&(page, _)| page < end) {
            assert!(is_free(&of.model, page, 1));
            let item = Item::Leaf {
                frame,
                order: Order::ZERO,
                attributes: expressed::<F>(&attributes),
                dirty: Some(attributes.dirty),
            };
            of.model.insert(page, item);
        }
        self.filled(space, page, end - page);
    }

    pub(super) fn replace(&mut self, space: usize, page: u64) {
        let attributes = self.attributes();
        let Some(frame) = self.alloc(Order::ZERO) else {
            return;
        };
        let number = frame.first().number();
        let env = self.env;
        let of = &mut self.spaces[space];
        let mut cursor = of.table.cursor(pages(page, 1)).unwrap();
        let old = find(&of.model, page);
        match cursor.replace(at(page), frame, attributes) {
            Ok(before) => {
                match (before, old) {
                    (Replaced::Nothing, None) => {}
                    (Replaced::Payload(payload), Some((_, Item::Payload(number)))) => {
                        assert_eq!(payload.number(), number)
                    }
                    (Replaced::Leaf(leaf, old), Some((first, item))) => {
                        same(first, &item, &leaf);
                        assert_eq!(leaf.frame, old.first());
                        env.pool.free(old);
                    }
                    other => panic!("{other:?}"),
                }
                let item = Item::Leaf {
                    frame: number,
                    order: Order::ZERO,
                    attributes: expressed::<F>(&attributes),
                    dirty: Some(attributes.dirty),
                };
                of.model.insert(page, item);
                drop(cursor);
                self.filled(space, page, 1);
                // What was there is flushed before the new one is seen.
                self.audit();
            }
            Err((error, frame)) => {
                env.pool.free(frame);
                match error {
                    MapError::Occupied => {
                        assert!(
                            matches!(old, Some((_, Item::Leaf { order, .. })) if order > Order::ZERO)
                        )
                    }
                    MapError::Memory(_) => {}
                    other => panic!("{other}"),
                }
            }
        }
    }

    pub(super) fn payload(&mut self, space: usize, page: u64) {
        let payload = Payload::new::<F>(self.rng.below(1 << 28)).unwrap();
        let of = &mut self.spaces[space];
        let mut gather = of.table.gather::<16>();
        let mut cursor = of.table.cursor(pages(page, 1)).unwrap();
        let result = cursor.set_payload(at(page), payload, &mut gather);
        drop(cursor);
        match (result, find(&of.model, page)) {
            (Ok(Entry::Empty), None) => {}
            (Ok(Entry::Payload(old)), Some((_, Item::Payload(number)))) => {
                assert_eq!(old.number(), number)
            }
            (Ok(Entry::Leaf(leaf)), Some((first, item))) => same(first, &item, &leaf),
            (Err(ChangeError::Unencodable { .. }), Some((_, Item::Leaf { order, .. })))
                if order > Order::ZERO =>
            {
                return;
            }
            (Err(ChangeError::Memory(_)), None) => return,
            other => panic!("{other:?}"),
        }
        of.model.insert(page, Item::Payload(payload.number()));
        self.settle(space, gather, page, 1);
    }
}

// Operations that fill pages: leaves of any size, ranges and blocks of them, payloads. A page that has something is refused, and the handle
// comes back.

use kmem_hal::{AllocError, Order};
use kmem_paging::format::Format;
use kmem_paging::{ChangeError, Entry, MapError, Payload, Replaced};

use super::model::{Slot, same};
use super::{Step, World, at, pages};

impl<F: Format> World<F> {
    /// One leaf, of any size.
    pub(super) fn map_leaf(&mut self, step: &Step) -> Option<AllocError> {
        let Step {
            half,
            huge,
            order,
            attributes,
            ..
        } = *step;
        let handle = self.pool.alloc(order);
        let frame = handle.first().number();
        let mut cursor = self.table.cursor(half).unwrap();
        let result = cursor.map(at(huge), handle, attributes);
        drop(cursor);
        let free = self.inside_free(huge, order.frames());
        match result {
            Ok(()) => {
                assert!(free, "mapped over something");
                let attributes = self.expressed(order, &attributes);
                self.model.insert(
                    huge,
                    Slot::Leaf {
                        frame,
                        order,
                        attributes,
                    },
                );
            }
            Err((error, handle)) => {
                assert_eq!(handle.first().number(), frame);
                self.pool.free(handle);
                match error {
                    MapError::Memory(error) => return Some(error),
                    MapError::Occupied => assert!(!free),
                    other => panic!("{other}"),
                }
            }
        }
        None
    }

    /// A range of small leaves.
    pub(super) fn map_run(&mut self, step: &Step) -> Option<AllocError> {
        let Step {
            half,
            page,
            count,
            attributes,
            extra,
            ..
        } = *step;
        let mut handles = Vec::new();
        let pool = &mut self.pool;
        let mut given = Vec::new();
        let stop_after = if extra & 0x40 != 0 { count / 2 } else { count };
        let mut cursor = self.table.cursor(half).unwrap();
        let count = count.min(600);
        let range = pages(page, count);
        let result = cursor.map_range(range, Order::ZERO, attributes, |page, left| {
            assert_eq!(page.number() + left, range.first().number() + count);
            if given.len() as u64 == stop_after {
                return None;
            }
            let handle = pool.alloc(Order::ZERO);
            given.push((page.number(), handle.first().number()));
            Some(handle)
        });
        drop(cursor);
        let mut failed = None;
        if let Err(stopped) = result {
            if let Some(handle) = stopped.handle {
                assert_eq!(given.pop().unwrap().1, handle.first().number());
                handles.push(handle);
            }
            match stopped.error {
                MapError::Memory(error) => {
                    assert!(given.is_empty(), "memory is no reason to stop half-way");
                    failed = Some(error);
                }
                MapError::Occupied => assert!(self.find(stopped.at.number()).is_some()),
                MapError::OutOfRange => assert_eq!(given.len() as u64, stop_after),
                other => panic!("{other}"),
            }
            assert_eq!(stopped.at.number() - page, given.len() as u64);
        }
        let attributes = self.expressed(Order::ZERO, &attributes);
        for (page, frame) in given {
            assert_eq!(self.find(page), None);
            self.model.insert(
                page,
                Slot::Leaf {
                    frame,
                    order: Order::ZERO,
                    attributes,
                },
            );
        }
        for handle in handles {
            self.pool.free(handle);
        }
        failed
    }

    /// Maps a block of up to 16 MiB as leaves of `largest` at most.
    pub(super) fn map_divided(&mut self, step: &Step) -> Option<AllocError> {
        let Step {
            half,
            page,
            attributes,
            order: largest,
            extra,
            ..
        } = *step;
        let block = Order::new(extra % 13).unwrap();
        let handle = self.pool.alloc(block);
        let frame = handle.first().number();
        let mut cursor = self.table.cursor(half).unwrap();
        let result = cursor.map_divided(at(page), handle, largest, attributes);
        drop(cursor);
        let fits = half.last().number() - page >= block.frames() - 1;
        let free = fits && self.inside_free(page, block.frames());
        match result {
            Ok(()) => assert!(free, "mapped over something"),
            Err((error, handle)) => {
                assert_eq!((handle.first().number(), handle.order()), (frame, block));
                self.pool.free(handle);
                match error {
                    MapError::Memory(error) => return Some(error),
                    MapError::Occupied => assert!(fits && !free),
                    MapError::OutOfRange => assert!(!fits),
                    other => panic!("{other}"),
                }
                return None;
            }
        }
        let aligned = |order: &Order| (page | frame) & (order.frames() - 1) == 0;
        let orders = self.orders().into_iter().rev();
        let mut fitting = orders.filter(|order| *order <= largest.min(block) && aligned(order));
        let order = fitting.next().unwrap();
        let attributes = self.expressed(order, &attributes);
        for offset in (0..block.frames()).step_by(order.frames() as usize) {
            let slot = Slot::Leaf {
                frame: frame + offset,
                order,
                attributes,
            };
            self.model.insert(page + offset, slot);
        }
        None
    }

    /// Leaves a payload where nothing is.
    pub(super) fn map_payload(&mut self, step: &Step) -> Option<AllocError> {
        let Step {
            half, page, extra, ..
        } = *step;
        let payload =
            Payload::new::<F>(u64::from(extra) << (F::PAYLOAD_BITS - 8) | u64::from(extra))
                .unwrap();
        let mut cursor = self.table.cursor(half).unwrap();
        let result = cursor.map_payload(at(page), payload);
        drop(cursor);
        match result {
            Ok(()) => {
                assert_eq!(self.find(page), None);
                self.model.insert(page, Slot::Payload(payload.number()));
            }
            Err(MapError::Memory(error)) => return Some(error),
            Err(MapError::Occupied) => assert!(self.find(page).is_some()),
            Err(other) => panic!("{other}"),
        }
        None
    }

    /// Leaves a payload where anything may be.
    pub(super) fn set_payload(&mut self, step: &Step) -> Option<AllocError> {
        let Step {
            half, page, extra, ..
        } = *step;
        let payload = Payload::new::<F>(u64::from(extra)).unwrap();
        let mut gather = self.table.gather::<1>();
        let mut cursor = self.table.cursor(half).unwrap();
        let result = cursor.set_payload(at(page), payload, &mut gather);
        drop(cursor);
        let pool = &mut self.pool;
        gather.commit(|handle| pool.free(handle));
        drop(gather);
        match (result, self.find(page)) {
            (Ok(Entry::Empty), None) => {}
            (Ok(Entry::Payload(old)), Some((_, Slot::Payload(number)))) => {
                assert_eq!(old.number(), number)
            }
            (Ok(Entry::Leaf(leaf)), Some((first, slot))) => same(first, &slot, &leaf),
            (Err(ChangeError::Memory(error)), None) => return Some(error),
            (Err(ChangeError::Unencodable { .. }), Some((_, Slot::Leaf { order, .. }))) => {
                assert_ne!(order, Order::ZERO);
                return None;
            }
            other => panic!("{other:?}"),
        }
        self.model.insert(page, Slot::Payload(payload.number()));
        None
    }

    /// Puts a leaf where anything may be.
    pub(super) fn replace(&mut self, step: &Step) -> Option<AllocError> {
        let Step {
            half,
            huge,
            order,
            attributes,
            ..
        } = *step;
        let handle = self.pool.alloc(order);
        let frame = handle.first().number();
        let mut cursor = self.table.cursor(half).unwrap();
        let result = cursor.replace(at(huge), handle, attributes);
        drop(cursor);
        let old = self.find(huge);
        match (result, old) {
            (Ok(Replaced::Nothing), None) => {
                assert!(self.inside_free(huge, order.frames()))
            }
            (Ok(Replaced::Payload(payload)), Some((_, Slot::Payload(number)))) => {
                assert_eq!(payload.number(), number);
            }
            (Ok(Replaced::Leaf(leaf, handle)), Some((first, slot))) => {
                same(first, &slot, &leaf);
                self.pool.free(handle);
            }
            (Err((error, handle)), old) => {
                self.pool.free(handle);
                match error {
                    MapError::Memory(error) => return Some(error),
                    MapError::Occupied => {
                        assert!(old.is_some() || !self.inside_free(huge, order.frames()))
                    }
                    other => panic!("{other}"),
                }
                return None;
            }
            other => panic!("{other:?}"),
        }
        let attributes = self.expressed(order, &attributes);
        self.model.insert(
            huge,
            Slot::Leaf {
                frame,
                order,
                attributes,
            },
        );
        None
    }
}

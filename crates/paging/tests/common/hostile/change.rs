// Operations that take something away: unmapping, changes of rights and of everything, harvests of accessed and dirty bits, and single
// pages through a cursor that keeps its table. What they show is what the flat map has.

use std::collections::BTreeSet;

use kmem_hal::{FrameSink, Order};
use kmem_paging::format::Format;
use kmem_paging::{Attributes, ChangeError, Cleared, Entry, Harvest, Harvested, MapError};

use super::model::{Item, expressed, find, inside, refuses_cuts, same};
use super::{World, at, pages};

impl<F: Format> World<F> {
    pub(super) fn unmap(&mut self, space: usize, page: u64, count: u64) {
        let mut gather = self.spaces[space].table.gather::<16>();
        let mut first = page;
        let end = page + count;
        let mut cleared = Vec::new();
        // Shown one by one, or not: then whole tables may go at once.
        let shown = self.rng.below(2) == 0;
        loop {
            let of = &mut self.spaces[space];
            let range = pages(first, end - first);
            let mut cursor = of.table.cursor(range).unwrap();
            let result = if shown {
                cursor.unmap_with(range, &mut gather, |item| cleared.push(item))
            } else {
                cursor.unmap(range, &mut gather)
            };
            drop(cursor);
            match result {
                Ok(_) => break,
                Err(ChangeError::Full { next }) => {
                    // What is pending is flushed and given back; then it goes on.
                    gather.commit_to(&self.env.pool);
                    self.spaces[space].waiting.clear();
                    first = next.number();
                }
                Err(error) => {
                    drop(gather);
                    return self.refused(space, page, count, error);
                }
            }
        }
        let of = &mut self.spaces[space];
        let expected = inside::<F>(&mut of.model, page, count);
        for (first, _) in &expected {
            of.model.remove(first);
        }
        if shown {
            assert_eq!(cleared.len(), expected.len(), "what was cleared");
        }
        for ((first, item), cleared) in expected.iter().zip(cleared) {
            match cleared {
                Cleared::Leaf(leaf) => same(*first, item, &leaf),
                Cleared::Payload(page, payload) => assert_eq!(
                    (*first, *item),
                    (page.number(), Item::Payload(payload.number()))
                ),
            }
        }
        let (from, to) = self.touched(page, count);
        self.settle(space, gather, from, to - from);
    }

    /// A change of a range that was refused for want of memory, or for a leaf that cannot be split, changed nothing.
    fn refused(&self, space: usize, page: u64, count: u64, error: ChangeError) {
        if let ChangeError::Indivisible { at } = error {
            let model = &self.spaces[space].model;
            let cuts = [page, page + count];
            assert!(refuses_cuts::<F>(model, cuts, at.number()), "{error}");
        } else {
            assert!(matches!(error, ChangeError::Memory(_)), "{error}");
        }
        self.unchanged(space);
    }

    /// Changes rights alone, or everything.
    pub(super) fn change(&mut self, space: usize, page: u64, count: u64, rights_only: bool) {
        let attributes = self.attributes();
        let of = &mut self.spaces[space];
        let range = pages(page, count);
        let mut gather = of.table.gather::<16>();
        let mut cursor = of.table.cursor(range).unwrap();
        let result = if rights_only {
            cursor.protect(range, attributes.rights, &mut gather)
        } else {
            cursor.update(range, &mut gather, |leaf| {
                let keep = leaf.attributes;
                Some(Attributes {
                    accessed: keep.accessed,
                    dirty: keep.dirty,
                    ..attributes
                })
            })
        };
        drop(cursor);
        if let Err(error) = result {
            drop(gather);
            return self.refused(space, page, count, error);
        }
        for (first, item) in inside::<F>(&mut of.model, page, count) {
            if let Item::Leaf {
                frame,
                order,
                attributes: old,
                dirty,
            } = item
            {
                let new = if rights_only {
                    old.rights(attributes.rights)
                } else {
                    attributes
                };
                let attributes = expressed::<F>(&new);
                let item = Item::Leaf {
                    frame,
                    order,
                    attributes,
                    dirty,
                };
                of.model.insert(first, item);
            }
        }
        let (from, to) = self.touched(page, count);
        self.settle(space, gather, from, to - from);
    }

    /// Single pages through one cursor, which keeps the table that it is in.
    pub(super) fn session(&mut self, space: usize, page: u64) {
        let area = pages(page & !0xf, 64);
        let turns = 2 + self.rng.below(12);
        let table = self.spaces[space].table;
        let mut cursor = table.cursor(area).unwrap();
        let mut gather = table.gather::<16>();
        for _ in 0..turns {
            let page = area.first().number() + self.rng.below(24);
            let attributes = self.attributes();
            let choice = self.rng.below(4);
            let frame = self.alloc(Order::ZERO);
            let of = &mut self.spaces[space];
            let old = find(&of.model, page);
            if matches!(old, Some((_, Item::Leaf { order, .. })) if order > Order::ZERO) {
                if let Some(frame) = frame {
                    self.env.pool.free(frame);
                }
                continue;
            }
            match (choice, frame) {
                (0..=1, Some(frame)) => {
                    let number = frame.first().number();
                    // What this gather has taken away is flushed by whoever fills the hole.
                    match cursor.map(at(page), frame, attributes) {
                        Ok(()) => {
                            assert_eq!(old, None);
                            of.model.insert(
                                page,
                                Item::Leaf {
                                    frame: number,
                                    order: Order::ZERO,
                                    attributes: expressed::<F>(&attributes),
                                    dirty: Some(attributes.dirty),
                                },
                            );
                            of.waiting.remove(&page);
                        }
                        Err((error, frame)) => {
                            self.env.pool.free(frame);
                            match error {
                                MapError::Occupied => assert!(old.is_some()),
                                MapError::Memory(_) => {}
                                other => panic!("{other}"),
                            }
                        }
                    }
                }
                (2, frame) => {
                    if let Some(frame) = frame {
                        self.env.pool.free(frame);
                    }
                    let cleared = cursor.unmap(pages(page, 1), &mut gather).unwrap();
                    assert_eq!(cleared == 1, old.is_some());
                    of.model.remove(&page);
                    of.waiting.insert(page);
                }
                (_, frame) => {
                    if let Some(frame) = frame {
                        self.env.pool.free(frame);
                    }
                    cursor
                        .protect(pages(page, 1), attributes.rights, &mut gather)
                        .unwrap();
                    if let Some(Item::Leaf {
                        attributes: old, ..
                    }) = of.model.get_mut(&page)
                    {
                        *old = expressed::<F>(&old.rights(attributes.rights));
                    }
                    of.waiting.insert(page);
                }
            }
            assert_eq!(
                cursor.query(at(page)) == Entry::Empty,
                !self.spaces[space].model.contains_key(&page)
            );
        }
        drop(cursor);
        let idle = gather.is_empty();
        self.settle(space, gather, page, 1);
        if idle && self.spaces[space].gathers.is_empty() {
            self.spaces[space].waiting.clear();
        }
    }

    pub(super) fn harvest(&mut self, space: usize, page: u64, count: u64) {
        let bits = Harvest::from_bits_truncate(1 + self.rng.below(3) as u8);
        let of = &mut self.spaces[space];
        let range = pages(page, count);
        let mut gather = of.table.gather::<16>();
        let mut cursor = of.table.cursor(range).unwrap();
        let mut dirty_pages = BTreeSet::new();
        let result = cursor.harvest(range, bits, &mut gather, |leaf| {
            if leaf.attributes.dirty {
                dirty_pages.insert(leaf.page.number());
            }
        });
        drop(cursor);
        if let Err((error, found)) = result {
            assert_eq!(found, Harvested::default());
            drop(gather);
            return self.refused(space, page, count, error);
        }
        for (first, item) in inside::<F>(&mut of.model, page, count) {
            if let Item::Leaf {
                frame,
                order,
                attributes,
                dirty,
            } = item
                && bits.contains(Harvest::DIRTY)
            {
                if let Some(dirty) = dirty {
                    assert_eq!(dirty_pages.contains(&first), dirty, "page {first:#x}");
                }
                let item = Item::Leaf {
                    frame,
                    order,
                    attributes,
                    dirty: Some(false),
                };
                of.model.insert(first, item);
            }
        }
        let (from, to) = self.touched(page, count);
        self.settle(space, gather, from, to - from);
    }
}

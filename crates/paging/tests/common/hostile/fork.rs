// Spaces that come and go: a child with copies of what its parent has, and spaces that are taken down while CPUs remember them.

use std::cell::Cell;

use kmem_hal::{FrameSink, FrameSource};
use kmem_paging::format::Format;
use kmem_paging::{ForkError, ForkItem, ForkStep, Run};

use super::super::modes::request;
use super::model::{Item, Model, expressed, inside, same};
use super::{Table, World, pages};

impl<F: Format> World<F> {
    /// A child with copies of what the parent has in one area; both lose the right to write.
    pub(super) fn fork(&mut self) {
        if self.spaces.len() >= 4 {
            return;
        }
        let parent = self.rng.below(self.spaces.len() as u64) as usize;
        let Ok(child) = Table::<F>::empty_like(self.env, self.spaces[parent].table) else {
            return;
        };
        let child = self.add_space(Some(child));
        let page = self.areas[self.rng.below(2) as usize];
        let count = 48;
        let env = self.env;
        let keep_parent = self.rng.below(2) == 0;
        let mut copies = Vec::new();
        let mut gather = self.spaces[parent].table.gather::<16>();
        let out_of_frames = Cell::new(false);
        let fuse = self.fuse;
        let result = self.spaces[parent].table.fork_into(
            self.spaces[child].table,
            pages(page, count),
            &mut gather,
            |item| match item {
                ForkItem::Payload(page, payload) => {
                    copies.push((page.number(), Item::Payload(payload.number())));
                    ForkStep::Payload(payload)
                }
                ForkItem::Leaf(leaf) => {
                    // Frames of pages are the caller's: the fuse is for tables.
                    env.pool.set_fuse(None);
                    let frame = env.pool.alloc(&request::<F>(leaf.order));
                    env.pool.set_fuse(fuse.map(|_| 0));
                    let Ok(handle) = frame else {
                        out_of_frames.set(true);
                        return ForkStep::Stop;
                    };
                    let child = leaf.attributes.write_protected();
                    let item = Item::Leaf {
                        frame: handle.first().number(),
                        order: leaf.order,
                        attributes: expressed::<F>(&child),
                        dirty: Some(child.dirty),
                    };
                    copies.push((leaf.page.number(), item));
                    ForkStep::Leaf {
                        handle,
                        child,
                        parent: (!keep_parent).then_some(leaf.attributes.write_protected()),
                    }
                }
            },
        );
        if let Err((ForkError::Memory(_), _)) = result {
            drop(gather);
            self.unchanged(parent);
            assert!(copies.is_empty());
            assert_eq!(self.spaces[child].table.table_count(), 1);
            return;
        }
        if let Err((error, handle)) = result {
            assert!(out_of_frames.get(), "tables were reserved: {error}");
            // Out of memory on the way: the child goes again, and the parent keeps what it lost.
            if let Some(handle) = handle {
                env.pool.free(handle);
            }
            gather.commit_to(&env.pool);
            drop(gather);
            self.spaces[parent].waiting.clear();
            self.reload(parent);
            let of = self.spaces.remove(child);
            self.free_asids.push(of.asid);
            self.free_asids.retain(|&asid| asid != 0);
            // SAFETY: leaked by `Space::new`, and forgotten by everybody.
            let table = *unsafe { Box::from_raw(std::ptr::from_ref(of.table).cast_mut()) };
            table.destroy(|_, frame| env.pool.free(frame), |_, _| {});
            return;
        }
        let of = &mut self.spaces[parent];
        let mut expected = inside::<F>(&mut of.model, page, count);
        expected.retain(|(first, _)| (page..page + count).contains(first));
        assert_eq!(expected.len(), copies.len(), "what was copied");
        for ((first, item), (page, _)) in expected.iter().zip(&copies) {
            assert_eq!(first, page);
            if let Item::Leaf {
                frame,
                order,
                attributes,
                dirty,
            } = *item
                && !keep_parent
            {
                let attributes = expressed::<F>(&attributes.write_protected());
                let item = Item::Leaf {
                    frame,
                    order,
                    attributes,
                    dirty,
                };
                of.model.insert(*first, item);
            }
        }
        self.spaces[child].model.extend(copies);
        let (from, to) = self.touched(page, count);
        self.settle(parent, gather, from, to - from);
    }

    /// Takes the model of a space from its table, after an operation that stopped half way.
    fn reload(&mut self, space: usize) {
        let lower = self.lower();
        let of = &mut self.spaces[space];
        let mut cursor = of.table.cursor(lower).unwrap();
        let mut model = Model::new();
        while let Some(run) = cursor.next_run() {
            match run {
                Run::Payload(page, payload) => {
                    model.insert(page.number(), Item::Payload(payload.number()));
                }
                Run::Leaves { range, first } => {
                    let step = first.order.frames();
                    for index in 0..range.count() / step {
                        let item = Item::Leaf {
                            frame: first.frame.number() + index * step,
                            order: first.order,
                            attributes: expressed::<F>(&first.attributes),
                            dirty: Some(first.attributes.dirty),
                        };
                        model.insert(first.page.number() + index * step, item);
                    }
                }
                _ => {}
            }
        }
        drop(cursor);
        of.model = model;
    }

    /// Takes a space down; its tag and its frames go to others at once.
    pub(super) fn destroy(&mut self, victim: usize) {
        self.commit_all(victim);
        self.spaces[victim].compare(self.lower());
        let last = self.spaces.len() - 1;
        let other = if victim == 0 { last } else { 0 };
        for cpu in 0..self.setup.cpus {
            if self.loaded[cpu] == victim {
                self.load(cpu, other);
            }
        }
        let of = self.spaces.remove(victim);
        for loaded in &mut self.loaded {
            if *loaded > victim {
                *loaded -= 1;
            }
        }
        let mut left = of.model;
        let env = self.env;
        // SAFETY: leaked by `Space::new`, and forgotten by everybody: its gathers are committed.
        let table = *unsafe { Box::from_raw(std::ptr::from_ref(of.table).cast_mut()) };
        let mut payloads = Vec::new();
        table.destroy(
            |leaf, frame| {
                let item = left.remove(&leaf.page.number()).expect("in the model");
                same(leaf.page.number(), &item, &leaf);
                assert_eq!((frame.first(), frame.order()), (leaf.frame, leaf.order));
                env.pool.free(frame);
            },
            |page, payload| payloads.push((page.number(), payload.number())),
        );
        for (page, number) in payloads {
            assert_eq!(left.remove(&page), Some(Item::Payload(number)));
        }
        assert!(left.is_empty(), "{left:?} were not given back");
        if of.asid != 0 {
            self.free_asids.insert(0, of.asid);
        }
        self.audit();
    }
}

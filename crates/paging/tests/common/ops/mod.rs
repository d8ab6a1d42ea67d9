// Operations on a page table, a flat map that says what they must come to, and the comparison of the two.
//
// One operation is six bytes, so that proptest, a fuzzer and a stored seed speak of the same thing. Here: what the bytes mean, and that
// an operation that lacks memory says so and changes nothing. What the table should say is in `model.rs`, whose frames those are in
// `pool.rs`, the operations in `fill.rs`, `change.rs`, `unmap.rs`, `huge.rs` and `fork.rs`.

mod change;
mod fill;
mod fork;
mod huge;
mod model;
mod pool;
mod unmap;

use std::collections::BTreeMap;

use kmem_hal::{AllocError, Frame, Order, OwnedFrame, Page, PageRange};
use kmem_paging::format::Format;
use kmem_paging::{Attributes, Cursor, Gather, MemoryType, PageTable, Rights, SoftBit, TableCache};

use super::machine::{Machine, TestEnv};
use model::{Slot, same};
use pool::Pool;

type Table<F> = PageTable<F, &'static TestEnv, OwnedFrame>;

type TestCursor<'t, F> = Cursor<'t, F, &'static TestEnv, OwnedFrame>;

type TestGather<'t, F> = Gather<'t, F, &'static TestEnv, OwnedFrame, 1>;

/// What six bytes come to.
#[derive(Clone, Copy)]
struct Step {
    /// The half of the space that it is in.
    half: PageRange,
    page: u64,
    range: PageRange,
    count: u64,
    attributes: Attributes,
    order: Order,
    /// The page of a leaf of `order` that covers `page`.
    huge: u64,
    extra: u8,
}

/// A table, its model, and the pool of its frames.
pub struct World<F: Format> {
    machine: Machine,
    table: Table<F>,
    model: BTreeMap<u64, Slot>,
    pool: Pool,
    areas: Vec<u64>,
}

thread_local! {
    static MACHINE: std::cell::Cell<Option<Machine>> = const { std::cell::Cell::new(None) };
}

fn at(number: u64) -> Page {
    Page::new(number).unwrap()
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::with_count(at(first), count).unwrap()
}

impl<F: Format> World<F> {
    pub fn new() -> Self {
        // One machine for all runs of a thread: a run that ends well gives back all that it took.
        let machine = MACHINE
            .with(|kept| kept.take())
            .unwrap_or_else(|| Machine::new(4096));
        let table = Table::<F>::new(machine.env()).unwrap();
        let canonical = F::canonical(table.levels());
        let top = canonical.lower_end().as_u64() >> 12;
        let mut areas = vec![
            0,
            0x200 - 20,
            0x400 - 20,
            0x4_0000 - 20,
            top + 1 - 0x400,
            top + 1 - 60,
        ];
        if let Some(start) = canonical.upper_start() {
            areas.push(start.as_u64() >> 12);
            areas.push(Page::LIMIT - 60);
        }
        Self {
            machine,
            table,
            model: BTreeMap::new(),
            pool: Pool::default(),
            areas,
        }
    }

    /// The last page of the half that `page` is in.
    fn half_end(&self, page: u64) -> u64 {
        let lower = F::canonical(self.table.levels()).lower_end().as_u64() >> 12;
        if page <= lower {
            lower
        } else {
            Page::LIMIT - 1
        }
    }

    fn half(&self, page: u64) -> PageRange {
        let end = self.half_end(page);
        let canonical = F::canonical(self.table.levels());
        let first = if end == Page::LIMIT - 1 && page > canonical.lower_end().as_u64() >> 12 {
            canonical.upper_start().unwrap().as_u64() >> 12
        } else {
            0
        };
        PageRange::new(at(first), at(end)).unwrap()
    }

    fn attributes(&self, seed: u8) -> Attributes {
        let rights = [
            Rights::USER_DATA,
            Rights::READ | Rights::USER,
            Rights::USER_CODE,
            Rights::KERNEL_DATA,
            Rights::empty(),
            Rights::all(),
        ][usize::from(seed % 6)];
        let mut attributes = Attributes::new(rights);
        if seed & 0x10 != 0 {
            attributes = attributes.accessed();
        }
        if seed & 0x20 != 0 {
            attributes = attributes.dirty();
        }
        if seed & 0x40 != 0 {
            attributes = attributes.soft(SoftBit::<F, 1>::BIT);
        }
        if seed & 0x80 != 0 {
            attributes = attributes.memory_type(
                [
                    MemoryType::Uncached,
                    MemoryType::WriteThrough,
                    MemoryType::WriteCombining,
                ][usize::from(seed % 3)],
            );
        }
        if !F::can_encode(1, Frame::ZERO, &attributes) {
            attributes = attributes.memory_type(MemoryType::WriteBack);
        }
        attributes
    }

    /// Does what six bytes say. With `fuse`, the allocation after that many fails; answers whether one did.
    pub fn step(&mut self, code: [u8; 6], fuse: Option<usize>) -> bool {
        let [kind, area, offset, length, seed, extra] = code;
        let base = self.areas[usize::from(area) % self.areas.len()];
        let mut page = base + u64::from(offset) % 56;
        let end = self.half_end(page);
        page = page.min(end);
        let mut count = 1 + u64::from(length) % 40;
        if extra & 0x80 != 0 {
            // Now and then a large range.
            count = 1 << (length % 20);
        }
        count = count.min(end - page + 1);
        let range = pages(page, count);
        let attributes = self.attributes(seed);
        let orders = self.orders();
        let order = orders[usize::from(extra) % orders.len()];
        if fuse.is_some() {
            // What is cached would hide the failure.
            TableCache::shrink(self.machine.env(), usize::MAX);
        }
        let before = fuse.map(|_| self.model.clone());
        let calls = self.machine.frames.calls();
        // Who was here before may have left it set, in another world even: the machine is used again.
        let _ = self.machine.frames.was_exhausted();
        self.machine.frames.set_fuse(fuse);
        let failed = self.apply(
            kind,
            &Step {
                half: self.half(page),
                page,
                range,
                count,
                attributes,
                order,
                huge: page >> order.get() << order.get(),
                extra,
            },
        );
        self.machine.frames.set_fuse(None);
        let asked = self.machine.frames.calls() - calls;
        if let (Some(fuse), Some(before)) = (fuse, before) {
            // A huge leaf of some formats takes more tables than there are frames, if it must be split far down.
            let exhausted = self.machine.frames.was_exhausted();
            assert_eq!(
                failed.is_some(),
                asked > fuse || exhausted,
                "a failed allocation is told"
            );
            if failed.is_some() {
                assert_eq!(self.model, before);
            }
            if exhausted {
                return false;
            }
        }
        failed.is_some()
    }

    /// Does what six bytes say with its first allocation failing, then with its second and so on, until it needs no more; then it is done for
    /// good. `refused` is called after each refusal. Of operations that need hundreds of tables, only some of the later ones fail.
    pub fn step_failing(&mut self, code: [u8; 6], mut refused: impl FnMut(&Self)) {
        let mut fuse = 0;
        while self.step(code, Some(fuse)) {
            refused(self);
            fuse += 1 + fuse / 8;
        }
    }

    fn apply(&mut self, kind: u8, step: &Step) -> Option<AllocError> {
        match kind % 19 {
            0 | 1 => self.map_leaf(step),
            2 => self.map_run(step),
            3 | 4 => self.unmap_shown(step),
            5 => self.update(step),
            6 => self.map_payload(step),
            7 => self.set_payload(step),
            8 => self.replace(step),
            9 => self.harvest(step),
            10 => self.split(step),
            11 => self.merge(step),
            13 => self.protect(step),
            14 => self.unmap(step.range),
            15 => self.map_divided(step),
            16 => self.relax(step),
            17 => self.look(step),
            18 => self.fork(step.range),
            _ => self.relocate(step),
        }
    }

    /// Changes the table through a cursor; no frame comes free by it.
    fn changing<R>(
        &self,
        half: PageRange,
        change: impl FnOnce(&mut TestCursor<'_, F>, &mut TestGather<'_, F>) -> R,
    ) -> R {
        let mut gather = self.table.gather::<1>();
        let mut cursor = self.table.cursor(half).unwrap();
        let result = change(&mut cursor, &mut gather);
        drop(cursor);
        gather.commit(drop);
        result
    }

    /// Takes everything down; nothing may be left.
    pub fn finish(mut self) {
        self.compare();
        let mut left = self.model;
        let pool = &mut self.pool;
        let payloads = std::cell::RefCell::new(Vec::new());
        self.table.destroy(
            |leaf, handle| {
                let slot = left.remove(&leaf.page.number()).unwrap();
                same(leaf.page.number(), &slot, &leaf);
                assert_eq!(handle.first(), leaf.frame);
                pool.free(handle);
            },
            |page, payload| {
                payloads
                    .borrow_mut()
                    .push((page.number(), payload.number()))
            },
        );
        for (page, number) in payloads.into_inner() {
            assert_eq!(left.remove(&page), Some(Slot::Payload(number)));
        }
        assert!(left.is_empty());
        assert!(self.pool.out.is_empty(), "frames leaked");
        TableCache::shrink(self.machine.env(), usize::MAX);
        assert_eq!(self.machine.frames.out(), 0, "tables leaked");
        self.machine.flushes.0.lock().unwrap().clear();
        MACHINE.with(|kept| kept.set(Some(self.machine)));
    }
}

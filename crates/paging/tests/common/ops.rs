// Operations on a page table, a flat map that says what they must come to, and the comparison of the two.
//
// One operation is six bytes, so that proptest, a fuzzer and a stored seed speak of the same thing.
use std::collections::{BTreeMap, BTreeSet};

use kmem_hal::{AllocError, Frame, Order, OwnedFrame, Page, PageRange};
use kmem_paging::format::Format;
use kmem_paging::{
    Attributes, ChangeError, Cleared, Entry, ForkError, ForkItem, ForkStep, Harvest, HugeError,
    Leaf, MapError, MemoryType, MoveError, PageTable, Payload, Replaced, Rights, Run, SoftBit,
    TableCache, TableError,
};

use super::machine::{Machine, TestEnv};

/// What a page has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Leaf {
        frame: u64,
        order: Order,
        attributes: Attributes,
    },
    Payload(u64),
}

impl Slot {
    fn pages(&self) -> u64 {
        match self {
            Self::Leaf { order, .. } => order.frames(),
            Self::Payload(_) => 1,
        }
    }
}

/// Frames that nobody has memory for: only their ownership is watched.
#[derive(Default)]
struct Pool {
    /// First frame and count of each run that is out.
    out: BTreeMap<u64, u64>,
    free: BTreeMap<u8, Vec<u64>>,
    next: u64,
}

impl Pool {
    fn alloc(&mut self, order: Order) -> OwnedFrame {
        let count = order.frames();
        let first = self
            .free
            .entry(order.get())
            .or_default()
            .pop()
            .unwrap_or_else(|| {
                let first = self.next.max(0x1_0000).next_multiple_of(count);
                self.next = first + count;
                first
            });
        self.out.insert(first, count);
        // SAFETY: O1: the pool gives a number to one owner at a time, and nobody reads such memory.
        unsafe { OwnedFrame::from_raw(Frame::from_number(first), order) }
    }

    fn free(&mut self, frame: OwnedFrame) {
        // A part of what was given, or several neighbours that a merged leaf made one.
        let (first, end) = (frame.first().number(), frame.range().end_number());
        let mut at = first;
        while at < end {
            let (&start, &length) = self.out.range(..=at).next_back().expect("freed by nobody");
            let stop = end.min(start + length);
            assert!(at < stop, "freed twice: {frame:?}");
            self.out.remove(&start);
            if start < at {
                self.out.insert(start, at - start);
            }
            if stop < start + length {
                self.out.insert(stop, start + length - stop);
            }
            at = stop;
        }
        self.free
            .entry(frame.order().get())
            .or_default()
            .push(first);
        let _ = frame.into_raw();
    }
}

type Table<F> = PageTable<F, &'static TestEnv, OwnedFrame>;

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

    /// The orders that leaves can have, ascending.
    fn orders(&self) -> Vec<Order> {
        F::LEVELS[..self.table.levels()]
            .iter()
            .filter(|level| level.leaf)
            .map(|level| level.order())
            .collect()
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

    /// The entry that covers `page`.
    fn find(&self, page: u64) -> Option<(u64, Slot)> {
        let (&first, &slot) = self.model.range(..=page).next_back()?;
        (first + (slot.pages() - 1) >= page).then_some((first, slot))
    }

    /// Cuts leaves until `page` starts one, if one covers it.
    fn cut(&mut self, page: u64) {
        while let Some((first, slot)) = self.find(page) {
            let Slot::Leaf {
                frame,
                order,
                attributes,
            } = slot
            else {
                return;
            };
            if first == page {
                return;
            }
            self.split_model(first, frame, order, attributes);
        }
    }

    fn split_model(&mut self, first: u64, frame: u64, order: Order, attributes: Attributes) {
        let orders = self.orders();
        let position = orders.iter().position(|&other| other == order).unwrap();
        // A level without leaves in between would show here; x86 has none.
        let part = orders[position - 1];
        self.model.remove(&first);
        for index in 0..order.frames() / part.frames() {
            let offset = index * part.frames();
            let slot = Slot::Leaf {
                frame: frame + offset,
                order: part,
                attributes,
            };
            self.model.insert(first + offset, slot);
        }
    }

    /// Cuts leaves at both ends of a range, and gives what starts inside.
    fn inside(&mut self, first: u64, count: u64) -> Vec<(u64, Slot)> {
        self.cut(first);
        if first + count < Page::LIMIT {
            self.cut(first + count);
        }
        let end = first + (count - 1);
        self.model
            .range(first..=end)
            .map(|(&page, &slot)| (page, slot))
            .collect()
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

    fn expressed(&self, order: Order, attributes: &Attributes) -> Attributes {
        let level = F::LEVELS
            .iter()
            .position(|level| level.order() == order)
            .unwrap()
            + 1;
        F::expressible(level, attributes)
    }

    /// Tables that the model needs: emptied ones must be gone, others must be there.
    fn expected_tables(&self) -> usize {
        let levels = self.table.levels();
        let mut tables = BTreeSet::new();
        let fixed = if F::FIXED_TOP {
            F::LEVELS[levels - 1].entries() as u64
        } else {
            0
        };
        for top in 0..fixed {
            let level = F::LEVELS[levels - 1];
            tables.insert((levels - 1, top << level.shift));
        }
        for (&page, slot) in &self.model {
            let order = match slot {
                Slot::Leaf { order, .. } => *order,
                Slot::Payload(_) => Order::ZERO,
            };
            let lowest = F::LEVELS
                .iter()
                .position(|level| level.order() == order)
                .unwrap()
                + 1;
            for number in lowest..levels {
                let level = F::LEVELS[number - 1];
                tables.insert((
                    number,
                    page >> (level.shift + level.bits) << (level.shift + level.bits),
                ));
            }
        }
        tables.len() + 1
    }

    /// Everything that the table says, held against everything that the model says.
    pub fn compare(&self) {
        let mut seen = BTreeMap::new();
        let mut halves = vec![self.half(0)];
        if F::canonical(self.table.levels()).upper_start().is_some() {
            halves.push(self.half(Page::LIMIT - 1));
        }
        for half in halves {
            let mut cursor = self.table.cursor(half).unwrap();
            let mut expected = half.first().number();
            while let Some(run) = cursor.next_run() {
                assert_eq!(
                    run.range().first().number(),
                    expected,
                    "runs follow each other"
                );
                expected = run.range().last().number().wrapping_add(1);
                match run {
                    Run::Absent(_) => {}
                    Run::Payload(page, payload) => {
                        seen.insert(page.number(), Slot::Payload(payload.number()));
                    }
                    Run::Leaves { range, first } => {
                        let step = first.order.frames();
                        for index in 0..range.count() / step {
                            let offset = index * step;
                            let slot = Slot::Leaf {
                                frame: first.frame.number() + offset,
                                order: first.order,
                                attributes: first.attributes,
                            };
                            seen.insert(first.page.number() + offset, slot);
                        }
                    }
                    _ => unreachable!(),
                }
            }
            assert_eq!(
                expected,
                half.last().number().wrapping_add(1) & (Page::LIMIT | (Page::LIMIT - 1))
            );
        }
        assert_eq!(seen, self.model);
        assert_eq!(self.table.table_count(), self.expected_tables(), "tables");
        let leaves: u64 = self
            .model
            .values()
            .map(|slot| {
                if let Slot::Leaf { order, .. } = slot {
                    order.frames()
                } else {
                    0
                }
            })
            .sum();
        assert_eq!(self.pool.out.values().sum::<u64>(), leaves, "frames");
        let cached = kmem_paging::Env::cache(self.machine.env()).length();
        assert_eq!(
            self.machine.frames.out(),
            self.table.table_count() + cached,
            "table frames"
        );
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
        self.machine.frames.set_fuse(fuse);
        let failed = self.apply(kind, page, range, attributes, order, extra);
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

    fn apply(
        &mut self,
        kind: u8,
        page: u64,
        range: PageRange,
        attributes: Attributes,
        order: Order,
        extra: u8,
    ) -> Option<AllocError> {
        let count = range.count();
        let half = self.half(page);
        let huge = page >> order.get() << order.get();
        match kind % 19 {
            0 | 1 => {
                // One leaf, of any size.
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
            }
            2 => {
                // A range of small leaves.
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
                return failed;
            }
            3 | 4 => {
                let mut cleared = Vec::new();
                let mut gather = self.table.gather::<3>();
                let mut cursor = self.table.cursor(half).unwrap();
                let mut rest = range;
                let mut failed = None;
                loop {
                    let result = cursor.unmap_with(rest, &mut gather, |what| cleared.push(what));
                    match result {
                        Ok(_) => break,
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
            }
            5 => {
                let mut gather = self.table.gather::<1>();
                let mut cursor = self.table.cursor(half).unwrap();
                let result = cursor.update(range, &mut gather, |_| Some(attributes));
                drop(cursor);
                gather.commit(drop);
                drop(gather);
                match result {
                    Ok(_) => {}
                    Err(ChangeError::Memory(error)) => return Some(error),
                    Err(other) => panic!("{other}"),
                }
                for (first, slot) in self.inside(page, count) {
                    if let Slot::Leaf { frame, order, .. } = slot {
                        let attributes = self.expressed(order, &attributes);
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
            }
            6 => {
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
            }
            7 => {
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
            }
            8 => {
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
            }
            9 => {
                let bits = Harvest::from_bits_truncate(extra);
                let mut gather = self.table.gather::<1>();
                let mut cursor = self.table.cursor(half).unwrap();
                let mut shown = Vec::new();
                let result = cursor.harvest(range, bits, &mut gather, |leaf| {
                    shown.push(leaf.page.number())
                });
                drop(cursor);
                gather.commit(drop);
                drop(gather);
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
            }
            10 => {
                let mut gather = self.table.gather::<1>();
                let mut cursor = self.table.cursor(half).unwrap();
                let result = cursor.split(at(page), &mut gather);
                drop(cursor);
                gather.commit(drop);
                drop(gather);
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
            }
            11 => {
                let orders = self.orders();
                let position = usize::from(extra) % (orders.len() - 1);
                let (small, order) = (orders[position], orders[position + 1]);
                let first = page >> order.get() << order.get();
                let mut gather = self.table.gather::<1>();
                let mut cursor = self.table.cursor(half).unwrap();
                let result = cursor.merge(at(first), order, &mut gather);
                drop(cursor);
                gather.commit(drop);
                drop(gather);
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
            }
            13 => {
                let rights = attributes.rights;
                let mut gather = self.table.gather::<1>();
                let mut cursor = self.table.cursor(half).unwrap();
                let result = cursor.protect(range, rights, &mut gather);
                drop(cursor);
                gather.commit(drop);
                drop(gather);
                match result {
                    Ok(_) => {}
                    Err(ChangeError::Memory(error)) => return Some(error),
                    Err(other) => panic!("{other}"),
                }
                self.change(page, count, |attributes| attributes.rights(rights));
            }
            14 => return self.unmap(range),
            15 => return self.map_divided(page, attributes, order, extra),
            16 => {
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
            }
            17 => {
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
            }
            18 => return self.fork(range),
            _ => {
                let to = self.areas[usize::from(extra) % self.areas.len()] + u64::from(extra >> 3);
                let mut gather = self.table.gather::<1>();
                let result = self
                    .table
                    .move_range(range, at(to.min(Page::LIMIT - 1)), &mut gather);
                gather.commit(drop);
                drop(gather);
                let inside_half = PageRange::with_count(at(to), count).is_some_and(|target| {
                    self.half(to).contains_range(target) && !target.overlaps(range)
                });
                match result {
                    Ok(_) => {
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
            }
        }
        None
    }

    /// Gives every leaf that starts in a range other attributes.
    fn change(&mut self, page: u64, count: u64, how: impl Fn(Attributes) -> Attributes) {
        for (first, slot) in self.inside(page, count) {
            if let Slot::Leaf {
                frame,
                order,
                attributes,
            } = slot
            {
                let attributes = self.expressed(order, &how(attributes));
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
    }

    /// Unmaps without a look at what goes: a page of a held table by itself, well-filled tables whole.
    fn unmap(&mut self, range: PageRange) -> Option<AllocError> {
        let single = range.count() == 1;
        let mut payloads = Vec::new();
        let pool = &mut self.pool;
        let mut gather = self.table.gather::<3>();
        let mut cursor = self.table.cursor(range).unwrap();
        let mut rest = range;
        loop {
            let result = if single {
                cursor.own(range.first()).unwrap();
                cursor.unmap(range, &mut gather)
            } else {
                cursor.unmap_giving(rest, &mut gather, |payload| payloads.push(payload.number()))
            };
            match result {
                Ok(_) => break,
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
        }
        drop(cursor);
        gather.commit_with(
            |handle| pool.free(handle),
            |payload| payloads.push(payload.number()),
        );
        drop(gather);
        let mut expected = Vec::new();
        for (first, slot) in self.inside(range.first().number(), range.count()) {
            self.model.remove(&first);
            if let Slot::Payload(number) = slot {
                expected.push(number);
            }
        }
        if !single {
            payloads.sort_unstable();
            expected.sort_unstable();
            assert_eq!(payloads, expected);
        }
        None
    }

    /// Maps a block of up to 16 MiB as leaves of `largest` at most.
    fn map_divided(
        &mut self,
        page: u64,
        attributes: Attributes,
        largest: Order,
        extra: u8,
    ) -> Option<AllocError> {
        let block = Order::new(extra % 13).unwrap();
        let handle = self.pool.alloc(block);
        let frame = handle.first().number();
        let half = self.half(page);
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

    /// Copies a range into a child, which is held against the model and taken down; both sides lose the right to write.
    fn fork(&mut self, range: PageRange) -> Option<AllocError> {
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

    fn inside_free(&self, first: u64, count: u64) -> bool {
        self.find(first).is_none()
            && self
                .model
                .range(first..=first + (count - 1))
                .next()
                .is_none()
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

fn same(first: u64, slot: &Slot, leaf: &Leaf) {
    let found = Slot::Leaf {
        frame: leaf.frame.number(),
        order: leaf.order,
        attributes: leaf.attributes,
    };
    assert_eq!((first, *slot), (leaf.page.number(), found));
}

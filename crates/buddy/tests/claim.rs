//! CMA, claims of ranges and compaction, with an owner who moves pages and checks that nothing is lost.

mod common;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use common::NoOwner;
use common::machine::{Machine, boot, map, map_of_nodes, one_zone, start};
use common::window::Window;
use kmem_buddy::{
    Buddy, ClaimError, CmaArea, Compacted, Config, Emptying, PlaceError, Reservation, ZoneFree,
    ZoneLimits,
};
use kmem_hal::{
    Frame, FrameRange, FrameRequest, FrameSink, FrameSource, Migrate, MigrateError, NoCpuCall,
    NodeId, Order, OwnedFrame, PhysMap, Pressure, PressureLevel, SingleCpu, Spin,
};

const FRAMES: u64 = 0x4000;

/// User pages: each has an id that stands in its memory.
struct Pages<'a> {
    window: &'a Window,
    pages: RefCell<BTreeMap<u64, (OwnedFrame, u64)>>,
    pinned: RefCell<BTreeSet<u64>>,
    /// Frames that are freed when somebody wants to move them: Gone.
    vanishing: RefCell<BTreeSet<u64>>,
    moved: RefCell<u64>,
    sink: &'a Machine<'a>,
}

impl<'a> Pages<'a> {
    fn new(window: &'a Window, sink: &'a Machine<'a>) -> Self {
        Self {
            window,
            pages: RefCell::default(),
            pinned: RefCell::default(),
            vanishing: RefCell::default(),
            moved: RefCell::default(),
            sink,
        }
    }

    fn word(&self, frame: Frame) -> *mut u64 {
        self.window.to_ptr(frame.start()).cast()
    }

    fn add(&self, frame: OwnedFrame) {
        let id = frame.first().number() ^ 0xabcd_0000;
        // SAFETY: the frame is owned here, and the window backs it.
        unsafe { self.word(frame.first()).write(id) };
        self.pages
            .borrow_mut()
            .insert(frame.first().number(), (frame, id));
    }

    fn fill(&self) {
        while let Ok(frame) = self.sink.alloc(&FrameRequest::ONE.movable()) {
            self.add(frame);
        }
    }

    fn remove(&self, frame: u64) {
        let (frame, id) = self.pages.borrow_mut().remove(&frame).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { self.word(frame.first()).read() }, id);
        self.sink.free(frame);
    }

    fn check(&self) {
        for (frame, id) in self.pages.borrow().values() {
            // SAFETY: as above.
            assert_eq!(unsafe { self.word(frame.first()).read() }, *id, "{frame:?}");
        }
    }
}

impl Migrate for Pages<'_> {
    fn migrate(
        &self,
        from: Frame,
        to: OwnedFrame,
    ) -> Result<OwnedFrame, (MigrateError, OwnedFrame)> {
        let number = from.number();
        if self.vanishing.borrow_mut().remove(&number) {
            self.remove(number);
            return Err((MigrateError::Gone, to));
        }
        if self.pinned.borrow().contains(&number) {
            return Err((MigrateError::Pinned, to));
        }
        let Some((old, id)) = self.pages.borrow_mut().remove(&number) else {
            return Err((MigrateError::NotMovable, to));
        };
        // SAFETY: both frames are owned here.
        unsafe { self.word(to.first()).write(self.word(from).read()) };
        self.pages
            .borrow_mut()
            .insert(to.first().number(), (to, id));
        *self.moved.borrow_mut() += 1;
        Ok(old)
    }
}

#[test]
fn a_cma_area_is_lent_to_movable_users_and_claimed_back() {
    let window = Window::new(FRAMES << 12, FRAMES << 12);
    let buddy = boot(&window, &[]);
    let range = FrameRange::from_numbers(0x1000, 0x2000).unwrap();
    assert_eq!(
        buddy.cma_area("odd", FrameRange::from_numbers(0x1001, 0x1201).unwrap()),
        Err(PlaceError::Foreign)
    );
    let area = buddy.cma_area("camera", range).unwrap();
    assert_eq!(buddy.cma_area("again", range), Err(PlaceError::InUse));
    assert_eq!(buddy.alloc_range_at(range), Err(PlaceError::InUse));
    assert_eq!(buddy.zones().next().unwrap().cma, 0x1000);
    assert!(
        buddy
            .mem_info()
            .to_string()
            .contains("CmaTotal:          16384 kB")
    );
    buddy.check().unwrap();

    // Nothing to move.
    let first = buddy
        .cma_claim(&area, 0x400, Order::HUGE_2M, &NoOwner)
        .unwrap();
    assert_eq!(first.range().first().number(), 0x1000);
    let second = buddy.cma_claim(&area, 100, Order::ZERO, &NoOwner).unwrap();
    assert_eq!(second.range().first().number(), 0x1400);
    buddy.free_range(first).unwrap();
    buddy.free_range(second).unwrap();
    assert_eq!(buddy.recount().free, buddy.mem_info().total);

    // Kernel memory never comes from it; user pages do.
    let mut kernel = Vec::new();
    while let Ok(frame) = buddy.alloc(&FrameRequest::ONE) {
        assert!(!range.contains(frame.first()));
        kernel.push(frame);
    }
    let users = Pages::new(&window, &buddy);
    users.fill();
    assert_eq!(users.pages.borrow().len(), 0x1000);
    assert_eq!(
        buddy.cma_claim(&area, 0x200, Order::ZERO, &users),
        Err(ClaimError::OutOfMemory(Frame::new(0x1000).unwrap()))
    );
    for frame in kernel.drain(..0x900) {
        buddy.free(frame);
    }
    // A pinned page and one of the kernel's are stepped over.
    users.pinned.borrow_mut().insert(0x1234);
    users.vanishing.borrow_mut().extend([0x1300, 0x1301]);
    let claimed = buddy.cma_claim(&area, 0x600, Order::ZERO, &users).unwrap();
    assert_eq!(claimed.range().first().number(), 0x1235);
    users.check();
    buddy.check().unwrap();
    assert!(
        users
            .pages
            .borrow()
            .keys()
            .all(|&frame| { !claimed.range().contains(Frame::new(frame).unwrap()) })
    );
    assert_eq!(
        buddy.cma_claim(&area, 0x1000, Order::ZERO, &users),
        Err(ClaimError::NoRoom)
    );
    buddy.free_range(claimed).unwrap();
    for frame in kernel {
        buddy.free(frame);
    }
    let all: Vec<_> = users.pages.borrow().keys().copied().collect();
    for frame in all {
        users.remove(frame);
    }
    buddy.drain_all();
    assert_eq!(buddy.recount().free, buddy.mem_info().total);
    assert_eq!(buddy.misuse(), None);
    buddy.check().unwrap();
}

#[test]
fn a_claim_longer_than_its_area_is_refused() {
    let window = Window::new(FRAMES << 12, FRAMES << 12);
    let buddy = boot(&window, &[]);
    let range = FrameRange::from_numbers(0x1000, 0x1400).unwrap();
    let area = buddy.cma_area("camera", range).unwrap();
    let free = buddy.mem_info().free;
    for frames in [0, range.count() + 1, u64::MAX - 0x1000, u64::MAX] {
        for align in [Order::ZERO, Order::MAX] {
            let refused = buddy.cma_claim(&area, frames, align, &NoOwner);
            assert_eq!(refused.unwrap_err(), ClaimError::NoRoom, "{frames:#x}");
        }
    }
    let refused = buddy.cma_claim(&area, 1, Order::MAX, &NoOwner);
    assert_eq!(refused.unwrap_err(), ClaimError::NoRoom);
    assert_eq!(buddy.mem_info().free, free);
    let whole = buddy.cma_claim(&area, range.count(), Order::ZERO, &NoOwner);
    buddy.free_range(whole.unwrap()).unwrap();
    buddy.check().unwrap();
}

#[test]
fn a_claim_that_fails_leaves_everything_as_it_was() {
    let window = Window::new(FRAMES << 12, FRAMES << 12);
    let buddy = boot(&window, &[]);
    let users = Pages::new(&window, &buddy);
    for _ in 0..6000 {
        users.add(buddy.alloc(&FrameRequest::ONE.movable()).unwrap());
    }
    // Neither the block without frame 0 nor the one with the allocator's tables.
    let taken = *users.pages.borrow().range(0x200..0x400).next().unwrap().0;
    users.pinned.borrow_mut().insert(taken);
    let types = buddy.page_type_info().to_string();
    buddy.drain_all();
    let before = buddy.page_type_info().to_string();
    let range = FrameRange::from_numbers(taken & !0x1ff, (taken & !0x1ff) + 0x200).unwrap();
    let error = buddy.claim(range, &users).unwrap_err();
    assert_eq!(error, ClaimError::Pinned(Frame::new(taken).unwrap()));
    assert!(types.contains("Isolate") && before.contains("Isolate"));
    buddy.drain_all();
    buddy.check().unwrap();
    users.check();
    let outside = FrameRange::from_numbers(FRAMES - 1, FRAMES + 1).unwrap();
    assert_eq!(
        buddy.claim(outside, &users).unwrap_err(),
        ClaimError::Foreign
    );
    // Without the pin the same range is had, is not allocated from meanwhile, and can be taken offline.
    users.pinned.borrow_mut().clear();
    let offline = buddy.claim(range, &users).unwrap();
    users.check();
    while let Ok(frame) = buddy.alloc(&FrameRequest::ONE.movable()) {
        assert!(!range.contains(frame.first()));
    }
    assert_eq!(offline.range(), range);
}

/// Pages of which each is pinned the first times that it is to move.
struct Pinning<'a>(&'a Pages<'a>, u32, RefCell<BTreeMap<u64, u32>>);

impl Migrate for Pinning<'_> {
    fn migrate(
        &self,
        from: Frame,
        to: OwnedFrame,
    ) -> Result<OwnedFrame, (MigrateError, OwnedFrame)> {
        let mut asked = self.2.borrow_mut();
        let asked = asked.entry(from.number()).or_default();
        *asked += 1;
        if *asked <= self.1 {
            return Err((MigrateError::Pinned, to));
        }
        self.0.migrate(from, to)
    }
}

#[test]
fn a_pin_that_ends_soon_is_waited_for() {
    let window = Window::new(FRAMES << 12, FRAMES << 12);
    let buddy = boot(&window, &[]);
    let pages = Pages::new(&window, &buddy);
    pages.fill();
    let range = FrameRange::from_numbers(0x400, 0x410).unwrap();
    for frame in 0x600..0x620 {
        pages.remove(frame);
    }
    let claim = |times| buddy.claim(range, &Pinning(&pages, times, RefCell::default()));
    assert_eq!(claim(9), Err(ClaimError::Pinned(range.first())));
    let claimed = claim(2).unwrap();
    assert_eq!(claimed.range(), range);
    pages.check();
    buddy.free_range(claimed).unwrap();
    buddy.check().unwrap();
}

/// Memory that may be plugged in later is listed and reserved at boot, so that there are tables for it.
#[test]
fn memory_is_plugged_in_and_out() {
    let window = Window::new(FRAMES << 12, FRAMES << 12);
    let plugged = FrameRange::from_numbers(FRAMES / 2, FRAMES).unwrap();
    let buddy = boot(&window, &[(plugged, Reservation::Other)]);
    let total = buddy.mem_info().total;
    let fill = || -> Vec<OwnedFrame> {
        std::iter::from_fn(|| buddy.alloc(&FrameRequest::ONE).ok()).collect()
    };
    let held = fill();
    assert_eq!(held.len() as u64, total);
    assert!(held.iter().all(|frame| !plugged.contains(frame.first())));
    // In: nobody uses it, and it is mapped.
    // SAFETY: as said.
    let joined = unsafe { buddy.release_range(plugged) };
    assert_eq!(joined, Ok(plugged.count()));
    assert_eq!(buddy.mem_info().total, total + plugged.count());
    let users = Pages::new(&window, &buddy);
    for _ in 0..1000 {
        users.add(buddy.alloc(&FrameRequest::ONE.movable()).unwrap());
    }
    assert!(
        users
            .pages
            .borrow()
            .keys()
            .all(|frame| *frame >= FRAMES / 2)
    );
    // Out: its users move, and nothing of it is given any more.
    buddy.free_bulk(held);
    let offline = buddy.claim(plugged, &users).unwrap();
    users.check();
    assert!(users.pages.borrow().keys().all(|frame| *frame < FRAMES / 2));
    let held = fill();
    assert_eq!(held.len() as u64, total - 1000);
    buddy.free_bulk(held);
    // In once more.
    buddy.free_range(offline).unwrap();
    assert_eq!(fill().len() as u64, total + plugged.count() - 1000);
    buddy.check().unwrap();
}

#[test]
fn compaction_makes_every_block_that_there_can_be() {
    let window = Window::new(FRAMES << 12, FRAMES << 12);
    let buddy = boot(&window, &[]);
    let users = Pages::new(&window, &buddy);
    users.fill();
    let mut seed = 99u64;
    let all: Vec<_> = users.pages.borrow().keys().copied().collect();
    for frame in all {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        // Between a tenth and nine tenths of a block are freed.
        if seed % 10 <= (frame >> 9) % 9 {
            users.remove(frame);
        }
    }
    buddy.drain_all();
    let huge = || -> u64 {
        buddy
            .zones()
            .map(|zone| zone.blocks[9] + 2 * zone.blocks[10])
            .sum()
    };
    let used = users.pages.borrow().len() as u64;
    let before = huge();
    // Two fingers, one taking from the top and one filling from the bottom, meet where the free frames below are as many
    // as the pages above: all of those have moved.
    let two_fingers = users.pages.borrow().range(used + 1..).count() as u64;
    // The last block holds the allocator's own tables and the first lacks frame 0: neither counts.
    let possible = (FRAMES / 512 - 2) - used.div_ceil(512);
    let nothing = Emptying {
        first: Frame::ZERO,
        moves: 0,
    };
    let mut plan = [nothing; 64];
    let found = buddy.plan_blocks(&mut plan);
    assert!(plan[..found].is_sorted_by_key(|entry| (entry.moves, entry.first)));
    let mut again = [nothing; 64];
    assert_eq!(buddy.plan_blocks(&mut again), found);
    assert_eq!(plan, again);
    let cheapest: u64 = plan[..(possible - before) as usize]
        .iter()
        .map(|e| u64::from(e.moves))
        .sum();

    let done = buddy.compact(possible - before, &users);
    assert_eq!(done.blocks, possible - before);
    buddy.drain_all();
    assert!(huge() >= possible, "{} of {possible}", huge());
    users.check();
    assert_eq!(users.pages.borrow().len() as u64, used);
    assert_eq!(done.moved, *users.moved.borrow());
    assert!(
        done.moved <= cheapest + cheapest / 4,
        "{} for {cheapest}",
        done.moved
    );
    assert!(
        done.moved < two_fingers,
        "{} against {two_fingers}",
        done.moved
    );
    buddy.check().unwrap();
    assert_eq!(buddy.misuse(), None);
}

/// Pages that move so many times and then no more: what never ends is a failure.
struct Tiring<'a>(&'a Pages<'a>, u64);

impl Migrate for Tiring<'_> {
    fn migrate(
        &self,
        from: Frame,
        to: OwnedFrame,
    ) -> Result<OwnedFrame, (MigrateError, OwnedFrame)> {
        assert!(*self.0.moved.borrow() < self.1, "moves without an end");
        self.0.migrate(from, to)
    }
}

/// Frames that move into a block that was wholly free gain nothing.
#[test]
fn compaction_ends_where_nothing_is_to_be_gained() {
    let window = Window::new(FRAMES << 12, FRAMES << 12);
    let buddy = boot(&window, &[]);
    let users = Pages::new(&window, &buddy);
    users.fill();
    // One block wholly free, one partly, all others full.
    (0x400..0x600).for_each(|frame| users.remove(frame));
    (0x800..0x964).for_each(|frame| users.remove(frame));
    buddy.drain_all();
    let nothing = Emptying {
        first: Frame::ZERO,
        moves: 0,
    };
    let mut plan = [nothing; 64];
    let found = buddy.plan_blocks(&mut plan);
    let partly = Emptying {
        first: Frame::new(0x800).unwrap(),
        moves: 0x200 - 0x164,
    };
    assert_eq!(plan[..found], [partly]);
    let done = buddy.compact(u64::MAX, &Tiring(&users, 10_000));
    assert_eq!((done.blocks, done.moved), (0, 0));
    // With as many free frames in a third block as the second has pages, there is one block to gain.
    (0xa00..0xa9c).for_each(|frame| users.remove(frame));
    let done = buddy.compact(u64::MAX, &Tiring(&users, 10_000));
    assert_eq!((done.blocks, done.moved), (1, 0x200 - 0x164));
    users.check();
    buddy.check().unwrap();
    assert_eq!(buddy.misuse(), None);
}

/// Frames of one zone that move into a wholly free block of another: what was gained is counted, not what was claimed.
#[test]
fn compaction_counts_what_it_gained() {
    let window = Window::new(FRAMES << 12, FRAMES << 12);
    let config = Config::new()
        .limits(ZoneLimits::X86_64)
        .min_free_kib(0)
        .reserve_ratio([0; 5]);
    let buddy = start(&window, &mut map(&[(0, FRAMES << 12)]), &config);
    let users = Pages::new(&window, &buddy);
    users.fill();
    // In the higher zone a block that is wholly free; in the lower one two that are half free.
    (0x2000..0x2200).for_each(|frame| users.remove(frame));
    (0x400..0x500).for_each(|frame| users.remove(frame));
    (0x800..0x900).for_each(|frame| users.remove(frame));
    buddy.drain_all();
    let whole = || buddy.zones().map(|zone| zone.blocks[9]).sum::<u64>();
    assert_eq!(whole(), 1);
    let done = buddy.compact(u64::MAX, &Tiring(&users, 10_000));
    buddy.drain_all();
    assert_eq!(1 + done.blocks, whole());
    assert_eq!(done.blocks, 1);
    users.check();
    buddy.check().unwrap();
}

/// While a page of one claim moves, somebody else claims from the same area.
struct Meanwhile<'a>(&'a Pages<'a>, RefCell<Option<Box<dyn FnOnce() + 'a>>>);

impl Migrate for Meanwhile<'_> {
    fn migrate(
        &self,
        from: Frame,
        to: OwnedFrame,
    ) -> Result<OwnedFrame, (MigrateError, OwnedFrame)> {
        let then = self.1.borrow_mut().take();
        if let Some(then) = then {
            then();
        }
        self.0.migrate(from, to)
    }
}

#[test]
fn a_claim_steps_over_what_somebody_else_is_emptying() {
    let window = Window::new(FRAMES << 12, FRAMES << 12);
    let buddy = boot(&window, &[]);
    let range = FrameRange::from_numbers(0x1000, 0x1600).unwrap();
    let area = buddy.cma_area("camera", range).unwrap();
    let users = Pages::new(&window, &buddy);
    let fill_area = || {
        let kernel: Vec<_> = std::iter::from_fn(|| buddy.alloc(&FrameRequest::ONE).ok()).collect();
        users.fill();
        buddy.free_bulk(kernel);
        buddy.drain_all();
    };
    fill_area();
    let one = |area: &CmaArea, frames| buddy.cma_claim(area, frames, Order::HUGE_2M, &users);
    let others = RefCell::new(Vec::new());
    let also = || {
        others.borrow_mut().push(one(&area, 0x200).unwrap());
        others.borrow_mut().push(one(&area, 0x200).unwrap());
        assert_eq!(one(&area, 0x200), Err(ClaimError::Busy));
    };
    let busy = FrameRange::from_numbers(0x1000, 0x1200).unwrap();
    let moving = Meanwhile(&users, RefCell::new(Some(Box::new(also))));
    let claimed = buddy.claim(busy, &moving).unwrap();
    assert!(moving.1.borrow().is_none());
    drop(moving);
    for other in others.into_inner() {
        buddy.free_range(other).unwrap();
    }
    buddy.free_range(claimed).unwrap();
    users.check();
    buddy.check().unwrap();
    fill_area();
    // The place that is free is in a block that is being emptied; those before it are looked at as well.
    (0x1400..0x1500).for_each(|frame| users.remove(frame));
    buddy.drain_all();
    let busy = FrameRange::from_numbers(0x1400, 0x1600).unwrap();
    let found = RefCell::new(None);
    let also = || *found.borrow_mut() = Some(buddy.cma_claim(&area, 0x100, Order::ZERO, &users));
    let moving = Meanwhile(&users, RefCell::new(Some(Box::new(also))));
    let claimed = buddy.claim(busy, &moving).unwrap();
    drop(moving);
    let other = found.into_inner().unwrap().unwrap();
    assert_eq!(other.range().first().number(), 0x1000);
    buddy.free_range(other).unwrap();
    buddy.free_range(claimed).unwrap();
    users.check();
    buddy.check().unwrap();
}

/// Two zones, DMA below frame 0x1000 and DMA32 above, or two nodes, the second from frame 0x2000.
fn boot_two(window: &Window, nodes: bool) -> Machine<'_> {
    let (mut map, config) = if nodes {
        (map_of_nodes(2, FRAMES << 11), one_zone())
    } else {
        let config = Config::new().min_free_kib(0).reserve_ratio([0; 5]);
        (map(&[(0, FRAMES << 12)]), config)
    };
    let buddy = start(window, &mut map, &config);
    assert_eq!(buddy.zones().count(), 2);
    buddy
}

/// Frees these frames, compacts, and gives what that did and how many pages moved to the other zone.
fn compact_two(nodes: bool, free: &[std::ops::Range<u64>]) -> ((u64, u64), u64) {
    let window = Window::new(FRAMES << 12, FRAMES << 12);
    let buddy = boot_two(&window, nodes);
    let users = Pages::new(&window, &buddy);
    users.fill();
    free.iter()
        .flat_map(Clone::clone)
        .for_each(|frame| users.remove(frame));
    buddy.drain_all();
    let upper = || {
        let edge = if nodes { FRAMES / 2 } else { 0x1000 };
        users.pages.borrow().range(edge..).count() as u64
    };
    let before = upper();
    let whole = || -> u64 {
        let blocks = |zone: ZoneFree| zone.blocks[9] + 2 * zone.blocks[10];
        buddy.zones().map(blocks).sum()
    };
    let whole_before = whole();
    let done = buddy.compact(u64::MAX, &Tiring(&users, 10_000));
    assert_eq!(whole() - whole_before, done.blocks);
    users.check();
    buddy.check().unwrap();
    assert_eq!(buddy.misuse(), None);
    ((done.blocks, done.moved), upper().abs_diff(before))
}

/// Blocks of the lower zone are emptied into each other, not into blocks of the higher zone that are wholly free.
#[test]
fn compaction_moves_pages_within_their_zone() {
    let done = compact_two(false, &[0x2000..0x2800, 0x400..0x500, 0x800..0x900]);
    assert_eq!(done, ((1, 0x100), 0));
    // What is to be gained in one zone is not measured by what is free in another.
    let done = compact_two(false, &[0x2000..0x2800, 0x400..0x52c, 0x2a00..0x2b2c]);
    assert_eq!(done, ((0, 0), 0));
    // In both.
    let done = compact_two(
        false,
        &[0x400..0x500, 0x800..0x900, 0x2400..0x2500, 0x2800..0x2900],
    );
    assert_eq!(done, ((2, 0x200), 0));
}

#[test]
fn compaction_moves_pages_within_their_node() {
    let done = compact_two(
        true,
        &[0x400..0x500, 0x800..0x900, 0x2400..0x2500, 0x2800..0x2900],
    );
    assert_eq!(done, ((2, 0x200), 0));
    let done = compact_two(true, &[0x400..0x600, 0x2400..0x2500, 0x2800..0x2900]);
    assert_eq!(done, ((1, 0x100), 0));
}

/// Pages move into blocks that were broken up for orders 7 and 8 only where no block is wholly free: until then these are no room.
#[test]
fn compaction_leaves_long_runs_alone_while_a_block_is_whole() {
    for (whole, short, expected) in [
        (true, 50, (0, 0)),
        (true, 200, (1, 128)),
        (true, 256, (2, 256)),
        (false, 50, (1, 128)),
    ] {
        let window = Window::new(FRAMES << 12, FRAMES << 12);
        let buddy = boot(&window, &[]);
        let users = Pages::new(&window, &buddy);
        users.fill();
        // Two long blocks, and then 128 pages in each.
        let seven = FrameRequest::new(Order::new(7).unwrap()).movable();
        let mut others = Vec::new();
        for base in [0x400, 0x800] {
            (base..base + 0x200).for_each(|frame| users.remove(frame));
            buddy.drain_all();
            let mut parts: Vec<_> = (0..4).map(|_| buddy.alloc(&seven).unwrap()).collect();
            assert!(
                parts
                    .iter()
                    .all(|part| part.first().number() & !0x1ff == base)
            );
            let kept = parts.swap_remove(0).into_raw().0;
            for frame in FrameRange::of_order(kept, seven.order).unwrap().iter() {
                // SAFETY: the frames of a block that was just taken and is no longer had as one.
                users.add(unsafe { OwnedFrame::from_raw(frame, Order::ZERO) });
            }
            others.extend(parts);
        }
        buddy.free_bulk(others);
        (0xc00..0xc00 + short).for_each(|frame| users.remove(frame));
        if whole {
            (0x2000..0x2200).for_each(|frame| users.remove(frame));
        }
        buddy.drain_all();
        let done = buddy.compact(u64::MAX, &Tiring(&users, 10_000));
        assert_eq!((done.blocks, done.moved), expected, "{whole} {short}");
        users.check();
        buddy.check().unwrap();
        assert_eq!(buddy.misuse(), None);
    }
}

/// Counts how often somebody was about to be refused.
#[derive(Default)]
struct Short(Cell<u32>);

impl Pressure for &Short {
    fn pressure(&self, _node: NodeId, level: PressureLevel, _request: &FrameRequest) -> bool {
        self.0
            .set(self.0.get() + u32::from(level != PressureLevel::Low));
        false
    }
}

/// Half of eight blocks is free, and all of that is the zone's reserve: one block is tried, and nobody has to give anything up for it.
#[test]
fn a_reserve_is_no_room_for_compaction() {
    let window = Window::new(FRAMES << 12, FRAMES << 12);
    let short = Short::default();
    // SAFETY: one thread.
    let cpu = unsafe { SingleCpu::new() };
    let buddy: Buddy<_, _, Spin, _, _> = Buddy::with(&window, cpu, NoCpuCall, &short);
    let config = Config::new()
        .limits(ZoneLimits::NORMAL_ONLY)
        .min_free_kib(16 << 10);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map(&[(0, FRAMES << 12)]), &config) }.unwrap();
    let mut held = BTreeMap::new();
    while let Ok(frame) = buddy.alloc(&FrameRequest::ONE.movable()) {
        held.insert(frame.first().number(), frame);
    }
    buddy.drain_all();
    // What was left is whole blocks; so many frames of them are taken by place as are freed elsewhere.
    let full = (0..FRAMES)
        .step_by(0x200)
        .filter(|&block| (block..block + 0x200).all(|number| held.contains_key(&number)));
    let full: Vec<_> = full.take(8).collect();
    assert_eq!(full.len(), 8);
    for frame in full.iter().flat_map(|&block| block..block + 0x100) {
        buddy.free(held.remove(&frame).unwrap());
    }
    buddy.drain_all();
    let whole = (0..FRAMES)
        .step_by(0x200)
        .map(|block| Frame::new(block).unwrap());
    let taken: Vec<_> = whole
        .filter_map(|block| buddy.alloc_at(block, Order::HUGE_2M).ok())
        .take(4)
        .collect();
    assert_eq!(taken.len(), 4);
    assert!(buddy.alloc(&FrameRequest::ONE.movable()).is_err());
    short.0.set(0);
    assert_eq!(buddy.compact(u64::MAX, &NoOwner), Compacted::default());
    assert_eq!(short.0.get(), 0);
    buddy.check().unwrap();
}

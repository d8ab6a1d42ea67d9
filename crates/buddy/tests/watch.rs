//! The policies: every wrong free at the call with memory intact, and who holds what.

mod common;

use std::collections::BTreeSet;

use common::machine::{MIB, map};
use common::window::Window;
use kmem_buddy::{
    Audit, ClaimError, Config, EarlyAllocator, FreeError, InitError, Owner, PageOwner, RegionKind,
    Reservation, Watch, WatchedBuddy, ZoneLimits,
};
use kmem_hal::{
    AllocError, CpuId, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, Migrate,
    MigrateError, NodeId, Order, OwnedFrame, PhysAddr, PhysMap, SingleCpu, Spin,
};
use proptest::prelude::*;

type Machine<'a, W> = WatchedBuddy<&'a Window, SingleCpu, W, Spin>;

const END: u64 = 0x2000;
/// The zones' border: 16 MiB.
const BORDER: u64 = 0x1000;

/// 32 MiB in two zones, with a hole from 10 to 11 MiB and 1 MiB reserved at 4 MiB.
fn boot<W: Watch>(window: &Window) -> Machine<'_, W> {
    let mut map = map(&[(0, 10 * MIB), (11 * MIB, 32 * MIB)]);
    map.reserve(PhysAddr::new(4 << 20), 1 << 20, Reservation::KernelImage)
        .unwrap();
    // SAFETY: each test uses its allocator from one thread.
    let buddy = Machine::new(window, unsafe { SingleCpu::new() });
    assert_eq!(
        buddy.alloc(&FrameRequest::ONE),
        Err(AllocError::NotInitialised)
    );
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe {
        buddy.init(
            &mut map,
            &Config::new().min_free_kib(0).reserve_ratio([0; 5]),
        )
    }
    .unwrap();
    buddy
}

fn window() -> Window {
    Window::new(END << 12, END << 12)
}

fn order(order: u8) -> Order {
    Order::new(order).unwrap()
}

/// A block that nobody gave: the wrong free is what is tested.
fn forged(first: u64, wanted: u8) -> OwnedFrame {
    // SAFETY: none; the allocator is to refuse it.
    unsafe { OwnedFrame::from_raw(Frame::new(first).unwrap(), order(wanted)) }
}

/// What is freed wrongly is refused with this error by each call, and nothing has changed.
fn refused<W: Watch>(buddy: &Machine<'_, W>, first: u64, wanted: u8, error: FreeError) {
    let state = |buddy: &Machine<'_, W>| {
        let info = buddy.mem_info();
        (
            info.free + info.cached,
            buddy.misuse().map_or(0, |misuse| misuse.count),
        )
    };
    let before = state(buddy);
    let (found, back) = buddy.try_free(forged(first, wanted)).unwrap_err();
    assert_eq!(found, error, "{first:#x} order {wanted}");
    assert_eq!(
        (back.first().number(), back.order()),
        (first, order(wanted))
    );
    assert_eq!(state(buddy), before);
    buddy.free(back);
    assert_eq!(state(buddy), (before.0, before.1 + 1));
    let misuse = buddy.misuse().unwrap();
    assert_eq!((misuse.error, misuse.first.number()), (error, first));
    let mut once = Some(forged(first, wanted));
    buddy.free_batch(&mut || once.take());
    assert_eq!(state(buddy), (before.0, before.1 + 2));
    buddy.check().unwrap();
}

#[test]
fn every_wrong_free_is_found_at_the_call() {
    let window = window();
    let buddy: Machine<'_, Audit> = boot(&window);
    // Foreign: no memory, a hole, reserved, the allocator's tables, across the end of a zone and of memory.
    refused(&buddy, END + 5, 0, FreeError::Foreign);
    refused(&buddy, 0xa40, 0, FreeError::Foreign);
    refused(&buddy, 0x480, 3, FreeError::Foreign);
    refused(
        &buddy,
        buddy.metadata().first().number(),
        0,
        FreeError::Foreign,
    );
    refused(&buddy, 0x800, 10, FreeError::Foreign);
    // Double: of every order, in an array or in the zone.
    for wanted in 0..=10 {
        let block = buddy.alloc(&FrameRequest::new(order(wanted))).unwrap();
        let first = block.first().number();
        // Wrong order, both ways, and from inside.
        if wanted > 0 {
            refused(&buddy, first, wanted - 1, FreeError::WrongOrder);
            refused(&buddy, first + (1 << wanted) - 1, 0, FreeError::WrongOrder);
            let half = 1 << (wanted - 1);
            refused(&buddy, first + half, wanted - 1, FreeError::WrongOrder);
        }
        if first.is_multiple_of(2 << wanted) && first + (2 << wanted) <= BORDER {
            refused(&buddy, first, wanted + 1, FreeError::WrongOrder);
        }
        buddy.free(block);
        refused(&buddy, first, wanted, FreeError::DoubleFree);
        buddy.drain_all();
        refused(&buddy, first, wanted, FreeError::DoubleFree);
        // The block is intact: it is had once.
        let one = buddy
            .alloc_at(Frame::new(first).unwrap(), order(wanted))
            .unwrap();
        assert!(
            buddy
                .alloc_at(Frame::new(first).unwrap(), Order::ZERO)
                .is_err()
        );
        buddy.free(one);
    }
    // Across the border of two zones: neighbours that were both taken.
    let pair = [BORDER - 1, BORDER].map(|number| {
        let frame = Frame::new(number).unwrap();
        buddy.alloc_at(frame, Order::ZERO).unwrap()
    });
    refused(&buddy, BORDER - 0x1000 + 0x800, 11, FreeError::Foreign);
    pair.into_iter().for_each(|frame| buddy.free(frame));
    buddy.drain_all();
    assert_eq!(buddy.recount().free, buddy.mem_info().total);
}

/// What the plain allocator finds too late: both frees lie in an array, and two owners get the frame.
#[test]
fn a_frame_never_has_two_owners() {
    let window = window();
    let buddy: Machine<'_, (Audit, PageOwner)> = boot(&window);
    let frame = buddy.alloc(&FrameRequest::ONE).unwrap();
    let first = frame.first().number();
    buddy.free(frame);
    buddy.free(forged(first, 0));
    assert_eq!(buddy.misuse().unwrap().error, FreeError::DoubleFree);
    let (one, two) = (
        buddy.alloc(&FrameRequest::ONE).unwrap(),
        buddy.alloc(&FrameRequest::ONE).unwrap(),
    );
    assert_ne!(one, two);
    buddy.free(one);
    buddy.free(two);
}

#[test]
fn halves_are_told_or_refused() {
    let window = window();
    let buddy: Machine<'_, (Audit, PageOwner)> = boot(&window);
    let block = buddy.alloc(&FrameRequest::new(order(3))).unwrap();
    let first = block.first().number();
    let (lower, upper) = buddy.split(block).unwrap();
    refused(&buddy, first, 3, FreeError::WrongOrder);
    let (quarter, last) = buddy.split(upper).unwrap();
    for part in [lower, last, quarter] {
        let (first, order) = (part.first().number(), part.order().get());
        buddy.free(part);
        refused(&buddy, first, order, FreeError::DoubleFree);
    }
    let one = buddy
        .split(buddy.alloc(&FrameRequest::ONE).unwrap())
        .unwrap_err();
    buddy.free(one);
    // Cut behind the policy's back.
    let block = buddy.alloc(&FrameRequest::new(order(1))).unwrap();
    let first = block.first().number();
    let (lower, upper) = block.split().unwrap();
    assert_eq!(buddy.try_free(upper).unwrap_err().0, FreeError::WrongOrder);
    drop(lower);
    buddy.free(forged(first, 1));
    buddy.drain_all();
    assert_eq!(buddy.recount().free, buddy.mem_info().total);
    assert_eq!(owners(&buddy), []);
}

#[test]
fn ranges_come_back_whole_or_in_any_pieces() {
    let window = window();
    let buddy: Machine<'_, (Audit, PageOwner)> = boot(&window);
    let range = buddy
        .alloc_range(704, order(6), &FrameRequest::ONE)
        .unwrap();
    let frames = range.range();
    let first = frames.first().number();
    assert!(buddy.owner_of(frames.last().unwrap()).is_some());
    buddy.free_range(range).unwrap();
    assert!(buddy.owner_of(frames.last().unwrap()).is_none());
    refused(&buddy, first, 0, FreeError::DoubleFree);
    let range = buddy.alloc_range_at(frames).unwrap();
    let mut blocks: Vec<_> = range.into_blocks(order(5)).collect();
    let one = blocks.pop().unwrap();
    let (at, size) = (one.first().number(), one.order().get());
    buddy.free(one);
    refused(&buddy, at, size, FreeError::DoubleFree);
    // Half of it is free already.
    refused(&buddy, at & !0x3f, 6, FreeError::WrongOrder);
    buddy.free_batch(&mut || blocks.pop());
    buddy.drain_all();
    assert_eq!(buddy.recount().free, buddy.mem_info().total);
    buddy.check().unwrap();
}

/// What stands before the allocator has its nodes.
#[test]
fn a_watched_allocator_has_the_nodes_of_the_plain_one() {
    let window = window();
    let mut map = map(&[(0, END << 12)]);
    map.assign_node(
        PhysAddr::new(BORDER << 12),
        (END - BORDER) << 12,
        NodeId::new(1),
    )
    .unwrap();
    // SAFETY: the test uses its allocator from one thread.
    let buddy: Machine<'_, Audit> = Machine::new(&window, unsafe { SingleCpu::new() });
    let config = Config::new()
        .limits(ZoneLimits::NORMAL_ONLY)
        .cpu_node(|_| NodeId::new(1))
        .distance(|from, to| 10 + 7 * from.get().abs_diff(to.get()) as u8);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &config) }.unwrap();
    let [zero, one] = [0, 1].map(NodeId::new);
    let node_of = |frame| FrameSource::node_of_frame(&buddy, Frame::new(frame).unwrap());
    assert_eq!(FrameSource::node_count(&buddy), 2);
    assert_eq!(FrameSource::node_of_cpu(&buddy, CpuId::BOOT), one);
    assert_eq!((node_of(BORDER - 1), node_of(BORDER)), (zero, one));
    assert_eq!(FrameSource::node_distance(&buddy, zero, one), 17);
}

fn owners<W: Watch>(buddy: &Machine<'_, W>) -> Vec<Owner> {
    let mut all = Vec::new();
    buddy.owners(|owner| all.push(owner));
    all
}

#[test]
fn owners_are_the_callers() {
    let window = window();
    let buddy: Machine<'_, PageOwner> = boot(&window);
    let request = FrameRequest::new(order(4));
    let (big, big_line) = (buddy.alloc(&request).unwrap(), line!());
    let small_line = line!();
    let mut small: Vec<_> = (0..3)
        .map(|_| buddy.alloc(&FrameRequest::ONE).unwrap())
        .collect();
    let mut batch = Vec::new();
    let batch_line = line!();
    buddy
        .alloc_batch(&FrameRequest::ONE, 5, &mut |frame| batch.push(frame))
        .unwrap();
    let (page, page_line) = (buddy.get_zeroed_page(&FrameRequest::ONE).unwrap(), line!());
    let place = Frame::new(0x700).unwrap();
    let (at, at_line) = (buddy.alloc_at(place, order(1)).unwrap(), line!());
    // A call of several lines is at one of them.
    let near = |line: u32| {
        let lines = [big_line, small_line, batch_line, page_line, at_line];
        lines.into_iter().filter(|&at| at <= line).max().unwrap()
    };
    let found: Vec<_> = owners(&buddy)
        .iter()
        .map(|owner| {
            (
                near(owner.location.unwrap().line()),
                owner.blocks,
                owner.frames,
            )
        })
        .collect();
    let expected = [
        (big_line, 1, 16),
        (batch_line, 5, 5),
        (small_line, 3, 3),
        (at_line, 1, 2),
        (page_line, 1, 1),
    ];
    assert_eq!(found, expected);
    for frame in big.range().iter() {
        assert_eq!(buddy.owner_of(frame).unwrap().line(), big_line);
        assert!(buddy.owner_of(frame).unwrap().file().ends_with("watch.rs"));
    }
    assert_eq!(
        buddy.owner_of(Frame::new(0x701).unwrap()).unwrap().line(),
        at_line
    );
    assert_eq!(buddy.owner_of(Frame::new(0x702).unwrap()), None);
    assert_eq!(buddy.owner_of(Frame::new(0xa40).unwrap()), None);
    // Through a generic caller it is the line in the caller's crate that asks.
    fn generic(source: &impl FrameSource) -> (OwnedFrame, u32) {
        (source.alloc(&FrameRequest::ONE).unwrap(), line!())
    }
    let (frame, line) = generic(&buddy);
    assert_eq!(buddy.owner_of(frame.first()).unwrap().line(), line);
    buddy.free(frame);
    let text = buddy.show_mem().to_string();
    assert!(text.starts_with("Mem-Info:\n"), "{text}");
    let most = text
        .lines()
        .skip_while(|line| *line != "Page owners:")
        .nth(1)
        .unwrap();
    assert!(
        most.starts_with("        64kB in      1 blocks  "),
        "{most}"
    );
    assert!(most.contains(&format!("watch.rs:{big_line}:")), "{most}");
    buddy.free(big);
    buddy.free(at);
    buddy.free_batch(&mut || batch.pop().or_else(|| small.pop()));
    // SAFETY: ours, of one page.
    unsafe { buddy.free_page(page) };
    assert_eq!(owners(&buddy), []);
    assert_eq!(buddy.misuse(), None);
}

#[test]
fn when_memory_runs_out_it_says_who_has_it() {
    let window = window();
    let buddy: Machine<'_, (Audit, PageOwner)> = boot(&window);
    let line = line!() + 1;
    while let Ok(_hog) = buddy.alloc(&FrameRequest::ONE.movable()) {}
    let total = buddy.mem_info().total;
    assert_eq!(owners(&buddy)[0].frames, total);
    let text = buddy.show_mem().to_string();
    assert!(
        text.contains(&format!("{}kB in {total:>6} blocks  ", total * 4)),
        "{text}"
    );
    assert!(text.contains(&format!("watch.rs:{line}:")), "{text}");
}

/// Copies a page and knows no mapping.
struct Copies<'a>(&'a Window, std::cell::Cell<u32>);

impl Migrate for Copies<'_> {
    fn migrate(
        &self,
        from: Frame,
        to: OwnedFrame,
    ) -> Result<OwnedFrame, (MigrateError, OwnedFrame)> {
        if self.1.get() == 0 {
            return Err((MigrateError::NotMovable, to));
        }
        self.1.set(self.1.get() - 1);
        // SAFETY: both are backed, and the owner of `from` is this test.
        unsafe { self.0.copy(from, to.first()) };
        let _moved = to.into_raw();
        // SAFETY: its content has moved, and nobody uses it.
        Ok(unsafe { OwnedFrame::from_raw(from, Order::ZERO) })
    }
}

#[test]
fn claims_take_their_owners_along() {
    let window = window();
    let buddy: Machine<'_, (Audit, PageOwner)> = boot(&window);
    let range = FrameRange::from_numbers(0x600, 0x800).unwrap();
    let line = line!();
    for at in [0x600, 0x613, 0x7ff] {
        let _user = buddy
            .alloc_at(Frame::new(at).unwrap(), Order::ZERO)
            .unwrap();
    }
    let stuck = Copies(&window, 1.into());
    assert!(matches!(
        buddy.claim(range, &stuck),
        Err(ClaimError::NotMovable(_))
    ));
    let claimed = buddy.claim(range, &Copies(&window, 9.into())).unwrap();
    // Three frames of the old owner somewhere else, and 512 of the claim.
    let found = owners(&buddy);
    assert_eq!((found[0].frames, found[1].frames), (512, 3));
    assert!((line..line + 6).contains(&found[1].location.unwrap().line()));
    buddy.free_range(claimed).unwrap();
    assert_eq!(buddy.misuse(), None);
    assert_eq!(
        buddy.recount().free + buddy.mem_info().cached,
        buddy.mem_info().total - 3
    );
}

#[test]
fn init_fails_whole() {
    let window = window();
    let mut small = map(&[(0x1000, 0x7000)]);
    // SAFETY: one thread.
    let buddy: Machine<'_, PageOwner> = Machine::new(&window, unsafe { SingleCpu::new() });
    let before: Vec<_> = small.reservations().collect();
    assert!(matches!(
        // SAFETY: X1: the test's own memory, which only this allocator has.
        unsafe { buddy.init(&mut small, &Config::new()) },
        Err(InitError::Metadata { .. })
    ));
    assert_eq!(small.reservations().collect::<Vec<_>>(), before);
    // Enough for the policy's table, and not for the allocator's.
    let mut map = map(&[(0x1000, 0x8000)]);
    assert!(matches!(
        // SAFETY: X1: the test's own memory, which only this allocator has.
        unsafe { buddy.init(&mut map, &Config::new()) },
        Err(InitError::Metadata { .. })
    ));
    assert_eq!(map.reservations().count(), 0);
    map.push(PhysAddr::new(1 << 20), 4 << 20, RegionKind::Usable)
        .unwrap();
    let config = Config::new().limits(ZoneLimits::NORMAL_ONLY);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    assert_eq!(unsafe { buddy.init(&mut map, &config) }, Ok(()));
    assert_eq!(
        // SAFETY: X1: refused before it looks at the map.
        unsafe { buddy.init(&mut map, &config) },
        Err(InitError::Twice)
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]
    /// Whatever is freed, rightly or wrongly: what was not taken as that block is refused, and nothing changes by it.
    #[test]
    fn only_what_was_taken_comes_back(ops in prop::collection::vec((0..4u8, any::<u16>(), 0..11u8), 1..150)) {
        let window = window();
        let buddy: Machine<'_, (Audit, PageOwner)> = boot(&window);
        let mut live: Vec<(u64, u8)> = Vec::new();
        for (what, number, wanted) in ops {
            match what {
                0 | 1 => if let Ok(frame) = buddy.alloc(&FrameRequest::new(order(wanted)).movable()) {
                    live.push((frame.first().number(), wanted));
                },
                2 => if !live.is_empty() {
                    let (first, wanted) = live.swap_remove(usize::from(number) % live.len());
                    prop_assert_eq!(buddy.try_free(forged(first, wanted)), Ok(()));
                },
                _ => {
                    let first = (u64::from(number) % (END + 64)) & !((1 << wanted) - 1);
                    let own = live.iter().position(|&block| block == (first, wanted));
                    let result = buddy.try_free(forged(first, wanted));
                    match own {
                        Some(at) => {
                            live.swap_remove(at);
                            prop_assert_eq!(result, Ok(()));
                        }
                        None => {
                            let overlaps = live.iter().any(|&(start, size)| {
                                start < first + (1 << wanted) && first < start + (1 << size)
                            });
                            let (error, _) = result.unwrap_err();
                            let expected = if overlaps { [FreeError::WrongOrder, FreeError::Foreign] } else { [FreeError::DoubleFree, FreeError::Foreign] };
                            prop_assert!(expected.contains(&error), "{first:#x} {wanted}: {error:?}");
                        }
                    }
                }
            }
        }
        let held: u64 = live.iter().map(|&(_, order)| 1 << order).sum();
        let info = buddy.mem_info();
        prop_assert_eq!(info.free + info.cached + held, info.total);
        prop_assert_eq!(owners(&buddy).iter().map(|owner| owner.frames).sum::<u64>(), held);
        prop_assert_eq!(buddy.misuse(), None);
        for (first, order) in live {
            buddy.free(forged(first, order));
        }
        buddy.drain_all();
        prop_assert_eq!(buddy.recount().free, buddy.mem_info().total);
        buddy.check().unwrap();
    }
}

#[test]
fn the_table_is_never_released() {
    let window = window();
    let mut map = map(&[(0, END << 12)]);
    let memory = &window;
    // SAFETY: X1: the test's own memory, and no allocator has started.
    let early = unsafe { EarlyAllocator::new(&mut map, &memory) }
        .alloc_frames(3, 1)
        .unwrap();
    // SAFETY: one thread.
    let buddy = Machine::<Audit>::new(memory, unsafe { SingleCpu::new() });
    let config = Config::new().min_free_kib(0).reserve_ratio([0; 5]);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &config) }.unwrap();
    let total = buddy.mem_info().total;
    let mut held = Vec::new();
    while let Ok(frame) = buddy.alloc(&FrameRequest::ONE.movable()) {
        held.push(frame);
    }
    let own: Vec<FrameRange> = {
        let known: BTreeSet<u64> = held.iter().map(|f| f.first().number()).collect();
        (1..END)
            .filter(|frame| !known.contains(frame))
            .map(|frame| FrameRange::from_numbers(frame, frame + 1).unwrap())
            .filter(|&frame| !early.contains_range(frame))
            .collect()
    };
    assert!(own.len() as u64 > buddy.metadata().count());
    for frame in own {
        // SAFETY: none; it is to be refused.
        let refused = unsafe { buddy.release_range(frame) };
        assert_eq!(refused, Err(FreeError::Foreign), "{frame:?}");
    }
    // SAFETY: nobody uses the early piece; the tables are to be left out.
    unsafe {
        assert_eq!(buddy.release(Reservation::Early), 3);
        assert_eq!(buddy.release(Reservation::Tables), 0);
    }
    assert_eq!(buddy.mem_info().total, total + 3);
    buddy.free_bulk(held);
    buddy.check().unwrap();
}

#[test]
fn bulk_calls_are_watched() {
    let window = window();
    let buddy: Machine<'_, (Audit, PageOwner)> = boot(&window);
    let mut frames = Vec::new();
    let given = buddy.alloc_bulk(&FrameRequest::ONE, 70, |frame| frames.push(frame));
    assert_eq!(given, Ok(70));
    let line = line!() - 2;
    assert!(
        frames
            .iter()
            .all(|frame| buddy.owner_of(frame.first()).unwrap().line() == line)
    );
    // Freed alone and together, and once more.
    let alone = frames.pop().unwrap();
    assert_eq!(buddy.try_free(alone), Ok(()));
    let numbers: Vec<u64> = frames.iter().map(|frame| frame.first().number()).collect();
    let total = buddy.recount().managed;
    buddy.free_bulk(frames);
    assert_eq!(buddy.misuse(), None);
    assert_eq!(buddy.owner_of(Frame::new(numbers[0]).unwrap()), None);
    buddy.free_bulk(numbers.iter().map(|&number| forged(number, 0)));
    let misuse = buddy.misuse().unwrap();
    assert_eq!((misuse.error, misuse.count), (FreeError::DoubleFree, 69));
    buddy.drain_local();
    assert_eq!(buddy.recount().free, total);
    buddy.check().unwrap();
}

/// A call that goes past the policy by `Deref` gives what cannot be freed, or takes what nobody had.
#[test]
fn every_call_that_gives_or_takes_frames_is_watched() {
    const CALLS: [&str; 8] = [
        include_str!("../src/buddy.rs"),
        include_str!("../src/batch.rs"),
        include_str!("../src/range.rs"),
        include_str!("../src/free.rs"),
        include_str!("../src/cpus.rs"),
        include_str!("../src/claim.rs"),
        include_str!("../src/compact.rs"),
        include_str!("../src/classic.rs"),
    ];
    let watched = include_str!("../src/watch/watched.rs");
    let mut seen = 0;
    for call in CALLS
        .into_iter()
        .flat_map(|source| source.split("\n    pub "))
    {
        let signature = call.split('{').next().unwrap();
        let Some((_, rest)) = signature.split_once("fn ") else {
            continue;
        };
        let moves = ["Owned", "NonNull", "Migrate"];
        if rest.contains("&self") && moves.iter().any(|word| rest.contains(word)) {
            let name = rest.split(['(', '<']).next().unwrap();
            let wrapper = ["(", "<"].map(|after| format!("fn {name}{after}"));
            assert!(
                wrapper.iter().any(|start| watched.contains(start)),
                "{name}"
            );
            seen += 1;
        }
    }
    assert!(seen >= 15, "{seen}");
}

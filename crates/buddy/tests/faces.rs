//! Every way to ask for memory: classic names, device limits, nodes, places, ranges, batches, the `x86_64` crate's traits.

mod common;

use common::machine::{MIB, Machine, machine, map, map_of_nodes, one_zone, start};
use common::window::Window;
use kmem_buddy::{Config, FreeError, PlaceError, Reservation, X86Frames, ZoneKind, ZoneLimits};
use kmem_hal::{
    AllocError, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, NodeId, NodePolicy, Order,
    OwnedFrame, PhysAddr, PhysMap,
};
use x86_64::structures::paging::{
    FrameAllocator, FrameDeallocator, PageSize, PhysFrame, Size1GiB, Size2MiB, Size4KiB,
};

/// `mib` MiB from 0, all of them backed, with the classic 32-bit zones ending at 16 and 24 MiB.
fn boot(window: &Window, mib: u64) -> Machine<'_> {
    let limits = ZoneLimits {
        normal: Some((24 << 20) >> 12),
        ..ZoneLimits::X86_32
    };
    let config = Config::new().limits(limits).min_free_kib(0);
    let mut map = map(&[(0, mib << 20)]);
    start(window, &mut map, &config.reserve_ratio([0; 5]))
}

fn order(order: u8) -> Order {
    Order::new(order).unwrap()
}

fn all_free(buddy: &Machine<'_>) {
    assert!(buddy.drain_all());
    assert_eq!(buddy.recount().free, buddy.mem_info().total);
    buddy.check().unwrap();
}

#[test]
fn classic_names_give_linear_addresses_of_mapped_memory() {
    let window = Window::new(32 << 20, 32 << 20);
    window.set_reach((24 << 20) >> 12);
    let buddy = boot(&window, 32);
    assert!(buddy.zones().any(|zone| zone.kind == ZoneKind::HighMem));
    for request in [
        FrameRequest::ONE,
        FrameRequest::ONE.movable(),
        FrameRequest::ONE.high(),
    ] {
        for wanted in [0, 1, 5, 10] {
            let request = FrameRequest {
                order: order(wanted),
                ..request
            };
            let pages = buddy.get_free_pages(&request).unwrap();
            let first = window.to_phys(pages.as_ptr());
            assert!(
                first.as_u64() + request.order.bytes() <= 24 << 20,
                "{request:?}"
            );
            assert!(first.is_aligned(request.order.bytes()));
            // SAFETY: ours; freed as it was asked for.
            unsafe {
                pages.write_bytes(0xee, request.order.bytes() as usize);
                buddy.free_pages(pages, request.order);
            }
        }
        let dirty = buddy.get_free_page(&request).unwrap();
        // SAFETY: as above.
        unsafe {
            dirty.write_bytes(0xee, 4096);
            buddy.free_page(dirty);
        }
        let zeroes = buddy.get_zeroed_page(&request).unwrap();
        // SAFETY: as above.
        unsafe {
            assert!(
                std::slice::from_raw_parts(zeroes.as_ptr(), 4096)
                    .iter()
                    .all(|&byte| byte == 0)
            );
            buddy.free_page(zeroes);
        }
    }
    // The device's limit, and what no memory can meet.
    let dma = FrameRequest::new(order(9)).below(PhysAddr::new(1 << 24));
    let pages = buddy.get_free_pages(&dma).unwrap();
    assert!(window.to_phys(pages.as_ptr()).as_u64() < 1 << 24);
    // SAFETY: as above.
    unsafe { buddy.free_pages(pages, order(9)) };
    let nowhere = FrameRequest::ONE.below(PhysAddr::new(4096));
    assert_eq!(
        buddy.get_free_page(&nowhere),
        Err(AllocError::Unsatisfiable)
    );
    assert_eq!(buddy.misuse(), None);
    all_free(&buddy);
    // Mapped memory runs out while HIGHMEM has some: that is a refusal, and no frame without an address.
    let mut taken = 0;
    while let Ok(_page) = buddy.get_free_page(&FrameRequest::ONE.movable()) {
        taken += 1;
    }
    assert_eq!(
        taken,
        buddy
            .zones()
            .map(|z| if z.kind == ZoneKind::HighMem {
                0
            } else {
                z.managed
            })
            .sum::<u64>()
    );
    assert!(buddy.alloc(&FrameRequest::ONE.movable()).is_ok());
}

#[test]
fn wrong_addresses_are_noted_and_left_alone() {
    let window = Window::new(32 << 20, 32 << 20);
    let unborn = machine(&window);
    assert_eq!(
        unborn.get_free_page(&FrameRequest::ONE),
        Err(AllocError::NotInitialised)
    );
    let buddy = boot(&window, 32);
    let pages = buddy.get_free_pages(&FrameRequest::new(order(2))).unwrap();
    // SAFETY: wrong frees are what is tested; the memory is not used.
    unsafe {
        unborn.free_pages(pages, order(2));
        buddy.free_pages(pages.add(16), Order::ZERO);
        assert_eq!(buddy.misuse().unwrap().error, FreeError::Misaligned);
        buddy.free_pages(pages.add(4096), order(2));
        assert_eq!(buddy.misuse().unwrap().count, 2);
        buddy.free_pages(pages, order(2));
    }
    assert_eq!(buddy.misuse().unwrap().count, 2);
    all_free(&buddy);
}

#[test]
fn the_mappers_of_the_x86_64_crate_take_frames() {
    fn pair<Z: PageSize>(buddy: &Machine<'_>) {
        let mut frames = X86Frames::new(buddy);
        let first: PhysFrame<Z> = frames.allocate_frame().expect("a frame of this size");
        let second: PhysFrame<Z> = frames.allocate_frame().expect("another one");
        assert_ne!(first, second);
        // The two frames are taken: nobody else can have them.
        let first_frame = Frame::containing(PhysAddr::new(first.start_address().as_u64()));
        assert_eq!(
            buddy.alloc_at(first_frame, Order::ZERO),
            Err(PlaceError::InUse)
        );
        // SAFETY: nothing is mapped to them.
        unsafe {
            frames.deallocate_frame(first);
            frames.deallocate_frame(second);
        }
    }
    let window = Window::new(4 << 30, 16 << 20);
    let mut map = map(&[(0, 4 << 30)]);
    let buddy = start(&window, &mut map, &Config::new().min_free_kib(0));
    pair::<Size4KiB>(&buddy);
    pair::<Size2MiB>(&buddy);
    pair::<Size1GiB>(&buddy);
    let below = FrameRequest::ONE.below(PhysAddr::new(1 << 24));
    let frame: PhysFrame<Size2MiB> = X86Frames::with(&buddy, below).allocate_frame().unwrap();
    assert!(frame.start_address().as_u64() < 1 << 24);
    let none: Option<PhysFrame<Size1GiB>> = X86Frames::with(&buddy, below).allocate_frame();
    assert_eq!(none, None);
    // SAFETY: nothing is mapped to it.
    unsafe { X86Frames::new(&buddy).deallocate_frame(frame) };
    assert_eq!(buddy.misuse(), None);
    all_free(&buddy);
}

#[test]
fn device_limits_are_kept_by_every_call() {
    let window = Window::new(32 << 20, 32 << 20);
    let buddy = boot(&window, 32);
    // A limit inside a zone, not at its end.
    let limit = PhysAddr::new((20 << 20) + 5000);
    let request = FrameRequest::ONE.below(limit);
    let ends = |range: FrameRange| range.end_number() << 12;
    for wanted in [0, 3, 9, 10] {
        let mut got = Vec::new();
        let request = FrameRequest {
            order: order(wanted),
            ..request
        };
        while let Ok(frame) = buddy.alloc(&request) {
            assert!(ends(frame.range()) <= limit.as_u64());
            got.push(frame);
        }
        let possible = ((20 << 20) + 4096) / request.order.bytes();
        assert!(
            got.len() as u64 >= possible - 2 && got.len() as u64 <= possible,
            "{wanted}: {}",
            got.len()
        );
        // Above the limit there is plenty.
        assert!(
            buddy
                .alloc(&FrameRequest::new(order(wanted)))
                .map(|frame| buddy.free(frame))
                .is_ok()
        );
        got.into_iter().for_each(|frame| buddy.free(frame));
    }
    let mut batch = Vec::new();
    assert_eq!(
        buddy.alloc_batch(&request, 6000, &mut |frame| batch.push(frame)),
        Ok(0x1401 - 1)
    );
    assert!(
        batch
            .iter()
            .all(|frame| ends(frame.range()) <= limit.as_u64())
    );
    batch.into_iter().for_each(|frame| buddy.free(frame));
    let range = buddy.alloc_range(0x900, Order::ZERO, &request).unwrap();
    assert!(ends(range.range()) <= limit.as_u64());
    buddy.free_range(range).unwrap();
    // Free memory below the limit, and none of it in one piece.
    assert_eq!(
        buddy.alloc_range(0x1500, Order::ZERO, &request),
        Err(AllocError::Unsatisfiable)
    );
    all_free(&buddy);
}

/// Four nodes of 16 MiB, at distances of a ring: 10, 20, 30, 20.
fn ring(window: &Window) -> Machine<'_> {
    let config = one_zone().distance(|from, to| {
        let steps = from.get().abs_diff(to.get());
        10 + 10 * steps.min(4 - steps) as u8
    });
    start(window, &mut map_of_nodes(4, 16 * MIB), &config)
}

fn node_of(frame: &OwnedFrame) -> u16 {
    (frame.first().number() >> 12) as u16
}

#[test]
fn nodes_are_asked_by_distance() {
    let window = Window::new(64 << 20, 64 << 20);
    let buddy = ring(&window);
    let node = NodeId::new(2);
    // Preferred: node 2, then its neighbours, then the far one, with nothing left over.
    let preferred = FrameRequest::new(order(8)).node(NodePolicy::Preferred(node));
    let mut seen = Vec::new();
    let mut blocks = Vec::new();
    while let Ok(block) = buddy.alloc(&preferred) {
        if seen.last() != Some(&node_of(&block)) {
            seen.push(node_of(&block));
        }
        blocks.push(block);
    }
    assert_eq!((seen[0], seen[3]), (2, 0), "{seen:?}");
    assert_eq!(seen.len(), 4);
    // Strict: that node or nothing.
    let strict = FrameRequest::new(order(8)).node(NodePolicy::Strict(node));
    assert_eq!(buddy.alloc(&strict).unwrap_err(), AllocError::OutOfMemory);
    let back = blocks.iter().position(|block| node_of(block) == 2).unwrap();
    buddy.free(blocks.swap_remove(back));
    let block = buddy.alloc(&strict).unwrap();
    assert_eq!(node_of(&block), 2);
    buddy.free(block);
    // A node that does not exist: strictly nothing, preferably the own one.
    let missing = NodeId::new(9);
    let strict = FrameRequest::ONE.node(NodePolicy::Strict(missing));
    assert_eq!(buddy.alloc(&strict).unwrap_err(), AllocError::Unsatisfiable);
    assert_eq!(
        buddy.alloc_range(3, Order::ZERO, &strict).unwrap_err(),
        AllocError::Unsatisfiable
    );
    blocks.drain(..).for_each(|block| buddy.free(block));
    let anywhere = FrameRequest::ONE.node(NodePolicy::Preferred(missing));
    let frame = buddy.alloc(&anywhere).unwrap();
    assert_eq!(node_of(&frame), 0);
    buddy.free(frame);
    // Interleaved: as many from each.
    let interleave = FrameRequest::ONE.node(NodePolicy::Interleave);
    let frames: Vec<_> = (0..400)
        .map(|_| buddy.alloc(&interleave).unwrap())
        .collect();
    for node in 0..4 {
        assert_eq!(
            frames.iter().filter(|frame| node_of(frame) == node).count(),
            100
        );
    }
    frames.into_iter().for_each(|frame| buddy.free(frame));
    all_free(&buddy);
}

#[test]
fn ranges_above_the_top_order_by_node_alignment_and_place() {
    let window = Window::new(64 << 20, 64 << 20);
    let buddy = ring(&window);
    let strict = FrameRequest::ONE
        .movable()
        .node(NodePolicy::Strict(NodeId::new(1)));
    // 12 MiB, more than any block, aligned to 4 MiB, in node 1.
    let range = buddy.alloc_range(0xc00, order(10), &strict).unwrap();
    assert!(range.range().first().is_aligned(order(10)));
    assert!((0x1000..0x2000).contains(&range.range().first().number()));
    assert_eq!(
        buddy.alloc_range(0xc00, order(10), &strict).unwrap_err(),
        AllocError::OutOfMemory
    );
    assert_eq!(
        buddy.alloc_range(0x1001, Order::ZERO, &strict).unwrap_err(),
        AllocError::Unsatisfiable
    );
    assert_eq!(
        buddy.alloc_range(0, Order::ZERO, &strict).unwrap_err(),
        AllocError::Unsatisfiable
    );
    // The same by place; then in pieces.
    let place = range.range();
    assert_eq!(buddy.alloc_range_at(place).unwrap_err(), PlaceError::InUse);
    buddy.free_range(range).unwrap();
    let again = buddy.alloc_range_at(place).unwrap();
    let mut blocks: Vec<_> = again.into_blocks(Order::MAX_BUDDY).collect();
    assert_eq!(blocks.len(), 3);
    buddy.free_batch(&mut || blocks.pop());
    // A block of order 12 is as long as it is aligned.
    let block = buddy
        .alloc(&FrameRequest::new(order(12)).node(NodePolicy::Strict(NodeId::new(3))))
        .unwrap_err();
    assert_eq!(block, AllocError::OutOfMemory, "the tables lie in node 3");
    let block = buddy
        .alloc(&FrameRequest::new(order(12)).node(NodePolicy::Strict(NodeId::new(2))))
        .unwrap();
    assert_eq!((block.first().number(), block.order()), (0x2000, order(12)));
    buddy.free(block);
    // Places that are no memory of one zone.
    for (first, end) in [
        (0x3ff0, 0x4010),
        (0xff0, 0x1010),
        (0x1_0000, 0x1_0001),
        (0, 1),
        (7, 7),
    ] {
        let range = FrameRange::from_numbers(first, end).unwrap();
        assert_eq!(
            buddy.alloc_range_at(range),
            Err(PlaceError::Foreign),
            "{first:#x}"
        );
    }
    assert_eq!(
        buddy.alloc_at(Frame::new(0x1001).unwrap(), order(1)),
        Err(PlaceError::Foreign)
    );
    assert_eq!(
        machine(&window).alloc_at(Frame::new(2).unwrap(), order(1)),
        Err(PlaceError::NotInitialised)
    );
    all_free(&buddy);
}

#[test]
fn batches_give_what_there_is() {
    let window = Window::new(32 << 20, 32 << 20);
    let buddy = boot(&window, 32);
    let mut got = Vec::new();
    for wanted in [0, 1, 3, 7, 9, 10, 11] {
        let request = FrameRequest::new(order(wanted)).movable();
        assert_eq!(
            buddy.alloc_batch(&request, 0, &mut |_| panic!("nothing was asked for")),
            Ok(0)
        );
        let given = buddy
            .alloc_batch(&request, usize::MAX, &mut |frame| got.push(frame))
            .unwrap();
        assert_eq!(given, got.len());
        let total: u64 = got.iter().map(|frame| frame.range().count()).sum();
        if wanted == 0 {
            assert_eq!(total, buddy.mem_info().total);
        }
        let more = buddy.alloc_batch(&request, 5, &mut |frame| got.push(frame));
        assert_eq!(more, Err(AllocError::OutOfMemory));
        let mut numbers: Vec<_> = got.iter().map(|frame| frame.first().number()).collect();
        numbers.sort_unstable();
        assert!(
            numbers
                .windows(2)
                .all(|pair| pair[1] - pair[0] >= 1 << wanted)
        );
        buddy.free_batch(&mut || got.pop());
        all_free(&buddy);
    }
    let unborn = machine(&window);
    assert_eq!(
        unborn.alloc_batch(&FrameRequest::ONE, 1, &mut |_| {}),
        Err(AllocError::NotInitialised)
    );
}

/// Frames that a batch cannot fill with zeros go back, with all that it took beside them.
#[test]
fn a_batch_gives_what_it_could_fill_with_zeros() {
    let window = Window::new(16 << 20, 16 << 20);
    let buddy = boot(&window, 16);
    let zeroed = FrameRequest::ONE.movable().zeroed();
    let before = buddy.recount().free + buddy.recount().cached;
    for reach in (0..=16 << 8).step_by(64) {
        window.set_reach(reach);
        let mut frames = Vec::new();
        let outcome = buddy.alloc_bulk(&zeroed, 100, |frame| frames.push(frame));
        match outcome {
            Ok(given) => assert_eq!(given, frames.len()),
            Err(error) => assert_eq!((error, frames.len()), (AllocError::Busy, 0)),
        }
        assert!(frames.iter().all(|frame| frame.first().number() < reach));
        assert_eq!(outcome == Ok(100), reach == 16 << 8, "below {reach}");
        buddy.check().unwrap();
        buddy.free_bulk(frames);
        let recount = buddy.recount();
        assert_eq!(recount.free + recount.cached, before);
    }
    buddy.drain_local();
    all_free(&buddy);
}

#[test]
fn early_pieces_are_handed_over() {
    use kmem_buddy::EarlyAllocator;
    let window = Window::new(32 << 20, 32 << 20);
    let mut map = map(&[(0, 32 << 20)]);
    let memory = &window;
    // SAFETY: X1: the test's own memory, which only this allocator has.
    let table = unsafe { EarlyAllocator::new(&mut map, &memory) }
        .alloc_frames(3, 1)
        .unwrap();
    // SAFETY: X1: the test's own memory, which only this allocator has.
    let low = unsafe { EarlyAllocator::new(&mut map, &memory) }
        .below(PhysAddr::new(1 << 20))
        .alloc(100, 64)
        .unwrap();
    let buddy = start(&window, &mut map, &Config::new().min_free_kib(0));
    // What was given early is nobody else's, down to the frame of the last byte.
    assert_eq!(buddy.alloc_range_at(table), Err(PlaceError::InUse));
    assert_eq!(
        buddy.alloc_at(Frame::containing(low), Order::ZERO),
        Err(PlaceError::InUse)
    );
    // SAFETY: the wrong free is what is tested.
    let wrong = unsafe { OwnedFrame::from_raw(table.first(), Order::ZERO) };
    assert_eq!(buddy.try_free(wrong).unwrap_err().0, FreeError::Foreign);
    let before = buddy.mem_info().total;
    // SAFETY: nobody uses the pieces.
    unsafe {
        assert_eq!(buddy.release_range(table), Ok(3));
        assert_eq!(buddy.release_range(table), Err(FreeError::Foreign));
        // All of the rest; the allocator's own tables are no early allocation.
        assert_eq!(
            buddy.release_range(buddy.metadata()),
            Err(FreeError::Foreign)
        );
        assert_eq!(buddy.release(Reservation::Early), 1);
        assert_eq!(buddy.release(Reservation::Early), 0);
    }
    assert_eq!(buddy.mem_info().total, before + 3 + 1);
    all_free(&buddy);
}

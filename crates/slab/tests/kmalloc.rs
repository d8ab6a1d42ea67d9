//! kmalloc and its relatives.

mod common;

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::Mutex;

use common::{Arena, System, ThreadCpu, parts, system};
use kmem_hal::{
    AllocError, Context, FrameRequest, FrameSink, FrameSource, LargeSource, NodeId, NodePolicy,
    OffsetMap, OwnedFrame, PhysMap, Pressure, PressureLevel, Spin,
};
use kmem_slab::{CLASSES, Flags, Geometry, InitError, Parts, SlabSystem, class_size};

fn fill(memory: NonNull<u8>, size: usize, seed: u8) {
    for at in 0..size {
        // SAFETY: the caller's allocation.
        unsafe { memory.as_ptr().add(at).write(seed.wrapping_add(at as u8)) };
    }
}

fn check(memory: NonNull<u8>, size: usize, seed: u8) {
    // SAFETY: the caller's allocation, which was filled.
    let bytes = unsafe { std::slice::from_raw_parts(memory.as_ptr(), size) };
    for (at, &byte) in bytes.iter().enumerate() {
        assert_eq!(byte, seed.wrapping_add(at as u8), "byte {at}");
    }
}

#[test]
fn before_init_there_is_nothing() {
    let system = System::new();
    assert_eq!(
        system.kmalloc(1, Flags::empty()),
        Err(AllocError::NotInitialised)
    );
    assert_eq!(
        system.kmalloc(100_000, Flags::empty()),
        Err(AllocError::NotInitialised)
    );
    assert!(system.alloc(Layout::new::<u64>()).is_null());
    assert!(system.shrink() == 0 && !system.is_ready());
    // SAFETY: nothing is there, which the call finds out.
    assert_eq!(unsafe { system.ksize(NonNull::dangling()) }, None);
}

#[test]
fn init_happens_once_and_a_failed_one_leaves_nothing() {
    let arena = Arena::new(1024);
    let system = SlabSystem::new();
    for fail_at in 0.. {
        arena
            .fail_at
            .store(fail_at, std::sync::atomic::Ordering::Relaxed);
        match system.init(parts(arena, 2)) {
            Err(InitError::Memory(AllocError::OutOfMemory)) => {
                assert_eq!(arena.used(), 0, "after failure {fail_at}")
            }
            Ok(()) => {
                assert!(fail_at > 4, "init asks for heads, a row and the caches");
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(system.init(parts(arena, 2)), Err(InitError::Already));
}

#[test]
fn sizes_round_up_to_their_class_and_keep_their_bytes() {
    let (arena, mut system) = system(4096, 1);
    let mut held = Vec::new();
    for size in (0..9000)
        .step_by(37)
        .chain([8192, 8193, 12288, 20000, 65536, 65537, 1 << 20])
    {
        let memory = system.kmalloc(size, Flags::empty()).unwrap();
        // SAFETY: allocated above.
        let usable = unsafe { system.ksize(memory) }.unwrap();
        assert!(usable >= size.max(1));
        if size > 8192 {
            assert_eq!(
                usable,
                size.next_multiple_of(4096),
                "pages are not rounded to powers of two"
            );
        }
        fill(memory, usable, size as u8);
        held.push((memory, usable, size as u8));
    }
    for &(memory, usable, seed) in &held {
        check(memory, usable, seed);
        // SAFETY: allocated above, freed once.
        unsafe { system.kfree(memory.as_ptr()) };
    }
    system.teardown().unwrap();
    assert_eq!(arena.used(), 0);
    arena.check_slots();
}

#[test]
fn powers_of_two_are_naturally_aligned() {
    let (_, system) = system(2048, 1);
    for shift in 4..=12 {
        for _ in 0..20 {
            let memory = system.kmalloc(1 << shift, Flags::empty()).unwrap();
            assert!(memory.as_ptr().addr().is_multiple_of(1 << shift));
        }
    }
}

#[test]
fn every_layout_is_aligned() {
    let (_, system) = system(8192, 1);
    for shift in 0..=14 {
        let align = 1 << shift;
        for size in [1, 3, 8, 24, 40, 65, 100, 600, 1025, 3000, 5000, 8192, 9000] {
            let layout = Layout::from_size_align(size, align).unwrap();
            let memory = system.alloc(layout);
            assert!(
                !memory.is_null() && memory.addr().is_multiple_of(align),
                "{layout:?}"
            );
            // SAFETY: allocated above with this layout.
            unsafe {
                memory.write_bytes(0xa5, size);
                system.dealloc(memory, layout);
            }
        }
    }
    let nothing = Layout::from_size_align(0, 64).unwrap();
    assert!(system.alloc(nothing).addr().is_multiple_of(64));
}

#[test]
fn zeroed_memory_is_zero_after_reuse() {
    let (_, system) = system(2048, 1);
    for size in [16, 100, 1000, 8000, 10_000] {
        let dirty = system.kmalloc(size, Flags::empty()).unwrap();
        fill(dirty, size, 1);
        // SAFETY: allocated above.
        unsafe { system.kfree(dirty.as_ptr()) };
        let clean = system.kmalloc(size, Flags::ZERO).unwrap();
        // SAFETY: allocated above.
        assert!((0..size).all(|at| unsafe { clean.as_ptr().add(at).read() } == 0));
    }
}

#[test]
fn realloc_of_nothing_allocates() {
    let (_, system) = system(1024, 1);
    let nothing = Layout::from_size_align(0, 1).unwrap();
    let none = system.alloc(nothing);
    // SAFETY: the pointer and its layout; then memory of the new layout, used and freed once.
    unsafe {
        let some = system.realloc(none, nothing, 8);
        assert!(system.ksize(NonNull::new(some).unwrap()).unwrap() >= 8);
        some.cast::<[u8; 8]>().write([7; 8]);
        system.dealloc(some, Layout::from_size_align(8, 1).unwrap());
    }
}

#[test]
fn ksize_knows_beginnings_of_objects_only() {
    let (_, system) = system(1024, 1);
    let memory = system.kmalloc(100, Flags::empty()).unwrap();
    // SAFETY: live memory; one byte into it is no memory of its own, which the call finds out without looking there.
    unsafe {
        assert_eq!(system.ksize(memory), Some(112));
        assert_eq!(system.ksize(memory.add(1)), None);
        assert_eq!(system.ksize(memory.add(111)), None);
        assert!(
            system
                .krealloc(memory.add(1).as_ptr(), 8, Flags::empty())
                .is_err()
        );
        system.kfree(memory.as_ptr());
    }
}

#[test]
fn krealloc_moves_below_the_limit_that_it_is_asked_for() {
    let arena = Arena::new(8192);
    let system = SlabSystem::new();
    system.init(parts(arena, 1)).unwrap();
    // The first 16 MiB are taken while the object's slab and some pages come from above.
    let request = FrameRequest::new(kmem_hal::Order::ZERO).below(kmem_hal::PhysAddr::new(16 << 20));
    let low: Vec<_> = std::iter::from_fn(|| arena.alloc(&request).ok()).collect();
    let phys = |memory: NonNull<u8>| arena.map().to_phys(memory.as_ptr()).as_u64();
    let object = system.kmalloc(64, Flags::empty()).unwrap();
    let pages = system.kmalloc(20_000, Flags::empty()).unwrap();
    assert!(phys(object) >= 16 << 20 && phys(pages) >= 16 << 20);
    fill(object, 64, 3);
    for frame in low {
        FrameSink::free(arena, frame);
    }
    // SAFETY: allocated above; each given up where the call succeeds.
    unsafe {
        let below = system.krealloc(object.as_ptr(), 64, Flags::DMA).unwrap();
        assert!(phys(below) < 16 << 20);
        check(below, 64, 3);
        let moved = system.krealloc(pages.as_ptr(), 20_000, Flags::DMA).unwrap();
        assert!(phys(moved) < 16 << 20);
        system.kfree(below.as_ptr());
        system.kfree(moved.as_ptr());
    }
}

#[test]
fn krealloc_moves_only_when_it_must() {
    let (_, system) = system(2048, 1);
    // SAFETY: each pointer is used until the next krealloc succeeds.
    unsafe {
        let a = system
            .krealloc(std::ptr::null_mut(), 65, Flags::empty())
            .unwrap();
        fill(a, 65, 9);
        assert_eq!(
            system.krealloc(a.as_ptr(), 80, Flags::empty()).unwrap(),
            a,
            "same class"
        );
        let b = system.krealloc(a.as_ptr(), 81, Flags::empty()).unwrap();
        assert_ne!(a, b);
        check(b, 65, 9);
        let c = system.krealloc(b.as_ptr(), 20_000, Flags::empty()).unwrap();
        check(c, 65, 9);
        assert_eq!(
            system.krealloc(c.as_ptr(), 20_480, Flags::empty()).unwrap(),
            c,
            "same pages"
        );
        let d = system.krealloc(c.as_ptr(), 70, Flags::empty()).unwrap();
        check(d, 65, 9);
        system.kfree(d.as_ptr());
    }
}

#[test]
fn realloc_by_layout_keeps_the_class_and_the_bytes() {
    let (_, system) = system(2048, 1);
    let layout = Layout::from_size_align(100, 32).unwrap();
    let a = NonNull::new(system.alloc(layout)).unwrap();
    fill(a, 100, 3);
    // SAFETY: each pointer is used until the next realloc.
    unsafe {
        let b = system.realloc(a.as_ptr(), layout, 120);
        assert_eq!(a.as_ptr(), b);
        let wide = Layout::from_size_align(120, 32).unwrap();
        let c = NonNull::new(system.realloc(b, wide, 5000)).unwrap();
        check(c, 100, 3);
        system.dealloc(c.as_ptr(), Layout::from_size_align(5000, 32).unwrap());
    }
}

#[test]
fn limits_are_kept() {
    let (arena, system) = system(8192, 1);
    // The arena lies below 32 MiB, so the first 16 MiB are half of it.
    let mut held = Vec::new();
    while let Ok(memory) = system.kmalloc(100, Flags::DMA) {
        held.push(memory);
        assert!(
            memory.as_ptr().addr()
                - kmem_hal::PhysMap::to_ptr(&arena.map(), kmem_hal::PhysAddr::ZERO).addr()
                < 16 << 20
        );
    }
    assert!(held.len() > 3000 && held.len() <= 4096);
    for memory in held {
        // SAFETY: allocated above.
        unsafe { system.kfree(memory.as_ptr()) };
    }
}

#[test]
fn exhaustion_is_an_answer_and_everything_comes_back() {
    let (arena, mut system) = system(256, 1);
    // Descriptors stay with their cache, so a small arena cannot be filled by every class in turn.
    for class in (1..CLASSES).step_by(7) {
        let size = class_size(class).unwrap();
        let mut held = Vec::new();
        while let Ok(memory) = system.kmalloc(size, Flags::empty()) {
            held.push(memory);
        }
        assert!(
            held.len() * size > 100 * 4096,
            "class {size} got {} objects",
            held.len()
        );
        held.sort();
        assert!(
            held.windows(2)
                .all(|pair| pair[0].as_ptr().addr() + size <= pair[1].as_ptr().addr()),
            "objects overlap"
        );
        for memory in held {
            // SAFETY: allocated above.
            unsafe { system.kfree(memory.as_ptr()) };
        }
    }
    system.teardown().unwrap();
    assert_eq!(arena.used(), 0);
    arena.check_slots();
}

#[test]
fn teardown_counts_what_is_out_and_works_again_afterwards() {
    let (arena, mut system) = system(512, 1);
    let a = system.kmalloc(100, Flags::empty()).unwrap();
    let leaked = system.teardown().unwrap_err();
    assert_eq!((leaked.cache, leaked.objects), ("kmalloc-112", 1));
    // SAFETY: allocated above.
    unsafe { system.kfree(a.as_ptr()) };
    system.teardown().unwrap();
    assert_eq!(arena.used(), 0);
    system.init(parts(arena, 1)).unwrap();
    assert!(system.kmalloc(100, Flags::empty()).is_ok());
}

#[test]
fn slabinfo_has_linux_form() {
    let (_, system) = system(512, 1);
    let held: Vec<_> = (0..3)
        .map(|_| system.kmalloc(64, Flags::empty()).unwrap())
        .collect();
    let text = system.slabinfo().to_string();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "slabinfo - version: 2.1");
    assert!(lines[1].starts_with("# name            <active_objs> <num_objs> <objsize>"));
    assert_eq!(
        lines[2],
        "kmalloc-64             3    128     64  128    2 : tunables   64   64    0 : slabdata      1      1      0"
    );
    assert_eq!(lines.len(), 3);
    drop(held);
}

#[test]
fn the_picture_shows_how_full_each_slab_is() {
    let (_, system) = common::system(1024, 1);
    assert_eq!(system.picture().to_string().lines().count(), 1);
    let per_slab = Geometry::new(1024, 1024).unwrap().objects();
    let mut objects: Vec<_> = (0..3 * per_slab)
        .map(|_| system.kmalloc(1024, Flags::empty()).unwrap())
        .collect();
    let line = |system: &common::System| {
        let picture = system.picture().to_string();
        let line = picture.lines().find(|line| line.starts_with("kmalloc-1k"));
        line.unwrap_or_default().trim_end().to_owned()
    };
    // Three full slabs.
    let full = line(&system);
    assert!(full.contains("100% of") && full.ends_with(" ###"), "{full}");
    // Half of the objects of one slab.
    objects.sort();
    for object in objects.drain(..per_slab / 2) {
        // SAFETY: allocated above, freed once.
        unsafe { system.kfree(object.as_ptr()) };
    }
    system.shrink();
    let half = line(&system);
    assert!(
        half.contains('5') && half.matches('#').count() == 2,
        "{half}"
    );
    assert!(half.contains(" 83% of"), "{half}");
    for object in objects {
        // SAFETY: allocated above, freed once.
        unsafe { system.kfree(object.as_ptr()) };
    }
    system.shrink();
    assert_eq!(line(&system), "");
}

/// The frames of the arena, and what was asked for.
struct Asked(&'static Arena, Mutex<Vec<FrameRequest>>);

// SAFETY: the arena's frames.
unsafe impl FrameSource for &Asked {
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        self.1.lock().unwrap().push(*request);
        self.0.alloc(request)
    }
}

impl FrameSink for &Asked {
    fn free(&self, frame: OwnedFrame) {
        self.0.free(frame);
    }
}

type AskingSystem<'a> = SlabSystem<Parts<&'a Asked, OffsetMap, ThreadCpu, Spin>>;

impl Asked {
    fn system(&self) -> AskingSystem<'_> {
        // SAFETY: map and table cover the arena.
        let parts = unsafe { Parts::new(self, self.0.map(), ThreadCpu(1), self.0.table) };
        let system = SlabSystem::new();
        system.init(parts).unwrap();
        self.seen();
        system
    }

    /// What was asked for since the last look.
    fn seen(&self) -> Vec<FrameRequest> {
        std::mem::take(&mut *self.1.lock().unwrap())
    }
}

#[test]
fn flags_reach_the_page_source() {
    let asked = Asked(Arena::new(2048), Mutex::default());
    let mut system = asked.system();
    let all = Flags::MAY_WAIT | Flags::NO_IO | Flags::NO_RECLAIM;
    let sizes = [24, 40, 56, 72, 88, 104, 120];
    for (size, (flags, context)) in sizes.into_iter().zip([
        (Flags::empty(), Context::Atomic),
        (Flags::MAY_WAIT, Context::MayWait),
        (Flags::NO_IO, Context::NoIo),
        (Flags::NO_RECLAIM, Context::NoReclaim),
        (Flags::MAY_WAIT | Flags::NO_IO, Context::NoIo),
        (all, Context::NoReclaim),
        (all | Flags::RESERVE, Context::NoReclaim),
    ]) {
        for size in [size, 20_000] {
            let memory = system.kmalloc(size, flags).unwrap();
            let reserve = flags.contains(Flags::RESERVE);
            let seen = asked.seen();
            // For a slab larger than it must be nobody reclaims, and nothing is taken from the reserves.
            let expected = if size == 20_000 {
                (context, reserve)
            } else {
                (context.min(Context::NoReclaim), false)
            };
            let with_flags =
                |request: &FrameRequest| (request.context, request.reserve) == expected;
            assert!(
                seen.iter().any(with_flags),
                "{flags:?} for {size} bytes: {seen:?}"
            );
            // SAFETY: allocated above, freed once.
            unsafe { system.kfree(memory.as_ptr()) };
        }
    }
    system.teardown().unwrap();
}

#[test]
fn a_free_asks_for_no_frame_that_others_would_have_to_give_up() {
    let asked = Asked(Arena::new(2048), Mutex::default());
    let mut system = asked.system();
    let take = || system.kmalloc(64, Flags::empty()).unwrap();
    // SAFETY: every object is freed once.
    let give = |object: NonNull<u8>| unsafe { system.kfree(object.as_ptr()) };
    // Arrays grow when objects come slowly and go fast, and travel when they do both fast.
    for pairs in [8, 0] {
        let objects: Vec<_> = (0..20_000)
            .map(|_| {
                (0..pairs).for_each(|_| give(take()));
                take()
            })
            .collect();
        asked.seen();
        objects.into_iter().for_each(give);
        let seen = asked.seen();
        assert!(!seen.is_empty(), "no array was asked for");
        assert!(seen.iter().all(|request| request.optional), "{pairs}");
    }
    system.teardown().unwrap();
}

#[test]
fn a_node_that_is_asked_for_reaches_the_page_source() {
    let asked = Asked(Arena::with_nodes(1024, 2), Mutex::default());
    let mut system = asked.system();
    let seen = || -> Vec<_> { asked.seen().iter().map(|request| request.node).collect() };
    let strict = NodePolicy::Strict(NodeId::new(1));
    let far = system.kmalloc_node(100, Flags::ZERO, strict).unwrap();
    let nodes = seen();
    assert_eq!(nodes.iter().filter(|node| **node == strict).count(), 1);
    // SAFETY: allocated above.
    assert_eq!(unsafe { system.ksize(far) }, Some(112));
    let whole = system.kmalloc_node(20_000, Flags::ZERO, strict).unwrap();
    assert_eq!(seen(), [strict]);
    let near = system
        .kmalloc_node(100, Flags::empty(), NodePolicy::Local)
        .unwrap();
    assert!(seen().iter().all(|&node| node == NodePolicy::Local));
    // SAFETY: allocated above.
    assert_eq!(unsafe { system.ksize(near) }, Some(112));
    // SAFETY: allocated above, freed once.
    unsafe {
        system.kfree(far.as_ptr());
        system.kfree(whole.as_ptr());
        system.kfree(near.as_ptr());
    }
    system.teardown().unwrap();
}

#[test]
fn short_memory_brings_out_what_caches_hold() {
    let (arena, system) = common::system(1024, 1);
    let objects: Vec<_> = (0..2000)
        .map(|_| system.kmalloc(512, Flags::empty()).unwrap())
        .collect();
    for object in objects {
        // SAFETY: allocated above, freed once.
        unsafe { system.kfree(object.as_ptr()) };
    }
    let held = arena.used();
    let told = |level| system.pressure(NodeId::ZERO, level, &FrameRequest::ONE);
    assert!(!told(PressureLevel::Low), "arrays are not given up early");
    assert_eq!(arena.used(), held);
    assert!(told(PressureLevel::Refusing));
    assert!(arena.used() < held);
    assert!(!told(PressureLevel::Refusing), "nothing more is there");
}

/// A large source of the host's heap; one for tasks only counts who asks it.
struct Heap {
    in_any_context: bool,
    given: Mutex<Vec<(usize, Layout)>>,
}

// SAFETY: V1 to V3: the host's heap gives each area once, in any context that a test has.
unsafe impl LargeSource for &'static Heap {
    fn in_any_context(&self) -> bool {
        self.in_any_context
    }
    fn alloc_large(&self, size: usize, _align: usize) -> Result<NonNull<u8>, AllocError> {
        let layout = Layout::from_size_align(size, 4096).unwrap();
        // SAFETY: the layout is not empty.
        let memory = NonNull::new(unsafe { std::alloc::alloc(layout) }).unwrap();
        // As if somebody had used it.
        // SAFETY: just allocated with this size.
        unsafe { memory.write_bytes(0xa5, size) };
        let mut given = self.given.lock().unwrap();
        given.push((memory.as_ptr().expose_provenance(), layout));
        Ok(memory)
    }
    unsafe fn free_large(&self, memory: NonNull<u8>) {
        let mut given = self.given.lock().unwrap();
        let at = given
            .iter()
            .position(|area| area.0 == memory.as_ptr().addr());
        let (_, layout) = given.swap_remove(at.expect("an area that was given"));
        // SAFETY: from `alloc_large`, and only once.
        unsafe { std::alloc::dealloc(memory.as_ptr(), layout) };
    }
    fn contains(&self, address: *const u8) -> bool {
        let given = self.given.lock().unwrap();
        let inside =
            |area: &(usize, Layout)| (area.0..area.0 + area.1.size()).contains(&address.addr());
        given.iter().any(inside)
    }
    fn size_of(&self, memory: NonNull<u8>) -> Option<usize> {
        let given = self.given.lock().unwrap();
        let area = given.iter().find(|area| area.0 == memory.as_ptr().addr())?;
        Some(area.1.size())
    }
}

#[test]
fn a_large_source_for_tasks_is_asked_only_by_who_may_wait() {
    for in_any_context in [false, true] {
        let arena = Arena::new(2048);
        let heap: &'static Heap = Box::leak(Box::new(Heap {
            in_any_context,
            given: Mutex::default(),
        }));
        let mut system = SlabSystem::new();
        // SAFETY: map and table cover the arena.
        let parts: Parts<_, _, _, Spin, _, _> =
            unsafe { Parts::with_large(arena, arena.map(), ThreadCpu(1), arena.table, heap) };
        system.init(parts).unwrap();
        let asked = |size, flags| {
            let served = system.kmalloc(size, flags);
            let asked = heap.given.lock().unwrap().len();
            if let Ok(memory) = served {
                if flags.contains(Flags::ZERO) {
                    // SAFETY: allocated above with this size.
                    let bytes = unsafe { std::slice::from_raw_parts(memory.as_ptr(), size) };
                    assert!(bytes.iter().all(|&byte| byte == 0));
                }
                // SAFETY: allocated above.
                unsafe { system.kfree(memory.as_ptr()) };
            }
            (served.is_ok(), asked == 1)
        };
        for flags in [Flags::MAY_WAIT, Flags::NO_IO, Flags::NO_RECLAIM] {
            assert_eq!(asked(100 << 10, flags), (true, true));
            assert_eq!(asked(5 << 20, flags), (true, true));
        }
        for flags in [Flags::empty(), Flags::RESERVE | Flags::ZERO] {
            assert_eq!(asked(100 << 10, flags), (true, in_any_context));
            assert_eq!(asked(5 << 20, flags), (in_any_context, in_any_context));
        }
        // No page is left: the source is the way out only for who may ask it.
        let mut held = Vec::new();
        while let Ok(memory) = system.kmalloc_node(4096, Flags::NO_WARN, NodePolicy::Interleave) {
            held.push(memory);
        }
        assert_eq!(asked(9 << 10, Flags::MAY_WAIT), (true, true));
        assert_eq!(
            asked(9 << 10, Flags::empty()),
            (in_any_context, in_any_context)
        );
        for memory in held {
            // SAFETY: allocated above.
            unsafe { system.kfree(memory.as_ptr()) };
        }
        system.teardown().unwrap();
        assert_eq!(arena.used(), 0);
    }
}

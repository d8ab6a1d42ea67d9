//! Each misuse that a policy is there to find, planted; and that a system with the policy works as one without.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::alloc::Layout;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use common::{Arena, TestParts, parts, run_as};
use kmem_hal::{AllocError, FrameTable, LargeSource, NodeId, NodePolicy, OffsetMap, Spin};
use kmem_slab::{
    Cache, Check, Flags, Guard, Misuse, Owner, OwnerCount, Plain, Platform, Poison, Policy,
    Quarantine, Redzone, ReuseCache, Shuffle, SlabSystem,
};

/// The parts of the other tests with a policy, a log of what was reported, and a source of pages for guarded objects.
struct Hardened<H> {
    parts: TestParts,
    log: Arc<Mutex<Vec<Misuse>>>,
    refused: Arc<Mutex<Vec<usize>>>,
    large: Pages,
    policy: PhantomData<fn() -> H>,
}

/// Pages of the host's heap, as a large source.
struct Pages(Mutex<Vec<usize>>);

// SAFETY: V1 to V3: the host's heap gives each page once.
unsafe impl LargeSource for Pages {
    fn in_any_context(&self) -> bool {
        true
    }
    fn alloc_large(&self, size: usize, _align: usize) -> Result<NonNull<u8>, AllocError> {
        if size > 4096 {
            return Err(AllocError::OutOfMemory);
        }
        // SAFETY: the layout is not empty.
        let page = unsafe { std::alloc::alloc(Layout::from_size_align(4096, 4096).unwrap()) };
        self.0.lock().unwrap().push(page.expose_provenance());
        NonNull::new(page).ok_or(AllocError::OutOfMemory)
    }
    unsafe fn free_large(&self, memory: NonNull<u8>) {
        let mut pages = self.0.lock().unwrap();
        let at = pages
            .iter()
            .position(|&page| page == memory.as_ptr().addr());
        pages.swap_remove(at.expect("a page that was given"));
        // SAFETY: from `alloc_large`, and only once.
        unsafe {
            std::alloc::dealloc(
                memory.as_ptr(),
                Layout::from_size_align(4096, 4096).unwrap(),
            )
        };
    }
    fn contains(&self, address: *const u8) -> bool {
        self.0.lock().unwrap().contains(&(address.addr() & !4095))
    }
    fn size_of(&self, memory: NonNull<u8>) -> Option<usize> {
        self.0
            .lock()
            .unwrap()
            .contains(&memory.as_ptr().addr())
            .then_some(4096)
    }
}

// SAFETY: S1 to S3: those of the parts.
unsafe impl<H: Policy> Platform for Hardened<H> {
    type Frames = &'static Arena;
    type Map = OffsetMap;
    type Cpu = common::ThreadCpu;
    type Lock = Spin;
    type Large = Pages;
    type Policy = H;

    fn frames(&self) -> &&'static Arena {
        self.parts.frames()
    }
    fn map(&self) -> &OffsetMap {
        self.parts.map()
    }
    fn table(&self) -> &FrameTable {
        self.parts.table()
    }
    fn cpu(&self) -> &common::ThreadCpu {
        self.parts.cpu()
    }
    fn large(&self) -> &Pages {
        &self.large
    }
    fn refused(&self, bytes: usize, error: AllocError) {
        assert_eq!(error, AllocError::OutOfMemory);
        self.refused.lock().unwrap().push(bytes);
    }
    fn misuse(&self, misuse: &Misuse) {
        self.log.lock().unwrap().push(*misuse);
    }
}

struct World<H: Policy> {
    arena: &'static Arena,
    system: SlabSystem<Hardened<H>>,
    log: Arc<Mutex<Vec<Misuse>>>,
    refused: Arc<Mutex<Vec<usize>>>,
}

impl<H: Policy> World<H> {
    fn new() -> Self {
        run_as(0);
        let (arena, log, refused) = (Arena::new(2048), Arc::default(), Arc::default());
        let system = SlabSystem::new();
        system
            .init(Hardened {
                parts: parts(arena, 2),
                log: Arc::clone(&log),
                refused: Arc::clone(&refused),
                large: Pages(Mutex::default()),
                policy: PhantomData,
            })
            .unwrap();
        Self {
            arena,
            system,
            log,
            refused,
        }
    }

    fn take(&self, size: usize) -> NonNull<u8> {
        self.system.kmalloc(size, Flags::empty()).unwrap()
    }

    /// What was reported since the last look.
    fn seen(&self) -> Vec<Misuse> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    fn end(mut self) {
        assert_eq!(self.seen(), []);
        self.system.teardown().unwrap();
        assert_eq!(self.arena.used(), 0);
        self.arena.check_slots();
    }
}

#[test]
fn check_finds_a_double_free_at_the_call_and_goes_on() {
    let world: World<Check> = World::new();
    for size in [8, 24, 40, 64, 100, 5000] {
        let layout = Layout::from_size_align(size, 8).unwrap();
        let take = || world.system.kmalloc_layout(layout, Flags::empty()).unwrap();
        let (a, b) = (take(), take());
        // SAFETY: the second free of `a` is the misuse under test, which the policy refuses.
        unsafe {
            world.system.kfree(a.as_ptr());
            world.system.kfree(a.as_ptr());
        }
        let address = a.as_ptr().addr();
        assert!(
            matches!(world.seen()[..], [Misuse::DoubleFree { address: at, .. }] if at == address),
            "size {size}"
        );
        // SAFETY: as above, with the layout.
        unsafe { world.system.kfree_layout(a, layout) };
        assert!(matches!(world.seen()[..], [Misuse::DoubleFree { .. }]));
        // SAFETY: a live allocation.
        unsafe { world.system.kfree_layout(b, layout) };
        assert_eq!(world.seen(), []);
    }
    world.end();
}

#[test]
fn check_finds_an_address_inside_an_object() {
    let world: World<Check> = World::new();
    for (size, offsets) in [
        (64, &[8, 16, 48][..]),
        (24, &[8, 16]),
        (40, &[8, 16, 24, 32]),
    ] {
        let objects = [world.take(size), world.take(size), world.take(size)];
        for &offset in offsets {
            // SAFETY: the misuse under test; nothing is written.
            unsafe { world.system.kfree(objects[1].as_ptr().add(offset)) };
            assert!(
                matches!(world.seen()[..], [Misuse::InvalidFree { .. }]),
                "{offset} of {size}"
            );
        }
        for object in objects {
            // SAFETY: live allocations.
            unsafe { world.system.kfree(object.as_ptr()) };
        }
    }
    world.end();
}

#[test]
fn check_finds_the_wrong_class_the_wrong_cache_and_strangers() {
    let world: World<Check> = World::new();
    {
        let one: Cache<'_, [u64; 8], _> = Cache::new(&world.system, "one");
        let other: Cache<'_, [u64; 8], _> = Cache::new(&world.system, "other");
        let boxed = one.alloc([1; 8]).unwrap();
        drop(other.alloc([1; 8]).unwrap());
        let raw = kmem_slab::SlabBox::into_raw(boxed);
        // SAFETY: the misuse under test: an object of one cache in a box of the other.
        drop(unsafe { kmem_slab::SlabBox::from_raw(&other, raw) });
        assert!(matches!(
            world.seen()[..],
            [Misuse::WrongCache {
                cache: "other",
                belongs_to: "one",
                ..
            }]
        ));
        // SAFETY: the object is still in use.
        drop(unsafe { kmem_slab::SlabBox::from_raw(&one, raw) });
    }
    let a = world.take(64);
    // SAFETY: the misuse under test: the layout is that of another class.
    unsafe {
        world
            .system
            .kfree_layout(a, Layout::from_size_align(200, 8).unwrap())
    };
    assert!(matches!(
        world.seen()[..],
        [Misuse::WrongCache {
            cache: "kmalloc-224",
            belongs_to: "kmalloc-128",
            ..
        }]
    ));
    let mut local = 0u64;
    // SAFETY: the misuse under test.
    unsafe {
        world
            .system
            .kfree_layout(NonNull::from(&mut local).cast(), Layout::new::<u64>())
    };
    assert!(matches!(world.seen()[..], [Misuse::ForeignFree { .. }]));
    // SAFETY: a live allocation.
    unsafe { world.system.kfree(a.as_ptr()) };
    world.end();
}

#[test]
fn redzone_finds_writes_behind_the_object_and_the_wrong_size() {
    let world: World<Redzone> = World::new();
    for size in [1, 60, 64, 1000] {
        for behind in [0, 1, 15] {
            let a = world.take(size);
            // SAFETY: a live allocation.
            assert_eq!(unsafe { world.system.ksize(a) }, Some(size));
            // SAFETY: inside the slot, behind the object: the misuse under test.
            unsafe {
                a.add(size + behind).write(1);
                world.system.kfree(a.as_ptr());
            }
            let at = size + behind;
            assert!(
                matches!(world.seen()[..], [Misuse::Overrun { offset, .. }] if offset == at),
                "{size} + {behind}"
            );
        }
    }
    let a = world.take(1000);
    // SAFETY: a live allocation; no record lies behind what is not its beginning, and the call does not look for one.
    assert_eq!(unsafe { world.system.ksize(a.add(999)) }, None);
    // SAFETY: a live allocation, and then none: its slab is still there.
    unsafe {
        world.system.kfree(a.as_ptr());
        assert_eq!(world.system.ksize(a), None);
    }
    let a = world.take(60);
    // SAFETY: the misuse under test: one byte less than was asked for.
    unsafe {
        world
            .system
            .kfree_layout(a, Layout::from_size_align(59, 8).unwrap())
    };
    assert!(matches!(
        world.seen()[..],
        [Misuse::WrongSize {
            allocated: 60,
            freed: 59,
            ..
        }]
    ));
    world.end();
}

#[test]
fn poison_finds_writes_after_the_free() {
    let world: World<Poison> = World::new();
    for offset in [0, 8, 63] {
        let a = world.take(64);
        // SAFETY: the write after the free is the misuse under test; the slab is still there.
        unsafe {
            world.system.kfree(a.as_ptr());
            a.add(offset).write(7);
        }
        let b = world.take(64);
        assert_eq!(a, b);
        assert!(
            matches!(world.seen()[..], [Misuse::UseAfterFree { offset: at, .. }] if at == offset)
        );
        // SAFETY: a live allocation.
        unsafe { world.system.kfree(b.as_ptr()) };
    }
    world.end();
}

#[test]
fn poison_shows_in_what_is_not_initialised() {
    let world: World<Poison> = World::new();
    let a = world.take(32);
    // SAFETY: allocated, and written by the policy.
    assert_eq!(unsafe { a.add(31).read() }, 0x5a);
    let b = world.system.kmalloc(32, Flags::ZERO).unwrap();
    // SAFETY: as above.
    assert_eq!(unsafe { b.add(31).read() }, 0);
    for object in [a, b] {
        // SAFETY: live allocations.
        unsafe { world.system.kfree(object.as_ptr()) };
    }
    world.end();
}

#[test]
fn quarantine_ends_with_its_cache_on_a_cpu_without_memory_for_a_head() {
    use kmem_hal::{FrameRequest, FrameSink, FrameSource};

    let world: World<Quarantine<8>> = World::new();
    let cache: Cache<'_, [u64; 9], _> = Cache::new(&world.system, "waiting");
    drop(cache.alloc([1; 9]).unwrap());
    assert!(cache.info().unwrap().waiting > 0);
    let one = || FrameSource::alloc(world.arena, &FrameRequest::ONE).ok();
    let frames: Vec<_> = std::iter::from_fn(one).collect();
    run_as(1);
    cache.destroy().unwrap();
    run_as(0);
    for frame in frames {
        FrameSink::free(world.arena, frame);
    }
    world.end();
}

#[test]
fn quarantine_keeps_freed_objects_from_coming_back_at_once() {
    let world: World<(Quarantine<8>, Poison)> = World::new();
    let mut freed = Vec::new();
    for round in 0..100 {
        let a = world.take(64);
        assert!(
            !freed.iter().rev().take(8).any(|&old| old == a),
            "round {round}: given again within 8 frees"
        );
        freed.push(a);
        // SAFETY: a live allocation.
        unsafe { world.system.kfree(a.as_ptr()) };
    }
    let old = *freed.last().unwrap();
    // SAFETY: the write after the free and the double free are the misuses under test.
    unsafe {
        world.system.kfree(old.as_ptr());
        assert!(matches!(world.seen()[..], [Misuse::DoubleFree { .. }]));
        old.add(5).write(1);
    }
    let mut waiting = 0;
    world
        .system
        .caches(|cache| waiting += cache.waiting)
        .unwrap();
    assert_eq!(waiting, 8);
    // It is found when the object leaves the quarantine.
    for _ in 0..8 {
        let a = world.take(64);
        // SAFETY: a live allocation.
        unsafe { world.system.kfree(a.as_ptr()) };
    }
    assert!(matches!(
        world.seen()[..],
        [Misuse::UseAfterFree { offset: 5, .. }]
    ));
    // What was found is poisoned again before the teardown looks.
    world.system.shrink();
    let mut active = 0;
    world
        .system
        .caches(|cache| active += cache.active_objects + cache.waiting)
        .unwrap();
    assert_eq!(active, 0);
}

#[test]
fn shuffle_gives_addresses_out_of_order() {
    let plain: World<Plain> = World::new();
    let shuffled: World<Shuffle> = World::new();
    fn ascending<H: Policy>(world: &World<H>) -> usize {
        let objects: Vec<_> = (0..60).map(|_| world.take(64)).collect();
        let count = objects.windows(2).filter(|pair| pair[0] < pair[1]).count();
        for object in objects {
            // SAFETY: live allocations.
            unsafe { world.system.kfree(object.as_ptr()) };
        }
        count
    }
    assert!(ascending(&plain) >= 57);
    assert!((10..50).contains(&ascending(&shuffled)));
    plain.end();
    shuffled.end();
}

#[test]
fn owner_tells_which_line_leaked() {
    let mut world: World<Owner> = World::new();
    let line = line!() + 1;
    let leaked = world.system.kmalloc(100, Flags::empty()).unwrap();
    let other = world.take(100);
    // SAFETY: a live allocation.
    unsafe { world.system.kfree(other.as_ptr()) };
    let mut owned = Vec::new();
    world.system.owners(|object| owned.push(*object));
    let [object] = owned[..] else {
        panic!("{owned:?}")
    };
    assert_eq!((object.cache, object.size), ("kmalloc-128", 100));
    assert_eq!(object.address, leaked.as_ptr().addr());
    let place = object.place.unwrap();
    assert_eq!((place.file(), place.line()), (file!(), line));
    assert!(object.to_string().contains("policies.rs"), "{object}");
    let refused = world.system.teardown().unwrap_err();
    assert_eq!((refused.cache, refused.objects), ("kmalloc-128", 1));
    // SAFETY: the allocation is still there.
    unsafe { world.system.kfree(leaked.as_ptr()) };
    world.end();
}

#[test]
fn owner_counts_objects_by_line() {
    let mut world: World<Owner> = World::new();
    let many: Vec<_> = (0..10).map(|_| world.take(100)).collect();
    let line = line!() + 1;
    let one = world.system.kmalloc(5000, Flags::empty()).unwrap();
    let mut table = [OwnerCount::NONE; 4];
    let (counts, others) = world.system.owner_counts(&mut table);
    assert_eq!((counts.len(), others), (2, 0));
    // Most bytes first.
    assert_eq!((counts[0].objects, counts[0].bytes), (1, 5000));
    assert_eq!(counts[0].place.unwrap().line(), line);
    assert_eq!((counts[1].cache, counts[1].objects), ("kmalloc-128", 10));
    assert_eq!(counts[1].bytes, 1000);
    assert!(
        counts[1]
            .to_string()
            .contains("10 objects, 1000 bytes from")
    );
    // A table that is too small says so.
    let mut small = [OwnerCount::NONE; 1];
    let (counts, others) = world.system.owner_counts(&mut small);
    assert_eq!(counts[0].objects + others, 11);
    for object in many.into_iter().chain([one]) {
        // SAFETY: live allocations.
        unsafe { world.system.kfree(object.as_ptr()) };
    }
    world.end();
}

#[test]
fn refusals_are_told_unless_the_caller_asks_for_silence() {
    let world: World<Plain> = World::new();
    let mut held = Vec::new();
    while let Ok(object) = world.system.kmalloc(8192, Flags::NO_WARN) {
        held.push(object);
    }
    assert_eq!(*world.refused.lock().unwrap(), []);
    assert!(world.system.kmalloc(8000, Flags::empty()).is_err());
    assert!(world.system.kmalloc(8000, Flags::NO_WARN).is_err());
    assert!(world.system.kmalloc(20_000, Flags::empty()).is_err());
    {
        let cache: Cache<'_, [u64; 600], _> = Cache::new(&world.system, "large");
        assert!(cache.alloc([0; 600]).is_err());
        assert!(cache.alloc_with([0; 600], Flags::NO_WARN).is_err());
    }
    assert_eq!(*world.refused.lock().unwrap(), [8000, 20_000, 4800]);
    for object in held {
        // SAFETY: live allocations.
        unsafe { world.system.kfree(object.as_ptr()) };
    }
    world.end();
}

#[test]
fn owner_tells_the_callers_line_whatever_the_call() {
    let mut world: World<Owner> = World::new();
    let layout = Layout::from_size_align(100, 8).unwrap();
    let here = NodePolicy::Preferred(NodeId::new(0));
    let system = &world.system;
    let line = line!() + 4;
    // SAFETY: memory of this system and its layout, which is given up; null allocates.
    let objects = unsafe {
        [
            system
                .kmalloc_node(100, Flags::empty(), here)
                .unwrap()
                .as_ptr(),
            system
                .krealloc(std::ptr::null_mut(), 100, Flags::empty())
                .unwrap()
                .as_ptr(),
            system.alloc(layout),
            system.alloc_zeroed(layout),
            system.realloc(std::ptr::dangling_mut(), Layout::new::<()>(), 100),
        ]
    };
    let mut lines = Vec::new();
    world.system.owners(|object| {
        let place = object.place.unwrap();
        assert_eq!(place.file(), file!());
        lines.push(place.line());
    });
    lines.sort_unstable();
    assert!(
        lines.iter().all(|at| (line..line + 15).contains(at)),
        "{lines:?}"
    );
    lines.dedup();
    assert_eq!(lines.len(), objects.len());
    for object in objects {
        // SAFETY: allocated above.
        unsafe { world.system.kfree(object) };
    }
    world.end();
}

#[test]
fn owner_tells_the_line_of_a_built_object() {
    let world: World<Owner> = World::new();
    {
        let cache = ReuseCache::new(&world.system, "built", || 5u64, |_| {});
        let line = line!() + 1;
        let object = cache.alloc().unwrap();
        // SAFETY: nobody else uses the system.
        unsafe {
            world.system.owners_shared(|owned| {
                assert_eq!(
                    owned.place.map(|at| (at.file(), at.line())),
                    Some((file!(), line))
                );
            });
        }
        drop(object);
    }
    world.end();
}

#[test]
fn owner_tells_the_line_of_a_box() {
    let mut world: World<Plain> = World::new();
    {
        let cache: Cache<'_, u64, _, false, Owner> = Cache::new(&world.system, "owned");
        let line = line!() + 1;
        let boxed = cache.alloc(5).unwrap();
        let mut owned = Vec::new();
        // SAFETY: nobody else uses the system.
        unsafe { world.system.owners_shared(|object| owned.push(*object)) };
        assert_eq!(owned.len(), 1);
        assert_eq!((owned[0].cache, owned[0].size), ("owned", 8));
        assert_eq!(owned[0].place.unwrap().line(), line);
        drop(boxed);
    }
    let mut owned = 0;
    world.system.owners(|_| owned += 1);
    assert_eq!(owned, 0);
    world.end();
}

#[test]
fn guard_puts_one_in_so_many_at_the_end_of_its_own_page() {
    let world: World<Guard<4>> = World::new();
    let mut at_an_end = 0;
    for size in [16, 48, 100, 1024] {
        let layout = Layout::from_size_align(size, 8).unwrap();
        let take = |_| world.system.kmalloc_layout(layout, Flags::empty()).unwrap();
        let objects: Vec<_> = (0..8).map(take).collect();
        for object in objects {
            let end = object.as_ptr().addr() + size.next_multiple_of(8);
            let guarded = end.is_multiple_of(4096);
            at_an_end += usize::from(guarded);
            // SAFETY: a live allocation.
            unsafe {
                object.write_bytes(1, size);
                if object.as_ptr().addr() & 16 == 0 {
                    world.system.kfree(object.as_ptr());
                } else {
                    world.system.kfree_layout(object, layout);
                }
            }
        }
    }
    assert!(at_an_end >= 8, "{at_an_end} of 32");
    world.end();
}

/// A mixed run: contents stay, counts agree, nothing is reported, all memory goes back.
fn works<H: Policy>() {
    let world: World<H> = World::new();
    // Address, size, content, and whether the layout was told.
    let mut held: Vec<(NonNull<u8>, usize, u8, bool)> = Vec::new();
    let mut state = 9u64;
    for step in 0..6000u32 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let random = (state >> 33) as usize;
        if !random.is_multiple_of(3) && held.len() < 300 || held.is_empty() {
            let size = 1 + random % [40, 300, 3000][random % 3];
            let by_layout = step.is_multiple_of(2);
            let served = if by_layout {
                let layout = Layout::from_size_align(size, 8).unwrap();
                world.system.kmalloc_layout(layout, Flags::empty())
            } else {
                world.system.kmalloc(size, Flags::empty())
            };
            let Ok(object) = served else {
                continue;
            };
            // SAFETY: a live allocation of `size` bytes.
            unsafe { object.write_bytes(step as u8, size) };
            held.push((object, size, step as u8, by_layout));
        } else {
            let (object, size, fill, by_layout) = held.swap_remove(random % held.len());
            // SAFETY: a live allocation, filled above.
            let bytes = unsafe { std::slice::from_raw_parts(object.as_ptr(), size) };
            assert!(bytes.iter().all(|&byte| byte == fill));
            let layout = Layout::from_size_align(size, 8).unwrap();
            // SAFETY: a live allocation.
            unsafe {
                if random.is_multiple_of(2) || !by_layout {
                    world.system.kfree(object.as_ptr());
                } else if random.is_multiple_of(5) {
                    let grown = world.system.realloc(object.as_ptr(), layout, size + 40);
                    let grown = NonNull::new(grown).unwrap();
                    assert_eq!(grown.as_ptr().read(), fill);
                    grown.write_bytes(fill, size + 40);
                    held.push((grown, size + 40, fill, true));
                } else {
                    world.system.kfree_layout(object, layout);
                }
            }
        }
        if step % 1500 == 700 {
            world.system.shrink();
        }
        run_as(u32::from(step % 64 < 20));
    }
    run_as(0);
    for (object, ..) in held {
        // SAFETY: live allocations.
        unsafe { world.system.kfree(object.as_ptr()) };
    }
    world
        .system
        .caches(|cache| {
            assert_eq!(cache.active_objects, 0, "{cache:?}");
            assert_eq!(cache.allocs, cache.frees, "{cache:?}");
        })
        .unwrap();
    world.end();
}

#[test]
fn systems_with_any_policy_work() {
    works::<Plain>();
    works::<Check>();
    works::<Redzone>();
    works::<Poison>();
    works::<Quarantine<16>>();
    works::<Shuffle>();
    works::<Owner>();
    works::<Guard<10>>();
    works::<(Check, Redzone, Poison, Quarantine<32>, Shuffle, Owner)>();
}

/// Powers of two up to a page lie at multiples of themselves, whatever lies behind each object.
fn aligns<H: Policy>() {
    let world: World<H> = World::new();
    let aligned = |object: NonNull<u8>, size: usize| {
        assert!(
            object.as_ptr().addr().is_multiple_of(size),
            "{size} bytes at {object:?}"
        );
    };
    for size in (0..=12).map(|shift| 1usize << shift) {
        let mut held: Vec<_> = (0..20).map(|_| world.take(size)).collect();
        for object in &mut held {
            aligned(*object, size);
            // SAFETY: a live allocation, replaced by what it became.
            unsafe {
                // Its class may be the same as that of the power of two, or not.
                for other in [size + 3, size] {
                    let moved = world
                        .system
                        .krealloc(object.as_ptr(), other, Flags::empty());
                    *object = moved.unwrap();
                }
            }
            aligned(*object, size);
        }
        for object in held {
            // SAFETY: a live allocation.
            unsafe { world.system.kfree(object.as_ptr()) };
        }
    }
    world.end();
}

#[test]
fn powers_of_two_are_aligned_to_themselves_under_every_policy() {
    aligns::<Plain>();
    aligns::<Check>();
    aligns::<Redzone>();
    aligns::<Poison>();
    aligns::<Owner>();
    aligns::<Guard<3>>();
    aligns::<(Check, Redzone, Poison, Quarantine<32>, Shuffle, Owner)>();
}

#[test]
fn check_finds_a_write_behind_the_object_at_its_free() {
    let world: World<Check> = World::new();
    let a = world.take(56);
    // SAFETY: a live allocation.
    let room = unsafe { world.system.ksize(a) }.unwrap();
    // SAFETY: the misuse under test: the first byte behind what may be used.
    unsafe {
        let behind = a.as_ptr().add(room);
        let was = behind.read();
        behind.write(!was);
        world.system.kfree(a.as_ptr());
        let seen = world.seen();
        assert!(
            matches!(seen[..], [Misuse::Overrun { address, offset, .. }]
                if address == a.as_ptr().addr() && offset == room),
            "{seen:?}"
        );
        // The object stayed where it was, and can be freed once the tag is whole again.
        behind.write(was);
        world.system.kfree(a.as_ptr());
    }
    world.end();
}

#[test]
fn check_never_reads_what_is_not_mapped() {
    let world: World<Check> = World::new();
    let layout = Layout::from_size_align(100, 8).unwrap();
    for address in [8usize, 4096, usize::MAX - 64, 1 << 40] {
        let wild = std::ptr::without_provenance_mut::<u8>(address);
        // SAFETY: the misuse under test.
        unsafe {
            world
                .system
                .kfree_layout(NonNull::new(wild).unwrap(), layout)
        };
        assert!(matches!(world.seen()[..], [Misuse::ForeignFree { .. }]));
    }
    world.end();
}

#[test]
fn memory_for_hardened_slabs_may_run_out_anywhere() {
    for fail in 0..40 {
        let mut world: World<(Check, Owner)> = World::new();
        world
            .arena
            .fail_at
            .store(fail, std::sync::atomic::Ordering::Relaxed);
        let objects: Vec<_> = (0..200)
            .filter_map(|n| world.system.kmalloc(40 + n, Flags::empty()).ok())
            .collect();
        world
            .arena
            .fail_at
            .store(u64::MAX, std::sync::atomic::Ordering::Relaxed);
        assert!(objects.len() >= 199, "one refusal costs at most one object");
        for object in objects {
            // SAFETY: live allocations.
            unsafe { world.system.kfree(object.as_ptr()) };
        }
        world.system.teardown().unwrap();
        assert_eq!(world.arena.used(), 0);
        world.arena.check_slots();
    }
}

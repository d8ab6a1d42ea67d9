//! A large source that runs short, and what caches hold meanwhile.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Arena, ThreadCpu};
use kmem_hal::{AllocError, LargeSource, Spin};
use kmem_slab::{Flags, Parts, Platform, SlabSystem};

/// Gives one area, where no more than so many frames of the arena are used: as a source that stands on the same frames.
struct Short {
    arena: &'static Arena,
    most: AtomicUsize,
    asked: AtomicUsize,
    given: AtomicUsize,
}

impl Short {
    fn new() -> &'static Self {
        Box::leak(Box::new(Self {
            arena: Arena::new(1024),
            most: AtomicUsize::new(0),
            asked: AtomicUsize::new(0),
            given: AtomicUsize::new(0),
        }))
    }
}

const LAYOUT: Layout = Layout::new::<[u64; 512]>();

// SAFETY: V1 to V3: one area at a time, of the host's heap; no test writes to it, nor asks for zeroes.
unsafe impl LargeSource for &'static Short {
    fn in_any_context(&self) -> bool {
        true
    }
    fn alloc_large(&self, _size: usize, _align: usize) -> Result<NonNull<u8>, AllocError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if self.arena.used() > self.most.load(Ordering::Relaxed) {
            return Err(AllocError::OutOfMemory);
        }
        // SAFETY: the layout is not empty.
        let memory = NonNull::new(unsafe { std::alloc::alloc(LAYOUT) }).unwrap();
        self.given
            .store(memory.as_ptr().expose_provenance(), Ordering::Relaxed);
        Ok(memory)
    }
    unsafe fn free_large(&self, memory: NonNull<u8>) {
        assert_eq!(
            self.given.swap(0, Ordering::Relaxed),
            memory.as_ptr().addr()
        );
        // SAFETY: from `alloc_large`, and only once.
        unsafe { std::alloc::dealloc(memory.as_ptr(), LAYOUT) };
    }
    fn contains(&self, address: *const u8) -> bool {
        self.given.load(Ordering::Relaxed) == address.addr()
    }
    fn size_of(&self, memory: NonNull<u8>) -> Option<usize> {
        self.contains(memory.as_ptr()).then_some(LAYOUT.size())
    }
}

/// Depots, arrays and empty slabs hold a good deal afterwards.
fn use_caches<P: Platform>(system: &SlabSystem<P>) {
    let take = |_| system.kmalloc(512, Flags::empty()).unwrap();
    let objects: Vec<_> = (0..2000).map(take).collect();
    for object in objects {
        // SAFETY: allocated above, freed once.
        unsafe { system.kfree(object.as_ptr()) };
    }
}

#[test]
fn what_caches_hold_serves_the_large_source_before_it_refuses() {
    const SIZE: usize = 5 << 20;
    let source = Short::new();
    let arena = source.arena;
    let mut system = SlabSystem::new();
    // SAFETY: map and table cover the arena.
    let parts: Parts<_, _, _, Spin, _, _> =
        unsafe { Parts::with_large(arena, arena.map(), ThreadCpu(1), arena.table, source) };
    system.init(parts).unwrap();
    use_caches(&system);
    let held = arena.used();
    let asked = || source.asked.swap(0, Ordering::Relaxed);

    // Nothing is given up where the first try is served.
    source.most.store(held, Ordering::Relaxed);
    let first = system.kmalloc(SIZE, Flags::empty()).unwrap();
    assert_eq!((asked(), arena.used()), (1, held));
    // SAFETY: allocated above.
    unsafe { system.kfree(first.as_ptr()) };

    source.most.store(held / 2, Ordering::Relaxed);
    let second = system.kmalloc(SIZE, Flags::empty()).unwrap();
    assert_eq!(asked(), 2);
    // SAFETY: allocated above.
    unsafe { system.kfree(second.as_ptr()) };

    // There is nothing more to be given up: it is not asked again, and its answer is the call's.
    source.most.store(0, Ordering::Relaxed);
    assert_eq!(
        system.kmalloc(SIZE, Flags::NO_WARN),
        Err(AllocError::OutOfMemory)
    );
    assert_eq!(asked(), 1);
    system.teardown().unwrap();
    assert_eq!(arena.used(), 0);
}

#[test]
fn caches_give_nothing_up_for_what_can_never_be_had() {
    let (arena, system) = common::system(1024, 1);
    use_caches(&system);
    let held = arena.used();
    assert_eq!(
        system.kmalloc(5 << 20, Flags::NO_WARN),
        Err(AllocError::Unsatisfiable)
    );
    assert_eq!(arena.used(), held);
}

#[test]
fn what_caches_hold_serves_whole_pages_before_they_are_refused() {
    for size in [20_000, 100_000] {
        let (_, fresh) = common::system(1024, 1);
        let (arena, system) = common::system(1024, 1);
        use_caches(&system);
        let held = arena.used();
        assert!(held > 100, "{held}");
        let all = |system: &common::System| {
            std::iter::from_fn(|| system.kmalloc(size, Flags::NO_WARN).ok()).count()
        };
        // Descriptors stay where they are, in the midst of what could be a block.
        let (most, served) = (all(&fresh), all(&system));
        assert!(served * 10 > most * 9, "{served} of {most} times {size}");
    }
}

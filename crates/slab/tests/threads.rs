//! Several CPUs: frees on another CPU, CPUs that go, and a page source that is entered again.

mod common;

use std::cell::Cell;
use std::collections::HashSet;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;

use common::{Arena, System, TestParts, parts, run_as, system};
use kmem_hal::{AllocError, CpuId, FrameRequest, FrameSink, FrameSource, Order};
use kmem_slab::{Cache, Flags, SlabBox, SlabSystem};

#[test]
fn objects_freed_on_another_cpu_flow_back_in_whole_arrays() {
    let (arena, mut system) = system(4096, 2);
    let rounds = 20_000;
    std::thread::scope(|scope| {
        let (send, receive) = sync_channel::<usize>(256);
        let system = &system;
        scope.spawn(move || {
            run_as(0);
            for round in 0..rounds {
                let memory = system
                    .kmalloc(64, Flags::empty())
                    .unwrap()
                    .as_ptr()
                    .cast::<usize>();
                // SAFETY: 64 bytes that belong to this thread.
                unsafe { memory.write(round) };
                send.send(memory.expose_provenance()).unwrap();
            }
        });
        scope.spawn(move || {
            run_as(1);
            for round in 0..rounds {
                let memory: *mut usize =
                    std::ptr::with_exposed_provenance_mut(receive.recv().unwrap());
                // SAFETY: the producer gave the allocation up.
                unsafe {
                    assert_eq!(memory.read(), round);
                    system.kfree(memory.cast());
                }
            }
        });
    });
    run_as(0);
    let mut info = None;
    system
        .caches(|cache| {
            if cache.name == "kmalloc-64" {
                info = Some(*cache);
            }
        })
        .unwrap();
    let info = info.unwrap();
    assert_eq!((info.active_objects, info.misuses), (0, 0));
    assert_eq!((info.allocs, info.frees), (rounds as u64, rounds as u64));
    // An array has 502 objects at most, and leaves one CPU before it comes to the other.
    assert!(
        info.exchanges >= 2 * rounds as u64 / 512,
        "the depot carries them: {info:?}"
    );
    assert!(
        info.frames < 64,
        "memory does not grow with the rounds: {info:?}"
    );
    system.teardown().unwrap();
    assert_eq!(arena.used(), 0);
}

#[test]
fn many_cpus_never_share_an_object() {
    for nodes in [1, 3] {
        four_cpus_on(nodes);
    }
}

fn four_cpus_on(nodes: u16) {
    let (arena, mut system) = (Arena::with_nodes(12_288, nodes), System::new());
    system.init(parts(arena, 4)).unwrap();
    {
        let cache: Cache<'_, (u32, u32), TestParts> = Cache::new(&system, "pairs");
        std::thread::scope(|scope| {
            for cpu in 0..4 {
                let (system, cache) = (&system, &cache);
                scope.spawn(move || {
                    run_as(cpu);
                    let mut state = u64::from(cpu) + 1;
                    let mut held: Vec<SlabBox<'_, (u32, u32), TestParts>> = Vec::new();
                    let mut blocks: Vec<(*mut u8, usize)> = Vec::new();
                    for round in 0..6000u32 {
                        state = state
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1);
                        let random = (state >> 33) as usize;
                        if !random.is_multiple_of(3) || held.is_empty() {
                            held.push(cache.alloc((cpu, round)).unwrap());
                            let size = 8 + random % 2000;
                            let memory = system.kmalloc(size, Flags::empty()).unwrap().as_ptr();
                            // SAFETY: the allocation belongs to this thread.
                            unsafe { memory.write_bytes(cpu as u8, size) };
                            blocks.push((memory, size));
                        } else {
                            let boxed = held.swap_remove(random % held.len());
                            assert_eq!(boxed.0, cpu);
                            let (memory, size) = blocks.swap_remove(random % blocks.len());
                            // SAFETY: as above; freed once.
                            unsafe {
                                assert!((0..size).all(|at| memory.add(at).read() == cpu as u8));
                                system.kfree(memory);
                            }
                        }
                        if random.is_multiple_of(1000) {
                            system.shrink();
                        }
                    }
                    for (memory, _) in blocks {
                        // SAFETY: freed once.
                        unsafe { system.kfree(memory) };
                    }
                });
            }
        });
        run_as(0);
        assert_eq!(cache.info().unwrap().active_objects, 0);
        cache.destroy().unwrap();
    }
    system.teardown().unwrap();
    assert_eq!(arena.used(), 0);
}

#[test]
fn a_cpu_that_goes_strands_nothing() {
    let (_, system) = system(1024, 3);
    run_as(1);
    let objects: Vec<_> = (0..100)
        .map(|_| system.kmalloc(64, Flags::empty()).unwrap())
        .collect();
    for object in objects {
        // SAFETY: allocated above.
        unsafe { system.kfree(object.as_ptr()) };
    }
    run_as(0);
    system.shrink();
    let held = |system: &System| {
        let mut held = (0, 0);
        system
            .caches(|cache| {
                if cache.name == "kmalloc-64" {
                    held = (cache.in_arrays, cache.frames);
                }
            })
            .unwrap();
        held
    };
    assert!(held(&system).0 >= 100, "CPU 1 still holds its arrays");
    // SAFETY: nothing runs as CPU 1.
    unsafe { system.cpu_offline(CpuId::new(1)) }.unwrap();
    system.shrink();
    assert_eq!(held(&system), (0, 0));
    // SAFETY: as above.
    let beyond = unsafe { system.cpu_offline(CpuId::new(3)) };
    assert_eq!(beyond, Err(AllocError::Unsatisfiable));
    assert_eq!(
        system.cpu_online(CpuId::new(3)),
        Err(AllocError::Unsatisfiable)
    );
    system.cpu_online(CpuId::new(2)).unwrap();
}

#[test]
fn a_cpu_without_heads_and_memory_says_so_and_takes_caches_apart_all_the_same() {
    let (arena, system) = system(4096, 2);
    // More caches than a page has heads, all used on CPU 1 alone.
    run_as(1);
    let mut caches: Vec<Cache<'_, [u64; 8], _>> =
        (0..70).map(|_| Cache::new(&system, "many")).collect();
    for cache in &caches {
        drop(
            (0..1000)
                .map(|n| cache.alloc([n; 8]).unwrap())
                .collect::<Vec<_>>(),
        );
    }
    let last = caches.pop().unwrap();
    assert!(last.info().unwrap().in_depot > 0);
    run_as(0);
    let all: Vec<_> =
        std::iter::from_fn(|| arena.alloc(&FrameRequest::new(Order::ZERO)).ok()).collect();
    // SAFETY: one thread plays both CPUs, and it is not CPU 1 now.
    let offline = || unsafe { system.cpu_offline(CpuId::new(1)) };
    assert_eq!(offline(), Err(AllocError::OutOfMemory));
    assert_eq!(last.destroy(), Ok(()));
    for frame in all {
        FrameSink::free(arena, frame);
    }
    assert_eq!(offline(), Ok(()));
    for cache in &caches {
        assert_eq!(cache.info().unwrap().in_arrays, 0);
    }
}

#[test]
fn other_cpus_drain_when_they_are_asked_to() {
    let (_, system) = system(1024, 2);
    run_as(1);
    let objects: Vec<_> = (0..64)
        .map(|_| system.kmalloc(64, Flags::empty()).unwrap())
        .collect();
    for object in &objects {
        // SAFETY: allocated above.
        unsafe { system.kfree(object.as_ptr()) };
    }
    run_as(0);
    system.shrink();
    run_as(1);
    system.drain_local();
    run_as(0);
    system.shrink();
    assert_eq!(system.totals().slab_frames, 0);
}

static NESTED: AtomicPtr<System> = AtomicPtr::new(std::ptr::null_mut());

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    static GOT: Cell<u32> = const { Cell::new(0) };
    static SEEN: Cell<usize> = const { Cell::new(0) };
}

/// What a page source that logs does: it allocates from the heap that is asking it for pages.
fn log() {
    if DEPTH.get() > 0 {
        return;
    }
    // SAFETY: the test's system lives until the pointer is cleared.
    let Some(system) = (unsafe { NESTED.load(Ordering::Acquire).as_ref() }) else {
        return;
    };
    if !system.is_ready() {
        return;
    }
    DEPTH.set(1);
    if let Ok(memory) = system.kmalloc(64, Flags::empty()) {
        GOT.set(GOT.get() + 1);
        SEEN.set(memory.as_ptr().addr());
        // SAFETY: 64 bytes of this call; freed once.
        unsafe {
            memory.write_bytes(0xee, 64);
            system.kfree(memory.as_ptr());
        }
    }
    DEPTH.set(0);
}

#[test]
fn a_page_source_may_allocate_from_the_heap_that_asks_it() {
    let arena = Arena::new(2048);
    let system: &'static mut System = Box::leak(Box::new(SlabSystem::new()));
    system.init(parts(arena, 1)).unwrap();
    NESTED.store(system, Ordering::Release);
    *arena.hook.lock().unwrap() = Some(log);
    let all: Vec<_> = (0..5000)
        .map(|_| system.kmalloc(64, Flags::empty()).unwrap())
        .collect();
    *arena.hook.lock().unwrap() = None;
    NESTED.store(std::ptr::null_mut(), Ordering::Release);
    assert!(
        GOT.get() > 20,
        "the nested calls were served: {}",
        GOT.get()
    );
    assert_eq!(
        all.iter().collect::<HashSet<_>>().len(),
        all.len(),
        "no object was given twice"
    );
    for object in all {
        // SAFETY: allocated above.
        unsafe { system.kfree(object.as_ptr()) };
    }
    system.teardown().unwrap();
    assert_eq!(arena.used(), 0);
}

static BUSY: AtomicUsize = AtomicUsize::new(0);

/// What a page source may do that looks at the heap.
fn look() {
    // The look asks for memory itself.
    if DEPTH.replace(1) > 0 {
        return;
    }
    // SAFETY: null, or the leaked system of the test below.
    let system = unsafe { LOOKED_AT.load(Ordering::Acquire).as_ref() };
    if system.is_some_and(|system| system.caches(|_| ()) == Err(AllocError::Busy)) {
        BUSY.fetch_add(1, Ordering::Relaxed);
    }
    DEPTH.set(0);
}

static LOOKED_AT: AtomicPtr<System> = AtomicPtr::new(std::ptr::null_mut());

#[test]
fn no_cache_that_joins_holds_the_registry_while_it_asks_for_memory() {
    run_as(0);
    for nodes in [1, 2] {
        let arena = Arena::with_nodes(4096, nodes);
        let system: &'static mut System = Box::leak(Box::new(SlabSystem::new()));
        system.init(parts(arena, 1)).unwrap();
        LOOKED_AT.store(system, Ordering::Release);
        *arena.hook.lock().unwrap() = Some(look);
        // More caches than a row has columns.
        let caches: Vec<Cache<'_, u64, _>> = (0..100).map(|_| Cache::new(system, "many")).collect();
        let boxes: Vec<_> = caches.iter().map(|cache| cache.alloc(1).unwrap()).collect();
        *arena.hook.lock().unwrap() = None;
        LOOKED_AT.store(std::ptr::null_mut(), Ordering::Release);
        assert_eq!(BUSY.load(Ordering::Relaxed), 0, "{nodes} nodes");
        drop(boxes);
        drop(caches);
        system.teardown().unwrap();
        assert_eq!(arena.used(), 0);
    }
}

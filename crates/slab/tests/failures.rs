//! Every request to the page source fails once, and nothing is lost or changed by it.

mod common;

use std::sync::Mutex;

use common::Arena;
use kmem_hal::{
    AllocError, Context, FrameRequest, FrameSink, FrameSource, OffsetMap, Order, OwnedFrame, Spin,
};
use kmem_slab::{Cache, Flags, Parts, SlabSystem};
use kmem_testkit::{FailingSource, every_failure};

#[test]
fn every_request_may_fail_and_nothing_is_lost() {
    for nodes in [1, 2, 3] {
        every_request_may_fail(Arena::with_nodes(9216, nodes));
    }
}

fn every_request_may_fail(arena: &'static Arena) {
    let places = every_failure(|plan| {
        let source = FailingSource::new(arena, plan);
        // SAFETY: map and table cover the arena.
        let parts: Parts<_, OffsetMap, _, Spin> =
            unsafe { Parts::new(&source, arena.map(), common::ThreadCpu(2), arena.table) };
        let mut system = SlabSystem::new();
        if system.init(parts).is_err() {
            assert_eq!(arena.used(), 0, "a failed init keeps nothing");
            return;
        }
        let mut held = Vec::new();
        let mut refused = 0;
        for cpu in 0..2 {
            common::run_as(cpu);
            for size in [64, 64, 700, 8000, 20_000, 70_000] {
                for _ in 0..40 {
                    match system.kmalloc(size, Flags::empty()) {
                        Ok(memory) => held.push(memory),
                        Err(_) => refused += 1,
                    }
                }
            }
        }
        // A single refusal is made good by a smaller block, an object from elsewhere or a second try.
        assert!(refused <= 1, "{refused} refusals for one failure");
        {
            let cache: Cache<'_, [u8; 300], _> = Cache::new(&system, "typed");
            let boxes: Vec<_> = (0..100)
                .filter_map(|n| cache.alloc([n; 300]).ok())
                .collect();
            assert!(boxes.len() >= 99);
            assert!(boxes.windows(2).all(|pair| pair[0][0] < pair[1][299]));
            drop(boxes);
            cache.destroy().unwrap();
        }
        common::run_as(0);
        for memory in held {
            // SAFETY: allocated above, freed once.
            unsafe { system.kfree(memory.as_ptr()) };
        }
        system.teardown().unwrap();
        assert_eq!(arena.used(), 0);
        arena.check_slots();
    });
    assert!(places > 30, "{places} requests");
}

/// Memory in pieces of at most `largest`; remembers what it was asked for.
struct Fragmented {
    arena: &'static Arena,
    largest: Order,
    asked: Mutex<Vec<FrameRequest>>,
}

// SAFETY: the arena's frames.
unsafe impl FrameSource for &Fragmented {
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        self.asked.lock().unwrap().push(*request);
        if request.order > self.largest {
            return Err(AllocError::OutOfMemory);
        }
        self.arena.alloc(request)
    }
}

impl FrameSink for &Fragmented {
    fn free(&self, frame: OwnedFrame) {
        self.arena.free(frame);
    }
}

/// A large slab only saves memory: nobody reclaims for it or takes it from the reserves while a smaller one will do.
#[test]
fn only_the_smallest_slab_is_worth_reclaim_and_the_reserves() {
    let flags = [
        (Flags::empty(), Context::Atomic, Context::Atomic),
        (Flags::NO_RECLAIM, Context::NoReclaim, Context::NoReclaim),
        (Flags::NO_IO, Context::NoReclaim, Context::NoIo),
        (Flags::MAY_WAIT, Context::NoReclaim, Context::MayWait),
    ];
    for (size, least) in [(700, 0), (6000, 1)] {
        for (flags, before, last) in flags {
            let least = Order::new(least).unwrap();
            let source = Fragmented {
                arena: Arena::new(1024),
                largest: least,
                asked: Mutex::default(),
            };
            // SAFETY: map and table cover the arena.
            let parts: Parts<_, OffsetMap, _, Spin> = unsafe {
                let (map, table) = (source.arena.map(), source.arena.table);
                Parts::new(&source, map, common::ThreadCpu(1), table)
            };
            let mut system = SlabSystem::new();
            system.init(parts).unwrap();
            source.asked.lock().unwrap().clear();
            let object = system.kmalloc(size, flags | Flags::RESERVE).unwrap();
            // What the slab is not made of, descriptors and arrays, is asked for from any context.
            let asked = source.asked.lock().unwrap().clone();
            let slab = asked.iter().position(|request| request.reserve);
            let slab = slab.expect("the smallest slab may come from the reserves");
            let (larger, smallest) = (&asked[..slab], asked[slab]);
            assert_eq!((smallest.order, smallest.context), (least, last));
            assert!(larger.iter().filter(|larger| larger.order > least).count() > 0);
            for request in larger.iter().filter(|larger| larger.order > least) {
                assert_eq!(request.context, before, "{flags:?}: {request:?}");
            }
            // SAFETY: allocated above.
            unsafe { system.kfree(object.as_ptr()) };
            system.teardown().unwrap();
            assert_eq!(source.arena.used(), 0);
        }
    }
}

//! Every request to the page source fails once, and nothing is lost or changed by it.

mod common;

use common::Arena;
use kmem_hal::{OffsetMap, Spin};
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

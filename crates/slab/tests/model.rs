//! kmalloc and caches against a model, and the object tests of the testkit on a typed cache.

#[path = "common/mod.rs"]
mod common;

use common::world::{SlabOp, run, run_with};
use common::{Arena, system};
use kmem_slab::{Cache, Check, Guard, Owner, Poison, Quarantine, Redzone, Shuffle};
use kmem_testkit::ops::{ObjectOp, run_objects};
use proptest::prelude::*;

fn op() -> impl Strategy<Value = SlabOp> {
    prop_oneof![
        8 => any::<(u16, u8, bool)>().prop_map(|(size, align, zeroed)| SlabOp::Alloc { size, align, zeroed }),
        2 => any::<(u16, u8)>().prop_map(|(size, count)| SlabOp::AllocMany { size, count }),
        8 => any::<(u16, bool)>().prop_map(|(which, by_pointer)| SlabOp::Free { which, by_pointer }),
        2 => any::<u8>().prop_map(|count| SlabOp::FreeMany { count }),
        3 => any::<(u16, u16)>().prop_map(|(which, size)| SlabOp::Realloc { which, size }),
        4 => any::<u64>().prop_map(|value| SlabOp::Value { value }),
        3 => any::<u16>().prop_map(|which| SlabOp::DropValue { which }),
        1 => Just(SlabOp::Shrink),
        1 => (0u16..500).prop_map(|objects| SlabOp::Scan { objects }),
        2 => any::<u8>().prop_map(|cpu| SlabOp::RunAs { cpu }),
        1 => any::<u8>().prop_map(|cpu| SlabOp::Offline { cpu }),
    ]
}

thread_local! {
    static ARENA: &'static Arena = Arena::new(4096);
}

/// Runs on the arena with so many nodes: CPUs 0 to 2 are of different ones where there are enough.
fn with_nodes(nodes: u16, test: impl FnOnce(&'static Arena)) {
    ARENA.with(|arena| {
        arena
            .nodes
            .store(nodes, std::sync::atomic::Ordering::Relaxed);
        test(arena);
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn calls_agree_with_the_model(
        ops in prop::collection::vec(op(), 1..100),
        nodes in 1..=4u16,
    ) {
        with_nodes(nodes, |arena| run(arena, &ops));
    }

    /// What a policy adds changes nothing that a correct program can see.
    #[test]
    fn calls_agree_with_the_model_under_every_policy(
        ops in prop::collection::vec(op(), 1..60),
        policy in 0..8u8,
        nodes in 1..=4u16,
    ) {
        with_nodes(nodes, |arena| match policy {
            0 => run_with::<Check>(arena, &ops),
            1 => run_with::<Redzone>(arena, &ops),
            2 => run_with::<Poison>(arena, &ops),
            3 => run_with::<Quarantine<7>>(arena, &ops),
            4 => run_with::<Shuffle>(arena, &ops),
            5 => run_with::<Owner>(arena, &ops),
            6 => run_with::<Guard<3>>(arena, &ops),
            _ => run_with::<(Check, Redzone, Poison, Quarantine<128>, Shuffle, Owner)>(arena, &ops),
        });
    }

    #[test]
    fn a_typed_cache_is_an_object_allocator(ops in prop::collection::vec(any::<ObjectOp>(), 1..400)) {
        let (_, system) = system(512, 1);
        let cache: Cache<'_, [u64; 12], _> = Cache::new(&system, "words");
        prop_assert!(run_objects(&cache, &ops).is_ok());
        prop_assert_eq!(cache.info().map_or(0, |info| info.active_objects), 0);
    }
}

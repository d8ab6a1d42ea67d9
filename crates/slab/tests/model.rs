//! kmalloc and caches against a model: random calls on several CPUs, contents and counts checked.

mod common;

use std::alloc::Layout;
use std::collections::BTreeMap;

use common::{TestParts, run_as, system};
use kmem_hal::{CpuId, Shrink};
use kmem_slab::{Cache, SlabBox};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Op {
    Alloc {
        size: usize,
        align: u32,
        zeroed: bool,
    },
    AllocMany {
        size: usize,
        count: usize,
    },
    Free {
        which: usize,
        by_pointer: bool,
    },
    FreeMany {
        count: usize,
    },
    Realloc {
        which: usize,
        size: usize,
    },
    Value {
        value: u64,
    },
    DropValue {
        which: usize,
    },
    Shrink,
    Scan {
        objects: usize,
    },
    RunAs {
        cpu: u32,
    },
    Offline {
        cpu: u32,
    },
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![8 => 1usize..256, 4 => 256usize..8193, 1 => 8193usize..40_000]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (size(), 0u32..8, any::<bool>()).prop_map(|(size, align, zeroed)| Op::Alloc { size, align, zeroed }),
        2 => (1usize..512, 1usize..300).prop_map(|(size, count)| Op::AllocMany { size, count }),
        8 => (any::<usize>(), any::<bool>()).prop_map(|(which, by_pointer)| Op::Free { which, by_pointer }),
        2 => (1usize..300).prop_map(|count| Op::FreeMany { count }),
        3 => (any::<usize>(), size()).prop_map(|(which, size)| Op::Realloc { which, size }),
        4 => any::<u64>().prop_map(|value| Op::Value { value }),
        3 => any::<usize>().prop_map(|which| Op::DropValue { which }),
        1 => Just(Op::Shrink),
        1 => (0usize..500).prop_map(|objects| Op::Scan { objects }),
        2 => (0u32..3).prop_map(|cpu| Op::RunAs { cpu }),
        1 => (0u32..3).prop_map(|cpu| Op::Offline { cpu }),
    ]
}

/// An allocation in the model: layout and the byte that fills it.
#[derive(Clone, Copy)]
struct Block {
    layout: Layout,
    seed: u8,
}

fn fill(address: usize, from: usize, block: Block) {
    for at in from..block.layout.size() {
        let byte: *mut u8 = std::ptr::with_exposed_provenance_mut(address + at);
        // SAFETY: inside a live allocation of the model.
        unsafe { byte.write(block.seed ^ at as u8) };
    }
}

fn verify(address: usize, length: usize, block: Block) {
    // SAFETY: inside a live allocation of the model, which was filled.
    let bytes = unsafe {
        std::slice::from_raw_parts(std::ptr::with_exposed_provenance::<u8>(address), length)
    };
    for (at, &byte) in bytes.iter().enumerate() {
        assert_eq!(
            byte,
            block.seed ^ at as u8,
            "byte {at} of {:?}",
            block.layout
        );
    }
}

fn nth(blocks: &BTreeMap<usize, Block>, which: usize) -> Option<(usize, Block)> {
    let count = blocks.len().max(1);
    blocks
        .iter()
        .nth(which % count)
        .map(|(&address, &block)| (address, block))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn calls_agree_with_the_model(ops in prop::collection::vec(op(), 1..120)) {
        let (arena, mut system) = system(4096, 3);
        let mut here = 0;
        run_as(here);
        let mut blocks: BTreeMap<usize, Block> = BTreeMap::new();
        {
            let cache: Cache<'_, u64, TestParts> = Cache::new(&system, "values");
            let mut values: Vec<(u64, SlabBox<'_, u64, TestParts>)> = Vec::new();
            let mut seed = 0u8;
            let insert = |blocks: &mut BTreeMap<usize, Block>, address: usize, layout: Layout, seed: u8| {
                let end = address + layout.size();
                if let Some((before, block)) = blocks.range(..end).next_back() {
                    assert!(before + block.layout.size() <= address, "{layout:?} overlaps {:?}", block.layout);
                }
                assert!(address.is_multiple_of(layout.align()));
                let block = Block { layout, seed };
                fill(address, 0, block);
                blocks.insert(address, block);
            };
            for op in ops {
                seed = seed.wrapping_add(17);
                match op {
                    Op::Alloc { size, align, zeroed } => {
                        let layout = Layout::from_size_align(size, 1 << align).unwrap();
                        let memory = if zeroed { system.alloc_zeroed(layout) } else { system.alloc(layout) };
                        if memory.is_null() { continue; }
                        if zeroed {
                            // SAFETY: just allocated with this size.
                            assert!((0..size).all(|at| unsafe { memory.add(at).read() } == 0));
                        }
                        insert(&mut blocks, memory.expose_provenance(), layout, seed);
                    }
                    Op::AllocMany { size, count } => {
                        let layout = Layout::from_size_align(size, 8).unwrap();
                        for _ in 0..count {
                            let memory = system.alloc(layout);
                            if memory.is_null() { break; }
                            insert(&mut blocks, memory.expose_provenance(), layout, seed);
                        }
                    }
                    Op::Free { which, by_pointer } => {
                        if let Some((address, block)) = nth(&blocks, which) {
                            verify(address, block.layout.size(), block);
                            blocks.remove(&address);
                            let memory = std::ptr::with_exposed_provenance_mut(address);
                            // SAFETY: a live allocation with this layout, freed once.
                            unsafe {
                                if by_pointer { system.kfree(memory) } else { system.dealloc(memory, block.layout) }
                            }
                        }
                    }
                    Op::FreeMany { count } => {
                        for _ in 0..count {
                            if let Some((address, block)) = blocks.pop_first() {
                                verify(address, block.layout.size(), block);
                                // SAFETY: as above.
                                unsafe { system.dealloc(std::ptr::with_exposed_provenance_mut(address), block.layout) };
                            }
                        }
                    }
                    Op::Realloc { which, size } => {
                        if let Some((address, block)) = nth(&blocks, which) {
                            let old = std::ptr::with_exposed_provenance_mut(address);
                            // SAFETY: a live allocation with this layout; replaced in the model where it moved.
                            let new = unsafe { system.realloc(old, block.layout, size) };
                            if new.is_null() { continue; }
                            blocks.remove(&address);
                            verify(new.expose_provenance(), size.min(block.layout.size()), block);
                            let layout = Layout::from_size_align(size, block.layout.align()).unwrap();
                            insert(&mut blocks, new.expose_provenance(), layout, seed);
                        }
                    }
                    Op::Value { value } => {
                        match cache.alloc(value) {
                            Ok(boxed) => values.push((value, boxed)),
                            Err(full) => assert_eq!(full.value, value),
                        }
                    }
                    Op::DropValue { which } => {
                        if !values.is_empty() {
                            let (value, boxed) = values.swap_remove(which % values.len());
                            assert_eq!(*boxed, value);
                        }
                    }
                    Op::Shrink => { system.shrink(); }
                    Op::Scan { objects } => {
                        let before = system.count();
                        let freed = system.scan(objects);
                        assert!(freed == 0 || before > 0 || freed > 0);
                    }
                    Op::RunAs { cpu } => {
                        here = cpu;
                        run_as(here);
                    }
                    Op::Offline { cpu } => {
                        if cpu != here {
                            // SAFETY: one thread plays all CPUs, and it is not this one now.
                            unsafe { system.cpu_offline(CpuId::new(cpu)) }.unwrap();
                        }
                    }
                }
            }
            // Two ways to count agree, and with the model.
            let mut objects = 0;
            system.caches(|info| {
                assert_eq!(info.allocs - info.frees, info.active_objects, "{}", info.name);
                assert_eq!(info.misuses, 0);
                if info.name == "values" {
                    assert_eq!(info.active_objects, values.len() as u64);
                } else {
                    objects += info.active_objects;
                }
            }).unwrap();
            let whole_pages = blocks.values().filter(|block| kmem_slab::class_of(block.layout.size(), block.layout.align()).is_none()).count();
            assert_eq!(objects + whole_pages as u64, blocks.len() as u64);
            assert_eq!(system.totals().page_blocks, whole_pages as u64);
            for (value, boxed) in &values {
                assert_eq!(**boxed, *value);
            }
        }
        for (address, block) in blocks {
            verify(address, block.layout.size(), block);
            let memory = std::ptr::with_exposed_provenance_mut(address);
            // SAFETY: a live allocation, freed once.
            unsafe { system.kfree(memory) };
        }
        system.teardown().unwrap();
        assert_eq!(arena.used(), 0);
        arena.check_slots();
    }
}

//! Random calls on several CPUs against a model: contents, overlaps and counts are checked.

use std::alloc::Layout;
use std::collections::BTreeMap;

use arbitrary::Arbitrary;
use kmem_hal::{CpuId, Shrink};
use kmem_slab::{Cache, CacheInfo, Plain, Policy, SlabBox, SlabSystem};

use super::{Arena, PolicyParts, policy_parts, run_as};

/// One call. Numbers are taken modulo what there is, so that any bytes are calls.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum SlabOp {
    /// Allocate with an alignment of up to 128 bytes.
    Alloc { size: u16, align: u8, zeroed: bool },
    /// Allocate `count` times up to 512 bytes.
    AllocMany { size: u16, count: u8 },
    /// Free one, by its pointer alone or with its layout.
    Free { which: u16, by_pointer: bool },
    /// Free the `count` lowest.
    FreeMany { count: u8 },
    /// Change the size of one.
    Realloc { which: u16, size: u16 },
    /// Put a value into the typed cache.
    Value { value: u64 },
    /// Drop one of the values.
    DropValue { which: u16 },
    /// Empty everything that is cached.
    Shrink,
    /// Free about as many objects.
    Scan { objects: u16 },
    /// Go on as another CPU.
    RunAs { cpu: u8 },
    /// Another CPU goes offline.
    Offline { cpu: u8 },
}

/// 1 to 40,000 bytes, small sizes more often.
fn bytes(raw: u16) -> usize {
    let raw = usize::from(raw);
    match raw & 7 {
        0..=4 => 1 + (raw >> 3) % 256,
        5 | 6 => 1 + (raw >> 3),
        _ => 1 + raw * 40_000 / 65_536,
    }
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

/// Runs calls on a new system over `arena`, and tears it down.
///
/// # Panics
///
/// Where the system and the model disagree.
pub fn run(arena: &'static Arena, ops: &[SlabOp]) {
    run_with::<Plain>(arena, ops);
}

/// As [`run`], with a hardening policy.
///
/// # Panics
///
/// As [`run`].
pub fn run_with<H: Policy>(arena: &'static Arena, ops: &[SlabOp]) {
    let mut system: SlabSystem<PolicyParts<H>> = SlabSystem::new();
    system.init(policy_parts(arena, 3)).unwrap();
    let mut here = 0;
    run_as(here);
    let mut blocks: BTreeMap<usize, Block> = BTreeMap::new();
    {
        let cache: Cache<'_, u64, PolicyParts<H>> = Cache::new(&system, "values");
        let mut values: Vec<(u64, SlabBox<'_, u64, PolicyParts<H>>)> = Vec::new();
        let mut seed = 0u8;
        let insert =
            |blocks: &mut BTreeMap<usize, Block>, address: usize, layout: Layout, seed: u8| {
                let end = address + layout.size();
                if let Some((before, block)) = blocks.range(..end).next_back() {
                    assert!(
                        before + block.layout.size() <= address,
                        "{layout:?} overlaps {:?}",
                        block.layout
                    );
                }
                assert!(address.is_multiple_of(layout.align()));
                let block = Block { layout, seed };
                fill(address, 0, block);
                blocks.insert(address, block);
            };
        for op in ops {
            seed = seed.wrapping_add(17);
            match *op {
                SlabOp::Alloc {
                    size,
                    align,
                    zeroed,
                } => {
                    let size = bytes(size);
                    let layout = Layout::from_size_align(size, 1 << (align % 8)).unwrap();
                    let memory = if zeroed {
                        system.alloc_zeroed(layout)
                    } else {
                        system.alloc(layout)
                    };
                    if memory.is_null() {
                        continue;
                    }
                    if zeroed {
                        // SAFETY: just allocated with this size.
                        assert!((0..size).all(|at| unsafe { memory.add(at).read() } == 0));
                    }
                    insert(&mut blocks, memory.expose_provenance(), layout, seed);
                }
                SlabOp::AllocMany { size, count } => {
                    let layout = Layout::from_size_align(bytes(size) % 512 + 1, 8).unwrap();
                    for _ in 0..count {
                        let memory = system.alloc(layout);
                        if memory.is_null() {
                            break;
                        }
                        insert(&mut blocks, memory.expose_provenance(), layout, seed);
                    }
                }
                SlabOp::Free { which, by_pointer } => {
                    if let Some((address, block)) = nth(&blocks, usize::from(which)) {
                        verify(address, block.layout.size(), block);
                        blocks.remove(&address);
                        let memory = std::ptr::with_exposed_provenance_mut(address);
                        // SAFETY: a live allocation with this layout, freed once.
                        unsafe {
                            if by_pointer {
                                system.kfree(memory)
                            } else {
                                system.dealloc(memory, block.layout)
                            }
                        }
                    }
                }
                SlabOp::FreeMany { count } => {
                    for _ in 0..count {
                        if let Some((address, block)) = blocks.pop_first() {
                            verify(address, block.layout.size(), block);
                            // SAFETY: as above.
                            unsafe {
                                system.dealloc(
                                    std::ptr::with_exposed_provenance_mut(address),
                                    block.layout,
                                )
                            };
                        }
                    }
                }
                SlabOp::Realloc { which, size } => {
                    let size = bytes(size);
                    if let Some((address, block)) = nth(&blocks, usize::from(which)) {
                        let old = std::ptr::with_exposed_provenance_mut(address);
                        // SAFETY: a live allocation with this layout; replaced in the model where it moved.
                        let new = unsafe { system.realloc(old, block.layout, size) };
                        if new.is_null() {
                            continue;
                        }
                        blocks.remove(&address);
                        verify(
                            new.expose_provenance(),
                            size.min(block.layout.size()),
                            block,
                        );
                        let layout = Layout::from_size_align(size, block.layout.align()).unwrap();
                        insert(&mut blocks, new.expose_provenance(), layout, seed);
                    }
                }
                SlabOp::Value { value } => match cache.alloc(value) {
                    Ok(boxed) => values.push((value, boxed)),
                    Err(full) => assert_eq!(full.value, value),
                },
                SlabOp::DropValue { which } => {
                    if !values.is_empty() {
                        let (value, boxed) = values.swap_remove(usize::from(which) % values.len());
                        assert_eq!(*boxed, value);
                    }
                }
                SlabOp::Shrink => {
                    system.shrink();
                }
                SlabOp::Scan { objects } => {
                    let sums = || {
                        let (mut total, mut active) = (0, 0);
                        let each = |cache: &CacheInfo| {
                            total += cache.total_objects;
                            active += cache.active_objects;
                        };
                        system.caches(each).unwrap();
                        (total, active)
                    };
                    let (total, active) = sums();
                    let freed = system.scan(usize::from(objects));
                    assert!(objects > 0 || freed == 0, "none were asked for");
                    // Exactly what left the caches, and nothing that somebody has.
                    assert_eq!(sums(), (total - freed as u64, active));
                }
                SlabOp::RunAs { cpu } => {
                    here = u32::from(cpu % 3);
                    run_as(here);
                }
                SlabOp::Offline { cpu } => {
                    let cpu = u32::from(cpu % 3);
                    if cpu != here {
                        // SAFETY: one thread plays all CPUs, and it is not this one now.
                        unsafe { system.cpu_offline(CpuId::new(cpu)) }.unwrap();
                    }
                }
            }
        }
        // Two ways to count agree, and with the model.
        let mut objects = 0;
        system
            .caches(|info| {
                assert_eq!(
                    info.allocs - info.frees,
                    info.active_objects,
                    "{}",
                    info.name
                );
                assert_eq!(info.misuses, 0);
                if info.name == "values" {
                    assert_eq!(info.active_objects, values.len() as u64);
                } else {
                    objects += info.active_objects;
                }
            })
            .unwrap();
        let whole_pages = blocks
            .values()
            .filter(|block| {
                let bytes = block.layout.size() + H::FEATURES.extra(block.layout.align());
                kmem_slab::class_of(bytes, block.layout.align()).is_none()
            })
            .count();
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

//! No byte of a free object is the allocator's: each is poisoned by hand while it is free, and so is every free frame.
//!
//! Under AddressSanitizer (`cargo xtask gate asan`, which sets `--cfg kmem_asan`) whoever touches such a byte ends the process. In any other build
//! the calls are nothing, and the test is one of many.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::alloc::Layout;
use std::ptr::NonNull;

use common::{Arena, poison, unpoison};
use common::{policy_parts, run_as};
use kmem_slab::{Plain, Policy, Shuffle, SlabSystem};

fn run<H: Policy>(arena: &'static Arena) {
    run_as(0);
    let mut system: SlabSystem<_> = SlabSystem::new();
    system.init(policy_parts::<H>(arena, 2)).unwrap();
    let mut live: Vec<(NonNull<u8>, Layout)> = Vec::new();
    let mut state = 7u64;
    for step in 0..20_000u32 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let random = (state >> 33) as usize;
        if random.is_multiple_of(2) && live.len() < 600 || live.is_empty() {
            let size = 1 + random / 2 % [64, 500, 9000][random / 2 % 3];
            let layout = Layout::from_size_align(size, 8).unwrap();
            let Some(object) = NonNull::new(system.alloc(layout)) else {
                continue;
            };
            unpoison(object.as_ptr(), size);
            // SAFETY: a live object of `size` bytes.
            unsafe { object.write_bytes(step as u8, size) };
            live.push((object, layout));
        } else {
            let (object, layout) = live.swap_remove(random / 2 % live.len());
            poison(object.as_ptr(), layout.size());
            // SAFETY: a live object with this layout, freed once.
            unsafe {
                if random.is_multiple_of(3) {
                    system.kfree(object.as_ptr());
                } else {
                    system.kfree_layout(object, layout);
                }
            }
        }
        if step % 3000 == 2999 {
            system.shrink();
        }
        run_as(u32::from(step % 100 < 30));
    }
    run_as(0);
    for (object, layout) in live {
        poison(object.as_ptr(), layout.size());
        // SAFETY: live objects.
        unsafe { system.kfree_layout(object, layout) };
    }
    system.teardown().unwrap();
    assert_eq!(arena.used(), 0);
}

#[test]
fn the_allocator_touches_no_free_object_and_no_free_frame() {
    let arena = Arena::new(4096);
    run::<Plain>(arena);
    run::<Shuffle>(arena);
}

/// What would be found: run by hand, since it ends the process.
#[test]
#[ignore = "ends the process under AddressSanitizer, as it must"]
fn a_write_to_a_free_object_is_found() {
    let (_, system) = common::system(64, 1);
    let object = system.alloc(Layout::new::<[u64; 4]>());
    poison(object, 32);
    // SAFETY: still allocated; poisoned, which is the point.
    unsafe { object.cast::<u64>().write_volatile(1) };
}

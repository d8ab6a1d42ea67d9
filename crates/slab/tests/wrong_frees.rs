//! Frees with a layout that is not the allocation's, or to a cache that is not the object's: refused by every policy that checks, and nothing changes.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::alloc::Layout;
use std::ptr::NonNull;

use common::hardened::World;
use kmem_slab::{Cache, Check, Flags, Misuse, Owner, Poison, Policy, Quarantine, Redzone, SlabBox};

fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).unwrap()
}

/// What is written into an object, to be found again.
fn sign(object: NonNull<u8>, size: usize, number: usize) {
    // SAFETY: the caller's object of so many bytes.
    unsafe { object.write_bytes(number as u8, size) };
}

fn is_signed(object: NonNull<u8>, size: usize, number: usize) -> bool {
    // SAFETY: the caller's object of so many bytes, which were written.
    let bytes = unsafe { std::slice::from_raw_parts(object.as_ptr(), size) };
    bytes.iter().all(|&byte| byte == number as u8)
}

/// Objects of one layout, each freed with another that has the same size and class but another alignment.
fn refuses_another_alignment<H: Policy>(size: usize, asked: usize, freed: usize) {
    let world: World<H> = World::new();
    let (right, wrong) = (layout(size, asked), layout(size, freed));
    let take = || world.system.kmalloc_layout(right, Flags::empty()).unwrap();
    let objects: Vec<_> = (0..20).map(|_| take()).collect();
    for (number, &object) in objects.iter().enumerate() {
        sign(object, size, number);
    }
    for &object in &objects {
        // SAFETY: the misuse under test, which the policy refuses.
        unsafe { world.system.kfree_layout(object, wrong) };
        let seen = world.seen();
        assert!(
            matches!(seen[..], [Misuse::WrongAlign { address, allocated, freed: with, .. }]
                if address == object.as_ptr().addr() && allocated == asked.max(8) && with == freed.max(8)),
            "{size} bytes at multiples of {asked}, freed as of {freed}: {seen:?}"
        );
    }
    // Nothing of them is handed out.
    let more: Vec<_> = (0..20).map(|_| take()).collect();
    for &object in &more {
        sign(object, size, 0xff);
    }
    for (number, &object) in objects.iter().enumerate() {
        assert!(is_signed(object, size, number), "object {number}");
    }
    for object in objects.into_iter().chain(more) {
        // SAFETY: live allocations of this layout.
        unsafe { world.system.kfree_layout(object, right) };
    }
    world.end();
}

#[test]
fn an_alignment_that_was_not_asked_for_is_refused() {
    for (asked, freed) in [(8, 16), (16, 8), (4, 16), (16, 1)] {
        refuses_another_alignment::<Check>(60, asked, freed);
        refuses_another_alignment::<Poison>(60, asked, freed);
        refuses_another_alignment::<Quarantine<4>>(60, asked, freed);
        refuses_another_alignment::<Owner>(44, asked, freed);
        refuses_another_alignment::<Redzone>(28, asked, freed);
    }
    for (asked, freed) in [(8, 64), (64, 8), (32, 64), (64, 32)] {
        refuses_another_alignment::<Check>(1050, asked, freed);
    }
}

/// All alignments up to 8 have the same bytes in front: one is as good as another, as before.
#[test]
fn alignments_up_to_the_tag_are_one() {
    let world: World<Check> = World::new();
    let object = world
        .system
        .kmalloc_layout(layout(60, 1), Flags::empty())
        .unwrap();
    // SAFETY: a live allocation.
    unsafe { world.system.kfree_layout(object, layout(60, 8)) };
    world.end();
}

/// An object of a class that is freed with a layout beyond all of them.
fn refuses_a_layout_beyond_the_classes<H: Policy>() {
    let world: World<H> = World::new();
    // The second has the object's size in its low 16 bits, the third is beyond by its alignment alone.
    for wrong in [
        layout(10_000, 8),
        layout((1 << 16) + 64, 8),
        layout(64, 8192),
    ] {
        let right = layout(64, 8);
        let object = world.system.kmalloc_layout(right, Flags::empty()).unwrap();
        let address = object.as_ptr().addr();
        // SAFETY: the misuse under test, which the policy refuses.
        unsafe { world.system.kfree_layout(object, wrong) };
        let seen = world.seen();
        let is_told = if wrong.size() == 64 {
            matches!(seen[..], [Misuse::WrongAlign { address: at, allocated: 8, freed: 8192, .. }] if at == address)
        } else {
            matches!(seen[..], [Misuse::WrongSize { address: at, allocated: 64, freed, .. }]
                if at == address && freed == wrong.size())
        };
        assert!(is_told, "{wrong:?}: {seen:?}");
        // SAFETY: it is still in use.
        unsafe { world.system.kfree_layout(object, right) };
        assert_eq!(world.seen(), []);
        // SAFETY: the misuse under test: it is free.
        unsafe { world.system.kfree_layout(object, wrong) };
        assert!(matches!(world.seen()[..], [Misuse::DoubleFree { .. }]));
    }
    // Pages are what such layouts are for.
    let pages = layout(10_000, 8);
    let memory = world.system.kmalloc_layout(pages, Flags::empty()).unwrap();
    // SAFETY: a live allocation.
    unsafe { world.system.kfree_layout(memory, pages) };
    world.end();
}

#[test]
fn a_layout_beyond_the_classes_does_not_free_an_object() {
    refuses_a_layout_beyond_the_classes::<Check>();
    refuses_a_layout_beyond_the_classes::<Redzone>();
    refuses_a_layout_beyond_the_classes::<Quarantine<2>>();
}

/// Caches whose numbers are 64 apart share a column of the pages of heads.
#[test]
fn an_object_is_refused_by_every_other_cache_of_its_size() {
    let world: World<Check> = World::new();
    {
        let caches: Vec<Cache<'_, [u64; 4], _>> = (0..140)
            .map(|_| Cache::new(&world.system, "alike"))
            .collect();
        for cache in &caches {
            drop(cache.alloc([0; 4]).unwrap());
        }
        let object = SlabBox::into_raw(caches[0].alloc([7; 4]).unwrap());
        for (number, other) in caches.iter().enumerate().skip(1) {
            // SAFETY: the misuse under test: an object of one cache in a box of another.
            drop(unsafe { SlabBox::from_raw(other, object) });
            let seen = world.seen();
            assert!(
                matches!(seen[..], [Misuse::WrongCache { .. }]),
                "cache {number}: {seen:?}"
            );
        }
        // SAFETY: it is still in use.
        drop(unsafe { SlabBox::from_raw(&caches[0], object) });
    }
    world.end();
}

/// What was mapped when the system had another platform is not looked at.
#[test]
#[cfg_attr(kmem_asan, ignore = "writes to memory on purpose that went back")]
fn memory_of_a_platform_that_is_gone_is_not_read() {
    let mut world: World<Check> = World::new();
    let layout = layout(60, 8);
    let object = world.system.kmalloc_layout(layout, Flags::empty()).unwrap();
    let tag = object.as_ptr().wrapping_sub(8).cast::<u64>();
    // SAFETY: the word before an object in use, and a live allocation.
    let in_use = unsafe {
        let in_use = tag.read();
        world.system.kfree_layout(object, layout);
        in_use
    };
    world.restart();
    // SAFETY: the test's own memory, which lives for ever; the free is the misuse under test.
    unsafe {
        tag.write(in_use);
        world.system.kfree_layout(object, layout);
        assert_eq!(tag.read(), in_use, "written to");
    }
    let seen = world.seen();
    assert!(matches!(seen[..], [Misuse::ForeignFree { .. }]), "{seen:?}");
    world.end();
}

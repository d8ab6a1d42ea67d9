//! Double frees and foreign frees are found and do no harm.

mod common;

use std::alloc::Layout;
use std::collections::HashSet;
use std::ptr::NonNull;

use common::system;
use kmem_slab::Flags;

fn misuses(system: &common::System) -> u64 {
    let mut sum = 0;
    system.caches(|cache| sum += cache.misuses).unwrap();
    sum + system.totals().foreign_frees
}

#[test]
fn a_double_free_is_found_at_the_flush_and_never_handed_out_twice() {
    let (_, system) = system(1024, 1);
    let a = system.kmalloc(64, Flags::empty()).unwrap();
    let b = system.kmalloc(64, Flags::empty()).unwrap();
    // SAFETY: the second free is the misuse under test.
    unsafe {
        system.kfree(a.as_ptr());
        system.kfree(b.as_ptr());
        system.kfree(a.as_ptr());
    }
    assert_eq!(misuses(&system), 0, "not seen yet: late");
    system.shrink();
    assert_eq!(misuses(&system), 1);
    let all: Vec<NonNull<u8>> = (0..1000)
        .map(|_| system.kmalloc(64, Flags::empty()).unwrap())
        .collect();
    let distinct: HashSet<_> = all.iter().collect();
    assert_eq!(distinct.len(), all.len());
}

#[test]
fn a_double_free_across_two_flushes_is_found() {
    let (_, system) = system(1024, 1);
    let keep = system.kmalloc(64, Flags::empty()).unwrap();
    let a = system.kmalloc(64, Flags::empty()).unwrap();
    // SAFETY: the second free is the misuse under test; `keep` keeps the slab alive.
    unsafe {
        system.kfree(a.as_ptr());
        system.shrink();
        system.kfree(a.as_ptr());
        system.shrink();
        assert_eq!(misuses(&system), 1);
        system.kfree(keep.as_ptr());
    }
}

#[test]
fn an_address_inside_an_object_is_found() {
    let (_, system) = system(1024, 1);
    let a = system.kmalloc(64, Flags::empty()).unwrap();
    // SAFETY: the misuse under test; the pointer stays inside the object.
    unsafe { system.kfree(a.as_ptr().add(8)) };
    system.shrink();
    assert_eq!(misuses(&system), 1);
    // SAFETY: allocated above, and still in use as far as the system knows.
    unsafe { system.kfree(a.as_ptr()) };
    system.shrink();
    assert_eq!(misuses(&system), 1);
}

#[test]
fn a_layout_of_another_class_is_found() {
    let (_, system) = system(1024, 1);
    let a = system.kmalloc(64, Flags::empty()).unwrap();
    // SAFETY: the misuse under test: the layout is not that of the allocation.
    unsafe { system.kfree_layout(a, Layout::from_size_align(200, 8).unwrap()) };
    system.shrink();
    assert_eq!(misuses(&system), 1);
}

#[test]
fn strangers_are_refused() {
    let (_, one) = system(1024, 1);
    let (_, other) = system(1024, 1);
    let mut local = 5u64;
    let theirs = other.kmalloc(64, Flags::empty()).unwrap();
    // SAFETY: the misuses under test.
    unsafe {
        assert_eq!(one.ksize(NonNull::from(&mut local).cast()), None);
        one.kfree((&raw mut local).cast());
        assert_eq!(misuses(&one), 1);
        one.kfree(theirs.as_ptr());
        assert_eq!(misuses(&one), 2);
        one.kfree(std::ptr::null_mut());
    }
    assert_eq!(misuses(&one), 2);
}

/// With a layout, that is found where the object would reach a slab: counted there and in all.
#[test]
fn a_stranger_with_a_layout_is_counted_at_the_flush() {
    let (_, one) = system(1024, 1);
    let (_, other) = system(1024, 1);
    let layout = Layout::new::<[u64; 8]>();
    let own = one.kmalloc_layout(layout, Flags::empty()).unwrap();
    let theirs = other.kmalloc_layout(layout, Flags::empty()).unwrap();
    let mut local = [5u64; 8];
    // SAFETY: the misuses under test.
    unsafe {
        one.kfree_layout(theirs, layout);
        one.kfree_layout(NonNull::from(&mut local).cast(), layout);
        one.kfree_layout(own, layout);
    }
    one.shrink();
    assert_eq!(one.totals().foreign_frees, 2);
    assert_eq!(misuses(&one), 2 + 2);
}

#[test]
fn pages_freed_twice_are_strangers() {
    let (_, system) = system(1024, 1);
    let pages = system.kmalloc(20_000, Flags::empty()).unwrap();
    // SAFETY: the second free is the misuse under test.
    unsafe {
        system.kfree(pages.as_ptr());
        system.kfree(pages.as_ptr());
    }
    assert_eq!(misuses(&system), 1);
}

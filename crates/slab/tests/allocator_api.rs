//! Collections over a slab system by way of `allocator-api2`.
#![cfg(all(feature = "allocator-api2-02", feature = "allocator-api2-04"))]

mod common;

use std::alloc::Layout;

use common::system;

macro_rules! collections {
    ($name:ident, $api:ident) => {
        #[test]
        fn $name() {
            use $api::alloc::Allocator;

            let (arena, mut system) = system(1024, 1);
            {
                let allocator = &system;
                let small = Layout::from_size_align(40, 8).unwrap();
                let same_class = Layout::from_size_align(36, 8).unwrap();
                let large = Layout::from_size_align(9000, 8).unwrap();
                let none = Layout::from_size_align(0, 16).unwrap();
                let memory = allocator.allocate_zeroed(small).unwrap();
                let first = memory.cast::<u8>();
                // SAFETY: 40 bytes, zero; each step gives the next what it took; the last is freed.
                unsafe {
                    assert_eq!(memory.as_ref(), [0; 40]);
                    first.write(9);
                    let shrunk = Allocator::shrink(&allocator, first, small, same_class).unwrap();
                    assert_eq!(shrunk.cast::<u8>(), first, "in place within a class");
                    let grown = allocator.grow_zeroed(first, same_class, large).unwrap();
                    assert_eq!(grown.as_ref()[0], 9);
                    assert!(grown.as_ref()[36..].iter().all(|&byte| byte == 0));
                    let gone = Allocator::shrink(&allocator, grown.cast(), large, none).unwrap();
                    assert_eq!(gone.len(), 0);
                    let back = allocator.grow(gone.cast(), none, small).unwrap();
                    allocator.deallocate(back.cast(), small);
                }
            }
            system.teardown().unwrap();
            assert_eq!(arena.used(), 0);
        }
    };
}

collections!(memory_of_version_0_2, allocator_api2_02);
collections!(memory_of_version_0_4, allocator_api2_04);

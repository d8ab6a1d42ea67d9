//! kvmalloc: one call for every size. Small ones are the slab system's, large ones vmalloc's, and freeing knows which.

#[path = "../examples/machine/mod.rs"]
mod machine;

use kmem::hal::LargeSource;
use kmem::{Flags, VirtAddr};
use machine::{LARGE, WORLD};

#[test]
fn sizes_beyond_the_caches_are_vmallocs() {
    let vmalloc = machine::start(64);
    let slab = WORLD.slab();
    let free = || {
        WORLD.frames().drain_local();
        WORLD.frames().mem_info().free
    };
    let small = slab.kmalloc(3000, Flags::empty()).unwrap();
    assert!(!vmalloc.contains(small.as_ptr()));
    let before = free();
    // Larger than any run of frames that an allocator of order 10 could give.
    // vmalloc is for tasks: whoever may be in an interrupt does not get there.
    assert!(slab.kmalloc(9 << 20, Flags::empty()).is_err());
    let block = slab.kmalloc(1 << 20, Flags::empty()).unwrap();
    assert!(!vmalloc.contains(block.as_ptr()));
    // SAFETY: given above.
    unsafe { slab.kfree(block.as_ptr()) };
    let large = slab.kmalloc(9 << 20, Flags::MAY_WAIT).unwrap();
    assert!(vmalloc.contains(large.as_ptr()));
    assert!((&LARGE).contains(large.as_ptr()));
    // SAFETY: given above.
    assert_eq!(unsafe { slab.ksize(large) }, Some(9 << 20));
    let page = VirtAddr::from_ptr(large.as_ptr());
    assert_eq!(vmalloc.bytes_at(page), Some(9 << 20));
    assert_eq!(vmalloc.used(), (1, (9 << 20) / 4096));
    assert!(before - free() >= (9 << 20) / 4096);
    // SAFETY: both were given by this system.
    unsafe {
        slab.kfree(large.as_ptr());
        slab.kfree(small.as_ptr());
    }
    vmalloc.purge();
    assert_eq!(vmalloc.used(), (0, 0));
    // What stays: a frame of descriptions, one for the purge, and the tables of the window.
    assert!(before - free() <= 16, "{} frames are gone", before - free());

    // No memory for it: refused, nothing is left.
    assert!(slab.kmalloc(1 << 30, Flags::MAY_WAIT).is_err());
    assert_eq!(vmalloc.used(), (0, 0));
    assert!(!LARGE.set(vmalloc), "it is set once");
}

//! What threads that ended hold serves others before anything is refused.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::{Barrier, Mutex, PoisonError};

use kmem_host::HostHeap;

/// Takes all that there is in pieces of this layout, and gives it back; answers how many pieces.
fn take_all(heap: &HostHeap, layout: Layout) -> usize {
    let mut pieces: Vec<*mut u8> = Vec::new();
    loop {
        // SAFETY: the layout is not empty.
        let piece = unsafe { heap.alloc(layout) };
        if piece.is_null() {
            break;
        }
        pieces.push(piece);
    }
    for &piece in &pieces {
        // SAFETY: allocated above with this layout.
        unsafe { heap.dealloc(piece, layout) };
    }
    pieces.len()
}

const THREADS: usize = 16;

/// The numbers of threads are the process's: where two heaps run short at the same moment, one may pass over a number that the other is emptying.
static ALONE: Mutex<()> = Mutex::new(());

/// Threads have had objects and ended; as many pieces can be had as without them.
fn serves(small: usize, large: usize) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let layout = |size| Layout::from_size_align(size, 8).unwrap();
    let fresh: &HostHeap = Box::leak(Box::new(HostHeap::with_arena(64 << 20)));
    let first = take_all(fresh, layout(large));
    assert!(first * large > 48 << 20, "{first} of {large} bytes");
    let heap: &'static HostHeap = Box::leak(Box::new(HostHeap::with_arena(64 << 20)));
    let gate = Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let alloc = |()| {
                    // SAFETY: the layout is not empty.
                    let piece = unsafe { heap.alloc(layout(small)) };
                    assert!(!piece.is_null());
                    piece
                };
                let pieces = [(); 60].map(alloc);
                // Each has a number of its own.
                gate.wait();
                for piece in pieces {
                    // SAFETY: allocated above.
                    unsafe { heap.dealloc(piece, layout(small)) };
                }
            });
        }
    });
    let mut held = 0;
    let slab = heap.memory().unwrap().slab();
    slab.caches(|cache| held += cache.in_arrays).unwrap();
    assert!(
        held as usize >= 8 * THREADS,
        "{held} in arrays of threads that ended"
    );
    let served = take_all(heap, layout(large));
    // A page of heads for each thread stays, and some of descriptors.
    let lost = if large < 1 << 20 { THREADS + 4 } else { 0 };
    assert!(
        served + lost >= first,
        "{served} of {first} pieces of {large}"
    );
}

#[test]
fn objects_of_the_same_class() {
    serves(8192, 8192);
}

#[test]
fn objects_of_another_class() {
    serves(4096, 8192);
}

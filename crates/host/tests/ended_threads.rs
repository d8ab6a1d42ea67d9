//! What threads that ended hold serves others before anything is refused.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::{Barrier, Mutex, PoisonError};

use kmem::{FrameRequest, FrameSink, FrameSource, Order, OwnedFrame};
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
    let use_objects = || {
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
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(use_objects)).collect();
        // The end of the scope waits for what they do, and not for their numbers to go back.
        for thread in threads {
            thread.join().unwrap();
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
    assert!(
        served + THREADS + 4 >= first,
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

/// A size beyond blocks is a range of frames, for which the page-frame allocator does not ask itself.
#[test]
fn a_range_beyond_blocks() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (small, large) = (
        Layout::new::<[u64; 1024]>(),
        Layout::new::<[u64; 5 << 17]>(),
    );
    let heap: &'static HostHeap = Box::leak(Box::new(HostHeap::with_arena(64 << 20)));
    let (main, full) = (Barrier::new(THREADS + 1), Barrier::new(THREADS));
    // All threads have theirs at the same time.
    let use_objects = |count: usize| {
        let alloc = |_| {
            // SAFETY: the layout is not empty.
            let piece = unsafe { heap.alloc(small) };
            assert!(!piece.is_null());
            piece
        };
        let pieces: Vec<_> = (0..count).map(alloc).collect();
        full.wait();
        // The last ones, from all over, stay in the thread's arrays.
        for at in (0..count).map(|number| number * 77 % count) {
            // SAFETY: allocated above; 77 has no divisor in common with the counts below.
            unsafe { heap.dealloc(pieces[at], small) };
        }
    };
    let mut before = 0;
    std::thread::scope(|scope| {
        let thread = || {
            // What belongs to the thread's number is there from now on, at the bottom.
            use_objects(20);
            main.wait();
            main.wait();
            use_objects(50);
        };
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(thread)).collect();
        main.wait();
        before = take_all(heap, large);
        // The threads find room for their objects above, and single frames below for what belongs to slabs.
        let frames = heap.memory().unwrap().frames();
        let mut blocks = Vec::new();
        for order in (0..=Order::MAX_BUDDY.get()).rev().filter_map(Order::new) {
            let request = FrameRequest::new(order);
            blocks.extend(std::iter::from_fn(|| frames.alloc(&request).ok()));
        }
        blocks.sort_by_key(|block: &OwnedFrame| (block.order(), block.first()));
        let above = blocks.split_off(blocks.len() - 2);
        let below = blocks.drain(..64);
        below.chain(above).for_each(|block| frames.free(block));
        main.wait();
        for thread in threads {
            thread.join().unwrap();
        }
        blocks.into_iter().for_each(|block| frames.free(block));
    });
    assert!(before >= 8, "{before}");
    let after = take_all(heap, large);
    assert!(after >= before, "{after} of {before}");
}

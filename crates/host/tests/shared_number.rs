//! More threads than numbers: the shared number's pins, and what it leaves behind. One test: all of it is the process's.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use kmem_hal::Cpu;
use kmem_host::{HostHeap, MAX_THREADS, ThreadCpu};

static HEAP: HostHeap = HostHeap::with_arena(64 << 20);

fn pinned_as() -> u32 {
    ThreadCpu.pin().id().get()
}

/// Objects that arrays of threads hold.
fn in_arrays() -> u64 {
    let mut objects = 0;
    let slab = HEAP.memory().unwrap().slab();
    slab.caches(|cache| objects += cache.in_arrays).unwrap();
    objects
}

#[test]
fn the_shared_number_is_kept_while_pinned_and_emptied_by_a_shrink() {
    let shared = MAX_THREADS - 1;
    // Threads take every number that is one thread's alone.
    let mut others: Vec<(JoinHandle<()>, Sender<()>)> = (0..shared)
        .map(|_| {
            let (told, tell) = channel();
            let (end, wait) = channel::<()>();
            let thread = std::thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(move || {
                    told.send(pinned_as()).unwrap();
                    let _ = wait.recv();
                })
                .unwrap();
            assert_ne!(tell.recv().unwrap(), shared);
            (thread, end)
        })
        .collect();
    // This one shares, and what it frees lies in the shared number's arrays.
    let layout = Layout::new::<[u64; 6]>();
    // SAFETY: the layout is not empty; freed once, with it.
    unsafe {
        let blocks: Vec<_> = (0..20).map(|_| HEAP.alloc(layout)).collect();
        assert!(blocks.iter().all(|block| !block.is_null()));
        for block in blocks {
            HEAP.dealloc(block, layout);
        }
    }
    assert!(in_arrays() >= 20);

    let pin = ThreadCpu.pin();
    assert_eq!(pin.id().get(), shared);
    let (thread, end) = others.pop().unwrap();
    end.send(()).unwrap();
    thread.join().unwrap();
    assert_eq!(ThreadCpu.leased(), shared - 1, "a number is free");
    // A nested pin, as a signal handler's: the number of the pin around it.
    assert_eq!(pinned_as(), shared);
    drop(pin);
    assert_ne!(pinned_as(), shared, "and now the free one can be had");

    // Who frees as the shared number leaves objects there: a shrink of another thread brings them out.
    HEAP.shrink();
    assert_eq!(in_arrays(), 0);

    for (thread, end) in others {
        end.send(()).unwrap();
        thread.join().unwrap();
    }
}

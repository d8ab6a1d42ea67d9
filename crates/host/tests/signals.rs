//! A program whose global allocator is kmem, and whose signal handler allocates: on whatever the thread was doing, the heap's slow paths included.
//!
//! A program of its own: nothing else in it shrinks the heap, so once the interrupted thread has its slabs, no handler's call may be refused. While
//! the thread asks for its first ones there is nothing for a handler but what needs the lock that it interrupted: then the call is refused, and says so.

use std::alloc::Layout;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kmem_host::HostHeap;

#[global_allocator]
static HEAP: HostHeap = HostHeap::with_arena(1 << 30);

static STOP: AtomicBool = AtomicBool::new(false);
/// How often the interrupted thread has filled and emptied its caches.
static ROUNDS: AtomicU64 = AtomicU64::new(0);
/// Signals since the second round.
static HANDLED: AtomicU64 = AtomicU64::new(0);
/// Of their allocations.
static REFUSED: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_signal(_signal: i32) {
    let warm = ROUNDS.load(Ordering::Relaxed) >= 2;
    let layout = Layout::new::<[u8; 64]>();
    let mut held = [core::ptr::null_mut::<u8>(); 8];
    for (index, place) in held.iter_mut().enumerate() {
        // SAFETY: the layout has bytes, and the memory has the layout.
        unsafe {
            *place = std::alloc::alloc(layout);
            if place.is_null() {
                REFUSED.fetch_add(u64::from(warm), Ordering::Relaxed);
            } else {
                place.write_bytes(index as u8, layout.size());
            }
        }
    }
    let given = |(_, place): &(usize, &*mut u8)| !place.is_null();
    for (index, &place) in held.iter().enumerate().filter(given) {
        // SAFETY: allocated and written above.
        unsafe {
            let bytes = core::slice::from_raw_parts(place, layout.size());
            assert!(bytes.iter().all(|&byte| byte == index as u8));
            std::alloc::dealloc(place, layout);
        }
    }
    HANDLED.fetch_add(u64::from(warm), Ordering::Relaxed);
}

#[test]
fn signal_handlers_may_allocate() {
    let worker = std::thread::spawn(|| {
        let mut held: Vec<Box<[u8; 64]>> = Vec::new();
        while !STOP.load(Ordering::Relaxed) {
            // Fills and empties arrays, depot and slabs of the class that the handler uses.
            for n in 0..3000u32 {
                held.push(Box::new([n as u8; 64]));
            }
            for (n, boxed) in held.drain(..).enumerate() {
                assert!(boxed.iter().all(|&byte| byte == n as u8));
            }
            ROUNDS.fetch_add(1, Ordering::Relaxed);
        }
    });
    let id = worker.as_pthread_t();
    // SAFETY: the handler is installed before the first signal, and the worker lives until it is joined below.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
        // Until enough have been handled: signals that come before the last was handled are one.
        while HANDLED.load(Ordering::Relaxed) < 1000 {
            libc::pthread_kill(id, libc::SIGUSR1);
            for _ in 0..500 {
                std::hint::spin_loop();
            }
            std::thread::yield_now();
        }
    }
    STOP.store(true, Ordering::Relaxed);
    worker.join().unwrap();
    assert_eq!(
        REFUSED.load(Ordering::Relaxed),
        0,
        "refused with slabs at hand"
    );
}

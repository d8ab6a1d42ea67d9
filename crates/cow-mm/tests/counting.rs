//! What a fault in an existing mapping costs while another thread stands still in the middle of `mmap`: no lock of the space, and locked
//! instructions on words of its own mapping, its own table and its own page only.
//!
//! Run with `RUSTFLAGS="--cfg kmem_counting" cargo test -p kmem-cow-mm --test counting`.
#![cfg(kmem_counting)]

use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use kmem_cow_mm::{AddressSpace, Layout, MapRequest, Mm, Outcome, Parts, Prot, VmaMemory};
use kmem_hal::sync::{counts, reset_counts};
use kmem_hal::{
    AllocError, FaultCode, FrameRange, ObjectAlloc, PageFault, RawSleepLock, SingleGrace, VirtAddr,
};
use kmem_mock_x86::{FramePool, Machine};
use kmem_paging::format::X86_64;
use kmem_testkit::{HeapObjects, SlotArena};

const PAGE: u64 = 4096;

/// How often a lock of a space or an object was touched.
static TOUCHED: AtomicUsize = AtomicUsize::new(0);

/// A lock whose every use is counted, and which says so instead of waiting for ever.
struct Watched(AtomicBool);

// SAFETY: S1 to S3 for one thread: a lock that is held is not given a second time.
unsafe impl RawSleepLock for Watched {
    const INIT: Self = Self(AtomicBool::new(false));

    fn lock_shared(&self) {
        self.lock_exclusive();
    }
    fn try_lock_shared(&self) -> bool {
        self.try_lock_exclusive()
    }
    unsafe fn unlock_shared(&self) {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.unlock_exclusive() }
    }
    fn lock_exclusive(&self) {
        assert!(self.try_lock_exclusive(), "waits for the stalled thread");
    }
    fn try_lock_exclusive(&self) -> bool {
        TOUCHED.fetch_add(1, Ordering::Relaxed);
        !self.0.swap(true, Ordering::Acquire)
    }
    unsafe fn unlock_exclusive(&self) {
        TOUCHED.fetch_add(1, Ordering::Relaxed);
        self.0.store(false, Ordering::Release);
    }
}

/// The host's heap, which runs a closure at each call: there a thread stands still, with the space's lock in its hands.
#[derive(Default)]
struct Stops {
    heap: HeapObjects<VmaMemory>,
    stop: RefCell<Option<Box<dyn FnMut()>>>,
    stops: Cell<usize>,
}

// SAFETY: forwards to an allocator that keeps the contract.
unsafe impl ObjectAlloc<VmaMemory> for &Stops {
    const TYPE_STABLE: bool = false;

    fn alloc(&self) -> Result<NonNull<VmaMemory>, AllocError> {
        if let Some(mut stop) = self.stop.take() {
            self.stops.set(self.stops.get() + 1);
            stop();
        }
        self.heap.alloc()
    }
    unsafe fn free(&self, object: NonNull<VmaMemory>) {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.heap.free(object) }
    }
}

#[test]
fn a_fault_takes_no_lock_of_the_space() {
    let machine: &'static Machine = Box::leak(Box::new(Machine::pc(64 << 20, 1)));
    let range = FrameRange::from_numbers(0, machine.memory().frame_limit()).unwrap();
    let slots: &'static SlotArena = Box::leak(Box::new(SlotArena::new(range)));
    let frames: &'static FramePool<'static> = Box::leak(Box::new(FramePool::new(machine, 256)));
    let vmas: &'static Stops = Box::leak(Box::default());
    // SAFETY: one thread, and the parts belong to one machine.
    let env = unsafe {
        let grace = SingleGrace::new();
        let paging = kmem_paging::Parts::new(machine, frames, machine, grace, machine, slots);
        let heap = (HeapObjects::new(), HeapObjects::new(), HeapObjects::new());
        Parts::<_, X86_64, _, _, _, _, Watched>::new(paging, heap.0, vmas, heap.1, heap.2)
    };
    let env = Box::leak(Box::new(env));
    let mm = Box::leak(Box::new(Mm::new(env).unwrap()));
    let space: &'static AddressSpace<'static, _> =
        Box::leak(Box::new(AddressSpace::new(mm, Layout::x86_64()).unwrap()));

    let map = |at: u64, prot| {
        let request = MapRequest::anonymous(64 * PAGE, prot).at(at);
        space.mmap(&request).unwrap();
        at
    };
    let both = Prot::READ | Prot::WRITE;
    let (low, high) = (map(0x4000_0000, both), map(0x4080_0000, both));
    let fault = move |address: u64, code: FaultCode| {
        let address = VirtAddr::new(address);
        let code = code | FaultCode::USER;
        assert_eq!(space.fault(&PageFault { address, code }), Outcome::Handled);
    };
    // The first write of each mapping is one for the space's lock: the mapping gets its reverse map. Its table comes too.
    fault(low, FaultCode::WRITE);
    fault(high, FaultCode::WRITE);

    // While the other thread stands in mmap with the lock: a first touch in each, a read of nothing, and a write that copies.
    *vmas.stop.borrow_mut() = Some(Box::new(move || {
        let before = TOUCHED.load(Ordering::Relaxed);
        for at in [low, high] {
            reset_counts();
            fault(at + PAGE, FaultCode::WRITE);
            // Into the VMA and out of it, the table's lock and its release.
            assert_eq!(counts().locked, 4, "a first touch");
            reset_counts();
            fault(at + 2 * PAGE, FaultCode::empty());
            // And a mapping of the zero page counted.
            assert!(counts().locked <= 6, "a read: {:?}", counts());
            fault(at + 2 * PAGE, FaultCode::WRITE | FaultCode::PRESENT);
        }
        assert_eq!(
            TOUCHED.load(Ordering::Relaxed),
            before,
            "a lock was touched"
        );
    }));
    // Enough mappings that do not merge, so that memory for a VMA is asked for.
    for number in 0..8 {
        map(
            0x5000_0000 + number * 0x10_0000,
            if number % 2 == 0 { Prot::READ } else { both },
        );
    }
    assert_eq!(vmas.stops.get(), 1, "mmap was not stalled");
    // A fault where nothing is mapped does take it.
    let before = TOUCHED.load(Ordering::Relaxed);
    let (address, code) = (VirtAddr::new(0x10_0000), FaultCode::USER);
    assert!(matches!(
        space.fault(&PageFault { address, code }),
        Outcome::Signal { .. }
    ));
    assert!(TOUCHED.load(Ordering::Relaxed) > before);
}

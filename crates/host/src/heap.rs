//! `HostHeap`: kmem as the global allocator of a program.
//!
//! std allocates before `main`, so the heap starts itself at the first allocation: it reserves the arena, and sets up frame table, page-frame
//! allocator and slab system, none of which need a heap.
//!
//! Invariants
//! - `I1`: `inner` is null until the heap has started, and never changes afterwards; what it points to is never freed.
//! - `I2`: one thread starts the heap; others wait for it. A signal handler on the starting thread gets null.

use std::alloc::{GlobalAlloc, Layout};
use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use kmem::{BootMap, Config, Memory, OffsetMap, PhysAddr, RegionKind};
use kmem_hal::NoCpuCall;

use crate::arena::{Arena, BASE};
use crate::idle::IdleThreads;
use crate::lock::HostLock;
use crate::ranges::Ranges;
use crate::threads::ThreadCpu;

/// The memory manager beneath a [`HostHeap`].
pub type HostMemory =
    Memory<OffsetMap, ThreadCpu, HostLock, NoCpuCall, &'static IdleThreads, Ranges>;

struct Inner {
    idle: IdleThreads,
    memory: HostMemory,
    arena: Arena,
}

/// A global allocator for programs: see the [crate's page](crate).
pub struct HostHeap {
    inner: AtomicPtr<Inner>,
    /// The thread that starts the heap: the address of one of its thread-locals.
    starter: AtomicUsize,
    bytes: usize,
}

thread_local! {
    static HERE: u8 = const { 0 };
}

impl HostHeap {
    /// A heap over a range as large as the machine's memory; where the address space is limited, over half of what it has room for, and no less than
    /// 16 MiB.
    #[must_use]
    pub const fn new() -> Self {
        Self::with_arena(0)
    }

    /// A heap over a range of `bytes` bytes, rounded up to 4 MiB; 0 means as large as [`new`](Self::new) makes it.
    #[must_use]
    pub const fn with_arena(bytes: usize) -> Self {
        Self {
            inner: AtomicPtr::new(ptr::null_mut()),
            starter: AtomicUsize::new(0),
            bytes,
        }
    }

    /// The memory manager; `None` before the first allocation, and where the heap could not start.
    #[inline(always)]
    #[must_use]
    pub fn memory(&self) -> Option<&'static HostMemory> {
        // SAFETY: never freed (I1).
        unsafe { self.inner.load(Ordering::Acquire).as_ref() }.map(|inner| &inner.memory)
    }

    /// The arena; `None` before the first allocation.
    #[must_use]
    pub fn arena(&self) -> Option<&'static Arena> {
        // SAFETY: never freed (I1).
        unsafe { self.inner.load(Ordering::Acquire).as_ref() }.map(|inner| &inner.arena)
    }

    /// Gives back what caches hold beyond need, the arrays of threads that ended included; answers the frames given back.
    pub fn shrink(&self) -> u64 {
        let Some(memory) = self.memory() else {
            return 0;
        };
        ThreadCpu.with_idle(|cpu| {
            // SAFETY: no thread has the number while `with_idle` holds it, and it saw what the last one wrote. It cannot be this
            // thread's: that one is leased.
            unsafe {
                let _ = memory.slab().cpu_offline(cpu);
                memory.frames().cpu_offline(cpu);
            }
        });
        memory.slab().shrink()
    }

    #[inline(always)]
    fn ready(&self) -> Option<&'static HostMemory> {
        self.memory().or_else(|| self.start())
    }

    /// The first allocation of all, or one beside it.
    #[cold]
    #[inline(never)]
    fn alloc_first(&self, layout: Layout) -> *mut u8 {
        match self.start() {
            Some(memory) => memory.slab().alloc(layout),
            None => ptr::null_mut(),
        }
    }

    #[cold]
    fn start(&self) -> Option<&'static HostMemory> {
        let me = HERE.with(|here| ptr::from_ref(here).addr());
        loop {
            if let Some(memory) = self.memory() {
                return Some(memory);
            }
            match self
                .starter
                .compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed)
            {
                Ok(_) => break,
                Err(starter) if starter == me => return None,
                // SAFETY: has no preconditions.
                Err(_) => unsafe {
                    libc::sched_yield();
                },
            }
        }
        let started = match self.memory() {
            // Another thread finished between the check and the exchange.
            Some(memory) => Some(memory),
            None => start(self.bytes).map(|inner| {
                self.inner.store(inner, Ordering::Release);
                // SAFETY: never freed (I1).
                unsafe { &(*inner).memory }
            }),
        };
        self.starter.store(0, Ordering::Release);
        started
    }
}

/// Bytes of memory that the machine has.
fn machine_memory() -> usize {
    // SAFETY: has no preconditions.
    let (pages, size) = unsafe {
        (
            libc::sysconf(libc::_SC_PHYS_PAGES),
            libc::sysconf(libc::_SC_PAGESIZE),
        )
    };
    let bytes = (pages.max(0) as usize).saturating_mul(size.max(0) as usize);
    bytes.clamp(256 << 20, 1 << 40)
}

/// Starts a heap over `bytes` bytes; for 0 over as many as the machine has. Where the host gives no such range, address space is limited (`RLIMIT_AS`,
/// `vm.overcommit_memory = 2`), and stacks, files and what the program maps for itself lie there too: half of what there is stays theirs.
fn start(bytes: usize) -> Option<*mut Inner> {
    if bytes > 0 {
        return start_over(bytes);
    }
    let all = machine_memory();
    start_over(all).or_else(|| {
        let fits = down_from(all, 8).find(|&bytes| Arena::new(bytes).is_ok())?;
        down_from((fits / 2).max(LEAST), 2).find_map(start_over)
    })
}

/// `most` bytes and ever less, by one in so many parts, down to the smallest arena.
fn down_from(most: usize, parts: usize) -> impl Iterator<Item = usize> {
    let less = move |&bytes: &usize| Some(bytes - bytes / parts);
    std::iter::successors(Some(most), less).take_while(|&bytes| bytes >= LEAST)
}

/// The smallest arena that a heap without a wish starts with, in bytes.
const LEAST: usize = 16 << 20;

fn start_over(bytes: usize) -> Option<*mut Inner> {
    let arena = Arena::new(bytes).ok()?;
    // Frames are taken from the bottom up, so that little of a large page stands idle.
    arena.map_huge();
    // What the heap itself is made of lies in a mapping of its own: it must not move or go away, and there is no heap yet.
    // SAFETY: an anonymous mapping at an address of the host's choice touches nothing that exists.
    let place = unsafe {
        libc::mmap(
            ptr::null_mut(),
            size_of::<Inner>(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if place == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: the arena's bytes are mapped at the offset and used by nobody else, and are all that is in reach (P1, P2).
    let map = unsafe { OffsetMap::over(arena.offset(), arena.frames()) };
    let usable = arena.bytes() as u64;
    let place = place.cast::<Inner>();
    // SAFETY: the mapping is page-aligned, large enough, this call's, and never unmapped once the heap has started; the hook, which the memory
    // manager names, is not written again.
    let inner: &'static Inner = unsafe {
        let idle = &raw mut (*place).idle;
        idle.write(IdleThreads::new());
        let memory = Memory::with(map, ThreadCpu, NoCpuCall, &*idle);
        (&raw mut (*place).memory).write(memory);
        (&raw mut (*place).arena).write(arena);
        &*place
    };
    let mut boot: BootMap = BootMap::new();
    let large = Ranges::new(inner.memory.frames(), inner.memory.table());
    // No watermarks: nobody reclaims here, so the last frame may be had.
    let config = Config::new().min_free_kib(0).reserve_ratio([0; 5]);
    let started = boot
        .push(PhysAddr::new(BASE), usable, RegionKind::Usable)
        .is_ok()
        // SAFETY: X1: the arena is this heap's alone.
        && unsafe { inner.memory.init_with(&mut boot, &config, large) }.is_ok();
    if started {
        inner.idle.connect(&inner.memory);
        Some(place)
    } else {
        // SAFETY: nobody has seen it; the reference is not used any more.
        unsafe {
            place.drop_in_place();
            libc::munmap(place.cast(), size_of::<Inner>());
        }
        None
    }
}

// SAFETY: the slab system gives memory that fits the layout and belongs to nobody else until it is given back; nothing unwinds.
unsafe impl GlobalAlloc for HostHeap {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match self.memory() {
            Some(memory) => memory.slab().alloc(layout),
            None => self.alloc_first(layout),
        }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match self.ready() {
            Some(memory) => memory.slab().alloc_zeroed(layout),
            None => ptr::null_mut(),
        }
    }

    #[inline]
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // What was allocated came from a heap that had started.
        if let Some(heap) = self.memory() {
            // SAFETY: the caller's promise.
            unsafe { heap.slab().dealloc(memory, layout) }
        }
    }

    #[inline]
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        match self.ready() {
            // SAFETY: the caller's promise.
            Some(heap) => unsafe { heap.slab().realloc(memory, layout, new_size) },
            None => ptr::null_mut(),
        }
    }
}

impl Default for HostHeap {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for HostHeap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostHeap(started: {})", self.memory().is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kmem::PhysMap;

    #[test]
    fn the_map_reaches_the_arena_and_nothing_else() {
        let _alone = crate::threads::tests::alone();
        let heap = HostHeap::with_arena(8 << 20);
        let memory = heap.ready().unwrap();
        let (map, arena) = (memory.frames().memory(), heap.arena().unwrap());
        let reach = map.reach();
        assert_eq!(map.to_ptr(reach.first().start()), arena.start());
        assert_eq!(reach.count(), 8 << 20 >> 12);
    }
}

//! An arena of host memory as physical frames, with a count, a failure injector and hooks.
#![allow(dead_code)]

pub mod hardened;
pub mod world;

use std::alloc::{Layout, alloc_zeroed};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Mutex, Once};

use kmem_hal::{
    AllocError, Cpu, CpuId, Frame, FrameRequest, FrameSink, FrameSource, FrameTable, NoLarge,
    NodeId, NodePolicy, OffsetMap, OwnedFrame, Section, Spin,
};
use kmem_slab::{Parts, Plain, SlabSystem};

/// Runs `f`; panics on this thread are not printed meanwhile. The hook is the process's, and tests run beside each other: it is set once and stays.
pub fn quietly<R>(f: impl FnOnce() -> R) -> R {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                before(panic);
            }
        }));
    });
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(f));
    QUIET.set(false);
    result.unwrap_or_else(|panic| resume_unwind(panic))
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// First-fit over a vector of frames; panics on a double free.
pub struct Arena {
    used: Mutex<Vec<bool>>,
    base: usize,
    pub table: &'static FrameTable,
    /// Memory nodes: as many equal parts of the frames. CPU `n` belongs to node `n` modulo that.
    pub nodes: AtomicU16,
    /// Requests until one is refused, u64::MAX = never; it counts down and stays at 0 for one refusal.
    pub fail_at: AtomicU64,
    pub requests: AtomicU64,
    /// Called at every request, as an interrupt or a log would be.
    pub hook: Mutex<Option<fn()>>,
}

impl Arena {
    pub fn new(frames: usize) -> &'static Self {
        let memory = Layout::from_size_align(frames << 12, 1 << 22).unwrap();
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc_zeroed(memory) };
        // No frame is anybody's yet.
        poison(base, frames << 12);
        let base = base.expose_provenance();
        let slots = Layout::from_size_align(FrameTable::SECTION_BYTES, 64).unwrap();
        // SAFETY: the layout is not empty.
        let slots = NonNull::new(unsafe { alloc_zeroed(slots) }).unwrap();
        let directory = Box::leak(Box::new([Section::absent()]));
        // SAFETY: leaked memory of that size.
        unsafe { directory[0].set_memory(slots) };
        let table = Box::leak(Box::new(FrameTable::new()));
        table.init(directory);
        Box::leak(Box::new(Self {
            used: Mutex::new(vec![false; frames]),
            base,
            table,
            nodes: AtomicU16::new(1),
            fail_at: AtomicU64::new(u64::MAX),
            requests: AtomicU64::new(0),
            hook: Mutex::new(None),
        }))
    }

    /// The same with so many memory nodes.
    pub fn with_nodes(frames: usize, nodes: u16) -> &'static Self {
        let arena = Self::new(frames);
        arena.nodes.store(nodes, Ordering::Relaxed);
        arena
    }

    pub fn node_of(&self, memory: NonNull<u8>) -> u16 {
        let frame = (memory.as_ptr().addr() - self.base) >> 12;
        self.node_of_frame(Frame::new(frame as u64).unwrap()).get()
    }

    /// Frames of a node that are used.
    pub fn used_on(&self, node: u16) -> usize {
        let used = self.used.lock().unwrap();
        let size = used.len() / usize::from(self.node_count());
        let first = usize::from(node) * size;
        used[first..first + size]
            .iter()
            .filter(|used| **used)
            .count()
    }

    pub fn used(&self) -> usize {
        self.used
            .lock()
            .unwrap()
            .iter()
            .filter(|used| **used)
            .count()
    }

    pub fn map(&self) -> OffsetMap {
        let frames = self.used.lock().unwrap().len() as u64;
        // SAFETY: the arena is valid for ever.
        unsafe { OffsetMap::new(self.base, frames) }
    }

    /// No slot says anything but "free" where the frame is free.
    pub fn check_slots(&self) {
        for (number, used) in self.used.lock().unwrap().iter().enumerate() {
            let slot = self.table.slot(Frame::new(number as u64).unwrap()).unwrap();
            if !used {
                assert_eq!(
                    slot.tag(),
                    kmem_hal::FrameTag::Free,
                    "slot of free frame {number}"
                );
            }
        }
    }
}

// SAFETY: a block is marked used under the lock before it is given; natural alignment; never zeroed on request is handled.
unsafe impl FrameSource for Arena {
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let hook = *self.hook.lock().unwrap();
        if let Some(hook) = hook {
            hook();
        }
        let refused = self
            .fail_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| match left {
                u64::MAX => None,
                left => Some(left.wrapping_sub(1)),
            });
        if refused == Ok(0) {
            return Err(AllocError::OutOfMemory);
        }
        let mut used = self.used.lock().unwrap();
        let size = request.order.frames() as usize;
        let nodes = self.node_count();
        let wanted = match request.node {
            NodePolicy::Local | NodePolicy::Interleave => self.node_of_cpu(CpuId::new(CPU.get())),
            NodePolicy::Preferred(node) | NodePolicy::Strict(node) => node,
        };
        let strict = matches!(request.node, NodePolicy::Strict(_));
        let mut order: Vec<NodeId> = (0..nodes).map(NodeId::new).collect();
        order.retain(|&node| !strict || node == wanted);
        order.sort_by_key(|&node| self.node_distance(wanted, node));
        let of_node = used.len() / usize::from(nodes);
        let first = order
            .into_iter()
            .find_map(|node| {
                let start = node.index() * of_node;
                let end = (start + of_node).min((request.max_address.as_u64() >> 12) as usize);
                (start.next_multiple_of(size)..end)
                    .step_by(size)
                    .find(|&first| {
                        first + size <= end && !used[first..first + size].contains(&true)
                    })
            })
            .ok_or(AllocError::OutOfMemory)?;
        used[first..first + size].fill(true);
        drop(used);
        let bytes = std::ptr::with_exposed_provenance_mut::<u8>(self.base + (first << 12));
        unpoison(bytes, size << 12);
        if request.zeroed {
            // SAFETY: the block is inside the arena and was just taken.
            unsafe { bytes.write_bytes(0, size << 12) };
        }
        // SAFETY: taken above, aligned to its size.
        Ok(unsafe { OwnedFrame::from_raw(Frame::new(first as u64).unwrap(), request.order) })
    }

    fn node_count(&self) -> u16 {
        self.nodes.load(Ordering::Relaxed)
    }
    fn node_of_cpu(&self, cpu: CpuId) -> NodeId {
        NodeId::new(cpu.get() as u16 % self.node_count())
    }
    fn node_of_frame(&self, frame: Frame) -> NodeId {
        let frames = self.used.lock().unwrap().len();
        let of_node = (frames / usize::from(self.node_count())) as u64;
        NodeId::new((frame.number() / of_node) as u16)
    }
    /// Nodes lie in a row.
    fn node_distance(&self, from: NodeId, to: NodeId) -> u8 {
        10 + from.get().abs_diff(to.get()) as u8
    }
}

impl FrameSink for Arena {
    fn free(&self, frame: OwnedFrame) {
        let mut used = self.used.lock().unwrap();
        for frame in frame.range().iter() {
            let place = &mut used[frame.number() as usize];
            assert!(*place, "frame {frame} was freed twice");
            *place = false;
            let bytes = self.base + ((frame.number() as usize) << 12);
            poison(std::ptr::with_exposed_provenance(bytes), 4096);
        }
        let _ = frame.into_raw();
    }
}

#[cfg(kmem_asan)]
unsafe extern "C" {
    fn __asan_poison_memory_region(address: *const core::ffi::c_void, bytes: usize);
    fn __asan_unpoison_memory_region(address: *const core::ffi::c_void, bytes: usize);
}

/// Under AddressSanitizer: whoever touches these bytes from now on ends the process.
pub fn poison(address: *const u8, bytes: usize) {
    #[cfg(kmem_asan)]
    // SAFETY: marks shadow bytes only.
    unsafe {
        __asan_poison_memory_region(address.cast(), bytes)
    };
    let _ = (address, bytes);
}

/// The opposite of [`poison`].
pub fn unpoison(address: *const u8, bytes: usize) {
    #[cfg(kmem_asan)]
    // SAFETY: marks shadow bytes only.
    unsafe {
        __asan_unpoison_memory_region(address.cast(), bytes)
    };
    let _ = (address, bytes);
}

thread_local! {
    static CPU: Cell<u32> = const { Cell::new(0) };
}

/// Threads as CPUs: each thread says which one it is.
#[derive(Clone, Copy)]
pub struct ThreadCpu(pub u32);

/// The calling thread runs as `cpu` from now on; no other thread does at the same time.
pub fn run_as(cpu: u32) {
    CPU.set(cpu);
}

// SAFETY: the tests give each thread its own number.
unsafe impl Cpu for ThreadCpu {
    type Guard<'a> = ();
    fn raw_pin(&self) {}
    fn id(&self, _guard: &()) -> CpuId {
        CpuId::new(CPU.get())
    }
    fn count(&self) -> u32 {
        self.0
    }
}

/// The parts of a system with a hardening policy.
pub type PolicyParts<H> =
    Parts<&'static Arena, OffsetMap, ThreadCpu, Spin, NoLarge, &'static FrameTable, H>;
pub type TestParts = PolicyParts<Plain>;
pub type System = SlabSystem<TestParts>;

pub fn policy_parts<H>(arena: &'static Arena, cpus: u32) -> PolicyParts<H> {
    // SAFETY: map and table cover the arena.
    unsafe { Parts::new(arena, arena.map(), ThreadCpu(cpus), arena.table) }
}

pub fn parts(arena: &'static Arena, cpus: u32) -> TestParts {
    policy_parts(arena, cpus)
}

pub fn system(frames: usize, cpus: u32) -> (&'static Arena, System) {
    let arena = Arena::new(frames);
    let system = SlabSystem::new();
    system.init(parts(arena, cpus)).unwrap();
    (arena, system)
}

//! What the models share: a machine of four mebibytes, its start, and two CPUs that do one thing each.

use std::collections::BTreeSet;

use kmem_buddy::{BootMap, Buddy, Config, RegionKind, Reservation, ZoneLimits};
use kmem_hal::sync::{AtomicU32, AtomicU64};
use kmem_hal::{
    AllocError, Cpu, CpuCall, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, NoCpuCall,
    NoPressure, Order, OwnedFrame, PhysAddr, PhysMap, RawLock, Spin,
};
use kmem_testkit::model::ModelCpu;
use loom::thread;

/// Four mebibytes at frame 0x100, backed for the allocator's tables.
pub struct Memory(usize);

pub const FIRST: u64 = 0x100;
pub const FRAMES: u64 = 0x400;

std::thread_local! {
    // One for all runs of a model: there are many, and a run leaves nothing that the next one reads.
    static MEMORY: &'static Memory = {
        let bytes = vec![0u64; (FRAMES << 12) as usize / 8 + 512].leak();
        let base = (bytes.as_mut_ptr().expose_provenance() + 4095) & !4095;
        Box::leak(Box::new(Memory(base)))
    };
}

impl Memory {
    pub fn new() -> &'static Self {
        MEMORY.with(|memory| *memory)
    }
}

// SAFETY: P1 to P5 for the leaked bytes; a model accesses no other frames.
unsafe impl PhysMap for Memory {
    fn reach(&self) -> FrameRange {
        FrameRange::from_numbers(FIRST, FIRST + FRAMES).unwrap()
    }
    fn to_ptr(&self, address: PhysAddr) -> *mut u8 {
        let offset = address.as_u64().wrapping_sub(FIRST << 12) as usize;
        std::ptr::with_exposed_provenance_mut(self.0.wrapping_add(offset))
    }
    fn to_phys(&self, pointer: *const u8) -> PhysAddr {
        PhysAddr::new((pointer.addr() - self.0) as u64 + (FIRST << 12))
    }
    unsafe fn words(&self, _: Frame) -> &[AtomicU64] {
        unreachable!("the allocator reads no frame as a table")
    }
    unsafe fn words32(&self, _: Frame) -> &[AtomicU32] {
        unreachable!("the allocator reads no frame as a table")
    }
}

/// Every interleaving. Booting is part of each run, and long.
pub fn explore(model: impl Fn() + Sync + Send + 'static) {
    explore_to(None, model);
}

/// Every interleaving with at most so many involuntary switches.
pub fn explore_to(switches: impl Into<Option<usize>>, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 100_000;
    builder.preemption_bound = switches.into();
    builder.check(model);
}

pub type Machine = Buddy<&'static Memory, ModelCpu, Spin>;

pub fn boot() -> &'static Machine {
    boot_with(ModelCpu::new(3), NoCpuCall)
}

pub fn boot_with<C: Cpu, L: RawLock, K>(
    cpu: C,
    call: K,
) -> &'static Buddy<&'static Memory, C, L, K, NoPressure> {
    let buddy = Buddy::with(Memory::new(), cpu, call, NoPressure);
    initialise(&buddy);
    Box::leak(Box::new(buddy))
}

pub fn initialise<C: Cpu, L: RawLock, K>(buddy: &Buddy<&'static Memory, C, L, K, NoPressure>) {
    let mut map: BootMap<4> = BootMap::new();
    map.push(PhysAddr::new(FIRST << 12), FRAMES << 12, RegionKind::Usable)
        .unwrap();
    map.reserve(PhysAddr::new(FIRST << 12), 0x3000, Reservation::Initrd)
        .unwrap();
    let config = Config::new()
        .limits(ZoneLimits::NORMAL_ONLY)
        .min_free_kib(0);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &config) }.unwrap();
}

/// Takes memory until `left` frames are free, and leaves the arrays empty.
pub fn fill<C: Cpu, L: RawLock, K: CpuCall>(
    buddy: &Buddy<&'static Memory, C, L, K, NoPressure>,
    left: usize,
) -> Vec<OwnedFrame> {
    let range = FrameRange::from_numbers(FIRST + 3, FIRST + FRAMES).unwrap();
    let mut taken = Vec::new();
    for order in (0..=10).rev() {
        let request = FrameRequest::new(Order::new(order).unwrap());
        while let Ok(block) = buddy.alloc(&request) {
            taken.push(block);
        }
    }
    let mut singles = Vec::new();
    while singles.len() < left {
        let block = taken.pop().unwrap();
        assert!(range.contains_range(block.range()));
        match block.split() {
            Ok((lower, upper)) => taken.extend([upper, lower]),
            Err(single) => singles.push(single),
        }
    }
    for single in singles {
        buddy.free(single);
    }
    buddy.drain_local();
    taken
}

pub fn distinct(frames: &[OwnedFrame]) {
    let numbers: BTreeSet<_> = frames.iter().map(|frame| frame.first().number()).collect();
    assert_eq!(numbers.len(), frames.len(), "a frame has two owners");
}

/// Runs one job on each CPU; gives what they hold at the end.
pub fn on_two_cpus(
    first: impl FnOnce() -> Vec<OwnedFrame> + Send + 'static,
    second: impl FnOnce() -> Vec<OwnedFrame> + Send + 'static,
) -> Vec<OwnedFrame> {
    let other = thread::spawn(move || {
        ModelCpu::bind(1);
        second()
    });
    let mut held = first();
    held.extend(other.join().unwrap());
    held
}

pub fn one(buddy: &Machine) -> Vec<OwnedFrame> {
    buddy.alloc(&FrameRequest::ONE).into_iter().collect()
}

pub fn settled<C: Cpu, L: RawLock, K: CpuCall>(
    buddy: &Buddy<&'static Memory, C, L, K, NoPressure>,
    held: Vec<OwnedFrame>,
    free: u64,
) {
    distinct(&held);
    for frame in held {
        buddy.free(frame);
    }
    let info = buddy.mem_info();
    assert_eq!(info.free + info.cached, free, "frames were lost");
    buddy.check().unwrap();
    assert_eq!(buddy.misuse(), None);
}

/// Takes a block of an order out of what `fill` gave, cut from a larger one if need be.
pub fn block_of(rest: &mut Vec<OwnedFrame>, order: u8) -> OwnedFrame {
    let fits = rest.iter().filter(|block| block.order().get() >= order);
    let smallest = fits.map(|block| block.order().get()).min().unwrap();
    let at = rest
        .iter()
        .position(|block| block.order().get() == smallest);
    let mut block = rest.swap_remove(at.unwrap());
    while block.order().get() > order {
        let (lower, upper) = block.split().unwrap();
        rest.push(upper);
        block = lower;
    }
    block
}

pub fn refused(error: AllocError) -> Vec<OwnedFrame> {
    assert!(matches!(
        error,
        AllocError::OutOfMemory | AllocError::OutOfMemoryHere
    ));
    Vec::new()
}

pub fn ask<C: Cpu, L: RawLock, K: CpuCall>(
    buddy: &Buddy<&'static Memory, C, L, K, NoPressure>,
    request: FrameRequest,
) -> Vec<OwnedFrame> {
    match buddy.alloc(&request) {
        Ok(frame) => vec![frame],
        Err(error) => refused(error),
    }
}

pub fn order(order: u8) -> FrameRequest {
    FrameRequest::new(Order::new(order).unwrap())
}

/// Nobody's pages can be moved.
pub struct Immovable;

impl kmem_hal::Migrate for Immovable {
    fn migrate(
        &self,
        _from: Frame,
        to: OwnedFrame,
    ) -> Result<OwnedFrame, (kmem_hal::MigrateError, OwnedFrame)> {
        Err((kmem_hal::MigrateError::NotMovable, to))
    }
}

//! Two CPUs in one allocator, every interleaving: no frame has two owners, none is lost, a refusal is honest.
#![cfg(loom)]

use std::collections::BTreeSet;

use kmem_buddy::{BootMap, Buddy, Config, RegionKind, Reservation, ZoneLimits};
use kmem_hal::sync::{AtomicU32, AtomicU64};
use kmem_hal::{
    AllocError, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, Order, OwnedFrame,
    PhysAddr, PhysMap, Spin,
};
use kmem_testkit::model::ModelCpu;
use loom::thread;

/// One mebibyte at frame 0x100, backed for the allocator's tables.
struct Memory(usize);

const FIRST: u64 = 0x100;
const FRAMES: u64 = 0x400;

impl Memory {
    fn new() -> &'static Self {
        let bytes = vec![0u64; (FRAMES << 12) as usize / 8 + 512].leak();
        let base = (bytes.as_mut_ptr().expose_provenance() + 4095) & !4095;
        Box::leak(Box::new(Self(base)))
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

/// Every interleaving with at most two involuntary switches. Booting is part of each run, and long.
fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 100_000;
    builder.preemption_bound = None;
    builder.check(model);
}

type Machine = Buddy<&'static Memory, ModelCpu, Spin>;

fn boot() -> &'static Machine {
    let mut map: BootMap<4> = BootMap::new();
    map.push(PhysAddr::new(FIRST << 12), FRAMES << 12, RegionKind::Usable)
        .unwrap();
    map.reserve(PhysAddr::new(FIRST << 12), 0x3000, Reservation::Initrd)
        .unwrap();
    let buddy = Machine::new(Memory::new(), ModelCpu::new(2));
    let config = Config::new()
        .limits(ZoneLimits::NORMAL_ONLY)
        .min_free_kib(0);
    buddy.init(&mut map, &config).unwrap();
    Box::leak(Box::new(buddy))
}

/// Takes memory until `left` frames are free, and leaves the arrays empty.
fn fill(buddy: &Machine, left: usize) -> Vec<OwnedFrame> {
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

fn distinct(frames: &[OwnedFrame]) {
    let numbers: BTreeSet<_> = frames.iter().map(|frame| frame.first().number()).collect();
    assert_eq!(numbers.len(), frames.len(), "a frame has two owners");
}

/// Runs one job on each CPU; gives what they hold at the end.
fn on_two_cpus(
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

fn one(buddy: &Machine) -> Vec<OwnedFrame> {
    buddy.alloc(&FrameRequest::ONE).into_iter().collect()
}

fn settled(buddy: &Machine, held: Vec<OwnedFrame>, free: u64) {
    distinct(&held);
    for frame in held {
        buddy.free(frame);
    }
    let info = buddy.mem_info();
    assert_eq!(info.free + info.cached, free, "frames were lost");
    buddy.check().unwrap();
    assert_eq!(buddy.misuse(), None);
}

#[test]
fn two_allocations_of_the_last_two_frames() {
    explore(|| {
        let buddy = boot();
        let _rest = fill(buddy, 2);
        let held = on_two_cpus(move || one(buddy), move || one(buddy));
        // One CPU's refill may have taken both frames: then the other was told that it was not asked.
        assert!(!held.is_empty());
        settled(buddy, held, 2);
    });
}

#[test]
fn an_allocation_beside_a_free_of_a_large_block() {
    explore(|| {
        let buddy = boot();
        let mut rest = fill(buddy, 0);
        let at = rest
            .iter()
            .position(|block| block.order().get() == 5)
            .unwrap();
        let large = rest.swap_remove(at);
        let held = on_two_cpus(
            move || match buddy.alloc(&FrameRequest::new(Order::new(5).unwrap())) {
                Ok(frame) => vec![frame],
                Err(error) => {
                    assert!(matches!(
                        error,
                        AllocError::OutOfMemory | AllocError::OutOfMemoryHere
                    ));
                    Vec::new()
                }
            },
            move || {
                buddy.free(large);
                Vec::new()
            },
        );
        settled(buddy, held, 32);
    });
}

#[test]
fn a_release_beside_a_free_into_its_block() {
    explore(|| {
        let buddy = boot();
        let mut rest = fill(buddy, 0);
        // A frame of the block whose first three frames were reserved at boot: its free looks at the reserved list.
        let at = rest
            .iter()
            .position(|block| block.first().number() == FIRST + 3)
            .unwrap();
        let neighbour = rest.swap_remove(at);
        let count = neighbour.order().frames();
        let held = on_two_cpus(
            move || {
                buddy.free(neighbour);
                Vec::new()
            },
            move || {
                // SAFETY: nobody uses the simulated initrd.
                assert_eq!(unsafe { buddy.release(Reservation::Initrd) }, 3);
                Vec::new()
            },
        );
        settled(buddy, held, count + 3);
    });
}

#[test]
fn two_cpus_free_into_one_word() {
    explore(|| {
        let buddy = boot();
        let mut rest = fill(buddy, 0);
        let at = rest
            .iter()
            .position(|block| block.order().get() == 6)
            .unwrap();
        let (lower, upper) = rest.swap_remove(at).split().unwrap();
        let held = on_two_cpus(
            move || {
                buddy.free(lower);
                Vec::new()
            },
            move || {
                buddy.free(upper);
                Vec::new()
            },
        );
        // The halves have merged: the whole can be had.
        let whole = buddy
            .alloc(&FrameRequest::new(Order::new(6).unwrap()))
            .unwrap();
        buddy.free(whole);
        settled(buddy, held, 64);
    });
}

#[test]
fn a_reserved_frame_is_refused_while_its_neighbour_is_released() {
    explore(|| {
        let buddy = boot();
        let rest = fill(buddy, 0);
        let held = on_two_cpus(
            move || {
                let middle = FrameRange::from_numbers(FIRST + 1, FIRST + 2).unwrap();
                // SAFETY: nobody uses the simulated initrd.
                assert_eq!(unsafe { buddy.release_range(middle) }, Ok(1));
                Vec::new()
            },
            move || {
                // SAFETY: the wrong free is what is tested.
                let reserved =
                    unsafe { OwnedFrame::from_raw(Frame::new(FIRST + 2).unwrap(), Order::ZERO) };
                assert!(
                    buddy.try_free(reserved).is_err(),
                    "a reserved frame was taken for free"
                );
                Vec::new()
            },
        );
        drop(rest);
        settled(buddy, held, 1);
    });
}

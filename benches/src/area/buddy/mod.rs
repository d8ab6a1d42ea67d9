//! Page-frame allocators: kmem-buddy beside list buddies, B-tree buddies and bitmaps.
//!
//! All manage a zone of the same size. Programs that ask for `&mut self` stand behind one spin lock, which a kernel would have to put
//! there; kmem needs none on its fast path, and that is part of what is compared. `limit:stack` is an array of frame numbers without
//! any lock: what a cache in front of any allocator costs at least. `limit:array` is one for each CPU, found by the CPU's number, as any
//! cache has to be; `limit:guarded-array` has the word, too, that an interrupt on the same CPU looks at, and `limit:refilled-array` fills that
//! one from a bit for each frame. `limit:loop` is what the loop of `mixed_80` costs with vectors of blocks that never run out; it is part of everybody's row.
//!
//! LLFree is not among them: it is on no registry of crates.
//!
//! | workload | an operation |
//! |---|---|
//! | `pair_oN` | an allocation or a free of order N, in turns, half of the zone in use |
//! | `bulk_alloc`, `bulk_free` | one frame after the other until 15/16 of the zone are out; then all back in random order |
//! | `batch_o0` | a frame in a batch of 64; programs without such a call take one after the other |
//! | `mixed_80` | a random allocation or free, orders 0 to 9 (half of them 0, a quarter 1, ..), 80 % in use |
//! | `mixed_80_refused` | refusals per million allocations of the same |
//! | `frag_90_50` | blocks of order 9 to be had after churn at 90 % and random frees to 50 % |
//! | `unmovable_1in16` | blocks of order 9 to be had after all but one in 16 frames were freed, the others unmovable |
//! | `meta_per_frame` | bytes of own memory by frame, in the zone that is 80 % full of mixed blocks |
//! | `init_1tib` | making the allocator of 1 TiB |

mod limits;
mod peers;

use bitmap_allocator::BitAlloc1M;
use buddy_slab_allocator::buddy::BuddyAllocator;
use kmem_buddy::{BootMap, Buddy, Config, RegionKind};
use kmem_hal::{Frame, FrameRange, FrameTable, PhysAddr, PhysMap, SECTION_FRAMES, SingleCpu, Spin};

use self::limits::{Arrays, GuardedArrays, RefilledArray, limit_pair, mixed_loop, stack_pair};
use self::peers::{Bitmap, BuddySystem, ListBuddy};
use super::counted;
use crate::clock::{Watch, race};
use crate::harness::{Competitor, Runner, Slice, Workload};
use crate::mixed::{Frames, Mixed, pairs, verify};
use crate::output::Unit;
use crate::platform::{BASE, HostBuddy, Region, buddy, run_as};
use crate::rng::Rng;

const AREA: &str = "buddy";

fn kmem(frames: u64) -> &'static HostBuddy {
    buddy(Region::leak(frames))
}

/// Adds all programs to a workload: `$make(allocator, frames, ..)` makes a competitor of an allocator of so many frames.
macro_rules! programs {
    ($workload:expr, $frames:expr, $make:ident ( $($argument:expr),* )) => {{
        let frames: u64 = $frames;
        $workload
            .with("kmem", $make(kmem(frames), frames $(, $argument)*))
            .with("buddy_system_allocator", $make(BuddySystem::new(frames), frames $(, $argument)*))
            .with("buddy-slab-allocator", $make(ListBuddy::new(frames), frames $(, $argument)*))
            .with("bitmap-allocator", $make(Bitmap::new(frames), frames $(, $argument)*))
    }};
}

/// Runs the workloads of this area.
pub fn run(runner: &mut Runner) {
    let frames = runner.size(1 << 16, 1 << 18);
    hot_pairs(runner, frames);
    bulks(runner, frames);
    mixes(runner, frames);
    fragmentation(runner, frames);
    metadata(runner, frames);
    initialisation(runner);
    counted(runner, AREA, &["shared_rmw_pair", "shared_rmw_mixed"]);
}

fn workload(name: &'static str, unit: Unit) -> Workload<'static> {
    Workload::new(AREA, name, unit)
}

const PAIRS: u64 = 10_000;

/// Half of the zone in use, frame by frame; the first slice checks that blocks do not overlap.
fn half<F: Frames>(frames: &F, size: u64, index: u64, held: &mut Vec<u64>) {
    if index == 0 {
        verify(frames, BASE, size, size / 2).expect("the allocator is sound");
        frames.alloc_batch(held, size as usize / 2);
    }
}

fn pair<F: Frames>(frames: F, size: u64, order: u8) -> impl Competitor {
    let mut held = Vec::new();
    move |index: u64, watch: &mut Watch| {
        half(&frames, size, index, &mut held);
        let answered = watch.time(|| pairs(&frames, order, PAIRS));
        Slice::ops(2 * PAIRS, answered)
    }
}

fn pair_2t<F: Frames>(frames: F, size: u64) -> impl Competitor {
    let mut held = Vec::new();
    move |index: u64, watch: &mut Watch| {
        half(&frames, size, index, &mut held);
        let (elapsed, answered) = race(|cpu| {
            run_as(cpu);
            pairs(&frames, 0, PAIRS)
        });
        watch.add(elapsed);
        Slice::ops(2 * PAIRS, answered[0] + answered[1])
    }
}

fn hot_pairs(runner: &mut Runner, frames: u64) {
    for (name, order) in [("pair_o0", 0), ("pair_o3", 3), ("pair_o9", 9)] {
        if runner.wants(name) {
            let mut workload = programs!(workload(name, Unit::Ns), frames, pair(order));
            if order == 0 {
                workload = workload
                    .with("limit:stack", stack_pair(frames))
                    .with("limit:array", limit_pair(Arrays::new(frames)))
                    .with(
                        "limit:guarded-array",
                        limit_pair(GuardedArrays::new(frames)),
                    );
            }
            runner.run(workload);
        }
    }
    if runner.wants("pair_o0") {
        runner.run(programs!(
            workload("pair_o0", Unit::Ns).threads(2),
            frames,
            pair_2t()
        ));
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Alloc,
    Free,
}

fn timed_if<R>(watch: &mut Watch, timed: bool, work: impl FnOnce() -> R) -> R {
    if timed { watch.time(work) } else { work() }
}

fn bulk<F: Frames>(frames: F, size: u64, timed: Phase) -> impl Competitor {
    let count = size as usize / 16 * 15;
    let mut held = Vec::with_capacity(count);
    move |index: u64, watch: &mut Watch| {
        timed_if(watch, timed == Phase::Alloc, || {
            while held.len() < count {
                held.push(frames.alloc(0).expect("the zone is not empty yet"));
            }
        });
        Rng::new(index).shuffle(&mut held);
        timed_if(watch, timed == Phase::Free, || {
            for &frame in &held {
                frames.free(frame, 0);
            }
        });
        held.clear();
        Slice::ops(count as u64, count as u64)
    }
}

fn batch<F: Frames>(frames: F, size: u64) -> impl Competitor {
    const BATCH: usize = 64;
    const ROUNDS: u64 = 100;
    let mut held = Vec::new();
    let mut batch = Vec::with_capacity(BATCH);
    move |index: u64, watch: &mut Watch| {
        half(&frames, size, index, &mut held);
        let given = watch.time(|| {
            let mut given = 0;
            for _ in 0..ROUNDS {
                given += frames.alloc_batch(&mut batch, BATCH) as u64;
                frames.free_batch(&mut batch);
            }
            given
        });
        Slice::ops(2 * ROUNDS * BATCH as u64, given)
    }
}

fn bulks(runner: &mut Runner, frames: u64) {
    for (name, phase) in [("bulk_alloc", Phase::Alloc), ("bulk_free", Phase::Free)] {
        if runner.wants(name) {
            let workload = workload(name, Unit::Ns).n(frames);
            let mut workload = programs!(workload, frames, bulk(phase));
            if phase == Phase::Alloc {
                let limit = bulk(RefilledArray::new(frames), frames, phase);
                workload = workload.with("limit:refilled-array", limit);
            }
            runner.run(workload);
        }
    }
    if runner.wants("batch_o0") {
        runner.run(programs!(workload("batch_o0", Unit::Ns), frames, batch()));
    }
}

const MIXED_OPS: u64 = 5_000;

fn mixed<F: Frames>(frames: F, size: u64) -> impl Competitor {
    let mut state = Mixed::new(size / 10 * 8, 1);
    move |index: u64, watch: &mut Watch| {
        if index == 0 {
            verify(&frames, BASE, size, size / 2).expect("the allocator is sound");
            state.fill(&frames);
        }
        watch.time(|| {
            for _ in 0..MIXED_OPS {
                state.step(&frames);
            }
        });
        assert!(state.used() > size / 10 * 7, "the zone is not in use");
        Slice::ops(MIXED_OPS, MIXED_OPS)
    }
}

/// Two threads, each with 40 % of the zone.
fn mixed_2t<F: Frames>(frames: F, size: u64) -> impl Competitor {
    let states = [1, 2].map(|seed| std::sync::Mutex::new(Mixed::new(size / 10 * 4, seed)));
    move |index: u64, watch: &mut Watch| {
        if index == 0 {
            states.iter().for_each(|state| {
                state.lock().expect("no thread panicked").fill(&frames);
            });
        }
        let (elapsed, _) = race(|cpu| {
            run_as(cpu);
            let mut state = states[cpu].lock().expect("no thread panicked");
            for _ in 0..MIXED_OPS {
                state.step(&frames);
            }
        });
        watch.add(elapsed);
        Slice::ops(MIXED_OPS, MIXED_OPS)
    }
}

/// Refusals per million allocations.
fn refused<F: Frames>(frames: F, size: u64, ops: u64) -> impl Competitor {
    move |index: u64, _: &mut Watch| {
        let mut state = Mixed::new(size / 10 * 8, index);
        state.fill(&frames);
        (state.tried, state.refused) = (0, 0);
        for _ in 0..ops {
            state.step(&frames);
        }
        let rate = state.refused as f64 * 1e6 / state.tried as f64;
        state.clear(&frames);
        Slice::value(rate)
    }
}

fn mixes(runner: &mut Runner, frames: u64) {
    if runner.wants("mixed_80") {
        let workload_1t = programs!(workload("mixed_80", Unit::Ns), frames, mixed());
        runner.run(workload_1t.with("limit:loop", mixed_loop(frames)));
        runner.run(programs!(
            workload("mixed_80", Unit::Ns).threads(2),
            frames,
            mixed_2t()
        ));
    }
    if runner.wants("mixed_80_refused") {
        let ops = runner.size(50_000, 1_000_000);
        let workload = workload("mixed_80_refused", Unit::Count);
        runner.run(programs!(workload, frames, refused(ops)));
    }
}

/// How many blocks of 2 MiB can be had now; all are given back.
fn huge_blocks(frames: &impl Frames) -> f64 {
    frames.settle();
    let mut blocks = Vec::new();
    while let Some(frame) = frames.alloc(9) {
        blocks.push(frame);
    }
    for &frame in &blocks {
        frames.free(frame, 9);
    }
    blocks.len() as f64
}

fn frag<F: Frames>(frames: F, size: u64) -> impl Competitor {
    move |index: u64, _: &mut Watch| {
        let mut state = Mixed::new(size / 10 * 9, index);
        state.fill(&frames);
        for _ in 0..size {
            state.step(&frames);
        }
        state.shrink_to(&frames, size / 2);
        let blocks = huge_blocks(&frames);
        state.clear(&frames);
        Slice::value(blocks)
    }
}

/// The zone is filled but for 1/32, as memory never is quite full; one frame in 16, at random, is unmovable and stays.
fn unmovable<F: Frames>(frames: F, size: u64) -> impl Competitor {
    move |index: u64, _: &mut Watch| {
        let mut rng = Rng::new(index);
        let (mut movable, mut pinned) = (Vec::new(), Vec::new());
        for _ in 0..size / 32 * 31 {
            let pin = rng.below(16) == 0;
            let frame = frames.alloc_frame(!pin).expect("the zone is not empty yet");
            if pin { &mut pinned } else { &mut movable }.push(frame);
        }
        rng.shuffle(&mut movable);
        for frame in movable {
            frames.free(frame, 0);
        }
        let blocks = huge_blocks(&frames);
        for frame in pinned {
            frames.free(frame, 0);
        }
        Slice::value(blocks)
    }
}

fn fragmentation(runner: &mut Runner, frames: u64) {
    if runner.wants("frag_90_50") {
        let workload = workload("frag_90_50", Unit::Blocks).n(frames / 512 / 2);
        runner.run(programs!(workload, frames, frag()));
    }
    if runner.wants("unmovable_1in16") {
        let perfect = (frames - frames / 32 * 31 / 16) / 512;
        let workload = workload("unmovable_1in16", Unit::Blocks).n(perfect);
        runner.run(programs!(workload, frames, unmovable()));
    }
}

/// Bytes that the host's heap has handed out.
fn heap_bytes() -> usize {
    // SAFETY: no arguments; it reads malloc's counters.
    unsafe { libc::mallinfo2() }.uordblks
}

fn metadata(runner: &mut Runner, frames: u64) {
    let by_frame = move |bytes: u64| Slice::value(bytes as f64 / frames as f64);
    if runner.wants("meta_per_frame") {
        let zone = kmem(frames);
        let of_kmem = move |_: u64, _: &mut Watch| by_frame(zone.metadata().count() * 4096);
        let of_trees = move |index: u64, _: &mut Watch| {
            let mut state = Mixed::new(frames / 10 * 8, index);
            let before = heap_bytes();
            let zone = BuddySystem::new(frames);
            state.fill(&zone);
            by_frame((heap_bytes() - before) as u64)
        };
        let of_lists = move |_: u64, _: &mut Watch| {
            by_frame(BuddyAllocator::<4096>::required_meta_size(frames as usize * 4096) as u64)
        };
        let of_bits = move |_: u64, _: &mut Watch| by_frame(size_of::<BitAlloc1M>() as u64);
        runner.run(
            workload("meta_per_frame", Unit::Bytes)
                .n(frames)
                .with("kmem", of_kmem)
                .with("buddy_system_allocator", of_trees)
                .with("buddy-slab-allocator", of_lists)
                .with("bitmap-allocator", of_bits),
        );
    }
    if runner.wants("frame_table_per_frame") {
        let slot = FrameTable::SECTION_BYTES as f64 / SECTION_FRAMES as f64;
        runner.run(
            workload("frame_table_per_frame", Unit::Bytes)
                .with("kmem", move |_: u64, _: &mut Watch| Slice::value(slot)),
        );
    }
}

/// 1 TiB of which only the top is memory: where kmem's own tables lie.
struct Window {
    region: Region,
    end: u64,
}

// SAFETY: P1 to P5 for the frames at the top; the allocator's tables are all that is accessed, and they lie there.
unsafe impl PhysMap for Window {
    fn reach(&self) -> FrameRange {
        FrameRange::new(Frame::ZERO, self.end).expect("it begins at 0")
    }
    fn to_ptr(&self, address: PhysAddr) -> *mut u8 {
        let offset = address
            .as_u64()
            .checked_sub(self.end * 4096 - self.region.bytes() as u64);
        let offset = offset.expect("an address in the backed window");
        self.region.base().wrapping_add(offset as usize)
    }
    fn to_phys(&self, pointer: *const u8) -> PhysAddr {
        let offset = pointer as u64 - self.region.base() as u64;
        PhysAddr::new(self.end * 4096 - self.region.bytes() as u64 + offset)
    }
}

fn initialisation(runner: &mut Runner) {
    const END: u64 = 1 << 28;
    if !runner.wants("init_1tib") {
        return;
    }
    let window = Window {
        region: Region::new(1 << 15).touched(),
        end: END,
    };
    let start = || {
        let mut map: BootMap = BootMap::new();
        map.push(PhysAddr::new(0), END * 4096, RegionKind::Usable)
            .expect("one entry fits");
        // SAFETY: this thread alone uses it.
        let cpu = unsafe { SingleCpu::new() };
        let buddy: Buddy<_, _, Spin> = Buddy::new(&window, cpu);
        (map, buddy)
    };
    let (mut map, buddy) = start();
    // SAFETY: X1: the window is this run's alone, and no allocator that was started on it before is used any more.
    unsafe { buddy.init(&mut map, &Config::new()) }.expect("buddy starts");
    let tables = buddy.metadata();
    let tables = (window.to_ptr(tables.first().start()), tables.count() * 4096);
    let of_kmem = |_: u64, watch: &mut Watch| {
        let (mut map, buddy) = start();
        watch
            // SAFETY: X1: the window is this run's alone, and no allocator that was started on it before is used any more.
            .time(|| unsafe { buddy.init(&mut map, &Config::new()) })
            .expect("buddy starts");
        assert!(buddy.mem_info().free > END / 100 * 99, "not all is free");
        Slice::limit(1)
    };
    let of_trees = |_: u64, watch: &mut Watch| {
        watch.time(|| BuddySystem::new(END));
        Slice::limit(1)
    };
    let of_memory = |_: u64, watch: &mut Watch| {
        // SAFETY: the tables of a dropped allocator.
        watch.time(|| unsafe { tables.0.write_bytes(0, tables.1 as usize) });
        Slice::limit(1)
    };
    runner.run(
        Workload::new(AREA, "init_1tib", Unit::Ns)
            .with("kmem", of_kmem)
            .with("buddy_system_allocator", of_trees)
            .with("limit:memset", of_memory),
    );
}

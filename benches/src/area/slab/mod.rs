//! Heaps: kmem-slab over kmem-buddy beside the heaps that kernels take from the registry, and the host's malloc.
//!
//! Each has an arena of the same size (512 MiB) whose pages are committed before anything is timed, and which the host maps in pages of 2 MiB, as
//! kernels map their memory. Programs that ask for `&mut self` stand
//! behind one spin lock. mimalloc, jemalloc and snmalloc need the feature `c-peers` and a C++ compiler, and run in the process's own memory, as
//! rusty_alloc does, with pages as they ask for them. slab_allocator_rs gives each size an eighth of its arena and good_memory_allocator spreads over all of it: they run the
//! workloads of one size only. `libc` is the malloc of the host, which keeps caches per thread and lives in user space. `limit:stack` is an array of
//! objects without a lock, the last freed first; `limit:bump` hands out the addresses of 32 MiB in a row and takes nothing back: what
//! the workload itself costs.
//!
//! | workload | an operation |
//! |---|---|
//! | `pair64` | 64 bytes allocated and freed |
//! | `batch_fifo`, `batch_lifo` | one of 1000 objects of 64 bytes, allocated one after the other, freed in that order or the opposite |
//! | `bulk32` | one of 32 objects of 64 bytes allocated in one call and freed in one; programs without such calls take them one by one |
//! | `replace` | a random one of N live objects freed and another allocated, 8 to 4096 bytes, sizes spread evenly over their logarithm |
//! | `prodcons` | an object of 64 bytes allocated by one thread, handed over in a ring of 1024, freed by another (wall time) |
//! | `replace_2t` | `replace` by two threads with N objects each, an operation of each thread (wall time) |
//! | `pair64_check`, `replace_check` | the same with kmem's policy `Check`, beside kmem without it |
//! | `hosted_sort`, `hosted_json` | a string made, sorted and dropped, or a record parsed, walked and dropped, by a program of which the heap is the global allocator; every heap that can is told to ask the host for pages of 2 MiB |
//! | `hosted_sort_4k`, `hosted_json_4k` | the same where the host gives nobody other pages than those of 4 KiB |
//! | `overhead` | bytes taken by bytes asked for, after all live objects were replaced many times |
//! | `overhead_shrunk` | the same after nine in ten objects were freed and the heap was shrunk, where it can be |
//! | `overhead_slabs` | bytes taken by bytes of slabs with an object in use, after that |
//! | `rmw_per_64`, `rmw_per_64_new` | locked instructions for 64 objects that leave their slabs and come back, and for 64 of new slabs |
//! | `shared_stores_replace` | locked instructions and stores to shared words for each replacement of `replace_2t`, counted |
//!
//! Every allocation writes 8 bytes into the object, as a program would.

use std::alloc::Layout;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use kmem_hal::ObjectAlloc;
use kmem_slab::Cache;

use super::counted;
use crate::clock::{Watch, race};
use crate::harness::{Competitor, Runner, Slice, Workload};
use crate::output::Unit;
use crate::platform::{Machine, Region, SlabParts, run_as};
use crate::rng::Rng;

mod heaps;
mod hosted;
mod kernels;
mod peers;

use heaps::{Heap, Heaps, HostMalloc, List, Talc, Tlsf};
#[cfg(feature = "c-peers")]
use peers::Global;
use peers::Rusty;

#[cfg(feature = "c-peers")]
static MIMALLOC: Global<mimalloc::MiMalloc> = Global(mimalloc::MiMalloc);
#[cfg(feature = "c-peers")]
static JEMALLOC: Global<tikv_jemallocator::Jemalloc> = Global(tikv_jemallocator::Jemalloc);
#[cfg(feature = "c-peers")]
static SNMALLOC: Global<snmalloc_rs::SnMalloc> = Global(snmalloc_rs::SnMalloc);

const AREA: &str = "slab";

/// Adds all programs: `$make(heap, ..)` makes a competitor of a heap.
macro_rules! programs {
    ($workload:expr, $heaps:expr, $limit:ident, $make:ident ( $($argument:expr),* )) => {{
        let workload = $workload
            .with("kmem", $make($heaps.kmem $(, $argument)*))
            .with("rlsf", $make(&$heaps.tlsf $(, $argument)*))
            .with("talc", $make(&$heaps.talc $(, $argument)*))
            .with("linked_list_allocator", $make(&$heaps.list $(, $argument)*))
            .with("buddy-slab-allocator", $make(&$heaps.buddy_slab $(, $argument)*))
            .with("slabmalloc", $make(&$heaps.slabmalloc $(, $argument)*))
            .with("slab_allocator_rs", $make(&$heaps.slabs $(, $argument)*))
            .with("good_memory_allocator", $make(&$heaps.good $(, $argument)*))
            .with("rusty_alloc", $make(&Rusty $(, $argument)*))
            .with("libc", $make(&HostMalloc $(, $argument)*));
        #[cfg(feature = "c-peers")]
        let workload = workload
            .with("mimalloc", $make(&MIMALLOC $(, $argument)*))
            .with("jemalloc", $make(&JEMALLOC $(, $argument)*))
            .with("snmalloc", $make(&SNMALLOC $(, $argument)*));
        workload.with(concat!("limit:", stringify!($limit)), $make(&$heaps.$limit $(, $argument)*))
    }};
}

/// Runs the workloads of this area.
pub fn run(runner: &mut Runner) {
    let frames = runner.size(1 << 14, 1 << 17);
    let heaps = Heaps::new(frames);
    if let Err(problem) = heaps.verify() {
        runner.problem(problem);
        return;
    }
    small(runner, &heaps);
    checked(runner, &heaps);
    bulk(runner, &heaps);
    replacing(runner, &heaps);
    handing_over(runner, &heaps);
    overheads(runner);
    hosted::programs(runner);
    counted(
        runner,
        AREA,
        &["rmw_per_64", "rmw_per_64_new", "shared_stores_replace"],
    );
}

const SMALL: Layout = Layout::new::<[u64; 8]>();

#[inline]
fn take(heap: &impl Heap, layout: Layout, tag: u64) -> *mut u8 {
    let memory = heap.alloc(layout);
    assert!(!memory.is_null(), "out of memory");
    // SAFETY: 8 bytes at least, aligned to 8, just allocated.
    unsafe { memory.cast::<u64>().write(tag) };
    memory
}

/// Objects of all sizes keep what was written into them while others come and go, and are aligned.
fn verify(name: &str, heap: &impl Heap) -> Result<(), String> {
    let mut rng = Rng::new(5);
    let mut live: Vec<(*mut u8, Layout, u8)> = Vec::new();
    for round in 0..4000u32 {
        if live.len() >= 1000 {
            let (memory, layout, byte) = live.swap_remove(rng.below(live.len() as u64) as usize);
            // SAFETY: written below, not freed yet.
            let bytes = unsafe { std::slice::from_raw_parts(memory, layout.size()) };
            if bytes.iter().any(|&value| value != byte) {
                return Err(format!("{name}: an object of {layout:?} was overwritten"));
            }
            // SAFETY: allocated below.
            unsafe { heap.free(memory, layout) };
        }
        let layout = any_layout(&mut rng);
        let memory = heap.alloc(layout);
        if memory.is_null() || !memory.addr().is_multiple_of(layout.align()) {
            return Err(format!("{name}: {memory:?} for {layout:?}"));
        }
        // SAFETY: just allocated.
        unsafe { memory.write_bytes(round as u8, layout.size()) };
        live.push((memory, layout, round as u8));
    }
    for (memory, layout, _) in live {
        // SAFETY: allocated above.
        unsafe { heap.free(memory, layout) };
    }
    Ok(())
}

/// 8 to 4096 bytes, spread evenly over the logarithm of the size.
fn any_layout(rng: &mut Rng) -> Layout {
    let power = 3 + rng.below(9);
    let size = (1 << power) + rng.below(1 << power);
    Layout::from_size_align(size as usize, 8).expect("a valid layout")
}

fn pair(heap: impl Heap) -> impl Competitor {
    const PAIRS: u64 = 10_000;
    move |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for tag in 0..PAIRS {
                let memory = std::hint::black_box(take(&heap, SMALL, tag));
                // SAFETY: just allocated.
                unsafe { heap.free(memory, SMALL) };
            }
        });
        Slice::ops(PAIRS, PAIRS)
    }
}

fn batch(heap: impl Heap, lifo: bool) -> impl Competitor {
    const OBJECTS: u64 = 1000;
    const ROUNDS: u64 = 5;
    let mut objects = Vec::with_capacity(OBJECTS as usize);
    move |_: u64, watch: &mut Watch| {
        let mut free = |memory| {
            // SAFETY: allocated below, freed once.
            unsafe { heap.free(memory, SMALL) }
        };
        watch.time(|| {
            for _ in 0..ROUNDS {
                for tag in 0..OBJECTS {
                    objects.push(take(&heap, SMALL, tag));
                }
                if lifo {
                    objects.drain(..).rev().for_each(&mut free);
                } else {
                    objects.drain(..).for_each(&mut free);
                }
            }
        });
        Slice::ops(ROUNDS * OBJECTS, OBJECTS)
    }
}

/// kmem as it is and with the policy `Check`, one after the other.
fn checked(runner: &mut Runner, heaps: &Heaps) {
    let workload = |name| Workload::new(AREA, name, Unit::Ns);
    let pairs = workload("pair64_check")
        .with("kmem", pair(&heaps.checked))
        .with("kmem unchecked", pair(heaps.kmem));
    #[cfg(feature = "c-peers")]
    let pairs = pairs.with("mimalloc", pair(&MIMALLOC));
    runner.run(pairs);
    if runner.wants("replace_check") {
        let count = runner.size(10_000, 50_000);
        let replaces = workload("replace_check")
            .n(count)
            .with("kmem", replace(&heaps.checked, count, false))
            .with("kmem unchecked", replace(heaps.kmem, count, false));
        #[cfg(feature = "c-peers")]
        let replaces = replaces.with("mimalloc", replace(&MIMALLOC, count, false));
        runner.run(replaces);
    }
}

fn small(runner: &mut Runner, heaps: &Heaps) {
    let workload = |name| Workload::new(AREA, name, Unit::Ns);
    runner.run(programs!(workload("pair64"), heaps, stack, pair()));
    runner.run(programs!(
        workload("batch_fifo"),
        heaps,
        stack,
        batch(false)
    ));
    runner.run(programs!(workload("batch_lifo"), heaps, stack, batch(true)));
}

const BULK: usize = 32;
const BULK_ROUNDS: u64 = 1000;

fn bulk_of_singles(heap: impl Heap) -> impl Competitor {
    let mut objects = Vec::with_capacity(BULK);
    move |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for _ in 0..BULK_ROUNDS {
                for tag in 0..BULK as u64 {
                    objects.push(take(&heap, SMALL, tag));
                }
                for memory in objects.drain(..) {
                    // SAFETY: allocated above.
                    unsafe { heap.free(memory, SMALL) };
                }
            }
        });
        Slice::ops(BULK_ROUNDS * BULK as u64, BULK as u64)
    }
}

fn bulk_of_kmem(cache: Cache<'static, [u64; 8], SlabParts>) -> impl Competitor {
    let mut objects = [MaybeUninit::<NonNull<[u64; 8]>>::uninit(); BULK];
    move |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for _ in 0..BULK_ROUNDS {
                assert_eq!(cache.alloc_bulk(&mut objects), BULK, "out of memory");
                // SAFETY: all were given above.
                let given = objects.map(|object| unsafe { object.assume_init() });
                for (tag, object) in given.iter().enumerate() {
                    // SAFETY: just allocated.
                    unsafe { object.cast::<u64>().write(tag as u64) };
                }
                // SAFETY: from this cache, freed once.
                unsafe { cache.free_bulk(&given) };
            }
        });
        Slice::ops(BULK_ROUNDS * BULK as u64, BULK as u64)
    }
}

fn bulk(runner: &mut Runner, heaps: &Heaps) {
    if !runner.wants("bulk32") {
        return;
    }
    let cache = Cache::new(&heaps.kmem.slab, "bulk32");
    let workload = Workload::new(AREA, "bulk32", Unit::Ns)
        .with("kmem", bulk_of_kmem(cache))
        .with("rlsf", bulk_of_singles(&heaps.tlsf))
        .with("talc", bulk_of_singles(&heaps.talc))
        .with("linked_list_allocator", bulk_of_singles(&heaps.list))
        .with("kmem one by one", bulk_of_singles(heaps.kmem))
        .with("rusty_alloc", bulk_of_singles(&Rusty))
        .with("libc", bulk_of_singles(&HostMalloc));
    #[cfg(feature = "c-peers")]
    let workload = workload
        .with("mimalloc", bulk_of_singles(&MIMALLOC))
        .with("jemalloc", bulk_of_singles(&JEMALLOC));
    runner.run(workload.with("limit:stack", bulk_of_singles(&heaps.stack)));
}

/// Live objects of all sizes; gives them back when it is dropped.
struct Live<'h, H: Heap> {
    heap: &'h H,
    objects: Vec<(*mut u8, Layout)>,
    requested: usize,
    rng: Rng,
}

// SAFETY: the objects belong to this value, and heaps are shared between threads.
unsafe impl<H: Heap> Send for Live<'_, H> {}

impl<'h, H: Heap> Live<'h, H> {
    fn new(heap: &'h H, seed: u64) -> Self {
        Self {
            heap,
            objects: Vec::new(),
            requested: 0,
            rng: Rng::new(seed),
        }
    }

    fn fill(&mut self, count: u64) {
        while self.objects.len() < count as usize {
            let layout = any_layout(&mut self.rng);
            self.requested += layout.size();
            self.objects
                .push((take(self.heap, layout, layout.size() as u64), layout));
        }
    }

    /// Replaces a random object; answers the address of the new one.
    #[inline]
    fn replace(&mut self) -> *mut u8 {
        let at = self.rng.below(self.objects.len() as u64) as usize;
        let layout = any_layout(&mut self.rng);
        let (memory, old) = self.objects[at];
        // SAFETY: allocated by this value, replaced below.
        unsafe { self.heap.free(memory, old) };
        let memory = self.heap.alloc(layout);
        if memory.is_null() {
            // What was freed must not be freed again when this value is dropped.
            self.objects.swap_remove(at);
            panic!("out of memory");
        }
        // SAFETY: 8 bytes at least, aligned to 8, just allocated.
        unsafe { memory.cast::<u64>().write(layout.size() as u64) };
        self.objects[at] = (memory, layout);
        self.requested += layout.size();
        self.requested -= old.size();
        memory
    }

    fn shrink_to(&mut self, count: usize) {
        self.rng.shuffle(&mut self.objects);
        for (memory, layout) in self.objects.drain(count..) {
            self.requested -= layout.size();
            // SAFETY: allocated by this value.
            unsafe { self.heap.free(memory, layout) };
        }
    }

    /// The tags that were written are still there.
    fn check(&self) {
        for &(memory, layout) in self.objects.iter().take(1000) {
            // SAFETY: a live object of at least 8 bytes.
            let tag = unsafe { memory.cast::<u64>().read() };
            assert_eq!(tag, layout.size() as u64, "an object was overwritten");
        }
    }
}

impl<H: Heap> Drop for Live<'_, H> {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

const REPLACES: u64 = 1000;

fn replace<'h, H: Heap>(heap: &'h H, count: u64, is_limit: bool) -> impl Competitor + 'h {
    let mut live = Live::new(heap, 11);
    move |_: u64, watch: &mut Watch| {
        live.fill(count);
        watch.time(|| {
            for _ in 0..REPLACES {
                live.replace();
            }
        });
        if is_limit {
            return Slice::limit(REPLACES);
        }
        live.check();
        Slice::ops(REPLACES, live.objects.len() as u64)
    }
}

fn replace_2t<'h, H: Heap>(heap: &'h H, count: u64, is_limit: bool) -> impl Competitor + 'h {
    let both = [1, 2].map(|seed| Mutex::new(Live::new(heap, seed)));
    move |_: u64, watch: &mut Watch| {
        for live in &both {
            live.lock().expect("no thread panicked").fill(count);
        }
        let (elapsed, counts) = race(|cpu| {
            run_as(cpu);
            let mut live = both[cpu].lock().expect("no thread panicked");
            for _ in 0..REPLACES {
                live.replace();
            }
            live.objects.len() as u64
        });
        watch.add(elapsed);
        if is_limit {
            return Slice::limit(REPLACES);
        }
        for live in &both {
            live.lock().expect("no thread panicked").check();
        }
        Slice::ops(REPLACES, counts[0] + counts[1])
    }
}

macro_rules! replacing {
    ($workload:expr, $heaps:expr, $make:ident, $count:expr) => {{
        let workload = $workload
            .n($count)
            .with("kmem", $make($heaps.kmem, $count, false))
            .with("rlsf", $make(&$heaps.tlsf, $count, false))
            .with("talc", $make(&$heaps.talc, $count, false))
            .with("linked_list_allocator", $make(&$heaps.list, $count, false))
            .with(
                "buddy-slab-allocator",
                $make(&$heaps.buddy_slab, $count, false),
            )
            .with("slabmalloc", $make(&$heaps.slabmalloc, $count, false))
            .with("rusty_alloc", $make(&Rusty, $count, false))
            .with("libc", $make(&HostMalloc, $count, false));
        #[cfg(feature = "c-peers")]
        let workload = workload
            .with("mimalloc", $make(&MIMALLOC, $count, false))
            .with("jemalloc", $make(&JEMALLOC, $count, false))
            .with("snmalloc", $make(&SNMALLOC, $count, false));
        workload.with("limit:bump", $make(&$heaps.bump, $count, true))
    }};
}

fn replacing(runner: &mut Runner, heaps: &Heaps) {
    let count = runner.size(10_000, 100_000);
    if runner.wants("replace") {
        let workload = Workload::new(AREA, "replace", Unit::Ns);
        runner.run(replacing!(workload, heaps, replace, count));
    }
    if runner.wants("replace_2t") {
        let workload = Workload::new(AREA, "replace_2t", Unit::Ns).threads(2);
        runner.run(replacing!(workload, heaps, replace_2t, count / 4));
    }
}

const RING: usize = 1024;
const HANDED: usize = 20_000;

/// Looks again, and lets another thread run where that takes long: there may be fewer processors than threads.
fn wait(tries: &mut u32) {
    *tries += 1;
    if tries.is_multiple_of(256) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

fn produce(heap: &impl Heap, ring: &[AtomicPtr<u8>], seen: &AtomicUsize) -> u64 {
    let mut sum = 0;
    for number in 0..HANDED {
        let memory = take(heap, SMALL, number as u64);
        sum += number as u64;
        let mut tries = 0;
        while number - seen.load(Ordering::Acquire) >= RING {
            wait(&mut tries);
        }
        ring[number % RING].store(memory, Ordering::Release);
    }
    sum
}

fn consume(heap: &impl Heap, ring: &[AtomicPtr<u8>], seen: &AtomicUsize) -> u64 {
    let mut sum = 0;
    for number in 0..HANDED {
        let place = &ring[number % RING];
        let mut tries = 0;
        let memory = loop {
            let memory = place.load(Ordering::Acquire);
            if !memory.is_null() {
                break memory;
            }
            wait(&mut tries);
        };
        place.store(std::ptr::null_mut(), Ordering::Relaxed);
        seen.store(number + 1, Ordering::Release);
        // SAFETY: the producer wrote it and handed it over; freed once.
        unsafe {
            sum += memory.cast::<u64>().read();
            heap.free(memory, SMALL);
        }
    }
    sum
}

fn prodcons(heap: impl Heap) -> impl Competitor {
    let ring: Vec<AtomicPtr<u8>> = (0..RING).map(|_| AtomicPtr::default()).collect();
    move |_: u64, watch: &mut Watch| {
        let seen = AtomicUsize::new(0);
        let (elapsed, sums) = race(|cpu| {
            run_as(cpu);
            match cpu {
                0 => produce(&heap, &ring, &seen),
                _ => consume(&heap, &ring, &seen),
            }
        });
        watch.add(elapsed);
        assert_eq!(sums[0], sums[1], "objects were lost or overwritten");
        Slice::ops(HANDED as u64, sums[1])
    }
}

fn handing_over(runner: &mut Runner, heaps: &Heaps) {
    let workload = Workload::new(AREA, "prodcons", Unit::Ns).threads(2);
    runner.run(programs!(workload, heaps, bump, prodcons()));
}

/// Bytes taken by bytes asked for, in full use and after nine in ten were freed.
struct Overhead {
    full: f64,
    shrunk: f64,
}

/// For an arena that begins at `base`: everything below the highest byte ever used is taken.
fn overhead_of_arena(
    heap: &impl Heap,
    base: usize,
    count: u64,
    replaces: u64,
    seed: u64,
) -> Overhead {
    let mut live = Live::new(heap, seed);
    live.fill(count);
    let mut highest = live
        .objects
        .iter()
        .map(|(memory, layout)| memory.addr() + layout.size())
        .max()
        .unwrap_or(base);
    for _ in 0..replaces {
        highest = highest.max(live.replace().addr());
    }
    live.check();
    let taken = (highest - base) as f64;
    let full = taken / live.requested as f64;
    live.shrink_to(count as usize / 10);
    Overhead {
        full,
        shrunk: taken / live.requested as f64,
    }
}

fn overhead_of_kmem(machine: &Machine, count: u64, replaces: u64, seed: u64) -> Overhead {
    machine.slab.shrink();
    let before = machine.used_frames();
    let mut live = Live::new(machine, seed);
    live.fill(count);
    for _ in 0..replaces {
        live.replace();
    }
    live.check();
    let taken = || (machine.used_frames() - before) as f64 * 4096.0;
    let full = taken() / live.requested as f64;
    live.shrink_to(count as usize / 10);
    machine.slab.shrink();
    let shrunk = taken() / live.requested as f64;
    Overhead { full, shrunk }
}

/// Bytes that kmem has taken by the bytes of slabs with an object in use, after nine in ten objects were freed and all was shrunk.
fn beside_live_slabs(machine: &Machine, count: u64, seed: u64) -> f64 {
    machine.slab.shrink();
    let before = machine.used_frames();
    let mut live = Live::new(machine, seed);
    live.fill(count);
    live.shrink_to(count as usize / 10);
    machine.slab.shrink();
    let mut in_use = 0;
    machine
        .slab
        .caches(|cache| {
            // Slabs may be smaller than those of the preferred size; of an empty one it is taken that it is none of these.
            let empty = (cache.slabs - cache.active_slabs) * cache.frames_per_slab;
            in_use += cache.frames.saturating_sub(empty);
        })
        .expect("nothing interrupts");
    (machine.used_frames() - before) as f64 / in_use as f64
}

fn overheads(runner: &mut Runner) {
    let count = runner.size(5_000, 100_000);
    // The first-fit list needs a walk of all holes for each replacement.
    let replaces = runner.size(5_000, 2_000_000);
    let of_list = count / 5;
    let frames = runner.size(1 << 13, 1 << 17);
    let machine = Machine::leak(Region::new(frames));
    for (name, is_full) in [("overhead", true), ("overhead_shrunk", false)] {
        if !runner.wants(name) {
            continue;
        }
        let pick = move |overhead: Overhead| {
            Slice::value(if is_full {
                overhead.full
            } else {
                overhead.shrunk
            })
        };
        let of_kmem =
            |seed: u64, _: &mut Watch| pick(overhead_of_kmem(machine, count, replaces, seed));
        let of_tlsf = |seed: u64, _: &mut Watch| {
            let heap = Tlsf::new(Region::new(frames));
            let base = heap.region.base().addr();
            pick(overhead_of_arena(&heap, base, count, replaces, seed))
        };
        let of_talc = |seed: u64, _: &mut Watch| {
            let heap = Talc::new(Region::new(frames));
            let base = heap.region.base().addr();
            pick(overhead_of_arena(&heap, base, count, replaces, seed))
        };
        let of_list = |seed: u64, _: &mut Watch| {
            let heap = List::new(Region::new(frames));
            let base = heap.region.base().addr();
            pick(overhead_of_arena(&heap, base, of_list, of_list, seed))
        };
        runner.run(
            Workload::new(AREA, name, Unit::Bytes)
                .n(count)
                .with("kmem", of_kmem)
                .with("rlsf", of_tlsf)
                .with("talc", of_talc)
                .with("linked_list_allocator", of_list),
        );
    }
    if runner.wants("overhead_slabs") {
        let of_kmem =
            |seed: u64, _: &mut Watch| Slice::value(beside_live_slabs(machine, count, seed));
        runner.run(
            Workload::new(AREA, "overhead_slabs", Unit::Bytes)
                .n(count)
                .with("kmem", of_kmem),
        );
    }
}

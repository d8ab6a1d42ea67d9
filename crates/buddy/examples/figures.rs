//! What an operation costs on this machine: a 1 GiB zone, one thread, nanoseconds per single operation.
//!
//! `cargo run --release -p kmem-buddy --example figures`. The `compare` program of `benches/` sets such figures beside
//! those of other allocators; this one is for a quick look while the allocator is being changed.

use kmem_buddy::{BootMap, Buddy, Config, RegionKind, ZoneLimits};
use kmem_hal::{
    FrameRequest, FrameSink, FrameSource, OffsetMap, Order, OwnedFrame, PhysAddr, SingleCpu,
};

type Machine = Buddy<OffsetMap, SingleCpu>;

const FRAMES: u64 = 262_144;

fn machine() -> Machine {
    // Of the gigabyte only the last 2 MiB are backed: the allocator's own tables. No other frame is accessed.
    const BACKED: usize = 4 << 20;
    let memory = Box::leak(vec![0u8; BACKED].into_boxed_slice());
    let top = (memory.as_mut_ptr().expose_provenance() + BACKED) & !0x1f_ffff;
    let base = 1u64 << 30;
    let offset = top.wrapping_sub((base + FRAMES * 4096) as usize);
    let mut map: BootMap = BootMap::new();
    map.push(PhysAddr::new(base), FRAMES * 4096, RegionKind::Usable)
        .unwrap();
    // SAFETY: only the top of the range is accessed, and that is backed.
    let memory = unsafe { OffsetMap::new(offset, (base >> 12) + FRAMES) };
    // SAFETY: one thread.
    let buddy = Buddy::new(memory, unsafe { SingleCpu::new() });
    let config = Config::new()
        .limits(ZoneLimits::NORMAL_ONLY)
        .min_free_kib(0);
    // SAFETY: X1: the example's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &config) }.unwrap();
    buddy
}

unsafe extern "C" {
    fn clock_gettime(clock: i32, time: *mut [i64; 2]) -> i32;
}

/// Time that this thread has spent on a processor, in nanoseconds.
fn now() -> f64 {
    const THREAD_CPUTIME: i32 = 3;
    let mut time = [0; 2];
    // SAFETY: two words, as the call wants on 64-bit Linux.
    unsafe { clock_gettime(THREAD_CPUTIME, &mut time) };
    time[0] as f64 * 1e9 + time[1] as f64
}

/// What an unsynchronised array costs in this loop: the floor of a hot pair.
fn floor(pairs: u64) {
    let mut array: Vec<u32> = (0..64).collect();
    measure("floor", 2 * pairs, || {
        let start = now();
        for _ in 0..pairs {
            let entry = std::hint::black_box(&mut array).pop().unwrap();
            std::hint::black_box(&mut array).push(std::hint::black_box(entry));
        }
        now() - start
    });
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn shuffle(frames: &mut [OwnedFrame], random: &mut Random) {
    for at in (1..frames.len()).rev() {
        frames.swap(at, (random.next() % (at as u64 + 1)) as usize);
    }
}

fn request(order: u8) -> FrameRequest {
    FrameRequest::new(Order::new(order).unwrap()).movable()
}

/// Runs `work` nine times; prints median and minimum of nanoseconds for each of `operations`.
fn measure(name: &str, operations: u64, mut work: impl FnMut() -> f64) {
    let mut runs: Vec<f64> = (0..9).map(|_| work() / operations as f64).collect();
    runs.sort_by(f64::total_cmp);
    println!(
        "{name:<14} {:>8.2} ns  (min {:.2}, max {:.2})",
        runs[4], runs[0], runs[8]
    );
}

fn half_full(buddy: &Machine) -> Vec<OwnedFrame> {
    let mut random = Random(7);
    let mut all = Vec::new();
    while let Ok(frame) = buddy.alloc(&request(0)) {
        all.push(frame);
    }
    shuffle(&mut all, &mut random);
    for frame in all.drain(..FRAMES as usize / 2) {
        buddy.free(frame);
    }
    all
}

fn main() {
    // One part alone, for a profiler: `figures batch`.
    let only = std::env::args().nth(1);
    let wanted = |part: &str| only.as_deref().is_none_or(|only| only == part);
    if wanted("pairs") {
        pairs();
    }
    if wanted("bulk") {
        bulk();
    }
    if wanted("batch") {
        batch();
    }
    if wanted("mixed") {
        mixed(80, 2_000_000);
    }
    if wanted("blocks") {
        fragmentation();
        unmovable();
    }
}

fn pairs() {
    let pairs = 10_000_000;
    floor(pairs);
    for order in [0u8, 3, 9] {
        let buddy = machine();
        let kept = if order == 0 {
            half_full(&buddy)
        } else {
            Vec::new()
        };
        let wanted = request(order);
        measure(&format!("pair_o{order}"), 2 * pairs, || {
            let start = now();
            for _ in 0..pairs {
                let frame = buddy.alloc(&wanted).unwrap();
                buddy.free(std::hint::black_box(frame));
            }
            now() - start
        });
        drop(kept);
    }
}

fn bulk() {
    let buddy = machine();
    let mut random = Random(11);
    let mut frees = Vec::new();
    measure("bulk_alloc", FRAMES, || {
        let mut frames = Vec::with_capacity(FRAMES as usize);
        let start = now();
        while let Ok(frame) = buddy.alloc(&request(0)) {
            frames.push(frame);
        }
        let time = now() - start * FRAMES as f64 / frames.len() as f64;
        shuffle(&mut frames, &mut random);
        let count = frames.len();
        let start = now();
        for frame in frames {
            buddy.free(frame);
        }
        frees.push((now() - start) / count as f64);
        time
    });
    let mut frees = frees.into_iter();
    measure("bulk_free", 1, || frees.next().unwrap());
}

fn batch() {
    let buddy = machine();
    let mut frames = Vec::with_capacity(FRAMES as usize);
    let batches = 2048;
    measure("batch_alloc", 64 * batches, || {
        let start = now();
        for _ in 0..batches {
            buddy
                .alloc_batch(&request(0), 64, &mut |frame| frames.push(frame))
                .unwrap();
        }
        let time = now() - start;
        buddy.free_batch(&mut || frames.pop());
        time
    });
}

/// Orders geometric (half are 0, one in 512 is 9), the zone so many per cent full.
fn mixed(percent: u64, operations: u64) {
    let buddy = machine();
    let mut random = Random(13);
    let mut live: Vec<OwnedFrame> = Vec::new();
    let mut used = 0;
    let mut refused = 0;
    let mut churn = |count: u64| {
        let start = now();
        for _ in 0..count {
            let number = random.next();
            if used * 100 < FRAMES * percent && number & 1 == 0 || live.is_empty() {
                let order = ((number >> 8 | 1 << 9).trailing_zeros()) as u8;
                match buddy.alloc(&request(order)) {
                    Ok(frame) => {
                        used += frame.order().frames();
                        live.push(frame);
                    }
                    Err(_) => refused += 1,
                }
            } else if used * 100 >= FRAMES * percent || number & 1 == 1 {
                let at = (number >> 8) as usize % live.len();
                let frame = live.swap_remove(at);
                used -= frame.order().frames();
                buddy.free(frame);
            }
        }
        now() - start
    };
    churn(operations);
    let fill = operations;
    measure("mixed_80", fill, || churn(fill));
    println!("mixed_80       {refused:>8} refused");
    buddy.check().unwrap();
}

fn fragmentation() {
    let buddy = machine();
    let mut random = Random(17);
    let mut live: Vec<OwnedFrame> = Vec::new();
    let mut used = 0;
    let mut refused = 0;
    for _ in 0..2_000_000 {
        let number = random.next();
        if used * 100 < FRAMES * 90 {
            let order = ((number >> 8 | 1 << 9).trailing_zeros()) as u8;
            match buddy.alloc(&request(order)) {
                Ok(frame) => {
                    used += frame.order().frames();
                    live.push(frame);
                }
                Err(_) => {
                    refused += 1;
                    let frame = live.swap_remove((number >> 8) as usize % live.len());
                    used -= frame.order().frames();
                    buddy.free(frame);
                }
            }
        } else {
            let frame = live.swap_remove((number >> 8) as usize % live.len());
            used -= frame.order().frames();
            buddy.free(frame);
        }
    }
    while used * 2 > FRAMES {
        let at = random.next() as usize % live.len();
        let frame = live.swap_remove(at);
        used -= frame.order().frames();
        buddy.free(frame);
    }
    println!(
        "frag_90_50     {:>8} of 256 huge blocks ({refused} refused)",
        huge(&buddy)
    );
}

fn unmovable() {
    let buddy = machine();
    let mut movable = Vec::new();
    let mut pinned = 0;
    for index in 0.. {
        let wanted = if index % 16 == 0 {
            FrameRequest::ONE
        } else {
            request(0)
        };
        match buddy.alloc(&wanted) {
            Ok(frame) if index % 16 == 0 => {
                pinned += 1;
                drop(frame);
            }
            Ok(frame) => movable.push(frame),
            Err(_) => break,
        }
    }
    for frame in movable {
        buddy.free(frame);
    }
    println!(
        "unmovable_1in16 {:>7} huge blocks of {}",
        huge(&buddy),
        (FRAMES - pinned) / 512
    );
}

fn huge(buddy: &Machine) -> u64 {
    buddy.drain_all();
    buddy
        .zones()
        .map(|zone| zone.blocks[9] + 2 * zone.blocks[10])
        .sum()
}

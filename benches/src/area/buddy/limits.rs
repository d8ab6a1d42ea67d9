//! What no allocator can do without: arrays of frame numbers, with ever more of what a kernel's must have.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, compiler_fence};

use super::{MIXED_OPS, PAIRS};
use crate::clock::Watch;
use crate::harness::{Competitor, Slice};
use crate::lock::Locked;
use crate::mixed::{Frames, Mixed, TOP, pairs};
use crate::platform::{BASE, CPUS, ThreadCpus};

/// A pair of an array that nobody else could use.
pub(super) fn stack_pair(frames: u64) -> impl Competitor {
    let mut free: Vec<u32> = (0..frames as u32).collect();
    move |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for _ in 0..PAIRS {
                let frame = std::hint::black_box(&mut free).pop();
                free.extend(std::hint::black_box(frame));
            }
        });
        Slice::limit(2 * PAIRS)
    }
}

/// An array for each CPU, without a flag, a lock or a check.
pub(super) struct Arrays([std::cell::UnsafeCell<Vec<u32>>; CPUS as usize]);

// SAFETY: a thread uses the array of its own number only (`run_as`).
unsafe impl Sync for Arrays {}

impl Arrays {
    pub fn new(frames: u64) -> Self {
        Self(std::array::from_fn(|_| {
            (0..frames as u32).collect::<Vec<_>>().into()
        }))
    }

    #[inline(always)]
    fn own(&self) -> Option<*mut Vec<u32>> {
        let pin = ThreadCpus::all();
        // What is read before a pin is not what is read after it.
        compiler_fence(SeqCst);
        let cpu = kmem_hal::Cpu::pin(&pin).id().index();
        self.0.get(cpu).map(std::cell::UnsafeCell::get)
    }
}

impl Frames for Arrays {
    #[inline(always)]
    fn alloc(&self, _order: u8) -> Option<u64> {
        // SAFETY: this thread's array, for the length of this call.
        let frame = unsafe { &mut *self.own()? }.pop()?;
        Some(u64::from(frame) + BASE)
    }
    #[inline(always)]
    fn free(&self, frame: u64, _order: u8) {
        let Some(own) = self.own() else { return };
        // SAFETY: as above.
        let own = unsafe { &mut *own };
        if own.len() < own.capacity() {
            own.push((frame - BASE) as u32);
        }
    }
}

/// The same with the word that an interrupt on the same CPU looks at: busy while the array is changed. What is busy serves nobody.
pub(super) struct GuardedArrays {
    arrays: Arrays,
    busy: [AtomicU32; CPUS as usize],
}

impl GuardedArrays {
    pub fn new(frames: u64) -> Self {
        Self::over(Arrays::new(frames))
    }

    fn over(arrays: Arrays) -> Self {
        let busy = [const { AtomicU32::new(0) }; CPUS as usize];
        Self { arrays, busy }
    }

    #[inline(always)]
    fn guarded<R>(&self, change: impl FnOnce() -> Option<R>) -> Option<R> {
        let pin = ThreadCpus::all();
        let busy = self.busy.get(kmem_hal::Cpu::pin(&pin).id().index())?;
        if busy.load(Relaxed) != 0 {
            return None;
        }
        busy.store(1, Relaxed);
        // An interrupt on this CPU sees its stores in program order; other CPUs never look.
        compiler_fence(SeqCst);
        let result = change();
        compiler_fence(SeqCst);
        busy.store(0, Relaxed);
        result
    }
}

impl Frames for GuardedArrays {
    #[inline(always)]
    fn alloc(&self, order: u8) -> Option<u64> {
        self.guarded(|| self.arrays.alloc(order))
    }
    #[inline(always)]
    fn free(&self, frame: u64, order: u8) {
        self.guarded(|| {
            self.arrays.free(frame, order);
            Some(())
        });
    }
}

/// A pair of order 0 of one of these.
pub(super) fn limit_pair(frames: impl Frames) -> impl Competitor {
    move |_: u64, watch: &mut Watch| {
        watch.time(|| pairs(&frames, 0, PAIRS));
        Slice::limit(2 * PAIRS)
    }
}

/// A guarded array of one CPU over a bit for each frame, which it is filled from a word at a time under a lock: what is left of an
/// allocator that knows nothing of zones, orders, types and marks. Frees go to the bits.
pub(super) struct RefilledArray {
    array: GuardedArrays,
    words: Locked<(Vec<u64>, usize)>,
}

impl RefilledArray {
    pub fn new(frames: u64) -> Self {
        let array = GuardedArrays::over(Arrays(std::array::from_fn(|_| {
            Vec::with_capacity(64).into()
        })));
        let words = Locked::new((vec![u64::MAX; frames as usize / 64], 0));
        Self { array, words }
    }

    #[cold]
    #[inline(never)]
    fn refill(&self) -> Option<u64> {
        let own = self.array.arrays.own()?;
        self.words.with(|(words, from)| {
            let at = *from + words[*from..].iter().position(|word| *word != 0)?;
            let mut bits = std::mem::take(&mut words[at]);
            *from = at;
            while bits != 0 {
                let bit = 63 - bits.leading_zeros();
                bits &= !(1 << bit);
                // SAFETY: this thread's array.
                unsafe { &mut *own }.push(at as u32 * 64 + bit);
            }
            Some(())
        })?;
        self.array.alloc(0)
    }
}

impl Frames for RefilledArray {
    #[inline(always)]
    fn alloc(&self, order: u8) -> Option<u64> {
        self.array.alloc(order).or_else(|| self.refill())
    }
    fn free(&self, frame: u64, _order: u8) {
        self.words.with(|(words, from)| {
            let number = (frame - BASE) as usize;
            words[number / 64] |= 1 << (number % 64);
            *from = 0;
        });
    }
}

/// Vectors of blocks by order that never run out: what a workload costs without an allocator.
struct Endless(std::cell::RefCell<[Vec<u64>; TOP as usize + 1]>);

// SAFETY: used by the thread that made it.
unsafe impl Sync for Endless {}

impl Frames for Endless {
    #[inline]
    fn alloc(&self, order: u8) -> Option<u64> {
        let frame = self.0.borrow_mut()[usize::from(order)].pop();
        Some(frame.unwrap_or(BASE))
    }
    #[inline]
    fn free(&self, frame: u64, order: u8) {
        self.0.borrow_mut()[usize::from(order)].push(frame);
    }
}

/// The loop of `mixed_80` alone.
pub(super) fn mixed_loop(size: u64) -> impl Competitor {
    let endless = Endless(Default::default());
    let mut state = Mixed::new(size / 10 * 8, 1);
    move |index: u64, watch: &mut Watch| {
        if index == 0 {
            state.fill(&endless);
        }
        watch.time(|| {
            for _ in 0..MIXED_OPS {
                state.step(&endless);
            }
        });
        Slice::limit(MIXED_OPS)
    }
}

//! Frame allocators as the buddy workloads see them, and the workload of mixed orders.

use crate::rng::Rng;

/// The largest order of [`Mixed`].
pub const TOP: u8 = 9;

/// An allocator of frames in blocks of a power of two.
pub trait Frames: Sync {
    /// Takes a block of `1 << order` frames; the number of its first frame.
    fn alloc(&self, order: u8) -> Option<u64>;
    /// Gives a block back.
    fn free(&self, frame: u64, order: u8);
    /// Takes one frame and says whether its content could be moved later.
    fn alloc_frame(&self, movable: bool) -> Option<u64> {
        let _ = movable;
        self.alloc(0)
    }
    /// Takes frames until `out` is full; answers how many.
    fn alloc_batch(&self, out: &mut Vec<u64>, count: usize) -> usize {
        for taken in 0..count {
            match self.alloc(0) {
                Some(frame) => out.push(frame),
                None => return taken,
            }
        }
        count
    }
    /// Gives all frames back.
    fn free_batch(&self, frames: &mut Vec<u64>) {
        for frame in frames.drain(..) {
            self.free(frame, 0);
        }
    }
    /// Puts what is kept aside for fast paths back, where there is such a thing.
    fn settle(&self) {}
}

impl<F: Frames + ?Sized> Frames for &F {
    #[inline(always)]
    fn alloc(&self, order: u8) -> Option<u64> {
        (**self).alloc(order)
    }
    #[inline(always)]
    fn free(&self, frame: u64, order: u8) {
        (**self).free(frame, order);
    }
    #[inline]
    fn alloc_frame(&self, movable: bool) -> Option<u64> {
        (**self).alloc_frame(movable)
    }
    #[inline]
    fn alloc_batch(&self, out: &mut Vec<u64>, count: usize) -> usize {
        (**self).alloc_batch(out, count)
    }
    #[inline]
    fn free_batch(&self, frames: &mut Vec<u64>) {
        (**self).free_batch(frames);
    }
    #[inline]
    fn settle(&self) {
        (**self).settle();
    }
}

/// An allocation and a free of one order, in turns; how many allocations were answered.
///
/// A call through a reference has to cost what a call costs: `counts` counts this loop, too.
pub fn pairs(frames: &impl Frames, order: u8, count: u64) -> u64 {
    let mut answered = 0;
    for _ in 0..count {
        if let Some(frame) = frames.alloc(order) {
            answered += 1;
            frames.free(frame, order);
        }
    }
    answered
}

/// An order: half of them 0, a quarter 1, and so on to [`TOP`].
pub fn order(rng: &mut Rng) -> u8 {
    (rng.next().trailing_zeros() as u8).min(TOP)
}

/// Random allocations and frees of mixed orders around a level of use.
#[derive(Debug)]
pub struct Mixed {
    live: Vec<(u64, u8)>,
    used: u64,
    target: u64,
    rng: Rng,
    /// Allocations that were refused.
    pub refused: u64,
    /// Allocations that were tried.
    pub tried: u64,
}

impl Mixed {
    /// Nothing allocated yet; `target` frames in use is where it settles.
    #[must_use]
    pub fn new(target: u64, seed: u64) -> Self {
        Self {
            live: Vec::with_capacity(target as usize),
            used: 0,
            target,
            rng: Rng::new(seed),
            refused: 0,
            tried: 0,
        }
    }

    /// Frames in use.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Allocates until the target is reached.
    pub fn fill(&mut self, frames: &impl Frames) {
        let mut refused = 0;
        while self.used < self.target && refused < 1000 {
            let before = self.refused;
            self.alloc(frames);
            refused += self.refused - before;
        }
    }

    /// One allocation or one free: a free above the target, below it one of the two at random, three to one for allocating.
    #[inline]
    pub fn step(&mut self, frames: &impl Frames) {
        if self.used >= self.target || (self.rng.next() & 3 == 0 && !self.live.is_empty()) {
            self.free_one(frames);
        } else {
            self.alloc(frames);
        }
    }

    #[inline]
    fn alloc(&mut self, frames: &impl Frames) {
        let order = order(&mut self.rng);
        self.tried += 1;
        match frames.alloc(order) {
            Some(frame) => {
                self.used += 1 << order;
                self.live.push((frame, order));
            }
            None => self.refused += 1,
        }
    }

    #[inline]
    fn free_one(&mut self, frames: &impl Frames) {
        let at = self.rng.below(self.live.len() as u64) as usize;
        let (frame, order) = self.live.swap_remove(at);
        self.used -= 1 << order;
        frames.free(frame, order);
    }

    /// Frees at random until at most `target` frames are in use.
    pub fn shrink_to(&mut self, frames: &impl Frames, target: u64) {
        while self.used > target {
            self.free_one(frames);
        }
    }

    /// Frees everything.
    pub fn clear(&mut self, frames: &impl Frames) {
        for (frame, order) in self.live.drain(..) {
            frames.free(frame, order);
        }
        self.used = 0;
    }
}

/// Allocates mixed orders until `target` frames are out, checks that no two blocks overlap and that each is aligned and inside
/// `0..frames` above the lowest, and frees all.
///
/// # Errors
///
/// What is wrong with which block.
pub fn verify(allocator: &impl Frames, base: u64, frames: u64, target: u64) -> Result<(), String> {
    let mut taken = vec![false; frames as usize];
    let mut blocks = Vec::new();
    let mut used = 0;
    let mut refused = 0;
    let mut rng = Rng::new(0xfeed);
    let mut result = Ok(());
    while used < target {
        let order = order(&mut rng);
        let Some(frame) = allocator.alloc(order) else {
            refused += 1;
            if refused > 1000 {
                result = Err(format!("refuses with {used} of {frames} frames in use"));
                break;
            }
            continue;
        };
        blocks.push((frame, order));
        used += 1 << order;
        let inside = frame
            .checked_sub(base)
            .filter(|first| first + (1 << order) <= frames);
        let Some(first) = inside else {
            result = Err(format!("frame {frame:#x} of order {order} is outside"));
            break;
        };
        if !frame.is_multiple_of(1 << order) {
            result = Err(format!("frame {frame:#x} is not aligned to order {order}"));
            break;
        }
        let places = &mut taken[first as usize..(first + (1 << order)) as usize];
        if places.contains(&true) {
            result = Err(format!("frame {frame:#x} of order {order} was given twice"));
            break;
        }
        places.fill(true);
    }
    for (frame, order) in blocks {
        allocator.free(frame, order);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Gives every frame once, aligned, and overlaps where it is told to.
    struct Bump {
        next: Mutex<u64>,
        stuck: bool,
        misaligned: bool,
    }

    impl Frames for Bump {
        fn alloc(&self, order: u8) -> Option<u64> {
            let mut next = self.next.lock().unwrap();
            let first = if self.misaligned {
                *next
            } else {
                next.next_multiple_of(1 << order)
            };
            if !self.stuck {
                *next = first + (1 << order);
            }
            Some(first)
        }
        fn free(&self, _frame: u64, _order: u8) {}
    }

    fn bump(stuck: bool, misaligned: bool) -> Bump {
        Bump {
            next: Mutex::new(0),
            stuck,
            misaligned,
        }
    }

    #[test]
    fn overlaps_misalignment_and_strangers_are_found() {
        assert_eq!(verify(&bump(false, false), 0, 1 << 16, 1 << 12), Ok(()));
        let twice = verify(&bump(true, false), 0, 1 << 16, 1 << 12);
        assert!(twice.unwrap_err().contains("given twice"));
        let crooked = verify(&bump(false, true), 0, 1 << 16, 1 << 12);
        assert!(crooked.unwrap_err().contains("not aligned"));
        let outside = verify(&bump(false, false), 0, 64, 1 << 12);
        assert!(outside.unwrap_err().contains("outside"));
    }

    #[test]
    fn orders_halve() {
        let mut rng = Rng::new(3);
        let mut counts = [0u32; TOP as usize + 1];
        for _ in 0..100_000 {
            counts[order(&mut rng) as usize] += 1;
        }
        assert!((48_000..52_000).contains(&counts[0]), "{counts:?}");
        assert!((23_000..27_000).contains(&counts[1]), "{counts:?}");
        assert!(counts[9] > 100, "{counts:?}");
    }

    #[test]
    fn use_settles_at_the_target() {
        let frames = bump(false, false);
        let mut mixed = Mixed::new(10_000, 1);
        mixed.fill(&frames);
        for _ in 0..10_000 {
            mixed.step(&frames);
            assert!((9_000..11_000).contains(&mixed.used()));
        }
        mixed.shrink_to(&frames, 5_000);
        assert!(mixed.used() <= 5_000);
        mixed.clear(&frames);
        assert_eq!(mixed.used(), 0);
    }
}

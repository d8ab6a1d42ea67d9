//! What a CPU tells the others about its readers: the invariants are those of [`super::epoch`].

use super::barrier::Barrier;
use super::epoch::Plant;
use crate::sync::{AtomicU64, LocalBool, LocalU32, Ordering, compiler_fence};

/// What a CPU tells the others about its readers.
#[derive(Debug)]
pub(super) struct Announcement {
    /// 0: nobody reads. Otherwise `epoch << 1 | 1`.
    word: AtomicU64,
    depth: LocalU32,
    pub fenced: LocalBool,
}

const ACTIVE: u64 = 1;

impl Announcement {
    crate::const_new! {
        /// Nobody reads.
        pub fn new() -> Self {
            Self {
                word: AtomicU64::new(0),
                depth: LocalU32::new(0),
                fenced: LocalBool::new(false),
            }
        }
    }

    /// Begins a section on the own CPU. The order of the lines is what `I2` rests on.
    #[inline]
    pub fn enter(&self, global: &AtomicU64, barrier: &impl Barrier, plant: Plant) {
        self.depth.set(self.depth.get() + 1);
        compiler_fence(Ordering::SeqCst);
        if !self.fenced.get() {
            // Where a context is announced that this one interrupted, or that calls it from inside `read_with`, the word is
            // that one's, and stays until this one is done.
            let own = self.announce(global);
            if plant != Plant::NoReaderFence {
                barrier.reader();
            }
            if own {
                self.fenced.set(true);
            }
        }
        compiler_fence(Ordering::SeqCst);
    }

    /// Announces a reader where none is announced; whether that was so.
    #[inline(always)]
    pub fn announce(&self, global: &AtomicU64) -> bool {
        let own = self.word.load(Ordering::Relaxed) == 0;
        if own {
            // Acquire: no read of the section is older than the epoch that it announces.
            let epoch = global.load(Ordering::Acquire);
            self.word.store(epoch << 1 | ACTIVE, Ordering::Relaxed);
        }
        own
    }

    /// Ends a section on the own CPU.
    #[inline]
    pub fn leave(&self) {
        compiler_fence(Ordering::SeqCst);
        let depth = self.depth.get() - 1;
        self.depth.set(depth);
        compiler_fence(Ordering::SeqCst);
        if depth == 0 && self.fenced.get() {
            self.fenced.set(false);
            self.silence();
        }
    }

    /// Takes the own announcement back.
    #[inline(always)]
    pub fn silence(&self) {
        compiler_fence(Ordering::SeqCst);
        // Release: what was read happens before whatever the grace period allows (G3).
        self.word.store(0, Ordering::Release);
    }

    /// Whether a reader here began in another epoch than `epoch`.
    pub fn blocks(&self, epoch: u64) -> bool {
        let word = self.word.load(Ordering::Acquire);
        word != 0 && word >> 1 != epoch
    }
}

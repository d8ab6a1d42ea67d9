//! What one CPU knows of the roots that it has loaded, and how often each space was changed.
//!
//! ```text
//!   AsidArea   loaded ──> frame + 1 | SWITCHING | 0       read by whoever flushes
//!              lazy                                        read by whoever flushes
//!              slot 0      the kernel's root, tag 0
//!              slot 1..=6  root, generation, user tag stale?     this CPU's own
//! ```
//!
//! Invariants
//! - `A1`: under the tag of a slot the CPU holds translations of the slot's root alone (and of its user root under the paired tag, unless
//!   that is marked stale).
//! - `A2`: what it holds there misses no change of the root up to the slot's generation.
//! - `A3`: `loaded` is `SWITCHING` from before the CPU reads the generation of a root that it is about to load until it has loaded it.

use kmem_hal::sync::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use kmem_hal::{Asid, Frame};

/// Tags that a CPU deals out to spaces, as Linux has it: few enough that a look through them costs nothing.
#[doc(alias = "TLB_NR_DYN_ASIDS")]
pub(super) const SPACES: usize = 6;

/// What is added to a space's tag for its user root (Linux: bit 11 too).
#[doc(alias = "X86_CR3_PTI_PCID_USER_BIT")]
pub(super) const USER_TAG: u16 = 1 << 11;

/// `loaded` while a CPU is between two roots.
pub(super) const SWITCHING: u64 = u64::MAX;

/// A root by its frame; 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name(pub u64);

impl Name {
    pub fn of(root: Frame) -> Self {
        Self(root.number() + 1)
    }

    pub fn frame(self) -> Option<Frame> {
        self.0.checked_sub(1).and_then(Frame::new)
    }
}

/// A tag of one CPU, and whose translations are under it.
#[derive(Debug)]
pub(super) struct Slot {
    root: AtomicU64,
    generation: AtomicU64,
    user_stale: AtomicBool,
}

impl Slot {
    kmem_hal::const_new! {
        fn new() -> Self {
            Self {
                root: AtomicU64::new(0),
                generation: AtomicU64::new(0),
                user_stale: AtomicBool::new(true),
            }
        }
    }

    pub fn holds(&self, name: Name) -> bool {
        self.root.load(Ordering::Relaxed) == name.0
    }

    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// `A2` holds for this generation.
    pub fn set_generation(&self, generation: u64) {
        self.generation.store(generation, Ordering::Relaxed);
    }

    pub fn assign(&self, name: Name, generation: u64) {
        self.root.store(name.0, Ordering::Relaxed);
        self.set_generation(generation);
    }

    /// Whatever is under the tag, it is nobody's.
    pub fn forget(&self) {
        self.assign(Name(0), 0);
    }

    /// What is under the user's tag goes before the CPU uses it again.
    pub fn spoil_user(&self) {
        self.user_stale.store(true, Ordering::Relaxed);
    }

    /// Whether the user's tag must be dropped now.
    pub fn take_user_stale(&self) -> bool {
        let stale = self.user_stale.load(Ordering::Relaxed);
        self.user_stale.store(false, Ordering::Relaxed);
        stale
    }
}

/// What an [`AsidMmu`](super::AsidMmu) keeps for one CPU: some 200 bytes.
#[doc(alias = "cpu_tlbstate")]
#[derive(Debug)]
pub struct AsidArea {
    pub(super) loaded: AtomicU64,
    pub(super) lazy: AtomicBool,
    /// The slot of the loaded root.
    current: AtomicUsize,
    /// The slot that the next new space gets.
    next: AtomicUsize,
    /// Set while the CPU is in `load_root`: an interrupt finds it so.
    pub(super) busy: AtomicBool,
    /// Set by an interrupt that found it busy: what was loaded must be loaded again.
    pub(super) missed: AtomicBool,
    /// The generation of the flush that this CPU is about to ask for; 0 for none.
    stamp: AtomicU64,
    pub(super) slots: [Slot; SPACES + 1],
}

impl AsidArea {
    kmem_hal::const_new! {
        /// The area of a CPU that has loaded nothing yet.
        pub fn new() -> Self {
            Self {
                loaded: AtomicU64::new(0),
                lazy: AtomicBool::new(false),
                current: AtomicUsize::new(0),
                next: AtomicUsize::new(1),
                busy: AtomicBool::new(false),
                missed: AtomicBool::new(false),
                stamp: AtomicU64::new(0),
                slots: [
                    Slot::new(), Slot::new(), Slot::new(), Slot::new(), Slot::new(), Slot::new(), Slot::new(),
                ],
            }
        }
    }

    pub(super) fn has_loaded(&self, name: Name) -> bool {
        let loaded = self.loaded.load(Ordering::SeqCst);
        loaded == name.0 || loaded == SWITCHING
    }

    pub(super) fn is_lazy(&self) -> bool {
        self.lazy.load(Ordering::SeqCst)
    }

    pub(super) fn current(&self) -> (usize, &Slot) {
        let number = self.current.load(Ordering::Relaxed);
        (number, &self.slots[number])
    }

    pub(super) fn set_current(&self, number: usize) {
        self.current.store(number, Ordering::Relaxed);
    }

    /// The slot of a space, and whether it is the space's already.
    pub(super) fn slot_for(&self, name: Name, slots: usize) -> (usize, bool) {
        if let Some(number) = (1..=slots).find(|&number| self.slots[number].holds(name)) {
            return (number, true);
        }
        let number = self.next.load(Ordering::Relaxed);
        let next = if number >= slots { 1 } else { number + 1 };
        self.next.store(next, Ordering::Relaxed);
        (number, false)
    }

    pub(super) fn put_stamp(&self, stamp: u64) {
        self.stamp.store(stamp, Ordering::Relaxed);
    }

    pub(super) fn stamp(&self) -> u64 {
        self.stamp.load(Ordering::Relaxed)
    }
}

impl Default for AsidArea {
    fn default() -> Self {
        Self::new()
    }
}

/// The tag of a slot, where the processor has tags.
pub(super) fn tag_of(number: usize, tagged: bool) -> Asid {
    Asid::new(if tagged { number as u16 } else { 0 })
}

//! Areas: runs of kernel pages with a purpose, and the memory in which they are described.
//!
//! ```text
//!   range in the tree   | guard below | usable pages ............ | guard above |
//!                         0 or more                                 1 page
//!
//!   tree ── range ──> word = where its Area is          a frame: | next frame | Area | Area | ... 102
//! ```
//!
//! Guards are never mapped: running off either end faults at once instead of reaching the neighbour.
//!
//! What changes while an area lives (freed, waiting, ready to be used again) changes in its description, so that the tree is
//! edited only when addresses are taken for the first time. Descriptions lie in frames that this module takes one at a time
//! and keeps; freeing an area needs no memory.
//!
//! Invariant `D1`: an [`AreaRef`] is made by [`Areas::take`], and used with the same [`Areas`] until it is given back: so it
//! points into one of its frames, which nobody else touches.

use core::panic::Location;
use core::ptr::NonNull;

use kmem_hal::{
    Frame, FrameSink, FrameTag, Order, OwnedFrame, PAGE_SIZE, Page, PageRange, PhysMap,
};
use kmem_paging::Env;
use kmem_vma_tree::Value;

/// What an area is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum AreaKind {
    /// Memory of frames that need not follow each other.
    Vmalloc = 0,
    /// Given frames, mapped one after the other.
    Vmap = 1,
    /// Device registers.
    Ioremap = 2,
    /// A kernel stack.
    Stack = 3,
    /// A buffer that a device reads and writes.
    Dma = 4,
    /// Code and data of a loadable module.
    Module = 5,
}

impl AreaKind {
    /// As `vmallocinfo` prints it. Linux knows stacks and modules by their caller; here they have names.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vmalloc => "vmalloc",
            Self::Vmap => "vmap",
            Self::Ioremap => "ioremap",
            Self::Stack => "stack",
            Self::Dma => "dma-coherent",
            Self::Module => "module",
        }
    }
}

/// Where an area stands in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Its user's, or being mapped for one.
    Used,
    /// Freed: its leaves are there or were not flushed everywhere.
    Freed,
    /// Nothing is mapped; its addresses can be used again.
    Ready,
}

/// The most guard pages below an area.
pub(crate) const MAX_GUARD: u64 = 0xff;

/// What is known of an area.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Area {
    /// The pages that it takes in the tree.
    pub range: PageRange,
    /// The next one of the chain that it is in.
    pub next: Option<AreaRef>,
    pub caller: Option<&'static Location<'static>>,
    pub kind: AreaKind,
    pub stage: Stage,
    pub guard_below: u8,
    /// Whether its frames belong to somebody else.
    pub borrowed: bool,
}

impl Area {
    /// Its mapped pages.
    pub fn usable(&self) -> Option<PageRange> {
        let first = Page::new(self.range.first().number() + u64::from(self.guard_below))?;
        PageRange::new(first, self.range.last().checked_sub(1)?)
    }
}

/// Where an area is described (`D1`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AreaRef(NonNull<Area>);

// SAFETY: a place in memory that is reached only through the `Areas` that it belongs to, which is behind a lock.
unsafe impl Send for AreaRef {}

impl Value for AreaRef {
    fn to_word(self) -> u64 {
        self.0.as_ptr().expose_provenance() as u64
    }

    fn from_word(word: u64) -> Self {
        let area = core::ptr::with_exposed_provenance_mut(word as usize);
        // The tree holds what `to_word` made of a pointer that is not null.
        Self(NonNull::new(area).unwrap_or(NonNull::dangling()))
    }
}

/// The first bytes of a frame of descriptions.
struct Header {
    next: Option<Frame>,
}

const FIRST: usize = size_of::<Header>().next_multiple_of(align_of::<Area>());
const PER_FRAME: usize = (PAGE_SIZE as usize - FIRST) / size_of::<Area>();

/// Memory for descriptions.
#[derive(Debug)]
pub(crate) struct Areas {
    free: Option<AreaRef>,
    frames: Option<Frame>,
    frame_count: u64,
}

impl Areas {
    pub const fn new() -> Self {
        Self {
            free: None,
            frames: None,
            frame_count: 0,
        }
    }

    /// Frames that hold places.
    pub fn frame_count(&self) -> u64 {
        self.frame_count
    }

    /// What is known of the area at `at`.
    #[inline]
    pub fn get(&self, at: AreaRef) -> Area {
        // SAFETY: `D1`: the place is initialised and in a frame of `self`, whose borrow keeps writers away.
        unsafe { at.0.read() }
    }

    /// Writes what is known of the area at `at`.
    #[inline]
    pub fn set(&mut self, at: AreaRef, area: Area) {
        // SAFETY: `D1`, and `&mut self` keeps everybody else away.
        unsafe { at.0.write(area) }
    }

    /// A place for a description; `None` where a frame is needed first.
    pub fn take(&mut self) -> Option<AreaRef> {
        let at = self.free?;
        self.free = self.get(at).next;
        Some(at)
    }

    /// Takes a place back.
    pub fn give(&mut self, at: AreaRef) {
        let mut area = self.get(at);
        area.next = self.free;
        self.set(at, area);
        self.free = Some(at);
    }

    /// Whether [`take`](Self::take) needs a frame.
    pub fn is_empty(&self) -> bool {
        self.free.is_none()
    }

    /// Makes places of a frame.
    ///
    /// # Errors
    ///
    /// The frame, where it is out of reach.
    pub fn extend<E: Env>(&mut self, env: &E, frame: OwnedFrame) -> Result<(), OwnedFrame> {
        if frame.order() != Order::ZERO || !env.map().reach().contains(frame.first()) {
            return Err(frame);
        }
        let (first, _) = frame.into_raw();
        if let Some(slot) = env.slots().slot(first) {
            slot.claim(FrameTag::Kernel, Order::ZERO);
        }
        let base = env.map().to_ptr(first.start());
        // SAFETY: P1: a page is valid there, page-aligned; it was this call's, and is in the chain of `self` from now on.
        unsafe { base.cast::<Header>().write(Header { next: self.frames }) };
        self.frames = Some(first);
        self.frame_count += 1;
        for index in (0..PER_FRAME).rev() {
            // SAFETY: inside the page, by the size of `PER_FRAME`; aligned, since `FIRST` and the size are multiples.
            let place = unsafe { base.add(FIRST).cast::<Area>().add(index) };
            let blank = Area {
                range: PageRange::single(Page::ZERO),
                next: self.free,
                caller: None,
                kind: AreaKind::Vmalloc,
                stage: Stage::Ready,
                guard_below: 0,
                borrowed: false,
            };
            // SAFETY: as above.
            unsafe { place.write(blank) };
            self.free = NonNull::new(place).map(AreaRef);
        }
        Ok(())
    }

    /// Gives every frame back. Nothing is described any more.
    pub fn destroy<E: Env>(&mut self, env: &E) {
        self.free = None;
        self.frame_count = 0;
        while let Some(first) = self.frames.take() {
            // SAFETY: `extend` wrote a header there.
            self.frames = unsafe { env.map().to_ptr(first.start()).cast::<Header>().read().next };
            if let Some(slot) = env.slots().slot(first) {
                slot.release();
            }
            // SAFETY: O1: the frame came to `extend` and no reference into it is used any more; O2: order 0; O3: no table of
            // this crate's mapped it.
            env.frames()
                .free(unsafe { OwnedFrame::from_raw(first, Order::ZERO) });
        }
    }
}

//! Lazy freeing: many areas, one flush.
//!
//! A flush interrupts every CPU, since every CPU maps the kernel. So a freed area waits, still mapped and known to nobody,
//! until enough have come together; then all are unmapped, one shootdown makes every CPU forget them, and frames and ranges
//! come free.
//!
//! ```text
//!   lazy.head ─> area freed last ─> .. ─> area freed first        the links are in the areas' descriptions
//! ```
//!
//! Areas whose frames belong to somebody else do not wait: their owner may free the frames as soon as the call returns.
//!
//! Source: Linux `mm/vmalloc.c` (`__purge_vmap_area_lazy`).

use kmem_hal::{FrameSink, ObjectAlloc, Page, PageRange, RawLock, VirtAddr};
use kmem_paging::format::Format;
use kmem_paging::{ChangeError, Cursor, Divisible, Env, Gather};
use kmem_vma_tree::Node;

use crate::area::{Area, AreaRef, Stage};
use crate::batch::{BATCH, Batch, Turn};
use crate::page::KernelPage;
use crate::request::NotAnArea;
use crate::vmalloc::{State, Vmalloc};

/// Leaves that are flushed together where the frame for a whole batch cannot be had.
const SMALL: usize = 16;
/// Leaves of a batch for each doubling of the number of CPUs.
const LEAVES_BY_DOUBLING: u64 = 48;
/// Areas of the chain that are read in one turn of the lock.
const TURN: usize = 16;

/// How much freed memory may wait for a purge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LazyLimit {
    frames: u64,
}

impl LazyLimit {
    /// 32 MiB, which Linux allows a machine of one CPU. Small areas make a [batch](Vmalloc::batch_leaves) long before.
    pub const DEFAULT: Self = Self::frames(8192);

    /// At most about so many frames: a free that goes beyond purges. 0: each free purges.
    #[must_use]
    pub const fn frames(frames: u64) -> Self {
        Self { frames }
    }
}

/// The areas that wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lazy {
    /// The area that was freed last.
    head: Option<AreaRef>,
    frames: u64,
    leaves: u64,
}

impl Lazy {
    pub const fn new() -> Self {
        Self {
            head: None,
            frames: 0,
            leaves: 0,
        }
    }

    pub const fn is_empty(&self) -> bool {
        self.head.is_none()
    }
}

impl<F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> Vmalloc<'_, F, E, N, L> {
    /// Takes an area back, by the address that was given for it; any address in its first page will do.
    ///
    /// The area is unusable at once. Its leaves go, its frames come free and its addresses may be given again at the next
    /// [`purge`](Self::purge), which many frees share. An area of borrowed frames is unmapped and flushed before the call
    /// returns.
    ///
    /// Context: may wait for other CPUs; not in interrupts.
    ///
    /// # Errors
    ///
    /// [`NotAnArea`] where nothing was given at that address, or it was freed already.
    #[doc(alias = "vfree")]
    #[doc(alias = "vunmap")]
    #[doc(alias = "iounmap")]
    pub fn free(&self, address: VirtAddr) -> Result<(), NotAnArea> {
        let page = Page::containing(address);
        if !self.window().contains(page) {
            return Err(NotAnArea(address));
        }
        let mut state = self.state.lock();
        let (at, area) = state.find(page).ok_or(NotAnArea(address))?;
        let usable = area.usable().ok_or(NotAnArea(address))?;
        if usable.first() != page || area.stage != Stage::Used {
            return Err(NotAnArea(address));
        }
        if area.borrowed {
            // Nobody else may free it from here on; it is in no chain.
            let stage = Stage::Freed;
            state.areas.set(at, Area { stage, ..area });
            drop(state);
            self.unmap(usable, true);
            self.give_range(page);
            return Ok(());
        }
        self.chain(&mut state, at, usable.count());
        let due =
            state.lazy.frames >= self.limit.frames || state.lazy.leaves >= self.batch_leaves();
        drop(state);
        if due {
            self.purge();
        }
        Ok(())
    }

    /// Adds an area with `frames` mapped frames to those that wait.
    fn chain(&self, state: &mut State, at: AreaRef, frames: u64) {
        let mut area = state.areas.get(at);
        (area.stage, area.next) = (Stage::Freed, state.lazy.head);
        state.areas.set(at, area);
        let huge = self.huge_order().map_or(1, |order| order.frames());
        state.lazy.head = Some(at);
        state.lazy.frames += frames;
        // An area of huge leaves has about as many as its size by theirs.
        state.lazy.leaves += if frames >= huge {
            frames / huge + frames % huge
        } else {
            frames
        };
    }

    /// Freed leaves that make a batch: a free that reaches as many purges.
    ///
    /// More on machines with more CPUs, where a shootdown costs more: 48 for one, 48 more whenever their number doubles, up to
    /// [`BATCH`]. (Linux lets 32 MiB wait by the same rule, for frames that come free before the flush; here they wait for it,
    /// and a small batch goes back into the array that the CPU takes its next frames from.)
    #[doc(alias = "lazy_max_pages")]
    #[must_use]
    pub fn batch_leaves(&self) -> u64 {
        let cpus = kmem_hal::Cpu::count(self.table.env().cpu());
        let doublings = u64::from(u32::BITS - cpus.leading_zeros());
        (LEAVES_BY_DOUBLING * doublings.max(1)).min(BATCH as u64)
    }

    /// Unmaps every freed area, flushes once, and gives frames and addresses back.
    ///
    /// When it returns, every area that was freed before the call is unmapped on every CPU: it waits for a purge under way, which
    /// may have taken some of them.
    ///
    /// Context: may wait for other CPUs; not in interrupts.
    #[doc(alias = "vm_unmap_aliases")]
    pub fn purge(&self) {
        let env = self.table.env();
        let first = self.batch.frame_count() == 0 && !self.state.lock().lazy.is_empty();
        let frame = first.then(|| Batch::take_frame(env)).flatten();
        let mut turn = self.batch.turn(env);
        let unused = frame.and_then(|frame| turn.keep(frame, env).err());
        self.purge_in(&mut turn);
        drop(turn);
        if let Some(frame) = unused {
            env.frames().free(frame);
        }
    }

    fn purge_in(&self, turn: &mut Turn<'_>) {
        let waiting = self.state.lock().take_lazy();
        if waiting.is_empty() {
            return;
        }
        let whole = turn.with(self.table, |gather| {
            self.unmap_waiting(waiting.head, gather);
        });
        if !whole {
            self.unmap_waiting_small(waiting.head);
        }
        self.give_waiting(waiting.head);
    }

    #[cold]
    #[inline(never)]
    fn unmap_waiting_small(&self, head: Option<AreaRef>) {
        let mut gather = self.table.gather::<SMALL>();
        self.unmap_waiting(head, &mut gather);
    }

    /// Unmaps the areas of a chain that this call took, with one flush for as much as the gather holds.
    fn unmap_waiting<const G: usize>(
        &self,
        mut next: Option<AreaRef>,
        gather: &mut Gather<'_, F, E, KernelPage, G>,
    ) {
        let Ok(mut cursor) = self.table.cursor(self.window()) else {
            return;
        };
        let env = self.table.env();
        let mut give = |page: KernelPage| page.release(env.slots(), env.frames());
        let mut turn = [None; TURN];
        while next.is_some() {
            let state = self.state.lock();
            for place in &mut turn {
                let area = next.map(|at| state.areas.get(at));
                *place = area.and_then(|area| area.usable());
                next = area.and_then(|area| area.next);
            }
            drop(state);
            for &range in turn.iter().flatten() {
                unmap_all(&mut cursor, range, gather, &mut give);
            }
            cursor.release();
        }
        gather.commit(give);
    }

    /// Makes the areas of a chain ready.
    fn give_waiting(&self, mut next: Option<AreaRef>) {
        let mut state = self.state.lock();
        while let Some(at) = next {
            next = state.areas.get(at).next;
            self.end(&mut state, at);
        }
        state.purging = false;
        drop(state);
        self.give_nodes();
    }

    /// Unmaps and flushes the pages of one area now, and frees their frames unless they are `borrowed`.
    #[inline(never)]
    pub(crate) fn unmap(&self, range: PageRange, borrowed: bool) {
        let Ok(mut cursor) = self.table.cursor(range) else {
            return;
        };
        let mut gather = self.table.gather::<SMALL>();
        let env = self.table.env();
        let mut give = |page: KernelPage| {
            if !borrowed {
                page.release(env.slots(), env.frames());
            }
        };
        unmap_all(&mut cursor, range, &mut gather, &mut give);
        drop(cursor);
        gather.commit(give);
    }
}

/// Unmaps `range`; where the gather is full meanwhile it is committed, and `give` gets what came out.
///
/// What is in the gather afterwards is the caller's to commit, with no table held.
pub(crate) fn unmap_all<F: Format, E: Env, H: Divisible, const G: usize>(
    cursor: &mut Cursor<'_, F, E, H>,
    range: PageRange,
    gather: &mut Gather<'_, F, E, H, G>,
    give: &mut impl FnMut(H),
) {
    let mut rest = Some(range);
    while let Some(range) = rest {
        rest = None;
        if let Err(ChangeError::Full { next }) = cursor.unmap(range, gather) {
            cursor.release();
            gather.commit(&mut *give);
            rest = PageRange::new(next, range.last());
        }
    }
}

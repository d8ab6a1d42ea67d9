//! Page-table isolation: a root for the kernel, and one for user mode in which the kernel is not.
//!
//! A processor that reads ahead of its permission checks (Meltdown, CVE-2017-5754) lets a program see whatever its page tables map, the
//! kernel's pages included. So the tables that user mode runs on map the kernel's not at all, but for the few pages that it takes to get in
//! and out: the trampoline.
//!
//! ```text
//!                    own part (user)               borrowed part (kernel)
//!   root             0 .................. 255      256 .................. 511 ──> the kernel table's: everything
//!                    │ the same tables │
//!   root + 1 frame   0 .................. 255      256 .................. 511 ──> the trampoline table's: entry code, entry stacks,
//!                                                                                descriptor tables
//! ```
//!
//! The trampoline table is an ordinary table of the kernel's that maps those pages at the addresses that they have in the kernel's, and
//! [lends](PageTable::lend_from) them. What is mapped in the own part is there for both roots: they differ in the top table alone.
//!
//! Invariants
//! - `R1`: the user root lies in the frame after the root, which has an even number; so whoever knows one knows the other.
//! - `R2`: own entries of the two top tables lead to the same tables, a moment excepted in which the user root lacks one that was just
//!   added (user mode faults, and finds it when it comes back). They change under the root's lock, before the flush that covers the change.
//! - `R3`: the user root's borrowed entries are the trampoline table's, which never change (`P3`).
//! - `R4`: the MMU means the user root wherever it is asked about the root ([`Mmu::isolates`]): it is loaded where either is, and a CPU that ran
//!   user mode alone is told of every change.
//!
//! The kernel leaves CR4.PGE clear: a global translation that it used would be there in user mode too, whatever root is loaded. Linux does the same.
//!
//! Costs: a frame a space, a store more where a top entry changes, and two loads of CR3 each way in and out, which drop nothing where the
//! processor has tags. [`AsidMmu`](crate::AsidMmu) with isolation drops pages under both tags.
//!
//! Does not handle: formats with fewer than four levels, whose top entries are too wide to keep the kernel out of.
//!
//! Source: Linux arch/x86/mm/pti.c and asm/pgtable.h (`kernel_to_user_pgdp`): the pair of frames. Lipp et al., Meltdown, 2018.

use kmem_hal::{
    AllocError, Context, Frame, FrameHandle, FrameRequest, FrameSink, FrameSource, Mmu, Order,
    OwnedFrame, Page, PhysAddr, PhysMap,
};

use crate::cache;
use crate::env::Env;
use crate::error::TableError;
use crate::format::{Format, level};
use crate::mutants::mutant;
use crate::node::Node;
use crate::table::PageTable;

/// The fewest levels that isolation makes sense with.
const FEWEST_LEVELS: usize = 4;

/// The frame of the user root that belongs to a root (`R1`).
pub(crate) fn user_root(root: Frame) -> Frame {
    Frame::from_number(root.number() | 1)
}

impl<F: Format, E: Env, H: FrameHandle> PageTable<F, E, H> {
    /// As [`sharing`](Self::sharing), with a second root for user mode that shares the upper part of `trampoline` instead.
    ///
    /// Both lenders must have called [`lend_from`](Self::lend_from) for the part. The user root's frame is the one after
    /// [`root`](Self::root)'s.
    ///
    /// # Errors
    ///
    /// [`TableError`]; [`TableError::BadLevels`] where the format has fewer than four levels, [`TableError::OneRoot`] where the environment's
    /// MMU does not know of user roots.
    ///
    /// # Examples
    ///
    /// ```
    /// use kmem_hal::{DeviceFrame, OwnedFrame, Page};
    /// use kmem_paging::{Env, PageTable, TableError, format::{Format, X86_64}};
    ///
    /// /// A space for a program: the kernel's upper half in the kernel, the trampoline's in user mode.
    /// fn space<E: Env + Copy>(
    ///     env: E,
    ///     kernel: &PageTable<X86_64, E, DeviceFrame>,
    ///     trampoline: &PageTable<X86_64, E, DeviceFrame>,
    /// ) -> Result<PageTable<X86_64, E, OwnedFrame>, TableError> {
    ///     let half = Page::containing(X86_64::canonical(4).upper_start().unwrap());
    ///     kernel.lend_from(half)?;
    ///     trampoline.lend_from(half)?;
    ///     PageTable::isolated(env, kernel, trampoline, half)
    /// }
    /// ```
    #[doc(alias = "pti_clone_user_shared")]
    #[doc(alias = "KPTI")]
    #[doc(alias = "KAISER")]
    pub fn isolated<G: Env, K: FrameHandle, B: Env, L: FrameHandle>(
        env: E,
        kernel: &PageTable<F, G, K>,
        trampoline: &PageTable<F, B, L>,
        from: Page,
    ) -> Result<Self, TableError> {
        let index = kernel.top_index(from);
        if !kernel.lends(index)
            || !trampoline.lends(index)
            || kernel.levels() != trampoline.levels()
        {
            return Err(TableError::CannotShare);
        }
        Self::paired(env, &kernel.root_node(), &trampoline.root_node(), index)
    }

    /// Whether there is a second root for user mode.
    #[must_use]
    pub fn is_isolated(&self) -> bool {
        self.isolated
    }

    /// An isolated table whose roots have these upper parts from top entry `from` on.
    pub(crate) fn paired(
        env: E,
        kernel: &Node<'_, F>,
        trampoline: &Node<'_, F>,
        from: usize,
    ) -> Result<Self, TableError> {
        if !env.mmu().isolates() {
            return Err(TableError::OneRoot);
        }
        let levels = kernel.level;
        if levels < FEWEST_LEVELS || F::FIXED_TOP {
            return Err(TableError::BadLevels);
        }
        let root = make_roots::<F, E>(&env, levels).map_err(TableError::Memory)?;
        let mut table = Self::with_root(env, root, levels, from);
        table.isolated = true;
        let (own, user) = (table.root_node(), table.user_node());
        for index in from..level::<F>(levels).entries() {
            own.store(index, kernel.load(index));
            let word = if mutant!("isolation-shows-the-kernel") {
                kernel.load(index)
            } else {
                trampoline.load(index)
            };
            user.store(index, word);
        }
        Ok(table)
    }

    /// The user root's table.
    pub(crate) fn user_node(&self) -> Node<'_, F> {
        // SAFETY: R1: made by `make_roots`, of the root's level, and given back with it.
        unsafe { Node::new(self.env(), user_root(self.root_frame()), self.levels()) }
    }

    /// Writes a top entry into the user root as well. The caller holds the root's lock.
    #[inline(always)]
    pub(crate) fn mirror(&self, node: &Node<'_, F>, index: usize, word: u64) {
        if node.level >= FEWEST_LEVELS && node.level == self.levels() && self.isolated {
            self.mirror_slowly(index, word);
        }
    }

    #[cold]
    fn mirror_slowly(&self, index: usize, word: u64) {
        if word == 0 && mutant!("isolation-keeps-old-tops") {
            return;
        }
        self.user_node().store(index, word);
    }

    /// Gives the user root back. Nobody has it loaded, and what was cached from it is flushed.
    pub(crate) fn drop_user_root(&self) {
        if !self.isolated {
            return;
        }
        let user = self.user_node();
        for index in 0..level::<F>(self.levels()).entries() {
            user.store(index, 0);
        }
        // SAFETY: O1: nobody but this table knew it; O3: the caller's promise; it holds zeros.
        cache::give(self.env(), unsafe {
            OwnedFrame::from_raw(user.frame, Order::ZERO)
        });
    }
}

/// Makes two private, empty roots in a row; gives the first.
fn make_roots<F: Format, E: Env>(env: &E, levels: usize) -> Result<Frame, AllocError> {
    let reach = env.map().reach();
    let limit = F::ROOT_FRAME_LIMIT.min(reach.end_number()) << kmem_hal::PAGE_SHIFT;
    let pair = Order::new(1).unwrap_or(Order::ZERO);
    let request = FrameRequest {
        max_address: PhysAddr::new(limit.wrapping_sub(1)),
        ..FrameRequest::new(pair).zeroed().context(Context::Atomic)
    };
    let frames = env.frames().alloc(&request)?;
    let slots = [frames.first(), user_root(frames.first())].map(|frame| env.slots().slot(frame));
    if !reach.contains(frames.first()) || slots.iter().any(Option::is_none) {
        env.frames().free(frames);
        return Err(AllocError::Unsatisfiable);
    }
    let (root, _) = frames.into_raw();
    for frame in [root, user_root(root)] {
        // SAFETY: the frames are private, zero, in reach and have slots.
        unsafe { Node::<F>::new(env, frame, levels) }.claim(Page::ZERO, root);
    }
    Ok(root)
}

//! Rows and pages of heads: what each CPU has of 64 caches, and each node behind the first.
//!
//! ```text
//!   row: [ CPU 0 ][ CPU 1 ] ... [ node 1 ][ node 2 ] ...      one pointer each
//!            |                       └─> 64 nodes' parts of caches, made with the row, in the node's memory
//!            └─> page of 64 heads, made when the CPU first needs it, from whichever context that is in
//! ```

use core::ptr::{self, NonNull};

use kmem_hal::sync::Ordering;
use kmem_hal::{
    AllocError, Cpu, CpuId, Frame, FrameRequest, FrameTag, NodeId, NodePolicy, Order, PhysMap,
    Pinned,
};

use crate::block;
use crate::head::{Head, HeadPage, Row};
use crate::node::{NodePage, NodeRow};
use crate::platform::Platform;
use crate::raw::RawCache;
use crate::system::SlabSystem;

/// What a row is made of.
#[derive(Clone, Copy)]
pub struct RowOf<L> {
    /// One place per CPU.
    pub heads: *const Row,
    /// How many nodes there are.
    pub nodes: u16,
    /// One place for each node behind the first; null where there is none.
    pub others: *const NodeRow<L>,
}

impl<P: Platform> SlabSystem<P> {
    /// Prepares heads for a CPU that is about to run.
    ///
    /// Optional: a CPU gets its heads at its first allocation as well, from whichever context that is in.
    ///
    /// # Errors
    ///
    /// [`AllocError`] where there is no memory; [`AllocError::Unsatisfiable`] for a CPU beyond the platform's count.
    pub fn cpu_online(&self, cpu: CpuId) -> Result<(), AllocError> {
        let platform = self.platform().ok_or(AllocError::NotInitialised)?;
        if cpu.get() >= platform.cpu().count() {
            return Err(AllocError::Unsatisfiable);
        }
        for row in &self.rows {
            let row = row.load(Ordering::Acquire);
            if !row.is_null() && self.head_page(platform, row, cpu).is_none() {
                return Err(AllocError::OutOfMemory);
            }
        }
        Ok(())
    }

    /// A row without heads, with the pages of all nodes.
    pub(crate) fn new_row(&self, platform: &P) -> Result<NonNull<Row>, AllocError> {
        let (cpus, others) = (
            platform.cpu().count() as usize,
            usize::from(self.nodes()) - 1,
        );
        let order = Self::row_order(cpus, others).ok_or(AllocError::Unsatisfiable)?;
        let (frame, memory) = block::take(platform, order)?;
        let row = memory.cast::<Row>();
        for cpu in 0..cpus {
            // SAFETY: the block holds `cpus` pointers and more, and belongs to this call.
            unsafe { row.add(cpu).write(Row::new(ptr::null_mut())) };
        }
        // SAFETY: behind them it holds `others` pointers.
        let nodes = unsafe { row.add(cpus) }.cast::<NodeRow<P::Lock>>();
        for at in 0..others {
            match self.node_page(platform, NodeId::new(at as u16 + 1)) {
                // SAFETY: as above.
                Ok(page) => unsafe { nodes.add(at).write(NodeRow::new(page.as_ptr())) },
                Err(error) => {
                    // SAFETY: `at` pages were made, and nobody has seen the row.
                    unsafe {
                        self.give_node_pages(platform, nodes.as_ptr(), at);
                        block::give(platform, frame, order);
                    }
                    return Err(error);
                }
            }
        }
        self.own_frames.fetch_add(order.frames(), Ordering::Relaxed);
        Ok(row)
    }

    /// Gives a row back that has no heads.
    ///
    /// # Safety
    ///
    /// It came from [`new_row`](Self::new_row), and nobody has seen it.
    pub(crate) unsafe fn give_row(&self, platform: &P, row: NonNull<Row>) {
        let (cpus, others) = (
            platform.cpu().count() as usize,
            usize::from(self.nodes()) - 1,
        );
        let frame = Frame::containing(platform.map().to_phys(row.as_ptr().cast()));
        // SAFETY: the nodes' places lie behind those of the CPUs; the rest is the caller's promise.
        unsafe { self.give_node_pages(platform, row.as_ptr().add(cpus).cast(), others) };
        if let Some(order) = Self::row_order(cpus, others) {
            // SAFETY: the block came from `new_row`, and nobody uses it by contract.
            unsafe { block::give(platform, frame, order) };
            self.own_frames.fetch_sub(order.frames(), Ordering::Relaxed);
        }
    }

    /// The order of a row's block.
    pub(crate) fn row_order(cpus: usize, others: usize) -> Option<Order> {
        Order::for_bytes((cpus * size_of::<Row>() + others * size_of::<NodeRow<P::Lock>>()) as u64)
    }

    /// Memory for 64 caches' parts of a node, not yet written, from that node's memory if there is some.
    fn node_page(
        &self,
        platform: &P,
        node: NodeId,
    ) -> Result<NonNull<NodePage<P::Lock>>, AllocError> {
        let order = Order::for_bytes(size_of::<NodePage<P::Lock>>() as u64)
            .ok_or(AllocError::Unsatisfiable)?;
        let request = FrameRequest::new(order).node(NodePolicy::Preferred(node));
        let (_, memory) = block::take_for(platform, &request, FrameTag::Kernel)?;
        self.own_frames.fetch_add(order.frames(), Ordering::Relaxed);
        Ok(memory.cast())
    }

    /// Gives the first `count` node pages of a row back.
    ///
    /// # Safety
    ///
    /// They were made, and nobody uses them, nor will.
    pub(crate) unsafe fn give_node_pages(
        &self,
        platform: &P,
        nodes: *const NodeRow<P::Lock>,
        count: usize,
    ) {
        for at in 0..count {
            // SAFETY: the caller's promise.
            let page = unsafe { &*nodes.add(at) }.load(Ordering::Acquire);
            let frame = Frame::containing(platform.map().to_phys(page.cast()));
            if let Some(order) = Order::for_bytes(size_of::<NodePage<P::Lock>>() as u64) {
                // SAFETY: the block was taken by `node_page`, and nobody uses it by contract.
                unsafe { block::give(platform, frame, order) };
                self.own_frames.fetch_sub(order.frames(), Ordering::Relaxed);
            }
        }
    }

    /// A row's parts.
    pub(crate) fn parts_of(&self, platform: &P, heads: *const Row) -> RowOf<P::Lock> {
        let nodes = self.nodes();
        let others = match nodes {
            1 => ptr::null(),
            // Behind the CPUs' pointers.
            _ => heads.wrapping_add(platform.cpu().count() as usize).cast(),
        };
        RowOf {
            heads,
            nodes,
            others,
        }
    }

    /// The page of heads of `cpu` in `row`, made if it is missing; `None` where there is no memory.
    pub(crate) fn head_page(&self, platform: &P, row: *const Row, cpu: CpuId) -> Option<&HeadPage> {
        // SAFETY: a row has a place for every CPU below `count` (hal C3), and lives as long as the system.
        let place = unsafe { &*row.add(cpu.index()) };
        let page = place.load(Ordering::Acquire);
        // SAFETY: pages in a row live as long as the system.
        if let Some(page) = unsafe { page.as_ref() } {
            return Some(page);
        }
        let order = Order::for_bytes(size_of::<HeadPage>() as u64)?;
        let (frame, memory) = block::take(platform, order).ok()?;
        let made = memory.cast::<HeadPage>();
        // SAFETY: the block is large enough, page-aligned, and belongs to this call.
        unsafe { HeadPage::write_to(made) };
        let placed = place.compare_exchange(
            ptr::null_mut(),
            made.as_ptr(),
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        match placed {
            Ok(_) => {
                self.own_frames.fetch_add(order.frames(), Ordering::Relaxed);
                // SAFETY: in a row now.
                Some(unsafe { made.as_ref() })
            }
            Err(other) => {
                // SAFETY: nobody saw the page that lost.
                unsafe { block::give(platform, frame, order) };
                // SAFETY: an interrupt on this CPU, or `cpu_online`, put this one there.
                unsafe { other.as_ref() }
            }
        }
    }

    /// Whether a CPU has its first page of heads, which the registry's guard is in.
    pub(crate) fn has_first_page(&self, cpu: CpuId) -> bool {
        let row = self.first_row();
        // SAFETY: a row has a place for every CPU below `count` (hal C3), and lives as long as the system.
        !row.is_null()
            && !unsafe { &*row.add(cpu.index()) }
                .load(Ordering::Acquire)
                .is_null()
    }

    /// The pinned CPU's head of `cache`, made if it is missing; `None` where there is no memory for it.
    pub(crate) fn head<'s>(
        &'s self,
        cache: &RawCache<P::Lock>,
        pin: &Pinned<'_, P::Cpu>,
    ) -> Option<&'s Head> {
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        Some(
            self.head_page(platform, cache.row, pin.id())?
                .head(cache.index),
        )
    }

    /// The head of `cache` on `cpu`, if that CPU has one.
    pub(crate) fn head_of(&self, cache: &RawCache<P::Lock>, cpu: u32) -> Option<&Head> {
        // SAFETY: callers pass CPUs below `count`; the row and its pages live as long as the system.
        let page = unsafe {
            (*cache.row.add(cpu as usize))
                .load(Ordering::Acquire)
                .as_ref()
        }?;
        Some(page.head(cache.index))
    }
}

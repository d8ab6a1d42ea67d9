//! Rows and pages of heads: what each CPU has of 64 caches.
//!
//! A row has one pointer per CPU; the page behind it is made when the CPU first needs it, from whichever context that is in.

use core::ptr::{self, NonNull};

use kmem_hal::sync::Ordering;
use kmem_hal::{AllocError, Cpu, CpuId, Order, Pinned};

use crate::block;
use crate::head::{Head, HeadPage, Row};
use crate::platform::Platform;
use crate::raw::RawCache;
use crate::system::SlabSystem;

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

    pub(crate) fn new_row(&self, platform: &P) -> Result<NonNull<Row>, AllocError> {
        let cpus = platform.cpu().count() as usize;
        let order =
            Order::for_bytes((cpus * size_of::<Row>()) as u64).ok_or(AllocError::Unsatisfiable)?;
        let (_, memory) = block::take(platform, order)?;
        let row = memory.cast::<Row>();
        for cpu in 0..cpus {
            // SAFETY: the block holds `cpus` pointers and belongs to this call.
            unsafe { row.add(cpu).write(Row::new(ptr::null_mut())) };
        }
        self.own_frames.fetch_add(order.frames(), Ordering::Relaxed);
        Ok(row)
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
                .head(cache.column),
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
        Some(page.head(cache.column))
    }
}

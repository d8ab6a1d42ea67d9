//! Temporary mappings of one CPU: a page for a moment, at once, from anywhere.
//!
//! ```text
//!   window   | CPU 0: 16 pages | CPU 1: 16 pages | ...        a set bit of the CPU's word = a page in use
//!   map      lowest clear bit ── set it ── store the leaf
//!   unmap    store a payload ── forget it on this CPU ── clear the bit
//! ```
//!
//! For memory that the linear map does not hold (high memory of a 32-bit kernel). Nobody else uses a CPU's pages, so no
//! other CPU is told when a mapping ends. Code that interrupts a call on the same CPU takes the next page and has given it
//! back when the interrupted code goes on, so the word of bits needs no locked instruction.
//!
//! Costs: a walk of the table, a store, and one `invlpg` when it ends. Nothing waits, nothing is allocated.
//!
//! Context: any, interrupts and NMIs included, as long as the caller stays on its CPU until the mapping ends.
//!
//! Source: Linux `mm/highmem.c` (`__kmap_local_pfn_prot`), Documentation/mm/highmem.rst.

use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;

use kmem_hal::sync::{AtomicU32, AtomicU64, Ordering};
use kmem_hal::{
    Asid, CachePadded, Cpu, FlushRequest, FlushScope, Frame, FrameRange, Mmu, Page, PageRange,
    PhysAddr, PhysMap, Pinned, Root, VirtAddr,
};
use kmem_paging::format::Format;
use kmem_paging::{Attributes, Divisible, Env, MapError, PageTable, Rights};

use crate::window::{Window, vacant};

/// Pages that each CPU has: mappings that may be nested on it.
#[doc(alias = "KM_MAX_IDX")]
pub const LOCAL_DEPTH: u32 = 16;

const ALL: u32 = (1 << LOCAL_DEPTH) - 1;

/// Which of a CPU's pages are in use.
#[derive(Debug)]
pub struct LocalSlots(CachePadded<AtomicU32>);

impl LocalSlots {
    kmem_hal::const_new! {
        /// None.
        pub fn new() -> Self {
            Self(CachePadded::new(AtomicU32::new(0)))
        }
    }

    /// Mappings that the CPU has now.
    #[must_use]
    pub fn in_use(&self) -> u32 {
        self.0.load(Ordering::Relaxed).count_ones()
    }
}

impl Default for LocalSlots {
    fn default() -> Self {
        Self::new()
    }
}

/// Temporary mappings: the [`PhysMap`] of a machine whose linear map does not hold all memory.
///
/// `M` is the map of what the linear map holds; page tables lie there. Before [`init`](Self::init) frames beyond cannot be
/// reached.
pub struct LocalMap<'a, F: Format, M: PhysMap, U: Mmu, C: Cpu> {
    low: M,
    mmu: U,
    cpu: C,
    slots: &'a [LocalSlots],
    /// One more than the root's frame; 0 before `init`.
    root: AtomicU64,
    levels: AtomicU32,
    first: AtomicU64,
    _format: PhantomData<F>,
}

impl<'a, F: Format, M: PhysMap, U: Mmu, C: Cpu> LocalMap<'a, F, M, U, C> {
    kmem_hal::const_new! {
        /// A map without a window yet; `slots` has one entry for each CPU that there may be.
        pub fn new(low: M, mmu: U, cpu: C, slots: &'a [LocalSlots]) -> Self {
            Self {
                low,
                mmu,
                cpu,
                slots,
                root: AtomicU64::new(0),
                levels: AtomicU32::new(0),
                first: AtomicU64::new(0),
                _format: PhantomData,
            }
        }
    }

    /// Which CPU runs this: what [`map`](Self::map) wants a pin of.
    #[must_use]
    pub fn cpu(&self) -> &C {
        &self.cpu
    }

    /// Pages that the window takes.
    #[must_use]
    pub fn window_pages(&self) -> u64 {
        self.slots.len() as u64 * u64::from(LOCAL_DEPTH)
    }

    /// Makes the window at `first`, in the kernel's table: once, at boot, before other CPUs map anything.
    ///
    /// # Errors
    ///
    /// [`MapError`]: no memory for its tables, something is there, or the table does not translate it.
    pub fn init<E: Env, H: Divisible>(
        &self,
        table: &PageTable<F, E, H>,
        first: Page,
    ) -> Result<(), MapError> {
        let pages =
            PageRange::with_count(first, self.window_pages()).ok_or(MapError::OutOfRange)?;
        let window = Window::new(table, pages)?;
        self.first.store(first.number(), Ordering::Relaxed);
        self.levels.store(table.levels() as u32, Ordering::Relaxed);
        self.root
            .store(window.root().number() + 1, Ordering::Release);
        Ok(())
    }

    /// Gives the window back: the machine is going down, and nobody maps anything.
    pub fn retire<E: Env, H: Divisible>(&self, table: &PageTable<F, E, H>) {
        if let Some(window) = self.window() {
            self.root.store(0, Ordering::Release);
            Window::clear(table, window.pages());
        }
    }

    fn window(&self) -> Option<Window<F>> {
        let root = self.root.load(Ordering::Acquire).checked_sub(1)?;
        let levels = self.levels.load(Ordering::Relaxed) as usize;
        let first = Page::from_number(self.first.load(Ordering::Relaxed));
        let pages = PageRange::with_count(first, self.window_pages())?;
        Some(Window::from_raw(Frame::from_number(root), levels, pages))
    }

    /// Maps `frame` for as long as the value lives; the pin keeps the caller on its CPU meanwhile.
    ///
    /// `None` where all of the CPU's pages are in use, or before [`init`](Self::init).
    #[doc(alias = "kmap_local_page")]
    #[doc(alias = "kmap_atomic")]
    pub fn map<'p>(
        &'p self,
        pin: &'p Pinned<'_, C>,
        frame: Frame,
    ) -> Option<LocalPage<'p, 'a, F, M, U, C>> {
        let cpu = pin.id().index();
        let slots = self.slots.get(cpu)?;
        let window = self.window()?;
        let attributes = Attributes::new(Rights::KERNEL_DATA.union(Rights::GLOBAL))
            .accessed()
            .dirty();
        if !F::can_encode(1, frame, &attributes) {
            return None;
        }
        // Whoever comes between the load and the store has given its bits back when this goes on.
        let used = slots.0.load(Ordering::Relaxed);
        let free = !used & ALL;
        if free == 0 {
            return None;
        }
        let bit = free.trailing_zeros();
        slots.0.store(used | 1 << bit, Ordering::Relaxed);
        let page = window.page(cpu as u64 * u64::from(LOCAL_DEPTH) + u64::from(bit))?;
        window.set(&self.low, page, F::leaf(1, frame, &attributes));
        if F::CACHES_ABSENT {
            self.forget(&window, page);
        }
        Some(LocalPage {
            map: self,
            page,
            _pin: PhantomData,
        })
    }

    fn forget(&self, window: &Window<F>, page: Page) {
        self.mmu.flush_local(&FlushRequest {
            root: Root {
                frame: window.root(),
                asid: Asid::ZERO,
            },
            scope: FlushScope::Pages {
                range: PageRange::single(page),
                stride: 1,
            },
            global: true,
            tables_freed: false,
        });
    }

    fn end(&self, page: Page) {
        let Some(window) = self.window() else {
            return;
        };
        let Some(index) = window.index(page) else {
            return;
        };
        window.set(&self.low, page, vacant::<F>());
        self.forget(&window, page);
        let depth = u64::from(LOCAL_DEPTH);
        if let Some(slots) = self.slots.get((index / depth) as usize) {
            let used = slots.0.load(Ordering::Relaxed);
            slots
                .0
                .store(used & !(1 << (index % depth)), Ordering::Relaxed);
        }
    }
}

/// A frame that is mapped until this is dropped; see [`LocalMap::map`].
#[must_use = "the mapping ends when the value is dropped"]
pub struct LocalPage<'p, 'a, F: Format, M: PhysMap, U: Mmu, C: Cpu> {
    map: &'p LocalMap<'a, F, M, U, C>,
    page: Page,
    // Keeps the caller on its CPU, and the value on its thread.
    _pin: PhantomData<(&'p (), *mut ())>,
}

impl<F: Format, M: PhysMap, U: Mmu, C: Cpu> LocalPage<'_, '_, F, M, U, C> {
    /// Where the frame's first byte is.
    #[must_use]
    pub fn address(&self) -> VirtAddr {
        self.page.start()
    }
}

impl<F: Format, M: PhysMap, U: Mmu, C: Cpu> Drop for LocalPage<'_, '_, F, M, U, C> {
    fn drop(&mut self) {
        self.map.end(self.page);
    }
}

impl<F: Format, M: PhysMap, U: Mmu, C: Cpu> fmt::Debug for LocalPage<'_, '_, F, M, U, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LocalPage({})", self.address())
    }
}

// SAFETY: P1 to P4 and P6 are those of `low`; P5: a page of the window is in use once (its bit), on one CPU, write-back.
unsafe impl<F: Format, M: PhysMap, U: Mmu, C: Cpu> PhysMap for LocalMap<'_, F, M, U, C> {
    #[inline]
    fn reach(&self) -> FrameRange {
        self.low.reach()
    }
    #[inline]
    fn to_ptr(&self, address: PhysAddr) -> *mut u8 {
        self.low.to_ptr(address)
    }
    #[inline]
    fn to_phys(&self, pointer: *const u8) -> PhysAddr {
        self.low.to_phys(pointer)
    }

    fn map_temporary(&self, frame: Frame) -> Option<NonNull<u8>> {
        if self.low.reach().contains(frame) {
            return NonNull::new(self.low.to_ptr(frame.start()));
        }
        let pin = self.cpu.pin();
        let mapped = self.map(&pin, frame)?;
        let address = mapped.address().as_u64() as usize;
        core::mem::forget(mapped);
        NonNull::new(core::ptr::with_exposed_provenance_mut(address))
    }

    unsafe fn unmap_temporary(&self, pointer: NonNull<u8>) {
        let page = Page::containing(VirtAddr::from_ptr(pointer.as_ptr()));
        self.end(page);
    }

    #[inline]
    unsafe fn words(&self, frame: Frame) -> &[AtomicU64] {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.low.words(frame) }
    }
    #[inline]
    unsafe fn words32(&self, frame: Frame) -> &[AtomicU32] {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.low.words32(frame) }
    }
    unsafe fn zero(&self, range: FrameRange) {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.low.zero(range) }
    }
    unsafe fn copy(&self, from: Frame, to: Frame) {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.low.copy(from, to) }
    }
}

impl<F: Format, M: PhysMap, U: Mmu, C: Cpu> fmt::Debug for LocalMap<'_, F, M, U, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalMap")
            .field("pages", &self.window().map(|window| window.pages()))
            .field("cpus", &self.slots.len())
            .finish_non_exhaustive()
    }
}
